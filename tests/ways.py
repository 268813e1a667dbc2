"""The programs of `tests/corpus`, and the ways in which people run one.

A program is a notebook and a script at once: a Python file whose cells begin at `# %%`. Every way must have the same
outcome. This is what differs by nature:

- A notebook shows the values of its cells. A script shows none, so we let it print the last one.
- Only a notebook shows figures. A script warns that it can't.
- Only a notebook can await in a cell or use a magic. A cell that begins at `# %% notebook` is for that. It is commented
  out, because it need not be Python. A cell that begins at `# %% script` takes its place in scripts.
- A script has an exit status, where a cell has an error. An exit with 0 is an error in a notebook only.
- A warning tells where it was raised, and a test how long it took.

As a module this is a process in which nbclient runs notebooks through a gateway.
"""

import ast
import asyncio
import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

from tests.guest.client import Sandbox

CORPUS = Path(__file__).with_name("corpus")
LIMIT = 110
"""Seconds that a program or a cell may take. In an emulated machine imports alone take up to a minute."""
NOT_SHOWN = "UserWarning: FigureCanvasAgg is non-interactive, and thus cannot be shown\n"
TAKE_FILES = r"""
find . -type f ! -path '*/.*' ! -path '*/__pycache__/*' -exec sha256sum {} + | sort -k 2
find . -mindepth 1 -maxdepth 1 ! -name '.*' -exec rm -r {} +
"""
"""A shell script that tells the files in the working directory, and deletes them."""


@dataclass
class Program:
    """A program of the corpus. `cells` are those of the notebook, `script` is the whole for Python."""

    path: Path
    cells: list[str] = field(default_factory=list)
    script: str = ""

    def __post_init__(self) -> None:
        text = self.path.read_text()
        _, *parts = re.split(r"^# %%( notebook| script|)\n", text, flags=re.MULTILINE)
        for kind, source in zip(parts[::2], parts[1::2], strict=True):
            if kind == " notebook":
                source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
            if kind != " script":
                self.cells.append(source.strip())
        last = ast.parse(text).body[-1]
        lines = text.split("\n")[: last.end_lineno]
        if isinstance(last, ast.Expr):
            lines[last.lineno - 1 :] = ["print(repr(", *lines[last.lineno - 1 :], "))"]
        self.script = "\n".join(lines) + "\n"

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def needs_machine(self) -> bool:
        """Whether it imports packages that only the guest image has."""
        return re.search(r"^(import|from) (numpy|openpyxl|pandas|PIL|sklearn)\b", self.script, re.MULTILINE) is not None


@dataclass
class Outcome:
    """What a run gives: what is printed, the error, files with their digests; of notebooks also all that is shown."""

    stdout: str
    stderr: str
    error: str
    files: str
    shown: list[dict[str, Any]] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        self.stderr = re.sub(r" in [\d.]+s$", "", self.stderr, flags=re.MULTILINE)
        self.stderr = re.sub(r"^\S*:\d+: (\w+Warning: .*\n)(  .*\n)?", r"\1", self.stderr, flags=re.MULTILINE)
        self.stderr = self.stderr.replace(NOT_SHOWN, "")

    @property
    def pictures(self) -> list[bytes]:
        """The PNG files that are shown."""
        return [base64.b64decode(data["image/png"]) for data in self.shown if "image/png" in data]


def programs(*, on_machine: bool = False) -> list[Program]:
    found = [Program(path) for path in sorted(CORPUS.glob("*.py"))]
    return [program for program in found if program.needs_machine is on_machine]


# -- scripts


def ended(stdout: str, stderr: str, code: int, files: str) -> Outcome:
    """The outcome of a program that has ended."""
    assert code != 124, "it was stopped at its timeout"
    error = ""
    if code:
        stderr, _, traceback = stderr.partition("Traceback (most recent call last):\n")
        name, _, value = (traceback.rstrip().rpartition("\n")[2] or f"SystemExit: {code}").partition(": ")
        error = f"{name.rpartition('.')[2]}: {value}"
    return Outcome(stdout, stderr, error, files)


def by_python(program: Program, folder: Path) -> Outcome:
    """The right outcome, which the programs have here in an empty folder."""
    file = folder / program.path.name
    file.write_text(program.script)
    ran = subprocess.run([sys.executable, file.name], cwd=folder, env=environment(), capture_output=True, timeout=60)
    file.unlink()
    files = subprocess.run(["sh", "-c", TAKE_FILES], cwd=folder, capture_output=True, check=True)
    return ended(ran.stdout.decode(), ran.stderr.decode(), ran.returncode, files.stdout.decode())


def environment() -> dict[str, str]:
    """Ours without asyncio's debug mode, which tells on the error stream what is slow."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONASYNCIODEBUG"}


def command(box: Sandbox, *argv: str, **fields: Any) -> Outcome:
    ran = box.run(*argv, timeout=LIMIT, **fields)
    return ended(ran["stdout"], ran["stderr"], ran["exitCode"], box.shell(TAKE_FILES))


def as_script(box: Sandbox, program: Program) -> Outcome:
    """A file is uploaded, and Python runs it."""
    assert box.upload(program.path.name, program.script).ok
    ran = box.run("python3", program.path.name, timeout=LIMIT)
    return ended(ran["stdout"], ran["stderr"], ran["exitCode"], box.shell(f"rm {program.path.name}\n{TAKE_FILES}"))


def as_command(box: Sandbox, program: Program) -> Outcome:
    return command(box, "python3", "-c", program.script)


def as_stdin(box: Sandbox, program: Program) -> Outcome:
    return command(box, "python3", "-", stdin=program.script)


# -- notebooks


def as_cells(box: Sandbox, program: Program) -> Outcome:
    """A cell after the other is sent to the sandbox, whose kernel is new."""
    assert box.server.request("POST", f"/api/kernels/{box.model['kernelID']}/restart").status_code == 200
    outputs: list[list[dict[str, Any]]] = []
    for source in program.cells:
        cell = box.execute(source, timeout=LIMIT)
        assert (cell["truncated"], cell["late"], cell["outcome"]) == (None, [], "finished")
        outputs.append([{"output_type": "stream", "name": name, "text": cell[name]} for name in ("stdout", "stderr")])
        outputs[-1] += [{"output_type": each["type"], "data": each["data"]} for each in cell["results"]]
        if cell["error"] is not None:
            outputs[-1].append(
                {"output_type": "error", "ename": cell["error"]["name"], "evalue": cell["error"]["value"]}
            )
            break
    return shown(outputs, box.shell(TAKE_FILES))


WAYS: dict[str, Callable[[Sandbox, Program], Outcome]] = {
    "cells": as_cells,
    "script": as_script,
    "command": as_command,
    "stdin": as_stdin,
}
"""The ways by one request after the other. `Notebooks` are one more."""


def shown(cells: list[list[dict[str, Any]]], files: str) -> Outcome:
    """The outcome of a notebook, from the outputs of its cells."""
    outputs = [each for cell in cells for each in cell]
    values = [
        each["data"]["text/plain"] + "\n" for each in cells[-1] if each["output_type"] in ("result", "execute_result")
    ]
    text = {
        name: "".join(each["text"] for each in outputs if each.get("name") == name) for name in ("stdout", "stderr")
    }
    errors = [f"{each['ename']}: {each['evalue']}" for each in outputs if each["output_type"] == "error"]
    error = next((each for each in errors if each != "SystemExit: 0"), "")
    return Outcome(
        text["stdout"] + "".join(values),
        text["stderr"],
        error,
        files,
        [each["data"] for each in outputs if "data" in each],
    )


class Notebooks:
    """A process in which nbclient runs notebooks, one after the other, in a sandbox of its own. Each has a new kernel.

    `server` has `url` and `request`, as that of a `Sandbox`.
    """

    def __init__(self, server: Any, key: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ways"],
            # nbclient's WebSocket sends no headers, so the key is in the address.
            env=environment() | {"JUPYTER_GATEWAY_URL": f"{server.url}/t/{key}"},
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            kernel = server.request("GET", f"/api/kernels/{self._ask(None)}").json()
            self.box = Sandbox(server, {"sandboxID": kernel["sandbox_id"]})
            self._ask(["None"])  # from here on nbclient is connected
        except BaseException:
            self.close()
            raise

    def _ask(self, request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def run(self, program: Program) -> Outcome:
        return shown(self._ask(program.cells), self.box.shell(TAKE_FILES))

    def close(self) -> None:
        """End the process and its sandbox."""
        self._process.communicate(timeout=60)


async def main() -> None:
    """Answer each line of standard input, which is the cells of a notebook or null for the kernel's id."""
    from jupyter_server.gateway.managers import GatewayKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    client = NotebookClient(nbformat.v4.new_notebook(), kernel_manager_class=GatewayKernelManager)
    client.create_kernel_manager()
    await client.async_start_new_kernel()
    # If the first answer takes over a second, jupyter_client asks for a local process, which this kernel has not.
    client.km._async_is_alive = client.km.is_alive
    while line := await asyncio.to_thread(sys.stdin.readline):
        answer: Any = client.km.kernel_id
        if (cells := json.loads(line)) is not None:
            if client.kc is not None:
                await client.km.restart_kernel()
            client.nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
            try:
                await client.async_execute(cleanup_kc=False)
            except CellExecutionError:
                pass  # the cell's outputs tell it
            answer = [cell.outputs for cell in client.nb.cells if cell.execution_count is not None]
        print(json.dumps(answer), flush=True)
    await client._async_cleanup_kernel()


if __name__ == "__main__":
    asyncio.run(main())
