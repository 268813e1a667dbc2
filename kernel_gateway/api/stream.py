"""The WebSocket for agents, `/sandboxes/{id}/stream`: JSON events of a kernel, and a few commands (docs/stream.md)."""

import asyncio
import time
from contextlib import suppress
from typing import Annotated

import msgspec
from tornado.iostream import StreamClosedError

from kernel_gateway.api.base import PROTOCOL
from kernel_gateway.api.rest import MaxOutput, check_id, check_text
from kernel_gateway.api.socket import MALFORMED, Socket
from kernel_gateway.errors import CellvmError
from kernel_gateway.guest.answers import whole_answer
from kernel_gateway.kernel import message
from kernel_gateway.kernel.events import CellError, Events, StreamEvent, asked, completions, made_at, variables
from kernel_gateway.kernel.executions import KEPT
from kernel_gateway.kernel.journal import Gap, Record
from kernel_gateway.kernel.message import GATEWAY, PARENT, By
from kernel_gateway.sandbox.access import Access
from kernel_gateway.sandbox.sandbox import Sandbox

SHOWN, SHOWN_CODE = 20, 200
"""Cells that wait of which a `state` tells, and characters of the code of each."""
LISTING = 10.0
"""Seconds that the kernel has to tell its variables."""
COMPLETING = 3.0
"""Seconds that it has to complete a name. It does so between cells, so the answer of a busy kernel has no match."""
STATE_PAUSE = 0.05
"""Seconds between two `state` events, because a short cell's coming and going is no news."""


class Execute(msgspec.Struct, tag="execute", tag_field="type"):
    """Run a cell. A cell sent again with the same `id` and code runs only once. `timeout`: seconds; default: none.

    With `maxOutput` the end of the cell has its output as one text of at most so many characters.
    """

    code: str
    id: str | None = None
    timeout: Annotated[float, msgspec.Meta(gt=0, le=86400)] | None = None
    allowInput: bool = True
    maxOutput: MaxOutput | None = None


class Input(msgspec.Struct, tag="input", tag_field="type"):
    """Answer an input request."""

    text: str


class Interrupt(msgspec.Struct, tag="interrupt", tag_field="type"):
    """Interrupt the cell that runs."""


class Restart(msgspec.Struct, tag="restart", tag_field="type"):
    """Replace the kernel by a fresh one."""


class HoldOthers(msgspec.Struct, tag="hold", tag_field="type"):
    """Let the cells of others wait for so many seconds."""

    seconds: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 600


class Release(msgspec.Struct, tag="release", tag_field="type"):
    """Let the cells of others run again."""


class ListVariables(msgspec.Struct, tag="variables", tag_field="type"):
    """Ask for the variables of the kernel's namespace, also while a cell runs. The answer is an event of that type."""


class Complete(msgspec.Struct, tag="complete", tag_field="type"):
    """Ask what may stand at a place of the code, in characters. The answer is an event `completions` with the `id`."""

    code: str
    cursor: Annotated[int, msgspec.Meta(ge=0)]
    id: str | None = None


Command = Execute | Input | Interrupt | Restart | HoldOthers | Release | ListVariables | Complete
_command = msgspec.json.Decoder(Command)


class Waiting(msgspec.Struct):
    """A cell that waits for its turn, and the beginning of its code."""

    id: str
    by: By
    code: str


class Held(msgspec.Struct):
    """Who holds the cells of others, whether it is this client, and until when, in seconds since 1970."""

    by: By
    isMine: bool
    until: int


class Answered(msgspec.Struct):
    """The cell that has got input last, and from whom."""

    id: str
    by: By


class StateEvent(msgspec.Struct, tag="state", tag_field="type", omit_defaults=True):
    """The first of `waitingCount` cells that wait for their turn, and the id of the one that asks for input."""

    asks: str
    waiting: list[Waiting]
    waitingCount: int
    seq: int = -1
    held: Held | None = None
    answered: Answered | None = None


class AgentStream(Socket):
    """Everything that happens in one sandbox's kernel, whoever caused it."""

    route = "/sandboxes/{id}/stream"

    def find(self, mine: Access, name: str) -> Sandbox:
        return mine.get(name)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return PROTOCOL if PROTOCOL in subprotocols else None

    def open(self, *args: str, **kwargs: str) -> None:
        self._events = Events()
        self._limits: dict[str, int] = {}
        super().open(*args, **kwargs)
        now = StreamEvent("status", seq=self.reader.after, state=self.kernel.state, reason=self.kernel.reason or None)
        self.write_message(msgspec.json.encode(now).decode())
        self._by = By("stream", self._query.client or GATEWAY.name)
        self._told: StateEvent | None = None
        self._listing: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._completing: asyncio.Task[None] | None = None
        self.changed()

    def changed(self) -> None:
        if self._query.state and self._telling is None:
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        """Tell what the kernel is at, if that is news. A client that reads slowly gets the newest state only."""
        with suppress(StreamClosedError):
            while (state := self._state()) != self._told:
                self._told = state
                numbered = msgspec.structs.replace(state, seq=self.reader.after)
                await self.send([msgspec.json.encode(numbered).decode()])
                await asyncio.sleep(STATE_PAUSE)
        self._telling = None

    def _state(self) -> StateEvent:
        kernel, hold = self.kernel, self.kernel.hold
        waiting = kernel.waiting()
        return StateEvent(
            asks=kernel.asking,
            waiting=[Waiting(each.id, each.by, shown(each.code)) for each in waiting[:SHOWN]],
            waitingCount=len(waiting),
            held=hold
            and Held(hold.by, hold.session == self.session, round(time.time() + hold.until - time.monotonic())),
            answered=kernel.answered and Answered(*kernel.answered),
        )

    def on_close(self) -> None:
        for task in (self._telling, self._listing, self._completing):
            if task is not None:
                task.cancel()
        super().on_close()

    async def frames(self, records: list[Record | Gap]) -> list[str | bytes]:
        found: list[StreamEvent] = []
        for record in records:
            if isinstance(record, Gap):
                found.append(StreamEvent("gap", seq=record.seq, messages=record.messages))
            else:
                made = self._events.receive(record.seq, record.kind, record.parent, record.ends, record.parts)
                found += [dated(event, record.parts) for event in made if is_of_cell(event, record.parts)]
        return [msgspec.json.encode(await self._with_text(event)).decode() for event in found]

    async def _with_text(self, event: StreamEvent) -> StreamEvent:
        """An event. The end of a cell has the cell's output as a text, if that was asked for."""
        limit = self._limits.pop(event.id, None) if event.type == "end" else None
        execution = self.kernel.executions.get(event.id)
        if limit is None or execution is None:
            return event
        try:
            told = await whole_answer(self.sandbox.guest, execution, limit)
        except CellvmError:
            return event  # the sandbox has just ended, which the close code tells, or there is no room
        return msgspec.structs.replace(event, text=told.text, outputFile=told.output_file)

    async def on_message(self, frame: str | bytes) -> None:
        """Obey a command, or answer with a `refused` event if that is not possible."""
        if self.is_closing:
            return
        try:
            command = _command.decode(frame)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self.end(MALFORMED, str(error))
            return
        try:
            await self._obey(command)
        except CellvmError as error:
            told = CellError(type(error).__name__, str(error), code=error.code)
            refused = StreamEvent("refused", seq=self.reader.after, id=getattr(command, "id", None) or "", error=told)
            await self.send([msgspec.json.encode(refused).decode()])

    async def _obey(self, command: Command) -> None:
        self.key.scope.check_change()
        match command:
            case Execute():
                check_id(command.id)
                check_text("code", command.code)
                execution = self.kernel.run(
                    command.code,
                    execution_id=command.id,
                    timeout=command.timeout,
                    with_input=command.allowInput,
                    by=self._by,
                    session=self.session,
                )
                if command.maxOutput is not None:
                    self._limits[execution.id] = command.maxOutput
                    if len(self._limits) > KEPT:
                        del self._limits[next(iter(self._limits))]
            case Input():
                check_text("text", command.text)
                await self.kernel.answer_input(command.text, self._by)
            case Interrupt():
                await self.kernel.interrupt()
            case Restart():
                await self.kernel.restart()
            case HoldOthers():
                self.kernel.hold_others(self.session, self._by, command.seconds)
            case Release():
                self.kernel.release(self.session)
            case ListVariables():
                if self._listing is None:
                    self._listing = asyncio.create_task(self._tell_variables())
            case Complete():
                check_id(command.id)
                check_text("code", command.code)
                if self._completing is not None:
                    self._completing.cancel()  # only the last place that the user was at is of interest
                self._completing = asyncio.create_task(self._tell_completions(command))

    async def _tell_variables(self) -> None:
        """Ask for the variables and tell them. Other commands are obeyed meanwhile, because a kernel may be slow."""
        request = {"type": "request", "seq": 1, "command": "cellvmVariables"}
        with suppress(StreamClosedError, CellvmError):  # the connection is being closed, and tells why
            content = await self.kernel.ask("debug_request", request, LISTING)
            if content is not None:
                told = StreamEvent("variables", seq=self.reader.after, variables=variables(content))
                await self.send([msgspec.json.encode(told).decode()])
        self._listing = None

    async def _tell_completions(self, command: Complete) -> None:
        """Ask what may stand at a place, and tell it. Other commands are obeyed meanwhile."""
        request = {"code": command.code, "cursor_pos": min(command.cursor, len(command.code))}
        with suppress(StreamClosedError, CellvmError):  # the connection is being closed, and tells why
            content = await self.kernel.ask("complete_request", request, COMPLETING, channel="shell")
            told = completions(content or b"{}")
            told = msgspec.structs.replace(told, seq=self.reader.after, id=command.id or "")
            await self.send([msgspec.json.encode(told).decode()])


def is_of_cell(event: StreamEvent, parts: list[bytes]) -> bool:
    """Whether it is no end of another request of Jupyter's. An execution that never ran has no header to tell."""
    return event.type != "end" or message.header(parts[PARENT]).msg_type in ("execute_request", "")


def dated(event: StreamEvent, parts: list[bytes]) -> StreamEvent:
    """An event of a message, with what this stream adds: when a cell has begun and ended, whose it is, and its code."""
    if event.type not in ("started", "end"):
        return event
    code, by = asked(parts) if event.type == "started" else (None, None)
    return msgspec.structs.replace(event, at=made_at(parts), code=code, by=by)


def shown(code: bytes) -> str:
    """The beginning of a cell's code."""
    return code[: 4 * SHOWN_CODE].decode("utf-8", "replace")[:SHOWN_CODE]
