"""Kernel messages, turned into events for REST clients and agents. Pure: messages in, events out.

An execution is over when both its reply (shell) and its `idle` (iopub) have come. Their order is not fixed, and the
journal marks the later one. A collected cell keeps up to `text_limit` characters of text per stream and up to
`result_limit` bytes of results. It counts the rest.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec

from kernel_gateway.kernel import message
from kernel_gateway.outcome import Ending

TEXT_LIMIT = 8 * 1024 * 1024
RESULT_LIMIT = 64 * 1024 * 1024
JsonObject = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "object"})]
"""An object as JSON text."""


class CellError(msgspec.Struct, frozen=True):
    """The error of a cell. `code` is set if not the user's code failed: exec_timeout, kernel_restarted."""

    name: str
    value: str
    traceback: list[str] = []
    code: str | None = None
    stateKept: bool | None = None


class Result(msgspec.Struct, frozen=True):
    """One rich output. `type` is "result" for the cell's value, "display" for what it displayed.

    `data` is a MIME bundle: text as text, images base64 encoded, JSON as JSON. It stays the JSON text that the kernel
    has sent, because nobody here needs its values. `values` reads it.
    """

    type: str
    data: JsonObject
    metadata: JsonObject = msgspec.field(default_factory=lambda: message.EMPTY)


class Truncated(msgspec.Struct):
    """What was left out: characters of text, number of results, messages that the journal no longer had."""

    stdout: int = 0
    stderr: int = 0
    results: int = 0
    messages: int = 0


class Cell(msgspec.Struct):
    """What one execution gave. `outcome` is finished, or unknown if its kernel ended before it was over."""

    results: list[Result] = []
    stdout: str = ""
    stderr: str = ""
    error: CellError | None = None
    executionCount: int | None = None
    truncated: Truncated | None = None
    outcome: str = Ending.FINISHED


class StreamEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that happened in a kernel; `type` tells which of the other fields are set (docs/stream.md).

    `seq` is its number in the kernel's journal (-1: it is not in there), `id` the execution it belongs to.
    """

    type: str
    seq: int = -1
    id: str = ""
    text: str | None = None
    data: JsonObject | None = None
    metadata: JsonObject | None = None
    displayId: str | None = None
    error: CellError | None = None
    executionCount: int | None = None
    prompt: str | None = None
    password: bool | None = None
    wait: bool | None = None
    state: str | None = None
    reason: str | None = None
    exitCode: int | None = None
    signal: int | None = None
    messages: int | None = None
    outcome: str | None = None


class Events:
    """A translator of messages into events. It remembers execution counts, so that an "end" can tell them."""

    def __init__(self) -> None:
        self._counts: dict[str, int | None] = {}

    def receive(self, seq: int, kind: str, execution: str, ends: bool, parts: Sequence[bytes]) -> list[StreamEvent]:
        """The events of one message: none, one, the "end", or one and the "end"."""
        events = []
        if len(self._counts) > 1000:
            self._counts.pop(next(iter(self._counts)))
        made = self._event(kind, execution, parts[message.CONTENT], parts[message.METADATA])
        if made is not None:
            events.append(msgspec.structs.replace(made, seq=seq, id=execution))
        if ends:
            count = self._counts.pop(execution, None)
            outcome = ending(parts[message.METADATA])
            events.append(StreamEvent("end", seq=seq, id=execution, executionCount=count, outcome=outcome))
        return events

    def _event(self, kind: str, execution: str, content: bytes, metadata: bytes) -> StreamEvent | None:
        match kind:
            case "stream":
                stream = message.read(content, message.Stream)
                return StreamEvent(stream.name, text=stream.text) if stream.name in ("stdout", "stderr") else None
            case "execute_result":
                return rich("result", content)
            case "display_data":
                return rich("display", content)
            case "update_display_data":
                return rich("update", content)
            case "clear_output":
                return StreamEvent("clear", wait=message.read(content, Clear).wait)
            case "error":
                return StreamEvent("error", error=cell_error(content))
            case "execute_input":
                self._counts[execution] = message.read(content, Input).execution_count
                return StreamEvent("started", executionCount=self._counts[execution])
            case "execute_reply":
                reply = message.read(content, message.Reply)
                self._counts[execution] = reply.execution_count or self._counts.get(execution)
                if reply.status == "aborted":
                    return StreamEvent("error", error=CellError("Aborted", "an earlier cell failed", code="aborted"))
            case "input_request":
                asked = message.read(content, Prompt)
                return StreamEvent("input_request", prompt=asked.prompt, password=asked.password)
            case "status":
                state = message.read(content, message.Status).execution_state
                if state not in ("busy", "idle") or not execution:
                    cause = message.read(metadata, Told).cellvm
                    return StreamEvent(
                        "status",
                        state=state,
                        reason=cause.reason or None,
                        exitCode=cause.exitCode,
                        signal=cause.signal,
                    )
        return None


class Input(msgspec.Struct):
    """The content of `execute_input`."""

    code: str = ""
    execution_count: int | None = None


class Clear(msgspec.Struct):
    """The content of `clear_output`."""

    wait: bool = False


class Prompt(msgspec.Struct):
    """The content of `input_request`."""

    prompt: str = ""
    password: bool = False


class Transient(msgspec.Struct):
    """What a rich output says of itself that is not kept in notebooks."""

    display_id: str | None = None


class Rich(msgspec.Struct):
    """The content of a result or a display."""

    data: msgspec.Raw = msgspec.Raw(b"")
    metadata: msgspec.Raw = message.EMPTY
    transient: Transient | None = None
    execution_count: int | None = None


class Failure(msgspec.Struct):
    """The content of `error`, and of a reply that tells one."""

    ename: str = ""
    evalue: str = ""
    traceback: list[str] = []
    code: str | None = None
    stateKept: bool | None = None


class Cause(msgspec.Struct, frozen=True):
    """What the gateway tells in a message's metadata."""

    reason: str = ""
    exitCode: int | None = None
    signal: int | None = None
    outcome: str = ""


class Told(msgspec.Struct):
    """The metadata of a message, as far as the gateway wrote it."""

    cellvm: Cause = Cause()


def ending(metadata: bytes) -> Ending:
    """How a request ended, from the metadata of its last message. The gateway tells it where the kernel could not."""
    told = message.read(metadata, Told).cellvm.outcome if message.OURS in metadata else ""
    return Ending(told) if told in list(Ending) else Ending.FINISHED


def rich(kind: str, part: bytes) -> StreamEvent | None:
    content = message.read(part, Rich)
    data = message.json_object(content.data)
    if data is None:
        return None
    return StreamEvent(
        kind,
        data=data,
        metadata=message.json_object(content.metadata) or message.EMPTY,
        displayId=content.transient.display_id if content.transient else None,
        executionCount=content.execution_count,
    )


def values(data: msgspec.Raw | None) -> dict[str, msgspec.Raw]:
    """The values of a MIME bundle by their types, each still as JSON text."""
    found: dict[str, msgspec.Raw] = msgspec.json.decode(data, type=dict[str, msgspec.Raw]) if data else {}
    return found


def cell_error(content: bytes) -> CellError:
    """The error that a message tells."""
    told = message.read(content, Failure)
    return CellError(told.ename, told.evalue, told.traceback, told.code, told.stateKept)


class Collector:
    """The collector of a cell's events, within limits.

    Args:
        keep: asked before more bytes are kept, and told of fewer. Where it says no, the rest is left out and counted.
    """

    def __init__(
        self,
        text_limit: int = TEXT_LIMIT,
        result_limit: int = RESULT_LIMIT,
        keep: Callable[[int], bool] = lambda size: True,
    ) -> None:
        self._may_keep = keep
        self._limits = {"stdout": text_limit, "stderr": text_limit}
        self._text: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._result_room = result_limit
        self._dropped = Truncated()
        self._cell = Cell()
        self._shown: dict[str, int] = {}
        self._sizes: list[int] = []

    def add(self, event: StreamEvent) -> None:
        match event.type:
            case "stdout" | "stderr":
                text = event.text or ""
                kept = text[: self._limits[event.type]]
                if kept and not self._may_keep(sys.getsizeof(kept)):
                    kept, self._limits[event.type] = "", 0
                self._limits[event.type] -= len(kept)
                self._text[event.type].append(kept)
                dropped = getattr(self._dropped, event.type) + len(text) - len(kept)
                setattr(self._dropped, event.type, dropped)
            case "result" | "display" | "update":
                self._add_result(event)
            case "error":
                self._cell.error = event.error
            case "gap":
                self._dropped.messages += event.messages or 0
            case "started" | "end":
                self._cell.executionCount = event.executionCount or self._cell.executionCount
                self._cell.outcome = event.outcome or self._cell.outcome

    def _add_result(self, event: StreamEvent) -> None:
        """Keep a result, in place of the one that it updates."""
        data, metadata = event.data or message.EMPTY, event.metadata or message.EMPTY
        size = len(memoryview(data)) + len(memoryview(metadata))
        index = self._shown.get(event.displayId or "") if event.type == "update" else None
        freed = 0 if index is None else self._sizes[index]
        if size > self._result_room + freed or not self._may_keep(size - freed):
            self._dropped.results += 1
            return
        self._result_room += freed - size
        result = Result("result" if event.type == "result" else "display", data, metadata)
        if index is not None:
            self._cell.results[index], self._sizes[index] = result, size
            return
        if event.displayId is not None:
            self._shown[event.displayId] = len(self._cell.results)
        self._cell.results.append(result)
        self._sizes.append(size)

    def cell(self) -> Cell:
        """The cell so far."""
        self._cell.stdout, self._cell.stderr = "".join(self._text["stdout"]), "".join(self._text["stderr"])
        dropped = self._dropped
        self._cell.truncated = dropped if dropped != Truncated() else None
        return self._cell
