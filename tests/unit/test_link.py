"""The gateway's end of the wire, with a peer that sends what no honest agent sends."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from guest_agent import wire
from guest_agent.wire import FrameType
from kernel_gateway.errors import GuestUnresponsive
from kernel_gateway.guest.link import EVENTS, Link
from tests.fakes import eventually

MESSAGE = b"".join(wire.pack_parts([b"iopub", b"{}", b"{}", b"{}", b"{}"]))  # type: ignore[arg-type]


def data(stream: int, payload: bytes) -> bytes:
    return wire.header(FrameType.DATA, stream, len(payload)) + payload


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Link, socket.socket]]:
    """A link and the socket of its peer, which has begun the link's epoch."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    link = await Link.open(ours)
    theirs.send(wire.encode(FrameType.REPLY, wire.LINK, wire.Welcome(epoch=link._epoch)))
    try:
        yield link, theirs
    finally:
        link.close()
        theirs.close()
        await asyncio.sleep(0)


async def test_a_flood_leaves_turns_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that come in one read are handled in many turns of the loop, in their order, and none is lost."""
    monkeypatch.setattr("kernel_gateway.guest.link.TURN", 0.0)
    turns: list[int] = []
    turn = 0

    async def others() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async with linked() as (link, peer):
        link.on_kernel_message = lambda parts: turns.append(turn)
        other = asyncio.create_task(others())
        peer.send(data(wire.KERNEL, MESSAGE) * 100)
        await eventually(lambda: len(turns) == 100)
        other.cancel()
        assert len(set(turns)) == 100
        peer.send(data(wire.KERNEL, MESSAGE))  # reading goes on
        await eventually(lambda: len(turns) == 101)


async def test_unasked_events_are_bounded() -> None:
    """A guest may tell of its kernel now and then. One that tells without end is given up."""
    status = wire.encode(FrameType.EVENT, wire.EVENTS, wire.KernelStatus(state="idle"))
    async with linked() as (link, peer):
        seen: list[wire.Body] = []
        link.on_event = seen.append
        peer.send(status * EVENTS)
        await eventually(lambda: len(seen) == EVENTS)
        assert not link.closed.done()
        peer.send(status)
        assert isinstance(await link.closed, GuestUnresponsive)
        assert len(seen) == EVENTS


@pytest.mark.parametrize("stream", [wire.KERNEL, wire.KERNEL_CONTROL, wire.FIRST_STREAM])
@pytest.mark.parametrize("amount", [0, 1, 2**32 - 1])
async def test_credit_for_nothing(stream: int, amount: int) -> None:
    """A guest that grants no credit, or credit for bytes that were never sent, breaks the protocol."""
    async with linked() as (link, peer), link.ask(wire.Spawn(argv=["cat"], env={}, cwd="/")):
        peer.send(wire.credit(stream, amount))
        assert isinstance(await link.closed, GuestUnresponsive)


async def test_credit_for_what_was_sent() -> None:
    """Credit for bytes that the guest has got is taken, down to the last byte."""
    async with linked() as (link, peer), link.ask(wire.Spawn(argv=["cat"], env={}, cwd="/")) as conversation:
        await conversation.send(b"x" * 1000)
        peer.send(wire.credit(wire.FIRST_STREAM, 999) + wire.credit(wire.FIRST_STREAM, 1))
        await asyncio.sleep(0.05)
        assert not link.closed.done()
