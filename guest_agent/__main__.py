"""Start the agent: in a virtual machine as root on its virtio port, or as a plain process on an inherited socket."""

import argparse
import asyncio
import ctypes
import gc
import os
import pwd
import signal
import sys
from pathlib import Path

from guest_agent import health, limits, resume
from guest_agent.agent import Agent

VIRTIO_PORT = "/dev/virtio-ports/cellvm"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_MEMORY = 8 * 1024 * 1024
"""Bytes that were freed and are kept for the next pieces of files, because the system clears each page that it gives
anew."""


async def run(options: argparse.Namespace) -> None:
    serving: asyncio.Server | None = None
    if options.fd is None:
        user = pwd.getpwnam("user")
        runtime = Path("/run/cellvm")
        fd = os.open(VIRTIO_PORT, os.O_RDWR | os.O_CLOEXEC)
        path = "/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        limits.protect_agent()
        resume.act_as(user.pw_uid)
        agent = Agent(fd, user.pw_dir, runtime, user.pw_uid, path)
        serving = await health.serve()
    else:
        runtime = Path(options.runtime)
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        agent = Agent(options.fd, options.home, runtime, None, path, list(filter(None, options.warm.split(","))))
    gc.freeze()  # these objects live as long as the agent, so the collector skips them
    await agent.channel.closed
    if serving is not None:
        serving.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="guest_agent", description="The agent inside a CellVM sandbox.")
    parser.add_argument("--fd", type=int, help="an inherited socket to the gateway (driver `unisolated`)")
    parser.add_argument("--home", help="with --fd: the sandbox's working directory")
    parser.add_argument("--runtime", help="with --fd: a directory for the agent's own files")
    parser.add_argument("--warm", default="", help="with --fd: modules that Python programs find imported, with commas")
    options = parser.parse_args()
    # These two are ignored if a shell has started the agent, or its server, in the background. Every program would
    # inherit that, and Ctrl-C would have no effect.
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    allocator = ctypes.CDLL(None)
    allocator.mallopt(M_MMAP_THRESHOLD, KEPT_MEMORY // 2)
    allocator.mallopt(M_TRIM_THRESHOLD, KEPT_MEMORY)
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
