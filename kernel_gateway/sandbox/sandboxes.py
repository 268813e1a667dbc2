"""All sandboxes of the server: create, find, list, end. Every look-up but `find` is by owner and id."""

import asyncio
import logging
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from kernel_gateway.drivers import DriverError
from kernel_gateway.errors import (
    CellvmError,
    Conflict,
    Draining,
    GuestFailure,
    HostFull,
    InvalidRequest,
    NotFound,
    TooManyRequests,
    Unavailable,
)
from kernel_gateway.guest.guest import Guest, Guests
from kernel_gateway.held import Held
from kernel_gateway.images.preparation import Preparation
from kernel_gateway.images.templates import Template, Templates
from kernel_gateway.metrics import Metrics
from kernel_gateway.network.policy import Floor, Policy, Refusal
from kernel_gateway.rate import Rate
from kernel_gateway.sandbox.lifecycle import ENDED, Event, State
from kernel_gateway.sandbox.pool import Pool
from kernel_gateway.sandbox.sandbox import Sandbox, filter_of, new_id
from kernel_gateway.sandbox.store import Store

log = logging.getLogger(__name__)

LEGAL_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
START_ATTEMPTS = 2
DEFAULT_POLICY = Policy()
TICK = 0.25
"""Seconds between looks at the lifetimes. A sandbox ends at most this long after its deadline."""
PAUSE = 1.0
"""Seconds after which a task that must live is started again."""
FLOOR_SHARE, FLOOR = 0.05, 2 * 1024**3
"""The part of the disk, and the bytes at most, that must be free for another sandbox. They are for those that run."""
ROOM_LIMIT = 5.0
"""Seconds that a create waits for a machine that is ending, if all places are taken."""
WORTH_ENDING = 256 * 1024**2
"""Bytes of disk. Nobody's sandbox is ended for less, because that would hardly help the others."""
FLUSH_LIMIT = 5.0
"""Seconds that a server which goes down waits for the database to take the ends of its sandboxes."""


T = TypeVar("T")


class Network(Protocol):
    """The common part of all sandboxes' networks: their mechanism, and the addresses that none of them reaches."""

    @property
    def mechanism(self) -> str: ...

    @property
    def floor(self) -> Floor: ...


async def to_its_end(task: asyncio.Task[T]) -> T:
    """The result of a task that goes on even if nobody waits for it any more."""
    # asyncio would complain of an exception that nobody has looked at.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(task)


async def supervised(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run a task that must live until it is cancelled. If it fails, it is started again, and the log says so."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("%s failed and is started again", name)
        await asyncio.sleep(PAUSE)


class Sandboxes:
    """The collection. `maximum` counts machines of sandboxes, from the create until the machine is gone, however the
    sandbox fares meanwhile. The pool is not counted. `per_owner` of them may be one owner's.

    `journals` is the directory for kernels' output that memory does not hold. It is on the disk that sandboxes use.
    `held` counts what waits in the server for each owner, and one owner creates `creates_per_minute` sandboxes at most.
    `metrics` counts creates and ends.
    `network` is None if machines have no network card, `preparation` is None if every template is ready from the start.
    """

    def __init__(
        self,
        templates: Templates,
        guests: Guests,
        pools: dict[str, Pool],
        store: Store,
        *,
        maximum: int,
        per_owner: int | None = None,
        journals: Path | None = None,
        held: Held | None = None,
        creates_per_minute: int = 600,
        metrics: Metrics | None = None,
        network: Network | None = None,
        preparation: Preparation | None = None,
    ) -> None:
        self.templates = templates
        self.maximum = maximum
        self.per_owner = maximum if per_owner is None else per_owner
        self.pools = pools
        self.capabilities = guests.capabilities
        self.network = network
        self._preparation = preparation
        self._guests = guests
        self._store = store
        self._journals = journals
        self.held = held or Held()
        self.creates = Rate(creates_per_minute)
        self.metrics = metrics or Metrics()
        self._sandboxes: dict[str, Sandbox] = {}
        self._places: set[Sandbox] = set()
        self._place_is_free = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._replacing: set[asyncio.Task[None]] = set()
        self.is_draining = False
        self.started_at = time.time()

    def __repr__(self) -> str:
        return f"<Sandboxes {len(self._sandboxes)}/{self.maximum}>"

    def __len__(self) -> int:
        return len(self._sandboxes)

    def __iter__(self) -> Iterator[Sandbox]:
        return iter([*self._sandboxes.values()])

    @property
    def trouble(self) -> str:
        """What is amiss with the server; empty if nothing is."""
        return self._store.trouble or self._lack_of_space()

    @property
    def disk_bytes(self) -> int:
        """Bytes of the host's disk that all sandboxes take."""
        return sum(each.disk_bytes for each in self._places)

    def _lack_of_space(self) -> str:
        free, floor = self._space()
        if free >= floor:
            return ""
        return f"the server's disk has {free >> 20} MiB free, and {floor >> 20} MiB are kept for running sandboxes"

    def _space(self) -> tuple[int, int]:
        """Free bytes of the disk, and how many should be free."""
        if self._journals is None:
            return 0, 0
        disk = shutil.disk_usage(self._journals)
        return disk.free, min(int(disk.total * FLOOR_SHARE), FLOOR)

    def _make_room(self) -> None:
        """End the sandbox that takes most of the disk if less than half the floor is free.

        A full disk would damage the files of all sandboxes. One is ended at a time, because its space comes back only
        when its machine is gone.
        """
        free, floor = self._space()
        if free >= floor // 2 or any(each.state in ENDED for each in self._places):
            return
        greatest = max(self._places, key=lambda each: each.disk_bytes, default=None)
        if greatest is not None and greatest.state is State.RUNNING and greatest.disk_bytes >= WORTH_ENDING:
            log.error("sandbox %s is ended, because the disk is full and it takes %d MiB of it",
                      greatest.id, greatest.disk_bytes >> 20)  # fmt: skip
            greatest.apply(Event.DISK_FULL)

    def start(self) -> None:
        """Begin to fill pools and to watch lifetimes."""
        self._tasks = [asyncio.create_task(supervised(repr(pool), pool.run)) for pool in self.pools.values()]
        self._tasks.append(asyncio.create_task(supervised("the watch over lifetimes", self._expire)))

    async def close(self) -> None:
        """End everything."""
        self.is_draining = True
        for task in self._tasks:
            task.cancel()
        ending = list(self._places)
        for sandbox in ending:
            sandbox.apply(Event.SERVER_STOPPED)
        await asyncio.gather(*(sandbox.gone() for sandbox in ending))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.flush(FLUSH_LIMIT)

    async def create(
        self,
        owner: str,
        template: Template,
        *,
        timeout: int,
        metadata: dict[str, str],
        env: dict[str, str],
        policy: Policy = DEFAULT_POLICY,
        idle_timeout: int | None = None,
        longest_life: int | None = None,
    ) -> Sandbox:
        """A new, running sandbox. It never runs with another policy than `policy`.

        Raises:
            TooManyRequests: the owner has `per_owner` already, or has created as many in this minute as one may.
            HostFull: there are `maximum` already, or no machine could be started, or it can't be written down.
            TemplateNotReady: the template is still being built.
            Draining: the server is going down.
            Unavailable: this server can't enforce the policy.
        """
        self._check_enforceable(policy)
        self.creates.count(owner, "sandboxes", time.monotonic())
        if self._preparation is not None:
            await self._preparation.require(template)
        await self._room_for(owner)
        if lack := self._lack_of_space():
            raise HostFull(lack, hint="the operator must free some space")
        sandbox_id = new_id()
        sandbox = Sandbox(
            sandbox_id,
            owner,
            template,
            timeout=timeout,
            metadata=metadata,
            env=env,
            policy=policy,
            idle_timeout=idle_timeout,
            longest_life=longest_life,
            ended=self._ended,
            gone=self._gone,
        )
        self._sandboxes[sandbox_id] = sandbox
        self._places.add(sandbox)
        try:
            await self._store.sandbox_created(sandbox_id, owner, template.id)
            guest = await self._start_guest(sandbox)
            if sandbox.state is not State.CREATING:
                await guest.kill()
                raise Conflict("the sandbox was ended while it was being created")
        except BaseException:
            sandbox.apply(Event.START_FAILED)
            raise
        guest.adopt(self.held.account(owner), self._journals)
        sandbox.set_timeout(timeout)
        sandbox.started(guest)
        return sandbox

    async def _room_for(self, owner: str) -> None:
        """Return when the owner may have one more sandbox. Machines that are just ending are waited for.

        Raises:
            Draining: the server is going down.
            TooManyRequests: the owner has `per_owner` already.
            HostFull: there are `maximum` already.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(ROOM_LIMIT):
                while self._refusal(owner) and any(each.state in ENDED for each in self._places):
                    self._place_is_free.clear()
                    await self._place_is_free.wait()
        if refusal := self._refusal(owner):
            raise refusal

    def places_of(self, owner: str) -> int:
        """Number of places that an owner's sandboxes take, those included that are starting or ending."""
        return sum(each.owner == owner for each in self._places)

    def _refusal(self, owner: str) -> CellvmError | None:
        if self.is_draining:
            return Draining("the server is going down")
        if self.places_of(owner) >= self.per_owner < self.maximum:
            return TooManyRequests(f"your key may have {self.per_owner} sandboxes at once", hint="delete one")
        if len(self._places) >= self.maximum:
            return HostFull(f"all {self.maximum} sandboxes of this server are in use", hint="delete one, or wait")
        return None

    async def _start_guest(self, sandbox: Sandbox) -> Guest:
        """A guest from the pool, or else from a restore. If a machine fails the handshake, another is tried."""
        env = {**sandbox.env, "E2B_SANDBOX_ID": sandbox.id, "E2B_TEMPLATE_ID": sandbox.template.id}
        pool = self.pools.get(sandbox.template.id)
        began = time.monotonic()
        for attempt in range(START_ATTEMPTS):
            try:
                in_stock = await pool.take() if pool else None
                guest = in_stock or await self._guests.start(sandbox.template.id)
                try:
                    if sandbox.policy != DEFAULT_POLICY:  # every filter begins with the default
                        await self._enforce(guest, sandbox.policy)
                    await self._guests.resume(guest, sandbox_id=sandbox.id, hostname=sandbox.id, env=env)
                except BaseException:
                    await guest.kill()
                    raise
                path = "pool" if in_stock else "restore"
                self.metrics.creates.labels(sandbox.template.id, path).observe(time.monotonic() - began)
                return guest
            except (DriverError, CellvmError) as error:
                self.metrics.failed_starts.labels(sandbox.template.id).inc()
                log.error("sandbox %s: start %d failed: %.500s", sandbox.id, attempt + 1, error)
        raise HostFull("no machine could be started for the sandbox", hint="the server's log says why")

    def _check_enforceable(self, policy: Policy) -> None:
        if policy.restricts and self.capabilities.network == "host":
            raise Unavailable(
                "this server can't restrict what sandboxes reach: they are not isolated and use the host's own network",
                hint="run it with another --isolation",
            )

    async def _enforce(self, guest: Guest, policy: Policy) -> None:
        """Put the policy into the guest's filter.

        Raises:
            DriverError: the filter did not take the policy.
        """
        between = filter_of(guest.vm)
        if between is not None:
            try:
                await between.apply(policy)
            except OSError as error:
                raise DriverError(f"the filter could not be reached: {error}") from error
        elif policy.restricts and self.capabilities.network != "off":
            raise DriverError("the machine has no filter")

    async def set_policy(self, sandbox: Sandbox, policy: Policy, ports_open: bool | None = None) -> None:
        """Replace the policy of a running sandbox. This is done to its end, even if the client has gone.

        Args:
            ports_open: open all its ports to everybody, or close them; None leaves them.

        Raises:
            Unavailable: this server can't enforce the policy.
            Conflict, SandboxDied: the sandbox is not running.
            GuestFailure: the policy could not be applied; the old one is still in force.
        """
        self._check_enforceable(policy)
        replacing = asyncio.create_task(self._replace_policy(sandbox, policy, ports_open))
        self._replacing.add(replacing)
        replacing.add_done_callback(self._replacing.discard)
        await to_its_end(replacing)

    async def _replace_policy(self, sandbox: Sandbox, policy: Policy, ports_open: bool | None) -> None:
        async with sandbox.applying:
            guest = sandbox.guest
            try:
                await self._enforce(guest, policy)
            except (DriverError, CellvmError) as error:
                log.error("sandbox %s: the policy could not be applied: %.500s", sandbox.id, error)
                _ = sandbox.guest  # raises if the sandbox has ended
                message = "the network policy could not be applied; the one before is still in force"
                raise GuestFailure("failed", message) from error
            sandbox.policy = policy
            self.changed(sandbox, {"reason": "network"})
            if ports_open is not None:
                sandbox.open_all_ports(ports_open)

    async def refusals(self, sandbox: Sandbox) -> list[Refusal]:
        """The destinations that were refused to the sandbox, newest first.

        Raises:
            Conflict, SandboxDied: the sandbox is not running.
            GuestFailure: the refusals can't be read now.
        """
        between = filter_of(sandbox.guest.vm)
        if between is None:
            return []
        try:
            return await between.refusals()
        except (DriverError, OSError) as error:
            log.error("sandbox %s: refusals can't be read: %.500s", sandbox.id, error)
            _ = sandbox.guest
            raise GuestFailure("failed", "the refusals can't be read now") from error

    def get(self, owner: str, sandbox_id: str) -> Sandbox:
        """The owner's sandbox of that id.

        Raises:
            InvalidRequest: no sandbox can have such an id.
            NotFound: no sandbox has it, or somebody else's does.
        """
        if not LEGAL_ID.fullmatch(sandbox_id):
            raise InvalidRequest("a sandbox id is made of letters and digits")
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is not None and sandbox.owner == owner:
            return sandbox
        end = self._store.end_of(sandbox_id, owner)
        raise NotFound("sandbox not found", hint=end and f"it ended {time.time() - end[0]:.0f} s ago: {end[1]}")

    def find(self, sandbox_id: str) -> Sandbox | None:
        """The sandbox of that id, whoever owns it. The caller must check what its client may do."""
        return self._sandboxes.get(sandbox_id)

    def list(self, owner: str) -> "list[Sandbox]":
        """The owner's sandboxes, newest first."""
        mine = [sandbox for sandbox in self._sandboxes.values() if sandbox.owner == owner]
        return sorted(mine, key=lambda sandbox: sandbox.started_at, reverse=True)

    def changed(self, sandbox: Sandbox, data: Mapping[str, object]) -> None:
        """Let an event tell that the owner has changed a sandbox's settings."""
        self._store.sandbox_changed("updated", sandbox.owner, sandbox.id, sandbox.template.id, data)

    async def kill(self, sandbox: Sandbox) -> None:
        """End a sandbox, and return when its machine is gone."""
        sandbox.apply(Event.KILL)
        await sandbox.gone()

    def _ended(self, sandbox: Sandbox, reason: str) -> None:
        self._store.sandbox_ended(sandbox.id, sandbox.owner, sandbox.template.id, reason)
        self.metrics.ends.labels(str(reason)).inc()
        del self._sandboxes[sandbox.id]

    def _gone(self, sandbox: Sandbox) -> None:
        self._places.discard(sandbox)
        self._place_is_free.set()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._check_deadlines()
            self._make_room()

    def _check_deadlines(self) -> None:
        for sandbox in list(self._sandboxes.values()):
            sandbox.check_deadline()
