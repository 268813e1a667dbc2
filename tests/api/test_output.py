"""What child processes, C libraries and threads print reaches the right answer, undamaged and in time."""

import asyncio
import json
from typing import Any

import pytest

from kernel_gateway.kernel.journal import Record
from tests.fakes import Service, eventually

WIDE = "日本語テキスト"


@pytest.mark.parametrize(
    "run",
    [
        "import subprocess; _ = subprocess.run(['cat', 'u.txt'])",
        "import os; _ = os.system('cat u.txt')",
        "import os; _ = os.write(1, open('u.txt', 'rb').read())",
        "import ctypes; c = ctypes.CDLL(None); t = open('u.txt', 'rb').read(); _ = c.write(1, t, len(t))",
        "import subprocess; _ = subprocess.run(['dd', 'if=u.txt', 'bs=1', 'count=4200', 'status=none'])",
        "import subprocess; _ = subprocess.run('cat u.txt >&2', shell=True)",
    ],
)
@pytest.mark.parametrize("text", [WIDE, "Привет, мир! ", "🙂é"])
async def test_characters_of_children(real: Service, real_box: str, run: str, text: str) -> None:
    """Characters that two reads of a pipe share are whole."""
    count = 200 if "bs=1" in run else 3000
    await real.execute(real_box, f"open('u.txt', 'w').write({text!r} * {count})")
    cell = await real.execute(real_box, run)
    printed = cell["stderr" if ">&2" in run else "stdout"]
    whole = (text * count).encode()[: 4200 if "bs=1" in run else None].decode(errors="ignore")
    assert (len(printed), "\ufffd" in printed) == (len(whole), False)
    assert printed == whole


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("import subprocess; _ = subprocess.run(['echo', 'LAST'])", "LAST\n"),
        ("import os; _ = os.system('echo LAST')", "LAST\n"),
        ("import ctypes; c = ctypes.CDLL(None); _ = c.printf(b'LAST'), c.fflush(None)", "LAST"),
        ("import subprocess; _ = subprocess.run('seq 20000; echo LAST', shell=True)", "LAST\n"),
        ("import os\npid = os.fork()\nif not pid: os.write(1, b'LAST'), os._exit(0)\n_ = os.waitpid(pid, 0)", "LAST"),
    ],
)
async def test_last_words_of_children(real: Service, real_box: str, code: str, printed: str) -> None:
    """What was written before the end of a cell is in its answer, every time."""
    for _ in range(15):
        cell = await real.execute(real_box, code)
        assert cell["stdout"].endswith(printed), cell
        assert cell["error"] is None


async def test_last_words_on_stderr(real: Service, real_box: str) -> None:
    """The same holds for the error stream, and for a cell that fails."""
    for _ in range(15):
        cell = await real.execute(real_box, "import os; _ = os.system('echo LAST >&2'); 1/0")
        assert cell["stderr"] == "LAST\n"


@pytest.mark.parametrize(
    "speak",
    [
        "subprocess.run(['echo', 'child'])",
        "os.system('echo child')",
        "os.write(1, b'child\\n')",
        "c.printf(b'child\\n'), c.fflush(None)",
        "subprocess.run(['echo', 'child']), signal.raise_signal(signal.SIGUSR1)",
    ],
)
async def test_children_speak_in_their_turn(real: Service, real_box: str, speak: str) -> None:
    """What a child has printed comes before what the cell prints, shows and gives after it."""
    imports = "import ctypes, os, signal, subprocess; c = ctypes.CDLL(None)\n"
    imports += "_ = signal.signal(signal.SIGUSR1, lambda *_: print('signal'))\n"
    code = f"{imports}for n in range(20):\n    print(n)\n    _ = {speak}\n    print('then')\n_ = {speak}\ndisplay(7)"
    said = "child\nsignal\n" if "raise" in speak else "child\n"
    answer = await real.call(
        "POST", f"/sandboxes/{real_box}/execute", {"code": code}, headers={"Accept": "application/x-ndjson"}
    )
    events = [json.loads(line) for line in answer.body.splitlines()]
    at = next(at for at, event in enumerate(events) if event["type"] == "display")
    printed = "".join(event["text"] for event in events[:at] if event["type"] == "stdout")
    assert printed == "".join(f"{n}\n{said}then\n" for n in range(20)) + said


async def test_output_of_forks(real: Service, real_box: str) -> None:
    """A fork says its own words only, though its parent has output that is not sent yet."""
    code = """
import os
for n in range(20):
    print(f"parent {n}\\n", end="")  # in one piece, because a child's words may come between two
    os.write(1, b"child\\n")
    if not (pid := os.fork()):
        print(f"fork {n}\\n", end="", flush=True)
        os._exit(0)
    _ = os.waitpid(pid, 0)
"""
    cell = await real.execute(real_box, code)
    said = [f"{who} {n}" for who in ("parent", "fork") for n in range(20)] + ["child"] * 20
    assert (cell["error"], sorted(cell["stdout"].splitlines())) == (None, sorted(said))


async def test_bytes_that_are_no_text(real: Service, real_box: str) -> None:
    """Bytes that are no UTF-8 become U+FFFD, and the rest is as it was."""
    cell = await real.execute(real_box, r"import os; _ = os.write(1, b'a\xffb\xe6\x97c\n')")
    assert cell["stdout"] == "a\ufffdb\ufffdc\n"


@pytest.mark.alone  # the child takes a processor, and what reads it another
async def test_a_child_that_never_stops_printing(real: Service) -> None:
    """A cell ends although its child prints on, and the kernel works."""
    real_box = await real.create()
    body = {"code": "import subprocess; p = subprocess.Popen('yes', stdout=None); 5", "timeout": 60}
    cell = json.loads((await real.call("POST", f"/sandboxes/{real_box}/execute", body, timeout=90)).body)
    assert (cell["results"][0]["data"]["text/plain"], cell["error"]) == ("5", None)
    await real.execute(real_box, "p.kill(); _ = p.wait()")
    assert (await real.execute(real_box, "6"))["results"][0]["data"]["text/plain"] == "6"
    await real.call("DELETE", f"/sandboxes/{real_box}")


async def test_output_that_was_closed(real: Service, real_box: str) -> None:
    """A cell that closes the descriptor breaks its children's output alone. `print` works on."""
    await real.execute(real_box, "import os; copy = os.dup(1); os.close(1)")
    assert (await real.execute(real_box, "print('here')"))["stdout"] == "here\n"
    await real.call("POST", f"/api/kernels/{real.sandboxes.get(real.owner, real_box).kernel_id}/restart", {})
    assert (await real.execute(real_box, "import os; _ = os.system('echo back')"))["stdout"] == "back\n"


# -- argv


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("import sys; path = sys.argv[1] if len(sys.argv) > 1 else 'data.csv'; path", "'data.csv'"),
        (
            "import argparse; p = argparse.ArgumentParser(); p.add_argument('--n', default=3); p.parse_args().n",
            "3",
        ),
        ("import sys; sys.argv", "['']"),
        ("import sys; 'kernel_main' in ' '.join(sys.argv)", "False"),
        ("import getopt, sys; getopt.getopt(sys.argv[1:], 'a')", "([], [])"),
        (
            "import unittest\nclass T(unittest.TestCase):\n    def test(self): pass\n"
            "unittest.main(argv=[''], exit=False).result.testsRun",
            "1",
        ),
    ],
)
async def test_argv(real: Service, real_box: str, code: str, value: str) -> None:
    """Code that reads its arguments finds none, as in an interactive Python."""
    cell: dict[str, Any] = await real.execute(real_box, code)
    assert cell["error"] is None, cell
    assert cell["results"][0]["data"]["text/plain"] == value


async def test_unittest_main(real: Service, real_box: str) -> None:
    """`unittest.main()` runs the tests of the cells, and ends its own cell as it ends a script."""
    code = "import unittest\nclass T(unittest.TestCase):\n    def test(self): pass\nunittest.main()"
    cell = await real.execute(real_box, code)
    assert (cell["error"]["name"], "Ran 1 test" in cell["stderr"]) == ("SystemExit", True)


async def test_two_streams_in_one_cell(real: Service, real_box: str) -> None:
    """Output of Python and of children is told as events of the cell that it belongs to."""
    headers = {"Accept": "application/x-ndjson"}
    code = "import os\nprint('a')\n_ = os.system('echo b; echo c >&2')"
    answer = await real.call("POST", f"/sandboxes/{real_box}/execute", {"code": code}, headers=headers)
    events = [json.loads(line) for line in answer.body.splitlines()]
    assert len({each["id"] for each in events}) == 1
    texts = {name: "".join(e["text"] for e in events if e["type"] == name) for name in ("stdout", "stderr")}
    assert (sorted(texts["stdout"].split()), texts["stderr"]) == (["a", "b"], "c\n")


# -- output that comes late


THREAD = "import threading, time\ndef tell(after, text):\n    time.sleep(after)\n    print(text, flush=True)\n"


def parts_of(real: Service, box: str) -> bytes:
    """All that the kernel has said."""
    journal = real.sandboxes.get(real.owner, box).guest.kernel.journal
    after, found = 0, []
    while records := journal.read(after):
        after = records[-1].seq
        found += [part for record in records if isinstance(record, Record) for part in record.parts]
    return b"\n".join(found)


async def settled(real: Service, box: str, text: str) -> None:
    """Return when the journal has that text."""
    await eventually(lambda: text.encode() in parts_of(real, box))


async def test_late_output_goes_to_whoever_asks_next(real: Service, real_box: str) -> None:
    """What a thread prints after its cell ended is in the next answer, which says whose it is. It is told once."""
    await real.execute(real_box, THREAD)
    code = "threading.Thread(target=tell, args=(0.5, 'of a thread')).start()\nprint('now')"
    first = await real.execute(real_box, code)
    assert (first["stdout"], first["late"]) == ("now\n", [])
    await settled(real, real_box, "of a thread\\n")
    second = await real.execute(real_box, "print('mine')")
    assert second["stdout"] == "mine\n"
    assert [(each["executionCount"], each["stdout"]) for each in second["late"]] == [
        (first["executionCount"], "of a thread\n")
    ]
    assert (await real.execute(real_box, "1"))["late"] == []


async def test_late_output_of_children(real: Service, real_box: str) -> None:
    """So is what a child prints that the cell has left running, also when a completion comes between."""
    await real.execute(real_box, "import subprocess; p = subprocess.Popen('sleep 0.5; echo of a child', shell=True)")
    await settled(real, real_box, "of a child\\n")
    cell = await real.execute(real_box, "2")
    assert [each["stdout"] for each in cell["late"]] == ["of a child\n"]


async def test_late_displays_of_tasks(real: Service, real_box: str) -> None:
    """A task of asyncio that goes on displays and fails late."""
    code = """
import asyncio
from IPython.display import display
async def later():
    await asyncio.sleep(0.5)
    print('printed'); display('dis' + 'played')
task = asyncio.create_task(later())
"""
    await real.execute(real_box, code)
    await settled(real, real_box, "displayed")
    cell = await real.execute(real_box, "3")
    (late,) = cell["late"]
    assert (late["stdout"], [each["data"]["text/plain"] for each in late["results"]]) == ("printed\n", ["'displayed'"])


async def test_late_output_in_a_stream(real: Service, real_box: str) -> None:
    """Events of other cells are marked, and have the ids of their cells."""
    await real.execute(real_box, THREAD)
    path, headers = f"/sandboxes/{real_box}/execute", {"Accept": "application/x-ndjson"}
    code = {"code": "threading.Thread(target=tell, args=(0.3, 'streamed late')).start()"}
    first = await real.call("POST", path, code, headers={**headers, "Idempotency-Key": "whose"})
    await settled(real, real_box, "streamed late\\n")
    second = await real.call("POST", path, {"code": "print('own')"}, headers={**headers, "Idempotency-Key": "next"})
    events = [json.loads(line) for line in second.body.splitlines()]
    assert [(each["id"], each["text"]) for each in events if each.get("late")] == [("whose", "streamed late\n")]
    assert {each["id"] for each in events if not each.get("late")} == {"next"}
    again = await real.call("GET", f"/sandboxes/{real_box}/executions/next", headers=headers)
    assert again.body == second.body
    assert not any(json.loads(line).get("late") for line in first.body.splitlines())


async def test_cells_that_wait_share_no_late_output(real: Service, real_box: str) -> None:
    """Of many cells at once each piece of late output is told to one, also a piece that comes as a cell ends."""
    # One write, because a cell may end between the two writes of `print`. Its line end then has another cell's name.
    await real.execute(
        real_box, "import sys, threading, time\ndef tell(text): time.sleep(0.35); sys.stdout.write(text)"
    )
    code = "threading.Thread(target=tell, args=('piece {0}\\n',)).start(); time.sleep(0.1)"
    cells = [asyncio.create_task(real.execute(real_box, code.format(number))) for number in range(8)]
    answers = [await each for each in cells]
    for number in range(8):  # a process that was held up may wake its threads in any order
        await settled(real, real_box, f"piece {number}\\n")
    answers.append(await real.execute(real_box, "4"))
    told = [text for each in answers for text in [each["stdout"], *(late["stdout"] for late in each["late"])]]
    assert sorted("".join(told).splitlines()) == [f"piece {number}" for number in range(8)]


# -- kernels that end between cells


@pytest.mark.parametrize(
    "code",
    [
        "import threading, os; zz = 1; threading.Timer(0.3, os._exit, [3]).start()",
        "import subprocess, os; zz = 1; _ = subprocess.Popen(f'sleep 0.3; kill -9 {os.getpid()}', shell=True)",
        "import asyncio, os; zz = 1; asyncio.get_running_loop().call_later(0.3, os._exit, 3)",
    ],
)
async def test_a_kernel_that_ends_between_cells(real: Service, real_box: str, code: str) -> None:
    """The next cell runs, and is told that the kernel is another one and why. The one after it is not."""
    kernel = real.sandboxes.get(real.owner, real_box).guest.kernel
    assert (await real.execute(real_box, code))["restarted"] is None
    await eventually(lambda: kernel.state == "restarting")
    cell = await real.execute(real_box, "'zz' in dir()")
    assert (cell["results"][0]["data"]["text/plain"], cell["error"]) == ("False", None)
    assert "the kernel" in cell["restarted"]
    assert (await real.execute(real_box, "1"))["restarted"] is None


async def test_a_death_that_was_told_is_not_told_again(real: Service, real_box: str) -> None:
    """A cell that ends its kernel has an error. Neither the next cell nor one after a restart says it again."""
    assert (await real.execute(real_box, "import os; os._exit(1)"))["error"]["code"] == "kernel_restarted"
    assert (await real.execute(real_box, "1"))["restarted"] is None
    await real.call("POST", f"/api/kernels/{real.sandboxes.get(real.owner, real_box).kernel_id}/restart", {})
    assert (await real.execute(real_box, "1"))["restarted"] is None
