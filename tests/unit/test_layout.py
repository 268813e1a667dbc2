"""Both layouts of kernel messages, against jupyter_server's own functions, and frames that are no messages."""

import json
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jupyter_server.services.kernels.connection.base import (
    deserialize_binary_message,
    deserialize_msg_from_ws_v1,
    serialize_binary_message,
    serialize_msg_to_ws_v1,
)

from kernel_gateway.kernel import layout, message
from kernel_gateway.kernel.layout import LayoutError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=4)
NAMES = st.text(min_size=1, max_size=12)
HEADERS = st.builds(
    lambda more, known: {**more, **known},
    OBJECTS,
    st.fixed_dictionaries(
        {"msg_id": NAMES, "msg_type": NAMES, "version": st.just("5.4"), "session": st.text(max_size=12)}
    ),
)
CHANNELS = st.sampled_from(["shell", "control", "stdin", "iopub"])
BUFFERS = st.lists(st.binary(max_size=50), max_size=4)


def raw(value: Any, ascii_only: bool = True) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only).encode()


PARTS = st.builds(
    lambda channel, header, objects, buffers, ascii_only: [
        channel.encode(),
        *(raw(each, ascii_only) for each in (header, *objects)),
        *buffers,
    ],
    CHANNELS,
    HEADERS,
    st.tuples(OBJECTS, OBJECTS, OBJECTS),
    BUFFERS,
    st.booleans(),
)
EXAMPLE = [
    b"shell",
    b'{"msg_id":"m","msg_type":"comm_msg","version":"5.4"}',
    b"{}",
    b'{"a": 1}',
    b'{"b": [2]}',
    b"\0\xff",
    b"",
]
ALL_BYTES = bytes(range(256))


def parsed(parts: list[bytes]) -> list[Any]:
    """The channel, the JSON parts as values, the buffers."""
    return [parts[0], *(json.loads(part) for part in parts[1:5]), *parts[5:]]


def legacy(parts: list[bytes]) -> dict[str, Any]:
    """A message in the form that Jupyter's clients have before they send it."""
    header, parent, metadata, content = (json.loads(part) for part in parts[1:5])
    return {
        "header": header,
        "msg_id": header["msg_id"],
        "msg_type": header["msg_type"],
        "parent_header": parent,
        "metadata": metadata,
        "content": content,
        "buffers": parts[5:],
        "channel": parts[0].decode(),
    }


# -- any message, against Jupyter's own functions


@given(PARTS)
def test_v1_is_jupyters(parts: list[bytes]) -> None:
    """Our frames are Jupyter's, byte for byte, and each side reads the other's."""
    frame = layout.to_v1(parts)
    assert frame == serialize_msg_to_ws_v1(parts[1:], parts[0].decode())
    assert deserialize_msg_from_ws_v1(frame) == (parts[0].decode(), parts[1:])
    assert layout.from_v1(frame) == parts


@given(PARTS)
def test_legacy_is_jupyters(parts: list[bytes]) -> None:
    """A client reads the message in our frame, which is text without buffers and binary with them."""
    frame = layout.to_legacy(parts)
    assert isinstance(frame, bytes if parts[5:] else str)
    text, *buffers = layout.split_legacy(frame) if isinstance(frame, bytes) else [frame.encode()]
    assert {**json.loads(text), "buffers": buffers} == legacy(parts)
    if isinstance(frame, bytes):
        assert deserialize_binary_message(frame)["buffers"] == parts[5:]


@given(PARTS)
def test_legacy_from_jupyters_clients(parts: list[bytes]) -> None:
    """Frames of Jupyter's clients are read as the message: text, and binary with or without buffers."""
    whole = legacy(parts)
    assert parsed(layout.from_legacy(serialize_binary_message(whole))) == parsed(parts)
    assert parsed(layout.from_legacy(json.dumps({**whole, "buffers": []}))) == parsed(parts[:5])
    assert parsed(layout.from_legacy(json.dumps({**whole, "buffers": []}, ensure_ascii=False))) == parsed(parts[:5])


@given(PARTS)
def test_from_one_layout_to_the_other(parts: list[bytes]) -> None:
    """A message that goes through both is still the same, to the byte of its JSON."""
    assert layout.from_legacy(layout.to_legacy(parts)) == layout.from_v1(layout.to_v1(parts)) == parts


@pytest.mark.parametrize("count", [1, 3, 1000, layout.MAX_PARTS - 10])
def test_many_buffers(count: int) -> None:
    """Buffers come unchanged, whatever their bytes and their number."""
    parts = [*EXAMPLE[:5], *(ALL_BYTES if each % 100 == 0 else b"" for each in range(count))]
    assert layout.from_v1(layout.to_v1(parts)) == parts
    assert layout.from_legacy(layout.to_legacy(parts)) == parts


def test_a_large_message() -> None:
    """50 MB go through both layouts."""
    parts = [*EXAMPLE[:4], raw({"text": "x" * 20_000_000}), ALL_BYTES * 120_000]
    assert layout.from_v1(layout.to_v1(parts)) == parts
    assert layout.from_legacy(layout.to_legacy(parts)) == parts


# -- clients with shapes of their own


def said(text: str) -> list[Any]:
    return parsed(layout.from_legacy(text))


HEAD = {"msg_id": "m", "msg_type": "execute_request", "version": "5.4"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"buffers": {}},
        {"buffers": []},
        {"buffers": None},
        {"channel": None},
        {"parent_header": None, "metadata": None},
        {"msg_id": 3, "msg_type": None, "version": "5.0", "anything": [{}]},
        {"zmq_identities": ["a"], "idents": []},
    ],
)
def test_clients_leave_out_and_add(more: dict[str, Any]) -> None:
    """A missing channel means shell, and missing parent and metadata are empty. Additional fields do no harm."""
    sent = {"header": HEAD, "content": {"code": "1"}, **more}
    assert said(json.dumps(sent)) == [b"shell", HEAD, {}, {}, {"code": "1"}]


@pytest.mark.parametrize(
    "more", [{"date": ""}, {"date": None}, {"session": ""}, {"version": "5"}, {"subshell_id": None}]
)
def test_headers_are_passed_on_as_they_are(more: dict[str, Any]) -> None:
    """The kernel gets a client's whole header."""
    header = {**HEAD, **more}
    assert said(json.dumps({"header": header, "channel": "control"}))[:2] == [b"control", header]


def test_a_binary_frame_of_one_part() -> None:
    """Some clients send every message as a binary frame of one part."""
    text = json.dumps({"header": HEAD, "content": {"code": "ü"}, "buffers": []}).encode()
    frame = struct.pack("!II", 1, 8) + text
    assert parsed(layout.from_legacy(frame)) == [b"shell", HEAD, {}, {}, {"code": "ü"}]


def test_json_with_blanks() -> None:
    """Blanks and line ends around everything are fine, in both layouts."""
    text = json.dumps({"header": HEAD, "content": {"a": [1]}, "metadata": None}, indent=2)
    assert said(f"\n {text} \n") == [b"shell", HEAD, {}, {}, {"a": [1]}]
    parts = [b"shell", b" " + raw(HEAD) + b"\n", b"{ }", b"\t{}", b'{\n"a": 1}']
    assert layout.from_v1(layout.to_v1(parts)) == parts
    assert parsed(layout.from_legacy(layout.to_legacy(parts))) == parsed(parts)


@pytest.mark.parametrize(
    "parts",
    [
        [b"iopub", b"", b"null", b"[]", b"3"],
        [b"iopub", b"{}", b"{}", b"{}", b'{"text": "\xff\xed\xa0\x80"}'],
        [b"\xff\xfe", b'{"msg_id": "\xff"}', b"{}", b"{}", b"{}", b"\xff"],
        [b'io"pub\\', b'{"msg_type": 3}', b"{}", b"{}", b"{}"],
    ],
)
def test_what_a_kernel_should_not_say(parts: list[bytes]) -> None:
    """A kernel's nonsense raises nothing, and text stays text."""
    frame = layout.to_legacy(parts)
    (frame.encode() if isinstance(frame, str) else layout.split_legacy(frame)[0]).decode(errors="replace")
    layout.to_v1(parts)
    msgspec.json.encode(layout.journal_entry(1, parts))


def test_bytes_that_are_no_text_stay_valid_json() -> None:
    """A kernel may print bytes that are not UTF-8. In legacy text they are replaced."""
    frame = layout.to_legacy([b"iopub", raw(HEAD), b"{}", b"{}", b'{"text": "a\xffb"}'])
    assert isinstance(frame, str)
    assert json.loads(frame)["content"] == {"text": "a\ufffdb"}


@given(PARTS)
def test_the_journals_form(parts: list[bytes]) -> None:
    """The REST journal has the same message, its buffers as base64."""
    found = msgspec.json.decode(msgspec.json.encode(layout.journal_entry(7, parts)))
    buffers = found.pop("buffers")
    assert [msgspec.convert(each, bytes) for each in buffers] == parts[5:]
    assert found.pop("seq") == 7
    expected = {name: value for name, value in legacy(parts).items() if name in found}
    assert found == msgspec.json.decode(json.dumps(expected))


# -- frames that are no messages


def accepts(read: Any, frame: str | bytes) -> bool:
    """Whether a frame is taken. Check that a kernel takes such a message, too, and that only LayoutError is raised."""
    try:
        parts = read(frame)
    except LayoutError:
        return False
    channel, header, *others = parsed(parts)[:5]
    assert isinstance(channel, bytes)
    assert header["msg_id"]
    assert header["msg_type"]
    assert all(isinstance(each, dict) for each in others)
    return True


@st.composite
def mutated(draw: st.DrawFn, kind: Any) -> bytes:
    """A good frame with some of its bytes changed, cut out, or added."""
    frame = bytearray(kind(draw(PARTS)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(frame) - 1, 0)) | st.integers(0, 80))
        length = draw(st.integers(0, 9) | st.integers(0, len(frame)))
        frame[at : at + length] = draw(st.binary(max_size=9) | st.binary(min_size=length, max_size=length))
    return bytes(frame)


@given(mutated(layout.to_v1) | st.binary(max_size=200))
@example(b"")
def test_any_bytes_as_v1(frame: bytes) -> None:
    """A spoiled frame is refused, or is still a message."""
    accepts(layout.from_v1, frame)


def one_text(parts: list[bytes]) -> bytes:
    return json.dumps({**legacy(parts), "buffers": []}).encode()


@given(mutated(lambda parts: serialize_binary_message(legacy(parts))) | st.binary(max_size=200))
@example(b"")
def test_any_bytes_as_legacy(frame: bytes) -> None:
    """The same holds for binary legacy frames."""
    accepts(layout.from_legacy, frame)


@given(mutated(one_text).map(lambda frame: frame.decode("utf-8", "replace")) | st.text(max_size=200))
@example("")
@example("\ud800")
@example("[" * 100_000)
@example('{"header":' * 50_000)
def test_any_text_as_legacy(frame: str) -> None:
    """The same holds for text."""
    accepts(layout.from_legacy, frame)


def table(kind: str, offsets: list[int], rest: bytes, count: int | None = None) -> bytes:
    """A frame with any table of offsets. `kind` is the format of one number."""
    return (
        struct.pack(f"{kind[0]}{1 + len(offsets)}{kind[1]}", len(offsets) if count is None else count, *offsets) + rest
    )


def good_offsets(pieces: list[bytes], start: int) -> list[int]:
    offsets = [start]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    return offsets


def spoiled(offsets: list[int], largest: int) -> list[list[int]]:
    """Tables that are wrong, each in one way."""
    swapped = [offsets[0], offsets[2], offsets[1], *offsets[3:]]
    return [
        swapped,
        offsets[:-1],
        [0, *offsets[1:]],
        [offsets[0] - 1, *offsets[1:]],
        [offsets[0] + 1, *offsets[1:]],
        [*offsets[:-1], offsets[-1] + 1],
        [*offsets[:-1], largest],
        [largest, *offsets[1:]],
        [offsets[0], largest, *offsets[2:]],
        list(reversed(offsets)),
    ]


def test_tables_of_v1() -> None:
    """A table that does not divide the frame exactly is refused. The right one is not."""
    offsets, rest = good_offsets(EXAMPLE, 8 * (2 + len(EXAMPLE))), b"".join(EXAMPLE)
    assert layout.from_v1(table("<Q", offsets, rest)) == EXAMPLE
    for wrong in spoiled(offsets, 2**64 - 1):
        assert not accepts(layout.from_v1, table("<Q", wrong, rest)), wrong
    for count in (0, 1, 5, 7, 9, 65_537, 2**32, 2**63, 2**64 - 1):
        assert not accepts(layout.from_v1, table("<Q", offsets, rest, count)), count
    assert not accepts(layout.from_v1, table("<Q", offsets, rest + b"x"))
    assert not accepts(layout.from_v1, table(">Q", offsets, rest))


def test_tables_of_legacy() -> None:
    """The same holds for the legacy table, which has no last offset."""
    pieces = [one_text(EXAMPLE), *EXAMPLE[5:], b"abc"]
    offsets, rest = good_offsets(pieces[:-1], 4 * (1 + len(pieces))), b"".join(pieces)
    assert layout.from_legacy(table(">I", offsets, rest))[5:] == pieces[1:]
    for wrong in spoiled(offsets, 2**32 - 1)[2:]:
        assert wrong == [*offsets[:-1], offsets[-1] + 1] or not accepts(layout.from_legacy, table(">I", wrong, rest))
    for count in (0, 1, 3, 5, 65_537, 2**31, 2**32 - 1):
        assert not accepts(layout.from_legacy, table(">I", offsets, rest, count)), count
    assert not accepts(layout.from_legacy, table("<I", offsets, rest))


def test_too_many_parts() -> None:
    """A frame of very many parts is refused before anything is done for each."""
    parts = [*EXAMPLE[:5], *[b""] * layout.MAX_PARTS]
    assert not accepts(layout.from_v1, layout.to_v1(parts))
    assert not accepts(layout.from_legacy, layout.to_legacy(parts))


WRONG = [b"", b"null", b"[]", b"3", b'"x"', b"{", b"{}}", b'{"a":}', b'{"a": NaN}', b"\xff", b'{"a": "\xff"}',
         b'{"a": "\xed\xa0\x80"}', b'{"a": "\n"}', b"{'a': 1}", b'{"a":' * 50_000]  # fmt: skip


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_parts_that_are_no_objects(at: int, wrong: bytes) -> None:
    """A kernel would drop such a message without a word. The gateway tells the client."""
    parts = [*EXAMPLE[:at], wrong, *EXAMPLE[at + 1 :]]
    assert not accepts(layout.from_v1, layout.to_v1(parts))


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"msg_id": "m"},
        {"msg_type": "t"},
        {**HEAD, "msg_id": ""},
        {**HEAD, "msg_type": 3},
        {**HEAD, "msg_id": None},
        {**HEAD, "version": 5},
    ],
)
def test_headers_that_name_nothing(header: dict[str, Any]) -> None:
    """Without an id and a type nobody could answer."""
    assert not accepts(layout.from_v1, layout.to_v1([b"shell", raw(header), *EXAMPLE[2:]]))
    assert not accepts(layout.from_legacy, json.dumps({"header": header}))


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "null",
        '"x"',
        "3",
        '{"header": null}',
        '{"header": []}',
        '{"content": {}}',
        "{} {}",
        "\0",
        "\ufeff{}",
    ],
)
def test_texts_that_are_no_messages(text: str) -> None:
    """JSON of another form is refused."""
    assert not accepts(layout.from_legacy, text)


@pytest.mark.parametrize("channel", [3, [], {}, "x" * 21, True])
def test_channels_that_are_none(channel: Any) -> None:
    """A channel is a short name. Other code decides which names a client may use."""
    assert not accepts(layout.from_legacy, json.dumps({"header": HEAD, "channel": channel}))
    assert {b"shell", b"control", b"stdin"} == message.SENT_BY_CLIENT
