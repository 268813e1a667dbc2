"""Undo on a real machine: a sandbox goes back to what it was after any of its cells, again and again."""

import os
import time
from collections.abc import Callable

from tests.guest.client import Sandbox, Server, until

TRIES = int(os.environ.get("CELLVM_TRIES", "10"))
"""Tries from one checkpoint; the promise is tried with 50 of them."""
CELLS = (
    "import os, subprocess, threading, time\nx, names = 1, ['one']\nopen('kept', 'w').write('first')",
    "x += 1\nnames.append('two')\nopen('second', 'w').write('2')\nopen('/dev/shm/second', 'w').write('2')",
    "x += 1\nnames.clear()\nos.remove('second')\nos.remove('/dev/shm/second')\nopen('third', 'w').write('3')",
    "open('kept', 'w').write('fourth')\nworker = subprocess.Popen(['sleep', '1000'])",
    "del x\nos.mkdir('fifth')\nopen('fifth/file', 'w').write('5' * 1000000)",
)
LOOK = """
found = {"x": globals().get("x"), "names": names, "files": sorted(os.listdir()), "kept": open("kept").read(),
  "tmpfs": os.path.exists("/dev/shm/second"), "sleeps": os.popen("pgrep -cxf 'sleep 1000'").read().strip(),
  "pid": os.getpid(), "id": os.environ["E2B_SANDBOX_ID"]}
found
"""


def checkpoints(box: Sandbox) -> list[dict[str, object]]:
    """The checkpoints that are there."""
    entries = box.get("/timeline").json()["entries"]
    return [each for each in entries if each["type"] == "checkpoint" and each["state"] == "kept"]


def go_back(box: Sandbox, number: object) -> None:
    answer = box.post(f"/checkpoints/{number}/restore")
    assert answer.status_code == 204, answer.text


def test_back_to_after_the_second_of_five_cells(start_server: Callable[..., Server]) -> None:
    """Variables, files, files in memory and processes are those of then, then of a later cell, and clock and id of now.

    Then an agent tries from one checkpoint again and again, and the disk stays within its budget.
    """
    server = start_server(pool_size=0, flags={"--max-checkpoints-mb": 300})
    with server.sandbox(checkpoints="cell") as box:
        beating = {"cmd": "sh", "args": ["-c", "while :; do date >> /tmp/beats; sleep 0.2; done"], "tag": "beat"}
        assert box.post("/commands", json=beating).status_code == 201
        seen = []
        for number, code in enumerate(CELLS, 1):
            assert box.execute(code)["error"] is None
            until(lambda number=number: len(checkpoints(box)) == 2 * number - 1, 30, every=0.1)
            seen.append(box.value(LOOK))
            until(lambda number=number: len(checkpoints(box)) == 2 * number, 30, every=0.1)
        assert [each["sleeps"] for each in seen] == ["0", "0", "0", "1", "1"]
        for cell in (1, 5, 2):
            go_back(box, 2 * cell - 1)
            assert box.value(LOOK) == seen[cell - 1]
            assert abs(box.value("time.time()") - time.time()) < 0.5 + 2 * box.scale
            assert box.get("/commands/beat").json()["status"] == "running"
        draws = []
        for _ in range(2):
            go_back(box, 3)
            draws.append(box.value("os.urandom(8).hex()"))
        assert draws[0] != draws[1]
        base = box.post("/checkpoints")
        assert base.status_code == 201, base.text
        for number in range(TRIES):
            assert box.execute(f"x += {number}\nopen('try', 'w').write('{number}')")["error"] is None
            go_back(box, base.json()["number"])
            found = box.get("/timeline").json()
            assert found["bytes"] <= found["budget"]
        assert box.value(LOOK) == seen[1]
        folder = server.data / "checkpoints"
        until(lambda: len(list(folder.iterdir())) == len(checkpoints(box)), 30, every=0.1)
        states = {each.get("state") for each in box.get("/timeline").json()["entries"]}
        assert "thinned" in states
    assert list(folder.iterdir()) == []
