"""Kernel messages turned into a cell's outcome: any order, any content, within limits."""

import itertools
import json
import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_gateway.jupyter import message
from kernel_gateway.jupyter.execution import CellError, Collector, Execution, StreamEvent

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


def msg(kind: str, **content: Any) -> list[bytes]:
    return [b"iopub", json.dumps({"msg_type": kind}).encode(), b"{}", b"{}", json.dumps(content).encode()]


def run(*messages: list[bytes]) -> list[StreamEvent]:
    execution = Execution()
    return [event for each in messages for event in execution.receive(each)]


REPLY = msg("execute_reply", status="ok", execution_count=3)
IDLE = msg("status", execution_state="idle")
TEXT = msg("stream", name="stdout", text="a")


@pytest.mark.parametrize("order", list(itertools.permutations(["reply", "idle", "text"])))
def test_an_execution_ends_with_both_reply_and_idle(order: tuple[str, ...]) -> None:
    """In whatever order they come, the end comes once, last of the two, and carries the count."""
    execution, messages = Execution(), {"reply": REPLY, "idle": IDLE, "text": TEXT}
    ends = []
    for name in order:
        was_done = execution.is_done
        ends += [event for event in execution.receive(messages[name]) if event.type == "end"]
        if {"reply", "idle"} <= set(order[: order.index(name) + 1]) and not was_done:
            assert execution.is_done
            break
        assert not execution.is_done
    assert ends == [StreamEvent("end", executionCount=3)]


def test_other_statuses_are_not_the_end() -> None:
    """Busy, and idle of another kind of message, do not count."""
    assert run(msg("status", execution_state="busy"), REPLY, msg("comm_msg", execution_state="idle")) == []


def test_every_kind_of_event() -> None:
    """Each message type becomes its event; those that nobody needs become none."""
    events = run(
        msg("execute_input", code="x", execution_count=3),
        msg("stream", name="stderr", text="e"),
        msg("display_data", data={"text/plain": "d"}, metadata={"k": 1}),
        msg("update_display_data", data={"text/plain": "u"}),
        msg("execute_result", data={"text/plain": "r"}, metadata=None),
        msg("clear_output", wait=True),
        msg("error", ename="E", evalue="v", traceback=["t"]),
        IDLE,
        REPLY,
    )
    assert events == [
        StreamEvent("started", executionCount=3),
        StreamEvent("stderr", text="e"),
        StreamEvent("display", data={"text/plain": "d"}, metadata={"k": 1}),
        StreamEvent("display", data={"text/plain": "u"}, metadata={}),
        StreamEvent("result", data={"text/plain": "r"}, metadata={}),
        StreamEvent("error", error=CellError("E", "v", ["t"])),
        StreamEvent("end", executionCount=3),
    ]


def test_aborted() -> None:
    """A cell that was never run because one before failed says so."""
    events = run(msg("execute_reply", status="aborted"), IDLE)
    assert [event.type for event in events] == ["error", "end"]
    assert events[0].error is not None
    assert events[0].error.name == "Aborted"


def test_an_error_is_told_once() -> None:
    """An error that is published and repeated in the reply is one event; one only in the reply is not lost."""
    failed = msg("execute_reply", status="error", ename="E", evalue="v", traceback=[])
    published = msg("error", ename="E", evalue="v", traceback=[])
    for order in ((published, failed, IDLE), (failed, published, IDLE), (failed, IDLE)):
        events = run(*order)
        assert [event.type for event in events].count("error") == 1, order
        assert events[-1].type == "end"


def test_abandon() -> None:
    """A cell whose kernel is gone is over."""
    execution = Execution()
    execution.abandon()
    assert execution.is_done


KINDS = [
    "stream", "execute_result", "display_data", "update_display_data", "error", "execute_input", "status",
    "execute_reply", "", "made_up",
]  # fmt: skip
FIELDS = [
    "name", "text", "data", "metadata", "ename", "evalue", "traceback", "execution_state", "execution_count", "status",
]  # fmt: skip


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(FIELDS), JSON)), max_size=20))
def test_any_content_can_be_taken(messages: list[tuple[str, dict[str, Any]]]) -> None:
    """Content of whatever types raises nothing, and the outcome can be written as JSON."""
    execution, collector = Execution(), Collector(text_limit=50, result_limit=2000)
    for kind, content in messages:
        for event in execution.receive(msg(kind, **content)):
            collector.add(event)
    message.msgspec.json.encode(collector.cell())


@given(st.lists(st.binary(max_size=40), min_size=5, max_size=5))
def test_any_bytes_can_be_taken(parts: list[bytes]) -> None:
    """Parts that are no JSON at all raise nothing."""
    assert Execution().receive(parts) == []
    assert isinstance(message.parent_id(parts), str)


@pytest.mark.parametrize("part", [b"", b"null", b"[]", b"3", b"{", b"\xff", b'{"a": 1', b"[" * 100_000])
def test_malformed_headers_and_content_read_as_empty(part: bytes) -> None:
    """The guest is not trusted to write JSON."""
    assert message.header(part) == message.Header()
    assert message.content(part) == {}
    assert message.content(memoryview(part)) == {}
    assert message.header(b'{"msg_type": 3, "msg_id": "x"}') == message.Header()


def test_text_is_cut_at_the_limit() -> None:
    """Text is kept up to the limit of each stream; the rest is counted, streams apart."""
    collector = Collector(text_limit=10)
    for name, text in (("stdout", "x" * 8), ("stderr", "e"), ("stdout", "y" * 8), ("stdout", "z")):
        collector.add(StreamEvent(name, text=text))
    cell = collector.cell()
    assert (cell.stdout, cell.stderr) == ("x" * 8 + "yy", "e")
    assert cell.truncated is not None
    assert (cell.truncated.stdout, cell.truncated.stderr, cell.truncated.results) == (7, 0, 0)


def test_results_are_left_out_at_the_limit() -> None:
    """A result that does not fit is left out and counted; a smaller one after it still fits."""
    collector = Collector(result_limit=100)
    for size in (60, 60, 30):
        collector.add(StreamEvent("display", data={"text/plain": "x" * size}, metadata={}))
    cell = collector.cell()
    assert [len(result.data["text/plain"]) for result in cell.results] == [60, 30]
    assert cell.truncated is not None
    assert cell.truncated.results == 1


def test_nothing_left_out_is_not_mentioned() -> None:
    """An outcome that is whole has no `truncated`."""
    collector = Collector()
    collector.add(StreamEvent("stdout", text="a"))
    collector.add(StreamEvent("end", executionCount=2))
    assert (collector.cell().truncated, collector.cell().executionCount) == (None, 2)


def test_a_request_of_ours() -> None:
    """A request has the documented form: channel, header with a fresh id, empty parent and metadata, content."""
    msg_id, parts = message.request("shell", "execute_request", {"code": "ü"}, "session")
    assert parts[0] == b"shell"
    header = json.loads(parts[1])
    assert header["msg_id"] == msg_id
    assert uuid.UUID(msg_id)
    assert (header["msg_type"], header["session"]) == ("execute_request", "session")
    assert {"username", "date", "version"} <= set(header)
    assert (parts[2], parts[3], json.loads(parts[4])) == (b"{}", b"{}", {"code": "ü"})
    assert message.request("shell", "x", {}, "s")[0] != msg_id
