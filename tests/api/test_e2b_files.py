"""E2B's dialect over real agents: files in place, metadata, watches, and results of a real kernel."""

import asyncio
import gzip
import json
import os
from typing import Any

import pytest

from guest_agent.watch import KEPT, Watched
from kernel_gateway.api.e2b import connect
from tests.api.clients import channels
from tests.api.test_e2b import INTERPRETER, Box
from tests.fakes import Service


@pytest.fixture
async def e2b(real: Service, real_box: str) -> Box:
    return Box(real, real.sandboxes.get(real.owner, real_box))


def multipart(*files: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
    parts = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n' % (name.encode(), content)
        for name, content in files
    )
    return parts + b"--b--\r\n", {"Content-Type": "multipart/form-data; boundary=b"}


async def upload(e2b: Box, query: str, body: bytes, headers: dict[str, str]) -> Any:
    answer = await e2b.call("POST", f"/files{query}", body, headers=headers)
    assert answer.code == 200, answer.body
    return json.loads(answer.body)


async def test_uploads(e2b: Box) -> None:
    """Several files in one body, in their order; a path in the query wins; the old content goes."""
    body, headers = multipart(("up/one", b"1"), ("up/two", b""))
    told = await upload(e2b, "", body, headers)
    assert [(each["name"], each["type"], sorted(each)) for each in told] == [
        ("one", "file", ["name", "path", "type"]),
        ("two", "file", ["name", "path", "type"]),
    ]
    body, headers = multipart(("ignored", b"new"))
    assert (await upload(e2b, "?path=up/one", body, headers))[0]["name"] == "one"
    assert (await e2b.call("GET", "/files?path=up/one")).body == b"new"
    empty = await e2b.call("GET", "/files?path=up/two")
    assert (empty.code, empty.headers["Content-Length"]) == (200, "0")
    part = await e2b.call("GET", "/files?path=up/one", headers={"Range": "bytes=1-"})
    assert (part.code, part.body) == (206, b"ew")


async def test_raw_uploads(e2b: Box) -> None:
    """A raw body is a file, as it is or compressed."""
    raw = {"Content-Type": "application/octet-stream"}
    content = bytes(range(256)) * 10_000
    for body, headers in ((content, raw), (gzip.compress(content), {**raw, "Content-Encoding": "gzip"})):
        await upload(e2b, "?path=raw", body, headers)
        assert (await e2b.call("GET", "/files?path=raw")).body == content
    for body, headers in (
        (gzip.compress(content)[:-9], {**raw, "Content-Encoding": "gzip"}),
        (b"no gzip", {**raw, "Content-Encoding": "gzip"}),
        (b"x", {**raw, "Content-Encoding": "br"}),
        (b"x", {"Content-Type": "text/plain"}),
    ):
        assert (await e2b.call("POST", "/files?path=raw", body, headers=headers)).code == 400


async def test_bad_uploads(e2b: Box) -> None:
    """One path twice, no file, a directory, an unknown user: refused and named."""
    for files, query, code in (
        ([("same", b"1"), ("same", b"2")], "", 400),
        ([("a", b"1"), ("b", b"2")], "?path=same", 400),
        ([], "", 400),
        ([("x", b"")], "?path=/", 400),
        ([("x", b"")], "?path=x&username=nobody-here", 401),
    ):
        body, headers = multipart(*files)
        answer = await e2b.call("POST", f"/files{query}", body, headers=headers)
        assert answer.code == code, (query, answer.body)
        assert set(json.loads(answer.body)) == {"code", "message"}
    missing = await e2b.call("GET", "/files?path=/missing/file")
    assert (missing.code, json.loads(missing.body)["message"]) == (404, "path '/missing/file' does not exist")
    assert (await e2b.call("GET", "/files?path=/")).code == 400


async def test_files_of_proc(e2b: Box) -> None:
    """Files of size 0 that hold something are read to their end."""
    assert (await e2b.call("GET", "/files?path=/proc/self/status")).body.startswith(b"Name:")


async def test_metadata(e2b: Box) -> None:
    """Metadata are told by upload, stat, list and move, and replaced as a whole by the next upload."""
    body, headers = multipart(("meta/a", b"1"))
    told = await upload(e2b, "", body, {**headers, "X-Metadata-Author": "Ada L.", "X-Metadata-n": "1"})
    expected = {"author": "Ada L.", "n": "1"}
    assert told[0]["metadata"] == expected
    os.setxattr(told[0]["path"], "user.other", b"x")
    entry = json.loads((await e2b.rpc("filesystem.Filesystem/Stat", {"path": "meta/a"})).body)["entry"]
    assert entry["metadata"] == expected
    listed = json.loads((await e2b.rpc("filesystem.Filesystem/ListDir", {"path": "meta"})).body)["entries"]
    assert listed[0]["metadata"] == expected
    move = {"source": "meta/a", "destination": "meta/b"}
    assert json.loads((await e2b.rpc("filesystem.Filesystem/Move", move)).body)["entry"]["metadata"] == expected
    told = await upload(e2b, "?path=meta/b", body, {**headers, "X-Metadata-x": "2"})
    assert told[0]["metadata"] == {"x": "2"}
    assert "metadata" not in (await upload(e2b, "?path=meta/b", body, headers))[0]
    answer = await e2b.call("POST", "/files", body, headers={**headers, "X-Metadata-x": "\u00e9"})
    assert answer.code == 400


async def test_entries(e2b: Box) -> None:
    """Entries as E2B tells them: links, modes, depth, and what is there already."""
    body, headers = multipart(("tree/d/e/f", b"1"), ("tree/a", b"22"))
    told = await upload(e2b, "", body, headers)
    root = told[1]["path"].removesuffix("/a")
    os.symlink(f"{root}/d", f"{root}/link")
    listing = json.loads((await e2b.rpc("filesystem.Filesystem/ListDir", {"path": "tree", "depth": 2})).body)
    names = [each["path"].removeprefix(f"{root}/") for each in listing["entries"]]
    assert names == ["a", "d", "d/e", "link"]
    link = listing["entries"][3]
    assert (link["type"], link["permissions"], link["symlinkTarget"]) == (
        "FILE_TYPE_DIRECTORY",
        "Lrwxrwxrwx",
        f"{root}/d",
    )
    file = listing["entries"][0]
    assert (file["type"], file["size"], file["mode"], file["permissions"]) == (
        "FILE_TYPE_FILE",
        "2",
        0o644,
        "-rw-r--r--",
    )
    for path, code, word in (("tree", 409, "already_exists"), ("tree/a", 400, "invalid_argument")):
        answer = await e2b.rpc("filesystem.Filesystem/MakeDir", {"path": path})
        assert (answer.code, json.loads(answer.body)["code"]) == (code, word)
    for path in ("tree", "tree"):
        assert (await e2b.rpc("filesystem.Filesystem/Remove", {"path": path})).code == 200
    for path, code in (("missing", 404), ("raw", 400)):
        await upload(e2b, "?path=raw", b"", {"Content-Type": "application/octet-stream"})
        assert (await e2b.rpc("filesystem.Filesystem/ListDir", {"path": path})).code == code


async def test_watchers(e2b: Box) -> None:
    """A watcher tells with entries if it was asked to, is bounded in number, and unknown ones are not found."""
    await e2b.rpc("filesystem.Filesystem/MakeDir", {"path": "seen"})
    answer = await e2b.rpc("filesystem.Filesystem/CreateWatcher", {"path": "seen", "includeEntry": True})
    watcher = json.loads(answer.body)
    await upload(e2b, "?path=seen/x", b"1", {"Content-Type": "application/octet-stream"})
    events = json.loads((await e2b.rpc("filesystem.Filesystem/GetWatcherEvents", watcher)).body)["events"]
    kinds = ["EVENT_TYPE_CREATE", "EVENT_TYPE_CHMOD", "EVENT_TYPE_WRITE"]
    assert [(each["name"], each["type"], each["entry"]["size"]) for each in events] == [
        ("x", kind, "1") for kind in kinds
    ]
    made = [watcher]
    while (answer := await e2b.rpc("filesystem.Filesystem/CreateWatcher", {"path": "seen"})).code == 200:
        made.append(json.loads(answer.body))
    assert (answer.code, len(made)) == (429, 64)
    for each in made:
        assert (await e2b.rpc("filesystem.Filesystem/RemoveWatcher", each)).code == 200
    assert (await e2b.rpc("filesystem.Filesystem/GetWatcherEvents", watcher)).code == 404
    for path, word in (("missing", "not_found"), ("seen/x", "invalid_argument")):
        assert (await e2b.stream("filesystem.Filesystem/WatchDir", {"path": path}))[1]["error"]["code"] == word


async def test_more_changes_than_are_kept(tmp_path: Any) -> None:
    """Beyond KEPT changes wait in the system's queue, and when that is full the reader is told of the loss."""
    watched = Watched(str(tmp_path), is_recursive=False)
    try:
        (tmp_path / "a").touch()
        await asyncio.sleep(0.01)
        for _ in range(2 * KEPT):
            os.rename(tmp_path / "a", tmp_path / "b")
            os.rename(tmp_path / "b", tmp_path / "a")
        pages = [watched.take()]
        while pages[-1].changes:
            pages.append(watched.take())
        assert sum(len(page.changes) for page in pages) >= KEPT
        assert any(page.lost for page in pages)
        assert not watched.take().lost
        (tmp_path / "c").touch()
        assert [(each.kind, each.name) for each in watched.take().changes] == [("create", "c")]
    finally:
        watched.close()


async def run(e2b: Box, code: str, **fields: Any) -> list[Any]:
    body = json.dumps({"code": code, **fields}).encode()
    answer = await e2b.call("POST", "/execute", body, port=INTERPRETER)
    assert answer.code == 200, answer.body
    assert answer.body.isascii()
    return [json.loads(line) for line in answer.body.splitlines()]


async def test_lines_of_the_interpreter(e2b: Box) -> None:
    """The count comes first and the end last; null is a field that was not sent; a run without output ends properly."""
    told = await run(e2b, "print('ü')\n'text'", context_id=None, language=None, env_vars=None)
    assert [each["type"] for each in told] == ["number_of_executions", "stdout", "result", "end_of_execution"]
    assert told[1]["text"] == "ü\n"
    assert told[2] == {"type": "result", "is_main_result": True, "extra": {}, "text": "text"}
    assert [each["type"] for each in await run(e2b, "")] == ["number_of_executions", "end_of_execution"]
    told = await run(e2b, "from IPython.display import display\ndisplay({'a/b': 1, 'image/png': 'eA=='}, raw=True)")
    assert told[1] == {"type": "result", "is_main_result": False, "extra": {"a/b": 1}, "png": "eA=="}


async def test_variables_of_one_run(e2b: Box) -> None:
    """They hold for that run, and go back to what they were, also after an error."""
    await run(e2b, "import os\nos.environ['KEPT'] = 'old'")
    code = "print(os.environ.get('KEPT'), os.environ.get('NEW'))"
    assert (await run(e2b, code, env_vars={"KEPT": "x", "NEW": "y"}))[1]["text"] == "x y\n"
    assert (await run(e2b, code))[1]["text"] == "old None\n"
    told = await run(e2b, "1/0", env_vars={"NEW": "z"})
    assert told[1]["name"] == "ZeroDivisionError"
    assert (await run(e2b, code))[1]["text"] == "old None\n"


async def test_metadata_that_ask_for_nonsense(e2b: Box, real: Service) -> None:
    """A Jupyter client may write anything there. Its cell ends with an error, and the next one runs."""
    async with channels(real, e2b.sandbox.kernel_id) as client:
        for env in (3, ["a"], {"A": 1}, {"A": None}, {"A=B": "c"}, {"A": "\0"}, {"": "a"}):
            answer = await client.run("1", metadata={"e2b": env})
            assert answer.reply["status"] == "error", env
            assert answer.all("error")
        assert (await client.run("2")).value == "2"


async def test_a_kernel_that_dies(e2b: Box) -> None:
    """The run ends with an error, and the next one has a new kernel that tells results as before."""
    told = await run(e2b, "import os; os._exit(1)")
    assert [each["type"] for each in told][-2:] == ["error", "end_of_execution"]
    assert (await run(e2b, "[1]"))[1]["json"] == [1]


async def test_refusals_of_the_interpreter(e2b: Box) -> None:
    """They are plain text."""
    for fields, code in (
        ({"context_id": "x", "language": "python"}, 400),
        ({"context_id": "x"}, 404),
        ({"language": "r"}, 501),
        ({"code": 1}, 400),
    ):
        body = json.dumps({"code": "1", **fields}).encode()
        answer = await e2b.call("POST", "/execute", body, port=INTERPRETER)
        assert answer.code == code
        assert answer.headers["Content-Type"].startswith("text/plain")
    for method, path, code in (("POST", "/contexts/x/restart", 404), ("DELETE", "/contexts/x", 404)):
        assert (await e2b.call(method, path, port=INTERPRETER)).code == code
    for method, path, body, told in (
        ("POST", "/contexts", b'{"language": "python"}', b"more contexts than the default one are not offered"),
        ("DELETE", f"/contexts/{e2b.sandbox.kernel_id}", b"", b"the default context can't be removed"),
    ):
        answer = await e2b.call(method, path, body, port=INTERPRETER)
        assert answer.code == 501
        assert answer.body.startswith(told)


async def test_hang_up_interrupts(e2b: Box) -> None:
    """A client that hangs up during a run interrupts it, and the next run works soon."""
    reader, writer = await asyncio.open_connection("127.0.0.1", e2b.service.port)
    body = json.dumps({"code": "import time\nprint('on', flush=True)\ntime.sleep(60)"}).encode()
    head = (
        f"POST /execute HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: {e2b.sandbox.id}\r\n"
        f"E2b-Sandbox-Port: {INTERPRETER}\r\nX-Access-Token: {e2b.sandbox.access_token}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await reader.readuntil(b"stdout")
    writer.close()
    async with asyncio.timeout(5):
        assert (await run(e2b, "7"))[1]["text"] == "7"


async def test_signals_of_processes(e2b: Box) -> None:
    """A process that is killed is told in Go's words, late readers get its end, and its pid is gone."""
    started = asyncio.create_task(
        e2b.stream("process.Process/Start", {"process": {"cmd": "sleep", "args": ["60"]}, "tag": "victim"})
    )
    selector = {"process": {"tag": "victim"}}
    while (answer := await e2b.rpc("process.Process/SendSignal", {**selector, "signal": "SIGNAL_SIGTERM"})).code == 404:
        await asyncio.sleep(0.02)
    assert answer.code == 200
    told, last = await started
    end = {"exitCode": -1, "exited": False, "status": "signal: terminated", "error": "signal: terminated"}
    assert (told[-1]["event"]["end"], last) == (end, {})
    told, _ = await e2b.stream("process.Process/Connect", selector)
    assert [next(iter(each["event"])) for each in told] == ["start", "end"]
    for method, more in (
        ("SendSignal", {"signal": "SIGNAL_SIGKILL"}),
        ("SendInput", {"input": {"stdin": "eA=="}}),
        ("CloseStdin", {}),
        ("Update", {"pty": {"size": {"cols": 1, "rows": 1}}}),
    ):
        answer = await e2b.rpc(f"process.Process/{method}", {**selector, **more})
        assert (answer.code, json.loads(answer.body)["code"]) == (404, "not_found"), method


async def test_bytes_that_are_no_text(e2b: Box) -> None:
    """Output is passed as it is."""
    message = {"process": {"cmd": "printf", "args": ["\\377\\376\\303"]}, "stdin": False}
    told, _ = await e2b.stream("process.Process/Start", message)
    assert b"".join(connect_bytes(each) for each in told) == b"\xff\xfe\xc3"


def connect_bytes(event: Any) -> bytes:
    import base64

    return base64.b64decode(event["event"].get("data", {}).get("stdout", ""))


async def test_a_stream_of_input(e2b: Box) -> None:
    """Envelopes of a stream of input reach the process as they come."""
    command = e2b.sandbox.guest.commands.start(["cat"], env={}, stdin=True)
    await command.running()
    body = connect.envelope({"start": {"process": {"pid": command.pid}}})
    body += connect.envelope({"data": {"input": {"stdin": "YQ=="}}}) + connect.envelope({"keepalive": {}})
    body += connect.envelope({"data": {"input": {"stdin": "Yg=="}}})
    headers = {"Content-Type": connect.STREAM}
    answer = await e2b.call("POST", "/process.Process/StreamInput", body, headers=headers)
    assert answer.body == connect.envelope({}) + connect.end()
    command.close_stdin()
    await command.over.wait()
    assert b"".join(b"".join(each.parts) for each in command.journal.read(0)) == b"ab"  # type: ignore[union-attr]
