"""How often somebody may do something: so many times within a window of time. Pure."""

import math
from collections import deque

from kernel_gateway.errors import RateLimited


class Rate:
    """The events of every owner within the last `window` seconds. Times are seconds of any clock that never goes back.

    Args:
        most: events of one owner within a window.
    """

    def __init__(self, most: int, window: float = 60.0) -> None:
        self.most = most
        self.window = window
        self._times: dict[str, deque[float]] = {}

    def of(self, owner: str, now: float) -> int:
        """Number of an owner's events within the window."""
        times = self._times.get(owner, deque())
        while times and times[0] <= now - self.window:
            times.popleft()
        if not times:
            self._times.pop(owner, None)
        return len(times)

    def reset(self, owner: str, now: float) -> int:
        """Whole seconds until the oldest event is out of the window; 0 if there is none."""
        return math.ceil(self._times[owner][0] + self.window - now) if self.of(owner, now) else 0

    def count(self, owner: str, what: str, now: float) -> None:
        """Count an event.

        Args:
            what: what is counted, for the refusal's message.

        Raises:
            RateLimited: the owner has had as many in the window as one may; this one is not counted.
        """
        if self.of(owner, now) >= self.most:
            raise RateLimited(
                f"your key may create {self.most} {what} in {self.window:.0f} seconds, and has",
                limit=self.most,
                retry_after=self.reset(owner, now),
            )
        self._times.setdefault(owner, deque()).append(now)
