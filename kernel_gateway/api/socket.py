"""WebSockets over a kernel's journal. Each connection reads the journal at its own speed.

A connection writes only as fast as its client reads, so nothing piles up here. A client that is behind gets
neighbouring text joined. A ping carries the number of the last message sent; its pong says that everything up to that
number has arrived.
"""

import asyncio
import logging
import socket
import struct
import time
import uuid
from collections.abc import Collection
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClosedError, WebSocketHandler, WebSocketProtocol, WebSocketProtocol13

from kernel_gateway.api.base import Handler
from kernel_gateway.errors import CellvmError, Draining, InvalidRequest, TooManyRequests
from kernel_gateway.held import SMALL, Held, Holding
from kernel_gateway.kernel.events import MAX_NAME
from kernel_gateway.kernel.journal import Gap, Record, merged
from kernel_gateway.kernel.kernel import Kernel
from kernel_gateway.kernel.pages import pages
from kernel_gateway.sandbox.access import Access
from kernel_gateway.sandbox.key import Key
from kernel_gateway.sandbox.lifecycle import ASLEEP
from kernel_gateway.sandbox.sandbox import Sandbox

log = logging.getLogger(__name__)

PIECE = 128 * 1024
"""Bytes of a client's message that are read before everybody else has a turn."""
BATCH = 256 * 1024
"""Bytes that are written before the client must have taken what came before."""
FLOOD, FLOOD_PAUSE = 3, 0.005
"""After this many reads in a row that found only text, text is gathered for this many seconds into one message."""
ACK_DELAY = 0.1
"""Seconds from a message to the ping that asks whether it has arrived."""
PING_INTERVAL = 30.0
PONG_TIMEOUT = 600.0
"""Seconds without a pong after which a connection is closed. They are many because some clients answer only while they
read. TCP notices dead peers, see `_keep_watch`."""
WATCHERS_MESSAGE = 64 * 1024
"""Bytes of the largest message from a client that only watches, and whose commands are all refused."""
MAX_VIEWERS = 8
"""Connections that one link to a sandbox may have at once, because they count for the sandbox's owner."""
HALF_OPEN = 40
"""Seconds that bytes may stay unacknowledged, or unread, before TCP gives the connection up."""

REPLACED, MALFORMED, NOT_ALLOWED, FAILED, GOING_DOWN, TRY_LATER, ENDED, PAUSED = (
    1000, 1007, 1008, 1011, 1012, 1013, 4410, 4411
)  # fmt: skip
"""Close codes; `docs/errors.md` explains them."""


TEXT, BINARY = 0x81, 0x82


def head(size: int, kind: int) -> bytes:
    """The header of one unmasked frame with a message of `size` bytes (RFC 6455, 5.2)."""
    if size < 126:
        return struct.pack("!BB", kind, size)
    return struct.pack("!BBH", kind, 126, size) if size < 65536 else struct.pack("!BBQ", kind, 127, size)


class Sockets:
    """The open WebSockets of a server, by owner.

    Args:
        most: connections that one owner may have at once. One that has been closed counts until the client has
            answered, or for five seconds.
        held: counts the messages. A message is held from its first byte until it has been passed on.
    """

    def __init__(self, most: int, held: Held) -> None:
        self.most = most
        self._held = held
        self._open: dict[str, set[Socket]] = {}

    def of(self, owner: str) -> int:
        """Number of connections of an owner."""
        return len(self._open.get(owner, ()))

    def check(self, key: Key) -> None:
        """Check that the key's owner may have another connection, and whoever has a link one of it.

        Raises:
            TooManyRequests: there are as many as there may be.
        """
        mine = self._open.get(key.owner, set())
        if key.scope.mode and sum(each.key.id == key.id for each in mine) >= MAX_VIEWERS:
            raise TooManyRequests(f"{MAX_VIEWERS} connections use this link, which is all that it may have at once")
        if len(mine) >= self.most:
            raise TooManyRequests(
                f"your key has {self.most} WebSockets open, which is all that one key may have at once",
                hint="close some; the operator sets the limit with --max-connections",
            )

    def add(self, new: "Socket") -> None:
        """Take in a connection, and close an older one of the same session."""
        mine = self._open.setdefault(new.sandbox.owner, set())
        for old in mine:
            if old.kernel is new.kernel and old.session == new.session:
                old.close(REPLACED, "the same session has connected again")
        mine.add(new)
        new.holding = self._held.account(new.sandbox.owner).hold("messages over WebSockets", share=new.key.scope.share)

    def remove(self, closed: "Socket") -> None:
        owner = closed.sandbox.owner
        closed.holding.release()
        self._open[owner].remove(closed)
        if not self._open[owner]:
            del self._open[owner]

    def close(self, code: int, reason: str) -> None:
        """Begin to close every connection."""
        for each in self._all():
            each.close(code, reason)

    def cut_others(self, keys: Collection[str]) -> None:
        """Close the connections of all keys but these, and take back what they hold and what has not begun."""
        for each in self._all():
            if each.key.id not in keys:
                each.kernel.give_up(each.session)
                each.close(NOT_ALLOWED, "the key was removed")

    def _all(self) -> list["Socket"]:
        return [each for mine in self._open.values() for each in mine]


class Frames(WebSocketProtocol13):
    """Tornado's protocol, which limits the messages of one connection. This one also limits those of one owner."""

    def __init__(self, socket: "Socket", params: Any) -> None:
        super().__init__(socket, mask_outgoing=False, params=params)
        self._socket = socket

    async def _read_bytes(self, n: int) -> bytes:
        """Called by Tornado for each part of a frame. When it reads the next frame, the last message was passed on."""
        size = len(self._fragmented_message_buffer or b"") + n
        try:
            self._socket.holding.resize(max(size - SMALL, 0))
        except CellvmError as error:
            self._socket.end(TRY_LATER, str(error))
            raise StreamClosedError from None
        if n <= PIECE:
            return await super()._read_bytes(n)
        pieces = []
        while n:
            pieces.append(await super()._read_bytes(min(n, PIECE)))
            n -= len(pieces[-1])
            await asyncio.sleep(0)  # everybody else has a turn
        return b"".join(pieces)

    async def _receive_frame_loop(self) -> None:
        """Receive until the end. An unfinished message goes then, because this object may live for seconds longer."""
        try:
            await super()._receive_frame_loop()
        finally:
            self._fragmented_message_buffer = None


class SocketQuery(msgspec.Struct):
    """`since`: number of the last message that the client has. `client` is its name, for others to see.

    `state`: it is to be told which cells run, wait and ask (the stream for agents only).
    """

    session_id: Annotated[str, msgspec.Meta(max_length=200)] = ""
    client: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""
    state: bool = False
    since: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Socket(WebSocketHandler, Handler):
    """One connection. A subclass finds the sandbox, makes frames of records, and reads the client's messages."""

    key: Key
    sandbox: Sandbox
    kernel: Kernel
    session: str
    holding: Holding
    """Messages that were received, or are announced, and have not been passed on."""
    is_binary = False
    route = ""
    """The path of the route, with names in place of ids."""

    def find(self, mine: Access, name: str) -> Sandbox:
        """The sandbox that the path names."""
        raise NotImplementedError

    async def frames(self, records: list[Record | Gap]) -> list[str | bytes]:
        """The frames that this client gets for records."""
        raise NotImplementedError

    async def prepare(self) -> None:
        """Refuse a bad request before the upgrade."""
        try:
            if self.request.method != "GET" or self.request.headers.get("Upgrade", "").lower() != "websocket":
                raise InvalidRequest("this is a WebSocket: connect with `Upgrade: websocket`")
            mine = self.authenticate()
            self.key = mine.key
            if mine.key.scope.mode:
                mine.key.scope.check_request("GET", self.route)
            else:
                mine.key.scope.check_change()
            self._sockets.check(mine.key)
            if self._sandboxes.places.is_draining:
                raise Draining("the server is going down")
            self._query: SocketQuery = self.query(SocketQuery)
            self.sandbox = self.find(mine, self.path_args[0])
            if self.sandbox.state in ASLEEP and self.key.scope.mode != "watch":
                await self._sandboxes.pauses.wake(self.sandbox)
            self.kernel = self.sandbox.guest.kernel
            since = self._query.since
            if since is not None and since > self.kernel.journal.last:
                raise InvalidRequest(
                    f"`since={since}` is ahead of the journal, which ends at {self.kernel.journal.last}",
                    hint="it is another kernel's number; leave `since` out",
                )
        except CellvmError as error:
            self.finish(self.set_error(error))

    @property
    def _sockets(self) -> Sockets:
        sockets: Sockets = self.application.settings["sockets"]
        return sockets

    def check_origin(self, origin: str) -> bool:
        """Whether the settings allow pages of another origin. Tornado lets pages of the server's own origin in."""
        return origin in self.application.settings["origins"]

    @property
    def max_message_size(self) -> int:
        return WATCHERS_MESSAGE if self.only_watches else int(self.application.settings["max_message"])

    @property
    def only_watches(self) -> bool:
        """Whether it must not matter to the sandbox that the client is there."""
        return self.key.scope.mode == "watch"

    def get_websocket_protocol(self) -> WebSocketProtocol | None:
        protocol = super().get_websocket_protocol()
        return Frames(self, protocol.params) if isinstance(protocol, WebSocketProtocol13) else None

    def open(self, *args: str, **kwargs: str) -> None:
        self.set_nodelay(True)
        self._keep_watch()
        self.session = self._query.session_id or uuid.uuid4().hex
        if self.key.scope.mode:
            # Whoever has a link sees the sessions of others in the ids of their cells, and may not take their places.
            self.session = f"{self.key.id} {self.session}"
            self._store.used(self.key.id)
        self._sockets.add(self)
        self.kernel.clients.add(self)
        since = self._query.since
        self.seen = self.kernel.attach(self.session, since, is_kept=not self.key.scope.mode)
        self.reader = self.kernel.journal.reader(self.seen.received, holds=not self.only_watches)
        self.present = self.kernel.journal.last
        self.inherited = frozenset[str]() if since is None else self.kernel.pending
        self.is_told_all = since is not None
        self.sent_before = self.seen.sent
        self._written = self.reader.after
        self._last_pong = time.monotonic()
        self._is_soon = False
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(PING_INTERVAL, self._ping)
        self._pumping = asyncio.create_task(self._pump())

    def _keep_watch(self) -> None:
        """Let TCP notice a peer that is gone, or that reads nothing while bytes wait for it."""
        assert self.ws_connection is not None
        assert self.ws_connection.stream is not None
        self._stream = self.ws_connection.stream
        stream = self._stream
        if stream.closed():
            raise StreamClosedError
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, HALF_OPEN * 1000)

    async def _pump(self) -> None:
        """Send the journal's records, old and new, as fast as the client reads them."""
        try:
            texts = 0
            async with aclosing(pages(self.reader, self.kernel.account)) as found:
                async for records in found:
                    if self.is_closing:
                        break
                    self.seen.sent = max(self.seen.sent, self.reader.after)
                    is_text = all(isinstance(r, Record) and r.kind == "stream" for r in records)
                    frames = await self.frames(merged(records, self.sent_before))
                    records.clear()  # the client may read slowly, and once in memory is enough
                    await self.send(frames)
                    self._written = self.reader.after
                    self._acknowledge_soon()
                    texts = texts + 1 if is_text else 0
                    if texts >= FLOOD:
                        await asyncio.sleep(FLOOD_PAUSE)
            self.end(ENDED, self.kernel.reason)
        except StreamClosedError:
            pass  # Tornado calls `on_close`, too
        except Exception:
            log.exception("a connection to the kernel of sandbox %s failed", self.sandbox.id)
            self.end(FAILED, "the server failed; its log says why")

    @property
    def is_closing(self) -> bool:
        return self.ws_connection is None or self.ws_connection.is_closing()

    async def send(self, frames: list[str | bytes]) -> None:
        """Write messages together, and after each batch wait until the client has read it.

        Tornado would write each message with a system call and a task of its own. That is half of a short cell's cost.
        """
        batch = bytearray()
        frames.reverse()
        while frames:
            frame = frames.pop()
            data = frame.encode() if isinstance(frame, str) else frame
            batch += head(len(data), TEXT if isinstance(frame, str) else BINARY)
            batch += data
            del frame, data  # the client may read slowly, and once in memory is enough
            if len(batch) >= BATCH or not frames:
                await self._write(batch)
                batch = bytearray()

    async def _write(self, frames: bytearray) -> None:
        """Write frames unless a Close frame has gone out, because no data may follow it (RFC 6455, 5.5.1)."""
        if not self.is_closing:
            await self._stream.write(memoryview(frames))

    def leave(self) -> None:
        """Called by the kernel before its sandbox is paused. What the client sends from now on is not read."""
        self.end(PAUSED, "the sandbox is being paused")

    def changed(self) -> None:
        """Called by the kernel when another cell runs, waits or asks than before. A subclass may tell its client."""

    def end(self, code: int, text: str) -> None:
        """Close with a reason. It is cut, because a close frame holds 123 bytes of it."""
        self.close(code, text.encode()[:120].decode("utf-8", "ignore"))

    def _acknowledge_soon(self) -> None:
        if not self._is_soon:
            self._is_soon = True
            self._timer.cancel()
            self._timer = self._loop.call_later(ACK_DELAY, self._ping)

    def _ping(self) -> None:
        self._is_soon = False
        if time.monotonic() - self._last_pong > PONG_TIMEOUT:
            self.close(NOT_ALLOWED, "no pong")
            return
        self._timer = self._loop.call_later(PING_INTERVAL, self._ping)
        try:
            self.ping(b"%d" % self._written)
        except WebSocketClosedError:
            pass  # Tornado calls `on_close`, too

    def on_pong(self, data: bytes) -> None:
        self._last_pong = time.monotonic()
        if data.isdigit() and len(data) < 20:
            self.seen.received = max(self.seen.received, min(int(data), self.seen.sent))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, (StreamClosedError, WebSocketClosedError)):  # a client may go at any time
            super().log_exception(typ, value, tb)

    def on_close(self) -> None:
        self._sockets.remove(self)
        self.kernel.clients.discard(self)
        self.kernel.client_left(self.session)
        self._timer.cancel()
        self._pumping.cancel()
