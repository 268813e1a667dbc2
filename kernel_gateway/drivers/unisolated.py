"""Driver `unisolated`: the agent as a plain process of the server's user, for development and fast tests only.

There is NO boundary: code in a sandbox can do whatever the server can. The operator must ask for this driver by name.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from kernel_gateway.drivers import Capabilities


class UnisolatedVm:
    """An agent process in a session of its own, with a temporary home."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, directory: Path) -> None:
        self._process = process
        self._channel: socket.socket | None = channel
        self._directory = directory
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(self._pidfd, self._exited)

    @property
    def pid(self) -> int:
        return self._process.pid

    def open(self) -> socket.socket:
        channel, self._channel = self._channel, None
        assert channel is not None
        return channel

    async def wait(self) -> str:
        return await asyncio.shield(self._ended)

    async def kill(self) -> None:
        if not self._ended.done():
            self._process.send_signal(signal.SIGKILL)
            await self.wait()

    def _exited(self) -> None:
        code = self._process.wait()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._channel is not None:
            self._channel.close()
        deleting = self._loop.run_in_executor(None, partial(shutil.rmtree, self._directory, ignore_errors=True))
        deleting.add_done_callback(lambda _: self._ended.set_result(f"the agent ended with {code}"))


class Unisolated:
    """Starts agents. `argv` replaces the agent's command, which gets `--fd`, `--home` and `--runtime`.

    `directory` is absolute, because agents change their own, and has at most LONGEST_PATH bytes. `warm` are the modules
    of each template.
    """

    LONGEST_PATH = 107 - len("/agent-12345678/kernel/9999/ipc-1")

    capabilities = Capabilities(isolation="none", accelerator="native", time_scale=1.0, network="host")

    def __init__(
        self, directory: Path, argv: list[str] | None = None, warm: Mapping[str, list[str]] | None = None
    ) -> None:
        self._directory = directory
        self._warm = warm or {}
        self._argv = argv or [sys.executable, "-m", "guest_agent"]

    async def start(self, source: str) -> UnisolatedVm:
        """A new agent. Of the source it knows the modules that Python programs find imported."""
        directory = Path(tempfile.mkdtemp(prefix="agent-", dir=self._directory))
        home = directory / "home"
        home.mkdir()
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(
                [
                    "setpriv", "--pdeathsig=KILL", "--", *self._argv, "--fd", str(theirs.fileno()), "--home", str(home),
                    "--runtime", str(directory), "--warm", ",".join(self._warm.get(source, ())),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # `cellvm run` prints there what the script prints
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)},
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            ours.close()
            shutil.rmtree(directory)
            raise
        finally:
            theirs.close()
        return UnisolatedVm(process, ours, directory)
