"""What only `code_interpreter_full` has. `make test-full` runs it, because building the template takes minutes."""

from collections.abc import Iterator

import pytest

from tests.guest.client import Sandbox, Server

pytestmark = pytest.mark.full

LIBRARIES = {
    "sympy": ("import sympy\nx = sympy.symbols('x')\nstr(sympy.integrate(sympy.cos(x) * x, x))", "x*sin(x) + cos(x)"),
    "statsmodels": (
        "import numpy as np, statsmodels.api as sm\nx = np.arange(20.0)\n"
        "[round(float(v), 6) for v in sm.OLS(2 * x + 1, sm.add_constant(x)).fit().params]",
        [1.0, 2.0],
    ),
    "networkx": ("import networkx as nx\nnx.shortest_path(nx.path_graph(5), 0, 3)", [0, 1, 2, 3]),
    "python-docx": (
        "import docx\nwritten = docx.Document()\nwritten.add_heading('Report', 1)\nwritten.save('r.docx')\n"
        "[each.text for each in docx.Document('r.docx').paragraphs]",
        ["Report"],
    ),
    "python-pptx": (
        "import pptx\nshow = pptx.Presentation()\nslide = show.slides.add_slide(show.slide_layouts[0])\n"
        "slide.shapes.title.text = 'Sales'\nshow.save('s.pptx')\n"
        "pptx.Presentation('s.pptx').slides[0].shapes.title.text",
        "Sales",
    ),
    "reportlab and pypdf": (
        "from pypdf import PdfReader\nfrom reportlab.pdfgen.canvas import Canvas\npage = Canvas('p.pdf')\n"
        "page.drawString(72, 720, 'three pages')\npage.save()\nPdfReader('p.pdf').pages[0].extract_text().strip()",
        "three pages",
    ),
    "pandas": ("import pandas as pd\nint(pd.DataFrame({'a': [1, 2]}).a.sum())", 3),
}
COMPILES = """
set -e
cd "$(mktemp -d)"
printf '#include <Python.h>\\nint main(void) { printf("%%s\\\\n", PY_VERSION); return 0; }\\n' > main.c
printf 'main: main.c\\n\\tgcc -I/usr/include/python3.11 -o main main.c\\n' > Makefile
make --silent && ./main
printf '#include <iostream>\\nint main() { std::cout << "C++" << std::endl; }\\n' > two.cc
g++ -o two two.cc && ./two
"""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A sandbox of the template, from a server that has built it."""
    flags = {"--templates": "code_interpreter_full"}
    server = Server(tmp_path_factory.mktemp("full") / "data", pool_size=1, max_sandboxes=2, flags=flags)
    try:
        with server.sandbox("code_interpreter_full") as sandbox:
            yield sandbox
    finally:
        server.close()


@pytest.mark.parametrize("library", LIBRARIES)
def test_library(full: Sandbox, library: str) -> None:
    """Every library that only this template has does its work, and what it shares with the other does, too."""
    code, expected = LIBRARIES[library]
    assert full.value(code) == expected


def test_compilers(full: Sandbox) -> None:
    """C with Python's headers, C++ and make are there."""
    version, words = full.shell(COMPILES).split()
    assert version.startswith("3.11.")
    assert words == "C++"


def test_fonts(full: Sandbox) -> None:
    """Plots can ask for all of Noto's CJK fonts by name."""
    code = "import matplotlib.pyplot as plt\nplt.title('销售额 売上 매출', fontname='Noto Sans CJK JP')\nplt.show()"
    cell = full.execute(code)
    assert (cell["stderr"], cell["error"]) == ("", None)
    assert "image/png" in cell["results"][0]["data"]
