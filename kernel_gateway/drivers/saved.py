"""A saved machine on disk: what its memory and its disk have that its template's snapshot has not.

In a directory of its own:

    machine.json             the template's snapshot that it needs, and SHA-256 and size of every other file
    memory, memory.runs      the pages of RAM that differ, and where they belong
    disk, disk.runs          the same of the writable disk
    state                    the devices
    template/                the files of that snapshot and its image, as hard links

Pages that are equal to the template's are left out, and of pages that are zero only the place is kept. The hard links
cost nothing. They keep the snapshot for as long as a saved machine needs it, whatever becomes of the cache.

Nothing of it is believed before its hash was checked. Pages are hashed while they are put into a machine that stands
still, so what was checked is what the machine has. A machine whose files are damaged is never let run.
"""

import array
import errno
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

import msgspec

from kernel_gateway.drivers import Damaged, NoSpace
from kernel_gateway.drivers.pages import PAGE, PIECE, Part, Read, Write
from kernel_gateway.images.snapshot import FileDigest, extents
from kernel_gateway.private import foreign

log = logging.getLogger(__name__)

MANIFEST = "machine.json"
TEMPLATE = "template"
PARTS = ("memory", "disk")
_ZEROS = bytes(PAGE)


class Manifest(msgspec.Struct, frozen=True):
    """Which machine it is. The fields but `files` are those of its template's snapshot."""

    template: str
    made_with: dict[str, str]
    tsc_khz: int
    files: dict[str, FileDigest]


def disk_parts(disk: int, base: int) -> Iterator[Part]:
    """The parts in which two sparse files of one length may differ: whole pages, in order, each once."""
    done = 0
    for offset, length in sorted([*extents(disk), *extents(base)]):
        start, end = max(offset // PAGE * PAGE, done), -(-(offset + length) // PAGE) * PAGE
        if start < end:
            yield start, end - start
            done = end


class _Out:
    """A new file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        os.fchmod(self._file.fileno(), 0o600)
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._size += len(data)
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> FileDigest:
        """The digest of the file, which is on disk now."""
        os.fsync(self._file.fileno())
        self._file.close()
        return FileDigest(self._size, self._hash.hexdigest())


def save_pages(read: Read, base: int, parts: Iterable[Part], path: Path) -> dict[str, FileDigest]:
    """Write those pages of `parts` that differ from a base to `path`, and their places beside it; returns the digests.

    Args:
        read: fills a buffer from an offset.
        base: an open file with the pages of the template.

    Raises:
        NoSpace: the disk is full.
        OSError: something can't be read or written.
    """
    pages, places = _Out(path), _Out(path.with_name(f"{path.name}.runs"))
    runs = array.array("Q")
    buffer = memoryview(bytearray(PIECE))
    try:
        for start, length in parts:
            for at in range(start, start + length, PIECE):
                piece = buffer[: min(PIECE, start + length - at)]
                if read(piece, at) != len(piece):
                    raise OSError(errno.EIO, "the machine's pages can't be read")
                _add(runs, pages, at, piece, os.pread(base, len(piece), at))
        places.write(runs.tobytes())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"the disk is full: {error}") from error
        raise
    finally:
        digests = {path.name: pages.close(), f"{path.name}.runs": places.close()}
    return digests


def _add(runs: "array.array[int]", pages: _Out, at: int, piece: memoryview, base: bytes) -> None:
    """Add what differs of a piece. A run is three numbers: offset, length, and 1 if it has data."""
    now = bytes(piece)
    if now == base:
        return
    for place in range(0, len(now), PAGE):
        page = now[place : place + PAGE]
        if page == base[place : place + PAGE]:
            continue
        has_data = page != _ZEROS[: len(page)]
        if runs and runs[-3] + runs[-2] == at + place and runs[-1] == has_data:
            runs[-2] += len(page)
        else:
            runs.extend((at + place, len(page), has_data))
        if has_data:
            pages.write(page)


class Saved:
    """A saved machine, to start machines from. Only its manifest has been read."""

    def __init__(self, directory: Path) -> None:
        """Read the manifest.

        Raises:
            Damaged: there is none, or it is somebody else's.
        """
        self.directory = directory
        path = directory / MANIFEST
        try:
            if why := foreign(directory.stat()) or foreign(path.stat()):
                raise Damaged(f"{directory}: it {why}")
            self.manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        except (OSError, msgspec.MsgspecError) as error:
            raise Damaged(f"{path}: {error}") from error

    def put_pages(self, name: str, write: Write, size: int) -> None:
        """Give a machine the pages of one of PARTS. If this fails, the machine must not be used.

        Args:
            write: writes a buffer to an offset.
            size: the length of what is written to.

        Raises:
            Damaged: the files are not what the manifest says.
            OSError: the machine can't be written to.
        """
        runs = array.array("Q")
        content = self.content(f"{name}.runs")
        if len(content) % (3 * runs.itemsize):
            raise Damaged(f"{self.directory / name}: the places of its pages are damaged")
        runs.frombytes(content)
        digest = hashlib.sha256()
        with self._open(name) as file:
            for offset, length, has_data in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
                if offset + length > size:
                    raise Damaged(f"{self.directory / name}: a page is beyond the end")
                for at in range(offset, offset + length, PIECE):
                    wanted = min(PIECE, offset + length - at)
                    data = os.read(file.fileno(), wanted) if has_data else bytes(wanted)
                    if has_data:
                        digest.update(data)
                    if len(data) != wanted or write(memoryview(data), at) != wanted:
                        raise Damaged(f"{self.directory / name}: it is cut short")
            if digest.hexdigest() != self.manifest.files[name].sha256 or os.read(file.fileno(), 1):
                raise Damaged(f"{self.directory / name}: its content is not what the manifest says")

    def content(self, name: str) -> bytes:
        """A whole file.

        Raises:
            Damaged: it is not what the manifest says.
        """
        with self._open(name) as file:
            data = file.read()
        expected = self.manifest.files[name]
        if FileDigest(len(data), hashlib.sha256(data).hexdigest()) != expected:
            raise Damaged(f"{self.directory / name}: its content is not what the manifest says")
        return data

    def _open(self, name: str) -> FileIO:
        path = self.directory / name
        if name not in self.manifest.files:
            raise Damaged(f"{path}: the manifest does not know it")
        try:
            file = path.open("rb", buffering=0)
        except OSError as error:
            raise Damaged(f"{path}: {error.strerror}") from error
        status = os.fstat(file.fileno())
        if why := foreign(status):
            file.close()
            raise Damaged(f"{path}: it {why}")
        if status.st_size != self.manifest.files[name].size:
            file.close()
            raise Damaged(f"{path}: it has {status.st_size} bytes, and the manifest says another number")
        return file


def write_file(path: Path, content: bytes) -> FileDigest:
    """Write a new file to disk."""
    out = _Out(path)
    try:
        out.write(content)
    finally:
        digest = out.close()
    return digest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    write_file(directory / MANIFEST, msgspec.json.encode(manifest))


def keep_template(directory: Path, files: dict[str, Path]) -> None:
    """Keep a snapshot's files for a saved machine. It is not kept if the cache is on another file system."""
    (directory / TEMPLATE).mkdir(mode=0o700)
    try:
        for name, path in files.items():
            os.link(path, directory / TEMPLATE / name)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOENT):
            raise
        log.warning(
            "%s needs its template's present snapshot, because that can't be linked to: %s", directory, error.strerror
        )
