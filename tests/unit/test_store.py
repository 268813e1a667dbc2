"""The store. Keys are kept as hashes only, and entries that a crash left open are closed."""

import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest

from kernel_gateway.errors import HostFull, InvalidRequest
from kernel_gateway.sandbox.key import Key, new_key, parse_scope
from kernel_gateway.sandbox.outbox import Event
from kernel_gateway.sandbox.store import RESERVE, SCHEMA, Entry, Store
from tests.fakes import eventually


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
    store.find_key(key)
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
    assert store.add_key(key, "again") == owner
    found = store.find_key(key)
    assert found is not None
    assert (found.id, found.owner, found.name, str(found.scope)) == (owner, owner, "mine", "")
    assert store.add_key(other, "other") != owner
    assert [(each.id, each.name) for each in store.list_keys()][:1] == [(owner, "mine")]
    assert store.find_key("unknown") is None
    assert store.remove_key(owner)
    assert not store.remove_key(owner)
    assert store.find_key(key) is None
    assert store.find_key(other) is not None


def test_keys_of_another_process(store: Store) -> None:
    """A key that another process adds or removes is known, or not, at once."""
    other = Store(store.path)
    try:
        key = new_key()
        owner = other.add_key(key, "theirs")
        assert [each.id for each in store.list_keys()] == [owner]
        assert store.find_key(key) == store.list_keys()[0]
        assert other.remove_key(owner)
        assert store.find_key(key) is None
        assert store.list_keys() == []
    finally:
        other.close()


def test_keys_with_limits(store: Store) -> None:
    """A key with a scope sees the sandboxes of another key, is removed alone, and goes with the owner's first key."""
    first, reader, builder = new_key(), new_key(), new_key()
    owner = store.add_key(first, "first")
    limited = store.add_key(reader, "reader", owner=owner, scope=parse_scope("read-only"))
    store.add_key(builder, "builder", owner=owner, scope=parse_scope("template=base"))
    found = store.find_key(reader)
    assert found is not None
    assert (found.id, found.owner, str(found.scope)) == (limited, owner, "read-only")
    assert store.remove_key(limited)
    assert [each.name for each in store.list_keys()] == ["first", "builder"]
    assert store.remove_key(owner)
    assert store.list_keys() == []


def test_a_lent_key(store: Store) -> None:
    """A key that is lent is known to this store and to no other, and is not on disk."""
    key = new_key()
    store.lend_key(key)
    found = store.find_key(key)
    assert found is not None
    assert found.owner == "CELLVM_API_KEY"
    with closing(Store(store.path)) as other:
        assert other.find_key(key) is None
        assert other.list_keys() == []


@pytest.mark.parametrize("key", ["", "x" * 19, "x" * 257])
def test_what_can_be_no_key_is_not_looked_up(store: Store, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers offer many texts. Those of another length than keys cost nothing."""
    monkeypatch.setattr("kernel_gateway.sandbox.store.hashed", None)
    assert store.find_key(key) is None


def test_a_database_of_earlier_servers(tmp_path: Path) -> None:
    """Keys and sandboxes stay. The key that an earlier server stored from its variable is not valid any more."""
    kept, variable = new_key(), new_key()
    with closing(sqlite3.connect(tmp_path / "cellvm.db", isolation_level=None)) as db:
        for statement in SCHEMA[0]:
            db.execute(statement)
        for key, owner, name in ((kept, "11", "mine"), (variable, "22", "CELLVM_API_KEY")):
            db.execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?)", (hashlib.sha256(key.encode()).digest(), owner, name, 1.0)
            )
        db.execute("INSERT INTO sandboxes VALUES ('sbx1', '11', 'base', 1, 2, 'died')")
    for _ in range(2):
        with closing(Store(tmp_path / "cellvm.db")) as store:
            assert store.list_keys() == [Key("11", "11", "mine", 1.0)]
            assert store.find_key(kept) is not None
            assert store.find_key(variable) is None
            assert store.end_of("sbx1", "11") == (2.0, "died")


@pytest.mark.parametrize("text", ["", "read-only", "template=code_interpreter", "sandbox=sbx1-a_b"])
def test_scopes_are_read_as_they_are_written(text: str) -> None:
    """Each form of a scope survives the database."""
    assert str(parse_scope(text)) == text


@pytest.mark.parametrize("text", ["readonly", "template=", "sandbox=a b", "template=a,sandbox=b", "owner=x", " "])
def test_what_is_no_scope(text: str) -> None:
    """It is refused, and is not taken for no limits."""
    with pytest.raises(InvalidRequest, match="read-only, metrics, template=ID, sandbox=ID, watch=ID or use=ID"):
        parse_scope(text)


def test_keys_have_the_form_that_clients_accept() -> None:
    """`e2b_` and 40 hex digits, never twice the same."""
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == 44 and key.startswith("e2b_") and int(key[4:], 16) >= 0 for key in keys)


async def test_the_journal_tells_only_the_owner_how_a_sandbox_ended(store: Store) -> None:
    """The first reason is kept, and only the owner can read it, before and after it is on disk."""
    await store.sandbox_created("sbx1", "me", "base")
    assert store.end_of("sbx1", "me") is None
    store.sandbox_ended("sbx1", "me", "base", "timeout")
    store.sandbox_ended("sbx1", "me", "base", "kill")
    for _ in range(2):
        end = store.end_of("sbx1", "me")
        assert end is not None
        assert end[1] == "timeout"
        assert store.end_of("sbx1", "you") is None
        assert [(each.id, each.reason) for each in store.ended_since("me", 0)] == [("sbx1", "timeout")]
        await store.flush(10)
        assert rows(store) == [("sbx1", "timeout")]
    store.sandbox_forgotten("sbx1", "you")
    assert len(store.ended_since("me", 0)) == 1
    store.sandbox_forgotten("sbx1", "me")
    assert store.ended_since("me", 0) == []


def rows(store: Store) -> list[tuple[str, str]]:
    """Id and reason of all sandboxes that are on disk."""
    with closing(sqlite3.connect(store.path)) as db:
        return db.execute("SELECT id, reason FROM sandboxes ORDER BY id").fetchall()


async def test_a_crash_leaves_open_entries_that_the_next_start_closes(tmp_path: Path) -> None:
    """Sandboxes of a killed server are closed once, with the given reason. Ended ones keep their own reason."""
    first = Store(tmp_path / "cellvm.db")
    for name in ("a", "b", "c"):
        await first.sandbox_created(name, "me", "base")
    first.sandbox_ended("c", "me", "base", "kill")
    await first.flush(10)
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


async def test_old_entries_are_deleted_at_a_start(store: Store) -> None:
    """An entry is kept for KEPT_DAYS days after its end, and an open one for ever."""
    day = 24 * 3600
    for name in ("old", "young", "open"):
        await store.sandbox_created(name, "me", "base")
    with closing(sqlite3.connect(store.path)) as db, db:
        db.execute("UPDATE sandboxes SET ended = ?, reason = 'died' WHERE id = 'old'", (time.time() - 31 * day,))
        db.execute("UPDATE sandboxes SET ended = ?, reason = 'died' WHERE id = 'young'", (time.time() - 29 * day,))
    assert store.end_all("host_restart") == 1
    assert rows(store) == [("open", "host_restart"), ("young", "died")]


async def test_pauses(store: Store) -> None:
    """A paused sandbox stays open at a start, its record is there, and its end or its resume removes it."""
    for name in ("sbx1", "sbx2", "sbx3"):
        await store.sandbox_created(name, "me", "base")
        await store.sandbox_paused(name, f"record of {name}")
    await store.sandbox_paused("sbx2", None)
    store.sandbox_ended("sbx3", "me", "base", "kill")
    await store.flush(10)
    await store.sandbox_paused("sbx3", "too late")
    assert store.end_all("host_restart") == 1
    assert store.paused() == {"sbx1": "record of sbx1"}
    assert store.end_of("sbx1", "me") is None
    assert store.end_of("sbx2", "me")[1] == "host_restart"  # type: ignore[index]


@pytest.mark.parametrize("version", range(len(SCHEMA)))
async def test_a_database_of_an_earlier_version(tmp_path: Path, version: int) -> None:
    """Entries of every earlier version are kept, and sandboxes can be paused in it."""
    with closing(sqlite3.connect(tmp_path / "db")) as db, db:
        for statements in SCHEMA[:version]:
            for statement in statements:
                db.execute(statement)
        if version:
            db.execute("INSERT INTO sandboxes (id, owner, template, created) VALUES ('sbx0', 'me', 'base', 1.0)")
        db.execute(f"PRAGMA user_version = {version}")
    store = Store(tmp_path / "db")
    await store.sandbox_created("sbx1", "me", "base")
    await store.sandbox_paused("sbx1", "record")
    assert store.end_all("host_restart") == bool(version)
    assert list(store.paused()) == ["sbx1"]
    store.close()


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """Another process holds the database, as a backup does."""
    with closing(sqlite3.connect(store.path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


async def test_the_reserve(tmp_path: Path) -> None:
    """On a full disk ends are written with the space that is kept for them. A later create keeps some again."""
    store = Store(tmp_path / "db")
    await store.sandbox_created("sbx0", "me", "base")
    reserve = tmp_path / "reserve"
    assert reserve.stat().st_blocks * 512 >= RESERVE
    insert, tried = store._insert, []

    def insert_if_there_is_space(entries: list[Entry], events: list[Event], uses: Mapping[str, int]) -> None:
        tried.append(reserve.exists())
        if reserve.exists():
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        insert(entries, events, uses)

    store._insert = insert_if_there_is_space  # type: ignore[method-assign]
    store.sandbox_ended("sbx0", "me", "base", "timeout")
    await store.flush(10)
    assert (tried, store.trouble, rows(store)) == ([True, False], "", [("sbx0", "timeout")])
    await store.sandbox_created("sbx1", "me", "base")
    assert reserve.exists()
    store.close()


@contextmanager
def full(store: Store) -> Iterator[None]:
    """The database may not grow by a page, as on a full disk."""
    db = store._writing_db
    (most,) = db.execute("PRAGMA max_page_count").fetchone()
    db.execute("PRAGMA max_page_count = 1")
    yield
    db.execute(f"PRAGMA max_page_count = {most}")


@pytest.mark.parametrize("trouble", [locked, full])
async def test_an_end_waits_for_no_disk(
    store: Store, trouble: Callable[[Store], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end is known at once while nothing can be written, a create is refused, and the end is written later."""
    monkeypatch.setattr("kernel_gateway.sandbox.store.RETRY", (0.01, 0.05))
    store._writing_db.execute("PRAGMA busy_timeout = 100")
    long = "sbx1" + "x" * 5000  # longer than any page has room for
    await store.sandbox_created("sbx0", "me", "base")
    with trouble(store):
        store.sandbox_ended(long, "me", "base", "timeout")
        end = store.end_of(long, "me")
        assert end is not None
        assert end[1] == "timeout"
        with pytest.raises(HostFull, match="database"):
            await store.sandbox_created("sbx2" + "x" * 5000, "me", "base")
        await eventually(lambda: store.trouble != "")
    await store.flush(10)
    assert store.trouble == ""
    assert (long, "timeout") in rows(store)


async def test_a_create_does_not_wait_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A create that waits for its entry is refused after its limit, and its end closes an entry that came late."""
    monkeypatch.setattr("kernel_gateway.sandbox.store.CREATE_LIMIT", 0.05)
    with locked(store):
        with pytest.raises(HostFull, match="locked"):
            await store.sandbox_created("sbx1", "me", "base")
        store.sandbox_ended("sbx1", "me", "base", "start_failed")
    await store.flush(10)
    assert rows(store) == [("sbx1", "start_failed")]
