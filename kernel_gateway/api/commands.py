"""The REST operations on commands: shapes over `guest/commands`."""

from codecs import getincrementaldecoder
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from kernel_gateway.api.base import Call, Endpoint
from kernel_gateway.api.rest import (
    LEGAL_ID,
    MAX_ARGUMENT,
    MAX_TIMEOUT,
    Seconds,
    Text,
    check_env,
    check_text,
    last_seen,
    rfc3339,
    stream,
    wanted_framing,
)
from kernel_gateway.errors import CellvmError, GuestFailure, InvalidRequest
from kernel_gateway.guest.commands import Command
from kernel_gateway.held import Holding
from kernel_gateway.kernel.journal import Gap

OUTPUT_LIMIT = 8 * 1024 * 1024
"""Bytes of each output stream that the answer of /processes holds. The rest is read, counted and dropped."""
PIECE, BATCH = 64 * 1024, 256 * 1024
"""Bytes of output that are made JSON at once, and bytes of an answer that are written before the client has read."""

Side = Annotated[int, Meta(ge=1, le=10_000)]
SignalName = Literal[
    "SIGHUP", "SIGINT", "SIGQUIT", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGTERM", "SIGCONT", "SIGSTOP",
    "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGWINCH",
]  # fmt: skip


# -- records


class Size(Struct):
    """A terminal's size in characters."""

    rows: Side = 24
    cols: Side = 80


class StartCommand(Struct):
    """A command. `args` are passed as they are, without a shell. A `timeout` of 0 is none.

    With `pty` it gets a terminal. With `stdin` its input stays open; a terminal's always does. `killOnHangUp` ends it
    with the stream that this request asks for.
    """

    cmd: Annotated[str, Meta(min_length=1)]
    args: list[str] = []
    envVars: Text = {}
    cwd: str = "~"
    timeout: Annotated[float, Meta(ge=0, le=MAX_TIMEOUT, description="Seconds.")] = 0.0
    user: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    tag: str | None = None
    pty: Size | None = None
    stdin: bool = False
    killOnHangUp: bool = False


class CommandError(Struct):
    """Why a command has no exit code. `code` is a word of docs/errors.md."""

    code: str
    message: str


class CommandModel(Struct):
    """A command. `status` is running, finished, not_started or unknown. `seq` is the number of its last output.

    `pid` is null before it runs, and `endedAt` and what follows are null until it is over.
    """

    pid: int | None
    tag: str | None
    cmd: str
    args: list[str]
    envVars: Text
    cwd: str
    user: str
    pty: Size | None
    status: str
    seq: int
    startedAt: str
    endedAt: str | None = None
    exitCode: int | None = None
    signal: int | None = None
    timedOut: bool | None = None
    error: CommandError | None = None


class CommandEvent(Struct, omit_defaults=True):
    """One event of a command; `type` tells which of the other fields are set (docs/rest.md)."""

    type: str
    seq: int
    pid: int | None = None
    text: str | None = None
    messages: int | None = None
    outcome: str | None = None
    exitCode: int | None = None
    signal: int | None = None
    timedOut: bool | None = None
    error: CommandError | None = None


class Input(Struct):
    """Text for a command's standard input."""

    text: str


class SendSignal(Struct):
    """A signal for a command's process group."""

    signal: SignalName


def end_of(command: Command) -> dict[str, Any]:
    """How a command ended, as fields of a record or an event; empty while it runs."""
    outcome, exited = command.outcome, command.exited
    if outcome is None:
        return {}
    error = outcome.error and CommandError(outcome.error.code, str(outcome.error))
    if exited is None:
        return {"error": error}
    return {"exitCode": exited.code, "signal": exited.signal or None, "timedOut": exited.timed_out, "error": error}


def model(command: Command) -> CommandModel:
    request = command.request

    def at(moment: datetime | None) -> str | None:
        return None if moment is None else rfc3339(moment)

    return CommandModel(
        pid=command.pid or None,
        tag=command.tag or None,
        cmd=request.argv[0],
        args=request.argv[1:],
        envVars=request.env,
        cwd=request.cwd,
        user=request.user or "user",
        pty=None if command.terminal is None else Size(*command.terminal),
        status=command.state,
        seq=command.journal.last,
        startedAt=rfc3339(command.started_at),
        endedAt=at(command.ended_at),
        **end_of(command),
    )


async def events(command: Command, after: int = 0) -> AsyncGenerator[CommandEvent, None]:
    """The events of a command: that it runs, its output after number `after`, at last its end."""
    await command.begun.wait()
    if command.pid:
        yield CommandEvent("started", min(after, command.journal.last), pid=command.pid)
    async with aclosing(command.output(after)) as output:
        async for each in output:
            if isinstance(each, Gap):
                yield CommandEvent("gap", each.seq, messages=each.messages)
            else:
                yield CommandEvent(each.kind, each.seq, text=each.parts[0].decode("utf-8", "replace"))
    yield CommandEvent("end", command.journal.last, outcome=command.state, **end_of(command))


def found(call: Call) -> Command:
    """The command that the path names."""
    return call.sandbox.guest.commands.find(call.path["command"])


# -- operations


def begin(call: Call, body: "StartCommand | RunProcess", **options: Any) -> Command:
    """Start a command, after a check of what no program can be given."""
    argv = [body.cmd, *body.args]
    check_env(body.envVars)
    check_text("cmd", body.cmd)
    check_text("args", *body.args)
    check_text("cwd", body.cwd)
    if "\0" in body.cwd:
        raise InvalidRequest("`cwd`: a path can't hold a NUL")
    for argument in argv:
        if "\0" in argument:
            raise InvalidRequest("a command's arguments can't hold a NUL")
        if len(argument.encode()) > MAX_ARGUMENT:
            raise InvalidRequest(
                f"an argument may have at most {MAX_ARGUMENT} bytes",
                hint="send long text as `stdin`, or upload it as a file",
            )
    commands = call.sandbox.guest.commands
    return commands.start(argv, env=body.envVars, cwd=body.cwd, timeout=body.timeout, **options)


async def start_command(call: Call, body: StartCommand) -> None:
    """Start a command and answer with its record, as soon as it runs. It goes on when the client hangs up.

    With `Accept: application/x-ndjson` (or `text/event-stream`) the answer is its events, `{"type": "end"}` last.
    """
    framing = wanted_framing(call.http)
    if body.killOnHangUp and framing is None:
        raise InvalidRequest("`killOnHangUp` needs a stream", hint="send `Accept: application/x-ndjson`")
    check_text("user", body.user or "")
    if body.tag is not None and (body.tag.isdigit() or not LEGAL_ID.fullmatch(body.tag)):
        raise InvalidRequest("a command's tag has 1 to 128 letters, digits or any of _ . : - and is no number")
    command = begin(
        call,
        body,
        user=body.user or "",
        tag=body.tag or "",
        terminal=(body.pty.rows, body.pty.cols) if body.pty else None,
        stdin=body.stdin,
    )
    try:
        await command.running()
        call.http.set_status(201)
        await answer(call, command, framing)
    finally:
        if body.killOnHangUp and command.outcome is None:
            command.kill()


async def answer(call: Call, command: Command, framing: str | None, after: int = 0) -> None:
    """Send a command's record, or its events."""
    if framing is not None:
        async with aclosing(events(command, after)) as found:
            await stream(call.http, framing, found)
        return
    call.http.set_header("Content-Type", "application/json")
    await call.http.finish(msgspec.json.encode(model(command)))


async def list_commands(call: Call) -> list[CommandModel]:
    """The commands that run, and the last ones that are over, oldest first."""
    return [model(command) for command in call.sandbox.guest.commands]


async def get_command(call: Call) -> None:
    """A command by its pid or its tag, or its events as a stream like POST …/commands."""
    await answer(call, found(call), wanted_framing(call.http), last_seen(call))


async def send_stdin(call: Call, body: Input) -> None:
    """Send text to a command's standard input, or to its terminal. It waits there until the command reads it."""
    check_text("text", body.text)
    found(call).write(body.text.encode())


async def close_stdin(call: Call) -> None:
    """End a command's standard input. A terminal has no such end; send it Ctrl-D."""
    found(call).close_stdin()


async def signal_command(call: Call, body: SendSignal) -> None:
    """Send a signal to a command's process group."""
    await found(call).signal(body.signal)


async def resize_command(call: Call, body: Size) -> None:
    """Give a command's terminal another size."""
    await found(call).resize(body.rows, body.cols)


# -- commands in one request


class RunProcess(Struct):
    """A command. `args` are passed as they are, without a shell. `stdin` is the text that it reads."""

    cmd: Annotated[str, Meta(min_length=1)]
    args: list[str] = []
    envVars: Text = {}
    cwd: str = "~"
    timeout: Seconds = 60.0
    stdin: str | None = None


class ProcessEnd(Struct, kw_only=True):
    """How a command ended. `exitCode` is 128 + N after signal N, and 124 when `timedOut`."""

    processID: str
    exitCode: int
    timedOut: bool = False
    signal: int | None = None
    truncated: dict[str, int] | None = None


class ProcessResult(ProcessEnd, kw_only=True):
    """How a command ended, and what it printed. `exitCode` is 128 + N after signal N, and 124 when `timedOut`.

    Output that is not UTF-8 has U+FFFD in place of bad bytes. `truncated` has the number of bytes left out per stream.
    """

    stdout: str
    stderr: str


class Output:
    """One stream of a command's output, up to OUTPUT_LIMIT bytes, and no more than there is room for.

    It is kept as bytes. As a text it could take four times as much, because one rare character makes every character of
    its text wide.
    """

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self.data = bytearray()
        self.dropped = 0

    def add(self, data: bytes) -> None:
        kept = data[: OUTPUT_LIMIT - len(self.data)]
        if self.dropped or not self._holding.grow(len(kept)):
            kept = b""
        self.data += kept
        self.dropped += len(data) - len(kept)

    def json(self) -> Iterator[bytes]:
        """The text as JSON without its quotes, in pieces."""
        decoder = getincrementaldecoder("utf-8")("replace")
        for at in range(0, len(self.data), PIECE):
            yield msgspec.json.encode(decoder.decode(self.data[at : at + PIECE]))[1:-1]
        yield msgspec.json.encode(decoder.decode(b"", final=True))[1:-1]


async def run_process(call: Call, body: RunProcess) -> None:
    """Run a command to its end and return its output. A client that hangs up ends the command."""
    end, outputs = await run_to_end(call, body)
    await send_result(call.http, end, outputs)


async def send_result(http: Endpoint, end: ProcessEnd, outputs: dict[str, Output]) -> None:
    """Answer with a ProcessResult, piece by piece as the client reads, so that the whole is never made."""
    http.set_header("Content-Type", "application/json")
    http.write(msgspec.json.encode(end)[:-1])
    waiting = 0
    for name, output in outputs.items():
        http.write(f',"{name}":"')
        for piece in output.json():
            http.write(piece)
            waiting += len(piece)
            if waiting >= BATCH:
                await http.flush()
                waiting = 0
        http.write('"')
    http.write("}")
    await http.finish()


async def run_to_end(call: Call, body: RunProcess) -> tuple[ProcessEnd, dict[str, Output]]:
    """How a command ended, and its output by the stream's name."""
    text, body.stdin = body.stdin or "", None
    check_text("stdin", text)
    commands = call.sandbox.guest.commands
    command = begin(call, body, stdin=True)
    outputs = {name: Output(call.http.hold("output of commands")) for name in ("stdout", "stderr")}
    try:
        command.write(text.encode())
        del text  # the command may run long, and its input is counted with it
        command.close_stdin()
        async with aclosing(command.output()) as output:
            async for each in output:
                # There are no gaps, because the command is held for its only reader.
                if not isinstance(each, Gap):
                    outputs[each.kind].add(each.parts[0])
    finally:
        if command.outcome is None:
            command.kill()
        commands.forget(command)
    exited = command.exited
    if exited is None:
        raise error_of(command)
    dropped = {name: output.dropped for name, output in outputs.items() if output.dropped}
    end = ProcessEnd(
        processID=str(command.pid),
        exitCode=exited.code,
        timedOut=exited.timed_out,
        signal=exited.signal or None,
        truncated=dropped or None,
    )
    return end, outputs


def error_of(command: Command) -> CellvmError:
    assert command.outcome is not None
    assert command.outcome.error is not None
    return command.outcome.error


async def envs(call: Call) -> Text:
    """The variables that a process in the sandbox sees."""
    end, outputs = await run_to_end(call, RunProcess(cmd="env", args=["-0"], timeout=30))
    stdout, stderr = (output.data.decode("utf-8", "replace") for output in outputs.values())
    if end.exitCode:
        raise GuestFailure("failed", f"env: {stderr[:500]}")
    return dict(pair.split("=", 1) for pair in stdout.split("\0") if "=" in pair)
