"""A siege: what a well-behaved tenant sees of a server under attack, and what is left of it a minute after.

The tenant lives on another server, too, which nobody attacks. Both share the machine with the attackers. So what
differs between them is what the attack does to the server, and not what it takes from the processors.
"""

import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from math import log10
from pathlib import Path
from typing import Any

from websockets.asyncio.client import connect

from kernel_gateway.sandbox.key import new_key
from kernel_gateway.sandbox.store import Store
from tests.api.clients import ServerProcess, server_process
from tests.api.test_files import BOUNDARY, multipart
from tests.siege.attackers import ATTACKS

RECOVERY = 60
"""Seconds after the attack until everything must be as before."""
STEPS = ("create", "cell", "command", "upload", "stream")
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
COLOURS = dict(zip(STEPS, ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"), strict=True))


BEGUN = time.monotonic()


def now() -> float:
    """Seconds since the begin."""
    return time.monotonic() - BEGUN


class Tenant:
    """A good tenant of a server. `samples` are (when, step, seconds it took)."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.samples: list[tuple[float, str, float]] = []
        self.errors: list[str] = []

    async def step(self, name: str, method: str, path: str, expect: int, **fields: Any) -> Any:
        """Time one request of the good tenant, and note it if the answer is not the expected one."""
        begun = time.monotonic()
        answer = await self.server.call(method, path, **fields)
        self.samples.append((now(), name, time.monotonic() - begun))
        if answer.code != expect:
            self.errors.append(f"{name}: {answer.code} {answer.body[:300]!r}")
        return json.loads(answer.body or b"null")

    async def live(self) -> None:
        """One round of the good tenant: create, cell, command, upload, stream, delete."""
        made = await self.step("create", "POST", "/sandboxes", 201, body={"templateID": "base", "timeout": 120})
        box = made.get("sandboxID")
        if box is None:
            return
        try:
            cell = await self.step("cell", "POST", f"/sandboxes/{box}/execute", 200, body={"code": "1 + 1"})
            if cell["results"][0]["data"]["text/plain"] != "2":
                self.errors.append(f"cell: {cell}")
            command = {"cmd": "true"}
            await self.step("command", "POST", f"/sandboxes/{box}/processes", 200, body=command)
            body = multipart(("file", "data", bytes(1 << 20)))
            await self.step("upload", "POST", f"/sandboxes/{box}/files", 200, body=body, headers=FORM)
            await self.stream(box)
        finally:
            await self.server.call("DELETE", f"/sandboxes/{box}")

    async def stream(self, box: str) -> None:
        """A cell with output over the agents' WebSocket, to its end."""
        begun = time.monotonic()
        url = self.server.url.replace("http", "ws", 1) + f"/sandboxes/{box}/stream"
        async with connect(url, additional_headers={"Authorization": f"Bearer {self.server.key}"}) as socket:
            code = "for n in range(50): print(n, flush=True)"
            await socket.send(json.dumps({"type": "execute", "id": "x", "code": code}))
            text = ""
            while (event := json.loads(await socket.recv()))["type"] != "end":
                text += event.get("text") or ""
        self.samples.append((now(), "stream", time.monotonic() - begun))
        if text != "".join(f"{n}\n" for n in range(50)):
            self.errors.append(f"stream: {text!r}")

    def p95(self, step: str, begin: float, end: float) -> float:
        took = [each for at, name, each in self.samples if name == step and begin <= at < end]
        return statistics.quantiles(took, n=20, method="inclusive")[-1] if len(took) > 1 else sum(took)


class Siege:
    """The attacked server, and its peer that nobody attacks, each with a good tenant."""

    def __init__(self, attacked: ServerProcess, peer: ServerProcess) -> None:
        self.server = attacked
        self.attacked, self.peer = Tenant(attacked), Tenant(peer)
        self.memory: list[tuple[float, int]] = []
        self.phases: list[tuple[str, float]] = []

    def phase(self, name: str) -> None:
        self.phases.append((name, now()))

    def span(self, name: str) -> tuple[float, float]:
        """Begin and end of a phase."""
        index = next(n for n, (each, _) in enumerate(self.phases) if each == name)
        return self.phases[index][1], self.phases[index + 1][1]

    async def live_for(self, seconds: float) -> None:
        """Let both tenants live, in turns."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await self.attacked.live()
            await self.peer.live()

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Note the attacked server's memory all the while."""

        async def watch() -> None:
            while True:
                self.memory.append((now(), self.server.memory()))
                await asyncio.sleep(0.2)

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.server.process.pid}/fd").iterdir()))

    async def recovery(self, descriptors: int) -> float | None:
        """Seconds until nothing of the attack is left; None if RECOVERY is over."""
        begun = time.monotonic()
        while time.monotonic() - begun < RECOVERY:
            health = json.loads((await self.server.call("GET", "/health")).body)
            if health["sandboxes"] == 0 and self.descriptors() <= descriptors + 2:
                return time.monotonic() - begun
            await asyncio.sleep(0.5)
        return None

    def figures(self) -> dict[str, Any]:
        """For each step the p95 in seconds: in peace, under attack, and at the peer while the other was attacked."""
        quiet, siege = self.span("quiet"), self.span("siege")
        return {
            step: {
                "quiet": self.attacked.p95(step, *quiet),
                "attacked": self.attacked.p95(step, *siege),
                "peer": self.peer.p95(step, *siege),
            }
            for step in STEPS
        }

    def drawn(self) -> str:
        """The curves as an SVG: the tenant's times on a logarithmic scale of five decades from 1 ms, memory below."""
        width, height, end = 1000, 500, max(now(), 1)
        parts = []
        for n, (step, colour) in enumerate(COLOURS.items()):
            took = [(at / end, took) for at, name, took in self.attacked.samples if name == step]
            heights = [(x * width, 300 - 60 * min(max(log10(max(t, 1e-9) / 0.001), 0), 5)) for x, t in took]
            parts += [line(heights, colour), f'<text x="4" y="{20 + 14 * n}" fill="{colour}">{step}</text>']
        most = max((size for _, size in self.memory), default=1)
        parts.append(line([(at / end * width, height - size / most * 150) for at, size in self.memory], "black"))
        parts.append(f'<text x="4" y="345">memory, at most {most >> 20} MiB</text>')
        for name, at in self.phases:
            x = at / end * width
            parts.append(line([(x, 0), (x, height)], "grey") + f'<text x="{x + 3:.1f}" y="{height - 4}">{name}</text>')
        box = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>\n' + "\n".join(parts) + "\n</svg>\n"


def line(points: list[tuple[float, float]], colour: str) -> str:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline fill="none" stroke="{colour}" points="{text}"/>'


async def besieged(
    directory: Path, quiet: float, seconds: float, attacks: str = ATTACKS
) -> tuple[Siege, dict[str, Any]]:
    """Run a siege, and return it with its figures. `quiet` and `seconds` are how long peace and attack last."""
    flags = ("--max-sandboxes", "24", "--max-sandboxes-per-key", "10", "--max-creates-per-minute", "300")
    keys = [new_key() for _ in range(2)]
    async with server_process(directory / "attacked", *flags) as server, server_process(directory / "peer") as peer:
        with closing(Store(directory / "attacked" / "cellvm.db")) as store:
            for number, key in enumerate(keys):
                store.add_key(key, f"hostile{number}")
        siege = Siege(server, peer)
        async with siege.watched():
            siege.phase("warm")
            await siege.live_for(1)
            siege.phase("quiet")
            descriptors, memory = siege.descriptors(), server.memory()
            await siege.live_for(quiet)
            siege.phase("siege")
            attackers = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.siege.attackers", server.url, str(seconds), attacks, *keys,
                stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONASYNCIODEBUG": ""},
            )  # fmt: skip
            said = asyncio.create_task(attackers.communicate())
            await siege.live_for(seconds)
            siege.phase("after")
            answer, _ = await said
            recovered = await siege.recovery(descriptors)
            await siege.live_for(1)
            siege.phase("end")
        return siege, {
            "p95": siege.figures(),
            "rounds": sum(name == "stream" for _, name, _ in siege.attacked.samples),
            "errors": siege.attacked.errors,
            "memory": {"before": memory, "peak": max(size for _, size in siege.memory), "after": server.memory()},
            "recovered": recovered,
            "attackers": json.loads(answer.splitlines()[-1]),
        }
