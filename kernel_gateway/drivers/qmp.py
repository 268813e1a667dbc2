"""A small QMP client: commands in order, the course of a migration, and the events that end a machine.

Sources: https://www.qemu.org/docs/master/interop/qmp-spec.html and qemu-qmp-ref.html beside it.
"""

import asyncio
import json
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from kernel_gateway.drivers import DriverError

ANSWER_TIMEOUT = 20.0
"""Seconds that QEMU may take to answer a command."""
FATAL = {
    "STOP": "its processors were stopped, and not by us",
    "RESET": "it was reset",
    "GUEST_PANICKED": "its kernel panicked",
}
"""Events after which a machine is of no use, though QEMU lives on. KVM's internal error shows itself as a STOP."""
MAX_REASON = 200
"""Characters of a reason that has QEMU's words in it."""
FILE_URIS = (8, 2)
"""The first QEMU that can move a machine's state to and from a file; `fd:` to a file is deprecated there."""
MAX_LINE = 1024 * 1024
"""Bytes of a line. QEMU's own are some KiB; a longer one is from a QEMU that is no more itself."""
STATE_SET, DEVICES_SET = 7, 8
"""The numbers of the sets that QEMU keeps the files of a state in: a migration's, and that of devices alone."""


class Qmp:
    """Controls one QEMU over a connected socket. Use `open`, then `execute`; `close` when done.

    `version` is QEMU's own, as (major, minor).
    """

    def __init__(
        self,
        sock: socket.socket,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        version: tuple[int, int],
        died: Callable[[str], None],
    ) -> None:
        self.version = version
        self._socket = sock
        self._reader = reader
        self._writer = writer
        self._died = died
        self._answers: deque[asyncio.Future[Any]] = deque()
        self._may_stop = False
        self._migration = ""
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, sock: socket.socket, died: Callable[[str], None]) -> "Qmp":
        """Wait for QEMU's greeting and leave negotiation mode.

        Args:
            died: told, with the reason, when the machine is of no use any more though QEMU has not ended.

        Raises:
            DriverError: QEMU ended instead, or says something else.
        """
        reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_LINE)
        try:
            if not (greeting := await reader.readline()):
                raise DriverError("QEMU ended before it could be controlled")
            version = _decode(greeting)["QMP"]["version"]["qemu"]
            numbers = int(version["major"]), int(version["minor"])
        except (ValueError, LookupError, TypeError) as error:
            writer.close()
            raise DriverError(f"QEMU does not begin as QEMU does: {error}") from error
        except BaseException:
            writer.close()
            raise
        self = cls(sock, reader, writer, numbers, died)
        self._task = asyncio.create_task(self._receive())
        await self.execute("qmp_capabilities")
        return self

    async def stop(self) -> None:
        """Stop all virtual processors."""
        self._may_stop = True
        await self.execute("stop")

    async def cont(self) -> None:
        """Let them run on."""
        self._may_stop = False
        await self.execute("cont")

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its answer.

        Raises:
            DriverError: QEMU refused it, ended, or does not answer.
        """
        answer = self._next_answer()
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        return await self._answer(command, answer)

    async def pass_state(self, fd: int) -> str:
        """Give QEMU the open file of a machine's state; returns the URI under which migrations know it."""
        if self.version >= FILE_URIS:
            await self._pass_descriptor(fd, "add-fd", {"fdset-id": STATE_SET})
            return f"file:/dev/fdset/{STATE_SET}"
        await self._pass_descriptor(fd, "getfd", {"fdname": "state"})
        return "fd:state"

    async def save_devices(self, fd: int) -> None:
        """Write the state of a stopped machine's devices, without its RAM, to a file that is open for writing only."""
        await self._pass_descriptor(fd, "add-fd", {"fdset-id": DEVICES_SET})
        try:
            # Xen moves the RAM of its machines itself, and so do we. With `live` it would let go of the disks.
            await self.execute("xen-save-devices-state", filename=f"/dev/fdset/{DEVICES_SET}", live=False)
        finally:
            await self.execute("remove-fd", **{"fdset-id": DEVICES_SET})

    async def _pass_descriptor(self, fd: int, command: str, arguments: dict[str, Any]) -> None:
        """Run a command that takes the file which comes with it."""
        await self._writer.drain()
        answer = self._next_answer()
        line = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        socket.send_fds(self._socket, [line], [fd])
        await self._answer(command, answer)

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
            DriverError: it failed, or QEMU ended first.
        """
        while self._migration != "completed":
            if self._migration in ("failed", "cancelled"):
                why = (await self.execute("query-migrate")).get("error-desc", "QEMU does not say why")
                raise DriverError(f"the machine's state could not be moved: {why}")
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
                message = _decode(line)
                if "event" in message:
                    self._happened(message["event"], message.get("data", {}))
                elif self._answers:
                    self._answered(self._answers[0], message)
                    self._answers.popleft()
        except ConnectionError:
            pass  # the same as its end: QEMU was killed
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # Nobody could stop or continue this machine any more.
            self._died(f"its QEMU says what is no QMP: {error}"[:MAX_REASON])
        finally:
            while self._answers:
                answer = self._answers.popleft()
                if not answer.done():
                    answer.set_exception(DriverError("QEMU has ended"))
            self._changed.set()

    def _answered(self, answer: asyncio.Future[Any], message: dict[str, Any]) -> None:
        """Give the next answer to whoever waits for it, if somebody still does."""
        told = f"QEMU: {message['error'].get('desc')}" if "error" in message else message["return"]
        if answer.done():
            return
        if "error" in message:
            answer.set_exception(DriverError(told))
        else:
            answer.set_result(told)

    def _happened(self, event: str, data: dict[str, Any]) -> None:
        """Take note of an event. None is kept, because a guest can cause any number of them."""
        if event == "MIGRATION":
            self._migration = data.get("status", "")
            self._changed.set()
        elif event in FATAL and not (event == "STOP" and self._may_stop):
            self._died(FATAL[event])


def _decode(line: bytes) -> dict[str, Any]:
    """A message.

    Raises:
        ValueError: it is none.
    """
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("brackets in brackets") from error
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message
