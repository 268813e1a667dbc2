"""Driver `qemu`: every sandbox is a microVM, restored from its template's snapshot.

A machine's whole estate is inherited descriptors: socket pairs for the agent's channel, QMP and the console, a disk
file without a name, and the template's sealed memory. So whatever happens to the server (kill -9 too), the kernel
takes everything back: the parent-death signal ends QEMU, and nothing is left in any directory.

Two ways to run one: `boot` starts the guest's kernel (only to make a template, and to probe KVM), `start` restores.
"""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

from kernel_gateway.drivers import Capabilities, DriverError, Nic, Nics
from kernel_gateway.drivers.jail import SERVER, Cell, Jail
from kernel_gateway.drivers.qemu_argv import Descriptors, Machine, qemu
from kernel_gateway.drivers.qmp import Qmp
from kernel_gateway.images.snapshot import Snapshot, copy_disk

CONSOLE_KEPT = 64 * 1024
"""Bytes of console output kept for error messages."""
START_TIMEOUT = 60.0
"""Seconds QEMU may take to start and load its state; it takes a tenth of one where nobody else is busy."""
LOOK_EVERY = 0.5
"""Seconds between two looks at what a machine has done."""
STANDSTILL = (0.5, 30.0)
"""A machine that has used less than so many seconds of processor time in so many seconds stands still. On a host with
a load of 30 for each processor it would still get twice as much."""
TCG_TIME_SCALE = 4.0
T = TypeVar("T")
_CAPABILITIES = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]


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


class QemuVm:
    """One QEMU process. `stop` and `cont` make it a `Stops`, `nic` a `Networked`."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        channel: socket.socket,
        qmp: socket.socket,
        console: socket.socket,
        nic: Nic | None,
        cell: Cell,
        disk: int,
    ) -> None:
        self.nic = nic
        self.cell = cell
        self._process = process
        self._disk = disk
        self._channel: socket.socket | None = channel
        self._console = console
        self._console_text = bytearray()
        self._printed = 0
        self._broken = ""
        self._qmp_socket = qmp
        self._qmp: Qmp | None = None
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        console.setblocking(False)
        self._loop.add_reader(console, self._console_readable)

    def __repr__(self) -> str:
        return f"<QemuVm pid={self.pid} {'ended' if self._ended.done() else 'running'}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def disk_bytes(self) -> int:
        return 0 if self._ended.done() else os.fstat(self._disk).st_blocks * 512

    @property
    def console_text(self) -> str:
        """The last CONSOLE_KEPT bytes the guest and QEMU printed, control characters shown as such."""
        text = self._console_text.decode("utf-8", "replace")
        return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)

    def open(self) -> socket.socket:
        channel, self._channel = self._channel, None  # now the caller's, who closes it
        assert channel is not None
        return channel

    async def progressing(self, work: Coroutine[Any, Any, T], cpu: float, *, renewed: bool = True) -> T:
        """The result of `work`, awaited for as long as the machine makes progress with what the work waits for.

        The limit is processor time that the machine has used, not time on the clock, because a machine on a busy host
        is slow without being stuck.

        Args:
            cpu: seconds of processor time that the machine may use without printing anything on its console.
            renewed: whether what it prints is progress; if not, the limit holds from the beginning to the end.

        Raises:
            DriverError: the machine has ended or makes no progress. The text says what was seen.
        """
        doing = asyncio.ensure_future(work)
        either: list[asyncio.Future[Any]] = [doing, self._ended]
        printed, since = self._printed, self._cpu_time()
        window, window_began = since, time.monotonic()
        try:
            while True:
                await asyncio.wait(either, timeout=LOOK_EVERY, return_when=asyncio.FIRST_COMPLETED)
                if doing.done():
                    return doing.result()
                if self._ended.done():
                    raise DriverError(f"the machine has ended: {self._ended.result()}")
                used, now = self._cpu_time(), time.monotonic()
                if renewed and self._printed != printed:
                    printed, since = self._printed, used
                if used - since > cpu:
                    without = " and printed nothing new" if renewed else ""
                    raise DriverError(f"the machine used {used - since:.0f} s of processor time{without}")
                if now - window_began > STANDSTILL[1]:
                    if used - window < STANDSTILL[0]:
                        raise DriverError(f"the machine has stood still for {now - window_began:.0f} s")
                    window, window_began = used, now
        finally:
            doing.cancel()

    def _cpu_time(self) -> float:
        """Seconds of processor time that the process has used, all its threads together."""
        # The number of a process's clock: clock_getcpuclockid(3), which Python does not have.
        try:
            return time.clock_gettime(~self.pid << 3 | 2)
        except OSError:  # it has ended just now
            return 0.0

    async def wait(self) -> str:
        return await asyncio.shield(self._ended)

    async def kill(self) -> None:
        if not self._ended.done():
            self._process.kill()
            await self.wait()

    async def stop(self) -> None:
        await (await self.control()).stop()

    async def cont(self) -> None:
        await (await self.control()).cont()

    async def control(self) -> Qmp:
        """The machine's QMP connection."""
        if self._qmp is None:
            self._qmp = await Qmp.open(self._qmp_socket, self._break)
        return self._qmp

    def _break(self, why: str) -> None:
        """End a machine that is of no use any more, though its QEMU would live on."""
        self._broken = self._broken or why
        self._process.kill()

    def _exited(self) -> None:
        code = self._process.wait()
        self._console_readable()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        os.close(self._disk)
        self._loop.remove_reader(self._console)
        self._console.close()
        # Only who listens on a descriptor may close it: its number may be somebody else's socket a moment later.
        if self._qmp is not None:
            self._qmp.close()
        else:
            self._qmp_socket.close()
        if self._channel is not None:
            self._channel.close()
        try:
            if self.nic is not None:
                self.nic.close()
            self.cell.release()
        finally:  # whatever fails there: many wait for this
            said = f"killed by {signal.Signals(-code).name}" if code < 0 else f"QEMU exited with {code}"
            self._ended.set_result(self._broken or said)

    def _console_readable(self) -> None:
        try:
            while data := self._console.recv(16 * 1024):
                self._printed += len(data)
                self._console_text += data
                del self._console_text[:-CONSOLE_KEPT]
        except BlockingIOError:
            return
        except OSError:
            pass
        self._loop.remove_reader(self._console)


@asynccontextmanager
async def _whole_or_nothing(vm: QemuVm) -> AsyncIterator[None]:
    """Kill the machine unless the block succeeds within START_TIMEOUT, also when it is cancelled."""
    try:
        async with asyncio.timeout(START_TIMEOUT):
            yield
    except (TimeoutError, DriverError) as error:
        await vm.kill()
        raise DriverError(f"the machine did not start: {error}\n{vm.console_text[-2000:]}") from error
    except BaseException:
        await vm.kill()
        raise


@contextmanager
def _told_as_driver_error() -> Iterator[None]:
    """What the host refuses (descriptors, processes, space) is a machine that could not be started."""
    try:
        yield
    except OSError as error:
        raise DriverError(f"the machine could not be started: {error}") from error


class Qemu:
    """Runs QEMU processes. One per server; `start` needs snapshots, `boot` does not.

    Args:
        binary: the QEMU program.
        accelerator: "kvm" or "tcg".
        disk_dir: where disks without a name take their space.
        jail: what stands round them.
        nics: where machines get their network cards; None for none.
    """

    def __init__(self, binary: str, accelerator: str, disk_dir: Path, jail: Jail, *, nics: Nics | None = None) -> None:
        self._binary = binary
        self._accelerator = accelerator
        self._disk_dir = disk_dir
        self._jail = jail
        self._nics = nics
        self._templates: dict[str, tuple[Snapshot, Image, Machine]] = {}
        hardware = accelerator == "kvm"
        self.capabilities = Capabilities(
            isolation="microvm",
            accelerator=accelerator,
            time_scale=1.0 if hardware else TCG_TIME_SCALE,
            network="off" if nics is None else nics.mechanism,
        )

    def offer(self, template_id: str, snapshot: Snapshot, image: Image, machine: Machine) -> None:
        """From now on `start` knows this template."""
        self._templates[template_id] = (snapshot, image, machine)

    async def start(self, source: str) -> QemuVm:
        """Restore a machine from its template's snapshot and let it run.

        Raises:
            DriverError: it could not be started; nothing is left behind.
        """
        snapshot, image, machine = self._templates[source]
        with ExitStack() as opened, _told_as_driver_error():
            disk = os.open(self._disk_dir, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            opened.callback(os.close, disk)
            copy_disk(snapshot.disk, disk)
            # Each reader needs a file position of its own: opened anew, not duplicated.
            state = os.open(f"/proc/self/fd/{snapshot.state}", os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, state)
            vm = self._spawn(machine, image, snapshot.memory, disk, await self._card(), template=False)
            async with _whole_or_nothing(vm):
                await vm.cell.confine(vm.pid)
                qmp = await vm.control()
                await qmp.execute("migrate-set-capabilities", capabilities=_CAPABILITIES)
                await qmp.execute("migrate-incoming", uri=await qmp.pass_state(state))
                await qmp.migrated()
                await qmp.cont()
        return vm

    async def boot(self, image: Image, machine: Machine, memory: int, disk: int) -> QemuVm:
        """Start the guest's kernel on a shared memory file and a disk, both the caller's.

        Raises:
            DriverError: it could not be started; nothing is left behind.
        """
        with _told_as_driver_error():
            vm = self._spawn(machine, image, memory, disk, await self._card(), template=True)
            async with _whole_or_nothing(vm):
                await vm.cell.confine(vm.pid)
                await vm.control()
        return vm

    async def save(self, vm: QemuVm, state: int) -> None:
        """Stop a booted machine for good and write the state of its devices to a file, open for writing only.

        Raises:
            DriverError: the state could not be written.
        """
        qmp = await vm.control()
        await qmp.execute("migrate-set-capabilities", capabilities=_CAPABILITIES)
        await qmp.stop()
        await qmp.execute("migrate", uri=await qmp.pass_state(state))
        await qmp.migrated()

    async def _card(self) -> Nic | None:
        return None if self._nics is None else await self._nics.take()

    def _spawn(
        self, machine: Machine, image: Image, memory: int, disk: int, nic: Nic | None, *, template: bool
    ) -> QemuVm:
        """Start QEMU; from here on the card is the machine's."""
        with ExitStack() as undo, ExitStack() as its:
            if nic is not None:
                undo.callback(nic.close)
            cell = self._jail.cell(machine, os.fstat(disk).st_size)
            undo.callback(cell.release)
            pairs = []
            for _ in range(3):
                ours, theirs = socket.socketpair()
                undo.callback(ours.close)
                its.callback(theirs.close)
                pairs.append((ours, theirs))
            (channel, its_channel), (qmp, its_qmp), (console, its_console) = pairs
            fds = Descriptors(
                kernel=image.kernel,
                initrd=image.initrd,
                memory=memory,
                root=image.root,
                disk=disk,
                channel=its_channel.fileno(),
                qmp=its_qmp.fileno(),
                console=its_console.fileno(),
                tap=None if nic is None else nic.tap,
            )
            argv = cell.command(qemu(self._binary, machine, fds, template=template))
            # The parent-death signal is tied to the thread that spawns: this must be the main one.
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=its_console.fileno(),
                stderr=its_console.fileno(),
                env={"PATH": os.defpath, SERVER: str(os.getpid())},
                cwd="/",
                pass_fds=(*fds.all(), *cell.fds),
                start_new_session=True,  # Ctrl-C is for the server, which lets requests finish
            )
            undo.pop_all()
        return QemuVm(process, channel, qmp, console, nic, cell, os.dup(disk))
