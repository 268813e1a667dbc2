"""Whether machines can run on this host's KVM, and if not, why.

A `/dev/kvm` that opens proves nothing: it may run the guest's kernel instruction by instruction, or refuse what QEMU
asks of it. So the real guest is booted once, and the verdict is kept with its reason.
"""

import errno
import fcntl
import os
import time
from pathlib import Path

import msgspec

from kernel_gateway.drivers import DriverError
from kernel_gateway.drivers.jail import Jail
from kernel_gateway.drivers.qemu import Qemu
from kernel_gateway.images.build import Builder
from kernel_gateway.images.cache import in_thread
from kernel_gateway.images.image import Progress
from kernel_gateway.images.templates import Template

DEVICE = Path("/dev/kvm")
KVM_CREATE_VM = 0xAE01
"""Source: linux/kvm.h."""
NO_HOLDS = 86_400
"""Seconds before a KVM that did not work is tried again: the reason may have been a full disk."""
CONTAINER_SIGNS = (Path("/.dockerenv"), Path("/run/.containerenv"), Path("/run/systemd/container"))


class Verdict(msgspec.Struct, frozen=True):
    """Whether the real guest runs on KVM. `why` says what was seen when it does not."""

    works: bool
    why: str = ""


def refused() -> str:
    """What is wrong with /dev/kvm itself, and what to do about it; empty when it makes machines."""
    if not DEVICE.exists():
        if any(sign.exists() for sign in CONTAINER_SIGNS):
            return "there is no /dev/kvm in this container: start the container with --device /dev/kvm"
        return "there is no /dev/kvm: load kvm_intel or kvm_amd, or allow nested virtualization on the machine below"
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return "/dev/kvm may not be opened by this user: add the user to the group `kvm`"
    except OSError as error:
        return f"/dev/kvm can't be opened: {error.strerror}"
    try:
        os.close(fcntl.ioctl(device, KVM_CREATE_VM, 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return "/dev/kvm is busy: another hypervisor, such as VirtualBox, holds the processor; stop its machines"
        return f"/dev/kvm makes no machine: {error.strerror}"
    finally:
        os.close(device)
    return ""


async def verdict(
    builder: Builder, template: Template, disks: Path, progress: Progress, *, anew: bool = False
) -> Verdict:
    """Whether to use KVM: found out by booting the real guest, then remembered for this host, QEMU, machine and image.

    Args:
        anew: try it now, whatever was found before, and don't wait for another process that builds.

    Raises:
        BuildError: the guest's image can't be built.
        Busy: another process builds, and this one does not wait.
    """
    if why := refused():
        return Verdict(False, why)
    try:
        jail = Jail.open(builder.binary, kvm=True)
    except DriverError as error:
        return Verdict(False, str(error))
    try:
        if why := jail.kvm_refused():  # not kept, because another server may have other privileges
            return Verdict(
                False,
                f"the users that machines run as can't open /dev/kvm ({why}): give the server CAP_MKNOD, or give the "
                "device to a group that may read and write it",
            )
        there = None if anew else await in_thread(builder.image_there, template)
        if there and (found := _remembered(builder.verdict_path(template, there))):
            return found
        async with builder.cache.building(progress, waits=not anew) as step:
            path = builder.verdict_path(template, await builder.image(template, step))
            if not anew and (found := _remembered(path)):
                return found
            why = await builder.probe_kvm(template, Qemu(builder.binary, "kvm", disks, jail), step)
            found = Verdict(not why, why)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(msgspec.json.encode(found))
            return found
    finally:
        jail.close()


def _remembered(path: Path) -> Verdict | None:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Verdict)
        is_fresh = time.time() - path.stat().st_mtime < NO_HOLDS
    except (OSError, msgspec.MsgspecError):
        return None
    return found if found.works or is_fresh else None
