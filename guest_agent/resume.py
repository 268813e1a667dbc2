"""What makes a restored machine one of its own: randomness, time, names. Each step fails loudly.

Clones of one snapshot wake with the same random state, the same clock and the same identity; none of that may reach
a user. Sources: random(4) for the two ioctls; the kernel hook is in kernel_main.py.
"""

import ctypes
import fcntl
import os
import socket
import struct
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
CLOCK_STEP_NS = 50_000_000
"""The clock is stepped when it is further off than this."""

_libc = ctypes.CDLL(None, use_errno=True)


def act_as(uid: int) -> None:
    """From now on resolve paths and own new files as `uid` (this thread only; other powers stay root's)."""
    _libc.setfsgid(uid)
    _libc.setfsuid(uid)


@contextmanager
def as_root(uid: int) -> Iterator[None]:
    """Files are root's within the block, and those of `uid` after it."""
    act_as(0)
    try:
        yield
    finally:
        act_as(uid)


def add_entropy(entropy: bytes) -> None:
    """Credit the host's random bytes to the kernel's generator and make it reseed at once."""
    with open("/dev/random", "wb", buffering=0) as device:
        fcntl.ioctl(device, RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(device, RNDRESEEDCRNG)


def step_clock(wall_ns: int) -> int:
    """Set the clock to the host's when it is off by more than CLOCK_STEP_NS; returns how far it was off, in ns."""
    drift = time.time_ns() - wall_ns
    if abs(drift) > CLOCK_STEP_NS:
        time.clock_settime_ns(time.CLOCK_REALTIME, wall_ns)
    return drift


def identify(hostname: str, runtime: Path) -> None:
    """New host name, machine id and boot id. Init has linked the files of /etc, and the kernel's, to these."""
    socket.sethostname(hostname)
    (runtime / "hostname").write_text(f"{hostname}\n")
    (runtime / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {hostname}\n")
    (runtime / "machine-id").write_text(f"{os.urandom(16).hex()}\n")
    (runtime / "boot_id").write_text(f"{uuid.UUID(bytes=os.urandom(16), version=4)}\n")
