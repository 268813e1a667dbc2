"""Pauses and resumes: sandboxes go to disk and come back, on request, at the end of a life, or with the server."""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress

from kernel_gateway.errors import CellvmError, HostFull, SandboxDied, TooManyRequests
from kernel_gateway.guest.guest import Guest
from kernel_gateway.sandbox.lifecycle import ASLEEP, Event, State
from kernel_gateway.sandbox.machines import Machines, saving
from kernel_gateway.sandbox.places import Places
from kernel_gateway.sandbox.record import Record, read_record, record_of
from kernel_gateway.sandbox.sandbox import Sandbox
from kernel_gateway.sandbox.shelf import Shelf, offered
from kernel_gateway.sandbox.store import Store

log = logging.getLogger(__name__)

PAUSE_TRIES, PAUSE_AGAIN = 10, 30.0
"""A pause at the end of a lifetime that fails is tried again so many times, after so many seconds each. Then the
sandbox is ended."""
PAUSES_AT_ONCE = 2
STOP_LIMIT = 15.0
"""Seconds in which a server that goes down pauses its sandboxes. Those that are not paused by then are ended."""
AUTO_RESUME_LIFE = 300
"""Seconds that a sandbox lives at least after a request has woken it."""


class Pauses:
    """The pauses of sandboxes. An owner may have `maximum` paused ones.

    Args:
        known: all sandboxes, by their ids.
        shelf: the folders of paused sandboxes; None if none can be paused.
    """

    def __init__(
        self,
        known: Mapping[str, Sandbox],
        places: Places,
        machines: Machines,
        store: Store,
        shelf: Shelf | None,
        maximum: int,
    ) -> None:
        self.maximum = maximum
        self._known = known
        self._places = places
        self._machines = machines
        self._store = store
        self._shelf = shelf
        self._beside: set[asyncio.Task[None]] = set()

    @property
    def is_offered(self) -> bool:
        """Whether sandboxes can be paused here."""
        return self._shelf is not None

    def check_offered(self) -> Shelf:
        """See that sandboxes can be paused here.

        Raises:
            Unavailable: they can't.
        """
        return offered(self._shelf, self._machines.capabilities, "pause sandboxes")

    def of(self, owner: str) -> int:
        """Number of an owner's sandboxes that are paused, or on their way to a pause or back."""
        return sum(each.owner == owner and each.state in ASLEEP for each in self._known.values())

    async def pause(self, sandbox: Sandbox) -> None:
        """Save a running sandbox to disk, and end its machine. This is done to its end, even if the client has gone.

        Raises:
            Unavailable: this server can't pause sandboxes.
            TooManyRequests: the owner has `maximum` already.
            Conflict: the sandbox is not running.
            InsufficientStorage: the disk has no room. The sandbox still runs.
            CellvmError: it could not be saved, and still runs, or has ended meanwhile.
        """
        await sandbox.done(self._begin_pause(sandbox))
        await sandbox.vacated()

    def _begin_pause(self, sandbox: Sandbox) -> asyncio.Task[None]:
        shelf = self.check_offered()
        if sandbox.state is State.RUNNING and self.of(sandbox.owner) >= self.maximum:
            raise TooManyRequests(
                f"your key may have {self.maximum} paused sandboxes",
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
            with saving(sandbox, "paused"):
                async with (
                    sandbox.checkpointing,
                    shelf.filled(sandbox.id) as directory,
                    self._machines.guests.still(guest, goes_on=False) as still,
                ):
                    await still.write(directory)
                    self._places.check_room_for_files()
                    try:
                        await shelf.put(directory, sandbox.id)
                        await self._store.sandbox_paused(sandbox.id, record_of(sandbox))
                    except BaseException:
                        await shelf.discard(sandbox.id)
                        raise
                    sandbox.has_files = True
                    sandbox.apply(Event.SAVED)
        finally:
            sandbox.apply(Event.PAUSE_FAILED)

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
                await sandbox.done(sandbox.work)
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
        shelf = self.check_offered()
        try:
            await self._machines.require(sandbox.template)
            await sandbox.vacated()
            await self._places.room(sandbox.owner)
            self._places.take(sandbox)
            guest = await self._machines.saved(sandbox, shelf.path(sandbox.id))
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
                self._places.free(sandbox)
                sandbox.apply(Event.RESUME_FAILED)

    async def _store_again(self, sandbox: Sandbox) -> None:
        with suppress(HostFull):
            if sandbox.state is State.PAUSED:
                await self._store.sandbox_paused(sandbox.id, record_of(sandbox))

    async def _pause_all(self) -> None:
        """Pause all that run, some at a time, as long as there is time."""
        turns = asyncio.Semaphore(PAUSES_AT_ONCE)

        async def pause(sandbox: Sandbox) -> None:
            async with turns:
                if sandbox.state in (State.PAUSING, State.RESTORING) and sandbox.work is not None:
                    await asyncio.wait({sandbox.work})
                if sandbox.state is State.RUNNING:
                    sandbox.was_stopped = True
                    try:
                        await self.pause(sandbox)
                    except CellvmError as error:
                        log.error("sandbox %s is ended, because it could not be paused: %s", sandbox.id, error)

        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_LIMIT):
                await asyncio.gather(*(pause(sandbox) for sandbox in self._places))

    def expired(self, sandbox: Sandbox) -> None:
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
            await sandbox.done(work)
        except CellvmError as error:
            log.error("sandbox %s could not be paused at its end: %s", sandbox.id, error)
            sandbox.pauses_failed += 1
            sandbox.set_timeout(PAUSE_AGAIN)

    # -- the server's own start and end

    def found(self) -> dict[str, Record]:
        """The sandboxes that earlier servers have paused, by their ids. What else is on the shelf is deleted."""
        if self._shelf is None:
            return {}
        records = self._store.paused()
        self._shelf.sweep(records.keys())
        found = {}
        for sandbox_id, text in records.items():
            record = read_record(f"paused sandbox {sandbox_id}", text)
            if record is None:
                continue
            if not self._shelf.path(sandbox_id).is_dir():
                log.error("sandbox %s was paused, and its files are gone", sandbox_id)
                self._store.sandbox_ended(sandbox_id, record.owner, record.template.id, "files_lost")
                continue
            found[sandbox_id] = record
        return found

    async def discard(self, sandbox: Sandbox) -> None:
        """Delete the files of a sandbox that has ended."""
        if sandbox.has_files:
            await self.check_offered().discard(sandbox.id)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def close(self, *, pause_all: bool) -> None:
        """Pause again what is being resumed, and all that run if they are to be kept."""
        for sandbox in self._places:
            if sandbox.state is State.RESUMING and sandbox.work is not None:
                sandbox.work.cancel()  # it is paused again then
        if pause_all and self._shelf is not None:
            await self._pause_all()

    async def settled(self) -> None:
        """Return when all that was begun is done."""
        await asyncio.gather(*self._beside, return_exceptions=True)
