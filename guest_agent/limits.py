"""How many processes and threads the sandbox user may have, so that a fork bomb leaves the agent alone.

The limit counts all of the user's together, but is each process's own, inherited. So those that must start when
there are as many as may be (a kernel after a restart; a command that is to end the others) are given a higher one.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PROCESSES = 2048
FOR_KERNELS = PROCESSES + 64
FOR_RESCUE = PROCESSES + 128


def protect_agent() -> None:
    """The agent comes before the user's processes, and these are limited. They do not inherit the agent's priority."""
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))


def let_go_first(pid: int) -> None:
    """Let a killed process end at once, and not in a row behind thousands that were killed with it."""
    with suppress(ProcessLookupError):
        os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(1))


@contextmanager
def limited_to(processes: int) -> Iterator[None]:
    """Programs that are started in the block have this limit."""
    before = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, before)
