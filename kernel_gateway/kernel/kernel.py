"""A sandbox's kernel as the gateway sees it: its journal, the routes of replies, and cells for REST and agents."""

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from guest_agent import wire
from kernel_gateway.errors import CellvmError, Conflict, GuestFailure
from kernel_gateway.guest.link import Link
from kernel_gateway.kernel import message
from kernel_gateway.kernel.events import CellError, Events, StreamEvent
from kernel_gateway.kernel.journal import Gap, Journal
from kernel_gateway.kernel.message import CHANNEL, CONTENT, HEADER, PARENT

log = logging.getLogger(__name__)

START_LIMIT = 120
"""Seconds a kernel may take to come back after its end, times the driver's time scale."""
INTERRUPT_GRACE = 0.75
"""Seconds a cell gets to end after an interrupt before its kernel is killed, so that the reply comes within a second.
An emulated machine gets twice as long, because a loop in it may need most of a second to notice."""
KEPT = 1000
"""Number of executions, and of sessions, that are remembered."""
MAX_PENDING = 10_000
UNTRACKED = frozenset(
    "comm_info_request comm_info_reply kernel_info_request kernel_info_reply shutdown_request shutdown_reply "
    "interrupt_request interrupt_reply debug_request debug_reply stream display_data update_display_data execute_input "
    "execute_result error status clear_output debug_event input_request input_reply".split()
)
"""Kinds of messages that are no activity of a user. jupyter_server has the same list."""


class Pending(msgspec.Struct):
    """A request that is not over: its session, channel and header, and which parts of its end have come."""

    session: str
    channel: str
    header: bytes
    kind: str
    is_replied: bool = False
    is_idle: bool = False


class ClientSession(msgspec.Struct):
    """A client's session: numbers of the last message that it has acknowledged, and of the last one sent to it."""

    received: int
    sent: int


class Execution:
    """A cell that the gateway runs for somebody.

    `id` is its Jupyter message id, and clients know it by that. `after` is the journal's number before its first
    message, `last` the number of its last one, 0 until it is over. `is_lost`: its kernel ended before it did, so nobody
    knows how far it came. `failure`: the reason why it could not be run at all.
    """

    def __init__(self, execution_id: str, digest: bytes, after: int, timeout: float | None) -> None:
        self.id = execution_id
        self.digest = digest
        self.after = after
        self.timeout = timeout
        self.last = 0
        self.is_lost = False
        self.failure: CellvmError | None = None
        self.is_unwanted = False
        self.timed_out: CellError | None = None
        self.clock = time.monotonic()
        self.is_started = False
        self.over = asyncio.Event()
        self.changed = asyncio.Event()

    @property
    def state(self) -> str:
        if not self.over.is_set():
            return "running"
        return "unknown" if self.is_lost else "finished"


class Kernel:
    """One kernel. Cells that the gateway runs itself run one at a time, in the order of the calls.

    `state` is one of Jupyter's: starting, idle, busy, restarting, dead. `reason` says why for the last two.
    `on_shutdown` is called when a client has shut the kernel down for good.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._session = uuid.uuid4().hex
        self._kernel_session = self._session
        self._pending: dict[str, Pending] = {}
        self._busy: dict[str, str] = {}
        self._turn = asyncio.Lock()
        self._usable = asyncio.Event()
        self._usable.set()
        self._condition = "idle"
        self._is_ending = False
        self._overdue: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.reason = ""
        self.last_activity = time.time()
        self.connections = 0
        self._sessions: dict[str, ClientSession] = {}
        self.executions: dict[str, Execution] = {}
        self.on_shutdown: Callable[[], None] = lambda: None
        self.journal = Journal(on_pressure=link.hold_kernel)
        link.on_kernel_message = self._message_received
        link.on_event = self._event_received
        link.closed.add_done_callback(lambda closed: self.close(str(closed.result())))

    def open_journal(self, directory: Path | None) -> None:
        """Begin a new journal for the kernel's owner, because the pool's messages are not the owner's."""
        self.journal.close()
        self.journal = Journal(directory, on_pressure=self._link.hold_kernel)
        self.executions.clear()
        self.last_activity = time.time()

    @property
    def state(self) -> str:
        return "busy" if self._condition == "idle" and self._busy else self._condition

    # -- what the kernel says

    def _message_received(self, parts: list[bytes]) -> None:
        if len(parts) <= CONTENT or parts[CHANNEL] not in message.SENT_BY_KERNEL:
            return  # this is not a kernel's message
        head = message.header(parts[HEADER])
        self._kernel_session = head.session
        parent = message.header(parts[PARENT])
        pending = self._pending.get(parent.msg_id)
        session: str | None = None
        if parts[CHANNEL] == b"iopub":
            if head.msg_type == "status":
                self._status_received(parent, message.content(parts[CONTENT]).get("execution_state"), pending)
            if parent.msg_type not in UNTRACKED:
                self.last_activity = time.time()
        else:
            session = pending.session if pending else parent.session
            if pending and head.msg_type.endswith("_reply"):
                pending.is_replied = True
        execution = self.executions.get(parent.msg_id)
        if execution is not None:
            if not execution.is_started:
                execution.is_started = True
                execution.clock = time.monotonic()
                execution.changed.set()
            if head.msg_type == "error" and execution.timed_out:
                parts[CONTENT] = error_content(execution.timed_out)
        ends = pending is not None and pending.is_replied and pending.is_idle
        self._record(parts, head.msg_type, parent.msg_id, session, ends)
        if self._is_ending and head.msg_type == "shutdown_reply" and pending and pending.is_replied:
            self.on_shutdown()

    def _status_received(self, parent: message.Header, state: object, pending: Pending | None) -> None:
        if state == "busy":
            if len(self._busy) < MAX_PENDING and parent.msg_type not in UNTRACKED:
                self._busy[parent.msg_id] = parent.msg_type
        elif state == "idle":
            self._busy.pop(parent.msg_id, None)
            if pending is not None:
                pending.is_idle = True

    def _record(self, parts: list[bytes], kind: str, parent: str, session: str | None, ends: bool) -> None:
        record = self.journal.append(parts, kind, parent, session, ends)
        if ends:
            self._pending.pop(parent, None)
            execution = self.executions.get(parent)
            if execution is not None:
                execution.last = record.seq
                execution.over.set()
                execution.changed.set()

    def _event_received(self, event: wire.Body) -> None:
        if not isinstance(event, wire.KernelStatus):
            return
        reason = event.reason[:500]
        cause = {"reason": reason, "exitCode": event.exit_code, "signal": event.signal}
        if self._is_ending:  # the kernel has gone, and its reply has not come
            self._lose(
                CellError("KernelShutDown", "the kernel was shut down", code="kernel_restarted", stateKept=False)
            )
            self.on_shutdown()
            return
        if event.state in ("restarting", "dead"):
            self._lose(CellError("KernelRestarted", reason, code="kernel_restarted", stateKept=False))
        if event.state in ("restarting", "dead", "idle"):
            self._condition, self.reason = event.state, "" if event.state == "idle" else reason
            self._stop_waiting()
            if event.state == "restarting":
                self._usable.clear()
                limit = START_LIMIT * self._link.time_scale
                self._overdue = asyncio.get_running_loop().call_later(limit, self._not_back)
            else:
                self._usable.set()
            self._publish("status", {"execution_state": event.state}, {k: v for k, v in cause.items() if v})

    def _stop_waiting(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()

    def _not_back(self) -> None:
        """Give the kernel up, because the agent announced another one and has said nothing since."""
        self._condition, self.reason = "dead", "another kernel did not start in time"
        self._usable.set()
        self._publish("status", {"execution_state": "dead"}, {"reason": self.reason})

    # -- what the gateway says in the kernel's name

    def _publish(self, kind: str, fields: dict[str, Any], cause: dict[str, Any] | None = None) -> None:
        metadata = {"cellvm": cause} if cause else {}
        parts = message.new("iopub", kind, fields, session=self._kernel_session, metadata=metadata)
        self._record(parts, kind, "", None, ends=False)

    def _lose(self, error: CellError) -> None:
        """End every request that was under way, because its kernel is gone and no client should wait for ever."""
        for msg_id in list(self._pending):
            self._end_request(msg_id, error)
        self._busy.clear()

    def _end_request(self, msg_id: str, error: CellError) -> None:
        if self.journal.is_closed:
            return
        pending = self._pending[msg_id]
        execution = self.executions.get(msg_id)
        if execution is not None:
            execution.is_lost = True
        content = msgspec.json.decode(error_content(error))

        def say(channel: str, kind: str, fields: dict[str, Any], ends: bool = False) -> None:
            session = None if channel == "iopub" else pending.session
            parts = message.new(channel, kind, fields, session=self._kernel_session, parent=pending.header)
            self._record(parts, kind, msg_id, session, ends)

        if pending.kind == "execute_request":
            say("iopub", "error", content)
        is_done = pending.kind == "shutdown_request"  # this request asked for the kernel's end
        outcome = {"status": "ok", "restart": False} if is_done else {"status": "error", **content}
        say(pending.channel, pending.kind.removesuffix("_request") + "_reply", outcome)
        say("iopub", "status", {"execution_state": "idle"}, ends=True)

    def close(self, reason: str) -> None:
        """Tell all readers that the sandbox has ended. Further calls do nothing."""
        if self.journal.is_closed:
            return
        self._stop_waiting()
        self._condition, self.reason = "dead", reason
        self._publish("status", {"execution_state": "dead"}, {"reason": reason})
        for execution in self.executions.values():
            if not execution.over.is_set():
                execution.is_lost = True
                execution.over.set()
                execution.changed.set()
        self._usable.set()
        self.journal.close()

    # -- what clients say

    def send(self, parts: list[bytes], session: str) -> Coroutine[Any, Any, None] | None:
        """Pass a client's message on; its replies go to the client's `session`.

        Most messages are on their way when this returns. If the kernel is restarting or behind, this returns a
        coroutine that sends the message. It raises SandboxDied if the sandbox ends meanwhile.
        """
        if not self._usable.is_set():
            return self._send_later(parts, session)
        if not self._expect(parts, session) or self._link.send_at_once(parts):
            return None
        return self._link.send_kernel_message(parts)

    async def _send_later(self, parts: list[bytes], session: str) -> None:
        await self._usable.wait()
        if self._expect(parts, session):
            await self._link.send_kernel_message(parts)

    def _expect(self, parts: list[bytes], session: str) -> bool:
        """Remember whose request it is, and return whether there is a kernel that could answer."""
        head = message.header(parts[HEADER])
        if head.msg_type.endswith("_request"):
            if len(self._pending) >= MAX_PENDING:
                del self._pending[next(each for each in self._pending if each not in self.executions)]
            self._pending.setdefault(
                head.msg_id, Pending(session, parts[CHANNEL].decode(), parts[HEADER], head.msg_type)
            )
            if head.msg_type == "shutdown_request":
                self._is_ending = not message.content(parts[CONTENT]).get("restart")
            if self._condition == "dead":
                reason = f"the kernel is dead ({self.reason}); restart it"
                self._end_request(head.msg_id, CellError("DeadKernel", reason, code="kernel_restarted"))
        return self._condition != "dead"

    async def answer_input(self, text: str) -> None:
        """Answer the cell that waits for input."""
        await self._link.send_kernel_message(
            message.new("stdin", "input_reply", {"value": text}, session=self._session)
        )

    @property
    def pending(self) -> frozenset[str]:
        """Ids of the requests that are not over."""
        return frozenset(self._pending)

    def attach(self, name: str, since: int | None) -> ClientSession:
        """The session of a client that connects, as the gateway knows it, or as the client says by `since`."""
        session = self._sessions.pop(name, None)
        if since is not None:
            session = ClientSession(since, since)
        elif session is None:
            session = ClientSession(self.journal.last, self.journal.last)
        self._sessions[name] = session
        if len(self._sessions) > KEPT:
            del self._sessions[next(iter(self._sessions))]
        return session

    # -- cells of the gateway's own

    def run(
        self,
        code: str,
        *,
        execution_id: str | None = None,
        timeout: float | None = None,
        quiet: bool = False,
        with_input: bool = False,
    ) -> Execution:
        """Run a cell, or find the one that runs or ran under this id.

        `timeout` seconds after its start the cell is interrupted, so that variables survive. If it does not end then,
        its kernel is replaced.

        Args:
            quiet: leave no trace in the user's history and counter.
            with_input: somebody will answer the cell's input requests.

        Raises:
            Conflict: the id was used for another cell, or too many cells are waiting.
        """
        digest = hashlib.sha256(code.encode("utf-8", "surrogatepass")).digest()
        known = self.executions.get(execution_id or "")
        if known is not None and known.digest == digest:
            return known
        if known is not None or execution_id in self._pending:
            raise Conflict("this id was used for another cell", hint="choose a new one for every cell")
        execution = Execution(execution_id or uuid.uuid4().hex, digest, self.journal.last, timeout)
        if len(self.executions) >= KEPT:
            oldest = next((each for each in self.executions.values() if each.over.is_set()), None)
            if oldest is None:
                raise Conflict(f"{KEPT} cells are waiting already", hint="wait for some of them")
            del self.executions[oldest.id]
        self.executions[execution.id] = execution
        fields = {
            "code": code,
            "silent": False,
            "store_history": not quiet,
            "user_expressions": {},
            "allow_stdin": with_input,
            "stop_on_error": False,
        }
        self._start(self._drive(execution, fields))
        return execution

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drive(self, execution: Execution, fields: dict[str, Any]) -> None:
        """See a cell through: its turn, its start, its timeout."""
        try:
            async with self._turn:
                await self._usable.wait()
                if self._condition == "dead":
                    await self.restart()
                if not execution.is_unwanted:
                    parts = message.new("shell", "execute_request", fields, session=self._session, msg_id=execution.id)
                    self._pending[execution.id] = Pending(self._session, "shell", parts[HEADER], "execute_request")
                    execution.clock = time.monotonic()
                    await self._link.send_kernel_message(parts)
                    await self._watch(execution)
        except CellvmError as error:
            execution.failure = error
        if not execution.over.is_set():  # it never reached the kernel
            self._pending.setdefault(execution.id, Pending(self._session, "shell", b"{}", "execute_request"))
            self._end_request(execution.id, CellError("NotRun", str(execution.failure or "nobody waits for it")))

    async def _watch(self, execution: Execution) -> None:
        deadline: float | None = None
        may_interrupt = True
        while not execution.over.is_set():
            end = deadline
            if end is None and execution.timeout is not None:
                end = execution.clock + execution.timeout
            execution.changed.clear()
            try:
                async with asyncio.timeout(None if end is None else max(end - time.monotonic(), 0)):
                    await execution.changed.wait()
            except TimeoutError:
                if deadline is not None:
                    self._end_request(execution.id, timed_out(execution.timeout, state_kept=False))
                    self._start(self._replace())
                elif not execution.is_started and "execute_request" in self._busy.values():
                    execution.clock = time.monotonic()  # another client's cell runs, so this one's time has not begun
                else:
                    execution.timed_out = timed_out(execution.timeout, state_kept=True)
                    deadline = time.monotonic() + INTERRUPT_GRACE * min(self._link.time_scale, 2)
                    await self.interrupt()
                continue
            if execution.is_unwanted and execution.is_started and may_interrupt:
                may_interrupt = False
                await self.interrupt()

    async def events(self, execution: Execution, after: int = 0) -> AsyncGenerator[StreamEvent, None]:
        """The events of a cell, from the journal's number `after` on, "end" last.

        Raises:
            CellvmError: the cell could not be run.
            SandboxDied, GuestUnresponsive: the sandbox ended; whether the cell has run is unknown.
        """
        translate = Events()
        with self.journal.reader(max(execution.after, after)) as reader:
            while not (execution.last and reader.after >= execution.last):
                records = await reader.next()
                if not records:
                    break
                for record in records:
                    if isinstance(record, Gap):
                        yield StreamEvent("gap", seq=record.seq, id=execution.id, messages=record.messages)
                    elif record.parent == execution.id and execution.failure is None:
                        for event in translate.receive(
                            record.seq, record.kind, record.parent, record.ends, record.parts
                        ):
                            yield event
                            if event.type == "end":
                                return
        if execution.failure is not None:
            raise execution.failure
        if self._link.closed.done():
            raise self._link.closed.result()
        yield StreamEvent("end", seq=execution.last, id=execution.id)

    async def execute(
        self, code: str, *, timeout: float | None = None, quiet: bool = False
    ) -> AsyncGenerator[StreamEvent, None]:
        """`run` a cell and yield its `events`. Closing the iterator early interrupts the cell."""
        execution = self.run(code, timeout=timeout, quiet=quiet)
        try:
            async for event in self.events(execution):
                yield event
        finally:
            if not execution.over.is_set():
                execution.is_unwanted = True
                execution.changed.set()

    # -- its life

    async def interrupt(self) -> None:
        """Interrupt the running cell. While the kernel is being replaced there is nothing to interrupt."""
        try:
            await self._link.call(wire.Interrupt(), wire.Done)
        except GuestFailure:
            pass

    async def _replace(self) -> None:
        """Kill a kernel that does not stop. The next cell waits for its successor; the reply to this one does not."""
        try:
            await self.restart("replaced, as it did not stop when a cell's time was over")
        except CellvmError as error:
            log.warning("a kernel could not be replaced: %.500s", error)  # it is dead now, and its answers say so

    async def restart(self, reason: str = "restarted on request") -> None:
        """Replace the kernel by a fresh one, and return when that is usable. Running cells end with an error.

        Raises:
            GuestFailure: the kernel could not be started.
        """
        self._lose(CellError("KernelRestarted", f"the kernel was {reason}", code="kernel_restarted", stateKept=False))
        self._usable.clear()
        self._condition = "starting"
        self._publish("status", {"execution_state": "starting"}, {"reason": reason})
        try:
            await self._link.call(wire.Restart(), wire.Done, timeout=60)
            self._condition = "idle"
        except CellvmError as error:
            self._condition, self.reason = "dead", str(error)
            raise
        finally:
            self._usable.set()


def timed_out(timeout: float | None, *, state_kept: bool) -> CellError:
    kept = "variables are kept" if state_kept else "it did not stop when interrupted, so its kernel was replaced"
    value = f"the cell was stopped after {timeout:g} s; {kept}"
    return CellError("ExecTimeout", value, code="exec_timeout", stateKept=state_kept)


def error_content(error: CellError) -> bytes:
    """An error as the content of Jupyter's `error` message, with `code` and `stateKept` added."""
    fields = {
        "ename": error.name,
        "evalue": error.value,
        "traceback": error.traceback or [f"{error.name}: {error.value}"],
    }
    if error.code is not None:
        fields["code"] = error.code
    if error.stateKept is not None:
        fields["stateKept"] = error.stateKept  # type: ignore[assignment]
    return msgspec.json.encode(fields)
