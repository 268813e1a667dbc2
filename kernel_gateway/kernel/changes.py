"""What a cell changed, as its kernel reports it. Pure.

The report is in the metadata of the cell's reply, as `cellvm.changes`. The kernel is not trusted, so a report is
bounded, and one that is not of the form below counts as none.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from kernel_gateway.kernel import message

MAX_METADATA = 64 * 1024
"""Bytes of the metadata of a cell's reply. Larger metadata is dropped. That of IPython has 200 without a report."""
Word = Annotated[str, Meta(max_length=100)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Described(msgspec.Struct, frozen=True, omit_defaults=True):
    """A variable after the cell. It has a length or a shape if its type is Python's or a known library's."""

    name: Word
    type: Word
    module: Word
    length: Count | None = None
    shape: Annotated[list[Count], Meta(max_length=8)] | None = None


class Variables(msgspec.Struct, frozen=True):
    """The variables that a cell made, bound to something else, and removed. `omitted` more are only counted."""

    added: Annotated[list[Described], Meta(max_length=50)]
    changed: Annotated[list[Described], Meta(max_length=50)]
    removed: Annotated[list[Word], Meta(max_length=50)]
    omitted: Count


class Changes(msgspec.Struct, frozen=True):
    """What a cell changed."""

    variables: Variables


class Report(msgspec.Struct, frozen=True):
    """What a kernel says for us."""

    changes: Changes


class Reported(msgspec.Struct):
    """The metadata of a cell's reply, as far as we have asked for it."""

    cellvm: Report | None = None


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def checked(metadata: bytes) -> bytes:
    """The metadata of a cell's reply with the kernel's report first, where `numbered` wants it, or without one.

    Nothing else that a kernel says in our name is left.
    """
    if len(metadata) > MAX_METADATA:
        return b"{}"
    try:
        fields = _fields.decode(metadata)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return b"{}"
    if "cellvm" not in fields:
        return metadata
    report = message.read(metadata, Reported).cellvm
    del fields["cellvm"]
    return msgspec.json.encode(fields if report is None else {"cellvm": report, **fields})


def changes(metadata: bytes) -> Changes | None:
    """What the metadata of a reply tells, once it is checked."""
    report = message.read(metadata, Reported).cellvm if message.OURS in metadata else None
    return None if report is None else report.changes
