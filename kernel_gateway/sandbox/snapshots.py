"""Snapshots: sandboxes as they stood at one moment, kept on disk, from which others start. Their sandboxes go on.

A snapshot needs its template's files, which it keeps by links, and nothing of its sandbox. A sandbox that was started
from it needs nothing of it once it runs. So a snapshot may be deleted at any time. One from which a sandbox is just
starting is not found any more, and its files go when that start is over.
"""

import asyncio
import logging
import secrets
import string
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from kernel_gateway.errors import Conflict, InsufficientStorage, NotFound, TooManyRequests
from kernel_gateway.images.cache import in_thread
from kernel_gateway.images.templates import Template
from kernel_gateway.sandbox.machines import Machines, saving
from kernel_gateway.sandbox.places import Places
from kernel_gateway.sandbox.recipe import Defaults
from kernel_gateway.sandbox.sandbox import Sandbox
from kernel_gateway.sandbox.shelf import Shelf, offered, size_of
from kernel_gateway.sandbox.store import Store
from kernel_gateway.tasks import to_its_end

log = logging.getLogger(__name__)

PREFIX = "snp"
ID_LENGTH = 20


class Snapshot(msgspec.Struct, frozen=True):
    """A snapshot of one of the owner's sandboxes. `created` is in seconds since 1970, `size` in bytes of disk.

    `name` is empty if it has none. `env` are the variables that its sandbox was created with, and `defaults` are how
    commands run there.
    """

    id: str
    owner: str
    name: str
    sandbox: str
    template: Template
    env: dict[str, str]
    created: float
    size: int
    defaults: Defaults = Defaults()


class Snapshots:
    """All snapshots of the server. An owner may have `maximum` of them."""

    def __init__(self, places: Places, machines: Machines, store: Store, shelf: Shelf | None, maximum: int) -> None:
        self.maximum = maximum
        self._places = places
        self._machines = machines
        self._store = store
        self._shelf = shelf
        self._known: dict[str, Snapshot] = {}
        self._begun: list[tuple[str, str]] = []  # owners and names of those that are being taken
        self._users: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Snapshot]] = set()

    def load(self) -> None:
        """Find the snapshots of earlier servers. What else is on the shelf is deleted."""
        if self._shelf is None:
            return
        rows = self._store.snapshots()
        self._shelf.sweep(rows.keys())
        for snapshot_id, text in rows.items():
            try:
                snapshot = msgspec.json.decode(text, type=Snapshot)
            except msgspec.MsgspecError as error:  # a later version's; its server may come back
                log.error("snapshot %s can't be read, and is left as it is: %s", snapshot_id, error)
                continue
            if self._shelf.path(snapshot_id).is_dir():
                self._known[snapshot_id] = snapshot
            else:
                log.error("the files of snapshot %s are gone", snapshot_id)

    def of(self, owner: str) -> list[Snapshot]:
        """An owner's snapshots, the newest first."""
        mine = [each for each in self._known.values() if each.owner == owner]
        return sorted(mine, key=lambda each: (each.created, each.id), reverse=True)

    def find(self, snapshot_id: str) -> Snapshot | None:
        """The snapshot of that id, whoever owns it. The caller must check what its client may do."""
        return self._known.get(snapshot_id)

    def of_name(self, owner: str, name: str) -> Snapshot | None:
        """The owner's snapshot of that id or name."""
        return next((each for each in self.of(owner) if name and name in (each.id, each.name)), None)

    def check_offered(self, what: str) -> Shelf:
        """Where snapshots are.

        Args:
            what: what the client wants to do, for the refusal's message.

        Raises:
            Unavailable: machines of this server can't be saved.
        """
        return offered(self._shelf, self._machines.capabilities, what)

    async def take(self, sandbox: Sandbox, name: str = "", *, template: Template | None = None) -> Snapshot:
        """A new snapshot of a running sandbox. This is done to its end, even if the client has gone.

        Args:
            template: the template of what is started from it; None for the sandbox's own.

        Raises:
            Unavailable: machines of this server can't be saved.
            TooManyRequests: the owner has `maximum` already.
            Conflict: another snapshot of the owner has the name, or the sandbox is not running.
            InsufficientStorage: the disk has no room.
            CellvmError: the sandbox could not be captured, or has ended.
        """
        shelf = self.check_offered("take snapshots of sandboxes")
        _ = sandbox.guest  # raises if it is not running
        if len(self.of(sandbox.owner)) + sum(owner == sandbox.owner for owner, _ in self._begun) >= self.maximum:
            raise TooManyRequests(
                f"your key may have {self.maximum} snapshots",
                hint="delete one; the operator sets the limit with --max-snapshots-per-key",
            )
        names = {(each.owner, each.name) for each in self.of(sandbox.owner)} | {*self._begun}
        if name and (sandbox.owner, name) in names:
            raise Conflict(f"you have a snapshot {name!r} already", hint="delete it, or choose another name")
        if lack := self._places.lack_of_space():
            raise InsufficientStorage(lack, hint="the operator must free some space; the sandbox still runs")
        self._begun.append((sandbox.owner, name))  # from this turn on it counts
        task = asyncio.create_task(self._take(sandbox, name, shelf, template or sandbox.template))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await to_its_end(task)

    async def _take(self, sandbox: Sandbox, name: str, shelf: Shelf, template: Template) -> Snapshot:
        snapshot_id = PREFIX + "".join(secrets.choice(string.digits + string.ascii_lowercase) for _ in range(ID_LENGTH))
        try:
            with saving(sandbox, "captured"):
                async with shelf.filled(snapshot_id) as directory:
                    async with self._machines.guests.still(sandbox.guest, goes_on=True) as still:
                        created = time.time()
                    try:
                        await still.write(directory)
                    finally:
                        still.close()
                    self._places.check_room_for_files()
                    size = await in_thread(size_of, directory)
                    snapshot = Snapshot(
                        snapshot_id,
                        sandbox.owner,
                        name,
                        sandbox.id,
                        template,
                        sandbox.env,
                        created,
                        size,
                        sandbox.defaults,
                    )
                    try:
                        await shelf.put(directory, snapshot_id)
                        await self._store.snapshot_taken(
                            snapshot_id, sandbox.id, msgspec.json.encode(snapshot).decode()
                        )
                    except BaseException:
                        await shelf.discard(snapshot_id)
                        raise
        finally:
            self._begun.remove((sandbox.owner, name))
        self._known[snapshot_id] = snapshot
        return snapshot

    async def delete(self, snapshot: Snapshot) -> None:
        """Delete a snapshot.

        Raises:
            NotFound: somebody else was faster.
            HostFull: the database can't be written.
        """
        if snapshot.id not in self._known:
            raise NotFound("snapshot not found")
        del self._known[snapshot.id]
        try:
            await self._store.snapshot_deleted(snapshot.id, snapshot.sandbox)
        except BaseException:
            self._known[snapshot.id] = snapshot
            raise
        await self._discard_unused(snapshot)

    @asynccontextmanager
    async def used(self, snapshot: Snapshot) -> AsyncIterator[Path]:
        """The directory of a snapshot. If the snapshot is deleted within the block, its files go after the block.

        Raises:
            NotFound: the snapshot was deleted before.
        """
        if self._shelf is None or snapshot.id not in self._known:
            raise NotFound("snapshot not found")
        self._users[snapshot.id] += 1
        try:
            yield self._shelf.path(snapshot.id)
        finally:
            self._users[snapshot.id] -= 1
            await self._discard_unused(snapshot)

    async def _discard_unused(self, snapshot: Snapshot) -> None:
        """Delete the files of a snapshot that was deleted, unless somebody uses it."""
        if self._shelf is not None and snapshot.id not in self._known and not self._users[snapshot.id]:
            del self._users[snapshot.id]
            await self._shelf.discard(snapshot.id)

    async def close(self) -> None:
        """Return when all that was begun is done."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
