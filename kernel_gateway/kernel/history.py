"""The cells that a kernel has run, whoever sent them: the beginning of each one's code, and how it ended. No I/O."""

from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec

from kernel_gateway.kernel import message
from kernel_gateway.kernel.events import Input

KEPT, KEPT_CODE = 1000, 200
"""Cells of a kernel that are remembered, and characters of the code of each."""
RUNNING = "running"


class Cell(msgspec.Struct, tag="cell", tag_field="type"):
    """A cell. `id` is its message's, `number` its execution count, and `at` is when it began.

    `status` is running, ok, error, or unknown if its kernel or its machine was gone before it ended.
    """

    id: str
    number: int | None
    code: str
    at: datetime
    status: str = RUNNING


class History:
    """The cells of one kernel, the oldest first."""

    def __init__(self, cells: list[Cell] | None = None) -> None:
        self._cells = cells or []

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._cells)

    def started(self, cell: str, content: bytes) -> None:
        """Take note of an `execute_input` of the kernel's."""
        told = message.read(content, Input)
        self._cells.append(
            Cell(cell, message.number_of(told.execution_count), told.code[:KEPT_CODE], datetime.now(UTC))
        )
        del self._cells[:-KEPT]

    def ended(self, cell: str, status: str) -> None:
        """Take note of a cell's end. A cell that left no `execute_input` is none of the history."""
        for each in reversed(self._cells):
            if each.id == cell and each.status == RUNNING:
                each.status = status
                break

    @property
    def last(self) -> str:
        """The id of the newest cell that is over; empty if there is none."""
        return next((each.id for each in reversed(self._cells) if each.status != RUNNING), "")
