"""The rest of a link and its epochs: the real ends of the wire in one process, and scripted peers that break it."""

import asyncio
import random
import socket
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from fcntl import ioctl
from itertools import pairwise
from termios import FIONREAD
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agent import wire
from guest_agent.channel import Channel
from guest_agent.channel import Stream as AgentStream
from guest_agent.kernel import Lane
from guest_agent.wire import FrameType
from kernel_gateway.errors import GuestUnresponsive, SandboxDied
from kernel_gateway.guest.link import Link
from tests.fakes import eventually, own_frame

SMALLEST = 1
"""A socket's buffer that the system raises to its minimum, so that frames are cut everywhere."""
SIZES = st.integers(0, 3 * wire.INITIAL_CREDIT)
TURNS = st.integers(0, 60)


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def kernel_message(number: int, size: int) -> list[bytes]:
    return [b"iopub", b"%d" % number, b"", b"{}", content(size)]


def unread(sock: socket.socket) -> int:
    """Bytes that the socket has received and nobody has read."""
    found = array("i", [0])
    ioctl(sock, FIONREAD, found)
    return found[0]


class Agent:
    """The agent's channel with work of its own: Read is a download of that size, Write an upload that comes back."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.channel = Channel(sock.fileno(), self._dispatch, self._kernel_data, self._epoch_begun)
        self.lane = Lane(self.channel.kernel)
        self.channel.kernel.on_credit = self.pump
        self.output: deque[list[bytes]] = deque()
        self.joiner = wire.MessageJoiner()
        self.input: list[list[bytes]] = []
        self.cancelled = 0

    async def _dispatch(self, stream: AgentStream, body: wire.Body) -> None:
        match body:
            case wire.Read():
                await self._send(stream, content(body.length))
                stream.reply(wire.Done())
            case wire.Write():
                whole = b""
                while (data := await stream.receive()) is not None:
                    whole += data
                await self._send(stream, whole)
                stream.reply(wire.Done())
            case wire.Ping():
                stream.reply(wire.Done())
            case wire.Resume() | wire.Continue():
                stream.reply(wire.Resumed(nonce=body.nonce, generation=1, drift_ns=0, sample=bytes(16), home="/"))
        self.cancelled += stream.cancelled.is_set()

    async def _send(self, stream: AgentStream, data: bytes) -> None:
        view = memoryview(data)
        while view:
            await stream.wait_for_room()
            if stream.cancelled.is_set():
                return
            room = stream.room
            stream.send_now(view[:room])
            view = view[room:]

    def pump(self) -> None:
        while self.lane.flush() and self.output:
            parts = self.output.popleft()
            self.lane.put(parts[0].decode(), parts[1:])

    def _kernel_data(self, frame: wire.Frame) -> None:
        self.channel.streams[frame.stream].take(len(frame.payload))
        if (parts := self.joiner.receive(frame)) is not None:
            self.input.append(parts)

    def _epoch_begun(self) -> None:
        self.joiner = wire.MessageJoiner()
        self.lane.begin()


class Ends:
    """Both ends of a wire. `output` are the kernel's messages that the gateway's end has received."""

    def __init__(self, ours: socket.socket, agent: Agent) -> None:
        self.ours = ours
        self.agent = agent
        self.output: list[list[bytes]] = []

    async def open(self) -> Link:
        """A new link over the same bytes."""
        return await Link.open(self.ours.dup(), on_kernel_message=self.output.append)

    def check_rest(self, link: Link) -> None:
        """No byte is on its way in either direction, and none waits for the rest of its frame."""
        assert link._transport is not None
        assert link._transport.get_write_buffer_size() == 0
        assert (unread(self.ours), unread(self.agent.sock)) == (0, 0)
        assert link._decoder.is_between_frames
        assert self.agent.channel._decoder.is_between_frames
        assert not self.agent.channel._current


@asynccontextmanager
async def ends() -> AsyncIterator[Ends]:
    """Both ends, over sockets that hold a few hundred bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALLEST)
        both = Ends(ours, Agent(theirs))
        yield both
        both.agent.channel._close(None)


async def download(link: Link, size: int) -> bytes:
    found = b""
    async with link.ask(wire.Read(path="", length=size)) as conversation:
        while isinstance(item := await conversation.receive(), tuple):
            found += item[1]
    return found


async def upload(link: Link, data: bytes) -> bytes:
    """Send, and return what came back."""
    async with link.ask(wire.Write(path="")) as conversation:

        async def feed() -> None:
            await conversation.send(data)
            conversation.end()

        async def read() -> bytes:
            found = b""
            while isinstance(item := await conversation.receive(), tuple):
                found += item[1]
            return found

        _, found = await asyncio.gather(feed(), read())
    return found


def flood(link: Link, sizes: list[int], messages: list[list[bytes]]) -> "asyncio.Future[list[Any]]":
    """Downloads, uploads and kernel messages at once."""

    async def to_kernel() -> None:
        for parts in messages:
            if not link.send_at_once(parts):
                await link.send_kernel_message(parts)

    work = [*(download(link, size) for size in sizes), *(upload(link, content(size)) for size in sizes), to_kernel()]
    return asyncio.gather(*work, return_exceptions=True)


async def turns(number: int) -> None:
    """Let the loop go round so often."""
    for _ in range(number):
        await asyncio.sleep(0)


@settings(max_examples=40)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=3),
    messages=st.lists(st.integers(0, 600_000), max_size=5),
    rests=st.lists(TURNS, min_size=1, max_size=5),
)
def test_everything_goes_on_after_a_rest(sizes: list[int], messages: list[int], rests: list[int]) -> None:
    """A link comes to rest at any moment of floods in both directions. Afterwards each byte arrives once, in order."""

    async def run() -> None:
        async with ends() as both:
            link, agent = await both.open(), both.agent
            await link.call(wire.Ping(), wire.Done)
            sent = [kernel_message(*each) for each in enumerate(messages)]
            agent.output.extend(sent)
            working = flood(link, sizes, sent)
            agent.pump()
            for moment in rests:
                await turns(moment)
                await link.quiesce()
                both.check_rest(link)
                asking = asyncio.create_task(link.call(wire.Ping(), wire.Done))
                await turns(20)
                both.check_rest(link)
                await link.cont()
                assert await asking == wire.Done()
            whole = [content(size) for size in sizes]
            assert await working == [*whole, *whole, None]
            await eventually(lambda: agent.input == sent and both.output == sent)
            assert (agent.cancelled, link.closed.done(), link._limits) == (0, False, {})
            link.close()

    asyncio.run(run())


@settings(max_examples=40)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=3),
    messages=st.lists(st.integers(0, 600_000), max_size=5),
    moment=TURNS,
    is_held=st.booleans(),
)
def test_a_new_epoch_begins_clean(sizes: list[int], messages: list[int], moment: int, is_held: bool) -> None:
    """A new link after a rest meets nothing of the old one. Only the kernel's messages go on, each whole and once."""

    async def run() -> None:
        async with ends() as both:
            link, agent = await both.open(), both.agent
            await link.call(wire.Ping(), wire.Done)
            link.hold_kernel(is_held)
            sent = [kernel_message(*each) for each in enumerate(messages)]
            agent.output.extend(sent)
            working = flood(link, sizes, sent)
            agent.pump()
            await turns(moment)
            await link.quiesce()
            link.close()
            ended = await working
            assert all(end is None or isinstance(end, bytes | SandboxDied) for end in ended)
            late = [kernel_message(*each) for each in enumerate(messages, len(messages))]
            agent.output.extend(late)  # what happens in the machine before it stops
            agent.pump()
            for number, stream in agent.channel.streams.items():
                if number >= wire.FIRST_STREAM:
                    stream.end()
                    stream.reply(wire.Done())
            before = len(agent.input)
            again = await both.open()
            continuing = asyncio.create_task(again.cont())
            whole = [content(size) for size in sizes]
            assert await flood(again, sizes, sent) == [*whole, *whole, None]
            await continuing
            await eventually(lambda: both.output == [*sent, *late] and agent.input[before:] == sent)
            assert sorted(agent.channel.streams) == [wire.EVENTS, wire.KERNEL, wire.KERNEL_CONTROL]
            assert (again._strikes, again.closed.done()) == (0, False)
            again.close()

    asyncio.run(run())


# -- scripted agents


class Peer:
    """The other end of a link, which answers only what a test tells it to."""

    def __init__(self, link: Link, sock: socket.socket) -> None:
        self.link = link
        self._sock = sock
        self._decoder = wire.Decoder()
        self._frames: deque[wire.Frame] = deque()

    async def next(self) -> wire.Frame:
        """The next frame of the link."""
        while not self._frames:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 100_000)
            assert data, "the link was closed"
            self._decoder.receive_data(data)
            self._frames.extend(self._decoder.frames())
        return self._frames.popleft()

    @property
    def has_nothing(self) -> bool:
        return not self._frames and unread(self._sock) == 0

    async def send(self, *frames: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, b"".join(frames))

    async def welcome(self) -> None:
        """Begin the link's epoch with a request, and answer both."""
        asking = asyncio.create_task(self.link.call(wire.Ping(), wire.Done))
        hello, ping = await self.next(), await self.next()
        assert (hello.type, hello.stream, ping.stream) == (FrameType.REQUEST, wire.LINK, wire.FIRST_STREAM)
        await self.send(reply(wire.LINK, wire.Welcome(epoch=wire.decode(hello).epoch)), reply(ping.stream, wire.Done()))
        await asking

    async def rest(self) -> None:
        """Bring the link to rest."""
        quiescing = asyncio.create_task(self.link.quiesce())
        while (frame := await self.next()).stream != wire.LINK:
            pass
        assert wire.decode(frame) == wire.Quiesce()
        await self.send(reply(wire.LINK, wire.Quiesced()))
        await quiescing

    async def end_rest(self) -> None:
        """Let the link go on, and acknowledge it."""
        continuing = asyncio.create_task(self.link.cont())
        while not isinstance(body := wire.decode(frame := await self.next()), wire.Continue):
            pass
        await self.send(
            reply(
                frame.stream,
                wire.Resumed(nonce=body.nonce, generation=wire.GENERATION, drift_ns=0, sample=bytes(16), home="/"),
            )
        )
        await continuing

    async def reason(self) -> Exception:
        """Why the link was closed."""
        return await asyncio.wait_for(asyncio.shield(self.link.closed), 5)


def reply(stream: int, body: wire.Body) -> bytes:
    return wire.encode(FrameType.REPLY, stream, body)


@asynccontextmanager
async def peer(time_scale: float = 1.0, **options: Callable[..., None]) -> AsyncIterator[Peer]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    link = await Link.open(ours, time_scale=time_scale, **options)
    with theirs:
        yield Peer(link, theirs)
        link.close()
        await asyncio.sleep(0)


STALE = [
    reply(16, wire.Done()),
    reply(wire.LINK, wire.Quiesced()),
    reply(wire.LINK, wire.Welcome(epoch=1)),
    wire.encode(FrameType.EVENT, wire.EVENTS, wire.KernelStatus(state="dead")),
    own_frame(FrameType.DATA, wire.KERNEL, bytes(1000), wire.MORE),
    own_frame(FrameType.DATA, wire.KERNEL_CONTROL, b"the last chunk of a message"),
    own_frame(FrameType.DATA, 16, bytes(5000)),
    own_frame(FrameType.END, 17),
    wire.credit(16, 1 << 20),
]


@settings(max_examples=100)
@given(stale=st.lists(st.sampled_from(STALE), max_size=300), cuts=st.lists(st.floats(0, 1), max_size=10))
def test_frames_of_an_older_epoch_are_dropped(stale: list[bytes], cuts: list[float]) -> None:
    """What comes before the Welcome of its own epoch changes nothing in a link, wherever the bytes are cut."""

    async def run() -> None:
        seen: list[Any] = []
        async with peer(on_kernel_message=seen.append, on_event=seen.append) as agent:
            link = agent.link
            asking = asyncio.create_task(link.call(wire.Ping(), wire.Done))
            await asyncio.sleep(0)
            welcome = reply(wire.LINK, wire.Welcome(epoch=link._epoch))
            data = b"".join([*stale, welcome, reply(wire.FIRST_STREAM, wire.Done())])
            places = [0, *sorted(int(cut * len(data)) for cut in cuts), len(data)]
            for begin, end in pairwise(places):
                assert not asking.done()
                link.data_received(data[begin:end])
            assert await asking == wire.Done()
            assert (seen, link._strikes, link.closed.done()) == ([], 0, False)
            assert set(link._kernel_credit.values()) == {wire.INITIAL_CREDIT}

    asyncio.run(run())


async def test_a_hello_that_is_lost() -> None:
    """A guest that boots drops what comes too early. The next request brings a Hello of the same epoch."""
    async with peer(time_scale=0.01) as agent:
        link = agent.link
        with pytest.raises(GuestUnresponsive, match="no answer"):
            await link.call(wire.Ping(), wire.Done)
        lost, _, _ = [await agent.next() for _ in range(3)]  # Hello, Ping, CANCEL
        asking = asyncio.create_task(link.call(wire.Ping(), wire.Done, 1000))
        again, ping = await agent.next(), await agent.next()
        assert (again, ping.stream) == (lost, 17)
        await agent.send(reply(wire.LINK, wire.Welcome(epoch=wire.decode(again).epoch)), reply(17, wire.Done()))
        assert await asking == wire.Done()
        asking = asyncio.create_task(link.call(wire.Ping(), wire.Done, 1000))
        assert (await agent.next()).stream == 18
        await agent.send(reply(18, wire.Done()))
        await asking


async def test_a_hello_that_comes_twice() -> None:
    """Requests that are sent before Welcome bring a Hello each, and none of them is dropped for that."""
    async with ends() as both:
        link = await Link.open(both.ours.dup())
        found = await asyncio.gather(*(upload(link, content(100_000)) for _ in range(5)))
        assert found == [content(100_000)] * 5
        link.close()


async def test_a_guest_that_does_not_come_to_rest_is_given_up() -> None:
    """A guest that does not answer Quiesce in time loses its link, and all who wait are told."""
    async with peer(time_scale=0.01) as agent:
        await agent.welcome()
        waiting = asyncio.create_task(agent.link.call(wire.Ping(), wire.Done, 1000))
        await asyncio.sleep(0)
        with pytest.raises(GuestUnresponsive, match="does not come to rest"):
            await agent.link.quiesce()
        with pytest.raises(GuestUnresponsive, match="does not come to rest"):
            await waiting


@pytest.mark.parametrize(
    "after",
    [
        own_frame(FrameType.DATA, wire.KERNEL, b"x"),
        wire.encode(FrameType.EVENT, wire.EVENTS, wire.KernelStatus(state="dead")),
        reply(16, wire.Done()),
        reply(wire.LINK, wire.Quiesced()),
        b"\x01",
    ],
)
@pytest.mark.parametrize("is_late", [False, True])
async def test_nothing_may_follow_quiesced(after: bytes, is_late: bool) -> None:
    """Any byte after Quiesced breaks the protocol, whether it comes with it or later."""
    async with peer() as agent:
        await agent.welcome()
        if is_late:
            await agent.rest()
            await agent.send(after)
        else:
            quiescing = asyncio.create_task(agent.link.quiesce())
            await agent.next()
            await agent.send(reply(wire.LINK, wire.Quiesced()), after)
            await asyncio.gather(quiescing, return_exceptions=True)
        assert "broke the protocol" in str(await agent.reason())
        with pytest.raises(GuestUnresponsive):
            await agent.link.cont()


@pytest.mark.parametrize(
    "frame",
    [
        reply(wire.LINK, wire.Quiesced()),
        reply(wire.LINK, wire.Done()),
        own_frame(FrameType.DATA, wire.LINK, b"x"),
        own_frame(FrameType.END, wire.LINK),
        wire.encode(FrameType.FAILURE, wire.LINK, wire.Failure(code="failed", message="")),
    ],
)
@pytest.mark.parametrize("is_asked", [False, True])
async def test_other_frames_about_the_link(frame: bytes, is_asked: bool) -> None:
    """On the link's own stream comes what it has asked for, and nothing else."""
    async with peer() as agent:
        await agent.welcome()
        quiescing = asyncio.create_task(agent.link.quiesce() if is_asked else asyncio.sleep(0))
        await asyncio.sleep(0)
        await agent.send(frame)
        if is_asked and frame == reply(wire.LINK, wire.Quiesced()):
            await quiescing
            assert not agent.link.closed.done()
        else:
            assert "does not fit" in str(await agent.reason())
            await asyncio.gather(quiescing, return_exceptions=True)


async def test_a_cancelled_quiesce_closes_the_link() -> None:
    """Nobody knows whether the guest is at rest, so the link can't be used."""
    async with peer() as agent:
        quiescing = asyncio.create_task(agent.link.quiesce())
        await asyncio.sleep(0)
        quiescing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await quiescing
        assert isinstance(await agent.reason(), GuestUnresponsive)
        with pytest.raises(GuestUnresponsive):
            await agent.link.quiesce()


async def test_a_link_at_rest_sends_nothing() -> None:
    """Requests, DATA, CREDIT, END, CANCEL and kernel messages wait until the rest ends, and go in order then."""
    async with peer() as agent:
        await agent.welcome()
        link = agent.link
        large = [b"shell", b"{}", b"{}", b"{}", bytes(wire.CHUNK)]
        async with link.ask(wire.Write(path="f")) as writing, link.ask(wire.Read(path="f")) as reading:
            await agent.send(own_frame(FrameType.DATA, 18, bytes(wire.CHUNK)))
            await agent.rest()
            await reading.receive()  # this owes a CREDIT
            sending = asyncio.create_task(writing.send(b"data"))
            calling = asyncio.create_task(link.call(wire.Ping(), wire.Done))
            assert not link.send_at_once([b"shell", b"{}", b"{}", b"{}", b"{}"])
            message = asyncio.create_task(link.send_kernel_message(large))
            await link.quiesce()  # it is at rest already
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in (sending, calling, message))
        await asyncio.sleep(0.05)
        assert agent.has_nothing
        continuing = asyncio.create_task(link.cont())
        found = [await agent.next() for _ in range(8)]
        assert [(frame.type.name, frame.stream) for frame in found[:3]] == [
            ("CREDIT", 18), ("CANCEL", 18), ("CANCEL", 17),
        ]  # fmt: skip
        assert isinstance(wire.decode(found[3]), wire.Continue)
        assert {(frame.type.name, frame.stream) for frame in found[4:]} == {
            ("DATA", wire.KERNEL), ("DATA", 17), ("REQUEST", 20),
        }  # fmt: skip
        await asyncio.gather(sending, message)
        link.close()
        await asyncio.gather(calling, continuing, return_exceptions=True)


async def test_limits_stand_still_in_a_rest() -> None:
    """The time of a rest does not count for those who wait for the guest, whether they asked before or in it."""
    async with peer() as agent:
        await agent.welcome()
        link = agent.link
        before = asyncio.create_task(link.call(wire.Ping(), wire.Done, 20))
        await asyncio.sleep(0)
        await agent.rest()
        within = asyncio.create_task(link.call(wire.Ping(), wire.Done, 10))
        await asyncio.sleep(0)
        assert [limit.when() for limit in link._limits] == [None, None]
        left = list(link._limits.values())
        assert 10 < left[0] <= 20
        assert left[1] == 10
        await agent.end_rest()
        assert all(limit.when() is not None for limit in link._limits)
        await agent.send(reply(17, wire.Done()), reply(19, wire.Done()))
        assert [await before, await within] == [wire.Done(), wire.Done()]


async def test_a_link_that_is_closed_at_rest() -> None:
    """All who wait for the end of a rest are told when the link is closed instead."""
    async with peer() as agent:
        await agent.welcome()
        await agent.rest()
        calling = asyncio.create_task(agent.link.call(wire.Ping(), wire.Done))
        message = asyncio.create_task(agent.link.send_kernel_message([b"shell", b"", b"", b"", b""]))
        await asyncio.sleep(0)
        agent.link.close()
        for task in (calling, message):
            with pytest.raises(SandboxDied):
                await task
        with pytest.raises(SandboxDied):
            await agent.link.quiesce()
