"""The life of a sandbox: one table, one function that reads it. Pure.

    CREATING ──started──▶ RUNNING ──kill, timeout, died, server_stopped──▶ STOPPED
        └────start_failed, kill, died, server_stopped──▶ STOPPED

A request may be refused, with a reason for the user. A fact may not, because it has happened already. STOPPED is final.
Every way into it passes the same clean-up, in `sandbox.py`.
"""

from enum import StrEnum

from kernel_gateway.errors import Conflict


class State(StrEnum):
    CREATING = "creating"
    RUNNING = "running"
    STOPPED = "stopped"


class Event(StrEnum):
    STARTED = "started"
    START_FAILED = "start_failed"
    KILL = "kill"
    EXPIRED = "timeout"
    DIED = "died"
    SERVER_STOPPED = "server_stopped"


REQUESTS = frozenset({Event.KILL})
"""Events that a user asks for. All others are facts."""

TRANSITIONS: dict[State, dict[Event, State]] = {
    State.CREATING: {
        Event.STARTED: State.RUNNING,
        Event.START_FAILED: State.STOPPED,
        Event.KILL: State.STOPPED,
        Event.DIED: State.STOPPED,
        Event.SERVER_STOPPED: State.STOPPED,
    },
    State.RUNNING: {
        Event.KILL: State.STOPPED,
        Event.EXPIRED: State.STOPPED,
        Event.DIED: State.STOPPED,
        Event.SERVER_STOPPED: State.STOPPED,
    },
    State.STOPPED: {},
}


def decide(state: State, event: Event) -> State | None:
    """The state that follows, or None if there is nothing to do.

    Raises:
        Conflict: a request that this state refuses.
    """
    following = TRANSITIONS[state].get(event)
    if following is None and event in REQUESTS and state is not State.STOPPED:
        raise Conflict(f"the sandbox is {state}: it can't be asked to {event} now")
    return following
