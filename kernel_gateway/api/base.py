"""HTTP without the domain: a table of routes, typed bodies, one error table, one place that authenticates.

A route is data: method, path, an async function, and the types of what goes in and out. The same table answers requests
and makes the OpenAPI document, so the two can't differ.
"""

import asyncio
import base64
import binascii
import contextlib
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from typing import Any, get_args

import msgspec
from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPServerRequest
from tornado.iostream import StreamClosedError
from tornado.web import HTTPError, RequestHandler, stream_request_body

from kernel_gateway.api.guesses import Guesses
from kernel_gateway.errors import (
    CellvmError,
    InvalidRequest,
    RateLimited,
    TooLarge,
    TooManyRequests,
    Unauthorized,
)
from kernel_gateway.held import SMALL, Holding
from kernel_gateway.sandbox.access import Access
from kernel_gateway.sandbox.key import Key
from kernel_gateway.sandbox.sandbox import Asleep, Sandbox
from kernel_gateway.sandbox.sandboxes import Sandboxes
from kernel_gateway.sandbox.store import Store

log = logging.getLogger(__name__)

JSON_LIMIT = 4 * 1024 * 1024
MAX_OF_LINK = 32
"""Requests with one link that are answered at once."""
"""Largest JSON body in bytes."""
DROPPED_BODY = 4 * 1024 * 1024 * 1024
"""Bytes of a refused body that are read and dropped before the connection is closed."""
JSON_BODY_TIMEOUT = 60.0
"""Seconds a client may take to send a JSON body."""

NOBODY = Key("", "", "", 0.0)
"""The key of a request that needs none."""

STATUS: dict[str, int] = {
    "invalid_request": 400,
    "too_large": 413,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "conflict": 409,
    "sandbox_paused": 409,
    "sandbox_restored": 409,
    "snapshot_corrupt": 409,
    "snapshot_incompatible": 409,
    "insufficient_storage": 507,
    "too_many_requests": 429,
    "not_implemented": 501,
    "template_not_ready": 503,
    "host_full": 503,
    "draining": 503,
    "sandbox_died": 502,
    "guest_unresponsive": 502,
    "method_not_allowed": 405,
    "misdirected": 421,
    "range_not_satisfiable": 416,
    "internal": 500,
    # the agent's refusals
    "is_directory": 400,
    "not_directory": 400,
    "not_regular": 400,
    "exists": 409,
    "permission_denied": 403,
    "no_space": 507,
    "invalid": 400,
    "cannot_run": 502,
    "port_closed": 502,
    "kernel_unavailable": 502,
    "failed": 502,
}
"""Every error code and its HTTP status; `docs/errors.md` explains them."""
EXPOSED = (
    "Content-Disposition, Content-Range, Location, Retry-After, X-More, "
    "X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset"
)
ALLOWED = "Authorization, Content-Type, Idempotency-Key, Last-Event-ID, Range, X-API-Key, X-Client-Name, X-XSRFToken"
"""Headers that web pages of allowed origins may send. Jupyter's pages send X-XSRFToken; nothing here reads it."""


class ErrorBody(msgspec.Struct, omit_defaults=True):
    """The body of every error. `code` is the HTTP status, `error` is the stable word of docs/errors.md.

    `reason` is the status in words, for Jupyter's clients.

    `outcome` is "unknown" when the work may have been done before the error, in part or as a whole, and "not_started"
    when it was accepted and then never begun, so that repeating it is safe. `sandboxId` is told where E2B tells it.
    """

    code: int
    message: str
    error: str
    reason: str
    hint: str | None = None
    outcome: str | None = None
    sandboxId: str | None = None


class MethodNotAllowed(CellvmError):
    code = "method_not_allowed"


class RangeNotSatisfiable(CellvmError):
    code = "range_not_satisfiable"


class Requests:
    """The requests that are being answered. `most` of them may be one owner's."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._all: dict[Any, tuple[str, ...]] = {}
        self._by: Counter[str] = Counter()  # by owner, and by link

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._all))

    def of(self, owner: str) -> int:
        """Number of an owner's requests."""
        return self._by[owner]

    def add(self, request: Any) -> None:
        self._all[request] = ()

    def assign(self, request: Any, key: Key) -> None:
        """Take note whose request it is.

        Raises:
            TooManyRequests: the owner, or a link, has as many as there may be.
        """
        if key.scope.mode and self._by[key.id] >= MAX_OF_LINK:
            raise TooManyRequests(
                f"{MAX_OF_LINK} requests with this link are being answered, which is all that it may have at once",
                hint="wait for some",
            )
        if self._by[key.owner] >= self.most:
            raise TooManyRequests(
                f"{self.most} requests of your key are being answered, which is all that one key may have at once",
                hint="wait for some; the operator sets the limit with --max-requests",
            )
        self._all[request] = (key.owner, key.id) if key.scope.mode else (key.owner,)
        self._by.update(self._all[request])

    def discard(self, request: Any) -> None:
        for each in self._all.pop(request, ()):
            self._by[each] -= 1
            if not self._by[each]:
                del self._by[each]


@dataclass(slots=True)
class Call:
    """One authenticated request, as operations see it. `http` is for operations that send their answer themselves.

    `mine` is what the request's key may see and create.
    """

    sandboxes: Sandboxes
    mine: Access
    path: dict[str, str]
    query: Any
    http: "Endpoint"

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox that the path names, if the key may see it."""
        return self.mine.get(self.path["id"])

    @property
    def owner(self) -> str:
        return self.mine.key.owner


Operation = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    `operation` gets the Call, and the decoded body when `body` is a type. Its result is sent as JSON with `status`,
    unless it has set `also`, the other status of a success, or has sent its answer itself, as one with `produces`, a
    content type, does. An `upload` operation reads the raw body from `call.http`. `refusal` is the type of errors that
    the operation sends itself.
    """

    method: str
    path: str
    operation: Operation
    body: Any = None
    query: Any = None
    answer: Any = None
    status: int = 200
    also: int | None = None
    produces: str | None = None
    refusal: Any = None
    upload: bool = False
    public: bool = False
    errors: tuple[int, ...] = field(default=())

    @property
    def pattern(self) -> str:
        return re.sub(r"\{\w+\}", "([^/]+)", self.path) + "/?"

    @property
    def names(self) -> list[str]:
        return re.findall(r"\{(\w+)\}", self.path)


PROTOCOL, KEY_PROTOCOL = "cellvm.v1", "cellvm.key."
"""A WebSocket of a web page offers two subprotocols: what it speaks, and its key in base64url. A page can set no header
of a WebSocket, and a key in the address would be in the logs of proxies."""


def key_of(request: HTTPServerRequest) -> str | None:
    """The key that a request carries.

    It is in `Authorization: Bearer …` (or `token …`), `X-API-Key: …`, a WebSocket's subprotocol, or `?token=…`.
    """
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() in ("bearer", "token") and key.strip():
        return key.strip()
    for offered in request.headers.get("Sec-WebSocket-Protocol", "").split(","):
        if offered.strip().startswith(KEY_PROTOCOL):
            return from_base64url(offered.strip().removeprefix(KEY_PROTOCOL))
    in_query = request.query_arguments.get("token", [b""])[-1].decode("utf-8", "replace")
    return request.headers.get("X-API-Key") or in_query or None


def from_base64url(text: str) -> str:
    """The text that base64url without padding means. Malformed ones give a text that is no key."""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except (binascii.Error, ValueError):
        return text


def refusal(request: HTTPServerRequest, guesses: Guesses) -> CellvmError:
    """The error for a request without a known key. If it has an unknown one, that is counted."""
    return refused(
        request, guesses, bool(key_of(request)), "send `Authorization: Bearer <key>`; `cellvm keys` makes one"
    )


def refused(request: HTTPServerRequest, guesses: Guesses, is_guess: bool, hint: str) -> CellvmError:
    """The error for a request without a known secret. One with an unknown one is a guess, and is counted."""
    address = request.remote_ip or ""
    if is_guess:
        guesses.add(address)
    if wait := guesses.wait(address):
        error = TooManyRequests(
            "too many unknown keys came from your address", hint="send a key that is known, or wait"
        )
        error.retry_after = wait
        return error
    return Unauthorized("the key is not known" if is_guess else "a key is required", hint=hint)


@cache
def fields_as_text(kind: Any) -> tuple[msgspec.json.Decoder[Any], dict[str, Any]]:
    """A decoder that takes the fields of a struct as JSON text, and those fields that are structs themselves."""
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    texts = msgspec.defstruct("Texts", [(name, msgspec.Raw, msgspec.Raw(b"null")) for name in fields])
    structs = {name: each for name, type_ in fields.items() for each in (type_, *get_args(type_)) if is_struct(each)}
    return msgspec.json.Decoder(texts), structs


def without_nulls(data: bytes, kind: Any) -> bytes:
    """A JSON object without those fields of `kind` that are null. Other fields are left out, because nobody reads them.

    Typed clients send null for what is not set.
    """
    decoder, structs = fields_as_text(kind)
    found = decoder.decode(data)
    kept = {name: getattr(found, name) for name in found.__struct_fields__}
    kept = {name: text for name, text in kept.items() if bytes(text) != b"null"}
    for name in structs.keys() & kept.keys():
        if bytes(kept[name]).startswith(b"{"):
            kept[name] = msgspec.Raw(without_nulls(bytes(kept[name]), structs[name]))
    return msgspec.json.encode(kept)


def is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def decode(data: bytes, kind: Any) -> Any:
    """A JSON body as its type. An empty body reads as `{}`, and a field that is null as one that is absent.

    Raises:
        InvalidRequest: the body is not JSON, or not of the type; the message says where.
    """
    try:
        try:
            return msgspec.json.decode(data or b"{}", type=kind)
        except msgspec.ValidationError:
            if b"null" not in data or not is_struct(kind):
                raise
            return msgspec.json.decode(without_nulls(data, kind), type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


class Handler(RequestHandler):
    """The common part of all answers: authentication, allowed origins, the form of errors."""

    def initialize(self, sandboxes: Sandboxes, store: Store) -> None:
        self._sandboxes = sandboxes
        self._store = store
        self._route: Route | None = None

    def count(self) -> None:
        """Count the request, which is over. Only a route gives it a name, because anybody can invent paths."""
        method, path = (self._route.method, self._route.path) if self._route else ("", "")
        metrics = self._sandboxes.metrics
        metrics.requests.labels(method, path, str(self.get_status())).inc()
        metrics.request_seconds.labels(method, path).observe(self.request.request_time())

    def authenticate(self) -> Access:
        """What the request's key may see and create.

        Raises:
            Unauthorized: the request has no key, or one that is not known.
            TooManyRequests: so have too many requests from its address.
        """
        key = key_of(self.request)
        known = self._store.find_key(key) if key else None
        if known is None:
            raise refusal(self.request, self.application.settings["guesses"])
        return Access(self._sandboxes, self._store, known)

    def query(self, kind: Any) -> Any:
        """The query parameters as a type.

        Raises:
            InvalidRequest: they are not of the type.
        """
        # get_query_argument is of no use, because it strips values and turns control characters into blanks.
        try:
            given = {name: values[-1].decode() for name, values in self.request.query_arguments.items()}
        except UnicodeDecodeError:
            raise InvalidRequest("the query is not UTF-8") from None
        try:
            return msgspec.convert(given, kind, strict=False)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"query: {error}") from None

    def set_error(self, error: Exception) -> bytes:
        """Set status and headers for an error, and return the body."""
        if not isinstance(error, CellvmError):
            log.error("%s %s failed", self.request.method, self.request.path, exc_info=error)
            error = CellvmError("the server failed; its log says why")
        status = self.status_of(error)
        self._sandboxes.metrics.errors.labels(error.code).inc()
        self.set_status(status)
        if status == HTTPStatus.UNAUTHORIZED:
            self.set_header("WWW-Authenticate", "Bearer")
        if error.retry_after is not None:
            self.set_header("Retry-After", str(error.retry_after))
        if isinstance(error, RateLimited):
            self.set_header("X-RateLimit-Limit", str(error.limit))
            self.set_header("X-RateLimit-Remaining", "0")
            self.set_header("X-RateLimit-Reset", str(error.retry_after))
        body = self.error_body(error, status)
        self.set_header("Content-Type", self.error_type)
        self.set_header("Content-Length", str(len(body)))
        return body

    error_type = "application/json"

    def status_of(self, error: CellvmError) -> int:
        return STATUS[error.code]

    def error_body(self, error: CellvmError, status: int) -> bytes:
        return msgspec.json.encode(ErrorBody(status, str(error), error.code, phrase(status), error.hint, error.outcome))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer an error that Tornado finds itself: a malformed path, an unknown method."""
        known = {400: "invalid_request", 405: "method_not_allowed"}
        reason = phrase(status_code)
        body = ErrorBody(status_code, reason, known.get(status_code, "internal"), reason)
        self.set_header("Content-Type", "application/json")
        self.finish(msgspec.json.encode(body))

    def set_default_headers(self) -> None:
        self.set_header("Server", "CellVM")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Frame-Options", "DENY")
        origin = self.request.headers.get("Origin", "")
        if origin in self.application.settings["origins"]:
            self.set_header("Access-Control-Allow-Origin", origin)
            # Some pages let the browser send cookies, and it then wants this word. No cookie is a key here.
            self.set_header("Access-Control-Allow-Credentials", "true")
            self.set_header("Access-Control-Expose-Headers", EXPOSED)
            self.set_header("Vary", "Origin")

    def compute_etag(self) -> None:
        return None

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, HTTPError):  # Tornado's refusals are the client's mistakes
            log.error("request failed", exc_info=(typ, value, tb))


@stream_request_body
class Endpoint(Handler):
    """All methods of one path."""

    def initialize(self, sandboxes: Sandboxes, store: Store, routes: dict[str, Route]) -> None:  # type: ignore[override]
        super().initialize(sandboxes, store)
        self._routes = routes
        self.key = NOBODY
        self._body = bytearray()
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        self._held = contextlib.ExitStack()
        self._body_holding = self.hold("bodies of requests")
        self._task: asyncio.Task[None] | None = None
        self._has_whole_body = False
        self._is_answered = False
        self._dropped = 0
        self._giving_up: asyncio.TimerHandle | None = None

    async def prepare(self) -> None:
        """Check everything in the head of the request, before any of the body is read."""
        self.application.settings["requests"].add(self)
        try:
            # Tornado sends the head alone of what answers a HEAD.
            route = self._routes.get("GET" if self.is_head else self.request.method or "")
            if route is None and self._is_preflight():
                return
            if route is None:
                self.set_header("Allow", self._offered)
                raise MethodNotAllowed(f"{self.request.path} offers {self._offered}")
            self._route = route
            mine = Access(self._sandboxes, self._store, NOBODY) if route.public else self.authenticate()
            self.key = mine.key
            if not route.public:
                self.application.settings["requests"].assign(self, mine.key)
            mine.key.scope.check_request(route.method, route.path)
            if mine.key.scope.mode and route.method != "GET":
                self._store.used(mine.key.id)
            self._body_holding = self.hold("bodies of requests")
            self.call = Call(
                self._sandboxes,
                mine,
                self.named(route),
                None if route.query is None else self.query(route.query),
                self,
            )
            if not route.upload:
                self._connection.set_body_timeout(JSON_BODY_TIMEOUT)
                if self._announced > self._body_limit:
                    raise self._too_large()
        except Exception as error:  # noqa: BLE001  `_fail` logs unknown errors
            await self._fail(error)
            return
        if route.upload:
            self._begin()

    def named(self, route: Route) -> dict[str, str]:
        """What the path names."""
        return dict(zip(route.names, map(str, self.path_args), strict=True))

    allowed_headers = ALLOWED

    def may_use(self, origin: str | None) -> bool:
        """Whether web pages of that origin may use the route."""
        return origin in self.application.settings["origins"]

    def _is_preflight(self) -> bool:
        """Whether this is a browser's preflight request for an allowed origin; it is answered here."""
        if self.request.method != "OPTIONS" or not self.may_use(self.request.headers.get("Origin")):
            return False
        self.set_header("Access-Control-Allow-Methods", self._offered)
        self.set_header("Access-Control-Allow-Headers", self.allowed_headers)
        self.set_header("Access-Control-Max-Age", "600")
        self.set_status(204)
        self.finish()
        return True

    @property
    def is_head(self) -> bool:
        """Whether the client wants the head of the answer alone."""
        return self.request.method == "HEAD"

    @property
    def _offered(self) -> str:
        """The methods of this path."""
        return ", ".join(sorted({*self._routes, *(["HEAD"] if "GET" in self._routes else [])}))

    @property
    def _announced(self) -> int:
        """The body's announced length. Tornado refuses one that is not a number."""
        length = self.request.headers.get("Content-Length", "0")
        return int(length) if re.fullmatch("[0-9]{1,18}", length) else 0

    @property
    def _body_limit(self) -> int:
        """Bytes of a body that is not an upload. A stranger's is not held for anybody, so it is small."""
        return JSON_LIMIT if self._route is None or not self._route.public else SMALL

    @property
    def _connection(self) -> HTTP1Connection:
        connection = self.request.connection
        assert isinstance(connection, HTTP1Connection)
        return connection

    def _too_large(self) -> TooLarge:
        return TooLarge(f"a JSON body may have at most {self._body_limit} bytes", hint="upload large content as a file")

    def hold(self, what: str, size: int = 0) -> Holding:
        """Hold bytes for the request's owner until the request has ended; `Account.hold` says more."""
        account, share = self._sandboxes.held.account(self.key.owner), self.key.scope.share
        return self._held.enter_context(account.hold(what, size, share=share))

    def _hold_body(self, size: int) -> None:
        self._body_holding.resize(max(size - SMALL, self._body_holding.size))

    async def data_received(self, chunk: bytes) -> None:
        if self._is_answered:
            # A refused body is read on, because many clients read the answer only when they have sent everything.
            self._dropped += len(chunk)
            if self._dropped > DROPPED_BODY:
                self._connection.stream.close()
            return
        try:
            if self._task is not None:
                self._hold_body(2 * len(chunk))  # one that is passed on, and the next
                await self._chunks.put(chunk)
            elif len(self._body) + len(chunk) > self._body_limit:
                raise self._too_large()
            else:
                self._hold_body(len(self._body) + len(chunk))
                self._body += chunk
        except CellvmError as error:
            self._body.clear()
            if self._task is not None:
                self._task.cancel()
            await self._fail(error)

    async def body_chunks(self) -> AsyncIterator[bytes]:
        """The body of an upload, as it arrives."""
        while (chunk := await self._chunks.get()) is not None:
            yield chunk

    def cut(self) -> None:
        """End the request by closing its connection."""
        self._connection.stream.close()

    def on_finish(self) -> None:
        self.application.settings["requests"].discard(self)
        if self._task is None:
            self._held.close()
        if self._giving_up is not None:
            self._giving_up.cancel()

    def on_connection_close(self) -> None:
        """The client hung up: cancel its operation."""
        super().on_connection_close()
        self.on_finish()
        if self._task is not None:
            self._task.cancel()

    async def _handle(self, *_: str) -> None:
        """Called by Tornado once the whole body has arrived."""
        self._has_whole_body = True
        if self._task is None and not self._is_answered:
            self._begin()
        elif self._task is not None and not self._task.done():
            await self._chunks.put(None)
        if self._task is not None:
            await self._task
        if self._is_answered:
            self.finish()

    get = post = put = patch = delete = head = options = _handle

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._run())
        # A callback, because a task that is cancelled before its first step never comes to a `finally`.
        self._task.add_done_callback(lambda _: self._held.close())

    async def _run(self) -> None:
        route = self._route
        assert route is not None
        arguments = [self.call]
        try:
            if route.body is not None:
                arguments.append(self._decoded(route.body))
            try:
                result = await route.operation(*arguments)
            except Asleep as paused:
                if self.key.scope.mode == "watch":
                    raise
                await self._sandboxes.pauses.wake(paused.sandbox)
                result = await route.operation(*arguments)
            if route.produces is None and not self._finished:
                if self.get_status() == 200:
                    self.set_status(route.status)
                if route.answer is not None:
                    self.set_header("Content-Type", "application/json")
                    self.write(msgspec.json.encode(result))
                else:
                    self.clear_header("Content-Type")
            if not self._finished:
                await self.finish()
        except (StreamClosedError, asyncio.CancelledError):
            pass  # the client has gone
        except Exception as error:  # noqa: BLE001
            await self._fail(error)

    @property
    def body(self) -> bytes:
        """The whole body, for an operation that decodes it itself."""
        return bytes(self._body)

    def _decoded(self, kind: Any) -> Any:
        """The body as its type. Its bytes are kept no longer."""
        data = bytes(self._body)
        self._body.clear()
        return decode(data, kind)

    async def _fail(self, error: Exception) -> None:
        """Answer with an error at once. The request is finished when its whole body has been read."""
        body = self.set_error(error)
        if self._headers_written:
            # It is too late for a status. The connection is closed, so that half an answer does not look whole.
            self._connection.stream.close()
            return
        self.clear_header("Content-Disposition")
        self._write_buffer.clear()
        self.write(body)
        self._is_answered = True
        while not self._chunks.empty():
            self._chunks.get_nowait()  # a `data_received` that waits to add a chunk goes on
        if not self._has_whole_body:  # the rest of the body is waited for only this long
            loop = asyncio.get_running_loop()
            self._giving_up = loop.call_later(JSON_BODY_TIMEOUT, self._connection.stream.close)
        with contextlib.suppress(StreamClosedError):  # the client has gone
            await self.flush()


class Missing(Endpoint):
    """Any request that no route answers: it gets this error."""

    def initialize(self, sandboxes: Sandboxes, store: Store, error: CellvmError) -> None:  # type: ignore[override]
        super().initialize(sandboxes, store, {})
        self._error = error

    async def prepare(self) -> None:
        self.application.settings["requests"].add(self)
        await self._fail(self._error)


def phrase(status: int) -> str:
    return HTTPStatus(status).phrase
