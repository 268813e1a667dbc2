"""Machines in stock. Each is restored, has passed the resume handshake, has been exercised once, and stands still.

A create takes a machine in a single step and pays neither for the restore nor for the first cell's cold caches. The
stock is refilled in the background, one machine at a time, so that it does not starve the sandboxes at work.
"""

import asyncio
import logging
import time
from collections import deque

from guest_agent import wire
from kernel_gateway.drivers import DriverError, Stops
from kernel_gateway.guest.guest import Guest, Guests

log = logging.getLogger(__name__)

RETRY_AFTER_FAILURE = (1.0, 30.0)
"""First and longest pause, in seconds, after a machine could not be prepared."""
QUIET = 1.0
"""Seconds without a create after which a stock that is not empty is refilled."""
# The first cell warms the caches. The second one clears `_`, because it must be empty.
EXERCISE = ("1 + 1", "get_ipython().displayhook.flush(); del _0")


class Pool:
    """A stock of `size` guests of one template. Use `run` as a task."""

    def __init__(self, guests: Guests, template_id: str, size: int) -> None:
        self.template_id = template_id
        self.size = size
        self._guests = guests
        self._ready: deque[Guest] = deque()
        self._wanted = asyncio.Event()
        self._last_taken = -QUIET

    def __repr__(self) -> str:
        return f"<Pool {self.template_id} {self.ready}/{self.size} ready>"

    @property
    def ready(self) -> int:
        return len(self._ready)

    async def take(self) -> Guest | None:
        """A running guest, which is the caller's from now on; None if there is none in stock."""
        while self._ready:
            guest = self._ready.popleft()
            self._last_taken = time.monotonic()
            self._wanted.set()
            if not guest.link.closed.done():
                try:
                    if isinstance(guest.vm, Stops):
                        await guest.vm.cont()
                    return guest
                except BaseException as error:
                    await guest.kill()
                    if not isinstance(error, DriverError):
                        raise
        return None

    async def run(self) -> None:
        """Refill the stock until cancelled, then destroy it."""
        pause = RETRY_AFTER_FAILURE[0]
        try:
            while True:
                dead = [guest for guest in self._ready if guest.link.closed.done()]
                self._ready = deque(guest for guest in self._ready if guest not in dead)
                for guest in dead:
                    await guest.kill()
                if len(self._ready) >= self.size:
                    self._wanted.clear()
                    await self._wanted.wait()
                    continue
                # Refilling waits while sandboxes are being created, because they need the processors.
                while self._ready and (left := self._last_taken + QUIET - time.monotonic()) > 0:
                    await asyncio.sleep(left)
                try:
                    self._add(await self._prepare())
                    pause = RETRY_AFTER_FAILURE[0]
                except Exception as error:  # noqa: BLE001  if this task ended, every create would be a cold one
                    log.error("a machine for the pool could not be prepared: %s", error)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, RETRY_AFTER_FAILURE[1])
        finally:
            while self._ready:
                await self._ready.popleft().kill()

    def _add(self, guest: Guest) -> None:
        self._ready.append(guest)
        guest.link.closed.add_done_callback(lambda _: self._wanted.set())

    async def _prepare(self) -> Guest:
        guest = await self._guests.start(self.template_id)
        try:
            for code in EXERCISE:
                async for _ in guest.kernel.execute(code, timeout=30, quiet=True):
                    pass
            async with guest.link.ask(wire.Spawn(argv=["true"], env={}, cwd="/")) as conversation:
                await conversation.reply()
            await self._guests.resume(guest, sandbox_id="pool", hostname="sandbox", env={})
            if isinstance(guest.vm, Stops):
                await guest.vm.stop()
        except BaseException:
            await guest.kill()
            raise
        return guest
