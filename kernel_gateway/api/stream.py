"""The WebSocket for agents, `/sandboxes/{id}/stream`: JSON events of a kernel, and a few commands (docs/stream.md)."""

from typing import Annotated

import msgspec

from kernel_gateway.api.rest import MaxOutput, check_id, check_text
from kernel_gateway.api.socket import MALFORMED, Socket
from kernel_gateway.errors import CellvmError
from kernel_gateway.guest.answers import whole_answer
from kernel_gateway.kernel.events import CellError, Events, StreamEvent
from kernel_gateway.kernel.executions import KEPT
from kernel_gateway.kernel.journal import Gap, Record
from kernel_gateway.sandbox.access import Access
from kernel_gateway.sandbox.sandbox import Sandbox


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


Command = Execute | Input | Interrupt | Restart
_command = msgspec.json.Decoder(Command)


class AgentStream(Socket):
    """Everything that happens in one sandbox's kernel, whoever caused it."""

    def find(self, mine: Access, name: str) -> Sandbox:
        return mine.get(name)

    def open(self, *args: str, **kwargs: str) -> None:
        self._events = Events()
        self._limits: dict[str, int] = {}
        super().open(*args, **kwargs)
        now = StreamEvent("status", seq=self.reader.after, state=self.kernel.state, reason=self.kernel.reason or None)
        self.write_message(msgspec.json.encode(now).decode())

    async def frames(self, records: list[Record | Gap]) -> list[str | bytes]:
        found: list[StreamEvent] = []
        for record in records:
            if isinstance(record, Gap):
                found.append(StreamEvent("gap", seq=record.seq, messages=record.messages))
            else:
                found += self._events.receive(record.seq, record.kind, record.parent, record.ends, record.parts)
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
        match command:
            case Execute():
                check_id(command.id)
                check_text("code", command.code)
                execution = self.kernel.run(
                    command.code, execution_id=command.id, timeout=command.timeout, with_input=command.allowInput
                )
                if command.maxOutput is not None:
                    self._limits[execution.id] = command.maxOutput
                    if len(self._limits) > KEPT:
                        del self._limits[next(iter(self._limits))]
            case Input():
                check_text("text", command.text)
                await self.kernel.answer_input(command.text)
            case Interrupt():
                await self.kernel.interrupt()
            case Restart():
                await self.kernel.restart()
