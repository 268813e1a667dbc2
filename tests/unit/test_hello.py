"""The meaning of a connection's first bytes: real ClientHellos, cut and bent ones, HTTP heads, and names."""

import re
import ssl
from ipaddress import IPv4Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kernel_gateway.network.hello import (
    MAX_HEAD,
    Hello,
    Malformed,
    Request,
    parse_authority,
    parse_host,
    read_hello,
    reverse_address,
)


def client_hello(name: str | None, **options: object) -> bytes:
    """The first bytes of OpenSSL, as a client."""
    context = ssl.create_default_context()
    context.check_hostname = False
    for option, value in options.items():
        getattr(context, option)(value) if callable(getattr(context, option)) else setattr(context, option, value)
    outgoing = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


def extension(kind: int, body: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body


def sni(*names: bytes, kind: int = 0) -> bytes:
    listed = b"".join(bytes([kind]) + len(name).to_bytes(2, "big") + name for name in names)
    return extension(0, len(listed).to_bytes(2, "big") + listed)


def handshake(*extensions: bytes, end: bytes = b"") -> bytes:
    """A ClientHello made by hand, without its records."""
    listed = b"".join(extensions)
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\0\x02\x13\x01" + b"\x01\0" + len(listed).to_bytes(2, "big") + listed
    body += end
    return b"\x01" + len(body).to_bytes(3, "big") + body


def records(message: bytes, size: int = 2**14) -> bytes:
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces)


REAL = client_hello("www.example.com")
GREASE = extension(0x0A0A, b"") + extension(0x1A1A, b"\0")


def test_the_name_in_a_real_hello_is_read() -> None:
    """OpenSSL's own ClientHello, with and without a name, with TLS 1.2 and with ALPN."""
    assert read_hello(REAL) == Hello("www.example.com")
    assert read_hello(client_hello("WWW.Example.COM")) == Hello("www.example.com")
    assert read_hello(client_hello(None)) == Hello(None)
    assert read_hello(client_hello("a.example", maximum_version=ssl.TLSVersion.TLSv1_2)) == Hello("a.example")
    assert read_hello(client_hello("a.example", set_alpn_protocols=["h2", "http/1.1"])) == Hello("a.example")


def test_a_hello_that_is_cut_is_waited_for() -> None:
    """No prefix of a hello is taken for a whole one, or for a wrong one."""
    assert [size for size in range(len(REAL)) if read_hello(REAL[:size]) is not None] == []


@given(st.integers(min_value=16, max_value=600))
def test_a_hello_may_be_spread_over_records(size: int) -> None:
    """A hello in several records is read, because some clients split it to hide the name from filters."""
    message = REAL[5:]
    assert read_hello(records(message, size)) == Hello("www.example.com")
    assert read_hello(records(message, size)[:-1]) is None


def test_early_data_may_follow() -> None:
    """A resumed TLS 1.3 connection sends application data behind its hello."""
    assert read_hello(REAL + b"\x17\x03\x03\0\x05early") == Hello("www.example.com")


def test_grease_is_skipped_and_the_outer_name_counts() -> None:
    """Unknown extensions, an encrypted ClientHello among them, change nothing."""
    encrypted = extension(0xFE0D, b"\0" + bytes(60))
    assert read_hello(records(handshake(GREASE, encrypted, sni(b"outer.example")))) == Hello("outer.example")
    assert read_hello(records(handshake(GREASE, encrypted))) == Hello(None)


def test_a_number_is_an_address() -> None:
    """Some clients send an address in place of a name. It is judged as an address."""
    assert read_hello(records(handshake(sni(b"8.8.8.8")))) == Hello(IPv4Address("8.8.8.8"))


@pytest.mark.parametrize(
    "data",
    [
        records(handshake(sni(b"a.example", b"b.example"))),  # two names
        records(handshake(sni(b"a.example"), sni(b"b.example"))),  # the extension twice
        records(handshake(sni(b"a.example", kind=1))),
        records(handshake(sni(b""))),
        records(handshake(sni(b"evil\0.example.com"))),
        records(handshake(sni("exämple.com".encode()))),
        records(handshake(extension(0, b""))),
        records(handshake(extension(0, b"\0\x0e\0\0\x09a.example\0\0"))),  # more behind the name
        records(handshake(sni(b"a.example"), end=b"\0")),
        records(handshake(sni(b"a.example")) + b"\x01"),
        records(b"\x02" + bytes(40)),  # a ServerHello
        records(b"\x01\xff\xff\xff"),  # 16 MiB are promised
        b"\x16\x03\x01\0\0",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x02",
        records(handshake(sni(b"a.example")), 1),  # too many records
        records(handshake(sni(b"a.example"))[:20]) + b"\x17\x03\x03\0\x01a",
    ],
)
def test_a_hello_with_two_readings_has_none(data: bytes) -> None:
    """Bytes that another program might read differently are refused."""
    with pytest.raises(Malformed):
        read_hello(data)


def test_what_is_no_tls_has_no_name() -> None:
    """Other protocols are told apart by their first byte."""
    assert read_hello(b"SSH-2.0-x\r\n") == Hello(None, is_tls=False)
    assert read_hello(b"\x80\x2e\x01") == Hello(None, is_tls=False)  # SSL 2
    assert read_hello(b"") is None


@given(st.binary(max_size=300))
@example(b"\x16\x03\x01\x00\x04\x01\x00\x00\x00")
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Nothing but Malformed comes out."""
    for first in (data, b"\x16\x03" + data, records(b"\x01" + data), records(handshake(data)) if data else b""):
        try:
            hello = read_hello(first)
        except Malformed:
            continue
        assert hello is None or hello.host is None or parse_host(str(hello.host)) == hello.host


@given(st.data())
def test_a_bent_hello_is_read_or_refused(data: st.DataObject) -> None:
    """One byte of a real hello is changed anywhere."""
    at = data.draw(st.integers(0, len(REAL) - 1))
    bent = REAL[:at] + bytes([data.draw(st.integers(0, 255))]) + REAL[at + 1 :]
    try:
        read_hello(bent)
    except Malformed:
        pass


# -- names


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("_dmarc.example.com", "_dmarc.example.com"),
        ("1e100.net", "1e100.net"),
        ("3.example", "3.example"),
        ("8.8.8.8", IPv4Address("8.8.8.8")),
        ("8.8.8.8.", IPv4Address("8.8.8.8")),
    ],
)
def test_a_host_has_one_form(text: str, host: str | IPv4Address) -> None:
    """A name gets lower case and no dot at its end. An address stays an address."""
    assert parse_host(text) == host


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "..", "a..b", ".a", "a.example..", "a b", "a\0.example.com", "a@example.com", "a/b", "a:80", "-a.b"),
        *(
            "a-.b",
            "é.example",
            "ſ.example",
            "ＥＸＡＭＰＬＥ.com",
            "a.example\n",
            "[::1]",
            "::1",
            "*.example.com",
            "%31",
        ),
        *(
            "127.1",
            "2130706433",
            "0x7f.1",
            "0x7f000001",
            "0177.0.0.1",
            "127.0.0.01",
            "1.2.3.4.5",
            "a.1",
            "a.0x",
            "1.2.3.",
        ),
        *("a" * 64 + ".example", ".".join(["a" * 60] * 5)),
    ],
)
def test_what_could_be_two_hosts_is_none(text: str) -> None:
    """Tricks against filters are refused: NUL, users, other digits, octal, hex, short addresses, other dots."""
    with pytest.raises(Malformed):
        parse_host(text)


@given(st.text(max_size=40) | st.from_regex(r"[a-zA-Z0-9_.x-]{1,40}", fullmatch=True))
def test_a_parsed_host_stays_what_it_is(text: str) -> None:
    """The form is final. Parsing it again changes nothing, and libc would look up or connect to the same."""
    try:
        host = parse_host(text)
    except Malformed:
        return
    assert parse_host(str(host)) == host
    assert re.fullmatch(r"[a-z0-9_.-]+", str(host))
    assert str(host) == text.lower().removesuffix(".")


def test_reverse_names_are_addresses() -> None:
    """A reverse name's address is judged. A name without one can't be looked up."""
    assert reverse_address("4.3.2.1.in-addr.arpa") == IPv4Address("1.2.3.4")
    assert reverse_address("example.com") is None
    for name in ("10.in-addr.arpa", "b.4.3.2.1.in-addr.arpa", "1.0.0.ip6.arpa", "04.3.2.1.in-addr.arpa"):
        with pytest.raises(Malformed):
            reverse_address(name)


@pytest.mark.parametrize(
    "text", [b"", b":80", b"a:0", b"a:65536", b"a:999999", b"a:b", b"u@a", b"a:80:80", b"[::1]:80", b"a:"]
)
def test_an_authority_is_a_host_and_perhaps_a_port(text: bytes) -> None:
    """Any other text is refused."""
    assert parse_authority(b"A.example.:8080") == ("a.example", 8080)
    with pytest.raises(Malformed):
        parse_authority(text)


# -- HTTP


def request(data: bytes) -> Request:
    read = Request()
    assert read.receive_head(data)
    return read


def test_a_request_is_written_anew() -> None:
    """The written request has one host, in its one form, and is alone on its connection."""
    read = request(
        b"GET /a?b HTTP/1.1\r\nHOST: Example.COM.:80\r\nX-A: 1\r\nConnection: keep-alive\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: x\r\nProxy-Authorization: Basic eA==\r\n\r\n"
        b"GET /second HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    )
    assert read.host() == ("example.com", 80)
    head = read.write_head(read.path(), b"example.com:80")
    assert head == b"GET /a?b HTTP/1.1\r\nHost: example.com:80\r\nX-A: 1\r\nConnection: close\r\n\r\n"
    assert read.receive_body(b"") == b""
    assert read.is_complete
    assert read.receive_body(b"GET /third HTTP/1.1\r\n\r\n") == b""


def test_bodies_are_measured_anew() -> None:
    """A body has a length or chunks. Bytes behind it, chunk extensions and trailers are dropped."""
    read = request(b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\n\r\nhe")
    assert read.receive_body(b"") + read.receive_body(b"lloGET / HTTP/1.1\r\n") == b"hello"
    read = request(b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhel")
    sent = read.receive_body(b"") + read.receive_body(b"lo\r\n0\r\nX: y\r\n\r\nGET /")
    assert sent == b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n\r\n",  # no host
        b"GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"POST / HTTP/1.0\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a.example\r\nX: \0\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: a.example\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\r\n\r\n",
        b"\x16\x03\x01\0\x05hello\r\n\r\n",
        b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\nContent-Length: 3\r\n\r\nabc",
        b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEAD + b"\r\n",
    ],
)
def test_a_head_with_two_readings_has_none(head: bytes) -> None:
    """A head that a server might read differently is refused."""
    with pytest.raises(Malformed):
        Request().receive_head(head)


def test_a_server_is_asked_for_paths() -> None:
    """A target with a host of its own would win over the Host header."""
    for line in (b"GET http://evil.example/ HTTP/1.1", b"OPTIONS * HTTP/1.1", b"CONNECT /a HTTP/1.1"):
        with pytest.raises(Malformed):
            request(line + b"\r\nHost: a.example\r\n\r\n").path()


def test_a_proxy_is_asked_for_addresses() -> None:
    """An address is http:// with a host, or a tunnel to host and port."""

    def absolute(target: bytes) -> object:
        return request(b"GET " + target + b" HTTP/1.1\r\nHost: other.example\r\n\r\n").absolute()

    assert absolute(b"http://A.example/b?c") == ("a.example", 80, b"/b?c")
    assert absolute(b"HTTP://a.example:8080") == ("a.example", 8080, b"/")
    assert absolute(b"http://8.8.8.8?c") == (IPv4Address("8.8.8.8"), 80, b"/?c")
    for target in (
        b"/",
        b"https://a.example/",
        b"http://u@a.example/",
        b"http://a.example\\@b/",
        b"http:///",
        b"http://a#/",
    ):
        with pytest.raises(Malformed):
            absolute(target)
    tunnel = request(b"CONNECT A.example:443 HTTP/1.1\r\nHost: x\r\n\r\n\x16\x03")
    assert tunnel.tunnel() == ("a.example", 443)
    assert tunnel.receive_body(b"") == b""
    assert tunnel.after_head() == b"\x16\x03"


HEADS = st.builds(
    lambda line, headers, end: line + b"\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + end,
    st.sampled_from(
        [b"GET / HTTP/1.1", b"POST http://a.example/ HTTP/1.1", b"CONNECT a:1 HTTP/1.0", b"GET  / HTTP/1.1"]
    ),
    st.lists(
        st.sampled_from([b"Host: a.example", b"Content-Length: 3", b"Transfer-Encoding: chunked", b"Host:", b" folded"])
        | st.binary(max_size=20),
        max_size=4,
    ),
    st.binary(max_size=20) | st.just(b"3\r\nabc\r\n0\r\n\r\n"),
)


@given(st.binary(max_size=200) | HEADS, st.integers(1, 50))
def test_any_request_is_read_or_refused(data: bytes, size: int) -> None:
    """Pieces may have any size. Only Malformed is raised, and a written head has one Host at most."""
    read = Request()
    has_head = False
    try:
        for at in range(0, len(data), size):
            piece = data[at : at + size]
            if has_head:
                read.receive_body(piece)
            elif read.receive_head(piece):
                has_head = True
                host, _ = read.host()
                head = read.write_head(b"/", None if host is None else str(host).encode())
                assert len(re.findall(rb"(?im)^host:", head)) <= 1
                assert head.endswith(b"\r\nConnection: close\r\n\r\n")
                read.receive_body(b"")
    except Malformed:
        pass
