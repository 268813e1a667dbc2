"""A machine with an agent that answers: its start, and the handshake that makes it one sandbox's own."""

import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kernel_gateway.drivers import DriverError, Vm, VmDriver
from kernel_gateway.errors import GuestUnresponsive
from kernel_gateway.guest.commands import Commands
from kernel_gateway.guest.link import Link
from kernel_gateway.held import Account
from kernel_gateway.kernel.kernel import Kernel

log = logging.getLogger(__name__)

SAMPLES_KEPT = 10_000


@dataclass(slots=True)
class Guest:
    """A machine with an agent that has passed the resume handshake.

    It works for the user `user`, in whose `home` relative paths start.
    """

    vm: Vm
    link: Link
    kernel: Kernel
    commands: Commands
    home: str = ""
    user: ClassVar[str] = "user"

    def adopt(self, account: Account, journals: Path | None) -> None:
        """Let the guest work for an owner from now on.

        Args:
            account: what waits in the server for the owner is held on it.
            journals: the directory for output that memory does not hold.
        """
        self.kernel.adopt(account, journals)
        self.commands.account = account

    async def kill(self) -> None:
        self.link.close()
        await self.vm.kill()


class Guests:
    """The starter of guests. It refuses a guest whose randomness is not fresh, because such a machine must not be used.

    `env` are the operator's variables for every sandbox. Variables of a sandbox's owner win.
    """

    def __init__(self, driver: VmDriver, env: dict[str, str] | None = None) -> None:
        self._driver = driver
        self._env = env or {}
        self.capabilities = driver.capabilities
        self._samples: dict[bytes, None] = {}

    async def start(self, template_id: str) -> Guest:
        """A new guest, running.

        Raises:
            DriverError, CellvmError: the guest did not start or did not acknowledge; nothing is left of it.
        """
        vm = await self._driver.start(template_id)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(vm.kill)
            try:
                link = await Link.open(vm.open(), time_scale=self._driver.capabilities.time_scale)
            except OSError as error:
                raise DriverError(f"the machine's agent can't be spoken to: {error}") from error
            undo.callback(link.close)
            guest = Guest(vm, link, Kernel(link), Commands(link))
            await self.resume(guest, sandbox_id="pool", hostname="sandbox", env={})
            undo.pop_all()
        return guest

    async def resume(self, guest: Guest, *, sandbox_id: str, hostname: str, env: dict[str, str]) -> None:
        """Do the handshake with a guest, whether it is from the pool or straight from a restore.

        Raises:
            CellvmError: the handshake failed; the caller destroys the guest.
        """
        resumed = await guest.link.resume(sandbox_id=sandbox_id, hostname=hostname, env={**self._env, **env})
        guest.home, sample = resumed.home, resumed.sample
        if sample in self._samples:
            log.critical("a guest's random sample was seen before: template clones are not being reseeded")
            raise GuestUnresponsive("the guest's randomness is not fresh")
        self._samples[sample] = None
        if len(self._samples) > SAMPLES_KEPT:
            del self._samples[next(iter(self._samples))]
