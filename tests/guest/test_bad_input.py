"""Wrong, hostile and unusual requests get the documented status and a helpful message, and take bounded memory."""

import base64
import hashlib
import json
import os
import re
import select
import signal
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from tests.guest.client import KEY, Sandbox, Server

MIB = 1 << 20


def check_error(answer: requests.Response, status: int, word: str) -> dict[str, Any]:
    """The answer is an error of the documented shape that mentions `word`."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["code"] == status
    assert isinstance(body["error"], str)
    assert word in body["message"] + body.get("hint", "")
    assert "Traceback" not in answer.text
    return body


# -- creating sandboxes

CREATES = {
    "unknown template": ({"templateID": "nope"}, "code_interpreter"),
    "no template": ({}, "templateID"),
    "template of wrong type": ({"templateID": 7}, "templateID"),
    "timeout 0": ({"templateID": "base", "timeout": 0}, "timeout"),
    "negative timeout": ({"templateID": "base", "timeout": -1}, "timeout"),
    "timeout above the maximum": ({"templateID": "base", "timeout": 3601}, "3600"),
    "timeout as text": ({"templateID": "base", "timeout": "300"}, "timeout"),
    "metadata of wrong type": ({"templateID": "base", "metadata": {"a": 1}}, "metadata"),
    "envVars as a list": ({"templateID": "base", "envVars": ["A=1"]}, "envVars"),
    "name of a variable with =": ({"templateID": "base", "envVars": {"A=B": "1"}}, "A=B"),
    "NUL in a variable": ({"templateID": "base", "envVars": {"A": "\0"}}, "NUL"),
    "not an object": ([1, 2], "object"),
}


@pytest.mark.parametrize("case", CREATES)
def test_create_refused(server: Server, case: str) -> None:
    """A create with a wrong field gets 400 that names the field, and no sandbox is made."""
    body, word = CREATES[case]
    before = server.get("/health").json()["sandboxes"]
    check_error(server.post("/sandboxes", json=body), 400, word)
    assert server.get("/health").json()["sandboxes"] == before


@pytest.mark.parametrize("body", [b'{"templateID": ', b"\xff\xfe", b'{"x": ' + b"[" * 100_000, b"templateID=base"])
def test_broken_json(server: Server, body: bytes) -> None:
    """A body that is not JSON is refused with 400 that says so."""
    check_error(server.post("/sandboxes", data=body, headers={"Content-Type": "application/json"}), 400, "JSON")


def test_no_key(server: Server) -> None:
    """Without a known key only /health works. The other answers say how to send a key."""
    assert requests.get(f"{server.url}/health", timeout=10).status_code == 200
    for headers in ({}, {"Authorization": "Bearer e2b_" + "0" * 40}, {"X-API-Key": ""}):
        answer = requests.post(f"{server.url}/sandboxes", json={"templateID": "base"}, headers=headers, timeout=10)
        check_error(answer, 401, "Authorization")


def test_unknown_sandbox(server: Server) -> None:
    """An unknown id gets 404 on every route of sandboxes."""
    for method, path in [
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/files?path=x"),
        ("GET", "/metrics"),
        ("GET", "/health"),
    ]:
        check_error(server.request(method, f"/sandboxes/sbx{'0' * 20}{path}"), 404, "sandbox not found")
    check_error(server.post(f"/sandboxes/sbx{'0' * 20}/processes", json={"cmd": "true"}), 404, "sandbox not found")


REFUSALS = {
    "no such path": ("GET", "/nowhere", {}, 404),
    "no key": ("GET", "/sandboxes", {"headers": {"Authorization": ""}}, 401),
    "wrong method": ("PUT", "/sandboxes", {}, 405),
    "wrong query": ("GET", "/sandboxes/BOX/files?path=", {}, 400),
    "wrong body": ("POST", "/sandboxes", {"json": {}}, 400),
    "no such file": ("GET", "/sandboxes/BOX/files?path=/no", {}, 404),
    "refused upload": ("POST", "/sandboxes/BOX/files", {"files": {"file": ("/etc/x", "x" * 100_000)}}, 403),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_keep_the_connection(server: Server, box: Sandbox, case: str) -> None:
    """The next request on the connection of a refused one is answered."""
    method, path, fields, status = REFUSALS[case]
    for _ in range(20):
        assert server.request(method, path.replace("BOX", box.id), **fields).status_code == status
        assert server.get("/health").status_code == 200


# -- large bodies

HUGE = 2 << 30


def send_huge(server: Server, path: str, chunked: bool) -> tuple[bytes, int]:
    """Send up to 2 GB until the server answers. Returns the answer and the number of bytes that were sent."""
    place = urlsplit(server.url)
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {HUGE}"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n{length}\r\n\r\n"
    piece = b" " * (256 * 1024)
    if chunked:
        piece = b"%x\r\n%s\r\n" % (len(piece), piece)
    answer, sent = b"", 0
    with socket.create_connection((place.hostname, place.port), 30) as connection:
        connection.sendall(head.encode())
        while sent < HUGE and not answer:
            if select.select([connection], [], [], 0)[0]:
                answer = connection.recv(65536)
                break
            try:
                sent += connection.send(piece)
            except OSError:
                break
        if not answer:
            answer = connection.recv(65536)
    return answer, sent


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("path", ["/sandboxes", "processes", "execute"])
def test_two_gigabytes_of_json(server: Server, box: Sandbox, path: str, chunked: bool) -> None:
    """A 2 GB body where JSON belongs is refused early with 413, and takes no memory."""
    if not path.startswith("/"):
        path = f"/sandboxes/{box.id}/{path}"
    with server.memory_grows_at_most(16 * MIB):
        answer, sent = send_huge(server, path, chunked)
    assert answer.startswith(b"HTTP/1.1 413 "), answer[:500]
    assert b'"too_large"' in answer
    assert b"upload" in answer
    assert sent < 100 * MIB


def test_two_gigabytes_from_requests(server: Server) -> None:
    """An ordinary client that sends a 2 GB body gets to read the 413."""
    body = (b" " * MIB for _ in range(2048))
    answer = requests.post(f"{server.url}/sandboxes", data=body, headers=server.http.headers, timeout=60)
    check_error(answer, 413, "upload")


# -- commands

COMMANDS = {
    "no command": ({}, "cmd"),
    "empty command": ({"cmd": ""}, "cmd"),
    "command of wrong type": ({"cmd": ["ls"]}, "cmd"),
    "arguments as text": ({"cmd": "ls", "args": "-l"}, "args"),
    "number as an argument": ({"cmd": "echo", "args": [1]}, "args"),
    "timeout 0": ({"cmd": "true", "timeout": 0}, "timeout"),
    "negative timeout": ({"cmd": "true", "timeout": -5}, "timeout"),
    "timeout above the maximum": ({"cmd": "true", "timeout": 3601}, "3600"),
    "NUL in an argument": ({"cmd": "echo", "args": ["a\0b"]}, "NUL"),
    "NUL in the working directory": ({"cmd": "true", "cwd": "/tmp\0"}, "NUL"),
    "lone surrogate": ({"cmd": "echo", "args": ["\ud800"]}, ""),
    "no such directory": ({"cmd": "true", "cwd": "/no/such"}, "/no/such"),
    "a file as the directory": ({"cmd": "true", "cwd": "/etc/passwd"}, "/etc/passwd"),
    "a million characters": ({"cmd": "echo", "args": ["x" * 1_000_000]}, "stdin"),
    "name of a variable with =": ({"cmd": "true", "envVars": {"A=B": "1"}}, "A=B"),
    "a large variable": ({"cmd": "true", "envVars": {"A": "x" * 1_000_000}}, ""),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command_refused(box: Sandbox, case: str) -> None:
    """A command with a wrong field gets 400 that names the field, and the sandbox goes on."""
    body, word = COMMANDS[case]
    check_error(box.post("/processes", json=body), 400, word)
    assert box.shell("echo fine") == "fine\n"


@pytest.mark.parametrize(
    ("body", "word"), [({}, "code"), ({"code": 1}, "code"), ({"code": "1", "timeout": 0}, "timeout")]
)
def test_cell_refused(box: Sandbox, body: dict[str, Any], word: str) -> None:
    """A cell with a wrong field gets 400."""
    check_error(box.post("/execute", json=body), 400, word)


@pytest.mark.parametrize("cmd", ["no-such-command", "/etc/passwd", "/home", "./relative"])
def test_command_not_runnable(box: Sandbox, cmd: str) -> None:
    """A command that is not found or is no program gets 502 with its name."""
    assert check_error(box.post("/processes", json={"cmd": cmd}), 502, cmd)["error"] == "cannot_run"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_command_ends_by_signal(box: Sandbox, number: int) -> None:
    """The exit code of a command that a signal ended is 128 + N, and the signal is told."""
    result = box.run("bash", "-c", f"echo out; echo err >&2; kill -{number} $$")
    assert (result["exitCode"], result["signal"], result["timedOut"]) == (128 + number, number, False)
    assert (result["stdout"], result["stderr"]) == ("out\n", "err\n")


@pytest.mark.parametrize("code", [1, 42, 255])
def test_command_fails(box: Sandbox, code: int) -> None:
    """A command's own exit code is passed on with 200."""
    assert box.run("bash", "-c", f"exit {code}")["exitCode"] == code


def test_output_that_is_not_utf8(box: Sandbox) -> None:
    """Bytes that are not UTF-8 arrive as U+FFFD. Characters that are cut by a buffer's end arrive whole."""
    result = box.run("bash", "-c", r"printf 'a\xff\xfeb'; printf '\xc3' >&2; sleep 0.3; printf '\xa4' >&2")
    assert (result["stdout"], result["stderr"]) == ("a\ufffd\ufffdb", "ä")


def test_input(box: Sandbox) -> None:
    """A command gets its `stdin`, also a large one. An unread one does no harm, and a missing one is empty."""
    text = "zeile ä\n" * 200_000
    assert box.run("sha256sum", stdin=text)["stdout"].split()[0] == hashlib.sha256(text.encode()).hexdigest()
    assert box.run("true", stdin=text)["exitCode"] == 0
    assert box.run("cat")["stdout"] == ""


def test_arguments_are_not_interpreted(box: Sandbox) -> None:
    """Arguments arrive unchanged, because there is no shell in between."""
    args = ["$HOME", "a  b", "*", '"', "'", "\n", "\r", "ä🙂", "", "-n", "`id`", "x" * 100_000]
    result = box.run("python3", "-c", "import sys, json; print(json.dumps(sys.argv[1:]))", *args)
    assert json.loads(result["stdout"]) == args


def test_two_hundred_megabytes_of_output(server: Server, box: Sandbox) -> None:
    """A command that prints 200 MB ends normally. The answer holds a part and says how much is missing."""
    with server.memory_grows_at_most(64 * MIB):
        result = box.run("bash", "-c", "head -c 200000000 /dev/zero | tr '\\0' x; echo done >&2", timeout=100)
    assert (result["exitCode"], result["stderr"]) == (0, "done\n")
    kept = len(result["stdout"])
    assert MIB <= kept <= 16 * MIB
    assert set(result["stdout"]) == {"x"}
    assert result["truncated"] == {"stdout": 200_000_000 - kept}


@pytest.mark.parametrize("code", ["for _ in range(100): print('y' * 999_999)", "print('y' * 99_999_999)"])
def test_cell_with_much_output(server: Server, box: Sandbox, code: str) -> None:
    """R8: a cell that prints 100 MB ends normally. The answer holds a part and says how much is missing."""
    with server.memory_grows_at_most(64 * MIB):
        cell = box.execute(f"{code}\n'end'", timeout=100)
    assert cell["error"] is None
    assert cell["results"][0]["data"]["text/plain"] == "'end'"
    kept = len(cell["stdout"])
    assert MIB <= kept <= 16 * MIB
    assert cell["truncated"]["stdout"] == 100_000_000 - kept


def test_cell_with_a_huge_result(server: Server, box: Sandbox) -> None:
    """R8: a result of 100 MB costs the server little memory. The answer says what it omits, and the sandbox goes on."""
    with server.memory_grows_at_most(64 * MIB):
        cell = box.execute("from IPython.display import HTML\nHTML('x' * 100_000_000)", timeout=100)
    kept = sum(len(result["data"].get("text/html", "")) for result in cell["results"])
    assert kept < 100_000_000
    assert cell["truncated"] is not None or "left out" in str(cell["results"])
    assert box.value("1 + 1") == 2


@pytest.mark.parametrize(
    ("code", "name"),
    [("1 / 0", "ZeroDivisionError"), ("def", "SyntaxError"), ("raise SystemExit(3)", "SystemExit"),
     ("input()", "StdinNotImplementedError"), ("raise OSError('\\ud800 \\udcff')", "OSError")],
)  # fmt: skip
def test_cell_fails(box: Sandbox, code: str, name: str) -> None:
    """A cell's error is told with its name, also when its text is odd, and the kernel goes on."""
    cell = box.execute(f"print('before')\n{code}" if code != "def" else code)
    assert cell["error"]["name"] == name
    assert cell["error"].get("code") is None
    assert box.value("1 + 1") == 2


def test_cell_prints_odd_text(box: Sandbox) -> None:
    """Text that can't be UTF-8 (a file name, say) is printed with marks for the bytes that can't be shown."""
    cell = box.execute("print('before \\udcff \\ud800 after')")
    assert re.fullmatch("before [?\ufffd]+ [?\ufffd]+ after\n", cell["stdout"])
    assert cell["stderr"] == ""


def test_cell_runs_commands(box: Sandbox) -> None:
    """Shell escapes work in cells, and a missing program does not stop the cell."""
    cell = box.execute("out = !echo a\n!exit 3\nprint(out, _exit_code)\n!no-such-command\nprint('after')")
    assert cell["error"] is None
    assert "['a'] 3" in cell["stdout"]
    assert cell["stdout"].endswith("after\n")


# -- files

ODD_NAMES = {
    "spaces": "a b.txt",
    "unicode": "übung 🙂.txt",
    "quotes": 'it\'s "quoted".txt',
    "line ends": "one\r\nContent-Type: evil\r\n.txt",
    "semicolon": 'x"; filename="y.txt',
    "per cent": "100%41.txt",
    "backslash": "a\\b.txt",
    "dash": "-rf",
    "hidden": ".hidden",
    "long": "n" * 255,
}


@pytest.mark.parametrize("kind", ODD_NAMES)
def test_odd_names(box: Sandbox, kind: str) -> None:
    """Any legal name goes both ways unharmed and is listed unchanged."""
    path = f"/home/user/odd/{ODD_NAMES[kind]}"
    answer = box.upload(path, kind)
    assert answer.status_code == 200, answer.text
    assert answer.json()[0]["path"] == path
    got = box.download(path)
    assert got.text == kind
    assert "evil" not in got.headers.get("Content-Type", "")
    assert ODD_NAMES[kind] in [entry["name"] for entry in box.get("/filesystem/list", params={"path": "odd"}).json()]
    assert box.value(f"__import__('os').path.exists({path!r})") is True


def test_large_file_both_ways(server: Server, box: Sandbox) -> None:
    """64 MB go up and come down unchanged, and the server does not hold them in memory."""
    content = os.urandom(64 * MIB)
    with server.memory_grows_at_most(32 * MIB):
        assert box.upload("large.bin", content).json()[0]["size"] == len(content)
        digest = hashlib.sha256()
        with box.download("large.bin", stream=True) as answer:
            assert int(answer.headers["Content-Length"]) == len(content)
            for chunk in answer.iter_content(MIB):
                digest.update(chunk)
    wanted = hashlib.sha256(content).hexdigest()
    assert digest.hexdigest() == wanted
    assert box.run("sha256sum", "large.bin")["stdout"].split()[0] == wanted


def test_range(box: Sandbox) -> None:
    """`Range` gets a part. A range outside of the file gets 416 and the size."""
    box.upload("range.txt", "0123456789")
    for span, part in {
        "0-3": "0123",
        "4-4": "4",
        "7-": "789",
        "-3": "789",
        "5-100": "56789",
        "-100": "0123456789",
    }.items():
        answer = box.download("range.txt", headers={"Range": f"bytes={span}"})
        assert (answer.status_code, answer.text) == (206, part), span
        assert answer.headers["Content-Range"].endswith("/10")
    answer = box.download("range.txt", headers={"Range": "bytes=10-"})
    assert check_error(answer, 416, "10")["error"] == "range_not_satisfiable"
    assert answer.headers["Content-Range"] == "bytes */10"
    whole = box.download("range.txt", headers={"Range": "lines=1-2"})
    assert (whole.status_code, whole.text) == (200, "0123456789")


def test_download_headers(box: Sandbox) -> None:
    """A download names its type and is an attachment that browsers do not run."""
    box.upload("page.html", "<script>alert(1)</script>")
    headers = box.download("page.html").headers
    assert headers["Content-Type"].startswith("text/html")
    assert headers["Content-Disposition"].startswith("attachment")
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_files_of_proc(box: Sandbox) -> None:
    """Files of /proc, which say that they are empty, are read to their end."""
    assert box.download("/proc/version").text.startswith("Linux version")
    assert "MemTotal" in box.download("/proc/meminfo").text
    inline = box.get("/filesystem", params={"path": "/proc/version"}).json()
    assert base64.b64decode(inline["content"]).startswith(b"Linux version")


@pytest.mark.parametrize("path", ["/proc/kmsg", "/dev/zero", "/dev/random", "fifo", "socket"])
def test_special_files(box: Sandbox, path: str) -> None:
    """A file that is not a regular one can be neither read nor written. It is refused at once."""
    box.shell(
        "test -p fifo || mkfifo fifo; test -S socket ||"
        "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('socket')\""
    )
    started = time.monotonic()
    assert box.download(path).status_code in (400, 403)
    assert box.get("/filesystem", params={"path": path}).status_code in (400, 403)
    if not path.startswith("/proc"):
        assert box.upload(path, "x").status_code in (400, 403)
    assert time.monotonic() - started < 5


NO_FILE = {
    "missing": ("/no/such", 404),
    "a directory": ("/home/user", 400),
    "a directory with a slash": ("/home/user/", 400),
    "below a file": ("/etc/passwd/x", 400),
    "NUL": ("/etc/pass\0wd", 400),
    "empty": ("", 400),
    "name too long": ("x" * 300, 400),
    "path too long": ("/x" * 5000, 400),
    "secret": ("/etc/shadow", 403),
    "dangling link": ("dangling", 404),
    "circle of links": ("circle", 400),
}


@pytest.mark.parametrize("case", NO_FILE)
def test_download_refused(box: Sandbox, case: str) -> None:
    """A path that is not a readable file gets the documented status, by download and inline."""
    box.shell("ln -sfn /no/such dangling; ln -sfn circle circle")
    path, status = NO_FILE[case]
    for route in ("/files", "/filesystem"):
        check_error(box.get(route, params={"path": path}), status, "")
    check_error(box.get("/files"), 400, "path")


NO_TARGET = {
    "root's directory": ("/etc/new", 403),
    "root's file": ("/etc/passwd", 403),
    "read-only system": ("/sys/new", 403),
    "a directory": ("/home/user", 400),
    "ends with a slash": ("/home/user/new/", 400),
    "below a file": ("/etc/passwd/x", 400),
    "NUL": ("a\0b", 400),
    "name too long": ("x" * 300, 400),
}


@pytest.mark.parametrize("case", NO_TARGET)
def test_upload_refused(box: Sandbox, case: str) -> None:
    """A target that can't be written gets the documented status, by upload and by JSON, and no part is left."""
    path, status = NO_TARGET[case]
    check_error(box.upload(path, "x"), status, "")
    content = base64.b64encode(b"x").decode()
    check_error(box.post("/filesystem", json={"path": path, "content": content}), status, "")
    assert box.shell("find /home/user /etc -name '*.part' 2>/dev/null; true") == ""


def test_large_upload_refused_is_answered(box: Sandbox) -> None:
    """A client whose large upload is refused can read the reason."""
    check_error(box.upload("/etc/new", os.urandom(32 * MIB)), 403, "/etc/new")


def test_full_disk(server: Server) -> None:
    """An upload for which the disk has no room gets 507 and leaves no part, and the sandbox goes on."""
    with server.sandbox() as box:
        box.shell("fallocate -l $(($(stat -fc '%a * %S' .) - 16 * 1024 * 1024)) filler")
        check_error(box.upload("big", os.urandom(32 * MIB)), 507, "No space left")
        assert box.shell("ls -A | grep -e big -e part; true") == ""
        box.shell("rm filler")
        assert box.upload("big", os.urandom(32 * MIB)).status_code == 200


def test_upload_malformed(box: Sandbox) -> None:
    """An upload that is not multipart, has no file, or is cut short is refused, and leaves no file."""
    check_error(box.post("/files", data=b"x"), 400, "multipart")
    check_error(box.post("/files", files={"path": (None, "a")}), 400, "file")
    check_error(box.post("/files", files={"other": ("n", "x")}), 400, "other")
    for body in (b"", b"garbage", b'--b\r\nContent-Disposition: form-data; name="file"; filename="cut"\r\n\r\nhal'):
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        check_error(box.post("/files", data=body, headers=headers), 400, "")
    assert box.shell("find /home/user -name '*cut*' -o -name '*.part'") == ""


def test_several_files(box: Sandbox) -> None:
    """One multipart body may hold several files, each with a path before it or its name as path."""
    parts = [
        ("path", (None, "many/a.txt")), ("file", ("ignored", "A")),
        ("file", ("many/b.txt", "B")), ("file", ("/home/user/many/c.txt", "")),
    ]  # fmt: skip
    answer = box.post("/files", files=parts)
    assert answer.status_code == 200, answer.text
    assert [entry["path"] for entry in answer.json()] == [f"/home/user/many/{name}.txt" for name in "abc"]
    assert box.shell("cd many && tail -n+1 *.txt && stat -c %s c.txt").split()[-1] == "0"
    assert [box.download(f"many/{name}.txt").text for name in "abc"] == ["A", "B", ""]


def test_path_after_the_file(box: Sandbox) -> None:
    """`curl -F file=@x -F path=y` stores the file at y, because the parts may come in any order."""
    answer = box.post("/files", files=[("file", ("wrong.txt", "content")), ("path", (None, "/home/user/right.txt"))])
    assert answer.status_code == 200, answer.text
    assert [entry["path"] for entry in answer.json()] == ["/home/user/right.txt"]
    assert box.download("right.txt").text == "content"
    assert box.download("wrong.txt").status_code == 404


def test_empty_file(box: Sandbox) -> None:
    """An empty file can be stored, listed and fetched."""
    assert box.upload("empty", b"").json()[0]["size"] == 0
    answer = box.download("empty")
    assert (answer.status_code, answer.content, answer.headers["Content-Length"]) == (200, b"", "0")
    assert box.get("/filesystem", params={"path": "empty"}).json()["content"] == ""
    assert check_error(box.download("empty", headers={"Range": "bytes=0-"}), 416, "")


def test_inline_limit(box: Sandbox) -> None:
    """A file over 1 MB is not put into JSON, but gets 400 that says to download it. Bad base64 gets 400."""
    box.upload("big", bytes(MIB + 1))
    check_error(box.get("/filesystem", params={"path": "big"}), 400, "download")
    check_error(box.post("/filesystem", json={"path": "x", "content": "%%%"}), 400, "base64")


def test_links(box: Sandbox) -> None:
    """Reads and writes follow links, stat tells their target, and a delete removes the link, not its target."""
    box.shell("echo first > target; ln -sfn target link; mkdir -p dir; echo x > dir/kept; ln -sfn dir dirlink")
    assert box.download("link").text == "first\n"
    box.upload("link", "second\n")
    assert box.shell("cat target; readlink link") == "second\ntarget\n"
    entry = box.get("/filesystem/stat", params={"path": "link"}).json()
    assert (entry["type"], entry["size"], entry["target"]) == ("file", 7, "/home/user/target")
    for path in ("link", "dirlink"):
        assert box.request("DELETE", "/filesystem", params={"path": path}).status_code == 204
    assert box.shell("cat target dir/kept") == "second\nx\n"


def test_directories(box: Sandbox) -> None:
    """Directories can be made, listed, moved and deleted. A request that can't be done gets an error."""
    assert box.post("/filesystem/mkdir", json={"path": "d1/d2"}).json()["isDir"] is True
    assert box.post("/filesystem/mkdir", json={"path": "d1/d2"}).status_code == 200
    box.upload("d1/d2/f", "x")
    move = {"source": "d1", "destination": "e1/e2"}
    assert box.post("/filesystem/move", json=move).json()["path"] == "/home/user/e1/e2"
    check_error(box.post("/filesystem/move", json=move), 404, "d1")
    check_error(box.post("/filesystem/mkdir", json={"path": "/etc/x"}), 403, "/etc/x")
    check_error(box.post("/filesystem/mkdir", json={"path": "e1/e2/d2/f"}), 409, "f")
    assert [entry["name"] for entry in box.get("/filesystem/list", params={"path": "e1/e2/d2"}).json()] == ["f"]
    assert box.request("DELETE", "/filesystem", params={"path": "e1"}).status_code == 204
    check_error(box.request("DELETE", "/filesystem", params={"path": "e1"}), 404, "e1")
    check_error(box.get("/filesystem/list", params={"path": "e1"}), 404, "e1")
    check_error(box.get("/filesystem/list", params={"path": "/etc/passwd"}), 400, "passwd")


def test_large_directory(box: Sandbox) -> None:
    """A directory of thousands of files is listed whole."""
    box.shell("mkdir -p full && cd full && seq -f %04g 2500 | xargs touch")
    names = [entry["name"] for entry in box.get("/filesystem/list", params={"path": "full"}).json()]
    assert names == [f"{n:04}" for n in range(1, 2501)]
    assert box.request("DELETE", "/filesystem", params={"path": "full"}).status_code == 204


def test_still_healthy(server: Server, box: Sandbox) -> None:
    """After these tests the sandbox and its kernel answer, and the server has logged no failure of its own."""
    assert box.get("/health").status_code == 204
    assert box.value("1 + 1") == 2
    log = server.log.read_text()
    assert "Traceback" not in log
    assert " ERROR " not in log
