"""Kernel messages as the gateway sees them: a channel's name and bare parts. Pure.

Source: https://jupyter-client.readthedocs.io/en/stable/messaging.html
"""

import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

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


class By(msgspec.Struct, frozen=True):
    """Who has asked for something: a client's own word for itself, and the way it has taken."""

    via: str
    name: str


GATEWAY = By("execute", "cellvm")


class Stream(msgspec.Struct, gc=False):
    """The content of a `stream` message."""

    name: str = ""
    text: str = ""


class Text(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """The content of a `stream` message that has what it must have, and nothing else."""

    name: str
    text: str


class Status(msgspec.Struct, gc=False):
    """The content of a `status` message."""

    execution_state: str = ""


class Reply(msgspec.Struct, gc=False):
    """The content of a reply. `restart` is told by a `shutdown_request`, too."""

    status: str = ""
    execution_count: int | None = None
    restart: bool = False


EMPTY = msgspec.Raw(b"{}")
S = TypeVar("S", bound=msgspec.Struct)
_header = msgspec.json.Decoder(Header)
_text = msgspec.json.Decoder(Text)
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


_decoder = cache(msgspec.json.Decoder)


def read(part: bytes | memoryview, kind: type[S]) -> S:
    """Read the fields of a content or metadata part that `kind` has. A malformed part reads as `kind()`.

    Other fields are skipped without being built, however large they are, because JSON as Python objects takes up to
    twenty times its bytes.
    """
    try:
        found: S = _decoder(kind).decode(part)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return kind()
    return found


def number_of(count: int | None) -> int | None:
    """The number of a cell, as a kernel tells it; None if it is none that can be stored."""
    return count if count is not None and 0 <= count < 2**63 else None


class Object(msgspec.Struct):
    """Any JSON object."""


_object = msgspec.json.Decoder(Object)


def json_object(part: bytes | memoryview | msgspec.Raw) -> msgspec.Raw | None:
    """A JSON object as the text that it is, to be put into an answer unread; None if it is malformed or no object."""
    try:
        str(part, "utf-8")
        _object.decode(part)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return part if isinstance(part, msgspec.Raw) else msgspec.Raw(part)


def joined(contents: Sequence[bytes]) -> bytes | None:
    """The contents of several `stream` messages as one.

    None if they are not all of the same stream, or if one is malformed or has more fields. Then each must stay as it
    is, because readers are to see a kernel's nonsense, and the further fields would be lost.
    """
    try:
        pieces = [_text.decode(part) for part in contents]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    name = pieces[0].name
    if any(piece.name != name for piece in pieces):
        return None
    return _encoder.encode(Text(name, "".join(piece.text for piece in pieces)))


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
    by: By = GATEWAY,
) -> list[bytes]:
    """A message by the gateway itself, as parts. `by` is told in its header, and so in the parent of what follows."""
    head = {
        "msg_id": msg_id or uuid.uuid4().hex,
        "msg_type": msg_type,
        "session": session,
        "username": by.name,
        "via": by.via,
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
