"""The two clients of docs/stream.md do what the page says, on a real machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest.client import KEY, Server

DOCS = Path(__file__).parents[2] / "docs"
# Node has no WebSocket of its own by default up to version 20, so it gets the one of JupyterLab's library.
NODE = """
globalThis.crypto ??= require("crypto").webcrypto;
globalThis.WebSocket = require("ws");
import(process.argv[1]);
"""


@pytest.mark.parametrize("name", ["stream.py", "stream.mjs"])
def test_the_page_shows_the_file(name: str) -> None:
    """docs/stream.md shows each client in full."""
    assert (DOCS / "examples" / name).read_text().strip() in (DOCS / "stream.md").read_text()


def run(command: list[str], server: Server, code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a cell by a client, in its own sandbox. Returns the process, with its output."""
    env = {**os.environ, "CELLVM_URL": server.url, "CELLVM_API_KEY": KEY}
    with server.sandbox() as box:
        return subprocess.run(
            [*command, box.id, code], env=env | options.pop("env", {}), capture_output=True, text=True, timeout=120,
            check=False, **options,
        )  # fmt: skip


@pytest.mark.parametrize("language", ["python", "javascript"])
def test_a_client(language: str, server: Server, services: Path) -> None:
    """A client runs a cell, shows its output, and ends when the cell ends."""
    command = [sys.executable, str(DOCS / "examples" / "stream.py")]
    if language == "javascript":
        command = ["node", "-e", NODE, str(DOCS / "examples" / "stream.mjs")]
    env = {"NODE_PATH": str(services.parent / "node_modules")}
    result = run(command, server, "for n in range(3): print(n)\n6 * 7", env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("0\n1\n2\n"), result.stdout
    assert "42" in result.stdout


def test_the_python_client_answers_input(server: Server) -> None:
    """The client's standard input goes to the cell that asks for input."""
    command = [sys.executable, str(DOCS / "examples" / "stream.py")]
    result = run(command, server, "print('got', input('name? '))", input="Ada\n")
    assert "got Ada" in result.stdout, result.stderr
