"""Receivers of webhooks: which of them are connected to, and what they get."""

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from kernel_gateway.network.policy import Floor
from kernel_gateway.webhooks import Refused, Sender, Targets, signature

HOST = IPv4Address("8.8.4.4")
FLOOR = Floor(exceptions=(IPv4Network("10.7.0.0/16"),), host=frozenset({HOST}))


class Names:
    """The resolver of a test: it tells the same addresses for every name, and counts the questions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
        self.asked = 0
        self.addresses = addresses
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self._answer)

    async def _answer(self, host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        self.asked += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "0.0.0.0", "10.0.0.1", "10.7.0.1", "172.16.0.9", "192.168.1.1", "169.254.169.254", "100.64.0.1",
     "168.63.129.16", "224.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1", "203.0.113.7", str(HOST)],
)  # fmt: skip
@pytest.mark.parametrize("url", ["https://receiver.example/", "https://receiver.example:8443/x"])
async def test_no_connection_goes_to_what_is_not_public(
    monkeypatch: pytest.MonkeyPatch, url: str, address: str
) -> None:
    """Whatever a name resolves to, what is private, special or this host's own is not connected to, by any trick."""
    Names(monkeypatch, address)

    async def connect(*_: object) -> None:
        raise AssertionError("it has connected")

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(Refused, match="on no public network"):
        await Sender(Targets(lambda: FLOOR))(url, b"{}", {})


async def test_mixed_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several addresses only those are left that may be connected to."""
    targets = Targets(lambda: FLOOR, (IPv4Network("10.9.0.0/16"),))
    assert targets.judge(["10.0.0.1", "1.1.1.1"], is_plain=False) == ["1.1.1.1"]
    assert targets.judge(["10.9.0.1", "10.0.0.1"], is_plain=True) == ["10.9.0.1"]
    with pytest.raises(Refused):
        targets.judge(["1.1.1.1"], is_plain=True)
    with pytest.raises(Refused):
        targets.judge([], is_plain=False)


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for receiver.example, and its key."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    subject = ["-subj", "/CN=receiver.example", "-addext", "subjectAltName=DNS:receiver.example"]
    files = ["-keyout", key, "-out", cert]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


class Hook(RequestHandler):
    """A receiver. The last request's body, host and header are kept on the class."""

    got: tuple[bytes, str, str] | None = None
    answer = b""

    def post(self) -> None:
        type(self).got = (self.request.body, self.request.host, self.request.headers.get("X-Event-ID", ""))
        self.write(self.answer)


@pytest.fixture
async def receiver(tmp_path: Path) -> AsyncIterator[tuple[int, ssl.SSLContext]]:
    """A receiver's port on this host, over TLS, and whom it trusts."""
    cert, key = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    server = HTTPServer(Application([(r"/.*", Hook)]), ssl_options=context)
    sock, port = bind_unused_port()
    server.add_sockets([sock])
    yield port, ssl.create_default_context(cafile=str(cert))
    server.stop()
    await server.close_all_connections()
    Hook.got, Hook.answer = None, b""


async def test_the_judged_address_is_the_one_that_is_connected_to(
    monkeypatch: pytest.MonkeyPatch, receiver: tuple[int, ssl.SSLContext]
) -> None:
    """A name is resolved once, so it can't lead elsewhere after it was judged. The certificate must be the name's."""
    port, trusted = receiver
    targets = Targets(lambda: FLOOR, (IPv4Network("127.0.0.1/32"),))
    names = Names(monkeypatch, "127.0.0.1")
    url = f"https://receiver.example:{port}/hook"
    assert await Sender(targets, trusted)(url, b"body", {"X-Event-ID": "7"}) == 200
    assert Hook.got == (b"body", f"receiver.example:{port}", "7")
    assert names.asked == 1
    for sender, where in ((Sender(targets), url), (Sender(targets, trusted), f"https://another.example:{port}/")):
        Hook.got = None
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            await sender(where, b"body", {})
        assert Hook.got is None


async def test_nobody_reads_the_answer(monkeypatch: pytest.MonkeyPatch, receiver: tuple[int, ssl.SSLContext]) -> None:
    """An answer of 30 MB is dropped as it comes."""
    port, trusted = receiver
    Hook.answer = b"x" * 30_000_000
    Names(monkeypatch, "127.0.0.1")
    targets = Targets(lambda: FLOOR, (IPv4Network("127.0.0.1/32"),))
    assert await Sender(targets, trusted)(f"https://receiver.example:{port}/", b"{}", {}) == 200


def test_the_signature() -> None:
    """It is the documented one: HMAC-SHA256 of the raw body, in lowercase hex (RFC 4231, test case 2)."""
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert signature("Jefe", b"what do ya want for nothing?") == expected
