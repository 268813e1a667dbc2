"""What is collected of a cell is what nbclient, which nobody here wrote, makes of the same messages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient

from kernel_gateway.api.rest import one_line
from kernel_gateway.kernel import message
from kernel_gateway.kernel.events import Cell, Collector, Events, StreamEvent
from kernel_gateway.kernel.notebook import Notebook

Message = tuple[str, dict[str, Any]]

RECORDED = dict(map(json.loads, (Path(__file__).parents[1] / "corpus" / "recorded.jsonl").read_text().splitlines()))
"""By a notebook's name, the messages of each of its cells. `tests/api/test_corpus.py` records them."""
NAMES = st.sampled_from(["a", "b"])
BUNDLES = st.dictionaries(st.sampled_from(["text/plain", "text/html"]), st.text(max_size=3), max_size=2)


def stream(name: str, text: str) -> Message:
    return "stream", {"name": name, "text": text}


def rich(kind: str, data: dict[str, str], name: str | None) -> Message:
    content = {"data": data, "metadata": {}, "transient": {"display_id": name} if name else {}}
    return kind, content | ({"execution_count": 1} if kind == "execute_result" else {})


def clear(wait: bool) -> Message:
    return "clear_output", {"wait": wait}


ERROR: Message = ("error", {"ename": "E", "evalue": "v", "traceback": ["t"]})
MESSAGES = st.one_of(
    st.builds(stream, st.sampled_from(["stdout", "stderr"]), st.text(max_size=3)),
    st.builds(rich, st.sampled_from(["display_data", "execute_result"]), BUNDLES, st.none() | NAMES),
    st.builds(rich, st.just("update_display_data"), BUNDLES, NAMES),
    st.builds(clear, st.booleans()),
    st.just(ERROR),
)


def known(messages: list[Message]) -> list[Message]:
    """The messages without updates of what this cell has not displayed, which have a meaning of their own here."""
    names: set[str] = set()
    kept = []
    for kind, content in messages:
        name = content.get("transient", {}).get("display_id")
        if kind == "update_display_data" and name not in names:
            continue
        names.add(name)
        kept.append((kind, content))
    return kept


def by_nbclient(*cells: list[Message]) -> list[list[dict[str, Any]]]:
    """The outputs of each cell of a notebook, with neighbouring text of one stream as one."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("") for _ in cells])
    client = NotebookClient(book)
    client.reset_execution_trackers()
    for number, messages in enumerate(cells):
        client.clear_before_next_output = False
        for kind, content in messages:
            told = {
                "header": {"msg_type": kind},
                "msg_type": kind,
                "parent_header": {"msg_id": "e"},
                "content": content,
            }
            client.process_message(json.loads(json.dumps(told)), book.cells[number], number)
    return [joined(cell["outputs"]) for cell in book.cells]


def joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for each in outputs:
        if found and each["output_type"] == "stream" and found[-1].get("name") == each["name"]:
            found[-1] = {**found[-1], "text": found[-1]["text"] + each["text"]}
        else:
            found.append(dict(each))
    return found


def events_of(messages: list[Message]) -> Iterator[StreamEvent]:
    translate = Events()
    for number, (kind, content) in enumerate(messages):
        yield from translate.receive(number, kind, "e", False, message.new("iopub", kind, content, session="s"))


def by_us(messages: list[Message]) -> Cell:
    collector = Collector()
    for event in events_of(messages):
        collector.add(event)
    return collector.cell()


def in_our_notebook(*cells: list[Message]) -> list[list[dict[str, Any]]]:
    empty = [{"cell_type": "code", "metadata": {}, "source": ""} for _ in cells]
    book = Notebook({"cells": empty, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    for number, messages in enumerate(cells):
        for event in events_of(messages):
            book.add(number, event)
    return [json.loads(msgspec.json.encode(each.written())) for each in book.outputs]


def data_of(output: Any) -> Any:
    return json.loads(msgspec.json.encode(output.data))


def check(messages: list[Message]) -> None:
    """Text by stream and results in their order are nbclient's, and an error stays told."""
    (right,) = by_nbclient(messages)
    cell = by_us(messages)
    for name in ("stdout", "stderr"):
        assert getattr(cell, name) == "".join(each["text"] for each in right if each.get("name") == name)
    kinds = {"execute_result": "result", "display_data": "display"}
    assert [(each.type, data_of(each)) for each in cell.results] == [
        (kinds[each["output_type"]], each["data"]) for each in right if each["output_type"] in kinds
    ]
    assert (cell.error is not None) is any(kind == "error" for kind, _ in messages)
    assert cell.truncated is None


@given(st.lists(MESSAGES, max_size=12).map(known))
def test_collected_as_nbclient_does(messages: list[Message]) -> None:
    """An answer, and a cell of a notebook, hold what nbclient's have."""
    check(messages)
    assert in_our_notebook(messages) == by_nbclient(messages)


@given(st.lists(st.lists(MESSAGES, max_size=6), max_size=4))
def test_cells_of_a_notebook(cells: list[list[Message]]) -> None:
    """Displays are updated across cells as nbclient does it."""
    assert in_our_notebook(*cells) == by_nbclient(*cells)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_notebooks(name: str) -> None:
    """The same holds for what real kernels have sent."""
    cells: list[list[Message]] = RECORDED[name]
    assert in_our_notebook(*cells) == by_nbclient(*cells)
    for messages in cells:
        check(known(messages))


def test_output_that_was_cleared_takes_no_room() -> None:
    """A plot that is drawn anew a thousand times fits where one of them fits, and is not said to be left out."""
    held = 0

    def keep(size: int) -> bool:
        nonlocal held
        held += size
        return held <= 3000

    collector, translate = Collector(result_limit=2000, keep=keep), Events()
    for number in range(1000):
        for kind, content in (clear(True), rich("display_data", {"text/plain": f"{number:01500d}"}, None)):
            for event in translate.receive(number, kind, "e", False, message.new("iopub", kind, content, session="s")):
                collector.add(event)
    assert [data_of(each)["text/plain"] for each in collector.cell().results] == [f"{999:01500d}"]
    assert collector.cell().truncated is None
    assert 1500 < held < 2000


@pytest.mark.parametrize(
    ("payload", "texts"),
    [
        ({"source": "page", "data": {"text/plain": "help"}, "start": 0}, ["help"]),
        ({"source": "set_next_input", "text": "x = 1", "replace": True}, ["x = 1"]),
        ({"source": "edit_magic", "filename": "a.py", "line_number": 1}, []),
        ({"source": "page", "data": "no bundle"}, []),
        ({"source": "made up"}, []),
        ("no payload", []),
    ],
)
def test_what_a_reply_wants_to_be_shown(payload: Any, texts: list[str]) -> None:
    """Pages of help and proposed cells are displays, whatever else a reply holds."""
    content = {"status": "ok", "execution_count": 3, "payload": [payload]}
    parts = message.new("shell", "execute_reply", content, session="s")
    *shown, end = Events().receive(1, "execute_reply", "e", True, parts)
    assert [json.loads(bytes(each.data or b""))["text/plain"] for each in shown] == texts
    assert (end.type, end.executionCount) == ("end", 3)


@given(st.recursive(st.text() | st.none(), lambda inner: st.dictionaries(st.text(), inner), max_leaves=5))
def test_one_line(value: Any) -> None:
    """A line of an answer is one line for every reader, and means the same."""
    for text in (json.dumps(value, ensure_ascii=False), json.dumps(value, indent=1), msgspec.json.encode(value)):
        encoded = text.encode("utf-8", "replace") if isinstance(text, str) else text
        line = one_line(encoded)
        assert json.loads(line) == json.loads(encoded)
        assert len(line.decode().splitlines()) == 1
        assert len(line.splitlines()) == 1
