"""Cells that are stopped keep their variables, and errors are told in good time, however deep they are."""

import asyncio
import re
import time
from typing import Any

import pytest

from guest_agent import wire
from tests.fakes import Service, Stream, eventually


def plain(cell: dict[str, Any]) -> str:
    """An error's traceback without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(cell["error"]["traceback"]))


async def stopped(real: Service, box: str, code: str) -> dict[str, Any]:
    """The answer of a cell that is stopped at its timeout, whose variables must be there after it."""
    await real.execute(box, "import asyncio, time; keep = 1")
    started = time.monotonic()
    cell: dict[str, Any] = await real.execute(box, code, timeout=0.5)
    assert time.monotonic() - started < 10
    assert (await real.execute(box, "keep"))["results"][0]["data"]["text/plain"] == "1"
    return cell


@pytest.mark.parametrize(
    "code",
    [
        "await asyncio.sleep(60)",
        "await asyncio.gather(asyncio.sleep(60), asyncio.sleep(60))",
        "async with asyncio.TaskGroup() as g:\n    g.create_task(asyncio.sleep(60))",
        "async def ticks():\n    while True:\n        yield await asyncio.sleep(0.01)\nasync for _ in ticks(): pass",
        "await asyncio.to_thread(time.sleep, 3)",
        "await asyncio.wait_for(asyncio.Event().wait(), 60)",
        "while True:\n    try:\n        await asyncio.sleep(60)\n    except Exception:\n        pass",
        "r, w = await asyncio.open_connection(*s.getsockname())\nawait r.read()",
    ],
)
async def test_cells_that_await(real: Service, real_box: str, code: str) -> None:
    """A cell that awaits, whatever it awaits, is stopped like any other."""
    await real.execute(real_box, "import socket; s = socket.create_server(('127.0.0.1', 0))")
    cell = await stopped(real, real_box, code)
    assert (cell["error"]["code"], cell["error"]["stateKept"], cell["outcome"]) == ("exec_timeout", True, "finished")


@pytest.mark.parametrize(
    "code",
    [
        "await asyncio.sleep(0)\ntime.sleep(60)",
        "await asyncio.sleep(0)\nwhile True: pass",
        "async def f(): time.sleep(60)\nawait f()",
        "async def f(): time.sleep(60)\nawait asyncio.gather(f(), f())",
        "async def f(): time.sleep(60)\nawait asyncio.create_task(f())",
    ],
)
async def test_code_that_blocks_in_a_cell_that_awaits(real: Service, real_box: str, code: str) -> None:
    """Code that does not return to the loop is interrupted where it is, also in a task of the user's."""
    cell = await stopped(real, real_box, code)
    assert (cell["error"]["code"], cell["error"]["stateKept"], cell["outcome"]) == ("exec_timeout", True, "finished")


@pytest.mark.parametrize(
    "code",
    [
        "import subprocess; subprocess.run(['sleep', '60'])",
        "import queue; queue.Queue().get()",
        "import threading; threading.Event().wait()",
        "import socket; s = socket.create_server(('127.0.0.1', 0)); s.accept()",
        "import concurrent.futures as c\nwith c.ThreadPoolExecutor() as p: p.submit(time.sleep, 0.7).result()",
        "import multiprocessing as m\nwith m.Pool(2) as p: p.map(time.sleep, [60, 60])",
    ],
)
async def test_library_code_that_blocks(real: Service, real_box: str, code: str) -> None:
    """Code that waits in a library is stopped there."""
    cell = await stopped(real, real_box, code)
    assert (cell["error"]["code"], cell["error"]["stateKept"], cell["outcome"]) == ("exec_timeout", True, "finished")


@pytest.mark.parametrize(
    "code", ["await asyncio.sleep(0)\ntime.sleep(60)", "await asyncio.sleep(60)", "time.sleep(60)"]
)
async def test_interrupts_in_quick_succession(real: Service, real_box: str, code: str) -> None:
    """However many interrupts come, and whenever, they stop the cell and leave the kernel."""
    await real.execute(real_box, "import asyncio, time; keep = 1")
    kernel = real.sandboxes.get(real.owner, real_box).guest.kernel
    for pause in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1):
        running = asyncio.create_task(real.execute(real_box, code))
        await eventually(lambda: kernel.state == "busy")
        for _ in range(5):
            await kernel.interrupt()
            await asyncio.sleep(pause)
        cell = await running
        assert (cell["error"]["name"], cell["outcome"]) in [
            ("KeyboardInterrupt", "finished"),
            ("CancelledError", "finished"),
        ]
        assert (await real.execute(real_box, "keep"))["results"][0]["data"]["text/plain"] == "1"


async def test_a_traceback_that_takes_long(real: Service, real_box: str) -> None:
    """The grace of a cell counts until its code has stopped. A traceback that takes a second more costs nothing."""
    slow = """
shell, render = get_ipython(), get_ipython().InteractiveTB.structured_traceback
def slow(*args, **options):
    shell.InteractiveTB.structured_traceback = render
    time.sleep(1.5)
    return render(*args, **options)
shell.InteractiveTB.structured_traceback = slow
time.sleep(60)
"""
    cell = await stopped(real, real_box, slow)
    assert (cell["error"]["code"], cell["error"]["stateKept"], cell["outcome"]) == ("exec_timeout", True, "finished")


async def test_a_cell_that_goes_on_after_the_interrupt(real: Service, real_box: str) -> None:
    """Code that swallows the interrupt has not stopped, so its kernel is replaced within the grace."""
    code = "import time\nwhile True:\n    try: time.sleep(60)\n    except BaseException: pass"
    started = time.monotonic()
    cell = await real.execute(real_box, code, timeout=0.5)
    assert (cell["error"]["code"], cell["error"]["stateKept"]) == ("exec_timeout", False)
    assert time.monotonic() - started < 4


# -- tracebacks


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("def even(n): return odd(n + 1)\ndef odd(n): return even(n + 1)\neven(0)", "RecursionError"),
        ("class A:\n    def __getattr__(self, name): return getattr(self, name + 'x')\nA().y", "RecursionError"),
        ("import sys; sys.setrecursionlimit(20000)\ndef g(n): return 1 / n if n == 0 else g(n - 1)\ng(9000)", None),
    ],
)
async def test_deep_tracebacks(real: Service, real_box: str, code: str, name: str | None) -> None:
    """The error of a deep recursion comes soon, is short, and says what was left out."""
    started = time.monotonic()
    cell = await real.execute(real_box, code)
    assert time.monotonic() - started < 5
    assert cell["error"]["name"] == (name or "ZeroDivisionError")
    assert "frames are left out" in plain(cell)
    assert len(plain(cell)) < 20_000


async def test_a_traceback_shows_the_code(real: Service, real_box: str) -> None:
    """A traceback has the cell, the file, the line with an arrow, the function's name and the lines around it."""
    module = (
        "def outer(x):\n    y = x\n    return inner(y)\n\n\ndef inner(value, *rest, **more):\n    return 1 / value\n"
    )
    await real.execute(real_box, f"open('module.py', 'w').write({module!r})")
    text = plain(await real.execute(real_box, "import module\nx = 0\nmodule.outer(x)"))
    assert re.search(r"Cell In\[\d+\], line 3\n +1 import module\n +2 x = 0\n-+> 3 module.outer\(x\)\n", text)
    assert re.search(r"File ~/module.py:3, in outer\(x\)\n", text)
    assert re.search(r"File ~/module.py:7, in inner\(value, \*rest, \*\*more\)\n", text)
    assert re.search(r"\n-+> 7 +return 1 / value\n", text)
    assert text.endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("eval('1/0')", ["File <string>:1", "ZeroDivisionError"]),
        ("exec(compile('x = 1\\n1/0', '/nosuch.py', 'exec'))", ["/nosuch.py:2", "ZeroDivisionError"]),
        ("try:\n    1/0\nexcept Exception as e:\n    raise KeyError('k') from e", ["direct cause", "line 4"]),
        ("try:\n    1/0\nexcept Exception:\n    {}['k']", ["During handling", "line 2", "line 4"]),
        ("[1/x for x in [0]]", ["<listcomp>", "ZeroDivisionError"]),
        ("def f(:", ["SyntaxError", "line 1"]),
        ("import json; json.loads('{')", ["json/decoder.py", "JSONDecodeError"]),
        ("%xmode Verbose\nz = 0\n1/z", ["z = 0", "ZeroDivisionError"]),
        ("%xmode Plain\n1/0", ["ZeroDivisionError"]),
        (
            "%xmode Context\ndef f():\n    __tracebackhide__ = True\n    g()\ndef g(): 1/0\nf()",
            ["skipping hidden", "g()"],
        ),
    ],
)
async def test_tracebacks_of_all_kinds(real: Service, real_box: str, code: str, parts: list[str]) -> None:
    """Code without a file, chains, comprehensions and IPython's other modes have their tracebacks."""
    if code.startswith("%xmode"):
        mode, _, code = code.partition("\n")
        await real.execute(real_box, mode)
    text = plain(await real.execute(real_box, code))
    assert [part for part in parts if part not in text] == [], text


async def test_an_edited_file_is_shown_as_it_is(real: Service, real_box: str) -> None:
    """A traceback shows the lines of the file as it is now."""
    code = "import importlib, sys\nsys.dont_write_bytecode = True\nimport changing\nimportlib.reload(changing)"
    for text in ("x = 1/0  # first", "# longer than before\nx = 1/0  # second"):
        await real.execute(real_box, f"open('changing.py', 'w').write({text!r})")
        cell = await real.execute(real_box, code)
        assert text.rpartition("# ")[2] in plain(cell)


async def test_a_guest_that_does_not_say_whether_a_cell_has_stopped(service: Service, box: str) -> None:
    """An agent that says nothing, or that every cell has stopped, holds the answer up for a bounded time."""

    async def silent(stream: Stream, body: wire.GetStopped) -> None:
        await asyncio.sleep(60)

    async def lying(stream: Stream, body: wire.GetStopped) -> None:
        await stream.reply(wire.Stopped(is_stopped=True))

    service.guest(box).kernel.ignores_interrupts = True
    for handler, limit in ((silent, 3), (lying, 10)):
        service.guest(box).script.handlers[wire.GetStopped] = handler
        started = time.monotonic()
        cell = await service.execute(box, "time.sleep(60)", timeout=0.5)
        assert (cell["error"]["code"], cell["error"]["stateKept"]) == ("exec_timeout", False)
        assert time.monotonic() - started < limit
