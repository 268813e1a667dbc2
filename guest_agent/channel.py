"""The agent's end of the wire: frames in and out over one file descriptor, with two lanes and credit.

Outgoing frames wait in two lanes. Small frames go to the urgent lane. DATA goes to the bulk lane, which holds at most
BULK_LIMIT bytes. The writer prefers the urgent lane, so a reply or an interrupt's answer waits for one chunk at most,
however much output is under way.
"""

import asyncio
import io
import os
from collections import deque
from collections.abc import Awaitable, Callable

from guest_agent import wire
from guest_agent.wire import Body, Failure, Frame, FrameType

BULK_LIMIT = 1024 * 1024

Buffers = list[bytes | memoryview]


class AgentError(Exception):
    """A request can't be done. `code` is one of wire.FAILURES, the text is for the user."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Stream:
    """One conversation with the gateway.

    `credit` is how many DATA bytes we may still send. `receive` hands out the gateway's DATA and grants credit for it.
    """

    def __init__(self, channel: "Channel", number: int) -> None:
        self.channel = channel
        self.number = number
        self.credit = wire.INITIAL_CREDIT
        self.cancelled = asyncio.Event()
        self.on_credit: Callable[[], None] = lambda: None
        self._incoming: deque[bytes | None] = deque()
        self._arrived = asyncio.Event()
        self._owed = 0
        self._has_sent_data = False
        self._may_send = asyncio.Event()

    def reply(self, body: Body) -> None:
        self._send(wire.encode(FrameType.REPLY, self.number, body))

    def event(self, body: Body) -> None:
        self._send(wire.encode(FrameType.EVENT, self.number, body))

    def fail(self, code: str, message: str) -> None:
        self._send(wire.encode(FrameType.FAILURE, self.number, Failure(code=code, message=message[:8000])))

    def _send(self, frame: bytes) -> None:
        """Send a frame as urgent, unless it would overtake this stream's own DATA."""
        if self._has_sent_data:
            self.channel.send_bulk([frame])
        else:
            self.channel.send(frame)

    def send_now(self, data: bytes | memoryview, flags: int = 0) -> None:
        """Queue DATA of at most CHUNK bytes. The caller has checked that there is `room`."""
        self.credit -= len(data)
        self._has_sent_data = True
        self.channel.send_bulk([wire.header(FrameType.DATA, self.number, len(data), flags), data])

    @property
    def room(self) -> int:
        """How many bytes `send_now` may queue at this moment."""
        return min(self.credit, wire.CHUNK) if self.channel.has_room else 0

    async def wait_for_room(self) -> None:
        """Return when there is room, or when the stream was cancelled."""
        while self.room <= 0 and not self.cancelled.is_set():
            self._may_send.clear()
            await self._may_send.wait()

    def end(self, flags: int = 0) -> None:
        """Say that no more DATA follows on this sub-channel after the queued frames."""
        self.channel.send_bulk([wire.header(FrameType.END, self.number, 0, flags)])

    async def receive(self) -> bytes | None:
        """The next DATA payload, or None at its END (or when the stream was cancelled)."""
        while not self._incoming:
            if self.cancelled.is_set():
                return None
            self._arrived.clear()
            await self._arrived.wait()
        data = self._incoming.popleft()
        if data is not None:
            self.take(len(data))
        return data

    def take(self, amount: int) -> None:
        """Count received bytes that are dealt with, and grant credit for them when they make a CHUNK."""
        self._owed += amount
        if self._owed >= wire.CHUNK:
            self.channel.send(wire.credit(self.number, self._owed))
            self._owed = 0

    def raise_if_cancelled(self) -> None:
        """Raise an AgentError if the gateway does not want the reply any more. Any thread may call it."""
        if self.cancelled.is_set():
            raise AgentError("failed", "cancelled")

    # -- called by the channel

    def data_received(self, data: bytes | None) -> None:
        self._incoming.append(data)
        self._arrived.set()

    def credit_received(self, amount: int) -> None:
        self.credit += amount
        self.room_changed()

    def room_changed(self) -> None:
        self._may_send.set()
        self.on_credit()

    def cancel_received(self) -> None:
        self.cancelled.set()
        self._arrived.set()
        self._may_send.set()


class Channel:
    """Frames in and out on `fd`, which must support polling.

    `dispatch` runs for each REQUEST. `kernel_data` gets the DATA frames of the two kernel streams.
    """

    def __init__(
        self,
        fd: int,
        dispatch: Callable[[Stream, Body], Awaitable[None]],
        kernel_data: Callable[[Frame], None],
    ) -> None:
        self._fd = fd
        self._raw = io.FileIO(fd, "rb", closefd=False)
        self._dispatch = dispatch
        self._kernel_data = kernel_data
        self._decoder = wire.Decoder()
        self._urgent: deque[Buffers] = deque()
        self._bulk: deque[Buffers] = deque()
        self._bulk_size = 0
        self._current: deque[memoryview] = deque()
        self._writing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.kernel = Stream(self, wire.KERNEL)
        self.kernel_control = Stream(self, wire.KERNEL_CONTROL)
        self.events = Stream(self, wire.EVENTS)
        self.streams = {s.number: s for s in (self.kernel, self.kernel_control, self.events)}
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._readable)

    # -- out

    @property
    def has_room(self) -> bool:
        return self._bulk_size < BULK_LIMIT

    def send(self, frame: bytes) -> None:
        self._urgent.append([frame])
        self._write()

    def send_bulk(self, frame: Buffers) -> None:
        self._bulk.append(frame)
        self._bulk_size += sum(len(buffer) for buffer in frame)
        self._write()

    def _write(self) -> None:
        """Write until the port is full. A frame is finished before another one begins."""
        had_room = self.has_room
        while True:
            if not self._current:
                if self._urgent:
                    frame = self._urgent.popleft()
                elif self._bulk:
                    frame = self._bulk.popleft()
                    self._bulk_size -= sum(len(buffer) for buffer in frame)
                else:
                    if self._writing:
                        self._writing = False
                        self._loop.remove_writer(self._fd)
                    break
                self._current.append(memoryview(b"".join(frame)))
            try:
                written = os.write(self._fd, self._current[0])
            except BlockingIOError:
                if not self._writing:
                    self._writing = True
                    self._loop.add_writer(self._fd, self._write)
                break
            except OSError as error:
                self._close(error)
                break
            rest = self._current.popleft()[written:]
            if rest:
                self._current.appendleft(rest)
        self._tell_room(had_room)

    def _tell_room(self, had_room: bool) -> None:
        if not had_room and self.has_room:
            for stream in list(self.streams.values()):
                stream.room_changed()

    # -- in

    def _readable(self) -> None:
        # A virtio port gives a page a read. `readall` loops over the pages in C until none is left. This ends, because
        # the gateway may send only as much as we have granted credit for.
        try:
            data = self._raw.readall()
        except OSError as error:
            self._close(error)
            return
        if data is None:
            return
        if not data:
            self._close(None)
            return
        self._decoder.receive_data(data)
        try:
            for frame in self._decoder.frames():
                self._receive(frame)
        except wire.FrameError as error:
            self._close(error)

    def _receive(self, frame: Frame) -> None:
        if frame.type is FrameType.REQUEST:
            stream = self.streams[frame.stream] = Stream(self, frame.stream)
            task = asyncio.ensure_future(self._answer(stream, wire.decode(frame)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif frame.stream in (wire.KERNEL, wire.KERNEL_CONTROL) and frame.type is FrameType.DATA:
            self._kernel_data(frame)
        elif (target := self.streams.get(frame.stream)) is not None:  # otherwise its conversation has ended already
            self._receive_in(target, frame)

    def _receive_in(self, target: Stream, frame: Frame) -> None:
        if frame.type is FrameType.DATA:
            target.data_received(frame.payload)
        elif frame.type is FrameType.END:
            target.data_received(None)
        elif frame.type is FrameType.CREDIT:
            target.credit_received(int.from_bytes(frame.payload, "big"))
        elif frame.type is FrameType.CANCEL:
            target.cancel_received()

    async def _answer(self, stream: Stream, body: Body) -> None:
        try:
            await self._dispatch(stream, body)
        except AgentError as error:
            stream.fail(error.code, str(error))
        except Exception as error:  # noqa: BLE001  the gateway gets an answer in any case
            stream.fail("failed", f"{type(error).__name__}: {error}")
        finally:
            del self.streams[stream.number]

    def _close(self, error: Exception | None) -> None:
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        for stream in self.streams.values():
            stream.cancel_received()
        if not self.closed.done():
            if error is None:
                self.closed.set_result(None)
            else:
                self.closed.set_exception(error)
