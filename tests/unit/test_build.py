"""A template's way from its image to its snapshot, with made-up machines: names, boots that fail, a full disk."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from guest_agent import wire
from kernel_gateway.drivers import DriverError, qemu_argv
from kernel_gateway.images.build import BOOT_ATTEMPTS, Builder, NotBooted, snapshot_path
from kernel_gateway.images.cache import Cache
from kernel_gateway.images.image import BuildError
from kernel_gateway.images.snapshot import Manifest, Snapshot
from kernel_gateway.images.templates import Template
from tests.fakes import FakeDriver, FakeVm, Handler, Script, Stream

RATE = 2_596_146
TEMPLATE = Template(id="base", description="", vcpus=1, memory_mb=8, disk_mb=8)
MACHINE = qemu_argv.Machine("tcg", 1, 8)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


# -- names


def manifest(rate: int, *, template: str = "base", qemu: str = "7.2") -> Manifest:
    return Manifest(template=template, made_with={"recipe": template, "qemu": qemu}, tsc_khz=rate, files={})


def test_hosts_of_two_clock_rates_do_not_disturb_each_other(cache: Cache) -> None:
    """Each finds its own snapshot again, in whatever order they start."""
    slow, fast = (snapshot_path(cache, manifest(rate)) for rate in (RATE, RATE + 400_000))
    assert slow != fast
    for path in (slow, fast):
        path.mkdir()
    for _ in range(3):
        assert snapshot_path(cache, manifest(RATE)) == slow
        assert snapshot_path(cache, manifest(RATE + 400_000)) == fast


def test_small_differences_of_measurements_make_no_new_snapshot(cache: Cache) -> None:
    """A rate within the tolerance finds what is there, the nearest first. One beyond it does not."""
    path = snapshot_path(cache, manifest(RATE))
    assert path.name.startswith(f"base-{RATE}khz-")
    path.mkdir()
    for difference in (-600, -3, 0, 3, 600):
        assert snapshot_path(cache, manifest(RATE + difference)) == path
    for difference in (-700, 700):
        assert snapshot_path(cache, manifest(RATE + difference)).name.startswith(f"base-{RATE + difference}khz-")
    other = snapshot_path(cache, manifest(RATE + 700))
    other.mkdir()
    assert snapshot_path(cache, manifest(RATE + 300)) == path
    assert snapshot_path(cache, manifest(RATE + 400)) == other


def test_only_the_same_snapshot_counts(cache: Cache) -> None:
    """Another template, another QEMU and unfinished work are not found, whatever their rate is."""
    wanted = snapshot_path(cache, manifest(RATE))
    for other in (manifest(RATE + 1, qemu="10.0"), manifest(RATE + 1, template="base-2")):
        snapshot_path(cache, other).mkdir()
    (cache.root / "snapshots" / f".{wanted.name}-abcd_123").mkdir()
    assert snapshot_path(cache, manifest(RATE)) == wanted


def test_a_guest_that_is_told_no_rate(cache: Cache) -> None:
    """Its snapshot has no rate in its name. All names are entries of the cache."""
    paths = [snapshot_path(cache, manifest(rate)) for rate in (0, RATE)]
    assert "khz" not in paths[0].name
    for path in paths:
        path.mkdir()
    assert {entry.path for entry in cache.entries()} == set(paths)


# -- boots


class Machine(FakeVm):
    """A machine with a console."""

    console_text = "the last words"

    async def progressing(self, work: Coroutine[Any, Any, Any], cpu: float) -> Any:
        """As the real one, without limits: the result of the work, unless the machine ends before."""
        doing, ended = asyncio.ensure_future(work), asyncio.ensure_future(self.wait())
        await asyncio.wait({doing, ended}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if doing.done():
            return doing.result()
        doing.cancel()
        raise DriverError(f"the machine has ended: {await self.wait()}")


class Bench(FakeDriver):
    """A driver whose boots go as the test says. It saves a few bytes as the state of a machine."""

    def __init__(self, *boots: DriverError | Script) -> None:
        super().__init__()
        self.boots = list(boots)
        self.saved = 0
        self.save_error: Exception | None = None

    async def boot(self, image: object, machine: object, memory: int, disk: int) -> Machine:
        boot = self.boots.pop(0)
        if isinstance(boot, DriverError):
            raise boot
        os.pwrite(memory, b"m" * 100, 4096)
        vm = Machine(boot)
        self.machines.append(vm)
        return vm

    async def save_template(self, vm: Machine, state: int) -> None:
        if self.save_error is not None:
            raise self.save_error
        assert vm.guest.is_at_rest
        os.write(state, b"state")
        self.saved += 1


async def warmed(stream: Stream, body: wire.Warm) -> None:
    await stream.reply(wire.Done())


def script(handlers: dict[type[wire.Body], Handler] | None = None) -> Script:
    """A guest that warms up at once, with other answers if the test wants them."""
    return Script(handlers={wire.Warm: warmed, **(handlers or {})})


async def dies(stream: Stream, body: wire.Ping) -> None:
    stream.guest.die("Kernel panic")


async def make(cache: Cache, driver: Bench) -> Path:
    """Make a snapshot, from the boot to its files."""
    path = snapshot_path(cache, manifest(RATE))
    await Builder(cache, "qemu", None)._make(
        TEMPLATE, driver, None, MACHINE, manifest(RATE), path, lambda _: None  # type: ignore[arg-type]
    )  # fmt: skip
    return path


def is_clean(cache: Cache, driver: Bench) -> bool:
    """No machine runs, and no unfinished work is left."""
    return not driver.alive and not list(cache.root.glob("*/.*"))


async def test_a_boot_that_fails_is_tried_again(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    """QEMU that does not start, and a guest that dies: the third boot makes the snapshot, and the log tells the others.

    All files and memory of the boots that failed are given back.
    """
    files = len(os.listdir("/proc/self/fd"))
    driver = Bench(DriverError("the machine did not start: out of luck"), script({wire.Ping: dies}), script())
    path = await make(cache, driver)
    assert [record.message.partition(": ")[0] for record in caplog.records] == [
        "boot 1 of at most 3",
        "boot 2 of at most 3",
    ]
    assert "did not get ready: the machine did not start: out of luck" in caplog.records[0].message
    assert "has ended" in caplog.records[1].message
    assert "the last words" in caplog.records[1].message
    assert (driver.boots, driver.saved) == ([], 1)
    snapshot = Snapshot.load(path)
    assert os.pread(snapshot.memory, 100, 4096) == b"m" * 100
    assert snapshot.manifest.made_with == manifest(RATE).made_with
    snapshot.close()
    assert is_clean(cache, driver)
    assert len(os.listdir("/proc/self/fd")) == files


async def test_a_machine_that_never_comes_up(cache: Cache) -> None:
    """After the last boot its reason is the error, with what to do."""
    driver = Bench(*(DriverError(f"no {number}") for number in range(BOOT_ATTEMPTS + 1)))
    with pytest.raises(NotBooted, match=r"(?s)base did not get ready: no 2\..*load of this host.*Start again"):
        await make(cache, driver)
    assert len(driver.boots) == 1
    assert is_clean(cache, driver)
    assert list((cache.root / "snapshots").iterdir()) == []


async def test_a_failure_after_the_boot_is_final(cache: Cache) -> None:
    """A guest that can't be warmed or saved would fail again."""

    async def refuse(stream: Stream, body: wire.Warm) -> None:
        await stream.fail("failed", "no module named numpy")

    driver = Bench(script({wire.Warm: refuse}), script())
    with pytest.raises(BuildError, match="no module named numpy"):
        await make(cache, driver)
    driver.save_error = DriverError("the state could not be moved: No space left on device")
    with pytest.raises(BuildError, match="No space left on device"):
        await make(cache, driver)
    assert driver.boots == []
    assert is_clean(cache, driver)


async def test_the_agent_is_waited_for(cache: Cache) -> None:
    """Questions that come before the agent are lost, so it is asked until it answers."""
    asked = []

    async def late(stream: Stream, body: wire.Ping) -> None:
        asked.append(body)
        if len(asked) > 4:
            await stream.reply(wire.Done())
        else:
            await asyncio.Event().wait()

    driver = Bench(script({wire.Ping: late}))
    await make(cache, driver)
    assert len(asked) >= 5
    assert driver.saved == 1


async def test_an_agent_that_talks_garbage_is_not_asked_for_ever(cache: Cache) -> None:
    """A link that gave the guest up can't be asked again: that boot has failed."""

    async def garbage(stream: Stream, body: wire.Ping) -> None:
        await stream.guest.send(b"\xff" * 100)

    driver = Bench(*(script({wire.Ping: garbage}) for _ in range(BOOT_ATTEMPTS)))
    async with asyncio.timeout(20):
        with pytest.raises(NotBooted):
            await make(cache, driver)
    assert is_clean(cache, driver)


async def test_what_is_not_what_its_name_says(cache: Cache) -> None:
    """A folder that was renamed is not offered: the manifest tells the rate, and with what it was made."""
    driver = Bench(script())
    path = await make(cache, driver)
    for other, why in (
        (manifest(RATE + 700), rf"its guest's clock counts {RATE} kHz, and this host's {RATE + 700} kHz"),
        (manifest(RATE, qemu="10.0"), "made with something else than its name says"),
    ):
        with pytest.raises(BuildError, match=why):
            await Builder(cache, "qemu", None)._offer(
                TEMPLATE, driver, path, other, None, MACHINE, {}, lambda _: None  # type: ignore[arg-type]
            )  # fmt: skip
    assert len(driver.machines) == 1
    cache.close()


# -- a full disk


SMALL_DISK = """
import asyncio, logging, sys
from pathlib import Path
from kernel_gateway.images.cache import Cache
from kernel_gateway.images.image import BuildError
from tests.unit.test_build import Bench, is_clean, make, script

class Full(Bench):
    async def boot(self, image, machine, memory, disk):
        vm = await super().boot(image, machine, memory, disk)
        with open("/dev/urandom", "rb") as random, open(memory, "wb", closefd=False) as file:
            file.write(random.read(8 << 20))
        return vm

async def main():
    cache, driver = Cache(Path(sys.argv[1])), Full(script(), script())
    try:
        await make(cache, driver)
    except BuildError as error:
        print(error)
    assert is_clean(cache, driver), list(cache.root.rglob("*"))
    print(len(driver.boots), "boots left,", len(cache.entries()), "entries")
    try:
        Path(sys.argv[1], "filler").write_bytes(bytes(8 << 20))
    except OSError as error:
        print(error.strerror)
    async with cache.building(print) as step:
        step("verify the snapshot")

asyncio.run(main())
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """The error names the folder and the reason, nobody boots again for it, and the room is given back.

    A start that needs no room is not ended by a full disk.
    """
    script = f'mount -t tmpfs -o size=4m none "$1" && exec {sys.executable} -W error -c "$2" "$1"'
    ran = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", tmp_path, SMALL_DISK],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    error, left, *rest = ran.stdout.splitlines()
    where = f"can't be made in {tmp_path}/snapshots: [Errno 28] No space left on device"
    assert error == f"the snapshot of base {where}. What was downloaded and built so far is kept"
    assert left == "1 boots left, 0 entries"
    assert rest == ["No space left on device", "verify the snapshot"]
