"""Programs on a real machine, with the packages that only the image has: the same outcome in each way to run them."""

import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import ways
from tests.guest.client import CELLVM, KEY, Sandbox, Server
from tests.ways import Notebooks, Outcome, Program

PROGRAMS = ways.programs(on_machine=True)
FIGURES = {"image_filters": 3, "plot_gallery": 4}
"""The number of pictures that each notebook shows."""


@pytest.fixture(scope="module")
def run(server: Server, box: Sandbox) -> Iterator[Callable[[Program, str], Outcome]]:
    """What runs a program in a way, once."""
    notebooks = Notebooks(server, KEY)
    each = {"notebook": notebooks.run} | {name: partial(way, box) for name, way in ways.WAYS.items()}
    known: dict[tuple[str, str], Outcome] = {}

    def run(program: Program, way: str) -> Outcome:
        key = (program.name, way)
        if key not in known:
            known[key] = each[way](program)
        return known[key]

    yield run
    notebooks.close()


@pytest.mark.parametrize("way", ["notebook", "cells", "command"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_outcome(run: Any, program: Program, way: str) -> None:
    """What is printed, the last value, the error and the files are those of the script."""
    assert run(program, way) == run(program, "script")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_shown(run: Any, program: Program) -> None:
    """A notebook shows what cells over REST show, and all figures."""
    found = run(program, "notebook")
    assert found.shown == run(program, "cells").shown
    assert len(found.pictures) == FIGURES.get(program.name, 0)


def test_figures(run: Any, tmp_path: Path) -> None:
    """`cellvm run` saves the figures that the notebook shows, in their sizes."""
    (program,) = (program for program in PROGRAMS if program.name == "plot_gallery")
    (tmp_path / "plots.py").write_text(program.script)
    flags = ["--data-dir", tmp_path / "data", "--templates", "code_interpreter"]
    ran = subprocess.run([CELLVM, "run", "plots.py", *flags], cwd=tmp_path, capture_output=True, text=True, timeout=170)
    assert (ran.returncode, ran.stdout) == (0, run(program, "script").stdout), ran.stderr
    pictures = [path.read_bytes() for path in sorted(tmp_path.glob("plots-*.png"))]
    assert [size(picture) for picture in pictures] == [size(each) for each in run(program, "notebook").pictures]


def size(png: bytes) -> tuple[int, ...]:
    return struct.unpack_from(">II", png, 16)
