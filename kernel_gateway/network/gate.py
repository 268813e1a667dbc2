"""The gate of one sandbox. Connections whose names matter pass through it; if the way out is a proxy, all do.

    guest ── any address, 80 or 443 ── filter redirects ─┐
                                                         ├─ Gate ── the address it was going to, or the host's proxy
    guest ── HTTP proxy, if a program is told of it ─────┘

A redirected connection goes to the address the guest dialled; its name is not looked up again. A name that a rule
allows is believed only if our resolver gave this address for it, because a guest could send an allowed name to any
address. The gate can't see inside TLS, so a server that serves an allowed name may serve others, too.

An HTTP connection carries one request (`hello.Request`), because a second one could go elsewhere. TLS and tunnels are
copied blindly both ways, a piece at a time, so a connection never holds more than two pieces in memory.

The host's proxy looks a name up again. So it is told a name only if the name stands for the address that was judged,
or if no address could be judged here. The proxy itself must keep private addresses out of reach.
"""

import asyncio
import logging
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from typing import Any

from kernel_gateway.network.hello import MAX_HEAD, Hello, Host, Malformed, Request, read_hello
from kernel_gateway.network.policy import Floor, Policy

log = logging.getLogger(__name__)

ACCEPT_PAUSE = 0.5
PIECE = 64 * 1024
BODY_PIECE = 4 * 1024
"""Bytes of a request's body read at once. They are few because tiny chunks are slow to parse and others wait then."""
MAX_READS = 100
"""Pieces that a head may come in. They are limited because the head is read from its start for each piece."""
SO_ORIGINAL_DST = 80
MAIL, RESOLVERS = 25, (53, 853)
ACCESS_DENIED = b"\x15\x03\x03\x00\x02\x02\x31"
"""A TLS alert: fatal, access_denied. OpenSSL prints it as `tlsv1 alert access denied`."""
_STATUS = re.compile(rb"HTTP/1\.[01] 2[0-9]{2}[ \r]")


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections a guest may have through its gate, and how long each step may take, in seconds."""

    connections: int = 256
    head: float = 10.0
    dial: float = 30.0
    idle: float = 600.0
    farewell: float = 1.0


class Refused(Exception):
    """A guest may not go there.

    Args:
        host, port: the destination.
        reason: "floor", "policy", "mail" or "dns".
    """

    def __init__(self, host: Host, port: int, reason: str) -> None:
        super().__init__(reason)
        self.host = host
        self.port = port
        self.reason = reason

    @property
    def text(self) -> str:
        """The message for a person."""
        why = {
            "floor": "it is private, special or the host's own",
            "mail": "mail is not sent from sandboxes",
            "dns": "names are resolved by the sandbox's own resolver",
        }
        return f"this sandbox may not reach {self.host}:{self.port}: {why.get(self.reason, 'its policy forbids it')}."


class Unreachable(Exception):
    """The destination is allowed, but there is no connection. The text is for the guest."""


def original_destination(sock: socket.socket) -> tuple[IPv4Address, int]:
    """The address and port that the guest dialled, of a redirected connection."""
    _, port, address = struct.unpack("!HH4s8x", sock.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16))
    return IPv4Address(address), port


class Gate:
    """The gate of one slot.

    Args:
        policy, floor: return the policy and the floor that are in force.
        pinned: tells whether the slot's resolver gave this address for this name (`Resolver.gave`).
        resolve: returns all addresses of a name, not judged, none if it does not resolve (`Resolver.addresses`).
        connect: dials an address that was judged, and returns a connected, non-blocking socket.
        refused: called with a name or an address, a port, and "floor", "policy", "mail" or "dns"; called with "*", 0
            and "limit" for a connection over the limit.
        proxy: the upstream proxy; None for direct connections.
        original: returns the destination of a redirected connection.
    """

    def __init__(
        self,
        *,
        policy: Callable[[], Policy],
        floor: Callable[[], Floor],
        pinned: Callable[[str, IPv4Address], bool],
        resolve: Callable[[str], Awaitable[list[IPv4Address]]],
        connect: Callable[[IPv4Address, int], Awaitable[socket.socket]],
        refused: Callable[[str, int, str], None],
        proxy: tuple[str, int] | None = None,
        original: Callable[[socket.socket], tuple[IPv4Address, int]] = original_destination,
        limits: Limits = Limits(),
    ) -> None:
        self._policy = policy
        self._floor = floor
        self._pinned = pinned
        self._resolve = resolve
        self._connect = connect
        self._refused = refused
        self._proxy = proxy
        self._original = original
        self._limits = limits
        self._listening: list[socket.socket] = []
        self._connections: set[asyncio.Task[None]] = set()
        self._judged: dict[asyncio.Task[None], Callable[[], object]] = {}
        self._reading_bodies = asyncio.Lock()

    def start(self, transparent: socket.socket | None, explicit: socket.socket | None) -> None:
        """Serve redirected connections, and connections to a proxy, on listening sockets.

        The caller closes the sockets after `close`.
        """
        if transparent is not None:
            self._listen(transparent, self._serve_redirected)
        if explicit is not None:
            self._listen(explicit, self._serve_proxy)

    def close(self) -> None:
        """Stop serving and cut all connections. May be called again."""
        for sock in self._listening:
            asyncio.get_running_loop().remove_reader(sock)
        self._listening.clear()
        for task in self._connections:
            task.cancel()

    def judge_again(self) -> None:
        """Cut the connections that a changed policy forbids."""
        for task, judge in list(self._judged.items()):
            try:
                judge()
            except Refused as refusal:
                self._refused(str(refusal.host), refusal.port, refusal.reason)
                task.cancel()

    def _listen(self, sock: socket.socket, serve: Callable[[socket.socket], Coroutine[Any, Any, None]]) -> None:
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._accept, sock, serve)
        self._listening.append(sock)

    def _accept(self, sock: socket.socket, serve: Callable[[socket.socket], Coroutine[Any, Any, None]]) -> None:
        """Accept one connection. The next one waits until the loop has done its other work."""
        loop = asyncio.get_running_loop()
        try:
            guest, _ = sock.accept()
        except BlockingIOError:
            return
        except OSError:
            # The server may be out of descriptors. The socket stays ready, so this would repeat without end.
            loop.remove_reader(sock)
            loop.call_later(
                ACCEPT_PAUSE, lambda: sock in self._listening and loop.add_reader(sock, self._accept, sock, serve)
            )
            return
        if len(self._connections) >= self._limits.connections:
            self._refused("*", 0, "limit")
            _reset(guest)
            guest.close()
            return
        guest.setblocking(False)

        def ended(task: asyncio.Task[None]) -> None:
            self._connections.discard(task)
            guest.close()  # here, because a task that is cancelled early never runs

        task = loop.create_task(self._guarded(guest, serve))
        self._connections.add(task)
        task.add_done_callback(ended)

    async def _guarded(self, guest: socket.socket, serve: Callable[[socket.socket], Coroutine[Any, Any, None]]) -> None:
        """Serve one connection. Every error ends here, because a guest must not reach the loop's exception handler."""
        try:
            await serve(guest)
        except (OSError, TimeoutError, EOFError):
            _reset(guest)  # one of the ends has gone, or is too slow
        except asyncio.CancelledError:
            _reset(guest)  # a policy cut it, and half an answer must not look whole
            raise
        except Exception as error:  # noqa: BLE001
            _reset(guest)
            log.warning("a sandbox's connection failed: %s %.200r", type(error).__name__, error)

    # -- redirected

    async def _serve_redirected(self, guest: socket.socket) -> None:
        address, port = self._original(guest)
        if port == 80:
            await self._serve_http(guest, address)
        else:
            await self._serve_tls(guest, address, port)

    async def _serve_tls(self, guest: socket.socket, address: IPv4Address, port: int) -> None:
        is_tls = False
        try:
            self._judge_address(address, port)
            try:
                hello, first = await self._read_hello(guest)
            except Malformed:
                is_tls = True
                raise Refused(address, port, "policy") from None
            is_tls = hello.is_tls
            judge = partial(self._judge, hello.host, address, port, is_known=self._is_known(hello.host, address))
            judge()
        except Refused as refusal:
            self._refused(str(refusal.host), port, refusal.reason)
            if is_tls:
                await self._say(guest, ACCESS_DENIED)
            else:
                _reset(guest)
            return
        try:
            upstream, early = await self._dial([address], port, self._name_for_proxy(hello.host, address))
        except Unreachable:
            _reset(guest)
            return
        with upstream:
            await self._splice(guest, upstream, judge, to_upstream=first, to_guest=early)

    async def _read_hello(self, guest: socket.socket) -> tuple[Hello, bytes]:
        """The hello of a connection, and the bytes read. A client that sends nothing for long has no name."""
        data = b""
        hello = None
        try:
            async with asyncio.timeout(self._limits.head):
                for _ in range(MAX_READS):
                    piece = await _receive(guest, MAX_HEAD + 1)
                    data += piece
                    hello = read_hello(data)
                    if not data:
                        raise EOFError
                    if hello is not None or not piece or len(data) > MAX_HEAD:
                        break
        except TimeoutError:
            pass
        if hello is None:
            if data:
                raise Malformed("a ClientHello that does not end")
            hello = Hello(None, is_tls=False)
        return hello, data

    async def _serve_http(self, guest: socket.socket, address: IPv4Address) -> None:
        request = Request()

        try:
            self._judge_address(address, 80)
            await self._read_request(guest, request)
            path = request.path()
            host, port = request.host()
            judge = partial(self._judge, host, address, 80, is_known=self._is_known(host, address))
            judge()
        except Malformed as error:
            await self._say(guest, _answer(400, "Bad Request", f"not sent on: {error}."))
            return
        except Refused as refusal:
            await self._refuse(guest, refusal)
            return
        name = self._name_for_proxy(host, address)
        if self._proxy is None:
            head = request.write_head(path, None if host is None else _authority(host, port))
        else:
            authority = _authority(name or address, None)
            head = request.write_head(b"http://" + authority + path, authority)
        await self._forward(guest, request, head, judge, [address], 80)

    def _judge_address(self, address: IPv4Address, port: int) -> None:
        """Raise Refused for an address that no sandbox may reach."""
        if self._floor().refuses(address):
            raise Refused(address, port, "floor")

    def _is_known(self, host: Host | None, address: IPv4Address) -> bool:
        """Whether our resolver gave the guest this address for this name."""
        return isinstance(host, str) and self._pinned(host, address)

    def _judge(self, host: Host | None, address: IPv4Address, port: int, *, is_known: bool) -> None:
        """Raise Refused if a redirected connection that asks for `host` may not go on to `address`.

        Args:
            is_known: whether the name had this address when the connection began; it may have others by now.
        """
        self._judge_address(address, port)
        policy = self._policy()
        if isinstance(host, str):
            verdict = policy.permits_name(host)
            if verdict and is_known:
                return
            if verdict is False:
                raise Refused(host, port, "policy")
        elif host is not None and host != address:
            raise Refused(host, port, "policy")
        if not policy.permits_address(address):
            raise Refused(host or address, port, "policy")

    def _name_for_proxy(self, host: Host | None, address: IPv4Address) -> str | None:
        """The name to ask the proxy for, if it stands for the address."""
        if not isinstance(host, str) or self._floor().refuses_name(host):
            return None
        return host if self._is_known(host, address) else None

    # -- as a proxy

    async def _serve_proxy(self, guest: socket.socket) -> None:
        request = Request()
        path = b""
        try:
            await self._read_request(guest, request)
            is_tunnel = request.head.method == b"CONNECT"
            if is_tunnel:
                host, port = request.tunnel()
            else:
                host, port, path = request.absolute()
            addresses, judge = await self._judge_for_proxy(host, port)
        except Malformed as error:
            await self._say(guest, _answer(400, "Bad Request", f"this is an HTTP proxy; not sent on: {error}."))
            return
        except Refused as refusal:
            await self._refuse(guest, refusal)
            return
        if not addresses and self._proxy is None:
            await self._say(guest, _answer(502, "Bad Gateway", f"{host} does not resolve."))
            return
        name = host if isinstance(host, str) else None
        if not is_tunnel:
            authority = _authority(host, None if port == 80 else port)
            target = path if self._proxy is None else b"http://" + authority + path
            await self._forward(guest, request, request.write_head(target, authority), judge, addresses, port)
            return
        try:
            upstream, early = await self._dial(addresses, port, name)
        except Unreachable as error:
            await self._say(guest, _answer(502, "Bad Gateway", str(error)))
            return
        with upstream:
            said = b"HTTP/1.1 200 Connection established\r\n\r\n" + early
            request.receive_body(b"")
            await self._splice(guest, upstream, judge, to_upstream=request.after_head(), to_guest=said)

    async def _judge_for_proxy(self, host: Host, port: int) -> tuple[list[IPv4Address], Callable[[], object]]:
        """The addresses of a host that may be dialled, none if only the proxy knows them, and a way to judge again.

        Raises:
            Refused: no address may be dialled.
        """
        found: list[IPv4Address] | None = None

        def judge() -> list[IPv4Address]:
            return self._permitted(host, port, found)

        judge()
        found = [host] if isinstance(host, IPv4Address) else await self._resolve(host)
        return judge(), judge

    def _permitted(self, host: Host, port: int, found: list[IPv4Address] | None) -> list[IPv4Address]:
        """The addresses in `found` that may be dialled for a host; `found` is None before they are known.

        Raises:
            Refused: the host may not be reached, or none of its addresses.
        """
        policy, floor = self._policy(), self._floor()
        verdict = policy.permits_name(host) if isinstance(host, str) else None
        if port == MAIL:
            raise Refused(host, port, "mail")
        if port in RESOLVERS:
            raise Refused(host, port, "dns")
        if isinstance(host, str) and floor.refuses_name(host):
            raise Refused(host, port, "floor")
        # A name without a rule is not even looked up if no address could be allowed.
        closed = not policy.allow_internet and (not policy.allow or found == [])
        if verdict is False or (verdict is None and closed):
            raise Refused(host, port, "policy")
        if not found:
            return []
        clear = [address for address in found if not floor.refuses(address)]
        if not clear:
            raise Refused(host, port, "floor")
        permitted = [address for address in clear if verdict or policy.permits_address(address)]
        # The proxy may take any of the addresses of a name, so all must be permitted.
        if not permitted or (self._proxy is not None and len(permitted) < len(found)):
            raise Refused(host, port, "policy" if len(permitted) < len(clear) else "floor")
        return permitted

    # -- both

    async def _read_request(self, guest: socket.socket, request: Request) -> None:
        """Read a request's head.

        Raises:
            Malformed: the head is not valid HTTP, or it is too long.
            TimeoutError, EOFError: the head did not come.
        """
        async with asyncio.timeout(self._limits.head):
            for _ in range(MAX_READS):
                piece = await _receive(guest, BODY_PIECE)
                if not piece:
                    raise EOFError
                if request.receive_head(piece):
                    return
        raise Malformed("a head in too many pieces")

    async def _forward(
        self,
        guest: socket.socket,
        request: Request,
        head: bytes,
        judge: Callable[[], object],
        addresses: list[IPv4Address],
        port: int,
    ) -> None:
        """Send the one request of a connection on, and copy the answer."""
        try:
            first = head + request.receive_body(b"")
            upstream = await (self._dial_direct(addresses, port) if self._proxy is None else self._dial_proxy())
        except Malformed as error:
            await self._say(guest, _answer(400, "Bad Request", f"not sent on: {error}."))
            return
        except Unreachable as error:
            await self._say(guest, _answer(502, "Bad Gateway", str(error)))
            return
        with upstream:
            await self._splice(guest, upstream, judge, to_upstream=first, request=request)

    async def _dial(self, addresses: list[IPv4Address], port: int, name: str | None) -> tuple[socket.socket, bytes]:
        """A connection to one of the addresses, directly or through the proxy, and the bytes that came on it already.

        Raises:
            Unreachable: there is none.
        """
        if self._proxy is None:
            return await self._dial_direct(addresses, port), b""
        upstream = await self._dial_proxy()
        with ExitStack() as stack:
            stack.enter_context(upstream)
            target = f"{name or addresses[0]}:{port}".encode()
            loop = asyncio.get_running_loop()
            answer = b""
            try:
                async with asyncio.timeout(self._limits.dial):
                    await loop.sock_sendall(upstream, b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target, target))
                    while b"\r\n\r\n" not in answer and len(answer) <= MAX_HEAD:
                        piece = await _receive(upstream, MAX_HEAD)
                        if not piece:
                            break
                        answer += piece
            except (OSError, TimeoutError):
                answer = b""
            head, end, early = answer.partition(b"\r\n\r\n")
            if not end or not _STATUS.match(head + b"\r"):
                raise Unreachable("the proxy of the host did not connect.")
            stack.pop_all()
        return upstream, early

    async def _dial_direct(self, addresses: list[IPv4Address], port: int) -> socket.socket:
        try:
            async with asyncio.timeout(self._limits.dial):
                for address in addresses:
                    try:
                        return await self._connect(address, port)
                    except OSError:
                        continue  # the next one may answer
        except TimeoutError:
            pass
        raise Unreachable("it can't be reached.")

    async def _dial_proxy(self) -> socket.socket:
        assert self._proxy is not None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._limits.dial):
                for family, kind, protocol, _, where in await loop.getaddrinfo(*self._proxy, type=socket.SOCK_STREAM):
                    sock = socket.socket(family, kind, protocol)
                    try:
                        sock.setblocking(False)
                        await loop.sock_connect(sock, where)
                    except OSError:
                        sock.close()
                    except BaseException:
                        sock.close()
                        raise
                    else:
                        return sock
        except (OSError, TimeoutError):
            pass
        raise Unreachable("the proxy of the host can't be reached.")

    async def _splice(
        self,
        guest: socket.socket,
        upstream: socket.socket,
        judge: Callable[[], object],
        *,
        to_upstream: bytes = b"",
        to_guest: bytes = b"",
        request: Request | None = None,
    ) -> None:
        """Copy both ways until both ends have ended, nothing comes for long, or a new policy forbids it."""
        task = asyncio.current_task()
        assert task is not None
        try:
            judge()  # the policy may have changed during the dialling
        except Refused as refusal:
            self._refused(str(refusal.host), refusal.port, refusal.reason)
            _reset(guest)
            return
        for sock in (guest, upstream):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._judged[task] = judge
        try:
            async with asyncio.timeout(self._limits.idle) as idle, asyncio.TaskGroup() as both:
                both.create_task(self._copy(guest, upstream, to_upstream, idle, request))
                both.create_task(self._copy(upstream, guest, to_guest, idle, None))
        except* (OSError, TimeoutError, Malformed):
            _reset(guest)
            _reset(upstream)
        finally:
            del self._judged[task]

    async def _copy(
        self, source: socket.socket, target: socket.socket, data: bytes, idle: asyncio.Timeout, request: Request | None
    ) -> None:
        """Copy one way. The source's end is passed on. While the target does not read, the source is not read."""
        loop = asyncio.get_running_loop()
        while True:
            if data:
                await loop.sock_sendall(target, data)
                idle.reschedule(loop.time() + self._limits.idle)
            piece = await _receive(source, PIECE if request is None else BODY_PIECE)
            if not piece:
                break
            if request is None:
                data = piece
            else:
                async with self._reading_bodies:
                    data = request.receive_body(piece)
                    await asyncio.sleep(0)
        try:
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has gone already; its last bytes may still be on their way

    async def _refuse(self, guest: socket.socket, refusal: Refused) -> None:
        self._refused(str(refusal.host), refusal.port, refusal.reason)
        hint = "GET /sandboxes/{id}/network tells its policy and what was refused."
        await self._say(guest, _answer(403, "Forbidden", f"{refusal.text}\n{hint}"))

    async def _say(self, guest: socket.socket, last: bytes) -> None:
        """Send the last bytes, then read the guest's, because a close with unread bytes would be a reset."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._limits.farewell):
            await loop.sock_sendall(guest, last)
            guest.shutdown(socket.SHUT_WR)
            while await _receive(guest, PIECE):
                pass


async def _receive(sock: socket.socket, size: int) -> bytes:
    # A socket that always has bytes would keep every other task from running.
    await asyncio.sleep(0)
    return await asyncio.get_running_loop().sock_recv(sock, size)


def _reset(sock: socket.socket) -> None:
    """Make the socket's close a reset, so that the other end sees the cut."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # it is closed already


def _authority(host: Host, port: int | None) -> bytes:
    return (str(host) if port is None else f"{host}:{port}").encode()


def _answer(status: int, phrase: str, text: str) -> bytes:
    body = f"CellVM: {text}\n".encode()
    return (
        f"HTTP/1.1 {status} {phrase}\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body
