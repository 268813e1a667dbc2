"""Running a program in the sandbox: its streams have credit, its end is told once, its group is killed at a timeout."""

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from guest_agent import limits, resume, wire
from guest_agent.channel import AgentError, Stream
from guest_agent.wire import Exited, Spawn, Started

READ_SIZE = 64 * 1024


class Output:
    """One pipe of a program, moved to a sub-channel no faster than the gateway's credit."""

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


async def spawn(stream: Stream, request: Spawn, env: dict[str, str], uid: int | None) -> None:
    """Run the program to its end. A CANCEL of the stream kills it.

    Args:
        env: the sandbox's environment; the request's own variables win over it.
        uid: the user and group to run as; None for those of the agent.

    Raises:
        AgentError: invalid (no such working directory, arguments too long) or cannot_run.
    """
    process = _start(request, {**env, **request.env}, uid)
    if uid is not None:
        # The agent is killed last when memory runs out. Its children must not inherit that.
        with resume.as_root(uid):
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("0")
    stream.event(Started(pid=process.pid))
    assert process.stdout is not None
    assert process.stderr is not None
    outputs = [
        Output(stream, os.dup(process.stdout.fileno()), wire.STDOUT),
        Output(stream, os.dup(process.stderr.fileno()), wire.STDERR),
    ]
    process.stdout.close()
    process.stderr.close()

    def room_changed() -> None:
        for output in outputs:
            output.room_changed()

    stream.on_credit = room_changed
    feeding = asyncio.ensure_future(_feed(stream, process))
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
            if uid is not None:
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
    code = process.wait()
    number = -code if code < 0 else 0
    stream.reply(
        Exited(code=124 if timed_out else 128 + number if number else code, signal=number, timed_out=timed_out)
    )


def _start(request: Spawn, env: dict[str, str], uid: int | None) -> subprocess.Popen[bytes]:
    if not os.path.isdir(request.cwd):
        raise AgentError("invalid", f"working directory {request.cwd!r} does not exist")

    def popen() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            request.argv,
            env=env,
            cwd=request.cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
        )

    try:
        try:
            return popen()
        except BlockingIOError:
            if uid is None:
                raise
            # The user is at the limit of processes. One more may start, because it may be a command that ends them.
            with limits.limited_to(limits.FOR_RESCUE):
                return popen()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.E2BIG:
            raise AgentError(
                "invalid", "argument list too long: upload the text as a file, or send it as stdin"
            ) from None
        raise AgentError("cannot_run", f"could not run {request.argv[0]!r}: {error}") from error


async def _feed(stream: Stream, process: subprocess.Popen[bytes]) -> None:
    """Pass the gateway's DATA to the program's standard input, until END or until nobody reads."""
    assert process.stdin
    pipe = process.stdin.fileno()
    os.set_blocking(pipe, False)
    loop = asyncio.get_running_loop()
    with process.stdin:
        while data := await stream.receive():
            view = memoryview(data)
            while view:
                try:
                    view = view[os.write(pipe, view) :]
                except BlockingIOError:
                    await _ready(loop.add_writer, loop.remove_writer, pipe)
                except BrokenPipeError:
                    return


async def _exit(process: subprocess.Popen[bytes]) -> None:
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
