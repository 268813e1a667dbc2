"""Jupyter's WebSocket, `/api/kernels/{id}/channels`: kernel messages to and from clients, in either layout."""

from collections.abc import Awaitable

import msgspec

from kernel_gateway.api.socket import MALFORMED, NOT_ALLOWED, Socket
from kernel_gateway.errors import CellvmError
from kernel_gateway.kernel import layout, message
from kernel_gateway.kernel.journal import Gap, Record
from kernel_gateway.kernel.message import CHANNEL, METADATA
from kernel_gateway.sandbox.access import Access
from kernel_gateway.sandbox.sandbox import Sandbox

STOCK_LIMIT = 10 * 1024 * 1024
"""Bytes of a message over which jupyter_server's own client closes the connection."""


def left_out(record: Record) -> list[bytes]:
    """A notice in place of a message that was too large for a client."""
    notice = (
        f"[{record.size} bytes are left out here, because the connection was lost while they were sent; "
        "a client that takes large messages, or GET /api/kernels/{id}/journal, has them]"
    )
    channel, header, parent, metadata, *_ = record.parts
    if channel == b"iopub":
        return message.new("iopub", "stream", {"name": "stderr", "text": notice + "\n"}, session="", parent=parent)
    error = {"status": "error", "ename": "MessageTooLarge", "evalue": notice, "traceback": []}
    return [channel, header, parent, metadata, msgspec.json.encode(error)]


class Channels(Socket):
    """All channels of one kernel, for one client session."""

    def find(self, mine: Access, name: str) -> Sandbox:
        return mine.of_kernel(name)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        self.is_binary = layout.V1 in subprotocols
        return layout.V1 if self.is_binary else None

    def open(self, *args: str, **kwargs: str) -> None:
        super().open(*args, **kwargs)
        if self.kernel.state not in ("idle", "busy"):
            # JupyterLab would connect again and again if it read `restarting`.
            state = "dead" if self.kernel.state == "dead" else "starting"
            told = message.new("iopub", "status", {"execution_state": state}, session="")
            self.write_message(self._frame(told), binary=self.is_binary)

    async def frames(self, records: list[Record | Gap]) -> list[str | bytes]:
        """The messages for everybody or for this session, and the whole past if the client asked for it by `since`."""
        found = []
        for record in records:
            is_past = record.seq <= self.present
            if isinstance(record, Gap):
                found.append(self._frame(self._notice(record)))
            elif is_past and record.kind == "status" and not record.parent:
                continue  # a past state of the kernel; `open` has told the present one
            elif (
                record.session in (None, self.session)
                or record.parent in self.inherited
                or (is_past and self.is_told_all)
            ):
                # A client that closes the connection over a large message gets a notice the second time, because it
                # would close over the message again.
                is_again = record.seq <= self.sent_before and not self.is_told_all
                parts = left_out(record) if is_again and record.size > STOCK_LIMIT else record.parts.copy()
                parts[METADATA] = message.numbered(parts[METADATA], record.seq)
                found.append(self._frame(parts))
        return found

    def _frame(self, parts: list[bytes]) -> str | bytes:
        return layout.to_v1(parts) if self.is_binary else layout.to_legacy(parts)

    def _notice(self, gap: Gap) -> list[bytes]:
        text = f"\n[{gap.messages} messages of output are missing here: they came faster than they were read]\n"
        return message.new(
            "iopub",
            "stream",
            {"name": "stderr", "text": text},
            session="",
            parent=gap.parent,
            metadata={"cellvm": {"seq": gap.seq, "missing": gap.messages}},
        )

    def on_message(self, frame: str | bytes) -> Awaitable[None] | None:
        """Pass a client's message on. The next one is read when this one has been sent."""
        if self.is_closing:
            return None
        try:
            parts = layout.from_v1(frame) if self.is_binary and isinstance(frame, bytes) else layout.from_legacy(frame)
        except layout.LayoutError as error:
            self.end(MALFORMED, str(error))
            return None
        if parts[CHANNEL] not in message.SENT_BY_CLIENT:
            self.close(NOT_ALLOWED, "a client may send on the channels shell, control and stdin")
            return None
        sending = self.kernel.send(parts, self.session)
        return None if sending is None else self._until_sent(sending)

    async def _until_sent(self, sending: Awaitable[None]) -> None:
        try:
            await sending
        except CellvmError:
            pass  # the machine is gone, and the journal says how the request has ended
