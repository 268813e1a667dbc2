"""Links to one sandbox for other people, in the database. A link is a key that sees the sandbox alone, for a while.

It is made, counted and removed in transactions with the events that tell it, and it goes with its sandbox.
"""

import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kernel_gateway.errors import NotFound, TooManyRequests
from kernel_gateway.sandbox import outbox
from kernel_gateway.sandbox.key import Scope

MODES = ("watch", "use")
MAX_SHARES = 20
"""Links that one sandbox may have at once."""

SCHEMA = (
    "ALTER TABLE keys ADD COLUMN expires REAL",
    "ALTER TABLE keys ADD COLUMN uses INTEGER NOT NULL DEFAULT 0",
)


class Share(NamedTuple):
    """A link, without its secret. Times are seconds since 1970, and one without `expires` is good until it is revoked.

    `uses` counts what was begun with it.
    """

    id: str
    mode: str
    created: float
    expires: float | None
    uses: int = 0


def scopes(sandbox: str) -> tuple[str, ...]:
    """The scopes of a sandbox's links, as the database has them."""
    return tuple(str(Scope(sandbox=sandbox, mode=mode)) for mode in MODES)


def of(db: sqlite3.Connection, sandbox: str) -> list[Share]:
    """The links of a sandbox that are good now, the oldest first."""
    query = (
        "SELECT id, substr(scope, 1, instr(scope, '=') - 1), created, expires, uses FROM keys"
        " WHERE scope IN (?, ?) AND (expires IS NULL OR expires > ?) ORDER BY created"
    )
    return [Share(*row) for row in db.execute(query, (*scopes(sandbox), time.time()))]


def add(db: sqlite3.Connection, sandbox: str, secret: bytes, mode: str, seconds: float) -> Share:
    """Make a link.

    Args:
        secret: the hash of its key.

    Raises:
        NotFound: the sandbox has ended.
        TooManyRequests: it has as many links as there may be.
    """
    if len(of(db, sandbox)) >= MAX_SHARES:
        raise TooManyRequests(f"the sandbox has {MAX_SHARES} links, which is all that it may have", hint="revoke one")
    made = Share(secrets.token_hex(8), mode, time.time(), time.time() + seconds)
    owner = _tell(db, sandbox, {"reason": "share", "shareID": made.id, "mode": mode})
    db.execute(
        "INSERT INTO keys (hash, owner, name, created, id, scope, expires) VALUES (?, ?, 'link', ?, ?, ?, ?)",
        (secret, owner, made.created, made.id, str(Scope(sandbox=sandbox, mode=mode)), made.expires),
    )
    return made


def revoke(db: sqlite3.Connection, sandbox: str, share: str) -> None:
    """Remove a link.

    Raises:
        NotFound: the sandbox has none with that id.
    """
    query = "DELETE FROM keys WHERE id = ? AND scope IN (?, ?) AND (expires IS NULL OR expires > ?)"
    if not db.execute(query, (share, *scopes(sandbox), time.time())).rowcount:
        raise NotFound("link not found")
    _tell(db, sandbox, {"reason": "share_revoked", "shareID": share})


def count(db: sqlite3.Connection, uses: Mapping[str, int]) -> None:
    """Add to the uses of links, by their ids."""
    db.executemany("UPDATE keys SET uses = uses + ? WHERE id = ?", [(number, share) for share, number in uses.items()])


def end(db: sqlite3.Connection, sandboxes: Iterable[str]) -> None:
    """Remove the links of sandboxes that have ended."""
    db.executemany("DELETE FROM keys WHERE scope IN (?, ?)", map(scopes, sandboxes))


def forget(db: sqlite3.Connection) -> None:
    """Remove the links whose time is over."""
    db.execute("DELETE FROM keys WHERE expires <= ?", (time.time(),))


def _tell(db: sqlite3.Connection, sandbox: str, data: Mapping[str, object]) -> str:
    """Write an event of a sandbox, and return its owner."""
    row = db.execute("SELECT owner, template FROM sandboxes WHERE id = ? AND ended IS NULL", (sandbox,)).fetchone()
    if row is None:
        raise NotFound("sandbox not found")
    outbox.record(db, [outbox.event("updated", row[0], sandbox, row[1], data)])
    return str(row[0])
