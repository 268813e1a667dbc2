"""Limits of the sandbox user's processes and threads, so that a fork bomb leaves the agent alone.

The kernel counts all processes of the user together, but each process has its own, inherited limit. So a process that
must start even then (a kernel after a restart, or a command that ends the others) is given a higher limit.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PROCESSES = 2048
FOR_KERNELS = PROCESSES + 64
FOR_RESCUE = PROCESSES + 128


def protect_agent() -> None:
    """Give the agent priority over the user's processes, and limit their number."""
    prefer_thread()
    resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))


def prefer_thread() -> None:
    """Give this thread of the agent priority over the user's processes. Its children and new threads do not inherit it.

    Every thread of the agent needs it, because one that waits for the processor may hold the interpreter's lock.
    """
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))


def let_go_first(pid: int) -> None:
    """Let a killed process end at once, not after thousands that were killed with it."""
    with suppress(ProcessLookupError):
        os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(1))


@contextmanager
def limited_to(processes: int) -> Iterator[None]:
    """Give programs that are started in the block this limit."""
    before = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, before)
