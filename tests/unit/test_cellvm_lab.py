"""What runs in a JupyterLab user's own Jupyter server, between a browser and a gateway that are both played here."""

import asyncio
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from jupyter_server.auth import AllowAllAuthorizer, IdentityProvider
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.gateway.managers import GatewayMappingKernelManager
from jupyter_server.serverapp import ServerApp
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from jupyter_server.services.kernels.connection import base as wire
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado import web
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.websocket import WebSocketHandler
from traitlets.config import Config, LoggingConfigurable

import cellvm_lab
import kernel_gateway
from cellvm_lab import GatewayConnection, GatewayKernels, SandboxContents, cells, connection
from cellvm_lab.cells import Cell, cells_of, routes

ROOT = Path(__file__).parents[2]
SOMEWHERE = "http://127.0.0.1:1"
KERNEL = "00000000-0000-0000-0000-000000000001"
V1 = "v1.kernel.websocket.jupyter.org"
STARTED = """
import sys
from jupyter_server.serverapp import ServerApp
app = ServerApp()
app.initialize(argv=sys.argv[1:], new_httpserver=False)
print(*(getattr(app, name).__name__ for name in (
    "kernel_websocket_connection_class", "kernel_manager_class", "contents_manager_class")))
"""


class Gateway:
    """A gateway with kernels, whose frames are the tests'."""

    def __init__(self) -> None:
        self.kernels: dict[str, dict[str, Any]] = {}
        self.asked: list[str | None] = []
        """`since` of each connection to a kernel."""
        self.heard: list[str | bytes] = []
        self.is_open = asyncio.Event()
        """Connections are answered."""
        self.is_open.set()
        self.frames = [frame(1)]
        """What each connection is sent at its start."""
        self.refuses = False
        self.journal: list[dict[str, Any]] = []

    def start_kernel(self) -> str:
        """A kernel that somebody has started."""
        kernel_id = f"kernel-{len(self.kernels)}"
        self.kernels[kernel_id] = {
            "id": kernel_id,
            "name": "python3",
            "last_activity": "2026-01-01T00:00:00.000000Z",
            "execution_state": "idle",
            "connections": 0,
        }
        return kernel_id


class Kernels(web.RequestHandler):
    def initialize(self, gateway: Gateway) -> None:
        self.kernels = gateway.kernels
        self.start_kernel = gateway.start_kernel

    def get(self, kernel_id: str | None = None) -> None:
        if kernel_id is None:
            self.finish(json.dumps(list(self.kernels.values())))
        elif kernel_id in self.kernels:
            self.finish(self.kernels[kernel_id])
        else:
            self.send_error(404)

    def post(self) -> None:
        self.set_status(201)
        self.finish(self.kernels[self.start_kernel()])

    def delete(self, kernel_id: str) -> None:
        del self.kernels[kernel_id]
        self.set_status(204)


class Channels(WebSocketHandler):
    def initialize(self, gateway: Gateway) -> None:
        self.gateway = gateway

    async def prepare(self) -> None:
        self.gateway.asked.append(self.get_argument("since", None))
        await self.gateway.is_open.wait()
        if self.gateway.refuses:
            raise web.HTTPError(503)

    def open(self) -> None:
        for each in self.gateway.frames:
            self.write_message(each, isinstance(each, bytes))

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return subprotocols[0] if subprotocols else None

    def on_message(self, message: str | bytes) -> None:
        self.gateway.heard.append(message)


class Journal(web.RequestHandler):
    def initialize(self, gateway: Gateway) -> None:
        self.gateway = gateway

    def get(self) -> None:
        self.gateway.asked.append(self.get_argument("since"))
        self.finish({"messages": self.gateway.journal, "next": 9, "last": 9, "missing": 0})


class Kernel(LoggingConfigurable):
    kernel_id = KERNEL


class Browsers(WebSocketHandler):
    """The Jupyter server's side of a browser's connection."""

    def initialize(self, relaying: list[asyncio.Task[None]]) -> None:
        self.relaying = relaying

    async def open(self) -> None:
        self.connection = GatewayConnection(parent=Kernel(), websocket_handler=self)
        self.connection.session.session = self.get_argument("session_id")
        await self.connection.connect()
        self.relaying.append(self.connection._relaying)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return subprotocols[0] if subprotocols else None

    def on_message(self, message: str | bytes) -> None:
        self.connection.handle_incoming_message(message)

    def on_close(self) -> None:
        self.connection.disconnect()


def frame(number: int) -> str:
    """A message of the gateway in the older layout, with that number in the journal."""
    return json.dumps({"metadata": {"cellvm": {"seq": number}}})


async def until(done: Callable[[], bool]) -> None:
    """Wait until that is so. pytest's limit ends a wait in vain."""
    while not done():
        await asyncio.sleep(0.005)


@pytest.fixture
def client() -> Iterator[Callable[..., GatewayClient]]:
    """Makes the process's only GatewayClient, for that long."""
    GatewayClient.clear_instance()
    yield GatewayClient.instance
    GatewayClient.clear_instance()


@pytest.fixture
async def listen() -> AsyncIterator[Callable[[list[Any]], str]]:
    """Starts a server with those routes and returns its address without a scheme."""
    servers: list[HTTPServer] = []

    def start(routes: list[Any]) -> str:
        socket, port = bind_unused_port()
        server = HTTPServer(web.Application(routes))
        server.add_socket(socket)
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop()
        await server.close_all_connections()


@pytest.fixture
async def gateway(listen: Callable[[list[Any]], str], client: Callable[..., GatewayClient]) -> Gateway:
    """A gateway that this process uses, and asks again without a pause.

    The fixture is a coroutine, because a server that is started outside of the tests' loop may get another loop.
    """
    gateway = Gateway()
    routes = [
        (r"/api/kernels/[^/]+/channels", Channels),
        (r"/api/kernels/[^/]+/journal", Journal),
        (r"/api/kernels", Kernels),
        (r"/api/kernels/([^/]+)", Kernels),
    ]
    address = listen([(path, handler, {"gateway": gateway}) for path, handler in routes])
    client(url=f"http://{address}", gateway_retry_interval=0.0)
    return gateway


@pytest.fixture
def relaying() -> list[asyncio.Task[None]]:
    """The task of each connection that a browser has made."""
    return []


@pytest.fixture
async def browser(
    gateway: Gateway, listen: Callable[[list[Any]], str], relaying: list[asyncio.Task[None]]
) -> Callable[[str], websockets.connect]:
    """Connects a session with the kernel, through a GatewayConnection."""
    address = listen([(r"/", Browsers, {"relaying": relaying})])
    return lambda session: websockets.connect(f"ws://{address}/?session_id={session}")


def test_version_and_license_are_the_servers() -> None:
    """Both distributions come from one release."""
    projects = [tomllib.loads((ROOT / each / "pyproject.toml").read_text())["project"] for each in (".", "lab")]
    versions = {project["version"] for project in projects}
    assert {kernel_gateway.__version__, cellvm_lab.__version__} == versions
    assert len({project["license"] for project in projects}) == 1
    assert (ROOT / "lab" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    for page in Path(cellvm_lab.PAGES).glob("*/package.json"):
        described = json.loads(page.read_text())
        assert {described["version"]} == versions
        assert (page.parent / described["jupyterlab"]["_build"]["load"]).is_file()


def test_one_flag_sets_the_classes(tmp_path: Path) -> None:
    """The documented flag, with a gateway, makes a Jupyter server use all three."""
    documented = (ROOT / "docs" / "jupyterlab.md").read_text()
    flag = re.search(r"--ServerApp\.jpserver_extensions=\S+", documented)
    assert flag is not None
    homes = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    answer = subprocess.run(
        [sys.executable, "-c", STARTED, flag[0], f"--gateway-url={SOMEWHERE}", "--allow-root"],
        env={**os.environ, **homes, "PYTHONPATH": str(ROOT / "lab")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout.split() == ["GatewayConnection", "GatewayKernels", "SandboxContents"], answer.stderr


def linked(config: dict[str, Any]) -> ServerApp:
    """A Jupyter server that has got to its extensions."""
    app = ServerApp(config=Config(config))
    cellvm_lab._link_jupyter_server_extension(app)
    app.gateway_config = GatewayClient.instance(parent=app)
    return app


def test_without_a_gateway_nothing_changes(client: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JupyterLab that is started without a gateway keeps its own classes."""
    monkeypatch.delenv("JUPYTER_GATEWAY_URL", raising=False)
    app = linked({})
    assert app.kernel_manager_class is AsyncMappingKernelManager
    assert app.contents_manager_class is AsyncLargeFileManager
    assert app.config.LabServerApp == {}


@pytest.mark.parametrize("own", [[], ["/mine"]])
def test_pages_get_their_part(client: object, own: list[str]) -> None:
    """JupyterLab and Notebook are told of the folder, besides the folders that the user has named."""
    config: dict[str, Any] = {"GatewayClient": {"url": SOMEWHERE}}
    app = linked(config | ({"LabServerApp": {"extra_labextensions_path": own.copy()}} if own else {}))
    given = app.config.LabServerApp.extra_labextensions_path
    assert (given if own else given.get_value([])) == [*own, cellvm_lab.PAGES]


def test_a_configured_class_stays(client: object) -> None:
    """Where the user's configuration names a class, the extension does not change it."""
    own = "jupyter_server.gateway.managers.GatewayMappingKernelManager"
    app = linked({"GatewayClient": {"url": SOMEWHERE}, "ServerApp": {"kernel_manager_class": own}})
    assert app.kernel_manager_class is GatewayMappingKernelManager
    assert app.kernel_websocket_connection_class is GatewayConnection
    assert app.contents_manager_class is SandboxContents


async def test_as_many_sessions_are_remembered(
    gateway: Gateway, browser: Callable[[str], websockets.connect], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that comes back asks for what it missed; the session that got nothing for longest is forgotten."""
    monkeypatch.setattr(connection, "SESSIONS", 2)
    for number, session in enumerate(["first", "second", "first", "third", "second", "third"], 1):
        gateway.frames = [frame(number)]
        async with browser(session) as page:
            assert await page.recv() == frame(number)
    assert gateway.asked == [None, None, "1", None, None, "4"]


async def test_what_waits_is_bounded(
    gateway: Gateway,
    browser: Callable[[str], websockets.connect],
    relaying: list[asyncio.Task[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A browser that says too much while the gateway is away is disconnected, and nothing of it is run later."""
    monkeypatch.setattr(connection, "LARGEST_MESSAGE", 1000)
    gateway.is_open.clear()
    async with browser("session") as page:
        await page.send(b"x" * 1000)
        await page.send(b"y")
        await page.send(b"too late")
        await page.wait_closed()
        assert page.close_code == 1001
    gateway.is_open.set()
    await relaying[0]
    assert gateway.heard == []


async def test_what_waits_is_sent(gateway: Gateway, browser: Callable[[str], websockets.connect]) -> None:
    """As much as may wait does wait, and counts no longer once it is sent."""
    gateway.is_open.clear()
    async with browser("session") as page:
        await page.send(b"before")
        await until(lambda: len(gateway.asked) == 1)
        gateway.is_open.set()
        await page.recv()
        await page.send(b"after")
        await until(lambda: len(gateway.heard) == 2)
    assert gateway.heard == [b"before", b"after"]


async def test_nobody_connects_for_a_browser_that_has_left(
    gateway: Gateway,
    browser: Callable[[str], websockets.connect],
    relaying: list[asyncio.Task[None]],
) -> None:
    """Such a connection would take the session over from the browser that has come back."""
    gateway.refuses = True
    client = GatewayClient.instance()
    client.gateway_retry_interval = client.gateway_retry_interval_max = 3600.0
    async with browser("session"):
        await until(lambda: len(gateway.asked) == 1)
    await relaying[0]
    assert gateway.asked == [None]


async def test_kernels_that_have_ended_are_forgotten(gateway: Gateway) -> None:
    """Whoever started a kernel and whoever ended it, nothing is kept of it."""
    kernels = GatewayKernels()
    own = [await kernels.start_kernel() for _ in range(3)]
    others = gateway.start_kernel()
    assert {each["id"] for each in await kernels.list_kernels()} == {*own, others}
    await kernels.shutdown_kernel(own[0])
    assert kernels._own == set(own[1:])
    assert set(kernels._kernel_connections) == {*own[1:], others}
    del gateway.kernels[own[1]], gateway.kernels[others]
    assert [each["id"] for each in await kernels.list_kernels()] == [own[2]]
    assert kernels._own == set(kernels._kernel_connections) == set(kernels._kernels) == {own[2]}
    await kernels.shutdown_all()
    assert gateway.kernels == kernels._kernels == {}


# -- pages that are loaded again


def sent(cell: str | None, request: str, layout: str | None) -> str | bytes:
    """A page's request to run a cell, in either layout. None is code that belongs to no cell."""
    header = {"msg_id": request, "msg_type": "execute_request", "session": "s"}
    metadata = {"cellId": cell} if cell else {}
    parts = {"header": header, "parent_header": {}, "metadata": metadata, "content": {"code": "1"}}
    return packed(parts, "shell", layout)


def came(kind: str, request: str, layout: str | None = None) -> str | bytes:
    """A kernel's message for a request: a type, or the state of a status."""
    is_state = kind in ("busy", "idle")
    header = {"msg_id": "x", "msg_type": "status" if is_state else kind}
    content = {"execution_state": kind} if is_state else {}
    parts = {"header": header, "parent_header": {"msg_id": request}, "metadata": {"cellvm": {"seq": 7}}}
    return packed(parts | {"content": content}, "iopub", layout)


def packed(parts: dict[str, Any], channel: str, layout: str | None) -> str | bytes:
    if layout:
        packed: bytes = wire.serialize_msg_to_ws_v1([json.dumps(each).encode() for each in parts.values()], channel)
        return b"".join(packed) if isinstance(packed, list) else packed
    return json.dumps({**parts, "channel": channel})


class JupyterServer:
    """The routes that pages ask, and the cells behind them."""

    def __init__(self, url: str, settings: dict[str, Any]) -> None:
        self.url = url
        self.cells = cells_of(settings)

    async def ask(self, path: str, method: str = "GET", token: str = "tok") -> tuple[int, Any]:
        url = f"{self.url}/cellvm/kernels/{KERNEL}/{path}"
        headers = {"Authorization": f"token {token}"} if token else {}
        answer = await AsyncHTTPClient().fetch(url, method=method, headers=headers, raise_error=False)
        return answer.code, json.loads(answer.body) if answer.body and answer.code == 200 else None

    async def listed(self) -> list[str]:
        _, told = await self.ask("cells")
        return [each["cell"] for each in told["cells"]]


@pytest.fixture
async def jupyter(gateway: Gateway, relaying: list[asyncio.Task[None]]) -> AsyncIterator[JupyterServer]:
    """A Jupyter server with pages at `/` and our routes, that uses the gateway."""
    settings = {
        "identity_provider": IdentityProvider(token="tok"),
        "authorizer": AllowAllAuthorizer(),
        "config_manager": None,
        "base_url": "/",
        "local_hostnames": ["127.0.0.1"],
        "cookie_secret": b"x",
    }
    socket, port = bind_unused_port()
    application = web.Application([(r"/", Browsers, {"relaying": relaying}), *routes("/")], **settings)
    server = HTTPServer(application)
    server.add_socket(socket)
    yield JupyterServer(f"http://127.0.0.1:{port}", application.settings)
    server.stop()
    await server.close_all_connections()


def page_of(jupyter: JupyterServer, session: str = "s", layout: str | None = None) -> websockets.connect:
    url = f"{jupyter.url.replace('http', 'ws')}/?session_id={session}"
    return websockets.connect(url, subprotocols=[websockets.Subprotocol(layout)] if layout else None)


@pytest.mark.parametrize("layout", [None, V1])
async def test_cells_that_a_page_may_lack(gateway: Gateway, jupyter: JupyterServer, layout: str | None) -> None:
    """A cell is known from its request until a page has all of its output and has saved it."""
    gateway.frames = [came("status", "", layout)]
    async with page_of(jupyter, layout=layout) as page:
        await page.recv()
        for cell, request in (("a", "1"), ("b", "2"), (None, "3")):
            await page.send(sent(cell, request, layout))
        await until(lambda: len(gateway.heard) == 3)
        assert await jupyter.ask("cells") == (
            200, {"cells": [{"request": "1", "cell": "a"}, {"request": "2", "cell": "b"}], "since": 7}
        )  # fmt: skip
        assert (await jupyter.ask("cells", "DELETE"))[0] == 204
        assert await jupyter.listed() == ["a", "b"]  # they have not ended
    gateway.frames = [came("busy", "1", layout), came("execute_reply", "1", layout), came("idle", "2", layout)]
    async with page_of(jupyter, layout=layout) as page:
        for _ in gateway.frames:
            await page.recv()
        await jupyter.ask("cells", "DELETE")
        assert await jupyter.listed() == ["a", "b"]  # the reply or the end is missing
    gateway.frames = [came("idle", "1", layout)]
    async with page_of(jupyter, layout=layout) as page:
        await page.recv()
        await until(lambda: not jupyter.cells._all["1"].missing)
        assert await jupyter.listed() == ["a", "b"]  # it is not saved
        await jupyter.ask("cells", "DELETE")
        assert await jupyter.listed() == ["b"]


async def test_another_page_has_other_cells(gateway: Gateway, jupyter: JupyterServer) -> None:
    """What another session gets is not what the page has that sent the cell."""
    gateway.frames = []
    async with page_of(jupyter) as page:
        await page.send(sent("a", "1", None))
        await until(lambda: len(gateway.heard) == 1)
    gateway.frames = [came("execute_reply", "1"), came("idle", "1")]
    async with page_of(jupyter, "other") as page:
        for _ in gateway.frames:
            await page.recv()
        await jupyter.ask("cells", "DELETE")
        assert await jupyter.listed() == ["a"]


async def test_a_cell_that_runs_again(jupyter: JupyterServer) -> None:
    """Of a cell only the last run counts."""
    for request in "12":
        jupyter.cells.sent(Cell(KERNEL, request, "s", "a", 0))
        jupyter.cells.sent(Cell("another", request + "0", "s", "a", 0))
    assert [each.request for each in jupyter.cells.of(KERNEL)] == ["2"]


async def test_cells_are_bounded(jupyter: JupyterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest cells are forgotten."""
    monkeypatch.setattr(cells, "MOST", 3)
    for number in range(5):
        jupyter.cells.sent(Cell(KERNEL, f"{number}", "s", f"cell {number}", number))
    assert await jupyter.listed() == ["cell 2", "cell 3", "cell 4"]


async def test_a_page_gets_messages_from_the_journal(gateway: Gateway, jupyter: JupyterServer) -> None:
    """They are those of the known cells, and a page that got the last ones has the cell."""
    for request in "12":
        jupyter.cells.sent(Cell(KERNEL, request, "s", f"cell {request}", 3))
    foreign = came("execute_reply", "3")
    mine = [json.loads(came(kind, "1")) for kind in ("execute_input", "execute_reply", "idle")]
    gateway.journal = [json.loads(foreign), *mine, json.loads(came("idle", "2"))]
    status, page = await jupyter.ask("messages?since=3")
    assert (status, page["messages"], page["next"], gateway.asked) == (200, gateway.journal[1:], 9, ["3"])
    await jupyter.ask("cells", "DELETE")
    assert await jupyter.listed() == ["cell 2"]


@pytest.mark.parametrize("path", ["cells", "messages?since=0"])
async def test_only_who_may_use_the_jupyter_server(gateway: Gateway, jupyter: JupyterServer, path: str) -> None:
    """Without the Jupyter server's token there is nothing, and the gateway is not asked."""
    assert (await jupyter.ask(path, token=""))[0] == 403
    assert (await jupyter.ask(path, token="other"))[0] == 403
    assert gateway.asked == []


@pytest.mark.parametrize("since", ["", "-1", "x", "0&wait=600", "1/../../x"])
async def test_a_number_is_a_number(gateway: Gateway, jupyter: JupyterServer, since: str) -> None:
    """Nothing but a number becomes part of the gateway's address."""
    status, _ = await jupyter.ask(f"messages?since={since}")
    assert (status, gateway.asked) == ((200, ["0"]) if "&" in since else (400, []))


@pytest.mark.parametrize(
    "bad", ["", "[]", "null", '{"header": 3}', '{"header": {"msg_type": "execute_request"}}', b"", b"\0" * 99]
)
async def test_messages_that_are_none(gateway: Gateway, jupyter: JupyterServer, bad: str | bytes) -> None:
    """A browser's malformed message passes, because the gateway says what is wrong with it. No cell comes of it."""
    for layout in (None, V1):
        async with page_of(jupyter, layout=layout) as page:
            await page.recv()
            await page.send(bad)
            await until(lambda: bad in gateway.heard)
        gateway.heard.clear()
    assert await jupyter.listed() == []
