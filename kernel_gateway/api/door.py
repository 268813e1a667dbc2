"""The front door: Tornado's HTTP server, with bounds for strangers.

Whoever reaches the port may connect, before any key is asked for. So connections are counted, in all and for each
address. A connection must show a request's head in time. When descriptors run out, the door waits, because an accept
that fails again and again would take the processor from everybody.
"""

import asyncio
import ipaddress
import logging
import socket
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

from tornado.http1connection import HTTP1ServerConnection
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPMessageDelegate

log = logging.getLogger(__name__)

AT_ONCE = 8
"""Connections that are accepted before everybody else has a turn."""
ACCEPT_PAUSE = 0.1
"""Seconds without accepting after there was no descriptor for a connection."""
FIRST_HEAD = 60.0
"""Seconds that a new connection has for the head of its first request."""
HEAD = 10.0
"""Seconds that a head may take from its first byte to its last, and TLS its handshake."""
TICK = 1.0
"""Seconds between looks at the heads."""
COMPLAINT = 60.0
"""Seconds between two complaints in the log."""


class Waiting:
    """A connection that waits for a head: since when, and since when a part of it is there."""

    def __init__(self, is_first: bool) -> None:
        self.since = time.monotonic()
        self.begun: float | None = None
        self.is_first = is_first

    def is_late(self, has_begun: bool, now: float) -> bool:
        if has_begun and self.begun is None:
            self.begun = now
        if self.begun is not None:
            return now - self.begun > HEAD
        return self.is_first and now - self.since > FIRST_HEAD


class Heads(HTTPMessageDelegate):
    """Passes a request on, and takes note that its head is there."""

    def __init__(self, inner: HTTPMessageDelegate, arrived: Any) -> None:
        self._inner = inner
        self._arrived = arrived

    def headers_received(self, start_line: Any, headers: Any) -> Any:
        self._arrived()
        return self._inner.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> Any:
        return self._inner.data_received(chunk)

    def finish(self) -> None:
        self._inner.finish()

    def on_connection_close(self) -> None:
        self._inner.on_connection_close()


class Door(HTTPServer):
    """An HTTP server that takes `most` connections, and a quarter of them from one address that is not this host's."""

    most = 10_000

    def initialize(self, *args: Any, **options: Any) -> None:
        super().initialize(*args, **options)
        self._waiting: dict[HTTP1ServerConnection, Waiting] = {}
        self._addresses: dict[HTTP1ServerConnection, str] = {}
        self._by_address: Counter[str] = Counter()
        self._complained = -COMPLAINT
        self._watch: asyncio.Task[None] | None = None

    # -- accepting

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        """Listen on sockets that are bound already."""
        loop = asyncio.get_running_loop()
        for sock in sockets:
            number = sock.fileno()
            self._sockets[number] = sock
            self._handlers[number] = partial(self._refuse, number)
            loop.add_reader(number, self._accept, sock)
        self._watch = loop.create_task(self._watch_heads())

    def _refuse(self, number: int) -> None:
        asyncio.get_running_loop().remove_reader(number)

    def stop(self) -> None:
        """Accept no more connections. Those that are open go on."""
        if self._watch is not None:
            self._watch.cancel()
        super().stop()

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                connection, address = sock.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._complain(f"connections can't be accepted: {error}")
                loop = asyncio.get_running_loop()
                loop.remove_reader(sock)
                loop.call_later(ACCEPT_PAUSE, self._accept_again, sock)
                return
            place = str(address[0])
            if len(self._connections) >= self.most:
                self._complain(f"{self.most} connections are open, and no more are taken")
                connection.close()
            elif self._by_address[place] >= self.most // 4 and not ipaddress.ip_address(place).is_loopback:
                self._complain(f"{place} has {self.most // 4} connections, and no more are taken from there")
                connection.close()
            else:
                self._handle_connection(connection, address)

    def _accept_again(self, sock: socket.socket) -> None:
        if sock.fileno() in self._sockets:
            asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)

    def _complain(self, text: str) -> None:
        if time.monotonic() - self._complained > COMPLAINT:
            self._complained = time.monotonic()
            log.warning("%s", text)

    # -- heads

    def start_request(self, server_conn: Any, request_conn: Any) -> HTTPMessageDelegate:
        """Called by Tornado when a connection begins to wait for a request."""
        is_first = server_conn not in self._addresses
        if is_first:
            place = str(server_conn.context.address[0]) if server_conn.context.address else ""
            self._addresses[server_conn] = place
            self._by_address[place] += 1
        self._waiting[server_conn] = Waiting(is_first)
        inner = super().start_request(server_conn, request_conn)
        return Heads(inner, partial(self._waiting.pop, server_conn, None))

    def on_close(self, server_conn: Any) -> None:
        """Called by Tornado when a connection has ended."""
        self._waiting.pop(server_conn, None)
        place = self._addresses.pop(server_conn, None)
        if place is not None:
            self._by_address[place] -= 1
            if not self._by_address[place]:
                del self._by_address[place]
        super().on_close(server_conn)

    async def _watch_heads(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            for connection, waiting in list(self._waiting.items()):
                stream = connection.stream
                has_begun = stream._read_buffer_size > 0 or getattr(stream, "_ssl_accepting", False)
                if waiting.is_late(has_begun, now):
                    stream.close()
