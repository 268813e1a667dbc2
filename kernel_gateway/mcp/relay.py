"""MCP over stdio: each line of the input is posted to a server, and each message of its answers is a line of output.

When a client cancels a request, the request's connection is closed, which is how a server is told. All calls of this
process have one scope, and so one sandbox.
"""

import asyncio
import ssl
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import quote, urlsplit

import h11
import msgspec

from kernel_gateway.mcp.protocol import headers_of
from kernel_gateway.mcp.scopes import SCOPE

LINE = 8 * 1024 * 1024
"""Bytes of the longest line that is taken."""


class Server:
    """A server's HTTP interface. Each request has a connection of its own, because closing it cancels the request.

    Args:
        url: the server's, as it prints it.
        key: an API key.
    """

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname or "localhost", parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/")
        self._headers = [("Host", parts.netloc.rpartition("@")[2]), ("Authorization", f"Bearer {key}")]

    async def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> AsyncIterator[h11.Response | bytes]:
        """The head of the answer, then its body in pieces. Closing the iterator closes the connection.

        Raises:
            OSError, h11.ProtocolError: the server can't be reached, or the connection broke.
        """
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        try:
            connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=64 * 1024)
            sent = [*self._headers, ("Content-Length", str(len(body))), *(headers or {}).items()]
            request = h11.Request(method=method, target=self._base + path, headers=sent)
            for event in (request, h11.Data(data=body), h11.EndOfMessage()):
                writer.write(connection.send(event) or b"")
            while True:
                match connection.next_event():
                    case h11.NEED_DATA:
                        connection.receive_data(await reader.read(64 * 1024))
                    case h11.Response() as head:
                        yield head
                    case h11.Data(data=data):
                        yield bytes(data)
                    case h11.EndOfMessage() | h11.ConnectionClosed():
                        return
        finally:
            writer.close()

    async def call(self, method: str, path: str) -> tuple[int, bytes]:
        """An answer's status and body."""
        status, body = 0, b""
        async for item in self.request(method, path):
            if isinstance(item, h11.Response):
                status = item.status_code
            else:
                body += item
        return status, body


class Relay:
    """The messages of one client, on their way to a server and back.

    Args:
        scope: names the client's sandbox.
        out: takes a message for the client.
    """

    def __init__(self, server: Server, scope: str, out: Callable[[bytes], None]) -> None:
        self._server = server
        self._scope = scope
        self._out = out
        self._session: str | None = None
        self._running: dict[Any, asyncio.Task[None]] = {}

    async def run(self, lines: Callable[[], Awaitable[bytes]]) -> None:
        """Pass messages on until the input ends. What still runs then is cancelled."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            while line := await lines():
                if not line.strip():
                    continue
                head = self._head(line)
                if head.get("method") == "notifications/cancelled":
                    running = self._running.get((head.get("params") or {}).get("requestId"))
                    if running is not None:
                        running.cancel()
                    continue
                task = asyncio.create_task(self._pass(line, head))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                if head.get("method") == "initialize":
                    await task  # its session is every later message's
                elif head.get("id") is not None:
                    self._running[head["id"]] = task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    def _head(line: bytes) -> dict[str, Any]:
        try:
            message = msgspec.json.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return {}  # the server says what is wrong with it
        return message if isinstance(message, dict) else {}

    async def _pass(self, line: bytes, head: dict[str, Any]) -> None:
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        headers |= headers_of(line)
        if self._session is not None and "MCP-Protocol-Version" not in headers:
            headers["Mcp-Session-Id"] = self._session
        body, is_stream = b"", False
        try:
            path = f"/mcp?scope={quote(self._scope)}"
            async for item in self._server.request("POST", path, line.strip(), headers):
                if isinstance(item, h11.Response):
                    told = {name.decode().lower(): value.decode() for name, value in item.headers}
                    is_stream = told.get("content-type", "").startswith("text/event-stream")
                    self._session = told.get("mcp-session-id", self._session)
                    continue
                body += item
                while is_stream and b"\n\n" in body:
                    event, _, body = body.partition(b"\n\n")
                    self._tell(event.partition(b"data: ")[2])
            if not is_stream:
                self._tell(body, head)
        except (OSError, h11.ProtocolError) as error:
            self._fail(head, f"the server can't be reached: {error}")
        finally:
            self._running.pop(head.get("id"), None)

    def _tell(self, message: bytes, head: dict[str, Any] | None = None) -> None:
        if not message.strip():
            return
        if head is not None and b'"jsonrpc"' not in message:  # an error of the server's own
            said = self._head(message)
            self._fail(head, str(said.get("message", "the server refused the request")))
            return
        self._out(message.strip() + b"\n")

    def _fail(self, head: dict[str, Any], message: str) -> None:
        if head.get("id") is not None:
            error = {"code": -32603, "message": message}
            self._out(msgspec.json.encode({"jsonrpc": "2.0", "id": head["id"], "error": error}) + b"\n")


async def relay(url: str, key: str, scope: str, *, keep: bool) -> None:
    """Serve MCP on standard input and output until the input ends.

    Args:
        scope: names the sandbox; empty for one of this process.
        keep: leave the sandbox running at the end.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    scope = scope or uuid.uuid4().hex
    server = Server(url, key)

    def out(message: bytes) -> None:
        sys.stdout.buffer.write(message)
        sys.stdout.buffer.flush()

    try:
        await Relay(server, scope, out).run(reader.readline)
    finally:
        if not keep:
            await end_sandboxes(server, scope)


async def end_sandboxes(server: Server, scope: str) -> None:
    """End the sandboxes of a scope."""
    status, body = await server.call("GET", f"/sandboxes?metadata={quote(f'{SCOPE}={scope}', safe='')}")
    if status == 200:
        for sandbox in msgspec.json.decode(body):
            await server.call("DELETE", f"/sandboxes/{sandbox['sandboxID']}")
