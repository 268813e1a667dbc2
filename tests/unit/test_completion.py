"""What a cell's imports will bind, known before they have run."""

import json
import os.path
import sys
from collections import Counter
from pathlib import Path

import pytest

from guest_agent.completion import imported

LOADED = [
    ("import json; json.lo", {"json": json}),
    ("import json\njson.lo", {"json": json}),
    ("import json as j, os\nj.", {"j": json, "os": os}),
    ("import os.path\nos.", {"os": os}),
    ("import os.path as p\np.", {"p": os.path}),
    ("from os import path\npath.jo", {"path": os.path}),
    ("from collections import (Counter,\n  OrderedDict as O)\nCou", {"Counter": Counter}),
    ("import \\\n  json\n", {"json": json}),
    ("for n in range(3):\n    import json\n    json.", {"json": json}),
    ("if True: import json\n", {"json": json}),
    ("import json  # a comment; import os\n", {"json": json}),
]


@pytest.mark.parametrize(("code", "bound"), LOADED)
def test_a_loaded_module_is_itself(code: str, bound: dict[str, object]) -> None:
    """A module that is loaded is found as it is, however it is imported."""
    found = imported(code)
    assert {name: found.get(name) for name in bound} == bound


def test_all_names_of_a_module() -> None:
    """`import *` binds the public names."""
    found = imported("from json import *\nlo")
    assert (found["loads"], "_default_decoder" in found) == (json.loads, False)


@pytest.mark.parametrize(
    "code",
    ["", "import", "import ", "from json import", "from json import (lo", "import nope_nope", "from nope import x",
     "from . import x", "from .a import x", "import json json", "text = 'import json'", "import a..b",
     "from json import nope", "import \ud800", "from json import (loads, (dumps))", "importer = json"],
)  # fmt: skip
def test_what_binds_nothing(code: str) -> None:
    """Code that is unfinished, wrong or no import binds nothing."""
    assert imported(code) == {}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that nobody has imported. One that is run leaves a file."""
    ran = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (tmp_path / "own_module.py").write_text(
        f"{ran}import json as j\nfrom os import *\nA, (B, C) = 1, (2, 3)\nD: int = 4\ndef f(): pass\nclass K: pass\n"
    )
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text(ran)
    (tmp_path / "own_package" / "part.py").write_text(f"{ran}async def g(): pass\n")
    (tmp_path / "broken_module.py").write_text("def (:\n")
    (tmp_path / "deep_module.py").write_text("x = " + "-" * 100_000 + "1\n")
    (tmp_path / "large_module.py").write_text("x = 1\n" * 100_000)
    (tmp_path / "own_space").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_module_that_is_not_loaded(own: Path) -> None:
    """Its names come from its source. Nothing of it, nor of a package around it, is run."""
    code = "import own_module\nfrom own_package import part\nfrom own_module import f as g\n"
    found = imported(code + "import own_package.part as p\n")
    assert set(dir(found["own_module"])) >= {"j", "A", "B", "C", "D", "f", "K"}
    assert "loads" not in dir(found["own_module"])
    assert (dir(found["part"]), dir(found["p"]), "g" in found) == (["g"], ["g"], True)
    assert not (own / "ran").exists()
    assert not {"own_module", "own_package", "own_package.part"} & set(sys.modules)


@pytest.mark.parametrize(
    "name", ["broken_module", "deep_module", "large_module", "own_space", "own_space.x", "own_module.x"]
)
def test_a_module_that_can_not_be_read(own: Path, name: str) -> None:
    """A source that is broken, too deep, too large or missing gives no names and no error."""
    assert imported(f"import {name} as m\n") == {}


def test_large_cells(own: Path) -> None:
    """Much code of any kind is looked through at once."""
    for piece in ("import ", "from x import (", "import \\\n", "from a", ";", " ", "import nope_nope;"):
        assert imported(piece * (1024 * 1024 // len(piece))) == {}
