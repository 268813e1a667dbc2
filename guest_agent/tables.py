"""The first and last rows of a data frame as data, for whoever shows tables without HTML.

Libraries are found where the user has imported them. Nothing is imported here, because that would cost each kernel the
time. Only a library's own types are read, not types that are made of them, because those may run anything.
"""

import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

MIME = "application/vnd.cellvm.table+json"
FIRST, LAST = 5, 3
"""Rows of the beginning and of the end."""
MAX_COLUMNS, MAX_CELL = 30, 60
MAX_SIZE = 16 * 1024
"""Bytes of a table as JSON. One that is larger has fewer columns."""

Table = dict[str, Any]


def connect(shell: Any) -> None:
    """Add the type to what a shell shows of a data frame."""
    from IPython.core.formatters import BaseFormatter

    class Formatter(BaseFormatter):
        """Rows of a data frame or a series."""

        format_type = MIME

        def __call__(self, thing: Any) -> Table | None:
            try:
                return table(thing)
            except Exception:  # noqa: BLE001  a library of another version; the text shows what there is
                return None

    shell.display_formatter.formatters[MIME] = Formatter(parent=shell.display_formatter)


def table(thing: Any) -> Table | None:
    """The table of a data frame or a series of pandas or polars; None of anything else."""
    for library, name, read in READERS:
        module = sys.modules.get(library)
        if type(module) is ModuleType and type(thing) is vars(module).get(name):
            count = MAX_COLUMNS
            while size_of(made := {"kind": name, **read(thing, count)}) > MAX_SIZE:
                count //= 2
            return made
    return None


def size_of(made: Table) -> int:
    """Bytes of a table as it is sent. What can't be UTF-8, as in names of files, becomes `?` on the way."""
    return len(json.dumps(made, ensure_ascii=False).encode("utf-8", "replace"))


def of_pandas(frame: Any, count: int) -> Table:
    rows, columns = frame.shape
    first, last = ends(rows)
    parts = [frame.iloc[:first, :count], frame.iloc[rows - last :, :count]]
    dtypes = [cut(each) for each in parts[0].dtypes]
    return {
        "shape": [rows, columns],
        "columns": [
            {"name": cut(name), "dtype": dtype}
            for name, dtype in zip(frame.columns[:count].tolist(), dtypes, strict=True)
        ],
        **{
            name: lines([part.index.tolist(), *(part.iloc[:, n].tolist() for n in range(len(dtypes)))])
            for name, part in zip(("first", "last"), parts, strict=True)
        },
    }


def of_polars(frame: Any, count: int) -> Table:
    rows, columns = frame.shape
    first, last = ends(rows)
    shown = frame.columns[:count]
    return {
        "shape": [rows, columns],
        "columns": [
            {"name": cut(name), "dtype": cut(dtype)} for name, dtype in zip(shown, frame.dtypes[:count], strict=True)
        ],
        **{
            name: lines([list(range(at, at + size)), *(frame.to_series(n).slice(at, size).to_list()
                                                       for n in range(len(shown)))])
            for name, at, size in (("first", 0, first), ("last", rows - last, last))
        },
    }  # fmt: skip


READERS: list[tuple[str, str, Callable[[Any, int], Table]]] = [
    ("pandas", "DataFrame", of_pandas),
    ("pandas", "Series", lambda series, count: of_pandas(series.to_frame(), count)),
    ("polars", "DataFrame", of_polars),
    ("polars", "Series", lambda series, count: of_polars(series.to_frame(), count)),
]
"""Where a type is to be found, and what reads it, given how many columns are wanted."""


def ends(rows: int) -> tuple[int, int]:
    """How many rows of the beginning and of the end are shown. A short table is all beginning."""
    return (rows, 0) if rows <= FIRST + LAST else (FIRST, LAST)


def lines(columns: list[list[Any]]) -> list[list[str]]:
    """Columns as rows of text."""
    return [[cut(cell) for cell in row] for row in zip(*columns, strict=True)]


def cut(cell: Any) -> str:
    """A cell as text, with the digits of a float that people read."""
    text = f"{cell:.8g}" if type(cell) is float else str(cell)
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"
