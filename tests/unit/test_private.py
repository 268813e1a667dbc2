"""Directories that are believed: whose they must be, and what is done with others."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kernel_gateway.images.cache import Cache
from kernel_gateway.private import foreign, private
from kernel_gateway.sandbox.key import new_key
from kernel_gateway.sandbox.store import Store
from kernel_gateway.server import claim, load_templates
from kernel_gateway.settings import Settings

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
NOBODY = 65534


def test_a_directory_of_our_own(tmp_path: Path) -> None:
    """A directory that is missing is made, for nobody else. One that others may read is all right."""
    made = private(tmp_path / "a/b")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o755)
    assert private(made) == made


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o1777], ids=oct)
def test_a_directory_that_others_may_write_to(tmp_path: Path, mode: int) -> None:
    """It is refused with what to do, sticky or not, and so is a directory below one that is not sticky."""
    path = private(tmp_path / "data")
    path.chmod(mode)
    with pytest.raises(PermissionError, match=rf"{path} may be written by everybody.*chmod go-w"):
        private(path)
    if mode & 0o1000:
        assert private(path / "below")
    else:
        with pytest.raises(PermissionError, match=rf"{path} of {path / 'below'} may be written by everybody"):
            private(path / "below")


@as_root
def test_a_directory_of_somebody_else(tmp_path: Path) -> None:
    """It is refused, on the way too, and also behind a link. A link that somebody else made is refused as well."""
    theirs = private(tmp_path / "theirs")
    (theirs / "ours").mkdir()
    link = tmp_path / "link"
    link.symlink_to(theirs / "ours")
    private(link)
    os.chown(theirs, NOBODY, NOBODY)
    for path in (theirs, theirs / "ours", link):
        with pytest.raises(PermissionError, match=f"{theirs}.* belongs to user {NOBODY}"):
            private(path)
    os.chown(theirs, 0, 0)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(PermissionError, match=f"{link} belongs to user {NOBODY}"):
        private(link)


@as_root
def test_a_group_that_may_write(tmp_path: Path) -> None:
    """A group of this user alone may write, because it is as good as the user. Another group may not."""
    path = private(tmp_path / "data")
    path.chmod(0o770)
    assert foreign(path.stat()) == ""
    os.chown(path, 0, 1)  # the user `daemon` is in it
    assert foreign(path.stat()) == "may be written by group 1"


@as_root
def test_a_planted_key_is_of_no_use(tmp_path: Path) -> None:
    """A data directory, a cache and a folder of templates that others may write to are refused before they are read."""
    data = private(tmp_path / "data")
    planted = Store(data / "cellvm.db")
    planted.add_key(new_key(), "planted")
    planted.close()
    (tmp_path / "templates").mkdir()
    uses: dict[Path, Callable[[], object]] = {
        data: lambda: claim(data),
        tmp_path / "cache": lambda: Cache(tmp_path / "cache"),
        tmp_path / "templates": lambda: load_templates(Settings(template_dir=str(tmp_path / "templates"))),
    }
    for path, use in uses.items():
        path.mkdir(exist_ok=True)
        path.chmod(0o777)
        os.chown(path, NOBODY, NOBODY)
        with pytest.raises(PermissionError, match=f"{path}.* belongs to user {NOBODY}"):
            use()
