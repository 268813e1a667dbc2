"""Steps that make a restored machine distinct: randomness, time, names. Each step fails loudly.

Clones of one snapshot wake with the same random state, the same clock and the same identity. None of these may reach
a user. The source of the two ioctls is random(4). The IPython kernel's part is in kernel_main.py.
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
"""Nanoseconds that the clock may be off before it is stepped."""

_libc = ctypes.CDLL(None, use_errno=True)


def act_as(uid: int) -> None:
    """Resolve paths and own new files as `uid` from now on, in this thread only. Other powers stay root's."""
    _libc.setfsgid(uid)
    _libc.setfsuid(uid)


def acting_as() -> int:
    """The user as whom this thread handles files."""
    return int(_libc.setfsuid(-1))  # an impossible id changes nothing, and the answer is the present one


@contextmanager
def as_root(uid: int) -> Iterator[None]:
    """Handle files as root within the block, and as `uid` after it."""
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
    """Set the clock to the host's if it is off by more than CLOCK_STEP_NS, and return how far it was off, in ns."""
    drift = time.time_ns() - wall_ns
    if abs(drift) > CLOCK_STEP_NS:
        time.clock_settime_ns(time.CLOCK_REALTIME, wall_ns)
    return drift


def identify(hostname: str, runtime: Path) -> None:
    """Set a new host name, machine id and boot id. Init has linked the files in /etc and in /proc to these files."""
    socket.sethostname(hostname)
    (runtime / "hostname").write_text(f"{hostname}\n")
    (runtime / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {hostname}\n")
    (runtime / "machine-id").write_text(f"{os.urandom(16).hex()}\n")
    (runtime / "boot_id").write_text(f"{uuid.UUID(bytes=os.urandom(16), version=4)}\n")
