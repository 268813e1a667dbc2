"""Frameworks on E2B's SDK or API, unmodified and without another network. A model says what it was told.

Servers without isolation serve them all.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import cached, run
from tests.e2e.test_e2b import HERE, named_server, names_asked_by, variables
from tests.guest.client import Server

FRAMEWORKS = HERE / "frameworks"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = {"--isolation": "unisolated"}
    running = Server(tmp_path_factory.mktemp("frameworks") / "data", pool_size=1, max_sandboxes=4, flags=flags)
    yield running
    running.close()


def python_with(framework: str, progress: Callable[[str], None]) -> Path:
    """The interpreter of an environment with that framework."""
    lock = FRAMEWORKS / framework / "requirements.lock"

    def make(directory: Path) -> None:
        progress(f"setting up {framework} in {directory}")
        run([sys.executable, "-m", "venv", str(directory)])
        run([str(directory / "bin" / "pip"), "install", "--quiet", "--no-deps", "--requirement", str(lock)])

    return cached(f"e2b-{framework}", lock, make) / "bin" / "python"


@pytest.mark.parametrize(
    "framework", ["smolagents", "openai-agents", pytest.param("langchain-e2b", marks=pytest.mark.frameworks)]
)
def test_framework(framework: str, server: Server, tmp_path: Path, progress: Callable[[str], None]) -> None:
    """An agent runs code, sees errors and output, and moves files in a sandbox of this server."""
    python = python_with(framework, progress)
    env = variables(E2B_API_URL=server.url, E2B_SANDBOX_URL=server.url)
    command = [str(python), str(FRAMEWORKS / framework / "program.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=env, cwd=tmp_path)
    assert result.returncode == 0, f"{result.stdout[-1500:]}\n{result.stderr[-4000:]}"


@pytest.mark.frameworks
async def test_litellm(tmp_path: Path, progress: Callable[[str], None]) -> None:
    """LiteLLM's code interpreter has a client of its own, and reaches sandboxes by their names alone."""
    server = named_server(tmp_path)
    try:
        program = FRAMEWORKS / "litellm" / "program.py"
        asked = await names_asked_by(python_with("litellm", progress), program, server, tmp_path)
    finally:
        server.close()
    assert asked == {"api.sbx.localhost", "49999"}
