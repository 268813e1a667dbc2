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


class Header(msgspec.Struct):
    """The fields of a header that the gateway reads."""

    msg_id: str = ""
    msg_type: str = ""
    session: str = ""


_header = msgspec.json.Decoder(Header)


def header(part: bytes | memoryview) -> Header:
    """Read a header or parent header; a malformed one reads as empty (the guest is not trusted)."""
    try:
        return _header.decode(part)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return Header()


def content(part: bytes | memoryview) -> dict[str, Any]:
    """Read a content part; anything but an object reads as empty."""
    try:
        found = msgspec.json.decode(part)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def request(channel: str, msg_type: str, fields: dict[str, Any], session: str) -> tuple[str, list[bytes]]:
    """A request of the gateway's own: its message id and its parts."""
    msg_id = uuid.uuid4().hex
    head = {
        "msg_id": msg_id,
        "msg_type": msg_type,
        "session": session,
        "username": "cellvm",
        "date": datetime.now(UTC).isoformat(),
        "version": "5.4",
    }
    return msg_id, [channel.encode(), json.dumps(head).encode(), b"{}", b"{}", json.dumps(fields).encode()]


def parent_id(parts: Sequence[bytes | memoryview]) -> str:
    """The id of the request that a message belongs to."""
    return header(parts[PARENT]).msg_id
