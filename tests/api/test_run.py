"""`cellvm run FILE` does what `python3 FILE` does. Both run here, and their outcomes are compared."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

SCRIPTS = {
    "prints": "print('one')\nimport sys\nprint('two', file=sys.stderr)\n",
    "the last expression is not shown": "1 + 1\n",
    "asyncio": "import asyncio\nasync def main():\n    await asyncio.sleep(0)\n    print('ran')\nasyncio.run(main())\n",
    "exit 0": "import sys\nprint('bye')\nsys.exit(0)\n",
    "exit 3": "import sys\nsys.exit(3)\n",
    "exit with words": "import sys\nsys.exit('what is wrong')\n",
    "exit()": "exit(4)\n",
    "an error": "def f():\n    return 1 / 0\n\n\nf()\n",
    "a group": "raise ExceptionGroup('g', [ValueError(1)])\n",
    "no Python": "def f(:\n",
    "top-level await": "import asyncio\nawait asyncio.sleep(0)\n",
    "its name": "import os, sys\nprint(__name__, os.path.basename(__file__), sys.argv, __doc__)\n",
    "arguments": "import sys\nprint(sys.argv[1:])\n",
    "argparse": "import argparse\np = argparse.ArgumentParser()\np.add_argument('a', nargs='*')\n"
    "p.add_argument('--n', type=int)\nprint(p.parse_args())\n",
    "argparse that fails": "import argparse\np = argparse.ArgumentParser()\np.add_argument('--must', required=True)\n"
    "p.parse_args([])\n",
    "stdin": "import sys\nprint(sys.stdin.read().upper())\n",
    "input": "print('got', input('name? '))\n",
    "an input too many": "input()\ninput()\ninput()\ninput()\n",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.fail('no')\n"
    "if __name__ == '__main__':\n    unittest.main()\n",
    "multiprocessing": "import multiprocessing\ndef f(x): return x * x\nif __name__ == '__main__':\n"
    "    with multiprocessing.get_context('spawn').Pool(2) as p: print(p.map(f, [1, 2, 3]))\n",
    "a signal": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n",
    "at exit": "import atexit\natexit.register(print, 'last')\nprint('first')\n",
    "its own folder": "import pathlib\npathlib.Path('x.py').write_text('y = 5')\nimport x\nprint(x.y)\n",
    "other bytes": "import sys\nsys.stdout.buffer.write(bytes(range(256)))\n",
    "wide characters": "print('日本語テキスト' * 20000)\n",
    "a thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()\n",
    "a coding line": "# -*- coding: latin-1 -*-\nprint(len('\xe4'))\n",
}
INPUT = "ann\nbob\nlast line"
ARGUMENTS = ["one", "--n", "3", "-x y"]


def cellvm(folder: Path, *words: str) -> "subprocess.CompletedProcess[bytes]":
    settings = ["--isolation", "unisolated", "--data-dir", str(folder / "data"), "--cache-dir", str(folder / "cache")]
    program, *rest = words
    end = rest.index("--") if "--" in rest else len(rest)
    command = [sys.executable, "-m", "kernel_gateway", "run", program, *rest[:end], *settings, *rest[end:]]
    # With this variable of the test run asyncio tells of each slow step.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONASYNCIODEBUG"}
    return subprocess.run(command, cwd=folder, capture_output=True, input=INPUT.encode(), timeout=60, env=env)


def told(stderr: bytes) -> str:
    """What a program wrote on its error stream, without the folders that it ran in and our own messages."""
    text = re.sub(r'File "[^"]*/', 'File "', re.sub(r" in [\d.]+s", "", stderr.decode()))
    return "\n".join(
        line for line in text.splitlines() if not re.match(r" *[\d.]+ s  |saved |.*ISOLATION IS OFF", line)
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_as_python_does(tmp_path: Path, name: str) -> None:
    """Output, errors and exit status are those of `python3 FILE`."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPTS[name], encoding="latin-1" if "latin-1" in SCRIPTS[name] else "utf-8")
    arguments = ARGUMENTS if name in ("arguments", "its name") else ARGUMENTS[:3] if name == "argparse" else []
    python = ["python3", "script.py", *arguments]
    right = subprocess.run(python, cwd=tmp_path, capture_output=True, input=INPUT.encode(), timeout=60)
    (tmp_path / "x.py").unlink(missing_ok=True)
    ran = cellvm(tmp_path, "script.py", *(["--", *arguments] if arguments else []))
    assert ran.stdout == right.stdout
    assert told(ran.stderr) == told(right.stderr)
    assert ran.returncode == (right.returncode if right.returncode >= 0 else 128 - right.returncode)


def test_files_are_fetched_after_a_failure(tmp_path: Path) -> None:
    """`--get` brings files also when the script fails."""
    (tmp_path / "script.py").write_text("open('out.txt', 'w').write('done')\n1/0\n")
    ran = cellvm(tmp_path, "script.py", "--get", "out.txt")
    assert (ran.returncode, (tmp_path / "out.txt").read_text()) == (1, "done")


@pytest.mark.parametrize("command", [["doctor", "--", "x"], ["keys", "list", "--", "x"]])
def test_arguments_are_for_scripts(tmp_path: Path, command: list[str]) -> None:
    """Other commands refuse what follows `--`."""
    ran = subprocess.run([sys.executable, "-m", "kernel_gateway", *command], capture_output=True, text=True, timeout=30)
    assert (ran.returncode, "cellvm run" in ran.stderr) == (1, True)


def run_notebook(folder: Path, *sources: str) -> "tuple[int, list[nbformat.NotebookNode]]":
    """The exit status of `cellvm nb run`, and the cells that it has written."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbformat.write(book, folder / "book.ipynb")
    settings = ["--isolation", "unisolated", "--data-dir", str(folder / "data"), "--cache-dir", str(folder / "cache")]
    command = [sys.executable, "-m", "kernel_gateway", "nb", "run", "book.ipynb", *settings]
    ran = subprocess.run(command, cwd=folder, capture_output=True, timeout=60)
    return ran.returncode, nbformat.read(folder / "book.out.ipynb", as_version=4).cells


@pytest.mark.parametrize("code", ["raise ExceptionGroup('g', [ValueError(1)])", "%nosuch", "%%sql\nSELECT 1", "exit()"])
def test_a_notebook_ends_at_its_failure(tmp_path: Path, code: str) -> None:
    """A cell whose failure only the reply tells ends the run, too."""
    status, cells = run_notebook(tmp_path, code, "print('ran')")
    assert (status, cells[1].execution_count, cells[1].outputs) == (1, None, [])
    assert cells[0].outputs[-1].output_type == "error"


def test_late_output_is_in_its_own_cell(tmp_path: Path) -> None:
    """What a thread prints while a later cell runs is in the cell that prints it or in the one that runs, once."""
    code = "import threading, time\nthreading.Timer(0.3, print, ['late']).start()"
    status, cells = run_notebook(tmp_path, code, "time.sleep(1)")
    texts = [output.text for cell in cells for output in cell.outputs if output.output_type == "stream"]
    assert (status, texts) == (0, ["late\n"])
