"""A template's way from its image to its snapshot, with made-up machines: names, boots that fail, a full disk."""

from pathlib import Path

import pytest

from kernel_gateway.images.build import snapshot_path
from kernel_gateway.images.cache import Cache
from kernel_gateway.images.snapshot import Manifest

RATE = 2_596_146


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
