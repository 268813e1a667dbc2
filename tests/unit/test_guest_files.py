"""The agent's work on files: scans that are kept, odd names and values, trees that change, and when work stops."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from guest_agent import files, wire
from guest_agent.channel import AgentError
from guest_agent.wire import Entries, ListDir


def go_on() -> None:
    """Check nothing: the work is wanted."""


def stop_after(entries: int) -> Callable[[], None]:
    """A check that ends the work after that many entries."""
    left = iter(range(entries))

    def check() -> None:
        if next(left, None) is None:
            raise AgentError("failed", "cancelled")

    return check


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with 100 files and a directory, unchanged for a while."""
    monkeypatch.setattr(files, "SETTLED_NS", 20_000_000)  # the clock of a file system has steps of some milliseconds
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for number in range(100):
        (folder / f"{number:03}").touch()
    time.sleep(2 * files.SETTLED_NS / 1e9)
    return folder


def page(folder: Path, after: str = "", kept: files.Scan | None = None, limit: int = 40) -> tuple[files.Scan, Entries]:
    return files.list_dir(ListDir(path=str(folder), after=after, limit=limit), kept, go_on)


def names(entries: Entries) -> list[str]:
    return [each.name for each in entries.entries]


def test_pages_come_from_one_scan(folder: Path) -> None:
    """B8: the second page uses the first one's scan."""
    scan, first = page(folder)
    again, second = page(folder, first.entries[-1].name, scan)
    assert again is scan
    assert names(first) + names(second) == [f"{number:03}" for number in range(80)]
    _, third = page(folder, second.entries[-1].name, scan)
    assert (len(third.entries), third.entries[-1].kind, third.more) == (21, "dir", False)


@pytest.mark.parametrize("change", ["new file", "deleted", "renamed", "rights", "another directory"])
def test_a_changed_directory_is_scanned_again(folder: Path, change: str) -> None:
    """A page never comes from a scan that is out of date."""
    scan, _ = page(folder)
    if change == "new file":
        (folder / "0390").touch()
    elif change == "deleted":
        (folder / "050").unlink()
    elif change == "renamed":
        (folder / "050").rename(folder / "0500")
    elif change == "rights":
        folder.chmod(0o711)
    else:
        folder.rename(folder.with_name("old"))
        folder.mkdir()
    again, second = page(folder, "039", scan)
    assert again is not scan
    assert set(names(second)) <= set(os.listdir(folder))
    assert (change == "new file") == ("0390" in names(second))


def test_a_directory_that_has_just_changed(tmp_path: Path) -> None:
    """A scan right after a change is not kept, because a second change may have the same time."""
    (tmp_path / "a").touch()
    scan, _ = page(tmp_path)
    again, _ = page(tmp_path, "0", scan)
    assert again is not scan


def test_a_file_that_is_deleted_during_a_listing(folder: Path) -> None:
    """A name of the scan that is gone is left out, and `more` is still right."""
    scan, _ = page(folder)
    (folder / "041").unlink()
    valid = files.Scan(files._state(folder.stat()), scan.texts, scan.names, is_settled=True)
    _, second = page(folder, "039", valid, limit=2)
    assert (names(second), second.more) == (["040", "042"], True)


def test_names_that_read_alike(tmp_path: Path) -> None:
    """Names are sorted as text and increase. Two names that read alike are one, because no request tells them apart."""
    for name in (b"a\xff", b"a\xfe", "aü".encode(), b"a", "a\N{OLD ITALIC LETTER A}".encode(), b"Z"):
        (tmp_path / os.fsdecode(name)).touch()
    _, found = page(tmp_path)
    assert names(found) == ["Z", "a", "aü", "a\ufffd", "a\N{OLD ITALIC LETTER A}"]
    assert wire.encode(wire.FrameType.REPLY, 16, found)


def test_the_largest_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with too many entries is refused before all of its names are in memory."""
    monkeypatch.setattr(files, "MAX_NAMES", 100)
    with pytest.raises(AgentError, match="over 100 entries") as caught:
        page(folder)
    assert caught.value.code == "too_large"
    (folder / "000").unlink()
    assert len(page(folder)[0].texts) == 100


def test_a_page_fits_its_frame(tmp_path: Path) -> None:
    """The longest names in a deep directory make short pages."""
    deep = str(tmp_path)
    while len(deep) < 3500:
        deep += "/" + "d" * 200
    os.makedirs(deep)
    for number in range(300):
        os.close(os.open(f"{deep}/{number:03}" + "ü" * 120, os.O_CREAT))
    found, after, pages = [], "", 0
    while True:
        _, entries = files.list_dir(ListDir(path=deep, after=after), None, go_on)
        assert len(wire.encode(wire.FrameType.REPLY, 16, entries)) < wire.MAX_CONTROL
        found, after, pages = found + names(entries), entries.entries[-1].name, pages + 1
        if not entries.more:
            break
    assert len(found) == 300
    assert found == sorted(found)
    assert pages > 1


def test_an_absurd_entry_fits_the_wire() -> None:
    """A link with a very long target and a time beyond 64 bits are described within the contract's limits."""
    path = Path(f"/dev/shm/{os.urandom(6).hex()}")
    path.touch()
    link = path.with_suffix(".link")
    link.symlink_to("/".join(["x" * 200] * 20))
    try:
        os.utime(path, ns=(0, 2**62 * 1_000_000_000))
        for each in (path, link):
            frame = wire.encode(wire.FrameType.REPLY, 16, files.entry(str(each)))
            decoder = wire.Decoder()
            decoder.receive_data(frame)
            assert wire.decode(next(decoder.frames())).name == each.name
        assert files.entry(str(path)).modified_ns == 2**63 - 1
    finally:
        path.unlink()
        link.unlink()


@pytest.mark.parametrize("entries", [0, 1, 50, 100])
def test_a_delete_stops(folder: Path, entries: int) -> None:
    """A delete ends at the next entry when it is not wanted any more."""
    with pytest.raises(AgentError, match="cancelled"):
        files.delete(str(folder), stop_after(entries))
    assert len(os.listdir(folder)) >= 101 - entries


def test_a_delete_of_everything(folder: Path, tmp_path: Path) -> None:
    """All entries of a tree go, whatever they are. Links are not followed."""
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "file").touch()
    (folder / "sub/link").symlink_to(keep)
    (folder / "sub/broken").symlink_to("nowhere")
    os.mkfifo(folder / "sub/fifo")
    (folder / ("sub/" + "deep/" * 700)).mkdir(parents=True)
    files.delete(str(folder), go_on)
    assert not folder.exists()
    (tmp_path / "link").symlink_to(keep)
    files.delete(str(tmp_path / "link"), go_on)
    assert os.listdir(tmp_path) == ["keep"]
    assert os.listdir(keep) == ["file"]


def test_many_directories_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories are remembered for deletion a run at a time, and all of them go."""
    monkeypatch.setattr(files, "RUN", 7)
    for number in range(50):
        (tmp_path / f"tree/{number}/below").mkdir(parents=True)
        (tmp_path / f"tree/{number}/file").touch()
    files.delete(str(tmp_path / "tree"), go_on)
    assert os.listdir(tmp_path) == []


def test_two_deletes_of_one_tree(folder: Path) -> None:
    """An entry that somebody else has deleted meanwhile is no error."""

    def interfere() -> None:
        for each in folder.iterdir():
            if each.is_file():
                each.unlink()

    files.delete(str(folder), interfere)
    assert not folder.exists()
    with pytest.raises(AgentError) as caught:
        files.delete(str(folder), go_on)
    assert caught.value.code == "not_found"


def test_moves_refused(folder: Path) -> None:
    """A directory goes into a directory, but not over something there, and not into itself."""
    (folder / "sub/100/x").mkdir(parents=True)
    (folder / "100").mkdir()
    for source, destination, code in (
        ("100", "sub", "exists"),
        ("sub", "sub/100/y", "invalid"),
        ("000", "sub", "is_directory"),
        ("sub", "000", "not_directory"),
    ):
        with pytest.raises(AgentError) as caught:
            files.move(wire.Move(source=str(folder / source), destination=str(folder / destination)), go_on)
        assert caught.value.code == code
    moved = files.move(wire.Move(source=str(folder / "100"), destination=str(folder / "sub/100")), go_on)
    assert moved.path == str(folder / "sub/100/100")
