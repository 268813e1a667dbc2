"""The template page's full example with only its address and its key changed, and the same pipeline as a cell."""

import base64
import hashlib
import io
import json
import re
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from tests.guest.client import KEY, Sandbox, Server

PROGRAM = Path(__file__).with_name("documented_example.txt").read_text()
PNG = b"\x89PNG\r\n\x1a\n"


def pipeline() -> str:
    """The code that the example sends."""
    return eval(re.search(r'^code = (""".*?""")$', PROGRAM, re.MULTILINE | re.DOTALL)[1])


def figures(cell: dict[str, Any]) -> list[bytes]:
    return [
        base64.b64decode(result["data"]["image/png"]) for result in cell["results"] if "image/png" in result["data"]
    ]


def test_example(server: Server) -> None:
    """The documented program runs unchanged, shows the summary, and downloads the chart that is in the sandbox."""
    program = PROGRAM.replace("https://api.sandbase.ai", server.url).replace("sk-sb-YOUR_KEY", KEY)
    work, clean_up = program.split("# 4. Clean up")
    names: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()) as printed:
        exec(work, names)
    assert names["result"]["exitCode"] == 0, names["result"]
    assert re.search(r"=== Summary ===\n +date +revenue +users\ncount +90 ", printed.getvalue())
    assert re.search(r"^Total revenue: \$[\d,]+\nAvg daily users: \d+\.\d$", printed.getvalue(), re.MULTILINE)
    assert "Chart saved to /home/user/chart.png" in printed.getvalue()

    chart = names["chart"]
    assert chart.status_code == 200
    assert chart.headers["Content-Type"] == "image/png"
    assert chart.content.startswith(PNG)
    sandbox = Sandbox(server, names["sandbox"])
    inside = sandbox.run("sha256sum", "/home/user/chart.png")["stdout"].split()[0]
    assert hashlib.sha256(chart.content).hexdigest() == inside

    exec(clean_up, names)
    assert sandbox.get("").status_code == 404


def test_create_answer(server: Server) -> None:
    """The answer to a create has the fields that the page documents, and the sandbox is running."""
    with server.sandbox() as sandbox:
        model = sandbox.model
        assert re.fullmatch(r"sbx[a-z0-9]+", model["sandboxID"])
        assert model["templateID"] == "code_interpreter"
        assert model["status"] == "running"
        assert isinstance(model["clientID"], str)
        assert all(
            re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[.\d]*Z", model[name]) for name in ("startedAt", "endAt")
        )


def test_documented_one_liner(box: Sandbox) -> None:
    """The page's `describe` command prints the table."""
    code = 'import pandas as pd; print(pd.DataFrame({"x": [1,2,3]}).describe())'
    result = box.run("python3", "-c", code)
    assert (result["exitCode"], result["stderr"]) == (0, "")
    assert result["stdout"].splitlines()[1].split() == ["count", "3.0"]
    assert set(result) >= {"processID", "stdout", "stderr", "exitCode"}


def test_pipeline_as_a_cell(box: Sandbox) -> None:
    """The pipeline through /execute returns its figure as a PNG, although the code chooses a file-only backend."""
    cell = box.execute(pipeline())
    assert cell["error"] is None
    assert cell["stdout"].startswith("=== Summary ===")
    (figure,) = figures(cell)
    assert figure.startswith(PNG)
    assert box.download("/home/user/chart.png").content.startswith(PNG)


def test_variables_stay(box: Sandbox) -> None:
    """A variable that one call sets is there in the next."""
    assert box.execute("kept = [1, 2]")["error"] is None
    assert box.value("kept + [3]") == [1, 2, 3]


INLINE = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots(figsize=(3, 2))\nax.plot([1, 2])\n"


@pytest.mark.parametrize("ending", ["plt.show()", "None", "fig"])
def test_inline_figures(box: Sandbox, ending: str) -> None:
    """A figure comes back once as a PNG when it is shown or left open, and twice when it is the cell's value."""
    code = f"import matplotlib\nmatplotlib.use('module://matplotlib_inline.backend_inline')\n{INLINE}{ending}"
    cell = box.execute(code)
    assert cell["error"] is None
    expected = 2 if ending == "fig" else 1  # a figure that is the value is also open when the cell ends, as in Jupyter
    assert len(figures(cell)) == expected
    assert all(figure.startswith(PNG) for figure in figures(cell))


def test_inline_is_the_default(server: Server) -> None:
    """In a fresh sandbox a figure needs no set-up, and tables come as HTML."""
    with server.sandbox() as sandbox:
        cell = sandbox.execute(INLINE + "plt.show()\nimport pandas as pd\npd.DataFrame({'x': [1, 2]})")
        assert cell["error"] is None
        assert len(figures(cell)) == 1
        value = cell["results"][-1]
        assert value["type"] == "result"
        assert "<table" in value["data"]["text/html"]
        assert "x" in value["data"]["text/plain"]


def test_streamed_cell(box: Sandbox) -> None:
    """A cell that is streamed as NDJSON sends its parts when they are made, and ends with `end`."""
    accept = {"Accept": "application/x-ndjson"}
    code = "import time\nprint('a')\ntime.sleep(1)\nprint('b')\n1 + 1"
    with box.post("/execute", json={"code": code}, headers=accept, stream=True) as answer:
        assert answer.headers["Content-Type"].startswith("application/x-ndjson")
        events = [(json.loads(line), time.monotonic()) for line in answer.iter_lines()]
    kinds = [event["type"] for event, _ in events]
    assert kinds[-1] == "end"
    assert [event["text"] for event, _ in events if event["type"] == "stdout"] == ["a\n", "b\n"]
    moments = [moment for event, moment in events if event["type"] == "stdout"]
    assert moments[1] - moments[0] > 0.5
    assert next(event for event, _ in events if event["type"] == "result")["data"]["text/plain"] == "2"
