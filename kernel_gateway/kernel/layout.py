"""The two layouts of a kernel message inside a WebSocket frame. Pure: parts to frames and back.

`v1.kernel.websocket.jupyter.org` is binary and keeps the parts as they are. Without that subprotocol a message is one
JSON text, or, with binary buffers, a binary frame that holds the JSON and the buffers.

Source: https://jupyter-server.readthedocs.io/en/latest/developers/websocket-protocols.html
"""

import struct
from itertools import pairwise
from typing import Annotated, Any

import msgspec

from kernel_gateway.kernel import message
from kernel_gateway.kernel.message import CHANNEL, CONTENT, HEADER, METADATA, PARENT

V1 = "v1.kernel.websocket.jupyter.org"
MAX_PARTS = 65_536

_raw = msgspec.json.Decoder(dict[str, msgspec.Raw])


class LayoutError(ValueError):
    """A frame that is not a kernel message."""


class Legacy(msgspec.Struct):
    """A message as JSON. Clients leave out what they don't need, and send `buffers` as a list or as an object."""

    header: msgspec.Raw
    channel: Annotated[str, msgspec.Meta(max_length=20)] | None = None
    parent_header: msgspec.Raw = msgspec.Raw(b"{}")
    metadata: msgspec.Raw = msgspec.Raw(b"{}")
    content: msgspec.Raw = msgspec.Raw(b"{}")


class ClientHeader(msgspec.Struct):
    """The fields of a request's header that a kernel needs."""

    msg_id: Annotated[str, msgspec.Meta(min_length=1)]
    msg_type: Annotated[str, msgspec.Meta(min_length=1)]
    version: str


_header = msgspec.json.Decoder(ClientHeader)
_legacy = msgspec.json.Decoder(Legacy)
_encoder = msgspec.json.Encoder()


def to_v1(parts: list[bytes]) -> bytes:
    """Parts (channel, header, parent, metadata, content, buffers) as a v1 frame: a table of offsets, then the parts."""
    count = len(parts) + 1
    offsets = [8 * (1 + count)]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    return b"".join([struct.pack(f"<{1 + count}Q", count, *offsets), *parts])


def from_v1(frame: bytes) -> list[bytes]:
    """The parts of a v1 frame.

    Raises:
        LayoutError: it is not a v1 frame.
    """
    if len(frame) < 8:
        raise LayoutError("a frame of this layout begins with 8 bytes")
    (count,) = struct.unpack_from("<Q", frame)
    if not 6 <= count <= MAX_PARTS or len(frame) < 8 * (1 + count):
        raise LayoutError(f"a table of {count} offsets")
    offsets = struct.unpack_from(f"<{count}Q", frame, 8)
    if offsets[0] != 8 * (1 + count) or offsets[-1] != len(frame) or list(offsets) != sorted(offsets):
        raise LayoutError("offsets that don't divide the frame")
    return _checked([frame[first:last] for first, last in pairwise(offsets)])


def to_legacy(parts: list[bytes]) -> str | bytes:
    """Parts as legacy JSON text, or a binary frame if there are buffers. Parts that are JSON already are not parsed."""
    head = message.header(parts[HEADER])
    text = b"".join(
        [
            b'{"header":', parts[HEADER],
            b',"msg_id":', _encoder.encode(head.msg_id),
            b',"msg_type":', _encoder.encode(head.msg_type),
            b',"parent_header":', parts[PARENT],
            b',"metadata":', parts[METADATA],
            b',"content":', parts[CONTENT],
            b',"buffers":[],"channel":', _encoder.encode(parts[CHANNEL].decode("ascii", "replace")), b"}",
        ]
    )  # fmt: skip
    if len(parts) == CONTENT + 1:
        return text.decode("utf-8", "replace")
    return join_legacy([text, *parts[CONTENT + 1 :]])


def join_legacy(pieces: list[bytes]) -> bytes:
    """The binary frame of a JSON text and its buffers."""
    offsets = [4 * (1 + len(pieces))]
    for piece in pieces[:-1]:
        offsets.append(offsets[-1] + len(piece))
    return b"".join([struct.pack(f">{1 + len(pieces)}I", len(pieces), *offsets), *pieces])


def split_legacy(frame: bytes) -> list[bytes]:
    """The JSON text and the buffers of a binary legacy frame.

    Raises:
        LayoutError: it is not such a frame.
    """
    if len(frame) < 4:
        raise LayoutError("a binary frame begins with 4 bytes")
    (count,) = struct.unpack_from(">I", frame)
    if not 1 <= count <= MAX_PARTS or len(frame) < 4 * (1 + count):
        raise LayoutError(f"a table of {count} offsets")
    offsets = [*struct.unpack_from(f">{count}I", frame, 4), len(frame)]
    if offsets[0] != 4 * (1 + count) or offsets != sorted(offsets):
        raise LayoutError("offsets that don't divide the frame")
    return [frame[first:last] for first, last in pairwise(offsets)]


def from_legacy(frame: str | bytes) -> list[bytes]:
    """The parts of a legacy frame, text or binary.

    Raises:
        LayoutError: it is not such a frame.
    """
    text, *buffers = [frame.encode("utf-8", "replace")] if isinstance(frame, str) else split_legacy(frame)
    try:
        found = _legacy.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LayoutError(f"not a message: {error}") from None
    channel = (found.channel or "shell").encode("utf-8", "replace")
    json_parts = [found.header, found.parent_header, found.metadata, found.content]
    return _checked([channel, *map(_object, json_parts), *buffers])


def _object(raw: msgspec.Raw) -> bytes:
    part = bytes(raw)
    return b"{}" if part == b"null" else part


def _checked(parts: list[bytes]) -> list[bytes]:
    """Refuse parts that a kernel would drop without a word, so that the client hears of it."""
    try:
        for part in parts[PARENT : CONTENT + 1]:
            part.decode()
            _raw.decode(part)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise LayoutError("header, parent header, metadata and content are JSON objects") from None
    try:
        parts[HEADER].decode()
        _header.decode(parts[HEADER])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LayoutError(f"a header has `msg_id`, `msg_type` and `version`: {error}") from None
    return parts


def journal_entry(seq: int, parts: list[bytes]) -> dict[str, Any]:
    """A message as one JSON object of the REST journal. Buffers become base64 text."""
    return {
        "seq": seq,
        "channel": parts[CHANNEL].decode("ascii", "replace"),
        "header": message.json_object(parts[HEADER]) or message.EMPTY,
        "parent_header": message.json_object(parts[PARENT]) or message.EMPTY,
        "metadata": message.json_object(parts[METADATA]) or message.EMPTY,
        "content": message.json_object(parts[CONTENT]) or message.EMPTY,
        "buffers": parts[CONTENT + 1 :],  # bytes: msgspec writes them as base64
    }
