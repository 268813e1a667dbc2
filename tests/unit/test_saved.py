"""A saved machine's files: what differs from the template, and nothing else; damage is found wherever it is."""

import mmap
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_gateway.drivers import Damaged, NoSpace
from kernel_gateway.drivers.pages import PAGE, at_places, copy_pages, memory_places, own_pages
from kernel_gateway.drivers.saved import MANIFEST, Manifest, Saved, disk_parts, save_pages, write_manifest
from kernel_gateway.images.snapshot import memory_file

PAGES = 600
"""More than two pieces."""


def filled(content: bytes) -> int:
    fd = memory_file("test", len(content))
    os.pwrite(fd, content, 0)
    return fd


def reader(fd: int) -> Callable[[memoryview, int], int]:
    return lambda buffer, at: os.preadv(fd, [buffer], at)


def writer(fd: int) -> Callable[[memoryview, int], int]:
    return lambda buffer, at: os.pwrite(fd, buffer, at)


def save(directory: Path, now: bytes, base: bytes, parts: list[tuple[int, int]]) -> Saved:
    """A saved "memory" of which these parts were looked at."""
    own, template = filled(now), filled(base)
    try:
        digests = save_pages(reader(own), template, parts, directory / "memory")
    finally:
        os.close(own)
        os.close(template)
    write_manifest(directory, Manifest("t", {}, 0, digests))
    return Saved(directory)


def restored(saved: Saved, base: bytes) -> bytes:
    fd = filled(base)
    try:
        saved.put_pages("memory", writer(fd), len(base))
        return os.pread(fd, len(base), 0)
    finally:
        os.close(fd)


@given(seed=st.integers(0, 1 << 30), share=st.floats(0, 1))
def test_pages_round_trip(tmp_path_factory: pytest.TempPathFactory, seed: int, share: float) -> None:
    """Whatever differs comes back, zero pages and equal pages take no room, and runs are as long as they can be."""
    chance = random.Random(seed)
    base = b"".join(chance.choice((bytes(PAGE), chance.randbytes(PAGE))) for _ in range(PAGES))
    pages = [base[at : at + PAGE] for at in range(0, len(base), PAGE)]
    for number in range(PAGES):
        if chance.random() < share:
            pages[number] = chance.choice((bytes(PAGE), chance.randbytes(PAGE), pages[number]))
    now = b"".join(pages)
    directory = tmp_path_factory.mktemp("saved")
    saved = save(directory, now, base, [(0, len(base))])
    assert restored(saved, base) == now
    changed = [page for number, page in enumerate(pages) if page != base[number * PAGE : (number + 1) * PAGE]]
    assert (directory / "memory").stat().st_size == sum(len(page) for page in changed if page.strip(b"\0"))


@pytest.mark.parametrize("name", ["memory", "memory.runs"])
def test_every_damage_is_found(tmp_path: Path, name: str) -> None:
    """R21: a hundred single bits, a cut and an extra byte are refused."""
    base = bytes(PAGES * PAGE)
    saved = save(tmp_path, random.Random(1).randbytes(len(base)), base, [(0, len(base))])
    path = tmp_path / name
    content = path.read_bytes()
    for number in range(100):
        damaged = bytearray(content)
        damaged[number * len(content) // 100] ^= 1 << number % 8
        path.write_bytes(damaged)
        with pytest.raises(Damaged):
            restored(saved, base)
    for wrong in (content[:-1], content + b"x", b""):
        path.write_bytes(wrong)
        with pytest.raises(Damaged):
            restored(saved, base)
    path.write_bytes(content)
    restored(saved, base)


def test_places_beyond_the_end_are_refused(tmp_path: Path) -> None:
    """A machine that is smaller than the saved one is not written beyond its end."""
    base = bytes(4 * PAGE)
    saved = save(tmp_path, b"x" * len(base), base, [(0, len(base))])
    with pytest.raises(Damaged):
        restored(saved, base[: 2 * PAGE])


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    """Files that others may write to are not believed."""
    base = bytes(PAGE)
    saved = save(tmp_path, b"x" * PAGE, base, [(0, PAGE)])
    (tmp_path / "memory").chmod(0o666)
    with pytest.raises(Damaged, match="may be written"):
        restored(saved, base)
    (tmp_path / MANIFEST).chmod(0o666)
    with pytest.raises(Damaged, match="may be written"):
        Saved(tmp_path)


def test_a_full_disk(tmp_path: Path) -> None:
    """What does not fit is told as such."""
    own = filled(b"x" * PAGE)
    try:
        (tmp_path / "memory").mkdir()
        with pytest.raises(FileExistsError):
            save_pages(reader(own), own, [(0, PAGE)], tmp_path / "memory")
        with pytest.raises(NoSpace):
            save_pages(partial(_full), own, [(0, PAGE)], tmp_path / "other")
    finally:
        os.close(own)


def _full(buffer: memoryview, at: int) -> int:
    raise OSError(28, "No space left on device")


def test_the_parts_of_a_disk() -> None:
    """Parts are whole pages, in order, each once, and hold all data of either file."""
    first, second = memory_file("a", 64 * PAGE), memory_file("b", 64 * PAGE)
    try:
        os.pwrite(first, b"x", 5 * PAGE + 7)
        os.pwrite(second, b"y" * 3 * PAGE, 5 * PAGE)
        os.pwrite(second, b"z", 63 * PAGE)
        parts = list(disk_parts(first, second))
        pages = [page for at, length in parts for page in range(at // PAGE, (at + length) // PAGE)]
        assert pages == sorted(set(pages))
        assert {5, 6, 7, 63} <= set(pages)
        assert all(at % PAGE == length % PAGE == 0 for at, length in parts)
    finally:
        os.close(first)
        os.close(second)


def test_the_own_pages_of_a_process() -> None:
    """Of a private mapping the pages that were written to are a process's own, and they are read by their offset."""

    base = filled(bytes(range(256)) * (32 * PAGE // 256))
    with mmap.mmap(base, 32 * PAGE, mmap.MAP_PRIVATE) as mapping:
        _ = mapping[0], mapping[20 * PAGE]  # a page that was only read is the file's
        for page in (3, 4, 17):
            mapping[page * PAGE + 1] = 99
        places = memory_places(os.getpid(), base)
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        memory = os.open("/proc/self/mem", os.O_RDWR)
        try:
            assert list(own_pages(pagemap, places)) == [(3 * PAGE, 2 * PAGE), (17 * PAGE, PAGE)]
            buffer = memoryview(bytearray(PAGE))
            assert at_places(places, os.preadv, memory)(buffer, 17 * PAGE) == PAGE
            assert buffer[1] == 99
            assert at_places(places, os.pwritev, memory)(memoryview(b"new"), 9 * PAGE) == 3
            assert mapping[9 * PAGE : 9 * PAGE + 3] == b"new"
            copy = memory_file("copy")
            copied = copy_pages(os.getpid(), places, [(3 * PAGE, 2 * PAGE), (17 * PAGE, PAGE)], copy)
            mapping[17 * PAGE + 1] = 0
            assert at_places(copied, os.preadv, copy)(buffer, 17 * PAGE) == PAGE
            assert buffer[1] == 99
            os.close(copy)
            assert os.pread(base, 1, 9 * PAGE) == b"\0"
        finally:
            os.close(pagemap)
            os.close(memory)
            os.close(base)
