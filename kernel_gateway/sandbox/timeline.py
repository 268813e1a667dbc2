"""A sandbox's checkpoints: which there are, which go first when there is no room, and when it went back. Pure."""

from datetime import datetime
from typing import Literal

import msgspec

from kernel_gateway.errors import InsufficientStorage, NotFound, TooManyRequests

KEPT, MARKS = 100, 500
"""Checkpoints that a sandbox may have, and checkpoints and returns to them that are remembered."""


class Checkpoint(msgspec.Struct, tag="checkpoint", tag_field="type"):
    """A sandbox as it stood at one moment. `size` is in bytes of disk.

    `cell` is the id of the last cell that was over then. `state` tells whether it is still there: thinned is one that
    made room for others.
    """

    number: int
    at: datetime
    size: int = msgspec.field(name="bytes")
    cell: str
    is_automatic: bool = msgspec.field(name="automatic")
    state: Literal["kept", "thinned", "deleted"] = "kept"


class Return(msgspec.Struct, tag="restored", tag_field="type"):
    """The sandbox went back to the checkpoint of that number."""

    number: int = msgspec.field(name="checkpoint")
    at: datetime


class Timeline(msgspec.Struct):
    """The checkpoints of one sandbox, and its returns to them, the oldest first.

    With `is_automatic` a checkpoint is taken after each cell. `last` is the newest checkpoint's number. `trouble` says
    why the last automatic one could not be taken; it is empty if it could.
    """

    is_automatic: bool = False
    marks: list[Checkpoint | Return] = []
    last: int = 0
    trouble: str = ""

    @property
    def kept(self) -> list[Checkpoint]:
        """The checkpoints that are there."""
        return [each for each in self.marks if isinstance(each, Checkpoint) and each.state == "kept"]

    @property
    def size(self) -> int:
        """Bytes of disk that the checkpoints take."""
        return sum(each.size for each in self.kept)

    def find(self, number: int) -> Checkpoint:
        """The checkpoint of that number.

        Raises:
            NotFound: there is none any more, or there never was.
        """
        found = next((each for each in self.marks if isinstance(each, Checkpoint) and each.number == number), None)
        if found is None or found.state != "kept":
            raise NotFound("checkpoint not found", hint=None if found is None else f"it was {found.state}")
        return found

    def in_the_way(self, size: int, budget: int) -> list[Checkpoint]:
        """The checkpoints that must go before there is room for another one: the oldest automatic ones.

        The one that the sandbox went back to last goes after the others, because tries begin there.

        Args:
            size: bytes of disk that the new one takes at most.
            budget: bytes that all may take.

        Raises:
            TooManyRequests, InsufficientStorage: there is no room without those that were asked for.
        """
        base = next((each.number for each in reversed(self.marks) if isinstance(each, Return)), 0)
        automatic = sorted((each for each in self.kept if each.is_automatic), key=lambda each: each.number == base)
        going: list[Checkpoint] = []
        left, count = budget - size - self.size, KEPT - 1 - len(self.kept)
        while (left < 0 or count < 0) and automatic:
            going.append(automatic.pop(0))
            left, count = left + going[-1].size, count + 1
        if left < 0:
            raise InsufficientStorage(
                f"the checkpoint may take {size >> 20} MiB, and all of a sandbox may take {budget >> 20} MiB",
                hint="delete some; the operator sets the limit with --max-checkpoints-mb; the sandbox still runs",
            )
        if count < 0:
            raise TooManyRequests(f"a sandbox may have {KEPT} checkpoints", hint="delete some")
        return going

    def add(self, mark: Checkpoint | Return) -> None:
        """Take note of a new checkpoint, or of a return. The oldest mark of what is not there any more is forgotten."""
        self.marks.append(mark)
        if len(self.marks) > MARKS:
            self.marks.remove(next(each for each in self.marks if isinstance(each, Return) or each.state != "kept"))
