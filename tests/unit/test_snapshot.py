"""Snapshots: damage is refused, copies are equal and sparse, and checked content can't change (R21)."""

import fcntl
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kernel_gateway.images.snapshot import (
    BLOCK,
    FILES,
    FileDigest,
    Manifest,
    Snapshot,
    SnapshotCorrupt,
    copy_disk,
    copy_sparse,
    memory_file,
)


def digest_of(path: Path) -> FileDigest:
    target = memory_file("copy")
    source = os.open(path, os.O_RDONLY)
    try:
        return copy_sparse(source, target)
    finally:
        os.close(source)
        os.close(target)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small snapshot. The tests change every byte of its files."""
    directory = tmp_path / "snapshot"
    directory.mkdir()
    rng = random.Random(21)
    for name, size in zip(FILES, (150, 40, 60), strict=True):
        (directory / name).write_bytes(rng.randbytes(size))
    write_manifest(directory)
    return directory


def write_manifest(directory: Path) -> None:
    files = {name: digest_of(directory / name) for name in FILES}
    manifest = Manifest(template="base", made_with={"qemu": "7.2"}, tsc_khz=2_600_000, files=files)
    (directory / "manifest.json").write_bytes(msgspec.json.encode(manifest))


@pytest.fixture
def open_files() -> Iterator[Callable[[Path], int]]:
    """Opens files for reading and closes them after the test."""
    opened: list[int] = []

    def open_file(path: Path) -> int:
        opened.append(os.open(path, os.O_RDWR | os.O_CREAT))
        return opened[-1]

    yield open_file
    for fd in opened:
        os.close(fd)


def test_a_snapshot_is_loaded_as_it_was(saved: Path) -> None:
    """The memory files have the content of the files, and the manifest is returned."""
    snapshot = Snapshot.load(saved)
    try:
        for name in FILES:
            fd = getattr(snapshot, name)
            assert os.pread(fd, 1000, 0) == (saved / name).read_bytes()
        assert snapshot.manifest.template == "base"
    finally:
        snapshot.close()


def test_what_was_checked_can_not_be_changed(saved: Path) -> None:
    """The memory files are sealed: no write, no growth, no further seals. Later changes of the files do not matter."""
    snapshot = Snapshot.load(saved)
    try:
        before = os.pread(snapshot.memory, 1000, 0)
        (saved / "memory").write_bytes(b"x" * 150)
        assert os.pread(snapshot.memory, 1000, 0) == before
        for name in FILES:
            fd = getattr(snapshot, name)
            with pytest.raises(OSError, match="not permitted"):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(OSError, match="not permitted"):
                os.ftruncate(fd, 1)
            with pytest.raises(OSError, match="not permitted"):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        snapshot.close()


@pytest.mark.parametrize("name", FILES)
def test_r21_every_changed_byte_is_refused(saved: Path, name: str) -> None:
    """A change of one bit or of all bits in any byte of any file is noticed, and so is a byte more or less."""
    path = saved / name
    whole = path.read_bytes()
    for at in range(len(whole)):
        for mask in (1 << (at % 8), 0xFF, whole[at]):  # the last one makes the byte zero
            if mask:
                path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
                with pytest.raises(SnapshotCorrupt, match=name):
                    Snapshot.load(saved)
    for other in (whole[:-1], whole + b"\0", whole + b"x", b"", b"\0" * len(whole)):
        path.write_bytes(other)
        with pytest.raises(SnapshotCorrupt, match=name):
            Snapshot.load(saved)
    path.write_bytes(whole)
    Snapshot.load(saved).close()


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "."])
def test_what_others_could_write_is_refused(saved: Path, name: str) -> None:
    """A snapshot is not believed when somebody else could have written a part of it, the manifest included."""
    (saved / name).chmod(0o666)
    with pytest.raises(SnapshotCorrupt, match="may be written by everybody"):
        Snapshot.load(saved)


def test_files_that_changed_places_are_refused(saved: Path) -> None:
    """A digest holds only for the file of its name."""
    (saved / "state").rename(saved / "x")
    (saved / "disk").rename(saved / "state")
    (saved / "x").rename(saved / "disk")
    with pytest.raises(SnapshotCorrupt):
        Snapshot.load(saved)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file(saved: Path, name: str) -> None:
    """A missing file is named, and nothing is left open."""
    (saved / name).unlink()
    with pytest.raises(SnapshotCorrupt, match=name):
        Snapshot.load(saved)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b'{"template": 3}', b"{}"])
def test_a_broken_manifest(saved: Path, text: bytes) -> None:
    """A manifest that can't be read is refused."""
    (saved / "manifest.json").write_bytes(text)
    with pytest.raises(SnapshotCorrupt):
        Snapshot.load(saved)


def test_a_manifest_cut_anywhere(saved: Path) -> None:
    """A manifest without its end is refused wherever it was cut."""
    whole = (saved / "manifest.json").read_bytes()
    for end in range(len(whole)):
        (saved / "manifest.json").write_bytes(whole[:end])
        with pytest.raises(SnapshotCorrupt):
            Snapshot.load(saved)


def test_a_manifest_that_lacks_a_file(saved: Path) -> None:
    """A file without a digest is not trusted."""
    manifest = msgspec.json.decode((saved / "manifest.json").read_bytes())
    del manifest["files"]["state"]
    (saved / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(SnapshotCorrupt, match="state"):
        Snapshot.load(saved)


def sparse(path: Path, size: int, *pieces: tuple[int, bytes]) -> None:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)


SPARSE: dict[str, tuple[int, tuple[tuple[int, bytes], ...]]] = {
    "empty": (0, ()),
    "a hole": (10 * BLOCK, ()),
    "data first": (10 * BLOCK, ((0, b"a" * 5000),)),
    "data last": (10 * BLOCK + 123, ((10 * BLOCK + 100, b"b" * 23),)),
    "data between": (20 * BLOCK, ((3 * BLOCK + 4097, b"c" * BLOCK), (9 * BLOCK, b"d"), (12 * BLOCK - 1, b"ee"))),
    "two in a block": (2 * BLOCK, ((4096, b"f" * 10), (20 * 4096, b"g" * 10))),
    "written zeros": (5 * BLOCK, ((BLOCK, bytes(2 * BLOCK)),)),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_copies(tmp_path: Path, open_files: Callable[[Path], int], kind: str) -> None:
    """Both copies are equal to the source and as sparse."""
    size, pieces = SPARSE[kind]
    sparse(tmp_path / "source", size, *pieces)
    source = open_files(tmp_path / "source")
    for name, copy in (("checked", copy_sparse), ("plain", copy_disk)):
        copy(source, open_files(tmp_path / name))
        assert (tmp_path / name).read_bytes() == (tmp_path / "source").read_bytes()
        assert (tmp_path / name).stat().st_blocks <= (tmp_path / "source").stat().st_blocks + 2 * BLOCK // 512 * len(
            pieces
        )


def test_a_digest_does_not_see_holes(tmp_path: Path) -> None:
    """Stored zeros and a hole are the same content. Moved data are not."""
    sparse(tmp_path / "hole", 4 * BLOCK, (2 * BLOCK, b"x" * BLOCK))
    (tmp_path / "full").write_bytes(bytes(2 * BLOCK) + b"x" * BLOCK + bytes(BLOCK))
    sparse(tmp_path / "moved", 4 * BLOCK, (BLOCK, b"x" * BLOCK))
    sparse(tmp_path / "longer", 5 * BLOCK, (2 * BLOCK, b"x" * BLOCK))
    digests = {name: digest_of(tmp_path / name) for name in ("hole", "full", "moved", "longer")}
    assert digests["hole"] == digests["full"]
    assert len({digests["hole"].sha256, digests["moved"].sha256, digests["longer"].sha256}) == 3


def test_a_digest_does_not_see_how_a_copy_is_stored(tmp_path: Path) -> None:
    """Several holes within one block change nothing, because copies by other tools have other holes."""
    pieces = [(4096 * n, b"x" * 100) for n in (1, 9, 40, 255, 256, 257, 700)]
    sparse(tmp_path / "sparse", 4 * BLOCK, *pieces)
    (tmp_path / "full").write_bytes((tmp_path / "sparse").read_bytes())
    assert (tmp_path / "sparse").stat().st_blocks < (tmp_path / "full").stat().st_blocks
    assert digest_of(tmp_path / "sparse") == digest_of(tmp_path / "full")
