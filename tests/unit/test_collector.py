"""What is collected of a cell is what nbclient, which nobody here wrote, makes of the same messages."""

import json
from typing import Any

import msgspec
import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient

from kernel_gateway.api.rest import one_line
from kernel_gateway.kernel import message
from kernel_gateway.kernel.events import Cell, Collector, Events
from kernel_gateway.kernel.notebook import Outputs

Message = tuple[str, dict[str, Any]]

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


def by_nbclient(messages: list[Message]) -> list[dict[str, Any]]:
    cell = nbformat.v4.new_code_cell("")
    client = NotebookClient(nbformat.v4.new_notebook(cells=[cell]))
    client.reset_execution_trackers()
    client.clear_before_next_output = False
    for kind, content in messages:
        told = {"header": {"msg_type": kind}, "msg_type": kind, "parent_header": {"msg_id": "e"}, "content": content}
        client.process_message(json.loads(json.dumps(told)), cell, 0)
    outputs: list[dict[str, Any]] = cell["outputs"]
    return outputs


def by_us(messages: list[Message]) -> tuple[Cell, Outputs]:
    translate, collector, outputs = Events(), Collector(), Outputs()
    for number, (kind, content) in enumerate(messages):
        parts = message.new("iopub", kind, content, session="s")
        for event in translate.receive(number, kind, "e", False, parts):
            collector.add(event)
            (outputs.update if event.type == "update" else outputs.add)(event)
    return collector.cell(), outputs


def data_of(output: Any) -> Any:
    return json.loads(msgspec.json.encode(output.data))


@given(st.lists(MESSAGES, max_size=12).map(known))
def test_collected_as_nbclient_does(messages: list[Message]) -> None:
    """Text by stream, results in their order and the notebook's outputs are the same; an error stays told."""
    right = by_nbclient(messages)
    cell, outputs = by_us(messages)
    for name in ("stdout", "stderr"):
        assert getattr(cell, name) == "".join(each["text"] for each in right if each.get("name") == name)
    kinds = {"execute_result": "result", "display_data": "display"}
    assert [(each.type, data_of(each)) for each in cell.results] == [
        (kinds[each["output_type"]], each["data"]) for each in right if each["output_type"] in kinds
    ]
    assert (cell.error is not None) is (ERROR in messages)
    assert cell.truncated is None
    joined: list[dict[str, Any]] = []
    for each in right:
        if joined and each["output_type"] == "stream" and joined[-1].get("name") == each["name"]:
            joined[-1] = {**joined[-1], "text": joined[-1]["text"] + each["text"]}
        else:
            joined.append(dict(each))
    assert json.loads(msgspec.json.encode(outputs.written())) == joined


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
