"""A kernel behind a server, measured from a Jupyter client: ours, its peer, and the floor, which is no server at all.

The floor is ipykernel driven by jupyter_client over ZMQ. The peer is Jupyter Kernel Gateway. All are measured by the
same code and in short turns, because a machine's speed changes from minute to minute. Each round has fresh servers and
kernels. A client decodes every message whole. A server's cost is read from the scheduler's account of its process,
without the kernel.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import requests
import zmq
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.jsonutil import json_default
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.session import Session
from jupyter_server.services.kernels.connection.base import (
    deserialize_binary_message,
    deserialize_msg_from_ws_v1,
    serialize_msg_to_ws_v1,
)
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from kernel_gateway.settings import Settings

LOCK = Path(__file__).parent / "peers.lock"
FLOOR, PEER, OURS = "ZMQ floor", "Kernel Gateway", "CellVM"
V1 = Subprotocol("v1.kernel.websocket.jupyter.org")
ROUNDS, TURNS, EXECUTES = 3, 5, 20
WARM_UPS = 20
LINES = 20_000
FEW_LINES = 2_000
"""Lines for machines that may be emulated, because each print takes 8 ms there."""
BLOB = 20_000_000
PATIENCE = 120
"""Seconds that one cell, or one start, may take."""
SETTLE = 0.3
"""Seconds for a server's work after the client has its answer."""
QUIET = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONPATH": ""}
"""Environment of everything started."""

FLUSHED = "for i in range({}): print(i, flush=True)"
BUFFERED = f"for i in range({LINES}): print(i)"
DISPLAY = f"from IPython.display import publish_display_data as p; p({{'text/plain': 'a' * {BLOB}}})"
COMM = f"from comm import create_comm; c = create_comm(target_name='bench', buffers=[bytes({BLOB})])"
FIGURE = "%matplotlib inline\nimport matplotlib.pyplot as plt; plt.figure(); plt.plot(range(50)); plt.show()"


# -- clients


@dataclass(slots=True)
class Answer:
    """One cell's wall time in ms, and the messages that came."""

    wall: float
    messages: list[dict[str, Any]]

    @property
    def lines(self) -> int:
        texts = [each["content"]["text"] for each in self.messages if each["content"].get("name") == "stdout"]
        return sum(text.count("\n") for text in texts)

    def find(self, kind: str) -> dict[str, Any]:
        return next(each for each in self.messages if each["header"]["msg_type"] == kind)


class Client:
    """One client of one kernel, over any way. The session makes the messages of all clients in the same way."""

    def __init__(self) -> None:
        self.session = Session()

    async def send(self, message: dict[str, Any]) -> None:
        """Send on the channel `shell`."""
        raise NotImplementedError

    async def receive(self) -> tuple[str, dict[str, Any]]:
        """The next message, of any channel, and the channel."""
        raise NotImplementedError

    async def request(self, kind: str, content: dict[str, Any], patience: float = PATIENCE) -> Answer:
        """Send a request, wait for its reply and for `idle`."""
        waiting = {"shell", "iopub"}
        messages = []
        started = time.perf_counter()
        async with asyncio.timeout(patience):
            message = self.session.msg(kind, content)
            await self.send(message)
            while waiting:
                channel, got = await self.receive()
                if got["parent_header"].get("msg_id") != message["msg_id"]:
                    continue
                messages.append(got)
                if channel == "shell" or got["content"].get("execution_state") == "idle":
                    waiting.remove(channel)
        return Answer((time.perf_counter() - started) * 1000, messages)

    async def execute(self, code: str) -> Answer:
        """Run a cell that must not fail."""
        answer = await self.request("execute_request", {"code": code, "silent": False, "store_history": True})
        reply = answer.find("execute_reply")["content"]
        if reply["status"] != "ok":
            raise SystemExit(f"{code!r:.80}: {reply}")
        return answer


class WebSocketClient(Client):
    """A client of a server that speaks Jupyter's REST and WebSocket protocols."""

    def __init__(self, connection: ClientConnection) -> None:
        super().__init__()
        self._connection = connection
        self._is_v1 = connection.subprotocol == V1

    async def send(self, message: dict[str, Any]) -> None:
        if self._is_v1:
            await self._connection.send(serialize_msg_to_ws_v1(message, "shell", self.session.pack))
        else:
            await self._connection.send(json.dumps({**message, "channel": "shell"}, default=json_default))

    async def receive(self) -> tuple[str, dict[str, Any]]:
        frame = await self._connection.recv()
        if self._is_v1:
            channel, parts = deserialize_msg_from_ws_v1(frame)
            names = ("header", "parent_header", "metadata", "content")
            return channel, {**dict(zip(names, map(json.loads, parts), strict=False)), "buffers": parts[4:]}
        message = json.loads(frame) if isinstance(frame, str) else deserialize_binary_message(frame)
        return message["channel"], message


class ZmqClient(Client):
    """A client without a server. It reads the kernel's own sockets as soon as it can.

    jupyter_client's asynchronous channels would cost the client twice as much, and then this would be no floor.
    """

    def __init__(self, connection: KernelConnectionInfo) -> None:
        self._channels = BlockingKernelClient()
        self._channels.load_connection_info(connection)
        self._channels.start_channels(stdin=False, hb=False)
        self.session = self._channels.session
        self._received: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        self._sockets = {"shell": self._channels.shell_channel.socket, "iopub": self._channels.iopub_channel.socket}
        for each in self._sockets.values():
            asyncio.get_running_loop().add_reader(each.getsockopt(zmq.FD), self._drain)

    def _drain(self) -> None:
        for name, each in self._sockets.items():
            while each.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                parts = self.session.feed_identities(each.recv_multipart(zmq.NOBLOCK))[1]
                self._received.put_nowait((name, self.session.deserialize(parts)))

    async def send(self, message: dict[str, Any]) -> None:
        self._channels.shell_channel.send(message)
        self._drain()  # the descriptor only tells changes, and sending may have taken one

    async def receive(self) -> tuple[str, dict[str, Any]]:
        return await self._received.get()

    async def ready(self) -> Self:
        """Wait until the kernel's output comes, because a subscription takes effect some time after it is made."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                await self.request("kernel_info_request", {}, 0.05)
                return self
        raise SystemExit("the kernel does not answer")

    def close(self) -> None:
        for each in self._sockets.values():
            asyncio.get_running_loop().remove_reader(each.getsockopt(zmq.FD))
        self._channels.stop_channels()


# -- what is measured


class Floor:
    """Kernels as children of this process."""

    def __init__(self) -> None:
        self.pids: dict[str, int] = {}

    @contextlib.asynccontextmanager
    async def kernel(self, protocol: str) -> AsyncIterator[Client]:
        specs = KernelSpecManager(kernel_dirs=[str(Path(sys.prefix, "share/jupyter/kernels"))])
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
        with tempfile.TemporaryDirectory(prefix="cellvm-bench-") as directory:
            env = {**os.environ, **QUIET, "IPYTHONDIR": directory}
            await manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=directory, env=env)
            try:
                client = ZmqClient(manager.get_connection_info())
                try:
                    yield await client.ready()
                finally:
                    client.close()
            finally:
                await manager.shutdown_kernel(now=True)


class Server:
    """A server that runs."""

    def __init__(self, url: str, key: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self._url = url
        self._headers = {"Authorization": f"token {key}"}
        self._process = process
        self._log = log
        self.pids = {"server": process.pid}

    def is_ready(self) -> bool:
        if self._process.poll() is not None:
            raise SystemExit(f"the server did not start:\n{self._log.read_text()[-2000:]}")
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            return requests.get(f"{self._url}/api", headers=self._headers, timeout=5).ok
        return False

    @contextlib.asynccontextmanager
    async def kernel(self, protocol: str) -> AsyncIterator[Client]:
        kernels = f"{self._url}/api/kernels"
        answer = await asyncio.to_thread(requests.post, kernels, headers=self._headers, json={}, timeout=PATIENCE)
        answer.raise_for_status()
        kernel = f"{kernels}/{answer.json()['id']}"
        self.pids |= agents(self._process.pid)
        try:
            async with connect(
                f"ws{kernel.removeprefix('http')}/channels?session_id={secrets.token_hex(8)}",
                additional_headers=self._headers,
                subprotocols=[V1] if protocol == "v1" else None,
                max_size=None,
                compression=None,
                ping_interval=None,
            ) as connection:
                yield WebSocketClient(connection)
        finally:
            await asyncio.to_thread(requests.delete, kernel, headers=self._headers, timeout=60)


def agents(server: int) -> dict[str, int]:
    """Our server's one agent, if it runs on this host."""
    for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split():
        if b"guest_agent" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return {"agent": int(pid)}
    return {}


@dataclass(frozen=True, slots=True)
class Target:
    """Something to measure. `command` has `{port}`, `{key}`, `{directory}`. The floor has no command."""

    name: str
    command: Sequence[str] = ()
    protocol: str = "v1"
    environment: Mapping[str, str] = field(default_factory=dict)
    only_executes: bool = False
    is_machine: bool = False

    @property
    def rounds(self) -> int:
        return 1 if self.is_machine else ROUNDS

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Floor | Server]:
        """The place, once it takes requests."""
        if not self.command:
            yield Floor()
            return
        with tempfile.TemporaryDirectory(prefix="cellvm-bench-") as directory:
            values = {"port": str(free_port()), "key": secrets.token_hex(20), "directory": directory}
            log = Path(directory, "log")
            with log.open("wb") as output:
                # It starts elsewhere, because both servers' packages have one name and ours lies here.
                process = subprocess.Popen(
                    [each.format(**values) for each in self.command],
                    cwd=directory,
                    env={**os.environ, **{name: text.format(**values) for name, text in self.environment.items()}},
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            try:
                server = Server(f"http://127.0.0.1:{values['port']}", values["key"], process, log)
                async with asyncio.timeout(PATIENCE):
                    while not server.is_ready():
                        await asyncio.sleep(0.01)
                yield server
            finally:
                process.terminate()
                try:
                    await asyncio.to_thread(process.wait, 20)
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def targets(peers: Path) -> list[Target]:
    """All targets, in the order in which they are measured and shown."""
    gateway = (str(peers / "bin/python"), "-m", "kernel_gateway", "--KernelGatewayApp.port={port}")
    jupyter = {
        **QUIET, "KG_AUTH_TOKEN": "{key}", "JUPYTER_NO_CONFIG": "1", "IPYTHONDIR": "{directory}",
        "JUPYTER_RUNTIME_DIR": "{directory}", "JUPYTER_CONFIG_DIR": "{directory}", "JUPYTER_DATA_DIR": "{directory}",
    }  # fmt: skip
    ours = (
        sys.executable, "-m", "kernel_gateway", "serve", "--port", "{port}", "--data-dir", "{directory}",
        "--pool-size", "0", "--templates", "code_interpreter", "--log-level", "error",
    )  # fmt: skip
    unisolated = (*ours, "--isolation", "unisolated")
    key = {**QUIET, "CELLVM_API_KEY": "{key}"}
    return [
        Target(FLOOR),
        Target(PEER, gateway, environment=jupyter),
        Target("Kernel Gateway + nodelay", nodelay(gateway), environment=jupyter, only_executes=True),
        Target(OURS, unisolated, environment=key),
        Target("CellVM, legacy layout", unisolated, "legacy", environment=key, only_executes=True),
        Target("CellVM, qemu", ours, environment=key, is_machine=True),
    ]


def nodelay(command: Sequence[str]) -> tuple[str, ...]:
    """The peer with TCP_NODELAY, because most of its time for a small cell is Nagle's algorithm."""
    python, _, module, *flags = command
    patched = (
        "import runpy\n"
        "from jupyter_server.base.websocket import WebSocketMixin\n"
        "opened = WebSocketMixin.open\n"
        "WebSocketMixin.open = lambda self, *args: (self.set_nodelay(True), opened(self, *args))\n"
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    return (python, "-c", patched, *flags)


def peers_environment() -> Path:
    """The peer's virtual environment, made on first use. It is not ours: both have a package `kernel_gateway`."""
    path = Settings().cache_path / "test" / f"peers-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]}"
    if not (path / ".ready").exists():
        print(f"  setting up {path} …", file=sys.stderr)
        venv.create(path, clear=True, with_pip=True)
        python = str(path / "bin/python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", str(LOCK)], check=True)
        fonts = {**os.environ, "MPLCONFIGDIR": str(path / "matplotlib")}
        subprocess.run([python, "-c", "import matplotlib.pyplot"], env=fonts, check=True)
        (path / ".ready").touch()
    return path


def cpu(pid: int) -> float:
    """Milliseconds that all threads of a process have run for."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in tasks) / 1e6


def resident(pid: int) -> float:
    """Resident memory in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


# -- measuring


class Subject:
    """A target with a kernel, in one round. `start` makes it."""

    def __init__(
        self, target: Target, client: Client, pids: Mapping[str, int], add: Callable[[str, float], None]
    ) -> None:
        self.target = target
        self._client = client
        self._pids = pids
        self._add = add

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, target: Target, add: Callable[[str, float], None]) -> AsyncIterator[Self]:
        """Start the server and a kernel, and run the cells that are not measured."""
        began = time.perf_counter()
        async with target.running() as place:
            if place.pids:
                add(f"{target.name}: start", (time.perf_counter() - began) * 1000)
            began = time.perf_counter()
            async with place.kernel(target.protocol) as client:
                await client.execute("1")
                add(f"{target.name}: first", (time.perf_counter() - began) * 1000)
                for _ in range(WARM_UPS):
                    await client.execute("1")
                yield cls(target, client, place.pids, add)

    def add(self, what: str, value: float) -> None:
        self._add(f"{self.target.name}: {what}", value)

    async def executes(self) -> None:
        """One turn of short cells."""
        before = self._cpu()
        for _ in range(EXECUTES):
            self.add("execute", (await self._client.execute("1")).wall)
        await asyncio.sleep(SETTLE)
        for name, spent in self._cpu().items():
            self.add(f"execute, {name} CPU", (spent - before[name]) / EXECUTES)

    async def outputs(self, packages: Path) -> None:
        """Memory, and cells with much output."""
        if self._pids:
            self.add("memory", resident(self._pids["server"]))
        if self.target.only_executes:
            return
        name, lines = ("few flushed", FEW_LINES) if self.target.is_machine else ("flushed", LINES)
        self.add(f"{name}, lines", (await self._cell(name, FLUSHED.format(lines))).lines)
        self.add("buffered, lines", (await self._cell("buffered", BUFFERED)).lines)
        text = (await self._cell("display", DISPLAY)).find("display_data")["content"]["data"]["text/plain"]
        buffers = (await self._cell("comm", COMM)).find("comm_open")["buffers"]
        if len(text) != BLOB or sum(map(len, buffers)) != BLOB:
            raise SystemExit(f"{self.target.name}: an output is not whole")
        if not self.target.is_machine:  # a machine has matplotlib
            await self._client.execute(
                f"import os, sys; os.environ['MPLCONFIGDIR'] = {str(packages / 'matplotlib')!r}\n"
                f"sys.path.append({str(next(packages.glob('lib/python3*/site-packages')))!r})"
            )
        for name in ("first figure", "second figure"):
            data = (await self._cell(name, FIGURE)).find("display_data")["content"]["data"]
            if "image/png" not in data:
                raise SystemExit(f"{self.target.name}: there is no figure")

    async def _cell(self, name: str, code: str) -> Answer:
        """Run a cell once, and account the work of each process for it."""
        before = self._cpu()
        answer = await self._client.execute(code)
        await asyncio.sleep(SETTLE)
        self.add(name, answer.wall)
        for who, spent in self._cpu().items():
            self.add(f"{name}, {who} CPU", spent - before[who])
        return answer

    def _cpu(self) -> dict[str, float]:
        return {name: cpu(pid) for name, pid in {**self._pids, "client": os.getpid()}.items()}


async def measure_round(chosen: Sequence[Target], packages: Path, add: Callable[[str, float], None]) -> None:
    """Start all, give each its turns, end all. A target that fails lacks samples, and the table shows that."""
    async with contextlib.AsyncExitStack() as stack:
        subjects = [await stack.enter_async_context(Subject.start(target, add)) for target in chosen]
        for _ in range(TURNS):
            for subject in subjects:
                await subject.executes()
        for subject in subjects:
            try:
                await subject.outputs(packages)
            except (TimeoutError, ConnectionClosed) as error:
                print(f"  {subject.target.name}: the rest of this round is missing, {error!r:.200}", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Row:
    """A measurement in the table. `promise` is the README's figure for our server without isolation."""

    name: str
    title: str
    unit: str = "ms"
    promise: str = ""


ROWS = (
    Row("start", "server ready"),
    Row("first", "new kernel, first `1`"),
    Row("execute", "execute `1`, reply and idle", promise="target <= 1.6 x floor"),
    Row("execute, server CPU", "execute `1`, server CPU", promise="target <= 0.8 ms"),
    Row("execute, agent CPU", "execute `1`, agent CPU"),
    Row("memory", "server memory, one kernel", "MB", "target <= 45 MB"),
    Row("flushed", f"{LINES:,} flushed prints"),
    Row("flushed, lines", f"{LINES:,} flushed prints, arrived", "lines", "target all"),
    Row("flushed, server CPU", f"{LINES:,} flushed prints, server CPU", promise="target <= 1200 ms"),
    Row("flushed, agent CPU", f"{LINES:,} flushed prints, agent CPU"),
    Row("few flushed", f"{FEW_LINES:,} flushed prints"),
    Row("few flushed, lines", f"{FEW_LINES:,} flushed prints, arrived", "lines"),
    Row("few flushed, server CPU", f"{FEW_LINES:,} flushed prints, server CPU"),
    Row("buffered", f"{LINES:,} prints"),
    Row("buffered, lines", f"{LINES:,} prints, arrived", "lines", "target all"),
    Row("display", "20 MB display_data"),
    Row("display, server CPU", "20 MB display_data, server CPU"),
    Row("comm", "20 MB comm buffer"),
    Row("comm, server CPU", "20 MB comm buffer, server CPU"),
    Row("first figure", "first matplotlib figure"),
    Row("second figure", "second matplotlib figure"),
)


def table(samples: Mapping[str, list[float]]) -> Iterator[str]:
    """One block for each measurement, one line for each target that has it."""
    for row in ROWS:
        names = [name for name in (each.name for each in targets(Path())) if f"{name}: {row.name}" in samples]
        if names:
            yield f"\n{row.title:34} {'p50':>9} {'p90':>9} {'p99':>9}"
        for name in names:
            values = sorted(samples[f"{name}: {row.name}"])
            percentiles = [values[round(share * (len(values) - 1))] for share in (0.5, 0.9, 0.99)]
            numbers = " ".join(f"{value:9.{2 if value < 10 else 1}f}" for value in percentiles)
            beside = "".join(
                f"{percentiles[0] / statistics.median(samples[f'{other}: {row.name}']):8.2f} x {other}"
                for other in (FLOOR, PEER)
                if name not in (FLOOR, PEER) and other in names
            )
            promise = row.promise if name == OURS else ""
            yield f"  {name:32} {numbers} {row.unit:5} n={len(values):<3} {promise:22} {beside}"


def measure(add: Callable[[str, float], None]) -> None:
    """Measure all targets. `add` takes each sample under its target's and its own name."""
    build = [sys.executable, "-m", "kernel_gateway", "build", "--templates", "code_interpreter"]
    subprocess.run(build, check=True)  # a first start would build, too
    peers = peers_environment()
    for turn in range(ROUNDS):
        print(f"  round {turn + 1} of {ROUNDS}", file=sys.stderr)
        chosen = [target for target in targets(peers) if turn < target.rounds]
        asyncio.run(measure_round(chosen, peers, add))
