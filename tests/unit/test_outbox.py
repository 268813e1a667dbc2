"""Events in the database, and their way out of it. Time is given, so hours take no time."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_gateway.errors import TooManyRequests
from kernel_gateway.sandbox import outbox
from kernel_gateway.sandbox.outbox import Event, Webhook, event


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    """An empty database."""
    with closing(opened()) as db:
        yield db


def opened() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    for statement in outbox.SCHEMA:
        db.execute(statement)
    return db


def webhook(name: str, owner: str = "me", types: str = "") -> Webhook:
    return Webhook(name, owner, name, "https://example.com/", types, "secret", 0.0)


def due(db: sqlite3.Connection, now: float = 0.0, full: tuple[str, ...] = ()) -> list[tuple[str, str, str]]:
    """The deliveries whose turn it is, as webhook, sandbox and last word of the type."""
    found = outbox.due(db, now, 100, (), full)
    return sorted((to.id, of.sandbox, of.type.rpartition(".")[2]) for _, of, to in found)


def record(db: sqlite3.Connection, *kinds: str, box: str = "a", owner: str = "me") -> None:
    outbox.record(db, [event(kind, owner, box, "base") for kind in kinds])


def test_who_gets_an_event(db: sqlite3.Connection) -> None:
    """All webhooks of the owner that want its type, and nobody else's."""
    outbox.add(db, webhook("all"))
    outbox.add(db, webhook("ends", types="sandbox.lifecycle.killed sandbox.lifecycle.paused"))
    outbox.add(db, webhook("theirs", owner="you"))
    record(db, "created")
    assert due(db) == [("all", "a", "created")]
    record(db, "killed", box="b")
    assert due(db) == [("all", "a", "created"), ("all", "b", "killed"), ("ends", "b", "killed")]


def test_once(db: sqlite3.Connection) -> None:
    """What happens once is told once, whoever writes it down again."""
    for _ in range(3):
        outbox.record(db, [event("killed", "me", "a", "base", {"reason": "kill"}, once=True)])
    assert len(outbox.events(db, "me", limit=10)) == 1


def test_a_lane_waits_for_its_first_event_and_no_other_lane_does(db: sqlite3.Connection) -> None:
    """The second event of a sandbox has its turn when the first has arrived. Pauses grow to a minute, not beyond."""
    outbox.add(db, webhook("w"))
    record(db, "created", "paused", "killed")
    record(db, "created", box="b")
    now = 0.0
    for pause in (1, 2, 4, 8, 16, 32, 60, 60):
        ((first, *_),) = [found for found in outbox.due(db, now, 100, (), ()) if found[1].sandbox == "a"]
        outbox.tried(db, first, 500, "the receiver answered 500", now)
        assert due(db, now) == [("w", "b", "created")]
        assert outbox.next_due(db, now) == now + pause
        now += pause
    for kind in ("created", "paused", "killed"):
        ((delivery, of, _),) = [found for found in outbox.due(db, now, 100, (), ()) if found[1].sandbox == "a"]
        assert of.type.endswith(kind)
        outbox.tried(db, delivery, 200, None, now)
    assert due(db, now) == [("w", "b", "created")]
    sent = outbox.deliveries(db, "w", 10)
    assert [(each.attempts, each.status, of.sandbox) for each, of in sent] == [
        (0, None, "b"),
        (1, 200, "a"),
        (1, 200, "a"),
        (9, 200, "a"),
    ]


def test_a_webhook_with_many_lanes_leaves_room(db: sqlite3.Connection) -> None:
    """Lanes of a webhook that has enough under way don't hide those of others."""
    outbox.add(db, webhook("down"))
    outbox.add(db, webhook("up", types="sandbox.lifecycle.killed"))
    for number in range(300):
        record(db, "created", box=f"box{number}")
    record(db, "killed", box="x")
    assert due(db, full=("down",)) == [("up", "x", "killed")]


def test_bounds(db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sandbox, of a webhook and of an owner not more is kept than said, and what is lost is counted."""
    monkeypatch.setattr(outbox, "MAX_EVENTS", 5)
    monkeypatch.setattr(outbox, "MAX_WAITING", 8)
    outbox.add(db, webhook("w"))
    record(db, *["updated"] * 7)
    assert len(outbox.events(db, "me", limit=100)) == 5
    record(db, *["updated"] * 5, box="b")
    (kept,) = outbox.webhooks(db, "me")
    assert kept.lost == 4
    for number in range(outbox.MAX_WEBHOOKS - 1):
        outbox.add(db, webhook(f"w{number}"))
    with pytest.raises(TooManyRequests, match="50 webhooks"):
        outbox.add(db, webhook("one more"))
    outbox.add(db, webhook("theirs", owner="you"))


def test_what_is_old_is_forgotten(db: sqlite3.Connection) -> None:
    """An event that can't be delivered is given up after three days and shown as such, and later forgotten."""
    outbox.add(db, webhook("w"))
    record(db, "created")
    db.execute("UPDATE events SET created = created - ?", (outbox.KEPT_DELIVERIES + 1,))
    outbox.forget(db, older_than=0.0)
    ((delivery, _),) = outbox.deliveries(db, "w", 10)
    assert delivery.ended is not None
    assert (delivery.error or "").startswith("given up")
    assert due(db) == []
    outbox.forget(db, older_than=2**40)
    assert outbox.events(db, "me", limit=10) == outbox.deliveries(db, "w", 10) == []
    assert db.execute("SELECT count(*) FROM lanes").fetchone() == (0,)


def test_removal(db: sqlite3.Connection) -> None:
    """A removed webhook leaves nothing behind. An owner can't remove another's."""
    outbox.add(db, webhook("w"))
    record(db, "created")
    assert not outbox.remove(db, "you", "w")
    assert outbox.remove(db, "me", "w")
    for table in ("webhooks", "lanes", "deliveries"):
        assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_look_ups(db: sqlite3.Connection) -> None:
    """Events are found by owner, sandbox, template, type and place, from either end. Numbers are each owner's own."""
    record(db, "created", "killed")
    record(db, "created", owner="you", box="c")
    outbox.record(db, [event("created", "me", "b", "full")])

    def found(**options: object) -> list[str]:
        events: list[Event] = outbox.events(db, "me", **{"limit": 10, **options})  # type: ignore[arg-type]
        return [f"{each.number}{each.sandbox}" for each in events]

    assert found() == ["3b", "2a", "1a"]
    assert found(oldest_first=True, limit=2) == ["1a", "2a"]
    assert found(offset=1) == ["2a", "1a"]
    assert found(sandbox="a", types=["sandbox.lifecycle.killed"]) == ["2a"]
    assert found(template="full") == ["3b"]
    assert found(after=1, oldest_first=True) == ["2a", "3b"]
    assert (outbox.last_number(db, "me"), outbox.last_number(db, "you"), outbox.last_number(db, "x")) == (3, 1, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30), st.data())
def test_order_whatever_fails(steps: list[tuple[str, bool]], data: st.DataObject) -> None:
    """Whatever happens, fails and comes again, each event arrives, and those of one sandbox arrive in their order."""
    with closing(opened()) as db:
        outbox.add(db, webhook("w"))
        arrived: list[tuple[str, int]] = []
        now = 0.0

        def deliver(may_fail: bool) -> bool:
            nonlocal now
            found = outbox.due(db, now, 100, (), ())
            if not found:
                now = outbox.next_due(db, now) or now
                return bool(outbox.next_due(db, -1.0))
            delivery, of, _ = data.draw(st.sampled_from(found))
            if may_fail and data.draw(st.booleans()):
                outbox.tried(db, delivery, None, "down", now)
            else:
                outbox.tried(db, delivery, 204, None, now)
                arrived.append((of.sandbox, of.seq))
            return True

        for box, delivers in steps:
            record(db, "updated", box=box)
            if delivers:
                deliver(may_fail=True)
        while deliver(may_fail=False):
            pass
        assert len(arrived) == len(steps)
        for box in "abc":
            mine = [seq for of, seq in arrived if of == box]
            assert mine == sorted(set(mine))
