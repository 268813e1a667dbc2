"""Data that outlives the server: keys and the journal of sandboxes, in one SQLite file.

A sandbox is written down before its machine starts and before it is destroyed, so that the file is right after any
crash. Calls are synchronous, because each is one small statement, far below a millisecond in WAL mode.
"""

import hashlib
import secrets
import sqlite3
import time
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    hash BLOB PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, created REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS sandboxes (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, template TEXT NOT NULL, created REAL NOT NULL, ended REAL, reason TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS live ON sandboxes (id) WHERE ended IS NULL;
CREATE INDEX IF NOT EXISTS ended ON sandboxes (owner, ended);
"""


def new_key() -> str:
    """An API key: 160 random bits in the form that E2B's clients accept."""
    return "e2b_" + secrets.token_hex(20)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Store:
    """The database. Times are seconds since 1970."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        path.chmod(0o600)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        self._db.close()

    # -- keys: only their hashes are kept

    def add_key(self, key: str, name: str) -> str:
        """Let `key` in, and return its owner's id. Adding a known key changes nothing."""
        known = self.owner_of(key)
        if known is not None:
            return known
        owner = secrets.token_hex(8)
        self._db.execute("INSERT INTO keys VALUES (?, ?, ?, ?)", (_hash(key), owner, name, time.time()))
        return owner

    def owner_of(self, key: str) -> str | None:
        """The owner of a key. The look-up is by hash, so its time tells nothing about the stored keys."""
        row = self._db.execute("SELECT owner FROM keys WHERE hash = ?", (_hash(key),)).fetchone()
        return row[0] if row else None

    def list_keys(self) -> list[tuple[str, str, float]]:
        """Owner id, name and time of creation of every key."""
        return self._db.execute("SELECT owner, name, created FROM keys ORDER BY created").fetchall()

    def remove_key(self, owner: str) -> bool:
        return self._db.execute("DELETE FROM keys WHERE owner = ?", (owner,)).rowcount > 0

    # -- sandboxes

    def sandbox_created(self, sandbox_id: str, owner: str, template: str) -> None:
        values = (sandbox_id, owner, template, time.time())
        self._db.execute("INSERT INTO sandboxes VALUES (?, ?, ?, ?, NULL, NULL)", values)

    def sandbox_ended(self, sandbox_id: str, reason: str) -> None:
        self._db.execute(
            "UPDATE sandboxes SET ended = ?, reason = ? WHERE id = ? AND ended IS NULL",
            (time.time(), reason, sandbox_id),
        )

    def end_of(self, sandbox_id: str, owner: str) -> tuple[float, str] | None:
        """When and why a sandbox of that owner ended."""
        row: tuple[float, str] | None = self._db.execute(
            "SELECT ended, reason FROM sandboxes WHERE id = ? AND owner = ? AND ended IS NOT NULL",
            (sandbox_id, owner),
        ).fetchone()
        return row

    def ended_since(self, owner: str, moment: float) -> list[tuple[str, str, float, str]]:
        """Id, template, end and reason of the owner's sandboxes that ended after `moment`, but not by a request."""
        return self._db.execute(
            "SELECT id, template, ended, reason FROM sandboxes WHERE owner = ? AND ended > ? AND reason != 'kill'"
            " ORDER BY ended DESC LIMIT 100",
            (owner, moment),
        ).fetchall()

    def sandbox_forgotten(self, sandbox_id: str) -> None:
        """Take note that the owner knows of a sandbox's end."""
        self._db.execute("UPDATE sandboxes SET reason = 'kill' WHERE id = ?", (sandbox_id,))

    def end_all(self, reason: str) -> int:
        """Close the entries that an earlier server left open, and return how many there were."""
        query = "UPDATE sandboxes SET ended = ?, reason = ? WHERE ended IS NULL"
        return self._db.execute(query, (time.time(), reason)).rowcount
