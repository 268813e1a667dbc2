"""Data that outlives the server: keys, the journal of sandboxes, their events and webhooks, in one SQLite file.

A sandbox is written down before its machine starts, and its end as soon as that can be written. No end of a sandbox
waits for the disk: ends are kept in memory until a thread has written them, and all look-ups know them from the first
moment. Reads and keys are small statements, far below a millisecond in WAL mode, and run where they are called.
"""

import asyncio
import logging
import math
import os
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from kernel_gateway.errors import HostFull
from kernel_gateway.sandbox import outbox, shares
from kernel_gateway.sandbox.key import ALL, Key, Scope, hashed, may_be_key, parse_scope

log = logging.getLogger(__name__)
T = TypeVar("T")

VARIABLE = "CELLVM_API_KEY"
"""The id and the owner of the key that the server was started with. It is not stored."""
SCHEMA = (
    (
        "CREATE TABLE IF NOT EXISTS keys ("
        " hash BLOB PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, created REAL NOT NULL) STRICT",
        "CREATE TABLE IF NOT EXISTS sandboxes ("
        " id TEXT PRIMARY KEY, owner TEXT NOT NULL, template TEXT NOT NULL, created REAL NOT NULL, ended REAL,"
        " reason TEXT) STRICT",
        "CREATE INDEX IF NOT EXISTS live ON sandboxes (id) WHERE ended IS NULL",
        "CREATE INDEX IF NOT EXISTS ended ON sandboxes (owner, ended)",
    ),
    (
        "DELETE FROM keys WHERE name = 'CELLVM_API_KEY'",  # earlier servers stored it
        "ALTER TABLE keys ADD COLUMN id TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE keys ADD COLUMN scope TEXT NOT NULL DEFAULT ''",
        "UPDATE keys SET id = owner",
    ),
    ("ALTER TABLE sandboxes ADD COLUMN paused TEXT", *outbox.SCHEMA),
    ("CREATE TABLE snapshots (id TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT",),
    ("CREATE TABLE builds (id TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT",),
    shares.SCHEMA,
)
"""What makes each version of the database from the one before."""
KEPT_DAYS = 30
"""Days that an entry of a sandbox is kept after its end."""
LOCK_TIMEOUT = 5.0
"""Seconds that one write waits for another process that holds the database."""
CREATE_LIMIT = 10.0
"""Seconds that a create waits for its entry."""
RETRY = (1.0, 30.0)
"""First and longest pause, in seconds, after ends could not be written."""
LISTED = 100
RESERVE = 8 * 1024 * 1024
"""Bytes of disk that are kept for the ends of sandboxes, because a full disk is when many of them end."""


class Entry(NamedTuple):
    """A sandbox in the journal. Times are seconds since 1970."""

    id: str
    owner: str
    template: str
    created: float
    ended: float | None = None
    reason: str | None = None


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Write all that the block writes, or nothing of it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


class Store:
    """The database. `trouble` says why ends can't be written at present; it is empty if they can.

    Keys are looked up in memory, because a stranger may offer very many. They are read again when another process has
    changed the database.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = self._connect(path)
        path.chmod(0o600)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._migrate()
        self._writing_db = self._connect(path)
        self._thread = ThreadPoolExecutor(1, "store")
        self._reserve = path.with_name("reserve")
        self._unwritten: dict[str, Entry] = {}
        self._untold: list[outbox.Event] = []
        self._uses: Counter[str] = Counter()
        self._news = asyncio.Event()
        self._flushing: asyncio.Task[None] | None = None
        self.trouble = ""
        self._lent: dict[bytes, Key] = {}
        self._known: dict[bytes, Key] = {}
        self._version = -1

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=LOCK_TIMEOUT)
        db.execute("PRAGMA synchronous=NORMAL")
        return db

    def _migrate(self) -> None:
        """Bring the database to the present version."""
        while (version := self._db.execute("PRAGMA user_version").fetchone()[0]) < len(SCHEMA):
            with transaction(self._db):
                if self._db.execute("PRAGMA user_version").fetchone()[0] == version:  # else another process was first
                    for statement in SCHEMA[version]:
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {version + 1}")

    async def flush(self, limit: float) -> None:
        """Return when all ends are written, or after `limit` seconds."""
        if self._flushing is not None:
            await asyncio.wait({self._flushing}, timeout=limit)

    def close(self) -> None:
        """Close the database. Ends that are not written by now are lost; the next start finds their entries open."""
        if self._flushing is not None:
            self._flushing.cancel()
        self._thread.shutdown()
        self._writing_db.close()
        self._db.close()

    # -- keys: only their hashes are kept

    def add_key(self, key: str, name: str, *, owner: str | None = None, scope: Scope = ALL) -> str:
        """Let `key` in, and return its id. Adding a known key changes nothing.

        Args:
            owner: whose sandboxes the key sees; None for an owner of its own.
        """
        known = self.find_key(key)
        if known is not None:
            return known.id
        key_id = secrets.token_hex(8)
        entry = (hashed(key), owner or key_id, name, time.time(), key_id, str(scope))
        self._db.execute("INSERT INTO keys (hash, owner, name, created, id, scope) VALUES (?, ?, ?, ?, ?, ?)", entry)
        self._version = -1
        return key_id

    def lend_key(self, key: str) -> None:
        """Let `key` in for as long as this store is open, without storing it."""
        self._lent[hashed(key)] = Key(VARIABLE, VARIABLE, VARIABLE, time.time())
        self._version = -1

    def find_key(self, key: str) -> Key | None:
        """What is known of a key. The look-up is by hash, so its time tells nothing about the stored keys."""
        known = self._keys().get(hashed(key)) if may_be_key(key) else None
        return known if known is not None and known.expires > time.time() else None

    def list_keys(self) -> list[Key]:
        """All keys that are good now, the oldest first."""
        return sorted((key for key in self._keys().values() if key.expires > time.time()), key=lambda key: key.created)

    def used(self, key_id: str) -> None:
        """Take note that something was begun with a link."""
        self._uses[key_id] += 1
        self._begin_to_flush()

    def _keys(self) -> dict[bytes, Key]:
        (version,) = self._db.execute("PRAGMA data_version").fetchone()  # another connection's commit changes it
        if version != self._version:
            rows = self._db.execute("SELECT hash, id, owner, name, created, scope, expires FROM keys").fetchall()
            stored = {
                row[0]: Key(row[1], row[2], row[3], row[4], parse_scope(row[5]), math.inf if row[6] is None else row[6])
                for row in rows
            }
            self._known = {**self._lent, **stored}
            self._version = version
        return self._known

    def remove_key(self, key_id: str, *, with_sandboxes: bool = False) -> bool:
        """Remove a key, and the keys that see the same sandboxes if it is their owner's first. False if there is none.

        Args:
            with_sandboxes: write down that the owner's sandboxes have ended. The server that runs them ends them.
        """
        with transaction(self._db):
            if with_sandboxes:
                query = "UPDATE sandboxes SET ended = ?, reason = 'key_removed' WHERE owner = ? AND ended IS NULL"
                self._db.execute(query, (time.time(), key_id))
            removed = self._db.execute("DELETE FROM keys WHERE ? IN (id, owner)", (key_id,)).rowcount
            if not self._db.execute("SELECT 1 FROM keys WHERE owner = ?", (key_id,)).fetchone():
                outbox.remove(self._db, key_id)
        self._version = -1
        return removed > 0

    # -- sandboxes

    async def sandbox_created(
        self, sandbox_id: str, owner: str, template: str, data: Mapping[str, object] = outbox.NONE
    ) -> None:
        """Write a sandbox down.

        Args:
            data: what its event tells besides.

        Raises:
            HostFull: the database can't be written.
        """
        await self._in_thread(self._write_first, Entry(sandbox_id, owner, template, time.time()), data)
        self._wake()

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """The result of a write.

        Raises:
            HostFull: the database can't be written. A write that was only late happens all the same.
        """
        try:
            async with asyncio.timeout(CREATE_LIMIT):
                return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
        except (sqlite3.Error, TimeoutError) as error:
            raise HostFull(f"the server's database can't be written: {str(error) or 'it is locked'}") from error

    def sandbox_changed(
        self, kind: str, owner: str, sandbox_id: str, template: str, data: Mapping[str, object]
    ) -> None:
        """Take note of an event that is no end. This never fails."""
        self._untold.append(outbox.event(kind, owner, sandbox_id, template, data))
        self._begin_to_flush()

    def sandbox_ended(self, sandbox_id: str, owner: str, template: str, reason: str) -> None:
        """Take note of an end. This never fails, and a later call for the same sandbox changes nothing."""
        if self.end_of(sandbox_id, owner) is None:
            self._note(Entry(sandbox_id, owner, template, time.time(), time.time(), reason))

    def sandbox_forgotten(self, sandbox_id: str, owner: str) -> None:
        """Take note that the owner knows of a sandbox's end."""
        entry = self.entry(sandbox_id)
        if entry is not None and entry.owner == owner:
            self._note(entry._replace(reason="kill"))

    def end_of(self, sandbox_id: str, owner: str) -> tuple[float, str] | None:
        """When and why a sandbox of that owner ended."""
        entry = self.entry(sandbox_id)
        if entry is None or entry.owner != owner or entry.ended is None or entry.reason is None:
            return None
        return entry.ended, entry.reason

    def ended_since(self, owner: str, moment: float) -> list[Entry]:
        """The owner's sandboxes that ended after `moment`, but not by a request, the last one first."""
        rows = self._db.execute(
            "SELECT id, owner, template, created, ended, reason FROM sandboxes"
            " WHERE owner = ? AND ended > ? ORDER BY ended DESC LIMIT ?",
            (owner, moment, LISTED),
        )
        entries = {entry.id: entry for entry in (Entry(*row) for row in rows)} | self._unwritten
        found = [
            entry
            for entry in entries.values()
            if entry.owner == owner and entry.ended is not None and entry.ended > moment and entry.reason != "kill"
        ]
        return sorted(found, key=lambda entry: entry.ended or 0, reverse=True)[:LISTED]

    def end_all(self, reason: str) -> int:
        """Close the entries that an earlier server left open, and return how many there were. Forget old ones."""
        self._db.execute("DELETE FROM sandboxes WHERE ended < ?", (self._oldest,))
        with transaction(self._db):
            left = self._db.execute(
                "UPDATE sandboxes SET ended = ?, reason = ? WHERE ended IS NULL AND paused IS NULL"
                " RETURNING owner, id, template",
                (time.time(), reason),
            ).fetchall()
            outbox.record(self._db, (_killed(owner, box, template, reason) for owner, box, template in left))
            shares.end(self._db, [box for _, box, _ in left])
        return len(left)

    @property
    def _oldest(self) -> float:
        """When the oldest entries were made that are kept."""
        return time.time() - KEPT_DAYS * 24 * 3600

    async def sandbox_paused(self, sandbox_id: str, record: str | None) -> None:
        """Write down that a sandbox is paused, and how it can be resumed; None for one that runs again.

        Raises:
            HostFull: the database can't be written. The entry is as it was, or will be when the write was only late.
        """
        await self._in_thread(self._write_paused, sandbox_id, record)
        self._wake()

    def paused(self) -> dict[str, str]:
        """The records of paused sandboxes by their ids."""
        query = "SELECT id, paused FROM sandboxes WHERE paused IS NOT NULL AND ended IS NULL"
        return dict(self._db.execute(query).fetchall())

    async def snapshot_taken(self, snapshot_id: str, sandbox_id: str, record: str) -> None:
        """Write a snapshot down, with an event of its sandbox.

        Raises:
            HostFull: the database can't be written.
        """
        await self._in_thread(self._write_snapshot, snapshot_id, sandbox_id, record)
        self._wake()

    async def snapshot_deleted(self, snapshot_id: str, sandbox_id: str) -> None:
        """Forget a snapshot, with an event of its sandbox.

        Raises:
            HostFull: the database can't be written.
        """

        def delete(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM snapshots WHERE id = ?", (snapshot_id,))
            _tell_of_snapshot(db, "snapshot_deleted", snapshot_id, sandbox_id)

        await self.change(delete)
        self._wake()

    def snapshots(self) -> dict[str, str]:
        """The records of all snapshots by their ids."""
        return dict(self._db.execute("SELECT id, record FROM snapshots").fetchall())

    async def builds_changed(self, kept: Iterable[tuple[str, str]], gone: Iterable[str]) -> None:
        """Write builds of templates down, each its id and its record, and forget others by their ids.

        Raises:
            HostFull: the database can't be written.
        """
        rows, ids = list(kept), [(each,) for each in gone]

        def change(db: sqlite3.Connection) -> None:
            db.executemany("INSERT OR REPLACE INTO builds (id, record) VALUES (?, ?)", rows)
            db.executemany("DELETE FROM builds WHERE id = ?", ids)

        await self.change(change)

    def builds(self) -> dict[str, str]:
        """The records of all builds of templates by their ids."""
        return dict(self._db.execute("SELECT id, record FROM builds").fetchall())

    def entry(self, sandbox_id: str) -> Entry | None:
        """What is written down of a sandbox, whoever owns it. The caller must check what its client may know."""
        if sandbox_id in self._unwritten:
            return self._unwritten[sandbox_id]
        query = "SELECT id, owner, template, created, ended, reason FROM sandboxes WHERE id = ?"
        row = self._db.execute(query, (sandbox_id,)).fetchone()
        return Entry(*row) if row else None

    def _note(self, entry: Entry) -> None:
        self._unwritten[entry.id] = entry
        self._begin_to_flush()

    def _begin_to_flush(self) -> None:
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        """Write what is unwritten, again and again until it is on disk."""
        pause = RETRY[0]
        while self._unwritten or self._untold or self._uses:
            entries, events, uses = list(self._unwritten.values()), list(self._untold), Counter(self._uses)
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._write, entries, events, uses)
            except (sqlite3.Error, OSError) as error:
                if not self.trouble:
                    log.error("ends of sandboxes can't be written now; they are kept and tried again: %s", error)
                self.trouble = str(error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY[1])
                continue
            del self._untold[: len(events)]
            self._uses -= uses
            self._wake()
            for entry in entries:
                if self._unwritten[entry.id] is entry:
                    del self._unwritten[entry.id]
            if self.trouble:
                log.warning("the database can be written again")
            self.trouble, pause = "", RETRY[0]

    def _write_first(self, entry: Entry, data: Mapping[str, object]) -> None:
        """Write a new entry, and see to the reserve. This runs in the thread."""
        self._insert([entry], [outbox.event("created", entry.owner, entry.id, entry.template, data, once=True)], {})
        if not self._reserve.exists():
            try:
                with self._reserve.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, RESERVE)
            except OSError as error:
                log.warning("there is no space for the database's reserve: %s", error)
                self._reserve.unlink(missing_ok=True)

    def _write(self, entries: list[Entry], events: list[outbox.Event], uses: Mapping[str, int]) -> None:
        """Write entries, with the space of the reserve if there is no other. This runs in the thread."""
        try:
            self._insert(entries, events, uses)
        except sqlite3.OperationalError as error:
            is_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            if not is_full or not self._reserve.exists():
                raise
            self._reserve.unlink()
            self._insert(entries, events, uses)

    def _insert(self, entries: list[Entry], events: list[outbox.Event], uses: Mapping[str, int]) -> None:
        """Insert entries, each in place of an older one of the same sandbox, and the events that tell of them."""
        with transaction(self._writing_db):
            self._writing_db.executemany(
                "INSERT INTO sandboxes (id, owner, template, created, ended, reason) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET ended = excluded.ended, reason = excluded.reason, paused = NULL",
                entries,
            )
            outbox.record(self._writing_db, events)
            shares.count(self._writing_db, uses)
            shares.end(self._writing_db, [each.id for each in entries if each.ended])
            outbox.record(
                self._writing_db,
                (_killed(each.owner, each.id, each.template, each.reason or "") for each in entries if each.ended),
            )

    def _write_snapshot(self, snapshot_id: str, sandbox_id: str, record: str) -> None:
        """Write a snapshot. This runs in the thread."""
        with transaction(self._writing_db):
            self._writing_db.execute("INSERT INTO snapshots (id, record) VALUES (?, ?)", (snapshot_id, record))
            _tell_of_snapshot(self._writing_db, "snapshot", snapshot_id, sandbox_id)

    def _write_paused(self, sandbox_id: str, record: str | None) -> None:
        """Write a pause or its end so that a loss of power can't undo it. This runs in the thread."""
        self._writing_db.execute("PRAGMA synchronous=FULL")
        try:
            with transaction(self._writing_db):
                query = "UPDATE sandboxes SET paused = ? WHERE id = ? AND ended IS NULL RETURNING owner, template"
                for owner, template in self._writing_db.execute(query, (record, sandbox_id)).fetchall():
                    kind = "resumed" if record is None else "paused"
                    outbox.record(self._writing_db, [outbox.event(kind, owner, sandbox_id, template)])
        finally:
            self._writing_db.execute("PRAGMA synchronous=NORMAL")

    # -- events and webhooks; `outbox` has the statements

    async def read(self, query: Callable[..., T], *arguments: object, **options: object) -> T:
        """The result of one of `outbox`'s look-ups, made outside of the event loop, because events may be many."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: query(self._writing_db, *arguments, **options)
        )

    async def change(self, statement: Callable[..., T], *arguments: object, is_news: bool = False) -> T:
        """The result of one of the changes of `outbox` or `shares`.

        Args:
            is_news: it writes events.

        Raises:
            HostFull: the database can't be written.
            CellvmError: what the change raises.
        """

        def work() -> T:
            with transaction(self._writing_db):
                return statement(self._writing_db, *arguments)

        result = await self._in_thread(work)
        if is_news:
            self._wake()
        return result

    async def forget(self) -> None:
        """Forget events and deliveries that are too old, and links whose time is over."""
        await self.change(outbox.forget, self._oldest)
        await self.change(shares.forget)

    def news(self) -> asyncio.Event:
        """What is set when there are more events than now."""
        return self._news

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _tell_of_snapshot(db: sqlite3.Connection, reason: str, snapshot_id: str, sandbox_id: str) -> None:
    """Record an event of a snapshot's sandbox, unless that is forgotten by now."""
    query = "SELECT owner, template FROM sandboxes WHERE id = ?"
    for owner, template in db.execute(query, (sandbox_id,)).fetchall():
        data = {"reason": reason, "snapshotID": snapshot_id}
        outbox.record(db, [outbox.event("updated", owner, sandbox_id, template, data)])


def _killed(owner: str, sandbox_id: str, template: str, reason: str) -> outbox.Event:
    return outbox.event("killed", owner, sandbox_id, template, {"reason": reason}, once=True)
