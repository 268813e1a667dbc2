"""The wire: round trips, limits, every split of the byte stream, and 100,000 broken frames (promise R12)."""

import random
import struct
import time
from typing import get_args

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agent import wire
from guest_agent.wire import Decoder, Frame, FrameError, FrameType, MessageJoiner
from tests.fakes import own_frame, resident

INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(max_size=50)
ENTRY = {
    "kind": st.sampled_from(["dir", "file", "other"]),
    "size": st.integers(0, 2**63 - 1),
    "mode": st.integers(0, 0o7777),
    "metadata": st.dictionaries(TEXT, TEXT, max_size=5),
}
"""Fields of an Entry that do not take every value of their type."""
REQUESTS, REPLIES, EVENTS = (get_args(union) for union in (wire.Request, wire.Reply, wire.Event))
BODIES = [
    *((FrameType.REQUEST, kind) for kind in REQUESTS),
    *((FrameType.REPLY, kind) for kind in REPLIES),
    *((FrameType.EVENT, kind) for kind in EVENTS),
    (FrameType.FAILURE, wire.Failure),
]


def values(kind: type[wire.Body]) -> st.SearchStrategy[wire.Body]:
    """Any value of a body type."""
    known = {str: TEXT, bytes: st.binary(max_size=50), int: INT64, bool: st.booleans()}
    known[float] = st.floats(allow_nan=False)
    known[list[str]] = st.lists(TEXT, max_size=5)
    known[dict[str, str]] = st.dictionaries(TEXT, TEXT, max_size=5)
    known[dict[str, str] | None] = st.none() | known[dict[str, str]]
    known[str | None] = st.none() | TEXT
    known[wire.Text] = TEXT
    known[wire.Text | None] = st.none() | TEXT
    known[tuple[int, int] | None] = st.none() | st.tuples(INT64, INT64)
    if kind is wire.Entry:
        known |= {each.type: ENTRY[each.name] for each in msgspec.structs.fields(kind) if each.name in ENTRY}
    if kind is wire.Entries:
        known[list[wire.Entry]] = st.lists(values(wire.Entry), max_size=3)
    if kind is wire.Changes:
        kinds = st.sampled_from(["create", "write", "remove", "rename", "chmod"])
        changes = st.lists(st.builds(wire.Change, kind=kinds, name=TEXT), max_size=3)
        known |= {each.type: changes for each in msgspec.structs.fields(kind) if each.name == "changes"}
    fields = {field.name: known[field.type] for field in msgspec.structs.fields(kind)}
    return st.builds(kind, **fields)


def frames_of(data: bytes) -> list[Frame]:
    decoder = Decoder()
    decoder.receive_data(data)
    return list(decoder.frames())


@pytest.mark.parametrize(("frame_type", "kind"), BODIES, ids=lambda x: getattr(x, "__name__", None) or x.name)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_body_survives_the_wire(frame_type: FrameType, kind: type[wire.Body], data: st.DataObject) -> None:
    """Every type of body is decoded as it was encoded."""
    body = data.draw(values(kind))
    (frame,) = frames_of(wire.encode(frame_type, 77, body))
    assert (frame.type, frame.stream, frame.flags) == (frame_type, 77, 0)
    assert wire.decode(frame) == body


def test_a_frame_read_by_hand() -> None:
    """The bytes are the documented ones: a big-endian header and a msgpack map, read by another library."""
    frame = wire.encode(FrameType.REQUEST, 0x01020304, wire.Spawn(argv=["ls", "-l"], env={"A": "ü"}, cwd="/"))
    assert struct.unpack(">BBHII", frame[:12]) == (1, 1, 0, 0x01020304, len(frame) - 12)
    assert msgpack.unpackb(frame[12:]) == {
        "type": "Spawn",
        "argv": ["ls", "-l"],
        "env": {"A": "ü"},
        "cwd": "/",
        "timeout_ms": 0,
        "user": "",
        "terminal": None,
        "window": 1 << 20,
    }
    theirs = msgpack.packb({"type": "Exited", "code": 3, "added_later": [1]})
    assert wire.decode(Frame(FrameType.REPLY, 16, 0, theirs)) == wire.Exited(code=3)


def test_credit_is_four_bytes() -> None:
    """A CREDIT frame carries its amount as a 32-bit number."""
    assert wire.credit(9, 70_000) == bytes.fromhex("0106000000000009 00000004 00011170")


def test_every_split_of_the_stream() -> None:
    """Frames come out the same wherever the byte stream is cut, once or after every byte."""
    stream = (
        wire.encode(FrameType.REQUEST, 16, wire.Stat(path="/etc"))
        + own_frame(FrameType.DATA, 16, b"hello", 1)
        + own_frame(FrameType.END, 16)
        + wire.credit(16, 5)
    )
    expected = frames_of(stream)
    assert [frame.type.name for frame in expected] == ["REQUEST", "DATA", "END", "CREDIT"]
    for cut in range(len(stream) + 1):
        decoder = Decoder()
        decoder.receive_data(stream[:cut])
        found = list(decoder.frames())
        decoder.receive_data(memoryview(stream)[cut:])
        assert found + list(decoder.frames()) == expected
    decoder, found = Decoder(), []
    for at in range(len(stream)):
        decoder.receive_data(stream[at : at + 1])
        found += decoder.frames()
    assert found == expected


@pytest.mark.parametrize("frame_type", FrameType, ids=lambda kind: kind.name)
def test_length_is_checked_before_anything_is_kept(frame_type: FrameType) -> None:
    """A header that promises more than its type's limit is refused at once, without waiting for the payload."""
    limit = wire._LIMITS[frame_type]
    assert frames_of(own_frame(frame_type, 16, bytes(limit))) == [Frame(frame_type, 16, 0, bytes(limit))]
    with pytest.raises(FrameError, match="over its limit"):
        frames_of(wire.header(frame_type, 16, limit + 1))


@pytest.mark.parametrize(
    "head", [b"\x02\x04\0\0\0\0\0\x10\0\0\0\0", b"\x01\x00\0\0\0\0\0\x10\0\0\0\0", b"\x01\x09\0\0\0\0\0\x10\0\0\0\0"]
)
def test_an_error_is_final(head: bytes) -> None:
    """After a wrong generation or type nothing more is decoded, even if good frames follow."""
    decoder = Decoder()
    decoder.receive_data(own_frame(FrameType.END, 16) + head)
    frames = decoder.frames()
    assert next(frames).type is FrameType.END
    with pytest.raises(FrameError):
        next(frames)
    decoder.receive_data(own_frame(FrameType.END, 16))
    with pytest.raises(FrameError):
        list(decoder.frames())


def test_a_body_too_large_is_not_sent() -> None:
    """Our side refuses to encode a body that the peer would refuse to read."""
    with pytest.raises(FrameError, match="over its limit"):
        wire.encode(FrameType.REQUEST, 16, wire.Stat(path="x" * wire.MAX_CONTROL))
    with pytest.raises(FrameError, match="over its limit"):
        wire.encode(FrameType.FAILURE, 16, wire.Failure(code="failed", message="x" * 65536))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc0",
        b"\x80",
        msgpack.packb({"type": "Nonsense"}),
        msgpack.packb({"type": "Done"}),
        msgpack.packb({"type": "Stat"}),
        msgpack.packb({"type": "Stat", "path": 3}),
        msgpack.packb({"type": "Stat", "path": b"\xff"}),
        msgpack.packb({"type": "Stat", "path": "/"})[:-1],
        msgpack.packb({"type": "Stat", "path": "/"}) + b"\0",
        b"\x82\xa4type\xa4Stat\xa4path\xa1\xff",
        b"\x91" * 100_000,
        b"\xdf\xff\xff\xff\xff",
    ],
)
def test_bodies_that_are_not_what_they_should_be(payload: bytes) -> None:
    """A wrong tag, a missing or mistyped field, bad UTF-8, a rest or deep nesting raises FrameError only."""
    with pytest.raises(FrameError):
        wire.decode(Frame(FrameType.REQUEST, 16, 0, payload))


def test_frames_print_short() -> None:
    """A frame's repr is one line however large its payload."""
    assert repr(Frame(FrameType.DATA, 16, 1, bytes(99))) == f"<DATA stream=16 flags=0x0001 99 B {'00' * 32}…>"


# -- kernel messages


def join(data: bytes) -> list[list[memoryview]]:
    joiner = MessageJoiner()
    return [parts for frame in frames_of(data) if (parts := joiner.receive(frame)) is not None]


@pytest.mark.parametrize("size", [0, 1, 12, wire.CHUNK - 50, wire.CHUNK, wire.CHUNK + 1, 1024 * 1024, 1024 * 1024 + 7])
def test_messages_cross_in_chunks(size: int) -> None:
    """A message of any size arrives unchanged, in DATA frames of at most CHUNK bytes, with MORE on all but the last."""
    parts = [b"iopub", b"{}", b"", b"{}", random.Random(size).randbytes(size), b"binary"]
    sent = [b"".join(frame) for frame in wire.chunk(wire.KERNEL, wire.pack_parts(parts))]
    frames = frames_of(b"".join(sent))
    assert len(frames) == len(sent) == -(-(4 + 4 * 6 + size + 15) // wire.CHUNK)
    assert all(len(frame.payload) <= wire.CHUNK for frame in frames)
    assert [frame.flags for frame in frames] == [wire.MORE] * (len(frames) - 1) + [0]
    (joined,) = join(b"".join(sent))
    assert [bytes(part) for part in joined] == parts


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.binary(max_size=300), min_size=5, max_size=12), min_size=1, max_size=4))
def test_messages_one_after_the_other(messages: list[list[bytes]]) -> None:
    """A joiner is ready for the next message after each."""
    sent = b"".join(b"".join(f) for parts in messages for f in wire.chunk(wire.KERNEL, wire.pack_parts(parts)))
    assert [[bytes(part) for part in parts] for parts in join(sent)] == messages


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0\0\0",
        struct.pack(">I", 0),
        struct.pack(">5I", 4, 0, 0, 0, 0),
        struct.pack(">6I", 5, 0, 0, 0, 0, 1),
        struct.pack(">6I", 5, 0, 0, 0, 0, 0) + b"x",
        struct.pack(">6I", 5, 2**32 - 1, 1, 0, 0, 0),
        struct.pack(">I", 2**32 - 1),
        struct.pack(">I", wire.MAX_PARTS + 1) + bytes(4 * (wire.MAX_PARTS + 1)),
    ],
)
def test_malformed_kernel_messages(message: bytes) -> None:
    """Counts and lengths that do not add up, or too few parts, are refused."""
    with pytest.raises(FrameError):
        wire.unpack_parts(message)


def test_a_message_has_a_limit() -> None:
    """Chunks without end are refused once they are over MAX_MESSAGE bytes."""
    joiner = MessageJoiner()
    frame = Frame(FrameType.DATA, wire.KERNEL, wire.MORE, bytes(wire.CHUNK))
    for _ in range(wire.MAX_MESSAGE // wire.CHUNK):
        assert joiner.receive(frame) is None
    with pytest.raises(FrameError, match="over"):
        joiner.receive(frame)


@pytest.mark.parametrize("size", [0, 1, wire.CHUNK - 1, wire.CHUNK + 1])
def test_only_the_last_chunk_may_be_small(size: int) -> None:
    """A chunk that is not the last is full, so a guest can't make us keep a great many tiny ones."""
    with pytest.raises(FrameError, match="not the last"):
        MessageJoiner().receive(Frame(FrameType.DATA, wire.KERNEL, wire.MORE, bytes(size)))


# -- R12


def test_r12_random_and_mutated_frames() -> None:
    """100,000 random and mutated frames raise nothing but FrameError, in 5 s, and memory grows by 8 MiB at most."""
    rng = random.Random(12)
    good = [
        wire.encode(FrameType.REPLY, 16, wire.Exited(code=1)),
        wire.encode(FrameType.REPLY, 17, wire.Entries(entries=[], more=True)),
        wire.encode(FrameType.FAILURE, 18, wire.Failure(code="failed", message="m")),
        wire.encode(FrameType.EVENT, 0, wire.KernelStatus(state="dead")),
        wire.encode(FrameType.REQUEST, 19, wire.Spawn(argv=["a"], env={"b": "c"}, cwd="/")),
        wire.credit(16, 1 << 20),
        own_frame(FrameType.DATA, 16, b"data" * 10, 2),
        b"".join(next(wire.chunk(wire.KERNEL, wire.pack_parts([b"iopub", b"{}", b"{}", b"{}", b"{}"])))),
    ]
    heads = [frame[:12] for frame in good]
    outcomes = {"error": 0, "frame": 0, "more": 0}

    def feed(data: bytes) -> None:
        decoder, joiner, seen = Decoder(), MessageJoiner(), 0
        decoder.receive_data(data)
        try:
            for frame in decoder.frames():
                seen += 1
                if frame.type in wire._decoders:
                    wire.decode(frame)
                elif frame.type is FrameType.DATA and frame.stream == wire.KERNEL:
                    joiner.receive(frame)
        except FrameError:
            outcomes["error"] += 1
        else:
            outcomes["frame" if seen else "more"] += 1

    def one() -> bytes:
        how = rng.randrange(4)
        if how == 0:
            return rng.randbytes(rng.randrange(64))
        if how == 1:  # a good header over rubbish
            return rng.choice(heads) + rng.randbytes(rng.randrange(64))
        data = bytearray(rng.choice(good))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if how == 3:
            del data[rng.randrange(len(data)) :]
        return bytes(data)

    for _ in range(2000):  # let one-time allocations happen first
        feed(one())
    before, begun = resident(), time.monotonic()
    for _ in range(100_000):
        feed(one())
    took = time.monotonic() - begun
    assert min(outcomes.values()) > 5000, outcomes  # each outcome was common
    assert resident() - before <= 8 << 20
    assert took < 5
