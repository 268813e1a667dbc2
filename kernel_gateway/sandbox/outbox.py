"""Events of sandboxes, and their way to webhooks, in the database.

The events of one sandbox for one webhook are a *lane*. They are delivered in order, and a lane whose first event can't
be delivered waits. Other lanes do not.

An event is written in the same transaction as the change that it tells. In that transaction it is also put into the
outbox of each webhook that wants it. So no change is without its event, and no event is lost on its way, whenever the
server dies. Whoever delivers takes it out of the outbox only when the receiver has it, so it may come twice. The id of
the event tells that.
"""

import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kernel_gateway.errors import TooManyRequests

LIFECYCLE = "sandbox.lifecycle."
TYPES = tuple(LIFECYCLE + name for name in ("created", "updated", "paused", "resumed", "killed"))
MAX_WEBHOOKS = 50
"""Webhooks that one owner may have."""
MAX_EVENTS = 1000
"""Events that are kept of one sandbox. Older ones are forgotten, delivered or not."""
MAX_WAITING = 100_000
"""Events that wait for one webhook. It loses what comes beyond, and `lost` counts it."""
KEPT_DELIVERIES = 3 * 24 * 3600.0
"""Seconds after which an event that could not be delivered is given up, and a delivered one is not shown any more."""
BACKOFF = (1.0, 60.0)
"""First and longest pause, in seconds, after an event could not be delivered."""

SCHEMA = (
    "CREATE TABLE events ("
    " seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, sandbox TEXT NOT NULL,"
    " template TEXT NOT NULL, type TEXT NOT NULL, data TEXT NOT NULL, created REAL NOT NULL,"
    " number INTEGER NOT NULL) STRICT",
    "CREATE INDEX events_of_owner ON events (owner, number)",
    "CREATE INDEX events_of_sandbox ON events (sandbox, seq)",
    "CREATE TABLE webhooks ("
    " id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, url TEXT NOT NULL, types TEXT NOT NULL,"
    " secret TEXT NOT NULL, created REAL NOT NULL, lost INTEGER NOT NULL DEFAULT 0) STRICT",
    "CREATE TABLE deliveries ("
    " webhook TEXT NOT NULL, seq INTEGER NOT NULL, sandbox TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,"
    " ended REAL, status INTEGER, error TEXT, PRIMARY KEY (webhook, seq)) STRICT",
    "CREATE INDEX waiting ON deliveries (webhook, sandbox, seq) WHERE ended IS NULL",
    "CREATE TABLE lanes ("
    " webhook TEXT NOT NULL, sandbox TEXT NOT NULL, due REAL NOT NULL, failures INTEGER NOT NULL DEFAULT 0,"
    " PRIMARY KEY (webhook, sandbox)) STRICT",
    "CREATE INDEX due ON lanes (due)",
)


NONE: Mapping[str, object] = {}


class Event(NamedTuple):
    """A fact about a sandbox. `created` is in seconds since 1970, `data` is a JSON object.

    `seq` is its place among all events of the server, and `number` its place among its owner's, which are none of the
    others' business. Both are 0 until it is written.
    """

    seq: int
    id: str
    owner: str
    sandbox: str
    template: str
    type: str
    data: str
    created: float
    number: int = 0


class Webhook(NamedTuple):
    """A receiver of an owner's events. `types` has those that it wants, separated by blanks; empty for all."""

    id: str
    owner: str
    name: str
    url: str
    types: str
    secret: str
    created: float
    lost: int = 0


class Delivery(NamedTuple):
    """An event on its way to a webhook.

    `ended` is when it arrived or was given up, in seconds since 1970, and `error` then tells which. `status` is the
    last answer's; None without one.
    """

    webhook: str
    seq: int
    sandbox: str
    attempts: int
    ended: float | None
    status: int | None
    error: str | None


def event(
    kind: str, owner: str, sandbox: str, template: str, data: Mapping[str, object] = NONE, *, once: bool = False
) -> Event:
    """A new event.

    Args:
        kind: the last word of its type.
        data: what else there is to say, as JSON has it.
        once: it happens once in a sandbox's life, and telling it again changes nothing.
    """
    event_id = uuid.uuid5(uuid.NAMESPACE_OID, f"{sandbox} {kind}") if once else uuid.uuid4()
    return Event(0, str(event_id), owner, sandbox, template, LIFECYCLE + kind, json.dumps(dict(data)), time.time())


def record(db: sqlite3.Connection, events: Iterable[Event]) -> None:
    """Write events, each into the outbox of the webhooks that want it. The caller has begun a transaction."""
    for each in events:
        written = db.execute(
            "INSERT INTO events (id, owner, sandbox, template, type, data, created, number) VALUES"
            " (?1, ?2, ?3, ?4, ?5, ?6, ?7, (SELECT coalesce(max(number), 0) + 1 FROM events WHERE owner = ?2))"
            " ON CONFLICT (id) DO NOTHING",
            each[1:-1],
        )
        if not written.rowcount:
            continue
        db.execute(
            "DELETE FROM events WHERE sandbox = ?1 AND seq <="
            " (SELECT seq FROM events WHERE sandbox = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?2)",
            (each.sandbox, MAX_EVENTS),
        )
        for webhook in _wanting(db, each):
            waiting = "SELECT count(*) FROM deliveries WHERE webhook = ? AND ended IS NULL"
            if db.execute(waiting, (webhook,)).fetchone()[0] >= MAX_WAITING:
                db.execute("UPDATE webhooks SET lost = lost + 1 WHERE id = ?", (webhook,))
            else:
                db.execute(
                    "INSERT INTO deliveries (webhook, seq, sandbox) VALUES (?, ?, ?)",
                    (webhook, written.lastrowid, each.sandbox),
                )
                lane = "INSERT INTO lanes (webhook, sandbox, due) VALUES (?, ?, 0) ON CONFLICT DO NOTHING"
                db.execute(lane, (webhook, each.sandbox))


def _wanting(db: sqlite3.Connection, event: Event) -> list[str]:
    rows = db.execute("SELECT id, types FROM webhooks WHERE owner = ?", (event.owner,)).fetchall()
    return [webhook for webhook, types in rows if not types or event.type in types.split(" ")]


def forget(db: sqlite3.Connection, older_than: float) -> None:
    """Forget events from before a moment, and deliveries that have ended or are of no use any more."""
    now = time.time()
    db.execute("DELETE FROM deliveries WHERE ended < ?", (now - KEPT_DELIVERIES,))
    db.execute(
        "UPDATE deliveries SET ended = ?, error = 'given up: ' || coalesce(error, 'it was never tried')"
        " WHERE ended IS NULL AND seq IN (SELECT seq FROM events WHERE created < ?)",
        (now, now - KEPT_DELIVERIES),
    )
    db.execute("DELETE FROM events WHERE created < ?", (older_than,))
    db.execute("DELETE FROM deliveries WHERE seq NOT IN (SELECT seq FROM events)")
    db.execute(
        "DELETE FROM lanes WHERE NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.webhook = lanes.webhook"
        " AND d.sandbox = lanes.sandbox AND d.ended IS NULL)"
    )


# -- look-ups


def events(
    db: sqlite3.Connection, owner: str, *, sandbox: str = "", template: str = "", types: Iterable[str] = (),
    after: int = 0, limit: int, offset: int = 0, oldest_first: bool = False,
) -> list[Event]:  # fmt: skip
    """An owner's events, the newest first or the oldest.

    Args:
        sandbox, template: of these alone, unless they are empty.
        types: of these types alone, unless there are none.
        after: those with a greater `number`.
    """
    wanted = json.dumps([*types])
    direction = "ASC" if oldest_first else "DESC"
    query = (
        "SELECT * FROM events WHERE owner = ?1 AND number > ?2 AND (?3 = '' OR template = ?3)"  # noqa: S608  no values in it
        " AND (?4 = '[]' OR type IN (SELECT value FROM json_each(?4)))"
        f" {'AND sandbox = ?7' if sandbox else ''} ORDER BY number {direction} LIMIT ?5 OFFSET ?6"
    )
    values = (owner, after, template, wanted, limit, offset, *([sandbox] if sandbox else []))
    return [Event(*row) for row in db.execute(query, values)]


def last_number(db: sqlite3.Connection, owner: str) -> int:
    """The number of an owner's newest event."""
    return int(db.execute("SELECT coalesce(max(number), 0) FROM events WHERE owner = ?", (owner,)).fetchone()[0])


def webhooks(db: sqlite3.Connection, owner: str) -> list[Webhook]:
    """An owner's webhooks, the oldest first."""
    rows = db.execute("SELECT * FROM webhooks WHERE owner = ? ORDER BY created, id", (owner,))
    return [Webhook(*row) for row in rows]


def deliveries(db: sqlite3.Connection, webhook: str, limit: int) -> list[tuple[Delivery, Event]]:
    """What was delivered to a webhook, and what waits for it, the newest event first."""
    rows = db.execute(
        "SELECT d.*, e.* FROM deliveries d JOIN events e USING (seq) WHERE d.webhook = ? ORDER BY d.seq DESC LIMIT ?",
        (webhook, limit),
    )
    width = len(Delivery._fields)
    return [(Delivery(*row[:width]), Event(*row[width:])) for row in rows]


def due(
    db: sqlite3.Connection, now: float, limit: int, busy: Iterable[tuple[str, str]], full: Iterable[str]
) -> list[tuple[Delivery, Event, Webhook]]:
    """The first event of each lane whose time has come, `limit` of them at most.

    Args:
        busy: lanes whose event is on its way already.
        full: webhooks whose lanes must wait.
    """
    found: list[tuple[Delivery, Event, Webhook]] = []
    lanes = (
        "SELECT webhook, sandbox FROM lanes"
        " WHERE due <= ? AND webhook NOT IN (SELECT value FROM json_each(?)) ORDER BY due LIMIT ?"
    )
    width, second = len(Delivery._fields), len(Delivery._fields) + len(Event._fields)
    taken = set(busy)
    for lane in db.execute(lanes, (now, json.dumps([*full]), limit + len(taken))).fetchall():
        if lane in taken:
            continue
        row = db.execute(
            "SELECT d.*, e.*, w.* FROM deliveries d JOIN events e USING (seq) JOIN webhooks w ON w.id = d.webhook"
            " WHERE d.webhook = ? AND d.sandbox = ? AND d.ended IS NULL ORDER BY d.seq LIMIT 1",
            lane,
        ).fetchone()
        if row:
            found.append((Delivery(*row[:width]), Event(*row[width:second]), Webhook(*row[second:])))
    return found


def next_due(db: sqlite3.Connection, now: float) -> float | None:
    """When the next lane's time comes, of those whose time is not now; None if none waits."""
    found: float | None = db.execute("SELECT min(due) FROM lanes WHERE due > ?", (now,)).fetchone()[0]
    return found


# -- changes; the caller has begun a transaction


def add(db: sqlite3.Connection, webhook: Webhook) -> None:
    """Add a webhook. It gets the events that are written from now on.

    Raises:
        TooManyRequests: the owner has MAX_WEBHOOKS already.
    """
    query = "SELECT count(*) FROM webhooks WHERE owner = ?"
    if db.execute(query, (webhook.owner,)).fetchone()[0] >= MAX_WEBHOOKS:
        raise TooManyRequests(f"your key may have {MAX_WEBHOOKS} webhooks", hint="delete one")
    db.execute("INSERT INTO webhooks VALUES (?, ?, ?, ?, ?, ?, ?, ?)", webhook)


def remove(db: sqlite3.Connection, owner: str, webhook: str = "") -> bool:
    """Remove one of an owner's webhooks, or all of them, with all that waits for it. False if there was none."""
    found = [each.id for each in webhooks(db, owner) if webhook in ("", each.id)]
    for each in found:
        for query in (
            "DELETE FROM webhooks WHERE id = ?",
            "DELETE FROM deliveries WHERE webhook = ?",
            "DELETE FROM lanes WHERE webhook = ?",
        ):
            db.execute(query, (each,))
    return bool(found)


def tried(db: sqlite3.Connection, delivery: Delivery, status: int | None, error: str | None, now: float) -> None:
    """Take note of an attempt at this moment.

    Args:
        status: the answer's; None without one.
        error: what went wrong; None if the receiver has the event.
    """
    lane = (delivery.webhook, delivery.sandbox)
    db.execute(
        "UPDATE deliveries SET attempts = attempts + 1, status = ?, error = ?, ended = ? WHERE webhook = ? AND seq = ?",
        (status, error, None if error else now, delivery.webhook, delivery.seq),
    )
    if error:
        (failures,) = db.execute("SELECT failures FROM lanes WHERE webhook = ? AND sandbox = ?", lane).fetchone() or (
            0,
        )
        pause = min(BACKOFF[0] * 2 ** min(failures, 10), BACKOFF[1])
        query = "UPDATE lanes SET due = ?, failures = failures + 1 WHERE webhook = ? AND sandbox = ?"
        db.execute(query, (now + pause, *lane))
    else:
        _go_on(db, lane)


def _go_on(db: sqlite3.Connection, lane: tuple[str, str]) -> None:
    """Let a lane's next event have its turn, or close a lane without one."""
    waits = "SELECT 1 FROM deliveries WHERE webhook = ? AND sandbox = ? AND ended IS NULL LIMIT 1"
    if db.execute(waits, lane).fetchone():
        db.execute("UPDATE lanes SET due = 0, failures = 0 WHERE webhook = ? AND sandbox = ?", lane)
    else:
        db.execute("DELETE FROM lanes WHERE webhook = ? AND sandbox = ?", lane)
