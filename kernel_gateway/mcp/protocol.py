"""The Model Context Protocol, in both of its eras. Pure: bytes and headers in, requests out, and answers as bytes.

The modern era (2026-07-28) has no sessions: each request tells its version and its client's capabilities, and headers
repeat what proxies need. The legacy era begins with `initialize`.

Sources: https://modelcontextprotocol.io/specification/2026-07-28 and https://modelcontextprotocol.io/specification/2025-11-25
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from kernel_gateway import __version__

MODERN = ("2026-07-28",)
LEGACY = ("2025-11-25", "2025-06-18", "2025-03-26")
META = "io.modelcontextprotocol/"
PARSE_ERROR, INVALID_REQUEST, UNKNOWN_METHOD, INVALID_PARAMS = -32700, -32600, -32601, -32602
HEADER_MISMATCH, UNKNOWN_VERSION, CANCELLED = -32020, -32022, -32800
NAMED = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
"""Methods whose requests have a header `Mcp-Name`, and the parameter that it repeats."""
HOUR = 3_600_000
"""Milliseconds for which clients may keep what never changes."""

SERVER_INFO = {"name": "cellvm", "title": "CellVM", "version": __version__}
CAPABILITIES: dict[str, Any] = {"tools": {}, "resources": {}}
INSTRUCTIONS = (
    "Runs Python (a live IPython kernel: variables stay) and bash in a sandbox. Give the handle in an answer's first "
    "line as `sandbox` to go on in the same sandbox. Long output is shortened, and all of it is in a file there."
)


class Error(msgspec.Struct, omit_defaults=True):
    """Why a request was not answered."""

    code: int
    message: str
    data: Any = None


class Failure(msgspec.Struct):
    """The message that tells an error. `id` is the request's, null if it could not be read."""

    id: str | int | None
    error: Error
    jsonrpc: str = "2.0"


class Refused(Exception):
    """A message that is answered with an error, and the HTTP status of the answer."""

    def __init__(self, code: int, message: str, *, request: Any = None, status: int = 400, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.request = request
        self.status = status
        self.data = data

    def encoded(self) -> bytes:
        """The error as a message."""
        return msgspec.json.encode(Failure(self.request, Error(self.code, str(self), self.data)))


class Request(NamedTuple):
    """A request, or a notification if `id` is None."""

    id: str | int | None
    method: str
    params: dict[str, Any]
    is_modern: bool

    @property
    def progress_token(self) -> str | int | None:
        """What the client wants to see in notifications of progress."""
        token = meta_of(self.params).get("progressToken")
        return token if isinstance(token, (str, int)) else None

    def refused(self, code: int, message: str, data: Any = None) -> Refused:
        """The error for a request that was understood."""
        status = 404 if self.is_modern and code == UNKNOWN_METHOD else 200
        return Refused(code, message, request=self.id, status=status, data=data)

    def answer(self, result: dict[str, Any], *, ttl: int | None = None, scope: str = "private") -> bytes:
        """The answer with a result.

        Args:
            ttl: milliseconds for which the client may keep it, if it may be kept at all.
            scope: "public" if it is the same for all clients.
        """
        if self.is_modern:
            result = {"resultType": "complete", **result}
            if ttl is not None:
                result |= {"ttlMs": ttl, "cacheScope": scope}
        return msgspec.json.encode({"jsonrpc": "2.0", "id": self.id, "result": result})

    def progress(self, seconds: float, message: str) -> bytes:
        """A notification that the request goes on."""
        params = {"progressToken": self.progress_token, "progress": seconds, "message": message}
        return msgspec.json.encode({"jsonrpc": "2.0", "method": "notifications/progress", "params": params})


def meta_of(params: dict[str, Any]) -> dict[str, Any]:
    meta = params.get("_meta")
    return meta if isinstance(meta, dict) else {}


def parse(body: bytes, headers: Mapping[str, str]) -> Request:
    """The message in a body.

    Args:
        headers: the HTTP request's. Their names are in any case.

    Raises:
        Refused: it is none, or its headers contradict it.
    """
    try:
        message = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(PARSE_ERROR, f"the body is not JSON: {error}") from None
    if isinstance(message, list):
        raise Refused(INVALID_REQUEST, "batches are not offered")
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0" or not isinstance(message.get("method"), str):
        raise Refused(INVALID_REQUEST, "this is no JSON-RPC 2.0 request")
    number, method, params = message.get("id"), message["method"], message.get("params", {})
    if "id" in message and (not isinstance(number, (str, int)) or isinstance(number, bool)):
        raise Refused(INVALID_REQUEST, "`id` is a string or a whole number")
    if not isinstance(params, dict):
        raise Refused(INVALID_PARAMS, "`params` is an object", request=number)
    told = headers.get("MCP-Protocol-Version", "").strip()
    is_modern = META + "protocolVersion" in meta_of(params) or told >= "2026"
    request = Request(number, method, params, is_modern)
    if number is None:
        return request
    if is_modern:
        check_modern(request, headers, told)
    elif told and told not in LEGACY:
        raise Refused(
            UNKNOWN_VERSION, f"the version {told:.50} is not offered", request=number, data={"supported": [*LEGACY]}
        )
    return request


def check_modern(request: Request, headers: Mapping[str, str], told: str) -> None:
    """Check that a request of the modern era has what it must have, and that its headers say the same.

    Raises:
        Refused: something is missing or differs.
    """
    meta = meta_of(request.params)
    version = meta.get(META + "protocolVersion")
    if not isinstance(version, str) or not isinstance(meta.get(META + "clientCapabilities"), dict):
        raise Refused(
            INVALID_PARAMS,
            f"`_meta` must have {META}protocolVersion and {META}clientCapabilities",
            request=request.id,
        )
    pairs: list[tuple[str, str | None, Any]] = [
        ("MCP-Protocol-Version", told, version),
        ("Mcp-Method", headers.get("Mcp-Method"), request.method),
    ]
    if request.method in NAMED:
        pairs.append(("Mcp-Name", headers.get("Mcp-Name"), request.params.get(NAMED[request.method])))
    for name, header, value in pairs:
        if header is None or decoded(header) != value:
            raise Refused(HEADER_MISMATCH, f"the header {name} does not say what the body says", request=request.id)
    if version not in MODERN:
        data = {"supported": [*MODERN, *LEGACY], "requested": version}
        raise Refused(UNKNOWN_VERSION, f"the version {version:.50} is not offered", request=request.id, data=data)


def decoded(header: str) -> str:
    """A header's value. What can't be in a header is in base64 between `=?base64?` and `?=`."""
    header = header.strip()
    if header.startswith("=?base64?") and header.endswith("?="):
        try:
            return base64.b64decode(header[9:-2], validate=True).decode()
        except (binascii.Error, ValueError):
            pass  # then it says itself, which is not what the body says
    return header


def headers_of(body: bytes) -> dict[str, str]:
    """The headers that a message of the modern era is sent with; none for other messages."""
    try:
        message = msgspec.json.decode(body)
        params = message.get("params", {})
        version = meta_of(params).get(META + "protocolVersion")
    except (msgspec.MsgspecError, AttributeError, RecursionError):
        return {}
    if not isinstance(version, str):
        return {}
    found = {"MCP-Protocol-Version": version, "Mcp-Method": str(message.get("method"))}
    if (name := params.get(NAMED.get(found["Mcp-Method"], ""))) is not None:
        found["Mcp-Name"] = f"=?base64?{base64.b64encode(str(name).encode()).decode()}?="
    return found


def initialized(request: Request) -> dict[str, Any]:
    """What `initialize` is answered with."""
    asked = request.params.get("protocolVersion")
    version = asked if asked in LEGACY else LEGACY[0]
    told = {"capabilities": CAPABILITIES, "serverInfo": SERVER_INFO, "instructions": INSTRUCTIONS}
    return {"protocolVersion": version, **told}


def discovered() -> dict[str, Any]:
    """What `server/discover` is answered with."""
    told = {"capabilities": CAPABILITIES, "instructions": INSTRUCTIONS}
    return {"supportedVersions": [*MODERN, *LEGACY], **told, "_meta": {META + "serverInfo": SERVER_INFO}}
