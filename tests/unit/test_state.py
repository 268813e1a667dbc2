"""The life of a kernel: the table, and properties of every walk through it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_gateway.kernel import state as module
from kernel_gateway.kernel.state import TRANSITIONS, WAITING, Event, State, decide

U, S, R, D, C = State.IDLE, State.STARTING, State.RESTARTING, State.DEAD, State.CLOSED
EXPECTED: dict[tuple[State, Event], State | None] = {
    (U, Event.RESTART): S,
    (U, Event.READY): None,
    (U, Event.ENDED): R,
    (U, Event.FAILED): D,
    (S, Event.RESTART): None,  # it is joined
    (S, Event.READY): U,
    (S, Event.ENDED): None,
    (S, Event.FAILED): D,
    (R, Event.RESTART): S,
    (R, Event.READY): U,
    (R, Event.ENDED): None,
    (R, Event.FAILED): D,
    (D, Event.RESTART): S,
    (D, Event.READY): U,
    (D, Event.ENDED): None,
    (D, Event.FAILED): None,
    **{(state, Event.RESTORED): U for state in (U, S, R, D)},
    **{(state, Event.CLOSED): C for state in (U, S, R, D)},
    **{(C, event): None for event in Event},
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_every_state_and_event(state: State, event: Event) -> None:
    """Each of the cells of the table, written out a second time."""
    assert decide(state, event) == EXPECTED[state, event]


def test_the_drawing_names_every_state_and_event() -> None:
    """The drawing in the module's docstring leaves no state and no event out."""
    drawn = module.__doc__ or ""
    assert set(re.findall("[A-Z]{4,}", drawn)) == {state.name for state in State}
    assert set(re.findall("──([a-z]+)──", drawn)) == set(Event)


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_any_sequence_of_events(events: list[Event]) -> None:
    """However events come, a kernel that waits can become usable again, and a closed one stays closed."""
    state = U
    for event in events:
        following = decide(state, event)
        assert state is not C or following is None
        state = following or state
    if state in WAITING:
        assert TRANSITIONS[state][Event.READY] is U
    assert (state is C) == (Event.CLOSED in events)
