"""Kernel messages, turned into events for REST clients and agents. Pure: messages in, events out.

An execution is over when both its reply (shell) and its `idle` (iopub) have come. Their order is not fixed, and the
journal marks the later one. A collected cell keeps up to `text_limit` characters of text per stream and up to
`result_limit` bytes of results. It counts the rest.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from kernel_gateway.kernel import message
from kernel_gateway.kernel.changes import Changes, changes
from kernel_gateway.outcome import Ending

TEXT_LIMIT = 8 * 1024 * 1024
RESULT_LIMIT = 64 * 1024 * 1024
MAX_PAYLOAD = 4 * 1024 * 1024
"""Bytes of a reply beyond which nothing in it is shown. The help for a large class has a tenth of it."""
MAX_PAGES = 100
MAX_REPORTS = 10
"""Reports of changes that wait for the ends of their cells."""
OUTPUTS = frozenset({"stdout", "stderr", "result", "display", "error"})
"""Events that a pending `clear` waits for."""
WAYS = ("execute", "stream", "jupyter")
MAX_VARIABLES, MAX_VALUE = 500, 300
"""Variables that are told at once, and characters of the value of each."""
MAX_NAME, MAX_DATE = 64, 40
"""Characters of a client's name, and of a time."""
RESTARTED = "restarted"
"""The state in the status that tells a cell that its kernel is another one than the cell before had."""
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


class Late(msgspec.Struct, frozen=True):
    """What an earlier cell has put out since it ended, because its threads or tasks go on."""

    id: str
    executionCount: int | None
    stdout: str
    stderr: str
    results: list[Result]


class Cell(msgspec.Struct):
    """What one execution gave. `outcome` is finished, or unknown if its kernel ended before it was over.

    `late` is what earlier cells have put out since. `restarted` says why the kernel is not the one of the cell before.
    `changes` is null if the kernel has told none.

    The last fields are for whoever asked with `wait` or `maxOutput`. `status` is running or the outcome, and `next` the
    number after which further output comes. `text` is all of it for a model. `outputFile` has what `text` leaves out.
    """

    results: list[Result] = []
    stdout: str = ""
    stderr: str = ""
    error: CellError | None = None
    executionCount: int | None = None
    truncated: Truncated | None = None
    outcome: str = Ending.FINISHED
    late: list[Late] = []
    restarted: str | None = None
    changes: Changes | None = None
    id: str | UnsetType = UNSET
    status: str | UnsetType = UNSET
    next: int | UnsetType = UNSET
    text: str | UnsetType = UNSET
    outputFile: str | UnsetType | None = UNSET


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
    late: bool | None = None
    code: str | None = None
    by: message.By | None = None
    at: str | None = None
    outputFile: str | None = None
    changes: Changes | None = None
    variables: "list[Variable] | None" = None
    matches: list[str] | None = None
    start: int | None = None
    end: int | None = None


class Events:
    """A translator of messages into events. It remembers counts and changes, so that an "end" can tell them."""

    def __init__(self) -> None:
        self._counts: dict[str, int | None] = {}
        self._changes: dict[str, Changes | None] = {}

    def receive(self, seq: int, kind: str, execution: str, ends: bool, parts: Sequence[bytes]) -> list[StreamEvent]:
        """The events of one message: none, one, the "end", or some and the "end"."""
        if len(self._counts) > 1000:
            self._counts.pop(next(iter(self._counts)))
        content = parts[message.CONTENT]
        made = self._event(kind, execution, content, parts[message.METADATA])
        told = [] if made is None else [made]
        if kind == "execute_reply":
            told += pages(content)
            self._changes[execution] = changes(parts[message.METADATA])
            if len(self._changes) > MAX_REPORTS:
                del self._changes[next(iter(self._changes))]
        events = [msgspec.structs.replace(event, seq=seq, id=execution) for event in told]
        if ends:
            count = self._counts.pop(execution, None)
            outcome, changed = ending(parts[message.METADATA]), self._changes.pop(execution, None)
            events.append(StreamEvent("end", seq, execution, executionCount=count, outcome=outcome, changes=changed))
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


class Asked(msgspec.Struct):
    """The header of a cell's request. Jupyter's clients say no `via`."""

    username: str = ""
    via: str = "jupyter"


def asked(parts: Sequence[bytes]) -> tuple[str, message.By]:
    """The code of the cell that an `execute_input` is about, and who has sent it. The kernel repeats both.

    The name is a client's word for itself, and all of it went through the guest, so it is cut to what it may be.
    """
    head = message.read(parts[message.PARENT], Asked)
    by = message.By(head.via if head.via in WAYS else "jupyter", head.username[:MAX_NAME])
    return message.read(parts[message.CONTENT], Input).code, by


class Dated(msgspec.Struct):
    """The header of a message that says when it was made."""

    date: str = ""


def made_at(parts: Sequence[bytes]) -> str:
    """When a message was made, by the clock of whoever made it."""
    return message.read(parts[message.HEADER], Dated).date[:MAX_DATE]


class Variable(msgspec.Struct):
    """A variable of the kernel's namespace, and the beginning of its value as text."""

    name: str
    type: str = ""
    value: str = ""


class Found(msgspec.Struct):
    variables: list[Variable] = []


class Inspected(msgspec.Struct):
    """The content of the reply to `cellvmVariables`."""

    body: Found = msgspec.field(default_factory=Found)


def variables(content: bytes) -> list[Variable]:
    """The variables that a reply to `cellvmVariables` tells, cut to what a list of them needs."""
    if len(content) > MAX_PAYLOAD:
        return []
    told = message.read(content, Inspected).body.variables
    return [
        Variable(each.name[:MAX_NAME], each.type[:MAX_NAME], each.value[:MAX_VALUE])
        for each in told[:MAX_VARIABLES]
        if each.name.isidentifier() and not each.name.startswith("_")
    ]


class Completions(msgspec.Struct):
    """The content of `complete_reply`: what may stand between two places of the code."""

    matches: list[str] = []
    cursor_start: int = 0
    cursor_end: int = 0


def completions(content: bytes) -> StreamEvent:
    """What a reply to `complete_request` offers, cut to what a list of it needs."""
    told = Completions() if len(content) > MAX_PAYLOAD else message.read(content, Completions)
    matches = [each[:MAX_VALUE] for each in told.matches[:MAX_VARIABLES]]
    return StreamEvent("completions", matches=matches, start=told.cursor_start, end=told.cursor_end)


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


class Payload(msgspec.Struct, gc=False):
    """What a reply wants to be shown: a page of help has `data`, a proposal for the next cell (`%load`) has `text`."""

    source: str
    data: msgspec.Raw = msgspec.Raw(b"")
    text: str = ""


class Payloads(msgspec.Struct):
    """The content of `execute_reply`, as far as it is to be shown."""

    payload: list[Payload] = []


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


def pages(content: bytes) -> list[StreamEvent]:
    """What a cell's reply wants to be shown, as displays, because no client of ours has a pager: `len?`, `%load`."""
    if len(content) > MAX_PAYLOAD:
        return []
    found = []
    for payload in message.read(content, Payloads).payload[:MAX_PAGES]:
        data = message.json_object(payload.data) if payload.source == "page" else None
        if payload.source == "set_next_input":
            data = msgspec.Raw(msgspec.json.encode({"text/plain": payload.text}))
        if data is not None:
            found.append(StreamEvent("display", data=data, metadata=message.EMPTY))
    return found


def values(data: msgspec.Raw | None) -> dict[str, msgspec.Raw]:
    """The values of a MIME bundle by their types, each still as JSON text."""
    found: dict[str, msgspec.Raw] = msgspec.json.decode(data, type=dict[str, msgspec.Raw]) if data else {}
    return found


def cell_error(content: bytes) -> CellError:
    """The error that a message tells."""
    told = message.read(content, Failure)
    return CellError(told.ename, told.evalue, told.traceback, told.code, told.stateKept)


class Collector:
    """The collector of a cell's events, within limits. It keeps what a notebook would show in the end.

    So a `clear` takes away what was there, and an `update` replaces what it updates. An update of a display that
    another cell has shown is a display of its own, because whoever asks here sees no other cell.

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
        self._text_limit, self._result_limit = text_limit, result_limit
        self._cell = Cell()
        self._kept = 0
        self._shown: dict[str, list[int]] = {}
        self._late: dict[str, Collector] = {}
        self._clear()

    def _clear(self) -> None:
        """Forget all output, and what of it was left out."""
        self._is_clear_due = False
        self._may_keep(-self._kept)
        self._kept = 0
        self._limits = {"stdout": self._text_limit, "stderr": self._text_limit}
        self._text: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._result_room = self._result_limit
        self._dropped = Truncated()
        self._cell.results = []
        self._sizes: list[int] = []
        self._shown = {name: [] for name in self._shown}

    def add(self, event: StreamEvent) -> None:
        """Take the next event. A late one is kept with those of its own cell."""
        if event.late:
            if event.id not in self._late:
                self._late[event.id] = Collector(self._text_limit, self._result_limit, self._may_keep)
            self._late[event.id].add(msgspec.structs.replace(event, late=None))
            self._late[event.id]._cell.executionCount = event.executionCount
            return
        if self._is_clear_due and event.type in OUTPUTS:
            self._clear()
        match event.type:
            case "stdout" | "stderr":
                self._add_text(event.type, event.text or "")
            case "result" | "display" | "update":
                self._add_result(event)
            case "clear" if event.wait:
                self._is_clear_due = True
            case "clear":
                self._clear()
            case "error":
                self._cell.error = event.error
            case "status" if event.state == RESTARTED:
                self._cell.restarted = event.reason
            case "gap":
                self._dropped.messages += event.messages or 0
            case "started" | "end":
                self._cell.executionCount = event.executionCount or self._cell.executionCount
                self._cell.outcome = event.outcome or self._cell.outcome
                self._cell.changes = event.changes

    def _keeps(self, size: int) -> bool:
        """Whether so many more bytes may be kept. They count from now on."""
        may = self._may_keep(size)
        self._kept += size if may else 0
        return may

    def _add_text(self, name: str, text: str) -> None:
        kept = text[: self._limits[name]]
        if kept and not self._keeps(sys.getsizeof(kept)):
            kept, self._limits[name] = "", 0
        self._limits[name] -= len(kept)
        self._text[name].append(kept)
        dropped = getattr(self._dropped, name) + len(text) - len(kept)
        setattr(self._dropped, name, dropped)

    def _add_result(self, event: StreamEvent) -> None:
        """Keep a result. Everything that was shown under its display id becomes the same."""
        data, metadata = event.data or message.EMPTY, event.metadata or message.EMPTY
        shown = self._shown.get(event.displayId or "")
        for index in shown or ():
            if self._has_room(data, metadata, self._sizes[index]):
                self._cell.results[index] = Result(self._cell.results[index].type, data, metadata)
                self._sizes[index] = size_of(data, metadata)
        if event.type == "update" and shown is not None:
            return
        if self._has_room(data, metadata, 0):
            if event.displayId:
                self._shown.setdefault(event.displayId, []).append(len(self._cell.results))
            self._cell.results.append(Result("result" if event.type == "result" else "display", data, metadata))
            self._sizes.append(size_of(data, metadata))

    def _has_room(self, data: msgspec.Raw, metadata: msgspec.Raw, freed: int) -> bool:
        """Take room for a result in place of one that took `freed` bytes, or count one more that is left out."""
        more = size_of(data, metadata) - freed
        if more > self._result_room or not self._keeps(more):
            self._dropped.results += 1
            return False
        self._result_room -= more
        return True

    def cell(self) -> Cell:
        """The cell so far."""
        self._cell.stdout, self._cell.stderr = "".join(self._text["stdout"]), "".join(self._text["stderr"])
        dropped = self._dropped
        self._cell.truncated = dropped if dropped != Truncated() else None
        late = [(name, each.cell()) for name, each in self._late.items()]
        self._cell.late = [
            Late(name, each.executionCount, each.stdout, each.stderr, each.results) for name, each in late
        ]
        return self._cell


def size_of(data: msgspec.Raw, metadata: msgspec.Raw) -> int:
    return len(memoryview(data)) + len(memoryview(metadata))
