"""A machine with an agent that answers: its start, the handshake that makes it one sandbox's own, and its pause.

A guest is saved with the server's half of it, because what goes on in the machine belongs to conversations here: cells,
commands, and the messages that clients have not read. Beside the driver's files these are:

    host       where the link, the kernel and the commands stand
    journal    the kernel's messages, in pages
"""

import errno
import hashlib
import logging
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

import msgspec

from kernel_gateway.drivers import Captured, Damaged, DriverError, NoSpace, Stops, Suspends, Vm, VmDriver
from kernel_gateway.errors import CellvmError, GuestUnresponsive
from kernel_gateway.guest.commands import Commands, CommandState
from kernel_gateway.guest.link import Link, Rest
from kernel_gateway.held import Account
from kernel_gateway.images.cache import in_thread
from kernel_gateway.kernel.journal import Dump, Record, decode_page
from kernel_gateway.kernel.kernel import Kernel, KernelState
from kernel_gateway.private import foreign

log = logging.getLogger(__name__)

SAMPLES_KEPT = 10_000
SETTLING = 30.0
"""Seconds that a kernel which is being replaced may take before a pause, times the driver's time scale."""
_SIZE = struct.Struct(">I")
"""A page's size, in front of it."""


class HostState(msgspec.Struct):
    """The server's half of a saved guest. `journal` is the SHA-256 of the journal's file."""

    home: str
    link: Rest
    kernel: KernelState
    commands: list[CommandState]
    journal: bytes


_host = msgspec.msgpack.Decoder(HostState)


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


class Identity(NamedTuple):
    """What a copy of a sandbox becomes: another sandbox, with its variables."""

    sandbox_id: str
    env: dict[str, str]


class Still:
    """How a guest stood at one moment, with the server's half of it. It must be closed."""

    def __init__(self, captured: Captured, host: HostState, dump: Dump) -> None:
        self.captured = captured
        self._host = msgspec.msgpack.encode(host)  # what it is made of goes on to change
        self._dump = dump

    def host(self) -> tuple[HostState, Iterator[list[Record]]]:
        """The server's half, and the pages of the kernel's journal. Both are the caller's own."""
        return _host.decode(self._host), map(decode_page, self._dump.pages())

    async def size(self) -> int:
        """Bytes of disk that writing it takes at most, without the kernel's messages."""
        return await self.captured.size() + len(self._host)

    async def write(self, directory: Path) -> None:
        """Write it to an empty directory.

        Raises:
            NoSpace: the disk has no room.
            DriverError: it can't be written.
        """
        await self.captured.write(directory)
        await in_thread(_write_host, directory, _host.decode(self._host), self._dump)

    def close(self) -> None:
        self.captured.close()
        self._dump.close()


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
        guest.home = resumed.home
        self._check_fresh(resumed.sample)

    @property
    def can_save(self) -> bool:
        """Whether guests can be saved and restored."""
        return isinstance(self._driver, Suspends)

    @asynccontextmanager
    async def still(self, guest: Guest, *, goes_on: bool, alone: bool = False) -> AsyncIterator["Still"]:
        """Capture a guest. It stands still within the block, and goes on after it.

        If its link is closed within the block, the guest is not used any more.

        Args:
            goes_on: what this gives is used after the block, and closed by the caller.
            alone: leave out the kernel's messages, and what its clients have asked for.

        Raises:
            NoSpace: the disk has no room.
            DriverError: it can't be captured.
            CellvmError: the guest does not come to rest, or its link was closed meanwhile.
        """
        driver = self._driver
        assert isinstance(driver, Suspends)
        await guest.kernel.settled(SETTLING * self._driver.capabilities.time_scale)
        async with guest.link.at_rest(), AsyncExitStack() as after:
            after.push_async_callback(self._go_on, guest)
            captured = await driver.capture(guest.vm, goes_on=goes_on)
            with ExitStack() as undo:
                undo.callback(captured.close)
                states, running = guest.commands.at_rest()
                kernel = guest.kernel.state_at_rest()
                if alone:
                    kernel, dump = kernel.alone(), Dump(None, [], [], [])
                else:
                    dump = guest.kernel.journal.dump()
                host = HostState(guest.home, guest.link.rest(running), kernel, states, b"")
                if goes_on:
                    dump = await in_thread(dump.detached)
                undo.callback(dump.close)
                still = Still(captured, host, dump)
                undo.pop_all()
            if not goes_on or guest.link.closed.done():
                after.callback(still.close)
            if guest.link.closed.done():  # a sandbox that goes back gives its kernel another machine
                raise guest.link.closed.result()
            yield still

    async def _go_on(self, guest: Guest) -> None:
        """Let a guest that stood still go on, if it is used. One that does not is given up."""
        if guest.link.closed.done():
            return
        assert isinstance(guest.vm, Stops)
        try:
            await guest.vm.cont()
            self._check_fresh((await guest.link.cont()).sample)
        except (DriverError, CellvmError) as error:
            guest.link.close(GuestUnresponsive(f"the machine does not go on after it stood still: {error}"))

    async def restore(
        self,
        source: "Path | Still",
        account: Account,
        journals: Path | None,
        enforce: Callable[[Vm], Awaitable[None]],
        another: Identity | None = None,
    ) -> Guest:
        """A guest that goes on where one was captured. All that went on in it goes on.

        Args:
            source: the directory that it was written to, or how it stood.
            account, journals: as of `Guest.adopt`.
            enforce: called with the machine before it runs.
            another: the sandbox that it becomes; None for the one that it was.

        Raises:
            Damaged, Incompatible, DriverError: as `Suspends.restore`.
            CellvmError: the guest does not acknowledge, or there is no room for what it holds. Nothing is left of it.
        """
        driver = self._driver
        assert isinstance(driver, Suspends)
        host, pages = await in_thread(_read_host, source) if isinstance(source, Path) else source.host()
        vm = await driver.restore(source if isinstance(source, Path) else source.captured)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(vm.kill)
            await enforce(vm)
            try:
                link = await Link.open(vm.open(), rest=host.link, time_scale=self._driver.capabilities.time_scale)
            except OSError as error:
                raise DriverError(f"the machine's agent can't be spoken to: {error}") from error
            undo.callback(link.close)
            guest = Guest(vm, link, Kernel(link), Commands(link), host.home)
            guest.adopt(account, journals)
            journal = guest.kernel.journal
            await in_thread(journal.restore, next(pages), pages, host.kernel.last, host.kernel.end)
            guest.kernel.restore(host.kernel)
            guest.commands.restore(host.commands, account)
            assert isinstance(vm, Stops)
            await vm.cont()
            if another is None:
                self._check_fresh((await link.cont()).sample)
            else:
                env = {**self._env, **another.env}
                resumed = await link.resume(
                    sandbox_id=another.sandbox_id, hostname=another.sandbox_id, env=env, is_copy=True
                )
                self._check_fresh(resumed.sample)
            undo.pop_all()
        return guest

    def _check_fresh(self, sample: bytes) -> None:
        if sample in self._samples:
            log.critical("a guest's random sample was seen before: template clones are not being reseeded")
            raise GuestUnresponsive("the guest's randomness is not fresh")
        self._samples[sample] = None
        if len(self._samples) > SAMPLES_KEPT:
            del self._samples[next(iter(self._samples))]


def _write_host(directory: Path, host: HostState, dump: Dump) -> None:
    """Write the server's half. This runs in a thread.

    Raises:
        NoSpace: the disk has no room.
    """
    try:
        digest = hashlib.sha256()
        with _new(directory / "journal") as file:
            for page in dump.pages():
                for data in (_SIZE.pack(len(page)), page):
                    digest.update(data)
                    file.write(data)
            file.flush()
            os.fsync(file.fileno())
        host.journal = digest.digest()
        content = msgspec.msgpack.encode(host)
        with _new(directory / "host") as file:
            file.write(hashlib.sha256(content).digest() + content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else DriverError
        raise kind(f"the machine could not be saved: {error}") from error


def _new(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _read_host(directory: Path) -> tuple[HostState, Iterator[list[Record]]]:
    """Read and check the server's half. This runs in a thread.

    Raises:
        Damaged: it is not what was written.
    """
    try:
        if why := foreign(directory.stat()):
            raise Damaged(f"{directory}: it {why}")
        content = (directory / "host").read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise Damaged(f"{directory / 'host'}: its content is not what was written")
        host = _host.decode(content[32:])
        journal = (directory / "journal").read_bytes()
    except (OSError, msgspec.MsgspecError) as error:
        raise Damaged(f"{directory}: {error}") from error
    if hashlib.sha256(journal).digest() != host.journal:
        raise Damaged(f"{directory / 'journal'}: its content is not what was written")
    return host, _pages(journal)


def _pages(journal: bytes) -> Iterator[list[Record]]:
    at = 0
    while at < len(journal):
        (size,) = _SIZE.unpack_from(journal, at)
        yield decode_page(journal[at + _SIZE.size : at + _SIZE.size + size])
        at += _SIZE.size + size
