"""Times of E2B's Python SDK beside plain REST of the same server, in turns: python bench.py URL [SANDBOX]

With a sandbox it only runs 100 commands in it at once. E2B_API_KEY is set. Each sample is a line, [name, value], in ms
or MB/s.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

URL = sys.argv[1]
os.environ |= {"E2B_API_URL": URL, "E2B_SANDBOX_URL": URL}

import httpx  # noqa: E402
from e2b_code_interpreter import AsyncSandbox, Sandbox  # noqa: E402

PATIENCE = 300
"""Seconds that one request may take."""
STREAMS = 100
COMMAND = "for n in 1 2 3 4 5; do echo $n; sleep 1; done"
BLOB = os.urandom(64 * 1024 * 1024)

rest = httpx.Client(base_url=URL, headers={"X-API-Key": os.environ["E2B_API_KEY"]}, timeout=PATIENCE)


def sample(name: str, value: float) -> None:
    print(json.dumps([name, value]), flush=True)


def timed(name: str, call: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = call()
    sample(name, (time.perf_counter() - started) * 1000)
    return result


def moved(name: str, call: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = call()
    sample(name, len(BLOB) / 1e6 / (time.perf_counter() - started))
    return result


def post(path: str, **request: Any) -> httpx.Response:
    return rest.post(path, **request).raise_for_status()


def first_by_sdk() -> Sandbox:
    box = Sandbox.create(timeout=600)
    assert box.run_code("1 + 1").text == "2"
    return box


def first_by_rest() -> str:
    sandbox: str = post("/sandboxes", json={"templateID": "code_interpreter", "timeout": 600}).json()["sandboxID"]
    post(f"/sandboxes/{sandbox}/execute", json={"code": "1 + 1"})
    return sandbox


def await_pool() -> None:
    while not rest.get("/health").json()["pool"][0]["ready"]:
        time.sleep(0.1)


def pairs() -> None:
    """A create with its first cell, a command, a file of 64 MiB: by the SDK and by REST."""
    rest.get("/health")
    Sandbox.list().next_items()  # so that both clients have a connection
    for _ in range(10):
        await_pool()
        box = timed("create, first cell: SDK", first_by_sdk)
        await_pool()
        rest.delete(f"/sandboxes/{timed('create, first cell: REST', first_by_rest)}")
        box.kill()
    with Sandbox.create(timeout=3600) as box:
        inside = f"/sandboxes/{box.sandbox_id}"
        login = {"cmd": "/bin/bash", "args": ["-l", "-c", "true"]}  # what the SDK asks for
        for _ in range(30):
            timed("command true: SDK", lambda: box.commands.run("true"))
            timed("command true: REST", lambda: post(f"{inside}/processes", json=login))
        for _ in range(5):
            moved("upload: SDK", lambda: box.files.write("blob", BLOB, request_timeout=PATIENCE))
            moved("upload: REST", lambda: post(f"{inside}/files", data={"path": "blob"}, files={"file": BLOB}))
            got = moved("download: SDK", lambda: box.files.read("blob", format="bytes", request_timeout=PATIENCE))
            assert got == BLOB
            got = moved("download: REST", lambda: rest.get(f"{inside}/files", params={"path": "blob"}).content)
            assert got == BLOB


async def streams(sandbox: str) -> None:
    """Commands at once in a sandbox, each with five lines in four seconds or more."""
    box = await AsyncSandbox.connect(sandbox, timeout=3600)
    started = time.perf_counter()
    ended = await asyncio.gather(*(box.commands.run(COMMAND, timeout=PATIENCE) for _ in range(STREAMS)))
    sample("command streams at once", (time.perf_counter() - started) * 1000)
    assert {each.stdout for each in ended} == {"1\n2\n3\n4\n5\n"}


if len(sys.argv) > 2:
    asyncio.run(streams(sys.argv[2]))
else:
    pairs()
sys.stdout.flush()
os._exit(0)  # the SDK's HTTP client now and then aborts while the interpreter ends
