"""Running programs in the sandbox: streams with credit, one end told once, a group that is killed at a timeout.

A program has three pipes, or a terminal of its own. Signals and sizes come in requests that name the program's stream.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import pwd
import signal
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from guest_agent import limits, resume, wire
from guest_agent.channel import AgentError, Stream
from guest_agent.instant import ZygoteProcess
from guest_agent.wire import Exited, Spawn, Started

READ_SIZE = 64 * 1024
SANDBOX_USER = "user"
TERM = "xterm-256color"
IUTF8 = 0o40000
"""The terminal's flag that makes a backspace delete a whole character; `termios` has no name for it yet."""


class Output:
    """One pipe of a program, or its terminal, moved to a sub-channel no faster than the gateway's credit."""

    def __init__(self, stream: Stream, pipe: int, sub: int) -> None:
        self._stream = stream
        self._pipe = pipe
        self._sub = sub
        self._loop = asyncio.get_running_loop()
        self._waiting = False
        self.open = True
        os.set_blocking(pipe, False)
        self._loop.add_reader(pipe, self.move)

    def move(self) -> bool:
        """Send as much as credit allows, and return whether the pipe is empty or at its end."""
        while self.open:
            room = self._stream.room
            if room <= 0:
                self._loop.remove_reader(self._pipe)
                self._waiting = True
                return False
            try:
                data = os.read(self._pipe, min(READ_SIZE, room))
            except BlockingIOError:
                return True
            except OSError:  # nobody has the terminal open any more
                data = b""
            if not data:
                self.close()
            else:
                self._stream.send_now(data, self._sub)
        return True

    def room_changed(self) -> None:
        if self.open and self._waiting and self._stream.room > 0:
            self._waiting = False
            self._loop.add_reader(self._pipe, self.move)

    async def drain(self) -> None:
        """Send all that is in the pipe now, then close it, because a background child may hold it open for ever."""
        while not self.move() and not self._stream.cancelled.is_set():
            await self._stream.wait_for_room()
        self.close()

    def close(self) -> None:
        if self.open:
            self.open = False
            self._loop.remove_reader(self._pipe)
            os.close(self._pipe)


@dataclass(frozen=True, slots=True)
class Account:
    """The user that a program runs as. `uid` is None for the agent's own user."""

    uid: int | None
    gid: int | None
    home: str
    env: dict[str, str]


class Process(Protocol):
    """A child of ours."""

    @property
    def pid(self) -> int: ...

    def wait(self) -> int:
        """Its exit status, or the number of the signal that ended it, negative."""


@dataclass(frozen=True, slots=True)
class Start:
    """A program to be started."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    account: Account
    terminal: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Program:
    """A program that runs. `outputs` are descriptors by their sub-channel. `terminal` is None if it has none."""

    process: Process
    stdin: int
    outputs: dict[int, int]
    terminal: int | None


class Programs:
    """The programs that run, by the number of their stream.

    Args:
        home: the home of the sandbox user.
        uid: the sandbox user; None if programs run as the agent's own user.
        zygote: what Python programs are forked from.
    """

    def __init__(self, home: str, uid: int | None, zygote: ZygoteProcess) -> None:
        self._home = home
        self._zygote = zygote
        self._uid = uid
        self._running: dict[int, Program] = {}

    async def spawn(self, stream: Stream, request: Spawn, env: dict[str, str]) -> None:
        """Run the program to its end. A CANCEL of the stream kills it.

        Args:
            env: the sandbox's environment; the request's own variables win over it.

        Raises:
            AgentError: invalid (no such user or working directory, arguments too long), permission_denied, cannot_run.
        """
        program = await self._begin(request, env)
        process = program.process
        if self._uid is not None:
            # The agent is killed last when memory runs out. Its children must not inherit that.
            with resume.as_root(self._uid):
                Path(f"/proc/{process.pid}/oom_score_adj").write_text("0")
        self._running[stream.number] = program
        stream.credit = request.window
        stream.event(Started(pid=process.pid))
        outputs = [Output(stream, pipe, sub) for sub, pipe in program.outputs.items()]

        def room_changed() -> None:
            for output in outputs:
                output.room_changed()

        stream.on_credit = room_changed
        feeding = asyncio.ensure_future(_feed(stream, program))
        exited = asyncio.ensure_future(_exit(process))
        cancelled = asyncio.ensure_future(stream.cancelled.wait())
        timed_out = False
        try:
            timeout = request.timeout_ms / 1000 or None
            await asyncio.wait({exited, cancelled}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():
                timed_out = not cancelled.done()
                # The leader is not reaped yet, so its group still exists and has not been reused.
                os.killpg(process.pid, signal.SIGKILL)
                if self._uid is not None:
                    limits.let_go_first(process.pid)
            await exited
            if timed_out:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            for output in outputs:
                await output.drain()
        finally:
            feeding.cancel()
            cancelled.cancel()
            for output in outputs:
                output.close()
            if program.terminal is not None:
                os.close(program.terminal)
            if self._running.get(stream.number) is program:  # a new epoch may have given the number to another
                del self._running[stream.number]
        code = process.wait()
        number = -code if code < 0 else 0
        stream.reply(
            Exited(code=124 if timed_out else 128 + number if number else code, signal=number, timed_out=timed_out)
        )

    async def _begin(self, request: Spawn, env: dict[str, str]) -> Program:
        account = self._account(request.user)
        with self._acting_as(account):
            start = _start(request, env, account)
            what, in_terminal = (start.argv, start.env, start.cwd), start.terminal is not None
            may_fork = account.uid == self._uid and self._zygote.may_fork(*what, terminal=in_terminal)
            ours, theirs = _ends(start.terminal)
        try:
            process: Process | None = None
            if may_fork:
                process = await self._zygote.fork(*what, theirs, terminal=in_terminal)
            if process is None:
                with self._acting_as(account):
                    process = _popen(start, theirs)
        except BaseException:
            for end in ours:
                os.close(end)
            raise
        finally:
            for end in theirs:
                os.close(end)
        if start.terminal is None:
            stdin, out, err = ours
            return Program(process, stdin, {wire.STDOUT: out, wire.STDERR: err}, None)
        (terminal,) = ours
        return Program(process, os.dup(terminal), {wire.STDOUT: os.dup(terminal)}, terminal)

    def answer(self, request: wire.Signal | wire.Resize | wire.GetUser) -> wire.Body:
        """The answer to a request about a program, or about a user."""
        match request:
            case wire.Signal():
                self.signal(request)
            case wire.Resize():
                self.resize(request)
            case wire.GetUser():
                return wire.User(home=self.home(request.name))
        return wire.Done()

    def signal(self, request: wire.Signal) -> None:
        """Signal a program's process group.

        Raises:
            AgentError: not_found, because the program has ended.
        """
        try:
            os.killpg(self._program(request.stream).process.pid, request.signal)
        except ProcessLookupError:
            raise AgentError("not_found", "the command has ended") from None

    def resize(self, request: wire.Resize) -> None:
        """Change the size of a program's terminal, and tell the program by SIGWINCH.

        Raises:
            AgentError: not_found (the program has ended), invalid (it has no terminal).
        """
        terminal = self._program(request.stream).terminal
        if terminal is None:
            raise AgentError("invalid", "the command has no terminal")
        _resize(terminal, request.rows, request.columns)

    def home(self, name: str) -> str:
        """The home of a user.

        Raises:
            AgentError: not_found (there is no such user), permission_denied (no program may run as that one).
        """
        if name not in ("", SANDBOX_USER):
            try:
                pwd.getpwnam(name)
            except (KeyError, ValueError):  # a name can't hold a NUL
                raise AgentError("not_found", f"there is no user {name!r}") from None
        return self._account(name).home

    def _program(self, stream: int) -> Program:
        if stream not in self._running:
            raise AgentError("not_found", "the command has ended")
        return self._running[stream]

    def _account(self, name: str) -> Account:
        if name in ("", SANDBOX_USER):
            return Account(self._uid, self._uid, self._home, {})
        if self._uid is None:
            if name != pwd.getpwuid(os.getuid()).pw_name:
                raise AgentError("permission_denied", "commands run as the server's user here, and as no other")
            return Account(None, None, self._home, {})
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            raise AgentError("invalid", f"there is no user {name!r}") from None
        names = {"HOME": found.pw_dir, "USER": name, "LOGNAME": name, "SHELL": found.pw_shell}
        return Account(found.pw_uid, found.pw_gid, found.pw_dir, names)

    @contextmanager
    def _acting_as(self, account: Account) -> Iterator[None]:
        """Resolve paths and open a terminal as that user within the block."""
        if self._uid is None or account.uid is None:
            yield
            return
        resume.act_as(account.uid)
        try:
            yield
        finally:
            resume.act_as(self._uid)


def _start(request: Spawn, env: dict[str, str], account: Account) -> Start:
    cwd = account.home + request.cwd[1:] if request.cwd.partition("/")[0] == "~" else request.cwd
    cwd = os.path.join(account.home, cwd)
    if not os.path.isdir(cwd):
        raise AgentError("invalid", f"cwd {cwd!r} does not exist")
    env = {**env, **account.env, **request.env}
    if request.terminal is not None:
        env = {"TERM": TERM, **env}
    return Start(request.argv, env, cwd, account, request.terminal)


def _ends(terminal: tuple[int, int] | None) -> tuple[list[int], list[int]]:
    """Our ends of a program's standard input, output and error, and its own. A terminal is both ends of all three."""
    if terminal is None:
        ends: list[int] = []
        try:
            for _ in range(3):
                ends += os.pipe()
        except OSError:
            for end in ends:
                os.close(end)
            raise
        stdin, ours, out, stdout, err, stderr = ends
        return [ours, out, err], [stdin, stdout, stderr]
    end, side = os.openpty()
    try:
        _resize(end, *terminal)
        flags = termios.tcgetattr(side)
        flags[0] |= IUTF8
        termios.tcsetattr(side, termios.TCSANOW, flags)
    except BaseException:
        os.close(end)
        os.close(side)
        raise
    return [end], [side]


def _take_terminal() -> None:
    """Make standard input the controlling terminal of this session."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _popen(start: Start, ends: list[int]) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own. `ends` are its standard input, output and error, or a terminal."""
    argv, account = start.argv, start.account

    def popen() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            argv,
            env=start.env,
            cwd=start.cwd,
            stdin=ends[0],
            stdout=ends[min(1, len(ends) - 1)],
            stderr=ends[-1],
            start_new_session=True,
            # `setsid --ctty` would do it without a function in the child, but it would hide that a program can't be
            # run. The function makes one system call, so no lock of another thread can be in its way.
            preexec_fn=None if start.terminal is None else _take_terminal,
            user=account.uid,
            group=account.gid,
            extra_groups=None if account.uid is None else [],
        )

    try:
        try:
            return popen()
        except BlockingIOError:
            if account.uid is None:
                raise
            # The user is at the limit of processes. One more may start, because it may be a command that ends them.
            with limits.limited_to(limits.FOR_RESCUE):
                return popen()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.E2BIG:
            raise AgentError(
                "invalid", "argument list too long: upload the text as a file, or send it as stdin"
            ) from None
        raise AgentError("cannot_run", f"could not run {argv[0]!r}: {error}") from error


async def _feed(stream: Stream, program: Program) -> None:
    """Pass the gateway's DATA to the program's standard input, until END or until nobody reads."""
    pipe = program.stdin
    os.set_blocking(pipe, False)
    loop = asyncio.get_running_loop()
    try:
        while data := await stream.receive():
            view = memoryview(data)
            while view:
                try:
                    view = view[os.write(pipe, view) :]
                except BlockingIOError:
                    await _ready(loop.add_writer, loop.remove_writer, pipe)
                except OSError:  # nobody reads any more
                    return
        if stream.cancelled.is_set():
            await (
                loop.create_future()
            )  # until it is killed, because a program may take the end of its input for success
    finally:
        os.close(pipe)


async def _exit(process: Process) -> None:
    """Return when the program has ended, without reaping it."""
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(process.pid)
    try:
        await _ready(loop.add_reader, loop.remove_reader, pidfd)
    finally:
        os.close(pidfd)


async def _ready(add: Callable[[int, Callable[[], None]], None], remove: Callable[[int], bool], fd: int) -> None:
    """Return when the loop reports the descriptor as ready."""
    ready = asyncio.Event()
    add(fd, ready.set)
    try:
        await ready.wait()
    finally:
        remove(fd)
