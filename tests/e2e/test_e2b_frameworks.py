"""Frameworks on E2B's SDK, unmodified and without another network. A model says what it was told.

One server without isolation serves them all.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import cached, run
from tests.e2e.test_e2b import HERE, variables
from tests.guest.client import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = {"--isolation": "unisolated"}
    running = Server(tmp_path_factory.mktemp("frameworks") / "data", pool_size=1, max_sandboxes=4, flags=flags)
    yield running
    running.close()


@pytest.mark.parametrize("framework", ["smolagents", "openai-agents", "langchain-e2b"])
def test_framework(framework: str, server: Server, tmp_path: Path, progress: Callable[[str], None]) -> None:
    """An agent runs code, sees errors and output, and moves files in a sandbox of this server."""
    source = HERE / "frameworks" / framework
    lock = source / "requirements.lock"

    def make(directory: Path) -> None:
        progress(f"setting up {framework} in {directory}")
        run([sys.executable, "-m", "venv", str(directory)])
        run([str(directory / "bin" / "pip"), "install", "--quiet", "--no-deps", "--requirement", str(lock)])

    python = cached(f"e2b-{framework}", lock, make) / "bin" / "python"
    env = variables(E2B_API_URL=server.url, E2B_SANDBOX_URL=server.url)
    command = [str(python), str(source / "program.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=env, cwd=tmp_path)
    assert result.returncode == 0, f"{result.stdout[-1500:]}\n{result.stderr[-4000:]}"
