"""A sandbox's kernel as the gateway sees it: its life, the routes of replies, and cells for REST and agents."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from guest_agent import wire
from kernel_gateway.errors import CellvmError, Conflict, GuestFailure, SandboxDied
from kernel_gateway.guest.link import Link
from kernel_gateway.held import Account, Held, Holding
from kernel_gateway.kernel import message
from kernel_gateway.kernel.changes import checked
from kernel_gateway.kernel.events import MAX_NAME, RESTARTED, Asked, CellError, Events, StreamEvent, cell_error
from kernel_gateway.kernel.executions import Execution, Executions, ExecutionState
from kernel_gateway.kernel.history import Cell, History
from kernel_gateway.kernel.journal import Gap, Journal, Record
from kernel_gateway.kernel.message import CHANNEL, CONTENT, GATEWAY, HEADER, METADATA, PARENT, By
from kernel_gateway.kernel.pages import pages
from kernel_gateway.kernel.state import WAITING, Event, State, decide
from kernel_gateway.outcome import FINISHED, Ending, Outcome

log = logging.getLogger(__name__)

START_LIMIT = 120
"""Seconds a kernel may take to come back after its end, times the driver's time scale."""
INTERRUPT_GRACE = 0.75
"""Seconds a cell gets to end after an interrupt before its kernel is killed, so that the reply comes within a second.
An emulated machine gets twice as long, because a loop in it may need most of a second to notice."""
ASK_LIMIT = 0.2
"""Seconds that the guest has to tell whether a cell has stopped, because the answer must not wait for it."""
REPLY_GRACE = 5.0
"""Seconds in which the reply of an interrupted cell must follow once its code has stopped. A traceback takes time."""
QUESTIONS = 100
"""Number of our own questions to the kernel whose messages are recognized and kept from everybody else."""
HOLD_GRACE = 30.0
"""Seconds for which a client that has lost its connection goes on to hold the cells of others."""
MAX_SESSIONS = 1000
"""Number of client sessions whose place in the journal is remembered."""
MAX_PENDING = 10_000
"""Number of requests that are not over. Beyond it the oldest are forgotten. Their replies still come, but a kernel's
end does not answer them."""
PENDING_COST = 500
"""Bytes that such a request costs in memory besides its header."""
UNTRACKED = frozenset(
    "comm_info_request comm_info_reply kernel_info_request kernel_info_reply shutdown_request shutdown_reply "
    "interrupt_request interrupt_reply debug_request debug_reply stream display_data update_display_data execute_input "
    "execute_result error status clear_output debug_event input_request input_reply".split()
)
"""Kinds of messages that are no activity of a user. jupyter_server has the same list."""
OUTPUT = frozenset({"stream", "display_data", "update_display_data", "execute_result", "error"})
"""Kinds of messages that are told to a later cell when they come late."""
SHOWN_AS = {State.CLOSED: "dead"}
"""Jupyter's word for a state, where it is not the state's own name."""


class Client(Protocol):
    """Somebody who is connected to a kernel. One that `only_watches` does not count as its user."""

    session: str

    @property
    def only_watches(self) -> bool: ...

    def leave(self) -> None:
        """End the connection, because the sandbox is about to be paused."""

    def changed(self) -> None:
        """Called when it is another cell that runs, waits or asks than before, or when cells are held or let go."""


class Hold(NamedTuple):
    """A client session that holds the cells of others until a time on the monotonic clock."""

    session: str
    by: By
    until: float


class Pending(msgspec.Struct):
    """A request that is not over: its session, channel and header, and which parts of its end have come.

    `failure` is the content of its reply if that says that it failed. `is_told` is whether an error was published.
    `holding` counts a client's request.
    """

    session: str
    channel: str
    header: bytes
    kind: str
    is_replied: bool = False
    is_idle: bool = False
    failure: CellError | None = None
    is_told: bool = False
    holding: Holding | None = None


class ClientSession(msgspec.Struct):
    """A client's session: numbers of the last message that it has acknowledged, and of the last one sent to it."""

    received: int
    sent: int


class KernelState(msgspec.Struct):
    """The gateway's knowledge of a paused sandbox's kernel, besides its journal. The fields are the Kernel's own."""

    session: str
    kernel_session: str
    state: State
    reason: str
    is_ending: bool
    untold: str
    late: int
    pending: dict[str, Pending]
    busy: dict[str, str]
    last_activity: float
    sessions: dict[str, ClientSession]
    executions: list[ExecutionState]
    last: int
    end: int
    history: list[Cell] = []

    def alone(self) -> "KernelState":
        """What is known of the kernel itself, without its journal, its clients and their work."""
        return msgspec.structs.replace(self, pending={}, sessions={}, executions=[], history=[], last=0, end=0)


class Kernel:
    """One kernel. Cells that the gateway runs itself run one at a time, in the order of the calls.

    Its life is the table in `state.py`, and `_apply` is the only place that changes it. `reason` says why it is
    restarting or dead, `since` is when its present state began, in seconds since 1970, and `incarnation` counts the
    processes that it has lost. `on_shutdown` is called when a client has shut the kernel down for good, and
    `on_cell_end` when a cell is over, whoever has sent it. `asking` is the id of the cell that waits for input, and
    `answered` tells which cell got an answer last, and from whom. `hold` is the client session for which the cells of
    others wait.
    """

    def __init__(self, link: Link) -> None:
        self._session = uuid.uuid4().hex
        self._kernel_session = self._session
        self._state = State.IDLE
        self._usable = asyncio.Event()
        self._usable.set()
        self._restarting: asyncio.Task[CellvmError | None] | None = None
        self._overdue: asyncio.TimerHandle | None = None
        self._is_ending = False
        self._untold = ""
        self._late = 0
        self._pending: dict[str, Pending] = {}
        self._unsent: set[str] = set()  # ids of messages that wait for their turn on the link
        self._busy: dict[str, str] = {}
        self._turn = asyncio.Lock()
        self.hold: Hold | None = None
        self._letting_go: asyncio.TimerHandle | None = None
        self.since = time.time()
        self._questions: dict[str, asyncio.Future[bytes]] = {}
        self.asking = ""
        self.answered: tuple[str, By] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.reason = ""
        self.incarnation = 0
        self.last_activity = time.time()
        self.clients: set[Client] = set()
        self._sessions: dict[str, ClientSession] = {}
        self.account = Held().account("")
        self.executions = Executions(self.account)
        self.history = History()
        self.on_shutdown: Callable[[], None] = lambda: None
        self.on_cell_end: Callable[[], None] = lambda: None
        self.journal = Journal(on_pressure=self._press)
        self._listen(link)

    def _listen(self, link: Link) -> None:
        """Be the kernel behind that link."""
        self._link = link
        link.on_kernel_message, link.on_event = self._message_received, self._event_received
        link.closed.add_done_callback(partial(self._link_closed, link))

    def _link_closed(self, link: Link, closed: asyncio.Future[Exception]) -> None:
        if link is self._link:
            self.close(closed.result())

    def _press(self, held: bool) -> None:
        self._link.hold_kernel(held)

    def adopt(self, account: Account, directory: Path | None) -> None:
        """Begin a new journal for the kernel's owner, because the pool's messages are not the owner's.

        Args:
            account: what waits for the owner is held on it.
            directory: the directory of the journal's file.
        """
        self.journal.close()
        self.journal = Journal(directory, on_pressure=self._press)
        self.account = account
        self.executions = Executions(account)
        self.last_activity = time.time()

    async def settled(self, limit: float) -> None:
        """Return when it is not being replaced.

        Raises:
            Conflict: it still is after `limit` seconds.
        """
        try:
            async with asyncio.timeout(limit):
                await self._usable.wait()
        except TimeoutError:
            raise Conflict(f"the kernel is {self._state} and does not come back", hint="wait, or restart it") from None

    def state_at_rest(self) -> KernelState:
        """What is stored of it while its sandbox is paused."""
        return KernelState(
            session=self._session,
            kernel_session=self._kernel_session,
            state=self._state,
            reason=self.reason,
            is_ending=self._is_ending,
            untold=self._untold,
            late=self._late,
            pending={
                msg_id: msgspec.structs.replace(each, holding=None)
                for msg_id, each in self._pending.items()
                if msg_id not in self._unsent
            },
            busy=dict(self._busy),
            last_activity=self.last_activity,
            sessions=dict(self._sessions),
            executions=self.executions.at_rest(self._unsent),
            last=self.journal.last,
            end=self.journal.end,
            history=list(self.history),
        )

    def restore(self, was: KernelState) -> None:
        """Go on with the kernel of a sandbox that was paused. The journal has been restored.

        Raises:
            TooManyRequests, HostFull: there is no room for what its requests hold.
        """
        self._session, self._kernel_session = was.session, was.kernel_session
        # A kernel that was just being started, too, is replaced for the next cell, because nobody tells of its start.
        self._state = State.DEAD if was.state in WAITING else was.state
        self.reason, self._is_ending = was.reason, was.is_ending
        self._untold, self._late, self._busy = was.untold, was.late, was.busy
        self.last_activity, self._sessions = was.last_activity, was.sessions
        self.history = History(was.history)
        self.executions.restore(was.executions)
        for msg_id, each in was.pending.items():
            if msg_id not in self.executions:
                each.holding = self.account.hold("headers of requests", len(each.header) + PENDING_COST)
            self._pending[msg_id] = each
        for execution in self.executions.unfinished():
            self._begin(self._watch_on(execution))

    async def _watch_on(self, execution: Execution) -> None:
        async with self._turn:
            await self._watch(execution)

    def go_back(self, to: "Kernel", error: CellvmError) -> None:
        """Go on as a kernel that was restored from an earlier moment does, on its link.

        The journal goes on, and clients stay. Work that is under way ends with the error, because it is undone, or has
        not begun. The other kernel must not be used any more. The link before is the caller's to close.
        """
        self._lose(our_error(error), error)
        for execution in list(self.executions.unfinished()):
            self._end_unsent(execution, error)
        self._link.on_kernel_message, self._link.on_event = (lambda _: None), (lambda _: None)
        self._listen(to._link)
        self._press(self.journal.is_pressed)
        self._kernel_session, self._busy, self._is_ending = to._kernel_session, to._busy, False
        self.incarnation += 1
        self._apply(Event.RESTORED, str(error))
        for record in to.journal.in_memory():  # what it has said since
            self.journal.append(record.parts, record.kind, record.parent, record.session)
        to.journal.close()
        if to._state is not State.IDLE:
            self._apply(Event.FAILED if to._state is State.DEAD else Event.ENDED, to.reason)

    @property
    def connections(self) -> int:
        """Number of clients that are connected and may use it."""
        return sum(not each.only_watches for each in self.clients)

    @property
    def state(self) -> str:
        """One of Jupyter's: starting, idle, busy, restarting, dead."""
        if self._state is State.IDLE and self._busy:
            return "busy"
        return SHOWN_AS.get(self._state, self._state)

    # -- its life

    def _apply(self, event: Event, reason: str, *, lost: CellError | None = None, **cause: int) -> bool:
        """Apply an event, and return whether it changed the state. Nothing else changes it.

        Args:
            lost: what requests under way are told, because their kernel is gone and no client should wait for ever.
            cause: `exitCode` and `signal` of a kernel that ended.
        """
        following = decide(self._state, event)
        if following is None:
            return False
        if lost is not None:
            is_unasked = event in (Event.ENDED, Event.FAILED)
            self._untold = reason if is_unasked and not self._pending else ""
            self._lose(lost)
        self._state = following
        self.since = time.time()
        self.incarnation += lost is not None
        self.reason = "" if following is State.IDLE else reason
        if self._overdue is not None:
            self._overdue.cancel()
        if following is State.RESTARTING:
            limit = START_LIMIT * self._link.time_scale
            self._overdue = asyncio.get_running_loop().call_later(limit, self._not_back)
        (self._usable.clear if following in WAITING else self._usable.set)()
        told = {"reason": reason, **{name: value for name, value in cause.items() if value}}
        self._publish("status", {"execution_state": SHOWN_AS.get(following, following)}, told)
        return True

    def _not_back(self) -> None:
        """Give the kernel up, because the agent announced another one and has said nothing since."""
        self._apply(Event.FAILED, "another kernel did not start in time")

    def _event_received(self, event: wire.Body) -> None:
        if not isinstance(event, wire.KernelStatus):
            return
        reason = event.reason[:500]
        is_gone = event.state in ("restarting", "dead")
        if is_gone and self._is_ending:  # the kernel has gone, and its reply has not come
            lost = CellError("KernelShutDown", "the kernel was shut down", code="kernel_restarted", stateKept=False)
            self._lose(lost)
            self.on_shutdown()
        elif self._state is State.STARTING:
            pass  # it is about the kernel before, or the answer to our request says the same
        elif is_gone:
            lost = CellError("KernelRestarted", reason, code="kernel_restarted", stateKept=False)
            gone = Event.ENDED if event.state == "restarting" else Event.FAILED
            self._apply(gone, reason, lost=lost, exitCode=event.exit_code, signal=event.signal)
        elif event.state == "idle":
            self._apply(Event.READY, reason)

    async def interrupt(self, execution_id: str | None = None) -> None:
        """Interrupt one cell, and no other: that execution, or else the one that runs at this moment.

        Nothing happens if it ends meanwhile, or while the kernel is being replaced.
        """
        if self._state is not State.IDLE:
            return
        busy = (msg_id for msg_id, kind in self._busy.items() if kind == "execute_request")
        sent = (msg_id for msg_id, each in self._pending.items() if each.kind == "execute_request" and not each.is_idle)
        target = execution_id or next(busy, None) or next(sent, "")
        try:
            await self._link.call(wire.Interrupt(target=target), wire.Done)
        except GuestFailure as error:
            log.warning("a kernel could not be interrupted: %.500s", error)

    async def restart(self, reason: str = "restarted on request") -> None:
        """Replace the kernel by a fresh one, and return when that is usable. Running cells end with an error.

        A restart that is under way is joined. It goes on to its end even if nobody waits for it any more.

        Raises:
            CellvmError: the kernel could not be started, or the sandbox has ended.
        """
        if self._state is State.CLOSED:
            raise SandboxDied(self.reason, outcome=Ending.NOT_STARTED)
        error = await asyncio.shield(self._restart(reason))
        if error is not None:
            raise error

    def _restart(self, reason: str) -> asyncio.Task[CellvmError | None]:
        """Begin a restart, or join the one that is under way. Work that comes from now on waits for the next kernel."""
        lost = CellError("KernelRestarted", f"the kernel was {reason}", code="kernel_restarted", stateKept=False)
        if self._apply(Event.RESTART, reason, lost=lost):
            self._restarting = asyncio.get_running_loop().create_task(self._start_another())
        assert self._restarting is not None
        return self._restarting

    async def _start_another(self) -> CellvmError | None:
        """Let the agent start another kernel, and return the reason if there is none."""
        link = self._link
        try:
            await link.call(wire.Restart(), wire.Done, timeout=60)
        except CellvmError as error:
            if link is self._link:  # else it went back to another one
                log.warning("a kernel could not be replaced: %.500s", error)
                self._apply(Event.FAILED, str(error))
            return error
        if link is self._link:
            self._apply(Event.READY, "restarted")
        return None

    def close(self, error: Exception) -> None:
        """Tell everybody that the sandbox has ended, and why. Further calls do nothing."""
        if self._state is State.CLOSED:
            return
        reason = str(error)
        failure = error if isinstance(error, CellvmError) else SandboxDied(reason)
        lost = CellError(type(failure).__name__, reason, code=failure.code, stateKept=False)
        self._lose(lost, failure)
        for execution in self.executions.unfinished():
            self._end_unsent(execution, failure)
        self._set_hold(None)
        self._apply(Event.CLOSED, reason)
        self.journal.close()

    # -- what the kernel says

    def _message_received(self, parts: list[bytes]) -> None:
        if len(parts) <= CONTENT or parts[CHANNEL] not in message.SENT_BY_KERNEL or self._state is State.CLOSED:
            return  # this is not a kernel's message, or nobody reads it any more
        head, parent = message.header(parts[HEADER]), message.header(parts[PARENT])
        self._kernel_session = head.session
        if head.msg_type == "execute_reply":
            parts[METADATA] = checked(parts[METADATA])
        question = self._questions.get(parent.msg_id)
        if question is None:
            self._told(parts, head, parent)
        elif head.msg_type.endswith("_reply") and not question.done():
            question.set_result(parts[CONTENT])

    def _told(self, parts: list[bytes], head: message.Header, parent: message.Header) -> None:
        """Take a message that is for everybody, or for the client that asked."""
        pending = self._pending.get(parent.msg_id)
        session: str | None = None
        if parts[CHANNEL] == b"iopub":
            if head.msg_type == "status":
                self._status_received(parent, message.read(parts[CONTENT], message.Status).execution_state, pending)
            if parent.msg_type not in UNTRACKED:
                self.last_activity = time.time()
        else:
            session = pending.session if pending else parent.session
            if pending and head.msg_type.endswith("_reply"):
                self._reply_received(parent.msg_id, pending, parts[CONTENT])
        execution = self.executions.get(parent.msg_id)
        if execution is not None:
            execution.start(head.msg_type, parts[CONTENT])
            if head.msg_type == "error" and execution.timed_out:
                parts[CONTENT] = error_content(execution.timed_out)
        if pending is not None:
            self._heard_of(parent.msg_id, pending, head.msg_type, parts[CONTENT])
        ends = pending is not None and pending.is_replied and pending.is_idle
        if ends and execution is not None:
            self._publish_failure(execution)
        record = self.journal.append(parts, head.msg_type, parent.msg_id, session, ends)
        self._asked_or_ended(head, parent, ends)
        if head.msg_type in OUTPUT and self.executions.is_late(parent.msg_id, record.seq):
            self._late = self._late or record.seq
        if ends:
            self._forget(parent.msg_id)
            if execution is not None:
                execution.end(FINISHED, record.seq)
            if pending is not None and pending.kind == "execute_request":
                self._cell_ended(parent.msg_id, "error" if pending.is_told or pending.failure else "ok")
        if self._is_ending and head.msg_type == "shutdown_reply" and pending and pending.is_replied:
            self.on_shutdown()

    def _heard_of(self, msg_id: str, pending: Pending, kind: str, content: bytes) -> None:
        if kind == "error":
            pending.is_told = True
        elif kind == "execute_input":
            self.history.started(msg_id, content)

    def _cell_ended(self, msg_id: str, status: str) -> None:
        self.history.ended(msg_id, status)
        self.on_cell_end()

    def _asked_or_ended(self, head: message.Header, parent: message.Header, ends: bool) -> None:
        if head.msg_type == "input_request":
            self.asking = parent.msg_id
        elif ends and parent.msg_id == self.asking:
            self.asking = ""
        elif not ends:
            return
        self._tell()

    def _reply_received(self, msg_id: str, pending: Pending, content: bytes) -> None:
        pending.is_replied = True
        execution = self.executions.get(msg_id)
        if execution is not None:
            reply = message.read(content, message.Reply)
            execution.count = message.number_of(reply.execution_count)
            pending.failure = cell_error(content) if reply.status == "error" else None

    def _status_received(self, parent: message.Header, state: str, pending: Pending | None) -> None:
        # The kernel before may be heard after its end. What it said it had begun is over, and no `idle` follows.
        is_over = self._state in WAITING or (pending is None and parent.msg_type.endswith("_request"))
        if state == "busy":
            if len(self._busy) < MAX_PENDING and parent.msg_type not in UNTRACKED and not is_over:
                self.since = self.since if self._busy else time.time()
                self._busy[parent.msg_id] = parent.msg_type
        elif state == "idle":
            if self._busy.pop(parent.msg_id, None) is not None and not self._busy:
                self.since = time.time()
            if pending is not None:
                pending.is_idle = True

    # -- what the gateway says in the kernel's name

    def _publish(self, kind: str, fields: dict[str, Any], cause: dict[str, Any]) -> None:
        parts = message.new("iopub", kind, fields, session=self._kernel_session, metadata={"cellvm": cause})
        self.journal.append(parts, kind)

    def _publish_failure(self, execution: Execution) -> None:
        """Publish the error that a failed cell's reply tells, if the kernel has published none.

        IPython only prints some: an exception group, a magic that does not exist, an interrupt that a second one met.
        """
        pending = self._pending[execution.id]
        if pending.failure is not None and not pending.is_told:
            error = execution.timed_out or pending.failure
            fields = msgspec.json.decode(error_content(error))
            parts = message.new("iopub", "error", fields, session=self._kernel_session, parent=pending.header)
            self.journal.append(parts, "error", execution.id)

    def _end_request(self, msg_id: str, error: CellError, ending: Ending, failure: CellvmError | None = None) -> None:
        """Answer a request in the kernel's place, and give its execution the outcome, if it is one of ours.

        Args:
            failure: what the execution's caller gets in place of the error.
        """
        pending = self._pending[msg_id]
        before = self.journal.last
        content = msgspec.json.decode(error_content(error))

        def say(channel: str, kind: str, fields: dict[str, Any], ends: bool = False) -> None:
            session = None if channel == "iopub" else pending.session
            told = {"cellvm": {"outcome": ending}}
            parts = message.new(
                channel, kind, fields, session=self._kernel_session, parent=pending.header, metadata=told
            )
            self.journal.append(parts, kind, msg_id, session, ends)

        if pending.kind == "execute_request":
            say("iopub", "error", content)
        is_done = pending.kind == "shutdown_request"  # this request asked for the kernel's end
        answer = {"status": "ok", "restart": False} if is_done else {"status": "error", **content}
        say(pending.channel, pending.kind.removesuffix("_request") + "_reply", answer)
        say("iopub", "status", {"execution_state": "idle"}, ends=True)
        self._forget(msg_id)
        if pending.kind == "execute_request" and ending is not Ending.NOT_STARTED:
            self._cell_ended(msg_id, ending)
        self._asked_or_ended(message.Header(), message.Header(msg_id), True)
        execution = self.executions.get(msg_id)
        if execution is not None and failure is not None:
            execution.end(Outcome.failed(ending, failure), before)
        elif execution is not None:
            execution.end(Outcome(ending), self.journal.last)

    def _lose(self, error: CellError, failure: CellvmError | None = None) -> None:
        """End every request that was under way, because its kernel is gone."""
        for msg_id in list(self._pending):
            self._end_request(msg_id, error, Ending.UNKNOWN, failure)
        self._busy.clear()

    def _end_unsent(self, execution: Execution, failure: CellvmError) -> None:
        """End an execution that the kernel has not got."""
        self._remember(execution.id, Pending(self._session, "shell", b"{}", "execute_request"))
        self._end_request(execution.id, our_error(failure), Ending.NOT_STARTED, failure)

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
        return self._send(parts)

    async def _send_later(self, parts: list[bytes], session: str) -> None:
        await self._usable.wait()
        if self._expect(parts, session):
            await self._send(parts)

    async def _send(self, parts: list[bytes]) -> None:
        """Send a message. A capture of the machine does not have it while it waits for its turn."""
        msg_id = message.header(parts[HEADER]).msg_id
        self._unsent.add(msg_id)
        try:
            await self._link.send_kernel_message(parts)
        finally:
            self._unsent.discard(msg_id)

    def _expect(self, parts: list[bytes], session: str) -> bool:
        """Remember whose request it is, and return whether there is a kernel that could answer."""
        if self._state is State.CLOSED:
            return False
        head = message.header(parts[HEADER])
        if head.msg_type == "input_reply":
            self._answered(By("jupyter", message.read(parts[HEADER], Asked).username[:MAX_NAME]))
        if head.msg_type.endswith("_request"):
            if head.msg_id not in self._pending:
                pending = Pending(session, parts[CHANNEL].decode(), parts[HEADER], head.msg_type)
                self._remember(head.msg_id, pending)
                try:
                    pending.holding = self.account.hold("headers of requests", len(pending.header) + PENDING_COST)
                except CellvmError as refusal:
                    self._end_request(head.msg_id, our_error(refusal), Ending.NOT_STARTED)
                    return False
            if head.msg_type == "shutdown_request":
                self._is_ending = not message.read(parts[CONTENT], message.Reply).restart
            if self._state is State.DEAD:
                reason = f"the kernel is dead ({self.reason}); restart it"
                error = CellError("DeadKernel", reason, code="kernel_restarted")
                self._end_request(head.msg_id, error, Ending.NOT_STARTED)
        return self._state is State.IDLE

    def _remember(self, msg_id: str, pending: Pending) -> None:
        self._pending[msg_id] = pending
        if len(self._pending) > MAX_PENDING:
            oldest = next((each for each in self._pending if each != msg_id and each not in self.executions), None)
            if oldest is not None:
                self._forget(oldest)

    def _forget(self, msg_id: str) -> None:
        pending = self._pending.pop(msg_id)
        if pending.holding is not None:
            pending.holding.release()

    async def answer_input(self, text: str, by: By = GATEWAY) -> None:
        """Answer the cell that waits for input."""
        self._answered(by)
        await self._link.send_kernel_message(
            message.new("stdin", "input_reply", {"value": text}, session=self._session)
        )

    async def ask(self, kind: str, fields: dict[str, Any], limit: float, *, channel: str = "control") -> bytes | None:
        """The content of the reply to a request of ours. No client and no journal sees it.

        Args:
            limit: seconds after which there is no answer, which is None.
            channel: on `control` the kernel answers beside cells, on `shell` between them.

        Raises:
            CellvmError: the sandbox has ended.
        """
        parts = message.new(channel, kind, fields, session=self._session)
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._questions[message.header(parts[HEADER]).msg_id] = reply
        if len(self._questions) > QUESTIONS:
            del self._questions[next(iter(self._questions))]
        await self._link.send_kernel_message(parts)
        done, _ = await asyncio.wait({reply}, timeout=limit)
        return reply.result() if done else None

    def _answered(self, by: By) -> None:
        self.asking, self.answered = "", (self.asking, by)
        self._tell()

    @property
    def has_cells(self) -> bool:
        """Whether the kernel has got cells that are not over."""
        return any(each.kind == "execute_request" for each in self._pending.values())

    @property
    def pending(self) -> frozenset[str]:
        """Ids of the requests that are not over."""
        return frozenset(self._pending)

    def attach(self, name: str, since: int | None, *, is_kept: bool = True) -> ClientSession:
        """The session of a client that connects, as the gateway knows it, or as the client says by `since`.

        Args:
            is_kept: remember its place for the next time.
        """
        session = self._sessions.pop(name, None)
        if since is not None:
            session = ClientSession(since, since)
        elif session is None:
            session = ClientSession(self.journal.last, self.journal.last)
        if is_kept:
            self._sessions[name] = session
        if len(self._sessions) > MAX_SESSIONS:
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
        by: By = GATEWAY,
        session: str = "",
        metadata: dict[str, Any] | None = None,
    ) -> Execution:
        """Run a cell, or find the one that runs or ran under this id.

        `timeout` seconds after its start the cell is interrupted, so that variables survive. If it does not end then,
        its kernel is replaced.

        Args:
            quiet: leave no trace in the user's history and counter.
            with_input: somebody will answer the cell's input requests.
            by: who asks.
            session: the client session that asks, if it is connected.
            metadata: those of the request to the kernel.

        Raises:
            Conflict: the id was used for another cell.
            TooManyRequests, HostFull: too many cells are waiting, or there is no room for the code.
            SandboxDied: the sandbox has ended.
        """
        known = self.executions.find(execution_id or "", code)
        if known is not None:
            return known
        if self._state is State.CLOSED:
            raise SandboxDied(self.reason, outcome=Ending.NOT_STARTED)
        if execution_id in self._pending:
            raise Conflict("this id was used for another cell", hint="choose a new one for every cell")
        is_waited_for = any(self.executions.unfinished())  # whoever runs is told what comes late
        after = self.journal.last if is_waited_for or not self._late else self._late - 1
        execution = Execution(execution_id or uuid.uuid4().hex, code, after, timeout, by, session, metadata)
        self.executions.add(execution)
        self._late = 0
        fields = {
            "silent": False,
            "store_history": not quiet,
            "user_expressions": {},
            "allow_stdin": with_input,
            "stop_on_error": False,
        }
        self._begin(self._drive(execution, fields))
        self._tell()
        return execution

    def waiting(self) -> list[Execution]:
        """The executions whose turn has not come, the next one first."""
        return [each for each in self.executions.unfinished() if not each.is_sent]

    @property
    def running_for(self) -> By | None:
        """Who has sent the execution that runs; None if none does."""
        found = (self.executions.get(msg_id) for msg_id in self._busy)
        return next((each.by for each in found if each is not None), None)

    def _tell(self) -> None:
        for client in self.clients:
            client.changed()

    # -- holding the cells of others

    def hold_others(self, session: str, by: By, seconds: float) -> None:
        """Let the cells of other clients wait, until `release` or for so many seconds.

        It holds executions. Cells that a Jupyter client sends go straight to the kernel.

        Raises:
            Conflict: another client holds them.
        """
        if self.hold is not None and self.hold.session != session:
            raise Conflict(f"{self.hold.by.name} holds the cells of others", hint="wait until they are released")
        self._set_hold(Hold(session, by, time.monotonic() + seconds))

    def release(self, session: str) -> None:
        """Let the cells of others run again, if that client session holds them."""
        if self.hold is not None and self.hold.session == session:
            self._set_hold(None)

    def give_up(self, session: str) -> None:
        """Let go what a client session holds, and never run its cells that have not begun."""
        self.release(session)
        for execution in self.waiting():
            if execution.session == session:
                self.stop(execution)

    def client_left(self, session: str) -> None:
        """Take note that a client session has lost its connection. Its hold lasts HOLD_GRACE seconds more at most."""
        hold = self.hold
        if hold is not None and hold.session == session and not any(each.session == session for each in self.clients):
            self._set_hold(hold._replace(until=min(hold.until, time.monotonic() + HOLD_GRACE)))

    def _set_hold(self, hold: Hold | None) -> None:
        self.hold = hold
        if self._letting_go is not None:
            self._letting_go.cancel()
            self._letting_go = None
        if hold is not None:
            loop = asyncio.get_running_loop()
            self._letting_go = loop.call_later(max(hold.until - time.monotonic(), 0), self._set_hold, None)
        for execution in self.waiting():
            execution.changed.set()
        self._tell()

    def _is_held(self, execution: Execution) -> bool:
        return self.hold is not None and self.hold.session != execution.session

    async def _drive(self, execution: Execution, fields: dict[str, Any]) -> None:
        """See a cell through: its turn, its start, its timeout. Whatever ends it gives its outcome."""
        try:
            while execution.outcome is None and not execution.is_sent:
                if self._is_held(execution):  # it waits without a turn, because the holder's cells pass it
                    execution.changed.clear()
                    await execution.changed.wait()
                    continue
                async with self._turn:
                    await self._take_turn(execution, fields)
        except CellvmError as error:
            if not execution.is_sent and execution.outcome is None:
                self._end_unsent(execution, error)
            # A link that breaks under a cell that was sent closes the kernel, and that gives the outcome.

    async def _take_turn(self, execution: Execution, fields: dict[str, Any]) -> None:
        while execution.outcome is None and self._state is not State.IDLE:
            if self._state in (State.DEAD, State.CLOSED):
                await self.restart("restarted for the next cell")
            await self._usable.wait()
        if execution.outcome is None and not self._is_held(execution):
            await self._send_cell(execution, fields)
            await self._watch(execution)

    async def _send_cell(self, execution: Execution, fields: dict[str, Any]) -> None:
        fields = {**fields, "code": execution.code.decode("utf-8", "surrogatepass")}
        parts = message.new(
            "shell",
            "execute_request",
            fields,
            session=self._session,
            msg_id=execution.id,
            metadata=execution.metadata,
            by=execution.by,
        )
        del fields
        self._remember(execution.id, Pending(self._session, "shell", parts[HEADER], "execute_request"))
        execution.is_sent = True
        self._tell()
        execution.restarted, self._untold = self._untold, ""
        execution.clock = time.monotonic()
        await self._send(parts)
        execution.drop_code()

    async def _watch(self, execution: Execution) -> None:
        deadline: float | None = None
        may_interrupt = True
        has_stopped = False
        while execution.outcome is None:
            end = deadline
            if end is None and execution.timeout is not None:
                end = execution.clock + execution.timeout
            execution.changed.clear()
            try:
                async with asyncio.timeout(None if end is None else max(end - time.monotonic(), 0)):
                    await execution.changed.wait()
            except TimeoutError:
                if execution.outcome is not None:
                    break  # it ended in the same turn
                if deadline is not None and not has_stopped and await self._has_stopped(execution):
                    has_stopped = True
                    deadline += REPLY_GRACE
                elif execution.outcome is not None:
                    break  # it ended while the guest was asked
                elif deadline is not None:
                    self._end_request(execution.id, timed_out(execution.timeout, state_kept=False), Ending.UNKNOWN)
                    # The next cell waits for the next kernel. The reply to this one does not.
                    self._restart("replaced, as it did not stop when a cell's time was over")
                elif not execution.is_started and "execute_request" in self._busy.values():
                    execution.clock = time.monotonic()  # another client's cell runs, so this one's time has not begun
                else:
                    execution.timed_out = timed_out(execution.timeout, state_kept=True)
                    deadline = time.monotonic() + INTERRUPT_GRACE * min(self._link.time_scale, 2)
                    self._begin(self._interrupt_beside(execution.id))
                continue
            runs = execution.is_started and execution.outcome is None
            if execution.is_unwanted and runs and may_interrupt:
                may_interrupt = False
                self._begin(self._interrupt_beside(execution.id))

    async def _interrupt_beside(self, execution_id: str) -> None:
        """Interrupt a cell while its watch goes on, because a guest that stands still would hold up the answer."""
        try:
            await self.interrupt(execution_id)
        except CellvmError:
            pass  # the link is broken, which has ended the cell

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _has_stopped(self, execution: Execution) -> bool:
        """Whether the cell's code is over though its reply has not come: its error is told, or is made in the guest."""
        if self._pending[execution.id].is_told:
            return True
        try:
            async with asyncio.timeout(ASK_LIMIT * min(self._link.time_scale, 2)):
                return (await self._link.call(wire.GetStopped(target=execution.id), wire.Stopped)).is_stopped
        except (GuestFailure, TimeoutError) as error:
            log.warning("a kernel could not be asked whether a cell has stopped: %.500r", error)
            return False

    async def events(
        self, execution: Execution, after: int = 0, until: int | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events of a cell, from the journal's number `after` on, "end" last.

        With `until` they are those up to that number, and nothing is waited for.

        Among them is, marked as late, what earlier cells of ours have put out since they ended. A status says if the
        kernel was replaced since the cell before and nobody was told.

        Raises:
            CellvmError: the cell could not be run, or the sandbox ended. The error's `outcome` says whether it has run.
        """
        translate = Events()
        reader = self.journal.reader(max(execution.after, after))
        async with aclosing(pages(reader, self.account)) as found:
            while reader.after < until if until is not None else not execution.is_told(reader.after):
                records = await anext(found, None)
                if records is None:
                    break
                for record in records:
                    if execution.outcome is not None and record.seq > execution.last:
                        break
                    if isinstance(record, Gap):
                        yield StreamEvent("gap", seq=record.seq, id=execution.id, messages=record.messages)
                    elif record.parent == execution.id:
                        for event in translate.receive(
                            record.seq, record.kind, record.parent, record.ends, record.parts
                        ):
                            if event.type == "started" and execution.restarted:
                                yield StreamEvent(
                                    "status", event.seq, execution.id, state=RESTARTED, reason=execution.restarted
                                )
                            yield event
                            if event.type == "end":
                                return
                    elif record.kind in OUTPUT and self._is_late_for(execution, record):
                        earlier = self.executions.get(record.parent)
                        count = None if earlier is None else earlier.count
                        for event in translate.receive(record.seq, record.kind, record.parent, False, record.parts):
                            yield msgspec.structs.replace(event, late=True, executionCount=count)
        if until is not None:
            return
        assert execution.outcome is not None  # a journal ends after all executions have
        if execution.outcome.error is not None:
            raise execution.outcome.error
        yield StreamEvent("end", seq=execution.last, id=execution.id, outcome=execution.outcome.ending)

    def _is_late_for(self, execution: Execution, record: Record) -> bool:
        """Whether a record is late output that this execution is to be told."""
        return self.executions.is_late(record.parent, record.seq) and self.executions.is_told_to(execution, record.seq)

    async def execute(
        self,
        code: str,
        *,
        timeout: float | None = None,
        quiet: bool = False,
        by: By = GATEWAY,
        metadata: dict[str, Any] | None = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        """`run` a cell and yield its `events`. Closing the iterator early interrupts the cell, or it is never run."""
        execution = self.run(code, timeout=timeout, quiet=quiet, by=by, metadata=metadata)
        del code, metadata  # a cell may wait long, and these are counted once
        with self.attended(execution):
            async for event in self.events(execution):
                yield event

    @contextmanager
    def attended(self, execution: Execution) -> Iterator[None]:
        """While somebody waits for a cell. Leaving early interrupts the cell, or it is never run."""
        try:
            yield
        finally:
            self.stop(execution)

    def stop(self, execution: Execution) -> None:
        """Interrupt a cell, or if its turn has not come, never run it. Nothing happens to one that is over."""
        if execution.is_sent:
            execution.is_unwanted = True
            execution.changed.set()
        else:
            execution.end(Outcome(Ending.NOT_STARTED), self.journal.last)


def our_error(error: CellvmError) -> CellError:
    """An error of ours, as a request's client is told of it."""
    return CellError(type(error).__name__, str(error), code=error.code)


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
