"""A machine as it stood at one moment: the start of copies of it, and what is written when it is saved.

It is held in open files without names, so nothing is left of it when the server ends. Where `Saved` is believed after
its hash was checked, nobody else could change these files.
"""

import os
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from kernel_gateway.drivers import DriverError, NoSpace
from kernel_gateway.drivers.base import Base
from kernel_gateway.drivers.pages import PIECE, Part, Read, Write
from kernel_gateway.drivers.saved import (
    Manifest,
    disk_parts,
    keep_template,
    save_pages,
    write_file,
    write_manifest,
)
from kernel_gateway.images.cache import in_thread

OVERHEAD, SHARE = 1024 * 1024, 1 / 128
"""Bytes that the files take besides the pages: the manifest, and what blocks leave over; and per byte the places."""
HEADER, FULL_SECTION = 8, b"\x04"
"""Bytes of the header of a machine's state, and the type of a section with a whole device."""
NO_DESCRIPTION = b"\x06\0\0\0\0"
"""The section of a state's description, empty. QEMU complains on the console of a state without one."""


class Captured:
    """What a machine has that its `base` has not.

    Args:
        state: of its devices, as QEMU loads it.
        memory: reads the machine's memory by its offset.
        own: the parts of the memory that are the machine's own.
        disk: its disk, open.
        held: closes all that is open.
    """

    def __init__(self, base: Base, state: bytes, memory: Read, own: list[Part], disk: int, held: ExitStack) -> None:
        self.base = base
        self._state = state
        self._own = own
        self._disk = disk
        self._read: dict[str, Read] = {"memory": memory, "disk": partial(_pread, disk)}
        self._held = held

    def close(self) -> None:
        """Let go of it. Idempotent."""
        self._held.close()

    async def size(self) -> int:
        """Bytes of disk that writing it takes at most. Pages that turn out to be equal to the template's take none."""
        return await in_thread(self._size)

    def _size(self) -> int:
        pages = sum(length for name in self._read for _, length in self._parts(name))
        return pages + int(pages * SHARE) + len(self._state) + OVERHEAD

    async def write(self, directory: Path) -> None:
        """Write it to an empty directory, in the form of `Saved`.

        Raises:
            NoSpace: the disk has no room.
            DriverError: it can't be written.
        """
        try:
            await in_thread(self._write, directory)
        except OSError as error:
            raise DriverError(f"the machine could not be saved: {error}") from error

    def _write(self, directory: Path) -> None:
        need = self._size()
        free = shutil.disk_usage(directory).free
        if free < need:
            raise NoSpace(f"saving the machine may take {need >> 20} MiB, and the disk has {free >> 20} MiB free")
        snapshot = self.base.snapshot
        digests = save_pages(self._read["memory"], snapshot.memory, self._parts("memory"), directory / "memory")
        digests |= save_pages(self._read["disk"], snapshot.disk, self._parts("disk"), directory / "disk")
        digests["state"] = write_file(directory / "state", self._state)
        keep_template(directory, self.base.files)
        found = snapshot.manifest
        write_manifest(directory, Manifest(found.template, found.made_with, found.tsc_khz, digests))

    def _parts(self, name: str) -> list[Part]:
        return self._own if name == "memory" else list(disk_parts(self._disk, self.base.snapshot.disk))

    # -- as `Saved`

    def put_pages(self, name: str, write: Write, size: int) -> None:
        """Give a machine, which is a clone of the template, the pages of its memory or its disk.

        Raises:
            OSError: the machine can't be written to.
        """
        buffer = memoryview(bytearray(PIECE))
        for start, length in self._parts(name):
            for at in range(start, start + length, PIECE):
                piece = buffer[: min(PIECE, start + length - at)]
                if self._read[name](piece, at) != len(piece) or write(piece, at) != len(piece):
                    raise DriverError("the copy of the machine can't be read")

    def content(self, name: str) -> bytes:
        """The state of the devices, which is the only content it has."""
        assert name == "state"
        return self._state


def _pread(fd: int, buffer: memoryview, at: int) -> int:
    return os.preadv(fd, [buffer], at)


def with_small_memory(template: int, devices: int) -> bytes:
    """A state that QEMU loads: the beginning of the template's, then the devices' of a machine.

    The beginning has what QEMU does not write with the devices alone: its configuration, and the small memories beside
    the RAM (firmware and ACPI tables), which no guest changes. Both states have the same sections in the same order.

    Raises:
        DriverError: QEMU has written something else.
    """
    whole, own = (os.pread(fd, os.fstat(fd).st_size, 0) for fd in (template, devices))
    # A section begins with its type, its number and its name (QEMU, migration/savevm.c, `save_section_header`).
    first = own[HEADER : HEADER + 6 + own[HEADER + 5]]
    if own[:HEADER] != whole[:HEADER] or first[:1] != FULL_SECTION or whole.count(first) != 1:
        raise DriverError("QEMU wrote a state of the machine's devices that has not the form of its template's")
    return whole[: whole.index(first)] + own[HEADER:] + NO_DESCRIPTION
