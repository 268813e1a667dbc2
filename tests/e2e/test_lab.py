"""JupyterLab with `--gateway-url`, as users start it: by itself, and with the classes of cellvm_lab."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import requests
import websockets
from jupyter_server.services.kernels.connection import base as wire

from tests.guest.client import KEY, Sandbox, Server, until

ROOT = Path(__file__).parents[2]
SCREENSHOT = ROOT / "test-results" / "lab.png"
OURS = "--ServerApp.jpserver_extensions=cellvm_lab=True"
NOTEBOOK = {"cells": [], "metadata": {"kernelspec": {"name": "code_interpreter", "display_name": ""}}}
TOKEN = "for-the-browser"
V1 = "v1.kernel.websocket.jupyter.org"
Running = Callable[..., AbstractAsyncContextManager["Lab"]]


class Lab:
    """A `jupyter lab` process. `packages` is a folder with further packages of its environment."""

    def __init__(self, python: Path, packages: Path, directory: Path, gateway: str, *options: str) -> None:
        self.directory = directory / "files"
        self.directory.mkdir()
        for name in ("test", "reload"):
            notebook = json.dumps({**NOTEBOOK, "nbformat": 4, "nbformat_minor": 5})
            (self.directory / f"{name}.ipynb").write_text(notebook)
        self.log = directory / "lab.log"
        homes = {f"JUPYTER_{name}_DIR": str(directory / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
        command = [python, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", f"--gateway-url={gateway}"]
        command += [f"--ServerApp.root_dir={self.directory}", f"--IdentityProvider.token={TOKEN}", *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
                env={**os.environ, **homes, "PYTHONPATH": str(packages), "JUPYTER_GATEWAY_AUTH_TOKEN": KEY},
            )
        self.http = requests.Session()
        self.http.headers["Authorization"] = f"token {TOKEN}"
        try:
            self.url = until(self._address, 120, every=0.1)[1]
            until(self._listens, 120, every=0.1)
        except BaseException:
            self.close()
            raise

    def _address(self) -> re.Match[str] | None:
        text = self.log.read_text()
        assert self.process.poll() is None, text[-3000:]
        return re.search(r"^\S.*ServerApp\]\s+(http://127\.0\.0\.1:\d+)/lab", text, re.MULTILINE)

    def _listens(self) -> bool:
        """Whether connections are accepted. A Jupyter server prints its address a moment before that."""
        host, port = self.url.removeprefix("http://").split(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            finally:
                self.process.kill()
                self.process.wait()

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        return self.http.request(method, f"{self.url}/{path}", timeout=60, **options)

    def json(self, method: str, path: str, status: int = 200, **options: Any) -> Any:
        answer = self.request(method, path, **options)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content and answer.ok else answer.text


class Relay:
    """A line between Lab and the server that can be cut. It is cut for good when its block is left."""

    def __init__(self, server: Server) -> None:
        self.port = int(server.url.rpartition(":")[2])
        self.ends: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self.listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        self.listener.close()
        self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward = await asyncio.open_connection("127.0.0.1", self.port)
        self.ends |= {writer, onward}
        await asyncio.gather(self._copy(reader, onward), self._copy(onward_reader, writer))
        self.ends -= {writer, onward}

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # the line was cut
        writer.close()

    def cut(self) -> None:
        for writer in self.ends:
            writer.transport.abort()


class Page:
    """A browser's use of a kernel, in either layout. It keeps all messages that it received."""

    def __init__(self, lab: Lab, kernel: str, layout: str | None = V1) -> None:
        self.session = uuid.uuid4().hex
        self.is_v1 = layout is not None
        query = f"session_id={self.session}&token={TOKEN}"
        self.socket = websockets.connect(
            f"{lab.url.replace('http', 'ws')}/api/kernels/{kernel}/channels?{query}",
            subprotocols=[layout] if layout else None,
            max_size=None,
            # The defaults are too short for a Jupyter server that has just started on a busy machine.
            open_timeout=60,
            ping_interval=None,
        )
        self.received: list[dict[str, Any]] = []

    async def __aenter__(self) -> Self:
        self.connection = await self.socket.__aenter__()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self.socket.__aexit__(*exception)

    async def send(self, kind: str, content: dict[str, Any], *buffers: bytes) -> str:
        header = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": kind,
            "session": self.session,
            "username": "",
            "version": "5.3",
        }
        parts = {"header": header, "parent_header": {}, "metadata": {}, "content": content}
        if self.is_v1:
            packed = [json.dumps(part).encode() for part in parts.values()]
            frame = wire.serialize_msg_to_ws_v1([*packed, *buffers], "shell")
        elif buffers:
            frame = wire.serialize_binary_message({**parts, "channel": "shell", "buffers": buffers})
        else:
            frame = json.dumps({**parts, "channel": "shell"})
        await self.connection.send(frame)
        return header["msg_id"]

    async def execute(self, code: str) -> str:
        return await self.send("execute_request", {"code": code, "silent": False, "allow_stdin": False})

    async def receive(self) -> dict[str, Any]:
        async with asyncio.timeout(60):
            frame = await self.connection.recv()
        if self.is_v1:
            channel, parts = wire.deserialize_msg_from_ws_v1(frame)
            names = ("header", "parent_header", "metadata", "content")
            message = dict(zip(names, map(json.loads, parts[:4]), strict=True)) | {"buffers": parts[4:]}
            message["channel"] = channel
        else:
            message = wire.deserialize_binary_message(frame) if isinstance(frame, bytes) else json.loads(frame)
        self.received.append(message)
        return message

    async def until(self, *kinds: str, parent: str) -> list[dict[str, Any]]:
        """Receive until messages of all those kinds have come for a request. Returns all messages for it."""
        while not set(kinds) <= {kind_of(each) for each in self.answers(parent)}:
            await self.receive()
        return self.answers(parent)

    def answers(self, parent: str) -> list[dict[str, Any]]:
        return [each for each in self.received if each["parent_header"].get("msg_id") == parent]

    async def run(self, code: str) -> str:
        """The text that a cell prints."""
        return printed(await self.until("execute_reply", "idle", parent=await self.execute(code)))


def kind_of(message: dict[str, Any]) -> str:
    """The type of a message, or the state if the message is a status."""
    return message["content"].get("execution_state") or message["header"]["msg_type"]


def printed(messages: list[dict[str, Any]]) -> str:
    return "".join(each["content"]["text"] for each in messages if kind_of(each) == "stream")


BESIDE_NOTHING = pytest.mark.alone
"""JupyterLab's page did not load its style sheet beside other tests, whose machines bring network cards and take them
away."""


@pytest.fixture(scope="session")
def running(lab_python: Path, cellvm_lab: Path) -> Running:
    """Runs JupyterLab for the time of a block, in an environment into which cellvm-lab is installed."""

    @asynccontextmanager
    async def running(directory: Path, gateway: str, *options: str) -> AsyncIterator[Lab]:
        lab = await asyncio.to_thread(Lab, lab_python, cellvm_lab, directory, gateway, *options)
        try:
            yield lab
        finally:
            await asyncio.to_thread(lab.close)

    return running


@pytest.fixture(scope="module")
async def relay(server: Server) -> AsyncIterator[Relay]:
    async with Relay(server) as relay:
        yield relay


@pytest.fixture(scope="module")
async def lab(relay: Relay, running: Running, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """JupyterLab with our classes, over the relay."""
    async with running(tmp_path_factory.mktemp("lab"), relay.url, OURS) as lab:
        yield lab


@pytest.fixture
async def kernel(lab: Lab) -> AsyncIterator[str]:
    """A kernel that JupyterLab has started."""
    model = await asyncio.to_thread(lab.json, "POST", "api/kernels", 201, json={"name": "code_interpreter"})
    yield model["id"]
    await asyncio.to_thread(lab.request, "DELETE", f"api/kernels/{model['id']}")


async def browse(python: Path, lab: Lab, steps: str, *kernel: str) -> dict[str, dict[str, Any]]:
    """Run those steps of browser.py, and return the result of each."""
    SCREENSHOT.parent.mkdir(exist_ok=True)
    address = f"{lab.url}/lab?token={TOKEN}"
    process = await asyncio.create_subprocess_exec(
        python, Path(__file__).with_name("browser.py"), address, SCREENSHOT, steps, *kernel, stdout=subprocess.PIPE
    )
    output, _ = await process.communicate()
    print(output.decode())
    found = {step.pop("step"): step for step in map(json.loads, output.splitlines())}
    errors = [f"{name}: {step['error']}" for name, step in found.items() if "error" in step]
    assert not errors, "\n".join([*errors, lab.log.read_text()[-5000:]])
    assert process.returncode == 0
    return found


@BESIDE_NOTHING
async def test_jupyterlab_as_it_comes(server: Server, running: Running, lab_python: Path, tmp_path: Path) -> None:
    """Text, a figure and a restart work without the flag that sets our classes."""
    async with running(tmp_path, server.url) as lab:
        steps = await browse(lab_python, lab, "stock")
    assert steps["text"]["text"] == "hello 42"
    assert min(steps["figure"]["png"]) > 100
    assert steps["restart"] | {"text": "False", "prompt": "[1]:"} == steps["restart"]


@BESIDE_NOTHING
async def test_jupyterlab_with_our_classes(server: Server, lab: Lab, lab_python: Path) -> None:
    """A notebook can do everything, the file browser shows a sandbox's file, and an agent's kernel can be used."""
    with server.sandbox() as box:
        box.execute("secret = 6 * 7")
        steps = await browse(lab_python, lab, "ours", box.get("").json()["kernelID"])
    assert steps["text"]["text"] == "hello 42"
    assert steps["table"]["cells"] == ["1", "x", "2", "y"]
    assert min(steps["figure"]["png"]) > 100
    assert steps["input"] | {"prompt": "name? ", "text": "got Ada ✓"} == steps["input"]
    assert steps["widget"] | {"picture": [37, 23], "upload": "True"} == steps["widget"]
    assert steps["large"]["text"] == "alive"
    assert steps["interrupt"]["text"] == "awake"
    assert steps["files"]["text"] == "from the browser"
    assert steps["restart"] | {"text": "False", "prompt": "[1]:"} == steps["restart"]
    assert steps["attach"]["text"] == "42"


async def test_pages_that_are_loaded_again(lab: Lab, lab_python: Path) -> None:
    """A page that comes after a cell was started shows all of its output: what came, what comes, and questions."""
    steps = await browse(lab_python, lab, "reload")
    assert steps["reload"]["numbers"] == [str(number) for number in range(40)]
    assert steps["reload"]["second"] == "second 42"
    assert steps["away"] | {"text": "step 19", "png": [37, 23]} == steps["away"]
    assert steps["question"]["text"] == "got one two"
    assert steps["unsaved"] | {"text": "kept 1", "cleared": 0} == steps["unsaved"]


@pytest.mark.parametrize("layout", [V1, None], ids=["v1", "legacy"])
async def test_nothing_is_lost_or_doubled(lab: Lab, kernel: str, relay: Relay, layout: str | None) -> None:
    """Nothing is lost when the line to the server breaks twice during a cell. The browser's new messages wait."""
    async with Page(lab, kernel, layout) as page:
        await page.run("pass")
        cell = await page.execute("import time\nfor n in range(400): print(n, flush=True); time.sleep(0.02)")
        for _ in range(2):
            await page.until("stream", parent=cell)
            count = len(page.received)
            relay.cut()
            await asyncio.sleep(0.2)
            asked = await page.execute("print('after')")
            while len(page.received) < count + 5:
                await page.receive()
        messages = await page.until("execute_reply", "idle", parent=cell)
        assert printed(messages).split() == [str(number) for number in range(400)]
        assert [kind_of(each) for each in messages if kind_of(each) != "stream"][-2:].count("execute_reply") == 1
        assert printed(await page.until("execute_reply", "idle", parent=asked)) == "after\n"
        numbers = [each["metadata"]["cellvm"]["seq"] for each in page.received]
        assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("layout", [V1, None], ids=["v1", "legacy"])
async def test_large_messages_with_bytes(lab: Lab, kernel: str, layout: str | None) -> None:
    """A binary message of 20 MiB goes to the kernel and comes back."""
    data = bytes(range(256)) * (20 * 4096)
    async with Page(lab, kernel, layout) as page:
        await page.run(
            "from comm import get_comm_manager\n"
            "def echo(comm, opened): comm.send({}, buffers=[opened['buffers'][0], b'end'])\n"
            "get_comm_manager().register_target('echo', echo)"
        )
        opened = {"comm_id": "1", "target_name": "echo", "data": {}}
        messages = await page.until("comm_msg", "idle", parent=await page.send("comm_open", opened, data))
        echo = next(each for each in messages if kind_of(each) == "comm_msg")
        assert [bytes(each) for each in echo["buffers"]] == [data, b"end"]


async def test_the_browser_hears_of_the_end(server: Server, lab: Lab, kernel: str) -> None:
    """When the sandbox has ended the browser is disconnected, and nothing tells it to try again."""
    async with Page(lab, kernel) as page:
        box = (await page.run("import os; print(os.environ['E2B_SANDBOX_ID'])")).strip()
        await asyncio.to_thread(server.request, "DELETE", f"/sandboxes/{box}")
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                await page.receive()
        assert page.connection.close_code == 1001


async def test_kernels_of_others(server: Server, running: Running, tmp_path: Path) -> None:
    """An agent's sandbox is among the kernels. It outlives the Jupyter server, but the server's own kernels do not."""
    with server.sandbox() as box:
        box.execute("secret = 6 * 7")
        kernel = box.get("").json()["kernelID"]
        async with running(tmp_path, server.url, OURS) as lab:
            own = await asyncio.to_thread(lab.json, "POST", "api/kernels", 201, json={"name": "code_interpreter"})
            listed = await asyncio.to_thread(lab.json, "GET", "api/kernels")
            assert {own["id"], kernel} <= {each["id"] for each in listed}
            async with Page(lab, kernel) as page:
                assert await page.run("print(secret)") == "42\n"
            await asyncio.to_thread(lab.json, "DELETE", f"api/kernels/{kernel}", 204)
        left = {each["id"] for each in server.get("/api/kernels").json()}
        assert kernel in left
        assert own["id"] not in left


async def test_it_ends_though_the_server_is_away(server: Server, running: Running, tmp_path: Path) -> None:
    """SIGTERM ends a Jupyter server that can't reach its kernels any more."""
    async with Relay(server) as relay, running(tmp_path, relay.url, OURS) as lab:
        own = await asyncio.to_thread(lab.json, "POST", "api/kernels", 201, json={"name": "code_interpreter"})
        relay.close()
    assert f"Kernel {own['id']} may go on" in lab.log.read_text()
    server.request("DELETE", f"/api/kernels/{own['id']}")


@pytest.fixture
async def home(server: Server, lab: Lab) -> AsyncIterator[tuple[Sandbox, Callable[..., Any]]]:
    """A sandbox, and a function for requests to Lab's contents API below the sandbox's home."""
    with server.sandbox() as box:

        async def ask(method: str, path: str, status: int = 200, **options: Any) -> Any:
            return await asyncio.to_thread(
                lab.json, method, f"api/contents/sandboxes/{box.id}{path}", status, **options
            )

        yield box, ask


async def test_files_in_both_directions(lab: Lab, home: tuple[Sandbox, Callable[..., Any]]) -> None:
    """Text, bytes and notebooks can be listed, read, written and downloaded. Hidden files are not shown."""
    box, ask = home
    content = bytes(range(256))
    box.shell("echo -n Grüße > text.txt; touch .hidden; mkdir -p 'a b/c'; mkfifo pipe")
    box.upload("/home/user/data.bin", content)
    top = await asyncio.to_thread(lab.json, "GET", "api/contents/sandboxes")
    assert box.id in {each["name"] for each in top["content"]}
    root = await asyncio.to_thread(lab.json, "GET", "api/contents")
    assert {"sandboxes", "test.ipynb"} <= {each["name"] for each in root["content"]}
    names = {each["name"]: each["type"] for each in (await ask("GET", ""))["content"]}
    assert names == {"text.txt": "file", "data.bin": "file", "a b": "directory"}

    text = await ask("GET", "/text.txt?hash=1")
    assert (text["content"], text["format"], text["mimetype"]) == ("Grüße", "text", "text/plain")
    assert text["hash"] == hashlib.sha256("Grüße".encode()).hexdigest()
    data = await ask("GET", "/data.bin")
    assert (base64.b64decode(data["content"]), data["format"], data["size"]) == (content, "base64", 256)
    await ask("GET", "/data.bin?format=text", 400)
    await ask("GET", "/none", 404)
    await ask("GET", "/text.txt/none", 404)
    await ask("GET", "/.hidden", 404)
    await ask("GET", "/pipe", 404)
    await ask("GET", "?type=file", 400)

    cells = [{"cell_type": "code", "source": "1", "metadata": {}, "outputs": [], "execution_count": None, "id": "one"}]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    await ask("PUT", "/new.ipynb", 201, json={"type": "notebook", "format": "json", "content": notebook})
    assert (await ask("GET", "/new.ipynb"))["content"]["cells"][0]["source"] == "1"
    assert json.loads(box.download("/home/user/new.ipynb").content)["cells"][0]["id"] == "one"
    await ask("PUT", "/note.txt", 201, json={"type": "file", "format": "text", "content": "first"})
    point = await ask("POST", "/note.txt/checkpoints", 201)
    await ask(
        "PUT", "/note.txt", json={"type": "file", "format": "base64", "content": base64.b64encode(content).decode()}
    )
    assert box.download("/home/user/note.txt").content == content
    await ask("POST", f"/note.txt/checkpoints/{point['id']}", 204)
    assert box.download("/home/user/note.txt").content == b"first"

    answer = await asyncio.to_thread(lab.request, "GET", f"files/sandboxes/{box.id}/data.bin?download=1")
    assert (answer.content, answer.headers["Content-Length"]) == (content, "256")
    assert "attachment" in answer.headers["Content-Disposition"]
    answer = await asyncio.to_thread(lab.request, "HEAD", f"files/sandboxes/{box.id}/text.txt")
    assert (answer.status_code, answer.headers["Content-Length"]) == (200, "7")
    for path in ("none", ".hidden", ""):
        answer = await asyncio.to_thread(lab.request, "GET", f"files/sandboxes/{box.id}/{path}")
        assert answer.status_code == 404


async def test_files_are_changed(lab: Lab, home: tuple[Sandbox, Callable[..., Any]]) -> None:
    """Files can be uploaded in pieces, made, renamed, copied and deleted. Forbidden changes are refused."""
    box, ask = home
    pieces = [os.urandom(1 << 20), os.urandom(1 << 20), os.urandom(1000)]
    for number, piece in zip((1, 2, -1), pieces, strict=True):
        model = {"type": "file", "format": "base64", "content": base64.b64encode(piece).decode(), "chunk": number}
        await ask("PUT", "/large 'x'.bin", 201 if number == 1 else 200, json=model)
    assert box.download("/home/user/large 'x'.bin").content == b"".join(pieces)
    answer = await asyncio.to_thread(lab.request, "GET", f"files/sandboxes/{box.id}/large 'x'.bin")
    assert answer.content == b"".join(pieces)

    assert (await ask("POST", "", 201, json={"type": "directory"}))["name"] == "Untitled Folder"
    assert (await ask("POST", "", 201, json={"type": "directory"}))["name"] == "Untitled Folder 1"
    assert (await ask("POST", "", 201, json={"type": "notebook"}))["name"] == "Untitled.ipynb"
    path = f"sandboxes/{box.id}"
    await ask("PATCH", "/Untitled Folder", json={"path": f"{path}/folder"})
    await ask("PATCH", "/folder", 409, json={"path": f"{path}/Untitled Folder 1"})
    await ask("PATCH", "/folder", 400, json={"path": "folder"})
    copied = await ask("POST", "/folder", 201, json={"copy_from": f"{path}/Untitled.ipynb"})
    assert copied["path"] == f"{path}/folder/Untitled.ipynb"
    here = await asyncio.to_thread(lab.json, "POST", "api/contents", 201, json={"copy_from": f"{path}/Untitled.ipynb"})
    assert (lab.directory / here["name"]).exists()
    await ask("DELETE", "/folder", 204)
    await ask("DELETE", "/folder", 404)
    assert box.shell("ls").split("\n") == ["Untitled Folder 1", "Untitled.ipynb", "large 'x'.bin", ""]

    await ask("DELETE", "", 403)
    await ask("PATCH", "", 403, json={"path": "sandboxes/other"})
    gone = await asyncio.to_thread(lab.request, "GET", "api/contents/sandboxes/sbx00000000000000000000")
    assert gone.status_code == 404
    box.shell("mkdir locked; sudo chown root locked; sudo chmod 755 locked")
    refused = await ask("PUT", "/locked/file", 403, json={"type": "file", "format": "text", "content": ""})
    assert "locked/file" in refused
