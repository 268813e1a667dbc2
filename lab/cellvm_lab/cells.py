"""Output for a page that was loaded again while cells ran.

Such a page has forgotten what it asked the kernel for, so JupyterLab drops what comes in answer. The connections of
this Jupyter server take note of each cell that a page has sent. The page's own part, `labextensions/`, asks here for
them and for their messages in the gateway's journal, and puts these into the cells with the same ids. A cell is
forgotten when a page has all of its output and has saved the notebook.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.gateway.gateway_client import GatewayClient, gateway_request
from jupyter_server.utils import url_path_join
from tornado import web

MOST = 1000
"""Cells that are remembered, of all kernels. Beyond it the oldest go."""
WAIT = 20
"""Seconds that a request for messages waits for the next one."""
LAST = {"execute_reply", "idle"}
"""What comes last for a cell, in either order."""


@dataclass(slots=True)
class Cell:
    """A notebook's cell that a page has sent to a kernel.

    `since` is a number in the journal that comes before the cell's messages. `missing` is what no page has of LAST.
    """

    kernel: str
    request: str
    session: str
    cell: str
    since: int
    missing: set[str] = field(default_factory=lambda: set(LAST))


class Cells:
    """The cells whose output may be in no saved notebook, by the ids of their requests, oldest first."""

    def __init__(self) -> None:
        self._all: dict[str, Cell] = {}

    def of(self, kernel: str) -> list[Cell]:
        return [each for each in self._all.values() if each.kernel == kernel]

    def sent(self, new: Cell) -> None:
        """A page has sent a cell. What is known of its last run is forgotten."""
        for old in self.of(new.kernel):
            if old.cell == new.cell:
                del self._all[old.request]
        self._all[new.request] = new
        if len(self._all) > MOST:
            del self._all[next(iter(self._all))]

    def arrived(self, message: dict[str, Any], session: str | None = None) -> None:
        """A page has a message: that of the session, or the one that asked for the journal."""
        cell = self._all.get(parent_of(message))
        if cell is not None and session in (None, cell.session):
            cell.missing.discard(kind_of(message))

    def saved(self, kernel: str) -> None:
        """A notebook with this kernel was saved, so cells whose output is complete are in it."""
        for each in self.of(kernel):
            if not each.missing:
                del self._all[each.request]


def parent_of(message: dict[str, Any]) -> str:
    return str(message.get("parent_header", {}).get("msg_id", ""))


def kind_of(message: dict[str, Any]) -> str:
    """The type of a message, or the state if it is a status."""
    return str(message.get("content", {}).get("execution_state") or message["header"].get("msg_type", ""))


def cells_of(settings: dict[str, Any]) -> Cells:
    """The cells of a Jupyter server, which are kept in its application's settings."""
    cells: Cells = settings.setdefault("cellvm_cells", Cells())
    return cells


class CellsHandler(APIHandler):
    """`/cellvm/kernels/{kernel}/cells`: which cells a page may lack."""

    auth_resource = "kernels"

    @web.authenticated
    @authorized
    async def get(self, kernel: str) -> None:
        """The cells, and the number in the journal after which their messages begin."""
        cells = cells_of(self.settings).of(kernel)
        since = min((each.since for each in cells), default=0)
        self.finish({"cells": [{"request": each.request, "cell": each.cell} for each in cells], "since": since})

    @web.authenticated
    @authorized
    async def delete(self, kernel: str) -> None:
        """A page has saved its notebook."""
        cells_of(self.settings).saved(kernel)
        self.set_status(204)
        self.finish()


class MessagesHandler(APIHandler):
    """`/cellvm/kernels/{kernel}/messages?since=N`: a page of the journal, with the messages for the cells."""

    auth_resource = "kernels"

    @web.authenticated
    @authorized
    async def get(self, kernel: str) -> None:
        client = GatewayClient.instance()
        place = url_path_join(client.url or "", client.kernels_endpoint, kernel, "journal")
        since = self.get_argument("since")
        if not since.isdigit():
            raise web.HTTPError(400, "`since` is the number of a message")
        answer = await gateway_request(f"{place}?since={since}&wait={WAIT}", method="GET")
        page = json.loads(answer.body)
        cells = cells_of(self.settings)
        requests = {each.request for each in cells.of(kernel)}
        page["messages"] = [each for each in page["messages"] if parent_of(each) in requests]
        self.finish(page)
        for each in page["messages"]:
            cells.arrived(each)


def routes(base_url: str) -> Iterable[tuple[str, type[APIHandler]]]:
    kernel = url_path_join(base_url, "cellvm", "kernels", r"(\w+-\w+-\w+-\w+-\w+)")
    return [(f"{kernel}/cells", CellsHandler), (f"{kernel}/messages", MessagesHandler)]
