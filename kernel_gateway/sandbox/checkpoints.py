"""Checkpoints: sandboxes as they stood, to which they go back as themselves (ADR 25).

A checkpoint is a capture on a shelf, as a snapshot is, without the kernel's messages, because the journal of a sandbox
that goes back goes on. All checkpoints of a sandbox stay within a budget of disk, and end with it.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from kernel_gateway.errors import CellvmError, InsufficientStorage, SandboxDied, SandboxRestored
from kernel_gateway.guest.guest import Guest
from kernel_gateway.images.cache import in_thread
from kernel_gateway.sandbox.lifecycle import ENDED, Event, State
from kernel_gateway.sandbox.machines import Machines, saving
from kernel_gateway.sandbox.places import Places
from kernel_gateway.sandbox.sandbox import Sandbox
from kernel_gateway.sandbox.shelf import Shelf, offered, size_of
from kernel_gateway.sandbox.store import Store
from kernel_gateway.sandbox.timeline import Checkpoint, Return
from kernel_gateway.tasks import to_its_end

log = logging.getLogger(__name__)

RESTORES_AT_ONCE = 2
"""Sandboxes of the server that go back at the same time, because each has two machines meanwhile."""


class Checkpoints:
    """The checkpoints of all sandboxes. Those of one sandbox may take `budget` bytes of disk.

    Args:
        shelf: their folders; None if machines can't be saved.
    """

    def __init__(self, places: Places, machines: Machines, store: Store, shelf: Shelf | None, budget: int) -> None:
        self.budget = budget
        self._places = places
        self._machines = machines
        self._store = store
        self._shelf = shelf
        self._turns = asyncio.Semaphore(RESTORES_AT_ONCE)
        self._due: set[Sandbox] = set()
        self._following: dict[Sandbox, asyncio.Task[None]] = {}
        self._waiting: dict[Sandbox, asyncio.Task[Checkpoint]] = {}
        self._tasks: set[asyncio.Task[Checkpoint]] = set()

    def check_offered(self) -> Shelf:
        """See that checkpoints can be taken here.

        Raises:
            Unavailable: they can't.
        """
        return offered(self._shelf, self._machines.capabilities, "take checkpoints of sandboxes")

    def sweep(self, sandboxes: Iterable[Sandbox]) -> None:
        """Delete all folders but those of these sandboxes, and of those that only a later version can read.

        A checkpoint whose folder is gone is taken for deleted.
        """
        if self._shelf is None:
            return
        found = {sandbox.id: sandbox for sandbox in sandboxes}
        known = {_name(sandbox, each.number): each for sandbox in found.values() for each in sandbox.timeline.kept}
        self._shelf.sweep(known.keys() | (self._store.paused().keys() - found.keys()))
        for name, checkpoint in known.items():
            if not self._shelf.path(name).is_dir():
                log.error("the files of checkpoint %s are gone", name)
                checkpoint.state = "deleted"

    async def take(self, sandbox: Sandbox) -> Checkpoint:
        """A new checkpoint of a running sandbox. This is done to its end, even if the client has gone.

        All who ask while another one is being taken share the next.

        Raises:
            Unavailable: machines of this server can't be saved.
            Conflict: the sandbox is not running.
            TooManyRequests: it has as many as it may have.
            InsufficientStorage: the budget or the disk has no room.
            CellvmError: the sandbox could not be captured, or has ended.
        """
        shelf = self.check_offered()
        _ = sandbox.guest  # raises if it is not running
        if sandbox not in self._waiting:
            task = self._waiting[sandbox] = asyncio.create_task(self._take(sandbox, shelf, is_automatic=False))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await to_its_end(self._waiting[sandbox])

    async def _take(self, sandbox: Sandbox, shelf: Shelf, *, is_automatic: bool) -> Checkpoint:
        async with sandbox.checkpointing:
            if not is_automatic:
                del self._waiting[sandbox]  # who asks from now on wants a later one
            guest, timeline = sandbox.guest, sandbox.timeline
            if lack := self._places.lack_of_space():
                raise InsufficientStorage(lack, hint="the operator must free some space; the sandbox still runs")
            timeline.in_the_way(0, self.budget)  # raises if one of any size has no room: no machine stops for nothing
            number = timeline.last + 1
            name = _name(sandbox, number)
            with saving(sandbox, "captured"):
                async with shelf.filled(name) as directory:
                    async with self._machines.guests.still(guest, goes_on=True, alone=True) as still:
                        at, cell = datetime.now(UTC), guest.kernel.history.last
                    try:
                        await self._make_room(sandbox, shelf, await still.size())
                        await still.write(directory)
                    finally:
                        still.close()
                    self._places.check_room_for_files()
                    size = await in_thread(size_of, directory)
                    try:
                        await shelf.put(directory, name)
                    except BaseException:
                        await shelf.discard(name)  # the next one gets the same number
                        raise
            timeline.last = number
            checkpoint = Checkpoint(number, at, size, cell, is_automatic)
            timeline.add(checkpoint)
        if sandbox.state in ENDED:  # whoever cleans up after it has waited for this
            raise SandboxDied("the sandbox has ended")
        self._tell(sandbox, "checkpoint", {"checkpoint": number, "bytes": size, "automatic": is_automatic})
        return checkpoint

    async def _make_room(self, sandbox: Sandbox, shelf: Shelf, size: int) -> None:
        """Thin out the checkpoints until there is room for one of that many bytes.

        Raises:
            TooManyRequests, InsufficientStorage: as `Timeline.in_the_way`.
        """
        going = sandbox.timeline.in_the_way(size, self.budget)
        for each in going:
            each.state = "thinned"
            await shelf.discard(_name(sandbox, each.number))
        if going:
            told = {"checkpoints": [each.number for each in going], "bytes": sum(each.size for each in going)}
            self._tell(sandbox, "checkpoints_thinned", told)

    def cell_ended(self, sandbox: Sandbox) -> None:
        """Take a checkpoint after a cell, if the sandbox asked for that. It begins before the next cell does.

        A cell that ends while a checkpoint is taken shares the next one, and so do cells that wait in the kernel.
        """
        if sandbox.timeline.is_automatic and sandbox.state is State.RUNNING:
            self._due.add(sandbox)
            if sandbox not in self._following:
                self._following[sandbox] = asyncio.create_task(self._follow(sandbox))

    async def _follow(self, sandbox: Sandbox) -> None:
        """Take checkpoints as long as one is due and no cell runs. The end of a cell that runs begins this anew."""
        shelf = self.check_offered()
        try:
            while sandbox in self._due and sandbox.kernel is not None and not sandbox.kernel.has_cells:
                self._due.discard(sandbox)
                await self._take(sandbox, shelf, is_automatic=True)
                sandbox.timeline.trouble = ""
        except CellvmError as error:
            if sandbox.state is State.RUNNING:
                sandbox.timeline.trouble = str(error)
                log.warning("sandbox %s has no checkpoint after a cell: %s", sandbox.id, error)
        finally:
            del self._following[sandbox]

    async def restore(self, sandbox: Sandbox, number: int) -> None:
        """Let a running sandbox go back to a checkpoint. This is done to its end, even if the client has gone.

        Its machine runs until the one of then has acknowledged the handshake.

        Raises:
            Unavailable: this server has no checkpoints.
            NotFound: the sandbox has no such checkpoint.
            Conflict: it is not running, or goes back already.
            Corrupt, Incompatible, HostFull: as a resume. The sandbox still runs.
            SandboxDied: it has ended meanwhile.
        """
        shelf = self.check_offered()
        sandbox.timeline.find(number)
        now = sandbox.guest  # raises if it is not running
        sandbox.apply(Event.RESTORE)
        sandbox.work = asyncio.create_task(self._restore(sandbox, now, number, shelf))
        await sandbox.done(sandbox.work)

    async def _restore(self, sandbox: Sandbox, now: Guest, number: int, shelf: Shelf) -> None:
        try:
            # No policy is replaced meanwhile, because only one of the two machines would have the new one.
            async with sandbox.checkpointing, sandbox.applying:
                await sandbox.vacated()
                # The turn comes last, so that what a sandbox waits for does not stop the returns of others.
                async with self._turns:
                    sandbox.timeline.find(number)  # another one may have needed its room meanwhile
                    guest = await self._machines.saved(sandbox, shelf.path(_name(sandbox, number)), "checkpoint")
                    # A closed link ends the sandbox in a moment: its clients have been told that it is over.
                    if sandbox.state is not State.RESTORING or now.link.closed.done():
                        await guest.kill()
                        raise SandboxDied("the sandbox has ended")
                    undone = f"the sandbox went back to checkpoint {number}"
                    sandbox.went_back(guest, SandboxRestored(undone, hint="what ran since then is undone"))
                    sandbox.timeline.add(Return(number, datetime.now(UTC)))
                    self._tell(sandbox, "restored", {"checkpoint": number})
                    await sandbox.vacated()
        except BaseException:
            sandbox.apply(Event.RESTORE_FAILED)
            raise

    async def delete(self, sandbox: Sandbox, number: int) -> None:
        """Delete a checkpoint of a running sandbox.

        Raises:
            NotFound: there is none.
            Conflict: the sandbox is not running, or goes back to one.
        """
        checkpoint = sandbox.timeline.find(number)
        _ = sandbox.guest  # raises if it is not running
        checkpoint.state = "deleted"
        await self.check_offered().discard(_name(sandbox, checkpoint.number))

    async def discard(self, sandbox: Sandbox) -> None:
        """Delete all checkpoints of a sandbox that has ended, that included which is just being taken."""
        self._due.discard(sandbox)
        async with sandbox.checkpointing:
            for each in sandbox.timeline.kept:
                await self.check_offered().discard(_name(sandbox, each.number))

    def _tell(self, sandbox: Sandbox, reason: str, data: Mapping[str, object]) -> None:
        told = {"reason": reason, **data}
        self._store.sandbox_changed("updated", sandbox.owner, sandbox.id, sandbox.template.id, told)

    async def close(self) -> None:
        """Return when all that was begun is done."""
        await asyncio.gather(*self._tasks, *self._following.values(), return_exceptions=True)


def _name(sandbox: Sandbox, number: int) -> str:
    """The name of a checkpoint's folder."""
    return f"{sandbox.id}.{number}"
