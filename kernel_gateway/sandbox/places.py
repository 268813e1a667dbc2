"""The places for machines, and the disk that they share: who may have one more, and when there is too little space."""

import asyncio
import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from kernel_gateway.drivers import NoSpace
from kernel_gateway.errors import CellvmError, Draining, HostFull, TooManyRequests
from kernel_gateway.sandbox.lifecycle import ENDED, Event, State
from kernel_gateway.sandbox.sandbox import Sandbox

log = logging.getLogger(__name__)

FLOOR_SHARE, FLOOR = 0.05, 2 * 1024**3
"""The part of the disk, and the bytes at most, that must be free for another sandbox. They are for those that run."""
ROOM_LIMIT = 5.0
"""Seconds that a create waits for a machine that is ending, if all places are taken."""
WORTH_ENDING = 256 * 1024**2
"""Bytes of disk. Nobody's sandbox is ended for less, because that would hardly help the others."""


class Places:
    """The sandboxes that have a place: from the create until the machine is gone, however the sandbox fares meanwhile.

    There are `maximum` places, and `per_owner` of them may be one owner's. The pool takes none. `disk` is a directory
    on the disk that sandboxes use; None if nobody looks at it. While the server `is_draining` nobody gets a place.
    """

    def __init__(self, maximum: int, per_owner: int | None, disk: Path | None) -> None:
        self.maximum = maximum
        self.per_owner = maximum if per_owner is None else per_owner
        self.is_draining = False
        self._disk = disk
        self._taken: set[Sandbox] = set()
        self._one_is_free = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Places {len(self)}/{self.maximum}>"

    def __len__(self) -> int:
        return len(self._taken)

    def __iter__(self) -> Iterator[Sandbox]:
        return iter([*self._taken])

    def of(self, owner: str) -> int:
        """Number of places that an owner's sandboxes take, those included that are starting or ending."""
        return sum(each.owner == owner for each in self._taken)

    def take(self, sandbox: Sandbox) -> None:
        """Give a sandbox a place. There must be `room`."""
        self._taken.add(sandbox)

    def free(self, sandbox: Sandbox) -> None:
        """Take note that a sandbox has no machine any more."""
        self._taken.discard(sandbox)
        self._one_is_free.set()

    async def room(self, owner: str, wanted: int = 1) -> None:
        """Return when the owner may have that many more sandboxes. Machines that are just ending are waited for.

        Raises:
            Draining: the server is going down.
            TooManyRequests: the owner has `per_owner` already.
            HostFull: there are `maximum` already.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(ROOM_LIMIT):
                while self._refusal(owner, wanted) and any(each.state in ENDED for each in self._taken):
                    self._one_is_free.clear()
                    await self._one_is_free.wait()
        if refusal := self._refusal(owner, wanted):
            raise refusal

    def _refusal(self, owner: str, wanted: int) -> CellvmError | None:
        if self.is_draining:
            return Draining("the server is going down")
        if self.of(owner) + wanted > self.per_owner < self.maximum:
            return TooManyRequests(f"your key may have {self.per_owner} sandboxes at once", hint="delete one")
        if len(self._taken) + wanted > self.maximum:
            return HostFull(f"all {self.maximum} sandboxes of this server are in use", hint="delete one, or wait")
        return None

    # -- the disk

    @property
    def disk_bytes(self) -> int:
        """Bytes of the host's disk that all sandboxes take."""
        return sum(each.disk_bytes for each in self._taken)

    def lack_of_space(self) -> str:
        """Why no sandbox may be created for want of disk; empty if there is enough."""
        free, floor = self._space()
        if free >= floor:
            return ""
        return f"the server's disk has {free >> 20} MiB free, and {floor >> 20} MiB are kept for running sandboxes"

    def check_room_for_files(self) -> None:
        """See that files which were just written leave room for the sandboxes that run.

        Raises:
            NoSpace: one of them would soon be ended for want of space.
        """
        free, floor = self._space()
        if free < floor // 2:
            raise NoSpace(f"it would leave {free >> 20} MiB of the server's disk, and running sandboxes need more")

    def make_room(self) -> None:
        """End the sandbox that takes most of the disk if less than half the floor is free.

        A full disk would damage the files of all sandboxes. One is ended at a time, because its space comes back only
        when its machine is gone.
        """
        free, floor = self._space()
        if free >= floor // 2 or any(each.state in ENDED for each in self._taken):
            return
        greatest = max(self._taken, key=lambda each: each.disk_bytes, default=None)
        if greatest is not None and greatest.state is State.RUNNING and greatest.disk_bytes >= WORTH_ENDING:
            log.error("sandbox %s is ended, because the disk is full and it takes %d MiB of it",
                      greatest.id, greatest.disk_bytes >> 20)  # fmt: skip
            greatest.apply(Event.DISK_FULL)

    def _space(self) -> tuple[int, int]:
        """Free bytes of the disk, and how many should be free."""
        if self._disk is None:
            return 0, 0
        disk = shutil.disk_usage(self._disk)
        return disk.free, min(int(disk.total * FLOOR_SHARE), FLOOR)
