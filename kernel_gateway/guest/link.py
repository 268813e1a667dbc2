"""The gateway's end of the wire: an asyncio shell round `guest_agent.wire`.

The guest is hostile. The decoder checks every number and length. Ids are ours. A frame that nobody asked for is
counted, and after STRIKES of them the link is closed. The guest gets credit only as consumers read, so a flood fills
its buffers, not ours. Writing waits while the guest does not read. A guest that reads nothing for WRITE_DEADLINE
seconds is given up.

A link at rest (`quiesce`) sends nothing, so that its machine may be stopped and saved. Requests and DATA wait with
their senders. Only END, CREDIT and CANCEL are kept here. They are few, because a conversation has at most one END for
each sub-channel, one CANCEL, and CREDIT for what it had received before.
"""

import asyncio
import itertools
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import msgspec

from guest_agent import wire
from guest_agent.wire import Body, Failure, Frame, FrameType
from kernel_gateway.errors import Conflict, GuestFailure, GuestUnresponsive, InvalidRequest, SandboxDied, TooLarge

STRIKES = 100
MAX_CANCELLED = 1000
"""Cancelled conversations that the guest has not answered yet. A guest with more of them is given up."""
EVENTS_PER_CONVERSATION = 4
SMALL = 2048
"""Pieces of DATA below this many bytes are joined while they wait."""
FLOOD_WINDOW, FLOOD_READS, FLOOD_PAUSE = 0.02, 40, 0.004
"""More than FLOOD_READS small reads in FLOOD_WINDOW seconds are a flood. Reading then pauses for FLOOD_PAUSE seconds at
a time."""
TURN = 0.0003
"""Seconds for which one link may handle frames before everybody else has a turn. The rest of its frames waits."""
EVENTS, EVENTS_INTERVAL = 100, 10.0
"""Number of events that a guest may send unasked in so many seconds. A kernel that ends again and again makes few."""
WRITE_BUFFER = 1024 * 1024
WRITE_DEADLINE = 10.0
"""Seconds the guest may leave our bytes unread, times the driver's time scale."""
SETTLING = 5.0
"""Seconds that a message on its way to the kernel may take before a rest, times the driver's time scale."""

T = TypeVar("T", bound=Body)


class Joiner(wire.MessageJoiner):
    """A joiner that tells what it has of a message which is not whole."""

    @property
    def pieces(self) -> list[bytes]:
        return list(self._pieces)


class Standing(msgspec.Struct):
    """Where a conversation stands in a rest."""

    credit: int
    owed: int
    granted: int
    grant_at: int
    events: int


class Rest(msgspec.Struct):
    """The gateway's half of a link at rest, with which another link goes on.

    `next` is the next conversation's number, `cancelled` are those that the guest has yet to answer. `pieces` are of
    kernel messages that have come in part. `held` is what to send first. The conversations are those that go on.
    """

    next: int
    cancelled: list[int]
    credit: dict[int, int]
    granted: dict[int, int]
    owed: dict[int, int]
    pieces: dict[int, list[bytes]]
    held: bytes
    conversations: dict[int, Standing]


class Conversation:
    """One stream: a request, and what came back so far."""

    def __init__(self, link: "Link", number: int, window: int) -> None:
        self.number = number
        self._link = link
        self._credit = wire.INITIAL_CREDIT
        self._owed = 0
        self._granted = window
        self._grant_at = min(wire.CHUNK, window // 2)
        self._events = 0
        self._arrived = asyncio.Event()
        self._may_send = asyncio.Event()
        self._items: deque[tuple[int, bytes] | Body] = deque()
        self._end: Body | Exception | None = None

    async def receive(self) -> tuple[int, bytes] | Body:
        """The next item from the guest, in order: DATA as (sub-channel, bytes), an event's body, at last the reply.

        Raises:
            GuestFailure: the guest refused the request.
            SandboxDied, GuestUnresponsive: the link broke.
        """
        while not self._items:
            if isinstance(self._end, Exception):
                raise self._end
            if self._end is not None:
                return self._end
            self._arrived.clear()
            await self._arrived.wait()
        return self._taken(self._items.popleft())

    def arrived(self) -> list[tuple[int, bytes] | Body]:
        """What has come and was not received yet, the reply last if it has come.

        Raises:
            GuestFailure: the guest refused the request.
        """
        found = [self._taken(item) for item in list(self._items)]
        self._items.clear()
        if isinstance(self._end, Exception):
            raise self._end
        return found if self._end is None else [*found, self._end]

    def standing(self) -> Standing:
        """Where it stands. Everything that has arrived must have been taken."""
        return Standing(self._credit, self._owed, self._granted, self._grant_at, self._events)

    @classmethod
    def of(cls, link: "Link", number: int, was: Standing) -> "Conversation":
        """A conversation that goes on over another link."""
        self = cls(link, number, was.granted)
        self._credit, self._owed, self._grant_at, self._events = was.credit, was.owed, was.grant_at, was.events
        return self

    def _taken(self, item: tuple[int, bytes] | Body) -> tuple[int, bytes] | Body:
        """An item that is received now, which gives the guest new credit."""
        if isinstance(item, tuple):
            self._owed += len(item[1])
            if self._owed >= self._grant_at:
                self._link.write(wire.credit(self.number, self._owed))
                self._granted += self._owed
                self._owed = 0
        return item

    async def reply(self) -> Any:
        """Skip to the reply."""
        while (item := await self.receive()) is not self._end:
            pass
        return item

    async def send(self, data: bytes | memoryview, sub: int = wire.STDIN) -> None:
        """Send DATA as the guest grants credit and reads."""
        view = memoryview(data)
        while view and (sent := await self.send_some(view, sub)):
            view = view[sent:]

    async def send_some(self, data: bytes | memoryview, sub: int = wire.STDIN) -> int:
        """Send the beginning of DATA, which is not empty, as one frame. Return its size; 0 if the conversation is over.

        A size is returned in the same turn in which the frame is on its way.
        """
        while self._end is None and self._credit <= 0:
            self._may_send.clear()
            await self._may_send.wait()
        if self._end is not None:
            return 0
        piece = memoryview(data)[: min(self._credit, wire.CHUNK)]
        self._credit -= len(piece)
        try:
            await self._link.write_bulk([wire.header(FrameType.DATA, self.number, len(piece), sub), piece])
        except BaseException:
            self._credit += len(piece)
            raise
        return len(piece)

    def end(self, sub: int = wire.STDIN) -> None:
        """Tell the guest that no more DATA follows on this sub-channel."""
        self._link.write(wire.header(FrameType.END, self.number, 0, sub))

    def cancel(self) -> None:
        """Ask the guest to end the work. Its reply still comes."""
        self._link.write(wire.header(FrameType.CANCEL, self.number, 0))

    # -- called by the link

    def received(self, frame: Frame) -> None:
        if frame.type is FrameType.DATA:
            self._granted -= len(frame.payload)
            if self._granted < 0:
                raise wire.FrameError("DATA beyond the credit granted")
            self._add_data(frame.flags & 0xFF, frame.payload)
        elif frame.type is FrameType.CREDIT:
            self._credit = with_credit(self._credit, frame)
            self._may_send.set()
            return
        elif frame.type is FrameType.EVENT:
            self._events += 1
            if self._events > EVENTS_PER_CONVERSATION:
                raise wire.FrameError("too many events in one conversation")
            self._items.append(wire.decode(frame))
        elif frame.type is FrameType.REPLY:
            self.close(wire.decode(frame))
        elif frame.type is FrameType.FAILURE:
            failure: Failure = wire.decode(frame)
            self.close(GuestFailure(failure.code if failure.code in wire.FAILURES else "failed", failure.message))
        self._arrived.set()

    def _add_data(self, sub: int, payload: bytes) -> None:
        """Keep DATA. Small pieces are joined, because they would take a multiple of the credit in memory."""
        last = self._items[-1] if self._items else None
        if isinstance(last, tuple) and last[0] == sub and len(last[1]) < SMALL:
            self._items[-1] = (sub, last[1] + payload)
        elif payload:
            self._items.append((sub, payload))

    def close(self, end: Body | Exception) -> None:
        if self._end is None:
            self._end = end
        self._arrived.set()
        self._may_send.set()

    @property
    def is_open(self) -> bool:
        return self._end is None


def with_credit(credit: int, frame: Frame) -> int:
    """Credit after the guest has granted more.

    Raises:
        FrameError: the grant is nothing, or more than what was sent since the start.
    """
    granted = int.from_bytes(frame.payload, "big")
    if granted == 0 or credit + granted > wire.INITIAL_CREDIT:
        raise wire.FrameError(f"credit of {granted} bytes, with {credit} unused")
    return credit + granted


class Link(asyncio.Protocol):
    """The connection to one agent. Make it with `Link.open`.

    Args:
        time_scale: the driver's factor for deadlines.
        on_kernel_message: called with the parts of each kernel message, the channel's name first.
        on_event: called with each unasked event.
    """

    def __init__(
        self,
        time_scale: float,
        on_kernel_message: Callable[[list[bytes]], None],
        on_event: Callable[[Body], None],
    ) -> None:
        self.time_scale = time_scale
        self.on_kernel_message = on_kernel_message
        self.on_event = on_event
        self._decoder = wire.Decoder()
        self._numbers = itertools.count(wire.FIRST_STREAM)
        self._conversations: dict[int, Conversation] = {}
        self._cancelled: set[int] = set()
        self._joiners = {wire.KERNEL: Joiner(), wire.KERNEL_CONTROL: Joiner()}
        self._kernel_credit = dict.fromkeys(self._joiners, wire.INITIAL_CREDIT)
        self._kernel_granted = dict.fromkeys(self._joiners, wire.INITIAL_CREDIT)
        self._kernel_owed = dict.fromkeys(self._joiners, 0)
        self._kernel_is_held = False
        self._kernel_may_send = asyncio.Event()
        self._kernel_sending = {number: asyncio.Lock() for number in self._joiners}
        self._writable = asyncio.Event()
        self._writable.set()
        self._epoch = secrets.randbits(63)
        self._has_begun = False
        self._awake = asyncio.Event()
        self._awake.set()
        self._quiet = asyncio.Event()
        self._held = bytearray()
        self._limits: dict[asyncio.Timeout, float] = {}
        self._strikes = 0
        self._is_behind = False
        self._event_times: deque[float] = deque()
        self._flood_since = 0.0
        self._small_reads = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[Exception] = self._loop.create_future()

    @classmethod
    async def open(
        cls,
        sock: socket.socket,
        *,
        rest: Rest | None = None,
        time_scale: float = 1.0,
        on_kernel_message: Callable[[list[bytes]], None] = lambda parts: None,
        on_event: Callable[[Body], None] = lambda body: None,
    ) -> "Link":
        """Take over a connected socket. It is closed with the link, or if this fails. Requests begin the epoch.

        Args:
            rest: the rest of an earlier link, which this one goes on with from its `cont` on.
        """
        try:
            _, link = await asyncio.get_running_loop().create_connection(
                lambda: cls(time_scale, on_kernel_message, on_event), sock=sock
            )
        except BaseException:
            sock.close()
            raise
        if rest is not None:
            link._take_over(rest)
        return link

    def _take_over(self, rest: Rest) -> None:
        self._has_begun = True
        self._awake.clear()
        self._quiet.set()
        self._numbers = itertools.count(rest.next)
        self._cancelled = set(rest.cancelled)
        self._kernel_credit, self._kernel_granted, self._kernel_owed = rest.credit, rest.granted, rest.owed
        for number, pieces in rest.pieces.items():
            for piece in pieces:
                self._joiners[number].receive(Frame(FrameType.DATA, wire.MORE, number, piece))
        self._held += rest.held
        for number in self._joiners:
            self._grant(number)  # nobody holds the kernel any more
        self._conversations = {number: Conversation.of(self, number, was) for number, was in rest.conversations.items()}

    # -- asking

    @asynccontextmanager
    async def ask(self, request: Body, window: int = wire.INITIAL_CREDIT) -> AsyncIterator[Conversation]:
        """Open a conversation. Leaving the block before its reply cancels it in the guest.

        Args:
            window: bytes of DATA that the guest may send before anything was read, and ahead of what was read.

        Raises:
            SandboxDied: the link is closed.
            TooLarge: the request does not fit into a frame.
            InvalidRequest: it has text that can't be UTF-8 (JSON allows lone surrogates).
        """
        await self._awake.wait()
        self._raise_if_closed()
        number = next(self._numbers)
        try:
            frame = wire.encode(FrameType.REQUEST, number, request)
        except wire.FrameError:
            raise TooLarge(
                f"a request to the sandbox may have at most {wire.MAX_CONTROL} bytes",
                hint="upload long text as a file, or send it as `stdin`",
            ) from None
        except UnicodeEncodeError:
            raise InvalidRequest("text with a lone surrogate can't be passed on") from None
        conversation = self._conversations[number] = Conversation(self, number, window)
        self._write_request(frame)
        try:
            yield conversation
        finally:
            self._left(conversation)

    @asynccontextmanager
    async def go_on(self, number: int) -> AsyncIterator[Conversation]:
        """Go on with a conversation of an earlier link. Leaving the block is as in `ask`."""
        conversation = self._conversations[number]
        try:
            yield conversation
        finally:
            self._left(conversation)

    def _left(self, conversation: Conversation) -> None:
        """Cancel a conversation that nobody waits for any more, unless it is over."""
        if conversation.is_open and not self.closed.done():
            conversation.cancel()
            conversation.close(GuestFailure("failed", "cancelled"))
            # The guest answers a cancelled request, too. Until then only its number is kept.
            self._cancelled.add(conversation.number)
            if len(self._cancelled) > MAX_CANCELLED:
                self.close(GuestUnresponsive("the guest does not answer what is cancelled"))
        self._conversations.pop(conversation.number, None)

    async def call(self, request: Body, reply_type: type[T], timeout: float = 30.0) -> T:
        """Ask and await the reply.

        Args:
            timeout: seconds to wait, times the driver's time scale. The time of a rest does not count.

        Raises:
            GuestFailure: the guest refused the request.
            GuestUnresponsive: there is no answer, or one of another type.
            SandboxDied: the link broke.
        """
        try:
            async with self._within(timeout), self.ask(request) as conversation:
                reply = await conversation.reply()
        except TimeoutError:
            raise GuestUnresponsive(f"no answer to {type(request).__name__} in time") from None
        if not isinstance(reply, reply_type):
            raise GuestUnresponsive(f"answered {type(request).__name__} with {type(reply).__name__}")
        return reply

    async def resume(
        self, *, sandbox_id: str, hostname: str, env: dict[str, str], is_copy: bool = False, timeout: float = 10.0
    ) -> wire.Resumed:
        """Do the resume handshake (fresh entropy, the host's clock, an identity), and return its acknowledgement.

        It makes the machine another sandbox. It ends a rest.

        Args:
            is_copy: what its processes have goes on, and `env` is added to their kernel's environment.

        Raises:
            GuestUnresponsive, GuestFailure, SandboxDied: the handshake failed; the machine must not be used.
        """
        fresh = wire.Resume(
            nonce=os.urandom(16),
            entropy=os.urandom(64),
            wall_ns=time.time_ns(),
            sandbox_id=sandbox_id,
            hostname=hostname,
            env=env,
            is_copy=is_copy,
        )
        return await self._acknowledged(fresh, timeout)

    async def cont(self, timeout: float = 10.0) -> wire.Resumed:
        """Let a machine that was stopped go on as the sandbox that it is, with fresh entropy and the host's clock.

        It ends a rest: all conversations of this link go on. In a new link, only the kernel and its cells go on.

        Raises:
            GuestUnresponsive, GuestFailure, SandboxDied: the handshake failed; the machine must not be used.
        """
        fresh = wire.Continue(nonce=os.urandom(16), entropy=os.urandom(64), wall_ns=time.time_ns())
        return await self._acknowledged(fresh, timeout)

    async def _acknowledged(self, request: wire.Resume | wire.Continue, timeout: float) -> wire.Resumed:
        self._end_rest()
        resumed = await self.call(request, wire.Resumed, timeout)
        if resumed.nonce != request.nonce or resumed.generation != wire.GENERATION or len(resumed.sample) != 16:
            raise GuestUnresponsive("the guest acknowledged the resume handshake with wrong values")
        return resumed

    # -- rest

    async def quiesce(self, timeout: float = 10.0) -> None:
        """Bring both directions to rest. Afterwards no byte is under way, and the machine may be stopped and saved.

        `resume` or `cont` ends the rest. A cancelled quiesce closes the link, because the guest may be at rest or not.

        Args:
            timeout: seconds that the guest has to send what waits, times the driver's time scale.

        Raises:
            GuestUnresponsive: the guest does not come to rest; the link is closed.
            SandboxDied: the link is closed.
        """
        self._raise_if_closed()
        if self._awake.is_set():
            self._write_request(wire.encode(FrameType.REQUEST, wire.LINK, wire.Quiesce()))
            self._awake.clear()
            for limit in self._limits:
                if (until := limit.when()) is not None and not limit.expired():
                    self._limits[limit] = until - self._loop.time()
                    limit.reschedule(None)
        try:
            async with asyncio.timeout(timeout * self.time_scale):
                await self._quiet.wait()
        except TimeoutError:
            self.close(GuestUnresponsive("the guest does not come to rest"))
        except asyncio.CancelledError:
            self.close(GuestUnresponsive("the guest was left on its way to rest"))
            raise
        self._raise_if_closed()

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """A rest in which no message to the kernel is half sent. `cont` or `close` must end it within the block.

        Raises:
            Conflict: a message to the kernel takes too long.
            GuestUnresponsive, SandboxDied: as `quiesce`.
        """
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(SETTLING * self.time_scale):
                    for sending in self._kernel_sending.values():
                        await held.enter_async_context(sending)
            except TimeoutError:
                raise Conflict("a message is on its way to the kernel, which does not read it", hint="wait") from None
            await self.quiesce()
            yield

    def rest(self, kept: Collection[Conversation]) -> Rest:
        """What another link needs to go on. The link must be at rest.

        Args:
            kept: conversations that go on. Others are cancelled then, because nobody waits for them any more.
        """
        conversations = {each.number: each.standing() for each in kept}
        left = [each.number for each in self._conversations.values() if each.is_open and each not in kept]
        cancels = b"".join(wire.header(FrameType.CANCEL, number, 0) for number in left)
        return Rest(
            next=next(self._numbers),
            cancelled=[*self._cancelled, *left],
            credit=dict(self._kernel_credit),
            granted=dict(self._kernel_granted),
            owed=dict(self._kernel_owed),
            pieces={number: joiner.pieces for number, joiner in self._joiners.items()},
            held=bytes(self._held) + cancels,
            conversations=conversations,
        )

    def _end_rest(self) -> None:
        if self._awake.is_set():
            return
        self._quiet.clear()
        self._awake.set()
        self.write(bytes(self._held))
        self._held.clear()
        for limit, left in self._limits.items():
            if not limit.expired():
                limit.reschedule(self._loop.time() + left)

    @asynccontextmanager
    async def _within(self, seconds: float) -> AsyncIterator[None]:
        """A limit for what waits for the guest, in seconds times the driver's time scale. It stands still in a rest."""
        seconds *= self.time_scale
        async with asyncio.timeout(seconds if self._awake.is_set() else None) as limit:
            self._limits[limit] = seconds
            try:
                yield
            finally:
                del self._limits[limit]

    # -- kernel messages

    def send_at_once(self, parts: list[bytes]) -> bool:
        """Send a kernel message if it is small and nothing is in its way. Return False if `send_kernel_message` must.

        Nearly all messages can be sent at once, and a task for each would cost more than the sending.
        """
        number = wire.KERNEL_CONTROL if parts[0] == b"control" else wire.KERNEL
        buffers = wire.pack_parts(parts)
        size = sum(map(len, buffers))
        is_free = self._awake.is_set() and self._writable.is_set() and not self._kernel_sending[number].locked()
        if not is_free or size > wire.CHUNK or self._kernel_credit[number] <= 0 or self.closed.done():
            return False
        self._kernel_credit[number] -= size
        self.write(b"".join([wire.header(FrameType.DATA, number, size), *buffers]))
        return True

    async def send_kernel_message(self, parts: list[bytes]) -> None:
        """Send one kernel message, its channel's name first. Control messages have a lane of their own."""
        number = wire.KERNEL_CONTROL if parts[0] == b"control" else wire.KERNEL
        async with self._kernel_sending[number]:
            for frame in wire.chunk(number, wire.pack_parts(parts)):
                size = sum(len(buffer) for buffer in frame[1:])
                await self._kernel_credit_for(number)
                self._kernel_credit[number] -= size
                await self.write_bulk(frame)

    async def _kernel_credit_for(self, number: int) -> None:
        """Wait until the agent grants credit. An agent that grants none is given up, whatever its kernel does."""
        try:
            async with self._within(WRITE_DEADLINE):
                while self._kernel_credit[number] <= 0:
                    self._raise_if_closed()
                    self._kernel_may_send.clear()
                    await self._kernel_may_send.wait()
        except TimeoutError:
            self._write_overdue()
            self._raise_if_closed()

    # -- writing

    def write(self, frame: bytes) -> None:
        """Queue a small frame."""
        if not self._awake.is_set():
            self._held += frame
        elif self._transport is not None and not self.closed.done():
            self._transport.write(frame)

    def _write_request(self, frame: bytes) -> None:
        """Queue a request. Until the epoch has begun, a Hello precedes it, because the one before may be lost."""
        if not self._has_begun:
            self.write(wire.encode(FrameType.REQUEST, wire.LINK, wire.Hello(epoch=self._epoch)))
        self.write(frame)

    async def write_bulk(self, frame: list[bytes | memoryview]) -> None:
        """Queue a large frame when the guest has read most of what came before."""
        while not (self._writable.is_set() and self._awake.is_set()):
            await self._writable.wait()
            await self._awake.wait()
        self._raise_if_closed()
        assert self._transport is not None
        self._transport.writelines(frame)

    def _raise_if_closed(self) -> None:
        if self.closed.done():
            raise self.closed.result()

    def hold_kernel(self, held: bool) -> None:
        """Grant the kernel's output no more credit while `held`, so that output waits in the guest's memory.

        Everything else goes on: files, commands, interrupts, and the kernel's control channel.
        """
        self._kernel_is_held = held
        if not held:
            self._grant(wire.KERNEL)

    def _grant(self, number: int) -> None:
        if self._kernel_owed[number] >= wire.CHUNK and not (number == wire.KERNEL and self._kernel_is_held):
            self.write(wire.credit(number, self._kernel_owed[number]))
            self._kernel_granted[number] += self._kernel_owed[number]
            self._kernel_owed[number] = 0

    def close(self, reason: Exception | None = None) -> None:
        """End the link. Everyone who waits on it gets `reason`."""
        if not self.closed.done():
            self.closed.set_result(reason or SandboxDied("the sandbox has ended"))
        if self._deadline is not None:
            self._deadline.cancel()
        if self._transport is not None:
            self._transport.abort()
        for conversation in self._conversations.values():
            conversation.close(self.closed.result())
        for event in (self._writable, self._kernel_may_send, self._awake, self._quiet):
            event.set()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_BUFFER)

    def data_received(self, data: bytes) -> None:
        if len(data) < SMALL:
            self._small_read()
        self._decoder.receive_data(data)
        self._handle_frames()

    def _handle_frames(self) -> None:
        """Handle what has come, for a turn. If frames are left, nothing more is read before they have had theirs."""
        until = self._loop.time() + TURN
        try:
            for frame in self._decoder.frames():
                if self.closed.done():
                    return
                self._receive(frame)
                if self._loop.time() > until:
                    self._is_behind = True
                    self._pause_reading()
                    self._loop.call_soon(self._handle_frames)
                    return
            if self._quiet.is_set() and not self._decoder.is_between_frames:
                raise wire.FrameError("bytes after Quiesced")
        except wire.FrameError as error:
            self.close(GuestUnresponsive(f"the guest broke the protocol: {error}"))
        if self._is_behind:
            self._is_behind = False
            self._read_on()

    def _small_read(self) -> None:
        """Gather some milliseconds of a flood of small reads in one, because a read costs mostly the waking up."""
        now = self._loop.time()
        if now - self._flood_since > FLOOD_WINDOW:
            self._flood_since, self._small_reads = now, 0
        self._small_reads += 1
        if self._small_reads > FLOOD_READS:
            self._pause_reading()
            self._loop.call_later(FLOOD_PAUSE, self._read_on)
            self._flood_since, self._small_reads = now, FLOOD_READS

    def _pause_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def _read_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing() and not self._is_behind:
            self._transport.resume_reading()

    def _receive(self, frame: Frame) -> None:
        if frame.stream == wire.LINK:
            self._link_frame(frame)
        elif not self._has_begun:
            pass  # it is of an older epoch
        elif self._quiet.is_set():
            raise wire.FrameError("a frame after Quiesced")
        elif frame.stream in self._joiners:
            self._kernel_frame(frame)
        elif frame.stream == wire.EVENTS and frame.type is FrameType.EVENT:
            self._event_received(wire.decode(frame))
        else:
            self._conversation_frame(frame)

    def _event_received(self, event: Body) -> None:
        now = self._loop.time()
        while self._event_times and now - self._event_times[0] > EVENTS_INTERVAL:
            self._event_times.popleft()
        self._event_times.append(now)
        if len(self._event_times) > EVENTS:
            raise wire.FrameError(f"over {EVENTS} events in {EVENTS_INTERVAL:g} s")
        self.on_event(event)

    def _link_frame(self, frame: Frame) -> None:
        body = wire.decode(frame) if frame.type is FrameType.REPLY else None
        if not self._has_begun:  # another Welcome is of an older epoch
            self._has_begun = body == wire.Welcome(epoch=self._epoch)
        elif isinstance(body, wire.Quiesced) and not self._awake.is_set() and not self._quiet.is_set():
            self._quiet.set()
        else:
            raise wire.FrameError("a frame that does not fit the link's state")

    def _conversation_frame(self, frame: Frame) -> None:
        conversation = self._conversations.get(frame.stream)
        is_known = conversation is not None or frame.stream in self._cancelled
        if not is_known or frame.type in (FrameType.REQUEST, FrameType.CANCEL):
            self._strikes += 1
            if self._strikes >= STRIKES:
                raise wire.FrameError(f"{STRIKES} frames that nobody asked for")
        elif conversation is None:
            if frame.type in (FrameType.REPLY, FrameType.FAILURE):
                self._cancelled.discard(frame.stream)
        elif conversation.is_open:
            conversation.received(frame)

    def _kernel_frame(self, frame: Frame) -> None:
        if frame.type is FrameType.CREDIT:
            self._kernel_credit[frame.stream] = with_credit(self._kernel_credit[frame.stream], frame)
            self._kernel_may_send.set()
        elif frame.type is FrameType.DATA:
            self._kernel_granted[frame.stream] -= len(frame.payload)
            if self._kernel_granted[frame.stream] < -wire.CHUNK:  # the last chunk may exceed the credit
                raise wire.FrameError("kernel messages beyond the credit granted")
            parts = self._joiners[frame.stream].receive(frame)
            self._kernel_owed[frame.stream] += len(frame.payload)
            self._grant(frame.stream)
            if parts is not None:
                self.on_kernel_message(parts)

    def pause_writing(self) -> None:
        self._writable.clear()
        self._deadline = self._loop.call_later(WRITE_DEADLINE * self.time_scale, self._write_overdue)

    def resume_writing(self) -> None:
        self._writable.set()
        if self._deadline is not None:
            self._deadline.cancel()

    def _write_overdue(self) -> None:
        self.close(GuestUnresponsive("the guest has stopped reading"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.close()
