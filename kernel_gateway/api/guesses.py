"""Strangers who offer unknown keys, by the address they come from."""

import ipaddress
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

PERIOD = 60.0
"""Seconds in which unknown keys from one address are counted together."""
LIMIT = 30
"""Unknown keys from one address in a period. Beyond that, its requests without a known key get 429."""
MOST = 10_000
"""Addresses that are remembered. Beyond that, the one whose period began first is forgotten."""


@dataclass(slots=True)
class _Period:
    since: float
    count: int = 0


class Guesses:
    """The unknown keys of the last minute. Whoever has a known key does not notice what others at the address do."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._periods: dict[str, _Period] = {}  # the one that began first comes first

    def __len__(self) -> int:
        return len(self._periods)

    def add(self, address: str) -> None:
        """Take note of an unknown key, and log it if it is the first of a period."""
        place, now = _place(address), self._clock()
        period = self._periods.get(place)
        if period is None or now - period.since >= PERIOD:
            before = self._periods.pop(place, _Period(now)).count
            if len(self._periods) >= MOST:
                del self._periods[next(iter(self._periods))]
            period = self._periods[place] = _Period(now)
            log.warning("an unknown key was offered from %s%s", place, f", and {before} before it" if before else "")
        period.count += 1

    def wait(self, address: str) -> int:
        """Seconds for which requests of that address without a known key are refused; 0 if they are not."""
        period = self._periods.get(_place(address))
        if period is None or period.count <= LIMIT:
            return 0
        return max(0, int(period.since + PERIOD - self._clock()) + 1)


def _place(address: str) -> str:
    """The address, or the network of an IPv6 address, because one client may have all addresses of a network."""
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(known) if known.version == 4 else str(ipaddress.ip_network((known, 64), strict=False))
