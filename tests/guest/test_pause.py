"""Pause and resume of a real machine: whatever is in it, it comes back as it was, also after the server's restart."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.guest.client import KEY, Sandbox, Server, until

CYCLES = int(os.environ.get("CELLVM_PAUSE_CYCLES", "5"))
"""Cycles of the long test; the promise is tried with 20 of them."""
START = """
import hashlib, os, socket, threading, time
blob = os.urandom(64 << 20)
os.makedirs("/dev/shm/t", exist_ok=True)
open("/dev/shm/t/blob", "wb").write(blob)
objects = {"a": [1, {2, 3}], "f": (lambda x: x + len(blob))}
opened = open("/home/user/opened", "w+")
ticks = 0
def count():
    global ticks
    while True:
        ticks += 1
        time.sleep(0.02)
threading.Thread(target=count, daemon=True).start()
listener = socket.create_server(("127.0.0.1", 0))
near = socket.create_connection(listener.getsockname())
far, _ = listener.accept()
"""
CHECK = """
n = {n}
near.sendall(b"%d" % n)
received = int(far.recv(100))
opened.write("%d\\n" % n); opened.flush()
before = ticks
time.sleep(0.5)
found = {{"hash": hashlib.sha256(open("/dev/shm/t/blob", "rb").read()).hexdigest(), "ticks": ticks, "before": before,
  "received": received, "sum": objects["f"](1) + objects["a"][0], "written": open("/home/user/opened").read(),
  "files": sorted(os.listdir("/home/user/cycles")), "clock": time.time(), "pid": os.getpid()}}
found
"""


def paused(box: Sandbox) -> bool:
    return bool(box.get("").json()["status"] == "paused")


def without_machines(server: Server) -> bool:
    return not server.machines()


def resume(box: Sandbox, **fields: object) -> None:
    answer = box.post("/resume", json=fields)
    assert answer.status_code == 201, answer.text


def pause(box: Sandbox) -> None:
    answer = box.post("/pause")
    assert answer.status_code == 204, answer.text


class Shell:
    """A bash on a terminal, started as a command."""

    def __init__(self, box: Sandbox) -> None:
        self.box = box
        body = {"cmd": "bash", "args": ["--norc"], "pty": {"rows": 24, "cols": 80}, "tag": "shell"}
        answer = box.post("/commands", json=body)
        assert answer.status_code == 201, answer.text
        self.pid = answer.json()["pid"]

    def ask(self, line: str, mark: str) -> None:
        """Type a line, and wait until the terminal shows the mark."""
        since = self.box.get("/commands/shell").json()["seq"]
        assert self.box.post("/commands/shell/stdin", json={"text": line + "\n"}).status_code == 204
        stream = self.box.get(
            "/commands/shell", params={"since": since}, headers={"Accept": "application/x-ndjson"}, stream=True
        )
        seen = ""
        with stream:
            for raw in stream.iter_lines():
                seen += json.loads(raw).get("text", "")
                if mark in seen:
                    return
        raise AssertionError(seen)


@pytest.mark.timeout(120 + 120 * CYCLES, func_only=True)
def test_cycles(start_server: Callable[..., Server]) -> None:
    """R20: after each cycle all is as it was, and goes on: by request, by expiry, under load, over a killed server."""
    server = start_server(pool_size=0)
    answer = server.post("/sandboxes", json={"templateID": "code_interpreter", "timeout": 3600, "autoPause": True})
    box = Sandbox(server, answer.json())
    box.execute(START, timeout=120)
    digest = box.value("hashlib.sha256(blob).hexdigest()", timeout=60)
    box.shell("mkdir -p ~/cycles; (while :; do date >> /tmp/beats; sleep 0.2; done) >/dev/null 2>&1 &")
    shell = Shell(box)
    shell.ask("kept=1; echo ready-$((40+2))", "ready-42")
    pid = box.value("os.getpid()")
    ticks = 0
    for n in range(1, CYCLES + 1):
        box.shell(f"echo {n} > ~/cycles/{n:02d}")
        kind = ("request", "expiry", "load", "kill")[n % 4]
        if kind == "expiry":
            assert box.post("/timeout", json={"timeout": 1}).status_code == 204
            until(partial(paused, box), 60)
        elif kind == "load":
            burning = box.post("/commands", json={"cmd": "sh", "args": ["-c", "while :; do :; done"], "tag": f"b{n}"})
            assert burning.status_code == 201
            time.sleep(0.5)
            pause(box)
        else:
            pause(box)
        if kind == "kill":
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            server = start_server(pool_size=0)
            shell.box = box = Sandbox(server, server.get(f"/sandboxes/{box.id}").json())
        assert paused(box)
        until(partial(without_machines, server), 10)
        resume(box)
        found = box.value(CHECK.format(n=n), timeout=120)
        if kind == "load":
            assert box.post(f"/commands/b{n}/signal", json={"signal": "SIGKILL"}).status_code == 204
        assert found["hash"] == digest
        assert found["ticks"] > found["before"] >= ticks
        ticks = found["ticks"]
        assert (found["received"], found["pid"]) == (n, pid)
        assert found["sum"] == 1 + (64 << 20) + 1
        assert found["written"] == "".join(f"{each}\n" for each in range(1, n + 1))
        assert found["files"] == [f"{each:02d}" for each in range(1, n + 1)]
        assert abs(found["clock"] - time.time()) < 0.5 + 2 * server.scale
        shell.ask(f"echo kept-$kept-$(({n}+100))", f"kept-1-{n + 100}")
        beats = int(box.shell("wc -l < /tmp/beats; sleep 1").split()[0])
        assert int(box.shell("wc -l < /tmp/beats").split()[0]) > beats
    assert server.request("DELETE", f"/sandboxes/{box.id}").status_code == 204
    assert list((server.data / "paused").iterdir()) == []


def test_a_cell_runs_on(server: Server) -> None:
    """A cell that runs while its sandbox is paused goes on, and its result is there under its id."""
    with server.sandbox() as box:
        headers = {"Idempotency-Key": "long", "Accept": "application/x-ndjson"}
        code = {"code": "import time\nfor n in range(8):\n    print(n, flush=True)\n    time.sleep(0.5)", "timeout": 60}
        with box.post("/execute", json=code, headers=headers, stream=True) as running:
            lines = running.iter_lines()
            while json.loads(next(lines)).get("text") != "1\n":
                pass
            pause(box)
            last = [json.loads(line) for line in lines][-1]
        assert (last["type"], last["outcome"]) == ("end", "unknown")
        resume(box)
        stream = box.get("/executions/long", headers={"Accept": "application/x-ndjson"})
        events = [json.loads(line) for line in stream.iter_lines()]
        assert "".join(each.get("text", "") for each in events) == "".join(f"{n}\n" for n in range(8))
        assert events[-1]["outcome"] == "finished"


def test_randomness_is_fresh_and_the_users_own_stays(server: Server) -> None:
    """After a resume the kernel's generator is reseeded, and generators that the user has seeded go on."""
    with server.sandbox() as box:
        box.execute("import random, os\nrandom.seed(7)\nfirst = random.random()")
        expected = box.value("(lambda r: (r.random(), r.random())[1])(random.Random(7))")
        pause(box)
        resume(box)
        assert box.value("random.random()") == expected


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["memory", "memory.runs", "disk", "disk.runs", "state", "host", "machine.json"])
def test_damage(server: Server, name: str) -> None:
    """A bit that differs in any file is found, and the sandbox stays paused. With the right file it goes on."""
    with server.sandbox("base") as box:
        box.execute("x = 'whole'")
        box.shell("seq 100000 > numbers; sync")
        pause(box)
        path = server.data / "paused" / box.id / name
        kept = path.read_bytes()
        flipped(path)
        answer = box.post("/resume", json={})
        assert answer.status_code == 409, answer.text
        assert answer.json()["error"] in ("snapshot_corrupt", "snapshot_incompatible")
        assert answer.json()["error"] == "snapshot_corrupt" or name == "machine.json"
        path.write_bytes(kept[: len(kept) // 2])
        assert box.post("/resume", json={}).json()["error"] == "snapshot_corrupt"
        path.unlink()
        assert box.post("/resume", json={}).json()["error"] == "snapshot_corrupt"
        path.write_bytes(kept)
        resume(box)
        assert box.value("x") == "whole"


def test_another_host(server: Server) -> None:
    """A sandbox that was saved with another processor or QEMU is refused with a word of what differs."""
    with server.sandbox("base") as box:
        pause(box)
        path = server.data / "paused" / box.id / "machine.json"
        kept = path.read_text()
        manifest = json.loads(kept)
        for field, word in (("cpu", "processor"), ("qemu", "QEMU")):
            manifest["made_with"] = {**json.loads(kept)["made_with"], field: "another"}
            path.write_text(json.dumps(manifest))
            answer = box.post("/resume", json={})
            assert (answer.status_code, answer.json()["error"]) == (409, "snapshot_incompatible")
            assert word in answer.json()["message"]
        path.write_text(json.dumps(json.loads(kept) | {"template": "gone"}))
        assert "not offered" in box.post("/resume", json={}).json()["message"]
        path.write_text(kept)
        resume(box)


def test_a_template_that_was_built_anew(server: Server) -> None:
    """A paused sandbox keeps its template's snapshot by links, and goes on from it when the template is another now."""
    with server.sandbox("base") as box:
        box.execute("x = 'old'")
        pause(box)
        folder = server.data / "paused" / box.id
        kept = sorted(path.name for path in (folder / "template").iterdir())
        assert kept == ["disk", "initrd", "kernel", "manifest.json", "memory", "root", "state"]
        assert all(path.stat().st_nlink > 1 for path in (folder / "template").iterdir())
        # Another recipe: this sandbox's template is not the one that is offered now.
        for path in (folder / "machine.json", folder / "template" / "manifest.json"):
            content = json.loads(path.read_text())
            content["made_with"]["recipe"] = "an older one"
            path.unlink()
            path.write_text(json.dumps(content))
            path.chmod(0o600)
        resume(box)
        assert box.value("x") == "old"


def test_what_a_pause_costs(server: Server) -> None:
    """The files have what changed and little more, and nobody but the server's user may read them."""
    with server.sandbox() as box:
        box.execute("import os\nblob = os.urandom(100 << 20)", timeout=60)
        pause(box)
        folder = server.data / "paused" / box.id
        own = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        assert 100 << 20 <= own <= (100 << 20) * 1.2 + (32 << 20)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()} == {0o600}
        digest = hashlib.sha256((folder / "memory").read_bytes()).hexdigest()
        assert json.loads((folder / "machine.json").read_text())["files"]["memory"]["sha256"] == digest
        resume(box)


def test_a_full_disk(server: Server) -> None:
    """R7: without room on the disk the answer is 507, nothing is left there, and the sandbox still runs."""
    place = server.data / "paused"
    with server.sandbox("base") as box:
        box.execute("import os\nblob = os.urandom(32 << 20)\nticks = 1", timeout=60)
        for size in ("1m", "24m"):
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "full", place], check=True)
            try:
                answer = box.post("/pause")
                assert (answer.status_code, answer.json()["error"]) == (507, "insufficient_storage")
                assert list(place.iterdir()) == []
            finally:
                subprocess.run(["umount", place], check=True)
            assert box.value("[ticks, len(blob)]") == [1, 32 << 20]
        pause(box)
        resume(box)
        assert box.value("len(blob)") == 32 << 20


def test_a_server_that_is_stopped(start_server: Callable[..., Server]) -> None:
    """SIGTERM pauses what runs within 30 s, and the next server has it."""
    server = start_server(pool_size=0)
    boxes = [Sandbox(server, server.post("/sandboxes", json={"templateID": "base"}).json()) for _ in range(2)]
    for number, box in enumerate(boxes):
        box.execute(f"x = {number}")
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert time.monotonic() - begun < 30
    server = start_server(pool_size=0)
    listed = server.get("/sandboxes?state=paused", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert {each["sandboxID"] for each in listed} == {box.id for box in boxes}
    for number, box in enumerate(boxes):
        box.server = server
        resume(box)
        assert box.value("x") == number
        assert box.request("DELETE", "").status_code == 204
