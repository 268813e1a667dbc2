"""The store. Keys are kept as hashes only, and entries that a crash left open are closed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel_gateway.sandbox.store import Store, new_key


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    store = Store(tmp_path / "cellvm.db")
    yield store
    store.close()


def test_the_text_of_a_key_is_nowhere_on_disk(store: Store, tmp_path: Path) -> None:
    """Neither the database nor its log holds a key, and only its user may read it."""
    key = new_key()
    store.add_key(key, "mine")
    store.owner_of(key)
    files = list(tmp_path.iterdir())
    assert len(files) >= 2
    for file in files:
        assert key.encode() not in file.read_bytes()
        assert key.removeprefix("e2b_").encode() not in file.read_bytes()
    assert (tmp_path / "cellvm.db").stat().st_mode & 0o777 == 0o600


def test_keys(store: Store) -> None:
    """A key's owner is found by the key, adding it twice changes nothing, a removed one is not known any more."""
    key, other = new_key(), new_key()
    owner = store.add_key(key, "mine")
    assert store.add_key(key, "again") == owner == store.owner_of(key)
    assert store.add_key(other, "other") != owner
    assert [each[:2] for each in store.list_keys()][:1] == [(owner, "mine")]
    assert store.owner_of("unknown") is None
    assert store.remove_key(owner)
    assert not store.remove_key(owner)
    assert store.owner_of(key) is None
    assert store.owner_of(other) is not None


def test_keys_have_the_form_that_clients_accept() -> None:
    """`e2b_` and 40 hex digits, never twice the same."""
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == 44 and key.startswith("e2b_") and int(key[4:], 16) >= 0 for key in keys)


def test_the_journal_tells_only_the_owner_how_a_sandbox_ended(store: Store) -> None:
    """The first reason is kept, and only the owner can read it."""
    store.sandbox_created("sbx1", "me", "base")
    assert store.end_of("sbx1", "me") is None
    store.sandbox_ended("sbx1", "timeout")
    store.sandbox_ended("sbx1", "kill")
    end = store.end_of("sbx1", "me")
    assert end is not None
    assert end[1] == "timeout"
    assert store.end_of("sbx1", "you") is None


def test_a_crash_leaves_open_entries_that_the_next_start_closes(tmp_path: Path) -> None:
    """Sandboxes of a killed server are closed once, with the given reason. Ended ones keep their own reason."""
    first = Store(tmp_path / "cellvm.db")
    for name in ("a", "b", "c"):
        first.sandbox_created(name, "me", "base")
    first.sandbox_ended("c", "kill")
    second = Store(tmp_path / "cellvm.db")  # the first was never closed
    try:
        assert second.end_all("host_restart") == 2
        assert second.end_all("host_restart") == 0
        ends = {name: second.end_of(name, "me") for name in ("a", "b", "c")}
        assert {name: end and end[1] for name, end in ends.items()} == {
            "a": "host_restart",
            "b": "host_restart",
            "c": "kill",
        }
    finally:
        first.close()
        second.close()
