"""The attackers, in a process of their own: `python -m tests.siege.attackers URL SECONDS ATTACKS KEY KEY`.

Two hostile tenants have the keys. Each has guests that flood the link, and plagues the server over HTTP. Strangers have
no key. Every load is bounded, and ends by itself after the time. The last line says what was done.
"""

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from guest_agent import wire
from guest_agent.wire import FrameType
from tests.api.test_files import BOUNDARY, multipart

HOSTILE = Path(__file__).with_name("hostile.py").read_bytes()
ATTACKS = "flood,queue,messages,service,strangers"
STRANGERS = 2_000
MIB = 1 << 20


def message(kind: str, content: bytes, parent: bytes = b"{}") -> bytes:
    """A kernel message as the agent sends it."""
    header = json.dumps({"msg_id": "m", "msg_type": kind, "session": "s"}).encode()
    parts = wire.pack_parts([b"iopub", header, parent, b"{}", content])
    return b"".join(b"".join(frame) for frame in wire.chunk(wire.KERNEL, parts))


VALUES = b"[" + b"[]," * (4 * MIB) + b"[]]"
LONG = b'{"msg_id":"' + b"x" * (4 * MIB) + b'"}'
FLOODS = {
    "events": wire.encode(FrameType.EVENT, wire.EVENTS, wire.KernelStatus(state="idle", reason="x")) * 1000,
    "credit": wire.credit(wire.KERNEL, 1) * 5000,
    "tiny": message("stream", b'{"name":"stdout","text":"x"}') * 2000,
    "headers": message("status", b'{"execution_state":"busy"}', LONG),
    "values": message("status", b'{"execution_state":"busy","other":' + VALUES + b"}"),
    "results": message("display_data", b'{"metadata":{},"data":{"application/json":' + VALUES + b"}}"),
    "garbage": random.Random(7).randbytes(MIB),
}


class Attack:
    """Everything that is done to one server."""

    def __init__(self, url: str, seconds: float) -> None:
        self.url = url
        self.host, self.port = url.rsplit("/", 1)[1].rsplit(":", 1)
        self.until = time.monotonic() + seconds
        self.seconds = seconds
        self.done: Counter[str] = Counter()
        self.http = AsyncHTTPClient(max_clients=400, max_body_size=256 * MIB)

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.until

    async def call(self, key: str, method: str, path: str, body: Any = None, data: bytes | None = None) -> HTTPResponse:
        kind = "application/json" if data is None else f"multipart/form-data; boundary={BOUNDARY}"
        data = data if body is None else json.dumps(body).encode()
        answer = await self.http.fetch(
            self.url + path,
            method=method,
            headers={"Authorization": f"Bearer {key}", "Content-Type": kind},
            body=data,
            allow_nonstandard_methods=True,
            request_timeout=30,
            raise_error=False,
        )
        self.done[f"{answer.code}"] += 1
        return answer

    @contextlib.asynccontextmanager
    async def box(self, key: str) -> AsyncIterator[str | None]:
        """A sandbox, or None if there is no room at present."""
        answer = await self.call(key, "POST", "/sandboxes", {"templateID": "base", "timeout": int(self.seconds) + 30})
        if answer.code != 201:
            await asyncio.sleep(1)
            yield None
            return
        name = json.loads(answer.body)["sandboxID"]
        try:
            yield name
        finally:
            await self.call(key, "DELETE", f"/sandboxes/{name}")

    async def again(self, what: str, attack: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Do something until the time is over. Whatever the server does to it is right."""
        while self.goes_on:
            begun = time.monotonic()
            with contextlib.suppress(OSError, WebSocketException, TimeoutError):
                self.done[what] += 1
                async with asyncio.timeout(max(self.until - time.monotonic(), 0.1)):
                    await attack(*args)
            await asyncio.sleep(max(0.2 - (time.monotonic() - begun), 0))

    # -- hostile guests

    async def flood(self, key: str, number: int) -> None:
        """A guest whose root floods the link in every way, one after the other."""
        kind = list(FLOODS)[(self.done["floods"] + number) % len(FLOODS)]
        async with self.box(key) as box:
            if box is None:
                return
            data = multipart(("file", "hostile.py", HOSTILE), ("file", "flood", FLOODS[kind]))
            await self.call(key, "POST", f"/sandboxes/{box}/files", data=data)
            command = {"cmd": sys.executable, "args": ["hostile.py", "flood", "5"], "timeout": 10}
            await self.call(key, "POST", f"/sandboxes/{box}/processes", command)
            self.done["floods"] += 1
            self.done[f"flood {kind}"] += 1

    # -- hostile tenants

    async def queue(self, key: str) -> None:
        """Much code that waits, large listings, exports and journals of one kernel, all at once."""
        async with self.box(key) as box:
            if box is None:
                return
            at = f"/sandboxes/{box}"
            mess = "import os, time\nfor n in range(20_000): open(f'f{n}' + 'x' * 100, 'w').close()\n"
            mess += "print('y' * 10_000_000)"
            await self.call(key, "POST", f"{at}/execute", {"code": mess, "timeout": 20})
            sleeping = asyncio.create_task(self.call(key, "POST", f"{at}/execute", {"code": "time.sleep(20)"}))
            requests = [
                *[("POST", f"{at}/execute", {"code": "#" + "x" * 3 * MIB}) for _ in range(20)],
                *[("GET", f"{at}/filesystem/list", None) for _ in range(10)],
                *[("GET", f"{at}/export", None) for _ in range(5)],
                *[("POST", f"{at}/processes", {"cmd": "sh", "args": ["-c", "yes 😀 | head -c 20000000"]})] * 10,
            ]
            await asyncio.gather(*(self.call(key, *each) for each in requests))
            await sleeping

    async def messages(self, key: str) -> None:
        """WebSocket messages that never end."""
        async with self.box(key) as box, contextlib.AsyncExitStack() as open_ones:
            if box is None:
                return
            for _ in range(10):
                url = self.url.replace("http", "ws", 1) + f"/sandboxes/{box}/stream"
                headers = {"Authorization": f"Bearer {key}"}
                socket = await open_ones.enter_async_context(connect(url, additional_headers=headers, open_timeout=10))

                async def endless() -> AsyncIterator[str]:
                    for _ in range(40):
                        yield "x" * MIB
                        await asyncio.sleep(0.05)
                    await asyncio.sleep(10)

                open_ones.push_async_callback(cancelled, asyncio.create_task(socket.send(endless())))
            await asyncio.sleep(5)

    async def service(self, key: str) -> None:
        """A public service that floods visitors who don't read."""
        async with self.box(key) as box, contextlib.AsyncExitStack() as visitors:
            if box is None:
                return
            code = (
                "import http.server, os, threading\nos.nice(19)\n"
                "class H(http.server.BaseHTTPRequestHandler):\n"
                "    def do_GET(self):\n"
                "        self.send_response(200); self.end_headers()\n"
                "        for _ in range(200): self.wfile.write(bytes(1 << 20))\n"
                "    def log_message(self, *_): pass\n"
                "s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), H)\n"
                "threading.Thread(target=s.serve_forever, daemon=True).start()\n"
                "print(s.server_port)"
            )
            answer = await self.call(key, "POST", f"/sandboxes/{box}/execute", {"code": code})
            port = json.loads(answer.body).get("stdout", "").strip()
            await self.call(key, "PUT", f"/sandboxes/{box}/ports", {"port": int(port), "public": True})
            for _ in range(100):
                _, writer = await asyncio.open_connection(self.host, int(self.port))
                visitors.callback(writer.close)
                writer.write(f"GET /sandboxes/{box}/ports/{port}/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            await asyncio.sleep(5)

    # -- strangers

    async def stranger(self, number: int) -> None:
        """A connection that begins a request and never ends it, or asks with a wrong key."""
        local = (f"127.0.1.{number % 200 + 1}", 0)
        reader, writer = await asyncio.open_connection(self.host, int(self.port), local_addr=local)
        try:
            key = f"e2b_{random.randbytes(20).hex()}"
            whole = b"" if number % 2 else b"\r\n\r\n"
            writer.write(f"GET /sandboxes HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {key}".encode() + whole)
            async with asyncio.timeout(15):
                while await reader.read(65536):
                    pass
        finally:
            writer.close()

    async def all(self, keys: list[str], names: list[str]) -> None:
        """Everything that is named, at once."""
        attacks = [self.again("floods sent", self.flood, keys[n % 2], n) for n in range(4) if "flood" in names]
        for key in keys:
            for each in (self.queue, self.messages, self.service):
                if each.__name__ in names:
                    attacks.append(self.again(each.__name__, each, key))
        if "strangers" in names:
            attacks += [self.again("strangers", self.stranger, number) for number in range(STRANGERS)]
        await asyncio.gather(*attacks)


async def cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def main(url: str, seconds: str, names: str, *keys: str) -> None:
    """Attack, and say what was done."""
    os.nice(10)
    attack = Attack(url, float(seconds))
    await attack.all(list(keys), names.split(","))
    print(json.dumps(attack.done))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
