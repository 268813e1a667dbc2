"""The Connect protocol with JSON, as E2B's clients speak it. Bytes in, values out; no I/O.

A unary call has a JSON body both ways. In a stream, each message is an envelope:

    1 byte flags | 4 bytes length, big-endian | JSON

A stream of answers ends with an envelope of flags END, whose JSON is `{}` or has the error. Its HTTP status is 200
whatever happens.
"""

import re
import struct
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import msgspec

from kernel_gateway.errors import CellvmError, InvalidRequest

HEADER = struct.Struct(">BI")
COMPRESSED, END = 0x01, 0x02
UNARY, STREAM = "application/json", "application/connect+json"
MAX_MESSAGE = 4 * 1024 * 1024
"""Largest JSON in one envelope, in bytes."""


class Code(StrEnum):
    """Connect's words for errors."""

    CANCELED = "canceled"
    UNKNOWN = "unknown"
    INVALID_ARGUMENT = "invalid_argument"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    NOT_FOUND = "not_found"
    ALREADY_EXISTS = "already_exists"
    PERMISSION_DENIED = "permission_denied"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    FAILED_PRECONDITION = "failed_precondition"
    UNIMPLEMENTED = "unimplemented"
    INTERNAL = "internal"
    UNAVAILABLE = "unavailable"
    UNAUTHENTICATED = "unauthenticated"


STATUS = {
    Code.CANCELED: 499,
    Code.UNKNOWN: 500,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}
"""The HTTP status of a unary call's error."""

CODES = {
    "invalid_request": Code.INVALID_ARGUMENT,
    "invalid": Code.INVALID_ARGUMENT,
    "is_directory": Code.INVALID_ARGUMENT,
    "not_directory": Code.INVALID_ARGUMENT,
    "not_regular": Code.INVALID_ARGUMENT,
    "cannot_run": Code.INVALID_ARGUMENT,
    "unauthorized": Code.UNAUTHENTICATED,
    "forbidden": Code.PERMISSION_DENIED,
    "permission_denied": Code.PERMISSION_DENIED,
    "not_found": Code.NOT_FOUND,
    "exists": Code.ALREADY_EXISTS,
    "conflict": Code.FAILED_PRECONDITION,
    "too_large": Code.RESOURCE_EXHAUSTED,
    "too_many_requests": Code.RESOURCE_EXHAUSTED,
    "no_space": Code.RESOURCE_EXHAUSTED,
    "not_implemented": Code.UNIMPLEMENTED,
    "method_not_allowed": Code.UNIMPLEMENTED,
    "host_full": Code.UNAVAILABLE,
    "draining": Code.UNAVAILABLE,
    "sandbox_died": Code.UNAVAILABLE,
    "sandbox_paused": Code.UNAVAILABLE,
    "guest_unresponsive": Code.UNAVAILABLE,
}
"""Connect's word for an error of ours; for all others it is internal."""


class Failed(InvalidRequest):
    """An error that has a word of Connect's of its own, and perhaps a status."""

    def __init__(self, word: Code, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.word = word
        self.status = status or STATUS[word]


class EnvelopeError(Failed):
    """Bytes that are no envelopes, or not those that the method takes."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.INVALID_ARGUMENT, message)


def code_of(error: CellvmError) -> Code:
    return error.word if isinstance(error, Failed) else CODES.get(error.code, Code.INTERNAL)


def status_of(error: CellvmError) -> int:
    return error.status if isinstance(error, Failed) else STATUS[code_of(error)]


class ErrorBody(msgspec.Struct):
    """An error, as the body of a unary call and in the last envelope of a stream."""

    code: str
    message: str


def error_body(error: CellvmError) -> ErrorBody:
    return ErrorBody(code_of(error), str(error))


def envelope(message: Any, flags: int = 0) -> bytes:
    """One envelope. `message` is encoded as JSON."""
    body = msgspec.json.encode(message)
    return HEADER.pack(flags, len(body)) + body


def end(error: CellvmError | None = None) -> bytes:
    """The last envelope of a stream."""
    return envelope({} if error is None else {"error": error_body(error)}, END)


class Decoder:
    """A decoder of a stream's bytes into the JSON of its messages. Call `receive_data`, then read `messages`."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive_data(self, data: bytes) -> None:
        """Take bytes as they came. They may be split anywhere."""
        self._buffer += data

    def messages(self) -> Iterator[bytes]:
        """The JSON of each complete envelope.

        Raises:
            EnvelopeError: an envelope is compressed, has unknown flags, ends the stream with anything but `{}`, or is
                over MAX_MESSAGE.
        """
        while len(self._buffer) >= HEADER.size:
            flags, length = HEADER.unpack_from(self._buffer)
            if flags & COMPRESSED:
                raise EnvelopeError("a compressed envelope; this server takes none")
            if flags:
                raise EnvelopeError(f"an envelope of flags {flags:#04x}; a client's have none")
            if length > MAX_MESSAGE:
                raise EnvelopeError(f"an envelope of {length} bytes; one has at most {MAX_MESSAGE}")
            if len(self._buffer) < HEADER.size + length:
                return
            body = bytes(self._buffer[HEADER.size : HEADER.size + length])
            del self._buffer[: HEADER.size + length]
            yield body

    def check_end(self) -> None:
        """Check that nothing is left when the stream is over.

        Raises:
            EnvelopeError: it ends within an envelope.
        """
        if self._buffer:
            raise EnvelopeError("the body ends within an envelope")


def only_message(body: bytes) -> bytes:
    """The JSON of a body that must be one envelope.

    Raises:
        EnvelopeError: it is something else.
    """
    decoder = Decoder()
    decoder.receive_data(body)
    found = list(decoder.messages())
    decoder.check_end()
    if len(found) != 1:
        raise EnvelopeError(f"the body has {len(found)} envelopes; this method takes one")
    return found[0]


def check_content(content_type: str, encoding: str, *, is_stream: bool) -> None:
    """Check that a body is of the codec that a method takes.

    Raises:
        Failed: it is of another one, or compressed.
    """
    wanted = STREAM if is_stream else UNARY
    given = content_type.partition(";")[0].strip().lower()
    if given != wanted:
        message = f"this method takes {wanted}, not {given[:100]!r}"
        raise Failed(Code.INVALID_ARGUMENT, message, status=415)
    if encoding.strip().lower() not in ("", "identity"):
        raise Failed(Code.UNIMPLEMENTED, f"this server takes no body that is encoded as {encoding[:100]!r}")


def timeout(text: str) -> float | None:
    """The seconds of a header `Connect-Timeout-Ms`; None without one, or for 0.

    Raises:
        EnvelopeError: it is not a number of milliseconds.
    """
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,10}", text):
        raise EnvelopeError("Connect-Timeout-Ms is a number of at most ten digits")
    return int(text) / 1000 or None
