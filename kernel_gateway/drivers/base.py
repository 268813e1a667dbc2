"""What a template's machines start from."""

import os
from dataclasses import astuple, dataclass
from pathlib import Path

from kernel_gateway.drivers.qemu_argv import Machine
from kernel_gateway.images.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Image:
    """Open descriptors of what machines of a template boot from: readable, never written."""

    kernel: int
    initrd: int
    root: int

    def close(self) -> None:
        """Close them, when no machine will be started with them any more."""
        for fd in astuple(self):
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Base:
    """What a template's machines start from.

    `files` are the snapshot's and the image's, by the names that a saved machine gives them.
    """

    snapshot: Snapshot
    image: Image
    machine: Machine
    files: dict[str, Path]
