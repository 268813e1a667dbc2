"""The zygote, seen from the agent: start it, ask it for programs, and do without it at any time.

What it does not do, for whatever reason, the agent does by `execve`. So nothing here is an error of a program's.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

from guest_agent import limits, startup

BOOT = (
    "import sys; sys.path[0] = {!r}; from guest_agent.imports import Fresh, Recorder; seen = Fresh(), Recorder(); "
    "from guest_agent.zygote import serve; serve({}, {!r}, *seen)"
)
"""What the zygote runs. Its first entry of `sys.path` is the way to our package, and does not stay. The recorder comes
before the zygote's own imports, because those count as well."""
ANSWER_LIMIT = 10.0
"""Seconds that the zygote has to fork. A user can stop it, as any process of theirs."""
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None)


class Child:
    """A program that the zygote has forked. It is a child of the agent."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def wait(self) -> int:
        """Its exit status, or the number of the signal that ended it, negative."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


def executable(name: str, env: dict[str, str], cwd: str) -> str | None:
    """The path by which `execve` would find a program, if that is an interpreter of the agent's own environment."""
    directories = [""] if "/" in name else os.get_exec_path(env)
    paths = (os.path.join(cwd, directory, name) for directory in directories)
    found = next(filter(os.path.exists, paths), None)
    if found is None or os.path.dirname(found) != os.path.dirname(sys.executable):
        return None
    return found if os.path.samefile(found, "/proc/self/exe") else None


class ZygoteProcess:
    """The zygote of one sandbox. It runs as the user `uid`, or as the agent's user if that is None.

    Args:
        modules: what it imports. A template's agent learns it later.
    """

    def __init__(self, uid: int | None, home: str, modules: list[str]) -> None:
        self._uid = uid
        self._home = home
        self._modules = modules
        self._pid = 0
        self._channel: socket.socket | None = None
        self._env: dict[str, str] = {}
        self._starting: asyncio.Task[None] | None = None

    async def warm(self, modules: list[str], env: dict[str, str]) -> None:
        """Start it anew, with these modules, and return when it is ready."""
        self._modules = modules
        self._forget()
        await self._start(env)

    def may_fork(self, argv: list[str], env: dict[str, str], cwd: str, *, terminal: bool) -> bool:
        """Whether the zygote is there and can be that program. If it is not there, it begins to start."""
        if startup.program(argv, env, terminal=terminal) is None or executable(argv[0], env, cwd) is None:
            return False
        if self._channel is None:
            if self._starting is None:
                self._starting = asyncio.create_task(self._start(env))
            return False
        return startup.read_once(env) == startup.read_once(self._env)

    async def fork(
        self, argv: list[str], env: dict[str, str], cwd: str, streams: list[int], *, terminal: bool
    ) -> Child | None:
        """Start the program, or return None if that must be done in another way.

        Args:
            streams: its standard input, output and error, or one terminal.
        """
        fields = {
            "argv": argv,
            "env": env,
            "cwd": cwd,
            "terminal": terminal,
            "executable": executable(argv[0], env, cwd),
            "is_protected": self._uid is not None,
            "processes": resource.getrlimit(resource.RLIMIT_NPROC),  # the zygote's may be higher
        }
        ours, theirs = socket.socketpair()
        with ours:
            request = os.memfd_create("request")
            try:
                ours.setblocking(False)
                os.write(request, json.dumps(fields).encode())
                if self._channel is None:
                    return None
                descriptors = [streams[0], streams[min(1, len(streams) - 1)], streams[-1], theirs.fileno(), request]
                socket.send_fds(self._channel, [b"f"], descriptors)
            except OSError:
                self._forget()
                return None
            finally:
                theirs.close()
                os.close(request)
            pid = await self._answer(ours)
        return Child(pid) if pid else None

    async def _answer(self, ours: socket.socket) -> int:
        """The process id that a fork tells, or 0. Nobody is left who could tell one when there is no zygote."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ANSWER_LIMIT):
                told = await loop.sock_recv(ours, 16)
        except TimeoutError:
            self._forget()
            told = await loop.sock_recv(ours, 16)
        if not told:
            self._forget()
        return int(told or 0)

    def _forget(self) -> None:
        """End the zygote, if it has not ended by itself."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    async def _start(self, env: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        env = {name: value for name, value in env.items() if name != "PYTHONPATH"}
        boot = BOOT.format(str(Path(__file__).parent.parent), theirs.fileno(), self._modules)
        with theirs, limits.limited_to(limits.FOR_KERNELS) if self._uid is not None else contextlib.nullcontext():
            process = subprocess.Popen(
                [sys.executable, "-c", boot],
                env=env,
                cwd=self._home,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                user=self._uid,
                group=self._uid,
                extra_groups=None if self._uid is None else [],
            )
        loop = asyncio.get_running_loop()
        try:
            is_warm = bool(await loop.sock_recv(ours, 1))
            # It forks once more and ends, because only a fresh fork has no threads. That fork must become our child.
            _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            if is_warm:
                await loop.sock_sendall(ours, b"g")
            await asyncio.to_thread(process.wait)
            told = await loop.sock_recv(ours, 16)
        except BaseException:
            ours.close()
            process.kill()
            process.wait()
            raise
        finally:
            _libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        if not told:  # it can't be had here, as when memory is short; `_starting` stays, so nobody tries again
            ours.close()
            return
        self._pid, self._channel, self._env, self._starting = int(told), ours, env, None
