"""Kernel messages as parts, and turned into events and a cell's outcome: any content, within limits."""

import json
import tracemalloc
import uuid
from datetime import datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_gateway.kernel import layout, message
from kernel_gateway.kernel.events import Cell, CellError, Collector, Events, Result, StreamEvent, values
from kernel_gateway.kernel.notebook import session_notebook

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
NO_JSON_OBJECT = [b"", b"null", b"[]", b"3", b"{", b"\xff", b'{"a": 1', b"[" * 100_000]


KINDS = (
    "stream execute_result display_data update_display_data clear_output error execute_input execute_reply "
    "input_request status made_up"
).split()


def raw(value: Any) -> msgspec.Raw:
    """A value as `json.dumps` writes it."""
    return msgspec.Raw(json.dumps(value).encode())


def text_of(result: Result) -> str:
    text: str = msgspec.json.decode(values(result.data)["text/plain"])
    return text


def msg(kind: str, metadata: dict[str, Any] | None = None, /, **content: Any) -> list[bytes]:
    return [b"iopub", json.dumps({"msg_type": kind}).encode(), b"{}", json.dumps(metadata or {}).encode(),
            json.dumps(content).encode()]  # fmt: skip


def events(*messages: tuple[str, dict[str, Any]], execution: str = "e", ends: bool = False) -> list[StreamEvent]:
    """Events of messages numbered from 1. The last message may end the execution."""
    translate = Events()
    return [
        event
        for seq, (kind, content) in enumerate(messages, 1)
        for event in translate.receive(seq, kind, execution, ends and seq == len(messages), msg(kind, **content))
    ]


def check(
    expected: StreamEvent | None,
    kind: str,
    content: dict[str, Any],
    execution: str = "e",
    metadata: dict[str, Any] | None = None,
) -> None:
    """Check that a message becomes this one event, with its number and execution, or none."""
    found = Events().receive(7, kind, execution, False, msg(kind, metadata, **content))
    assert found == ([] if expected is None else [msgspec.structs.replace(expected, seq=7, id=execution)])


# -- events


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("execute_input", {"code": "x", "execution_count": 3}, StreamEvent("started", executionCount=3)),
        ("stream", {"name": "stdout", "text": "o"}, StreamEvent("stdout", text="o")),
        ("stream", {"name": "stderr", "text": "e"}, StreamEvent("stderr", text="e")),
        ("stream", {"name": "other", "text": "e"}, None),
        (
            "display_data",
            {"data": {"text/plain": "d"}, "metadata": {"k": 1}, "transient": {"display_id": "i"}},
            StreamEvent("display", data=raw({"text/plain": "d"}), metadata=raw({"k": 1}), displayId="i"),
        ),
        ("display_data", {"data": {}, "transient": {}}, StreamEvent("display", data=raw({}), metadata=raw({}))),
        ("display_data", {"data": "no"}, None),
        (
            "update_display_data",
            {"data": {"text/plain": "u"}, "transient": {"display_id": "i"}},
            StreamEvent("update", data=raw({"text/plain": "u"}), metadata=raw({}), displayId="i"),
        ),
        (
            "execute_result",
            {"data": {"text/plain": "r"}, "metadata": None, "execution_count": 4},
            StreamEvent("result", data=raw({"text/plain": "r"}), metadata=raw({}), executionCount=4),
        ),
        ("clear_output", {"wait": True}, StreamEvent("clear", wait=True)),
        ("clear_output", {}, StreamEvent("clear", wait=False)),
        (
            "error",
            {"ename": "E", "evalue": "v", "traceback": ["t"]},
            StreamEvent("error", error=CellError("E", "v", ["t"])),
        ),
        (
            "error",
            {"ename": "E", "evalue": "v", "traceback": [], "code": "exec_timeout", "stateKept": True},
            StreamEvent("error", error=CellError("E", "v", [], "exec_timeout", True)),
        ),
        (
            "input_request",
            {"prompt": "name? ", "password": True},
            StreamEvent("input_request", prompt="name? ", password=True),
        ),
        ("input_request", {}, StreamEvent("input_request", prompt="", password=False)),
        ("execute_reply", {"status": "ok", "execution_count": 3}, None),
        ("execute_reply", {"status": "error", "ename": "E"}, None),
        ("comm_msg", {"data": {}}, None),
        ("kernel_info_reply", {"status": "ok"}, None),
    ],
)
def test_every_kind_of_event(kind: str, content: dict[str, Any], expected: StreamEvent | None) -> None:
    """Each message type becomes its event, with the number and the execution. Types that nobody needs become none."""
    check(expected, kind, content)


@pytest.mark.parametrize(
    ("state", "execution", "is_told"),
    [
        ("busy", "e", False),
        ("idle", "e", False),
        ("busy", "", True),
        ("idle", "", True),
        ("starting", "e", True),
        ("dead", "", True),
    ],
)
def test_which_statuses_are_events(state: str, execution: str, is_told: bool) -> None:
    """The kernel's own states are events. A request's busy and idle are not."""
    check(StreamEvent("status", state=state) if is_told else None, "status", {"execution_state": state}, execution)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (
            {"cellvm": {"reason": "out of memory", "exitCode": 0, "signal": 9, "seq": 3}},
            StreamEvent("status", state="dead", reason="out of memory", exitCode=0, signal=9),
        ),
        ({}, StreamEvent("status", state="dead")),
        ({"cellvm": None}, StreamEvent("status", state="dead")),
        ({"cellvm": [1]}, StreamEvent("status", state="dead")),
        (
            {"cellvm": {"reason": 5, "exitCode": "x", "signal": []}},
            StreamEvent("status", state="dead"),
        ),
    ],
)
def test_a_status_tells_its_cause(metadata: dict[str, Any], expected: StreamEvent) -> None:
    """The reason of a kernel's end is in the message's metadata. Nonsense there does no harm."""
    check(expected, "status", {"execution_state": "dead"}, "", metadata)


@pytest.mark.parametrize("kind", ["status", "execute_reply", "comm_msg", "made_up"])
def test_the_end(kind: str) -> None:
    """The message that the journal marks is the end, whatever its kind, and it carries the count."""
    started = ("execute_input", {"code": "1", "execution_count": 3})
    found = events(started, (kind, {"execution_state": "idle", "status": "ok"}), ends=True)
    assert [(each.type, each.seq, each.id, each.executionCount) for each in found] == [
        ("started", 1, "e", 3),
        ("end", 2, "e", 3),
    ]


def test_the_end_after_another_event() -> None:
    """An aborted cell's reply is both an error and the end."""
    found = events(("status", {"execution_state": "idle"}), ("execute_reply", {"status": "aborted"}), ends=True)
    assert [(each.type, each.seq) for each in found] == [("error", 2), ("end", 2)]
    assert found[0].error is not None
    assert (found[0].error.name, found[0].error.code) == ("Aborted", "aborted")


def test_executions_that_overlap() -> None:
    """Each end has the count of its own execution."""
    translate = Events()
    for name, count in (("a", 1), ("b", 2)):
        translate.receive(count, "execute_input", name, False, msg("execute_input", execution_count=count))
    ends = [translate.receive(9, "status", name, True, msg("status", execution_state="idle"))[0] for name in "ba"]
    assert [(each.id, each.executionCount) for each in ends] == [("b", 2), ("a", 1)]


def test_counts_of_executions_without_end_are_forgotten() -> None:
    """A client's many cells that never end don't fill the memory."""
    translate = Events()
    for seq in range(3000):
        translate.receive(seq, "execute_input", str(seq), False, msg("execute_input", execution_count=seq))
    assert len(translate._counts) < 1100


FIELDS = [
    "name", "text", "data", "metadata", "ename", "evalue", "traceback", "execution_state", "execution_count", "status",
    "transient", "prompt", "password", "wait", "code", "stateKept",
]  # fmt: skip
CONTENT = st.dictionaries(st.sampled_from(FIELDS), JSON)
MESSAGES = st.tuples(st.sampled_from([*KINDS, ""]), CONTENT, st.dictionaries(st.just("cellvm"), JSON))


@settings(max_examples=60)
@given(st.lists(st.tuples(MESSAGES, st.sampled_from(["", "e"]), st.booleans()), max_size=20))
def test_any_content_can_be_taken(messages: list[tuple[tuple[str, Any, Any], str, bool]]) -> None:
    """Content of whatever types raises nothing, and both events and outcome can be written as JSON."""
    translate, collector = Events(), Collector(text_limit=50, result_limit=2000)
    for (kind, content, metadata), execution, ends in messages:
        for each in translate.receive(1, kind, execution, ends, msg(kind, metadata, **content)):
            collector.add(each)
            assert json.loads(msgspec.json.encode(each))["type"] == each.type
    msgspec.json.encode(collector.cell())


@given(st.lists(st.binary(max_size=40), min_size=5, max_size=5), st.sampled_from(KINDS))
def test_any_bytes_can_be_taken(parts: list[bytes], kind: str) -> None:
    """Parts that are no JSON at all raise nothing."""
    assert len(Events().receive(1, kind, "e", False, parts)) <= 1


# -- the outcome


def cell(*found: StreamEvent, **limits: int) -> Cell:
    collector = Collector(**limits)
    for each in found:
        collector.add(each)
    return collector.cell()


def shown(kind: str, text: str, display_id: str | None = None) -> StreamEvent:
    return StreamEvent(kind, data=raw({"text/plain": text}), displayId=display_id)


def test_text_is_cut_at_the_limit() -> None:
    """Text is kept up to the limit of each stream. The rest is counted for each stream."""
    pieces = (("stdout", "x" * 8), ("stderr", "e"), ("stdout", "y" * 8), ("stdout", "z"))
    found = cell(*(StreamEvent(name, text=text) for name, text in pieces), text_limit=10)
    assert (found.stdout, found.stderr) == ("x" * 8 + "yy", "e")
    assert found.truncated is not None
    assert (found.truncated.stdout, found.truncated.stderr, found.truncated.results) == (7, 0, 0)


def test_results_are_left_out_at_the_limit() -> None:
    """A result that does not fit is left out and counted. A smaller one after it still fits."""
    found = cell(*(shown("display", "x" * size) for size in (60, 60, 30)), result_limit=130)
    assert [len(text_of(result)) for result in found.results] == [60, 30]
    assert found.truncated is not None
    assert found.truncated.results == 1


def test_messages_that_are_missing_are_counted() -> None:
    """Gaps add up."""
    found = cell(StreamEvent("gap", messages=3), StreamEvent("stdout", text="a"), StreamEvent("gap", messages=4))
    assert found.truncated is not None
    assert (found.stdout, found.truncated.messages) == ("a", 7)


def test_nothing_left_out_is_not_mentioned() -> None:
    """An outcome that is whole has no `truncated`."""
    found = cell(StreamEvent("stdout", text="a"), StreamEvent("end", executionCount=2))
    assert (found.truncated, found.executionCount) == (None, 2)


def test_an_update_replaces_what_was_displayed() -> None:
    """Only the display of that id changes, in its place. An update of an unknown id becomes a display."""
    found = cell(
        shown("display", "a", "1"), shown("display", "b", "2"), shown("result", "c"), shown("update", "A", "1"),
        shown("update", "d", "3"), shown("update", "D", "3"), shown("update", "e"),
    )  # fmt: skip
    told = [(result.type, text_of(result)) for result in found.results]
    assert told == [("display", "A"), ("display", "b"), ("result", "c"), ("display", "D"), ("display", "e")]


def test_many_updates_stay_within_the_limit() -> None:
    """A display that grows by its updates is limited, too, so an outcome is never larger than allowed."""
    updates = [shown("update", "x" * size, "1") for size in range(0, 1000, 100)]
    found = cell(shown("display", "", "1"), *updates, result_limit=500)
    assert sum(len(text_of(result)) for result in found.results) <= 500


def test_what_is_not_part_of_an_outcome() -> None:
    """Statuses and input requests change nothing. The last error counts."""
    found = cell(
        shown("result", "1"),
        StreamEvent("status", state="dead"),
        StreamEvent("input_request", prompt="?"),
        StreamEvent("error", error=CellError("A", "")),
        StreamEvent("error", error=CellError("B", "")),
        StreamEvent("end"),
    )
    assert found == Cell(results=[Result("result", raw({"text/plain": "1"}))], error=CellError("B", ""))


def test_values_cost_no_more_than_their_text() -> None:
    """Data is kept as JSON text, because millions of small values as Python objects would be twenty times as large."""
    value = b"[" + b"[]," * 1_000_000 + b"[]]"
    bundle = b'{"application/json":' + value + b"}"
    content = b'{"data":' + bundle + b',"metadata":{"k":' + value + b"},"
    content += b'"transient":{},"execution_count":1,"execution_state":"idle","ename":"E","other":' + value + b"}"
    parts = [b"iopub", b"{}", b"{}", b'{"cellvm":{"other":' + value + b"}}", content]
    tracemalloc.start()
    for kind in KINDS:
        for event in Events().receive(1, kind, "", True, parts):
            msgspec.json.encode(cell(event))
    msgspec.json.encode(layout.journal_entry(1, parts))
    result = StreamEvent("result", data=msgspec.Raw(bundle), executionCount=1)
    content = session_notebook([("1", 1, [result])])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * sum(map(len, parts))
    assert len(json.loads(content)["cells"][0]["outputs"][0]["data"]["application/json"]) == 1_000_001


# -- messages


@pytest.mark.parametrize("part", NO_JSON_OBJECT)
def test_malformed_headers_and_content_read_as_empty(part: bytes) -> None:
    """The guest is not trusted to write JSON."""
    assert message.header(part) == message.Header()
    assert message.read(part, message.Reply) == message.Reply()
    assert message.read(memoryview(part), message.Reply) == message.Reply()
    assert message.json_object(part) is None
    assert message.header(b'{"msg_type": 3, "msg_id": "x"}') == message.Header()


def test_a_message_of_ours() -> None:
    """Our message has the documented form: channel, header with a fresh id and the time, parent, metadata, content."""
    parts = message.new("shell", "execute_request", {"code": "ü\ud800"}, session="s", metadata={"a": 1})
    header = json.loads(parts[1])
    assert set(header) == {"msg_id", "msg_type", "session", "username", "via", "date", "version"}
    assert (header["msg_type"], header["session"]) == ("execute_request", "s")
    assert uuid.UUID(header["msg_id"])
    assert header["date"].endswith("Z")
    assert datetime.fromisoformat(header["date"]).tzinfo is not None
    assert (parts[0], parts[2], json.loads(parts[3])) == (b"shell", b"{}", {"a": 1})
    assert json.loads(parts[4]) == {"code": "ü\ud800"}
    assert parts[1] != message.new("shell", "execute_request", {}, session="s")[1]


def test_an_answer_of_ours() -> None:
    """Id and parent are as given."""
    parts = message.new("iopub", "status", {}, session="s", parent=b'{"msg_id":"p"}', msg_id="m")
    assert message.header(parts[1]) == message.Header("m", "status", "s")
    assert parts[2] == b'{"msg_id":"p"}'


def text(name: str, text: str) -> bytes:
    return json.dumps({"name": name, "text": text}).encode()


@given(st.lists(st.text(), min_size=1), st.sampled_from(["stdout", "stderr"]))
def test_joined(texts: list[str], name: str) -> None:
    """Texts of one stream become one text, in order, whatever they hold."""
    found = message.joined([text(name, each) for each in texts])
    assert found is not None
    assert json.loads(found) == {"name": name, "text": "".join(texts)}


@pytest.mark.parametrize(
    "other",
    [text("stderr", "b"), text("stdout", "\ud800"), b'{"name": "stdout"}', b'{"text": "b"}', b"{}",
     b'{"name": "stdout", "text": 3}', b'{"name": null, "text": "b"}', b'{"name": "stdout", "text": "b", "more": 1}',
     *NO_JSON_OBJECT],
)  # fmt: skip
def test_what_can_not_be_joined(other: bytes) -> None:
    """Messages of different streams, without text, or with more than text are not joined."""
    for contents in ([text("stdout", "a"), other], [other, text("stdout", "a")]):
        assert message.joined(contents) is None


@given(st.dictionaries(st.text(max_size=10).filter(lambda name: name != "cellvm"), JSON), st.integers(0, 2**53))
def test_numbered(metadata: dict[str, Any], seq: int) -> None:
    """A message's number is added to whatever metadata there is, however it is spaced."""
    for form in (json.dumps(metadata), json.dumps(metadata, indent=2), f" \n{json.dumps(metadata)} "):
        assert json.loads(message.numbered(form.encode(), seq)) == {**metadata, "cellvm": {"seq": seq}}


def test_numbered_keeps_what_the_gateway_says_itself() -> None:
    """The cause of a status stays beside the number."""
    parts = message.new("iopub", "status", {}, session="s", metadata={"cellvm": {"reason": "r", "signal": 9}})
    assert json.loads(message.numbered(parts[3], 5)) == {"cellvm": {"seq": 5, "reason": "r", "signal": 9}}


@pytest.mark.parametrize("metadata", [*NO_JSON_OBJECT[:5], b"{ }", b"{\n}", b"x", b'"{}"'])
def test_numbered_metadata_that_is_none(metadata: bytes) -> None:
    """Metadata that is no object counts as empty."""
    if metadata != b"{":  # this one is not even closed
        assert json.loads(message.numbered(metadata, 5)) == {"cellvm": {"seq": 5}}
