"""The contract between the gateway and the agent inside a sandbox. No I/O in here.

One byte stream joins them (a virtio-serial port, or a socket for the unisolated driver). It carries frames:

    offset  size  field
    0       1     generation   the protocol's generation, GENERATION
    1       1     type         a FrameType
    2       2     flags        sub-channel in the low byte, MORE in the high one
    4       4     stream       which conversation the frame belongs to
    8       4     length       bytes of payload that follow

all big-endian. The length is checked against the limit of its type before anything is read or allocated.

A conversation is a *stream*. The gateway opens one with a REQUEST (a typed body) under a number it never uses
again. The agent answers with one REPLY or FAILURE. Before that, both may send DATA and END on its sub-channels.
Numbers below FIRST_STREAM are fixed: kernel messages travel on KERNEL (bulk) and KERNEL_CONTROL (priority), EVENTS
carries the agent's messages that nobody asked for, and LINK carries the requests about the link itself.

Bulk data flows with credit. A side may send DATA on a stream only while it holds credit for it. Credit is counted in
payload bytes: INITIAL_CREDIT at the start, and more by CREDIT frames of the reader. So a slow reader stops the writer,
and nobody's memory grows.

An *epoch* is the time of one link. The gateway begins it with Hello, and the agent's first frame of it is Welcome with
the same number. Until Welcome comes, a Hello precedes every request, because a guest that boots drops what comes too
early. With the first Hello the agent forgets all conversations, credit and waiting frames of the epoch before. The
gateway drops frames that come before Welcome, because they are of an older epoch.

A link comes to *rest* by Quiesce. The gateway sends nothing after it. The agent sends what waits, then Quiesced, and
nothing after that. Now no byte is under way, and the machine may be stopped and saved. A Resume or a Continue ends the
rest of the same link, and everything goes on. A Hello ends it for a new link.

Kernel messages are opaque. `pack_parts` joins the parts of one Jupyter message. They cross as DATA frames of CHUNK
bytes with MORE set; the last frame has no MORE and may be shorter. The host never sees the signing key and signs
nothing.

Evolution: fields and types are only added, and new fields are optional. Any other change raises GENERATION.
`tests/unit/test_wire_snapshot.py` shows every change as a diff.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

GENERATION = 1
HEADER = struct.Struct(">BBHII")
CHUNK = 256 * 1024
"""Largest payload of a DATA frame that we send, in bytes. A control frame never waits behind more than this."""
MAX_CONTROL = 1024 * 1024
"""Largest typed body, in bytes (a REQUEST may carry environment variables and a long argument)."""
MAX_DATA = 1024 * 1024
"""Largest DATA payload that is accepted, in bytes."""
MAX_MESSAGE = 64 * 1024 * 1024
"""Largest kernel message after joining its chunks, in bytes. The agent puts a notice in place of a larger one."""
MAX_PARTS = 65_536
INITIAL_CREDIT = 1024 * 1024
"""Bytes either side may send on a new stream before the first CREDIT frame."""
MAX_TEXT = 4096
"""Longest text in an Entry, in characters. Linux accepts no longer path."""
MAX_METADATA = 256
"""Extended attributes in an Entry."""
MAX_CHANGES = 200
"""Changes in one answer. With the longest names they fit into a frame."""
METADATA = "user.e2b."
"""The beginning of the names of those extended attributes that are a file's metadata."""

EVENTS = 0
KERNEL = 1
KERNEL_CONTROL = 2
LINK = 3
FIRST_STREAM = 16

MORE = 0x0100
STDIN, STDOUT, STDERR = 0, 1, 2


class FrameType(IntEnum):
    REQUEST = 1
    REPLY = 2
    FAILURE = 3
    DATA = 4
    END = 5
    CREDIT = 6
    CANCEL = 7
    EVENT = 8


_LIMITS = {
    FrameType.REQUEST: MAX_CONTROL,
    FrameType.REPLY: MAX_CONTROL,
    FrameType.FAILURE: 64 * 1024,
    FrameType.DATA: MAX_DATA,
    FrameType.END: 0,
    FrameType.CREDIT: 4,
    FrameType.CANCEL: 0,
    FrameType.EVENT: 64 * 1024,
}


_KINDS = {int(kind): (kind, limit) for kind, limit in _LIMITS.items()}


class FrameError(Exception):
    """The peer broke the protocol. The link must be closed, because its bytes can't be trusted any more."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. `payload` is a copy."""

    type: FrameType
    stream: int
    flags: int
    payload: bytes

    def __repr__(self) -> str:
        shown = self.payload[:32].hex() + ("…" if len(self.payload) > 32 else "")
        return f"<{self.type.name} stream={self.stream} flags={self.flags:#06x} {len(self.payload)} B {shown}>"


class Decoder:
    """A decoder of received bytes into frames. Call `receive_data`, then iterate over `frames`.

    A FrameError is final: later calls raise it again.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._error: FrameError | None = None

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes as they came. They may be split anywhere."""
        self._buffer += data

    def frames(self) -> Iterator[Frame]:
        """Yield each complete frame.

        Raises:
            FrameError: wrong generation, unknown type, or a length over the type's limit.
        """
        if self._error is not None:
            raise self._error
        buffer, offset = self._buffer, 0
        try:
            while len(buffer) - offset >= HEADER.size:
                generation, kind, flags, stream, length = HEADER.unpack_from(buffer, offset)
                type_ = self._check(generation, kind, length)
                end = offset + HEADER.size + length
                if len(buffer) < end:
                    break
                payload = bytes(memoryview(buffer)[offset + HEADER.size : end])
                offset = end
                yield Frame(type_, stream, flags, payload)
        finally:
            del buffer[:offset]

    @property
    def is_between_frames(self) -> bool:
        """Whether no part of a frame waits for the rest of it."""
        return not self._buffer

    def _check(self, generation: int, kind: int, length: int) -> FrameType:
        type_, limit = _KINDS.get(kind, (None, 0))
        if generation != GENERATION:
            self._error = FrameError(f"generation {generation}, expected {GENERATION}")
        elif type_ is None:
            self._error = FrameError(f"unknown frame type {kind}")
        elif length > limit:
            self._error = FrameError(f"{type_.name} frame of {length} bytes, over its limit")
        else:
            return type_
        raise self._error


def header(type_: FrameType, stream: int, length: int, flags: int = 0) -> bytes:
    """The 12 bytes that precede a payload of `length` bytes."""
    return HEADER.pack(GENERATION, type_, flags, stream, length)


# -- typed bodies ------------------------------------------------------------------------------------------------


class Body(msgspec.Struct, tag=True, kw_only=True):
    """Base of every typed body: a msgpack map whose `type` names the class."""


class Hello(Body):
    """Begin an epoch, unless it has begun already. It comes on LINK. `epoch` is a random number of 63 bits."""

    epoch: int


class Welcome(Body):
    """The agent's first frame of an epoch, on LINK."""

    epoch: int


class Quiesce(Body):
    """Bring the link to rest. It comes on LINK."""


class Quiesced(Body):
    """The agent's last frame before the rest, on LINK."""


class Resume(Body):
    """Make a restored machine a sandbox of its own. The agent acknowledges this before any user byte passes.

    `entropy` is 64 random bytes of the host, `wall_ns` its clock (ns since 1970). Every process sees `env`.

    `is_copy` says that the machine is a copy of a sandbox that was at work. Its kernel and its commands go on. Random
    state, names and the kernel's session become its own, and `env` is added to what there is.
    """

    nonce: bytes
    entropy: bytes
    wall_ns: int
    sandbox_id: str
    hostname: str
    env: dict[str, str]
    is_copy: bool = False


class Continue(Body):
    """Let a machine that was stopped go on as the sandbox that it is. Environment, names and random state stay.

    `entropy` and `wall_ns` are those of Resume, and so is the acknowledgement.
    """

    nonce: bytes
    entropy: bytes
    wall_ns: int


class Resumed(Body):
    """`sample` is fresh output of the guest's random number generator, `drift_ns` how far its clock was off.

    `home` is the sandbox user's home, in which relative paths start.
    """

    nonce: bytes
    generation: int
    drift_ns: int
    sample: bytes
    home: str


class Warm(Body):
    """For building a template: start the kernel, import `modules`, run `exercise`, and leave no names behind."""

    modules: list[str]
    exercise: str


class Flush(Body):
    """Write all dirty pages to the disk (before a snapshot)."""


class Ping(Body):
    pass


class Done(Body):
    """The answer to a request that needs no data in its answer."""


class Spawn(Body):
    """Run a program. Its output comes as DATA on STDOUT and STDERR, its input goes as DATA and END on STDIN.

    `cwd` begins at the user's home unless it is absolute. `timeout_ms` kills the whole process group; 0 is no limit. An
    empty `user` is the sandbox's. With a `terminal` of that many rows and columns the program gets one of its own,
    whose output comes as DATA on STDOUT, and END has no meaning. `window` is the credit for output at the start.
    """

    argv: list[str]
    env: dict[str, str]
    cwd: str
    timeout_ms: int = 0
    user: str = ""
    terminal: tuple[int, int] | None = None
    window: int = INITIAL_CREDIT


class Started(Body):
    """An EVENT on the stream of a Spawn, when the program runs."""

    pid: int


class Exited(Body):
    """`code` is the exit status, 128 + `signal` after a signal, or 124 after a timeout."""

    code: int
    signal: int = 0
    timed_out: bool = False


class Signal(Body):
    """Send a signal to the process group of the program that runs on a `stream`."""

    stream: int
    signal: int


class Resize(Body):
    """Give the terminal of the program that runs on a `stream` another size."""

    stream: int
    rows: int
    columns: int


class Connect(Body):
    """Open a TCP connection to a service inside the sandbox.

    The agent answers with the EVENT Connected. Then the gateway's DATA and END on STDIN go to the service, and the
    service's bytes come as DATA on STDOUT. The REPLY Done comes when the service has closed the connection. `window` is
    the credit for the service's bytes at the start.
    """

    port: int
    window: int = INITIAL_CREDIT


class Connected(Body):
    """An EVENT on the stream of a Connect, when the service has accepted."""


class GetUser(Body):
    """Ask for the home of a user of the sandbox. A user that does not exist is not_found."""

    name: str


class User(Body):
    """The answer to GetUser."""

    home: str


class Stat(Body):
    """Ask for an Entry. Like all requests for files it is done with the rights of `user`, empty for the sandbox's."""

    path: str
    user: str = ""


Text = Annotated[str, Meta(max_length=MAX_TEXT)]


class Entry(Body):
    """A file or directory. `mode` is the permission bits, `modified_ns` since 1970, `size` bytes.

    Bytes of a name that are not UTF-8 are U+FFFD. `metadata` are the extended attributes below METADATA.
    """

    name: Text
    path: Text
    kind: Literal["dir", "file", "other"]
    size: Annotated[int, Meta(ge=0)]
    mode: Annotated[int, Meta(ge=0, le=0o7777)]
    owner: Text
    group: Text
    modified_ns: int
    target: Text | None = None
    metadata: Annotated[dict[Text, Text], Meta(max_length=MAX_METADATA)] = {}


class ListDir(Body):
    """Ask for one page of a directory: up to `limit` entries (0: as many as fit) with the names after `after`."""

    path: str
    after: str = ""
    limit: int = 0
    user: str = ""


class Entries(Body):
    """A page. Each name is greater than the one before it. With `more` there is at least one entry."""

    entries: list[Entry]
    more: bool = False


class Read(Body):
    """Send `length` bytes of a file from `offset` (negative length: to its end) as DATA, END, then the REPLY.

    The first frame is an EVENT with the file's Entry.
    """

    path: str
    offset: int = 0
    length: int = -1
    user: str = ""


class Write(Body):
    """Take DATA up to END as the new content of a file. Its parents are made. The REPLY is its Entry.

    The old content stays until END, unless the file is written `in_place`, as whoever watches the directory may want.
    Then the file belongs to the user afterwards, and `metadata` replaces all that it has, if it is not None.
    """

    path: str
    user: str = ""
    in_place: bool = False
    metadata: dict[str, str] | None = None


class MakeDir(Body):
    """Make a directory with its parents. One that exists already is an error only if this is `exclusive`."""

    path: str
    user: str = ""
    exclusive: bool = False


class Move(Body):
    source: str
    destination: str
    user: str = ""


class Delete(Body):
    path: str
    user: str = ""


class Watch(Body):
    """Watch a directory, with those in it if it is `recursive`, until CANCEL. The agent answers with Watching."""

    path: str
    recursive: bool = False
    user: str = ""


class Watching(Body):
    """An EVENT on the stream of a Watch, when changes are noted."""


class GetChanges(Body):
    """Ask for what has changed since the last time in the directory that is watched on a `stream`.

    With `wait` the answer comes only when there is something to tell.
    """

    stream: int
    wait: bool = False


class Change(msgspec.Struct, kw_only=True):
    """Something that happened to a file. `name` is its path from the watched directory."""

    kind: Literal["create", "write", "remove", "rename", "chmod"]
    name: Text


class Changes(Body):
    """Changes in their order. `lost` says that there were more than could be noted."""

    changes: Annotated[list[Change], Meta(max_length=MAX_CHANGES)]
    lost: bool = False


class GetMetrics(Body):
    pass


class Metrics(Body):
    """Readings of the guest: percent of all CPUs since the last reading, and bytes."""

    ts: int
    cpu_count: int
    cpu_used_pct: float
    mem_total: int
    mem_used: int
    mem_cache: int
    disk_total: int
    disk_used: int


class Interrupt(Body):
    """Interrupt (SIGINT) the cell whose message id is `target`, and no other; without one, what the kernel does now."""

    target: str = ""


class GetStopped(Body):
    """Ask whether the code of the cell with message id `target` is over by an error. Its reply may take a while yet."""

    target: str


class Stopped(Body):
    """The answer to GetStopped."""

    is_stopped: bool


class Restart(Body):
    """Kill the kernel and start a fresh one. The REPLY comes when that is usable."""


class KernelStatus(Body):
    """An EVENT on EVENTS, when the kernel has changed its state.

    `state` is idle, restarting or dead. `reason` is a text for the user.
    """

    state: str
    reason: str = ""
    exit_code: int = 0
    signal: int = 0


class Failure(Body):
    """The reason why a request could not be done. `code` is one of FAILURES, `message` is a text for the user."""

    code: str
    message: str


FAILURES = frozenset(
    {
        "not_found",
        "is_directory",
        "not_directory",
        "not_regular",
        "exists",
        "permission_denied",
        "no_space",
        "too_large",
        "invalid",
        "cannot_run",
        "port_closed",
        "kernel_unavailable",
        "failed",
    }
)

Request = (
    Resume | Warm | Flush | Ping | Spawn | Stat | ListDir | Read | Write | MakeDir | Move | Delete | GetMetrics
    | Interrupt | GetStopped | Restart | Connect | Signal | Resize | Hello | Quiesce | Continue | GetUser | Watch
    | GetChanges
)  # fmt: skip
Reply = Resumed | Done | Exited | Entry | Entries | Metrics | Stopped | Welcome | Quiesced | User | Changes
Event = Started | Entry | KernelStatus | Connected | Watching

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[FrameType, msgspec.msgpack.Decoder[Any]] = {
    FrameType.REQUEST: msgspec.msgpack.Decoder(Request),
    FrameType.REPLY: msgspec.msgpack.Decoder(Reply),
    FrameType.FAILURE: msgspec.msgpack.Decoder(Failure),
    FrameType.EVENT: msgspec.msgpack.Decoder(Event),
}


def encode(type_: FrameType, stream: int, body: Body) -> bytes:
    """A whole frame with a typed body.

    Raises:
        FrameError: the body is larger than its frame may be.
    """
    payload = _encoder.encode(body)
    if len(payload) > _LIMITS[type_]:
        raise FrameError(f"{type_.name} body of {len(payload)} bytes, over its limit")
    return header(type_, stream, len(payload)) + payload


def decode(frame: Frame) -> Any:
    """The typed body of a REQUEST, REPLY, FAILURE or EVENT.

    Raises:
        FrameError: the payload is no body of the frame's type.
    """
    try:
        return _decoders[frame.type].decode(frame.payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FrameError(f"{frame.type.name} body: {error}") from error


def credit(stream: int, amount: int) -> bytes:
    """A CREDIT frame granting `amount` more bytes on `stream`."""
    return header(FrameType.CREDIT, stream, 4) + amount.to_bytes(4, "big")


# -- kernel messages ---------------------------------------------------------------------------------------------


def pack_parts(parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """The parts of one kernel message as buffers to send in order: a count, the lengths, the bytes.

    The parts are the channel's name, then header, parent header, metadata, content, and any binary buffers.
    """
    lengths = [memoryview(part).nbytes for part in parts]
    return [struct.pack(f">I{len(parts)}I", len(parts), *lengths), *parts]


def unpack_parts(message: bytes) -> list[bytes]:
    """The inverse of `pack_parts`.

    Raises:
        FrameError: counts and lengths do not add up, or there are fewer than the five parts of any message.
    """
    if len(message) < 4:
        raise FrameError("kernel message without a part count")
    (count,) = struct.unpack_from(">I", message)
    if not 5 <= count <= MAX_PARTS or len(message) < 4 + 4 * count:
        raise FrameError(f"kernel message with {count} parts")
    lengths = struct.unpack_from(f">{count}I", message, 4)
    start = 4 + 4 * count
    if start + sum(lengths) != len(message):
        raise FrameError("kernel message whose part lengths do not add up")
    parts = []
    for length in lengths:
        parts.append(message[start : start + length])
        start += length
    return parts


def chunk(stream: int, buffers: Sequence[bytes | memoryview]) -> Iterator[list[bytes | memoryview]]:
    """Split one message into DATA frames of at most CHUNK bytes. Each is a list of buffers to write in order."""
    remaining = sum(memoryview(b).nbytes for b in buffers)
    views = [memoryview(b).cast("B") for b in buffers if memoryview(b).nbytes]
    while remaining:
        size = min(remaining, CHUNK)
        remaining -= size
        frame: list[bytes | memoryview] = [header(FrameType.DATA, stream, size, MORE if remaining else 0)]
        while size:
            piece = views[0][:size]
            frame.append(piece)
            size -= len(piece)
            if len(piece) == len(views[0]):
                views.pop(0)
            else:
                views[0] = views[0][len(piece) :]
        yield frame


class MessageJoiner:
    """The joiner of the chunks of kernel messages, in the order in which they come on one stream."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def receive(self, frame: Frame) -> list[bytes] | None:
        """Take a DATA frame, and return the parts of the message if it was the last chunk, else None.

        Raises:
            FrameError: the message is over MAX_MESSAGE, or malformed.
        """
        if frame.flags & MORE and len(frame.payload) != CHUNK:
            raise FrameError(f"a chunk of {len(frame.payload)} bytes that is not the last")
        self._pieces.append(frame.payload)
        self._size += len(frame.payload)
        if self._size > MAX_MESSAGE:
            raise FrameError(f"kernel message over {MAX_MESSAGE} bytes")
        if frame.flags & MORE:
            return None
        message = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces, self._size = [], 0
        return unpack_parts(message)
