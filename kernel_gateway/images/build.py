"""From a template's recipe to its verified snapshot: image, initramfs, one boot, warm kernel, save, first restore.

Everything is cached under a hash of what went into it, the QEMU version and the machine included, so the second start
of a server only verifies.
"""

import hashlib
import itertools
import logging
import math
import os
import re
import subprocess
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from guest_agent import wire
from kernel_gateway.drivers import DriverError
from kernel_gateway.drivers.base import Image
from kernel_gateway.drivers.jail import opened_for_machines
from kernel_gateway.drivers.qemu import IMAGE, Qemu, QemuVm
from kernel_gateway.drivers.qemu_argv import Descriptors, Machine, qemu
from kernel_gateway.drivers.tsc import is_same_rate, tsc_khz
from kernel_gateway.errors import CellvmError, GuestUnresponsive
from kernel_gateway.guest.guest import Guests
from kernel_gateway.guest.link import Link
from kernel_gateway.images.cache import Cache, in_thread
from kernel_gateway.images.image import (
    BuildError,
    Progress,
    build_image,
    build_initrd,
    content_hash,
    damage,
    finished,
    initrd_there,
    newest_image,
)
from kernel_gateway.images.snapshot import (
    FILES,
    FileDigest,
    Manifest,
    Snapshot,
    SnapshotCorrupt,
    copy_sparse,
    memory_file,
)
from kernel_gateway.images.templates import Template

log = logging.getLogger(__name__)

# Seconds of processor time, not of the clock, so that they hold on a busy host too.
BOOT_CPU = 40.0
"""What a booting machine may use without printing anything. A whole boot takes about 8 under TCG."""
WARM_CPU = 400.0
"""What warming may use. It takes about 30 under TCG."""
PROBE_CPU = 6.0
"""What the real guest gets to boot on KVM before the verdict is no. On hardware it takes about two."""
BOOT_ATTEMPTS = 3
ASK_EVERY = 0.1
"""Seconds between two questions whether the agent is there, times the driver's time scale."""
LAST_WORDS = 1500
"""Characters of a machine's console that an error shows."""
FIRMWARE = "bios-microvm.bin"


class HostRefused(BuildError):
    """The host has no room for a first machine, or is too slow for one: that says nothing of the snapshot."""


class NotBooted(BuildError):
    """The template's machine did not come up. Another boot may."""


def qemu_version(binary: str) -> str:
    """Such as "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)": the distribution's revision is part of it.

    Raises:
        BuildError: the program can't be run.
    """
    found = re.search(r"version (.+)", _told(binary, "--version"))
    return found[1].strip() if found else "unknown"


def firmware(binary: str) -> str:
    """A digest of the firmware that QEMU would load, which other packages than its own bring."""
    digest = hashlib.sha256()
    for line in _told(binary, "-L", "help").splitlines():
        file = Path(line.strip()) / FIRMWARE
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _told(binary: str, *arguments: str) -> str:
    try:
        return subprocess.run([binary, *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{binary} can't be run: {error}") from error


def cpu_identity(cpuinfo: str, release: str) -> str:
    """What a machine on hardware KVM sees of the host's processor and kernel, from /proc/cpuinfo and `uname -r`.

    A snapshot of such a machine must not be restored under another: its guest has chosen its instructions by them.
    """
    first, _, _ = cpuinfo.partition("\n\n")
    fields = dict(re.findall(r"^([^:\n]+?)\s*:[ \t]*(.*)$", first, re.MULTILINE))
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags")
    return "\n".join([release, *(f"{name}={fields.get(name, '')}" for name in names)])


def this_cpu() -> str:
    """The identity of this host's processor and kernel."""
    return cpu_identity(Path("/proc/cpuinfo").read_text(), os.uname().release)


def snapshot_path(cache: Cache, manifest: Manifest) -> Path:
    """Where the snapshot that fits lies, or will lie.

    The rate of an emulated guest's clock is in the name, so that hosts of several rates keep their snapshots side by
    side. Of the rates that are there, one that may be this host's counts as this host's, because measurements differ.
    """
    folder, key = cache.root / "snapshots", content_hash(msgspec.json.encode(manifest.made_with))
    if not manifest.tsc_khz:
        return folder / f"{manifest.template}-{key}"
    name = re.compile(rf"{re.escape(manifest.template)}-(\d+)khz-{key}")
    rates = [int(found[1]) for path in folder.iterdir() if (found := name.fullmatch(path.name))]
    near = [rate for rate in rates if is_same_rate(rate, manifest.tsc_khz)]
    rate = min(near, key=lambda rate: abs(rate - manifest.tsc_khz), default=manifest.tsc_khz)
    return folder / f"{manifest.template}-{rate}khz-{key}"


def machine_of(template: Template, accelerator: str) -> Machine:
    """The machine that a template's sandboxes are, on this host."""
    rate = 0
    if accelerator == "tcg":
        try:
            rate = tsc_khz()
        except OSError as error:
            log.warning("guests measure their clocks themselves, because this process can't: %s", error)
    return Machine(accelerator, template.vcpus, template.memory_mb, rate)


@dataclass(frozen=True, slots=True)
class Builder:
    """Builds what the driver `qemu` offers. `cache` holds all results; `ca_bundle` is copied into guests (or None)."""

    cache: Cache
    binary: str
    ca_bundle: Path | None

    def image_there(self, template: Template) -> Path | None:
        """The template's image, if the cache has it whole."""
        found = newest_image(template, self.cache, self.ca_bundle)
        return None if found is None or damage(found) else self.cache.use(found)

    async def image(self, template: Template, step: Progress, *, anew: bool = False) -> Path:
        return await build_image(template, self.cache, self.ca_bundle, step, anew=anew)

    def open_image(self, directory: Path, initrd: Path) -> Image:
        """The files that machines of this image read, opened for the server's life."""
        return Image(*opened_for_machines(image_files(directory, initrd)))

    async def ready(self, template: Template, driver: Qemu, progress: Progress) -> None:
        """Build what is missing, verify, offer the template on the driver, and see a first machine answer.

        A cached snapshot that fails any of this is deleted and made again, once. Only who has to build waits for
        others who build or prune.

        Raises:
            BuildError: a step failed.
        """

        def named(step: Progress) -> Progress:
            return lambda text: step(f"{template.id}: {text}")

        if await self._is_there(template, driver, named(progress)):
            return
        async with self.cache.building(progress) as step:
            directory = await self.image(template, named(step))
            initrd = await in_thread(build_initrd, directory, self.cache)
            await self._snapshot(template, driver, directory, initrd, named(step))

    async def _is_there(self, template: Template, driver: Qemu, step: Progress) -> bool:
        """Offer the template if the cache has all of it. What is pruned meanwhile is not there any more."""
        try:
            directory = await in_thread(self.image_there, template)
            initrd = directory and await in_thread(initrd_there, directory, self.cache)
            if directory is None or initrd is None:
                return False
            machine = await in_thread(machine_of, template, driver.capabilities.accelerator)
            manifest = await in_thread(self._expected, template, driver, machine, directory, initrd)
            path = snapshot_path(self.cache, manifest)
            if not path.is_dir():
                return False
            image = self.open_image(directory, initrd)
        except OSError:
            return False
        try:
            files = _files(path, directory, initrd)
            await self._offer(template, driver, path, manifest, image, machine, files, step)
        except BaseException as error:
            image.close()
            if isinstance(error, HostRefused) or not isinstance(error, (BuildError, OSError)):
                raise
            return False  # whoever may delete it says why
        return True

    async def _snapshot(self, template: Template, driver: Qemu, directory: Path, initrd: Path, step: Progress) -> None:
        """Offer the template from its snapshot, which is made if there is none of use. Within `building`."""
        machine = await in_thread(machine_of, template, driver.capabilities.accelerator)
        # In a thread, because a server may be at work already.
        manifest = await in_thread(self._expected, template, driver, machine, directory, initrd)
        path = snapshot_path(self.cache, manifest)
        image, files = self.open_image(directory, initrd), _files(path, directory, initrd)
        try:
            if path.is_dir():
                try:
                    await self._offer(template, driver, path, manifest, image, machine, files, step)
                    return
                except HostRefused:
                    raise
                except BuildError as error:
                    log.warning("the cached snapshot of %s is of no use and is made again: %s", template.id, error)
                    self.cache.drop(path)
            await self._make(template, driver, image, machine, manifest, path, step)
            await self._offer(template, driver, path, manifest, image, machine, files, step)
        except BaseException:
            image.close()
            raise

    def _expected(self, template: Template, driver: Qemu, machine: Machine, image: Path, initrd: Path) -> Manifest:
        """What a snapshot that fits here was made with."""
        return Manifest(
            template=template.id,
            made_with={
                "recipe": repr(template),
                "image": image.name,
                "initrd": initrd.parent.name,
                "qemu": qemu_version(self.binary),
                "firmware": firmware(self.binary),
                "argv": _argv(machine, network=driver.capabilities.network != "off"),
                "cpu": this_cpu() if machine.accelerator == "kvm" else "",
            },
            tsc_khz=machine.tsc_khz,
            files={},
        )

    async def _offer(
        self, template: Template, driver: Qemu, path: Path, expected: Manifest, image: Image, machine: Machine,
        files: dict[str, Path], step: Progress,
    ) -> None:  # fmt: skip
        """Verify a snapshot, offer it on the driver, and restore one machine from it.

        Raises:
            BuildError: it is damaged, was made elsewhere, or its machines don't answer.
        """
        step("verify the snapshot")
        try:
            snapshot = await in_thread(Snapshot.load, self.cache.use(path))
        except SnapshotCorrupt as error:
            raise BuildError(str(error)) from error
        try:
            found = snapshot.manifest
            if found.made_with != expected.made_with:
                raise BuildError(f"{path}: it was made with something else than its name says")
            if not is_same_rate(found.tsc_khz, expected.tsc_khz):
                raise BuildError(
                    f"its guest's clock counts {found.tsc_khz} kHz, and this host's {expected.tsc_khz} kHz"
                )
            # The guest goes on by the rate that it was told: the machine is the one that was saved.
            driver.offer(template.id, snapshot, image, replace(machine, tsc_khz=found.tsc_khz), files)
            step("start a first machine")
            try:
                guest = await Guests(driver).start(template.id)
            except (DriverError, CellvmError) as error:
                if isinstance(error.__cause__, OSError):  # a time-out is one, too
                    raise HostRefused(f"no machine of the template {template.id} could be started: {error}") from error
                raise BuildError(f"a machine that was restored from the snapshot does not answer: {error}") from error
            await guest.kill()
        except BaseException:
            snapshot.close()
            raise

    async def _make(
        self, template: Template, driver: Qemu, image: Image, machine: Machine, manifest: Manifest, path: Path,
        step: Progress,
    ) -> None:  # fmt: skip
        """Make a snapshot. A machine that does not come up is booted again, BOOT_ATTEMPTS times in all."""
        for attempt in range(1, BOOT_ATTEMPTS + 1):
            try:
                with finished(path) as work:
                    await self._boot(template, driver, image, machine, manifest, work, step)
                return
            except NotBooted as error:
                if attempt == BOOT_ATTEMPTS:
                    raise
                log.warning("boot %d of at most %d: %s", attempt, BOOT_ATTEMPTS, error)
            except OSError as error:
                why = f"the snapshot of {template.id} can't be made in {path.parent}: {error}"
                raise BuildError(f"{why}. What was downloaded and built so far is kept") from error

    async def _boot(
        self, template: Template, driver: Qemu, image: Image, machine: Machine, manifest: Manifest, work: Path,
        step: Progress,
    ) -> None:  # fmt: skip
        step("boot the template")
        with ExitStack() as opened:
            memory = memory_file("template", machine.ram_mb * 1024 * 1024)
            opened.callback(os.close, memory)
            disk = await in_thread(self._format, work / "disk", template.disk_mb)
            opened.callback(os.close, disk)
            state = os.open(work / "state", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            opened.callback(os.close, state)
            try:
                vm = await driver.boot(image, machine, memory, disk)
            except DriverError as error:
                raise NotBooted(_what_was_seen(template, error)) from error
            try:
                with closing(await Link.open(vm.open(), time_scale=driver.capabilities.time_scale)) as link:
                    try:
                        await vm.progressing(_answered(link), BOOT_CPU)
                    except (CellvmError, DriverError) as error:
                        raise NotBooted(_what_was_seen(template, error, vm)) from error
                    step("warm the kernel")
                    warm = wire.Warm(modules=template.warm, exercise=template.exercise)
                    await vm.progressing(link.call(warm, wire.Done, timeout=math.inf), WARM_CPU)
                    await link.call(wire.Flush(), wire.Done)
                    step("save the snapshot")
                    await link.quiesce()
                    await driver.save_template(vm, state)
            except (CellvmError, DriverError) as error:
                raise BuildError(_what_was_seen(template, error, vm)) from error
            finally:
                await vm.kill()
            with open(work / "memory", "w+b") as file:
                await in_thread(copy_sparse, memory, file.fileno())
        digests = {name: await in_thread(_digest, work / name) for name in FILES}
        (work / "manifest.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, files=digests)))

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

    def verdict_path(self, template: Template, image: Path) -> Path:
        """Where a verdict on this host's KVM lies. It holds for this processor, QEMU, machine and image."""
        argv = _argv(machine_of(template, "kvm"), network=False)
        key = content_hash(this_cpu(), qemu_version(self.binary), firmware(self.binary), argv, image.name)
        return self.cache.root / "kvm" / key

    async def probe_kvm(self, template: Template, driver: Qemu, step: Progress) -> str:
        """Why the real guest does not boot on this host's KVM, with what it printed last; empty when it does."""
        step("try KVM with the real guest")
        directory = await self.image(template, step)
        image = self.open_image(directory, await in_thread(build_initrd, directory, self.cache))
        machine = machine_of(template, "kvm")
        memory = memory_file("probe", machine.ram_mb * 1024 * 1024)
        path = self.cache.root / f".probe-{os.getpid()}"
        disk = await in_thread(self._format, path, template.disk_mb)
        try:
            path.unlink()
            vm = await driver.boot(image, machine, memory, disk)
            try:
                with closing(await Link.open(vm.open())) as link:
                    await vm.progressing(_answered(link), PROBE_CPU, renewed=False)
            except (CellvmError, DriverError) as error:
                return f"{error}; the last it printed: {vm.console_text[-LAST_WORDS:].strip() or 'nothing'}"
            finally:
                await vm.kill()
        except DriverError as error:
            return str(error)
        finally:
            os.close(memory)
            os.close(disk)
            image.close()
        return ""


def image_files(directory: Path, initrd: Path) -> list[Path]:
    """The files that machines of an image read: kernel, initrd, root."""
    kernel = next((directory / "boot/boot").glob("vmlinuz-*"))
    return [kernel, initrd, directory / "root.erofs"]


def _files(snapshot: Path, directory: Path, initrd: Path) -> dict[str, Path]:
    """All files of a template, by the names under which a saved machine keeps them."""
    image = zip(IMAGE, image_files(directory, initrd), strict=True)
    return {**{name: snapshot / name for name in ("manifest.json", *FILES)}, **dict(image)}


def _argv(machine: Machine, *, network: bool) -> str:
    """The command line that a template is made with, whatever its descriptors are and whatever the host's rate is."""
    numbers = range(9 if network else 8)
    if machine.tsc_khz:
        machine = replace(machine, tsc_khz=1)
    return " ".join(qemu("qemu", machine, Descriptors(*numbers), template=True)[1:])


async def _answered(link: Link) -> None:
    """Return when the agent answers. It is asked again and again, because the guest drops what comes too early.

    The questions become rarer, because a link bears only so many that are not answered.
    """
    for asked in itertools.count():
        try:
            await link.call(wire.Ping(), wire.Done, timeout=ASK_EVERY * min(1 + asked / 10, 20))
            return
        except GuestUnresponsive:
            if link.closed.done():  # the link gave the guest up
                raise


def _what_was_seen(template: Template, error: Exception, vm: QemuVm | None = None) -> str:
    printed = ""
    if vm is not None:
        printed = f" The machine printed last:\n{vm.console_text[-LAST_WORDS:].strip() or '(nothing)'}"
    load = os.getloadavg()[0]
    return (
        f"the template {template.id} did not get ready: {error}.\n"
        f"The load of this host is {load:.1f} on {os.cpu_count()} processors.{printed}\n"
        "What was downloaded and built so far is kept. Start again, when the host is less busy if its load is high; "
        "`cellvm doctor` tells what the host lacks."
    )


def _digest(path: Path) -> FileDigest:
    """Hash a file as `copy_sparse` does."""
    with path.open("rb") as source:
        sink = memory_file(path.name)
        try:
            return copy_sparse(source.fileno(), sink)
        finally:
            os.close(sink)
