"""Events become the outputs of cells, and whatever they are, the notebook stays a valid one."""

import json
import warnings
from pathlib import Path
from typing import Any

import msgspec
import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_gateway.__main__ import main
from kernel_gateway.kernel.events import CellError, StreamEvent
from kernel_gateway.kernel.notebook import Notebook, NotebookError, Outputs, session_notebook
from tests.unit.test_jupyter import raw

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def out(text: str, name: str = "stdout") -> StreamEvent:
    return StreamEvent(name, text=text)


def shown(text: str, display_id: str | None = None, kind: str = "display", **fields: Any) -> StreamEvent:
    return StreamEvent(kind, data=raw({"text/plain": text}), displayId=display_id, **fields)


def outputs(*events: StreamEvent, limit: int = 10_000) -> list[dict[str, Any]]:
    cell = Outputs(limit)
    for event in events:
        cell.add(event)
    return plain(cell)


def plain(cell: Outputs) -> list[dict[str, Any]]:
    """What is written, with values in place of JSON text."""
    found: list[dict[str, Any]] = msgspec.json.decode(msgspec.json.encode(cell.written()))
    return found


def brief(written: list[dict[str, Any]]) -> list[str]:
    """Outputs in short: text, or the text of a bundle."""
    return [item["text"] if "text" in item else item["data"]["text/plain"] for item in written]


def session(*cells: list[StreamEvent]) -> Any:
    """The notebook of a session, read again."""
    return json.loads(session_notebook((f"cell {n}", n, events) for n, events in enumerate(cells, 1)))


def joined(cell: dict[str, Any]) -> list[str]:
    """`brief` of a cell in a file, where text is a list of lines."""
    return ["".join(item) for item in brief(cell["outputs"])]


def test_text_follows_text_of_its_stream() -> None:
    """Pieces of one stream are one output until something else comes between."""
    written = outputs(out("a"), out("b\n"), out("!", "stderr"), out("c"), shown("d"), out("e"), out("f"))
    assert brief(written) == ["ab\n", "!", "c", "d", "ef"]
    assert [item.get("name") for item in written] == ["stdout", "stderr", "stdout", None, "stdout"]


def test_results_errors_and_counts() -> None:
    """A result carries its number, an error its traceback, and the cell knows both."""
    cell = Outputs()
    error = CellError("ValueError", "no", ["line 1", "line 2"])
    for event in (
        StreamEvent("started", executionCount=7),
        shown("42", kind="result", metadata=raw({"k": 1}), executionCount=7),
        StreamEvent("error", error=error),
        StreamEvent("end", executionCount=7),
    ):
        cell.add(event)
    assert plain(cell) == [
        {"output_type": "execute_result", "execution_count": 7, "data": {"text/plain": "42"}, "metadata": {"k": 1}},
        {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": ["line 1", "line 2"]},
    ]
    assert (cell.execution_count, cell.error) == (7, error)


def test_clear() -> None:
    """A clear empties the cell at once, or with `wait` when the next output comes. Later output stays."""
    clear, wait = StreamEvent("clear", wait=False), StreamEvent("clear", wait=True)
    assert brief(outputs(out("a"), clear)) == []
    assert brief(outputs(out("a"), clear, out("b"))) == ["b"]
    assert brief(outputs(out("a"), wait)) == ["a"]
    assert brief(outputs(out("a"), wait, out("b"), out("c"))) == ["bc"]
    assert brief(outputs(out("a"), wait, shown("b"), out("c"))) == ["b", "c"]
    assert brief(outputs(out("a"), wait, clear, out("b"), out("c"))) == ["bc"]


def test_an_update_reaches_all_displays_of_its_id() -> None:
    """Displays change in the cell itself, in earlier ones, and several in one. Displays with other ids stay."""
    update = shown("new", "x", kind="update", metadata=raw({"m": 1}))
    book = session([shown("old", "x"), shown("other", "y")], [shown("old", "x"), shown("old", "x"), update, out("t")])
    assert [joined(cell) for cell in book["cells"]] == [["new", "other"], ["new", "new", "t"]]
    assert book["cells"][0]["outputs"][0]["metadata"] == {"m": 1}


def test_an_update_without_a_display() -> None:
    """An update without a display shows nothing, even if a clear removed the display. A due clear stays due."""
    update = shown("new", "x", kind="update")
    assert joined(session([update])["cells"][0]) == []
    assert joined(session([shown("a", "x"), StreamEvent("clear"), update])["cells"][0]) == []
    assert joined(session([shown("a", "x"), StreamEvent("clear", wait=True), update])["cells"][0]) == ["new"]


def test_updates_come_in_the_kernels_order() -> None:
    """The later number wins, because a thread of the first cell may update after the second cell did."""
    first = [shown("0", "x", seq=1), shown("3", "x", kind="update", seq=9)]
    second = [shown("2", "x", kind="update", seq=5)]
    assert joined(session(first, second)["cells"][0]) == ["3"]


def test_a_gap_is_told() -> None:
    """Where messages are missing, a line on stderr says how many."""
    written = outputs(out("a"), StreamEvent("gap", messages=12), out("b"))
    assert [item["name"] for item in written] == ["stdout", "stderr", "stdout"]
    assert "12 messages of output are missing" in written[1]["text"]


def test_a_cell_has_a_limit() -> None:
    """Output that does not fit is counted and told. A clear makes room. An update takes no more than there is."""
    written = outputs(*[out("x" * 100)] * 20, limit=1000)
    assert len(written[0]["text"]) < 1000
    assert f"{20 - len(written[0]['text']) // 100} messages of output are missing" in written[-1]["text"]
    assert brief(outputs(out("x" * 2000), StreamEvent("clear"), out("y"), limit=1000)) == ["y"]
    cell = Outputs(1000)
    cell.add(shown("small", "x"))
    cell.update(shown("x" * 2000, "x", kind="update"))
    assert brief(plain(cell))[0] == "small"
    for _ in range(100):
        cell.update(shown("y" * 500, "x", kind="update"))
    assert brief(plain(cell))[0] == "y" * 500


def test_small_things_count_too() -> None:
    """A million empty outputs are no way round the limit."""
    assert len(outputs(*[shown("")] * 1000, limit=10_000)) < 100


def test_bundles_are_as_the_format_wants_them() -> None:
    """JSON types keep their value. Everything else is text."""
    data = {"application/vnd.x+json": {"a": [1]}, "application/json": 1, "text/plain": 3, "image/png": None, "a": ["b"]}
    (written,) = outputs(StreamEvent("display", data=raw(data)))
    assert written["data"] == {**data, "text/plain": "3", "image/png": "null", "a": '["b"]'}


def test_session_notebook() -> None:
    """The notebook names its kernel and language, and each cell has its code, number and id."""
    events = [StreamEvent("started", executionCount=4), out("Grüße\n"), StreamEvent("end", executionCount=4)]
    content = session_notebook([("print('Grüße')", 4, events), ("1/0", None, [])])
    book = nbformat.reads(content.decode(), as_version=4)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    assert book.metadata.kernelspec.name == "python3"
    assert book.metadata.language_info.name == "python"
    assert [(cell.id, cell.source, cell.execution_count) for cell in book.cells] == [
        ("cell-1", "print('Grüße')", 4),
        ("cell-2", "1/0", None),
    ]
    assert "Grüße" in content.decode()
    assert content == session_notebook([("print('Grüße')", 4, events), ("1/0", None, [])])


def test_no_cells() -> None:
    """A session in which nothing ran is a notebook too."""
    nbformat.validate(session())


JSON = st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2)
EVENTS = st.builds(
    StreamEvent,
    st.sampled_from("started stdout stderr result display update clear error input_request status gap end".split()),
    seq=st.integers(0, 50),
    text=st.text(max_size=5),
    data=st.dictionaries(
        st.sampled_from(["text/plain", "application/json", "x", "", "image/png\n"]), JSON, max_size=3
    ).map(raw),
    metadata=st.none() | st.dictionaries(st.text(max_size=5), JSON, max_size=2).map(raw),
    displayId=st.sampled_from([None, "", "a", "b"]),
    error=st.builds(CellError, st.text(max_size=5), st.text(max_size=5), st.lists(st.text(max_size=5), max_size=3)),
    executionCount=st.sampled_from([None, -1, 0, 1, True]),
    wait=st.sampled_from([None, False, True]),
    messages=st.integers(0, 5),
)


@given(st.lists(st.tuples(st.text(max_size=5), st.sampled_from([None, 0, 3]), st.lists(EVENTS)), max_size=4))
def test_every_notebook_is_valid(cells: list[tuple[str, int | None, list[StreamEvent]]]) -> None:
    """Whatever a kernel says, the export is a notebook by the schema, with all the code."""
    book = nbformat.reads(session_notebook(cells).decode(), as_version=4)
    nbformat.validate(book)
    assert [cell.source for cell in book.cells] == [code for code, _, _ in cells]


def notebook(path: Path, *cells: dict[str, Any], **fields: Any) -> Path:
    """A file with these code cells."""
    node = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, **fields}
    code = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": ""}
    node["cells"] = [{"id": f"c{number}", **code, **cell} for number, cell in enumerate(cells)]
    path.write_text(json.dumps(node))
    return path


BAD = {
    "print(1)": "is not a notebook",
    "": "is not a notebook",
    "[]": "is not a notebook",
    "{}": "is not a notebook",
    '{"nbformat": "4"}': "is not a notebook",
    '{"nbformat": 4, "cells": null}': "is not a notebook",
    '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code"}]}': "is not a",
    '{"nbformat": 2}': "is not a",
    '{"nbformat": 5, "nbformat_minor": 1, "cells": []}': "notebook format 5.1; the newest that can be read is 4",
    '{"nbformat": 4, "nbformat_minor": 5, "cells": [], "metadata": {"language_info": {"name": "R"}}}': "notebook in R",
}


@pytest.mark.parametrize("content", BAD)
def test_what_is_no_notebook(content: str, tmp_path: Path) -> None:
    """The error names the file and says what is wrong with it."""
    path = tmp_path / "x.ipynb"
    path.write_text(content)
    with pytest.raises(NotebookError, match=BAD[content]) as error:
        Notebook.read(path)
    assert str(path) in str(error.value)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`cellvm nb run` ends with status 1 and one line, before it starts anything."""
    bad = tmp_path / "bad.ipynb"
    bad.write_text("print(1)")
    good = notebook(tmp_path / "good.ipynb")
    for arguments, text in {
        (str(tmp_path / "none.ipynb"),): "No such file",
        (str(bad),): "is not a notebook",
        (str(good), "-o", str(tmp_path / "none" / "x.ipynb")): "no folder",
    }.items():
        assert main(["nb", "run", *arguments]) == 1
        assert text in " ".join(capsys.readouterr().err.split())
    for limit in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(SystemExit):
            main(["nb", "run", str(good), "--timeout", limit])


def test_old_formats(tmp_path: Path) -> None:
    """Format 3 is converted. Format 4.5 without cell ids gets them, without a warning."""
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {"name": "x"}}
    old["worksheets"] = [{"cells": [{"cell_type": "code", "language": "python", "input": "1", "outputs": []}]}]
    path = tmp_path / "old.ipynb"
    path.write_text(json.dumps(old))
    assert [cell["source"] for cell in Notebook.read(path).cells] == ["1"]
    bare = notebook(tmp_path / "bare.ipynb", {"source": ["a\n", "b"]})
    bare.write_text(bare.read_text().replace('"id": "c0", ', ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (cell,) = Notebook.read(bare).cells
    assert cell["source"] == "a\nb"
    assert cell["id"]


def test_a_run_replaces_outputs_and_nothing_else(tmp_path: Path) -> None:
    """Old outputs are removed, even from cells that were not reached. Text, metadata and skipped cells stay."""
    stale = [{"output_type": "stream", "name": "stdout", "text": "stale"}]
    path = notebook(
        tmp_path / "x.ipynb",
        {"source": "1", "outputs": stale, "execution_count": 9, "metadata": {"mine": 1}},
        {"source": "2", "outputs": stale, "metadata": {"tags": ["skip-execution"]}},
        {"source": "3", "outputs": stale},
        metadata={"kernelspec": {"name": "my-env", "display_name": "Mine"}, "other": [1]},
    )
    book = Notebook.read(path)
    assert [cell["source"] for cell in book.cells] == ["1", "3"]
    book.add(0, StreamEvent("started", executionCount=1))
    book.add(0, out("fresh"))
    target = tmp_path / "y.ipynb"
    book.write(target)
    written = nbformat.read(target, as_version=4)
    assert [[item.text for item in cell.outputs] for cell in written.cells] == [["fresh"], ["stale"], []]
    assert [cell.execution_count for cell in written.cells] == [1, None, None]
    assert written.cells[0].metadata == {"mine": 1}
    assert written.metadata.kernelspec.name == "my-env"
    assert written.metadata.other == [1]
    assert written.metadata.language_info.name == "python"


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """The file's mode stays, a link stays a link, and nothing is left beside it."""
    path = notebook(tmp_path / "x.ipynb", {"source": "1"})
    path.chmod(0o640)
    link = tmp_path / "link.ipynb"
    link.symlink_to(path)
    Notebook.read(path).write(link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link.ipynb", "x.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_our_notebooks(path: Path) -> None:
    """Our notebooks are valid, in format 4.5, for Python, without outputs, explained in words, and check themselves."""
    book = json.loads(path.read_text())
    nbformat.validate(book)
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len(book["cells"]) - len(code) >= 4
    assert sum("assert " in "".join(cell["source"]) for cell in code) >= 3
    assert f"`{path.name}`" in (path.parent / "README.md").read_text()


def test_there_are_notebooks() -> None:
    """There are at least the five that the README names."""
    assert len(NOTEBOOKS) >= 5
