"""A template's snapshot: the state of a machine with a warm kernel, from which every sandbox starts.

On disk, in a directory of its own:

    manifest.json   what it was made with, and the SHA-256 and size of every other file
    memory          the machine's RAM, sparse
    state           the devices (about 100 KB)
    disk            the writable disk at that moment, sparse

Nothing of it is used before its hash was checked. RAM and device state are copied into sealed memory files while they
are hashed: what was checked is what is mapped, nobody can change it, and all clones share its pages.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kernel_gateway.private import foreign

BLOCK = 1024 * 1024
FILES = ("memory", "state", "disk")
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class SnapshotCorrupt(Exception):
    """A file of a snapshot is missing, is not what the manifest says, or is somebody else's."""


class FileDigest(msgspec.Struct, frozen=True):
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """What a snapshot was made with, each thing by its name: all of it decides whether the snapshot fits.

    `tsc_khz` is the rate by which its guest reads its clock, which may differ a little from host to host; 0 when the
    guest has it from KVM or has measured it.
    """

    template: str
    made_with: dict[str, str]
    tsc_khz: int
    files: dict[str, FileDigest]


def extents(fd: int) -> Iterator[tuple[int, int]]:
    """The parts of a sparse file that hold data, as (offset, length)."""
    end = os.fstat(fd).st_size
    offset = 0
    while offset < end:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        hole = os.lseek(fd, offset, os.SEEK_HOLE)
        yield offset, hole - offset
        offset = hole


def copy_sparse(source: int, target: int) -> FileDigest:
    """Copy a sparse file's data at the same offsets, leaving out blocks of zeros; returns its digest.

    The digest is over the size and every block that is not zero, with its offset, so holes cost nothing.
    """
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    digest = hashlib.sha256(size.to_bytes(8, "big"))
    buffer = memoryview(bytearray(BLOCK))
    zeros = bytes(BLOCK)
    done = 0
    for offset, length in extents(source):
        # Several extents may lie in one block, and more of them in one copy of a file than in another.
        for at in range(max(done, offset - offset % BLOCK), offset + length, BLOCK):
            done = at + BLOCK
            count = os.preadv(source, [buffer], at)
            piece = buffer[:count]
            if piece != zeros[:count]:
                digest.update(at.to_bytes(8, "big"))
                digest.update(piece)
                os.pwrite(target, piece, at)
    return FileDigest(size=size, sha256=digest.hexdigest())


def copy_disk(source: int, target: int) -> None:
    """Copy a sparse file's data without looking at it."""
    os.ftruncate(target, os.fstat(source).st_size)
    for offset, length in extents(source):
        os.lseek(target, offset, os.SEEK_SET)
        while length:
            copied = os.sendfile(target, source, offset, length)
            if not copied:
                raise OSError(f"file ended at {offset}")
            offset, length = offset + copied, length - copied


def memory_file(name: str, size: int = 0) -> int:
    """A new anonymous file in memory, open for everybody who is given its descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A verified snapshot, ready to start machines from. The descriptors live as long as the server.

    `memory`, `state` and `disk` are sealed memory files.
    """

    manifest: Manifest
    memory: int
    state: int
    disk: int

    def close(self) -> None:
        """Let go of it, when no machine will be started from it any more."""
        for fd in (self.memory, self.state, self.disk):
            os.close(fd)

    @classmethod
    def load(cls, directory: Path) -> "Snapshot":
        """Check every file's owner, and its content against the manifest, and hold it in memory.

        Raises:
            SnapshotCorrupt: something is missing or differs; says what.
        """
        try:
            if why := foreign(directory.stat()) or foreign((directory / "manifest.json").stat()):
                raise SnapshotCorrupt(f"{directory}: it {why}")
            manifest = msgspec.json.decode((directory / "manifest.json").read_bytes(), type=Manifest)
        except (OSError, msgspec.MsgspecError) as error:
            raise SnapshotCorrupt(f"{directory}: {error}") from error
        with ExitStack() as opened:
            held = {}
            for name in FILES:
                held[name] = cls._hold(directory / name, manifest)
                opened.callback(os.close, held[name])
            opened.pop_all()
        return cls(manifest, **held)

    @staticmethod
    def _hold(path: Path, manifest: Manifest) -> int:
        try:
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SnapshotCorrupt(f"{path}: {error.strerror}") from error
        try:
            if why := foreign(os.fstat(source)):
                raise SnapshotCorrupt(f"{path}: it {why}")
            held = memory_file(path.name)
            digest = copy_sparse(source, held)
        finally:
            os.close(source)
        if digest != manifest.files.get(path.name):
            os.close(held)
            raise SnapshotCorrupt(f"{path}: its content is not what the manifest says")
        fcntl.fcntl(held, fcntl.F_ADD_SEALS, SEALS)
        return held
