"""The life of a sandbox: one table, one function that reads it. Pure.

    CREATING ──started──▶ RUNNING ──kill, timeout, died, disk_full, server_stopped──▶ STOPPING ──gone──▶ STOPPED
        ├────kill, died, server_stopped──▶ STOPPING
        └────start_failed──▶ STOPPED

    RUNNING ──pause──▶ PAUSING ──saved──▶ PAUSED ──resume──▶ RESUMING ──resumed──▶ RUNNING
                          └─pause_failed─▶ RUNNING               └─resume_failed─▶ PAUSED

    RUNNING ──restore──▶ RESTORING ──restored, restore_failed──▶ RUNNING

A request may be refused, with a reason for the user. A fact may not, because it has happened already. STOPPING means
that its owner has seen the last of it and its machine is on its way out. STOPPED means that nothing is left of it, so
its place is free. PAUSED means that it is in files, and has no machine. RESTORING means that it goes back to a
checkpoint: its machine runs until the one of then is there.
"""

from enum import StrEnum

from kernel_gateway.errors import Conflict


class State(StrEnum):
    CREATING = "creating"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    RESTORING = "restoring"
    STOPPING = "stopping"
    STOPPED = "stopped"


ENDED = frozenset({State.STOPPING, State.STOPPED})
ASLEEP = frozenset({State.PAUSING, State.PAUSED, State.RESUMING})
"""States in which requests reach no machine."""


class Event(StrEnum):
    STARTED = "started"
    START_FAILED = "start_failed"
    KILL = "kill"
    EXPIRED = "timeout"
    DIED = "died"
    DISK_FULL = "disk_full"
    SERVER_STOPPED = "server_stopped"
    PAUSE = "pause"
    SAVED = "saved"
    PAUSE_FAILED = "pause_failed"
    RESUME = "resume"
    RESUMED = "resumed"
    RESUME_FAILED = "resume_failed"
    RESTORE = "restore"
    RESTORED = "restored"
    RESTORE_FAILED = "restore_failed"
    GONE = "gone"


REQUESTS = frozenset({Event.KILL, Event.PAUSE, Event.RESUME, Event.RESTORE})
"""Events that a user asks for. All others are facts."""

TRANSITIONS: dict[State, dict[Event, State]] = {
    State.CREATING: {
        Event.STARTED: State.RUNNING,
        Event.START_FAILED: State.STOPPED,
        Event.KILL: State.STOPPING,
        Event.DIED: State.STOPPING,
        Event.SERVER_STOPPED: State.STOPPING,
    },
    State.RUNNING: {
        Event.KILL: State.STOPPING,
        Event.EXPIRED: State.STOPPING,
        Event.DISK_FULL: State.STOPPING,
        Event.DIED: State.STOPPING,
        Event.SERVER_STOPPED: State.STOPPING,
        Event.PAUSE: State.PAUSING,
        Event.RESTORE: State.RESTORING,
    },
    State.PAUSING: {
        Event.SAVED: State.PAUSED,
        Event.PAUSE_FAILED: State.RUNNING,
        Event.KILL: State.STOPPING,
        Event.DIED: State.STOPPING,
        Event.SERVER_STOPPED: State.STOPPING,
    },
    State.PAUSED: {Event.RESUME: State.RESUMING, Event.KILL: State.STOPPING},
    State.RESUMING: {
        Event.RESUMED: State.RUNNING,
        Event.RESUME_FAILED: State.PAUSED,
        Event.KILL: State.STOPPING,
    },
    State.RESTORING: {
        Event.RESTORED: State.RUNNING,
        Event.RESTORE_FAILED: State.RUNNING,
        Event.KILL: State.STOPPING,
        Event.DIED: State.STOPPING,
        Event.SERVER_STOPPED: State.STOPPING,
    },
    State.STOPPING: {Event.START_FAILED: State.STOPPED, Event.GONE: State.STOPPED},
    State.STOPPED: {},
}


def decide(state: State, event: Event) -> State | None:
    """The state that follows, or None if there is nothing to do.

    Raises:
        Conflict: a request that this state refuses.
    """
    following = TRANSITIONS[state].get(event)
    if following is None and event in REQUESTS and state not in ENDED:
        raise Conflict(f"the sandbox is {state}: it can't be asked to {event} now")
    return following
