"""The messages of one cell, turned into what a REST client wants. Pure: messages in, events out.

An execution is over when both its reply (shell) and its `idle` (iopub) have come; their order is not fixed. Text is
kept up to `text_limit` characters per stream and results up to `result_limit` bytes; the rest is counted and told.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from kernel_gateway.jupyter import message

TEXT_LIMIT = 8 * 1024 * 1024
RESULT_LIMIT = 64 * 1024 * 1024


class CellError(msgspec.Struct, frozen=True):
    """What a cell raised. `code` is set when it is not the user's code that failed: exec_timeout, kernel_restarted."""

    name: str
    value: str
    traceback: list[str] = []
    code: str | None = None
    stateKept: bool | None = None


class Result(msgspec.Struct, frozen=True):
    """One rich output. `type` is "result" for the cell's value, "display" for what it displayed.

    `data` is a MIME bundle: text as text, images base64 encoded, JSON as JSON.
    """

    type: str
    data: dict[str, Any]
    metadata: dict[str, Any] = {}


class Truncated(msgspec.Struct):
    """What was left out: characters of text, number of results."""

    stdout: int = 0
    stderr: int = 0
    results: int = 0


class Cell(msgspec.Struct):
    """The outcome of one execution."""

    results: list[Result] = []
    stdout: str = ""
    stderr: str = ""
    error: CellError | None = None
    executionCount: int | None = None
    truncated: Truncated | None = None


class StreamEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a streamed execution; `type` tells which of the other fields are set."""

    type: str
    text: str | None = None
    data: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    error: CellError | None = None
    executionCount: int | None = None


class Execution:
    """Follows one execute request. Feed it each message whose parent is the request; it answers with events."""

    def __init__(self) -> None:
        self._replied = self._idle = False
        self._has_failed = False
        self._error: CellError | None = None
        self.count: int | None = None

    @property
    def is_done(self) -> bool:
        return self._replied and self._idle

    def abandon(self) -> None:
        """Nothing more will come: its kernel is gone."""
        self._replied = self._idle = True

    def receive(self, parts: Sequence[bytes | memoryview]) -> list[StreamEvent]:
        """The events that one message means; the last of an execution is "end"."""
        kind = message.header(parts[message.HEADER]).msg_type
        content = message.content(parts[message.CONTENT])
        events: list[StreamEvent] = []
        match kind:
            case "stream" if content.get("name") in ("stdout", "stderr"):
                events.append(StreamEvent(content["name"], text=str(content.get("text", ""))))
            case "execute_result" | "display_data" | "update_display_data":
                data, metadata = content.get("data"), content.get("metadata")
                if isinstance(data, dict):
                    events.append(
                        StreamEvent(
                            "result" if kind == "execute_result" else "display",
                            data=data,
                            metadata=metadata if isinstance(metadata, dict) else {},
                        )
                    )
            case "error":
                self._error = None
                self._has_failed = True
                events.append(StreamEvent("error", error=cell_error(content)))
            case "execute_input":
                self.count = number(content.get("execution_count"))
                events.append(StreamEvent("started", executionCount=self.count))
            case "status" if content.get("execution_state") == "idle":
                self._idle = True
            case "execute_reply":
                self._replied = True
                self.count = number(content.get("execution_count")) or self.count
                if content.get("status") == "aborted":
                    events.append(StreamEvent("error", error=CellError("Aborted", "an earlier cell failed")))
                elif content.get("status") == "error" and not self._has_failed:
                    self._error = cell_error(content)
        if self.is_done:
            if self._error is not None:  # published by nobody
                events.append(StreamEvent("error", error=self._error))
            events.append(StreamEvent("end", executionCount=self.count))
        return events


def number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def cell_error(content: dict[str, Any]) -> CellError:
    traceback = content.get("traceback")
    return CellError(
        name=str(content.get("ename", "")),
        value=str(content.get("evalue", "")),
        traceback=[str(line) for line in traceback] if isinstance(traceback, list) else [],
    )


class Collector:
    """Adds events up to a Cell, within the limits."""

    def __init__(self, text_limit: int = TEXT_LIMIT, result_limit: int = RESULT_LIMIT) -> None:
        self._limits = {"stdout": text_limit, "stderr": text_limit}
        self._text: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._result_room = result_limit
        self._dropped = Truncated()
        self._cell = Cell()

    def add(self, event: StreamEvent) -> None:
        match event.type:
            case "stdout" | "stderr":
                text = event.text or ""
                kept = text[: self._limits[event.type]]
                self._limits[event.type] -= len(kept)
                self._text[event.type].append(kept)
                dropped = getattr(self._dropped, event.type) + len(text) - len(kept)
                setattr(self._dropped, event.type, dropped)
            case "result" | "display":
                size = sum(len(value) if isinstance(value, str) else 1000 for value in (event.data or {}).values())
                if size > self._result_room:
                    self._dropped.results += 1
                else:
                    self._result_room -= size
                    self._cell.results.append(Result(event.type, event.data or {}, event.metadata or {}))
            case "error":
                self._cell.error = event.error
            case "started" | "end":
                self._cell.executionCount = event.executionCount or self._cell.executionCount

    def cell(self) -> Cell:
        """Everything so far."""
        self._cell.stdout, self._cell.stderr = "".join(self._text["stdout"]), "".join(self._text["stderr"])
        dropped = self._dropped
        self._cell.truncated = dropped if dropped.stdout or dropped.stderr or dropped.results else None
        return self._cell
