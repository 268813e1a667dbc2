"""The official client of MCP, unmodified, in both eras, over HTTP and over stdio. No machine is needed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from tests.e2e.conftest import cached, run
from tests.guest.client import KEY, Server

HERE = Path(__file__).parent / "mcp"
CELLVM = [sys.executable, "-m", "kernel_gateway", "mcp"]


@pytest.fixture(scope="module")
def client(progress: Callable[[str], None]) -> list[str]:
    """The command of the script that uses the official client."""
    lock = HERE / "python-2.3.0.lock"

    def make(directory: Path) -> None:
        progress(f"setting up mcp 2.3.0 in {directory}")
        run([sys.executable, "-m", "venv", str(directory)])
        run([str(directory / "bin" / "pip"), "install", "--quiet", "--require-hashes", "--requirement", str(lock)])

    return [str(cached("mcp-python-2.3.0", lock, make) / "bin" / "python"), str(HERE / "client.py")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = {"--isolation": "unisolated"}
    running = Server(tmp_path_factory.mktemp("mcp") / "data", pool_size=1, max_sandboxes=20, flags=flags)
    yield running
    running.close()


def check(command: list[str], data: Path) -> None:
    env = {**os.environ, "CELLVM_API_KEY": KEY, "XDG_DATA_HOME": str(data)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert result.returncode == 0, f"{result.stdout[-1500:]}\n{result.stderr[-4000:]}"


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_over_http(client: list[str], server: Server, tmp_path: Path, mode: str) -> None:
    """Calls share a variable, an image is shown, and an error is told."""
    check([*client, mode, f"{server.url}/mcp", KEY], tmp_path)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_over_stdio(client: list[str], server: Server, tmp_path: Path, mode: str) -> None:
    """The same with a program that passes messages on. No sandbox is left when the input has ended."""
    check([*client, mode, "stdio", *CELLVM, "--url", server.url], tmp_path)
    with urlopen(Request(f"{server.url}/sandboxes", headers={"X-API-Key": KEY})) as answer:
        scoped = [each for each in json.load(answer) if "cellvm.scope" in each["metadata"]]
    assert scoped == []


def test_without_a_server(client: list[str], tmp_path: Path) -> None:
    """`cellvm mcp` makes its sandbox itself, and leaves nothing but its answers on standard output."""
    check([*client, "auto", "stdio", *CELLVM, "--isolation", "unisolated"], tmp_path)
