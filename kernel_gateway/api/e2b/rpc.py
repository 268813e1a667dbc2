"""The procedures of E2B's clients: one table of methods, and the endpoint that serves them over Connect's codec."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from enum import Enum
from typing import Any, NamedTuple

import msgspec
from tornado.iostream import StreamClosedError

from kernel_gateway.api.base import Call, Route, decode
from kernel_gateway.api.e2b import connect, filesystem, process
from kernel_gateway.api.e2b.plane import GONE, Plane
from kernel_gateway.errors import CellvmError, InvalidRequest, Unavailable

KEEPALIVE, SHORTEST_KEEPALIVE = 90.0, 1.0
"""Seconds of silence after which a stream says that it lives, unless the client asks for others, and the least."""


class Kind(Enum):
    """How a method is called."""

    UNARY = "unary"
    SERVER = "stream of answers"
    CLIENT = "stream of requests"


class Method(NamedTuple):
    """A method. `operation` gets the call and the request.

    It returns the answer, or for a stream of answers an iterator over them. For a stream of requests it gets an
    iterator over those. Without an operation the method is not offered.
    """

    kind: Kind
    request: Any
    operation: Callable[..., Any]
    keepalive: Any = None


METHODS = {
    "process.Process/List": Method(Kind.UNARY, process.Nothing, process.list_processes),
    "process.Process/Start": Method(Kind.SERVER, process.Start, process.start, process.KEEPALIVE),
    "process.Process/Connect": Method(Kind.SERVER, process.Selected, process.connect_to, process.KEEPALIVE),
    "process.Process/SendInput": Method(Kind.UNARY, process.SendInput, process.send_input),
    "process.Process/StreamInput": Method(Kind.CLIENT, process.InputMessage, process.stream_input),
    "process.Process/CloseStdin": Method(Kind.UNARY, process.Selected, process.close_stdin),
    "process.Process/SendSignal": Method(Kind.UNARY, process.SendSignal, process.send_signal),
    "process.Process/Update": Method(Kind.UNARY, process.Update, process.update),
    "filesystem.Filesystem/Stat": Method(Kind.UNARY, filesystem.AtPath, filesystem.stat),
    "filesystem.Filesystem/ListDir": Method(Kind.UNARY, filesystem.ListDir, filesystem.list_dir),
    "filesystem.Filesystem/MakeDir": Method(Kind.UNARY, filesystem.AtPath, filesystem.make_dir),
    "filesystem.Filesystem/Move": Method(Kind.UNARY, filesystem.Move, filesystem.move),
    "filesystem.Filesystem/Remove": Method(Kind.UNARY, filesystem.AtPath, filesystem.remove),
    "filesystem.Filesystem/WatchDir": Method(Kind.SERVER, filesystem.WatchDir, filesystem.watch_dir, {"keepalive": {}}),
    "filesystem.Filesystem/CreateWatcher": Method(Kind.UNARY, filesystem.WatchDir, filesystem.create_watcher),
    "filesystem.Filesystem/GetWatcherEvents": Method(Kind.UNARY, filesystem.Watcher, filesystem.get_watcher_events),
    "filesystem.Filesystem/RemoveWatcher": Method(Kind.UNARY, filesystem.Watcher, filesystem.remove_watcher),
}


class Procedure(Plane):
    """A method, whether there is one or not. Its errors are Connect's.

    So is that of an unknown one, because a plain 404 would mean to clients that a file or a process does not exist.
    """

    def status_of(self, error: CellvmError) -> int:
        return 502 if isinstance(error, GONE) else connect.status_of(error)

    def error_body(self, error: CellvmError, status: int) -> bytes:
        if isinstance(error, GONE):
            return super().error_body(error, status)
        return msgspec.json.encode(connect.error_body(error))


class Rpc(Procedure):
    """A method that there is."""

    _method: Method

    async def prepare(self) -> None:
        self._is_stream = False
        await super().prepare()

    def named(self, route: Route) -> dict[str, str]:
        """Check the codec, too, because this is before the body is read."""
        self._method = METHODS[route.path.removeprefix("/")]
        headers = self.request.headers
        is_stream = self._method.kind is not Kind.UNARY
        encoding = headers.get("Content-Encoding", "") if not is_stream else headers.get("Connect-Content-Encoding", "")
        try:
            connect.check_content(headers.get("Content-Type", ""), encoding, is_stream=is_stream)
        except connect.Failed:
            self.set_header("Accept-Post", f"{connect.UNARY}, {connect.STREAM}")
            raise
        self._is_stream = is_stream
        return super().named(route)

    def _decoded(self, kind: Any) -> Any:
        data = bytes(self._body)
        self._body.clear()
        return decode(connect.only_message(data) if self._is_stream else data, kind)

    async def requests(self, kind: Any) -> AsyncIterator[Any]:
        """The messages of a stream of requests, as they come."""
        decoder = connect.Decoder()
        async for chunk in self.body_chunks():
            decoder.receive_data(chunk)
            for message in decoder.messages():
                yield decode(message, kind)
        decoder.check_end()

    async def send(self, data: bytes) -> None:
        self.write(data)
        await self.flush()

    async def begin_stream(self) -> None:
        """Send the head at once, because a client waits for it."""
        self.set_header("Content-Type", connect.STREAM)
        await self.flush()

    async def _fail(self, error: Exception) -> None:
        """Tell an error within a stream in its last envelope, where clients of streams look for it."""
        is_told = isinstance(error, CellvmError) and not isinstance(error, GONE)
        if not (self._is_stream and self._headers_written and is_told):
            await super()._fail(error)
            return
        assert isinstance(error, CellvmError)
        self.write(connect.end(error))
        self._is_answered = True
        with suppress(StreamClosedError):  # the client has gone
            await self.flush()


async def keeping_alive(
    events: AsyncGenerator[Any, None], interval: float, keepalive: Any
) -> AsyncGenerator[Any, None]:
    """The events, and in each `interval` seconds of silence one that says that the stream lives."""
    following: asyncio.Task[Any] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))
            await asyncio.wait({following}, timeout=interval)
            if not following.done():
                yield keepalive
                continue
            try:
                event = following.result()
            except StopAsyncIteration:
                return
            finally:
                following = None
            yield event
    finally:
        if following is not None:
            following.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration, CellvmError):
                await following
        await events.aclose()


async def call_unary(call: Call, body: Any) -> Any:
    """Answer a unary call."""
    http = of(call)
    return await http._method.operation(call, body)


async def call_server_stream(call: Call, body: Any) -> None:
    """Answer with a stream of messages. Its time is bounded by the client's header."""
    http = of(call)
    headers = call.http.request.headers
    interval = keepalive_interval(headers.get("Keepalive-Ping-Interval", ""))
    limit = connect.timeout(headers.get("Connect-Timeout-Ms", ""))
    await http.begin_stream()
    events = keeping_alive(http._method.operation(call, body), interval, http._method.keepalive)
    has_begun = False
    try:
        async with aclosing(events), asyncio.timeout(limit):
            async for event in events:
                has_begun = has_begun or event is not http._method.keepalive
                if has_begun:  # the SDKs fail if another event than the start comes first
                    await http.send(connect.envelope(event))
    except TimeoutError:
        raise connect.Failed(connect.Code.DEADLINE_EXCEEDED, "the time of the call is over") from None
    await http.send(connect.end())
    await http.finish()


async def call_client_stream(call: Call) -> None:
    """Take a stream of messages, and answer with one."""
    http = of(call)
    answer = await http._method.operation(call, http.requests(http._method.request))
    http.set_header("Content-Type", connect.STREAM)
    http.write(connect.envelope(answer) + connect.end())
    await http.finish()


def of(call: Call) -> Rpc:
    assert isinstance(call.http, Rpc)
    return call.http


def keepalive_interval(text: str) -> float:
    """The seconds of a header `Keepalive-Ping-Interval`."""
    if not text:
        return KEEPALIVE
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):  # `float` takes "nan", with which a timer never ends
        raise InvalidRequest("Keepalive-Ping-Interval is a number of seconds")
    return max(float(text), SHORTEST_KEEPALIVE)


async def not_offered(call: Call) -> None:
    """A method that there is none of."""
    raise Unavailable(f"{call.http.request.path[:200]}: this server has no such method")


ROUTES = [
    Route("POST", f"/{name}", call_client_stream, upload=True, produces=connect.STREAM)
    if method.kind is Kind.CLIENT
    else Route("POST", f"/{name}", call_unary, body=method.request, answer=dict)
    if method.kind is Kind.UNARY
    else Route("POST", f"/{name}", call_server_stream, body=method.request, produces=connect.STREAM)
    for name, method in METHODS.items()
]
