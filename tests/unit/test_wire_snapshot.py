"""The protocol's surface, compared with a file in the repository, so that every change shows as a diff."""

import json
import os
from pathlib import Path
from typing import Any, get_args

import msgspec

from guest_agent import wire

SNAPSHOT = Path(__file__).parent / f"wire_generation_{wire.GENERATION}.json"
CONSTANTS = (
    "GENERATION", "CHUNK", "MAX_CONTROL", "MAX_DATA", "MAX_MESSAGE", "MAX_PARTS", "INITIAL_CREDIT", "EVENTS", "KERNEL",
    "KERNEL_CONTROL", "LINK", "FIRST_STREAM", "MORE", "STDIN", "STDOUT", "STDERR", "MAX_TEXT", "MAX_METADATA",
    "MAX_CHANGES",
)  # fmt: skip
BLESS = f"BLESS=1 python -m pytest tests/unit/{Path(__file__).name}"


def surface() -> dict[str, Any]:
    """All that a peer must agree on."""
    bodies = sorted(wire.Body.__subclasses__(), key=lambda kind: kind.__name__)
    return {
        "header": wire.HEADER.format,
        "constants": {name: getattr(wire, name) for name in CONSTANTS},
        "frames": {kind.name: {"number": kind.value, "limit": wire._LIMITS[kind]} for kind in wire.FrameType},
        "failures": sorted(wire.FAILURES),
        "unions": {
            name: sorted(kind.__name__ for kind in get_args(getattr(wire, name)))
            for name in ("Request", "Reply", "Event")
        },
        "bodies": {kind.__name__: {f.name: describe(f) for f in msgspec.structs.fields(kind)} for kind in bodies},
    }


def describe(field: msgspec.structs.FieldInfo) -> str:
    kind = field.type.__name__ if isinstance(field.type, type) and not get_args(field.type) else str(field.type)
    return kind if field.required else f"{kind} = {field.default!r}"


def test_the_protocol_is_the_one_that_was_agreed() -> None:
    """Frame types, limits, constants, bodies and their fields are those of the checked-in file."""
    found = json.dumps(surface(), indent=1) + "\n"
    if os.environ.get("BLESS"):
        SNAPSHOT.write_text(found)
    assert found == SNAPSHOT.read_text(), f"the wire has changed; if that is meant: {BLESS}"


def test_the_file_shows_every_constant_and_body() -> None:
    """Nothing of the protocol is left out of the comparison."""
    numbers = {name for name, value in vars(wire).items() if name.isupper() and isinstance(value, int)}
    assert numbers == set(CONSTANTS)
    in_unions = {kind for name in ("Request", "Reply", "Event") for kind in get_args(getattr(wire, name))}
    assert set(wire.Body.__subclasses__()) == in_unions | {wire.Failure}


def test_added_fields_are_optional() -> None:
    """A body written by an older peer, without fields that have a default, is still understood."""
    assert wire.decode(
        wire.Frame(wire.FrameType.REQUEST, 16, 0, msgspec.msgpack.encode({"type": "Read", "path": "/x"}))
    ) == wire.Read(path="/x")
