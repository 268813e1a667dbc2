"""MCP over HTTP: both eras, tools, scopes and what a model is told. tests/e2e/test_mcp.py has others' clients."""

import asyncio
import base64
import json
from typing import Any

import pytest
from tornado.httpclient import HTTPResponse

from kernel_gateway.mcp.protocol import headers_of
from kernel_gateway.sandbox.key import Scope
from tests.fakes import Service, eventually

META = {"io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {}}


async def post(
    real: Service,
    method: str,
    params: dict[str, Any] | None = None,
    *,
    path: str = "/mcp",
    key: str = "",
    **headers: str,
) -> HTTPResponse:
    """Send a request of the modern era."""
    message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"_meta": META, **(params or {})}}
    body = json.dumps(message).encode()
    return await real.call("POST", path, body=body, key=key, headers={**headers_of(body), **headers}, timeout=60)


async def use(real: Service, tool: str, at: str = "/mcp", /, *, key: str = "", **arguments: Any) -> dict[str, Any]:
    """The result of a tool."""
    answer = await post(real, "tools/call", {"name": tool, "arguments": arguments}, path=at, key=key)
    assert answer.code == 200, answer.body
    return dict(json.loads(answer.body)["result"])


def text(result: dict[str, Any]) -> str:
    return str(result["content"][0]["text"])


def handle(result: dict[str, Any]) -> str:
    return text(result)[1:].split(" ")[0]


@pytest.fixture(scope="module", autouse=True)
async def warm(real: Service) -> None:
    """The scope that most tests share has its sandbox."""
    await use(real, "run_code", "/mcp?scope=tests", code="1")


SCOPED = "/mcp?scope=tests"


async def test_the_list_of_tools_is_short_and_the_same(real: Service) -> None:
    """Models pay for the list with each request, so it has 5,000 bytes at most and never changes."""
    lists = [(await post(real, "tools/list")).body for _ in range(2)]
    assert lists[0] == lists[1]
    assert len(lists[0]) <= 5000
    result = json.loads(lists[0])["result"]
    assert (result["resultType"], result["cacheScope"], result["ttlMs"]) == ("complete", "public", 3_600_000)
    names = [tool["name"] for tool in result["tools"]]
    assert names == sorted(names)
    assert all(tool["inputSchema"]["type"] == "object" for tool in result["tools"])


async def test_discovery(real: Service) -> None:
    """A client of the modern era is told versions and capabilities."""
    result = json.loads((await post(real, "server/discover")).body)["result"]
    assert result["supportedVersions"][0] == "2026-07-28"
    assert result["capabilities"] == {"tools": {}, "resources": {}}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, -32700),
        (b"[]", 400, -32600),
        (b"3", 400, -32600),
        (b'{"jsonrpc": "2.0", "id": null, "method": "ping"}', 400, -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": []}', 400, -32602),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "nothing"}', 200, -32601),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "nothing"}}', 200, -32602),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": ["x"]}}', 200, -32602),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "resources/read", "params": {"uri": "file:///x"}}', 200, -32602),
    ],
)
async def test_messages_that_are_wrong(real: Service, body: bytes, status: int, code: int) -> None:
    """Each has the error that JSON-RPC and MCP ask for."""
    answer = await real.call("POST", "/mcp", body=body)
    assert (answer.code, json.loads(answer.body)["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("headers", "params", "status", "code"),
    [
        ({"Mcp-Method": "prompts/list"}, {}, 400, -32020),
        ({"MCP-Protocol-Version": "2025-11-25"}, {}, 400, -32020),
        ({}, {"_meta": {"io.modelcontextprotocol/protocolVersion": "2026-07-28"}}, 400, -32602),
        ({}, {"_meta": {**META, "io.modelcontextprotocol/protocolVersion": "2099-01-01"}}, 400, -32022),
    ],
)
async def test_headers_say_what_the_body_says(
    real: Service, headers: dict[str, str], params: dict[str, Any], status: int, code: int
) -> None:
    """A request of the modern era whose parts contradict each other is refused."""
    answer = await post(real, "tools/list", params, **headers)
    assert (answer.code, json.loads(answer.body)["error"]["code"]) == (status, code)


async def test_unknown_methods_of_the_modern_era(real: Service) -> None:
    """Methods that were removed are not found."""
    for method in ("initialize", "ping", "logging/setLevel"):
        answer = await post(real, method)
        assert (answer.code, json.loads(answer.body)["error"]["code"]) == (404, -32601)


async def test_who_may_come(real: Service) -> None:
    """A key is needed, other methods are refused, and so are web pages that are not allowed."""
    assert (await real.call("POST", "/mcp", body=b"{}", key=None)).code == 401
    answer = await real.call("GET", "/mcp")
    assert (answer.code, answer.headers["Allow"]) == (405, "DELETE, POST")
    answer = await real.call("POST", "/mcp", body=b"{}", key=None, headers={"Origin": "https://evil.example"})
    assert answer.code == 403
    answer = await post(real, "tools/list", Origin=real.url)
    assert answer.code == 200


async def test_legacy_sessions(real: Service) -> None:
    """A session has a sandbox of its own, which ends with it."""

    async def send(method: str, params: Any = None, session: str = "", **more: Any) -> HTTPResponse:
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params or {}, **more}
        headers = {"Mcp-Session-Id": session} if session else {}
        return await real.call("POST", "/mcp", message, headers=headers)

    answer = await send("initialize", {"protocolVersion": "2025-06-18"})
    session = answer.headers["Mcp-Session-Id"]
    assert json.loads(answer.body)["result"]["protocolVersion"] == "2025-06-18"
    other = await send("initialize", {"protocolVersion": "1999-01-01"})
    assert json.loads(other.body)["result"]["protocolVersion"] == "2025-11-25"
    answer = await send("notifications/initialized", session=session)
    assert json.loads((await send("ping", session=session)).body)["result"] == {}
    for code, shown in (("x = 5", ""), ("x + 1", "6")):
        answer = await send("tools/call", {"name": "run_code", "arguments": {"code": code}}, session)
        assert text(json.loads(answer.body)["result"]).partition("\n")[2] == shown
    boxes = len(real.sandboxes)
    assert (await real.call("DELETE", "/mcp", headers={"Mcp-Session-Id": session})).code == 200
    await eventually(lambda: len(real.sandboxes) == boxes - 1)
    assert (await send("ping", session=session)).code == 404
    assert (await real.call("DELETE", "/mcp", headers={"Mcp-Session-Id": session})).code == 404
    notification = await real.call("POST", "/mcp", {"jsonrpc": "2.0", "method": "notifications/initialized"})
    assert (notification.code, notification.body) == (202, b"")


async def test_whose_sandbox_it_is(real: Service) -> None:
    """Without a scope each call has a new kernel, with one they share it, and nobody else's handle is known."""
    first, second = await asyncio.gather(*(use(real, "run_code", code=f"x = {n}\nx") for n in (1, 2)))
    assert handle(first) != handle(second)
    again = await use(real, "run_code", code="x", sandbox=handle(first))
    assert text(again).endswith("\n1")
    await use(real, "run_code", SCOPED, code="x = 7")
    assert text(await use(real, "run_code", SCOPED, code="x")).endswith("\n7")
    for key, name in (("", "sbx000000000"), (real.other_key, handle(first)), ("", "sbx")):
        unknown = await use(real, "run_code", key=key, code="1", sandbox=name)
        assert unknown["isError"]
        assert text(unknown).startswith("there is no sandbox ")
    for each in (first, second):
        deleted = await use(real, "sandbox", action="delete", sandbox=handle(each))
        assert text(deleted) == f"{handle(each)} deleted"


async def test_calls_that_come_together_share_the_sandbox_of_their_scope(real: Service) -> None:
    """A scope never has two sandboxes."""
    results = await asyncio.gather(*(use(real, "run_code", "/mcp?scope=new", code="1") for _ in range(4)))
    assert len({handle(result) for result in results}) == 1
    await use(real, "sandbox", action="delete", sandbox=handle(results[0]))
    ended = await use(real, "run_code", "/mcp?scope=new", code="1")
    assert text(ended).startswith("[the sandbox before has ended (kill): variables and files are lost")
    await use(real, "sandbox", action="delete", sandbox=text(ended).split("\n")[1][1:].split(" ")[0])


async def test_a_long_cell_is_taken_up_again(real: Service) -> None:
    """An answer comes in time, and the rest comes once, from the same run."""
    code = "import time\nopen('count', 'a').write('x')\nfor n in range(20): print(n); time.sleep(0.05)"
    result = await use(real, "run_code", SCOPED, code=code, wait=0.4)
    assert "still running after" in text(result)
    assert f'execution(sandbox="{handle(result)}")' in text(result)
    lines = text(result).split("\n")[1:]
    while "still running" in text(result):
        result = await use(real, "execution", SCOPED, wait=0.4)
        lines += text(result).split("\n")[1:]
    assert [line for line in lines if line != "1"] == [str(n) for n in range(20) if n != 1]
    assert text(await use(real, "run_code", SCOPED, code="open('count').read()")).endswith("'x'")
    again = await use(real, "execution", SCOPED, id=result["_meta"]["cellvm/execution"]["id"])
    assert text(again).split("\n")[1:3] == ["0", "1"]  # an answer that was lost comes again


async def test_a_client_that_hangs_up_interrupts_its_cell(real: Service) -> None:
    """Another call tells what the cell gave."""
    kernel = next(each for each in real.sandboxes if each.metadata.get("cellvm.scope") == "tests").guest.kernel
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    params = {"name": "run_code", "arguments": {"code": "print('begun')\nimport time\ntime.sleep(30)"}}
    body = json.dumps({**call, "params": params}).encode()
    _reader, writer = await asyncio.open_connection("127.0.0.1", real.port)
    head = (
        f"POST {SCOPED} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {real.key}\r\nContent-Length: {len(body)}"
    )
    writer.write(head.encode() + b"\r\n\r\n" + body)
    await eventually(lambda: kernel.state == "busy")
    writer.close()
    await eventually(lambda: kernel.state == "idle", timeout=2)
    told = text(await use(real, "execution", SCOPED))
    assert told.split("\n")[1:3] == ["begun", "KeyboardInterrupt"]


async def test_progress_is_told_to_who_asks(real: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a token the answer is a stream, in which the last line of output comes now and then."""
    monkeypatch.setattr("kernel_gateway.api.mcp.PROGRESS", 0.2)
    params = {"name": "run_code", "arguments": {"code": "import time\nprint('half')\ntime.sleep(1)"}}
    meta = {**META, "progressToken": "p"}
    answer = await post(
        real, "tools/call", {**params, "_meta": meta}, path=SCOPED, Accept="application/json, text/event-stream"
    )
    assert answer.headers["Content-Type"] == "text/event-stream"
    messages = [json.loads(event.partition("data: ")[2]) for event in answer.body.decode().strip().split("\n\n")]
    told = [each["params"]["message"] for each in messages[:-1]]
    assert told[-1] == "half"
    assert messages[-1]["result"]["content"]


async def test_cancelling_a_request_of_a_session(real: Service) -> None:
    """A notification of the legacy era cancels it."""
    message = {"jsonrpc": "2.0", "id": 9, "method": "initialize", "params": {}}
    headers = {"Mcp-Session-Id": (await real.call("POST", "/mcp", message)).headers["Mcp-Session-Id"]}
    params = {"name": "run_code", "arguments": {"code": "import time; time.sleep(30)"}}
    call = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": params}
    running = asyncio.create_task(real.call("POST", SCOPED, call, headers=headers))
    kernel = next(each for each in real.sandboxes if each.metadata.get("cellvm.scope") == "tests").guest.kernel
    await eventually(lambda: kernel.state == "busy")
    cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 7}}
    assert (await real.call("POST", SCOPED, cancel, headers=headers)).code == 202
    assert json.loads((await running).body)["error"]["code"] == -32800
    await eventually(lambda: kernel.state == "idle", timeout=2)
    assert (await real.call("DELETE", "/mcp", headers=headers)).code == 200


async def test_images_and_links(real: Service) -> None:
    """Four images are shown, others are links whose files can be read."""
    code = """
import base64, zlib, struct
def png(n):
    head = struct.pack('>IIBBBBB', 8, 8 + n, 8, 0, 0, 0, 0)
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    data = zlib.compress(b'\\0' * 9 * (8 + n))
    return b'\\x89PNG\\r\\n\\x1a\\n' + chunk(b'IHDR', head) + chunk(b'IDAT', data) + chunk(b'IEND', b'')
for n in range(6):
    display({'image/png': base64.b64encode(png(n)).decode(), 'text/plain': 'figure'}, raw=True)
"""
    result = await use(real, "run_code", SCOPED, code=code)
    kinds = [block["type"] for block in result["content"]]
    assert kinds == ["text", *["image"] * 4, *["resource_link"] * 2]
    assert "[image 6: 8x13 PNG]" in text(result)
    answer = await post(real, "resources/read", {"uri": result["content"][-1]["uri"]})
    (content,) = json.loads(answer.body)["result"]["contents"]
    assert (content["mimeType"], base64.b64decode(content["blob"])[16:24]) == (
        "image/png",
        bytes([0, 0, 0, 8, 0, 0, 0, 13]),
    )
    unseen = await use(real, "run_code", SCOPED, code=code, max_output=0)
    assert [block["type"] for block in unseen["content"]] == ["text"]


async def test_files(real: Service) -> None:
    """Files are written and read in lines, and what is no text is said to be none."""
    assert text(await use(real, "write_file", SCOPED, path="a/b.txt", content="one\ntwo\nthree\n")) == "14 B written"
    assert text(await use(real, "read_file", SCOPED, path="a/b.txt")) == "one\ntwo\nthree"
    part = await use(real, "read_file", SCOPED, path="a/b.txt", offset=1, limit=1)
    assert text(part) == "two\n[lines 2 to 2; more follow]"
    await use(real, "run_code", SCOPED, code="open('c.bin', 'wb').write(bytes(12_000))")
    assert text(await use(real, "read_file", SCOPED, path="c.bin")) == "binary, 12 KB"
    missing = await use(real, "read_file", SCOPED, path="nothing")
    assert missing["isError"]
    uri = "cellvm://{}/files{}/a/b.txt"
    ran = await use(real, "run_code", SCOPED, code="import os; print(os.path.expanduser('~'))")
    home = text(ran).split("\n")[1]
    answer = await post(real, "resources/read", {"uri": uri.format(handle(ran), home)})
    assert json.loads(answer.body)["result"]["contents"][0]["text"] == "one\ntwo\nthree\n"
    for wrong in (uri.format(handle(ran), "/nothing"), "cellvm://sbx000000000/files/x", "x"):
        error = json.loads((await post(real, "resources/read", {"uri": wrong})).body)["error"]
        assert (error["code"], error["data"]) == (-32602, {"uri": wrong})


async def test_commands(real: Service) -> None:
    """A command has its output and its exit status, and is stopped in time."""
    ran = await use(real, "run_command", SCOPED, command="echo out; echo err >&2; exit 3")
    assert sorted(text(ran).split("\n")[1:3]) == ["err", "out"]
    assert (text(ran).split("\n")[-1], ran["isError"]) == ("exit 3", True)
    slow = await use(real, "run_command", SCOPED, command="echo begun; sleep 20", timeout=0.5)
    assert text(slow).split("\n")[1:] == ["begun", "[stopped after 0.5 s]"]
    bytes_ = await use(real, "run_command", SCOPED, command="printf 'a\\377b'")
    assert text(bytes_).split("\n")[1] == "a\ufffdb"


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("run_code", {}),
        ("run_code", {"code": 3}),
        ("run_code", {"code": "1", "wait": 51}),
        ("run_code", {"code": "1", "speed": 1}),
        ("sandbox", {"action": "create", "template": "nothing"}),
        ("sandbox", {"action": "delete"}),
        ("read_file", {"path": "\0"}),
    ],
)
async def test_arguments_that_are_wrong(real: Service, tool: str, arguments: dict[str, Any]) -> None:
    """The model is told what is wrong, so that it can correct itself."""
    result = await use(real, tool, SCOPED, **arguments)
    assert result["isError"]
    assert text(result)


async def test_a_key_with_limits_keeps_them(real: Service) -> None:
    """A key that may only read calls no tool, and a sandbox's own key means that sandbox."""
    box = handle(await use(real, "run_code", SCOPED, code="x = 7"))
    sandbox = next(each for each in real.sandboxes if each.id.startswith(box))
    keys = {"read-only": Scope(is_read_only=True), "one-sandbox": Scope(sandbox=sandbox.id)}
    for name, scope in keys.items():
        real.store.add_key(f"e2b_{name}{'0' * 30}", name, owner=real.owner, scope=scope)
    reader, user = (f"e2b_{name}{'0' * 30}" for name in keys)
    assert (await post(real, "tools/list", key=reader)).code == 403
    assert text(await use(real, "run_code", key=user, code="x")).endswith("\n7")
    assert (await use(real, "sandbox", key=user, action="create"))["isError"]
