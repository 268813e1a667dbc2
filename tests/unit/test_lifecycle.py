"""The life of a sandbox: the table, and properties of every walk through it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_gateway.errors import Conflict
from kernel_gateway.sandbox.lifecycle import REQUESTS, TRANSITIONS, Event, State, decide

C, R, E, S = State.CREATING, State.RUNNING, State.STOPPING, State.STOPPED
PING, PAUSED, RING, BACK = State.PAUSING, State.PAUSED, State.RESUMING, State.RESTORING
NEW = (
    Event.PAUSE, Event.SAVED, Event.PAUSE_FAILED, Event.RESUME, Event.RESUMED, Event.RESUME_FAILED,
    Event.RESTORE, Event.RESTORED, Event.RESTORE_FAILED,
)  # fmt: skip
REFUSED = {(R, Event.RESUME), (PAUSED, Event.PAUSE), (PAUSED, Event.RESTORE)} | {
    (state, event) for state in (C, PING, RING, BACK) for event in (Event.PAUSE, Event.RESUME, Event.RESTORE)
}
EXPECTED: dict[tuple[State, Event], State | None] = {
    **{(state, event): None for state in (C, R) for event in NEW},
    (R, Event.PAUSE): PING,
    (R, Event.RESTORE): BACK,
    **{(state, event): None for state in (PING, PAUSED, RING, BACK) for event in Event},
    (PING, Event.SAVED): PAUSED,
    (PING, Event.PAUSE_FAILED): R,
    (PING, Event.KILL): E,
    (PING, Event.DIED): E,
    (PING, Event.SERVER_STOPPED): E,
    (PAUSED, Event.RESUME): RING,
    (PAUSED, Event.KILL): E,
    (RING, Event.RESUMED): R,
    (RING, Event.RESUME_FAILED): PAUSED,
    (RING, Event.KILL): E,
    (BACK, Event.RESTORED): R,
    (BACK, Event.RESTORE_FAILED): R,
    **{(BACK, event): E for event in (Event.KILL, Event.DIED, Event.SERVER_STOPPED)},
    (C, Event.STARTED): R,
    (C, Event.START_FAILED): S,
    (C, Event.KILL): E,
    (C, Event.EXPIRED): None,
    (C, Event.DIED): E,
    (C, Event.SERVER_STOPPED): E,
    (C, Event.GONE): None,
    (C, Event.DISK_FULL): None,
    (R, Event.STARTED): None,
    (R, Event.START_FAILED): None,
    (R, Event.KILL): E,
    (R, Event.EXPIRED): E,
    (R, Event.DIED): E,
    (R, Event.SERVER_STOPPED): E,
    (R, Event.GONE): None,
    (R, Event.DISK_FULL): E,
    **{(E, event): None for event in Event},
    (E, Event.START_FAILED): S,
    (E, Event.GONE): S,
    **{(S, event): None for event in Event},
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_every_state_and_event(state: State, event: Event) -> None:
    """Each of the cells of the table, written out a second time."""
    if (state, event) in REFUSED:
        with pytest.raises(Conflict, match=state):
            decide(state, event)
        return
    assert decide(state, event) == EXPECTED[state, event]


def test_the_table_covers_every_state() -> None:
    """No state is missing from the table, and each can be reached."""
    assert set(TRANSITIONS) == set(State)
    assert {target for row in TRANSITIONS.values() for target in row.values()} | {C} == set(State)


@pytest.mark.parametrize("event", Event)
def test_stopped_is_final(event: Event) -> None:
    """A stopped sandbox stays stopped whatever happens, and another request is no error."""
    assert decide(S, event) is None


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", sorted(set(Event) - REQUESTS))
def test_facts_are_never_refused(state: State, event: Event) -> None:
    """A fact is taken in every state. `decide` returns and does not raise."""
    assert decide(state, event) in (None, *State)


def test_a_request_that_a_state_refuses_is_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request without a transition is refused with a reason that names the state."""
    monkeypatch.delitem(TRANSITIONS[C], Event.KILL)
    with pytest.raises(Conflict, match="creating"):
        decide(C, Event.KILL)
    assert decide(S, Event.KILL) is None


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_any_sequence_of_events(events: list[Event]) -> None:
    """However events come, the sandbox ends at most once, and then for good."""
    state, ends = C, 0
    for event in events:
        try:
            following = decide(state, event)
        except Conflict:
            assert event in REQUESTS
            continue
        assert state is not S or following is None
        ends += following is S
        state = following or state
    assert ends <= 1
    assert (state is S) == (ends == 1)
