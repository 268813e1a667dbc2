"""All sandboxes of the server: create, find, list, pause, end. Every look-up but `find` is by owner and id."""

import asyncio
import logging
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from kernel_gateway import drivers
from kernel_gateway.drivers import DriverError, NoSpace, Vm
from kernel_gateway.errors import (
    CellvmError,
    Conflict,
    Corrupt,
    Draining,
    GuestFailure,
    HostFull,
    Incompatible,
    InsufficientStorage,
    InvalidRequest,
    NotFound,
    SandboxDied,
    TooManyRequests,
    Unavailable,
)
from kernel_gateway.guest.guest import Guest, Guests
from kernel_gateway.held import Held
from kernel_gateway.images.preparation import Preparation
from kernel_gateway.images.templates import Template, Templates
from kernel_gateway.metrics import Metrics
from kernel_gateway.network.policy import Floor, Policy, Refusal, parse_policy
from kernel_gateway.rate import Rate
from kernel_gateway.sandbox.lifecycle import ASLEEP, ENDED, Event, State
from kernel_gateway.sandbox.pool import Pool
from kernel_gateway.sandbox.record import Record, record_of
from kernel_gateway.sandbox.sandbox import Sandbox, filter_of, new_id
from kernel_gateway.sandbox.shelf import Shelf
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
PAUSE_TRIES, PAUSE_AGAIN = 10, 30.0
"""A pause at the end of a lifetime that fails is tried again so many times, after so many seconds each. Then the
sandbox is ended."""
PAUSES_AT_ONCE = 2
STOP_LIMIT = 15.0
"""Seconds in which a server that goes down pauses its sandboxes. Those that are not paused by then are ended."""
AUTO_RESUME_LIFE = 300
"""Seconds that a sandbox lives at least after a request has woken it."""

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
    `paused` is the directory of paused sandboxes; None if none can be paused. An owner may have `max_paused` of them.
    With `pause_at_close` sandboxes that run are paused when the server goes down, as far as they can be.
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
        paused: Path | None = None,
        max_paused: int = 100,
        pause_at_close: bool = False,
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
        self._shelf = None if paused is None or not guests.can_save else Shelf(paused)
        self.max_paused = max_paused
        self._pause_at_close = pause_at_close
        self.held = held or Held()
        self.creates = Rate(creates_per_minute)
        self.metrics = metrics or Metrics()
        self._sandboxes: dict[str, Sandbox] = {}
        self._places: set[Sandbox] = set()
        self._place_is_free = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._beside: set[asyncio.Task[None]] = set()
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
        """Find the paused sandboxes, and begin to fill pools and to watch lifetimes."""
        if self._shelf is not None:
            self._find_paused(self._shelf)
        self._tasks = [asyncio.create_task(supervised(repr(pool), pool.run)) for pool in self.pools.values()]
        self._tasks.append(asyncio.create_task(supervised("the watch over lifetimes", self._expire)))

    async def close(self) -> None:
        """End everything."""
        self.is_draining = True
        for task in self._tasks:
            task.cancel()
        for sandbox in self._places:
            if sandbox.state is State.RESUMING and sandbox.work is not None:
                sandbox.work.cancel()  # it is paused again then
        if self._pause_at_close and self._shelf is not None:
            await self._pause_all()
        ending = [sandbox for sandbox in self._places if sandbox.state is not State.PAUSED]
        for sandbox in ending:
            sandbox.apply(Event.SERVER_STOPPED)
        await asyncio.gather(*(sandbox.gone() for sandbox in ending if sandbox.state in ENDED))
        await asyncio.gather(*self._tasks, *self._beside, return_exceptions=True)
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
    ) -> Sandbox:
        """A new, running sandbox. It never runs with another policy than `policy`.

        Args:
            auto_pause: pause it when its lifetime is over.
            auto_resume: let any request wake it when it is paused.

        Raises:
            TooManyRequests: the owner has `per_owner` already, or has created as many in this minute as one may.
            HostFull: there are `maximum` already, or no machine could be started, or it can't be written down.
            TemplateNotReady: the template is still being built.
            Draining: the server is going down.
            Unavailable: this server can't enforce the policy, or can't pause sandboxes.
        """
        self._check_enforceable(policy)
        if auto_pause or auto_resume:
            self._check_can_pause()
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
            auto_pause=auto_pause,
            auto_resume=auto_resume,
            ended=self._ended,
            vacated=self._vacated,
            discard=self._discard,
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
                        await self._enforce(guest.vm, sandbox.policy)
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

    async def _enforce(self, vm: Vm, policy: Policy) -> None:
        """Put the policy into the machine's filter.

        Raises:
            DriverError: the filter did not take the policy.
        """
        between = filter_of(vm)
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
        self._keep(replacing)
        await to_its_end(replacing)

    async def _replace_policy(self, sandbox: Sandbox, policy: Policy, ports_open: bool | None) -> None:
        async with sandbox.applying:
            guest = sandbox.guest
            try:
                await self._enforce(guest.vm, policy)
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

    def _vacated(self, sandbox: Sandbox) -> None:
        self._places.discard(sandbox)
        self._place_is_free.set()

    async def _discard(self, sandbox: Sandbox) -> None:
        if self._shelf is not None:
            await self._shelf.discard(sandbox.id)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    # -- pauses

    def _check_can_pause(self) -> Shelf:
        if self._shelf is None:
            raise Unavailable(
                f"this server can't pause sandboxes: they run on {self.capabilities.accelerator} without a machine "
                "that could be saved",
                hint="run it with another --isolation",
            )
        return self._shelf

    @property
    def can_pause(self) -> bool:
        """Whether sandboxes can be paused here."""
        return self._shelf is not None

    def paused_of(self, owner: str) -> int:
        """Number of an owner's sandboxes that are paused, or on their way to a pause or back."""
        return sum(each.owner == owner and each.state in ASLEEP for each in self._sandboxes.values())

    async def pause(self, sandbox: Sandbox) -> None:
        """Save a running sandbox to disk, and end its machine. This is done to its end, even if the client has gone.

        Raises:
            Unavailable: this server can't pause sandboxes.
            TooManyRequests: the owner has `max_paused` already.
            Conflict: the sandbox is not running.
            InsufficientStorage: the disk has no room. The sandbox still runs.
            CellvmError: it could not be saved, and still runs, or has ended meanwhile.
        """
        await self._done(sandbox, self._begin_pause(sandbox))
        await sandbox.vacated()

    def _begin_pause(self, sandbox: Sandbox) -> asyncio.Task[None]:
        shelf = self._check_can_pause()
        if sandbox.state is State.RUNNING and self.paused_of(sandbox.owner) >= self.max_paused:
            raise TooManyRequests(
                f"your key may have {self.max_paused} paused sandboxes",
                hint="delete one; the operator sets the limit with --max-paused-per-key",
            )
        guest = sandbox.guest if sandbox.state not in ASLEEP else None
        sandbox.apply(Event.PAUSE)
        assert guest is not None  # a sandbox that sleeps has refused
        sandbox.work = asyncio.create_task(self._pause(sandbox, guest, shelf))
        return sandbox.work

    async def _pause(self, sandbox: Sandbox, guest: Guest, shelf: Shelf) -> None:
        try:
            for client in list(guest.kernel.clients):
                client.leave()
            async with shelf.filled(sandbox.id) as directory, self._guests.saved(guest, directory):
                self._check_room_for_pause()
                try:
                    await shelf.put(directory, sandbox.id)
                    await self._store.sandbox_paused(sandbox.id, record_of(sandbox))
                except BaseException:
                    await shelf.discard(sandbox.id)
                    raise
                sandbox.has_files = True
                sandbox.apply(Event.SAVED)
        except NoSpace as error:
            hint = "the operator must free some space; the sandbox still runs"
            raise InsufficientStorage(f"the sandbox can't be paused: {error}", hint=hint) from error
        except (DriverError, OSError) as error:
            log.error("sandbox %s could not be paused: %.500s", sandbox.id, error)
            raise GuestFailure(
                "failed", "the sandbox could not be paused, and still runs; the server's log says why"
            ) from error
        finally:
            sandbox.apply(Event.PAUSE_FAILED)

    def _check_room_for_pause(self) -> None:
        """See that the files leave room for the sandboxes that run.

        Raises:
            NoSpace: one of them would soon be ended for want of space.
        """
        free, floor = self._space()
        if free < floor // 2:
            raise NoSpace(f"it would leave {free >> 20} MiB of the server's disk, and running sandboxes need more")

    async def resume(self, sandbox: Sandbox, timeout: float | None = None) -> bool:
        """Let a paused sandbox go on, and return whether it was paused. One that runs lives at least `timeout` seconds.

        All who ask at the same time share one resume.

        Args:
            timeout: seconds of its lifetime from now on; None for as many as it was created with.

        Raises:
            HostFull, TooManyRequests, Draining, TemplateNotReady: as `create`. In these cases, and those that follow,
                the sandbox stays paused.
            Corrupt: its files are damaged.
            Incompatible: it can't go on with this host, or with this template.
            Conflict, SandboxDied: it is being created, or has ended.
        """
        was_paused = False
        while sandbox.state in ASLEEP:
            if sandbox.state is State.PAUSED:
                sandbox.apply(Event.RESUME)
                sandbox.work = asyncio.create_task(self._resume(sandbox, timeout))
            is_pause = sandbox.state is State.PAUSING
            assert sandbox.work is not None
            try:
                await self._done(sandbox, sandbox.work)
            except CellvmError:
                if not is_pause:
                    raise
            was_paused = was_paused or not is_pause
        _ = sandbox.guest  # raises if it is not running
        if timeout is not None:
            sandbox.extend(timeout)
        return was_paused

    async def wake(self, sandbox: Sandbox) -> None:
        """Resume a sandbox for a request that has met it paused, if it asked for that.

        Raises:
            Asleep: it did not.
            CellvmError: as `resume`.
        """
        if not (sandbox.auto_resume or sandbox.was_stopped):
            _ = sandbox.guest
        await self.resume(sandbox, max(sandbox.timeout, AUTO_RESUME_LIFE))

    async def _resume(self, sandbox: Sandbox, timeout: float | None) -> None:
        shelf = self._check_can_pause()
        try:
            if self._preparation is not None and self.templates.find(sandbox.template.id) is not None:
                await self._preparation.require(sandbox.template)
            await sandbox.vacated()
            await self._room_for(sandbox.owner)
            self._places.add(sandbox)
            guest = await self._restored(sandbox, shelf)
            try:
                await self._store.sandbox_paused(sandbox.id, None)
            except BaseException:
                await guest.kill()
                # The write may still come to pass, and this one comes after it.
                self._keep(asyncio.create_task(self._store_again(sandbox)))
                raise
            if sandbox.state is not State.RESUMING:
                await guest.kill()
                raise SandboxDied("the sandbox was ended while it was resumed")
            sandbox.set_timeout(sandbox.timeout if timeout is None else timeout)
            sandbox.pauses_failed, sandbox.was_stopped = 0, False
            sandbox.has_files = False
            sandbox.started(guest, Event.RESUMED)
            self._keep(asyncio.create_task(shelf.discard(sandbox.id)))
        finally:
            if sandbox.state is State.RESUMING:
                self._vacated(sandbox)
                sandbox.apply(Event.RESUME_FAILED)

    async def _restored(self, sandbox: Sandbox, shelf: Shelf) -> Guest:
        async def enforce(vm: Vm) -> None:
            if sandbox.policy != DEFAULT_POLICY:
                await self._enforce(vm, sandbox.policy)

        account = self.held.account(sandbox.owner)
        try:
            return await self._guests.restore(shelf.path(sandbox.id), account, self._journals, enforce)
        except drivers.Damaged as error:
            log.error("sandbox %s can't be resumed: %s", sandbox.id, error)
            what = "the files of the paused sandbox are damaged, and it can't be resumed"
            raise Corrupt(
                what, hint="the server's log names the file; restore it from a copy, or delete the sandbox"
            ) from error
        except drivers.Incompatible as error:
            hint = "resume it where it was paused, or delete it"
            raise Incompatible(f"the sandbox can't be resumed here: {error}", hint=hint) from error
        except (DriverError, OSError) as error:
            log.error("sandbox %s could not be resumed: %.500s", sandbox.id, error)
            raise HostFull("no machine could be started for the sandbox", hint="the server's log says why") from error

    async def _store_again(self, sandbox: Sandbox) -> None:
        with suppress(HostFull):
            if sandbox.state is State.PAUSED:
                await self._store.sandbox_paused(sandbox.id, record_of(sandbox))

    async def _done(self, sandbox: Sandbox, work: asyncio.Task[None]) -> None:
        """Return when a pause or resume is done, which goes on even if nobody waits for it any more."""
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({work})
        if work.cancelled():
            raise (
                SandboxDied("the sandbox has ended") if sandbox.state in ENDED else Draining("the server is going down")
            )
        work.result()

    async def _pause_all(self) -> None:
        """Pause all that run, some at a time, as long as there is time."""
        turns = asyncio.Semaphore(PAUSES_AT_ONCE)

        async def pause(sandbox: Sandbox) -> None:
            async with turns:
                if sandbox.state is State.PAUSING and sandbox.work is not None:
                    await asyncio.wait({sandbox.work})
                elif sandbox.state is State.RUNNING:
                    sandbox.was_stopped = True
                    try:
                        await self.pause(sandbox)
                    except CellvmError as error:
                        log.error("sandbox %s is ended, because it could not be paused: %s", sandbox.id, error)

        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_LIMIT):
                await asyncio.gather(*(pause(sandbox) for sandbox in list(self._places)))

    def _find_paused(self, shelf: Shelf) -> None:
        """Take in the sandboxes that earlier servers have paused."""
        records = self._store.paused()
        shelf.sweep(records.keys())
        for sandbox_id, text in records.items():
            try:
                record = msgspec.json.decode(text, type=Record)
            except msgspec.MsgspecError as error:  # a later version's; its server may come back
                log.error("paused sandbox %s can't be read, and is left as it is: %s", sandbox_id, error)
                continue
            if not shelf.path(sandbox_id).is_dir():
                log.error("sandbox %s was paused, and its files are gone", sandbox_id)
                self._store.sandbox_ended(sandbox_id, record.owner, record.template.id, "files_lost")
                continue
            self._sandboxes[sandbox_id] = self._paused_sandbox(sandbox_id, record)

    def _policy_of(self, sandbox_id: str, record: Record) -> Policy:
        """The policy of a paused sandbox. One that this server's floor does not allow any more becomes no internet."""
        try:
            return parse_policy(
                allow_internet=record.allow_internet,
                allow_out=record.allow_out,
                deny_out=record.deny_out,
                floor=Floor() if self.network is None else self.network.floor,
            )
        except CellvmError as error:
            log.error(
                "paused sandbox %s gets no internet, because its policy is not allowed here: %s", sandbox_id, error
            )
            return Policy(allow_internet=False)

    def _paused_sandbox(self, sandbox_id: str, record: Record) -> Sandbox:
        sandbox = Sandbox(
            sandbox_id,
            record.owner,
            record.template,
            timeout=record.timeout,
            metadata=record.metadata,
            env=record.env,
            policy=self._policy_of(sandbox_id, record),
            idle_timeout=record.idle_timeout,
            longest_life=record.longest_life,
            auto_pause=record.auto_pause,
            auto_resume=record.auto_resume,
            state=State.PAUSED,
            ended=self._ended,
            vacated=self._vacated,
            discard=self._discard,
        )
        sandbox.open_ports, sandbox.all_ports_open = record.open_ports, record.all_ports_open
        sandbox.kernel_name, sandbox.was_stopped = record.kernel_name, record.was_stopped
        if record.access_token:  # records of earlier servers have none
            sandbox.access_token, sandbox.traffic_token = record.access_token, record.traffic_token
        sandbox.started_at, sandbox.paused_at, sandbox.has_files = record.started_at, record.paused_at, True
        return sandbox

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._check_deadlines()
            self._make_room()

    def _check_deadlines(self) -> None:
        for sandbox in list(self._sandboxes.values()):
            if sandbox.is_over():
                self._expired(sandbox)

    def _expired(self, sandbox: Sandbox) -> None:
        """Pause a sandbox whose lifetime is over, if it asked for that, or end it."""
        if sandbox.auto_pause and sandbox.pauses_failed < PAUSE_TRIES:
            try:
                self._keep(asyncio.create_task(self._pause_expired(sandbox, self._begin_pause(sandbox))))
                return
            except CellvmError as error:
                log.error("sandbox %s is ended, because it can't be paused: %s", sandbox.id, error)
        sandbox.apply(Event.EXPIRED)

    async def _pause_expired(self, sandbox: Sandbox, work: asyncio.Task[None]) -> None:
        try:
            await self._done(sandbox, work)
        except CellvmError as error:
            log.error("sandbox %s could not be paused at its end: %s", sandbox.id, error)
            sandbox.pauses_failed += 1
            sandbox.set_timeout(PAUSE_AGAIN)
