"""The cache: entries are held and pruned, and damaged or copied content is noticed."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernel_gateway.images.cache import DAY, KINDS, STEP_LIMIT, Busy, Cache, Entry, in_thread
from kernel_gateway.images.image import SEAL, damage, finished, seal
from tests.fakes import eventually


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def entry(cache: Cache, name: str, *, days: float = 0, size: int = 10_000) -> Path:
    """An entry that was last used so many days ago."""
    path = cache.root / name
    path.mkdir(parents=True)
    (path / "file").write_bytes(bytes(size))
    (path / "folder").mkdir()
    (path / "folder/link").symlink_to("/nowhere")
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


def ignore(_: str) -> None:
    pass


def test_all_entries_are_told(cache: Cache) -> None:
    """Each entry is listed with its size on disk, the largest first. Unfinished work is no entry."""
    for n, kind in enumerate(KINDS):
        entry(cache, f"{kind}/{n:016x}", days=n, size=(n + 1) * 50_000)
    entry(cache, "images/.dddddddddddddddd-abcd_123")
    found = cache.entries()
    assert [each.name for each in found] == [f"{kind}/{n:016x}" for n, kind in reversed(list(enumerate(KINDS)))]
    assert all(each.size >= 50_000 and not each.is_held for each in found)
    assert time.time() - found[0].used_at == pytest.approx((len(KINDS) - 1) * DAY, abs=60)


async def test_what_was_not_used_is_pruned(cache: Cache) -> None:
    """Only entries that are old enough are deleted, and they are deleted completely."""
    old, young = entry(cache, "images/aaaaaaaaaaaaaaaa", days=15), entry(cache, "images/bbbbbbbbbbbbbbbb", days=13)
    async with cache.building(ignore):
        assert [each.path for each in cache.prune(14)] == [old]
        assert list(cache.prune(14)) == []
    assert young.is_dir()
    assert os.listdir(cache.root / "images") == ["bbbbbbbbbbbbbbbb"]


async def test_what_a_server_uses_is_never_pruned(cache: Cache) -> None:
    """An entry that another process holds stays until that process ends, however it ends."""
    held = entry(cache, "snapshots/base-cccccccccccccccc", days=100)
    script = f"""
import sys, time
from pathlib import Path
from kernel_gateway.images.cache import Cache
cache = Cache(Path({str(cache.root)!r}))
cache.use(cache.root / "snapshots/base-cccccccccccccccc")
print("held", flush=True)
time.sleep(600)
"""
    user = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert user.stdout
        assert user.stdout.readline() == b"held\n"
        (found,) = cache.entries()
        assert found.is_held
        assert time.time() - found.used_at < 60  # the use is noted
        async with cache.building(ignore):
            assert list(cache.prune(0)) == []
        assert (held / "file").exists()
    finally:
        user.kill()
        user.wait()
        user.stdout.close()
    async with cache.building(ignore):
        assert [each.path for each in cache.prune(0)] == [held]


async def test_using_twice_and_dropping(cache: Cache) -> None:
    """An entry takes one descriptor, however often it is used. Its holder can delete it if it is of no use."""
    path = entry(cache, "images/3333333333333333")
    files = len(os.listdir("/proc/self/fd"))
    assert cache.use(path) == cache.use(path) == path
    assert len(os.listdir("/proc/self/fd")) == files + 1
    cache.drop(path)
    assert not path.exists()
    cache.use(entry(cache, "images/2222222222222222"))
    cache.close()
    assert len(os.listdir("/proc/self/fd")) == files


async def test_one_builds_at_a_time(cache: Cache) -> None:
    """The second build waits, says so once, and goes on when the first is done."""
    told: list[str] = []
    order = []

    async def build(name: str) -> None:
        async with cache.building(told.append):
            order.append(name)
            await asyncio.sleep(0.7)
            order.append(name)

    await asyncio.gather(build("a"), build("b"))
    assert order in (["a", "a", "b", "b"], ["b", "b", "a", "a"])
    assert told == [f"wait for another build in {cache.root}"]


async def test_who_waits_is_told_what_for(cache: Cache) -> None:
    """Each step of the one that builds is told to the others, once. One that does not wait hears it as an error."""
    told: list[str] = []
    steps: list[str] = []

    async def wait() -> None:
        async with cache.building(told.append):
            pass

    async with cache.building(steps.append) as step:
        step("base: boot the template, which is a long step")
        with pytest.raises(Busy, match=r"^another process builds in .*/cache: base: boot the template, which is a"):
            async with cache.building(told.append, waits=False):
                pass
        waiting = asyncio.create_task(wait())
        await eventually(lambda: len(told) == 1)
        step("base: warm")
        await eventually(lambda: len(told) == 2)
        step("ä" * 10_000)
        await eventually(lambda: len(told) == 3)
    await waiting
    about = f"wait for another build in {cache.root}: "
    assert told[:2] == [f"{about}base: boot the template, which is a long step", f"{about}base: warm"]
    assert told[2] == about + "ä" * (STEP_LIMIT // 2)
    assert steps == ["base: boot the template, which is a long step", "base: warm", "ä" * 10_000]


async def test_the_step_of_a_killed_builder_is_forgotten(cache: Cache) -> None:
    """Whoever builds next is not taken for the one that was killed."""
    (cache.root / "lock").write_text("base: warm the kernel")
    async with cache.building(ignore):
        with pytest.raises(Busy, match=r"/cache$"):
            async with cache.building(ignore, waits=False):
                pass
    async with cache.building(ignore, waits=False):
        pass


def test_looking_disturbs_nobody(cache: Cache) -> None:
    """Many look at the same entries at the same time: to none of them they are in use."""
    for n in range(20):
        entry(cache, f"images/{n:016x}", size=10)

    def look(_: int) -> list[Entry]:
        return [each for _ in range(30) for each in cache.entries()]

    with ThreadPoolExecutor(8) as lookers:
        found = [each for entries in lookers.map(look, range(8)) for each in entries]
    assert len(found) == 8 * 30 * 20
    assert not [each for each in found if each.is_held]


async def test_cancelled_work_is_over_when_its_caller_is(cache: Cache) -> None:
    """A thread can't be stopped: the lock is kept until it has ended, however often its caller is cancelled."""
    may_end, ended = threading.Event(), threading.Event()

    def work() -> None:
        may_end.wait(20)
        ended.set()
        raise OSError("no space left")

    async def build() -> None:
        async with cache.building(ignore):
            await in_thread(work)

    building = asyncio.create_task(build())
    await asyncio.sleep(0.05)
    for _ in range(3):
        building.cancel()
        await asyncio.sleep(0.02)
        with pytest.raises(Busy):
            async with cache.building(ignore, waits=False):
                pass
    may_end.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await building
    assert ended.is_set()
    assert "no space left" in str(caught.value.__cause__)
    async with cache.building(ignore, waits=False):
        assert await in_thread(int, "42") == 42
        with pytest.raises(ValueError, match="invalid literal"):
            await in_thread(int, "x")


async def test_what_a_killed_builder_left_is_deleted(cache: Cache) -> None:
    """The next build deletes the unfinished work of a killed process, but keeps its downloads."""
    with pytest.raises(KeyboardInterrupt), finished(cache.root / "images/3333333333333333"):
        raise KeyboardInterrupt
    entry(cache, "images/.eeeeeeeeeeeeeeee-abcd1234")
    entry(cache, "snapshots/.base-ffffffffffffffff")
    (cache.root / ".probe-1").touch()
    entry(cache, "wheels/1111111111111111.part")
    async with cache.building(ignore):
        assert sorted(str(path.relative_to(cache.root)) for path in cache.root.glob("**/.*")) == []
    assert (cache.root / "wheels/1111111111111111.part/file").exists()


async def test_what_is_not_ours_is_never_deleted(tmp_path: Path) -> None:
    """A directory that also serves other purposes keeps its hidden files, and folders with our kinds' names."""
    for name in (".ssh/id", ".bashrc", "project/.git/head", "images/holiday/1.jpg", "images/.thumbs/1", "kvm/notes/x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        os.utime(path.parent, (0, 0))
    before = sorted(tmp_path.rglob("*"))
    cache = Cache(tmp_path)
    async with cache.building(ignore):
        assert list(cache.prune(0)) == []
    assert set(before) <= set(tmp_path.rglob("*"))


async def test_what_can_not_be_deleted_is_in_nobodys_way(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names another user's leftover by its path, and the build goes on."""
    left = entry(cache, "images/.dddddddddddddddd-abcd1234")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("kernel_gateway.images.cache._delete", refuse)
    async with cache.building(ignore):
        pass
    assert str(left) in caplog.text


# -- sealed directories


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A directory of two files that is sealed, and was once checked."""
    directory = tmp_path / "image"
    (directory / "boot").mkdir(parents=True)
    (directory / "root").write_bytes(b"r" * 5000)
    (directory / "boot/kernel").write_bytes(b"k" * 100)
    seal(directory, [directory / "root", directory / "boot/kernel"])
    assert damage(directory) == ""
    return directory


@pytest.mark.parametrize("name", ["root", "boot/kernel"])
def test_damage_is_noticed(sealed: Path, name: str) -> None:
    """A file that is shorter, different or missing is named, although an earlier check found it whole."""
    path = sealed / name
    whole = path.read_bytes()
    for broken in (whole[:-1], b"", b"x" + whole[1:]):
        path.write_bytes(broken)
        assert name in damage(sealed)
    path.write_bytes(whole)
    assert damage(sealed) == ""
    path.unlink()
    assert "No such file" in damage(sealed)


@pytest.mark.parametrize("seal", [None, b"", b"{", b"[]", b'{"gone": "00"}'])
def test_a_directory_without_a_seal_is_damaged(sealed: Path, seal: bytes | None) -> None:
    """A directory that can't be checked is not trusted."""
    (sealed / SEAL).unlink()
    if seal is not None:
        (sealed / SEAL).write_bytes(seal)
    assert damage(sealed)


@pytest.mark.parametrize("name", ["root", "boot/kernel", "."])
def test_what_others_could_write_is_damaged(sealed: Path, name: str) -> None:
    """A file or directory that others may write to is of no use, although its content is right."""
    (sealed / name).chmod(0o666)
    assert "may be written by everybody" in damage(sealed)


def test_a_copy_is_read_once(sealed: Path, tmp_path: Path) -> None:
    """A copy is as good as its source. A copy that was cut is noticed, although it contains the source's check."""
    copy = tmp_path / "copy"
    shutil.copytree(sealed, copy)
    assert damage(copy) == ""
    cut = tmp_path / "cut"
    shutil.copytree(sealed, cut)
    with (cut / "root").open("r+b") as file:
        file.truncate(4000)
    assert "root" in damage(cut)


def test_whole_files_are_not_read_again(sealed: Path) -> None:
    """After the first check only the files' metadata is compared, so that the next start takes no time."""
    (sealed / "root").chmod(0)
    if os.geteuid():
        assert "Permission denied" in damage(sealed)
    (sealed / "root").chmod(0o644)
    assert damage(sealed) == ""
    before = os.stat(sealed / "root").st_atime_ns
    os.utime(sealed / "root", ns=(before - 10**15, os.stat(sealed / "root").st_mtime_ns))
    assert damage(sealed) == ""  # the file is read once more, because the inode has changed
    read = os.stat(sealed / "root").st_atime_ns
    assert damage(sealed) == ""
    assert os.stat(sealed / "root").st_atime_ns == read
