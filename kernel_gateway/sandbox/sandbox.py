"""One sandbox: its state, its guest, its end. All changes of state go through `apply`."""

import asyncio
import logging
import math
import secrets
import string
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Protocol, runtime_checkable

from guest_agent import wire
from kernel_gateway.drivers import Networked, TakesDisk, Vm
from kernel_gateway.errors import CellvmError, Conflict, Draining, SandboxDied, SandboxPaused
from kernel_gateway.guest.guest import Guest
from kernel_gateway.guest.watchers import Watchers
from kernel_gateway.images.templates import Template
from kernel_gateway.kernel.kernel import Kernel
from kernel_gateway.network.policy import Policy, Refusal
from kernel_gateway.outcome import Ending
from kernel_gateway.sandbox.key import Key, Scope
from kernel_gateway.sandbox.lifecycle import ASLEEP, ENDED, Event, State, decide
from kernel_gateway.sandbox.recipe import Defaults
from kernel_gateway.sandbox.timeline import Timeline

log = logging.getLogger(__name__)

PREFIX = "sbx"
ID_LENGTH = 20
ID_ALPHABET = string.digits + string.ascii_lowercase
READING, READINGS = 5.0, 720
"""Seconds between readings of a guest's use of resources, and how many of them are kept."""
TOKEN_SIZE = 24
"""Bytes of a token."""
END_LIMIT = 30.0
"""Seconds after which nobody waits for a machine's end any more. Its place stays taken until it has ended."""


class Asleep(SandboxPaused):
    """A request has met a paused sandbox before anything was done. Whoever has such a request may wake the sandbox."""

    def __init__(self, message: str, *, sandbox: "Sandbox", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.sandbox = sandbox


def new_id() -> str:
    """An id that nobody can guess: 103 random bits."""
    return PREFIX + "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))


def kernel_id(sandbox: str) -> str:
    """A sandbox's id in the form that Jupyter's clients accept as a kernel's. `sandbox_id` turns it back."""
    return str(uuid.UUID(int=int(sandbox.removeprefix(PREFIX), 36)))


def sandbox_id(kernel: str) -> str:
    """The id of a kernel's sandbox. A text that is no kernel id gives an id that no sandbox has."""
    try:
        number = uuid.UUID(kernel).int
    except ValueError:
        return PREFIX
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = ID_ALPHABET[digit] + digits
    return PREFIX + digits.rjust(ID_LENGTH, "0")


@runtime_checkable
class Filter(Protocol):
    """A network card that lets through what a policy permits, and counts the rest."""

    async def apply(self, policy: Policy) -> None:
        """Replace the policy. Connections that the new one forbids are cut.

        Raises:
            DriverError: the policy could not be replaced; the old one is still in force.
        """

    async def refusals(self) -> list[Refusal]:
        """All refusals so far, newest first.

        Raises:
            DriverError: the refusals can't be read.
        """


def filter_of(vm: Vm) -> Filter | None:
    """The filter between a machine and the internet; None for a machine without a network card of its own."""
    card = vm.nic if isinstance(vm, Networked) else None
    return card if isinstance(card, Filter) else None


class Sandbox:
    """A sandbox of one owner.

    `deadline` is on the monotonic clock, because a step of the host's clock must not move a lifetime. `ends_at` is the
    same time for people. With `idle_timeout` the sandbox lives on while somebody is connected to its kernel or the
    kernel works, and that many seconds longer. With `longest_life` it ends that many seconds after its creation at the
    latest. `access_token` opens all that is in the sandbox, and `traffic_token` its ports, to whoever has them, and
    both stay the same as long as it lives. `readings` are of its use of resources, oldest first. `policy` says what it
    may reach. Code that replaces it holds `applying`. `ended` is called once, with the reason, when its owner has seen
    the last of it. `vacated` is called when a machine of it is gone, and `discard` when its files are of no more use.
    `cell_ended` is called when a cell in it is over.

    With `auto_pause` it is paused when its lifetime is over, and with `auto_resume` every request wakes it. So it is,
    too, if it `was_stopped`: paused with its server, and not for its owner. `work` is the task that pauses or resumes
    it, or lets it go back to a checkpoint. `defaults` say how commands run that leave it open. Paused time does not
    count: a resume begins a new lifetime.

    `timeline` has its checkpoints. Whoever takes one, or needs that nobody does, holds `checkpointing`.
    """

    def __init__(
        self,
        sandbox_id: str,
        owner: str,
        template: Template,
        *,
        timeout: int,
        metadata: dict[str, str],
        env: dict[str, str],
        policy: Policy,
        idle_timeout: int | None = None,
        longest_life: float | None = None,
        auto_pause: bool = False,
        auto_resume: bool = False,
        state: State = State.CREATING,
        ended: Callable[["Sandbox", str], None],
        vacated: Callable[["Sandbox"], None],
        discard: Callable[["Sandbox"], Awaitable[None]],
        cell_ended: Callable[["Sandbox"], None],
    ) -> None:
        self.id = sandbox_id
        self.owner = owner
        self.template = template
        self.metadata = metadata
        self.env = env
        self.policy = policy
        self.applying = asyncio.Lock()
        self.access_token = secrets.token_hex(TOKEN_SIZE)
        self.traffic_token = secrets.token_hex(TOKEN_SIZE)
        self.watchers = Watchers()
        self.open_ports: set[int] = set()
        self.all_ports_open = False
        self.port_users: dict[asyncio.Task[None], int | str] = {}  # a visitor's port, or the id of a key
        self.started_at = datetime.now(UTC)
        self.paused_at: datetime | None = None
        self.timeout = timeout
        self.idle_timeout = idle_timeout
        self.auto_pause = auto_pause
        self.auto_resume = auto_resume
        self.was_stopped = False
        self.defaults = Defaults()
        self.pauses_failed = 0
        self.has_files = False
        self.work: asyncio.Task[None] | None = None
        self.timeline = Timeline()
        self.checkpointing = asyncio.Lock()
        self.kernel_name = template.id  # the name by which a Jupyter client has asked for it
        self.state = state
        self._on_ended = ended
        self._on_vacated = vacated
        self._discard = discard
        self._cell_ended = cell_ended
        self._guest: Guest | None = None
        self._watch: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self.readings: deque[wire.Metrics] = deque(maxlen=READINGS)
        self._cleaning: asyncio.Task[None] | None = None
        self._is_gone = asyncio.Event()
        self._last_deadline = math.inf if longest_life is None else time.monotonic() + longest_life
        self.set_timeout(timeout)

    @property
    def full_env(self) -> dict[str, str]:
        """What every process in it sees of its owner and of us."""
        return {**self.env, "E2B_SANDBOX_ID": self.id, "E2B_TEMPLATE_ID": self.template.id}

    @property
    def token_key(self) -> Key:
        """What a token of the sandbox is worth: a key that sees it alone."""
        return Key("", self.owner, "token", 0.0, Scope(sandbox=self.id))

    def __repr__(self) -> str:
        return f"<Sandbox {self.id} {self.state} of {self.template.id}>"

    def set_timeout(self, seconds: float) -> None:
        """Let the sandbox expire that many seconds from now, or at the end of its longest life if that is sooner."""
        self.deadline = min(time.monotonic() + seconds, self._last_deadline)

    def extend(self, seconds: float) -> None:
        """Let the sandbox live at least that many seconds from now."""
        self.deadline = max(self.deadline, min(time.monotonic() + seconds, self._last_deadline))

    def is_over(self) -> bool:
        """Whether its lifetime is over though it runs. A sandbox that is in use is given more time first."""
        if self.idle_timeout is not None and self.is_in_use:
            self.set_timeout(self.idle_timeout)
        return self.state is State.RUNNING and self.deadline <= time.monotonic()

    @property
    def life_left(self) -> float | None:
        """Seconds until the end of its longest life; None without one."""
        return None if self._last_deadline == math.inf else self._last_deadline - time.monotonic()

    def is_open(self, port: int) -> bool:
        """Whether that port may be used without a key."""
        return self.all_ports_open or port in self.open_ports

    def open_port(self, port: int, is_open: bool) -> None:
        """Let everybody use a port, or only the owner."""
        (self.open_ports.add if is_open else self.open_ports.discard)(port)
        self._cut_visitors()

    def open_all_ports(self, is_open: bool) -> None:
        """Let everybody use all ports, or only the owner. Closing also closes ports that were opened one by one."""
        self.all_ports_open = is_open
        if not is_open:
            self.open_ports.clear()
        self._cut_visitors()

    def cut_others(self, keys: Collection[str]) -> None:
        """End the connections to ports that were made with another key than these, which are given by their ids."""
        for task, user in self.port_users.items():
            if isinstance(user, str) and user not in keys:
                task.cancel()

    def _cut_visitors(self) -> None:
        for task, user in self.port_users.items():
            if isinstance(user, int) and not self.is_open(user):
                task.cancel()

    @property
    def kernel_id(self) -> str:
        return kernel_id(self.id)

    @property
    def kernel(self) -> Kernel | None:
        """Its kernel, once it has one."""
        return None if self._guest is None else self._guest.kernel

    @property
    def is_in_use(self) -> bool:
        """Whether somebody is connected to its kernel, or the kernel works."""
        return self.kernel is not None and (self.kernel.connections > 0 or self.kernel.state == "busy")

    @property
    def disk_bytes(self) -> int:
        """Bytes of the host's disk that it takes: its disk, its checkpoints, and output that memory does not hold."""
        if self._guest is None:
            return self.timeline.size
        vm = self._guest.vm
        own = vm.disk_bytes if isinstance(vm, TakesDisk) else 0
        return own + self._guest.kernel.journal.disk_bytes + self.timeline.size

    @property
    def ends_at(self) -> datetime:
        """When its lifetime is over. Of a paused sandbox it is when it was paused."""
        if self.paused_at is not None:
            return self.paused_at
        return datetime.fromtimestamp(time.time() + self.deadline - time.monotonic(), UTC)

    @property
    def guest(self) -> Guest:
        """Its guest, for requests.

        Raises:
            Conflict: the sandbox is not running yet, or is going back to a checkpoint.
            Asleep: it is paused, or on its way to a pause or back.
            SandboxDied: the sandbox has ended.
        """
        if self.state in ENDED:
            raise SandboxDied("the sandbox has ended", outcome=Ending.NOT_STARTED)
        if self.state in ASLEEP:
            hint = "POST /sandboxes/{id}/resume lets it go on"
            raise Asleep(f"the sandbox is {self.state}", sandbox=self, hint=hint)
        if self.state is State.RESTORING:
            raise Conflict("the sandbox is going back to a checkpoint", hint="ask again in a moment")
        if self._guest is None:
            raise Conflict("the sandbox is still being created")
        return self._guest

    def started(self, guest: Guest, event: Event = Event.STARTED) -> None:
        """Take over a guest that has started, or was resumed. From now on its death ends the sandbox."""
        self._guest = guest
        self.paused_at = None
        guest.kernel.on_shutdown = lambda: self.apply(Event.KILL)
        guest.kernel.on_cell_end = lambda: self._cell_ended(self)
        self._watch = asyncio.create_task(self._watch_guest(guest))
        self._reading = asyncio.create_task(self._read_metrics(guest))
        self.apply(event)

    def went_back(self, guest: Guest, error: CellvmError) -> None:
        """Take over a guest of an earlier moment in place of the present one, and destroy that.

        Args:
            error: what is told to all whose work is undone by this.
        """
        before = self._guest
        assert before is not None
        before.kernel.go_back(guest.kernel, error)
        guest.kernel = before.kernel
        before.link.close(error)
        self._stop_watching()
        self._cleaning = asyncio.create_task(self._kill(before))
        self.started(guest, Event.RESTORED)

    async def done(self, work: asyncio.Task[None]) -> None:
        """Return when a task that changes its state is done, which goes on even if nobody waits for it any more."""
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({work})
        if work.cancelled():
            raise SandboxDied("the sandbox has ended") if self.state in ENDED else Draining("the server is going down")
        work.result()

    async def _read_metrics(self, guest: Guest) -> None:
        """Keep a reading of the guest's use of resources from time to time. One that does not come is left out."""
        while not guest.link.closed.done():
            await asyncio.sleep(READING)
            with suppress(CellvmError):
                self.readings.append(await guest.link.call(wire.GetMetrics(), wire.Metrics))

    async def _watch_guest(self, guest: Guest) -> None:
        """End the sandbox when its machine ends or breaks the protocol."""
        machine = asyncio.ensure_future(guest.vm.wait())
        waiting: set[asyncio.Future[Any]] = {machine, guest.link.closed}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            machine.cancel()
        reason = str(guest.link.closed.result()) if guest.link.closed.done() else machine.result()
        log.warning("sandbox %s ended by itself: %.200r", self.id, reason)
        if guest is self._guest:
            self.apply(Event.DIED)

    def apply(self, event: Event) -> None:
        """Apply an event. Nothing else changes the state.

        Raises:
            Conflict: a request that can't be granted now.
        """
        following = decide(self.state, event)
        if following is None:
            return
        before, self.state = self.state, following
        if following in ENDED and before not in ENDED:
            self._on_ended(self, event)
        if following is State.PAUSED and event is Event.SAVED:
            guest, self._guest, self.has_files = self._guest, None, True
            self.paused_at = datetime.now(UTC)
            assert guest is not None
            self._tell(
                guest, SandboxPaused("the sandbox was paused", hint="what has begun in it goes on after a resume")
            )
            self._cleaning = asyncio.create_task(self._vacate(guest))
        if following is State.STOPPING and (before is not State.CREATING or self._guest is not None):
            # Readers are told first, so that nobody takes the end of what they read for the end of their work.
            if self._guest is not None:
                self._tell(self._guest, SandboxDied(f"the sandbox has ended: {event}"))
            self._cleaning = asyncio.create_task(self._clean_up(self._guest, self._cleaning))
        if following is State.STOPPED:
            self._on_vacated(self)
            self._is_gone.set()

    def _tell(self, guest: Guest, error: CellvmError) -> None:
        """Tell all who wait for a guest that it is gone."""
        guest.kernel.close(error)
        guest.link.close(error)

    async def _clean_up(self, guest: Guest | None, before: asyncio.Task[None] | None) -> None:
        """Destroy the guest and the files, whatever ended the sandbox."""
        if guest is not None:
            self._stop_watching()
            await self._kill(guest)
        if self.work is not None:
            self.work.cancel()
            await asyncio.wait({self.work})
        if before is not None:
            await asyncio.wait({before})
        await self._discard(self)
        self.apply(Event.GONE)

    async def _vacate(self, guest: Guest) -> None:
        """Destroy the guest of a sandbox that was saved."""
        self._stop_watching()
        await self._kill(guest)
        self._on_vacated(self)

    async def vacated(self) -> None:
        """Return when its machine before the present one, or before its pause, is gone, or after END_LIMIT seconds."""
        if self._cleaning is not None:
            await asyncio.wait({self._cleaning}, timeout=END_LIMIT)

    def _stop_watching(self) -> None:
        for task in (self._watch, self._reading):
            if task is not None:
                task.cancel()

    async def _kill(self, guest: Guest) -> None:
        killing = asyncio.create_task(guest.kill())
        await asyncio.wait({killing}, timeout=END_LIMIT)
        if not killing.done():
            log.error("sandbox %s: process %d has not ended within %d s of SIGKILL", self.id, guest.vm.pid, END_LIMIT)
        await killing

    async def gone(self) -> None:
        """Return when nothing of the sandbox is left, or after END_LIMIT seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(END_LIMIT):
                await self._is_gone.wait()
