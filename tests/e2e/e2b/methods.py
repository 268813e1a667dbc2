"""Every public method of E2B's Python SDK, called on a server. It runs in an environment with the SDK.

    python methods.py sync|async URL

Each step prints a JSON line with what it has shown: the methods, and whether they work, differ or are not offered. The
last step compares the methods with those of the SDK's classes, so that none is left out.
"""

import asyncio
import inspect
import json
import os
import socket
import sys
import time
import traceback
import urllib.request
from typing import Any

MODE, URL = sys.argv[1:3]
if URL.startswith("https://"):  # one name for each sandbox; not every machine resolves those below localhost
    resolve = socket.getaddrinfo

    def resolve_localhost(host: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return resolve("127.0.0.1" if str(name).endswith(".localhost") else host, *args, **options)

    socket.getaddrinfo = resolve_localhost
    os.environ["E2B_DOMAIN"] = URL.removeprefix("https://api.")
else:
    os.environ |= {"E2B_API_URL": URL, "E2B_SANDBOX_URL": URL}

import e2b  # noqa: E402
import e2b_code_interpreter  # noqa: E402

IS_ASYNC = MODE == "async"
Sandbox: Any = e2b_code_interpreter.AsyncSandbox if IS_ASYNC else e2b_code_interpreter.Sandbox
SEEN: set[str] = set()
PROPERTIES = {"pid", "has_next", "next_token"}


async def got(value: Any) -> Any:
    """The value that a method gives, of the SDK's sync and async classes alike."""
    return await value if inspect.isawaitable(value) else value


def tell(answer: str, methods: str, note: str = "") -> None:
    for method in methods.split():
        SEEN.add(method)
        print(json.dumps({"method": method, "answer": answer, "note": note}), flush=True)


async def refused(methods: str, note: str, call: Any, word: str) -> None:
    """A method that is not offered says so, and names what."""
    try:
        await got(call())
    except Exception as error:  # noqa: BLE001
        assert word in str(error), f"{methods}: {error!r}"
        tell("not offered", methods, note)
        return
    raise AssertionError(f"{methods}: it was offered")


async def fails(kind: type[Exception] | tuple[type[Exception], ...], call: Any) -> Exception:
    try:
        await got(call())
    except kind as error:
        return error
    raise AssertionError(f"no {kind}")


async def lifecycle() -> None:
    box = await got(Sandbox.create(timeout=60, metadata={"team k": "a&b"}, envs={"GIVEN": "yes"}))
    assert await got(box.is_running())
    info = await got(box.get_info())
    assert (info.sandbox_id, info.template_id, info.metadata) == (box.sandbox_id, "code_interpreter", {"team k": "a&b"})
    assert box.get_host(3000) == f"3000-{box.sandbox_id}.{box.sandbox_domain}"
    assert box.traffic_access_token
    tell("works", "Sandbox.create Sandbox.is_running Sandbox.get_info Sandbox.get_host Sandbox.sandbox_id")
    tell("works", "Sandbox.sandbox_domain Sandbox.traffic_access_token Sandbox.connection_config Sandbox.envd_api_url")
    if hasattr(Sandbox, "envd_direct_url"):
        assert box.envd_direct_url
        tell("works", "Sandbox.envd_direct_url")
    again = await got(Sandbox.connect(box.sandbox_id, timeout=90))
    assert again.sandbox_id == box.sandbox_id
    extended = await got(box.get_info())
    assert extended.end_at > info.end_at
    assert (await got(again.commands.run("echo $GIVEN"))).stdout == "yes\n"
    await got(box.set_timeout(50))
    assert (await got(box.get_info())).end_at < extended.end_at
    tell("works", "Sandbox.connect Sandbox.set_timeout")
    query = e2b.SandboxQuery(metadata={"team k": "a&b"})
    pages = Sandbox.list(query=query, limit=1)
    assert pages.has_next
    assert [each.sandbox_id for each in await got(pages.next_items())] == [box.sandbox_id]
    assert not pages.has_next
    assert pages.next_token is None
    assert await got(Sandbox.list(query=e2b.SandboxQuery(metadata={"team k": "b"})).next_items()) == []
    tell("works", "Sandbox.list SandboxPaginator.next_items SandboxPaginator.has_next SandboxPaginator.next_token")
    before = time.time()
    for _ in range(40):
        if readings := await got(box.get_metrics()):
            break
        await asyncio.sleep(0.25)
    assert readings[0].cpu_count
    assert readings[0].mem_total > readings[0].mem_used > 0
    assert before - 60 < readings[0].timestamp.timestamp() < before + 30
    tell("works", "Sandbox.get_metrics")
    if hasattr(Sandbox, "update_network"):
        await got(box.update_network({}))
        tell("works", "Sandbox.update_network")
    assert await got(box.kill())
    assert not await got(box.is_running())
    assert not await got(box.kill())
    await fails(e2b.NotFoundException, lambda: Sandbox.connect(box.sandbox_id))
    tell("works", "Sandbox.kill")


async def files(box: Any) -> None:
    f = box.files
    written = await got(f.write("notes/a.txt", "hällo"))
    assert (written.name, written.path.rsplit("/", 2)[1:]) == ("a.txt", ["notes", "a.txt"])
    assert await got(f.read("notes/a.txt")) == "hällo"
    assert bytes(await got(f.read("notes/a.txt", format="bytes"))) == "hällo".encode()
    stream = await got(f.read("notes/a.txt", format="stream"))
    data = b"".join([each async for each in stream]) if IS_ASYNC else b"".join(stream)
    assert data == "hällo".encode()
    await got(f.write("empty", b""))
    assert await got(f.read("empty")) == ""
    several = await got(f.write_files([{"path": "many/1", "data": "one"}, {"path": "many/2", "data": b"\0two"}]))
    assert [each.name for each in several] == ["1", "2"]
    assert bytes(await got(f.read("many/2", format="bytes"))) == b"\0two"
    missing = await fails(e2b.NotFoundException, lambda: f.read("missing"))
    assert "does not exist" in str(missing)
    tell("works", "Filesystem.write Filesystem.read Filesystem.write_files")
    assert await got(f.exists("many/1"))
    assert not await got(f.exists("missing"))
    info = await got(f.get_info("many/1"))
    assert (info.type, info.size, info.permissions) == (e2b.FileType.FILE, 3, "-rw-r--r--")
    assert await got(f.make_dir("deep/er"))
    assert not await got(f.make_dir("deep/er"))
    await got(f.write("deep/er/x", "1"))
    names = [each.path.partition("/deep/")[2] for each in await got(f.list("deep", depth=2))]
    assert names == ["er", "er/x"]
    moved = await got(f.rename("deep/er/x", "deep/y"))
    assert moved.name == "y"
    await got(f.remove("deep"))
    assert not await got(f.exists("deep"))
    tell("works", "Filesystem.exists Filesystem.get_info Filesystem.make_dir Filesystem.list Filesystem.rename")
    tell("works", "Filesystem.remove")
    await watching(box)
    url = box.download_url("notes/a.txt", use_signature_expiration=60)
    if URL.startswith("http://"):
        assert urllib.request.urlopen(url).read() == "hällo".encode()
        expired = box.download_url("notes/a.txt", use_signature_expiration=-60)
        assert status_of(expired) == 401
        assert status_of(url.replace("v1_", "v1_0")) == 401
        part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="any"\r\n\r\nup\r\n--b--\r\n'
        request = urllib.request.Request(box.upload_url("up.txt"), part)
        request.add_header("Content-Type", "multipart/form-data; boundary=b")
        assert json.load(urllib.request.urlopen(request))[0]["name"] == "up.txt"
        assert await got(f.read("up.txt")) == "up"
    else:
        assert box.upload_url("up.txt")
    tell("works", "Sandbox.download_url Sandbox.upload_url")


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)


async def watching(box: Any) -> None:
    f = box.files
    await got(f.make_dir("watched"))
    seen: list[Any] = []
    options = {"recursive": True}
    if IS_ASYNC:
        handle = await f.watch_dir("watched", seen.append, **options)
    else:
        handle = f.watch_dir("watched", **options)
    await got(f.write("watched/a", "1"))
    await got(f.make_dir("watched/in"))
    await got(f.write("watched/in/b", "1"))
    await got(f.rename("watched/a", "watched/c"))
    for _ in range(50):
        if not IS_ASYNC:
            seen += handle.get_new_events()
        if any(each.name == "c" for each in seen):
            break
        await asyncio.sleep(0.05)
    told = [(each.type.value, each.name) for each in seen]
    assert told[:3] == [("create", "a"), ("chmod", "a"), ("write", "a")], told
    assert ("create", "in/b") in told
    assert ("write", "in/b") in told
    assert told[-2:] == [("rename", "a"), ("create", "c")], told
    await got(handle.stop())
    await fails(e2b.NotFoundException, lambda: f.watch_dir(*(["missing", print] if IS_ASYNC else ["missing"])))
    tell("works", "Filesystem.watch_dir WatchHandle.stop" + ("" if IS_ASYNC else " WatchHandle.get_new_events"))


async def commands(box: Any) -> None:
    c = box.commands
    out: list[str] = []
    options = {"on_stdout": out.append, "envs": {"A": "b"}, "cwd": "/tmp"}
    done = await got(c.run("echo $A; pwd; echo no >&2", **options))
    assert (done.stdout, done.stderr, done.exit_code) == ("b\n/tmp\n", "no\n", 0)
    assert "".join(out) == "b\n/tmp\n"
    failed = await fails(e2b.CommandExitException, lambda: c.run("exit 3"))
    assert failed.exit_code == 3
    await fails(e2b.TimeoutException, lambda: c.run("sleep 20", timeout=0.5))
    await fails(e2b.InvalidArgumentException, lambda: c.run("true", cwd="/missing"))
    await fails(e2b.AuthenticationException, lambda: c.run("true", user="nobody-here"))
    handle = await got(c.run("cat; echo over", background=True, stdin=True))
    assert handle.pid in [each.pid for each in await got(c.list())]
    await got(c.send_stdin(handle.pid, "typed\n"))
    if hasattr(c, "close_stdin"):
        await got(c.close_stdin(handle.pid))
        assert (await got(handle.wait())).stdout == "typed\nover\n"
        tell("works", "Commands.close_stdin")
        handle = await got(c.run("cat", background=True, stdin=True))
        await got(handle.send_stdin("more\n"))
        await got(handle.close_stdin())
        assert (await got(handle.wait())).stdout == "more\n"
        tell("works", "CommandHandle.send_stdin CommandHandle.close_stdin")
    else:
        await got(handle.kill())
    if hasattr(c, "stream_input"):
        await streamed(c)
    handle = await got(c.run("sleep 0.5; echo later", background=True))
    await got(handle.disconnect())
    other = await got(c.connect(handle.pid))
    assert (await got(other.wait())).stdout == "later\n"
    handle = await got(c.run("sleep 100", background=True))
    assert (await got(c.run(f"kill -0 {handle.pid}"))).exit_code == 0
    assert await got(handle.kill())
    await fails(e2b.CommandExitException, lambda: c.run(f"kill -0 {handle.pid}"))
    assert not await got(c.kill(handle.pid))
    killed = await fails(e2b.CommandExitException, handle.wait)
    assert killed.exit_code == -1
    if IS_ASYNC:
        assert (handle.stdout, handle.stderr, handle.exit_code) == ("", "", -1)
        assert handle.error == "signal: killed"
        tell("works", "CommandHandle.stdout CommandHandle.stderr CommandHandle.exit_code CommandHandle.error")
    tell("works", "Commands.run Commands.list Commands.send_stdin Commands.connect Commands.kill")
    tell("works", "CommandHandle.pid CommandHandle.wait CommandHandle.disconnect CommandHandle.kill")


async def streamed(c: Any) -> None:
    """Input as a stream, that lasts."""
    handle = await got(c.run("cat", background=True, stdin=True))
    if IS_ASYNC:
        stream = c.stream_input(handle.pid)
        await stream.send(b"streamed\n")
        await stream.close()
    else:
        c.stream_input(handle.pid, iter([b"stream", b"ed\n"]))
    await got(c.close_stdin(handle.pid))
    assert (await got(handle.wait())).stdout == "streamed\n"
    tell("works", "Commands.stream_input")


async def terminals(box: Any) -> None:
    out: list[bytes] = []
    size = e2b.PtySize(rows=20, cols=90)
    handle = await got(box.pty.create(size=size, **({"on_data": out.append} if IS_ASYNC else {})))
    await got(box.pty.resize(handle.pid, e2b.PtySize(rows=33, cols=44)))
    await got(box.pty.send_stdin(handle.pid, b"echo $((20 + 3))-$(stty size | tr ' ' x); exit\n"))
    if IS_ASYNC:
        await handle.wait()
    else:
        handle.wait(on_pty=out.append)
    assert b"23-33x44" in b"".join(out), out
    handle = await got(box.pty.create(size=size, **({"on_data": out.append} if IS_ASYNC else {})))
    other = await got(box.pty.connect(handle.pid, **({"on_data": out.append} if IS_ASYNC else {})))
    assert other.pid == handle.pid
    if hasattr(box.pty, "stream_input"):
        if IS_ASYNC:
            await box.pty.stream_input(handle.pid).close()
        else:
            box.pty.stream_input(handle.pid, iter([b"echo\n"]))
        tell("works", "Pty.stream_input")
    assert await got(box.pty.kill(handle.pid))
    assert not await got(box.pty.kill(handle.pid))
    tell("works", "Pty.create Pty.resize Pty.send_stdin Pty.connect Pty.kill")


async def code(box: Any) -> None:
    out: list[str] = []
    ran = await got(box.run_code("print('ü')\nx = 41\nx + 1", on_stdout=lambda each: out.append(each.line)))
    assert (ran.text, ran.logs.stdout, out, ran.error) == ("42", ["ü\n"], ["ü\n"], None)
    assert ran.results[0].is_main_result
    first = ran.execution_count
    assert (await got(box.run_code("x"))).execution_count == first + 1
    failed = await got(box.run_code("1 / 0"))
    assert failed.error.name == "ZeroDivisionError"
    assert "\x1b" not in failed.error.traceback
    assert (await got(box.run_code("import os; os.environ['E']", envs={"E": "5"}))).text == "5"
    assert (await got(box.run_code("os.environ.get('E')"))).text is None
    assert (await got(box.run_code("[1, {'a': None}]"))).results[0].json == [1, {"a": None}]
    assert (await got(box.run_code("  y = 3\n  y"))).text == "3"
    assert (await got(box.run_code("import asyncio\nawait asyncio.sleep(0, 'slept')"))).text == "slept"
    shown = await got(box.run_code("from IPython.display import HTML\ndisplay(HTML('<b>x</b>'))"))
    assert shown.results[0].html == "<b>x</b>"
    assert not shown.results[0].is_main_result
    assert (await got(box.run_code("echo $((6 * 7))", language="bash"))).logs.stdout == ["42\n"]
    tell("differs", "Sandbox.run_code", "Python, and bash with a fresh shell each time; no other language")
    found = await got(box.list_code_contexts())
    assert [each.language for each in found] == ["python"]
    assert (await got(box.run_code("x", context=found[0]))).text == "41"
    await got(box.restart_code_context(found[0]))
    assert (await got(box.run_code("x"))).error.name == "NameError"
    tell("works", "Sandbox.list_code_contexts Sandbox.restart_code_context")
    note = "one context only"
    await refused("Sandbox.create_code_context", note, box.create_code_context, "not offered")
    await refused("Sandbox.remove_code_context", note, lambda: box.remove_code_context(found[0]), "can't be removed")


async def git(box: Any) -> None:
    g = box.git
    await got(g.init("repo", initial_branch="main"))
    await got(g.configure_user("Ada", "ada@example.com"))
    await got(g.set_config("user.name", "Ada", scope="global"))
    assert await got(g.get_config("user.name", scope="global")) == "Ada"
    await got(box.files.write("repo/a", "1"))
    await got(g.add("repo"))
    await got(g.commit("repo", "first"))
    assert (await got(g.status("repo"))).is_clean
    await got(g.create_branch("repo", "next"))
    await got(g.checkout_branch("repo", "main"))
    assert "next" in (await got(g.branches("repo"))).branches
    await got(g.delete_branch("repo", "next"))
    await got(box.files.write("repo/a", "2"))
    await got(g.add("repo"))
    await got(g.reset("repo"))
    await got(g.restore("repo", paths=["a"]))
    assert await got(box.files.read("repo/a")) == "1"
    await got(box.commands.run("git init --bare -b main far"))
    far = (await got(box.commands.run("echo $PWD/far"))).stdout.strip()
    await got(g.remote_add("repo", "origin", far))
    assert await got(g.remote_get("repo", "origin")) == far
    await got(g.push("repo", remote="origin", branch="main"))
    await got(g.pull("repo", remote="origin", branch="main"))
    await got(g.clone(far, path="copy"))
    assert await got(box.files.read("copy/a")) == "1"
    await got(g.dangerously_authenticate("ada", "not-a-secret"))
    tell("works", " ".join(f"Git.{name}" for name in public(type(g))))


async def not_offered(box: Any) -> None:
    pauses = "needs machines that can be saved, which this server has not"
    await refused("Sandbox.pause Sandbox.beta_pause", pauses, lambda: Sandbox.pause(box.sandbox_id), "501")
    await refused("Sandbox.create_snapshot", pauses, lambda: Sandbox.create_snapshot(box.sandbox_id), "501")
    if hasattr(Sandbox, "fork"):
        await refused("Sandbox.fork", pauses, lambda: Sandbox.fork(box.sandbox_id), "501")
    assert not await got(Sandbox.delete_snapshot("missing"))
    pages = Sandbox.list_snapshots()
    assert pages.has_next
    assert await got(pages.next_items()) == []
    assert not pages.has_next
    assert pages.next_token is None
    tell("works", "Sandbox.delete_snapshot Sandbox.list_snapshots")
    tell("works", "SnapshotPaginator.next_items SnapshotPaginator.has_next SnapshotPaginator.next_token")
    note = "there is no template mcp-gateway"
    await refused("Sandbox.get_mcp_token Sandbox.get_mcp_url", note, lambda: Sandbox.create(mcp={"x": {}}), "mcp")
    if hasattr(Sandbox, "beta_create"):
        await refused("Sandbox.beta_create", pauses, lambda: Sandbox.beta_create(auto_pause=True), "pause")


def public(kind: type) -> list[str]:
    """Names of a class's public methods and properties."""
    return [
        name
        for name in dir(kind)
        if not name.startswith("_")
        and (callable(getattr(kind, name)) or isinstance(inspect.getattr_static(kind, name), property))
    ]


def check_complete(box: Any) -> None:
    kinds = {
        "Sandbox": Sandbox,
        "Filesystem": type(box.files),
        "Commands": type(box.commands),
        "Pty": type(box.pty),
        "Git": type(box.git),
        "CommandHandle": e2b.AsyncCommandHandle if IS_ASYNC else e2b.CommandHandle,
        "WatchHandle": e2b.AsyncWatchHandle if IS_ASYNC else e2b.WatchHandle,
        "SandboxPaginator": e2b.AsyncSandboxPaginator if IS_ASYNC else e2b.SandboxPaginator,
        "SnapshotPaginator": e2b.AsyncSnapshotPaginator if IS_ASYNC else e2b.SnapshotPaginator,
    }
    parts = {"Sandbox.files", "Sandbox.commands", "Sandbox.pty", "Sandbox.git"}
    all_ = {f"{name}.{method}" for name, kind in kinds.items() for method in public(kind)} - parts
    assert all_ <= SEEN, f"not called: {sorted(all_ - SEEN)}"


async def main() -> None:
    await lifecycle()
    box = await got(Sandbox.create(timeout=120))
    try:
        for part in (files, commands, terminals, code, git, not_offered):
            await part(box)
        check_complete(box)
    finally:
        await got(box.kill())


try:
    asyncio.run(main())
except BaseException:  # noqa: BLE001  whatever it is, it is printed
    traceback.print_exc()
    raise SystemExit(1) from None
