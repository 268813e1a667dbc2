"""The whole server in this process, over real agents (driver `unisolated`): start, work, stop, and leave nothing."""

import asyncio
import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPResponse
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from kernel_gateway.__main__ import main
from kernel_gateway.sandbox.key import parse_scope
from kernel_gateway.sandbox.store import Store
from kernel_gateway.server import Server, builder, running
from kernel_gateway.settings import Settings, SettingsError
from tests.fakes import error_of, eventually

KEY = "sk-sb-of-the-tests-0123456789"
REMOVED = "sk-sb-removed-by-the-tests"


def settings(directory: Path, **fields: Any) -> Settings:
    return Settings(
        **{
            "port": 0,
            "data_dir": str(directory / "data"),
            "cache_dir": str(directory / "cache"),
            "isolation": "unisolated",
            "pool_size": 1,
            "api_key": KEY,
            **fields,
        }
    )


@pytest.fixture
async def client() -> AsyncIterator[AsyncHTTPClient]:
    """A client of the test's own."""
    client = AsyncHTTPClient(force_instance=True)
    yield client
    client.close()


async def call(
    client: AsyncHTTPClient, server: Server, method: str, path: str, body: object = None, key: str = KEY
) -> HTTPResponse:
    return await client.fetch(
        server.url + path,
        method=method,
        body=json.dumps(body) if body is not None else None,
        headers={"X-API-Key": key},
        raise_error=False,
        allow_nonstandard_methods=True,
    )


async def test_strangers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server listens through its door: a head that does not end is cut off."""
    monkeypatch.setattr("kernel_gateway.api.door.HEAD", 0.1)
    monkeypatch.setattr("kernel_gateway.api.door.TICK", 0.05)
    async with running(settings(tmp_path, pool_size=0), lambda text: None) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        writer.write(b"GET / HT")
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def drained(socket: ClientConnection) -> None:
    """Read a WebSocket until it raises."""
    while True:
        await socket.recv()


async def test_a_removed_key_is_cut_off(tmp_path: Path, client: AsyncHTTPClient) -> None:
    """When another process removes a key, its WebSockets and requests end, and those of other keys go on."""
    async with running(settings(tmp_path, pool_size=0), lambda text: None) as server:
        answers = []
        with closing(Store(tmp_path / "data" / "cellvm.db")) as store:
            owner = store.add_key(REMOVED, "removed")
            for key, pause in ((REMOVED, 60), (KEY, 5)):
                body = {"templateID": "code_interpreter"}
                box = json.loads((await call(client, server, "POST", "/sandboxes", body, key)).body)["sandboxID"]
                path = f"/sandboxes/{box}"
                cell = {"code": f"import time; time.sleep({pause}); 6 * 7"}
                running_cell = asyncio.create_task(call(client, server, "POST", f"{path}/execute", cell, key))
                uri = f"{server.url.replace('http', 'ws')}{path}/stream"
                answers.append((running_cell, await connect(uri, additional_headers={"X-API-Key": key})))
            await asyncio.sleep(0.5)
            assert store.remove_key(owner)
        (cut, socket), (kept, other) = answers
        with pytest.raises(ConnectionClosed) as closed:
            await asyncio.wait_for(drained(socket), 10)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, "the key was removed")
        with pytest.raises(HTTPClientError):
            (await cut).rethrow()
        assert json.loads((await kept).body)["results"][0]["data"] == {"text/plain": "42"}
        await other.close()
        assert (await call(client, server, "GET", "/sandboxes", key=REMOVED)).code == 401
        assert len(server.sandboxes) == 2


async def test_a_removed_key_with_limits_is_cut_off_alone(tmp_path: Path, client: AsyncHTTPClient) -> None:
    """Its own WebSocket ends. That of the owner's first key, in the same sandbox, goes on."""
    async with running(settings(tmp_path, pool_size=0), lambda text: None) as server:
        answer = await call(client, server, "POST", "/sandboxes", {"templateID": "base"})
        box = json.loads(answer.body)["sandboxID"]
        uri = f"{server.url.replace('http', 'ws')}/sandboxes/{box}/stream"
        with closing(Store(tmp_path / "data" / "cellvm.db")) as store:
            scope = parse_scope(f"sandbox={box}")
            limited = store.add_key(REMOVED, "limited", owner="CELLVM_API_KEY", scope=scope)
            cut, kept = [await connect(uri, additional_headers={"X-API-Key": key}) for key in (REMOVED, KEY)]
            assert store.remove_key(limited)
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(drained(cut), 10)
        await kept.send('{"type": "execute", "code": "6 * 7"}')
        while "42" not in str(await asyncio.wait_for(kept.recv(), 20)):
            pass
        await kept.close()
        assert (await call(client, server, "GET", f"/sandboxes/{box}")).code == 200


async def test_a_removed_key_takes_its_sandboxes(
    tmp_path: Path, client: AsyncHTTPClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keys remove --with-sandboxes`, in another process, ends those of that key and no others."""
    monkeypatch.setenv("CELLVM_DATA_DIR", str(tmp_path / "data"))
    async with running(settings(tmp_path, pool_size=0), lambda text: None) as server:
        boxes = []
        with closing(Store(tmp_path / "data" / "cellvm.db")) as store:
            owner = store.add_key(REMOVED, "removed")
            for key in (REMOVED, KEY):
                answer = await call(client, server, "POST", "/sandboxes", {"templateID": "base"}, key)
                boxes.append(json.loads(answer.body)["sandboxID"])
            command = [sys.executable, "-m", "kernel_gateway", "keys", "remove", owner, "--with-sandboxes"]
            process = await asyncio.create_subprocess_exec(*command)
            assert await process.wait() == 0
            await eventually(lambda: len(server.sandboxes) == 1)
            assert server.sandboxes.find(boxes[0]) is None
            assert (store.end_of(boxes[0], owner) or (0, ""))[1] == "key_removed"
        assert (await call(client, server, "GET", f"/sandboxes/{boxes[1]}")).code == 200


async def test_the_key_of_the_variable_is_not_stored(tmp_path: Path, client: AsyncHTTPClient) -> None:
    """It is valid while the variable says so. A server that is started with another one does not know it any more."""
    other = KEY[::-1]
    async with running(settings(tmp_path, pool_size=0), lambda text: None) as server:
        assert (await call(client, server, "GET", "/sandboxes")).code == 200
    async with running(settings(tmp_path, pool_size=0, api_key=other), lambda text: None) as server:
        assert (await call(client, server, "GET", "/sandboxes")).code == 401
        assert (await call(client, server, "GET", "/sandboxes", key=other)).code == 200
    async with running(settings(tmp_path, pool_size=0, api_key=""), lambda text: None) as server:
        assert server.new_key is not None
        assert (await call(client, server, "GET", "/sandboxes", key=other)).code == 401


@pytest.mark.parametrize("key", ["x", "x" * 19, "x" * 257, "with a blank in between", "schlüssel" * 5])
async def test_weak_keys_are_refused(tmp_path: Path, key: str) -> None:
    """A key that could be guessed, or that no client can send, ends the start with a sentence that says what to do."""
    with pytest.raises(SettingsError, match=r"CELLVM_API_KEY must have 20 to 256 .* `openssl rand"):
        async with running(settings(tmp_path, api_key=key), lambda text: None):
            pass


async def test_a_disk_at_its_floor(tmp_path: Path, client: AsyncHTTPClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """While too little space is free no sandbox is created, health says why, and running sandboxes go on."""
    async with running(settings(tmp_path, pool_size=0), lambda text: None) as server:
        body = {"templateID": "code_interpreter"}
        box = json.loads((await call(client, server, "POST", "/sandboxes", body)).body)["sandboxID"]
        assert json.loads((await call(client, server, "GET", "/health")).body)["trouble"] is None
        monkeypatch.setattr("kernel_gateway.sandbox.places.FLOOR_SHARE", 1.0)
        monkeypatch.setattr("kernel_gateway.sandbox.places.FLOOR", 1 << 60)
        answer = await call(client, server, "POST", "/sandboxes", body)
        assert (answer.code, error_of(answer)["error"]) == (503, "host_full")
        assert "MiB free" in error_of(answer)["message"]
        assert "MiB free" in json.loads((await call(client, server, "GET", "/health")).body)["trouble"]
        answer = await call(client, server, "POST", f"/sandboxes/{box}/execute", {"code": "6 * 7"})
        assert json.loads(answer.body)["results"][0]["data"] == {"text/plain": "42"}
        assert len(server.sandboxes) == 1


async def test_a_relative_data_directory(
    tmp_path: Path, client: AsyncHTTPClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels start, whatever directory their agents work in."""
    monkeypatch.chdir(tmp_path)
    async with running(settings(tmp_path, data_dir="data", pool_size=0), lambda text: None) as server:
        answer = await call(client, server, "POST", "/sandboxes", {"templateID": "code_interpreter"})
        box = json.loads(answer.body)["sandboxID"]
        answer = await call(client, server, "POST", f"/sandboxes/{box}/execute", {"code": "6 * 7"})
        assert json.loads(answer.body)["results"][0]["data"] == {"text/plain": "42"}


async def test_a_data_directory_with_a_long_path(tmp_path: Path) -> None:
    """The start is refused with the reason, because no kernel could start there without isolation."""
    with pytest.raises(SettingsError, match="shorter --data-dir"):
        async with running(settings(tmp_path, data_dir=str(tmp_path / ("x" * 100))), lambda text: None):
            pass


async def test_a_server_from_start_to_end(
    tmp_path: Path, client: AsyncHTTPClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The server starts, warns that there is no isolation, answers, runs commands and cells, and leaves nothing."""
    with caplog.at_level(logging.INFO):
        async with running(settings(tmp_path), lambda text: None) as server:
            assert "ISOLATION IS OFF" in caplog.text
            health = json.loads((await call(client, server, "GET", "/health", key="")).body)
            assert (health["ready"], health["isolation"], health["accelerator"]) == (True, "none", "native")
            (pool,) = server.sandboxes.pools.values()
            await eventually(lambda: pool.ready == 1, 20)
            answer = await call(client, server, "POST", "/sandboxes", {"templateID": "code_interpreter"})
            assert answer.code == 201, answer.body
            box = json.loads(answer.body)["sandboxID"]
            body = {"cmd": "sh", "args": ["-c", "echo $E2B_SANDBOX_ID; pwd"]}
            result = json.loads((await call(client, server, "POST", f"/sandboxes/{box}/processes", body)).body)
            assert result["stdout"].split("\n")[0] == box
            for code, text in (("x = 41", None), ("x + 1", "42")):
                answer = await call(client, server, "POST", f"/sandboxes/{box}/execute", {"code": code})
                cell = json.loads(answer.body)
                assert (cell["results"][0]["data"]["text/plain"] if text else None) == text
            assert KEY not in caplog.text
            data = tmp_path / "data"
            assert list(data.rglob("agent-*"))
    assert sorted(path.name for path in data.rglob("*")) == [
        "cellvm.db",
        "checkpoints",
        "disks",
        "journals",
        "lock",
        "paused",
        "reserve",
        "snapshots",
    ]
    with pytest.raises(ConnectionError):
        await client.fetch(server.url + "/health")


def test_a_data_directory_that_others_may_write_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server does not start on it, and `cellvm keys` does not, either. Both say what to do."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o777)
    for command in (["serve", "--isolation", "unisolated", "--port", "0"], ["keys", "list"]):
        assert main([*command, "--data-dir", str(tmp_path / "data")]) == 1
        assert "chmod go-w" in " ".join(capsys.readouterr().err.split())
    assert list((tmp_path / "data").iterdir()) == []


async def test_the_first_start_makes_a_key(tmp_path: Path, client: AsyncHTTPClient) -> None:
    """Without a key in the settings the first start makes one that works. Later starts know it and make none."""
    mine = settings(tmp_path, api_key="", pool_size=0)
    async with running(mine, lambda text: None) as server:
        key = server.new_key
        assert key is not None
        assert (await call(client, server, "GET", "/sandboxes", key=key)).code == 200
        assert (await call(client, server, "GET", "/sandboxes", key="other")).code == 401
    async with running(mine, lambda text: None) as server:
        assert server.new_key is None
        assert (await call(client, server, "GET", "/sandboxes", key=key)).code == 200


async def test_two_servers_do_not_share_a_data_directory(tmp_path: Path) -> None:
    """The second is refused with a sentence, and the first goes on."""
    mine = settings(tmp_path, pool_size=0)
    async with running(mine, lambda text: None):
        with pytest.raises(SettingsError, match="another server uses"):
            await running(mine, lambda text: None).__aenter__()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Tornado leaves its socket to the GC
async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """The start is refused with host and port in the message, and nothing stays held."""
    async with running(settings(tmp_path, pool_size=0), lambda text: None) as server:
        port = int(server.url.rsplit(":", 1)[1])
        with pytest.raises(SettingsError, match=rf"127\.0\.0\.1:{port}"):
            await running(settings(tmp_path / "other", port=port), lambda text: None).__aenter__()


@pytest.mark.parametrize(
    ("fields", "says"), [({"templates": "nope"}, "no template 'nope'"), ({"host": "256.1.1.1"}, "256.1.1.1")]
)
async def test_settings_that_can_not_be_used(tmp_path: Path, fields: dict[str, str], says: str) -> None:
    """They are refused with a sentence, and nothing stays held."""
    with pytest.raises(SettingsError, match=says):
        await running(settings(tmp_path, **fields), lambda text: None).__aenter__()


async def test_a_stop_lets_requests_finish(tmp_path: Path, client: AsyncHTTPClient) -> None:
    """A server that goes down finishes its running requests and takes no new ones."""
    context = running(settings(tmp_path, pool_size=0), lambda text: None)
    server = await context.__aenter__()
    answer = await call(client, server, "POST", "/sandboxes", {"templateID": "base"})
    box = json.loads(answer.body)["sandboxID"]
    body = {"cmd": "sh", "args": ["-c", "sleep 0.5; echo done"]}
    under_way = asyncio.create_task(call(client, server, "POST", f"/sandboxes/{box}/processes", body))
    await asyncio.sleep(0.2)
    await context.__aexit__(None, None, None)
    assert json.loads((await under_way).body)["stdout"] == "done\n"


async def test_a_stop_does_not_wait_for_ever(tmp_path: Path, client: AsyncHTTPClient) -> None:
    """A request that does not finish within shutdown_timeout ends with its sandbox, and its answer says so."""
    context = running(settings(tmp_path, pool_size=0, shutdown_timeout=1), lambda text: None)
    server = await context.__aenter__()
    answer = await call(client, server, "POST", "/sandboxes", {"templateID": "base"})
    box = json.loads(answer.body)["sandboxID"]
    body = {"cmd": "sleep", "args": ["60"]}
    under_way = asyncio.create_task(call(client, server, "POST", f"/sandboxes/{box}/processes", body))
    await asyncio.sleep(0.2)
    begun = time.monotonic()
    await context.__aexit__(None, None, None)
    assert 0.8 < time.monotonic() - begun < 4
    try:
        answer = await under_way
    except (ConnectionError, OSError):
        pass
    else:
        assert error_of(answer)["error"] == "sandbox_died"


async def test_a_restart_tells_what_became_of_sandboxes(tmp_path: Path, client: AsyncHTTPClient) -> None:
    """After a stop the owner hears why a sandbox ended."""
    async with running(settings(tmp_path, pool_size=0), lambda text: None) as server:
        answer = await call(client, server, "POST", "/sandboxes", {"templateID": "base"})
        box = json.loads(answer.body)["sandboxID"]
    async with running(settings(tmp_path, pool_size=0), lambda text: None) as server:
        answer = await call(client, server, "GET", f"/sandboxes/{box}")
        assert answer.code == 404
        assert error_of(answer)["hint"].endswith("server_stopped")


# -- the command line


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`cellvm keys` makes, lists and removes keys. The list never shows one."""
    monkeypatch.setenv("CELLVM_DATA_DIR", str(tmp_path))
    assert main(["keys", "add", "mine"]) == 0
    key = next(word for word in capsys.readouterr().out.split() if word.startswith("e2b_"))
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert "mine" in listed
    assert key not in listed
    owner = next(line for line in listed.splitlines() if "mine" in line).split()[0]
    assert main(["keys", "remove", owner]) == 0
    capsys.readouterr()
    main(["keys", "list"])
    assert "mine" not in capsys.readouterr().out


def test_keys_with_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`cellvm keys add --scope` makes them, and the list tells their limits. What makes no sense is refused."""
    monkeypatch.setenv("CELLVM_DATA_DIR", str(tmp_path))
    assert main(["keys", "add", "mine"]) == 0
    with closing(Store(tmp_path / "cellvm.db")) as store:
        (mine,) = store.list_keys()
        asyncio.run(written(store, mine.id))
    for scope in (["read-only", "--of", mine.id], ["template=code-interpreter-v1"], ["sandbox=sbx1"]):
        assert main(["keys", "add", "limited", "--scope", *scope]) == 0
    assert main(["keys", "add", "limited", "--scope", "read-only", "--of", "CELLVM_API_KEY"]) == 0
    capsys.readouterr()
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    for limits in (f"(read-only of {mine.id})", "(template=code_interpreter)", f"(sandbox=sbx1 of {mine.id})"):
        assert limits in listed
    assert "(read-only of CELLVM_API_KEY)" in listed
    for wrong in (
        ["add", "x", "--scope", "all"],
        ["add", "x", "--scope", "read-only"],
        ["add", "x", "--of", mine.id],
        ["add", "x", "--scope", "read-only", "--of", "unknown"],
        ["add", "x", "--scope", "template=unknown"],
        ["add", "x", "--scope", "sandbox=unknown"],
        ["list", "--scope", "read-only"],
        ["add", "x", "--with-sandboxes"],
    ):
        assert main(["keys", *wrong]) == 1
        assert "cellvm: " in capsys.readouterr().err
    main(["keys", "list"])
    assert capsys.readouterr().out == listed


async def written(store: Store, owner: str) -> None:
    await store.sandbox_created("sbx1", owner, "base")


@pytest.mark.parametrize(
    ("argv", "says"),
    [(["serve", "--port", "x"], "--port"), (["serve", "--isolation", "docker"], "--isolation")],
)
def test_a_bad_flag(argv: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An invalid value gives a message with the flag's name and a non-zero status, without a traceback."""
    assert main([*argv, "--data-dir", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert says in told
    assert "Traceback" not in told


@pytest.mark.parametrize("command", ["serve", "build", "doctor", "run", "keys"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command has help; `serve` lists every setting."""
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert command in text
    if command == "serve":
        assert "--max-sandboxes" in text


async def test_it_listens_beyond_this_machine_only_when_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without isolation the server listens elsewhere only by a flag, so not by accident. The message names it."""
    with pytest.raises(SettingsError, match="allow-insecure-emulation"):
        async with running(settings(tmp_path, host="0.0.0.0", pool_size=0), print):
            pass
    async with running(settings(tmp_path, host="0.0.0.0", pool_size=0, allow_insecure_emulation=True), print) as server:
        assert server.url.startswith("http://0.0.0.0:")
        assert "KEYS CROSS THE NETWORK IN CLEAR" in caplog.text
    caplog.clear()
    async with running(settings(tmp_path, pool_size=0), print):
        assert "IN CLEAR" not in caplog.text


async def test_a_server_and_its_names(tmp_path: Path, client: AsyncHTTPClient) -> None:
    """The server answers to its own names and to those of --allow-host."""

    async def code(server: Server, host: str) -> int:
        return (await client.fetch(f"{server.url}/health", headers={"Host": host}, raise_error=False)).code

    async with running(settings(tmp_path, pool_size=0, domain="box.example.com:8443"), print) as server:
        assert [await code(server, host) for host in ("box.example.com", "evil.example")] == [200, 421]
    async with running(settings(tmp_path, pool_size=0, allow_host="a.example, B.example"), print) as server:
        assert [await code(server, host) for host in ("a.example", "b.example:1", "c.example")] == [200, 200, 421]
    async with running(settings(tmp_path, pool_size=0, allow_host="*"), print) as server:
        assert await code(server, "evil.example") == 200


async def test_no_core_is_dumped(tmp_path: Path) -> None:
    """A server that crashes leaves no copy of its memory, which has everybody's output."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    async with running(settings(tmp_path, pool_size=0), print):
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, before[1])
    resource.setrlimit(resource.RLIMIT_CORE, before)


def certificate(directory: Path) -> Path:
    """A CA certificate of the test's own."""
    path = directory / "own.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=ours", "-keyout", "/dev/null"]
    subprocess.run([*command, "-out", path], check=True, capture_output=True)
    return path


def test_an_extra_ca_is_added(tmp_path: Path) -> None:
    """Guests trust the bundle and the operator's CA. A file without a certificate is refused by its setting."""
    bundle, own = tmp_path / "bundle.pem", certificate(tmp_path)
    bundle.write_text("# the host's\n")
    made = builder(settings(tmp_path, ca_bundle=str(bundle), extra_ca=str(own))).ca_bundle
    assert made is not None
    assert made.read_bytes() == bundle.read_bytes() + b"\n" + own.read_bytes()
    assert builder(settings(tmp_path, ca_bundle=str(bundle))).ca_bundle == bundle
    (tmp_path / "other.txt").write_text("hello")
    for extra, base in ((tmp_path / "other.txt", bundle), (tmp_path / "none", bundle), (own, tmp_path / "none")):
        with pytest.raises(SettingsError, match="--extra-ca"):
            builder(settings(tmp_path, ca_bundle=str(base), extra_ca=str(extra)))
