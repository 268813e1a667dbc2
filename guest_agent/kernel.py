"""The sandbox's IPython kernel, seen from the agent: start, watch, interrupt, restart, and move its messages.

Messages are moved, not read. The agent keeps the connection's signing key. The gateway gets a message as its channel's
name and the bare parts. One DEALER identity serves shell and stdin, as the Jupyter protocol asks.

Source: https://jupyter-client.readthedocs.io/en/stable/messaging.html (the wire protocol).
"""

import asyncio
import contextlib
import hmac
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from guest_agent import limits, startup, wire
from guest_agent.cells import Cells, word
from guest_agent.channel import AgentError, Channel, Stream
from guest_agent.wire import KernelStatus

DELIMITER = b"<IDS|MSG>"
NUDGE_INTERVAL = 0.02
BURST = 64
"""Messages of one channel that are moved before the other channels have a turn."""
LAST_WORDS = 0.05
"""Seconds that an ended kernel's last messages have to arrive."""
START_TIMEOUT = 120
"""Seconds a kernel may take to answer its first request. They are many because emulated machines are slow."""
AIM_LIMIT = 60.0
"""Seconds that an interrupt waits for its cell to begin."""
AIM_INTERVAL = 0.02
SIGNAL_AGAIN = 0.5
"""Seconds after which a signal is repeated if the kernel has not noticed it. A thread that is about to wait in the
system when a signal comes would wait on."""
PORTS = ("shell", "iopub", "stdin", "control", "hb")
NURSERY = "import sys; sys.path[:] = [{!r}, *filter(None, sys.path)]; from guest_agent.kernel_main import main; main()"
"""What the nursery runs. The user's files in the working directory must not be taken for modules of the kernel's."""


class Connection:
    """The sockets of one running kernel, and the key that signs the messages to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key = uuid.uuid4().hex.encode()
        self.file = directory / "connection.json"
        ports = {f"{name}_port": number for number, name in enumerate(PORTS, 1)}
        info = {"transport": "ipc", "ip": str(directory / "ipc"), "key": self.key.decode()}
        self.file.write_text(json.dumps({**info, **ports, "signature_scheme": "hmac-sha256", "kernel_name": ""}))
        self._context = zmq.Context()
        identity = uuid.uuid4().bytes
        self.sockets = {
            name: self._connect(name, number, identity) for number, name in enumerate(PORTS, 1) if name != "hb"
        }

    def _connect(self, name: str, number: int, identity: bytes) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.SUB if name == "iopub" else zmq.DEALER)
        sock.linger = 0
        # A limit on sending would drop messages. The limit on receiving makes output wait for a slow reader in the
        # kernel's memory, not in ours, because the kernel must end first when memory runs out.
        sock.sndhwm = 0
        sock.rcvhwm = 64
        if name == "iopub":
            sock.subscribe(b"")
        else:
            sock.identity = identity
        # Retry quickly while the kernel has not bound its end yet.
        sock.reconnect_ivl = 5
        sock.connect(f"ipc://{self.directory}/ipc-{number}")
        return sock

    def send(self, channel: str, parts: list[bytes]) -> None:
        """Sign and send one message: header, parent header, metadata, content, buffers."""
        mac = hmac.new(self.key, digestmod="sha256")
        for part in parts[:4]:
            mac.update(part)
        self.sockets[channel].send_multipart([DELIMITER, mac.hexdigest().encode(), *parts])

    def receive(self, channel: str) -> list[bytes] | None:
        """The parts of the next message after identities and signature, or None if no message waits."""
        sock = self.sockets[channel]
        try:
            parts = sock.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        if DELIMITER not in parts:
            return []  # XPUB's subscription notices and the like
        return parts[parts.index(DELIMITER) + 2 :]

    def close(self) -> None:
        self._context.destroy(linger=0)
        shutil.rmtree(self.directory, ignore_errors=True)


def message(kind: str, content: dict[str, Any]) -> tuple[str, list[bytes]]:
    """A message by the agent itself: its id, and its four parts."""
    msg_id = uuid.uuid4().hex
    fields = {"msg_id": msg_id, "msg_type": kind, "session": "agent", "username": "agent", "version": "5.4", "date": ""}
    return msg_id, [json.dumps(part).encode() for part in (fields, {}, {}, content)]


class Lane:
    """The way of kernel messages to the gateway on one stream. At most one message is in pieces at a time."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._message: list[bytes | memoryview] = []
        self._pieces: Iterator[list[bytes | memoryview]] = iter(())
        self._next: list[bytes | memoryview] | None = None

    def put(self, channel: str, parts: list[bytes]) -> None:
        if sum(len(part) for part in parts) > wire.MAX_MESSAGE - 1024 * 1024:
            parts = shortened(parts)
        self._message = wire.pack_parts([channel.encode(), *parts])
        self.begin()

    def begin(self) -> None:
        """Begin to send the message. In a new epoch it begins again, because that epoch's gateway has none of it."""
        self._pieces = wire.chunk(self.stream.number, self._message)
        self._next = next(self._pieces, None)

    def flush(self) -> bool:
        """Send as much as credit allows, and return whether the lane is free for another message."""
        while self._next is not None:
            if self.stream.room <= 0:
                return False
            self.stream.credit -= sum(len(b) for b in self._next[1:])
            self.stream.channel.send_bulk(self._next)
            self._next = next(self._pieces, None)
        self._message = []
        return True


def shortened(parts: list[bytes]) -> list[bytes]:
    """A message that is too large for the wire, with a notice in place of its content."""
    size = sum(len(part) for part in parts)
    notice = f"[{size} bytes of output left out: one message may have at most {wire.MAX_MESSAGE} bytes]"
    kind = json.loads(parts[0]).get("msg_type")
    content: dict[str, Any] = {"data": {"text/plain": notice}, "metadata": {}, "execution_count": None}
    if kind == "stream":
        content = {"name": "stderr", "text": notice + "\n"}
    elif kind in ("error", "execute_reply"):
        content = {"status": "error", "ename": "OutputTooLarge", "evalue": notice, "traceback": []}
    return [*parts[:3], json.dumps(content).encode()]


def oom_kills() -> int:
    """Number of processes that the machine has ended because its memory ran out."""
    return int(dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines()).get("oom_kill", "0"))


class Kernel:
    """One sandbox's kernel. It runs as the user `uid`, or as the agent's user if that is None."""

    def __init__(self, channel: Channel, runtime: Path, uid: int | None) -> None:
        self._channel = channel
        self._runtime = runtime
        self._uid = uid
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = None
        self._cells: Cells | None = None
        self._aiming: asyncio.Task[None] | None = None
        self._pid = 0
        self._count = 0
        self._nursery: asyncio.StreamWriter | None = None
        self._nursery_process: subprocess.Popen[bytes] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._started_with: dict[str, str] = {}
        self._answers: deque[asyncio.Future[dict[str, Any]]] = deque()
        self._own: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._starting = asyncio.Lock()
        self._expected_exit = 0
        self._fresh = 0  # the process id of a kernel that does not answer yet
        self._oom_kills = 0
        self._resumes: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.env: dict[str, str] = {}
        self._bulk = Lane(channel.kernel)
        self._control = Lane(channel.kernel_control)
        channel.kernel.on_credit = channel.kernel_control.on_credit = self._pump
        self._joiners = {wire.KERNEL: wire.MessageJoiner(), wire.KERNEL_CONTROL: wire.MessageJoiner()}
        self._said = KernelStatus(state="idle")

    # -- the nursery

    async def start_nursery(self, modules: list[str]) -> None:
        """Start the process that kernels fork from and let it import `modules`. One before it ends, with its kernel."""
        if self._nursery_process is not None and self._nursery is not None and self._watch is not None:
            self._watch.cancel()
            self._kill()
            self._pid = 0
            self._nursery_process.kill()
            await asyncio.to_thread(self._nursery_process.wait)
            self._nursery.close()
        ours, theirs = socket.socketpair()
        self._started_with = startup.read_once(self.env)
        with limits.limited_to(limits.FOR_KERNELS) if self._uid is not None else contextlib.nullcontext():
            self._nursery_process = subprocess.Popen(
                [sys.executable, "-c", NURSERY.format(str(Path(__file__).parent.parent)), str(theirs.fileno())],
                # A kernel adds PYTHONPATH for its user's modules. Its own come from where they are installed.
                env={name: value for name, value in self.env.items() if name != "PYTHONPATH"},
                cwd=self.env["HOME"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                user=self._uid,
                group=self._uid,
                extra_groups=None if self._uid is None else [],
            )
        theirs.close()
        reader, self._nursery = await asyncio.open_connection(sock=ours)
        self._watch = asyncio.ensure_future(self._watch_nursery(reader))
        await self._ask_nursery(warm=modules)

    async def _is_nursery_current(self) -> bool:
        """Whether a fork of the nursery is what a freshly started interpreter would be."""
        if self._nursery_process is None or self._nursery_process.poll() is not None:
            return False
        if self._started_with != startup.read_once(self.env):
            return False
        return bool((await self._ask_nursery(is_current=self.env))["current"])

    async def _ask_nursery(self, **request: Any) -> dict[str, Any]:
        assert self._nursery is not None
        answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._answers.append(answer)
        self._nursery.write(json.dumps(request).encode() + b"\n")
        return await answer

    async def _watch_nursery(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            told = json.loads(line)
            if "exited" in told:
                self._exited(told["exited"], told["status"])
            else:
                self._answers.popleft().set_result(told)
        while self._answers:
            self._answers.popleft().set_exception(AgentError("kernel_unavailable", "the kernel's parent has died"))
        self._pid = 0
        self._say("dead", "the process that kernels are forked from has died")

    # -- life

    @property
    def is_running(self) -> bool:
        return self._connection is not None

    async def start(self) -> None:
        """Fork a kernel and return when it answers and its output arrives."""
        async with self._starting:
            await self._start()

    async def _start(self) -> None:
        if not await self._is_nursery_current():
            await self.start_nursery([])
        self._disconnect()
        self._count += 1
        directory = self._runtime / f"{self._count}"
        try:
            directory.mkdir(mode=0o700, parents=True)
            cells = Cells.create(directory / "cells")
            connection = Connection(directory)
        except OSError as error:  # as when /run is full
            shutil.rmtree(directory, ignore_errors=True)
            raise AgentError("kernel_unavailable", f"the kernel could not be started: {error}") from error
        joined: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = self._loop.create_future()
        server = await asyncio.start_unix_server(lambda *ends: joined.set_result(ends), directory / "resume")
        self._oom_kills = oom_kills()
        self._pid = self._fresh = (await self._ask_nursery(fork=str(connection.file), env=self.env))["pid"]
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await self._nudge(connection)
                self._resumes = await joined
        except BaseException as error:
            connection.close()
            self._kill()
            if isinstance(error, TimeoutError):
                raise AgentError("kernel_unavailable", f"the kernel did not start within {START_TIMEOUT} s") from None
            raise
        finally:
            server.close()
            self._fresh = 0
        self._connection, self._cells = connection, cells
        for name, sock in connection.sockets.items():
            self._loop.add_reader(int(sock.fd), self._pump, name)
        self._pump()

    async def _nudge(self, connection: Connection) -> None:
        """Ask until both a reply and published output have come back, because only then are all sockets joined."""
        waiting = published = False
        while waiting or not published:
            if not self._pid:
                raise AgentError("kernel_unavailable", "the kernel ended while it was starting")
            if not waiting:  # one question at a time, because a queue would keep a slow machine busy for seconds
                connection.send("shell", message("kernel_info_request", {})[1])
                waiting = True
            await asyncio.sleep(NUDGE_INTERVAL)
            while (parts := connection.receive("iopub")) is not None:
                published = published or bool(parts)
            while parts := connection.receive("shell"):
                waiting = False
        while True:  # read the answers that are still on their way
            await asyncio.sleep(NUDGE_INTERVAL)
            left = [name for name in ("shell", "iopub") if connection.receive(name) is not None]
            if not left:
                return

    def _disconnect(self) -> None:
        if self._aiming is not None:
            self._aiming.cancel()
            self._aiming = None
        self._cells = None  # its page in /run is free for the next kernel then, even if /run is full
        if self._connection is not None:
            for sock in self._connection.sockets.values():
                self._loop.remove_reader(int(sock.fd))
            self._connection.close()
            self._connection = None
        if self._resumes is not None:
            self._resumes[1].close()
            self._resumes = None
        for waiting in self._own.values():
            waiting.set_exception(AgentError("kernel_unavailable", "the kernel has ended"))
        self._own.clear()

    def _kill(self) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)

    async def answer(self, body: wire.Interrupt | wire.GetStopped | wire.Restart) -> wire.Done | wire.Stopped:
        """Answer one request about the kernel."""
        match body:
            case wire.Interrupt():
                self.interrupt(body.target)
            case wire.GetStopped():
                return wire.Stopped(is_stopped=self.has_stopped(body.target))
            case wire.Restart():
                await self.restart()
        return wire.Done()

    async def restart(self) -> None:
        """Kill the kernel with all its children and start another. Its variables are lost."""
        async with self._starting:
            self._expected_exit = self._pid
            self._kill()
            await self._start()
        self._say("idle", "restarted")

    def interrupt(self, target: str) -> None:
        """Interrupt the cell of that message id, now or when it begins, and no other; without an id, what runs now.

        Nothing is done to a kernel that is starting, because nobody's code runs in it.
        """
        if self._connection is None or self._cells is None:
            return
        if self._aiming is not None:
            self._aiming.cancel()
        if target:
            self._aiming = asyncio.ensure_future(self._aim(self._cells, word(target)))
        else:
            self._signal()

    def has_stopped(self, target: str) -> bool:
        """Whether the code of the cell of that message id is over by an error."""
        return self._cells is not None and self._cells.stopped == word(target)

    async def _aim(self, cells: Cells, target: int) -> None:
        """Wait until the kernel is in the cell `target`, then signal until it has noticed, twice at most."""
        until = self._loop.time() + AIM_LIMIT
        while (running := cells.running) != target:
            if running or cells.ended == target or self._loop.time() > until:
                return  # the cell is over, because cells run in order, or it never came
            await asyncio.sleep(AIM_INTERVAL)
        cells.expect_signal()
        self._signal()
        await asyncio.sleep(SIGNAL_AGAIN)
        if cells.running == target and cells.interrupted != target:
            self._signal()

    def _signal(self) -> None:
        """Send SIGINT to the kernel and its children. Id 0, after the kernel has ended, would be our own group."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGINT)

    def _exited(self, pid: int, status: int) -> None:
        """Say why a kernel has ended and start another, unless somebody waits for its end or its start."""
        if pid != self._pid:
            return
        self._pid = 0
        if pid == self._expected_exit or pid == self._fresh:
            return
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = 128 + number if number else os.waitstatus_to_exitcode(status)
        reason = f"ended by {signal.Signals(number).name}" if number else f"exited with status {code}"
        if number == signal.SIGKILL and oom_kills() > self._oom_kills:
            reason = "ended because the sandbox ran out of memory"
        told = f"the kernel was {reason}" if number else f"the kernel {reason}"
        self._restarting = asyncio.ensure_future(self._replace(told, code, number))

    async def _replace(self, reason: str, code: int, number: int) -> None:
        await asyncio.sleep(LAST_WORDS)  # its last messages are still on their way through ZMQ
        self._pump()
        async with self._starting:
            if self._pid:
                return  # the gateway asked for another kernel meanwhile
            self._say("restarting", reason, code, number)
            try:
                await self._start()
            except AgentError as error:
                self._say("dead", str(error))
            else:
                self._say("idle", "restarted")

    def _say(self, state: str, reason: str = "", exit_code: int = 0, number: int = 0) -> None:
        self._said = KernelStatus(state=state, reason=reason, exit_code=exit_code, signal=number)
        self._channel.events.event(self._said)

    # -- messages

    def epoch_begun(self) -> None:
        """Begin anew with a gateway that knows nothing. It takes a kernel for idle that it is not told of."""
        self._joiners = {wire.KERNEL: wire.MessageJoiner(), wire.KERNEL_CONTROL: wire.MessageJoiner()}
        for lane in (self._bulk, self._control):
            lane.begin()
        if self._said.state != "idle":
            self._channel.events.event(self._said)

    def data_received(self, frame: wire.Frame) -> None:
        """Take a piece of a message from the gateway."""
        stream = self._channel.streams[frame.stream]
        stream.take(len(frame.payload))
        parts = self._joiners[frame.stream].receive(frame)
        if parts is None or self._connection is None:
            return
        channel = parts[0].decode("ascii", "replace")
        if channel in self._connection.sockets and channel != "iopub":
            self._connection.send(channel, parts[1:])
            self._pump(channel)

    def _pump(self, *names: str) -> None:
        """Move messages that wait on these channels (default: on all) towards the gateway while there is credit.

        Callers name channels because asking an empty socket costs as much as taking a message.
        """
        if (connection := self._connection) is None:
            return
        for name in names or ("control", "iopub", "shell", "stdin"):
            lane = self._control if name == "control" else self._bulk
            for _ in range(BURST):
                if connection is not self._connection or not self._move(connection, name, lane):
                    break
            else:
                self._loop.call_soon(self._pump)  # the other channels have a turn before that

    def _move(self, connection: Connection, name: str, lane: Lane) -> bool:
        if not lane.flush():
            return False
        parts = connection.receive(name)
        if parts is None:
            return False
        if parts and not (name == "shell" and self._is_own(parts)):
            lane.put(name, parts)
            lane.flush()
        return True

    # -- the agent's own requests

    def _is_own(self, parts: list[bytes]) -> bool:
        if b'"agent"' not in parts[1] or not self._own:
            return False
        waiting = self._own.pop(json.loads(parts[1]).get("msg_id"), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(json.loads(parts[3]))
        return waiting is not None

    async def execute(self, code: str) -> dict[str, Any]:
        """Run `code` outside the user's history, and return the content of the reply."""
        if self._connection is None:
            raise AgentError("kernel_unavailable", "the kernel is not running")
        content = {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
        msg_id, parts = message("execute_request", content)
        answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._own[msg_id] = answer
        self._connection.send("shell", parts)
        self._pump("shell")
        return await answer

    async def resume(self, added: dict[str, str] | None = None) -> None:
        """Make the kernel's random state, session and environment the sandbox's own.

        The kernel is replaced if its process must have been started with that environment.

        Args:
            added: the kernel is a copy of one at work, and goes on, if there is one. These variables are added to its
                environment, which its user may have changed.
        """
        if added is not None and self._resumes is None:
            return
        if added is None and self._started_with != startup.read_once(self.env):
            self._expected_exit = self._pid
            await self.start()
        if self._resumes is None:
            raise AgentError("kernel_unavailable", "the kernel is not running")
        reader, writer = self._resumes
        writer.write(json.dumps([self.env, added]).encode() + b"\n")
        if not await reader.readline() and added is None:  # a copy's kernel may end at any moment, as any kernel
            raise AgentError("kernel_unavailable", "the kernel ended while it was being resumed")
