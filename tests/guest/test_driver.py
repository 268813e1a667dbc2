"""The driver `qemu` with a guest of a few bytes, under emulation, and under KVM where `/dev/kvm` works.

The guest has no kernel, so it runs on any KVM, also on one that would interpret a kernel. It prints the digits from 0
to 9 again and again. A machine that goes on from a snapshot goes on counting.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from kernel_gateway import kvm
from kernel_gateway.drivers import Damaged, DriverError
from kernel_gateway.drivers.base import Image
from kernel_gateway.drivers.jail import Jail
from kernel_gateway.drivers.qemu import Qemu, QemuVm
from kernel_gateway.drivers.qemu_argv import Machine
from kernel_gateway.images.snapshot import Manifest, Snapshot, memory_file

QEMU = shutil.which("qemu-system-x86_64") or "qemu-system-x86_64"
ACCELERATORS = ["tcg", *([] if kvm.refused() else ["kvm"])]
SECTOR = 512
COUNT = bytes.fromhex(
    "30db"  # xor bl, bl            the next digit
    "bafd03"  # print: mov dx, 0x3fd  the serial port's line status
    "ec a820 74fb"  # in al, dx; test al, 0x20; jz back, until the port takes a byte
    "baf803 88d8 0430 ee"  # mov dx, 0x3f8; mov al, bl; add al, '0'; out dx, al
    "fec3 80fb0a 7502 30db"  # inc bl; cmp bl, 10; jne over; xor bl, bl
    "66b900000200"  # over: mov ecx, 0x20000
    "6649 75fc"  # dec ecx; jnz back
    "ebdf"  # jmp print
)
NOWHERE = bytes.fromhex(
    "fa 2e660f01168800"  # cli; lgdt cs:[0x88], the six bytes after the jump
    "0f20c0 0c01 0f22c0"  # mov eax, cr0; or al, 1; mov cr0, eax
    "66ea000000e00800"  # jmp 8:0xe0000000, where there is no memory and no device
    "0f00 8e020100 0000000000000000 ffff0000009acf00"  # the table: an empty entry, and code from 0 to 4 GiB
)
TRIPLE_FAULT = bytes.fromhex("fa 2e0f011e8000 cc 0000000000000000 0000000000000000")  # cli; lidt cs:[0x80]; int3


def kernel(code: bytes) -> bytes:
    """A file that QEMU takes for a Linux kernel. Source: kernel, Documentation/arch/x86/boot.rst."""
    setup = bytearray(2 * SECTOR)
    setup[0x1F1] = 1  # sectors of setup code after the first
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x200:0x202] = b"\xeb\x6e"  # jump over the header
    setup[0x202:0x206] = b"HdrS"
    setup[0x206:0x208] = (0x0204).to_bytes(2, "little")
    setup[0x211] = 1  # loaded high
    setup[0x22C:0x230] = (0x37FF_FFFF).to_bytes(4, "little")  # an initramfs may end here
    setup[0x270 : 0x270 + len(code)] = code
    return bytes(setup) + bytes(SECTOR)


def filled(name: str, content: bytes) -> int:
    fd = memory_file(name)
    os.write(fd, content)
    return fd


@dataclass
class Bench:
    """A driver, and the files from which its machines boot."""

    driver: Qemu
    machine: Machine
    files: list[int]

    def file(self, name: str, content: bytes = b"", size: int = 0) -> int:
        self.files.append(filled(name, content) if content else memory_file(name, size))
        return self.files[-1]

    def image(self, code: bytes) -> Image:
        root = os.open(f"/proc/self/fd/{self.file('root', size=1 << 20)}", os.O_RDONLY | os.O_CLOEXEC)
        self.files.append(root)
        return Image(self.file("kernel", kernel(code)), self.file("initrd", b"x"), root)

    async def boot(self, code: bytes) -> QemuVm:
        self.memory, self.disk = self.file("memory", size=self.machine.ram_mb << 20), self.file("disk", size=1 << 20)
        return await self.driver.boot(self.image(code), self.machine, self.memory, self.disk)

    async def offer(self, vm: QemuVm, tmp_path: Path, kept: int | None = None) -> None:
        """Save the machine and offer it as a template. `kept` cuts its devices' state to so many bytes."""
        path = tmp_path / "state"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            await self.driver.save_template(vm, fd)
        finally:
            os.close(fd)
        state = self.file("state", path.read_bytes()[:kept])
        manifest = Manifest(template="tiny", made_with={}, tsc_khz=0, files={})
        snapshot = Snapshot(manifest, self.memory, state, self.disk)
        self.driver.offer("tiny", snapshot, self.image(COUNT), self.machine)


@pytest.fixture(params=ACCELERATORS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """A bench for each accelerator, in the real jail."""
    accelerator = request.param
    jail = Jail.open(QEMU, kvm=accelerator == "kvm")
    (tmp_path / "disks").mkdir()
    bench = Bench(Qemu(QEMU, accelerator, tmp_path / "disks", jail), Machine(accelerator, 1, 48), [])
    yield bench
    for fd in bench.files:
        os.close(fd)
    jail.close()


def digits(vm: QemuVm) -> str:
    """The digits that the guest has printed. The firmware prints none."""
    return "".join(filter(str.isdigit, vm.console_text))


async def counted(vm: QemuVm, more: int) -> None:
    """Return when the guest has printed so many digits more."""
    wanted = len(digits(vm)) + more
    while len(digits(vm)) < wanted:
        await asyncio.sleep(0.01)


async def worked(vm: QemuVm, seconds: float) -> None:
    """Return when the machine has used so many seconds more of processor time."""
    enough = vm._cpu_time() + seconds
    while vm._cpu_time() < enough:
        await asyncio.sleep(0.01)


@pytest.fixture
async def counting(bench: Bench) -> AsyncIterator[QemuVm]:
    """A booted machine that counts."""
    vm = await bench.boot(COUNT)
    vm.open().close()
    await vm.progressing(counted(vm, 12), cpu=20)
    yield vm
    await vm.kill()


async def test_boot_stop_and_cont(counting: QemuVm) -> None:
    """The guest counts, stands still while it is stopped, and then goes on with the next digit."""
    await counting.stop()
    await asyncio.sleep(0.1)
    before = digits(counting)
    await asyncio.sleep(0.3)
    assert digits(counting) == before
    await counting.cont()
    await counting.progressing(counted(counting, 3), cpu=20)
    assert digits(counting).startswith(before)
    assert digits(counting)[:12] == "012345678901"
    assert "running" in repr(counting)


async def test_save_and_restore(bench: Bench, counting: QemuVm, tmp_path: Path) -> None:
    """Every clone goes on with the digit after the saved machine's last one, and no clone disturbs another."""
    await bench.offer(counting, tmp_path)
    following = (int(digits(counting)[-1]) + 1) % 10
    clones = [await bench.driver.start("tiny") for _ in range(3)]
    try:
        for clone in clones:
            clone.open().close()
            await clone.progressing(counted(clone, 12), cpu=20)
            # The last digit may have been in the serial port when the machine was saved.
            assert (int(digits(clone)[0]) - following) % 10 in (0, 9)
            assert digits(clone)[:10] in "0123456789" * 2
    finally:
        for clone in clones:
            await clone.kill()
    assert await counting.control() is not None
    await counting.kill()
    assert "SIGKILL" in await counting.wait()


async def saved(driver: Qemu, vm: QemuVm, folder: Path) -> None:
    """Capture a machine and write it to a folder."""
    captured = await driver.capture(vm, goes_on=False)
    try:
        await captured.write(folder)
    finally:
        captured.close()


async def test_a_saved_machine(bench: Bench, counting: QemuVm, tmp_path: Path) -> None:
    """A clone that was saved goes on with its next digit, on its own and from its files, again and again."""
    await bench.offer(counting, tmp_path)
    clone = await bench.driver.start("tiny")
    clone.open().close()
    try:
        for number in range(3):
            await clone.progressing(counted(clone, 7), cpu=20)
            folder = tmp_path / f"saved{number}"
            folder.mkdir(mode=0o700)
            await saved(bench.driver, clone, folder)
            following = (int(digits(clone)[-1]) + 1) % 10
            told = len(digits(clone))
            await asyncio.sleep(0.2)
            assert len(digits(clone)) == told  # it stands still
            other = await bench.driver.restore(folder)
            other.open().close()
            try:
                await asyncio.sleep(0.2)
                assert digits(other) == ""
                await other.cont()
                await other.progressing(counted(other, 12), cpu=20)
                assert (int(digits(other)[0]) - following) % 10 in (0, 9)
                assert digits(other)[:10] in "0123456789" * 2
            finally:
                if number == 1:  # the next one is saved from a restored machine
                    await clone.kill()
                    clone = other
                else:
                    await other.kill()
            if number != 1:
                await clone.cont()
    finally:
        await clone.kill()


async def test_copies_of_a_machine_that_goes_on(bench: Bench, counting: QemuVm, tmp_path: Path) -> None:
    """Copies begin where the machine was captured, though it has gone on since, and even ended."""
    await bench.offer(counting, tmp_path)
    clone = await bench.driver.start("tiny")
    clone.open().close()
    captured = None
    try:
        await clone.progressing(counted(clone, 7), cpu=20)
        captured = await bench.driver.capture(clone, goes_on=True)
        following = (int(digits(clone)[-1]) + 1) % 10
        await clone.cont()
        await clone.progressing(counted(clone, 20), cpu=20)
        await clone.kill()
        for _ in range(2):
            copy = await bench.driver.restore(captured)
            copy.open().close()
            try:
                await copy.cont()
                await copy.progressing(counted(copy, 12), cpu=20)
                assert (int(digits(copy)[0]) - following) % 10 in (0, 9)
            finally:
                await copy.kill()
    finally:
        if captured is not None:
            captured.close()
        await clone.kill()


async def test_a_save_that_fails(bench: Bench, counting: QemuVm, tmp_path: Path) -> None:
    """The machine goes on after a save that found no room, and can be saved then."""
    await bench.offer(counting, tmp_path)
    clone = await bench.driver.start("tiny")
    clone.open().close()
    folder = tmp_path / "saved"
    folder.mkdir(mode=0o700)
    (folder / "memory").mkdir()
    try:
        with pytest.raises(DriverError):
            await saved(bench.driver, clone, folder)
        await clone.cont()
        await clone.progressing(counted(clone, 3), cpu=20)
        (tmp_path / "other").mkdir(mode=0o700)
        await saved(bench.driver, clone, tmp_path / "other")
    finally:
        await clone.kill()


@pytest.mark.parametrize("name", ["memory", "memory.runs", "state"])
async def test_damage_is_found_before_a_machine_runs(bench: Bench, counting: QemuVm, tmp_path: Path, name: str) -> None:
    """No machine comes of damaged files, and no process is left of the attempt."""
    await bench.offer(counting, tmp_path)
    clone = await bench.driver.start("tiny")
    clone.open().close()
    folder = tmp_path / "saved"
    folder.mkdir(mode=0o700)
    try:
        await saved(bench.driver, clone, folder)
    finally:
        await clone.kill()
    content = bytearray((folder / name).read_bytes()) or bytearray(b"x")  # this guest changes nothing in its memory
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    children = set(Path("/proc/thread-self/children").read_text().split())
    with pytest.raises(Damaged):
        await bench.driver.restore(folder)
    assert set(Path("/proc/thread-self/children").read_text().split()) <= children


async def test_a_state_that_can_not_be_written(bench: Bench, counting: QemuVm) -> None:
    """Saving to a full device fails with QEMU's reason, and does not wait for ever."""
    full = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
    try:
        async with asyncio.timeout(20):
            with pytest.raises(DriverError, match="could not be moved"):
                await bench.driver.save_template(counting, full)
    finally:
        os.close(full)


async def test_a_state_that_can_not_be_read(bench: Bench, counting: QemuVm, tmp_path: Path) -> None:
    """No machine is started from half a state, and no process is left of the attempt."""
    await bench.offer(counting, tmp_path, kept=1000)
    children = set(Path("/proc/thread-self/children").read_text().split())
    async with asyncio.timeout(30):
        with pytest.raises(DriverError, match="did not start"):
            await bench.driver.start("tiny")
    assert set(Path("/proc/thread-self/children").read_text().split()) <= children


async def test_a_stop_that_nobody_asked_for(counting: QemuVm) -> None:
    """A machine whose processors QEMU has stopped counts as ended, and the reason is told."""
    with suppress(DriverError):  # QEMU may be killed before it has answered
        await (await counting.control()).execute("stop")
    async with asyncio.timeout(10):
        assert await counting.wait() == "its processors were stopped, and not by us"


async def test_code_that_can_not_be_executed(bench: Bench) -> None:
    """KVM gives up when a guest jumps to where there is no memory. QEMU lives on, but its machine is ended.

    Emulated processors read zeros there, and zeros are valid code. The machine goes on and does not end.
    """
    vm = await bench.boot(NOWHERE)
    vm.open().close()
    try:
        if bench.machine.accelerator == "kvm":
            async with asyncio.timeout(20):
                assert await vm.wait() == "its processors were stopped, and not by us"
        else:
            with pytest.raises(DriverError, match="printed nothing new"):
                await vm.progressing(asyncio.Event().wait(), cpu=1)
    finally:
        await vm.kill()


async def test_a_triple_fault(bench: Bench) -> None:
    """A guest that resets its machine ends the machine."""
    vm = await bench.boot(TRIPLE_FAULT)
    vm.open().close()
    try:
        async with asyncio.timeout(20):
            assert await vm.wait() in ("QEMU exited with 0", "its processors were stopped, and not by us")
    finally:
        await vm.kill()


async def test_a_machine_that_makes_no_progress(bench: Bench) -> None:
    """The limit is processor time without new output. The error says how much was used."""
    vm = await bench.boot(bytes.fromhex("ebfe"))  # jmp to itself
    vm.open().close()
    try:
        with pytest.raises(DriverError, match=r"used [12] s of processor time and printed nothing new"):
            await vm.progressing(asyncio.Event().wait(), cpu=1)
    finally:
        await vm.kill()
    with pytest.raises(DriverError, match="has ended: killed by SIGKILL"):
        await vm.progressing(asyncio.Event().wait(), cpu=1)


async def test_a_machine_that_stands_still(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that sleeps for ever uses no processor time, so the clock finds it."""
    monkeypatch.setattr("kernel_gateway.drivers.qemu.STANDSTILL", (0.5, 1.0))
    vm = await bench.boot(bytes.fromhex("fa f4 ebfd"))  # cli; hlt; jmp back
    vm.open().close()
    try:
        with pytest.raises(DriverError, match=r"has stood still for [12] s"):
            await vm.progressing(asyncio.Event().wait(), cpu=60)
    finally:
        await vm.kill()


async def test_progress_renews_the_limit(counting: QemuVm) -> None:
    """A machine that prints may use more than its limit, unless the limit is for the whole time."""
    await counting.progressing(worked(counting, 3), cpu=0.5)
    with pytest.raises(DriverError, match=r"used \d s of processor time$"):
        await counting.progressing(asyncio.Event().wait(), cpu=0.5, renewed=False)
