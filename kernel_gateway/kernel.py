"""A sandbox's kernel as the gateway sees it: routes its messages to whoever asked, and runs cells for REST."""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator

from guest_agent import wire
from kernel_gateway.errors import CellvmError, GuestFailure
from kernel_gateway.jupyter import message
from kernel_gateway.jupyter.execution import CellError, Execution, StreamEvent
from kernel_gateway.link import Link

HIGH_WATER = 4 * 1024 * 1024
"""Bytes of messages waiting for a reader at which the guest is made to wait."""
INTERRUPT_GRACE = 0.75
"""Seconds a cell gets to end after an interrupt before its kernel is killed: the reply comes within a second."""


class Inbox:
    """The messages of one request that have not been read yet."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._messages: deque[list[memoryview] | CellError] = deque()
        self._size = 0
        self._arrived = asyncio.Event()

    def put(self, item: list[memoryview] | CellError) -> None:
        self._messages.append(item)
        if isinstance(item, list):
            self._size += sum(len(part) for part in item)
            if self._size > HIGH_WATER:
                self._link.pause_reading()
        self._arrived.set()

    async def get(self) -> list[memoryview] | CellError:
        while not self._messages:
            self._arrived.clear()
            await self._arrived.wait()
        item = self._messages.popleft()
        if isinstance(item, list):
            before, self._size = self._size, self._size - sum(len(part) for part in item)
            if before > HIGH_WATER >= self._size:
                self._link.resume_reading()
        return item

    def discard(self) -> None:
        self._messages.clear()
        if self._size > HIGH_WATER:
            self._link.resume_reading()
        self._size = 0


class Kernel:
    """One kernel. `execute` runs one cell at a time, in the order of the calls."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._session = uuid.uuid4().hex
        self._inboxes: dict[str, Inbox] = {}
        self._turn = asyncio.Lock()
        self._usable = asyncio.Event()
        self._usable.set()
        self._is_dead = False
        link.on_kernel_message = self._message_received
        link.on_event = self._event_received

    def _message_received(self, parts: list[memoryview]) -> None:
        inbox = self._inboxes.get(message.parent_id(parts))
        if inbox is not None:
            inbox.put(parts)

    def _event_received(self, event: wire.Body) -> None:
        if not isinstance(event, wire.KernelStatus):
            return
        self._is_dead = event.state == "dead"
        if event.state == "restarting":
            self._usable.clear()
        else:
            self._usable.set()
        if event.state in ("restarting", "dead"):
            self._lose_cells(event.reason[:500])

    async def execute(
        self, code: str, *, timeout: float | None = None, quiet: bool = False
    ) -> AsyncGenerator[StreamEvent, None]:
        """Run a cell and yield what comes of it, "end" last.

        At `timeout` seconds the cell is interrupted, so that variables survive; one that does not end then has its
        kernel replaced. Closing the iterator early interrupts the cell.

        Args:
            quiet: leave no trace in the user's history and counter.

        Raises:
            SandboxDied, GuestUnresponsive: the sandbox ended; whether the cell has run is unknown.
        """
        async with self._turn:
            await self._usable.wait()
            if self._is_dead:
                await self.restart()
            fields = {
                "code": code,
                "silent": False,
                "store_history": not quiet,
                "user_expressions": {},
                "allow_stdin": False,
                "stop_on_error": False,
            }
            msg_id, parts = message.request("shell", "execute_request", fields, self._session)
            inbox = self._inboxes[msg_id] = Inbox(self._link)
            lost = asyncio.ensure_future(asyncio.shield(self._link.closed))
            lost.add_done_callback(lambda _: inbox.put(CellError("SandboxDied", "", code="sandbox_died")))
            execution = Execution()
            try:
                await self._link.send_kernel_message(parts)
                async for event in self._follow(execution, inbox, timeout):
                    yield event
            finally:
                del self._inboxes[msg_id]
                inbox.discard()
                lost.cancel()
                if not execution.is_done and not self._link.closed.done():
                    await self._interrupt()

    async def _follow(
        self, execution: Execution, inbox: Inbox, timeout: float | None
    ) -> AsyncGenerator[StreamEvent, None]:
        deadline = None if timeout is None else time.monotonic() + timeout
        interrupted = False
        while not execution.is_done:
            try:
                async with asyncio.timeout(None if deadline is None else max(deadline - time.monotonic(), 0)):
                    item = await inbox.get()
            except TimeoutError:
                if interrupted:
                    execution.abandon()
                    self._replace()
                    yield StreamEvent("error", error=timed_out(timeout, state_kept=False))
                    yield StreamEvent("end", executionCount=execution.count)
                    return
                interrupted, deadline = True, time.monotonic() + INTERRUPT_GRACE
                await self._interrupt()
                continue
            if isinstance(item, CellError):
                if self._link.closed.done():
                    raise self._link.closed.result()
                execution.abandon()
                yield StreamEvent("error", error=item)
                yield StreamEvent("end", executionCount=execution.count)
                return
            for event in execution.receive(item):
                if interrupted and event.error is not None:
                    event = StreamEvent("error", error=timed_out(timeout, state_kept=True))
                yield event

    async def _interrupt(self) -> None:
        try:
            await self._link.call(wire.Interrupt(), wire.Done)
        except GuestFailure:
            pass  # the kernel is being replaced already: nothing is left to interrupt

    def _replace(self) -> None:
        """Kill a kernel that does not stop. The next cell waits for its successor; this one's reply does not."""
        self._usable.clear()
        self._replacing = asyncio.ensure_future(self._restart())

    async def restart(self) -> None:
        """Replace the kernel by a fresh one; returns when it is usable. Running cells end with an error."""
        self._lose_cells("the kernel was restarted on request")
        self._usable.clear()
        await self._restart()

    async def _restart(self) -> None:
        try:
            await self._link.call(wire.Restart(), wire.Done, timeout=60)
            self._is_dead = False
        except CellvmError:
            self._is_dead = True
            raise
        finally:
            self._usable.set()

    def _lose_cells(self, reason: str) -> None:
        lost = CellError("KernelRestarted", reason, code="kernel_restarted", stateKept=False)
        for inbox in self._inboxes.values():
            inbox.put(lost)


def timed_out(timeout: float | None, *, state_kept: bool) -> CellError:
    kept = "variables are kept" if state_kept else "it did not stop when interrupted, so its kernel was replaced"
    value = f"the cell was stopped after {timeout:g} s; {kept}"
    return CellError("ExecTimeout", value, code="exec_timeout", stateKept=state_kept)
