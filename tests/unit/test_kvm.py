"""The reasons against KVM, as `cellvm doctor` tells them. Each cause is tried on a made-up device."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kernel_gateway import kvm
from kernel_gateway.drivers.jail import Jail
from kernel_gateway.host import Finding, kvm_finding
from kernel_gateway.images.build import Builder, cpu_identity
from kernel_gateway.images.cache import Busy, Cache
from kernel_gateway.images.templates import Template
from kernel_gateway.kvm import Verdict
from kernel_gateway.settings import Settings

SLOW = "sandboxes run emulated (TCG): correct, 5 to 20 times slower, and not a security boundary by QEMU's word"
TEMPLATE = Template(id="t", description="", vcpus=1, memory_mb=64, disk_mb=64)


def sentence() -> str:
    """Doctor's sentence about the device in its present state."""
    finding = kvm_finding(Verdict(False, kvm.refused()))
    assert (finding.level, finding.meaning) == ("warn", SLOW)
    return finding.what


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own device in place of /dev/kvm, on a host that is no container."""
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    monkeypatch.setattr(kvm, "CONTAINER_SIGNS", (tmp_path / "container",))
    return tmp_path / "kvm"


def test_no_device(device: Path) -> None:
    assert sentence() == (
        "no KVM: there is no /dev/kvm: load kvm_intel or kvm_amd, or allow nested virtualization on the machine below"
    )


def test_a_container_without_the_device(device: Path) -> None:
    (device.parent / "container").touch()
    assert sentence() == "no KVM: there is no /dev/kvm in this container: start the container with --device /dev/kvm"


def test_no_permission(device: Path) -> None:
    """The device is opened as another user, because root may open everything."""
    device.touch(mode=0o600)
    for directory in (device.parent, *device.parent.parents):
        if directory.owner() == "root" and str(directory).startswith("/tmp/"):
            directory.chmod(0o755)
    code = f"""
import os
from pathlib import Path
from kernel_gateway import kvm
kvm.DEVICE = Path({str(device)!r})
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
print(kvm.refused())
"""
    if os.geteuid():
        device.chmod(0)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "/dev/kvm may not be opened by this user: add the user to the group `kvm`\n"


def test_busy(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VirtualBox, for example, runs a machine of its own."""
    device.touch()

    def busy(*_: object) -> int:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(fcntl, "ioctl", busy)
    assert sentence() == (
        "no KVM: /dev/kvm is busy: another hypervisor, such as VirtualBox, holds the processor; stop its machines"
    )


def test_a_device_that_is_none(device: Path) -> None:
    """A plain file makes no machines."""
    device.touch()
    assert sentence() == "no KVM: /dev/kvm makes no machine: Inappropriate ioctl for device"


def test_a_device_that_makes_machines(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that tries the device is closed again."""
    device.touch()
    made: list[int] = []

    def make(*_: object) -> int:
        made.append(os.open("/dev/null", os.O_RDONLY))
        return made[-1]

    monkeypatch.setattr(fcntl, "ioctl", make)
    assert kvm.refused() == ""
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(made[0])


def test_other_verdicts() -> None:
    """A guest may boot, or not boot, or it could not be tried."""
    assert kvm_finding(Verdict(True)).level == "ok"
    nested = "the machine used 6 s of processor time; the last it printed: Probing EDD"
    assert kvm_finding(Verdict(False, nested)).what == f"no KVM: {nested}"
    assert kvm_finding("packages are missing").what == "KVM was not tried: packages are missing"


# -- verdicts


class Probe:
    """A builder whose image is an empty folder. Its guest boots or fails as the test says."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.binary = "qemu"
        self.key = "key"
        self.answers: list[str] = []

    def image_there(self, template: Template) -> Path | None:
        return self.cache.root / "images"

    async def image(self, template: Template, step: Callable[[str], None]) -> Path:
        return self.cache.root / "images"

    def verdict_path(self, template: Template, image: Path) -> Path:
        return self.cache.root / "kvm" / self.key

    async def probe_kvm(self, *_: object) -> str:
        return self.answers.pop(0)


class FakeJail:
    refusal = ""

    def kvm_refused(self) -> str:
        return self.refusal

    def close(self) -> None:
        pass


Ask = Callable[..., Awaitable[Verdict]]


@pytest.fixture
def probe(tmp_path: Path) -> Probe:
    return Probe(Cache(tmp_path / "cache"))


@pytest.fixture
def jail(monkeypatch: pytest.MonkeyPatch) -> FakeJail:
    jail = FakeJail()
    monkeypatch.setattr(Jail, "open", lambda binary, kvm: jail)
    monkeypatch.setattr("kernel_gateway.kvm.refused", lambda: "")
    return jail


@pytest.fixture
def ask(probe: Probe, jail: FakeJail, tmp_path: Path) -> Ask:
    """A function that asks for the verdict."""

    async def ask(**how: Any) -> Verdict:
        return await kvm.verdict(probe, TEMPLATE, tmp_path, lambda _: None, **how)  # type: ignore[arg-type]

    return ask


async def test_a_verdict_is_remembered_with_its_reason(probe: Probe, ask: Ask) -> None:
    """The guest is booted once for each key. Doctor can have it booted anew."""
    probe.answers = ["MSR 0x10a", "", "dead again"]
    assert await ask() == await ask() == Verdict(False, "MSR 0x10a")
    probe.key = "other"
    assert await ask() == await ask() == Verdict(True)
    assert await ask(anew=True) == await ask() == Verdict(False, "dead again")


async def test_a_remembered_verdict_waits_for_nobody(probe: Probe, ask: Ask) -> None:
    """While another process builds, a verdict that is there is told at once. Doctor does not wait for a new one."""
    probe.answers = ["MSR 0x10a"]
    found = await ask()
    async with Cache(probe.cache.root).building(lambda _: None):
        assert await ask() == found
        with pytest.raises(Busy):
            await ask(anew=True)


async def test_a_no_holds_a_day(probe: Probe, ask: Ask) -> None:
    """A refusal is tried again after a day, and an unreadable verdict at once. A yes holds for ever."""
    probe.answers = ["full disk", "", "never asked"]
    await ask()
    path = probe.cache.root / "kvm/key"
    then = time.time() - kvm.NO_HOLDS - 1
    os.utime(path, (then, then))
    assert await ask() == Verdict(True)
    os.utime(path, (then, then))
    assert await ask() == Verdict(True)
    path.write_text("no")  # earlier versions wrote this
    assert await ask() == Verdict(False, "never asked")


async def test_machines_users_may_not_open_it(ask: Ask, jail: FakeJail, probe: Probe) -> None:
    """If machines' users can't open the device, the guest is not tried, and the sentence tells the remedy."""
    jail.refusal = "cannot open /dev/kvm: Permission denied"
    found = await ask()
    assert kvm_finding(found).what == (
        "no KVM: the users that machines run as can't open /dev/kvm (cannot open /dev/kvm: Permission denied): give "
        "the server CAP_MKNOD, or give the device to a group that may read and write it"
    )
    jail.refusal, probe.answers = "", [""]
    assert await ask() == Verdict(True)  # a server with other privileges gets another answer
    jail.refusal = "cannot open /dev/kvm: Permission denied"
    assert not (await ask()).works


def test_the_key_of_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key depends on QEMU's revision, its firmware, the machine, the image and the processor."""
    told = {"version": "7.2.22 (Debian 1)", "firmware": b"a"}
    monkeypatch.setattr("kernel_gateway.images.build.this_cpu", lambda: told.get("cpu", "x"))

    def builder(name: str) -> Builder:
        (tmp_path / name).mkdir()
        (tmp_path / name / "bios-microvm.bin").write_bytes(told["firmware"])  # type: ignore[arg-type]
        program = tmp_path / name / "qemu"
        program.write_text(
            f'#!/bin/sh\nif [ "$1" = -L ]; then echo {tmp_path / name}; else echo "QEMU emulator version '
            f'{told["version"]}"; fi\n'
        )
        program.chmod(0o755)
        return Builder(Cache(tmp_path / "cache"), str(program), None)

    image = Path("image")
    keys = [builder("same").verdict_path(TEMPLATE, image)]
    assert builder("again").verdict_path(TEMPLATE, image) == keys[0]
    keys.append(builder("image").verdict_path(TEMPLATE, Path("other")))
    keys.append(builder("machine").verdict_path(msgspec.structs.replace(TEMPLATE, vcpus=2), image))
    for name, value in (("version", "7.2.22 (Debian 2)"), ("firmware", b"b"), ("cpu", "y")):
        told[name] = value
        keys.append(builder(name).verdict_path(TEMPLATE, image))
    assert len(set(keys)) == len(keys)


CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1
microcode\t: 0xa101148
cpu MHz\t\t: 2596.146
flags\t\t: fpu vme de

processor\t: 1
vendor_id\t: SomebodyElse
"""


def test_a_processors_identity() -> None:
    """A processor's identity depends on its instructions, and not on its present clock rate."""
    known = cpu_identity(CPUINFO, "6.1.0-42")
    assert "vendor_id=AuthenticAMD" in known.splitlines()
    assert cpu_identity(CPUINFO.replace("2596.146", "3000.1"), "6.1.0-42") == known
    assert cpu_identity(CPUINFO.replace("SomebodyElse", "x"), "6.1.0-42") == known
    others = [
        cpu_identity(CPUINFO.replace(old, new), "6.1.0-42")
        for old, new in (
            ("AuthenticAMD", "GenuineIntel"), ("family\t: 25", "family\t: 26"), ("model\t\t: 17", "model\t\t: 18"),
            ("EPYC", "Ryzen"), ("stepping\t: 1", "stepping\t: 2"), ("0xa101148", "0xa101149"), ("vme de", "vme"),
        )
    ]  # fmt: skip
    assert len({known, *others, cpu_identity(CPUINFO, "6.1.0-43")}) == len(others) + 2


@pytest.mark.parametrize("isolation", ["qemu-kvm"])
async def test_kvm_by_name_where_there_is_none(isolation: str, device: Path, tmp_path: Path) -> None:
    """One sentence names the flag and the cause."""
    from kernel_gateway.server import load_templates, opened_driver
    from kernel_gateway.settings import SettingsError

    settings = Settings(isolation=isolation, data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(SettingsError, match=r"^--isolation qemu-kvm: there is no /dev/kvm: load kvm_intel"):
        async with opened_driver(settings, load_templates(settings).default, lambda _: None):
            pass


async def test_doctor_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process builds: doctor says what that one does, and tells all the rest at once."""
    from kernel_gateway import __main__ as command

    told: list[Verdict | str] = []

    def examine(settings: Settings, disk_mb: int, kvm: Verdict | str, *_: object) -> list[Finding]:
        told.append(kvm)
        return [kvm_finding(kvm)]

    monkeypatch.setattr(kvm, "refused", lambda: "")
    monkeypatch.setattr(command, "missing_packages", lambda qemu: [])
    monkeypatch.setattr(command, "examine", examine)
    settings = Settings(data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), network="off")
    async with Cache(tmp_path / "cache").building(lambda _: None) as step:
        step("base: warm the kernel")
        assert await command.doctor(settings) == 0
    assert told == [f"another process builds in {tmp_path}/cache: base: warm the kernel"]
