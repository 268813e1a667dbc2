"""The cells that the gateway runs for REST clients and agents: their ids, their bounds, their ends. No I/O."""

import asyncio
import hashlib
import time
from collections.abc import Container, Iterator
from typing import Any

import msgspec

from kernel_gateway.errors import Conflict, TooManyRequests
from kernel_gateway.held import Account, Holding
from kernel_gateway.kernel import message
from kernel_gateway.kernel.events import CellError
from kernel_gateway.kernel.message import GATEWAY, By
from kernel_gateway.outcome import Ending, Outcome, Packed

RUNNING = "running"
"""The state of an execution that is not over."""
KEPT = 1000
"""Number of executions that a kernel remembers. Not more of them may be unfinished at a time."""


class ExecutionState(msgspec.Struct):
    """An execution of a paused sandbox that the kernel has got. `since` is the age of its clock, in seconds."""

    id: str
    digest: bytes
    after: int
    timeout: float | None
    last: int
    outcome: Packed | None
    timed_out: CellError | None
    is_started: bool
    is_unwanted: bool
    since: float
    count: int | None
    restarted: str


class Execution:
    """A cell that the gateway runs for somebody.

    `id` is its Jupyter message id, and clients know it by that. `code`, as bytes, and the `metadata` of the request to
    the kernel are kept, and held for the owner, until the kernel has got them. `after` is the journal's number before
    its first message. `outcome` is None until it is over, and `last` is then the number of the last message to show.
    `timed_out` is the error to tell in place of the interrupt that the gateway has sent. `clock` is when its time
    began. `count` is its number in the kernel, once that is known. `restarted` says why its kernel is another one than
    the execution before had. `told` is the number of the last message that a model has been told of. `by` has asked for
    it, over the connection of the client session `session` if it was one.
    """

    def __init__(
        self,
        execution_id: str,
        code: str,
        after: int,
        timeout: float | None,
        by: By = GATEWAY,
        session: str = "",
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.id = execution_id
        self.by = by
        self.session = session
        self.code = encoded(code)
        self.digest = digest(self.code)
        self.metadata = metadata or {}
        self.holding: Holding | None = None
        self.after = after
        self.timeout = timeout
        self.last = 0
        self.outcome: Outcome | None = None
        self.timed_out: CellError | None = None
        self.is_sent = False
        self.is_started = False
        self.is_unwanted = False
        self.clock = time.monotonic()
        self.count: int | None = None
        self.restarted = ""
        self.told = 0
        self.changed = asyncio.Event()

    def state_at_rest(self) -> ExecutionState:
        """What is stored of it while its sandbox is paused."""
        return ExecutionState(
            id=self.id,
            digest=self.digest,
            after=self.after,
            timeout=self.timeout,
            last=self.last,
            outcome=None if self.outcome is None else self.outcome.packed(),
            timed_out=self.timed_out,
            is_started=self.is_started,
            is_unwanted=self.is_unwanted,
            since=time.monotonic() - self.clock,
            count=self.count,
            restarted=self.restarted,
        )

    @classmethod
    def of(cls, was: ExecutionState) -> "Execution":
        """An execution of a sandbox that was paused."""
        self = cls(was.id, "", was.after, was.timeout)
        self.digest, self.last, self.timed_out, self.count = was.digest, was.last, was.timed_out, was.count
        self.outcome = None if was.outcome is None else Outcome.unpacked(was.outcome)
        self.is_sent, self.is_started, self.is_unwanted = True, was.is_started, was.is_unwanted
        self.clock, self.restarted = time.monotonic() - was.since, was.restarted
        return self

    @property
    def state(self) -> str:
        """RUNNING, or how it ended."""
        return RUNNING if self.outcome is None else self.outcome.ending

    def is_told(self, after: int) -> bool:
        """Whether it is over, and a reader at the journal's number `after` has had all of it."""
        return self.outcome is not None and after >= self.last

    def start(self, kind: str, content: bytes) -> None:
        """Take note that the kernel has begun with it, by a message of that kind."""
        if kind == "execute_input":
            self.count = message.number_of(message.read(content, message.Reply).execution_count)
        if not self.is_started:
            self.is_started = True
            self.clock = time.monotonic()
            self.changed.set()

    def end(self, outcome: Outcome, last: int) -> None:
        """Give the outcome. It is given once: later calls change nothing."""
        if self.outcome is None:
            self.outcome, self.last = outcome, last
            self.drop_code()
            self.changed.set()

    def drop_code(self) -> None:
        """Keep its code and metadata no longer, because the kernel has them, or will not get them."""
        self.code = b""
        self.metadata = {}
        if self.holding is not None:
            self.holding.release()


def encoded(code: str) -> bytes:
    return code.encode("utf-8", "surrogatepass")


def digest(code: bytes) -> bytes:
    return hashlib.sha256(code).digest()


class Executions:
    """A kernel's executions by id, oldest first. Their code is held on the account until it is sent."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._by_id: dict[str, Execution] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, execution_id: str) -> bool:
        return execution_id in self._by_id

    def get(self, execution_id: str) -> Execution | None:
        return self._by_id.get(execution_id)

    @property
    def last(self) -> Execution | None:
        """The newest one."""
        return next(reversed(self._by_id.values()), None)

    def find(self, execution_id: str, code: str) -> Execution | None:
        """The execution that was started with that id; None if there is none, or if it never ran and may be repeated.

        Raises:
            Conflict: the id was used for another cell.
        """
        known = self._by_id.get(execution_id)
        if known is not None and known.digest != digest(encoded(code)):
            raise Conflict("this id was used for another cell", hint="choose a new one for every cell")
        return None if known is None or known.state == Ending.NOT_STARTED else known

    def at_rest(self, unsent: Container[str]) -> list[ExecutionState]:
        """What is stored of them while the sandbox is paused. Those that the kernel has not got are left out.

        Args:
            unsent: ids of messages that are about to be sent.
        """
        return [each.state_at_rest() for each in self._by_id.values() if each.is_sent and each.id not in unsent]

    def restore(self, states: list[ExecutionState]) -> None:
        """Go on with the executions of a sandbox that was paused."""
        self._by_id = {state.id: Execution.of(state) for state in states}

    def unfinished(self) -> Iterator[Execution]:
        return (each for each in self._by_id.values() if each.outcome is None)

    def is_late(self, parent: str, seq: int) -> bool:
        """Whether message `seq` of the execution `parent` has come after its end."""
        of = self._by_id.get(parent)
        return of is not None and of.outcome is not None and seq > of.last

    def is_told_to(self, execution: Execution, seq: int) -> bool:
        """Whether that execution is the one to tell a late message to: the first that ends after it."""
        for each in self._by_id.values():
            if each is execution:
                return True
            if each.outcome is None or seq <= each.last:
                return False
        return False

    def add(self, execution: Execution) -> None:
        """Remember an execution. The oldest one that is over is forgotten for it.

        Raises:
            TooManyRequests, HostFull: too many cells are waiting, or there is no room for the code.
        """
        oldest = next((each for each in self._by_id.values() if each.outcome is not None), None)
        is_full = len(self._by_id) >= KEPT
        if is_full and oldest is None:
            raise TooManyRequests(f"{KEPT} cells are waiting already", hint="wait for some of them")
        size = len(execution.code) + len(msgspec.json.encode(execution.metadata))
        execution.holding = self._account.hold("code of cells that wait", size)
        if is_full and oldest is not None:
            del self._by_id[oldest.id]
        self._by_id[execution.id] = execution
