"""What people really run, on a real kernel: the answer tells what a notebook would show, and how it truly ended."""

import asyncio
import json
from typing import Any

import pytest
import requests

from tests.fakes import Service


def texts(cell: dict[str, Any]) -> list[str]:
    return [each["data"].get("text/plain", "") for each in cell["results"]]


# -- output that is cleared, pages


@pytest.mark.parametrize(
    ("code", "stdout", "results"),
    [
        ("for k in range(3):\n    clear_output(wait=True); print(k); display(k)", "2\n", ["2"]),
        ("for k in range(3):\n    print(k); display(k); clear_output()", "", []),
        ("print(1); clear_output(wait=True)", "1\n", []),
        ("h = display('a', display_id='x'); clear_output(); h.update('b'); 7", "", ["7"]),
        ("h = display('a', display_id='x'); h.update('b'); display('c', display_id='x'); None", "", ["'c'", "'c'"]),
    ],
)
async def test_clear_output(real: Service, real_box: str, code: str, stdout: str, results: list[str]) -> None:
    """An answer holds what the cell's notebook would show."""
    cell = await real.execute(real_box, f"from IPython.display import clear_output, display\n{code}")
    assert (cell["stdout"], texts(cell), cell["truncated"], cell["error"]) == (stdout, results, None, None)


@pytest.mark.parametrize("code", ["len?", "?len", "%pinfo len", "len??", "import json\njson.dumps?"])
async def test_help(real: Service, real_box: str, code: str) -> None:
    """Help is a display, on both ways to get an answer."""
    cell = await real.execute(real_box, code)
    assert any("Docstring" in text or "Signature" in text for text in texts(cell)), cell
    answer = await real.call(
        "POST", f"/sandboxes/{real_box}/execute", {"code": code}, headers={"Accept": "application/x-ndjson"}
    )
    kinds = [json.loads(line)["type"] for line in answer.body.splitlines()]
    assert (kinds.count("display"), kinds[-1]) == (1, "end")


async def test_proposed_cells(real: Service, real_box: str) -> None:
    """The cell that `%load` and others propose is shown, because there is no input field to put it into."""
    await real.execute(real_box, "open('a.py', 'w').write('x = 1')")
    assert texts(await real.execute(real_box, "%load a.py")) == ["# %load a.py\nx = 1"]
    await real.execute(real_box, "y = 2")
    assert len(texts(await real.execute(real_box, "%recall -l 1"))) == 1
    assert texts(await real.execute(real_box, "get_ipython().set_next_input('z = 3')")) == ["z = 3"]


# -- line ends


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\x1c", "\x0b", "\r"])
async def test_line_ends_that_are_none(real: Service, real_box: str, character: str) -> None:
    """The readers of common clients take every event for one line."""
    url, key = f"{real.url}/sandboxes/{real_box}/execute", f"Bearer {real.key}"
    code = f"print('one' + {character!r} + 'two')\n{{'a': 'one' + {character!r} + 'two'}}"

    def read(accept: str) -> list[str]:
        headers = {"Authorization": key, "Accept": accept}
        with requests.post(url, json={"code": code}, headers=headers, stream=True, timeout=30) as answer:
            answer.encoding = "utf-8"
            return [line.removeprefix("data: ") for line in answer.iter_lines(decode_unicode=True) if line]

    for accept in ("application/x-ndjson", "text/event-stream"):
        lines = await asyncio.to_thread(read, accept)
        found = [json.loads(line) for line in lines if not line.startswith("id: ")]
        assert "".join(each["text"] for each in found if each["type"] == "stdout") == f"one{character}two\n"
        assert found[-1]["type"] == "end"


async def test_line_ends_in_data_of_the_kernel(real: Service, real_box: str) -> None:
    """JSON that the kernel has laid out over lines stays one line."""
    code = """
kernel, sent = get_ipython().kernel, get_ipython().kernel.session.pack
kernel.session.pack = lambda value: __import__("json").dumps(value, indent=2, default=str).encode()
display({"text/plain": "laid out"}, raw=True)
kernel.session.pack = sent
"""
    headers = {"Accept": "application/x-ndjson"}
    answer = await real.call("POST", f"/sandboxes/{real_box}/execute", {"code": code}, headers=headers)
    events = [json.loads(line) for line in answer.body.splitlines()]
    assert [each["data"] for each in events if each["type"] == "display"] == [{"text/plain": "laid out"}]


# -- the truth is in the reply


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("raise ExceptionGroup('g', [ValueError(1)])", "ExceptionGroup"),
        ("raise BaseExceptionGroup('g', [KeyboardInterrupt()])", "BaseExceptionGroup"),
        ("import asyncio\nasync with asyncio.TaskGroup() as g:\n    g.create_task(asyncio.sleep(-1, 1/0))", None),
        (
            "import asyncio\nasync def f(): 1/0\nasync with asyncio.TaskGroup() as g:\n    g.create_task(f())",
            "ExceptionGroup",
        ),
        ("%nosuch", "UsageError"),
        ("%%sql\nSELECT 1", "UsageError"),
        ("%matplotlib nosuch", None),
        ("raise SystemExit(3)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def broken(:", "SyntaxError"),
        ("%run nosuch.py", None),
    ],
)
async def test_failures_that_only_the_reply_tells(real: Service, real_box: str, code: str, name: str | None) -> None:
    """Every cell that failed has one error with the name of its exception; so has its stream."""
    cell = await real.execute(real_box, code)
    assert cell["error"] is not None
    assert name in (None, cell["error"]["name"])
    headers = {"Accept": "application/x-ndjson"}
    answer = await real.call("POST", f"/sandboxes/{real_box}/execute", {"code": code}, headers=headers)
    errors = [json.loads(line) for line in answer.body.splitlines() if json.loads(line)["type"] == "error"]
    assert [each["error"]["name"] for each in errors] == [cell["error"]["name"]]
