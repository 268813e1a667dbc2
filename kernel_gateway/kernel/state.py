"""The life of a kernel: one table, one function that reads it. Pure.

A kernel that was started by the template or by a restore is IDLE when the server meets it. Whether it works is no state
of its life, because the kernel says so itself, message by message.

    IDLE ──restart──▶ STARTING ──ready──▶ IDLE        somebody asked for another kernel
    IDLE ──ended──▶ RESTARTING ──ready──▶ IDLE        it ended by itself, and the agent starts another
    STARTING, RESTARTING, IDLE ──failed──▶ DEAD       no kernel could be started
    RESTARTING, DEAD ──restart──▶ STARTING
    DEAD ──ready──▶ IDLE                              it came after all
    any but CLOSED ──restored──▶ IDLE                 the sandbox went back to a checkpoint, with the kernel of then
    any ──closed──▶ CLOSED                            the sandbox has ended

What the agent tells while a kernel is STARTING does not count, because it may be about the kernel before. The answer to
the request counts.
"""

from enum import StrEnum


class State(StrEnum):
    IDLE = "idle"
    STARTING = "starting"
    RESTARTING = "restarting"
    DEAD = "dead"
    CLOSED = "closed"


class Event(StrEnum):
    RESTART = "restart"
    READY = "ready"
    ENDED = "ended"
    FAILED = "failed"
    RESTORED = "restored"
    CLOSED = "closed"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.IDLE: {
        Event.RESTART: State.STARTING,
        Event.ENDED: State.RESTARTING,
        Event.FAILED: State.DEAD,
        Event.RESTORED: State.IDLE,
        Event.CLOSED: State.CLOSED,
    },
    State.STARTING: {
        Event.READY: State.IDLE,
        Event.FAILED: State.DEAD,
        Event.RESTORED: State.IDLE,
        Event.CLOSED: State.CLOSED,
    },
    State.RESTARTING: {
        Event.RESTART: State.STARTING,
        Event.READY: State.IDLE,
        Event.FAILED: State.DEAD,
        Event.RESTORED: State.IDLE,
        Event.CLOSED: State.CLOSED,
    },
    State.DEAD: {
        Event.RESTART: State.STARTING,
        Event.READY: State.IDLE,
        Event.RESTORED: State.IDLE,
        Event.CLOSED: State.CLOSED,
    },
    State.CLOSED: {},
}

WAITING = frozenset({State.STARTING, State.RESTARTING})
"""States in which work waits for the next kernel."""


def decide(state: State, event: Event) -> State | None:
    """The state that follows, or None if the event changes nothing."""
    return TRANSITIONS[state].get(event)
