"""Paused sandboxes, snapshots or checkpoints on disk: a folder for each, whole or not there.

A folder is filled under a name with a dot in front, and gets its own name when all of it is on disk. What is not whole,
or is nobody's any more, is deleted when the server starts.
"""

import logging
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Container
from contextlib import asynccontextmanager
from pathlib import Path

from kernel_gateway.drivers import Capabilities
from kernel_gateway.errors import Unavailable
from kernel_gateway.images.cache import in_thread

log = logging.getLogger(__name__)


class Shelf:
    """The folders of sandboxes, snapshots or checkpoints by their names, below a directory of the server's own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, name: str) -> Path:
        """Where one is, whether it is there or not."""
        return self._directory / name

    @asynccontextmanager
    async def filled(self, name: str) -> AsyncIterator[Path]:
        """A new folder, to be filled and put on the shelf within the block. Otherwise it is deleted."""
        work = self._directory / f".{name}-{secrets.token_hex(4)}"
        try:
            await in_thread(work.mkdir, 0o700)
            yield work
        finally:
            await in_thread(_delete, work)

    async def put(self, work: Path, name: str) -> None:
        """Give a folder that is filled its name, for good.

        Raises:
            OSError: the disk refuses.
        """
        await in_thread(self._put, work, name)

    def _put(self, work: Path, name: str) -> None:
        _to_disk(work)
        work.rename(self.path(name))
        _to_disk(self._directory)

    async def discard(self, name: str) -> None:
        """Delete a folder. What can't be deleted now is left to the next start."""
        await in_thread(_delete, self.path(name))

    def sweep(self, known: Container[str]) -> None:
        """Delete all folders but the known ones. Who knows a sandbox's id knows all its checkpoints, too."""
        for path in self._directory.iterdir():
            if path.name not in known and path.stem not in known:
                log.warning("%s is left of an earlier server, and is deleted", path)
                _delete(path)


def offered(shelf: Shelf | None, capabilities: Capabilities, what: str) -> Shelf:
    """The shelf of a server that can do something.

    Raises:
        Unavailable: it can't, because its machines can't be saved.
    """
    if shelf is None:
        raise Unavailable(
            f"this server can't {what}: they run on {capabilities.accelerator} without a machine that could be saved",
            hint="run it with another --isolation",
        )
    return shelf


def size_of(directory: Path) -> int:
    """Bytes of disk that the files of a folder take, without those of the template."""
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(directory) if entry.is_file())


def _to_disk(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _delete(path: Path) -> None:
    def failed(_: object, name: str, error: tuple[object, BaseException, object]) -> None:
        if not isinstance(error[1], FileNotFoundError):
            log.error("%s can't be deleted: %s", name, error[1])

    shutil.rmtree(path, onerror=failed)
