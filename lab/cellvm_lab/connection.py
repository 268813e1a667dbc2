"""The way of a kernel's messages between the browser and the gateway."""

import asyncio
import contextlib
import json
import random
import struct
import time
from typing import Any
from urllib.parse import urlencode

from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.services.kernels.connection.base import BaseKernelWebsocketConnection
from jupyter_server.utils import url_path_join
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, websocket_connect

from cellvm_lab.cells import Cell, Cells, cells_of

LARGEST_MESSAGE = 256 * 1024 * 1024
"""Bytes of one kernel message, either way. Tornado's own limit, 10 MiB, is less than one large figure."""
PING_INTERVAL = 30
"""Seconds between pings to the gateway. A gateway that does not answer a ping for as long is given up."""
FINAL = {1000, 4410}
"""Close codes after which connecting again is no use: another connection took over; the sandbox has ended."""
SESSIONS = 1000
"""Browsers' sessions with a kernel that are remembered. A page that is loaded again is a new session.

A session that was forgotten can still come back, but the last tenth of a second of its output may come twice.
"""


class GatewayConnection(BaseKernelWebsocketConnection):
    """One browser's connection to one kernel. Frames pass as they are, in the protocol that the browser has chosen.

    When the gateway is lost, this connects again and asks for all messages after the last one the browser got. The
    browser's messages wait meanwhile. If the gateway stays away, or more than LARGEST_MESSAGE waits for it, the browser
    is disconnected, so that its user can see it.
    """

    async def prepare(self) -> None:
        """Allow large messages from the browser, too. This is called before the browser is answered."""
        self.websocket_handler.settings.setdefault("websocket_max_message_size", LARGEST_MESSAGE)

    async def connect(self) -> None:
        """Called when the browser's side is open."""
        self.websocket_handler.set_nodelay(True)
        self._protocol = self.websocket_handler.selected_subprotocol
        self._gateway: WebSocketClientConnection | None = None
        self._waiting: list[str | bytes] = []
        self._waiting_size = 0
        self._left = asyncio.Event()
        self._misses = 0
        self._relaying = asyncio.create_task(self._relay())

    def disconnect(self) -> None:  # type: ignore[override]  # it is not awaited
        """Called when the browser has left."""
        self._left.set()
        if self._gateway is not None:
            self._gateway.close()

    def handle_incoming_message(self, incoming_msg: str | bytes) -> None:
        """Called with each message of the browser."""
        self._note_cell(incoming_msg)
        if self._gateway is not None:
            with contextlib.suppress(WebSocketClosedError):  # the gateway was lost, and nobody has noticed yet
                self._gateway.write_message(incoming_msg, isinstance(incoming_msg, bytes))
                return
        self._waiting.append(incoming_msg)
        self._waiting_size += len(incoming_msg)
        if self._waiting_size > LARGEST_MESSAGE:
            self._waiting.clear()
            self._left.set()  # a later message must not reach the kernel without those that were dropped
            self.websocket_handler.close(1001, "too much waits for the gateway")

    def _note_cell(self, frame: str | bytes) -> None:
        try:
            message = read(frame, self._protocol)
            if message["header"]["msg_type"] != "execute_request":
                return
            request, cell = message["header"]["msg_id"], message["metadata"].get("cellId")
        except (LookupError, TypeError, AttributeError, ValueError, struct.error):
            return  # it is malformed, and the gateway will say so
        if cell:
            new = Cell(self.kernel_id, request, self.session_id, cell, self._last_messages.get(self._key, 0))
            self._cells.sent(new)

    async def _relay(self) -> None:
        client = GatewayClient.instance()
        try:
            while await self._until_lost() and self._misses < client.gateway_retry_max:
                pause = min(
                    client.gateway_retry_interval * 2 ** min(self._misses, 16), client.gateway_retry_interval_max
                )
                self._misses += 1
                self.log.warning("Kernel %s: connecting to the gateway again in %.0f s", self.kernel_id, pause)
                pause *= random.uniform(1, 1.2)  # noqa: S311  not all connect at the same time
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._left.wait(), pause)
                    return
        finally:
            self.websocket_handler.close(1001, "no way to the kernel")  # JupyterLab does not retry after this code

    async def _until_lost(self) -> bool:
        """Relay for as long as one connection lasts, and return whether another one may go better."""
        client = GatewayClient.instance()
        query = {"session_id": self.session_id}
        if self._key in self._last_messages:
            query["since"] = str(self._last_messages[self._key])
        url = url_path_join(client.ws_url or "", client.kernels_endpoint, self.kernel_id, "channels")
        try:
            gateway = await websocket_connect(
                HTTPRequest(f"{url}?{urlencode(query)}", **client.load_connection_args()),
                subprotocols=[self._protocol] if self._protocol else None,
                max_message_size=LARGEST_MESSAGE,
                ping_interval=PING_INTERVAL,
            )
        except HTTPClientError as error:
            self.log.warning("Kernel %s: the gateway says %s", self.kernel_id, error)
            return not (self._left.is_set() or 400 <= error.code < 500)
        except OSError as error:
            self.log.warning("Kernel %s: no gateway: %s", self.kernel_id, error)
            return not self._left.is_set()
        began = time.monotonic()
        try:
            assert gateway.protocol is not None
            gateway.protocol.set_nodelay(True)
            for message in self._waiting:
                gateway.write_message(message, isinstance(message, bytes))
            self._waiting.clear()
            self._waiting_size = 0
            self._gateway = gateway
            while not self._left.is_set() and (frame := await gateway.read_message()) is not None:
                await self.websocket_handler.write_message(frame, isinstance(frame, bytes))
                self._misses = 0
                told = read(frame, self._protocol)
                if number := told["metadata"].get("cellvm", {}).get("seq"):
                    self._remember(number)
                self._cells.arrived(told, self.session_id)
        except WebSocketClosedError:
            return False  # the browser has left
        finally:
            self._gateway = None
            gateway.close()
            if time.monotonic() - began > PING_INTERVAL:
                self._misses = 0
        return not (self._left.is_set() or gateway.close_code in FINAL)

    @property
    def _key(self) -> tuple[str, str]:
        return self.kernel_id, self.session_id

    @property
    def _cells(self) -> Cells:
        return cells_of(self.websocket_handler.settings)

    @property
    def _last_messages(self) -> dict[tuple[str, str], int]:
        """Number of the last message that each session got, the session that got one last at the end."""
        last: dict[tuple[str, str], int] = self.websocket_handler.settings.setdefault("cellvm_last_messages", {})
        return last

    def _remember(self, number: int) -> None:
        last = self._last_messages
        last.pop(self._key, None)
        last[self._key] = number
        if len(last) > SESSIONS:
            del last[next(iter(last))]


def read(frame: str | bytes, protocol: str | None) -> dict[str, Any]:
    """A message without its buffers. Of the newer layout only what is small is read: the content only of a status."""
    message: dict[str, Any]
    if isinstance(frame, str) or not protocol:
        if isinstance(frame, bytes):  # u32 count; u32 offsets of the JSON and of the buffers
            start, end = struct.unpack_from(">2I", frame, 4)
            frame = frame[start:end]
        message = json.loads(frame)
        return message
    # u64 count; u64 offsets of channel, header, parent_header, metadata, content, and of what follows
    _, header, parent, metadata, content, end = struct.unpack_from("<6Q", frame, 8)
    message = {
        "header": json.loads(frame[header:parent]),
        "parent_header": json.loads(frame[parent:metadata]),
        "metadata": json.loads(frame[metadata:content]),
    }
    if message["header"].get("msg_type") == "status":
        message["content"] = json.loads(frame[content:end])
    return message
