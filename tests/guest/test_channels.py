"""Kernel messages over WebSockets: these tests need a real machine."""

import asyncio
import os
import random
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.exceptions import ConnectionClosed, WebSocketException

from tests.api.clients import Client, Proxy, agent, channels
from tests.guest.client import KEY, Sandbox, Server

ALL_BYTES = bytes(range(256))


def target(server: Server) -> Any:
    """A server in the form that the WebSocket clients take."""
    return SimpleNamespace(url=server.url, key=KEY)


@pytest.fixture(params=[True, False], ids=["v1", "legacy"])
async def client(request: pytest.FixtureRequest, server: Server, box: Sandbox) -> AsyncIterator[Client]:
    """A client of the shared sandbox's kernel, in each layout. After the test the kernel still works."""
    async with channels(target(server), box.model["kernelID"], v1=request.param) as client:
        yield client
        assert (await client.run("6 * 7", 60)).value == "42"


async def test_a_figure(client: Client) -> None:
    """A figure comes as a PNG, between busy and idle."""
    answer = await client.run("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()", 60)
    kinds = [message.state or message.kind for message in answer.messages if message.channel == "iopub"]
    assert kinds == ["busy", "execute_input", "display_data", "idle"]
    assert answer.all("display_data")[0].content["data"]["image/png"].startswith("iVBOR")


async def test_comms_carry_all_bytes(client: Client) -> None:
    """A megabyte of buffers, with all byte values, goes both ways unchanged."""
    code = """
def opened(comm, message):
    comm.on_msg(lambda message: comm.send({}, buffers=message["buffers"]))
get_ipython().kernel.comm_manager.register_target("echo", opened)
"""
    await client.run(code, 60)
    comm, buffers = uuid.uuid4().hex, [ALL_BYTES, b"", ALL_BYTES * 4000]
    await client.send("comm_open", {"comm_id": comm, "target_name": "echo", "data": {}})
    await client.send("comm_msg", {"comm_id": comm, "data": {}}, buffers=buffers)
    assert (await client.until_kind("comm_msg", 60)).buffers == buffers


@pytest.mark.parametrize(
    ("code", "match"),
    [
        ("import pandas as pd\npd.read_cs", "read_csv"),
        ("import numpy as np; np.linsp", "linspace"),
        ("import matplotlib.pyplot as plt\nplt.scat", "scatter"),
        ("import wave\nwave.op", "open"),
    ],
)
async def test_completion_in_the_first_cell(client: Client, code: str, match: str) -> None:
    """What a cell imports is completed before it has run, of warm modules and of others."""
    begun = time.monotonic()
    answer = await client.answer(await client.send("complete_request", {"code": code, "cursor_pos": len(code)}), 60)
    print(f"completed in {time.monotonic() - begun:.2f} s")
    assert match in [text.rpartition(".")[2] for text in answer.reply["matches"]]


async def test_widgets_are_there(client: Client) -> None:
    """ipywidgets opens its comms as JupyterLab expects them."""
    answer = await client.run("import ipywidgets; ipywidgets.IntSlider()", 120)
    assert {message.content["target_name"] for message in answer.all("comm_open")} == {"jupyter.widget"}
    (result,) = answer.all("execute_result") + answer.all("display_data")
    assert "application/vnd.jupyter.widget-view+json" in result.content["data"]


async def test_input_and_control(client: Client) -> None:
    """While a cell asks its client for input, the control channel and the debugger answer."""
    request = await client.start("print(input('name: '))")
    asked = await client.until_kind("input_request", 60)
    assert (await client.ask("kernel_info_request", channel="control")).reply["status"] == "ok"
    debugger = await client.ask("debug_request", {"type": "request", "seq": 1, "command": "debugInfo"}, "control")
    assert debugger.reply["success"] is True
    await client.send("input_reply", {"value": "x", "status": "ok"}, "stdin", parent=asked.header)
    assert (await client.answer(request, 60)).text == "x\n"


@pytest.mark.parametrize("by", ["message", "REST"])
async def test_an_interrupt_overtakes_output(client: Client, server: Server, by: str) -> None:
    """An interrupt reaches the kernel in under a second, also while 20 MB of output are under way to the client."""
    code = """
        import time
        try:
            for _ in range(20):
                print("x" * 1_000_000, flush=True)
            time.sleep(30)
        except KeyboardInterrupt:
            at = time.time()
    """
    request = await client.start(code)
    await client.until_kind("stream", 60)
    sent = time.time()
    if by == "message":
        await client.send("interrupt_request", {}, "control")
    else:
        await asyncio.to_thread(server.post, f"/api/kernels/{client.kernel}/interrupt")
    await client.answer(request, 60)
    at = float((await client.run("at", 60)).value)
    assert -0.1 < at - sent < 1 * server.scale  # the clocks may differ by a few milliseconds


@pytest.mark.parametrize(
    ("code", "cause"),
    [("os._exit(3)", {"exitCode": 3}), ("os.kill(os.getpid(), 9)", {"exitCode": 137, "signal": 9})],
    ids=["exit", "SIGKILL"],
)
async def test_a_kernel_that_ends(client: Client, code: str, cause: dict[str, int]) -> None:
    """The cell of a kernel that ends gets an error. Clients hear `restarting`, why, and then `idle`. Files stay."""
    await client.run("open('kept', 'w').close()", 60)
    answer = await client.run(f"import os, time; print('.', flush=True); time.sleep(0.5); {code}", 60)
    assert [message.kind for message in answer.messages][-4:-1] == ["stream", "error", "execute_reply"]
    told = [message for message in client.messages if message.state == "restarting"]
    if not told:
        told = (await client.until_state("restarting", 60))[-1:]
    assert cause.items() <= told[0].metadata["cellvm"].items()
    await client.until_state("idle", 60)
    assert (await client.run("import os; os.path.exists('kept')", 60)).value == "True"


async def test_r14_cuts(server: Server, box: Sandbox) -> None:
    """A client that is cut off at 30 random points, and resumes after its last number, gets each message once."""
    rng, text, is_over = random.Random(14), "", False
    direct = target(server)
    async with (
        Proxy(
            urlsplit(server.url).port or 0, lambda: int(10 ** rng.uniform(0, 5)) if proxy.cuts < 30 else None
        ) as proxy,
        channels(direct, box.model["kernelID"]) as client,
    ):
        request = await client.start("for n in range(100_000): print('line', n)")
        seen = (await client.until_kind("execute_input", 60)).seq
        cut = SimpleNamespace(url=proxy.url, key=KEY)
        while not is_over:
            with suppress(WebSocketException, ConnectionError, EOFError):
                async with channels(cut, box.model["kernelID"], since=seen) as other:
                    while not is_over:
                        message = await other.receive(60)
                        assert message.seq > seen
                        seen = message.seq
                        text += message.content["text"] if message.kind == "stream" else ""
                        is_over = message.state == "idle" and message.parent["msg_id"] == request
        assert proxy.cuts == 30
        await client.answer(request, 60)
    assert text == "".join(f"line {n}\n" for n in range(100_000))


async def test_r8_a_client_that_does_not_read(server: Server, box: Sandbox) -> None:
    """While 100 MB are printed the server grows by 32 MiB at most. Afterwards the client gets them in order."""
    code = "for n in range(1000): print(f'{n:09d} ' + 'x' * 99_989)"
    async with channels(target(server), box.model["kernelID"], max_queue=1) as client:
        with server.memory_grows_at_most(32 << 20):
            request = await client.start(code)
            await asyncio.sleep(5 * server.scale)
        answer = await client.answer(request, 60)
        assert answer.text == "".join(f"{n:09d} {'x' * 99_989}\n" for n in range(1000))
        assert (await client.run("1", 60)).value == "1"


@pytest.mark.alone
async def test_r2_the_machine_is_killed(start_server: Callable[..., Server]) -> None:
    """The clients of a killed machine are closed with 4410 within a second, and its kernel is listed as dead."""
    server = start_server(pool_size=0)
    kernel = server.post("/api/kernels").json()
    (machine,) = server.machines()
    async with (
        channels(target(server), kernel["id"]) as client,
        agent(target(server), kernel["sandbox_id"]) as other,
    ):
        await client.start("import time; print('.', flush=True); time.sleep(60)")
        await client.until_kind("stream", 60)
        os.kill(machine, signal.SIGKILL)
        begun = time.monotonic()
        assert await client.close_code() == 4410
        with pytest.raises(ConnectionClosed):
            await other.until("nothing more")
        assert other.socket.close_code == 4410
        assert time.monotonic() - begun < 1
    model = server.get(f"/api/kernels/{kernel['id']}").json()
    assert (model["execution_state"], "died" in model["reason"]) == ("dead", True)


async def test_a_shutdown_ends_the_machine(server: Server) -> None:
    """After a client's shutdown_request the kernel and its machine are gone."""
    kernel = server.post("/api/kernels", json={"name": "base"}).json()
    async with channels(target(server), kernel["id"]) as client:
        await client.send("shutdown_request", {"restart": False}, "control")
        await client.until(lambda message: (message.kind, message.channel) == ("shutdown_reply", "control"), 60)
        assert await client.close_code() == 4410
    assert server.get(f"/api/kernels/{kernel['id']}").status_code == 404
    assert server.get(f"/sandboxes/{kernel['sandbox_id']}").status_code == 404
