"""The cache: what templates are built from and into. Entries but `debs` are named by a hash of what went into them.

    wheels/KEY               Python packages of a lock file; `KEY.part` while they are being downloaded
    debs/SUITE               Debian packages
    images/TIME-KEY          a guest image: root.erofs, boot/, packages; the newest of a key counts
    initrd/KEY               a first file system
    snapshots/TEMPLATE-KEY   a template's snapshot
    kvm/KEY                  whether this host's KVM runs the guest

Many servers may share a cache. One of them builds at a time, behind the file `lock`, and writes its steps into it for
those who wait. Who finds all that it needs does not wait. A server holds a shared lock on each entry that it uses, so
that pruning leaves the entry alone. An entry's modification time tells when it was last used.
Names with a dot in front are unfinished work: whoever holds `lock` may delete those of builders that were killed.
"""

import asyncio
import fcntl
import logging
import os
import re
import shutil
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kernel_gateway.private import private

log = logging.getLogger(__name__)

SUITE = "bookworm"
"""The Debian release of guests."""
KINDS = ("wheels", "debs", "images", "initrd", "snapshots", "kvm")
DAY = 86_400
KEY = rf"(?:[A-Za-z0-9_-]+-)?[0-9a-f]{{16}}|{SUITE}"
"""The names of entries: nothing else in the directory is ours to delete."""
ENTRY = re.compile(rf"(?:{KEY})(?:\.part)?")
UNFINISHED = re.compile(rf"\.(?:{KEY})(?:\.part)?(?:-[a-z0-9_]{{8}})?")
"""Names of work that was begun (with the letters of `mkdtemp`), and of entries that are being deleted."""
STEP_LIMIT = 500
"""Bytes of a builder's step that others are shown."""
_LOCK = struct.Struct("hhqqi4x")
"""The kernel's `struct flock`: type, whence, start, length (0 for the whole file), pid (0 for a lock of open files)."""
T = TypeVar("T")


class Busy(Exception):
    """Another process builds or prunes in the cache; the text says where, and what it does."""


async def in_thread(work: Callable[..., T], *arguments: object) -> T:
    """The result of `work`, run in a thread.

    Cancelled, it waits for the thread's end first. Nothing can stop the thread, and it still uses what its caller would
    give back then: the build lock, descriptors, folders.
    """
    running = asyncio.get_running_loop().run_in_executor(None, work, *arguments)
    cancelled = None
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from running.exception()
    return running.result()


@dataclass(frozen=True, slots=True)
class Entry:
    """Something in the cache. `size` in bytes on disk, `used_at` in seconds since 1970."""

    path: Path
    size: int
    used_at: float
    is_held: bool

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"


class Cache:
    """A cache directory, and what this process uses of it.

    Raises:
        PermissionError: others may write to it, so nothing in it can be believed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._held: dict[Path, int] = {}
        for kind in KINDS:
            (root / kind).mkdir(parents=True, exist_ok=True)
            private(root / kind)

    def __repr__(self) -> str:
        return f"<Cache {self.root}>"

    @asynccontextmanager
    async def building(
        self, progress: Callable[[str], None], *, waits: bool = True
    ) -> AsyncIterator[Callable[[str], None]]:
        """Be the only one who builds or prunes. Waits for others: what they build is most likely what we need.

        Yields what tells a step: to `progress`, and to others who wait.

        Args:
            waits: whether to wait for others, and tell their steps meanwhile.

        Raises:
            Busy: there is another one, and this one does not wait.
        """
        lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

        def note(text: str) -> None:
            with suppress(OSError):  # a full disk: what others are told is not worth a start that needs no room
                os.pwrite(lock, text.encode()[:STEP_LIMIT].ljust(STEP_LIMIT, b"\0"), 0)

        def step(text: str) -> None:
            note(text)
            progress(text)

        try:
            told = None
            while not _locked(lock):
                other = os.pread(lock, STEP_LIMIT, 0).decode("utf-8", "replace").rstrip("\0")
                doing = f"{self.root}: {other}" if other else str(self.root)
                if not waits:
                    raise Busy(f"another process builds in {doing}")
                if doing != told:
                    progress(f"wait for another build in {doing}")
                told = doing
                await asyncio.sleep(0.5)
            note("")  # a builder that was killed has left its step there
            for left in self._unfinished():
                try:
                    await in_thread(_delete, left)
                except OSError as error:  # another user's, say; it is in nobody's way
                    log.warning("%s is left of a build that was killed, and can't be deleted: %s", left, error)
            yield step
        finally:
            os.close(lock)

    def _unfinished(self) -> Iterator[Path]:
        """What builders that were killed have left. No other file is touched, whatever the directory is used for."""
        for kind in KINDS:
            yield from (path for path in (self.root / kind).glob(".*") if UNFINISHED.fullmatch(path.name))
        yield from (path for path in self.root.glob(".probe-*") if re.fullmatch(r"\.probe-\d+", path.name))

    def use(self, path: Path) -> Path:
        """Hold an entry for as long as this cache is open, and note that it was used now. Returns the path."""
        if path not in self._held:
            held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.fcntl(held, fcntl.F_OFD_SETLK, _LOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
            self._held[path] = held
        path.touch()
        return path

    def drop(self, path: Path) -> None:
        """Delete an entry that turned out to be unusable, within `building`."""
        if (held := self._held.pop(path, None)) is not None:
            os.close(held)
        _delete(path)

    def close(self) -> None:
        """Let go of all entries."""
        while self._held:
            os.close(self._held.popitem()[1])

    def entries(self) -> list[Entry]:
        """All there is, the largest first."""
        found = [_entry(path) for kind in KINDS for path in (self.root / kind).iterdir() if ENTRY.fullmatch(path.name)]
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.size, reverse=True)

    def prune(self, days: float) -> Iterator[Entry]:
        """Delete what nobody holds and nobody has used for so many days; tells what was deleted. Within `building`."""
        for entry in self.entries():
            if entry.is_held or time.time() - entry.used_at < days * DAY:
                continue
            # A server that begins to use the entry at this moment has its files open already, or finds none and builds.
            _delete(entry.path)
            yield entry


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _entry(path: Path) -> Entry | None:
    """None for what has been deleted just now."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # Only asked for, not taken: whoever looks at the same time would see that lock.
        found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        is_held = _LOCK.unpack(found)[0] != fcntl.F_UNLCK
        return Entry(path, _size(path), os.fstat(file).st_mtime, is_held)
    finally:
        os.close(file)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if not each.is_symlink()]
    total = 0
    for each in files:
        try:
            total += each.stat().st_blocks * 512
        except FileNotFoundError:  # being deleted
            continue
    return total


def _delete(path: Path) -> None:
    """Delete a file or folder. It vanishes at once: an interruption leaves unfinished work, no half entry."""
    if not path.name.startswith("."):
        path = path.rename(path.with_name(f".{path.name}"))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
