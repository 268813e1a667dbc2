"""Services in sandboxes, from outside: the permission, and the bytes both ways (docs/ports.md).

    client ── Tornado ── Preview ── Exchange (h11) ── Conversation ── agent ── service

A Preview is not a RequestHandler, because any method is allowed and the answer is the service's. Each request has its
own connection to the service. Credit makes one end wait while the other reads slowly. A failure before the head of
the answer becomes one of our errors. After the head the client's connection is cut, so that half an answer does not
look whole.
"""

import asyncio
import logging
import re
import select
import socket
from collections.abc import Callable
from http import HTTPStatus
from http.client import responses
from typing import Annotated, Any, TypeVar

import msgspec
from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPHeaders, HTTPMessageDelegate, HTTPServerRequest, RequestStartLine, ResponseStartLine
from tornado.iostream import IOStream, StreamClosedError

from guest_agent import wire
from kernel_gateway.api.base import DROPPED_BODY, STATUS, Call, ErrorBody, Requests, key_of, phrase, refusal
from kernel_gateway.api.guesses import Guesses
from kernel_gateway.errors import (
    CellvmError,
    Conflict,
    Draining,
    Forbidden,
    GuestFailure,
    GuestUnresponsive,
    HostFull,
    InvalidRequest,
    NotFound,
)
from kernel_gateway.guest.link import Conversation
from kernel_gateway.ports import (
    TRAFFIC,
    Answer,
    Carried,
    Client,
    Exchange,
    Headers,
    Place,
    answer_headers,
    framing,
    refuse_key_in_path,
    without_keys,
)
from kernel_gateway.sandbox.access import Access
from kernel_gateway.sandbox.key import Key, is_secret
from kernel_gateway.sandbox.lifecycle import ASLEEP
from kernel_gateway.sandbox.sandbox import Sandbox
from kernel_gateway.sandbox.sandboxes import Sandboxes
from kernel_gateway.sandbox.store import Store

log = logging.getLogger(__name__)

T = TypeVar("T")
CONNECT_TIMEOUT = 10.0
"""Seconds a service may take to accept a connection, times the driver's time scale."""
MAX_CONNECTIONS, MAX_VISITORS = 256, 192
"""Connections to the services of one sandbox at a time, in all and of visitors."""
WINDOW = 64 * 1024
"""Bytes that a service may send ahead of its client."""
CONNECTION, VISITORS_SHARE = 2 * WINDOW, 0.5
"""Bytes that are held for a connection: what a service has sent, and a piece on its way to the client. Visitors' bytes
are the sandbox's owner's, and take this share of what may be held for the owner."""
STALL_TIMEOUT = 600.0
"""Seconds for which a service may read nothing of a request's body. They are limited because meanwhile we can't tell
whether the client is still there."""
PIECE = 256 * 1024
"""Bytes that are read from a client at once after a switch to another protocol."""
MAX_EVENTS = 50
"""Chunks of an answer that are read at once. They are limited because a service may send very many small ones."""
HANG_UP_LOOK = 5.0
"""Seconds between looks at whether the client is still there. We look because Tornado does not notice a hang-up while
it holds bytes of the next request."""
IGNORED_BODY_TIMEOUT = 60.0
"""Seconds to wait for the rest of a request's body after the answer."""
LINGER = 5.0
"""Seconds a service has to read the last bytes of a client that hung up."""


# -- which ports are open


class PortModel(msgspec.Struct):
    """A port that is open to everybody, and its addresses: a path on this server, and a host name."""

    port: int
    public: bool
    path: str
    host: str


class PortsModel(msgspec.Struct):
    """`allPublic`: every port is open. `ports`: the ports that were opened one by one."""

    allPublic: bool
    ports: list[PortModel]


class SetPort(msgspec.Struct):
    """Open a port to everybody, or close it again. Without `port` all ports are meant."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    public: bool = False


async def list_ports(call: Call) -> PortsModel:
    """The ports of a sandbox that are open to everybody."""
    sandbox, settings = call.sandbox, call.http.application.settings
    return PortsModel(
        sandbox.all_ports_open,
        [
            PortModel(
                port,
                True,
                f"{settings['base_url']}/sandboxes/{sandbox.id}/ports/{port}/",
                f"{port}-{sandbox.id}.{settings['domain']}",
            )
            for port in sorted(sandbox.open_ports)
        ],
    )


async def set_port(call: Call, body: SetPort) -> None:
    """Open a port, or all, to everybody who has its address, or close it. Closing cuts the visitors' connections."""
    sandbox = call.sandbox
    if body.port is None:
        sandbox.open_all_ports(body.public)
    elif sandbox.all_ports_open and not body.public:
        raise Conflict("all ports are open: one alone can't be closed", hint='close all with {"public": false} first')
    else:
        sandbox.open_port(body.port, body.public)


# -- one request


class NoTrafficToken(Forbidden):
    """A closed port was asked for by its host name, without anything that could open it. The words are E2B's."""

    def __init__(self) -> None:
        super().__init__(
            f"Token header '{TRAFFIC}' is missing",
            hint="send the sandbox's token for its ports, or a key as `Authorization: Bearer <key>`, or open the port",
        )


def client_of(request: HTTPServerRequest) -> Client:
    return Client(request.remote_ip or "", request.protocol, request.host)


class Preview(HTTPMessageDelegate):
    """One request to a service, from its head to the end of its answer.

    Args:
        settings: the application's.
        rest: the address after the port, without the query, still encoded.
        key_in_path: the address begins with `/t/KEY`.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        request: HTTPServerRequest,
        place: Place,
        rest: str,
        *,
        key_in_path: bool = False,
    ) -> None:
        assert isinstance(request.connection, HTTP1Connection)
        self._sandboxes: Sandboxes = settings["sandboxes"]
        self._store: Store = settings["store"]
        self._guesses: Guesses = settings["guesses"]
        self._stripped: re.Pattern[str] = settings["stripped"]
        self._requests: Requests = settings["requests"]
        self._reading: asyncio.Lock = settings["reading"]
        self._request = request
        self._connection = request.connection
        self._place = place
        self._rest = rest
        self._key_in_path = key_in_path
        self._sandbox: Sandbox | None = None
        self._key: Key | None = None  # None for a visitor
        self._exchange: Exchange | None = None
        self._conversation: Conversation | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_begun = asyncio.Event()  # the request is on its way, and it is settled whether protocols switch
        self._has_whole_body = asyncio.Event()
        self._has_head = False
        self._is_answered = False
        self._is_last = False
        self._dropped = 0
        self._status = 0
        self._ending: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Preview {self._place.sandbox}:{self._place.port} {self._status or '…'}>"

    # -- called by Tornado

    async def headers_received(self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders) -> None:
        self._requests.add(self)
        self._connection.set_close_callback(self.on_connection_close)
        # Until Tornado reads again, only this callback notices that the client hangs up.
        self._connection.stream.set_close_callback(self.on_connection_close)
        self._connection.stream.set_nodelay(True)
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._finished())
        self._look_again()
        await self._is_begun.wait()

    async def data_received(self, chunk: bytes) -> None:
        if self._is_answered or self._conversation is None or self._exchange is None:
            # The body is read on after the answer, because many clients read only when they have sent everything.
            self._dropped += len(chunk)
            if self._dropped > DROPPED_BODY:
                self._connection.close()
        elif self._may_go_on:
            await self._send(self._exchange.body(chunk))

    def finish(self) -> None:
        self._has_whole_body.set()
        if self._exchange is None or self._is_answered or not self._may_go_on:
            return
        if last := self._exchange.end():
            self._ending = asyncio.create_task(self._send(last))

    def on_connection_close(self) -> None:
        """The client hung up: end the connection to the service."""
        if self._task is not None:
            self._task.cancel()

    def _look_at_client(self) -> None:
        stream = self._connection.stream
        if stream is None or stream.socket is None:  # switched to another protocol, or closed
            return
        poll = select.poll()
        poll.register(stream.socket, select.POLLRDHUP)
        # While a body comes, this may be the body's end or a hang-up. Tornado finds out which.
        if poll.poll(0) and (self._has_whole_body.is_set() or self._exchange is None):
            self.on_connection_close()
        else:
            self._look_again()

    def _look_again(self) -> None:
        self._look = asyncio.get_running_loop().call_later(HANG_UP_LOOK, self._look_at_client)

    # -- the way there

    async def _run(self) -> None:
        try:
            await self._answer()
        except (StreamClosedError, asyncio.CancelledError):
            self._connection.close()  # the client has gone
        except Exception as error:  # noqa: BLE001  `_fail` logs unknown errors
            try:
                await self._fail(error)
            except (StreamClosedError, asyncio.CancelledError):
                self._connection.close()

    def _finished(self) -> None:
        self._look.cancel()
        self._is_begun.set()
        self._requests.discard(self)

    async def _answer(self) -> None:
        headers = list(self._request.headers.get_all())
        self._is_last = True  # if `framing` raises, nobody knows where the request ends
        length = framing(headers)
        self._is_last = False
        port = self._place.number
        if self._key_in_path:
            raise InvalidRequest(
                "a port's address may not begin with `/t/`: the page could read the key in it",
                hint="send the key as `Authorization: Bearer <key>` or `X-API-Key: <key>`, or open the port",
            )
        if not self._rest:
            await self._redirect()
            return
        if not self._rest.startswith("/") or self._request.method == "CONNECT":
            raise InvalidRequest("a request to a port has a path, as in GET /…; the port is no proxy")
        refuse_key_in_path(self._rest, self._store.find_key)
        carried = without_keys(headers, self._request.query, self._store.find_key)
        sandbox = self._sandbox = self._find(carried)
        if self._sandboxes.places.is_draining:
            raise Draining("the server is going down")
        if sandbox.state in ASLEEP:
            await self._sandboxes.pauses.wake(sandbox)
        link = sandbox.guest.link
        if len(sandbox.port_users) >= (MAX_VISITORS if self._is_stranger else MAX_CONNECTIONS):
            raise HostFull("there are too many connections to ports of this sandbox", hint="close some, or wait")
        assert self._task is not None
        sandbox.port_users[self._task] = port if self._key is None else self._key.id
        account = self._sandboxes.held.account(sandbox.owner)
        share = VISITORS_SHARE if self._is_stranger else 1.0
        try:
            with account.hold("connections to ports", CONNECTION, share=share):
                async with link.ask(wire.Connect(port=port, window=WINDOW), WINDOW) as conversation:
                    await self._connect(conversation, CONNECT_TIMEOUT * link.time_scale)
                    await self._converse(conversation, carried, length)
        finally:
            del sandbox.port_users[self._task]
        if self._is_answered:
            await self._end()

    def _find(self, carried: Carried) -> Sandbox:
        """The sandbox, if the client may reach this port of it.

        Raises:
            Unauthorized, TooManyRequests, Forbidden, NotFound: the client may not. The words are the same whether the
                sandbox exists or not.
        """
        refused: CellvmError | None = None
        for key in carried.keys:
            try:
                sandbox = Access(self._sandboxes, self._store, key).get(self._place.sandbox)
                is_read = self._request.method in ("GET", "HEAD") and "Upgrade" not in self._request.headers
                if key.scope.mode or not is_read:
                    key.scope.check_change()
            except (NotFound, Forbidden) as error:
                refused = error
            else:
                self._key = key
                return sandbox
        visited = self._sandboxes.find(self._place.sandbox)
        token = self._request.headers.get(TRAFFIC, "")
        if visited is not None and token and is_secret(token, visited.traffic_token):
            self._key = visited.token_key
            return visited
        if visited is not None and visited.is_open(self._place.number):
            return visited
        if token:
            self._guesses.add(self._request.remote_ip or "")
        elif not (refused or self._place.is_by_path or key_of(self._request)):
            raise NoTrafficToken
        raise refused or refusal(self._request, self._guesses)

    @property
    def _is_visitor(self) -> bool:
        return self._key is None

    @property
    def _is_stranger(self) -> bool:
        """Whether it leaves room for the owner: a visitor, or whoever has a link."""
        return self._key is None or self._key.scope.mode != ""

    @property
    def _may_go_on(self) -> bool:
        """Whether the connection may stay: a visitor's ends when the port is closed."""
        assert self._sandbox is not None
        return not self._is_visitor or self._sandbox.is_open(self._place.number)

    async def _redirect(self) -> None:
        """Redirect to the address with a slash, because the page's relative links need it."""
        if self._request.method not in ("GET", "HEAD"):
            raise InvalidRequest("the service's paths begin with a slash", hint=f"ask {self._place.prefix}/")
        location = self._place.prefix + "/" + (f"?{self._request.query}" if self._request.query else "")
        await self._write_head(308, [("Location", location), ("Content-Length", "0")])
        await self._end()

    async def _connect(self, conversation: Conversation, timeout: float) -> None:
        closed = f"the sandbox is running but port is not open: nothing listens on {self._place.number}"
        try:
            async with asyncio.timeout(timeout):
                first = await conversation.receive()
        except TimeoutError:
            raise GuestFailure("port_closed", f"{closed}, or it does not accept connections") from None
        except GuestFailure as error:
            if error.code == "port_closed":
                raise GuestFailure(error.code, closed) from None
            # The guest must not choose the words or the status of other errors.
            raise GuestFailure("failed", f"the sandbox could not connect to port {self._place.number}") from None
        if not isinstance(first, wire.Connected):
            raise GuestUnresponsive("the guest did not answer Connect as it must")

    async def _converse(self, conversation: Conversation, carried: Carried, length: int | None) -> None:
        request = self._request
        named = re.search(r"\bupgrade\b", request.headers.get("Connection", ""), re.IGNORECASE)
        upgrade = request.headers.get("Upgrade", "") if named and length == 0 else ""
        exchange = Exchange(self._place, self._stripped)
        target = self._rest + (f"?{carried.query}" if carried.query else "")
        head = exchange.request(request.method or "", target, carried.headers, length, upgrade, client_of(request))
        if upgrade:
            request.headers.pop("Expect", None)  # there is no body to be asked for
            head += exchange.end()  # it has no body; what the client sends from here on may be of another protocol
        await conversation.send(head)
        self._conversation = conversation
        if not upgrade:
            self._exchange = exchange
            self._is_begun.set()
        answer = await self._head(exchange, conversation)
        if answer.switches:
            await self._switch(conversation, answer, exchange.rest)
            return
        is_download = carried.in_address and not upgrade
        await self._write_head(answer.status, self._headers(answer, is_download=is_download))
        self._is_begun.set()
        while not exchange.is_over:
            if data := await self._in_turn(lambda: self._body(exchange)):
                await self._connection.write(data)
            elif not exchange.is_over:
                exchange.receive_data(await self._receive(conversation))
        self._is_answered = True

    def _headers(self, answer: Answer, *, is_download: bool) -> Headers:
        return answer_headers(answer, self._place, is_private=not self._is_visitor, is_download=is_download)

    async def _send(self, data: bytes) -> None:
        """Send to the service as it reads; after STALL_TIMEOUT cut the client. `_receive` raises other errors."""
        assert self._conversation is not None
        try:
            async with asyncio.timeout(STALL_TIMEOUT):
                await self._conversation.send(data)
        except TimeoutError:
            self._connection.close()
        except CellvmError:
            pass

    # -- the way back

    async def _head(self, exchange: Exchange, conversation: Conversation) -> Answer:
        while not isinstance(piece := await self._in_turn(exchange.next_event), Answer):
            exchange.receive_data(await self._receive(conversation))
        return piece

    async def _in_turn(self, read: Callable[[], T]) -> T:
        """Read a piece of an answer while no other answer is read, then let the event loop do other work.

        A service may send thousands of headers, or of chunks of a byte, and they take long to read.
        """
        async with self._reading:
            piece = read()
            await asyncio.sleep(0)
        return piece

    def _body(self, exchange: Exchange) -> bytes:
        """The part of the answer's body that has arrived."""
        pieces: list[bytes] = []
        try:
            while len(pieces) < MAX_EVENTS and isinstance(piece := exchange.next_event(), bytes) and piece:
                pieces.append(piece)
        except GuestFailure:
            if not pieces:  # earlier pieces still go out; the next call raises this again
                raise
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _receive(self, conversation: Conversation) -> bytes:
        """The service's next bytes; none when it has closed the connection."""
        try:
            while isinstance(item := await conversation.receive(), tuple):
                if item[0] == wire.STDOUT and self._may_go_on:
                    return item[1]
        except GuestFailure:
            raise GuestFailure("failed", f"the connection to port {self._place.number} broke") from None
        return b""

    async def _write_head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self._status = status
        given = HTTPHeaders()
        for name, value in headers:
            given.add(name, value)
        # With this header Tornado would ask for the body in the middle of the answer. Without it the body won't come.
        if self._request.headers.pop("Expect", None) is not None and not self._is_begun.is_set():
            self._is_last = True
        if self._request.version == "HTTP/1.0" and "Content-Length" not in given:
            self._request.headers["Connection"] = "close"  # otherwise Tornado announces that it is kept
            self._is_last = True  # the client learns from the close where the body ends
        elif self._is_last:
            given["Connection"] = "close"
        self._has_head = True
        line = ResponseStartLine("HTTP/1.1", status, responses.get(status, "Unknown"))
        await self._connection.write_headers(line, given)

    async def _end(self) -> None:
        """The answer is whole. The rest of the request's body is dropped, and the request is over with it."""
        self._is_answered = True
        self._log()
        if self._is_last and not self._is_begun.is_set():
            # The stream is taken from Tornado, because Tornado would read a body and further requests from its buffer.
            self._connection.detach().close()
            return
        self._is_begun.set()
        if not self._is_last:
            try:
                async with asyncio.timeout(IGNORED_BODY_TIMEOUT):
                    await self._has_whole_body.wait()
            except TimeoutError:
                self._connection.close()
                return
        self._connection.finish()
        if self._is_last:
            self._connection.close()

    async def _fail(self, error: Exception) -> None:
        if self._has_head:
            if not isinstance(error, CellvmError):
                log.error("%r failed", self, exc_info=error)
            # It is too late for a status. The connection is closed, so that half an answer does not look whole.
            self._connection.close()
            return
        if not isinstance(error, CellvmError):
            log.error("%r failed", self, exc_info=error)
            error = CellvmError("the server failed; its log says why")
        status = STATUS[error.code]
        told = ErrorBody(status, str(error), error.code, phrase(status), error.hint, error.outcome)
        if isinstance(error, NoTrafficToken):
            told.sandboxId = self._place.sandbox
        body = msgspec.json.encode(told)
        headers = [
            ("Server", "CellVM"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cache-Control", "no-store"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
        ]
        if status == HTTPStatus.UNAUTHORIZED:
            headers.append(("WWW-Authenticate", "Bearer"))
        if error.retry_after is not None:
            headers.append(("Retry-After", str(error.retry_after)))
        await self._write_head(status, headers)
        if self._request.method != "HEAD":
            await self._connection.write(body)
        await self._end()

    def _log(self) -> None:
        """Log one line a request, without the service's path and query and without its answer."""
        place, milliseconds = self._place, round(self._request.request_time() * 1000)
        log.info(
            "%.20s /sandboxes/%.64s/ports/%.5s/ %d %d ms",
            self._request.method,
            place.sandbox,
            place.port,
            self._status,
            milliseconds,
        )

    # -- another protocol

    async def _switch(self, conversation: Conversation, answer: Answer, first: bytes) -> None:
        """Copy bytes both ways until one side closes."""
        headers = self._headers(answer, is_download=False)
        headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
        upgrade = next((value for name, value in answer.headers if name.lower() == "upgrade"), "")
        await self._write_head(answer.status, [*headers, ("Connection", "Upgrade"), ("Upgrade", upgrade)])
        self._log()
        stream = self._connection.detach()
        self._requests.discard(self)
        self._is_begun.set()
        if stream.socket is not None:
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        up = asyncio.create_task(self._copy_up(stream, conversation))
        down = asyncio.create_task(self._copy_down(stream, conversation, first))
        try:
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            if not down.done():
                await asyncio.wait({down}, timeout=LINGER)
        finally:
            up.cancel()
            down.cancel()
            await asyncio.wait({up, down})
            stream.close()

    async def _copy_up(self, stream: IOStream, conversation: Conversation) -> None:
        try:
            while True:
                await conversation.send(await stream.read_bytes(PIECE, partial=True))
        except (StreamClosedError, CellvmError):
            pass
        conversation.end()

    async def _copy_down(self, stream: IOStream, conversation: Conversation, data: bytes) -> None:
        try:
            while True:
                try:
                    await stream.write(data)
                except StreamClosedError:
                    pass  # the client has gone; the service may still read what it has sent
                if not (data := await self._receive(conversation)):
                    return
        except CellvmError:
            pass
