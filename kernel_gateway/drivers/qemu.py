"""Driver `qemu`: every sandbox is a microVM, restored from its template's snapshot.

A machine's whole estate is inherited descriptors: socket pairs for the agent's channel, QMP and the console, a disk
file without a name, and the template's sealed memory. So whatever happens to the server (kill -9 too), the kernel
takes everything back: the parent-death signal ends QEMU, and nothing is left in any directory.

Three ways to run one: `boot` starts the guest's kernel (only to make a template, and to probe KVM), `start` restores a
template's snapshot, `restore` goes on with a machine that was saved.

A saved machine begins as a clone of its template. The server writes the pages of memory that differ into it, and then
QEMU loads the saved state of the devices instead of the template's (docs/adr/0020).
"""

import asyncio
import errno
import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kernel_gateway.drivers import Capabilities, Damaged, DriverError, Incompatible, Nic, Nics, NoSpace
from kernel_gateway.drivers.base import Base, Image
from kernel_gateway.drivers.captured import Captured, with_small_memory
from kernel_gateway.drivers.jail import SERVER, Cell, Jail, opened_for_machines
from kernel_gateway.drivers.pages import at_places, copy_pages, memory_places, own_pages
from kernel_gateway.drivers.qemu_argv import Descriptors, Machine, qemu
from kernel_gateway.drivers.qmp import Qmp
from kernel_gateway.drivers.saved import TEMPLATE, Saved
from kernel_gateway.images.cache import in_thread
from kernel_gateway.images.snapshot import SEALS, Snapshot, SnapshotCorrupt, copy_disk, memory_file

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
COPIED_IN_MEMORY = 256 * 1024**2
"""Bytes of a machine's own memory that are copied to memory. A larger copy goes to the disk, which takes longer."""
T = TypeVar("T")
_CAPABILITIES = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
IMAGE = ("kernel", "initrd", "root")
"""The names of an image's files where a saved machine keeps them, in the order of Image's fields."""
HOSTS = {"qemu": "QEMU", "firmware": "firmware", "argv": "QEMU's arguments", "cpu": "processor"}
"""The part of what a snapshot was made with that is the host's, and what people call it."""


class QemuVm:
    """One QEMU process. `stop` and `cont` make it a `Stops`, `nic` a `Networked`.

    `base` is what it was restored from, None if it was booted.
    """

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
        self.base: Base | None = None
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
    def disk(self) -> int:
        """Its disk, open as long as it lives."""
        return self._disk

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

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

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
    except (Damaged, NoSpace):
        await vm.kill()
        raise
    except (TimeoutError, DriverError) as error:
        await vm.kill()
        raise DriverError(f"the machine did not start: {error}\n{vm.console_text[-2000:]}") from error
    except BaseException:
        await vm.kill()
        raise


@contextmanager
def _told_as_driver_error(what: str = "the machine could not be started") -> Iterator[None]:
    """What the host refuses (descriptors, processes, space) is a machine that could not be started, or saved."""
    try:
        yield
    except OSError as error:
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else DriverError
        raise kind(f"{what}: {error}") from error


def _pwrite(fd: int, buffer: memoryview, at: int) -> int:
    return os.pwrite(fd, buffer, at)


def _held(content: bytes) -> int:
    """A sealed memory file with that content."""
    fd = memory_file("devices")
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def _kept_template(saved: Saved, machine: Machine) -> Base:
    """The template's snapshot and image that a saved machine has kept. This runs in a thread."""
    directory = saved.directory / TEMPLATE
    files = {path.name: path for path in directory.iterdir()} if directory.is_dir() else {}
    if not files:
        raise Incompatible("its template was built anew, and the snapshot that it needs could not be kept")
    try:
        snapshot = Snapshot.load(directory)
    except SnapshotCorrupt as error:
        raise Damaged(str(error)) from error
    found = snapshot.manifest
    try:
        if (found.made_with, found.tsc_khz) != (saved.manifest.made_with, saved.manifest.tsc_khz):
            raise Damaged(f"{directory}: it is another snapshot than the machine was cloned from")
        image = Image(*opened_for_machines([files[name] for name in IMAGE]))
    except BaseException:
        snapshot.close()
        raise
    return Base(snapshot, image, replace(machine, tsc_khz=found.tsc_khz), files)


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
        self._templates: dict[str, Base] = {}
        self._kept: dict[tuple[str, ...], Base] = {}
        hardware = accelerator == "kvm"
        self.capabilities = Capabilities(
            isolation="microvm",
            accelerator=accelerator,
            time_scale=1.0 if hardware else TCG_TIME_SCALE,
            network="off" if nics is None else nics.mechanism,
        )

    def offer(
        self, template_id: str, snapshot: Snapshot, image: Image, machine: Machine, files: dict[str, Path] | None = None
    ) -> None:
        """From now on `start` knows this template.

        Args:
            files: the files of snapshot and image, which saved machines keep by links.
        """
        self._templates[template_id] = Base(snapshot, image, machine, files or {})

    async def start(self, source: str) -> QemuVm:
        """Restore a machine from its template's snapshot and let it run.

        Raises:
            DriverError: it could not be started; nothing is left behind.
        """
        async with self._clone(self._templates[source]) as vm:
            await vm.cont()
        return vm

    @asynccontextmanager
    async def _clone(self, base: Base, saved: Saved | Captured | None = None) -> AsyncIterator[QemuVm]:
        """A machine that stands still, as its template's snapshot has it, or as it was saved or captured.

        If the block fails, nothing is left of the machine.
        """
        snapshot = base.snapshot
        with ExitStack() as opened, _told_as_driver_error():
            disk = self._file_on_disk()
            opened.callback(os.close, disk)
            copy_disk(snapshot.disk, disk)
            devices = snapshot.state
            if saved is not None:
                await in_thread(saved.put_pages, "disk", partial(_pwrite, disk), os.fstat(disk).st_size)
                devices = _held(await in_thread(saved.content, "state"))
                opened.callback(os.close, devices)
            # Each reader needs a file position of its own: opened anew, not duplicated.
            state = os.open(f"/proc/self/fd/{devices}", os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, state)
            vm = self._spawn(base.machine, base.image, snapshot.memory, disk, await self._card(), template=False)
            vm.base = base
            async with _whole_or_nothing(vm):
                await vm.cell.confine(vm.pid)
                qmp = await vm.control()
                if saved is not None:  # before the devices, because they look at their queues in memory
                    memory = os.open(f"/proc/{vm.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
                    opened.callback(os.close, memory)
                    write = at_places(memory_places(vm.pid, snapshot.memory), os.pwritev, memory)
                    await in_thread(saved.put_pages, "memory", write, base.machine.ram_mb << 20)
                await qmp.execute("migrate-set-capabilities", capabilities=_CAPABILITIES)
                await qmp.execute("migrate-incoming", uri=await qmp.pass_state(state))
                await qmp.migrated()
                yield vm

    async def restore(self, source: Path | Captured) -> QemuVm:
        """A machine that stands where another one was captured, from its files or as it was captured.

        Raises:
            Damaged: the files are not what was saved.
            Incompatible: it can't go on here; the text says why.
            DriverError: it could not be started. In all cases nothing is left behind.
        """
        if isinstance(source, Captured):
            async with self._clone(source.base, source) as vm:
                return vm
        saved = await in_thread(Saved, source)
        async with self._clone(await self._base_of(saved), saved) as vm:
            return vm

    async def _base_of(self, saved: Saved) -> Base:
        """What a saved machine was cloned from: the template's present snapshot, or the one that it has kept."""
        manifest = saved.manifest
        present = self._templates.get(manifest.template)
        if present is None:
            raise Incompatible(f"its template {manifest.template!r} is not offered by this server")
        there = present.snapshot.manifest
        if (there.made_with, there.tsc_khz) == (manifest.made_with, manifest.tsc_khz):
            return present
        for name, words in HOSTS.items():
            if there.made_with.get(name) != manifest.made_with.get(name):
                raise Incompatible(f"it was saved with another {words} than this host has now")
        if bool(manifest.tsc_khz) != bool(there.tsc_khz):
            raise Incompatible("its guest's clock counts in another way than this host's")
        key = (manifest.template, str(manifest.tsc_khz), *(f"{k}={v}" for k, v in sorted(manifest.made_with.items())))
        if key not in self._kept:
            kept = await in_thread(_kept_template, saved, present.machine)
            if key in self._kept:  # another restore was faster
                kept.snapshot.close()
                kept.image.close()
            else:
                self._kept[key] = kept
        return self._kept[key]

    async def capture(self, vm: QemuVm, *, goes_on: bool) -> Captured:
        """Stop a machine, and hold what it has that its template has not.

        Args:
            goes_on: the machine may go on while the capture is used, which takes a copy of its memory and its disk.

        Raises:
            NoSpace: the disk has no room.
            DriverError: the machine can't be read, or has ended.
        """
        base = vm.base
        assert base is not None
        with ExitStack() as opened, _told_as_driver_error("the machine could not be captured"):
            # The files are opened here, where the machine is known to live: another process may have its number later.
            memory = os.open(f"/proc/{vm.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, memory)
            disk = os.dup(vm.disk)
            opened.callback(os.close, disk)
            places = memory_places(vm.pid, base.snapshot.memory)
            with ExitStack() as used:
                pagemap = os.open(f"/proc/{vm.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
                used.callback(os.close, pagemap)
                devices = memory_file("devices")
                used.callback(os.close, devices)
                writable = os.open(f"/proc/self/fd/{devices}", os.O_WRONLY | os.O_CLOEXEC)
                used.callback(os.close, writable)
                await vm.stop()
                await (await vm.control()).save_devices(writable)
                own = await in_thread(lambda: list(own_pages(pagemap, places)))
                if goes_on:
                    size = sum(length for _, length in own)
                    copy = memory_file("memory") if size <= COPIED_IN_MEMORY else self._file_on_disk()
                    opened.callback(os.close, copy)
                    places = await in_thread(copy_pages, vm.pid, places, own, copy)
                    memory, original, disk = copy, disk, self._file_on_disk()
                    opened.callback(os.close, disk)
                    await in_thread(copy_disk, original, disk)
                if vm.has_ended:
                    raise DriverError("the machine ended while it was captured")
                state = with_small_memory(base.snapshot.state, devices)
            return Captured(base, state, at_places(places, os.preadv, memory), own, disk, opened.pop_all())

    def _file_on_disk(self) -> int:
        """A new file without a name, where disks take their space."""
        return os.open(self._disk_dir, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)

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

    async def save_template(self, vm: QemuVm, state: int) -> None:
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
