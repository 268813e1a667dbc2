"""Connect's codec: envelopes in pieces, and everything that is none."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_gateway.api.base import STATUS
from kernel_gateway.api.e2b import connect
from kernel_gateway.api.e2b.connect import Code, Decoder, EnvelopeError, Failed
from kernel_gateway.errors import CellvmError, GuestFailure, NotFound, Unavailable

MESSAGES = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20), max_size=3), max_size=6)


@given(MESSAGES, st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_messages_in_any_pieces(messages: list[dict[str, object]], sizes: list[int]) -> None:
    """However the network cuts the bytes, the messages are the same."""
    data = b"".join(connect.envelope(message) for message in messages)
    decoder = Decoder()
    found = []
    at = 0
    for size in [*sizes, len(data)]:
        decoder.receive_data(data[at : at + size])
        found += [json.loads(body) for body in decoder.messages()]
        at += size
    decoder.check_end()
    assert found == messages


@given(st.binary(max_size=100))
def test_any_bytes(data: bytes) -> None:
    """Any bytes are messages, or an EnvelopeError, and nothing else."""
    with suppress(EnvelopeError):
        assert isinstance(connect.only_message(data), bytes)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "0 envelopes"),
        (b"\0\0\0", "within an envelope"),
        (b"\0\0\0\0\2{", "within an envelope"),
        (b"\1\0\0\0\2{}", "compressed"),
        (b"\3\0\0\0\2{}", "compressed"),
        (b"\2\0\0\0\2{}", "flags 0x02"),
        (b"\x80\0\0\0\2{}", "flags 0x80"),
        (b"\0\xff\xff\xff\xff{}", "4294967295 bytes"),
        (2 * b"\0\0\0\0\2{}", "2 envelopes"),
    ],
)
def test_what_is_no_envelope(body: bytes, says: str) -> None:
    """The message says what is wrong."""
    with pytest.raises(EnvelopeError, match=says):
        connect.only_message(body)


def test_a_large_length_costs_no_memory() -> None:
    """A length over the limit is refused before anything of the message is there."""
    decoder = Decoder()
    decoder.receive_data(b"\0" + (connect.MAX_MESSAGE + 1).to_bytes(4, "big"))
    with pytest.raises(EnvelopeError):
        list(decoder.messages())


@pytest.mark.parametrize(
    ("kind", "encoding", "is_stream", "status"),
    [
        ("application/proto", "", False, 415),
        ("application/connect+proto", "", True, 415),
        ("application/grpc", "", True, 415),
        ("application/json", "", True, 415),
        ("application/connect+json", "", False, 415),
        ("", "", False, 415),
        ("application/json", "gzip", False, 501),
        ("application/connect+json", "br", True, 501),
    ],
)
def test_other_codecs(kind: str, encoding: str, is_stream: bool, status: int) -> None:
    """JSON without compression is the only codec."""
    with pytest.raises(Failed) as refused:
        connect.check_content(kind, encoding, is_stream=is_stream)
    assert refused.value.status == status


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_codec_that_is_taken(is_stream: bool) -> None:
    """A parameter of the type and `identity` change nothing."""
    kind = connect.STREAM if is_stream else connect.UNARY
    connect.check_content(f"{kind.upper()}; charset=utf-8", "identity", is_stream=is_stream)


@pytest.mark.parametrize(("text", "seconds"), [("", None), ("0", None), ("1500", 1.5), ("9999999999", 9999999.999)])
def test_timeouts(text: str, seconds: float | None) -> None:
    """Milliseconds become seconds, and none means no limit."""
    assert connect.timeout(text) == seconds


@pytest.mark.parametrize("text", ["-1", "x", "1.5", "1" * 11, "٣"])
def test_bad_timeouts(text: str) -> None:
    """Anything else is an error."""
    with pytest.raises(EnvelopeError):
        connect.timeout(text)


@pytest.mark.parametrize(
    ("error", "word", "status"),
    [
        (NotFound("x"), "not_found", 404),
        (Unavailable("x"), "unimplemented", 501),
        (GuestFailure("no_space", "x"), "resource_exhausted", 429),
        (CellvmError("x"), "internal", 500),
        (Failed(Code.DEADLINE_EXCEEDED, "x"), "deadline_exceeded", 504),
    ],
)
def test_words_of_errors(error: CellvmError, word: str, status: int) -> None:
    """An error has Connect's word, in a body and in the last envelope."""
    assert connect.status_of(error) == status
    last = connect.end(error)
    assert last[0] == connect.END
    assert json.loads(last[5:]) == {"error": {"code": word, "message": "x"}}


def test_every_word_is_one_of_ours() -> None:
    """The table maps only words that there are, and each of Connect's has a status."""
    assert connect.CODES.keys() <= STATUS.keys()
    assert set(connect.STATUS) == set(Code)


def test_the_end_of_a_good_stream() -> None:
    """The last envelope is an empty object."""
    assert connect.end() == b"\2\0\0\0\2{}"
