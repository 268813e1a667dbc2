"""Pages of another process: which of a private mapping are its own, and how they are read, written and copied."""

import bisect
import ctypes
import errno
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path

PAGE = mmap.PAGESIZE
PIECE = 1024 * 1024
_IS_OWN = bytes(int(bool(byte & 0xC0) and not byte & 0x20) for byte in range(256))
"""For the highest byte of an entry of /proc/PID/pagemap: 1 if the page is there or swapped out, and of no file.

Source: kernel, Documentation/admin-guide/mm/pagemap.rst."""
_BATCH = 1024
"""Parts that one system call copies (IOV_MAX)."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t

Part = tuple[int, int]
"""An offset and a length, in bytes."""
Place = tuple[int, int, int]
"""Where a part is: its address in a process, or its offset in another file; its offset; its length."""
Read = Callable[[memoryview, int], int]
Write = Callable[[memoryview, int], int]


def memory_places(pid: int, memory: int) -> list[Place]:
    """Where a process has mapped a memory file: address, offset in the file, and length of each part."""
    wanted = os.fstat(memory)
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, _, offset, device, inode, *_ = line.split(maxsplit=5)
        major, minor = (int(number, 16) for number in device.split(":"))
        if int(inode) == wanted.st_ino and os.makedev(major, minor) == wanted.st_dev:
            start, end = (int(number, 16) for number in addresses.split("-"))
            found.append((start, int(offset, 16), end - start))
    return found


def own_pages(pagemap: int, places: Iterable[Place]) -> Iterator[Part]:
    """The parts of a private mapping that a process has written to, as offset in the file and length.

    Args:
        pagemap: the process's /proc/PID/pagemap, open.
    """
    for address, offset, length in places:
        entries = os.pread(pagemap, length // PAGE * 8, address // PAGE * 8)
        for run in re.finditer(b"\1+", entries[7::8].translate(_IS_OWN)):
            yield offset + run.start() * PAGE, len(run[0]) * PAGE


def at_places(places: list[Place], how: Callable[[int, list[memoryview], int], int], fd: int) -> Read:
    """A function that reads or writes what is at these places by the offset of each part.

    Args:
        how: `os.preadv` or `os.pwritev`.
        fd: /proc/PID/mem or another file, open.
    """
    place_of = _finder(places)

    def move(buffer: memoryview, at: int) -> int:
        address, offset, length = place_of(at)
        return how(fd, [buffer[: offset + length - at]], address + at - offset)

    return move


def _finder(places: list[Place]) -> Callable[[int], Place]:
    """A function that finds the place which has an offset."""
    ordered = sorted(places, key=lambda place: place[1])
    offsets = [offset for _, offset, _ in ordered]
    return lambda at: ordered[bisect.bisect_right(offsets, at) - 1]


class _Vector(ctypes.Structure):
    """A `struct iovec`."""

    _fields_ = [("address", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def copy_pages(pid: int, places: list[Place], parts: list[Part], target: int) -> list[Place]:
    """Copy parts of a process's mapping to a file, one behind the other; returns where they are in it.

    Several parts cross in one system call, because the process stands still meanwhile. The caller sees to it that the
    process still lives afterwards, because its number may be another process's then.

    Raises:
        OSError: the process's memory can't be read, or the file has no room.
    """
    place_of = _finder(places)

    def theirs(part: Part) -> _Vector:
        address, offset, _ = place_of(part[0])
        return _Vector(address + part[0] - offset, part[1])

    size = sum(length for _, length in parts)
    if not size:
        return []
    os.ftruncate(target, size)
    with mmap.mmap(target, size) as copied:
        view = (ctypes.c_char * size).from_buffer(copied)
        at = ctypes.addressof(view)
        for first in range(0, len(parts), _BATCH):
            batch = parts[first : first + _BATCH]
            length = sum(each for _, each in batch)
            ours, vectors = _Vector(at, length), (_Vector * len(batch))(*map(theirs, batch))
            count = _libc.process_vm_readv(pid, ctypes.byref(ours), 1, vectors, len(batch), 0)
            if count != length:
                raise OSError(ctypes.get_errno() or errno.EIO, "the machine's memory can't be read")
            at += length
        del view
    starts = accumulate((length for _, length in parts), initial=0)
    return [(start, offset, length) for start, (offset, length) in zip(starts, parts, strict=False)]
