"""Answers that fit a model's context and come before its client gives up. Nothing runs twice, and nothing is lost."""

import asyncio
import json
from typing import Any

import pytest

from kernel_gateway.guest.answers import KEPT, WHOLE
from kernel_gateway.kernel.kernel import Kernel
from tests.fakes import Service, error_of, eventually


async def ask(real: Service, box: str, code: str, **fields: Any) -> dict[str, Any]:
    answer = await real.call("POST", f"/sandboxes/{box}/execute", {"code": code, **fields})
    assert answer.code == 200, answer.body
    return dict(json.loads(answer.body))


async def further(real: Service, box: str, execution: str, **query: Any) -> dict[str, Any]:
    words = "&".join(f"{name}={value}" for name, value in query.items())
    answer = await real.call("GET", f"/sandboxes/{box}/executions/{execution}?{words}")
    assert answer.code == 200, answer.body
    return dict(json.loads(answer.body))


def kernel_of(real: Service, box: str) -> Kernel:
    return real.sandboxes.get(real.owner, box).guest.kernel


async def test_nothing_changes_unasked(real: Service, real_box: str) -> None:
    """An answer without `wait` and `maxOutput` has the fields that it always had."""
    cell = await real.execute(real_box, "1")
    assert not {"id", "status", "next", "text", "outputFile"} & cell.keys()


async def test_an_answer_before_the_cells_end(real: Service, real_box: str) -> None:
    """After `wait` the answer has the output so far, and the rest comes once, in order, from the same run."""
    code = "import os, time\nopen('runs', 'a').write('x')\nfor n in range(40): print(n); time.sleep(0.05)"
    first = await ask(real, real_box, code, wait=0.5, maxOutput=1000)
    assert (first["status"], first["outcome"]) == ("running", "running")
    printed = first["stdout"]
    assert first["text"] + "\n" == printed
    assert printed.startswith("0\n")
    since, status = first["next"], "running"
    while status == "running":
        part = await further(real, real_box, first["id"], wait=0.5, since=since, maxOutput=1000)
        status, since = part["status"], part["result"]["next"]
        printed += part["result"]["stdout"]
    assert (status, printed) == ("finished", "".join(f"{n}\n" for n in range(40)))
    assert (await ask(real, real_box, "open('runs').read()", maxOutput=200))["text"] == "'x'"


async def test_a_cell_that_ends_in_time(real: Service, real_box: str) -> None:
    """An answer within `wait` is the whole cell."""
    cell = await ask(real, real_box, "print(1)\n2", wait=30, maxOutput=200)
    assert (cell["status"], cell["text"], cell["stdout"], cell["outputFile"]) == ("finished", "1\n2", "1\n", None)
    assert (await further(real, real_box, cell["id"]))["result"]["stdout"] == "1\n"


async def test_stopping_an_execution(real: Service, real_box: str) -> None:
    """DELETE interrupts a cell that runs, and one whose turn has not come never runs."""
    running = await ask(real, real_box, "import time; print('begun'); time.sleep(60)", wait=0.5)
    waiting = await ask(real, real_box, "open('never', 'w')", wait=0.1)
    for execution in (waiting, running, running):
        path = f"/sandboxes/{real_box}/executions/{execution['id']}"
        assert (await real.call("DELETE", path)).code == 204
    ended = await further(real, real_box, running["id"], wait=5, maxOutput=500)
    assert ended["result"]["error"]["name"] == "KeyboardInterrupt"
    assert ended["result"]["text"].startswith("begun\nKeyboardInterrupt")
    assert (await further(real, real_box, waiting["id"]))["status"] == "not_started"
    assert (await ask(real, real_box, "import os; os.path.exists('never')", maxOutput=200))["text"] == "False"
    unknown = await real.call("DELETE", f"/sandboxes/{real_box}/executions/nobody")
    assert (unknown.code, error_of(unknown)["error"]) == (404, "not_found")


async def test_a_client_that_hangs_up_has_stopped_nothing(real: Service, real_box: str) -> None:
    """With `wait` a cell goes on, as with an Idempotency-Key."""
    code = "import time\nfor n in range(20): time.sleep(0.05)\nopen('done', 'w').close()"
    request = asyncio.create_task(ask(real, real_box, code, wait=30))
    kernel = kernel_of(real, real_box)
    await eventually(lambda: kernel.state == "busy")
    request.cancel()
    assert (await ask(real, real_box, "import os; os.path.exists('done')", maxOutput=200))["text"] == "True"


async def test_much_output_is_in_a_file(real: Service, real_box: str) -> None:
    """The text has the beginning and the end, and the file has all of it. Code can read the file."""
    code = "for n in range(200_000): print('line', n)\n1 / 0"
    cell = await ask(real, real_box, code, maxOutput=8000, timeout=60)
    lines = cell["text"].split("\n")
    assert (lines[0], lines[-2:]) == ("line 0", ["ZeroDivisionError: division by zero", "cell line 2: 1 / 0"])
    assert len(cell["text"]) <= 8000
    assert f"all of it: {cell['outputFile']} …]" in cell["text"]
    read = await ask(
        real,
        real_box,
        f"text = open({cell['outputFile']!r}).read()\ntext[:7], text.count('\\nline '), 'Traceback' in text",
        maxOutput=500,
    )
    assert read["text"] == "('line 0\\n', 199999, True)"


async def test_files_of_output_are_bounded(real: Service, real_box: str) -> None:
    """A file has at most 8 MiB, and the newest files are kept."""
    for _ in range(KEPT + 2):
        last = await ask(real, real_box, "for n in range(99): print(n)", maxOutput=200)
    listing = f"import os; folder = os.path.dirname({last['outputFile']!r}); len(os.listdir(folder))"
    assert (await ask(real, real_box, listing, maxOutput=200))["text"] == str(KEPT)
    box = await real.create()
    large = await ask(real, box, "for n in range(1200): print('x' * 9999)", maxOutput=500)
    size = await ask(real, box, f"import os; os.path.getsize({large['outputFile']!r})", maxOutput=200)
    assert int(size["text"]) == WHOLE
    await real.call("DELETE", f"/sandboxes/{box}")  # and the file of its journal


async def test_output_that_cannot_be_stored(real: Service, real_box: str) -> None:
    """If the file can't be written, the text says so, and the answer comes all the same."""
    await real.execute(real_box, "import shutil, os; shutil.rmtree('.cellvm'); open('.cellvm', 'w').close()")
    cell = await ask(real, real_box, "for n in range(999): print(n)", maxOutput=500)
    assert cell["outputFile"] is None
    assert "it could not be stored: " in cell["text"]
    await real.execute(real_box, "os.remove('.cellvm')")


async def test_errors_and_bars_are_short(real: Service, real_box: str) -> None:
    """A real traceback, a chain of many, and a progress bar."""
    missing = await ask(real, real_box, "import json\n\njson.loads('{')", maxOutput=8000)
    place = "\ncell line 3: json.loads('{')\njson/decoder.py:"
    assert len(missing["text"]) <= 200
    assert missing["text"].startswith("JSONDecodeError: Expecting property name")
    assert place in missing["text"]
    nested = (
        "e = None\nfor n in range(64):\n    try: raise ValueError(n) from e\n    except ValueError as f: e = f\nraise e"
    )
    assert len((await ask(real, real_box, nested, maxOutput=8000))["text"]) <= 1500
    bar = "import sys\nfor n in range(1001): print(f'\\r{n / 10:.0f}%|' + '#' * (n // 100), end='', file=sys.stderr)"
    assert (await ask(real, real_box, bar, maxOutput=8000))["text"] == "100%|##########"


async def test_a_lost_kernel_is_told_first(real: Service, real_box: str) -> None:
    """The answer whose kernel ended says so in its first line, and so does the next one if nobody was told."""
    told = "[the kernel was restarted (exited with status 7): variables are lost, files are kept]"
    cell = await ask(real, real_box, "print('so far', flush=True); import os; os._exit(7)", maxOutput=500)
    assert cell["text"].split("\n")[0] == told
    assert cell["status"] == "unknown"
    kernel = kernel_of(real, real_box)
    before = kernel.incarnation
    await real.execute(real_box, "import os, threading; threading.Timer(0.2, lambda: os._exit(7)).start()")
    await eventually(lambda: kernel.incarnation > before)
    assert (await ask(real, real_box, "print(1)", maxOutput=500))["text"] == f"{told}\n1"


async def test_a_timeout_is_told_last(real: Service, real_box: str) -> None:
    """Text of a cell that was stopped ends with that, and says what is kept."""
    cell = await ask(real, real_box, "import time; print(1); time.sleep(9)", timeout=0.5, maxOutput=500)
    assert cell["text"] == "1\n[stopped after 0.5 s; variables are kept]"


@pytest.mark.parametrize("wrong", [{"wait": 0}, {"wait": 3601}, {"maxOutput": 199}, {"maxOutput": 1_000_001}])
async def test_limits_of_limits(real: Service, real_box: str, wrong: dict[str, Any]) -> None:
    """Values out of range are 400."""
    answer = await real.call("POST", f"/sandboxes/{real_box}/execute", {"code": "1", **wrong})
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")


async def test_streams_have_the_text_at_their_end(real: Service, real_box: str) -> None:
    """A stream tells the text with `end`, and takes no `wait`."""
    path, accept = f"/sandboxes/{real_box}/execute", {"Accept": "application/x-ndjson"}
    answer = await real.call("POST", path, {"code": "print(1)\n2", "maxOutput": 300}, headers=accept)
    end = json.loads(answer.body.splitlines()[-1])
    assert (end["type"], end["text"]) == ("end", "1\n2")
    refused = await real.call("POST", path, {"code": "ran = 1", "wait": 1}, headers=accept)
    assert (refused.code, error_of(refused)["error"]) == (400, "invalid_request")
    assert (await real.execute(real_box, "ran"))["error"]["name"] == "NameError"


LIBRARY = """
import sys, types

class Column(list):
    def slice(self, at, size): return Column(self[at:at + size])
    def to_list(self): return self

class DataFrame:
    shape, columns, dtypes = (1000, 40), [f'c{n}' for n in range(40)], ['Int64'] * 40
    def to_series(self, n):
        return Column(f'{row}-{n}' + {1: 'x' * 99, 2: '\\udc80'}.get(n, '') for row in range(1000))
    def __repr__(self): return 'a frame'

class Derived(DataFrame): pass

sys.modules['polars'] = types.ModuleType('polars')
sys.modules['polars'].DataFrame = DataFrame
"""
"""The part of polars that tables are read by. tests/guest/test_template.py has the libraries themselves."""


async def test_data_frames_are_tables(real: Service, real_box: str) -> None:
    """A frame comes with its first and last rows as data, which the text shows. Only the library's own type is read."""
    await real.execute(real_box, LIBRARY)
    cell = await ask(real, real_box, "DataFrame()", maxOutput=8000)
    table = cell["results"][0]["data"]["application/vnd.cellvm.table+json"]
    assert (table["shape"], len(table["columns"]), table["columns"][0]) == (
        [1000, 40],
        30,
        {"name": "c0", "dtype": "Int64"},
    )
    assert [row[0] for row in table["first"] + table["last"]] == ["0", "1", "2", "3", "4", "997", "998", "999"]
    assert {len(row) for row in table["first"]} == {31}
    assert table["last"][0][1:4] == ["997-0", "997-1" + "x" * 54 + "…", "997-2?"]
    assert cell["text"].split("\n")[0] == "DataFrame 1000 x 40"
    await real.execute(real_box, "DataFrame.dtypes = None  # as of a version that is not known")
    for other in ("Derived()", "DataFrame()", "[1, 2]"):
        assert list((await ask(real, real_box, other, maxOutput=8000))["results"][0]["data"]) == ["text/plain"]
    await real.execute(real_box, "del sys.modules['polars']")
