"""The service `process.Process` of E2B's clients: a shape over the commands of a sandbox."""

import asyncio
import signal as signals
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from msgspec import Struct

from kernel_gateway.api.base import Call
from kernel_gateway.api.commands import Size, StartCommand, begin
from kernel_gateway.api.e2b.connect import Code, EnvelopeError, Failed, timeout
from kernel_gateway.api.e2b.plane import Plane
from kernel_gateway.api.rest import check_text
from kernel_gateway.errors import CellvmError, GuestFailure, InvalidRequest, NotFound
from kernel_gateway.guest.commands import Command
from kernel_gateway.guest.files import Files
from kernel_gateway.kernel.journal import Gap

REAPED = 2.0
"""Seconds that the answer to a SIGKILL waits for the end of the process, times the driver's time scale."""
KEEPALIVE: dict[str, Any] = {"event": {"keepalive": {}}}
SIGNALS = {"SIGNAL_SIGKILL": "SIGKILL", "SIGNAL_SIGTERM": "SIGTERM"}


class Nothing(Struct):
    """An empty message."""


class Config(Struct, omit_defaults=True):
    """What a process runs. `cwd` is the user's home if it is empty."""

    cmd: str = ""
    args: list[str] = []
    envs: dict[str, str] = {}
    cwd: str = ""


class Pty(Struct):
    """A terminal."""

    size: Size = msgspec.field(default_factory=Size)


class Start(Struct):
    """A new process. Its standard input stays open unless `stdin` is false."""

    process: Config
    pty: Pty | None = None
    tag: str | None = None
    stdin: bool = True


class Selector(Struct):
    """A process, by its pid or its tag."""

    pid: int | None = None
    tag: str | None = None


class Selected(Struct):
    """A message that concerns one process."""

    process: Selector


class Given(Struct):
    """Input, base64 encoded."""

    stdin: bytes | None = None
    pty: bytes | None = None

    @property
    def data(self) -> bytes:
        return self.pty if self.stdin is None and self.pty is not None else self.stdin or b""


class SendInput(Struct):
    process: Selector
    input: Given


class InputData(Struct):
    input: Given


class InputMessage(Struct):
    """A message of a stream of input. The first one names the process."""

    start: Selected | None = None
    data: InputData | None = None
    keepalive: Nothing | None = None


class SendSignal(Struct):
    process: Selector
    signal: str = ""


class Update(Struct):
    process: Selector
    pty: Pty | None = None


class ProcessInfo(Struct, omit_defaults=True):
    """A process that runs."""

    config: Config
    pid: int
    tag: str | None = None


class Processes(Struct):
    processes: list[ProcessInfo]


class End(Struct, omit_defaults=True):
    """How a process ended, in the words of Go."""

    exitCode: int
    exited: bool
    status: str
    error: str | None = None


def found(call: Call, selector: Selector) -> Command:
    """The process, if it is known.

    Raises:
        NotFound: it is not.
    """
    if selector.pid is None and not selector.tag:
        raise InvalidRequest("a process is named by `pid` or `tag`")
    name = selector.tag if selector.pid is None else str(selector.pid)
    try:
        return call.sandbox.guest.commands.find(name or "")
    except NotFound:
        raise NotFound(f"process with {'tag' if selector.pid is None else 'pid'} {name!r:.100} not found") from None


def running(call: Call, selector: Selector) -> Command:
    """The process, if it runs."""
    command = found(call, selector)
    if command.outcome is not None:
        raise NotFound(f"process with pid {command.pid} has ended")
    return command


def end_of(command: Command) -> End:
    """How a process ended.

    Raises:
        CellvmError: nobody knows, or it was not started.
        Failed: its time was over.
    """
    exited = command.exited
    if exited is None:
        assert command.outcome is not None
        assert command.outcome.error is not None
        raise command.outcome.error
    if exited.timed_out:
        raise Failed(Code.DEADLINE_EXCEEDED, "the time of the process is over, and it was killed")
    if exited.signal:
        status = f"signal: {signal_name(exited.signal)}"
        return End(-1, False, status, status)
    status = f"exit status {exited.code}"
    return End(exited.code, True, status, status if exited.code else None)


def signal_name(number: int) -> str:
    """A signal's name as Go tells it."""
    name = signals.strsignal(number) or f"signal {number}"
    return name.lower()


async def events(command: Command, after: int) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a process from output number `after` on."""
    await command.running()
    yield {"event": {"start": {"pid": command.pid}}}
    async with aclosing(command.output(after)) as output:
        async for each in output:
            if not isinstance(each, Gap):
                yield {"event": {"data": {each.kind: each.parts[0]}}}
    yield {"event": {"end": end_of(command)}}


def cwd_of(command: Command) -> str:
    """The working directory, if the client has named one."""
    return "" if command.request.cwd == "~" else command.request.cwd


async def list_processes(call: Call, body: Nothing) -> Processes:
    """The processes that were started here and run."""
    return Processes(
        [
            ProcessInfo(
                Config(command.request.argv[0], command.request.argv[1:], command.request.env, cwd_of(command)),
                command.pid,
                command.tag or None,
            )
            for command in call.sandbox.guest.commands
            if command.pid and command.outcome is None
        ]
    )


async def start(call: Call, body: Start) -> AsyncGenerator[dict[str, Any], None]:
    """Start a process and tell its events. It goes on when the client hangs up, but not beyond the call's time."""
    if not body.process.cmd:
        raise InvalidRequest("`process.cmd` is empty")
    check_text("tag", body.tag or "")
    user = user_of(call)
    await check_user(call, user)
    process = body.process
    limit = timeout(call.http.request.headers.get("Connect-Timeout-Ms", "")) or 0.0
    command = begin(
        call,
        StartCommand(
            process.cmd, process.args, process.envs, process.cwd or call.sandbox.defaults.workdir or "~", limit
        ),
        user="" if user == call.sandbox.guest.user else user,
        tag=body.tag or "",
        terminal=(body.pty.size.rows, body.pty.size.cols) if body.pty else None,
        stdin=body.stdin,
    )
    async with aclosing(events(command, 0)) as told:
        async for event in told:
            yield event


def user_of(call: Call) -> str:
    """The user that the request, or else the sandbox's template, asks for; empty for the guest's own."""
    assert isinstance(call.http, Plane)
    return call.http.user() or call.sandbox.defaults.user


async def check_user(call: Call, user: str) -> Files:
    """The files of a user of the sandbox.

    Raises:
        Failed: there is no such user.
    """
    check_text("user", user)
    try:
        return await Files.of(call.sandbox.guest, user)
    except GuestFailure as error:
        if error.code != "not_found":
            raise
        raise Failed(Code.UNAUTHENTICATED, f"invalid username: {user!r:.100}") from None


async def connect_to(call: Call, body: Selected) -> AsyncGenerator[dict[str, Any], None]:
    """Tell the events of a process from now on."""
    command = found(call, body.process)
    async with aclosing(events(command, command.journal.last)) as told:
        async for event in told:
            yield event


async def send_input(call: Call, body: SendInput) -> Nothing:
    """Send input to a process or its terminal."""
    running(call, body.process).write(body.input.data)
    return Nothing()


async def stream_input(call: Call, messages: AsyncIterator[InputMessage]) -> Nothing:
    """Send input to a process as it comes, and as fast as the process reads it."""
    command: Command | None = None
    _ = call.sandbox.guest  # a paused one wakes before anything of the stream is read
    async for message in messages:
        if message.start is not None:
            command = running(call, message.start.process)
        elif message.data is not None:
            if command is None:
                raise EnvelopeError("a stream of input begins with `start`")
            await command.feed(message.data.input.data)
    return Nothing()


async def close_stdin(call: Call, body: Selected) -> Nothing:
    """End the standard input of a process."""
    running(call, body.process).close_stdin()
    return Nothing()


async def send_signal(call: Call, body: SendSignal) -> Nothing:
    """Send a signal to a process and its children. After SIGKILL, answer when it has ended."""
    command = running(call, body.process)
    name = SIGNALS.get(body.signal)
    if name is None:
        raise InvalidRequest(f"`signal` is one of {', '.join(SIGNALS)}, not {body.signal[:100]!r}")
    try:
        await command.signal(name)
    except CellvmError:
        _ = running(call, body.process)  # it has ended meanwhile
        raise
    if name == "SIGKILL":
        with suppress(TimeoutError):
            async with asyncio.timeout(REAPED * call.sandbox.guest.link.time_scale):
                await command.over.wait()
    return Nothing()


async def update(call: Call, body: Update) -> Nothing:
    """Give a process's terminal another size."""
    command = running(call, body.process)
    if body.pty is not None:
        await command.resize(body.pty.size.rows, body.pty.size.cols)
    return Nothing()
