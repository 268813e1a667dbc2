"""The README's blocks can be pasted: they run in order, against the server that its first block starts."""

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.guest.client import START_LIMIT, until
from tests.guest.readme import ADDRESS, ROOT, Block, Terminal, blocks, checkout, documents, failures

PASTED = [block for block in blocks() if block.section != "JupyterLab"]
"""The JupyterLab blocks run in tests/e2e/test_readme.py, because JupyterLab is installed there."""
SERVE, TEST = (Block("Start", "sh", f"make {target}\n") for target in ("serve", "test"))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, dict[str, str]]]:
    """`make serve` in a copy of the tree, until SIGTERM. Yields the copy, the server's address, and the environment."""
    tree = checkout(tmp_path)
    log = tmp_path / "serve.log"
    environment = {name: value for name, value in os.environ.items() if name != "CELLVM_API_KEY"}
    environment |= {"CELLVM_DATA_DIR": str(tmp_path / "data"), "CELLVM_PORT": "0", "CELLVM_POOL_SIZE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            shlex.split(SERVE.text), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=tree, env=environment
        )

    def ready() -> re.Match[str] | None:
        text = log.read_text()
        assert process.poll() is None, text
        return re.search(r"^CellVM .* is ready at http://(\S+) .*\nAPI key: e2b_", text, re.MULTILINE)

    try:
        yield tree, until(ready, START_LIMIT, every=0.05)[1], environment
    finally:
        process.send_signal(signal.SIGTERM)  # `make` passes the signal on
        process.wait(60)
    assert "stopping …" in log.read_text()


def test_every_block_in_order(served: tuple[Path, str, dict[str, str]]) -> None:
    """Shell blocks succeed and print no errors. A JSON block equals the last answer of the block before it."""
    tree, address, environment = served
    printed = [""]
    assert PASTED[:2] == [SERVE, TEST], "the two commands come first"
    with Terminal(tree, address, environment) as terminal:
        for block in PASTED[2:]:
            match block.language:
                case "sh":
                    printed.append(terminal.run(block.text))
                case "json":
                    assert documents(printed[-1])[-1] == json.loads(block.text)
                case other:
                    pytest.fail(f"nothing is known of blocks of {other!r}:\n{block.text}")
    everything = "\n".join(printed)
    assert re.search(r"^sbx[a-z0-9]{20}$", everything, re.MULTILINE), "the sandbox is created"
    assert [answer["stdout"] for answer in documents(everything) if "exitCode" in answer] == ["42\n"]
    assert (tree / "data.csv").read_text() in everything, "the file that was uploaded is downloaded"
    assert "0\n1\n2\n" in everything, "the agent's program prints what the cell prints"
    assert requests.get(f"http://{address}/health", timeout=10).json()["sandboxes"] == 0, "the sandbox is deleted"


def test_make_test_runs_everything() -> None:
    """`make test` can't run inside itself, so this only checks that its script runs the checks and all tests."""
    recipe = re.search(r"^test: .*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe[1] == "@exec sh tests/run.sh"
    script = (ROOT / "tests" / "run.sh").read_text()
    for part in ("ruff", "mypy", "pytest", *(f"tests/{each}" for each in ("unit", "api", "contract", "guest", "e2e"))):
        assert part in script


@pytest.mark.parametrize(
    ("printed", "is_wrong"),
    [
        ('{"code":404,"message":"sandbox not found","error":"not_found"}', True),
        ('{"results":[],"error":null}{"code":400,"message":"…","error":"invalid_request"}', True),
        ('{"results":[],"error":{"name":"NameError","code":null}}', True),
        ('{"stdout":"","exitCode":1}', True),
        ('{"stdout":"{}","exitCode":0}{"results":[],"error":null}', False),
        ("day,visitors\n[1\n", False),
    ],
)  # fmt: skip
def test_an_error_is_seen(printed: str, is_wrong: bool) -> None:
    """The check of a block's output finds every kind of answer that a reader would take for a failure."""
    assert bool(failures(printed)) is is_wrong


@pytest.mark.parametrize("text", ["false\ntrue", "false | cat", "x=$(false)", "nothing-of-this-name", "exit 0"])
def test_a_block_that_fails_is_seen(text: str, tmp_path: Path) -> None:
    """A failure is seen anywhere in a block, also in a pipe or a substitution, and also when the session ends."""
    (tmp_path / "tree").mkdir()
    with Terminal(tmp_path / "tree", ADDRESS, os.environ) as terminal, pytest.raises(AssertionError):
        terminal.run(text)
