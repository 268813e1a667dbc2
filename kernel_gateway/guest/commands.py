"""Commands in a sandbox. A command outlives the request that has started it, and its output is kept for readers.

    start ──▶ Command ──▶ conversation ──▶ agent ──▶ program
                 │                            │
              Journal ◀──── output ───────────┘
               ▲   ▲
          Reader   Reader: at any place, at any time

The guest is held only while even the fastest reader is behind. With nobody attached the output flows on, and its oldest
part is dropped at the bounds of the command and of the sandbox. A command has one outcome, which `Command.end` takes
once, whatever the cause: it exits, is killed, reaches its timeout, could not be started, or its machine ends.
"""

import asyncio
import codecs
import signal as signals
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime

import msgspec

from guest_agent import wire
from kernel_gateway.errors import (
    CellvmError,
    Conflict,
    GuestFailure,
    GuestUnresponsive,
    NotFound,
    TooManyRequests,
)
from kernel_gateway.guest.link import Conversation, Link
from kernel_gateway.held import Account, Held
from kernel_gateway.kernel.journal import Gap, Journal, Record
from kernel_gateway.outcome import FINISHED, Ending, Outcome, Packed

MAX_RUNNING = 128
KEPT = 128
"""Number of commands of a sandbox that are over and still known."""
COMMAND_OUTPUT = 4 * 1024 * 1024
SANDBOX_OUTPUT = 16 * 1024 * 1024
"""Bytes of output that are kept of a command, and of all commands of a sandbox. Each piece counts OVERHEAD more."""
PIECE = 32 * 1024
"""Bytes of output in one record of a journal."""
PAGE = 64 * 1024
HIGH_WATER = 32 * 1024
"""Bytes that the fastest reader may be behind. So much of every running command fits into SANDBOX_OUTPUT."""
WINDOW = 128 * 1024
"""Bytes of output that the guest may send ahead of what was kept. They are held for each command that runs."""
STDIN_WAITING = 4 * 1024 * 1024
"""Bytes of input that wait for a command to read them."""
WATCHDOG = 5.0
"""Seconds after its own timeout at which a command's silence means that the guest is broken."""


class CommandState(msgspec.Struct):
    """A command of a paused sandbox. `number` is its conversation's, `left` the seconds until its timeout."""

    request: wire.Spawn
    tag: str
    pid: int
    terminal: tuple[int, int] | None
    started_at: datetime
    ended_at: datetime | None
    outcome: Packed | None
    exited: wire.Exited | None
    last: int
    end: int
    records: list[Record]
    incomplete: dict[str, bytes]
    input: bytes
    input_is_open: bool
    input_is_ended: bool
    number: int | None
    left: float | None


class Command:
    """One command, from its start to as long as it is known.

    `pid` is 0 until it runs. `begun` is set when it runs or is over, `over` when it is over. `outcome` is None until it
    is over; `exited` says how the program ended, if that is known. `terminal` is the present size of its terminal, as
    rows and columns. `holding` counts its arguments and variables, and the input that waits. Make it with
    `Commands.start`.
    """

    def __init__(self, link: Link, request: wire.Spawn, tag: str, account: Account) -> None:
        self.request = request
        texts = [*request.argv, *request.env, *request.env.values()]
        self._cost = sum(map(sys.getsizeof, texts))
        self.holding = account.hold("commands")
        self.tag = tag
        self.pid = 0
        self.terminal = request.terminal
        self.started_at = datetime.now(UTC)
        self.ended_at: datetime | None = None
        self.outcome: Outcome | None = None
        self.exited: wire.Exited | None = None
        self.journal = Journal(
            memory=COMMAND_OUTPUT, disk=0, page=PAGE, high_water=HIGH_WATER, on_pressure=self._pressure_changed
        )
        self._link = link
        self._conversation: Conversation | None = None
        self.begun = asyncio.Event()
        self._may_flow = asyncio.Event()
        self._may_flow.set()
        self._is_free = False
        self._incomplete: dict[str, bytes] = {}
        self._input = bytearray()
        self._input_is_open = True
        self._input_is_ended = False
        self._input_changed = asyncio.Event()
        self._input_taken = asyncio.Event()
        self.over = asyncio.Event()
        self.ends_by: float | None = None

    def __repr__(self) -> str:
        return f"<Command {self.pid} {self.state} {self.request.argv[0]!r}>"

    @property
    def state(self) -> str:
        """running, or how it ended: finished, not_started, unknown."""
        return "running" if self.outcome is None else self.outcome.ending

    @property
    def is_known_to_the_guest(self) -> bool:
        """Whether the guest has got it, or it is over."""
        return self._conversation is not None or self.outcome is not None

    @property
    def size(self) -> int:
        """Bytes that it costs the server: its arguments, variables and waiting input, and its window while it runs."""
        return self._cost + len(self._input) + (WINDOW if self.outcome is None else 0)

    # -- for whoever knows the command

    async def running(self) -> None:
        """Return when it runs, or is over already.

        Raises:
            CellvmError: it could not be started. `outcome` tells whether that is sure.
        """
        await self.begun.wait()
        if self.outcome is not None and self.outcome.error is not None and not self.pid:
            raise self.outcome.error

    async def output(self, after: int = 0) -> AsyncGenerator[Record | Gap, None]:
        """Its output after number `after`, first what is kept, then as it comes, until it is over.

        A record's `kind` is stdout, stderr or pty, and its only part are bytes. If the output is UTF-8, no record ends
        within a character.
        """
        with self.journal.reader(after) as reader:
            while found := await reader.next():
                for each in found:
                    yield each

    def write(self, data: bytes) -> None:
        """Send input. It waits until the program reads it.

        Raises:
            Conflict: the command is over, or its input is closed.
            TooManyRequests, HostFull: too much input waits already; nothing of this one was sent.
        """
        self._check_running()
        if not self._input_is_open:
            raise Conflict("the command's standard input is closed")
        if len(self._input) + len(data) > STDIN_WAITING:
            raise TooManyRequests(
                f"{len(self._input)} bytes of input wait already, because the command has not read them",
                hint=f"at most {STDIN_WAITING} bytes may wait",
            )
        self.holding.resize(self.size + len(data))
        self._input += data
        self._input_changed.set()

    async def feed(self, data: bytes) -> None:
        """`write` as soon as there is room for it."""
        while self.outcome is None and len(self._input) + len(data) > STDIN_WAITING and self._input:
            self._input_taken.clear()
            await self._input_taken.wait()
        self.write(data)

    def close_stdin(self) -> None:
        """End its standard input, after what waits. Once it is closed, this does nothing.

        Raises:
            Conflict: the command is over, or it has a terminal.
        """
        self._check_running()
        if self.terminal is not None:
            raise Conflict("a terminal's input can't be closed", hint="send Ctrl-D, the character U+0004")
        self._input_is_open = False
        self._input_changed.set()

    async def signal(self, name: str) -> None:
        """Send a signal to its process group.

        Args:
            name: the signal's name, as SIGTERM.

        Raises:
            Conflict: the command is over.
        """
        if name == "SIGKILL":
            self.set_free()
        await self._ask(wire.Signal, signal=signals.Signals[name])

    async def resize(self, rows: int, columns: int) -> None:
        """Change its terminal's size.

        Raises:
            Conflict: the command is over, or has no terminal.
        """
        if self.terminal is None:
            raise Conflict("the command has no terminal")
        await self._ask(wire.Resize, rows=rows, columns=columns)
        self.terminal = (rows, columns)

    def kill(self) -> None:
        """Kill its process group, also before it has a pid. What it has printed by then may be left out."""
        self.set_free()
        if self._conversation is not None:
            self._conversation.cancel()
        else:
            error = Conflict("the command was cancelled before it was started")
            self.end(Outcome.failed(Ending.NOT_STARTED, error))

    # -- for its sandbox

    async def run(self, conversation: Conversation, kept: Callable[[], None]) -> None:
        """Take what the guest says of it, up to its end. Calls `kept` after each piece of output."""
        self._conversation = conversation
        feeding = asyncio.create_task(self._feed(conversation))
        try:
            while self.outcome is None:
                await self._may_flow.wait()
                self._received(await conversation.receive())
                kept()
        finally:
            feeding.cancel()

    def _received(self, item: tuple[int, bytes] | wire.Body) -> None:
        if isinstance(item, tuple):
            self._keep(*item)
        elif isinstance(item, wire.Started) and not self.pid:
            self.pid = item.pid
            self.begun.set()
        elif isinstance(item, wire.Exited):
            self.end(FINISHED, item)
        else:
            raise GuestUnresponsive("the guest answered a command with something else")

    def catch_up(self) -> Conversation | None:
        """Take all that has come at once, beyond what its readers have read, too; return its conversation, if open."""
        if self._conversation is None or self.outcome is not None:
            return None
        try:
            for item in self._conversation.arrived():
                if self.outcome is None:
                    self._received(item)
        except CellvmError as error:
            self.fail(error)
        return self._conversation if self.outcome is None else None

    def state_at_rest(self) -> CommandState:
        """What is stored of it while its sandbox is paused."""
        return CommandState(
            request=self.request,
            tag=self.tag,
            pid=self.pid,
            terminal=self.terminal,
            started_at=self.started_at,
            ended_at=self.ended_at,
            outcome=None if self.outcome is None else self.outcome.packed(),
            exited=self.exited,
            last=self.journal.last,
            end=self.journal.end,
            records=self.journal.in_memory(),
            incomplete=self._incomplete,
            input=bytes(self._input),
            input_is_open=self._input_is_open,
            input_is_ended=self._input_is_ended,
            number=None if self._conversation is None else self._conversation.number,
            left=None if self.ends_by is None else self.ends_by - time.monotonic(),
        )

    @classmethod
    def of(cls, link: Link, was: CommandState, account: Account) -> "Command":
        """A command of a sandbox that was paused."""
        self = cls(link, was.request, was.tag, account)
        self.pid, self.terminal, self.started_at = was.pid, was.terminal, was.started_at
        self.journal.restore([], [was.records], was.last, was.end)
        self._incomplete, self._input, self._input_is_open = was.incomplete, bytearray(was.input), was.input_is_open
        self._input_is_ended = was.input_is_ended
        if was.pid:
            self.begun.set()
        if was.outcome is not None:
            self.outcome, self.exited, self.ended_at = Outcome.unpacked(was.outcome), was.exited, was.ended_at
            self.journal.close()
            self.begun.set()
        return self

    def set_free(self) -> None:
        """Hold the guest no more for any reader, because the command is to end."""
        self._is_free = True
        self._may_flow.set()

    def fail(self, error: CellvmError) -> None:
        """End it, because it can't be run or its end can't be learnt."""
        is_refused = isinstance(error, GuestFailure) and not self.pid
        ending = Ending.NOT_STARTED if is_refused or self._conversation is None else Ending.UNKNOWN
        self.end(Outcome.failed(ending, error))

    def end(self, outcome: Outcome, exited: wire.Exited | None = None) -> None:
        """Say how it ended. Nothing else sets its outcome, and only the first call counts."""
        if self.outcome is not None:
            return
        self.outcome, self.exited, self.ended_at = outcome, exited, datetime.now(UTC)
        for kind, rest in self._incomplete.items():
            self.journal.append([rest], kind)
        self.journal.close()
        self._input.clear()
        self.holding.resize(self.size)
        self.begun.set()
        self._input_taken.set()
        self.over.set()

    def _keep(self, sub: int, data: bytes) -> None:
        """Keep output in pieces. A character that is not complete waits for its rest."""
        kind = "pty" if self.request.terminal is not None else "stdout" if sub == wire.STDOUT else "stderr"
        for at in range(0, len(data), PIECE):
            piece = self._incomplete.pop(kind, b"") + data[at : at + PIECE]
            _, size = codecs.utf_8_decode(piece, "replace")
            if size:
                self.journal.append([piece[:size]], kind)
            if size < len(piece):
                self._incomplete[kind] = piece[size:]

    async def _feed(self, conversation: Conversation) -> None:
        try:
            while (self._input or self._input_is_open) and not self._input_is_ended:
                if self._input:
                    sent = await conversation.send_some(bytes(self._input[: wire.CHUNK]))
                    if not sent:
                        return  # it is over
                    del self._input[:sent]
                    self._input_taken.set()
                self.holding.resize(self.size)
                if not self._input and self._input_is_open:
                    self._input_changed.clear()
                    await self._input_changed.wait()
            if not self._input_is_ended:
                self._input_is_ended = True
                conversation.end()
        except CellvmError:
            pass  # `receive` raises it, too

    def _pressure_changed(self, held: bool) -> None:
        if held and not self._is_free:
            self._may_flow.clear()
        else:
            self._may_flow.set()

    def _check_running(self) -> None:
        if self.outcome is not None:
            raise Conflict("the command is over")

    async def _ask(self, kind: type[wire.Signal] | type[wire.Resize], **fields: int) -> None:
        """Make a request that concerns the running program."""
        self._check_running()
        if self._conversation is None:
            raise Conflict("the command is not started yet")
        try:
            await self._link.call(kind(stream=self._conversation.number, **fields), wire.Done)
        except GuestFailure as error:
            if error.code != "not_found":
                raise
            raise Conflict("the command is over, or not started yet") from None


class Commands:
    """The commands of one sandbox: those that run, and the last ones that are over. `account` is their owner's."""

    def __init__(self, link: Link) -> None:
        self.account = Held().account("")
        self._link = link
        self._known: list[Command] = []
        self._tasks: set[asyncio.Task[None]] = set()
        link.closed.add_done_callback(self._link_closed)

    def __iter__(self) -> Iterator[Command]:
        """Every command that is known, oldest first."""
        return iter(self._known)

    def find(self, name: str) -> Command:
        """The newest command with that pid or tag.

        Raises:
            NotFound: no command that is known has it.
        """
        for command in reversed(self._known):
            if name and name in (command.tag, str(command.pid or "")):
                return command
        raise NotFound("no such command in this sandbox", hint="the newest commands that are over are known, no others")

    def start(
        self,
        argv: list[str],
        *,
        env: dict[str, str],
        cwd: str = "~",
        user: str = "",
        tag: str = "",
        timeout: float = 0,
        terminal: tuple[int, int] | None = None,
        stdin: bool = False,
    ) -> Command:
        """A new command. `Command.running` tells when it runs; its end does not depend on who waits for it.

        Args:
            env: its variables, which win over the sandbox's.
            cwd: where it runs; relative paths and `~` begin at the user's home.
            user: the user that it runs as; empty for the sandbox's own.
            timeout: seconds after which its process group is killed; 0 for no limit.
            terminal: rows and columns of a terminal of its own.
            stdin: whether its standard input stays open for `write`.

        Raises:
            TooManyRequests, HostFull: too many commands run in the sandbox, or there is no room for the arguments.
        """
        request = wire.Spawn(
            argv=argv,
            env=env,
            cwd=cwd,
            timeout_ms=max(1, round(timeout * 1000)) if timeout else 0,
            user=user,
            terminal=terminal,
            window=WINDOW,
        )
        command = Command(self._link, request, tag, self.account)
        self._admit(command)
        if terminal is None and not stdin:
            command.close_stdin()
        command.ends_by = time.monotonic() + timeout if timeout else None
        self._begin(command, self._link.ask(command.request, WINDOW))
        return command

    def _begin(self, command: Command, conversation: AbstractAsyncContextManager[Conversation]) -> None:
        task = asyncio.create_task(self._run(command, conversation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def at_rest(self) -> tuple[list[CommandState], list[Conversation]]:
        """What is stored of the commands while the sandbox is paused, and the conversations of those that run.

        A command that the guest has not got is left out. It is told so when the link closes.
        """
        running = [each for command in self._known if (each := command.catch_up()) is not None]
        return [each.state_at_rest() for each in self._known if each.is_known_to_the_guest], running

    def restore(self, states: list[CommandState], account: Account) -> None:
        """Go on with the commands of a sandbox that was paused.

        Raises:
            TooManyRequests, HostFull: there is no room for what they hold.
        """
        self.account = account
        for state in states:
            command = Command.of(self._link, state, account)
            command.holding.resize(command.size)
            self._known.append(command)
            if command.outcome is None and state.number is not None:
                command.ends_by = None if state.left is None else time.monotonic() + state.left
                self._begin(command, self._link.go_on(state.number))

    def forget(self, command: Command) -> None:
        """Drop what is kept of a command that is over."""
        if command.outcome is not None and command in self._known:
            self._known.remove(command)
            command.holding.release()

    def _admit(self, command: Command) -> None:
        over = [each for each in self._known if each.outcome is not None]
        running = len(self._known) - len(over)
        if running >= MAX_RUNNING:
            raise TooManyRequests(
                f"{running} commands run in this sandbox already",
                hint=f"wait for some of them, or end them; at most {MAX_RUNNING} run at once",
            )
        while not command.holding.grow(command.size):
            if not over:
                command.holding.resize(command.size)  # raises
            self.forget(over.pop(0))
        self._known.append(command)
        while len(over) > KEPT:
            self.forget(over.pop(0))

    async def _run(self, command: Command, asking: AbstractAsyncContextManager[Conversation]) -> None:
        """See a command through: its start, its output, its end."""
        if command.outcome is not None:  # it was killed before its turn
            return
        left = None if command.ends_by is None else max(command.ends_by - time.monotonic(), 0)
        silence = None if left is None else left + WATCHDOG * self._link.time_scale
        free = None if left is None else asyncio.get_running_loop().call_later(left, command.set_free)
        try:
            async with asyncio.timeout(silence), asking as conversation:
                await command.run(conversation, self._keep_within_bounds)
        except TimeoutError:
            error = GuestUnresponsive("the guest did not end a command at its timeout; the sandbox was destroyed")
            self._link.close(error)
            command.fail(error)
        except CellvmError as error:
            command.fail(error)
        finally:
            if free is not None:
                free.cancel()
            if self._link.closed.done():  # nobody finds it any more
                command.holding.release()

    def _keep_within_bounds(self) -> None:
        """Drop output of the command that has most of it, oldest first, while that of all is over SANDBOX_OUTPUT."""
        journals = [command.journal for command in self._known]
        while sum(journal.held_bytes for journal in journals) > SANDBOX_OUTPUT:
            max(journals, key=lambda journal: journal.held_bytes).spill()

    def _link_closed(self, closed: asyncio.Future[Exception]) -> None:
        for command in self._known:
            command.set_free()
            command.holding.release()
