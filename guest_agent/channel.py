"""The agent's end of the wire: frames in and out over one file descriptor, with two lanes and credit.

Outgoing frames wait in two lanes. Small frames go to the urgent lane. DATA goes to the bulk lane, which holds at most
BULK_LIMIT bytes. The writer prefers the urgent lane, so a reply or an interrupt's answer waits for one chunk at most,
however much output is under way.

When the gateway asks for rest, nobody has room for more DATA. The lanes are written to their end, and Quiesced is the
last frame. From then on frames wait until the gateway lets the link go on, or begins a new epoch without them.
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
        self._is_dropped = False
        self._incoming: deque[bytes | None] = deque()
        self._arrived = asyncio.Event()
        self._owed = 0
        self._has_sent_data = False
        self._may_send = asyncio.Event()

    def reply(self, body: Body) -> None:
        self._send_body(FrameType.REPLY, body)

    def event(self, body: Body) -> None:
        self._send_body(FrameType.EVENT, body)

    def fail(self, code: str, message: str) -> None:
        self._send_body(FrameType.FAILURE, Failure(code=code, message=message[:8000]))

    def _send_body(self, type_: FrameType, body: Body) -> None:
        """Send a body as urgent, unless it would overtake this stream's own DATA."""
        self._send([wire.encode(type_, self.number, body)], is_bulk=self._has_sent_data)

    def _send(self, frame: Buffers, *, is_bulk: bool) -> None:
        if self._is_dropped:
            return
        if is_bulk:
            self.channel.send_bulk(frame)
        else:
            self.channel.send(frame)

    def send_now(self, data: bytes | memoryview, flags: int = 0) -> None:
        """Queue DATA of at most CHUNK bytes. The caller has checked that there is `room`."""
        self.credit -= len(data)
        self._has_sent_data = True
        self._send([wire.header(FrameType.DATA, self.number, len(data), flags), data], is_bulk=True)

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
        self._send([wire.header(FrameType.END, self.number, 0, flags)], is_bulk=True)

    async def receive(self) -> bytes | None:
        """The next DATA payload, or None from its END on (or when the stream was cancelled)."""
        while not self._incoming:
            if self.cancelled.is_set():
                return None
            self._arrived.clear()
            await self._arrived.wait()
        data = self._incoming[0]
        if data is not None:
            del self._incoming[0]
            self.take(len(data))
        return data

    async def receive_many(self, size: int) -> list[bytes]:
        """DATA payloads that have `size` bytes or more together, or what is left until the END."""
        found: list[bytes] = []
        while size > 0 and (data := await self.receive()) is not None:
            found.append(data)
            size -= len(data)
        return found

    def take(self, amount: int) -> None:
        """Count received bytes that are dealt with, and grant credit for them when they make a CHUNK."""
        self._owed += amount
        if self._owed >= wire.CHUNK:
            self._send([wire.credit(self.number, self._owed)], is_bulk=False)
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

    def drop(self) -> None:
        """Cancel the conversation, and send nothing of it any more, because its epoch is over."""
        self._is_dropped = True
        self.cancel_received()

    def begin_epoch(self) -> None:
        """Begin a kernel's stream anew."""
        self.credit = wire.INITIAL_CREDIT
        self._owed = 0


class Channel:
    """Frames in and out on `fd`, which must support polling.

    `dispatch` runs for each REQUEST. `kernel_data` gets the DATA frames of the two kernel streams. `epoch_begun` is
    called when a new epoch has begun.
    """

    def __init__(
        self,
        fd: int,
        dispatch: Callable[[Stream, Body], Awaitable[None]],
        kernel_data: Callable[[Frame], None],
        epoch_begun: Callable[[], None],
    ) -> None:
        self._fd = fd
        self._raw = io.FileIO(fd, "rb", closefd=False)
        self._dispatch = dispatch
        self._kernel_data = kernel_data
        self._epoch_begun = epoch_begun
        self._decoder = wire.Decoder()
        self._urgent: deque[Buffers] = deque()
        self._bulk: deque[Buffers] = deque()
        self._bulk_size = 0
        self._current: deque[memoryview] = deque()
        self._writing = False
        self._epoch = -1
        self._is_quiescing = False
        self._is_quiet = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.kernel = Stream(self, wire.KERNEL)
        self.kernel_control = Stream(self, wire.KERNEL_CONTROL)
        self.events = Stream(self, wire.EVENTS)
        self.streams = self._fixed_streams()
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._readable)

    def _fixed_streams(self) -> dict[int, Stream]:
        return {stream.number: stream for stream in (self.kernel, self.kernel_control, self.events)}

    # -- out

    @property
    def has_room(self) -> bool:
        return not self._is_quiescing and self._bulk_size < BULK_LIMIT

    def send(self, frame: Buffers) -> None:
        self._urgent.append(frame)
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
                frame = self._next_frame()
                if frame is None:
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

    def _next_frame(self) -> Buffers | None:
        if self._is_quiet:
            return None
        if self._urgent:
            return self._urgent.popleft()
        if self._bulk:
            frame = self._bulk.popleft()
            self._bulk_size -= sum(len(buffer) for buffer in frame)
            return frame
        if self._is_quiescing:
            self._is_quiet = True
            return [wire.encode(FrameType.REPLY, wire.LINK, wire.Quiesced())]
        return None

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
            self._receive_request(frame.stream, wire.decode(frame))
        elif frame.stream in (wire.KERNEL, wire.KERNEL_CONTROL) and frame.type is FrameType.DATA:
            self._kernel_data(frame)
        elif (target := self.streams.get(frame.stream)) is not None:  # otherwise its conversation has ended already
            self._receive_in(target, frame)

    def _receive_request(self, number: int, body: Body) -> None:
        if isinstance(body, wire.Hello):
            if body.epoch != self._epoch:
                self._begin_epoch(body.epoch)
        elif isinstance(body, wire.Quiesce):
            self._is_quiescing = True
            self._write()
        else:
            if isinstance(body, wire.Resume | wire.Continue):
                self._end_rest()
            stream = self.streams[number] = Stream(self, number)
            task = asyncio.ensure_future(self._answer(stream, body))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _begin_epoch(self, epoch: int) -> None:
        """Drop all that is of the epoch before. Only the frame that is being written is finished."""
        self._epoch = epoch
        for stream in self.streams.values():
            if stream.number >= wire.FIRST_STREAM:
                stream.drop()
        self.streams = self._fixed_streams()
        self.kernel.begin_epoch()
        self.kernel_control.begin_epoch()
        self._urgent.clear()
        self._bulk.clear()
        self._bulk_size = 0
        self._urgent.append([wire.encode(FrameType.REPLY, wire.LINK, wire.Welcome(epoch=epoch))])
        self._epoch_begun()
        self._end_rest()

    def _end_rest(self) -> None:
        self._is_quiescing = self._is_quiet = False
        self._tell_room(had_room=False)
        self._write()

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
            if self.streams.get(stream.number) is stream:  # otherwise its epoch is over
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
