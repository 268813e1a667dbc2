"""The Model Context Protocol over HTTP: `POST /mcp` for every message, `DELETE /mcp` for the end of a legacy session.

What a message is stands in `mcp/protocol`, which sandbox it means in `mcp/scopes`, what its tool does in `mcp/tools`.
"""

import asyncio
import secrets
import time
from collections import OrderedDict
from typing import Annotated, Any
from urllib.parse import urlsplit

from msgspec import Meta, Struct

from kernel_gateway.api.base import Call, Endpoint
from kernel_gateway.errors import CellvmError, Forbidden, NotFound
from kernel_gateway.mcp import protocol, tools
from kernel_gateway.mcp.protocol import CANCELLED, HOUR, INVALID_PARAMS, UNKNOWN_METHOD, Refused, Request
from kernel_gateway.mcp.scopes import Caller, Scopes

PROGRESS = 5.0
"""Seconds between notifications of progress."""
SESSIONS = 1000
"""Legacy sessions of one owner. Beyond it the oldest is forgotten."""


class McpQuery(Struct):
    """`scope` names a chat or a client process, whose calls share one sandbox."""

    scope: Annotated[str, Meta(pattern="^[A-Za-z0-9_.:-]{0,64}$")] = ""


class Mcp:
    """What the server remembers of MCP clients: scopes, legacy sessions by owner, and the calls of these that run."""

    def __init__(self, idle_timeout: int) -> None:
        self.scopes = Scopes(idle_timeout)
        self._sessions: dict[str, OrderedDict[str, None]] = {}
        self.running: dict[tuple[str, str, Any], asyncio.Task[Any]] = {}

    def open(self, owner: str) -> str:
        """A new session's id."""
        mine = self._sessions.setdefault(owner, OrderedDict())
        session = secrets.token_hex(16)
        mine[session] = None
        if len(mine) > SESSIONS:
            mine.popitem(last=False)
        return session

    def has(self, owner: str, session: str) -> bool:
        return session in self._sessions.get(owner, ())

    def close(self, owner: str, session: str) -> None:
        """Forget a session."""
        del self._sessions[owner][session]
        if not self._sessions[owner]:
            del self._sessions[owner]


class McpEndpoint(Endpoint):
    """The path of MCP. A web page that is not allowed is refused before its key is looked at."""

    async def prepare(self) -> None:
        origin = self.request.headers.get("Origin")
        is_ours = origin is not None and urlsplit(origin).netloc.lower() == self.request.host.lower()
        if origin is not None and not is_ours and not self.may_use(origin):
            self.application.settings["requests"].add(self)
            await self._fail(Forbidden("web pages of this origin may not use the server"))
            return
        await super().prepare()


def session_of(call: Call) -> str:
    """The legacy session that a request names; empty if it names none.

    Raises:
        NotFound: there is none of that id.
    """
    session = call.http.request.headers.get("Mcp-Session-Id", "")
    mcp: Mcp = call.http.application.settings["mcp"]
    if session and not mcp.has(call.owner, session):
        raise NotFound("there is no such session", hint="send `initialize`")
    return session


async def delete_session(call: Call) -> None:
    """End a session of the legacy era, and its sandboxes."""
    mcp: Mcp = call.http.application.settings["mcp"]
    session = session_of(call)
    if not session:
        raise NotFound("the header Mcp-Session-Id names no session")
    mcp.close(call.owner, session)
    for sandbox in Caller(call.sandboxes, call.mine, mcp.scopes, session).of_scope():
        await call.sandboxes.kill(sandbox)


async def serve(call: Call) -> None:
    """A message of an MCP client, of the revision 2026-07-28 or of one of those since 2025-03-26.

    A client that hangs up interrupts the cell that its call runs. Another call tells what it gave.
    """
    mcp: Mcp = call.http.application.settings["mcp"]
    http = call.http
    try:
        request = protocol.parse(http.body, http.request.headers)
        session = "" if request.is_modern else session_of(call)
        if request.id is None:
            cancelled = mcp.running.get((call.owner, session, request.params.get("requestId")))
            if request.method == "notifications/cancelled" and session and cancelled is not None:
                cancelled.cancel()
            http.set_status(202)
            await http.finish()
            return
        caller = Caller(call.sandboxes, call.mine, mcp.scopes, call.query.scope or session)
        if request.method == "initialize" and not request.is_modern:
            http.set_header("Mcp-Session-Id", mcp.open(call.owner))
        await Conversation(mcp, call, caller, request, session).answer()
    except Refused as refused:
        http.set_status(refused.status)
        http.set_header("Content-Type", "application/json")
        await http.finish(refused.encoded())


class Conversation:
    """One request and its answer. With a progress token the answer is a stream, which also tells that it goes on."""

    def __init__(self, mcp: Mcp, call: Call, caller: Caller, request: Request, session: str) -> None:
        self._mcp = mcp
        self._call = call
        self._caller = caller
        self._request = request
        self._key = (call.owner, session, request.id)
        self._line = ""
        accept = call.http.request.headers.get("Accept", "")
        self._is_stream = request.progress_token is not None and "text/event-stream" in accept

    async def answer(self) -> None:
        """Answer the request. A client that hangs up cancels the work.

        Raises:
            Refused: it can't be answered.
        """
        http, began = self._call.http, time.monotonic()
        work = asyncio.create_task(self._work())
        self._mcp.running[self._key] = work
        try:
            while not (await asyncio.wait({work}, timeout=PROGRESS if self._is_stream else None))[0]:
                seconds = round(time.monotonic() - began, 1)
                await self._send(self._request.progress(seconds, self._line))
        finally:
            work.cancel()
            if self._mcp.running.get(self._key) is work:
                del self._mcp.running[self._key]
            await asyncio.wait({work})
        if work.cancelled():
            raise self._request.refused(CANCELLED, "the request was cancelled")
        message = work.result()
        if self._is_stream:
            await self._send(message)
            await http.finish()
        else:
            http.set_header("Content-Type", "application/json")
            await http.finish(message)

    async def _send(self, message: bytes) -> None:
        http = self._call.http
        if not http._headers_written:
            http.set_header("Content-Type", "text/event-stream")
            http.set_header("X-Accel-Buffering", "no")
        http.write(b"event: message\ndata: " + message + b"\n\n")
        await http.flush()

    async def _work(self) -> bytes:
        request, params = self._request, self._request.params
        match request.method:
            case "initialize" if not request.is_modern:
                return request.answer(protocol.initialized(request))
            case "ping" if not request.is_modern:
                return request.answer({})
            case "server/discover" if request.is_modern:
                return request.answer(protocol.discovered(), ttl=HOUR, scope="public")
            case "tools/list":
                return request.answer({"tools": tools.described()}, ttl=HOUR, scope="public")
            case "tools/call":
                return await self._use_tool(params)
            case "resources/list":
                return request.answer({"resources": []}, ttl=0)
            case "resources/templates/list":
                return request.answer({"resourceTemplates": tools.TEMPLATES}, ttl=HOUR, scope="public")
            case "resources/read":
                return await self._read_resource(params.get("uri"))
        raise request.refused(UNKNOWN_METHOD, f"there is no method {request.method!r:.100}")

    async def _use_tool(self, params: dict[str, Any]) -> bytes:
        name = params.get("name")
        if not isinstance(name, str) or name not in tools.TOOLS:
            raise self._request.refused(INVALID_PARAMS, f"there is no tool {name!r:.100}")
        used = tools.Call(self._caller, self._call.http.hold, self._tell)
        result = await tools.use(used, name, params.get("arguments") or {})
        return self._request.answer(result.encoded())

    def _tell(self, text: str) -> None:
        self._line = text.strip().rpartition("\n")[2] or self._line

    async def _read_resource(self, uri: Any) -> bytes:
        if not isinstance(uri, str):
            raise self._request.refused(INVALID_PARAMS, "`uri` is a string")
        try:
            found = await tools.read_resource(self._caller, uri, self._call.http.hold)
        except CellvmError as error:
            message = f"{error}" + (f" ({error.hint})" if error.hint else "")
            raise self._request.refused(INVALID_PARAMS, message, {"uri": uri}) from None
        return self._request.answer({"contents": [found]}, ttl=0)
