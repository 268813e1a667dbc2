"""Our notebooks on real machines: nbclient runs them through the server, and `cellvm nb run` by itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.guest.client import CELLVM, KEY, Server

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
FIGURES = {"csv_exploration": 1, "machine_learning": 2, "excel_json": 0, "plot_gallery": 5, "polars_vs_pandas": 1}
"""The number of pictures that each notebook shows."""
PLOTLY = "application/vnd.plotly.v1+json"


BY_NBCLIENT = """
import sys
import nbformat
from jupyter_server.gateway.managers import GatewayKernelManager
from nbclient import NotebookClient

book = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(book, kernel_manager_class=GatewayKernelManager).execute()
nbformat.write(book, sys.argv[2])
"""


def outputs(book: Any) -> list[Any]:
    return [item for cell in book.cells if cell.cell_type == "code" for item in cell.outputs]


def check(book: Any, name: str) -> None:
    """The notebook is valid, every cell has run in order, nothing is on standard error, and the figures are there."""
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    found = outputs(book)
    assert [item.text for item in found if item.output_type == "stream" and item.name == "stderr"] == []
    assert not [item for item in found if item.output_type == "error"]
    assert sum("image/png" in item.get("data", {}) for item in found) == FIGURES.get(name, 0)
    if name == "plot_gallery":
        figures = [item.data for item in found if PLOTLY in item.get("data", {})]
        assert [len(figure[PLOTLY]["data"]) for figure in figures] == [3, 3, 1]
        assert all("plotly" in figure["text/html"].lower() for figure in figures)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_by_nbclient(server: Server, path: Path, tmp_path: Path) -> None:
    """An unmodified nbclient runs the notebook through the gateway. Afterwards its sandbox is gone."""
    before = {sandbox["sandboxID"] for sandbox in server.get("/sandboxes").json()}
    out = tmp_path / path.name
    # nbclient's WebSocket sends no headers, so the key is in the address.
    env = {**os.environ, "JUPYTER_GATEWAY_URL": f"{server.url}/t/{KEY}"}
    subprocess.run([sys.executable, "-c", BY_NBCLIENT, path, out], env=env, check=True, timeout=170)
    check(nbformat.read(out, as_version=4), path.stem)
    assert {sandbox["sandboxID"] for sandbox in server.get("/sandboxes").json()} == before


def nb_run(path: Path, *flags: str, template: str = "base") -> subprocess.CompletedProcess[str]:
    """Run `cellvm nb run` in the notebook's folder."""
    command = [CELLVM, "nb", "run", path.name, *flags, "--template", template, "--data-dir", path.parent / "data"]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=170, check=False)


def write(path: Path, *cells: str | tuple[str, str]) -> Path:
    """Write a notebook of these cells. A pair is a cell's code and its tag."""
    book = nbformat.v4.new_notebook()
    for cell in cells:
        code, tags = (cell, []) if isinstance(cell, str) else (cell[0], [cell[1]])
        book.cells.append(nbformat.v4.new_code_cell(code, metadata={"tags": tags}))
    nbformat.write(book, path)
    return path


def texts(path: Path) -> list[list[str]]:
    """Each cell's outputs in short: text, the value's text, or the exception's name."""
    return [
        [item.get("text") or item.get("ename") or item.data["text/plain"] for item in cell.outputs]
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
    ]


def test_nb_run(server: Server, tmp_path: Path) -> None:
    """A notebook of ours is written with all its outputs into a file beside it, and is itself unchanged."""
    path = tmp_path / "csv_exploration.ipynb"
    original = (NOTEBOOKS / path.name).read_text()
    path.write_text(original)
    result = nb_run(path, "--get", "orders.csv", template="code_interpreter")
    assert result.returncode == 0, result.stderr
    check(nbformat.read(tmp_path / "csv_exploration.out.ipynb", as_version=4), path.stem)
    assert path.read_text() == original
    assert (tmp_path / "orders.csv").read_text().startswith("order_id;date;city;")
    assert "cell 12 of 12: with open" in result.stderr


def test_nb_run_stops_at_a_failure(server: Server, tmp_path: Path) -> None:
    """A failed cell ends the run with status 1. The traceback is shown, and the outputs so far are written."""
    path = write(tmp_path / "x.ipynb", "print('one')\n1", "1 / 0", "print('three')")
    result = nb_run(path, "-o", "done.ipynb")
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr
    assert "cell 2 of 3 failed" in result.stderr
    assert texts(tmp_path / "done.ipynb") == [["one\n", "1"], ["ZeroDivisionError"], []]
    assert not (tmp_path / "x.out.ipynb").exists()


def test_nb_run_goes_on(server: Server, tmp_path: Path) -> None:
    """With the tag or --allow-errors the run goes on after an exception. Displays are updated across cells."""
    path = write(
        tmp_path / "x.ipynb",
        "shown = display('waiting', display_id=True)",
        ("1 / 0", "raises-exception"),
        "import sys\nprint('a'); print('b', file=sys.stderr); shown.update('done')",
    )
    assert nb_run(path, "--in-place").returncode == 0
    assert texts(path) == [["'done'"], ["ZeroDivisionError"], ["a\n", "b\n"]]
    write(path, "1 / 0", "2")
    assert nb_run(path, "--allow-errors").returncode == 0
    assert texts(tmp_path / "x.out.ipynb") == [["ZeroDivisionError"], ["2"]]


def test_nb_run_times_out(server: Server, tmp_path: Path) -> None:
    """--timeout is for each cell, and a cell that exceeds it ends the run also with --allow-errors."""
    path = write(tmp_path / "x.ipynb", "import time", "time.sleep(1)", "time.sleep(60)", "4")
    result = nb_run(path, "--timeout", "5", "--allow-errors")
    assert result.returncode == 1
    assert "cell 3 of 4 failed: ExecTimeout" in result.stderr
    assert texts(tmp_path / "x.out.ipynb") == [[], [], ["ExecTimeout"], []]


def test_nb_run_without_its_kernel(server: Server, tmp_path: Path) -> None:
    """A cell that ends its kernel ends the run, and the reason is told."""
    path = write(tmp_path / "x.ipynb", "import os\nprint('before', flush=True)", "os._exit(3)", "print('after')")
    result = nb_run(path, "--allow-errors")
    assert result.returncode == 1
    assert "cell 2 of 3 failed" in result.stderr
    written = json.loads((tmp_path / "x.out.ipynb").read_text())
    assert [len(cell["outputs"]) for cell in written["cells"]] == [1, 1, 0]
