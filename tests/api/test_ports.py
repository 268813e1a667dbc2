"""Services in sandboxes through the gateway, by path and by host name, also with bad services and clients.

The sandbox is a real agent (driver `unisolated`), the service a small one on raw sockets in its kernel. It notes every
byte that it gets. After each test no key may be among them.
"""

import asyncio
import base64
import hashlib
import json
import logging
import random
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from tornado.httpclient import HTTPResponse
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from guest_agent import wire
from kernel_gateway.api import base, guesses, ports
from kernel_gateway.api.base import STATUS
from kernel_gateway.drivers.unisolated import Unisolated
from kernel_gateway.guest import link
from kernel_gateway.ports import names
from kernel_gateway.sandbox.lifecycle import State
from kernel_gateway.sandbox.sandbox import Sandbox
from tests.fakes import Service, error_of, eventually, resident, serving

SERVICE = """
import asyncio, collections, hashlib, json, threading
from websockets.asyncio.server import serve

seen, closed, begun = bytearray(), [], []
ticks = collections.defaultdict(asyncio.Queue)  # by query

async def answer(reader, writer):
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    seen.extend(head)
    line, *rest = head.decode("latin-1").split("\\r\\n")[:-2]
    method, target, version = line.split(" ")
    headers = [each.split(": ", 1) for each in rest]
    lower = {name.lower(): value for name, value in headers}
    path, _, query = target.partition("?")
    begun.append(path)

    async def pieces():
        if "content-length" in lower:
            left = int(lower["content-length"])
            while left and (data := await reader.read(min(left, 262144))):
                left -= len(data)
                yield data
        elif "transfer-encoding" in lower:
            while size := int(await reader.readline(), 16):
                yield await reader.readexactly(size)
                await reader.readline()

    async def whole():
        return b"".join([piece async for piece in pieces()])

    def reply(body, kind="application/json"):
        writer.write(f"HTTP/1.1 200 OK\\r\\nContent-Type: {kind}\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n".encode())
        if method != "HEAD":
            writer.write(body)

    if path == "/raw":  # answers with the body of the request, whatever it is
        writer.write(await whole())
    elif path == "/count":
        digest, size = hashlib.sha256(), 0
        async for piece in pieces():
            digest.update(piece)
            size += len(piece)
        reply(json.dumps([size, digest.hexdigest()]).encode())
    elif path.startswith("/big/"):
        size = int(path[5:]) << 20
        writer.write(f"HTTP/1.1 200 OK\\r\\nContent-Length: {size}\\r\\n\\r\\n".encode())
        for n in range(size >> 20):
            writer.write(bytes([n & 255]) * (1 << 20))
            await writer.drain()
    elif path == "/ticks":
        writer.write(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n")
        for n in range(3):
            writer.write(b"9\\r\\ndata: %d\\n\\n\\r\\n" % n)
            await ticks[query].get()
        writer.write(b"0\\r\\n\\r\\n")
    elif path == "/tick":
        ticks[query].put_nowait(None)
        reply(b"{}")
    elif path == "/hang":
        await reader.read()
    elif path == "/stall":
        await ticks[query].get()
    elif path == "/early":  # answers before the request is whole
        writer.write(b"HTTP/1.1 413 Too Large\\r\\nContent-Length: 2\\r\\n\\r\\nno")
    elif path == "/refuse":  # the same, and then holds on to the connection without reading
        writer.write(b"HTTP/1.1 413 Too Large\\r\\nContent-Length: 2\\r\\n\\r\\nno")
        await ticks["refuse"].get()
    elif path == "/tunnel":
        writer.write(b"HTTP/1.1 101 Switching\\r\\nConnection: Upgrade\\r\\nUpgrade: echo\\r\\n\\r\\nfirst")
        while data := await reader.read(65536):
            writer.write(data.upper())
            await writer.drain()
        seen.extend(b"END")
    else:
        body = await whole()
        seen.extend(body[:65536])
        told = {"method": method, "target": target, "headers": headers, "body": body.decode("latin-1")}
        reply(json.dumps(told).encode())
    await writer.drain()

async def connection(reader, writer):
    try:
        await answer(reader, writer)
        writer.close()
        await writer.wait_closed()
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.transport.abort()
        closed.append(1)

async def echo(ws):
    seen.extend(repr(list(ws.request.headers.raw_items())).encode())
    async for message in ws:
        if message == "close":
            await ws.close(4321, "as asked")
        else:
            await ws.send(message)

async def main():
    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    sockets = await serve(echo, "127.0.0.1", 0, max_size=None, ping_interval=None, close_timeout=2)
    found.append((server.sockets[0].getsockname()[1], sockets.sockets[0].getsockname()[1]))
    is_up.set()
    await asyncio.Event().wait()

import logging
logging.disable()
found, is_up = [], threading.Event()
threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
is_up.wait()
print(*found[0])
"""
CSP = "sandbox allow-scripts allow-forms allow-popups allow-modals allow-downloads"
MIB = 1 << 20


@dataclass
class Lab:
    """A gateway, a sandbox, and the service in it."""

    service: Service
    box: str
    port: int
    sockets: int

    @property
    def base(self) -> str:
        return f"/sandboxes/{self.box}/ports/{self.port}"

    @property
    def sandbox(self) -> Sandbox:
        return self.service.sandboxes.get(self.service.owner, self.box)

    @property
    def host(self) -> str:
        return f"{self.port}-{self.box}.localhost"

    async def call(self, method: str, path: str, **options: Any) -> HTTPResponse:
        return await self.service.call(method, self.base + path, follow_redirects=False, **options)

    async def by_host(self, method: str, path: str, host: str = "", **options: Any) -> HTTPResponse:
        """A request to the host name of the port."""
        headers = {"Host": host or self.host, **options.pop("headers", {})}
        return await self.service.call(method, path, headers=headers, follow_redirects=False, **options)

    async def answered(self, raw: bytes, **options: Any) -> HTTPResponse:
        """The client's answer when the service answers with these bytes."""
        return await self.call("POST", "/raw", body=raw, **options)

    async def value(self, expression: str) -> Any:
        """The value of an expression in the service's kernel."""
        cell = await self.service.execute(self.box, f"print(json.dumps({expression}))")
        assert cell["error"] is None
        return json.loads(cell["stdout"])

    async def has_seen(self, text: str) -> bool:
        """Whether the service has got this text, in upper or lower case."""
        return bool(await self.value(f"{text.lower().encode()!r} in seen.lower()"))

    async def open(self, public: bool = True, port: int | None = -1) -> int:
        port = self.port if port == -1 else port
        fields = {"public": public} if port is None else {"public": public, "port": port}
        return (await self.service.call("PUT", f"/sandboxes/{self.box}/ports", fields)).code

    @asynccontextmanager
    async def raw(self, request: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection to the gateway on which these bytes have been sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.service.port)
        try:
            writer.write(request)
            yield reader, writer
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def spoken(self, request: bytes) -> bytes:
        """The gateway's whole answer to these bytes, until it closes the connection."""
        async with self.raw(request) as (reader, _), asyncio.timeout(20):
            return await reader.read()

    def head(self, path: str = "/", method: str = "GET", *lines: str, key: str | None = "") -> bytes:
        """The head of a request."""
        sent = [f"{method} {self.base}{path} HTTP/1.1", "Host: gateway", *lines]
        if key is not None:
            sent.append(f"Authorization: Bearer {key or self.service.key}")
        return "\r\n".join([*sent, "", ""]).encode("latin-1")


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """One service for all tests that leave it unchanged."""
    directory = tmp_path_factory.mktemp("ports")
    async with serving(directory, Unisolated(directory), origins=frozenset({"https://lab.example"})) as service:
        yield await start(service)


async def start(service: Service) -> Lab:
    box = await service.create(timeout=3600)
    cell = await service.execute(box, SERVICE)
    assert cell["error"] is None, cell
    port, sockets = cell["stdout"].split()
    return Lab(service, box, int(port), int(sockets))


@pytest.fixture
async def lab(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    """The service. Afterwards its ports are closed, and it must have seen no key."""
    # All tests together offer many unknown keys.
    monkeypatch.setattr(guesses, "LIMIT", 10_000)
    yield shared
    await shared.open(public=False, port=None)
    await eventually(lambda: len(shared.sandbox.port_users) == 0)
    basic = base64.b64encode(f"x:{shared.service.key}".encode()).decode()
    secrets = [shared.service.key, shared.service.other_key, basic, shared.service.key[4:].replace("a", "%61")]
    assert not any([await shared.has_seen(secret) for secret in secrets])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def echoed(answer: HTTPResponse) -> dict[str, Any]:
    """The request as the service got it. Names of headers are in small letters."""
    assert answer.code == 200, answer.body
    told = json.loads(answer.body)
    return {**told, "headers": {name.lower(): value for name, value in told["headers"]}}


# -- requests and answers


@pytest.mark.parametrize(
    "method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "M-SEARCH", "TRACE"]
)
async def test_any_method(lab: Lab, method: str) -> None:
    """Method, path, query, headers and body arrive as they were sent, and so does the answer."""
    body = b"\x00\xffbody" if method in ("POST", "PUT", "PATCH", "PROPFIND") else None
    headers = {"X-Own": "a, b", "Accept": "x/y", "User-Agent": "tests"}
    answer = await lab.call(method, "/a%20b/%2F/..;x?q=%41&q=&&+%2b", body=body, headers=headers)
    told = echoed(answer)
    assert (told["method"], told["target"]) == (method, "/a%20b/%2F/..;x?q=%41&q=&&+%2b")
    assert told["body"] == (body or b"").decode("latin-1")
    assert {name: told["headers"][name.lower()] for name in headers} == headers
    assert told["headers"]["host"] == f"localhost:{lab.port}"
    assert told["headers"]["connection"] == "close"
    assert answer.headers["Content-Type"] == "application/json"


async def test_head(lab: Lab) -> None:
    """HEAD has the length of the body, and no body. The connection to the gateway goes on."""
    request = lab.head("/x", "HEAD")
    async with lab.raw(request + request) as (reader, _), asyncio.timeout(20):
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert re.search(rb"\r\nContent-Length: [1-9]", head)


async def test_paths_are_the_services_own(lab: Lab) -> None:
    """A path with `..`, or like a route of the gateway, is only a path of the service."""
    for path in (
        "/../../../health",
        "//evil.example/x",
        "/%2e%2e/health",
        "/http://x/",
        "/sandboxes",
        "/?",
        "/a?b?c",
        "/@x",
    ):
        async with lab.raw(lab.head(path, "GET", "Connection: close")) as (reader, _):
            told = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
        assert told["target"] == path.removesuffix("?")


async def test_the_slash_after_the_port(lab: Lab) -> None:
    """A GET without it gets a redirect, so that relative links work. Other methods get an error."""
    for method in ("GET", "HEAD"):
        answer = await lab.call(method, "?a=b", key=None)
        assert (answer.code, answer.headers["Location"]) == (308, f"{lab.base}/?a=b")
    answer = await lab.call("POST", "", body=b"x")
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")


@pytest.mark.parametrize("port", ["0", "65536", "99999", "-1", "08000", "x", "8000x", "%38000", "8" * 400, "１"])
async def test_ports_that_are_none(lab: Lab, port: str) -> None:
    """A port is a number from 1 to 65535, without leading zeros."""
    port = port.encode().decode("latin-1")
    request = lab.head().replace(f"ports/{lab.port}".encode(), f"ports/{port}".encode("latin-1"))
    assert b"400 Bad Request" in await lab.spoken(
        request.replace(b"GET", b"GET", 1)[:-2] + b"Connection: close\r\n\r\n"
    )


async def test_a_port_that_is_closed(lab: Lab) -> None:
    """The answer is 502 with the words that E2B's clients look for, and without the guest's own."""
    lab.port, port = free_port(), lab.port
    try:
        answer = await lab.call("GET", "/")
    finally:
        lab.port = port
    assert (answer.code, error_of(answer)["error"]) == (502, "port_closed")
    assert "port is not open" in error_of(answer)["message"]
    assert "outcome" not in error_of(answer)


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_100_mib_up(lab: Lab, is_chunked: bool) -> None:
    """A large upload arrives whole, and the server does not grow."""
    piece, count = bytes(range(256)) * 1024, 400
    digest = hashlib.sha256(piece * 1)
    for _ in range(count - 1):
        digest.update(piece)
    framing = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {count * len(piece)}"
    before = resident()
    async with lab.raw(lab.head("/count", "POST", framing, "Connection: close")) as (reader, writer):
        most = 0
        for _ in range(count):
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
            await writer.drain()
            most = max(most, resident())
        writer.write(b"0\r\n\r\n" if is_chunked else b"")
        answer = await reader.read()
    assert json.loads(answer[answer.index(b"[") : answer.index(b"]") + 1]) == [count * len(piece), digest.hexdigest()]
    assert most - before <= 16 * MIB


async def test_100_mib_down(lab: Lab) -> None:
    """A large download arrives whole, and the server does not grow."""
    before, most, size = resident(), 0, 0
    async with lab.raw(lab.head("/big/100", "GET", "Connection: close")) as (reader, _):
        await reader.readuntil(b"\r\n\r\n")
        while data := await reader.read(MIB):
            assert data[0] in ((size >> 20) & 255, (size - 1 >> 20) & 255)
            size += len(data)
            most = max(most, resident())
    assert size == 100 * MIB
    assert most - before <= 16 * MIB


async def test_a_slow_reader_stops_the_service(lab: Lab) -> None:
    """A client that reads nothing stops the service. The server's memory stays, and others are not held up."""
    before = resident()
    async with lab.raw(lab.head("/big/200", "GET", "Connection: close")) as (reader, _):
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(10):
            assert (await lab.call("GET", "/x")).code == 200
        assert resident() - before <= 16 * MIB
        size = 0
        while data := await reader.read(MIB):
            size += len(data)
    assert size == 200 * MIB
    assert resident() - before <= 16 * MIB


async def test_a_service_that_does_not_read(lab: Lab) -> None:
    """An upload waits for the service, and nothing piles up. When the service ends, so does the request."""
    before, sent = resident(), 0
    async with lab.raw(lab.head("/stall?s", "POST", f"Content-Length: {200 * MIB}")) as (_, writer):
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                while sent < 200 * MIB:
                    writer.write(bytes(MIB))
                    sent += MIB
                    await writer.drain()
        assert sent < 100 * MIB
        assert resident() - before <= 16 * MIB + sent - writer.transport.get_write_buffer_size()
        writer.transport.abort()
    assert (await lab.call("GET", "/tick?s")).code == 200
    await eventually(lambda: len(lab.sandbox.port_users) == 0)


async def test_events_come_at_once(lab: Lab) -> None:
    """Each piece of a streamed answer is there before the service makes the next."""
    async with lab.raw(lab.head("/ticks?e", "GET", "Connection: close")) as (reader, _), asyncio.timeout(20):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"Transfer-Encoding: chunked" in head
        for n in range(3):
            assert await reader.readuntil(b"\n\n\r\n") == b"9\r\ndata: %d\n\n\r\n" % n
            assert (await lab.call("GET", "/tick?e")).code == 200
        assert await reader.read() == b"0\r\n\r\n"


async def test_an_answer_before_the_request_is_whole(lab: Lab) -> None:
    """The client hears an early refusal while it still sends, and its connection stays usable."""
    second = lab.head("/x", "GET", "Connection: close")
    async with lab.raw(lab.head("/early", "POST", "Content-Length: 1000000")) as (reader, writer), asyncio.timeout(20):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413 ")
        assert await reader.readexactly(2) == b"no"
        writer.write(bytes(1_000_000) + second)
        assert b"200 OK" in await reader.read()


async def test_an_answer_to_an_upload_that_nobody_reads(lab: Lab) -> None:
    """When the service has answered and reads no more, the rest of the body is dropped and the client can read."""
    size = 12 * MIB
    async with lab.raw(lab.head("/refuse", "POST", f"Content-Length: {size}")) as (reader, writer), asyncio.timeout(20):
        for _ in range(12):
            writer.write(bytes(MIB))
            await writer.drain()
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
        assert await reader.readexactly(2) == b"no"
        writer.write(lab.head("/x", "GET", "Connection: close"))
        assert b"200 OK" in await reader.read()
    assert (await lab.call("GET", "/tick?refuse")).code == 200


async def test_a_body_that_is_not_wanted_is_not_waited_for(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that was refused and sends no body is cut off after a while, also by the gateway's own routes."""
    monkeypatch.setattr(ports, "IGNORED_BODY_TIMEOUT", 0.3)
    monkeypatch.setattr(base, "JSON_BODY_TIMEOUT", 0.3)
    assert (await lab.spoken(lab.head("/x", "POST", "Content-Length: 9", key="wrong"))).startswith(b"HTTP/1.1 401 ")
    for line in ("POST /sandboxes", f"POST /sandboxes/{lab.box}/files", "PUT /nowhere"):
        head = f"{line} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n".encode()
        assert (await lab.spoken(head)).startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 404 "))


async def test_expect_100(lab: Lab) -> None:
    """A client that waits for 100 gets it. A client that is refused does not, and the connection ends."""
    lines = ("Content-Length: 3", "Expect: 100-continue", "Connection: close")
    async with lab.raw(lab.head("/x", "POST", *lines)) as (reader, writer), asyncio.timeout(20):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(b"abc")
        assert b'"body": "abc"' in await reader.read()
    assert (await lab.spoken(lab.head("/x", "POST", *lines[:2], key="wrong"))).startswith(b"HTTP/1.1 401 ")
    redirected = await lab.spoken(lab.head("", "GET", *lines[:2]))
    assert redirected.startswith(b"HTTP/1.1 308 ")
    assert redirected.count(b"HTTP/1.1") == 1


async def test_expect_100_with_an_upgrade(lab: Lab) -> None:
    """There is no body, so no 100 is sent in the middle of the answer."""
    lines = ("Connection: Upgrade", "Upgrade: websocket", "Expect: 100-continue")
    async with lab.raw(lab.head("/x", "GET", *lines) + lab.head("/y", "GET", "Connection: close")) as (reader, _):
        async with asyncio.timeout(20):
            spoken = await reader.read()
    assert re.findall(rb"HTTP/1.1 (\d+)", spoken) == [b"200", b"200"]
    assert b'"target": "/y"' in spoken


async def test_a_client_that_hangs_up(lab: Lab) -> None:
    """The service's connection ends with the client's, whether it waits, streams, or has not answered."""
    for path in ("/hang", "/ticks?h", "/big/100"):
        begun, ended = await lab.value("[len(begun), len(closed)]")
        async with lab.raw(lab.head(path)):
            async with asyncio.timeout(60):
                while (await lab.value("len(begun)")) == begun:
                    await asyncio.sleep(0.01)
        await eventually(lambda: len(lab.sandbox.port_users) == 0)
        if path == "/ticks?h":  # the service notices when it sends more
            for _ in range(3):
                await lab.call("GET", "/tick?h")
        async with asyncio.timeout(60):
            while (await lab.value("len(closed)")) <= ended:
                await asyncio.sleep(0.01)


async def test_a_client_that_hangs_up_behind_its_next_request(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway notices that the client has gone, though bytes of it wait to be read."""
    monkeypatch.setattr(ports, "HANG_UP_LOOK", 0.1)
    async with lab.raw(lab.head("/hang") + b"G"):
        await eventually(lambda: len(lab.sandbox.port_users) == 1)
    await eventually(lambda: len(lab.sandbox.port_users) == 0)


async def test_http_1_0(lab: Lab) -> None:
    """An answer that ends with the connection is whole, and so is an answer to a client of HTTP 1.0."""
    answer = await lab.answered(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nuntil the end")
    assert (answer.code, answer.body) == (200, b"until the end")
    raw = b"HTTP/1.0 200 OK\r\n\r\nthe end"
    for lines in ((), ("Connection: keep-alive",)):
        request = lab.head("/raw", "POST", f"Content-Length: {len(raw)}", *lines)
        spoken = await lab.spoken(request.replace(b"HTTP/1.1", b"HTTP/1.0") + raw)
        assert spoken.endswith(b"\r\n\r\nthe end")
        assert b"chunked" not in spoken
        assert b"keep-alive" not in spoken.lower()


async def test_informational_answers_are_skipped(lab: Lab) -> None:
    """Answers 1xx before the real one are for the gateway alone."""
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    answer = await lab.answered(hints + b"HTTP/1.1 201 Made\r\nContent-Length: 2\r\n\r\nok")
    assert (answer.code, answer.body, answer.headers.get("Link")) == (201, b"ok", None)


@pytest.mark.parametrize("status", [204, 304])
async def test_answers_without_a_body(lab: Lab, status: int) -> None:
    """Such answers have no body, whatever their headers say."""
    answer = await lab.answered(b"HTTP/1.1 %d X\r\nContent-Length: 5\r\nETag: x\r\n\r\n" % status)
    assert (answer.code, answer.body, answer.headers["ETag"]) == (status, b"", "x")


async def test_an_unknown_status(lab: Lab) -> None:
    """An unknown number passes, with a reason phrase of the gateway."""
    answer = await lab.answered(b"HTTP/1.1 599 \xff\xfe<script>\r\nContent-Length: 0\r\n\r\n")
    assert (answer.code, answer.reason) == (599, "Unknown")


async def test_chunked_answers_with_trailers(lab: Lab) -> None:
    """Chunks are joined and trailers dropped. Very many very small chunks pass, too."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
    answer = await lab.answered(head + b"3;ext=1\r\nabc\r\n1\r\nd\r\n0\r\nX-Sum: 1\r\n\r\n")
    assert (answer.body, answer.headers.get("X-Sum"), answer.headers.get("Trailer")) == (b"abcd", None, None)
    answer = await lab.answered(head + b"1\r\na\r\n" * 50_000 + b"0\r\n\r\n")
    assert answer.body == b"a" * 50_000


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 1000,
        b"not HTTP at all\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x01b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x7fb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX y: a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1e3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: echo\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 65536 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
        b"HTTP/1.1 200 " + b"a" * 300_000,
    ],
    ids=lambda raw: repr(raw[:60]),
)
async def test_malformed_answers(lab: Lab, raw: bytes) -> None:
    """If the service's bytes are no answer, the client gets 502 with a sentence of the gateway."""
    answer = await lab.answered(raw)
    error = error_of(answer)
    assert (answer.code, error["error"]) == (502, "failed")
    assert error["message"].startswith(f"the service on port {lab.port} ")


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcdef",
    ],
)
async def test_an_answer_that_breaks_off(lab: Lab, raw: bytes) -> None:
    """The part before the break arrives, and no client can take it for whole."""
    spoken = await lab.spoken(lab.head("/raw", "POST", f"Content-Length: {len(raw)}") + raw)
    head, _, body = spoken.partition(b"\r\n\r\n")
    assert b"abc" in body
    assert body == b"abc" if b"Content-Length: 10" in head else not body.endswith(b"0\r\n\r\n")


def spoiled(rng: random.Random, text: bytes) -> bytes:
    """The text with some bytes changed, doubled or cut out."""
    data = bytearray(text)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at:at] = rng.choice([b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b":", b",", b"\xff", b"9"])
            case 2:
                del data[at : at + rng.randrange(20)]
            case _:
                data[at:at] = data[at : at + rng.randrange(200)]
    return bytes(data)


async def test_500_spoiled_answers(lab: Lab) -> None:
    """Each becomes an answer, a 502, or a connection that is cut, but never a fault of the server."""
    rng = random.Random(4)
    whole = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nLocation: http://localhost/x\r\nSet-Cookie: a; Domain=x\r\n\r\nabcde",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: X\r\nX: y\r\n\r\n5\r\nabcde\r\n0\r\nT:\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 302 Found\r\nLocation: /x\r\nRefresh: 1\r\n\r\nabcde",
    ]
    for _ in range(500):
        raw = spoiled(rng, rng.choice(whole))
        head = lab.head("/raw", "POST", f"Content-Length: {len(raw)}", "Connection: close")
        spoken = await lab.spoken(head + raw)
        status = int(spoken[9:12])
        assert status not in (500, 503), raw
        assert status != 502 or b'"error":"failed"' in spoken, raw


async def test_500_spoiled_requests(lab: Lab) -> None:
    """Each is answered by the service or refused with a 4xx, but is never a fault of the server."""
    rng = random.Random(5)
    lines = (
        "Content-Length: 5",
        "Connection: close, X",
        "X: y",
        "Cookie: a=b",
        "Referer: http://gateway/x",
        "Origin: null",
    )
    request = lab.head("/x/y?a=b&token=c", "POST", *lines) + b"abcde"
    statuses: list[int] = []

    async def one(request: bytes) -> None:
        async with lab.raw(request) as (reader, _):
            try:
                async with asyncio.timeout(0.5):
                    spoken = await reader.read()
            except TimeoutError:
                return  # it was cut short, and the server waits for its rest
        assert not spoken or 200 <= int(spoken[9:12]) < 500, request
        statuses.append(int(spoken[9:12] or 0))

    for _ in range(5):
        await asyncio.gather(*(one(spoiled(rng, request)) for _ in range(100)))
    assert statuses.count(200) > 20
    assert statuses.count(400) > 20
    await eventually(lambda: len(lab.sandbox.port_users) == 0)


async def test_more_than_the_length_says(lab: Lab) -> None:
    """Bytes after the answer are dropped, and do not become part of the next answer."""
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    request = lab.head("/raw", "POST", f"Content-Length: {len(raw)}") + raw
    spoken = await lab.spoken(request + lab.head("/x", "GET", "Connection: close"))
    assert spoken.count(b"HTTP/1.1 200 OK") == 2
    assert b"evil" not in spoken
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    answer = await lab.answered(raw)
    assert (answer.body, answer.headers.get("Content-Length")) == (b"ok", None)


# -- requests that could be read in two ways


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 3", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: gzip, chunked",),
        ("Transfer-Encoding: xchunked",),
        ("Content-Length: 3", "Content-Length: 4"),
        ("Content-Length: 3", "Content-Length: 3"),
        ("Content-Length: 3, 3",),
        ("Content-Length: +3",),
        ("Content-Length: 0x3",),
        ("Content-Length: -3",),
        ("Content-Length:",),
        ("X: a\rContent-Length: 3",),
        ("X: a\n b",),
        ("X : a",),
        ("X: \x00",),
    ],
)
async def test_smuggling(lab: Lab, lines: tuple[str, ...]) -> None:
    """A request that could end in two places is refused, never reaches the service, and ends the connection."""
    before = await lab.value("len(begun)")
    inner = lab.head("/smuggled")
    spoken = await lab.spoken(lab.head("/outer", "POST", *lines) + b"0\r\n\r\n" + inner)
    assert spoken.startswith(b"HTTP/1.1 400 ")
    assert b" 200 " not in spoken
    assert await lab.value("len(begun)") == before


async def test_a_request_within_a_body(lab: Lab) -> None:
    """A body that looks like a request is only a body."""
    inner = lab.head("/within", key=None)
    answer = await lab.call("GET", "/x", body=inner)
    assert echoed(answer)["body"] == inner.decode()
    assert "/within" not in await lab.value("begun")


@pytest.mark.parametrize("path", ["/a\rb", "/a\nX: y", "/a\x00", "/a b", "/a\tb", "/\xff", "/\x7f"])
async def test_characters_that_no_address_has(lab: Lab, path: str) -> None:
    """They are refused. Encoded ones pass unchanged."""
    spoken = await lab.spoken(lab.head(path, "GET", "Connection: close"))
    assert spoken.startswith(b"HTTP/1.1 400 ")
    encoded = "/" + "".join(f"%{ord(each):02x}" for each in path[1:])
    assert echoed(await lab.call("GET", encoded))["target"] == encoded


@pytest.mark.parametrize(
    "line",
    ["GET http://gateway{base}/ HTTP/1.1", "CONNECT {base}/ HTTP/1.1", "OPTIONS * HTTP/1.1", "GET {base}/ HTTP/2"],
)
async def test_it_is_no_proxy(lab: Lab, line: str) -> None:
    """Requests in a form other than for a path reach no service."""
    before = await lab.value("len(begun)")
    first = lab.head("/", "GET", "Connection: close").split(b"\r\n", 1)[1]
    spoken = await lab.spoken(line.format(base=lab.base).encode() + b"\r\n" + first)
    assert re.match(rb"HTTP/1.1 (400|404|405) ", spoken)
    host = f"Host: {lab.host}\r\nAuthorization: Bearer {lab.service.key}\r\nConnection: close\r\n\r\n".encode()
    for line in (b"GET http://x/ HTTP/1.1", b"CONNECT x:1 HTTP/1.1", b"OPTIONS * HTTP/1.1"):
        assert (await lab.spoken(line + b"\r\n" + host)).startswith(b"HTTP/1.1 400 ")
    assert await lab.value("len(begun)") == before


async def test_hop_by_hop_headers(lab: Lab) -> None:
    """Headers about a connection, and headers that it names, are for the next hop only, both ways."""
    headers = {
        "Connection": "close, X-Named",
        "X-Named": "1",
        "Keep-Alive": "1",
        "Proxy-Authorization": "x",
        "Proxy-Connection": "x",
        "TE": "trailers",
        "Upgrade": "h2c",
        "X-Forwarded-For": "6.6.6.6",
        "X-Forwarded-Host": "evil",
        "X-Forwarded-Anything": "x",
        "Forwarded": "for=6.6.6.6",
        "X-Real-IP": "6.6.6.6",
    }
    told = echoed(await lab.call("GET", "/", headers=headers))["headers"]
    assert told.pop("connection") == "close"
    assert told.pop("x-forwarded-for") == "127.0.0.1"
    assert told.pop("x-forwarded-host") == f"127.0.0.1:{lab.service.port}"
    assert told.pop("x-forwarded-proto") == "http"
    assert told.pop("x-forwarded-prefix") == lab.base
    assert not set(told) & {name.lower() for name in headers}
    answer = await lab.answered(
        b"HTTP/1.1 200 OK\r\nConnection: X-Named\r\nX-Named: 1\r\nKeep-Alive: 1\r\nProxy-Authenticate: x\r\n"
        b"Upgrade: h2c\r\nContent-Length: 0\r\n\r\n"
    )
    assert not {"X-Named", "Keep-Alive", "Proxy-Authenticate", "Upgrade"} & set(answer.headers)


# -- who may


async def test_a_port_needs_the_owners_key(lab: Lab) -> None:
    """No key, an unknown one and another owner's are refused as on all routes, also for unknown sandboxes."""
    nobody = f"/sandboxes/sbx{'a' * 20}/ports/{lab.port}"
    none = (404, b'{"code":404,"message":"sandbox not found","error":"not_found","reason":"Not Found"}')
    for prefix in (lab.base, nobody, f"/sandboxes/x/ports/{lab.port}"):
        for headers, message in (
            ({}, "a key is required"),
            ({"Authorization": "Bearer wrong"}, "the key is not known"),
            ({"Authorization": "Basic eDp5"}, "a key is required"),
            ({"X-API-Key": "wrong"}, "the key is not known"),
        ):
            answer = await lab.service.call("GET", prefix + "/", key=None, headers=headers)
            assert (answer.code, error_of(answer)["message"]) == (401, message)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        answer = await lab.service.call("GET", prefix + "/", key=lab.service.other_key)
        assert (answer.code, answer.body) == none
    answer = await lab.service.call("GET", nobody + "/")
    assert (answer.code, answer.body) == none


FORMS = {
    "bearer": ({"Authorization": "Bearer KEY"}, ""),
    "token": ({"Authorization": "token KEY"}, ""),
    "odd": ({"Authorization": "BEARER   KEY "}, ""),
    "api key": ({"X-API-Key": "KEY"}, ""),
    "query": ({}, "token=KEY"),
    "encoded query": ({}, "%74oken=ENC"),
    "basic": ({"Authorization": "Basic BASIC"}, ""),
    "bare": ({"Authorization": "KEY"}, ""),
    "all": ({"Authorization": "Bearer KEY", "X-API-Key": "KEY"}, "a=1&token=KEY&token=KEY"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("by_host", [False, True])
async def test_no_key_reaches_the_service(lab: Lab, form: str, public: bool, by_host: bool) -> None:
    """The service does not see a key, in whatever form it comes. Values beside the key stay unchanged."""
    await lab.open(public)
    key = lab.service.key
    texts = {"KEY": key, "ENC": "%65" + key[1:], "BASIC": base64.b64encode(f"x:{key}".encode()).decode()}
    headers, query = FORMS[form]
    for name, text in texts.items():
        headers = {each: value.replace(name, text) for each, value in headers.items()}
        query = query.replace(name, text)
    path = f"/x?own=%41&{query}&token=mine" if query else "/x?own=%41&token=mine"
    call = lab.by_host if by_host else lab.call
    answer = await call("GET", path, key=None, headers={**headers, "X-Own": "1"})
    told = echoed(answer)
    assert told["target"] in ("/x?own=%41&token=mine", "/x?own=%41&a=1&token=mine")
    assert told["headers"]["x-own"] == "1"
    assert not {"authorization", "x-api-key"} & set(told["headers"])
    # An answer to an address with a key is a download, because a page could read its own address.
    assert answer.headers.get("Content-Disposition") == ("attachment" if query else None)
    assert answer.headers["Content-Type"] == ("application/octet-stream" if query else "application/json")
    if query:
        assert answer.headers.get_list("Content-Security-Policy") == ["sandbox"]
        assert answer.headers.get_list("X-Content-Type-Options") == ["nosniff"]


@pytest.mark.parametrize("public", [False, True])
async def test_a_key_in_the_path_is_refused(lab: Lab, public: bool) -> None:
    """A key there is refused, because the page could read it."""
    await lab.open(public)
    before = await lab.value("len(begun)")
    for key in (lab.service.key, "wrong"):
        answer = await lab.service.call("GET", f"/t/{key}{lab.base}/", key=None)
        assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")
        assert "Bearer" in error_of(answer)["hint"]
    answer = await lab.by_host("GET", f"/t/{lab.service.key}/", key=None)
    assert answer.code == 400
    answer = await lab.call("GET", f"/t/{lab.service.key.replace('a', '%61')}/x", key=None)
    assert answer.code == 400
    assert await lab.value("len(begun)") == before
    if public:
        assert echoed(await lab.by_host("GET", "/t/of-its-own/x", key=None))["target"] == "/t/of-its-own/x"


async def test_the_services_own_credentials(lab: Lab) -> None:
    """Tokens reach the service: alone on an open port, and on a closed one beside a key of ours elsewhere."""
    own = {"Authorization": "Bearer of-the-app", "X-API-Key": lab.service.key}
    assert echoed(await lab.call("GET", "/", key=None, headers=own))["headers"]["authorization"] == "Bearer of-the-app"
    own = {"Authorization": f"Bearer {lab.service.key}", "X-API-Key": "of-the-app"}
    assert echoed(await lab.call("GET", "/", key=None, headers=own))["headers"]["x-api-key"] == "of-the-app"
    await lab.open()
    own = {"Authorization": "Bearer of-the-app", "X-API-Key": "of-the-app"}
    told = echoed(await lab.call("GET", "/?token=of-the-app", key=None, headers=own))
    assert {name: told["headers"][name.lower()] for name in own} == own
    assert told["target"] == "/?token=of-the-app"
    # Another owner is a visitor like any other, and that owner's key must not reach the service either.
    told = echoed(await lab.call("GET", "/", key=lab.service.other_key))
    assert "authorization" not in told["headers"]


@pytest.mark.parametrize("name", ["Authorization", "X-API-Key"])
async def test_keys_are_looked_for_in_one_header(lab: Lab, name: str) -> None:
    """A header that comes many times is refused, because the search for keys would keep everybody waiting."""
    lines = [f"{name}: {' '.join(f'x{n}' for n in range(60))}"] * 100
    assert (await lab.spoken(lab.head("/x", "GET", *lines, "Connection: close"))).startswith(b"HTTP/1.1 400 ")
    assert (await lab.call("GET", "/x")).code == 200


async def test_addresses_of_the_gateways_pages_stay_here(lab: Lab) -> None:
    """A Referer from outside the preview is dropped, because the gateway's own addresses may have a key."""
    origin = lab.service.url
    for referer in (f"{origin}/t/{lab.service.key}/lab", f"{origin}/?token={lab.service.key}", "https://elsewhere/"):
        assert "referer" not in echoed(await lab.call("GET", "/", headers={"Referer": referer}))["headers"]
    told = echoed(await lab.call("GET", "/", headers={"Referer": f"{origin}{lab.base}/a?token={lab.service.key}"}))
    assert told["headers"]["referer"] == f"http://localhost:{lab.port}/a"


async def test_open_and_close(lab: Lab) -> None:
    """An open port needs no key, the others still do. Closing it cuts visitors' connections, not the owner's."""
    assert await lab.open() == 204
    path = f"/sandboxes/{lab.box}/ports"
    listed = json.loads((await lab.service.call("GET", path)).body)
    mine = {"port": lab.port, "public": True, "path": f"{lab.base}/", "host": lab.host}
    assert listed == {"allPublic": False, "ports": [mine]}
    assert (await lab.call("GET", "/", key=None)).code == 200
    assert (await lab.by_host("GET", "/", key=None)).code == 200
    other = f"/sandboxes/{lab.box}/ports/{lab.sockets}/"
    assert (await lab.service.call("GET", other, key=None)).code == 401
    async with (
        lab.raw(lab.head("/ticks?v", key=None)) as (visitor, _),
        lab.raw(lab.head("/ticks?o")) as (owner, _),
        asyncio.timeout(20),
    ):
        for reader in (visitor, owner):
            await reader.readuntil(b"data: 0\n\n\r\n")
        assert await lab.open(public=False) == 204
        for name in "vovovo":
            await lab.call("GET", f"/tick?{name}")
        assert await visitor.read() == b""  # it was cut, because there is no last chunk
        await owner.readuntil(b"\r\n0\r\n\r\n")
    assert (await lab.call("GET", "/", key=None)).code == 401
    assert json.loads((await lab.service.call("GET", path)).body) == {"allPublic": False, "ports": []}


async def test_all_ports_at_once(lab: Lab) -> None:
    """A request without a port means all ports. After that a single one can't be closed."""
    assert await lab.open(port=None) == 204
    assert json.loads((await lab.service.call("GET", f"/sandboxes/{lab.box}/ports")).body)["allPublic"] is True
    assert (await lab.call("GET", "/", key=None)).code == 200
    assert await lab.open(public=False) == 409
    assert await lab.open(public=False, port=None) == 204
    assert (await lab.call("GET", "/", key=None)).code == 401


async def test_open_from_the_start(service: Service) -> None:
    """`network.allowPublicTraffic` opens all ports when a sandbox is created, and closes them later."""
    box = await service.create(network={"allowPublicTraffic": True})

    async def closed(stream: Any, body: wire.Connect) -> None:
        await stream.fail("port_closed", "no")

    service.guest(box).script.handlers[wire.Connect] = closed
    assert (await service.call("GET", f"/sandboxes/{box}/ports/8000/", key=None)).code == 502
    await service.call("PUT", f"/sandboxes/{box}/ports", {"port": 8000, "public": True})
    await service.call("PUT", f"/sandboxes/{box}/network", {"allowPublicTraffic": False})
    assert (await service.call("GET", f"/sandboxes/{box}/ports/8000/", key=None)).code == 401


@pytest.mark.parametrize("body", [{"port": 0}, {"port": 65536}, {"port": "8000"}, {"port": 8.5}, {"public": 1}, []])
async def test_ports_that_can_not_be_opened(lab: Lab, body: object) -> None:
    """An invalid body opens nothing."""
    answer = await lab.service.call("PUT", f"/sandboxes/{lab.box}/ports", body)
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")
    assert not lab.sandbox.open_ports


async def test_connections_are_limited(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit the answer is 503. The sandbox itself can still be reached."""
    monkeypatch.setattr(ports, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(ports, "MAX_VISITORS", 1)
    await lab.open()
    async with lab.raw(lab.head("/hang", key=None)):
        await eventually(lambda: len(lab.sandbox.port_users) == 1)
        assert (await lab.call("GET", "/", key=None)).code == 503
        assert (await lab.call("GET", "/")).code == 200
        await eventually(lambda: len(lab.sandbox.port_users) == 1)
        async with lab.raw(lab.head("/hang")):
            await eventually(lambda: len(lab.sandbox.port_users) == 2)
            answer = await lab.call("GET", "/")
            assert (answer.code, error_of(answer)["error"], answer.headers["Retry-After"]) == (503, "host_full", "5")
    await eventually(lambda: len(lab.sandbox.port_users) == 0)
    assert (await lab.call("GET", "/")).code == 200


@asynccontextmanager
async def deaf(lab: Lab, number: int) -> AsyncIterator[None]:
    """Visitors that ask for very much and read nothing, over connections that take little."""
    async with AsyncExitStack() as stack:
        for _ in range(number):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", lab.service.port))
            await loop.sock_sendall(client, lab.head("/big/50", key=None))
        yield


async def test_visitors_that_do_not_read(lab: Lab) -> None:
    """S16: 192 strangers that read nothing take 24 MiB of the owner's account and as much memory, and give it back."""
    await lab.open()
    held, before = lab.service.sandboxes.held, resident()
    async with deaf(lab, ports.MAX_VISITORS):
        await eventually(lambda: len(lab.sandbox.port_users) == ports.MAX_VISITORS, 20)
        await asyncio.sleep(1)  # what may come has come
        assert held.of(lab.service.owner) == ports.MAX_VISITORS * ports.CONNECTION == 24 * MIB
        assert resident() - before <= 64 * MIB
        assert (await lab.call("GET", "/")).code == 200
    await eventually(lambda: held.size == 0, 20)


async def test_visitors_leave_room_for_the_owner(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Visitors hold half of what the owner may at most. Beyond it they get 429, and the owner is served."""
    held = lab.service.sandboxes.held
    monkeypatch.setattr(held, "most", 4 * ports.CONNECTION)
    await lab.open()
    async with deaf(lab, 2):
        await eventually(lambda: held.of(lab.service.owner) == 2 * ports.CONNECTION)
        answer = await lab.call("GET", "/", key=None)
        assert (answer.code, error_of(answer)["error"], answer.headers["Retry-After"]) == (
            429,
            "too_many_requests",
            "5",
        )
        assert (await lab.call("GET", "/")).code == 200
    await eventually(lambda: held.size == 0)


# -- what stands in front

OF_A_PROXY = {
    "Authorization": "Basic eDpwcm94eS1zZWNyZXQ=",
    "Cf-Access-Jwt-Assertion": "proxy-secret",
    "CF-Connecting-IP": "proxy-secret",
    "X-Auth-Request-Access-Token": "proxy-secret",
    "X-Amzn-Oidc-Data": "proxy-secret",
    "X-Goog-IAP-JWT-Assertion": "proxy-secret",
    "X-MS-CLIENT-PRINCIPAL": "proxy-secret",
    "Remote-User": "proxy-secret",
    "Remote_User": "proxy-secret",
    "X_forwarded_for": "proxy-secret",
    "X-Real-IP": "proxy-secret",
    "Via": "proxy-secret",
    "Cookie": "a=1; CF_Authorization=proxy-secret; _oauth2_proxy_0=proxy-secret; b=2",
}
"""What proxies add to a request."""


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("by_host", [False, True])
async def test_what_a_proxy_adds_stays_here(lab: Lab, public: bool, by_host: bool) -> None:
    """No credential of what stands in front reaches the service, and no client can pretend to be in front."""
    await lab.open(public)
    call = lab.by_host if by_host else lab.call
    headers = {**OF_A_PROXY, "X-API-Key": lab.service.key, "X-Own": "1"}
    told = echoed(await call("GET", "/", key=None, headers=headers))["headers"]
    assert told.get("cookie") == ("a=1; b=2" if by_host else None)
    assert told["x-own"] == "1"
    assert not {name.lower() for name in OF_A_PROXY} & (set(told) - {"cookie"})
    assert "proxy-secret" not in str(told)
    assert "eDpwcm94eS1zZWNyZXQ=" not in str(told)


OBEYED = (
    "X-Accel-Redirect X-Accel-Buffering X-Sendfile X-Sendfile-Type X-LIGHTTPD-send-file X-LiteSpeed-Location"
    " X-Reproxy-URL Surrogate-Control CDN-Cache-Control Cloudflare-CDN-Cache-Control X-Cache-Control Edge-Control"
    " X-Envoy-Immediate-Health-Check-Fail Server"
).split()
OF_NEW_BROWSERS = (
    "Sec-Session-Registration Secure-Session-Registration IdP-SignIn-Status Speculation-Rules Origin-Trial Critical-CH"
    " Public-Key-Pins Permissions-Policy Refresh"
).split()
PASSED = (
    "Cache-Control ETag Last-Modified Vary Expires Retry-After Link Content-Language Content-Disposition X-Own"
    " Access-Control-Allow-Origin Access-Control-Expose-Headers Mcp-Session-Id"
).split()


@pytest.mark.parametrize("by_host", [False, True])
async def test_what_proxies_and_browsers_obey(lab: Lab, by_host: bool) -> None:
    """Headers that a proxy in front obeys are dropped. By path only headers pass that are known to be harmless."""
    lines = "".join(f"{name}: /private\r\n" for name in [*OBEYED, *OF_NEW_BROWSERS, *PASSED])
    call = lab.by_host if by_host else lab.call
    answer = await call("POST", "/raw", body=f"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n{lines}\r\n".encode())
    assert answer.code == 200
    given = {name.lower() for name in answer.headers}
    assert not {name.lower() for name in OBEYED} & given
    assert {name.lower() for name in PASSED} <= given
    expected = {name.lower() for name in OF_NEW_BROWSERS} if by_host else set()
    assert {name.lower() for name in OF_NEW_BROWSERS} & given == expected


@pytest.mark.parametrize(
    ("given", "private"),
    [
        ("", "private"),
        ("Cache-Control: public, max-age=60\r\n", "private, max-age=60"),
        ("Cache-Control: s-maxage=60\r\nCache-Control: no-cache, PRIVATE\r\n", "private, no-cache"),
        ("Cache-Control: no-store\r\n", "private, no-store"),
    ],
)
async def test_answers_of_a_closed_port_are_private(lab: Lab, given: str, private: str) -> None:
    """No cache in front keeps for others what was answered to a key. What strangers get is the service's own affair."""
    raw = f"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n{given}\r\n".encode()
    assert (await lab.answered(raw)).headers.get_list("Cache-Control") == [private]
    await lab.open()
    own = [line.partition(": ")[2] for line in given.split("\r\n")[:-1]]
    assert (await lab.answered(raw, key=None)).headers.get_list("Cache-Control") == own


async def test_the_operators_own_headers(tmp_path: Any) -> None:
    """Headers of `--strip-headers` reach no service. A `*` at the end means all that begin like it."""
    async with serving(tmp_path, Unisolated(tmp_path), stripped=names("X-Corp-*, X-Staff")) as service:
        lab = await start(service)
        headers = {"X-Corp-Token": "1", "X-Staff": "1", "X-Staff-Only": "1", "X-Corpus": "1"}
        told = echoed(await lab.call("GET", "/", headers=headers))["headers"]
        assert set(told) & {name.lower() for name in headers} == {"x-staff-only", "x-corpus"}


# -- what a page may do


OF_THE_ORIGIN = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Security-Policy: default-src 'self'\r\nSet-Cookie: a=b\r\n"
    b"Set-Cookie: c=d; Path=/; domain=.localhost; Secure\r\nService-Worker-Allowed: /\r\nAlt-Svc: h2=\"x:1\"\r\n"
    b"Strict-Transport-Security: max-age=1\r\nClear-Site-Data: \"*\"\r\nNEL: {}\r\nReport-To: {}\r\n"
    b"WWW-Authenticate: Basic realm=x\r\nX-Content-Type-Options: x\r\nReferrer-Policy: unsafe-url\r\n"
    b"Access-Control-Allow-Origin: https://app.example\r\nX-Own: 1\r\n\r\n"
)  # fmt: skip


async def test_by_path_a_page_has_no_origin(lab: Lab) -> None:
    """The page is sandboxed, and may set no headers for the origin, because it shares the gateway's address."""
    answer = await lab.answered(OF_THE_ORIGIN, headers={"Cookie": "secret=1", "Origin": "https://app.example"})
    assert answer.headers.get_list("Content-Security-Policy") == ["default-src 'self'", CSP]
    assert answer.headers.get_list("X-Content-Type-Options") == ["nosniff"]
    assert answer.headers.get_list("Referrer-Policy") == ["no-referrer"]
    assert answer.headers["X-Own"] == "1"
    assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
    gone = "Set-Cookie Service-Worker-Allowed Alt-Svc Strict-Transport-Security Clear-Site-Data NEL Report-To"
    assert not {*gone.split(), "WWW-Authenticate"} & set(answer.headers)
    assert not await lab.has_seen("secret=1")


async def test_by_host_name_a_page_has_its_own(lab: Lab) -> None:
    """Cookies pass, but for this host alone. Headers about the origin pass, because the origin is its own."""
    answer = await lab.by_host("POST", "/raw", body=OF_THE_ORIGIN, headers={"Cookie": "own=1"})
    assert answer.headers.get_list("Set-Cookie") == ["a=b", "c=d; Path=/; Secure"]
    assert answer.headers.get_list("Content-Security-Policy") == ["default-src 'self'"]
    assert answer.headers["Referrer-Policy"] == "unsafe-url"
    assert answer.headers["Service-Worker-Allowed"] == "/"
    assert "Clear-Site-Data" not in answer.headers
    assert await lab.has_seen("own=1")


async def test_the_gateways_cors_is_not_the_ports(lab: Lab) -> None:
    """A page that may use the gateway gets the service's own CORS headers from a port, also for a preflight."""
    headers = {"Origin": "https://lab.example", "Access-Control-Request-Method": "PUT"}
    told = echoed(await lab.call("OPTIONS", "/", headers=headers))
    assert (told["method"], told["headers"]["origin"]) == ("OPTIONS", "https://lab.example")
    answer = await lab.call("OPTIONS", "/", headers=headers, key=None)
    assert answer.code == 401
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    ("location", "by_path", "by_host"),
    [
        ("/login?a=%20", "{base}/login?a=%20", "/login?a=%20"),
        ("/", "{base}/", "/"),
        ("next", "next", "next"),
        ("?a", "?a", "?a"),
        ("http://localhost:{port}/x#y", "{base}/x#y", "/x#y"),
        ("https://127.0.0.1:{port}/x", "{base}/x", "/x"),
        ("//localhost:{port}/x", "{base}/x", "/x"),
        ("http://LOCALHOST:{port}", "{base}/", "/"),
        ("http://localhost:{port}?q", "{base}/?q", "/?q"),
        ("http://localhost:{port}//evil.example", "{base}/evil.example", "/evil.example"),
        ("http://localhost:1/x", "http://localhost:1/x", "http://localhost:1/x"),
        ("https://elsewhere.example/x", "https://elsewhere.example/x", "https://elsewhere.example/x"),
        ("//elsewhere.example/x", "//elsewhere.example/x", "//elsewhere.example/x"),
        ("http://[", "http://[", "http://["),
        ("http://localhost:99999/", "http://localhost:99999/", "http://localhost:99999/"),
        ("{base}/login", "{base}/login", "{base}/login"),
        ("{base}x/login", "{base}{base}x/login", "{base}x/login"),
    ],
)
async def test_redirects(lab: Lab, location: str, by_path: str, by_host: str) -> None:
    """The service's addresses become the client's."""
    location = location.format(port=lab.port, base=lab.base)
    raw = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    answer = await lab.answered(raw)
    assert (answer.code, answer.headers["Location"]) == (302, by_path.format(base=lab.base))
    answer = await lab.by_host("POST", "/raw", body=raw)
    assert (answer.code, answer.headers["Location"]) == (302, by_host.format(base=lab.base))


async def test_a_page_of_the_service_is_its_own(lab: Lab) -> None:
    """The service's own pages have localhost as their origin, as the service knows itself. Others keep theirs."""
    for call, own in (
        (lab.call, lab.service.url),
        (lab.by_host, f"http://{lab.host}"),
        (lab.by_host, f"https://{lab.host}"),
    ):
        told = echoed(await call("GET", "/", headers={"Origin": own}))
        assert told["headers"]["origin"] == f"http://localhost:{lab.port}"
    for call in (lab.call, lab.by_host):
        told = echoed(await call("GET", "/", headers={"Origin": "https://elsewhere.example"}))
        assert told["headers"]["origin"] == "https://elsewhere.example"
        # Sandboxed frames of any site have this origin, so it proves nothing.
        assert echoed(await call("GET", "/", headers={"Origin": "null"}))["headers"]["origin"] == "null"


# -- by host name


async def test_by_host_name(lab: Lab) -> None:
    """The whole address is the service's. The gateway's own routes do not exist there."""
    for path in ("/", "/health", "/sandboxes", "/openapi.json", "/api/kernels", f"{lab.base}/x"):
        told = echoed(await lab.by_host("GET", path))
        assert told["target"] == path
        assert told["headers"]["host"] == f"localhost:{lab.port}"
        assert told["headers"]["x-forwarded-host"] == lab.host
        assert "x-forwarded-prefix" not in told["headers"]
    for host in (f"{lab.host}:{lab.service.port}", lab.host.upper(), f"{lab.host}."):
        assert echoed(await lab.by_host("GET", "/a", host))["target"] == "/a"


async def test_odd_host_names(lab: Lab) -> None:
    """A host name that begins like a port's never reaches the gateway's own routes. All others do."""
    for host in (
        f"{lab.port}-sbx{'a' * 20}.localhost",
        f"{lab.port}-.localhost",
        f"{lab.port}-x.y.localhost",
        "0-x.localhost",
    ):
        answer = await lab.by_host("GET", "/health", host, key=None)
        assert answer.code in (400, 403), host
    answer = await lab.by_host("GET", "/", f"{lab.port}-{lab.box}.localhost", key=lab.service.other_key)
    unknown = await lab.by_host("GET", "/", f"{lab.port}-sbx{'a' * 20}.localhost", key=lab.service.other_key)
    assert (answer.code, answer.body) == (unknown.code, unknown.body) == (404, unknown.body)
    for host in (
        "localhost",
        "127.0.0.1",
        "[::1]:8888",
        "x.localhost",
        "8000.localhost",
        "8000-x.example.com",
        "8000-x",
        "...",
    ):
        assert (await lab.by_host("GET", "/health", host, key=None)).code == 200, host


async def test_another_domain(tmp_path: Any) -> None:
    """The setting names the domain, and perhaps the port that clients use."""
    async with serving(tmp_path, domain="Preview.Example.com:8443") as service:
        box = await service.create()
        host = f"8000-{box}.preview.example.com"
        assert (await service.call("GET", "/", headers={"Host": host}, key=None)).code == 403
        assert (await service.call("GET", "/health", headers={"Host": f"8000-{box}.localhost"}, key=None)).code == 200
        await service.call("PUT", f"/sandboxes/{box}/ports", {"port": 8000, "public": True})
        listed = json.loads((await service.call("GET", f"/sandboxes/{box}/ports")).body)
        assert listed["ports"][0]["host"] == f"8000-{box}.Preview.Example.com:8443"


async def test_under_a_base_url(tmp_path: Any) -> None:
    """Redirects and prefixes begin with the base URL, too."""
    async with serving(tmp_path, Unisolated(tmp_path), base_url="/cells") as service:
        service.url += "/cells"
        lab = await start(service)
        told = echoed(await lab.call("GET", "/x"))
        assert told["headers"]["x-forwarded-prefix"] == f"/cells{lab.base}"
        assert (await lab.call("GET", "")).headers["Location"] == f"/cells{lab.base}/"
        answer = await lab.answered(b"HTTP/1.1 302 Found\r\nLocation: /y\r\nContent-Length: 0\r\n\r\n")
        assert answer.headers["Location"] == f"/cells{lab.base}/y"


# -- WebSockets and other protocols


def websocket(lab: Lab, *, key: str | None = "", query: str = "", by_host: bool = False, **options: Any) -> connect:
    """A WebSocket to the service's second port."""
    path = f"/{query}" if by_host else f"/sandboxes/{lab.box}/ports/{lab.sockets}/{query}"
    headers = {} if key is None else {"Authorization": f"Bearer {key or lab.service.key}"}
    fixed: dict[str, Any] = {"max_size": None, "compression": None, "ping_interval": None, "proxy": None}
    if by_host:
        fixed |= {"host": "127.0.0.1", "port": lab.service.port}
    authority = f"{lab.sockets}-{lab.box}.localhost" if by_host else "127.0.0.1"
    return connect(f"ws://{authority}:{lab.service.port}{path}", additional_headers=headers, **{**fixed, **options})


@pytest.mark.parametrize("by_host", [False, True])
async def test_websockets(lab: Lab, by_host: bool) -> None:
    """Text, binary, 20 MB, pings and close codes pass both ways."""
    async with websocket(lab, by_host=by_host, origin="http://elsewhere.example") as ws, asyncio.timeout(60):
        for message in ("text", "ünïcode", b"", b"\x00\xff", "x" * 20_000_000, b"y" * 20_000_000):
            await ws.send(message)
            assert await ws.recv() == message
        await (await ws.ping())
        await ws.send("close")
        with pytest.raises(ConnectionClosed):
            await ws.recv()
        assert (ws.close_code, ws.close_reason) == (4321, "as asked")
    await eventually(lambda: len(lab.sandbox.port_users) == 0)


async def test_websockets_with_the_key_in_the_query(lab: Lab) -> None:
    """Pages can send a key nowhere else. The service does not see it."""
    async with websocket(lab, key=None, query=f"?token={lab.service.key}&a=1") as ws, asyncio.timeout(20):
        await ws.send("x")
        assert await ws.recv() == "x"
    for key in (None, "wrong"):
        with pytest.raises(InvalidStatus) as refused:
            await websocket(lab, key=key)
        assert refused.value.response.status_code == 401
    await lab.open(port=lab.sockets)
    async with websocket(lab, key=None):
        pass


async def test_a_websocket_ends_with_its_sandbox(tmp_path: Any) -> None:
    """A request that waits for an answer, and one that has half of it, end as well."""
    async with serving(tmp_path, Unisolated(tmp_path)) as service:
        lab = await start(service)
        async with (
            websocket(lab) as ws,
            lab.raw(lab.head("/hang")) as (waiting, _),
            lab.raw(lab.head("/ticks")) as (half, _),
            asyncio.timeout(20),
        ):
            await half.readuntil(b"data: 0\n\n\r\n")
            await eventually(lambda: len(lab.sandbox.port_users) == 3)
            await service.call("DELETE", f"/sandboxes/{lab.box}")
            with pytest.raises(ConnectionClosed):
                await ws.recv()
            assert ws.close_code == 1006
            head = await waiting.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 502 ")
            assert b"sandbox_died" in await waiting.readuntil(b"}")
            assert await half.read() == b""


async def test_a_websocket_whose_client_vanishes(lab: Lab) -> None:
    """The service's connection ends too."""
    async with websocket(lab) as ws:
        await eventually(lambda: len(lab.sandbox.port_users) == 1)
        ws.transport.abort()
        await eventually(lambda: len(lab.sandbox.port_users) == 0)


async def test_a_visitors_websocket_on_a_port_that_is_closed(lab: Lab) -> None:
    """The WebSocket is cut, and nothing passes any more."""
    await lab.open(port=lab.sockets)
    async with websocket(lab, key=None) as ws, asyncio.timeout(20):
        await ws.send("x")
        assert await ws.recv() == "x"
        await lab.open(public=False, port=lab.sockets)
        with pytest.raises(ConnectionClosed):
            await ws.recv()


async def test_visitors_of_a_port_that_is_closed(lab: Lab) -> None:
    """They are cut at once, whatever they wait for, and no bytes of theirs pass. The owner stays."""
    await lab.open()
    upgrade = ("Connection: Upgrade", "Upgrade: echo")
    async with (
        lab.raw(lab.head("/tunnel", "GET", *upgrade, key=None)) as (tunnel, speaking),
        lab.raw(lab.head("/hang", key=None)) as (waiting, _),
        lab.raw(lab.head("/x", "POST", "Content-Length: 10", key=None) + b"half") as (sending, _),
        lab.raw(lab.head("/tunnel", "GET", *upgrade)) as (owners, owner),
        asyncio.timeout(20),
    ):
        await tunnel.readuntil(b"first")
        await owners.readuntil(b"first")
        await eventually(lambda: len(lab.sandbox.port_users) == 4)
        await lab.open(public=False)
        speaking.write(b"after-the-end")
        for reader in (tunnel, waiting, sending):
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
        owner.write(b"x")
        assert await owners.readexactly(1) == b"X"
    assert not await lab.has_seen("after-the-end")


async def test_any_upgrade(lab: Lab) -> None:
    """Bytes pass unchanged, bytes behind the answer first. Bytes that were sent before a hang-up still arrive."""
    request = lab.head("/tunnel", "GET", "Connection: keep-alive, Upgrade", "Upgrade: echo")
    async with lab.raw(request) as (reader, writer), asyncio.timeout(20):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"\r\nUpgrade: echo\r\n" in head
        assert await reader.readexactly(5) == b"first"
        writer.write(b"a\x00b")
        assert await reader.readexactly(3) == b"A\x00B"
        writer.write(b"last words")
        await writer.drain()
    async with asyncio.timeout(10):
        while not (await lab.value("seen.endswith(b'END')")):
            await asyncio.sleep(0.01)


async def test_an_upgrade_that_is_refused(lab: Lab) -> None:
    """The refusal is an ordinary answer, and the connection goes on."""
    request = lab.head("/x", "GET", "Connection: Upgrade", "Upgrade: websocket")
    async with lab.raw(request + lab.head("/y", "GET", "Connection: close")) as (reader, _), asyncio.timeout(20):
        spoken = await reader.read()
    assert spoken.count(b"HTTP/1.1 200 OK") == 2
    assert (await lab.call("GET", "/z", headers={"Upgrade": "websocket"})).code == 200


# -- a hostile agent, and the log


async def test_agents_that_answer_nonsense(service: Service, box: str) -> None:
    """Whatever an agent does with a Connect, the client gets a documented 502 without the agent's words."""
    script = service.guest(box).script

    async def done(stream: Any, body: wire.Connect) -> None:
        await stream.reply(wire.Done())

    async def data(stream: Any, body: wire.Connect) -> None:
        await stream.data(b"HTTP/1.1 200 OK\r\n\r\n", wire.STDOUT)

    async def closed(stream: Any, body: wire.Connect) -> None:
        await stream.fail("port_closed", "<script>")

    async def refused(stream: Any, body: wire.Connect) -> None:
        await stream.fail("no_space", "<script>")

    async def broken(stream: Any, body: wire.Connect) -> None:
        await stream.event(wire.Connected())
        await stream.fail("permission_denied", "<script>")

    async def stderr(stream: Any, body: wire.Connect) -> None:
        await stream.event(wire.Connected())
        await stream.data(b"x" * 100, wire.STDERR)
        await stream.data(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", wire.STDOUT)
        await stream.reply(wire.Done())

    for handler, expected in (
        (done, "guest_unresponsive"),
        (data, "guest_unresponsive"),
        (closed, "port_closed"),
        (refused, "failed"),
        (broken, "failed"),
    ):
        script.handlers[wire.Connect] = handler
        answer = await service.call("GET", f"/sandboxes/{box}/ports/8000/")
        assert (answer.code, error_of(answer)["error"]) == (STATUS[expected], expected)
        assert "<script>" not in answer.body.decode()
    script.handlers[wire.Connect] = stderr
    answer = await service.call("GET", f"/sandboxes/{box}/ports/8000/")
    assert (answer.code, answer.body) == (200, b"ok")


async def test_agents_that_never_let_go(service: Service, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose client has left is not kept. An agent that answers nothing loses its sandbox."""
    monkeypatch.setattr(link, "MAX_CANCELLED", 20)

    async def flood(stream: Any, body: wire.Connect) -> None:
        with suppress(asyncio.CancelledError):
            await stream.event(wire.Connected())
            await stream.data(b"HTTP/1.1 200 OK\r\n\r\n", wire.STDOUT)
            for _ in range(3):
                await stream.data(bytes(wire.CHUNK), wire.STDOUT)
            await asyncio.Event().wait()
        await is_over.wait()

    is_over = asyncio.Event()
    script = service.guest(box).script
    script.handlers[wire.Connect] = flood
    sandbox = service.sandboxes.get(service.owner, box)
    head = f"GET /sandboxes/{box}/ports/80/ HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n\r\n"

    async def leave() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(head.encode())
        await reader.readline()  # the guest has got the request
        writer.transport.abort()
        await eventually(lambda: len(sandbox.port_users) == 0)

    for _ in range(20):
        await leave()
    assert sandbox.guest.link._conversations == {}
    assert len(sandbox.guest.link._cancelled) == 20
    await leave()
    await eventually(lambda: sandbox.state is State.STOPPED)
    is_over.set()


async def test_connecting_is_bounded(service: Service, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that neither accepts nor refuses gives 502 in time. A client that leaves earlier is gone at once."""

    async def never(stream: Any, body: wire.Connect) -> None:
        await asyncio.Event().wait()

    service.guest(box).script.handlers[wire.Connect] = never
    sandbox = service.sandboxes.get(service.owner, box)
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    head = f"GET /sandboxes/{box}/ports/80/ HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n\r\n"
    writer.write(head.encode())
    await eventually(lambda: len(sandbox.port_users) == 1)
    writer.close()
    await writer.wait_closed()
    await eventually(lambda: len(sandbox.port_users) == 0)
    monkeypatch.setattr(ports, "CONNECT_TIMEOUT", 0.2)
    begun = time.monotonic()
    answer = await service.call("GET", f"/sandboxes/{box}/ports/80/")
    assert (answer.code, error_of(answer)["error"]) == (502, "port_closed")
    assert time.monotonic() - begun < 5


async def test_the_log_tells_little(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """A request has one line, without query, path within the service, key, or anything from the service."""
    caplog.set_level(logging.INFO)
    await lab.call("GET", f"/private-path?q=private-query&token={lab.service.key}")
    await lab.answered(b"HTTP/1.1 200 private-reason\r\nX: private-header\r\nContent-Length: 1\r\n\r\nx")
    await lab.answered(b"private-nonsense")
    await lab.service.call("GET", f"/t/{lab.service.key}{lab.base}/private-path")
    async with websocket(lab, query="?private-query"):
        pass
    lines = [record.getMessage() for record in caplog.records if "/ports/" in record.getMessage()]
    assert len(lines) == 5
    assert re.fullmatch(rf"GET {lab.base}/ 200 \d+ ms", lines[0])
    assert "private" not in caplog.text
    assert lab.service.key not in caplog.text
