"""A small QMP client: commands in order, events awaited by name.

Source: https://www.qemu.org/docs/master/interop/qmp-spec.html
"""

import asyncio
import json
import socket
from collections import deque
from typing import Any

from kernel_gateway.drivers import DriverError

ANSWER_TIMEOUT = 20.0
"""Seconds that QEMU may take to answer a command."""
AWAITED = "MIGRATION"
"""The only event that anybody waits for. Of others a guest can cause any number: none is kept."""


class Qmp:
    """Controls one QEMU over a connected socket. Use `open`, then `execute`; `close` when done."""

    def __init__(self, sock: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._socket = sock
        self._reader = reader
        self._writer = writer
        self._answers: deque[asyncio.Future[Any]] = deque()
        self._events: list[Any] = []
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, sock: socket.socket) -> "Qmp":
        """Wait for QEMU's greeting and leave negotiation mode.

        Raises:
            DriverError: QEMU ended instead.
        """
        reader, writer = await asyncio.open_connection(sock=sock)
        if not await reader.readline():
            writer.close()
            raise DriverError("QEMU ended before it could be controlled")
        self = cls(sock, reader, writer)
        self._task = asyncio.create_task(self._receive())
        await self.execute("qmp_capabilities")
        return self

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its answer.

        Raises:
            DriverError: QEMU refused it, ended, or does not answer.
        """
        answer = self._next_answer()
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        return await self._answer(command, answer)

    async def pass_descriptor(self, name: str, fd: int) -> None:
        """Give QEMU an open file under a name (QEMU takes the file that came with the command)."""
        await self._writer.drain()
        answer = self._next_answer()
        command = json.dumps({"execute": "getfd", "arguments": {"fdname": name}}).encode() + b"\n"
        socket.send_fds(self._socket, [command], [fd])
        await self._answer("getfd", answer)

    def _next_answer(self) -> asyncio.Future[Any]:
        if self._task is None or self._task.done():
            raise DriverError("QEMU has ended")
        answer = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        return answer

    async def _answer(self, command: str, answer: asyncio.Future[Any]) -> Any:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                return await answer
        except TimeoutError:
            raise DriverError(f"QEMU did not answer {command} in {ANSWER_TIMEOUT:.0f} s") from None

    async def migrated(self) -> None:
        """Return when a migration that was begun has completed.

        Raises:
            DriverError: QEMU ended first.
        """
        while not any(data.get("status") == "completed" for data in self._events):
            if self._task is None or self._task.done():
                raise DriverError("QEMU ended before its state was moved")
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        """Let go of the socket, at once."""
        self._writer.transport.abort()
        if self._task is not None:
            self._task.cancel()

    async def _receive(self) -> None:
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                if "event" in message:
                    if message["event"] == AWAITED:
                        self._events.append(message.get("data", {}))
                        self._changed.set()
                elif self._answers:
                    answer = self._answers.popleft()
                    if answer.done():
                        continue
                    if "error" in message:
                        answer.set_exception(DriverError(f"QEMU: {message['error'].get('desc')}"))
                    else:
                        answer.set_result(message["return"])
        except ConnectionError:
            pass  # the same as its end: QEMU was killed
        finally:
            while self._answers:
                answer = self._answers.popleft()
                if not answer.done():
                    answer.set_exception(DriverError("QEMU has ended"))
            self._changed.set()
