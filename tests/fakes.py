"""A driver whose machines are scripted guests in this process, speaking the real codec over a socketpair.

A healthy fake guest answers everything the agent answers: the handshake, a handful of programs, files in memory, and
a kernel that understands a few lines of Python. A test breaks it through a Script (replace the handler of one request,
spoil the handshake), or by making the guest stall, flood, talk garbage or die.
"""

import ast
import asyncio
import json
import operator
import os
import posixpath
import re
import socket
import tarfile
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application

from guest_agent import wire
from guest_agent.wire import Body, FrameType
from kernel_gateway.api.app import application
from kernel_gateway.drivers import Capabilities, Damaged, DriverError
from kernel_gateway.guest.guest import Guests
from kernel_gateway.held import Held
from kernel_gateway.images.templates import Template, Templates
from kernel_gateway.network.policy import Floor, Policy, Refusal
from kernel_gateway.sandbox import recipe
from kernel_gateway.sandbox.pool import Pool
from kernel_gateway.sandbox.sandboxes import Sandboxes
from kernel_gateway.sandbox.store import Store

HOME = "/home/user"
ENDLESS = "/events"
"""The path whose answer does not end by itself; test_events.py has it."""
PAGE = 100
PIECE = b"flood! " * 9362  # just under 64 KiB
TEMPLATES = [
    Template(id="code_interpreter", description="for tests", vcpus=2, memory_mb=2048, disk_mb=10240, aliases=["ci-v1"]),
    Template(id="base", description="for tests, too", vcpus=1, memory_mb=512, disk_mb=1024),
]


class Refused(Exception):
    """The fake agent refuses a request. This becomes a FAILURE."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


Handler = Callable[["Stream", Any], Awaitable[None]]


@dataclass
class Script:
    """A machine's faults, none by default.

    `sample` makes a handshake's random sample. `resumed` may change the acknowledgement before it is sent. `handlers`
    replace the handlers of requests. `start_error` is raised instead of starting, and `filter_error` when a network
    policy is applied or refusals are read. Saving takes `save_delay` seconds and `save_size` bytes, and ends with
    `save_error`, or with `write_error` when its files are written. `notes` are what cells have said by `note(…)`.
    `reply_metadata` is the metadata of cells' replies.
    """

    sample: Callable[[], bytes] = lambda: os.urandom(16)
    resumed: Callable[[wire.Resumed], wire.Resumed | None] = lambda reply: reply
    handlers: dict[type[Body], Handler] = field(default_factory=dict)
    start_error: Exception | None = None
    start_delay: float = 0.0
    filter_error: Exception | None = None
    save_error: Exception | None = None
    write_error: Exception | None = None
    save_delay: float = 0.0
    save_size: int = 0
    notes: list[str] = field(default_factory=list)
    reply_metadata: bytes = b"{}"


class Stream:
    """The guest's side of one conversation. It sends with credit and receives DATA."""

    def __init__(self, guest: "FakeGuest", number: int) -> None:
        self.guest = guest
        self.number = number
        self.epoch = guest.epoch
        self.credit = wire.INITIAL_CREDIT
        self.changed = asyncio.Event()
        self.incoming: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def reply(self, body: Body) -> None:
        await self.send(wire.encode(FrameType.REPLY, self.number, body))

    async def event(self, body: Body) -> None:
        await self.send(wire.encode(FrameType.EVENT, self.number, body))

    async def fail(self, code: str, message: str) -> None:
        body = wire.Failure(code=code, message=message)
        await self.send(wire.encode(FrameType.FAILURE, self.number, body))

    async def data(self, data: bytes, sub: int = 0) -> None:
        """Send DATA, waiting for credit like an honest agent."""
        view = memoryview(data)
        while view:
            await self.wait_for_credit()
            piece = view[: min(self.credit, wire.CHUNK)]
            self.credit -= len(piece)
            await self.send(wire.header(FrameType.DATA, self.number, len(piece), sub) + piece)
            view = view[len(piece) :]

    async def wait_for_credit(self) -> None:
        while self.credit <= 0:
            self.changed.clear()
            await self.changed.wait()

    async def end(self, sub: int = 0) -> None:
        await self.send(wire.header(FrameType.END, self.number, 0, sub))

    async def received(self) -> bytes | None:
        data = await self.incoming.get()
        if data:
            await self.send(wire.credit(self.number, len(data)))
        return data

    async def send(self, frame: bytes) -> None:
        """Send a frame unless the stream's epoch is over."""
        await self.guest.send(frame, self.epoch)

    def begin_epoch(self) -> None:
        """Begin a kernel's stream anew."""
        self.epoch, self.credit = self.guest.epoch, wire.INITIAL_CREDIT
        self.changed.set()


class FakeGuest:
    """An agent in memory. `send` writes bytes as they are, so a test may send any nonsense with it."""

    def __init__(self, sock: socket.socket, script: Script, die: Callable[[str], None]) -> None:
        self.script = script
        self.die = die
        self.env: dict[str, str] = {}
        self.requests: list[Body] = []
        self.files: dict[str, bytes | None] = dict.fromkeys(("/", "/home", HOME, "/tmp"))
        self.programs: dict[int, asyncio.Future[int]] = {}
        self._pids = count(4711)
        self.bytes_read = 0
        self._sock = sock
        self.epoch = 0
        self._sending = asyncio.Lock()
        self._awake = asyncio.Event()  # not set: the link is at rest
        self._awake.set()
        self._reads = asyncio.Event()
        self._reads.set()
        self._streams: dict[int, Stream] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.is_saved = False
        self.kernel = FakeKernel(self)

    # -- faults that a test may cause

    def stall(self) -> None:
        """Stop reading."""
        self._reads.clear()

    def go_on(self) -> None:
        self._reads.set()

    async def send(self, data: bytes, epoch: int | None = None) -> None:
        """Send when the link is not at rest, and only if the epoch goes on."""
        async with self._sending:
            await self._awake.wait()
            if epoch in (None, self.epoch):
                await self.send_now(data)

    async def send_now(self, data: bytes) -> None:
        """Send, even from a link at rest."""
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    def cut(self) -> None:
        """End the byte stream, though the machine lives on."""
        self._sock.shutdown(socket.SHUT_RDWR)

    @property
    def is_at_rest(self) -> bool:
        return not self._awake.is_set()

    # -- the agent

    async def run(self) -> None:
        """Serve until the other end is gone."""
        decoder, loop = wire.Decoder(), asyncio.get_running_loop()
        try:
            while True:
                data = await loop.sock_recv(self._sock, 256 * 1024)
                await self._reads.wait()
                if not data:
                    return
                self.bytes_read += len(data)
                decoder.receive_data(data)
                for frame in decoder.frames():
                    await self._receive(frame)
        except OSError:
            pass  # the machine was killed, so the sockets are closed
        finally:
            if not self.is_saved:
                await self.end()

    async def end(self) -> None:
        """End all that goes on in the machine."""
        for task in self._tasks.values():
            task.cancel()  # before any wait, because this task may be cancelled while it waits
        await self.kernel.close()
        await cancel(*self._tasks.values())

    def frozen(self) -> Callable[[], "FakeGuest"]:
        """What makes guests with the files and the kernel that this one has now, and no commands. They are at rest."""
        env, files, epoch, kernel = dict(self.env), dict(self.files), self.epoch, self.kernel.frozen()

        def thaw() -> FakeGuest:
            other = FakeGuest(self._sock, self.script, self.die)
            other.env, other.files, other.epoch = dict(env), dict(files), epoch
            kernel(other.kernel)
            other._awake.clear()
            return other

        return thaw

    def move(self, sock: socket.socket, die: Callable[[str], None]) -> None:
        """Go on as another machine."""
        self._sock, self.die, self.is_saved = sock, die, False

    async def _receive(self, frame: wire.Frame) -> None:
        if frame.stream == wire.LINK:
            await self._link_received(wire.decode(frame))
        elif frame.type is FrameType.REQUEST:
            stream = self._streams[frame.stream] = Stream(self, frame.stream)
            body = wire.decode(frame)
            stream.credit = getattr(body, "window", wire.INITIAL_CREDIT)
            self.requests.append(body)
            if isinstance(body, wire.Resume | wire.Continue):
                self._awake.set()
            self._tasks[frame.stream] = asyncio.create_task(self._answer(stream, body))
            await asyncio.sleep(0)  # a CANCEL finds it begun, because it could not answer otherwise
        elif frame.stream in (wire.KERNEL, wire.KERNEL_CONTROL):
            await self.kernel.frame_received(frame)
        elif frame.type is FrameType.CANCEL and frame.stream in self._tasks:
            self._tasks[frame.stream].cancel()
        elif (known := self._streams.get(frame.stream)) is not None:
            if frame.type is FrameType.CREDIT:
                known.credit += int.from_bytes(frame.payload, "big")
                known.changed.set()
            elif frame.type in (FrameType.DATA, FrameType.END):
                known.incoming.put_nowait(frame.payload or None)

    async def _link_received(self, body: wire.Hello | wire.Quiesce) -> None:
        if handler := self.script.handlers.get(type(body)):
            await handler(Stream(self, wire.LINK), body)
        elif isinstance(body, wire.Hello):
            if body.epoch == self.epoch:
                return
            self.epoch = body.epoch
            self._awake.set()
            await cancel(*self._tasks.values())
            self.kernel.begin_epoch()
            await self.send(wire.encode(FrameType.REPLY, wire.LINK, wire.Welcome(epoch=body.epoch)))
        else:
            async with self._sending:
                await self.send_now(wire.encode(FrameType.REPLY, wire.LINK, wire.Quiesced()))
                self._awake.clear()

    async def _answer(self, stream: Stream, body: Body) -> None:
        try:
            handler = self.script.handlers.get(type(body)) or getattr(self, "_do_" + type(body).__name__.lower())
            await handler(stream, body)
        except Refused as error:
            await stream.fail(error.code, str(error))
        except asyncio.CancelledError:
            with suppress(OSError):
                await stream.fail("failed", "cancelled")
            raise
        except OSError:
            pass  # killed
        finally:
            del self._streams[stream.number], self._tasks[stream.number]

    async def _do_ping(self, stream: Stream, body: wire.Ping) -> None:
        await stream.reply(wire.Done())

    async def _do_flush(self, stream: Stream, body: wire.Flush) -> None:
        await stream.reply(wire.Done())

    async def _do_resume(self, stream: Stream, body: wire.Resume) -> None:
        self.env = {**(self.env if body.is_copy else {"HOME": HOME, "E2B_SANDBOX": "true"}), **body.env}
        reply = self.script.resumed(
            wire.Resumed(
                nonce=body.nonce, generation=wire.GENERATION, drift_ns=0, sample=self.script.sample(), home=HOME
            )
        )
        if reply is not None:
            await stream.reply(reply)

    async def _do_continue(self, stream: Stream, body: wire.Continue) -> None:
        await stream.reply(
            wire.Resumed(
                nonce=body.nonce, generation=wire.GENERATION, drift_ns=0, sample=self.script.sample(), home=HOME
            )
        )

    async def _do_getmetrics(self, stream: Stream, body: wire.GetMetrics) -> None:
        await stream.reply(
            wire.Metrics(
                ts=int(time.time()),
                cpu_count=2,
                cpu_used_pct=1.5,
                mem_total=2 << 30,
                mem_used=1 << 29,
                mem_cache=1 << 20,
                disk_total=10 << 30,
                disk_used=1 << 20,
            )
        )

    async def _do_interrupt(self, stream: Stream, body: wire.Interrupt) -> None:
        self.kernel.interrupt()
        await stream.reply(wire.Done())

    async def _do_getstopped(self, stream: Stream, body: wire.GetStopped) -> None:
        await stream.reply(wire.Stopped(is_stopped=False))

    async def _do_restart(self, stream: Stream, body: wire.Restart) -> None:
        await self.kernel.restart()
        await stream.reply(wire.Done())

    # -- programs

    async def _do_spawn(self, stream: Stream, body: wire.Spawn) -> None:
        cwd = posixpath.normpath(posixpath.join(HOME, re.sub("^~(?=/|$)", HOME, body.cwd)))
        if self.files.get(cwd, b"") is not None:
            raise Refused("invalid", f"cwd {body.cwd!r} does not exist")
        if body.user not in ("", "user", "root"):
            raise Refused("invalid", f"there is no user {body.user!r}")
        program = PROGRAMS.get(body.argv[0])
        if program is None:
            raise Refused("cannot_run", f"could not run {body.argv[0]!r}")
        running = self.programs[stream.number] = asyncio.get_running_loop().create_future()
        await stream.event(wire.Started(pid=next(self._pids)))
        working = asyncio.create_task(program(stream, body))
        try:
            waiting = {working, running}
            await asyncio.wait(waiting, timeout=body.timeout_ms / 1000 or None, return_when=asyncio.FIRST_COMPLETED)
            ended = next((each for each in (running, working) if each.done()), None)
        finally:
            await cancel(working)
            del self.programs[stream.number]
        if ended is None:
            await stream.reply(wire.Exited(code=124, signal=9, timed_out=True))
        else:
            code = ended.result()
            await stream.reply(wire.Exited(code=code if code >= 0 else 128 - code, signal=max(-code, 0)))

    async def _do_signal(self, stream: Stream, body: wire.Signal) -> None:
        if body.stream not in self.programs:
            raise Refused("not_found", "the command has ended")
        if not self.programs[body.stream].done():
            self.programs[body.stream].set_result(-body.signal)
        await stream.reply(wire.Done())

    async def _do_resize(self, stream: Stream, body: wire.Resize) -> None:
        if body.stream not in self.programs:
            raise Refused("not_found", "the command has ended")
        await stream.reply(wire.Done())

    async def _do_getuser(self, stream: Stream, body: wire.GetUser) -> None:
        if body.name not in ("user", "root"):
            raise Refused("not_found", f"there is no user {body.name!r}")
        await stream.reply(wire.User(home="/root" if body.name == "root" else "/home/user"))

    # -- files

    def _entry(self, path: str) -> wire.Entry:
        if len(path.encode()) >= wire.MAX_TEXT:
            raise Refused("invalid", "file name too long")
        path = posixpath.normpath(path)
        parent = posixpath.dirname(path)
        if path not in self.files:
            code = "not_directory" if self.files.get(parent) is not None else "not_found"
            raise Refused(code, f"{path}: no such file or directory")
        content = self.files[path]
        return wire.Entry(
            name=posixpath.basename(path) or "/",
            path=path,
            kind="dir" if content is None else "file",
            size=len(content or b""),
            mode=0o755 if content is None else 0o644,
            owner="user",
            group="user",
            modified_ns=time.time_ns(),
        )

    def _make_dirs(self, path: str) -> None:
        if len(path) > 4096:  # Linux knows no longer ones
            raise Refused("invalid", f"{path[:100]}…: the path is too long")
        while path not in self.files:
            self.files[path] = None
            path = posixpath.dirname(path)
        if self.files[path] is not None:
            raise Refused("exists", f"{path}: exists")

    async def _do_stat(self, stream: Stream, body: wire.Stat) -> None:
        await stream.reply(self._entry(body.path))

    async def _do_listdir(self, stream: Stream, body: wire.ListDir) -> None:
        path = posixpath.normpath(body.path)
        if self._entry(path).kind != "dir":
            raise Refused("not_directory", f"{path}: is not a directory")
        names = sorted(posixpath.basename(p) for p in self.files if p != "/" and posixpath.dirname(p) == path)
        start = bisect_right(names, body.after) if body.after else 0
        end = start + min(body.limit or PAGE, PAGE)
        page = [self._entry(posixpath.join(path, name)) for name in names[start:end]]
        await stream.reply(wire.Entries(entries=page, more=end < len(names)))

    async def _do_read(self, stream: Stream, body: wire.Read) -> None:
        entry = self._entry(body.path)
        content = self.files[entry.path]
        if content is None:
            raise Refused("is_directory", f"{entry.path}: is a directory")
        await stream.event(entry)
        await stream.data(content[body.offset : None if body.length < 0 else body.offset + body.length])
        await stream.end()
        await stream.reply(wire.Done())

    async def _do_write(self, stream: Stream, body: wire.Write) -> None:
        path = posixpath.normpath(body.path)
        if self.files.get(path, b"") is None:
            raise Refused("is_directory", f"{path}: is a directory")
        self._make_dirs(posixpath.dirname(path))
        pieces = []
        while (data := await stream.received()) is not None:
            pieces.append(data)
        self.files[path] = b"".join(pieces)
        await stream.reply(self._entry(path))

    async def _do_makedir(self, stream: Stream, body: wire.MakeDir) -> None:
        path = posixpath.normpath(body.path)
        if body.exclusive and path in self.files:
            raise Refused("exists" if self.files[path] is None else "not_directory", f"{path}: exists")
        self._make_dirs(path)
        await stream.reply(self._entry(path))

    async def _do_move(self, stream: Stream, body: wire.Move) -> None:
        source, destination = posixpath.normpath(body.source), posixpath.normpath(body.destination)
        self._entry(source)
        if self.files.get(destination, b"") is None:
            raise Refused("is_directory", f"{destination}: is a directory")
        self._make_dirs(posixpath.dirname(destination))
        for path in [p for p in self.files if p == source or p.startswith(source + "/")]:
            self.files[destination + path[len(source) :]] = self.files.pop(path)
        await stream.reply(self._entry(destination))

    async def _do_delete(self, stream: Stream, body: wire.Delete) -> None:
        gone = self._entry(body.path).path
        for path in [p for p in self.files if p == gone or p.startswith(gone + "/")]:
            del self.files[path]
        await stream.reply(wire.Done())


# -- programs: each gets its stream and request and returns its exit status, -N for signal N


async def _true(stream: Stream, body: wire.Spawn) -> int:
    return 0


async def _false(stream: Stream, body: wire.Spawn) -> int:
    return 1


async def _echo(stream: Stream, body: wire.Spawn) -> int:
    await stream.data(" ".join(body.argv[1:]).encode() + b"\n", wire.STDOUT)
    return 0


async def _cat(stream: Stream, body: wire.Spawn) -> int:
    while data := await stream.received():
        await stream.data(data, wire.STDOUT)
    return 0


async def _env(stream: Stream, body: wire.Spawn) -> int:
    end = "\0" if "-0" in body.argv else "\n"
    variables = {**stream.guest.env, **body.env}
    await stream.data("".join(f"{k}={v}{end}" for k, v in variables.items()).encode(), wire.STDOUT)
    return 0


async def _sleep(stream: Stream, body: wire.Spawn) -> int:
    await asyncio.sleep(float(body.argv[1]))
    return 0


async def _flood(stream: Stream, body: wire.Spawn) -> int:
    """Print that many megabytes."""
    for _ in range(int(body.argv[1]) * 16):
        await stream.data(PIECE, wire.STDOUT)
    return 0


async def _binary(stream: Stream, body: wire.Spawn) -> int:
    """Print the bytes of the hex argument."""
    await stream.data(bytes.fromhex(body.argv[1]), wire.STDOUT)
    return 0


async def _die(stream: Stream, body: wire.Spawn) -> int:
    """Take the machine down."""
    stream.guest.die("killed by a test")
    await asyncio.sleep(60)
    return 0


async def _sh(stream: Stream, body: wire.Spawn) -> int:
    """The few scripts that tests use."""
    script = body.argv[2]
    if found := re.fullmatch(r"exit (\d+)", script):
        return int(found[1])
    if found := re.fullmatch(r"kill -(\d+) \$\$", script):
        return -int(found[1])
    if found := re.fullmatch(r"echo (\w+)( >&2)?(?:; sleep (\d+))?", script):
        await stream.data(found[1].encode() + b"\n", wire.STDERR if found[2] else wire.STDOUT)
        await asyncio.sleep(float(found[3] or 0))
        return 0
    await stream.data(b"sh: not in the fake's repertoire\n", wire.STDERR)
    return 2


async def _bash(stream: Stream, body: wire.Spawn) -> int:
    """What builds of templates run: COPY and WORKDIR as the scripts do, and a few lines of shell."""
    at = body.argv.index("-c")
    script, files = body.argv[at + 1], stream.guest.files
    if script == recipe.WORKDIR:
        files.setdefault(body.argv[at + 3], None)
    elif script == recipe.COPY:
        archive, source, target, *_ = body.argv[at + 3 :]
        content = files.pop(archive)
        assert content is not None
        with tarfile.open(fileobj=BytesIO(content)) as tar:
            for member in tar:
                if member.isfile():
                    name = posixpath.relpath(member.name, source)
                    if name == ".":
                        name = posixpath.basename(source) if target.endswith("/") else ""
                    found = tar.extractfile(member)
                    assert found is not None
                    files[posixpath.normpath(f"{target}/{name}")] = found.read()
    elif found := re.fullmatch(r"touch (\S+)", script):
        files[posixpath.join(body.cwd, found[1])] = b""
    elif found := re.fullmatch(r"test -e (\S+)", script):
        return int(found[1] not in files)
    elif found := re.fullmatch(r"sleep (\d+)", script):
        await asyncio.sleep(int(found[1]))
    elif found := re.fullmatch(r"echo \$(\w+)", script):
        await stream.data(f"{body.env.get(found[1], '')}\n".encode(), wire.STDOUT)
    elif script == "whoami":
        await stream.data(f"{body.user or 'user'} in {body.cwd}\n".encode(), wire.STDOUT)
    else:
        return await _sh(stream, wire.Spawn(argv=["sh", "-c", script], env={}, cwd=body.cwd))
    return 0


async def _id(stream: Stream, body: wire.Spawn) -> int:
    """Whether there is such a user."""
    if body.argv[-1] in ("user", "root"):
        return 0
    await stream.data(f"id: '{body.argv[-1]}': no such user\n".encode(), wire.STDERR)
    return 1


PROGRAMS: dict[str, Callable[[Stream, wire.Spawn], Awaitable[int]]] = {
    "true": _true, "false": _false, "echo": _echo, "cat": _cat, "env": _env, "sleep": _sleep, "flood": _flood,
    "binary": _binary, "die": _die, "sh": _sh, "/bin/bash": _bash, "id": _id,
}  # fmt: skip


# -- the kernel


NOTHING = memoryview(b'{"code": "", "store_history": false}')


def is_cell(parts: list[memoryview]) -> bool:
    return bool(json.loads(bytes(parts[1])).get("msg_type") == "execute_request")


class FakeKernel:
    """A kernel for a small part of Python: names, + - * /, print, input, display, sleep, os._exit, flood(megabytes).

    Comm messages come back as they were, and other requests get a reply. Control messages do not wait.
    """

    def __init__(self, guest: FakeGuest) -> None:
        self._guest = guest
        self._streams = {number: Stream(guest, number) for number in (wire.KERNEL, wire.KERNEL_CONTROL)}
        self._joiners = {number: wire.MessageJoiner() for number in self._streams}
        self._sending = {number: asyncio.Lock() for number in self._streams}
        self._inputs: asyncio.Queue[str] = asyncio.Queue()
        self._controls: set[asyncio.Task[None]] = set()
        self._cells: asyncio.Queue[list[memoryview]] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())
        self._cell: asyncio.Task[None] | None = None
        self._at: list[memoryview] | None = None  # what it works at
        self._names: dict[str, Any] = {}
        self._count = 0
        self._restarting = self._closing = False
        self.ignores_interrupts = False

    async def frame_received(self, frame: wire.Frame) -> None:
        if frame.type is FrameType.CREDIT:
            self._streams[frame.stream].credit += int.from_bytes(frame.payload, "big")
            self._streams[frame.stream].changed.set()
            return
        parts = self._joiners[frame.stream].receive(frame)
        await self._guest.send(wire.credit(frame.stream, len(frame.payload)))
        if parts is None:
            return
        if bytes(parts[0]) == b"stdin":
            self._inputs.put_nowait(json.loads(bytes(parts[4]))["value"])
        elif bytes(parts[0]) == b"control":
            self._controls.add(task := asyncio.create_task(self._answer("control", parts)))
            task.add_done_callback(self._controls.discard)
        else:
            self._cells.put_nowait(parts)

    def interrupt(self) -> None:
        if self._cell is not None and not self.ignores_interrupts:
            self._cell.cancel()

    async def restart(self) -> None:
        self._restarting = True
        await cancel(self._cell)
        self._restarting = False
        while not self._cells.empty():
            self._cells.get_nowait()
        self._names, self._count = {}, 0
        await self._say("idle", "restarted")

    def frozen(self) -> Callable[["FakeKernel"], None]:
        """What gives another kernel the names, the count and the credit that this one has now.

        What is left of its cells does nothing in the other one, and has its replies.
        """
        at = [] if self._at is None else [self._at]
        left = [[*each[:4], NOTHING] if is_cell(each) else each for each in (*at, *self._cells._queue)]  # type: ignore[attr-defined]
        names, count, credit = dict(self._names), self._count, {n: each.credit for n, each in self._streams.items()}

        def thaw(other: FakeKernel) -> None:
            other._names, other._count = dict(names), count
            for each in left:
                other._cells.put_nowait(each)
            for number, stream in other._streams.items():
                stream.begin_epoch()
                stream.credit = credit[number]

        return thaw

    @property
    def has_ended(self) -> bool:
        return self._closing

    async def close(self) -> None:
        self._closing = True
        await cancel(self._cell, self._task, *self._controls)

    async def _say(self, state: str, reason: str, exit_code: int = 0) -> None:
        status = wire.KernelStatus(state=state, reason=reason, exit_code=exit_code)
        await self._guest.send(wire.encode(FrameType.EVENT, wire.EVENTS, status))

    async def publish(
        self,
        channel: str,
        kind: str,
        parent: bytes | memoryview,
        content: dict[str, Any],
        buffers: list[bytes] | None = None,
    ) -> None:
        """Send one kernel message, within credit."""
        metadata = self._guest.script.reply_metadata if kind == "execute_reply" else b"{}"
        parts = [channel.encode(), self.header(kind), bytes(parent), metadata, json.dumps(content).encode()]
        number = wire.KERNEL_CONTROL if channel == "control" else wire.KERNEL
        async with self._sending[number]:
            while not await self._send_whole(self._streams[number], wire.pack_parts([*parts, *(buffers or [])])):
                pass

    async def _send_whole(self, stream: Stream, message: list[bytes | memoryview]) -> bool:
        """Send a message in one epoch, or return False."""
        epoch = stream.epoch
        for frame in wire.chunk(stream.number, message):
            await stream.wait_for_credit()
            if stream.epoch != epoch:
                return False
            stream.credit -= sum(len(buffer) for buffer in frame[1:])
            await self._guest.send(b"".join(frame), epoch)
        return stream.epoch == epoch

    def begin_epoch(self) -> None:
        """Forget pieces of messages. A message that was being sent is sent again."""
        for stream in self._streams.values():
            stream.begin_epoch()
        self._joiners = {number: wire.MessageJoiner() for number in self._streams}

    def header(self, kind: str) -> bytes:
        """The header of a new message."""
        fields = {"msg_id": os.urandom(8).hex(), "msg_type": kind, "session": "fake", "username": "fake"}
        return json.dumps({**fields, "version": "5.4", "date": "2026-01-01T00:00:00.000000Z"}).encode()

    async def _run(self) -> None:
        while True:
            self._at = None
            self._at = parts = await self._cells.get()
            if not is_cell(parts):
                await self._answer("shell", parts)
                continue
            self._cell = asyncio.create_task(self._execute(parts[1], json.loads(bytes(parts[4]))))
            # The cell is not awaited itself, because a cancelled cell must not look like our own end.
            await asyncio.wait([self._cell])

    async def _answer(self, channel: str, parts: list[memoryview]) -> None:
        """Answer a message that is no cell. A comm message comes back, a request gets a reply."""
        parent, content = parts[1], json.loads(bytes(parts[4]))
        kind = str(json.loads(bytes(parent)).get("msg_type"))
        with suppress(OSError):  # the machine was killed
            await self.publish("iopub", "status", parent, {"execution_state": "busy"})
            if kind in ("comm_open", "comm_msg"):
                await self.publish("iopub", "comm_msg", parent, content, [bytes(part) for part in parts[5:]])
            elif kind.endswith("_request"):
                if kind == "interrupt_request":
                    self.interrupt()
                reply = {**REPLIES.get(kind, {}), **content, "status": "ok"}
                await self.publish(channel, kind.removesuffix("_request") + "_reply", parent, reply)
            await self.publish("iopub", "status", parent, {"execution_state": "idle"})

    async def _execute(self, parent: memoryview, request: dict[str, Any]) -> None:
        self._count += bool(request.get("store_history", True))
        count = {"execution_count": self._count}
        await self.publish("iopub", "status", parent, {"execution_state": "busy"})
        await self.publish("iopub", "execute_input", parent, {"code": request["code"], **count})
        status = "ok"
        try:
            await self._interpret(request["code"], parent)
        except asyncio.CancelledError:
            if self._restarting or self._closing:
                raise
            status = await self._error(parent, "KeyboardInterrupt", "")
        except OSError:
            return  # the machine was killed
        except Exception as error:  # noqa: BLE001  a cell may raise anything
            status = await self._error(parent, type(error).__name__, str(error))
        await self.publish("shell", "execute_reply", parent, {"status": status, **count})
        await self.publish("iopub", "status", parent, {"execution_state": "idle"})

    async def _error(self, parent: memoryview, name: str, value: str) -> str:
        content = {"ename": name, "evalue": value, "traceback": [f"{name}: {value}"]}
        await self.publish("iopub", "error", parent, content)
        return "error"

    async def _interpret(self, code: str, parent: memoryview) -> None:
        for statement in ast.parse(code).body:
            match statement:
                case ast.Import() | ast.ImportFrom():
                    pass
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self._names[name] = await self._value(value, parent)
                case ast.Expr(value=value):
                    found = await self._value(value, parent)
                    if found is not None:
                        data = {"data": {"text/plain": repr(found)}, "metadata": {}, "execution_count": self._count}
                        await self.publish("iopub", "execute_result", parent, data)
                case _:
                    raise NotImplementedError(ast.unparse(statement))

    async def _value(self, node: ast.expr, parent: memoryview) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                if name not in self._names:
                    raise NameError(f"name {name!r} is not defined")
                return self._names[name]
            case ast.Dict(keys=keys, values=values):
                pairs = zip(keys, values, strict=True)
                return {await self._value(k, parent): await self._value(v, parent) for k, v in pairs if k}
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](await self._value(left, parent), await self._value(right, parent))
            case ast.Call(func=func, args=args):
                return await self._call(ast.unparse(func), [await self._value(a, parent) for a in args], parent)
        raise NotImplementedError(ast.unparse(node))

    async def _call(self, name: str, args: list[Any], parent: memoryview) -> Any:
        match name:
            case "print":
                text = " ".join(map(str, args)) + "\n"
                await self.publish("iopub", "stream", parent, {"name": "stdout", "text": text})
            case "input":
                await self.publish("stdin", "input_request", parent, {"prompt": "".join(args), "password": False})
                return await self._inputs.get()
            case "display":
                await self.publish("iopub", "display_data", parent, {"data": args[0], "metadata": {}})
            case "note":
                self._guest.script.notes.append(args[0])
            case "time.sleep":
                await self._sleep(args[0])
            case "os._exit":
                await self._say("restarting", f"the kernel exited with status {args[0]}", args[0])
                self._names = {}
                await self._say("idle", "restarted")
                await asyncio.sleep(0.05)
            case "flood":
                for _ in range(args[0] * 16):
                    await self.publish("iopub", "stream", parent, {"name": "stdout", "text": PIECE.decode()})
            case "die":
                self._guest.die("killed by a test")
                await asyncio.sleep(60)
            case _:
                raise NameError(f"name {name!r} is not defined")
        return None

    async def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(left)


REPLIES: dict[str, dict[str, Any]] = {
    "kernel_info_request": {
        "protocol_version": "5.4",
        "implementation": "fake",
        "implementation_version": "1",
        "language_info": {"name": "python", "version": "3", "mimetype": "text/x-python", "file_extension": ".py"},
        "banner": "",
        "help_links": [],
    },
    "comm_info_request": {"comms": {}},
    "shutdown_request": {"restart": False},
}

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


# -- the driver


class FakeSlot:
    """A machine's network that only remembers policies, in the order they were applied, and refusals of a test.

    While a test has cleared `may_apply`, applying waits.
    """

    tap = -1

    def __init__(self, script: Script) -> None:
        self.applied: list[Policy] = []
        self.refused: list[Refusal] = []
        self.may_apply = asyncio.Event()
        self.may_apply.set()
        self.is_closed = False
        self._script = script

    async def apply(self, policy: Policy) -> None:
        await self.may_apply.wait()
        self._work()
        self.applied.append(policy)

    async def refusals(self) -> list[Refusal]:
        self._work()
        return self.refused

    def close(self) -> None:
        self.is_closed = True

    def _work(self) -> None:
        if self._script.filter_error is not None:
            raise self._script.filter_error
        if self.is_closed:
            raise DriverError("the network is closed")


@dataclass
class FakeNetwork:
    """The common part of all `FakeSlot`s."""

    mechanism: str = "netns"
    floor: Floor = field(default_factory=Floor)


class FakeVm:
    """One machine. `die` ends it as if by itself."""

    def __init__(self, script: Script, nic: FakeSlot | None = None, guest: FakeGuest | None = None) -> None:
        self.nic = nic
        self.disk_bytes = 0
        self.is_stopped = False
        self._ours, theirs = socket.socketpair()
        self._is_open = False
        theirs.setblocking(False)
        self._theirs = theirs
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.guest = guest or FakeGuest(theirs, script, self.die)
        self.guest.move(theirs, self.die)
        self._task = asyncio.create_task(self.guest.run())

    @property
    def is_alive(self) -> bool:
        return not self._ended.done()

    @property
    def pid(self) -> int:
        return 0

    def open(self) -> socket.socket:
        self._is_open = True
        return self._ours

    async def wait(self) -> str:
        return await asyncio.shield(self._ended)

    def die(self, reason: str) -> None:
        if not self._ended.done():
            self._ended.set_result(reason)
            self._task.cancel()
            if self.nic is not None:
                self.nic.close()
            self._task.add_done_callback(lambda _: self._theirs.close())
            # A dead process's sockets are shut down like this.
            with suppress(OSError):
                self._theirs.shutdown(socket.SHUT_RDWR)

    async def kill(self) -> None:
        self.die("killed")
        with suppress(asyncio.CancelledError):
            await asyncio.shield(asyncio.gather(self._task, return_exceptions=True))
        if not self._is_open:
            self._ours.close()


class StoppableFakeVm(FakeVm):
    """A machine that can stand still, as QEMU's can."""

    async def stop(self) -> None:
        self.is_stopped = True

    async def cont(self) -> None:
        if not self.is_alive:
            raise DriverError("the machine has ended")
        self.is_stopped = False


class FakeDriver:
    """A driver of fake machines. `script` holds for machines started from then on. `machines` are all machines so far.

    Machines have a network card unless `network` is "off" or "host". `has_cards` may say otherwise.
    """

    def __init__(self, *, time_scale: float = 1.0, stops: bool = True, network: str = "off") -> None:
        self.capabilities = Capabilities(isolation="none", accelerator="fake", time_scale=time_scale, network=network)
        self.has_cards = network in ("netns", "passt")
        self.script = Script()
        self.machines: list[FakeVm] = []
        self._kind = StoppableFakeVm if stops else FakeVm

    @property
    def alive(self) -> list[FakeVm]:
        return [vm for vm in self.machines if vm.is_alive]

    async def start(self, source: str) -> FakeVm:
        script = self.script
        await asyncio.sleep(script.start_delay)
        if script.start_error is not None:
            raise script.start_error
        vm = self._kind(script, FakeSlot(script) if self.has_cards else None)
        self.machines.append(vm)
        return vm


class SavingDriver(FakeDriver):
    """A driver whose machines can be saved. What goes on in a saved machine stays in this process.

    `saved` are such machines by the names in their files, also after a restart of the service.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.saved: dict[str, FakeGuest | Callable[[], FakeGuest]] = {}

    async def capture(self, vm: Any, *, goes_on: bool) -> "FakeCaptured":
        await vm.stop()
        await asyncio.sleep(self.script.save_delay)
        if self.script.save_error is not None:
            raise self.script.save_error
        if not vm.is_alive:
            raise DriverError("the machine has ended")
        return FakeCaptured(self, vm.guest, vm.guest.frozen() if goes_on else None)

    async def restore(self, source: "Path | FakeCaptured") -> FakeVm:
        script = self.script
        await asyncio.sleep(script.start_delay)
        if script.start_error is not None:
            raise script.start_error
        make = source.thaw if isinstance(source, FakeCaptured) else self.saved.get((source / "machine").read_text())
        if make is None:
            raise Damaged("it is none of ours")
        guest = make if isinstance(make, FakeGuest) else make()
        vm = StoppableFakeVm(script, FakeSlot(script) if self.has_cards else None, guest)
        vm.guest.script = script
        self.machines.append(vm)
        await vm.stop()
        return vm

    async def close(self) -> None:
        """End what goes on in saved machines."""
        for guest in self.saved.values():
            if isinstance(guest, FakeGuest):
                await guest.end()


class FakeCaptured:
    """A machine as it stood: the guest itself if it does not go on, or else what makes copies of it."""

    def __init__(self, driver: SavingDriver, guest: FakeGuest, thaw: Callable[[], FakeGuest] | None) -> None:
        self.thaw = thaw
        self._driver = driver
        self._guest = guest

    async def size(self) -> int:
        return self._driver.script.save_size + 64 * 1024  # what the server adds to it, too

    async def write(self, directory: Path) -> None:
        if self._driver.script.write_error is not None:
            raise self._driver.script.write_error
        name = os.urandom(8).hex()
        (directory / "machine").write_text(name)
        (directory / "memory").write_bytes(b"m" * self._driver.script.save_size)
        self._driver.saved[name] = self.thaw or self._guest
        self._guest.is_saved = self.thaw is None

    def close(self) -> None:
        pass


async def cancel(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks and wait until they have ended, whatever they raise."""
    others = [task for task in tasks if task is not None and task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


# -- the real application over it


class Service:
    """The real Tornado application on a port of its own, and a client for it."""

    def __init__(self, url: str, app: Application, sandboxes: Sandboxes, store: Store, driver: Any) -> None:
        self.app = app
        self.url = url
        self.port = int(url.rsplit(":", 1)[1])
        self.sandboxes = sandboxes
        self.store = store
        self.driver = driver
        self.key = "e2b_" + "a" * 40
        self.other_key = "sk-sb-of-somebody-else"
        self.owner = store.add_key(self.key, "tests")
        store.add_key(self.other_key, "others")
        self._client = AsyncHTTPClient(force_instance=True, max_clients=400, max_body_size=1 << 30)

    async def call(
        self,
        method: str,
        path: str,
        json: Any = None,
        *,
        body: bytes | None = None,
        key: str | None = "",
        headers: dict[str, str] | None = None,
        timeout: float = 30.0,
        **options: Any,
    ) -> HTTPResponse:
        """Send one request. `json` is encoded, `body` is sent as it is. Without `key` the service's is sent."""
        sent = dict(headers or {})
        if key is not None:
            sent["Authorization"] = f"Bearer {key or self.key}"
        if json is not None:
            body = msgspec.json.encode(json)
        if body is None and method in ("POST", "PUT", "PATCH") and "body_producer" not in options:
            body = b""
        return await self._client.fetch(
            self.url + path,
            method=method,
            body=body,
            headers=sent,
            raise_error=False,
            request_timeout=timeout,
            allow_nonstandard_methods=True,
            **options,
        )

    async def create(self, **fields: Any) -> str:
        """A running sandbox's id."""
        answer = await self.call("POST", "/sandboxes", {"templateID": "code_interpreter", **fields})
        assert answer.code == 201, answer.body
        return str(json.loads(answer.body)["sandboxID"])

    async def run(self, sandbox_id: str, cmd: str, *args: str, **fields: Any) -> Any:
        """The result of a command."""
        answer = await self.call("POST", f"/sandboxes/{sandbox_id}/processes", {"cmd": cmd, "args": args, **fields})
        assert answer.code == 200, answer.body
        return json.loads(answer.body)

    async def execute(self, sandbox_id: str, code: str, **fields: Any) -> Any:
        """The outcome of a cell."""
        answer = await self.call("POST", f"/sandboxes/{sandbox_id}/execute", {"code": code, **fields})
        assert answer.code == 200, answer.body
        return json.loads(answer.body)

    def guest(self, sandbox_id: str) -> FakeGuest:
        """The fake behind a sandbox."""
        return self._vm(sandbox_id).guest

    def slot(self, sandbox_id: str) -> FakeSlot:
        """The fake network of a sandbox."""
        nic = self._vm(sandbox_id).nic
        assert nic is not None
        return nic

    def _vm(self, sandbox_id: str) -> FakeVm:
        vm = self.sandboxes.get(self.owner, sandbox_id).guest.vm
        assert isinstance(vm, FakeVm)
        return vm

    def close(self) -> None:
        self._client.close()


@asynccontextmanager
async def serving(
    directory: Path,
    driver: Any = None,
    *,
    max_sandboxes: int = 4,
    per_owner: int | None = None,
    max_timeout: int = 3600,
    pool_size: int = 0,
    held: Held | None = None,
    creates_per_minute: int = 100_000,
    store: str = "cellvm.db",
    network: FakeNetwork | None = None,
    journals: Path | None = None,
    max_paused: int = 100,
    max_snapshots: int = 100,
    checkpoint_bytes: int = 2 << 30,
    pause_at_close: bool = False,
    **options: Any,
) -> AsyncIterator[Service]:
    """A service for the time of the block. Nothing is left of it afterwards. `options` are the application's."""
    driver = driver or FakeDriver()
    db = Store(directory / store)
    guests = Guests(driver)
    paused = directory / "paused"
    snapshots = directory / "snapshots"
    checkpoints = directory / "checkpoints"
    for folder in (paused, snapshots, checkpoints):
        folder.mkdir(mode=0o700, exist_ok=True)
    pools = {"code_interpreter": Pool(guests, "code_interpreter", pool_size)} if pool_size else {}
    sandboxes = Sandboxes(
        Templates(TEMPLATES),
        guests,
        pools,
        db,
        maximum=max_sandboxes,
        per_owner=per_owner,
        max_timeout=max_timeout,
        held=held,
        creates_per_minute=creates_per_minute,
        network=network,
        journals=journals,
        paused=paused,
        max_paused=max_paused,
        snapshots=snapshots,
        max_snapshots=max_snapshots,
        checkpoints=checkpoints,
        checkpoint_bytes=checkpoint_bytes,
        pause_at_close=pause_at_close,
    )
    app = application(sandboxes, db, **options)
    http = HTTPServer(app, max_body_size=1 << 50, max_header_size=64 * 1024)
    sock, port = bind_unused_port()
    http.add_sockets([sock])
    sandboxes.start()
    service = Service(f"http://127.0.0.1:{port}", app, sandboxes, db, driver)
    try:
        yield service
    finally:
        service.close()
        http.stop()
        await sandboxes.close()
        await http.close_all_connections()
        db.close()


def resident() -> int:
    """Memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def own_frame(kind: FrameType, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """A frame with any payload."""
    return wire.header(kind, stream, len(payload), flags) + payload


async def eventually(check: Callable[[], Any], timeout: float = 30.0) -> None:
    """Return when the check holds, or fail after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < end, "did not come true in time"
        await asyncio.sleep(0.01)


def error_of(answer: HTTPResponse) -> dict[str, Any]:
    """The body of an error, checked against its schema."""
    body = json.loads(answer.body)
    assert set(body) <= {"code", "message", "error", "reason", "hint", "outcome"}, body
    assert body["code"] == answer.code
    assert isinstance(body["message"], str)
    assert body["message"]
    assert re.fullmatch(r"[a-z_]+", body["error"])
    return dict(body)
