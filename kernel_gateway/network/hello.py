"""The host that a connection asks for, read from its first bytes: a TLS ClientHello or an HTTP request. Pure.

The bytes come from a hostile guest. Bytes that could be read in two ways are refused, because the server at the other
end might read them the other way. So a name has one form, and an HTTP request is written anew from its parsed parts.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address

import h11

MAX_HEAD = 16 * 1024
"""Bytes of a ClientHello, and of a request's head."""
MAX_RECORDS = 64
Host = str | IPv4Address

_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_AUTHORITY = re.compile(rb"([A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_ABSOLUTE = re.compile(rb"(?i:http)://([^/?#@]*)((?:[/?][!-~]*)?)")


class Malformed(ValueError):
    """The bytes are not valid. The text is ours and holds none of them."""


def parse_host(text: str) -> Host:
    """A name or an address in the only form that we pass on: lower case, no dot at the end.

    A name has letters, digits, hyphens and, because services and buckets have them, underscores. Resolvers take a name
    for an address if its last label is a number. Such a name must be four plain decimal numbers: no octal, no hex, no
    127.1.

    Raises:
        Malformed: the text is neither.
    """
    name = text.removesuffix(".").lower() if text.isascii() else ""
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        try:
            return IPv4Address(name)
        except ValueError:
            raise Malformed("an address that is not as it must be") from None
    if len(name) > 253 or not _NAME.fullmatch(name):
        raise Malformed("a name that is not as it must be")
    return name


def reverse_address(name: str) -> IPv4Address | None:
    """The address that a name below in-addr.arpa is about; None for other names.

    Raises:
        Malformed: the name is about no address, or about an IPv6 address.
    """
    if not name.endswith((".in-addr.arpa", ".ip6.arpa")):
        return None
    try:
        return IPv4Address(".".join(reversed(name.removesuffix(".in-addr.arpa").split("."))))
    except ValueError:
        raise Malformed("not the name of an IPv4 address") from None


def parse_authority(text: bytes) -> tuple[Host, int | None]:
    """Host and port of a Host header or of a URI. There may be no user and no IPv6 address.

    Raises:
        Malformed: the text is not valid.
    """
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise Malformed("not a host, or not a host and a port")
    port = int(match[2]) if match[2] else None
    if port is not None and not 0 < port < 65536:
        raise Malformed("no such port")
    return parse_host(match[1].decode()), port


# -- TLS


@dataclass(frozen=True, slots=True)
class Hello:
    """A client's first message. `host` is None if the client named no host, or does not speak TLS."""

    host: Host | None
    is_tls: bool = True


class _Bytes:
    """A reader of big-endian numbers and vectors, which raises Malformed at the end of the bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        if len(piece) < size:
            raise Malformed("a ClientHello that ends early")
        self._at += size
        return piece

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> "_Bytes":
        return _Bytes(self.take(self.number(size)))


def read_hello(data: bytes) -> Hello | None:
    """A connection's first bytes as a TLS ClientHello; None when more are needed.

    The hello may be spread over records in any way. With an encrypted ClientHello the outer name counts, because it
    names the server that the connection goes to. GREASE is skipped like every unknown extension.

    Raises:
        Malformed: the bytes begin as TLS and are not a valid ClientHello.
    """
    if not data:
        return None
    if data[0] != 22:
        return Hello(None, is_tls=False)
    message = b""
    at = records = 0
    while len(message) < 4 or len(message) < 4 + int.from_bytes(message[1:4], "big"):
        if data[at : at + 1] not in (b"", b"\x16") or data[at + 1 : at + 2] not in (b"", b"\x03"):
            raise Malformed("not a handshake")
        if message and (message[0] != 1 or int.from_bytes(message[1:4], "big") > MAX_HEAD):
            raise Malformed("not a ClientHello, or too long")
        if len(data) < at + 5:
            return None
        size = int.from_bytes(data[at + 3 : at + 5], "big")
        records += 1
        if not 0 < size <= 2**14 or records > MAX_RECORDS:
            raise Malformed("a record of a wrong length, or too many")
        message += data[at + 5 : at + 5 + size]
        if len(data) < at + 5 + size:
            return None
        at += 5 + size
    if message[0] != 1 or len(message) != 4 + int.from_bytes(message[1:4], "big"):
        raise Malformed("not a ClientHello alone")  # early data may follow, in records of their own
    return Hello(_server_name(_Bytes(message[4:])))


def _server_name(hello: _Bytes) -> Host | None:
    hello.take(2 + 32)  # version, random
    hello.vector(1)  # session
    hello.vector(2)  # cipher suites
    hello.vector(1)  # compression methods
    if not hello:
        return None
    extensions = hello.vector(2)
    if hello:
        raise Malformed("more than a ClientHello")
    seen = set()
    host: Host | None = None
    while extensions:
        kind = extensions.number(2)
        body = extensions.vector(2)
        if kind in seen:
            raise Malformed("an extension twice")
        seen.add(kind)
        if kind == 0:
            names = body.vector(2)
            if names.number(1) != 0:
                raise Malformed("not a host's name")
            raw = names.vector(2)
            if names or body:
                raise Malformed("more than one name")
            host = parse_host(raw.rest().decode("latin-1"))
    return host


# -- HTTP


class Request:
    """The one HTTP request that a connection may carry, read strictly and written anew.

    A second request could go to another host, so it is not read: the first is sent on with `Connection: close`. The
    guest's framing is not trusted, so the body is measured anew. No upgrade is passed on, because the bytes after it
    can't be judged. So a WebSocket without TLS does not work through a gate.
    """

    def __init__(self) -> None:
        self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._head: h11.Request | None = None
        self._is_chunked = False
        self.is_complete = False

    def receive_head(self, data: bytes) -> bool:
        """Take bytes, and return whether the head is complete.

        Raises:
            Malformed: the bytes are not valid HTTP/1.x.
        """
        event = self._next(data)
        if not isinstance(event, h11.Request):
            return False
        headers = [name for name, _ in event.headers]
        self._is_chunked = b"transfer-encoding" in headers
        framings = headers.count(b"transfer-encoding") + headers.count(b"content-length")
        if event.http_version not in (b"1.0", b"1.1") or (self._is_chunked and event.http_version == b"1.0"):
            raise Malformed("not HTTP/1.1")
        if framings > 1 or (framings and event.method == b"CONNECT"):
            raise Malformed("a body of two lengths")
        self._head = event
        return True

    @property
    def head(self) -> h11.Request:
        assert self._head is not None, "the head comes first"
        return self._head

    def host(self) -> tuple[Host | None, int | None]:
        """Host and port of the Host header, if there is one.

        Raises:
            Malformed: the header is not valid, or there are two.
        """
        hosts = [value for name, value in self.head.headers if name == b"host"]
        if len(hosts) > 1:
            raise Malformed("two hosts")
        return parse_authority(hosts[0]) if hosts else (None, None)

    def path(self) -> bytes:
        """The target of a request to a server: a path.

        Raises:
            Malformed: the request is for a tunnel, or its target is no path.
        """
        if self.head.method == b"CONNECT" or not self.head.target.startswith(b"/"):
            raise Malformed("not a path")
        return self.head.target

    def absolute(self) -> tuple[Host, int, bytes]:
        """Host, port and path of a request to a proxy.

        Raises:
            Malformed: the target is not `http://host/…`.
        """
        match = _ABSOLUTE.fullmatch(self.head.target)
        if match is None or self.head.method == b"CONNECT":
            raise Malformed("not an http:// address")
        host, port = parse_authority(match[1])
        return host, port or 80, match[2] if match[2].startswith(b"/") else b"/" + match[2]

    def tunnel(self) -> tuple[Host, int]:
        """Host and port of a CONNECT.

        Raises:
            Malformed: the target is not `host:port`.
        """
        host, port = parse_authority(self.head.target)
        if port is None:
            raise Malformed("a port is missing")
        return host, port

    def after_head(self) -> bytes:
        """The bytes that came behind a CONNECT."""
        data: bytes = self._parser.trailing_data[0]
        return data

    def write_head(self, target: bytes, host: bytes | None) -> bytes:
        """The head to send on. `host` replaces the Host header. Headers of a single connection are left out."""
        lines = [b"%b %b HTTP/%b" % (self.head.method, target, self.head.http_version)]
        if host is not None:
            lines.append(b"Host: " + host)
        for (name, value), (raw, _) in zip(self.head.headers, self.head.headers.raw_items(), strict=True):
            if name not in _OF_ONE_CONNECTION:
                lines.append(raw + b": " + value)
        return b"\r\n".join([*lines, b"Connection: close", b"", b""])

    def receive_body(self, data: bytes) -> bytes:
        """Take bytes behind the head, none at first, and return what to send on. Bytes behind the body are dropped.

        Raises:
            Malformed: the body is not valid.
        """
        out = []
        while not self.is_complete:
            event = self._next(data)
            data = b""
            if isinstance(event, h11.Data) and event.data:
                body = bytes(event.data)
                out.append(b"%x\r\n%b\r\n" % (len(body), body) if self._is_chunked else body)
            elif isinstance(event, h11.EndOfMessage):
                self.is_complete = True
                out.append(b"0\r\n\r\n" if self._is_chunked else b"")
            elif event is h11.NEED_DATA:
                break
        return b"".join(out)

    def _next(self, data: bytes) -> object:
        try:
            if data:
                self._parser.receive_data(data)
            return self._parser.next_event()
        except h11.RemoteProtocolError:
            raise Malformed("not HTTP as it must be") from None


_OF_ONE_CONNECTION = {
    b"host",
    b"connection",
    b"keep-alive",
    b"proxy-connection",
    b"proxy-authorization",
    b"te",
    b"trailer",
    b"upgrade",
    b"http2-settings",
}
