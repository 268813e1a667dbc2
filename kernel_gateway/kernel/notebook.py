"""Notebooks. The events of an execution become the outputs of its cell.

Outputs and notebooks are plain dictionaries in the shape of nbformat 4.5. nbformat itself reads, checks and writes
them.
"""

import os
import re
import shutil
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kernel_gateway.kernel.events import CellError, StreamEvent, values
from kernel_gateway.kernel.message import EMPTY

MAX_CELL = 128 * 1024 * 1024
"""Bytes that one cell's outputs may take, because a runaway `print` must not fill the host's memory."""
PIECE = 100
"""Bytes that every piece of output counts besides its content."""
METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"},
    "language_info": {
        "name": "python",
        "mimetype": "text/x-python",
        "file_extension": ".py",
        "codemirror_mode": {"name": "ipython", "version": 3},
        "pygments_lexer": "ipython3",
        "nbconvert_exporter": "python",
    },
}
JSON_TYPE = re.compile(r"application/(.*\+)?json")
Json = dict[str, Any]


class NotebookError(Exception):
    """A file can't be used as a notebook. The text says why."""


class Outputs:
    """The outputs of one execution, as a code cell keeps them.

    `error` is the error that it raised, `execution_count` its number.
    """

    def __init__(self, limit: int = MAX_CELL) -> None:
        self.error: CellError | None = None
        self.execution_count: int | None = None
        self._items: list[Json] = []
        self._displays: dict[str, list[Json]] = {}
        self._is_clear_due = False
        self._limit = self._room = limit
        self._left_out = 0

    def add(self, event: StreamEvent) -> None:
        """Take the next event of the execution, unless it is an update, which goes to `update`."""
        match event.type:
            case "started" | "end":
                self.execution_count = count(event) or self.execution_count
            case "stdout" | "stderr":
                self._say(event.type, event.text or "")
            case "gap":
                self._say("stderr", left_out(event.messages or 0))
            case "result" | "display":
                item: Json = {"output_type": "display_data"}
                if event.type == "result":
                    item = {"output_type": "execute_result", "execution_count": count(event) or self.execution_count}
                item |= {"data": bundle(event), "metadata": event.metadata or EMPTY}
                if self._append(item) and event.displayId:
                    self._displays.setdefault(event.displayId, []).append(item)
            case "error" if event.error is not None:
                self.error = event.error
                name, value, traceback = event.error.name, event.error.value, event.error.traceback
                self._append({"output_type": "error", "ename": name, "evalue": value, "traceback": traceback})
            case "clear" if event.wait:
                self._is_clear_due = True
            case "clear":
                self._clear()

    def update(self, event: StreamEvent) -> None:
        """Replace the data of the displays with the event's id, if there are any here."""
        for item in self._displays.get(event.displayId or "", ()):
            new = {"data": bundle(event), "metadata": event.metadata or EMPTY}
            if self._fits(size(new) - size({name: item[name] for name in new})):
                item.update(new)

    def written(self) -> list[Json]:
        """The outputs so far, in nbformat's shape. Data and metadata are still JSON text."""
        items = [
            {**item, "text": "".join(item["text"])} if item["output_type"] == "stream" else item for item in self._items
        ]
        if self._left_out:
            items.append({"output_type": "stream", "name": "stderr", "text": left_out(self._left_out)})
        return items

    def _say(self, name: str, text: str) -> None:
        """Add text to text of the same stream. The pieces are joined only in `written`."""
        last = self._items[-1] if self._items and not self._is_clear_due else {}
        if last.get("name") != name:
            self._append({"output_type": "stream", "name": name, "text": [text]})
        elif self._fits(size(text)):
            last["text"].append(text)

    def _append(self, item: Json) -> bool:
        if self._is_clear_due:
            self._clear()
        fits = self._fits(size(item))
        if fits:
            self._items.append(item)
        return fits

    def _fits(self, length: int) -> bool:
        """Take that much of the room, or count one more item that is left out."""
        fits = length <= self._room
        self._room -= length if fits else 0
        self._left_out += not fits
        return fits

    def _clear(self) -> None:
        self._is_clear_due = False
        self._items.clear()
        self._displays.clear()
        self._room, self._left_out = self._limit, 0


class Notebook:
    """A notebook whose code cells get new outputs. `cells` are its code cells that are not tagged `skip-execution`."""

    def __init__(self, node: Json) -> None:
        self.node = node
        self.cells: list[Json] = [
            cell for cell in node["cells"] if cell["cell_type"] == "code" and "skip-execution" not in tags(cell)
        ]
        self.outputs = [Outputs() for _ in self.cells]

    @classmethod
    def read(cls, path: Path) -> "Notebook":
        """The notebook in a file. Formats before 4 are converted.

        Raises:
            NotebookError: the file is no notebook, or not one in Python, or newer than nbformat knows.
        """
        nbformat = library()
        content = path.read_bytes()
        try:
            head = msgspec.json.decode(content, type=Head)
            if head.nbformat > nbformat.current_nbformat:
                raise NotebookError(
                    f"{path} has the notebook format {head.nbformat}.{head.nbformat_minor}; "
                    f"the newest that can be read is {nbformat.current_nbformat}"
                )
            node = nbformat.convert(nbformat.reader.reads(content.decode()), nbformat.current_nbformat)
            with warnings.catch_warnings(action="ignore"):  # it warns of ids that it adds to cells
                _, node = nbformat.validator.normalize(node)
            nbformat.validate(node)
        except nbformat.ValidationError as error:
            raise NotebookError(f"{path} is not a valid notebook: {error.message}") from error
        except (msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError) as error:
            # nbformat's converters trust old files, so they may fail in many ways
            raise NotebookError(f"{path} is not a notebook: {error}") from error
        metadata = node["metadata"]
        language = metadata.get("language_info", {}).get("name") or metadata.get("kernelspec", {}).get("language")
        if str(language or "python").lower() not in ("python", "ipython"):
            raise NotebookError(f"{path} is a notebook in {language}; sandboxes run Python")
        for name, value in METADATA.items():
            metadata.setdefault(name, value)
        return cls(node)

    def add(self, number: int, event: StreamEvent) -> None:
        """Take an event of cell `number`. What is displayed under one id is the same everywhere, in whichever cell."""
        if event.displayId:
            for outputs in self.outputs:
                outputs.update(event)
        if event.type != "update":
            self.outputs[number].add(event)

    def to_bytes(self) -> bytes:
        """The notebook as a file's content."""
        nbformat = library()
        for cell, outputs in zip(self.cells, self.outputs, strict=True):
            cell["outputs"] = msgspec.json.decode(msgspec.json.encode(outputs.written()))
            cell["execution_count"] = outputs.execution_count
        node = nbformat.from_dict(self.node)
        nbformat.validate(node)
        text: str = nbformat.v4.writes(node, ensure_ascii=False)
        return (text + "\n").encode()

    def write(self, path: Path) -> None:
        """Write a file, or replace it as a whole, because a full disk must not cost the notebook that was there."""
        content = self.to_bytes()
        path = path.resolve()
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_bytes(content)
            if path.exists():
                shutil.copymode(path, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


class Head(msgspec.Struct):
    """The fields that tell a notebook from other JSON."""

    nbformat: int
    nbformat_minor: int = 0
    cells: list[Json] = []


def library() -> Any:
    """nbformat, imported when it is first needed, because it and its schema library take tens of MiB."""
    import nbformat

    return nbformat


def session_notebook(cells: Iterable[tuple[str, int | None, Sequence[StreamEvent]]]) -> bytes:
    """A session as a notebook: for each cell its code, its execution count and all its events.

    nbformat is not used, because it would make Python objects of all data, and they take up to twenty times the bytes.
    """
    given = list(cells)
    book = Notebook(
        {
            "nbformat": 4,
            "nbformat_minor": 5,
            "metadata": METADATA,
            "cells": [
                {"cell_type": "code", "id": f"cell-{number}", "metadata": {}, "source": code}
                for number, (code, _, _) in enumerate(given, 1)
            ],
        }
    )
    # The kernel's order counts, because a thread of an early cell may update a display after a later cell did.
    in_order = sorted(((n, event) for n, cell in enumerate(given) for event in cell[2]), key=lambda pair: pair[1].seq)
    for number, event in in_order:
        book.add(number, event)
    for cell, outputs, (_, execution_count, _) in zip(book.cells, book.outputs, given, strict=True):
        cell["outputs"] = outputs.written()
        cell["execution_count"] = execution_count if execution_count is not None else outputs.execution_count
    # A cell has a line. The data is not indented, because the blanks before deeply nested data could be any number.
    cells_json = b",\n".join(msgspec.json.encode(cell) for cell in book.node.pop("cells"))
    return b'{"cells": [\n' + cells_json + b"\n]," + msgspec.json.encode(book.node)[1:] + b"\n"


def tags(cell: Json) -> list[str]:
    found: list[str] = cell["metadata"].get("tags", [])
    return found


def count(event: StreamEvent) -> int | None:
    """The event's execution count if it is valid, because a kernel may send anything."""
    value = event.executionCount
    return value if value is not None and not isinstance(value, bool) and value >= 0 else None


def bundle(event: StreamEvent) -> dict[str, msgspec.Raw]:
    """The event's MIME bundle as the format wants it. Data whose type is not JSON is text."""
    return {
        mime: value if bytes(value).startswith(b'"') or JSON_TYPE.fullmatch(mime) else as_text(value)
        for mime, value in values(event.data).items()
    }


def as_text(value: msgspec.Raw) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(str(value, "utf-8")))


def size(content: Json | str) -> int:
    return PIECE + len(msgspec.json.encode(content))


def left_out(messages: int) -> str:
    return f"\n[{messages} messages of output are missing here: there was more than is kept]\n"
