"""On an emulated machine, where all Python takes twenty times as long, errors and timeouts do not cost variables."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.guest.client import CELLVM, Sandbox


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("import pandas as pd\npd.DataFrame({'a': [1]})['nope']", "KeyError"),
        ("import matplotlib.pyplot as plt\nplt.plot([1, 2], [1, 2, 3])", "ValueError"),
        ("import pandas as pd\npd.DataFrame({'a': [1]}).merge(pd.DataFrame({'b': [1]}), on='c')", "KeyError"),
        ("import numpy as np\nnp.zeros((2, 3)) @ np.zeros((2, 3))", "ValueError"),
        ("from sklearn.linear_model import LinearRegression\nLinearRegression().fit([[1], [2]], [1])", "ValueError"),
    ],
)
def test_errors_of_libraries(box: Sandbox, code: str, name: str) -> None:
    """An error deep in a library is told soon, and variables are kept."""
    box.execute("kept = 1")
    started = time.monotonic()
    cell = box.execute(code)
    print(f"{name}: {time.monotonic() - started:.1f} s")
    assert cell["error"]["name"] == name
    assert time.monotonic() - started < 30
    assert box.execute("kept")["results"][0]["data"]["text/plain"] == "1"


@pytest.mark.parametrize(
    "code",
    [
        "import subprocess\nsubprocess.run(['sleep', '100'])",
        "import asyncio\nawait asyncio.sleep(100)",
        "import queue\nqueue.Queue().get()",
        "import socket, requests\ns = socket.create_server(('127.0.0.1', 0))\n"
        "requests.get('http://%s:%d' % s.getsockname())",
        "import numpy as np\nfrom sklearn.ensemble import RandomForestClassifier\n"
        "RandomForestClassifier(100000).fit(np.random.rand(500, 20), np.random.randint(0, 2, 500))",
    ],
)
def test_timeouts_in_libraries(box: Sandbox, code: str) -> None:
    """A timeout in library code keeps variables, and the answer comes within five seconds after it."""
    box.execute("kept = 2")
    started = time.monotonic()
    cell = box.execute(code, timeout=5)
    print(f"{time.monotonic() - started:.1f} s")
    assert (cell["error"]["code"], cell["error"]["stateKept"]) == ("exec_timeout", True)
    assert time.monotonic() - started < 15
    assert box.execute("kept")["results"][0]["data"]["text/plain"] == "2"


def test_figures_of_a_script(tmp_path: Path) -> None:
    """`cellvm run` saves what a script shows, and what it leaves open, and has the script's exit status."""
    script = """
import matplotlib.pyplot as plt
for number in range(2):
    plt.figure(); plt.plot([1, 2]); plt.title(f"figure {number}")
plt.show()
plt.bar(["a"], [1])
print("drawn", flush=True)
raise SystemExit(5)
"""
    (tmp_path / "plots.py").write_text(script)
    ran = subprocess.run(
        [CELLVM, "run", "plots.py", "--data-dir", tmp_path / "data", "--templates", "code_interpreter"],
        cwd=tmp_path, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (5, "drawn\n"), ran.stderr
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["plots-1.png", "plots-2.png", "plots-3.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
