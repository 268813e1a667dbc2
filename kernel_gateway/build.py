"""From a template's recipe to its verified snapshot: image, initramfs, one boot, warm kernel, save.

Everything is cached under a hash of what went into it, the QEMU version and the machine included, so the second start
of a server only verifies.
"""

import asyncio
import os
import re
import subprocess
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec

from guest_agent import wire
from kernel_gateway.drivers import DriverError
from kernel_gateway.drivers.jail import opened_for_machines
from kernel_gateway.drivers.qemu import Image, Qemu, QemuVm
from kernel_gateway.drivers.qemu_argv import Descriptors, Machine
from kernel_gateway.errors import CellvmError
from kernel_gateway.image import BuildError, Progress, build_image, build_initrd, content_hash, finished
from kernel_gateway.link import Link
from kernel_gateway.snapshot import FILES, FileDigest, Manifest, Snapshot, SnapshotCorrupt, copy_sparse, memory_file
from kernel_gateway.templates import Template

BOOT_TIMEOUT = 20.0
"""Seconds from QEMU's start to the agent's first answer, times the driver's time scale."""
LIFE_SIGN = b"Run /init as init process"
LIFE_SIGN_TIMEOUT = 8.0
"""Seconds until the guest's kernel must have said so; it takes about two under TCG."""
BOOT_ATTEMPTS = 8
WARM_TIMEOUT = 120.0
KVM_PROBE_TIMEOUT = 15.0
"""Seconds the real guest gets to boot on KVM before the verdict is no. On hardware it takes about two."""


def qemu_version(binary: str) -> str:
    """Such as "7.2.22".

    Raises:
        BuildError: the program can't be run.
    """
    try:
        text = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{binary} can't be run: {error}") from error
    found = re.search(r"version (\S+)", text)
    return found[1] if found else text.strip()


@dataclass(frozen=True, slots=True)
class Builder:
    """Builds what the driver `qemu` offers. `cache` holds all results; `ca_bundle` is copied into guests (or None)."""

    cache: Path
    binary: str
    ca_bundle: Path | None

    async def image(self, template: Template, step: Progress) -> Path:
        return await build_image(template, self.cache, self.ca_bundle, step)

    def open_image(self, directory: Path, initrd: Path) -> Image:
        """The files that machines of this image read, opened for the server's life."""
        kernel = next((directory / "boot/boot").glob("vmlinuz-*"))
        return Image(*opened_for_machines([kernel, initrd, directory / "root.erofs"]))

    async def ready(self, template: Template, driver: Qemu, step: Progress) -> None:
        """Build what is missing, verify, and offer the template on the driver.

        Raises:
            BuildError: a step failed.
        """

        def told(text: str) -> None:
            step(f"{template.id}: {text}")

        directory = await self.image(template, told)
        initrd = build_initrd(directory, self.cache)
        image = self.open_image(directory, initrd)
        machine = Machine(driver.capabilities.accelerator, template.vcpus, template.memory_mb)
        version = qemu_version(self.binary)
        numbers = range(8 if driver.capabilities.network == "off" else 9)
        argv = driver.command(machine, Descriptors(*numbers), template=True)[1:]
        key = content_hash(template.id, directory.name, initrd, version, repr(argv), repr(template))
        path = self.cache / "snapshots" / f"{template.id}-{key}"
        if not path.is_dir():
            manifest = Manifest(template=template.id, qemu_version=version, argv=argv, image=directory.name, files={})
            with finished(path) as work:
                await self._make(template, driver, image, machine, manifest, work, told)
        told("verify snapshot")
        try:
            snapshot = await asyncio.to_thread(Snapshot.load, path)
        except SnapshotCorrupt as error:
            raise BuildError(f"{error}\nDelete {path} and build again.") from error
        driver.offer(template.id, snapshot, image, machine)

    async def _make(
        self, template: Template, driver: Qemu, image: Image, machine: Machine, manifest: Manifest, work: Path,
        step: Progress,
    ) -> None:  # fmt: skip
        step("boot the template")
        memory = memory_file("template", machine.ram_mb * 1024 * 1024)
        disk = self._format(work / "disk", template.disk_mb)
        state = os.open(work / "state", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            vm = await self._boot(driver, image, machine, memory, disk)
            try:
                with closing(await Link.open(vm.open(), time_scale=driver.capabilities.time_scale)) as link:
                    await self._answering(link, vm, BOOT_TIMEOUT)
                    step("warm the kernel")
                    warm = wire.Warm(modules=template.warm, exercise=template.exercise)
                    await link.call(warm, wire.Done, timeout=WARM_TIMEOUT)
                    await link.call(wire.Flush(), wire.Done)
                    step("save the snapshot")
                    await driver.save(vm, state)
            except CellvmError as error:
                raise BuildError(f"the template did not get ready: {error}\n{vm.console_text[-3000:]}") from error
            finally:
                await vm.kill()
            with open(work / "memory", "w+b") as file:
                await asyncio.to_thread(copy_sparse, memory, file.fileno())
        finally:
            for fd in (memory, disk, state):
                os.close(fd)
        digests = {name: await asyncio.to_thread(_digest, work / name) for name in FILES}
        (work / "manifest.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, files=digests)))

    async def _boot(self, driver: Qemu, image: Image, machine: Machine, memory: int, disk: int) -> QemuVm:
        """Boot a machine whose kernel comes up.

        Under TCG the kernel measures its clock against an emulated timer. On a busy host that fails now and then, and
        the kernel hangs: about one boot in eight.
        """
        for _ in range(BOOT_ATTEMPTS):
            vm = await driver.boot(image, machine, memory, disk)
            if await vm.has_printed(LIFE_SIGN, LIFE_SIGN_TIMEOUT):
                return vm
            await vm.kill()
        raise BuildError(f"the guest's kernel did not come up in {BOOT_ATTEMPTS} attempts:\n{vm.console_text[-1500:]}")

    def _format(self, path: Path, size_mb: int) -> int:
        """A new sparse disk with an empty ext4. No journal: the disk does not outlive its machine's memory."""
        with path.open("wb") as file:
            file.truncate(size_mb * 1024 * 1024)
        command = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1", str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise BuildError(f"mkfs.ext4 failed: {getattr(error, 'stderr', error)}") from error
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    async def _answering(self, link: Link, vm: QemuVm, timeout: float) -> None:
        """Return when the agent answers; the guest drops what is sent before its port is open, so ask again."""
        deadline = time.monotonic() + timeout * link.time_scale
        while True:
            try:
                await link.call(wire.Ping(), wire.Done, timeout=0.5)
                return
            except CellvmError:
                if link.closed.done() or time.monotonic() > deadline:
                    raise

    async def probe_kvm(self, template: Template, driver: Qemu, step: Progress) -> bool:
        """Whether the real guest boots on this host's KVM. A `/dev/kvm` that opens proves nothing."""
        step("try KVM with the real guest")
        directory = await self.image(template, step)
        image = self.open_image(directory, build_initrd(directory, self.cache))
        machine = Machine("kvm", template.vcpus, template.memory_mb)
        memory = memory_file("probe", machine.ram_mb * 1024 * 1024)
        path = self.cache / f"probe-{os.getpid()}"
        try:
            disk = self._format(path, template.disk_mb)
            path.unlink()
            vm = await driver.boot(image, machine, memory, disk)
            try:
                with closing(await Link.open(vm.open())) as link:
                    await self._answering(link, vm, KVM_PROBE_TIMEOUT)
            finally:
                await vm.kill()
        except (BuildError, CellvmError, DriverError):
            return False
        finally:
            os.close(memory)
        return True


def _digest(path: Path) -> FileDigest:
    """Hash a file as `copy_sparse` does."""
    with path.open("rb") as source:
        sink = memory_file(path.name)
        try:
            return copy_sparse(source.fileno(), sink)
        finally:
            os.close(sink)
