"""A cell's events as one text for a model: what is left of them, in which order, and within which limits."""

import base64
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_gateway.kernel.events import CellError, StreamEvent
from kernel_gateway.kernel.shape import ERROR_LIMIT, TABLE, Shaped, shape

LIMIT = 8000


def out(text: str, stream: str = "stdout") -> StreamEvent:
    return StreamEvent(stream, text=text)


def rich(kind: str = "result", **data: object) -> StreamEvent:
    bundle = {name.replace("__", "+").replace("_", "/"): value for name, value in data.items()}
    return StreamEvent(kind, data=msgspec.Raw(msgspec.json.encode(bundle)))


def failed(name: str, value: str, *traceback: str, code: str | None = None, kept: bool | None = None) -> StreamEvent:
    return StreamEvent("error", error=CellError(name, value, list(traceback), code, kept))


def text(*events: StreamEvent, limit: int = LIMIT) -> str:
    return shape(events, limit).text


pieces = st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.text("abc \n\r\b\t\x1b[0mKü", max_size=60)))


@given(pieces, st.integers(200, 600))
def test_a_text_never_exceeds_its_limit(printed: list[tuple[str, str]], limit: int) -> None:
    """Whatever is printed, and in whichever pieces."""
    assert len(shape([out(piece * 7, stream) for stream, piece in printed], limit).text) <= limit


@given(st.text("abcdefgh\n\r\b", max_size=4000), st.integers(200, 600))
def test_a_text_that_was_made_stays_as_it_is(printed: str, limit: int) -> None:
    """Shaping is idempotent."""
    once = text(out(printed), limit=limit)
    assert text(out(once), limit=limit) == once


@given(st.text("ab\n\r\b\x1b[2K0m", max_size=300), st.lists(st.integers(0, 300), max_size=9))
def test_the_pieces_do_not_matter(printed: str, cuts: list[int]) -> None:
    """The same output gives the same text, wherever it is cut."""
    at = [0, *sorted(cuts), len(printed)]
    assert text(*(out(printed[a:b]) for a, b in pairwise(at))) == text(out(printed))


@given(st.lists(st.text("abcdef", min_size=1, max_size=40), min_size=1, max_size=200), st.integers(200, 600))
def test_the_last_line_is_kept(lines: list[str], limit: int) -> None:
    """A result is at the end, so the last line is there whatever is left out."""
    assert text(out("\n".join([*lines, "the last line"])), limit=limit).endswith("the last line")


def test_many_lines_have_a_beginning_and_an_end() -> None:
    """Of what is left out the number is told, and where it is only if somebody says so."""
    made: Shaped = shape([out("".join(f"line {n}\n" for n in range(200_000)))], LIMIT)
    first, *_, last = made.text.split("\n")
    assert (first, last) == ("line 0", "line 199999")
    assert len(made.text) <= LIMIT
    marker = next(line for line in made.text.split("\n") if line.startswith("[…"))
    assert marker == f"[… {made.omitted:,} lines, 2.3 MB left out …]"
    assert made.text.index(marker) < LIMIT / 2  # the end has more


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("".join(f"\r{n:3}%|{'#' * (n // 10)}" for n in range(1001)), "1000%|" + "#" * 100),
        ("abc\b\bX\n", "aXc"),
        ("\x1b[31mred\x1b[0m \x1b]8;;http://a\x07link\x1b]8;;\x07", "red link"),
        ("old text\r\x1b[2Knew\n", "new"),
        ("old text\rnew\x1b[K\n", "new"),
        ("a\0b\x07c\x7fd", "abcd"),
        ("one\r\ntwo\r\n", "one\ntwo"),
        ("same\n" * 5000, "same [x 5000]"),
        ("twice\n" * 2, "twice\ntwice"),
        ("a\n\n\n\n\nb", "a\n\nb"),
        ("x" * 50_011, "x" * 1200 + "[… 48,411 characters …]" + "x" * 400),
        ("x" * 200_000 + "end", "x" * 1200 + "[… 198,403 characters …]" + "x" * 397 + "end"),
    ],
)
def test_lines_are_what_a_terminal_shows(printed: str, shown: str) -> None:
    """Progress bars are one line, colours are gone, and equal and long lines are shortened."""
    assert text(out(printed)) == shown


def test_a_progress_bar_beside_prints() -> None:
    """Each stream has its own line, so a bar stays one."""
    events = [each for n in range(50) for each in (out(f"\rat {n}", "stderr"), out(f"step {n}\n"))]
    lines = text(*events).split("\n")
    assert (lines[0], lines[-2], lines[-1], len(lines)) == ("step 0", "step 49", "at 49", 51)


def test_rich_output_in_order() -> None:
    """Results come where they came, images as their names, HTML never."""
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (1024).to_bytes(4) + (320).to_bytes(4) + bytes(9))
    html = rich(text_html="<b>no</b>", text_plain="<IPython.core.display.HTML object>")
    made = shape(
        [out("before\n"), rich("display", image_png=png.decode(), text_plain="<Figure>"), html,
         rich("display", image_svg__xml="<svg/>"), out("after"), rich(text_plain="{'a': 1}", text_html="<p>")],
        LIMIT,
    )  # fmt: skip
    assert made.text == "before\n[image 1: 1024x320 PNG]\n[text/html]\n[image 2: 8 B SVG]\nafter\n{'a': 1}"
    assert [(image.number, image.mime, image.data) for image in made.images] == [(1, "image/png", png.decode())]


def test_clears_and_updates() -> None:
    """A text has what a notebook would show in the end."""
    clear = StreamEvent("clear", wait=True)
    update = StreamEvent("update", displayId="d", data=msgspec.Raw(b'{"text/plain":"100 %"}'))
    assert text(out("1\n"), clear, out("2\n"), clear, out("3\n"), update) == "3\n100 %"


def test_a_table_has_its_shape_and_tabs() -> None:
    """A data frame is its first and last rows. A table that is none is passed over."""
    table = {
        "kind": "DataFrame", "shape": [1000, 2],
        "columns": [{"name": "a", "dtype": "int64"}, {"name": "b\n", "dtype": "str"}],
        "first": [["0", "1", "x"]], "last": [["999", "2", "y"]],
    }  # fmt: skip
    bundle = {TABLE: table, "text/plain": "   a b"}
    event = StreamEvent("result", data=msgspec.Raw(msgspec.json.encode(bundle)))
    assert text(event) == "DataFrame 1000 x 2\n\ta\tb \n\tint64\tstr\n0\t1\tx\n…\n999\t2\ty"
    for wrong in ({**table, "shape": "x"}, {**table, "first": [["x" * 20_000]]}, [], {**table, "columns": None}):
        bundle = {TABLE: wrong, "text/plain": "   a b"}
        assert text(StreamEvent("result", data=msgspec.Raw(msgspec.json.encode(bundle)))) == "   a b"


def test_what_the_server_says_of_a_cell() -> None:
    """A lost kernel is told first, a timeout last."""
    restarted = StreamEvent("status", state="restarted", reason="the kernel was ended because of memory")
    told = "[the kernel was restarted (ended because of memory): variables are lost, files are kept]"
    assert text(out("1"), restarted) == f"{told}\n1"
    lost = failed("KernelRestarted", "the kernel exited with status 3", code="kernel_restarted", kept=False)
    assert text(out("1\n"), lost).startswith("[the kernel was restarted (exited with status 3): variables")
    timeout = failed("ExecTimeout", "the cell was stopped after 2.5 s; variables", code="exec_timeout", kept=True)
    assert text(out("1"), timeout) == "1\n[stopped after 2.5 s; variables are kept]"


def test_late_output_says_whose_it_is() -> None:
    """What an earlier cell goes on to print is not taken for this cell's."""
    late = StreamEvent("stdout", text="tick\n", late=True, executionCount=3)
    assert text(out("a\n"), late, late, out("b")) == "a\n[cell 3 goes on:]\ntick\ntick\n[this cell:]\nb"


DEEP = """\x1b[31m---------------------------------------------------------------------------\x1b[0m
KeyError                                  Traceback (most recent call last)
File /opt/venv/lib/python3.11/site-packages/pandas/core/indexes/base.py:3812, in Index.get_loc(self, key)
   3811 try:
-> 3812     return self._engine.get_loc(casted_key)
   3813 except KeyError as err:

KeyError: 'b'

The above exception was the direct cause of the following exception:

KeyError                                  Traceback (most recent call last)
Cell In[7], line 3
      1 import pandas as pd
      2 df = pd.DataFrame({'a': [1]})
----> 3 df['b']

File /opt/venv/lib/python3.11/site-packages/pandas/core/indexes/base.py:3812, in Index.get_loc(self, key)
-> 3812         raise KeyError(key) from err

KeyError: 'b'"""


def test_errors_are_in_the_cells_own_words() -> None:
    """An exception is its text, the cell's line, and the innermost place outside of the cell."""
    made = text(failed("KeyError", "'b'", *DEEP.split("\n")))
    assert made == "KeyError: 'b'\ncell line 3: df['b']\npandas/core/indexes/base.py:3812 get_loc"
    syntax = failed("SyntaxError", "invalid syntax (1.py, line 1)", "  Cell In[1], line 1\n    x = = 3\n        ^\n")
    assert text(syntax) == "SyntaxError: invalid syntax (1.py, line 1)\ncell line 1: x = = 3"
    assert text(failed("Weird", "")) == "Weird"
    assert len(text(failed("E", "v" * 100_000, "x" * 10_000_000))) <= ERROR_LIMIT


def test_chained_errors_are_a_line_each() -> None:
    """The nearest causes and the first one are told, within the limit."""
    head = "ValueError   Traceback (most recent call last)\nCell In[1], line 1\n----> 1 f()\n"
    link = "\nDuring handling of the above exception, another exception occurred:\n\n"
    chain = link.join(f"{head}\nValueError: number {n} {'x' * 60}" for n in range(64))
    made = text(failed("ValueError", "number 63", *chain.split("\n")))
    assert len(made) <= ERROR_LIMIT
    assert "because of ValueError: number 62 " in made
    assert "because of ValueError: number 0 " in made
    assert "exceptions …]" in made
