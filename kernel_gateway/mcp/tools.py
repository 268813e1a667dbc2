"""The tools that a model gets: code, commands and files of a sandbox, and the sandbox itself.

The table is short, because every model pays for its text with each request.
"""

import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import quote, unquote

import msgspec
from msgspec import Meta, Struct

from kernel_gateway.errors import CellvmError, InvalidRequest, NotFound
from kernel_gateway.guest.answers import Answer, answer, images_as_files, told
from kernel_gateway.guest.files import Files
from kernel_gateway.held import Holding
from kernel_gateway.kernel.changes import Changes
from kernel_gateway.kernel.events import CellError, StreamEvent
from kernel_gateway.kernel.executions import RUNNING, Execution
from kernel_gateway.kernel.journal import Gap
from kernel_gateway.kernel.shape import IMAGE_LIMIT, Shaper, size_text
from kernel_gateway.mcp.scopes import Caller
from kernel_gateway.network.policy import Policy
from kernel_gateway.sandbox.machines import DEFAULT_POLICY
from kernel_gateway.sandbox.sandbox import Sandbox

READ_LIMIT = 64 * 1024 * 1024
"""Bytes of a file that are read to find lines in it."""
TEXT_LIMIT = 100_000
"""Characters of a file that one answer has."""
RESOURCE_TEXT, RESOURCE_BLOB = 256 * 1024, 1024 * 1024
"""Bytes of a resource that is given as text, and as something else."""

Name = Annotated[str, Meta(max_length=64, description="Handle; default: this chat's")]
Limit = Annotated[int, Meta(ge=0, le=100_000, description="Characters of the answer; 0: no images")]
Wait = Annotated[float, Meta(ge=0.1, le=50, description="Seconds until an answer comes though the cell goes on")]
Timeout = Annotated[float, Meta(gt=0, le=3600)]
LEAST = 500
"""Characters that an answer may always have."""


class RunCode(Struct, forbid_unknown_fields=True):
    """Run Python in the live IPython kernel (variables stay; %magic, !command, await). Shows text, tables, figures."""

    code: str
    sandbox: Name | None = None
    timeout: Timeout = 600.0
    wait: Wait = 45.0
    max_output: Limit = 8000


class AskExecution(Struct, forbid_unknown_fields=True):
    """What is new of a cell that still runs or whose answer was lost. Nothing runs again."""

    sandbox: Name | None = None
    id: Annotated[str, Meta(max_length=128, description="Default: the last cell")] | None = None
    wait: Wait = 45.0
    stop: Annotated[bool, Meta(description="Interrupt it")] = False


class RunCommand(Struct, forbid_unknown_fields=True):
    """Run a bash command, 50 s at most. For longer ones: !command in run_code."""

    command: Annotated[str, Meta(min_length=1, max_length=100_000)]
    sandbox: Name | None = None
    cwd: str = "~"
    timeout: Annotated[float, Meta(gt=0, le=50)] = 45.0
    max_output: Limit = 8000


class ReadFile(Struct, forbid_unknown_fields=True):
    """Read lines of a text file, or see an image."""

    path: Annotated[str, Meta(min_length=1)]
    sandbox: Name | None = None
    offset: Annotated[int, Meta(ge=0, description="Lines to skip")] = 0
    limit: Annotated[int, Meta(ge=1, le=100_000, description="Lines")] = 500


class WriteFile(Struct, forbid_unknown_fields=True):
    """Write a text file. Its folder is made."""

    path: Annotated[str, Meta(min_length=1)]
    content: str
    sandbox: Name | None = None


class ManageSandbox(Struct, forbid_unknown_fields=True):
    """Create, list, delete sandboxes or extend their life. Not needed to run code."""

    action: Literal["create", "list", "delete", "extend"]
    sandbox: Name | None = None
    template: str | None = None
    internet: bool = True
    minutes: Annotated[int, Meta(ge=1, le=60)] = 30


class Result(NamedTuple):
    """A tool's answer. `meta` is for programs. Models do not see it."""

    content: list[dict[str, Any]]
    is_error: bool = False
    meta: dict[str, Any] | None = None

    def encoded(self) -> dict[str, Any]:
        told = {"content": self.content, "isError": self.is_error}
        return told if self.meta is None else {**told, "_meta": {"cellvm/execution": self.meta}}


def text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def failure(message: str) -> Result:
    """An answer that lets the model correct itself."""
    return Result([text_block(message)], is_error=True)


class Call(NamedTuple):
    """One call of a tool. `hold` counts bytes until its answer is sent, `tell` takes the last line of output."""

    caller: Caller
    hold: Callable[[str, int], Holding]
    tell: Callable[[str], None]


# -- cells


async def run_code(call: Call, asked: RunCode) -> Result:
    sandbox, notes = await call.caller.sandbox_of(asked.sandbox)
    check_unicode(asked.code)
    execution = sandbox.guest.kernel.run(asked.code, timeout=asked.timeout)
    return await follow(call, sandbox, execution, notes, asked.wait, asked.max_output)


async def ask_execution(call: Call, asked: AskExecution) -> Result:
    sandbox, notes = await call.caller.sandbox_of(asked.sandbox)
    executions = sandbox.guest.kernel.executions
    execution = executions.last if asked.id is None else executions.get(asked.id)
    if execution is None:
        return failure("no such cell was run in this sandbox; it is safe to run it")
    if asked.stop:
        sandbox.guest.kernel.stop(execution)
    if execution.is_told(execution.told):
        execution.told = 0  # its answer was lost, or the model wants it again
    return await follow(call, sandbox, execution, notes, asked.wait, 8000, is_attended=False)


async def follow(
    call: Call,
    sandbox: Sandbox,
    execution: Execution,
    notes: list[str],
    wait: float,
    limit: int,
    *,
    is_attended: bool = True,
) -> Result:
    """What a cell gives within `wait` seconds. One that is attended is interrupted when the client hangs up."""
    guest, since = sandbox.guest, execution.told
    call.hold("answers of cells", 2 * max(limit, LEAST))
    shaper, errors, changes = Shaper(max(limit, LEAST)), list[CellError](), list[Changes]()

    def take(event: StreamEvent) -> None:
        if event.type == "error" and event.error is not None and not event.late:
            errors.append(event.error)
        if event.text and event.type in ("stdout", "stderr"):
            call.tell(event.text[-200:])
        if event.changes is not None:
            changes.append(event.changes)

    try:
        async with aclosing(guest.kernel.events(execution, since)) as events:
            last = await told(events, wait, shaper.add, take)
    except BaseException:
        if is_attended:
            guest.kernel.stop(execution)
        raise
    made = await answer(guest, execution, shaper)
    execution.told = max(since, last)
    status = execution.state if execution.is_told(execution.told) else RUNNING
    seconds = time.monotonic() - execution.clock
    handle = call.caller.handle_of(sandbox)
    cell = "cell" if execution.count is None else f"cell {execution.count}"
    head = f"[{handle} {cell}, {seconds:.1f} s]"
    if status == RUNNING:
        go_on = f'go on with execution(sandbox="{handle}")'
        head = f"[{handle} {cell} still running after {seconds:.0f} s; {go_on}]"
    content = [text_block("\n".join(filter(None, [*notes, head, made.text])))]
    content += await images(call, sandbox, execution, since, made, shaper) if limit else []
    error = errors[-1] if errors else None
    meta = {
        "sandbox": sandbox.id,
        "id": execution.id,
        "status": status,
        "executionCount": execution.count,
        "seconds": round(seconds, 3),
        "error": error and {"name": error.name, "value": error.value[:500], "code": error.code},
        "outputFile": made.output_file,
        "changes": msgspec.to_builtins(changes[0]) if changes else None,
    }
    return Result(content, error is not None or status not in (RUNNING, "finished"), meta)


async def images(
    call: Call, sandbox: Sandbox, execution: Execution, since: int, made: Answer, shaper: Shaper
) -> list[dict[str, Any]]:
    """Blocks of the images that are small enough, and links to the others."""
    call.hold("answers of cells", 2 * sum(len(image.data) for image in made.images))
    blocks = [{"type": "image", "data": image.data, "mimeType": image.mime} for image in made.images]
    if not shaper.unshown:
        return blocks
    try:
        links = await images_as_files(sandbox.guest, execution, shaper.unshown, since)
    except CellvmError as error:
        return [*blocks, text_block(f"[images that are too large could not be stored: {error!s:.100}]")]
    return blocks + [
        {
            "type": "resource_link",
            "uri": uri_of(call.caller.handle_of(sandbox), link.path),
            "name": f"image {link.number}",
            "mimeType": link.mime,
        }
        for link in links
    ]


# -- commands


async def run_command(call: Call, asked: RunCommand) -> Result:
    sandbox, notes = await call.caller.sandbox_of(asked.sandbox)
    for text in (asked.command, asked.cwd):
        check_unicode(text)
        if "\0" in text:
            raise InvalidRequest("a command can't hold a NUL")
    limit = max(asked.max_output, LEAST)
    call.hold("output of commands", 2 * limit)
    shaper = Shaper(limit)
    commands = sandbox.guest.commands
    command = commands.start(["bash", "-c", asked.command], env={}, cwd=asked.cwd, timeout=asked.timeout)
    try:
        async with aclosing(command.output()) as output:
            async for each in output:
                if not isinstance(each, Gap):
                    event = StreamEvent(each.kind, text=each.parts[0].decode("utf-8", "replace"))
                    shaper.add(event)
                    call.tell((event.text or "")[-200:])
    finally:
        if command.outcome is None:
            command.kill()
        commands.forget(command)
    shaper.finish()
    if command.exited is None:
        return failure(str(command.outcome.error if command.outcome else "the command did not run"))
    end = f"[stopped after {asked.timeout:g} s]" if command.exited.timed_out else f"exit {command.exited.code}"
    parts = [*notes, f"[{call.caller.handle_of(sandbox)}]", shaper.shaped("; write it to a file").text, end]
    return Result([text_block("\n".join(filter(None, parts)))], command.exited.code != 0)


# -- files


async def read_file(call: Call, asked: ReadFile) -> Result:
    sandbox, notes = await call.caller.sandbox_of(asked.sandbox)
    files = Files(sandbox.guest)
    call.hold("files inside JSON", 4 * TEXT_LIMIT)
    async with files.read(asked.path) as content:
        pieces = content.pieces()
        first = await anext(pieces, b"")
        mime = image_type(first)
        if mime is not None:
            return await read_image(call, sandbox, asked.path, mime, content.size or 0, first, pieces)
        if b"\0" in first[:8192]:
            return Result([text_block(f"binary, {size_text(content.size or 0)}")])
        lines, more = await lines_of(first, pieces, asked.offset, asked.limit)
    left = f"[lines {asked.offset + 1} to {asked.offset + len(lines)}; more follow]" if more else ""
    return Result([text_block("\n".join(filter(None, [*notes, "\n".join(lines) or "(empty)", left])))])


async def lines_of(first: bytes, pieces: AsyncIterator[bytes], offset: int, limit: int) -> tuple[list[str], bool]:
    """So many lines after the first `offset`, and whether more follow."""
    lines: list[str] = []
    rest, number, size, read = first, 0, 0, len(first)
    while True:
        *whole, rest = rest.split(b"\n")
        for line in whole:
            number += 1
            if number > offset:
                lines.append(line[: 4 * TEXT_LIMIT].decode("utf-8", "replace")[:TEXT_LIMIT].rstrip("\r"))
                size += len(lines[-1]) + 1
                if len(lines) == limit or size > TEXT_LIMIT:
                    return lines, True
        piece = await anext(pieces, b"")
        read += len(piece)
        if not piece or read > READ_LIMIT:
            if rest and number >= offset:
                lines.append(rest.decode("utf-8", "replace")[:TEXT_LIMIT])
            return lines, bool(piece)
        rest = rest[-READ_LIMIT:] + piece


async def read_image(
    call: Call, sandbox: Sandbox, path: str, mime: str, size: int, first: bytes, pieces: AsyncIterator[bytes]
) -> Result:
    """A file that is an image, or if it is too large a link to it."""
    if size > IMAGE_LIMIT * 3 // 4:
        uri = uri_of(call.caller.handle_of(sandbox), Files(sandbox.guest).resolve(path))
        return Result([{"type": "resource_link", "uri": uri, "name": path, "mimeType": mime, "size": size}])
    data = first + b"".join([piece async for piece in pieces])
    return Result([{"type": "image", "data": base64.b64encode(data).decode(), "mimeType": mime}])


def image_type(head: bytes) -> str | None:
    """The type of an image that models can see, by its first bytes."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    return "image/jpeg" if head.startswith(b"\xff\xd8\xff") else None


async def write_file(call: Call, asked: WriteFile) -> Result:
    sandbox, notes = await call.caller.sandbox_of(asked.sandbox)
    check_unicode(asked.content)
    content = asked.content.encode()
    async with Files(sandbox.guest).write(asked.path) as writing:
        await writing.send(content)
        await writing.finish()
    return Result([text_block("\n".join([*notes, f"{size_text(len(content))} written"]))])


# -- sandboxes


async def manage_sandbox(call: Call, asked: ManageSandbox) -> Result:
    caller = call.caller
    if asked.action == "list":
        lines = [caller.line_of(each) for each in caller.mine.list()]
        return Result([text_block("\n".join(lines) or "no sandboxes")])
    if asked.action == "create":
        policy = DEFAULT_POLICY if asked.internet else Policy(allow_internet=False)
        sandbox = await caller.create(asked.template, minutes=asked.minutes, policy=policy)
        return Result([text_block(caller.line_of(sandbox))])
    if asked.sandbox is None:
        raise InvalidRequest(f"{asked.action} needs `sandbox`")
    sandbox = caller.find(asked.sandbox)
    line = f"{caller.handle_of(sandbox)} deleted"
    if asked.action == "delete":
        await caller.sandboxes.kill(sandbox)
        return Result([text_block(line)])
    _ = sandbox.guest
    sandbox.extend(asked.minutes * 60)
    return Result([text_block(caller.line_of(sandbox))])


# -- the table


class Tool(NamedTuple):
    arguments: type[Struct]
    operation: Callable[[Call, Any], Awaitable[Result]]
    annotations: dict[str, bool]


OPEN = {"openWorldHint": True}
TOOLS: dict[str, Tool] = {
    "execution": Tool(AskExecution, ask_execution, OPEN),
    "read_file": Tool(ReadFile, read_file, {"readOnlyHint": True}),
    "run_code": Tool(RunCode, run_code, OPEN),
    "run_command": Tool(RunCommand, run_command, OPEN),
    "sandbox": Tool(ManageSandbox, manage_sandbox, {"destructiveHint": True}),
    "write_file": Tool(WriteFile, write_file, {"destructiveHint": True}),
}


def described() -> list[dict[str, Any]]:
    """The list of tools. It is the same for all, and in the same order."""
    return [
        {
            "name": name,
            "description": tool.arguments.__doc__,
            "inputSchema": schema_of(tool.arguments),
            "annotations": tool.annotations,
        }
        for name, tool in TOOLS.items()
    ]


def schema_of(kind: type[Struct]) -> dict[str, Any]:
    """The JSON schema of arguments, without what models do not need."""
    schema = msgspec.json.schema(kind)["$defs"][kind.__name__]
    properties = {}
    for name, field in schema["properties"].items():
        options = [each for each in field.pop("anyOf", []) if each != {"type": "null"}]
        field = {**field, **(options[0] if options else {})}
        if field.get("default", 0) is None:
            del field["default"]
        properties[name] = field
    return {"type": "object", "properties": properties, "required": schema["required"]} if schema.get("required") else {
        "type": "object", "properties": properties
    }  # fmt: skip


async def use(call: Call, name: str, arguments: Any) -> Result:
    """Call a tool. What is wrong with the arguments or in the sandbox is told to the model.

    Raises:
        KeyError: there is no such tool.
    """
    tool = TOOLS[name]
    try:
        asked = msgspec.convert(arguments, tool.arguments)
        return await tool.operation(call, asked)
    except msgspec.ValidationError as error:
        return failure(f"{name}: {error}")
    except CellvmError as error:
        return failure(f"{error}" + (f" ({error.hint})" if error.hint else ""))


def check_unicode(text: str) -> None:
    """Refuse text that can't be UTF-8 (JSON allows lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("text with a lone surrogate can't be passed on") from None


# -- resources

SCHEME = "cellvm://"
TEMPLATES = [
    {
        "uriTemplate": f"{SCHEME}{{sandbox}}/files/{{+path}}",
        "name": "files",
        "description": "A file of a sandbox, by its absolute path",
    }
]


def uri_of(handle: str, path: str) -> str:
    return f"{SCHEME}{handle}/files{quote(path)}"


async def read_resource(caller: Caller, uri: str, hold: Callable[[str, int], Holding]) -> dict[str, Any]:
    """The content of a file.

    Raises:
        NotFound: there is no such file in the key's sight.
        CellvmError: it can't be read, or is too large.
    """
    handle, found, path = uri.removeprefix(SCHEME).partition("/files/")
    if not uri.startswith(SCHEME) or not found:
        raise NotFound("resources are cellvm://SANDBOX/files/PATH")
    sandbox = await caller.awake(caller.find(handle))
    hold("files inside JSON", 3 * RESOURCE_BLOB)
    async with Files(sandbox.guest).read("/" + unquote(path)) as content:
        if (content.size or 0) > RESOURCE_BLOB:
            raise InvalidRequest(f"it has {content.size} bytes", hint="download it with GET /sandboxes/{id}/files")
        data = b"".join([piece async for piece in content.pieces()])[: RESOURCE_BLOB + 1]
    try:
        text = data.decode() if len(data) <= RESOURCE_TEXT else None
    except UnicodeDecodeError:
        text = None
    if text is not None:
        return {"uri": uri, "mimeType": "text/plain", "text": text}
    mime = image_type(data) or "application/octet-stream"
    return {"uri": uri, "mimeType": mime, "blob": base64.b64encode(data).decode()}
