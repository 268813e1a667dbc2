"""The two clients of docs/stream.md do what the page says, on a real machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest.client import KEY, Server

DOCS = Path(__file__).parents[2] / "docs"
# Node 20 has no WebSocket of its own unless asked, and older ones have none: the one of JupyterLab's library will do.
NODE = """
globalThis.crypto ??= require("crypto").webcrypto;
globalThis.WebSocket = require("ws");
import(process.argv[1]);
"""


@pytest.mark.parametrize("name", ["stream.py", "stream.mjs"])
def test_the_page_shows_the_file(name: str) -> None:
    """docs/stream.md has each client whole."""
    assert (DOCS / "examples" / name).read_text().strip() in (DOCS / "stream.md").read_text()


def run(command: list[str], server: Server, code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """What a client prints of a cell in a sandbox of its own."""
    env = {**os.environ, "CELLVM_URL": server.url, "CELLVM_API_KEY": KEY}
    with server.sandbox() as box:
        return subprocess.run(
            [*command, box.id, code], env=env | options.pop("env", {}), capture_output=True, text=True, timeout=120,
            check=False, **options,
        )  # fmt: skip


@pytest.mark.parametrize("language", ["python", "javascript"])
def test_a_client(language: str, server: Server, services: Path) -> None:
    """It runs a cell, shows what comes of it, and ends with it."""
    command = [sys.executable, str(DOCS / "examples" / "stream.py")]
    if language == "javascript":
        command = ["node", "-e", NODE, str(DOCS / "examples" / "stream.mjs")]
    env = {"NODE_PATH": str(services.parent / "node_modules")}
    result = run(command, server, "for n in range(3): print(n)\n6 * 7", env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("0\n1\n2\n"), result.stdout
    assert "42" in result.stdout


def test_the_python_client_answers_input(server: Server) -> None:
    """What it reads from its own input goes to the cell that asks."""
    command = [sys.executable, str(DOCS / "examples" / "stream.py")]
    result = run(command, server, "print('got', input('name? '))", input="Ada\n")
    assert "got Ada" in result.stdout, result.stderr
