"""HTTP without the domain: a table of routes, typed bodies, one error table, one place that authenticates.

A route is data: method, path, an async function, and the types of what goes in and out. The same table answers requests
and makes the OpenAPI document, so the two can't differ.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec
from tornado.http1connection import HTTP1Connection
from tornado.iostream import StreamClosedError
from tornado.web import RequestHandler, stream_request_body

from kernel_gateway.errors import CellvmError, InvalidRequest, NotFound, TooLarge, Unauthorized
from kernel_gateway.sandbox import Sandbox
from kernel_gateway.sandboxes import Sandboxes
from kernel_gateway.store import Store

log = logging.getLogger(__name__)

JSON_LIMIT = 4 * 1024 * 1024
"""Largest JSON body in bytes."""
DROPPED_UPLOAD = 16 * 1024 * 1024
"""Bytes of a refused upload that are read before the connection is closed."""
JSON_BODY_TIMEOUT = 60.0
"""Seconds a client may take to send a JSON body."""

STATUS: dict[str, int] = {
    "invalid_request": 400,
    "too_large": 413,
    "unauthorized": 401,
    "not_found": 404,
    "conflict": 409,
    "not_implemented": 501,
    "host_full": 503,
    "draining": 503,
    "sandbox_died": 502,
    "guest_unresponsive": 502,
    "method_not_allowed": 405,
    "range_not_satisfiable": 416,
    "internal": 500,
    # what the agent refuses with
    "is_directory": 400,
    "not_directory": 400,
    "not_regular": 400,
    "exists": 409,
    "permission_denied": 403,
    "no_space": 507,
    "invalid": 400,
    "cannot_run": 502,
    "kernel_unavailable": 502,
    "failed": 502,
}
"""Every error code and its HTTP status; `docs/errors.md` explains them."""
OUTCOME_UNKNOWN = frozenset({"sandbox_died", "guest_unresponsive"})


class ErrorBody(msgspec.Struct, omit_defaults=True):
    """What every error answers. `code` is the HTTP status, `error` the stable word of docs/errors.md.

    `outcome` is "unknown" when the request may have had an effect before it failed.
    """

    code: int
    message: str
    error: str
    hint: str | None = None
    outcome: str | None = None


class MethodNotAllowed(CellvmError):
    code = "method_not_allowed"


class RangeNotSatisfiable(CellvmError):
    code = "range_not_satisfiable"


@dataclass(slots=True)
class Call:
    """One authenticated request, as operations see it. `answer` is the way out for those that stream."""

    sandboxes: Sandboxes
    store: Store
    owner: str
    path: dict[str, str]
    query: Any
    http: "Endpoint"

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox that the path names, if it is this owner's."""
        return self.sandboxes.get(self.owner, self.path["id"])


Operation = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    `operation` gets the Call, and the decoded body when `body` is a type; what it returns is sent as JSON with
    `status`, or nothing when it answered by itself (`produces` then names the content type). `upload` operations get
    the raw body as they read it from `call.http`.
    """

    method: str
    path: str
    operation: Operation
    body: Any = None
    query: Any = None
    answer: Any = None
    status: int = 200
    produces: str | None = None
    upload: bool = False
    public: bool = False
    errors: tuple[int, ...] = field(default=())

    @property
    def pattern(self) -> str:
        return re.sub(r"\{\w+\}", "([^/]+)", self.path) + "/?"

    @property
    def names(self) -> list[str]:
        return re.findall(r"\{(\w+)\}", self.path)


def key_of(headers: Any) -> str | None:
    """The key that a request carries, if any: `Authorization: Bearer …` or `X-API-Key: …`."""
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    if scheme.lower() in ("bearer", "token") and key.strip():
        return str(key.strip())
    found = headers.get("X-API-Key")
    return str(found) if found else None


def decode(data: bytes, kind: Any) -> Any:
    """A JSON body as its type; an empty one reads as `{}`.

    Raises:
        InvalidRequest: it is not JSON, or not of the type; says where.
    """
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


@stream_request_body
class Endpoint(RequestHandler):
    """All methods of one path."""

    def initialize(self, routes: dict[str, Route], sandboxes: Sandboxes, store: Store) -> None:
        self._routes = routes
        self._sandboxes = sandboxes
        self._store = store
        self._body = bytearray()
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=4)
        self._task: asyncio.Task[None] | None = None
        self._refused: Exception | None = None
        self._has_whole_body = False

    async def prepare(self) -> None:
        """Settle everything that the head of the request decides, before any of the body is read."""
        self.application.settings["requests"].add(self)
        try:
            route = self._routes.get(self.request.method or "")
            if route is None:
                self.set_header("Allow", ", ".join(sorted(self._routes)))
                raise MethodNotAllowed(f"{self.request.path} offers {', '.join(sorted(self._routes))}")
            self._route = route
            names = [str(argument) for argument in self.path_args]
            owner = "" if route.public else self._authenticate()
            self.call = Call(
                self._sandboxes,
                self._store,
                owner,
                dict(zip(route.names, names, strict=True)),
                self._query(route),
                self,
            )
            if not route.upload:
                self._connection.set_body_timeout(JSON_BODY_TIMEOUT)
                if self._announced > JSON_LIMIT:
                    raise self._too_large()
        except Exception as error:  # noqa: BLE001  `_fail` logs what it does not know
            self._refuse(error)
            return
        if route.upload:
            self._task = asyncio.create_task(self._run())

    def _refuse(self, error: Exception) -> None:
        """Answer with an error: once the body has been read if it is small, so that the connection can be kept."""
        if self._announced > JSON_LIMIT:
            self.set_header("Connection", "close")
            self._fail(error)
        else:
            self._refused = error

    @property
    def _announced(self) -> int:
        """How long the body says it is; Tornado refuses what is not a number."""
        length = self.request.headers.get("Content-Length", "0")
        return int(length) if re.fullmatch("[0-9]{1,18}", length) else 0

    @property
    def _connection(self) -> HTTP1Connection:
        connection = self.request.connection
        assert isinstance(connection, HTTP1Connection)
        return connection

    def _authenticate(self) -> str:
        key = key_of(self.request.headers)
        owner = self._store.owner_of(key) if key else None
        if owner is None:
            self.set_header("WWW-Authenticate", "Bearer")
            raise Unauthorized(
                "the key is not known" if key else "a key is required",
                hint="send `Authorization: Bearer <key>`; `cellvm keys` makes one",
            )
        return owner

    def _query(self, route: Route) -> Any:
        if route.query is None:
            return None
        # Not by get_query_argument: it strips, and turns control characters into blanks.
        try:
            given = {name: values[-1].decode() for name, values in self.request.query_arguments.items()}
        except UnicodeDecodeError:
            raise InvalidRequest("the query is not UTF-8") from None
        try:
            return msgspec.convert(given, route.query, strict=False)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"query: {error}") from None

    def _too_large(self) -> TooLarge:
        return TooLarge(f"a JSON body may have at most {JSON_LIMIT} bytes", hint="upload large content as a file")

    async def data_received(self, chunk: bytes) -> None:
        if self._finished:
            return  # refused already: what still comes is read and dropped
        if self._task is not None:
            await self._chunks.put(chunk)
        elif len(self._body) + len(chunk) > JSON_LIMIT:
            self._body.clear()
            self.set_header("Connection", "close")
            self._fail(self._refused or self._too_large())
        else:
            self._body += chunk

    async def body_chunks(self) -> AsyncIterator[bytes]:
        """The body of an upload, as it arrives."""
        while not self._has_whole_body:
            chunk = await self._chunks.get()
            if chunk is None:
                self._has_whole_body = True
            else:
                yield chunk

    def on_finish(self) -> None:
        self.application.settings["requests"].discard(self)

    def on_connection_close(self) -> None:
        """The client hung up: stop what it asked for."""
        self.application.settings["requests"].discard(self)
        if self._task is not None:
            self._task.cancel()

    async def _handle(self, *_: str) -> None:
        """Called by Tornado once the whole body has arrived."""
        if self._finished:
            return
        if self._refused is not None:
            self._fail(self._refused)
            return
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        else:
            await self._chunks.put(None)
        await self._task

    get = post = put = patch = delete = head = options = _handle

    async def _run(self) -> None:
        route = self._route
        try:
            if route.body is not None:
                result = await route.operation(self.call, decode(bytes(self._body), route.body))
            else:
                result = await route.operation(self.call)
            if route.produces is None:
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
            pass  # the client has gone: nobody is left to tell
        except Exception as error:  # noqa: BLE001
            if route.upload:
                await self._drop_upload()
            self._fail(error)

    async def _drop_upload(self) -> None:
        """Read on in a refused upload, so that a client which sends everything first gets to read the answer."""
        dropped = 0
        async for chunk in self.body_chunks():
            dropped += len(chunk)
            if dropped > DROPPED_UPLOAD:
                self.set_header("Connection", "close")
                return

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, CellvmError):
            log.error("%s %s failed", self.request.method, self.request.path, exc_info=error)
            error = CellvmError("the server failed; its log says why")
        if self._headers_written:
            # Too late for a status: cut the answer off, so that nobody takes it for whole.
            self._connection.stream.close()
            return
        status = STATUS[error.code]
        self.set_status(status)
        if error.retry_after is not None:
            self.set_header("Retry-After", str(error.retry_after))
        self.set_header("Content-Type", "application/json")
        self.clear_header("Content-Length")
        self.clear_header("Content-Disposition")
        body = ErrorBody(
            status, str(error), error.code, error.hint, "unknown" if error.code in OUTCOME_UNKNOWN else None
        )
        self.finish(msgspec.json.encode(body))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Errors that Tornado finds itself: a malformed path, a method it does not know."""
        known = {400: "invalid_request", 405: "method_not_allowed"}
        body = ErrorBody(status_code, reason(status_code), known.get(status_code, "internal"))
        self.set_header("Content-Type", "application/json")
        self.finish(msgspec.json.encode(body))

    def set_default_headers(self) -> None:
        self.set_header("Server", "CellVM")
        self.set_header("X-Content-Type-Options", "nosniff")

    def compute_etag(self) -> None:
        return None

    def log_exception(self, *args: Any) -> None:
        log.error("request failed", exc_info=args)


class Missing(Endpoint):
    """Any path that no route has."""

    async def prepare(self) -> None:
        self.application.settings["requests"].add(self)
        self._refuse(NotFound("there is no such path", hint="GET /openapi.json lists what there is"))


def reason(status: int) -> str:
    return HTTPStatus(status).phrase
