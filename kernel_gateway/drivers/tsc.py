"""The rate of this host's time stamp counter (TSC), which emulated processors share."""

import ctypes
import mmap
import time
from collections.abc import Callable

MEASURED_FOR = 0.05
"""Seconds between the two looks at the counter."""
LOOKS = 20
TOLERANCE = 250e-6
"""How far two measurements on one host may differ, as a part of the rate: 250 ppm are 22 s a day."""
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret


def tsc_khz() -> int:
    """Measure the counter against the host's clock, in kHz, for MEASURED_FOR seconds.

    Raises:
        OSError: this process may not have memory that it can both write and execute.
    """
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_RDTSC)
        code = ctypes.c_char.from_buffer(page)
        rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))
        first_ns, first = _look(rdtsc)
        time.sleep(MEASURED_FOR)
        last_ns, last = _look(rdtsc)
        del rdtsc, code  # the page can't be closed while they refer to it
    return round((last - first) * 1_000_000 / (last_ns - first_ns))


def _look(rdtsc: Callable[[], int]) -> tuple[int, int]:
    """Clock (ns) and counter at one moment: of several looks, the one that was interrupted least."""
    found = []
    for _ in range(LOOKS):
        # RAW, because a time server bends the other clock by more than TOLERANCE.
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        counter = rdtsc()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        found.append((after - before, (before + after) // 2, counter))
    _, clock, counter = min(found)
    return clock, counter


def is_same_rate(one: int, other: int) -> bool:
    """Whether two measured rates may be one host's."""
    return abs(one - other) <= TOLERANCE * max(one, other)
