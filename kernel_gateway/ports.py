"""HTTP between a client and a service inside a sandbox. Pure: values in, values out.

The service is hostile, and so is the page it shows. Four things must hold:

- No key of ours reaches the service, wherever a client has put one (`without_keys`).
- The service's answer is read by h11 and written anew. By path only headers that are known to be harmless pass. At
  both kinds of address, headers are dropped that a proxy in front would obey (`answer_headers`).
- What a proxy in front adds to a request, to prove who the client is, never reaches the service (`forwarded`).
- Neither the service nor the client decides where one request ends and the next begins. Each request has its own
  connection, and a request whose length can be read in two ways is refused (`framing`).

A preview has two kinds of address. By path it shares the gateway's origin, so its pages get an opaque origin (CSP
`sandbox`) and no cookies. By host name it has an origin of its own.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import unquote, unquote_plus, urlsplit

import h11

from kernel_gateway.errors import GuestFailure, InvalidRequest
from kernel_gateway.sandbox.key import Key, may_be_key

HEAD_LIMIT = 32 * 1024
"""Largest head of an answer, in bytes."""
MAX_INFORMATIONAL = 10
"""Answers 1xx that are skipped before the real one."""
CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f]")
"""Characters that no header may have. h11 lets some of them pass."""
KEY_CANDIDATES = 64
"""Words of an Authorization header that are looked at."""
QUERY_CANDIDATES = 4
"""Values of `token` in a query that are looked up."""

Headers = list[tuple[str, str]]
FindKey = Callable[[str], Key | None]

HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding"
    " upgrade http2-settings".split()
)
TRAFFIC = "e2b-traffic-access-token"
E2B = (TRAFFIC, "e2b-sandbox-id", "e2b-sandbox-port")
"""Headers by which E2B's clients show that they may use a port, and name it."""
NOT_FORWARDED = HOP_BY_HOP | {*"host content-length expect origin referer".split(), *E2B}
"""Headers of a request that concern only the client and us, or that are written anew."""


def names(text: str) -> re.Pattern[str]:
    """What matches these names of headers, in small letters. A name may end in `*`, for all that begin like it."""
    return re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in text.lower().replace(",", " ").split()))


NONE = names("")
FROM_PROXIES = names(
    "via forwarded x-forwarded-* x-real-ip true-client-ip client-ip x-client-ip x-cluster-client-ip fastly-* cf-* cdn-*"
    " x-original-* x-rewrite-url x-envoy-* remote-* x-remote-* x-auth-request-* x-authentik-* x-authenticated-*"
    " x-webauth-* x-vouch-* x-pomerium-* x-amzn-oidc-* x-amzn-mtls-* x-goog-* x-ms-client-principal* x-ms-token-*"
    " tailscale-* client-cert* x-client-cert* x-ssl-* ssl-* x-arr-*"
)
"""Headers in which a proxy tells a server who the client is, or proves it. The service must get neither from a proxy in
front, which would hand over a credential, nor from a client, who may say anything."""
LOGINS = frozenset("basic digest negotiate ntlm".split())
"""Schemes of `Authorization` that a browser repeats at every address of a host. They are meant for what is in front."""
COOKIES_OF_PROXIES = names(
    "cf_authorization cf_appsession _oauth2_proxy* gcp_iaap* awselbauthsessioncookie* appserviceauthsession* _vouch*"
    " vouchcookie* _pomerium* authelia_session authentik_*"
)
"""Cookies of what stands in front. A browser sends them to all hosts below a domain."""
OBEYED_BY_PROXIES = names(
    "server via x-accel-* x-sendfile* x-lighttpd-* x-litespeed-* x-reproxy-* x-envoy-* x-cache* x-varnish* x-original-*"
    " surrogate-* cdn-* *cdn-cache-control cf-* edge-* fastly-* akamai-* x-akamai-*"
)
"""Headers of an answer that proxies and caches in front obey. nginx answers `X-Accel-Redirect` with a file of its own.
`Server` is among them because nobody should take the service's word for what stands here."""
NOT_ANSWERED = HOP_BY_HOP | {"clear-site-data"}
"""Headers of an answer that are dropped. `Clear-Site-Data: "cookies"` reaches beyond the host it comes from."""
ANSWERED_BY_PATH = names(
    "content-* cache-control pragma expires age date etag last-modified vary accept-ranges allow location link"
    " retry-after access-control-* sec-websocket-* cross-origin-resource-policy ratelimit* mcp-* x-*"
)
"""All headers of an answer that pass by path. A browser would take others for the gateway's own, and every year brings
new ones of that kind."""
SANDBOXED = "sandbox allow-scripts allow-forms allow-popups allow-modals allow-downloads"
PAGE_SAFETY: Headers = [
    ("Content-Security-Policy", SANDBOXED),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
]
DOWNLOAD_SAFETY: Headers = [
    ("Content-Type", "application/octet-stream"),
    ("Content-Disposition", "attachment"),
    ("Content-Security-Policy", "sandbox"),
    *PAGE_SAFETY[1:],
]
"""Headers of an answer to an address with a key in it. No browser may show it, because a page could read the key."""


@dataclass(frozen=True, slots=True)
class Place:
    """The port that a request is for. `prefix` is its address before the service's own path, empty by host name."""

    sandbox: str
    port: str
    prefix: str = ""

    @property
    def is_by_path(self) -> bool:
        return bool(self.prefix)

    @property
    def number(self) -> int:
        """The port as a number.

        Raises:
            InvalidRequest: there is no such port.
        """
        if not re.fullmatch("[1-9][0-9]{0,4}", self.port) or int(self.port) > 65535:
            raise InvalidRequest("a port is a number from 1 to 65535")
        return int(self.port)


def place_of_host(host: str, domain: str) -> Place | None:
    """The place of a host name `{port}-{id}.{domain}`; None for another kind of name. `host` and `domain` have no port.

    A name that only begins like that is a place that does not exist, because the gateway must not answer by it.
    """
    name, _, rest = host.lower().removesuffix(".").partition(".")
    found = re.fullmatch("([0-9]+)-(.*)", name)
    if not domain or found is None:
        return None
    if rest == domain:
        return Place(found[2], found[1])
    return Place(found[2] + ".", found[1]) if rest.endswith(f".{domain}") else None


def place_of_path(path: str, before: str) -> Place | None:
    """The place of a path `/sandboxes/{id}/ports/{port}…`; None for another path. `before` stood in front of it."""
    found = re.match("/sandboxes/([^/]+)/ports/([^/]+)", path)
    return None if found is None else Place(found[1], found[2], before + found[0])


# -- keys ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Carried:
    """A request's headers and query without our keys, and the keys that were there.

    `in_address`: a key was in the query, and the page could read it there.
    """

    headers: Headers
    query: str
    keys: frozenset[Key]
    in_address: bool


def without_keys(headers: Iterable[tuple[str, str]], query: str, find_key: FindKey) -> Carried:
    """Take our keys out. A value that is no key of ours is for the service and stays, byte for byte.

    Raises:
        InvalidRequest: a header for keys comes more than once.
    """
    headers = list(headers)
    for name in ("authorization", "x-api-key"):
        if sum(given.lower() == name for given, _ in headers) > 1:
            raise InvalidRequest(f"a request has one {name} header, not more")
    keys: set[Key] = set()
    kept: Headers = []
    for name, value in headers:
        words = _words(value) if name.lower() == "authorization" else {value} if name.lower() == "x-api-key" else set()
        found = {key for word in words if (key := find_key(word))}
        keys |= found
        if not found:
            kept.append((name, value))
    cleaned, in_query = _query_without_keys(query, find_key)
    return Carried(kept, cleaned, frozenset(keys | in_query), bool(in_query))


def _words(value: str) -> set[str]:
    """Everything in an Authorization header that could be a key, also as one half of `Basic`."""
    scheme, _, rest = value.strip().partition(" ")
    found = {value.strip(), rest.strip(), *re.split(r'[\s,;="]+', value)[:KEY_CANDIDATES]}
    if scheme.lower() == "basic":
        try:
            found |= set(base64.b64decode(rest.strip(), validate=True).decode("utf-8", "replace").split(":", 1))
        except binascii.Error:
            pass  # it is not base64, so it is no key of ours
    return found - {""}


def _candidate(piece: str) -> str | None:
    """What could be a key of ours in a piece of a query."""
    name, _, value = piece.partition("=")
    text = unquote_plus(value) if unquote_plus(name) == "token" else ""
    return text if may_be_key(text) else None


def _query_without_keys(query: str, find_key: FindKey) -> tuple[str, set[Key]]:
    keys: set[Key] = set()
    kept = []
    candidates = 0
    for piece in query.split("&"):
        text = _candidate(piece)
        candidates += text is not None
        if candidates > QUERY_CANDIDATES:
            raise InvalidRequest(f"a query has at most {QUERY_CANDIDATES} long values of `token`")
        key = find_key(text) if text else None
        if key is None:
            kept.append(piece)
        else:
            keys.add(key)
    return "&".join(kept), keys


def refuse_key_in_path(path: str, find_key: FindKey) -> None:
    """Refuse a key in a path, because the page could read its own address.

    Raises:
        InvalidRequest: a key of ours is in the path.
    """
    found = re.match("/+t/([^/]+)", path, re.IGNORECASE)
    if found is not None and find_key(unquote(found[1])):
        raise InvalidRequest(
            "a port's address may not have a key in its path: the page could read it",
            hint="send the key as `Authorization: Bearer <key>` or `X-API-Key: <key>`, or open the port",
        )


# -- the request --------------------------------------------------------------------------------------------------


def framing(headers: Iterable[tuple[str, str]]) -> int | None:
    """The length of a request's body; None if it comes in chunks.

    Raises:
        InvalidRequest: the length can be read in more than one way.
    """
    lengths = [value for name, value in headers if name.lower() == "content-length"]
    encodings = [value for name, value in headers if name.lower() == "transfer-encoding"]
    if len(lengths) + len(encodings) > 1:
        raise InvalidRequest("a request has one Content-Length or one Transfer-Encoding, not more")
    if encodings:
        if encodings[0].lower() != "chunked":
            raise InvalidRequest("the only Transfer-Encoding that is allowed is `chunked`")
        return None
    if lengths and not re.fullmatch("[0-9]{1,18}", lengths[0]):
        raise InvalidRequest("Content-Length is not a number")
    return int(lengths[0]) if lengths else 0


@dataclass(frozen=True, slots=True)
class Client:
    """The client, as the service is told of it. `host` is the client's name for the gateway, perhaps with a port."""

    address: str
    scheme: str
    host: str

    @property
    def origins(self) -> tuple[str, str]:
        """The gateway's origins for a browser. There are two, because there may be TLS in front that we do not see."""
        return f"http://{self.host.lower()}", f"https://{self.host.lower()}"


def forwarded(headers: Headers, place: Place, stripped: re.Pattern[str]) -> Headers:
    """The headers of a request that go on to the service as they are, perhaps with fewer cookies."""
    dropped = NOT_FORWARDED | _named_by_connection(headers)
    kept: Headers = []
    for name, value in headers:
        lower = name.lower()
        # Many servers take `_` for `-`, so one could not tell what such a name means there.
        if lower in dropped or "_" in lower or FROM_PROXIES.fullmatch(lower) or stripped.fullmatch(lower):
            continue
        if lower == "authorization" and value.split(" ")[0].lower() in LOGINS:
            continue
        if lower == "cookie":
            value = "" if place.is_by_path else _without_cookies_of_proxies(value)
            if not value:
                continue
        kept.append((name, value))
    return kept


def _without_cookies_of_proxies(cookies: str) -> str:
    pieces = [piece.strip() for piece in cookies.split(";")]
    return "; ".join(
        piece for piece in pieces if piece and not COOKIES_OF_PROXIES.fullmatch(piece.partition("=")[0].strip().lower())
    )


class Exchange:
    """One request and its answer, as bytes towards the service and from it.

    `stripped` matches headers, in small letters, that the operator keeps from services.
    """

    def __init__(self, place: Place, stripped: re.Pattern[str] = NONE) -> None:
        self._place = place
        self._stripped = stripped
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_LIMIT)
        self._skipped = 0
        self.is_over = False

    @property
    def _service(self) -> str:
        return f"http://localhost:{self._place.number}"

    def request(
        self, method: str, target: str, headers: Headers, length: int | None, upgrade: str, client: Client
    ) -> bytes:
        """The request's head.

        Raises:
            InvalidRequest: the head has something in it that HTTP does not allow.
        """
        kept = forwarded(headers, self._place, self._stripped)
        sent: Headers = [("Host", f"localhost:{self._place.number}"), *kept, *self._whence(headers, client)]
        sent += [("Connection", "Upgrade"), ("Upgrade", upgrade)] if upgrade else [("Connection", "close")]
        if length is None:
            sent.append(("Transfer-Encoding", "chunked"))
        elif length or method not in ("GET", "HEAD", "OPTIONS", "DELETE", "TRACE"):
            sent.append(("Content-Length", str(length)))
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent]
        try:
            head = self._h11.send(h11.Request(method=method, target=target.encode("latin-1"), headers=raw))
        except h11.LocalProtocolError:
            raise InvalidRequest("the request's address or headers have characters that must be encoded") from None
        return head or b""

    def _whence(self, headers: Headers, client: Client) -> Headers:
        """Headers about where the request comes from. The client's own headers of this kind are dropped."""
        told = [
            ("X-Forwarded-For", client.address),
            ("X-Forwarded-Host", client.host),
            ("X-Forwarded-Proto", client.scheme),
        ]
        if self._place.is_by_path:
            told.append(("X-Forwarded-Prefix", self._place.prefix))
        for name, value in headers:
            if name.lower() == "origin":
                # The service knows itself as localhost, so its own pages must come from there.
                # `null` stays as it is, because sandboxed pages of any site have it, too.
                is_own = value.lower() in client.origins
                told.append(("Origin", self._service if is_own else value))
            elif name.lower() == "referer":
                # Addresses of other pages are dropped, because one of the gateway's own may have a key in it.
                for start in (f"{origin}{self._place.prefix}/" for origin in client.origins):
                    if value.lower().startswith(start.lower()):
                        told.append(("Referer", f"{self._service}/{value[len(start) :].partition('?')[0]}"))
        return told

    def body(self, data: bytes) -> bytes:
        """A piece of the request's body."""
        return self._h11.send(h11.Data(data=data)) or b""

    def end(self) -> bytes:
        """The end of the request's body."""
        return self._h11.send(h11.EndOfMessage()) or b""

    def receive_data(self, data: bytes) -> None:
        """Take bytes that the service has sent; none mean that it has closed the connection."""
        self._h11.receive_data(data)

    def next_event(self) -> "Answer | bytes | None":
        """The answer's head, then its body in pieces; None when more bytes are needed.

        After the body's end, or after a head that switches protocols, `is_over` holds.

        Raises:
            GuestFailure: the answer is not HTTP, too long, or cut off.
        """
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError:
                raise GuestFailure(
                    "failed", f"the service on port {self._place.number} did not answer as HTTP demands"
                ) from None
            match event:
                case h11.InformationalResponse() if event.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
                    self._skipped += 1
                    if self._skipped > MAX_INFORMATIONAL:
                        raise GuestFailure("failed", f"the service on port {self._place.number} sent only 1xx answers")
                case h11.Response() | h11.InformationalResponse():
                    return self._answer(event)
                case h11.Data():
                    return bytes(event.data)
                case h11.NEED_DATA:
                    return None
                case _:  # the end, or a connection that is not HTTP's any more
                    self.is_over = True
                    return b""

    def _answer(self, event: h11.Response | h11.InformationalResponse) -> "Answer":
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers.raw_items()]
        if any(CONTROL.search(value) for _, value in headers):
            raise GuestFailure("failed", f"the service on port {self._place.number} did not answer as HTTP demands")
        if sum(len(name) + len(value) + 4 for name, value in headers) > HEAD_LIMIT:
            raise GuestFailure("failed", f"the service on port {self._place.number} answered with too long a head")
        return Answer(event.status_code, headers)

    @property
    def rest(self) -> bytes:
        """The bytes after a head that switches protocols."""
        return bytes(self._h11.trailing_data[0])


# -- the answer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of a service's answer, as it came."""

    status: int
    headers: Headers

    @property
    def switches(self) -> bool:
        return self.status == HTTPStatus.SWITCHING_PROTOCOLS


def _named_by_connection(headers: Headers) -> set[str]:
    values = [value for name, value in headers if name.lower() == "connection"]
    return {word.strip().lower() for value in values for word in value.split(",")}


def answer_headers(answer: Answer, place: Place, *, is_private: bool, is_download: bool) -> Headers:
    """The headers that go on to the client.

    Args:
        is_private: the client has shown a key, so no cache in front may keep the answer for others.
        is_download: no browser may show it as a page.
    """
    dropped = NOT_ANSWERED | _named_by_connection(answer.headers)
    if any(name.lower() == "transfer-encoding" for name, _ in answer.headers) or answer.status == HTTPStatus.NO_CONTENT:
        dropped = dropped | {"content-length"}
    if place.is_by_path or is_download:
        dropped = dropped | {name.lower() for name, _ in PAGE_SAFETY[1:]}
    if is_private:
        dropped = dropped | {"cache-control"}
    if is_download:
        dropped = dropped | {"content-disposition", "content-type", "content-security-policy"}
    kept: Headers = []
    for name, value in answer.headers:
        lower = name.lower()
        if lower in dropped or OBEYED_BY_PROXIES.fullmatch(lower):
            continue
        if place.is_by_path and not ANSWERED_BY_PATH.fullmatch(lower):
            continue
        if lower in ("location", "content-location"):
            value = relocated(value, place)
        elif lower == "set-cookie":
            value = _without_domain(value)
        kept.append((name, value))
    if is_private:
        kept.append(("Cache-Control", _private(answer.headers)))
    if is_download:
        kept += DOWNLOAD_SAFETY
    elif place.is_by_path:
        kept += PAGE_SAFETY
    return kept


def _private(headers: Headers) -> str:
    """The service's `Cache-Control`, for nobody but the client."""
    values = [value for name, value in headers if name.lower() == "cache-control"]
    words = [word.strip() for value in values for word in value.split(",")]
    shared = ("public", "private", "s-maxage", "proxy-revalidate")
    kept = [word for word in words if word and word.partition("=")[0].strip().lower() not in shared]
    return ", ".join(["private", *kept])


def relocated(location: str, place: Place) -> str:
    """The client's address for an address that the service has given."""
    try:
        parts = urlsplit(location)
        is_own = parts.hostname in ("localhost", "127.0.0.1") and (parts.port or 80) == place.number
    except ValueError:
        return location
    if is_own and parts.scheme in ("http", "https", ""):
        rest = location.partition("//")[2]
        location = rest[len(parts.netloc) :]
        location = location if location.startswith("/") else f"/{location}"
        location = "/" + location.lstrip("/")
    is_told = location == place.prefix or location.startswith(f"{place.prefix}/")  # it heeds X-Forwarded-Prefix
    is_path = location.startswith("/") and not location.startswith("//")
    return place.prefix + location if is_path and not (place.is_by_path and is_told) else location


def _without_domain(cookie: str) -> str:
    """A cookie for this host alone, because with a `Domain` other sandboxes' previews would get it, too."""
    first, *attributes = cookie.split(";")
    return ";".join([first, *(each for each in attributes if each.partition("=")[0].strip().lower() != "domain")])
