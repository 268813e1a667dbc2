"""The interface of drivers. A driver turns a template into a running agent behind a socket.

A driver knows nothing of sandboxes, HTTP or kernels. An ability that only some drivers have is a Protocol of its own,
and differences are data in Capabilities.
"""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

GUEST_MAC = "02:63:76:00:00:02"
"""The Ethernet address of every machine's card. Each machine is alone on its network, and wakes configured."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The properties of a driver's machines, as users are told them.

    `isolation` names the boundary round a sandbox, `accelerator` how its processors run. `time_scale` is roughly how
    much slower than the host they are, and timeouts that wait for a guest are multiplied by it. `network` is how
    sandboxes reach the internet: "netns" or "passt", through a filter of ours; "off", not at all; "host", as the host
    itself does, with nothing in between.
    """

    isolation: str
    accelerator: str
    time_scale: float
    network: str = "off"


class Nic(Protocol):
    """A machine's network card, seen from the host. `tap` is the open descriptor of an Ethernet device."""

    @property
    def tap(self) -> int: ...

    def close(self) -> None:
        """Release the device and all that belongs to it. Idempotent."""


class Nics(Protocol):
    """Hands out network cards, ready and behind their filter."""

    @property
    def mechanism(self) -> str:
        """The value of `Capabilities.network`."""

    async def take(self) -> Nic:
        """A card that nobody has used.

        Raises:
            DriverError: no card could be made.
        """


class Vm(Protocol):
    """One running machine with an agent in it."""

    @property
    def pid(self) -> int:
        """The host process that is the machine."""

    def open(self) -> socket.socket:
        """The byte stream to the agent. The caller must close it, and may call this once."""

    async def wait(self) -> str:
        """Return when the machine has ended, with a sentence for logs. It may be awaited many times."""

    async def kill(self) -> None:
        """End the machine now and release all that it held. Idempotent; never raises."""


@runtime_checkable
class Networked(Protocol):
    """A machine with a network card of its own."""

    @property
    def nic(self) -> Nic | None: ...


@runtime_checkable
class TakesDisk(Protocol):
    """A machine whose disk takes space of the host as it is written to."""

    @property
    def disk_bytes(self) -> int: ...


@runtime_checkable
class Stops(Protocol):
    """A machine that can stand still without using a processor."""

    async def stop(self) -> None:
        """Stop all virtual processors."""

    async def cont(self) -> None:
        """Let the virtual processors go on."""


class VmDriver(Protocol):
    """Starts machines from templates."""

    @property
    def capabilities(self) -> Capabilities: ...

    async def start(self, source: str) -> Vm:
        """A new machine, whose agent runs and waits for the resume handshake.

        Args:
            source: the id of a template.

        Raises:
            DriverError: the machine could not be started; nothing is left behind.
        """


class Captured(Protocol):
    """A machine as it stood at one moment. It is of its driver, and holds descriptors until it is closed."""

    async def size(self) -> int:
        """Bytes of disk that writing it takes at most."""

    async def write(self, directory: Path) -> None:
        """Write to an empty directory how the machine's memory, devices and disk differ from its template's.

        Raises:
            NoSpace: the disk has no room for the files.
            DriverError: the files could not be written. What was written is of no use.
        """

    def close(self) -> None:
        """Let go of it. Idempotent."""


@runtime_checkable
class Suspends(Protocol):
    """A driver that can capture a machine, and start machines from that. Its machines are `Stops`, too."""

    async def capture(self, vm: Vm, *, goes_on: bool) -> Captured:
        """Stop a machine, and hold how it stands. Afterwards it stands still, also if this fails.

        The caller has brought the machine's link to rest, because bytes that are under way are not captured.

        Args:
            goes_on: the machine may go on while the capture is used. Otherwise it must stand still until it is closed.

        Raises:
            NoSpace: the disk has no room.
            DriverError: it can't be captured, or has ended.
        """

    async def restore(self, source: Path | Captured) -> Vm:
        """A machine that stands where another one was captured, with a network card of its own.

        A directory, or a capture that is not closed, may be restored from many times. The machine runs from its first
        `cont` on. The caller says what it is, by `Link.cont` or `Link.resume`, before any other request.

        Raises:
            Damaged: the files are not what was saved.
            Incompatible: it can't go on here; the text says why.
            DriverError: the machine could not be started. In all cases nothing is left behind.
        """


class DriverError(Exception):
    """A machine could not be started or controlled."""


class NoSpace(DriverError):
    """The disk has no room."""


class Damaged(DriverError):
    """The files of a saved machine are not what was saved, or are somebody else's."""


class Incompatible(DriverError):
    """A saved machine can't go on with this host, this QEMU or this template."""
