"""The code interpreter of E2B's clients: shapes over a sandbox's kernel.

A sandbox has one context, which is its kernel. The metadata of each cell ask the kernel to show results as E2B does
(`guest_agent/results.py`).
"""

import json
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import Struct

from kernel_gateway.api.base import Call, Route
from kernel_gateway.api.e2b.plane import GONE, Plane
from kernel_gateway.api.e2b.rpc import keeping_alive
from kernel_gateway.api.rest import check_env, check_text, one_line
from kernel_gateway.errors import CellvmError, InvalidRequest, NotFound, Unavailable
from kernel_gateway.kernel.events import StreamEvent, values
from kernel_gateway.kernel.kernel import Kernel
from kernel_gateway.kernel.shape import TABLE

KEEPALIVE = 5.0
"""Seconds of silence after which a stream says that it lives."""
COLORS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
FIELDS = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
    "e2b/data": "data",
    "e2b/chart": "chart",
}
"""Fields of a result, by the types of a MIME bundle."""
CELLS = {"python": "{code}", "bash": "%%bash\n{code}"}
"""How a cell of each language is run in the one kernel that there is."""
ALIASES = {"python3": "python", "sh": "bash"}


class Run(Struct):
    """Code to run. `env_vars` hold while it runs."""

    code: str
    context_id: str | None = None
    language: str | None = None
    env_vars: dict[str, str] | None = None


class NewContext(Struct):
    language: str | None = None
    cwd: str | None = None


class Context(Struct):
    id: str
    language: str
    cwd: str


class Interpreter(Plane):
    """A path of the code interpreter. Its errors are plain text."""

    error_type = "text/plain; charset=utf-8"

    def error_body(self, error: CellvmError, status: int) -> bytes:
        return super().error_body(error, status) if isinstance(error, GONE) else str(error).encode()


def ascii_line(message: Any) -> bytes:
    """A line of JSON in ASCII, because clients decode each piece that the network gives them by itself."""
    text = one_line(msgspec.json.encode(message)).decode()
    return re.sub(r"[^\x00-\x7f]+", lambda found: json.dumps(found[0])[1:-1], text).encode() + b"\n"


def result(event: StreamEvent) -> dict[str, Any]:
    """A rich output as a message."""
    told: dict[str, Any] = {"type": "result", "is_main_result": event.type == "result", "extra": {}}
    for kind, value in values(event.data).items():
        if bytes(value) == b"null" or kind == TABLE:  # E2B has `data` for tables
            continue
        if kind == "text/plain":
            told["text"] = unquoted(msgspec.json.decode(value))
        elif kind in FIELDS:
            told[FIELDS[kind]] = value
        else:
            told["extra"][kind] = value
    return told


def unquoted(text: Any) -> Any:
    """A text without the quotes that Python writes round a string."""
    is_quoted = isinstance(text, str) and len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if is_quoted else text


def message(event: StreamEvent) -> dict[str, Any] | None:
    """An event of a cell as a message; None if E2B has none for it."""
    if event.late:
        return None
    match event.type:
        case "started":
            return {"type": "number_of_executions", "execution_count": event.executionCount or 0}
        case "stdout" | "stderr":
            return {"type": event.type, "text": event.text, "timestamp": time.time_ns()}
        case "result" | "display" | "update":
            return result(event)
        case "error" if event.error is not None:
            traceback = COLORS.sub("", "\n".join(event.error.traceback))
            return {"type": "error", "name": event.error.name, "value": event.error.value, "traceback": traceback}
        case "end":
            return {"type": "end_of_execution"}
    return None


async def lines(kernel: Kernel, code: str, env: dict[str, str]) -> AsyncGenerator[dict[str, Any], None]:
    """The messages of a cell while which the variables hold. Closing the iterator early interrupts the cell."""
    async with aclosing(kernel.execute(code, metadata={"e2b": env})) as events:
        async for event in events:
            if (told := message(event)) is not None:
                yield told


async def execute(call: Call, body: Run) -> None:
    """Run code in a context, and tell what it gives as it comes. A client that hangs up interrupts it."""
    if body.context_id is not None and body.language is not None:
        raise InvalidRequest("Only one of context_id or language can be provided")
    if body.context_id is not None:
        check_context(call, body.context_id)
    language = (body.language or "python").lower()
    language = ALIASES.get(language, language)
    if language not in CELLS:
        raise Unavailable(f"language {language[:100]!r} is not offered; this server runs {', '.join(CELLS)}")
    env = body.env_vars or {}
    check_env(env)
    check_text("code", body.code)
    code = CELLS[language].format(code=body.code)
    kernel = call.sandbox.guest.kernel
    http = call.http
    http.set_header("Content-Type", "application/x-ndjson")
    await http.flush()
    async with aclosing(keeping_alive(lines(kernel, code, env), KEEPALIVE, {"type": "keepalive"})) as told:
        try:
            async for each in told:
                http.write(ascii_line(each))
                await http.flush()
        except GONE:
            raise
        except CellvmError as error:
            http.write(
                ascii_line({"type": "error", "name": type(error).__name__, "value": str(error), "traceback": ""})
            )
            http.write(ascii_line({"type": "end_of_execution"}))
    await http.finish()


def context_of(call: Call) -> Context:
    return Context(call.sandbox.kernel_id, "python", call.sandbox.guest.home)


def check_context(call: Call, name: str) -> None:
    """Check that a context exists.

    Raises:
        NotFound: it does not.
    """
    if name not in (call.sandbox.kernel_id, "default"):
        raise NotFound(f"Context {name[:100]} not found")


async def list_contexts(call: Call) -> list[Context]:
    """The one context that there is."""
    return [context_of(call)]


async def create_context(call: Call, body: NewContext) -> Context:
    """Not offered."""
    raise Unavailable("more contexts than the default one are not offered by this server")


async def restart_context(call: Call) -> None:
    """Replace the context's kernel by a fresh one."""
    check_context(call, call.path["context"])
    await call.sandbox.guest.kernel.restart()


async def delete_context(call: Call) -> None:
    """Not offered for the default context."""
    check_context(call, call.path["context"])
    raise Unavailable("the default context can't be removed on this server; restart it")


async def health(call: Call) -> str:
    """Whether the sandbox runs. No token is needed."""
    assert isinstance(call.http, Plane)
    _ = call.http.running().guest
    return "OK"


ROUTES = [
    Route("GET", "/health", health, answer=str, public=True),
    Route("POST", "/execute", execute, body=Run, produces="application/x-ndjson"),
    Route("GET", "/contexts", list_contexts, answer=list[Context]),
    Route("POST", "/contexts", create_context, body=NewContext, answer=Context),
    Route("POST", "/contexts/{context}/restart", restart_context, answer=dict),
    Route("DELETE", "/contexts/{context}", delete_context, answer=dict),
]
