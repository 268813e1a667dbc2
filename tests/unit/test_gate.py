"""The gate of one sandbox, on loopback: redirected connections, and connections to it as a proxy."""

import asyncio
import errno
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from kernel_gateway.network.gate import ACCESS_DENIED, Gate, Limits
from kernel_gateway.network.policy import Floor, Policy

SITE, OTHER, PRIVATE = IPv4Address("93.184.215.14"), IPv4Address("8.8.8.8"), IPv4Address("10.0.0.7")
ONLY_SITE = Policy(allow_internet=False, allow_names=("site.example",))
NOT_EVIL = Policy(deny_names=("evil.example",))


def client_hello(name: str | None) -> bytes:
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.check_hostname = False
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


def make_certificate(directory: Path) -> None:
    subject = ["-subj", "/CN=site.example", "-addext", "subjectAltName=DNS:site.example"]
    files = ["-keyout", str(directory / "key"), "-out", str(directory / "certificate")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files],
        check=True,
        capture_output=True,
    )


def listening() -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    sock.bind(("127.0.0.1", 0))
    sock.listen(400)
    return sock


@dataclass
class World:
    """A gate between a guest and a server on loopback that stands for every address, and for the proxy."""

    policy: Policy = field(default_factory=Policy)
    floor: Floor = field(default_factory=Floor)
    limits: Limits = field(default_factory=Limits)
    has_proxy: bool = False
    going_to: tuple[IPv4Address, int] | None = (SITE, 443)
    names: dict[str, list[IPv4Address]] = field(
        default_factory=lambda: {"site.example": [SITE], "evil.example": [OTHER], "both.example": [SITE, PRIVATE]}
    )
    pins: set[tuple[str, IPv4Address]] = field(default_factory=lambda: {("site.example", SITE)})
    refused: list[tuple[str, int, str]] = field(default_factory=list)
    dialled: list[tuple[str, int]] = field(default_factory=list)
    looked_up: list[str] = field(default_factory=list)
    unreachable: bool = False
    policy_while_dialling: Policy | None = None
    answer: bytes = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    holds: bool = False
    """The server says nothing and copies what it gets back."""
    received: bytes = b""
    proxied: list[bytes] = field(default_factory=list)
    proxy_says: bytes = b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n"
    broken: list[object] = field(default_factory=list)

    @asynccontextmanager
    async def run(self) -> AsyncIterator["World"]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: self.broken.append(context))
        async with AsyncExitStack() as stack:
            self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
            stack.callback(self.server.close)
            proxy = await asyncio.start_server(self.serve_proxy, "127.0.0.1", 0)
            stack.callback(proxy.close)
            redirected = stack.enter_context(listening())
            explicit = stack.enter_context(listening())
            self.redirected, self.explicit = redirected.getsockname(), explicit.getsockname()
            self.gate = Gate(
                policy=lambda: self.policy,
                floor=lambda: self.floor,
                pinned=lambda name, address: (name, address) in self.pins,
                resolve=self.resolve,
                connect=self.connect,
                refused=lambda name, port, reason: self.refused.append((name, port, reason)),
                proxy=proxy.sockets[0].getsockname() if self.has_proxy else None,
                original=self.original,
                limits=self.limits,
            )
            self.gate.start(redirected, explicit)
            try:
                yield self
            finally:
                self.gate.close()
                async with asyncio.timeout(20):
                    while self.gate._connections:
                        await asyncio.sleep(0.01)
                loop.set_exception_handler(None)
        assert self.broken == []

    def original(self, sock: socket.socket) -> tuple[IPv4Address, int]:
        if self.going_to is None:
            raise OSError(errno.ENOENT, "not redirected")
        return self.going_to

    async def resolve(self, name: str) -> list[IPv4Address]:
        self.looked_up.append(name)
        return self.names.get(name, [])

    async def connect(self, address: IPv4Address, port: int) -> socket.socket:
        self.dialled.append((str(address), port))
        self.policy = self.policy_while_dialling or self.policy
        if self.unreachable:
            raise OSError(errno.EHOSTUNREACH, "no way")
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self.server.sockets[0].getsockname())
        return sock

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.received += data
                if self.holds:
                    writer.write(data)
                    await writer.drain()
                elif b"\r\n\r\n" in self.received:
                    writer.write(self.answer)
                    break
            if self.holds:
                writer.write(b"<end>")
        except OSError:
            pass  # the gate has cut it
        writer.close()

    async def serve_proxy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.proxied.append(head)
            if head.startswith(b"CONNECT"):
                writer.write(self.proxy_says)
                if b" 200 " in self.proxy_says:
                    await self.serve(reader, writer)
            else:
                writer.write(self.answer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        writer.close()

    async def say(self, data: bytes, *, explicit: bool = False, ends: bool = False) -> bytes:
        """Send this and read all that comes, or b"RST" if the connection is reset."""
        writer = None
        try:
            async with asyncio.timeout(30):
                reader, writer = await asyncio.open_connection(*(self.explicit if explicit else self.redirected))
                writer.write(data)
                if ends:
                    writer.write_eof()
                return await reader.read()
        except ConnectionResetError:
            return b"RST"
        finally:
            if writer is not None:
                writer.close()

    async def hello(self, name: str | None) -> bytes:
        return await self.say(client_hello(name), ends=True)

    async def get(self, host: str, target: str = "/", *, explicit: bool = False) -> bytes:
        return await self.say(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(), explicit=explicit)


# -- redirected, TLS


async def test_an_allowed_name_passes_to_the_address_it_was_given() -> None:
    """The hello arrives untouched, and both ways are copied to the end."""
    async with World(ONLY_SITE, holds=True).run() as world:
        first = client_hello("Site.Example")
        assert await world.say(first + b"more", ends=True) == first + b"more<end>"
        assert world.dialled == [(str(SITE), 443)]
        assert world.refused == []
        assert world.looked_up == []


@pytest.mark.parametrize(
    ("policy", "name", "address", "refused"),
    [
        (ONLY_SITE, "other.example", SITE, ("other.example", 443, "policy")),
        (ONLY_SITE, "site.example", OTHER, ("site.example", 443, "policy")),  # an address that is not this name's
        (ONLY_SITE, None, SITE, (str(SITE), 443, "policy")),
        (ONLY_SITE, "sub.site.example", SITE, ("sub.site.example", 443, "policy")),
        (NOT_EVIL, "evil.example", SITE, ("evil.example", 443, "policy")),
        (Policy(deny=(IPv4Network("8.0.0.0/8"),)), "a.example", OTHER, ("a.example", 443, "policy")),
    ],
)
async def test_a_refused_name_gets_an_alert(
    policy: Policy, name: str | None, address: IPv4Address, refused: tuple[str, int, str]
) -> None:
    """TLS libraries print the alert as a sentence. Nothing is dialled."""
    async with World(policy, going_to=(address, 443)).run() as world:
        assert await world.hello(name) == ACCESS_DENIED
        assert world.refused == [refused]
        assert world.dialled == []


async def test_a_name_that_no_rule_names_is_judged_by_its_address() -> None:
    """With the internet allowed, other names pass. So do connections without a name or without TLS."""
    async with World(NOT_EVIL, going_to=(OTHER, 443), holds=True).run() as world:
        for first in (client_hello("a.example"), client_hello(None), b"SSH-2.0-x\r\n"):
            assert await world.say(first, ends=True) == first + b"<end>"
        assert world.dialled == [(str(OTHER), 443)] * 3
    rule = Policy(allow_internet=False, allow=(IPv4Network("8.8.8.0/24"),), allow_names=("site.example",))
    async with World(rule, going_to=(OTHER, 443), holds=True).run() as world:
        assert (await world.hello("a.example")).endswith(b"<end>")


async def test_the_floor_is_below_all_rules() -> None:
    """An allowed name that was pinned does not lead to a private address, and nothing is read from the guest."""
    policy = Policy(allow_names=("site.example",), allow=(IPv4Network("10.0.0.0/8"),))
    async with World(policy, going_to=(PRIVATE, 443), pins={("site.example", PRIVATE)}).run() as world:
        assert await world.hello("site.example") == b"RST"
        assert world.refused == [(str(PRIVATE), 443, "floor")]
        assert world.dialled == []


@pytest.mark.parametrize("policy", [ONLY_SITE, NOT_EVIL])
async def test_a_hello_that_can_not_be_read_is_refused(policy: Policy) -> None:
    """Such a hello is refused although its address is allowed, because a server might read a denied name in it."""
    bad = client_hello("site.example").replace(b"site.example", b"site\0example")
    long = b"\x16\x03\x01\x40\x00" + b"\x01\x00\x3f\xff" + bytes(2000)
    async with World(policy, limits=Limits(head=0.2)).run() as world:
        for first in (bad, long, b"\x16\x03\x01\0\0", b"\x16"):
            assert await world.say(first) == ACCESS_DENIED
        assert world.refused == [(str(SITE), 443, "policy")] * 4
        assert world.dialled == []


async def test_a_hello_may_come_in_pieces() -> None:
    """The number of pieces is limited, because the hello is read from its start for each piece."""
    first = client_hello("site.example")
    async with World(ONLY_SITE, holds=True).run() as world:
        for size, expected in ((100, first + b"<end>"), (2, ACCESS_DENIED)):
            reader, writer = await asyncio.open_connection(*world.redirected)
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(first), size):
                writer.write(first[at : at + size])
                await asyncio.sleep(0.003)
            writer.write_eof()
            assert await reader.read() == expected
            writer.close()


async def test_who_is_silent_has_no_name() -> None:
    """After a while a silent connection is judged by its address, because some servers speak first."""
    async with World(Policy(), limits=Limits(head=0.1, idle=0.3), holds=True).run() as world:
        assert await world.say(b"") == b"RST"
        assert world.dialled == [(str(SITE), 443)]
    async with World(ONLY_SITE, limits=Limits(head=0.1)).run() as world:
        assert await world.say(b"") == b"RST"
        assert await world.say(b"", ends=True) == b"RST"
        assert world.refused == [(str(SITE), 443, "policy")]


async def test_what_can_not_be_reached_is_reset() -> None:
    """A guest sees the same as without a gate."""
    async with World(ONLY_SITE, unreachable=True).run() as world:
        assert await world.say(client_hello("site.example")) == b"RST"
        assert world.refused == []


async def test_tls_works_through_the_gate_and_its_refusal_can_be_read(tmp_path: Path) -> None:
    """A real client and a real server talk through the gate."""
    make_certificate(tmp_path)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    ours = ssl.create_default_context(cafile=str(tmp_path / "certificate"))
    async with World(ONLY_SITE).run() as world:
        world.server.close()
        world.server = await asyncio.start_server(world.serve, "127.0.0.1", 0, ssl=theirs)
        reader, writer = await asyncio.open_connection(*world.redirected, ssl=ours, server_hostname="site.example")
        writer.write(b"GET / HTTP/1.1\r\nHost: site.example\r\n\r\n")
        assert await reader.read() == world.answer
        writer.close()
        with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
            await asyncio.open_connection(*world.redirected, ssl=ours, server_hostname="evil.example")
        world.server.close()


# -- redirected, HTTP


async def test_one_request_passes() -> None:
    """The request is written anew and alone on its connection. A second one to another host goes nowhere."""
    async with World(ONLY_SITE, going_to=(SITE, 80)).run() as world:
        second = b"GET /2 HTTP/1.1\r\nHost: evil.example\r\n\r\n"
        answer = await world.say(b"GET /1 HTTP/1.1\r\nHost: SITE.example.\r\nA: b\r\n\r\n" + second)
        assert answer == world.answer
        assert world.received == b"GET /1 HTTP/1.1\r\nHost: site.example\r\nA: b\r\nConnection: close\r\n\r\n"
        assert world.dialled == [(str(SITE), 80)]


async def test_bodies_pass_and_nothing_behind_them() -> None:
    """A body passes, by length and in chunks, and a request smuggled behind it does not."""
    body = bytes(range(256)) * 1000
    smuggled = b"GET /evil HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    chunked = (
        b"".join(b"%x\r\n%b\r\n" % (1000, body[at : at + 1000]) for at in range(0, len(body), 1000)) + b"0\r\n\r\n"
    )
    for framing, sent in ((b"Content-Length: %d" % len(body), body), (b"Transfer-Encoding: chunked", chunked)):
        async with World(ONLY_SITE, going_to=(SITE, 80), holds=True).run() as world:
            head = b"POST / HTTP/1.1\r\nHost: site.example\r\n" + framing + b"\r\n\r\n"
            echoed = await world.say(head + sent + smuggled, ends=True)
            assert echoed.endswith(b"<end>")
            assert b"evil" not in world.received
            assert world.received.startswith(b"POST / HTTP/1.1\r\nHost: site.example\r\n" + framing)
            if framing.startswith(b"Content"):
                assert world.received.endswith(b"\r\n\r\n" + body)
            else:
                assert world.received.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("host", "address", "reason"),
    [
        ("evil.example", SITE, "policy"),
        ("site.example", OTHER, "policy"),
        ("8.8.8.8", SITE, "policy"),
        ("93.184.215.14", SITE, "policy"),
        ("site.example", PRIVATE, "floor"),
    ],
)
async def test_a_refused_request_is_told_why(host: str, address: IPv4Address, reason: str) -> None:
    """A text names the sandbox's policy as the reason, and the address where it can be read."""
    async with World(ONLY_SITE, going_to=(address, 80)).run() as world:
        answer = await world.get(host)
        assert answer.startswith(b"HTTP/1.1 403 Forbidden\r\n")
        assert b"GET /sandboxes/{id}/network" in answer
        shown = str(address) if reason == "floor" else host
        assert shown.encode() in answer
        assert world.refused == [(shown, 80, reason)]
        assert world.dialled == []


async def test_a_number_that_is_not_the_address_is_refused() -> None:
    """The request is refused although both addresses are allowed, because no honest client sends it."""
    async with World(NOT_EVIL, going_to=(SITE, 80)).run() as world:
        assert (await world.get("8.8.8.8")).startswith(b"HTTP/1.1 403 ")
        assert await world.get(str(SITE)) == world.answer
        assert world.refused == [("8.8.8.8", 80, "policy")]


@pytest.mark.parametrize(
    "data",
    [
        b"GET http://evil.example/ HTTP/1.1\r\nHost: site.example\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: site.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: site.example\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: evil.example@site.example\r\n\r\n",
        b"GET / HTTP/1.1\r\n Host: evil.example\r\nHost: site.example\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: site.example\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"\x16\x03\x01\x02\0\x01" + bytes(100) + b"\r\n\r\n",
        b"\0" * 20000,
    ],
)
async def test_a_request_with_two_readings_is_not_sent_on(data: bytes) -> None:
    """The guest gets 400, and nothing is dialled."""
    async with World(NOT_EVIL, going_to=(SITE, 80)).run() as world:
        assert (await world.say(data)).startswith(b"HTTP/1.1 400 ")
        assert world.dialled == []


async def test_a_server_that_is_not_there() -> None:
    """The guest gets 502 with a text. A request that does not come is given up."""
    async with World(going_to=(SITE, 80), unreachable=True, limits=Limits(head=0.1)).run() as world:
        assert (await world.get("site.example")).startswith(b"HTTP/1.1 502 ")
        assert await world.say(b"GET / HTTP/1.1\r\n") == b"RST"


# -- through the host's proxy


async def test_the_proxy_is_asked_by_name_if_the_name_stands_for_the_address() -> None:
    """Otherwise the proxy is asked by address, because a guest must not make it look up an invented name."""
    async with World(has_proxy=True, holds=True).run() as world:
        for name in ("site.example", "metadata.google.internal", "evil.example", None):
            assert (await world.hello(name)).endswith(b"<end>")
        heads = [head.split(b"\r\n")[0] for head in world.proxied]
        by_address = b"CONNECT 93.184.215.14:443 HTTP/1.1"
        assert heads == [b"CONNECT site.example:443 HTTP/1.1", by_address, by_address, by_address]
        assert world.dialled == []


async def test_the_proxy_gets_http_as_proxies_do() -> None:
    """The request is in absolute form, because many proxies let CONNECT through to 443 only."""
    async with World(has_proxy=True, going_to=(SITE, 80)).run() as world:
        assert await world.get("site.example", "/a") == world.answer
        assert await world.get("evil.example", "/a") == world.answer
        assert [head.split(b"\r\n")[:2] for head in world.proxied] == [
            [b"GET http://site.example/a HTTP/1.1", b"Host: site.example"],
            [b"GET http://93.184.215.14/a HTTP/1.1", b"Host: 93.184.215.14"],
        ]


@pytest.mark.parametrize("says", [b"HTTP/1.1 403 No\r\n\r\n", b"", b"HTTP/1.1 200", b"x" * 20000 + b"\r\n\r\n"])
async def test_a_proxy_that_does_not_connect(says: bytes) -> None:
    """The connection ends, and a program that uses the gate as a proxy is told."""
    async with World(has_proxy=True, proxy_says=says).run() as world:
        assert await world.hello("site.example") == b"RST"
        tunnel = b"CONNECT site.example:443 HTTP/1.1\r\nHost: site.example\r\n\r\n"
        assert (await world.say(tunnel, explicit=True)).startswith(b"HTTP/1.1 502 ")


# -- as a proxy


def tunnel_to(authority: str) -> bytes:
    return f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode()


async def test_a_tunnel() -> None:
    """A tunnel goes to any port of a judged address. Bytes behind its head are passed on."""
    async with World(NOT_EVIL, holds=True).run() as world:
        answer = await world.say(tunnel_to("Site.example:8443") + b"early", explicit=True, ends=True)
        assert answer == b"HTTP/1.1 200 Connection established\r\n\r\nearly<end>"
        assert world.dialled == [(str(SITE), 8443)]
        answer = await world.say(b"CONNECT 8.8.8.8:443 HTTP/1.0\r\n\r\n", explicit=True, ends=True)
        assert answer.endswith(b"\r\n\r\n<end>")
        assert world.dialled[1:] == [(str(OTHER), 443)]


async def test_a_plain_request_to_the_proxy() -> None:
    """One request goes as a path to the server, or in absolute form to the host's proxy, without credentials."""
    data = b"GET http://site.example:81/a HTTP/1.1\r\nHost: x\r\nProxy-Authorization: y\r\nProxy-Connection: z\r\n\r\n"
    async with World(NOT_EVIL).run() as world:
        assert await world.say(data, explicit=True) == world.answer
        assert world.received == b"GET /a HTTP/1.1\r\nHost: site.example:81\r\nConnection: close\r\n\r\n"
        assert world.dialled == [(str(SITE), 81)]
    async with World(NOT_EVIL, has_proxy=True).run() as world:
        assert await world.say(data, explicit=True) == world.answer
        head = b"GET http://site.example:81/a HTTP/1.1\r\nHost: site.example:81\r\nConnection: close\r\n\r\n"
        assert world.proxied == [head]


@pytest.mark.parametrize("has_proxy", [False, True])
@pytest.mark.parametrize(
    ("policy", "host", "port", "reason"),
    [
        (Policy(), "site.example", 25, "mail"),
        (Policy(), "8.8.8.8", 25, "mail"),
        (Policy(), "10.0.0.7", 443, "floor"),
        (Policy(), "169.254.169.254", 80, "floor"),
        (Policy(), "private.example", 443, "floor"),
        (Policy(allow_names=("private.example",)), "private.example", 443, "floor"),
        (Policy(), "localhost", 443, "floor"),
        (Policy(), "db", 443, "floor"),
        (Policy(), "metadata.google.internal", 80, "floor"),
        (NOT_EVIL, "evil.example", 443, "policy"),
        (ONLY_SITE, "8.8.8.8", 443, "policy"),
        (ONLY_SITE, "unknown.example", 443, "policy"),
        (Policy(deny=(IPv4Network("8.0.0.0/8"),)), "evil.example", 443, "policy"),
        (Policy(allow_internet=False, allow=(IPv4Network("8.0.0.0/8"),)), "site.example", 443, "policy"),
        (Policy(allow_internet=False, allow=(IPv4Network("8.0.0.0/8"),)), "unknown.example", 443, "policy"),
    ],
)
async def test_what_the_proxy_refuses(policy: Policy, host: str, port: int, reason: str, has_proxy: bool) -> None:
    """Tunnels and plain requests get 403 and a text with either way out, and nothing is dialled."""
    async with World(policy, has_proxy=has_proxy).run() as world:
        world.names["private.example"] = [PRIVATE]
        plain = f"GET http://{host}:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        for data in (tunnel_to(f"{host}:{port}"), plain):
            answer = await world.say(data, explicit=True)
            assert answer.startswith(b"HTTP/1.1 403 ")
        assert world.refused == [(host, port, reason)] * 2
        assert world.dialled == []
        assert world.proxied == []


async def test_a_closed_policy_asks_for_no_names() -> None:
    """No name is looked up, because it could carry a message out."""
    async with World(ONLY_SITE).run() as world:
        await world.say(tunnel_to("secret.evil.example:443"), explicit=True)
        assert world.looked_up == []


async def test_of_several_addresses_only_the_right_ones_are_dialled() -> None:
    """The host's proxy could take any of the addresses, so it is not asked for such a name."""
    async with World(holds=True).run() as world:
        assert b" 200 " in await world.say(tunnel_to("both.example:443"), explicit=True, ends=True)
        assert world.dialled == [(str(SITE), 443)]
    async with World(has_proxy=True).run() as world:
        assert b" 403 " in await world.say(tunnel_to("both.example:443"), explicit=True)
        assert world.proxied == []


async def test_a_name_that_only_the_hosts_proxy_knows() -> None:
    """The proxy decides. Without a proxy there is no connection."""
    async with World(NOT_EVIL, has_proxy=True, holds=True).run() as world:
        assert b" 200 " in await world.say(tunnel_to("unknown.example:443"), explicit=True, ends=True)
        assert world.proxied[0].startswith(b"CONNECT unknown.example:443 HTTP/1.1\r\n")
    async with World(NOT_EVIL).run() as world:
        assert b" 502 " in await world.say(tunnel_to("unknown.example:443"), explicit=True)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: site.example\r\n\r\n",
        b"GET https://site.example/ HTTP/1.1\r\nHost: site.example\r\n\r\n",
        b"GET http://a@site.example/ HTTP/1.1\r\nHost: site.example\r\n\r\n",
        b"CONNECT site.example HTTP/1.1\r\nHost: site.example\r\n\r\n",
        b"CONNECT [::1]:443 HTTP/1.1\r\nHost: site.example\r\n\r\n",
        b"CONNECT 0x7f.1:443 HTTP/1.1\r\nHost: site.example\r\n\r\n",
        b"\x05\x01\0" + b"\r\n\r\n",
    ],
)
async def test_what_is_no_request_to_a_proxy(data: bytes) -> None:
    """The guest gets 400, and nothing is dialled."""
    async with World().run() as world:
        assert (await world.say(data, explicit=True)).startswith(b"HTTP/1.1 400 ")
        assert world.dialled == []


# -- both


async def test_a_new_policy_cuts_what_it_forbids() -> None:
    """Connections that the new policy allows go on."""
    async with World(NOT_EVIL, holds=True).run() as world:
        first = client_hello("site.example")
        connections = []
        for data, where in ((first, world.redirected), (tunnel_to("8.8.8.8:443") + b"x", world.explicit)):
            reader, writer = await asyncio.open_connection(*where)
            writer.write(data)
            await (reader.readexactly(len(first)) if data is first else reader.readuntil(b"\r\n\r\nx"))
            connections.append((reader, writer))
        world.policy = ONLY_SITE
        world.pins.clear()  # as if the answer had expired
        world.gate.judge_again()
        (site, site_writer), (other, other_writer) = connections
        async with asyncio.timeout(20):
            with pytest.raises(ConnectionResetError):
                await other.read()
            site_writer.write(b"still here")
            assert await site.readuntil(b"still here")
        assert world.refused == [("8.8.8.8", 443, "policy")]
        site_writer.close()
        other_writer.close()


async def test_a_policy_that_changes_while_dialling_holds() -> None:
    """Not a byte of the guest goes out."""
    async with World(NOT_EVIL, going_to=(OTHER, 443), policy_while_dialling=ONLY_SITE, holds=True).run() as world:
        assert await world.hello("a.example") == b"RST"
        assert world.dialled == [(str(OTHER), 443)]
        assert world.refused == [("a.example", 443, "policy")]
        assert world.received == b""


async def test_a_guest_has_its_share_of_connections() -> None:
    """Further connections are reset and counted."""
    async with World(limits=Limits(connections=2), holds=True).run() as world:
        writers = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection(*world.redirected)
            writer.write(b"hello")
            await reader.readexactly(5)
            writers.append(writer)
        assert await world.say(b"hello") == b"RST"
        assert await world.say(b"hello", explicit=True) == b"RST"
        assert world.refused == [("*", 0, "limit")] * 2
        for writer in writers:
            writer.close()


async def test_who_does_not_read_is_not_read_from() -> None:
    """If a server sends without end and the guest does not read, the bytes in between stay few."""
    sent = 0
    has_stopped = asyncio.Event()

    async with World().run() as world:

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            writer.transport.set_write_buffer_limits(high=0)
            try:
                while True:
                    writer.write(bytes(65536))
                    async with asyncio.timeout(1):
                        await writer.drain()
                    sent += 65536
            except (TimeoutError, OSError):
                has_stopped.set()
            writer.transport.abort()

        world.server.close()
        world.server = await asyncio.start_server(flood, "127.0.0.1", 0)
        guest = socket.create_connection(world.redirected)
        guest.sendall(b"hello")
        async with asyncio.timeout(60):
            await has_stopped.wait()
        assert sent < 32 * 1024 * 1024  # the kernel's buffers
        guest.close()
        world.server.close()


async def test_what_is_idle_is_cut() -> None:
    """A connection is cut after a while without a byte either way."""
    async with World(limits=Limits(idle=0.3), holds=True).run() as world:
        assert await world.say(b"hello") == b"RST"


async def test_much_passes_unchanged() -> None:
    """Both ways are copied at once."""
    data = b"SSH" + bytes(range(251)) * 40_000
    async with World(holds=True).run() as world:
        assert await world.say(data, ends=True) == data + b"<end>"


async def test_closing_cuts_everything() -> None:
    """Connections that have just come are cut, too, and the gate may be closed again."""
    async with World(holds=True).run() as world:
        reader, writer = await asyncio.open_connection(*world.redirected)
        writer.write(b"hello")
        await reader.readexactly(5)
        world.gate.close()
        world.gate.close()
        async with asyncio.timeout(20):
            try:
                assert await reader.read() == b""
            except ConnectionResetError:
                pass
        writer.close()


async def test_where_it_was_going_is_unknown() -> None:
    """A connection that was not redirected is reset."""
    async with World(going_to=None).run() as world:
        assert await world.say(b"hello") == b"RST"
        assert world.dialled == []
