"""Files on a real machine: work on them holds up nothing else, and has the sandbox user's rights."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.guest.client import Sandbox, Server

AT_ONCE = 16
"""More requests than the agent has threads for files."""


def at_once(call: Callable[[int], requests.Response]) -> Iterable[requests.Response]:
    """The answers to that many calls at the same time, so that every thread of the agent has a part in them."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(call, range(AT_ONCE)))


def test_a_large_delete_disturbs_no_command(server: Server) -> None:
    """B7: commands with a timeout of a second, and cells, run to their end while a tree of 50,000 files is deleted."""
    with server.sandbox() as box, ThreadPoolExecutor(1) as thread:
        box.shell("mkdir tree && cd tree && seq -f %06g 50000 | xargs touch", timeout=300)
        deleting = thread.submit(box.request, "DELETE", "/filesystem", params={"path": "tree"}, timeout=600)
        while not deleting.done():
            result = box.run("true", timeout=1 * server.scale)
            assert (result["exitCode"], result["timedOut"]) == (0, False)
            assert box.value("6 * 7") == 42
        assert deleting.result().status_code == 204
        assert box.get("/filesystem/stat", params={"path": "tree"}).status_code == 404


def test_files_belong_to_the_user(box: Sandbox) -> None:
    """Whatever thread makes a file or a directory, it is the user's."""
    uploads = at_once(lambda number: box.upload(f"/home/user/made/{number}/file", b"content"))
    assert {entry["owner"] for answer in uploads for entry in answer.json()} == {"user"}
    folders = at_once(lambda number: box.post("/filesystem/mkdir", json={"path": f"made/folder {number}/sub"}))
    assert {answer.json()["owner"] for answer in folders} == {"user"}
    assert box.shell("find made -not -user user -or -not -group user") == ""


@pytest.mark.parametrize(
    ("method", "path", "fields"),
    [
        ("GET", "/files", {"params": {"path": "/etc/shadow"}}),
        ("GET", "/filesystem", {"params": {"path": "/etc/shadow"}}),
        ("GET", "/filesystem/list", {"params": {"path": "/root"}}),
        ("GET", "/filesystem/stat", {"params": {"path": "/root/x"}}),
        ("POST", "/filesystem", {"json": {"path": "/etc/made", "content": ""}}),
        ("POST", "/filesystem/mkdir", {"json": {"path": "/etc/made"}}),
        ("POST", "/filesystem/move", {"json": {"source": "/etc/passwd", "destination": "passwd"}}),
        ("DELETE", "/filesystem", {"params": {"path": "/etc/passwd"}}),
    ],
)
def test_files_of_root_are_refused(box: Sandbox, method: str, path: str, fields: dict[str, object]) -> None:
    """No thread has root's rights."""
    answers = at_once(lambda number: box.request(method, path, **fields))
    assert {(answer.status_code, answer.json()["error"]) for answer in answers} == {(403, "permission_denied")}


def test_a_large_directory_in_pages(box: Sandbox) -> None:
    """Each file is on one page, in order. The whole is too large for one answer."""
    box.shell("mkdir full && cd full && seq -f %05g 10500 | xargs touch", timeout=120)
    answer = box.get("/filesystem/list", params={"path": "full"})
    assert (answer.status_code, answer.json()["error"]) == (413, "too_large")
    names: list[str] = []
    more = "true"
    while more:
        after = names[-1] if names else ""
        answer = box.get("/filesystem/list", params={"path": "full", "limit": 3000, "after": after})
        names += [entry["name"] for entry in answer.json()]
        more = answer.headers.get("X-More", "")
    assert names == [f"{number:05}" for number in range(1, 10_501)]
