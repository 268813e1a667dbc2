"""Kernel messages as the gateway sees them: a channel's name and bare parts. Pure.

Source: https://jupyter-client.readthedocs.io/en/stable/messaging.html
"""

import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

CHANNEL, HEADER, PARENT, METADATA, CONTENT = range(5)
"""Positions of the parts; binary buffers follow."""
SENT_BY_KERNEL = frozenset({b"shell", b"iopub", b"stdin", b"control"})
SENT_BY_CLIENT = frozenset({b"shell", b"stdin", b"control"})
VERSION = "5.4"
OURS = b'{"cellvm":{'
MAX_HEADER = 64 * 1024
MAX_FIELD = 256
"""Bytes of a header, and characters of an id or a type. A header with more reads as empty, because nobody may make us
decode or keep it."""


class Header(msgspec.Struct, gc=False):
    """The fields of a header that the gateway reads."""

    msg_id: str = ""
    msg_type: str = ""
    session: str = ""


class Stream(msgspec.Struct, gc=False):
    """The content of a `stream` message."""

    name: str
    text: str


class Status(msgspec.Struct, gc=False):
    """The content of a `status` message. Other fields are skipped, however large they are."""

    execution_state: str = ""


_header = msgspec.json.Decoder(Header)
_status = msgspec.json.Decoder(Status)
_stream = msgspec.json.Decoder(Stream)
_encoder = msgspec.json.Encoder()


def header(part: bytes | memoryview) -> Header:
    """Read a header or parent header. A malformed one reads as empty, because the guest is not trusted."""
    if len(part) > MAX_HEADER:
        return Header()
    try:
        found = _header.decode(part)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return Header()
    is_short = max(len(found.msg_id), len(found.msg_type), len(found.session)) <= MAX_FIELD
    return found if is_short else Header()


def execution_state(part: bytes | memoryview) -> str:
    """The state that the content of a `status` message tells; empty if it is malformed."""
    try:
        return _status.decode(part).execution_state
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return ""


def content(part: bytes | memoryview) -> dict[str, Any]:
    """Read a content part. Anything but an object reads as empty."""
    try:
        found = msgspec.json.decode(part)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def joined(contents: Sequence[bytes]) -> bytes | None:
    """The contents of several `stream` messages as one; None if they are not all of the same stream."""
    try:
        pieces = [_stream.decode(part) for part in contents]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    name = pieces[0].name
    if any(piece.name != name for piece in pieces):
        return None
    return _encoder.encode(Stream(name, "".join(piece.text for piece in pieces)))


def numbered(metadata: bytes, seq: int) -> bytes:
    """A metadata part that also tells the message's number in its journal, as `cellvm.seq`."""
    if metadata.startswith(OURS):  # one of the gateway's own messages
        return OURS + b'"seq":%d,' % seq + metadata[len(OURS) :]
    own = b'{"cellvm":{"seq":%d}' % seq
    rest = metadata.lstrip()[1:].lstrip() if metadata.lstrip().startswith(b"{") else b"}"
    return own + rest if rest.startswith(b"}") else own + b"," + rest


def new(
    channel: str,
    msg_type: str,
    fields: dict[str, Any],
    *,
    session: str,
    parent: bytes = b"{}",
    msg_id: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> list[bytes]:
    """A message by the gateway itself, as parts."""
    head = {
        "msg_id": msg_id or uuid.uuid4().hex,
        "msg_type": msg_type,
        "session": session,
        "username": "cellvm",
        "date": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "version": VERSION,
    }
    return [
        channel.encode(),
        _encoder.encode(head),
        parent,
        _encoder.encode(metadata or {}),
        json.dumps(fields).encode(),  # not by msgspec, because text from users may hold lone surrogates
    ]
