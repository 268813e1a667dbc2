"""All sandboxes of the server: create, find, list, end. Every look-up but `find` is by owner and id."""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from kernel_gateway.drivers import DriverError
from kernel_gateway.errors import (
    CellvmError,
    Conflict,
    GuestFailure,
    HostFull,
    InvalidRequest,
    NotFound,
)
from kernel_gateway.guest.guest import Guest, Guests, Still
from kernel_gateway.held import Held
from kernel_gateway.images.preparation import Preparation
from kernel_gateway.images.templates import Template, Templates
from kernel_gateway.metrics import Metrics
from kernel_gateway.network.policy import Floor, Policy, Refusal
from kernel_gateway.rate import Rate
from kernel_gateway.sandbox.builds import Builds
from kernel_gateway.sandbox.checkpoints import Checkpoints
from kernel_gateway.sandbox.lifecycle import ENDED, Event, State
from kernel_gateway.sandbox.machines import DEFAULT_POLICY, Machines, saving
from kernel_gateway.sandbox.pauses import Pauses
from kernel_gateway.sandbox.places import Places
from kernel_gateway.sandbox.pool import Pool
from kernel_gateway.sandbox.record import paused_sandbox
from kernel_gateway.sandbox.sandbox import Sandbox, filter_of, new_id
from kernel_gateway.sandbox.shelf import Shelf
from kernel_gateway.sandbox.snapshots import Snapshot, Snapshots
from kernel_gateway.sandbox.store import Store
from kernel_gateway.sandbox.uploads import Uploads
from kernel_gateway.tasks import to_its_end

log = logging.getLogger(__name__)

LEGAL_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
TICK = 0.25
"""Seconds between looks at the lifetimes. A sandbox ends at most this long after its deadline."""
PAUSE = 1.0
"""Seconds after which a task that must live is started again."""
FLUSH_LIMIT = 5.0
"""Seconds that a server which goes down waits for the database to take the ends of its sandboxes."""


STARTS_AT_ONCE = 2
"""Children of one fork that are started at the same time."""
NOTHING: Mapping[str, object] = {}


class Network(Protocol):
    """The common part of all sandboxes' networks: their mechanism, and the addresses that none of them reaches."""

    @property
    def mechanism(self) -> str: ...

    @property
    def floor(self) -> Floor: ...


async def supervised(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run a task that must live until it is cancelled. If it fails, it is started again, and the log says so."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("%s failed and is started again", name)
        await asyncio.sleep(PAUSE)


class Sandboxes:
    """The collection. `places` says how many there may be.

    A request may let a sandbox live `max_timeout` seconds from then on, and as often as it likes.
    `held` counts what waits in the server for each owner, and one owner creates `creates_per_minute` sandboxes at most.
    `metrics` counts creates and ends. `network` is None if machines have no network card. `pauses` lets sandboxes go to
    disk and come back, and `checkpoints` lets them go back to what they were.

    Args:
        maximum, per_owner: as of `Places`.
        journals: the directory for kernels' output that memory does not hold. It is on the disk that sandboxes use.
        preparation: None if every template is ready from the start.
        paused: the directory of paused sandboxes; None if none can be paused. An owner may have `max_paused` of them.
        snapshots: the same for snapshots, of which an owner may have `max_snapshots`.
        checkpoints: the same for checkpoints. Those of one sandbox may take `checkpoint_bytes` of disk.
        pause_at_close: sandboxes that run are paused when the server goes down, as far as they can be.
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
        max_timeout: int = 3600,
        journals: Path | None = None,
        held: Held | None = None,
        creates_per_minute: int = 600,
        metrics: Metrics | None = None,
        network: Network | None = None,
        preparation: Preparation | None = None,
        paused: Path | None = None,
        max_paused: int = 100,
        snapshots: Path | None = None,
        max_snapshots: int = 100,
        checkpoints: Path | None = None,
        checkpoint_bytes: int = 2 << 30,
        pause_at_close: bool = False,
    ) -> None:
        self.templates = templates
        self.pools = pools
        self.capabilities = guests.capabilities
        self.network = network
        self.max_timeout = max_timeout
        self.held = held or Held()
        self.metrics = metrics or Metrics()
        self.creates = Rate(creates_per_minute)
        self.places = Places(maximum, per_owner, journals)
        self._store = store
        self._sandboxes: dict[str, Sandbox] = {}
        self._machines = Machines(guests, pools, templates, self.held, self.metrics, journals, preparation)
        folders = (paused, snapshots, checkpoints)
        shelves = [None if each is None or not guests.can_save else Shelf(each) for each in folders]
        self.pauses = Pauses(self._sandboxes, self.places, self._machines, store, shelves[0], max_paused)
        self.snapshots = Snapshots(self.places, self._machines, store, shelves[1], max_snapshots)
        self.checkpoints = Checkpoints(self.places, self._machines, store, shelves[2], checkpoint_bytes)
        uploads = Uploads(self.places, journals)
        self.builds = Builds(self.create, self.kill, self.snapshots, uploads, store, self.held)
        self._pause_at_close = pause_at_close
        self._make = partial(
            Sandbox,
            ended=self._ended,
            vacated=self.places.free,
            discard=self._discard,
            cell_ended=self.checkpoints.cell_ended,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._beside: set[asyncio.Task[Any]] = set()
        self.started_at = time.time()

    def __repr__(self) -> str:
        return f"<Sandboxes {len(self)} of {self.places!r}>"

    def __len__(self) -> int:
        return len(self._sandboxes)

    def __iter__(self) -> Iterator[Sandbox]:
        return iter([*self._sandboxes.values()])

    @property
    def trouble(self) -> str:
        """What is amiss with the server; empty if nothing is."""
        return self._store.trouble or self.places.lack_of_space()

    def start(self) -> None:
        """Find what earlier servers have kept, and begin to fill pools and to watch lifetimes."""
        floor = Floor() if self.network is None else self.network.floor
        for sandbox_id, record in self.pauses.found().items():
            self._sandboxes[sandbox_id] = paused_sandbox(self._make, sandbox_id, record, floor)
        self.checkpoints.sweep(self)
        self.snapshots.load()
        self.builds.load()
        self._tasks = [asyncio.create_task(supervised(repr(pool), pool.run)) for pool in self.pools.values()]
        self._tasks.append(asyncio.create_task(supervised("the watch over lifetimes", self._expire)))

    async def close(self) -> None:
        """End everything."""
        self.places.is_draining = True
        for task in self._tasks:
            task.cancel()
        await self.builds.close()
        await self.pauses.close(pause_all=self._pause_at_close)
        ending = [sandbox for sandbox in self.places if sandbox.state is not State.PAUSED]
        for sandbox in ending:
            sandbox.apply(Event.SERVER_STOPPED)
        await asyncio.gather(*(sandbox.gone() for sandbox in ending if sandbox.state in ENDED))
        await asyncio.gather(*self._tasks, *self._beside, return_exceptions=True)
        await self.pauses.settled()
        await self.snapshots.close()
        await self.checkpoints.close()
        for sandbox in self:
            await sandbox.vacated()
            if sandbox.work is not None:
                await asyncio.wait({sandbox.work})
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
        auto_pause: bool = False,
        auto_resume: bool = False,
        checkpoints: bool = False,
        snapshot: Snapshot | None = None,
    ) -> Sandbox:
        """A new, running sandbox. It never runs with another policy than `policy`.

        Args:
            auto_pause: pause it when its lifetime is over.
            auto_resume: let any request wake it when it is paused.
            checkpoints: take one after each cell.
            snapshot: what it starts from, in place of the template as it was made.

        Raises:
            TooManyRequests: the owner has `per_owner` already, or has created as many in this minute as one may.
            HostFull: there are `maximum` already, or no machine could be started, or it can't be written down.
            TemplateNotReady: the template is still being built.
            Draining: the server is going down.
            Unavailable: this server can't enforce the policy, or can't pause sandboxes or take checkpoints.
            NotFound, Corrupt, Incompatible: the snapshot was deleted, is damaged, or does not fit this host.
        """
        self._machines.check_enforceable(policy)
        if auto_pause or auto_resume:
            self.pauses.check_offered()
        if checkpoints:
            self.checkpoints.check_offered()
        await self._admit(owner, template)
        sandbox = self._make(
            new_id(),
            owner,
            template,
            timeout=timeout,
            metadata=metadata,
            env=env,
            policy=policy,
            idle_timeout=idle_timeout,
            longest_life=longest_life,
            auto_pause=auto_pause,
            auto_resume=auto_resume,
        )
        sandbox.timeline.is_automatic = checkpoints
        self._begin(sandbox)
        if snapshot is None:
            return await self._start(sandbox, self._machines.fresh)
        sandbox.defaults = snapshot.defaults
        return await self._start(sandbox, partial(self._from_snapshot, snapshot), {"snapshotID": snapshot.id})

    async def fork(self, sandbox: Sandbox, count: int, timeout: int | None = None) -> "list[Sandbox | CellvmError]":
        """That many copies of a running sandbox, each with an identity of its own, or why one could not be started.

        This is done to its end, even if the client has gone.

        Args:
            timeout: seconds of their lifetimes; None for as many as the sandbox was created with.

        Raises:
            Unavailable: machines of this server can't be copied.
            Conflict, SandboxDied: the sandbox is not running.
            TooManyRequests, HostFull, Draining: there is no room for all of them.
            InsufficientStorage: the disk has no room.
            CellvmError: the sandbox could not be captured.
        """
        self.pauses.check_offered()
        guest = sandbox.guest
        await self._admit(sandbox.owner, sandbox.template, count)
        children = [self._child(sandbox, timeout) for _ in range(count)]
        forking = asyncio.create_task(self._fork(sandbox, guest, children))
        self._keep(forking)
        return await to_its_end(forking)

    def _child(self, parent: Sandbox, timeout: int | None) -> Sandbox:
        """A copy of a sandbox, which has no machine yet."""
        child = self._make(
            new_id(),
            parent.owner,
            parent.template,
            timeout=parent.timeout if timeout is None else timeout,
            metadata=parent.metadata,
            env=parent.env,
            policy=parent.policy,
            idle_timeout=parent.idle_timeout,
            longest_life=parent.life_left,
            auto_pause=parent.auto_pause,
            auto_resume=parent.auto_resume,
        )
        child.open_ports, child.all_ports_open = set(parent.open_ports), parent.all_ports_open
        child.kernel_name, child.defaults = parent.kernel_name, parent.defaults
        child.timeline.is_automatic = parent.timeline.is_automatic
        self._begin(child)
        return child

    async def _fork(self, parent: Sandbox, guest: Guest, children: "list[Sandbox]") -> "list[Sandbox | CellvmError]":
        turns = asyncio.Semaphore(STARTS_AT_ONCE)

        async def start(child: Sandbox, still: Still) -> Sandbox | CellvmError:
            async with turns:
                try:
                    return await self._start(child, partial(self._machines.copy, source=still), {"parent": parent.id})
                except CellvmError as error:
                    return error

        try:
            with saving(parent, "forked"):
                async with self._machines.guests.still(guest, goes_on=True) as still:
                    pass
        except BaseException:
            for child in children:
                child.apply(Event.START_FAILED)
            raise
        try:
            return await asyncio.gather(*(start(child, still) for child in children))
        finally:
            still.close()

    async def _from_snapshot(self, snapshot: Snapshot, sandbox: Sandbox) -> Guest:
        async with self.snapshots.used(snapshot) as directory:
            return await self._machines.copy(sandbox, directory)

    async def _admit(self, owner: str, template: Template, count: int = 1) -> None:
        """Return when the owner may create that many sandboxes of a template.

        Raises:
            CellvmError: as `create`.
        """
        for _ in range(count):
            self.creates.count(owner, "sandboxes", time.monotonic())
        await self._machines.require(template)
        await self.places.room(owner, count)
        if lack := self.places.lack_of_space():
            raise HostFull(lack, hint="the operator must free some space")

    def _begin(self, sandbox: Sandbox) -> None:
        """Take in a sandbox that was admitted in this same turn."""
        self._sandboxes[sandbox.id] = sandbox
        self.places.take(sandbox)

    async def _start(
        self, sandbox: Sandbox, start: Callable[[Sandbox], Awaitable[Guest]], data: Mapping[str, object] = NOTHING
    ) -> Sandbox:
        """Write a new sandbox down, and let it run.

        Args:
            start: gives it its guest.
            data: what its first event tells besides.
        """
        try:
            await self._store.sandbox_created(sandbox.id, sandbox.owner, sandbox.template.id, data)
            guest = await start(sandbox)
            if sandbox.state is not State.CREATING:
                await guest.kill()
                raise Conflict("the sandbox was ended while it was being created")
        except BaseException:
            sandbox.apply(Event.START_FAILED)
            raise
        sandbox.set_timeout(sandbox.timeout)
        sandbox.started(guest)
        return sandbox

    async def set_policy(self, sandbox: Sandbox, policy: Policy, ports_open: bool | None = None) -> None:
        """Replace the policy of a running sandbox. This is done to its end, even if the client has gone.

        Args:
            ports_open: open all its ports to everybody, or close them; None leaves them.

        Raises:
            Unavailable: this server can't enforce the policy.
            Conflict, SandboxDied: the sandbox is not running.
            GuestFailure: the policy could not be applied; the old one is still in force.
        """
        self._machines.check_enforceable(policy)
        replacing = asyncio.create_task(self._replace_policy(sandbox, policy, ports_open))
        self._keep(replacing)
        await to_its_end(replacing)

    async def _replace_policy(self, sandbox: Sandbox, policy: Policy, ports_open: bool | None) -> None:
        async with sandbox.applying:
            guest = sandbox.guest
            try:
                await self._machines.enforce(guest.vm, policy)
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

    async def _discard(self, sandbox: Sandbox) -> None:
        """Delete the files of a sandbox that has ended."""
        await self.pauses.discard(sandbox)
        await self.checkpoints.discard(sandbox)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._check_deadlines()
            self.builds.expire()
            self.places.make_room()

    def _check_deadlines(self) -> None:
        for sandbox in list(self._sandboxes.values()):
            if sandbox.is_over():
                self.pauses.expired(sandbox)
