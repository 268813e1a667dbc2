"""JupyterLab's own client library in Node, against real machines, in both layouts of kernel messages."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.guest.client import KEY, Server

EXPECTED: dict[str, dict[str, Any]] = {
    "specs": {"default": "code_interpreter", "names": ["base", "code_interpreter", "code_interpreter_full", "python3"]},
    "start": {"status": "ok", "language": "python", "debugger": True},
    "execute": {
        "status": "ok",
        "stdout": "hello\n",
        "types": ["status", "execute_input", "stream", "execute_result", "status"],
        "value": "42",
    },
    "stdin": {"prompt": "name? ", "stdout": "got Ada ✓\n"},
    "comm to the kernel": {"buffers": 2, "bytes": 256},
    "comm from the kernel": {"opened": {"a": 1}, "told": {"b": 2}},
    "subshell": {"created": "ok", "listed": True, "deleted": "ok", "value": "False"},
    "debugger": {"success": True, "isStarted": False},
    "interrupt": {"status": "error", "ename": "KeyboardInterrupt"},
    "large display": {"characters": 11 * 1024 * 1024},
    "restart": {"id": True, "ename": "NameError"},
    "death": {"status": "ok", "stdout": "again\n"},
    "sessions": {"path": "renamed.ipynb", "kernel": True, "running": True},
    "shutdown": {"gone": True, "sessions": 0},
}


@pytest.mark.parametrize("layout", ["v1", "legacy"])
def test_the_client_library(layout: str, server: Server, services: Path) -> None:
    """A notebook does everything that JupyterLab's pages do in its life."""
    command = ["node", str(services), server.url, KEY, layout]
    result = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    steps = {step.pop("step"): step for step in map(json.loads, result.stdout.splitlines())}
    print(result.stdout, result.stderr[-3000:])
    assert result.returncode == 0, result.stdout
    for name, expected in EXPECTED.items():
        assert steps[name] | expected == steps[name], name
    statuses = steps["death"]["statuses"]
    assert statuses.count("restarting") == 1, "the client drops its state and connects again each time"
