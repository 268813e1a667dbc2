"""E2B's dialect at its edges: who may, which sandbox is meant, and what no client of E2B's would send."""

import asyncio
import json
import logging
import random
import struct
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest
from tornado.httpclient import HTTPResponse

from kernel_gateway.api.e2b import connect, control, rpc
from kernel_gateway.api.e2b.plane import signature
from kernel_gateway.api.e2b.rpc import METHODS, Kind
from kernel_gateway.sandbox.sandbox import Sandbox
from tests.fakes import SavingDriver, Service, resident, serving

ENVD, INTERPRETER = "49983", "49999"


class Box:
    """A sandbox as E2B's clients reach it."""

    def __init__(self, service: Service, sandbox: Sandbox) -> None:
        self.service = service
        self.sandbox = sandbox

    async def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        port: str | None = ENVD,
        token: str | None = "",
        headers: dict[str, str] | None = None,
    ) -> HTTPResponse:
        """One request. Without `token` it is the sandbox's own, without `port` no header names the sandbox."""
        sent = dict(headers or {})
        if port is not None:
            sent |= {"E2b-Sandbox-Id": self.sandbox.id, "E2b-Sandbox-Port": port}
        if token is not None:
            sent["X-Access-Token"] = token or self.sandbox.access_token
        return await self.service.call(method, path, body=body, key=None, headers=sent)

    async def rpc(self, method: str, message: Any, **options: Any) -> HTTPResponse:
        """A unary call."""
        headers = {"Content-Type": connect.UNARY, **options.pop("headers", {})}
        return await self.call("POST", f"/{method}", json.dumps(message).encode(), headers=headers, **options)

    async def stream(self, method: str, message: Any, **options: Any) -> tuple[list[Any], Any]:
        """The messages of a stream of answers, and what its last envelope says."""
        headers = {"Content-Type": connect.STREAM, **options.pop("headers", {})}
        answer = await self.call("POST", f"/{method}", connect.envelope(message), headers=headers, **options)
        assert answer.code == 200, answer.body
        return envelopes(answer.body)


def envelopes(data: bytes) -> tuple[list[Any], Any]:
    found: list[Any] = []
    while data:
        flags, length = struct.unpack_from(">BI", data)
        message = json.loads(data[5 : 5 + length])
        data = data[5 + length :]
        if flags == connect.END:
            assert data == b""
            return found, message
        found.append(message)
    raise AssertionError("the stream has no last envelope")


async def created(service: Service, **fields: Any) -> Box:
    return Box(service, service.sandboxes.get(service.owner, await service.create(**fields)))


@pytest.fixture
async def e2b(service: Service) -> Box:
    return await created(service)


# -- who may


@pytest.mark.parametrize("method", ["process.Process/List", "filesystem.Filesystem/Stat"])
async def test_tokens(e2b: Box, service: Service, method: str, caplog: pytest.LogCaptureFixture) -> None:
    """The sandbox's own token opens it. Another sandbox's, a key and the token for ports do not, and none is logged."""
    caplog.set_level(logging.DEBUG)
    other = await created(service)
    message = {"path": "/"}
    assert (await e2b.rpc(method, message)).code == 200
    for token in (None, "x", other.sandbox.access_token, e2b.sandbox.traffic_token, service.key):
        answer = await e2b.rpc(method, message, token=token)
        assert answer.code == 401
        assert json.loads(answer.body)["code"] == "unauthenticated"
    secrets = (e2b.sandbox.access_token, other.sandbox.access_token, e2b.sandbox.traffic_token)
    assert not any(secret in caplog.text for secret in secrets)


async def test_the_interpreter_takes_either_token(e2b: Box) -> None:
    """The code interpreter is opened by both tokens of its sandbox, and by nothing else."""
    traffic = {"E2b-Traffic-Access-Token": e2b.sandbox.traffic_token}
    assert (await e2b.call("GET", "/contexts", port=INTERPRETER, token=None, headers=traffic)).code == 200
    assert (await e2b.call("GET", "/contexts", port=INTERPRETER)).code == 200
    assert (await e2b.call("GET", "/contexts", port=INTERPRETER, token=None)).code == 401
    assert (await e2b.call("GET", "/contexts", port=INTERPRETER, token="x")).code == 401


async def test_whoever_guesses_is_slowed(e2b: Box) -> None:
    """Many wrong tokens from one address get 429, and the right one works on."""
    codes = {(await e2b.rpc("process.Process/List", {}, token=f"wrong{number}")).code for number in range(40)}
    assert codes == {401, 429}
    assert (await e2b.rpc("process.Process/List", {})).code == 200


async def test_a_key_that_may_only_read_gets_no_token(e2b: Box, service: Service) -> None:
    """A read-only key sees the sandbox without what opens it, and may not connect."""
    from kernel_gateway.sandbox.key import Scope

    service.store.add_key("e2b_" + "c" * 40, "reader", owner=service.owner, scope=Scope(is_read_only=True))
    answer = await service.call("GET", f"/sandboxes/{e2b.sandbox.id}", key="e2b_" + "c" * 40)
    assert answer.code == 200
    assert e2b.sandbox.access_token.encode() not in answer.body
    answer = await service.call("POST", f"/v2/sandboxes/{e2b.sandbox.id}/connect", {}, key="e2b_" + "c" * 40)
    assert answer.code == 403


async def test_another_owner(e2b: Box, service: Service) -> None:
    """Another owner's key gets neither the sandbox nor its tokens."""
    for method, path in (("POST", "/v2/sandboxes/{}/connect"), ("GET", "/sandboxes/{}")):
        answer = await service.call(method, path.format(e2b.sandbox.id), {}, key=service.other_key)
        assert answer.code == 404
        assert e2b.sandbox.access_token.encode() not in answer.body


# -- which sandbox


async def test_half_a_place(e2b: Box) -> None:
    """A request that names a sandbox without a port, or the reverse, is 400 and says what is missing."""
    for given, missing in (("E2b-Sandbox-Id", "E2b-Sandbox-Port"), ("E2b-Sandbox-Port", "E2b-Sandbox-Id")):
        answer = await e2b.call("GET", "/health", port=None, headers={given: "49983"})
        assert answer.code == 400
        assert f"missing header {missing}" in json.loads(answer.body)["message"]


async def test_wrong_places(e2b: Box) -> None:
    """The headers decide, not the token: an id that is nobody's is gone, and a port that is none is refused."""
    own = e2b.sandbox.id
    for sandbox in ("sbxnobody", f"../{own}", f"{own}x", own.upper()):
        for port, path, code in ((ENVD, "/files?path=a", 502), (INTERPRETER, "/contexts", 502), ("8000", "/", 403)):
            headers = {"E2b-Sandbox-Id": sandbox, "E2b-Sandbox-Port": port}
            answer = await e2b.call("GET", path, port=None, headers=headers)
            assert (answer.code, json.loads(answer.body)["sandboxId"]) == (code, sandbox)
    for port in ("abc", "-1", "0", "65536", f"{ENVD}x", "9" * 400):
        answer = await e2b.call("GET", "/health", port=port)
        assert (answer.code, json.loads(answer.body)["message"]) == (400, "a port is a number from 1 to 65535")


@pytest.mark.parametrize("port", [ENVD, INTERPRETER])
async def test_health(e2b: Box, service: Service, port: str) -> None:
    """Health is told to anyone who knows the id: good while it runs, then 502 in E2B's words."""
    assert (await e2b.call("GET", "/health", port=port, token=None)).code == (204 if port == ENVD else 200)
    await service.call("DELETE", f"/sandboxes/{e2b.sandbox.id}")
    answer = await e2b.call("GET", "/health", port=port, token=None)
    told = {"sandboxId": e2b.sandbox.id, "message": "The sandbox was not found", "code": 502}
    assert (answer.code, json.loads(answer.body)) == (502, told)
    answer = await e2b.rpc("process.Process/List", {})
    assert (answer.code, json.loads(answer.body)) == (502, told)


async def test_without_headers(e2b: Box, service: Service) -> None:
    """Some releases forget the headers: the token says which sandbox is meant."""
    await created(service)
    answer = await e2b.rpc("filesystem.Filesystem/MakeDir", {"path": "mine"}, port=None)
    assert answer.code == 200
    assert "/home/user/mine" in service.guest(e2b.sandbox.id).files
    assert (await e2b.rpc("process.Process/List", {}, port=None, token="x" * 48)).code == 401
    assert (await e2b.call("GET", "/health", port=None, token=None)).code == 200, "the server's own"


async def test_a_control_request_with_headers_of_a_plane(e2b: Box, service: Service) -> None:
    """Old releases send them with `connect`, too. It is the server's own all the same, and needs a key."""
    headers = {"E2b-Sandbox-Id": e2b.sandbox.id, "E2b-Sandbox-Port": ENVD}
    path = f"/sandboxes/{e2b.sandbox.id}/connect"
    assert (await service.call("POST", path, {}, headers=headers)).code == 200
    assert (await e2b.call("POST", path, b"{}")).code == 401
    assert (await e2b.call("GET", "/nothing")).code == 404


async def test_other_ports(e2b: Box) -> None:
    """Another port than E2B's own is a service: closed without a token, and not there without one that listens."""
    answer = await e2b.call("GET", "/", port="8000", token=None)
    assert answer.code == 403
    told = json.loads(answer.body)
    assert (told["sandboxId"], told["code"]) == (e2b.sandbox.id, 403)
    assert "Token header 'e2b-traffic-access-token' is missing" in told["message"]
    assert (await e2b.call("GET", "/", port="0x1", token=None)).code in (400, 403)


# -- signed addresses


def address(path: str, operation: str, token: str, expiration: str = "", user: str = "") -> str:
    sign = quote(signature(path, operation, user, token, expiration), safe="")
    more = (f"&signature_expiration={expiration}" if expiration else "") + (f"&username={user}" if user else "")
    return f"/files?path={quote(path)}&signature={sign}{more}"


async def test_signatures(e2b: Box, service: Service) -> None:
    """A signature opens one file for one operation, as long as it lasts, whoever has it."""
    other = await created(service)
    token = e2b.sandbox.access_token
    service.guest(e2b.sandbox.id).files |= {"/home/user/a": b"content", "/home/user/b": b"other"}
    later, before = str(int(time.time()) + 60), str(int(time.time()) - 1)

    async def get(url: str, **options: Any) -> tuple[int, bytes]:
        answer = await e2b.call("GET", url, port=None, **{"token": None, **options})
        return answer.code, answer.body

    for expiration in ("", later):
        assert await get(address("a", "read", token, expiration)) == (200, b"content")
    expired = b'{"code":401,"message":"signature is already expired"}'
    assert await get(address("a", "read", token, before)) == (401, expired)
    forged = [
        address("a", "write", token),
        address("a", "read", token).replace("path=a", "path=b"),
        address("a", "read", other.sandbox.access_token).replace("path=a", "path=b"),
        address("a", "read", token, later).replace(later, str(int(later) + 1)),
        address("a", "read", token, before).replace(f"&signature_expiration={before}", ""),
        address("a", "read", token) + "&username=root",
        address("a", "read", "x" * 48),
        "/files?path=a&signature=v1_",
        "/files?path=a&signature=" + "A" * 46,
        "/files?path=a",
    ]
    for url in forged:
        code, body = await get(url)
        assert code == 401, url
        assert b"content" not in body
        assert body != expired
    assert (await get(address("a", "read", token), token="wrong"))[0] == 401, "a wrong token beside a good signature"
    assert (await get(address("a", "read", other.sandbox.access_token)))[0] == 404, "of the sandbox that signed"


# -- malformed


def malformed() -> list[tuple[str, str, bytes, dict[str, str]]]:
    """Requests to procedures: a name, the method, the body, headers. They are the same each time."""
    chance = random.Random(7)
    good = {"process": {"cmd": "true"}, "path": "/", "watcherId": "x"}
    text = json.dumps(good).encode()
    whole = connect.envelope(good)
    found: list[tuple[str, str, bytes, dict[str, str]]] = []
    for name, method in METHODS.items():
        is_stream = method.kind is not Kind.UNARY
        own, foreign = (connect.STREAM, connect.UNARY) if is_stream else (connect.UNARY, connect.STREAM)
        for kind in (foreign, "application/proto", "application/connect+proto", "application/grpc+json", "text/plain"):
            found.append((f"{name} as {kind}", name, whole if is_stream else text, {"Content-Type": kind}))
        bodies = [
            b"[]",
            b"null",
            b"{",
            b'{"path": 1, "process": 2, "watcherId": 3}',
            b"{} {}",
            b"\xff\xfe",
            b"[" * 5000,
        ]
        if (
            method.kind is Kind.CLIENT or method.request.__struct_fields__ == ()
        ):  # no field is wrong that they don't have
            bodies = [b"[]", b"{", b"{} {}", b"\xff\xfe"]
        if is_stream:
            envelopes = [connect.HEADER.pack(0, len(body)) + body for body in bodies]
            envelopes += [b"\1" + whole[1:], b"\2" + whole[1:], bytes([chance.randrange(4, 256)]) + whole[1:]]
            envelopes += [whole[:-1], whole[:3], b"\0" + (2**31).to_bytes(4, "big") + text]
            bodies = [*envelopes, *([whole + whole, b""] if method.kind is Kind.SERVER else [])]
        for number, body in enumerate(bodies):
            found.append((f"{name} with body {number}", name, body, {"Content-Type": own}))
        encoding = "Connect-Content-Encoding" if is_stream else "Content-Encoding"
        packed = {"Content-Type": own, encoding: "zstd"}
        found.append((f"{name} packed", name, whole if is_stream else text, packed))
    return found


async def test_malformed_envelopes(e2b: Box) -> None:
    """Each of about 200 requests that can't be right gets Connect's error, and the sandbox works on."""
    table = malformed()
    assert len(table) >= 200
    for name, method, body, headers in table:
        answer = await e2b.call("POST", f"/{method}", body, headers=headers)
        told = json.loads(answer.body)
        assert answer.code in (400, 415, 501), name
        assert told["code"] in ("invalid_argument", "unimplemented"), name
        assert told["message"], name
        if answer.code == 415:
            assert answer.headers["Accept-Post"] == f"{connect.UNARY}, {connect.STREAM}"
    assert (await e2b.rpc("process.Process/List", {})).code == 200


@pytest.mark.parametrize(
    "path", ["/process.Process/Nothing", "/filesystem.Filesystem/Compose", "/other.Service/Method"]
)
async def test_methods_that_do_not_exist(e2b: Box, path: str) -> None:
    """They are unimplemented, never a plain 404, because a client would take that for a missing file."""
    answer = await e2b.call("POST", path, b"{}", headers={"Content-Type": connect.UNARY})
    assert (answer.code, json.loads(answer.body)["code"]) == (501, "unimplemented")
    assert (await e2b.call("POST", path, b"{}", token="x")).code == 401


@pytest.mark.parametrize("value", ["soon", "nan", "inf", "-1", "1e9", "9" * 400])
@pytest.mark.parametrize("header", ["Connect-Timeout-Ms", "Keepalive-Ping-Interval"])
async def test_bad_headers_of_streams(e2b: Box, header: str, value: str) -> None:
    """A header that is no number is an error, and nothing is started."""
    headers = {"Content-Type": connect.STREAM, header: value}
    answer = await e2b.call(
        "POST", "/process.Process/Start", connect.envelope({"process": {"cmd": "x"}}), headers=headers
    )
    assert (answer.code, json.loads(answer.body)["code"]) == (400, "invalid_argument")
    assert not list(e2b.sandbox.guest.commands)


# -- what the SDKs' suites do not show


async def test_a_process(e2b: Box) -> None:
    """A process's events: its start, its output, its end, and the last envelope."""
    told, last = await e2b.stream("process.Process/Start", {"process": {"cmd": "echo", "args": ["hi"]}, "stdin": False})
    assert [next(iter(each["event"])) for each in told] == ["start", "data", "end"]
    assert told[1]["event"]["data"] == {"stdout": "aGkK"}
    assert told[2]["event"]["end"] == {"exitCode": 0, "exited": True, "status": "exit status 0"}
    assert last == {}


async def test_an_error_within_a_stream(e2b: Box) -> None:
    """A stream that can't begin ends with an error in its last envelope."""
    told, last = await e2b.stream("process.Process/Connect", {"process": {"pid": 4711}})
    assert (told, last["error"]["code"]) == ([], "not_found")


async def test_keepalive_and_deadline(e2b: Box) -> None:
    """A silent stream says that it lives, and ends when its time is over, with its process."""
    headers = {"Keepalive-Ping-Interval": "1", "Connect-Timeout-Ms": "1600"}
    message = {"process": {"cmd": "sleep", "args": ["60"]}, "tag": "long"}
    told, last = await e2b.stream("process.Process/Start", message, headers=headers)
    assert [next(iter(each["event"])) for each in told] == ["start", "keepalive"]
    assert last["error"]["code"] == "deadline_exceeded"


async def test_a_slow_start(e2b: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is a stream's first event, though it takes longer than silence may last."""
    monkeypatch.setattr(rpc, "SHORTEST_KEEPALIVE", 0)
    message = {"process": {"cmd": "echo", "args": ["hi"]}, "stdin": False}
    told, last = await e2b.stream("process.Process/Start", message, headers={"Keepalive-Ping-Interval": "0"})
    kinds = [next(iter(each["event"])) for each in told]
    assert (kinds[0], kinds[-1], last) == ("start", "end", {})


async def test_a_kill_resets_streams(e2b: Box, service: Service) -> None:
    """A sandbox that ends under a stream resets its connection, and is unhealthy by then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    body = connect.envelope({"process": {"cmd": "sleep", "args": ["60"]}})
    head = (
        f"POST /process.Process/Start HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: {e2b.sandbox.id}\r\n"
        f"E2b-Sandbox-Port: {ENVD}\r\nX-Access-Token: {e2b.sandbox.access_token}\r\n"
        f"Content-Type: {connect.STREAM}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await reader.readuntil(b'"start"')
    killing = asyncio.create_task(service.call("DELETE", f"/sandboxes/{e2b.sandbox.id}"))
    with pytest.raises(ConnectionResetError):
        await reader.read()
    assert (await e2b.call("GET", "/health", token=None)).code == 502
    await killing
    writer.close()


async def test_the_same_create_again(service: Service) -> None:
    """An Idempotency-Key gives the same sandbox, also at once, and is refused for another one."""
    headers = {"Idempotency-Key": "once-1"}
    body = {"templateID": "base"}
    answers = await asyncio.gather(*(service.call("POST", "/v2/sandboxes", body, headers=headers) for _ in range(3)))
    assert [each.code for each in answers] == [201, 201, 201]
    assert len({json.loads(each.body)["sandboxID"] for each in answers}) == 1
    answer = await service.call("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 9}, headers=headers)
    assert answer.code == 409
    answer = await service.call("POST", "/v2/sandboxes", body, headers={"Idempotency-Key": "no blanks"})
    assert answer.code == 400
    box = json.loads(answers[0].body)["sandboxID"]
    for number in range(control.KEPT_KEYS + 1):  # another owner's keys don't take the place of mine
        other = {"Idempotency-Key": f"other-{number}"}
        made = await service.call("POST", "/v2/sandboxes", body, headers=other, key=service.other_key)
        made = await service.call("DELETE", f"/sandboxes/{json.loads(made.body)['sandboxID']}", key=service.other_key)
        assert made.code == 204
    again = await service.call("POST", "/v2/sandboxes", body, headers=headers)
    assert json.loads(again.body)["sandboxID"] == box
    await service.call("DELETE", f"/sandboxes/{box}")
    assert (await service.call("POST", "/v2/sandboxes", body, headers=headers)).code == 404


@pytest.mark.parametrize(
    "field",
    [
        {"autoPauseMemory": False},
        {"mcp": {"x": {}}},
        {"volumeMounts": [{"name": "v", "path": "/v"}]},
        {"iam": {"tokens": {}} | {"x": 1}},
        {"network": {"egressProxy": {"address": "x"}}},
        {"network": {"rules": {"h": []}}},
        {"network": {"dnsServers": ["9.9.9.9"]}},
        {"network": {"httpsPorts": [8443]}},
    ],
)
async def test_what_is_not_offered_is_named(service: Service, field: dict[str, Any]) -> None:
    """A field that can't be honoured answers 501 and is named, and nothing is started."""
    for path in ("/sandboxes", "/v2/sandboxes"):
        answer = await service.call("POST", path, {"templateID": "base", **field})
        assert answer.code == 501
        name = next(iter(next(iter(field.values())))) if "network" in field else next(iter(field))
        assert name in json.loads(answer.body)["message"]
    assert service.driver.machines == []


async def test_the_list(service: Service) -> None:
    """Pages in both orders, and filters that match nothing give nothing."""
    boxes = [await service.create(metadata={"k k": "v&x", "n": str(number)}) for number in range(3)]

    async def page(query: str) -> tuple[list[str], str | None]:
        answer = await service.call("GET", f"/v2/sandboxes?{query}")
        assert answer.code == 200, answer.body
        return [each["sandboxID"] for each in json.loads(answer.body)], answer.headers.get("X-Next-Token")

    assert await page("") == (boxes[::-1], None)
    assert await page("order=asc") == (boxes, None)
    for order, expected in (("desc", boxes[::-1]), ("asc", boxes)):
        first, token = await page(f"order={order}&limit=2")
        assert token is not None
        assert await page(f"order={order}&limit=2&nextToken={quote(token)}") == (expected[2:], None)
        assert first == expected[:2]
    assert (await page("metadata=k%252520k%3Dv%252526x"))[0] == boxes[::-1]
    assert (await page("state=running%2Cpaused"))[0] == boxes[::-1]
    for nothing in ("state=paused", "state=other", "template=other", "metadata=k%3Dother"):
        assert await page(nothing) == ([], None)
    started = json.loads((await service.call("GET", f"/sandboxes/{boxes[1]}")).body)["startedAt"]
    assert (await page(f"startedAfter={quote(started)}"))[0] == boxes[:0:-1]
    for bad in ("limit=0", "order=up", "startedAfter=x", "nextToken=%C3%BC"):
        assert (await service.call("GET", f"/v2/sandboxes?{bad}")).code == 400, bad


async def test_the_end_at_once(e2b: Box, service: Service) -> None:
    """E2B's clients end a sandbox by a timeout of 0. Others are told that it is too small."""
    path = f"/sandboxes/{e2b.sandbox.id}/timeout"
    assert (await service.call("POST", path, {"timeout": 0})).code == 400
    assert (await service.call("POST", path, {"timeout": 0}, headers={"publisher": "e2b"})).code == 204
    await e2b.sandbox.gone()
    assert (await e2b.call("GET", "/health", token=None)).code == 502


@pytest.fixture
async def roomy(tmp_path: Any) -> AsyncIterator[Service]:
    async with serving(tmp_path, max_requests=1200) as running:
        yield running


async def test_a_thousand_idle_streams(roomy: Service) -> None:
    """A thousand clients that wait for one process take little memory, and a request beside them is answered."""
    box = await created(roomy)
    sandbox = box.sandbox
    command = sandbox.guest.commands.start(["sleep", "60"], env={})
    await command.running()
    body = connect.envelope({"process": {"pid": command.pid}})
    head = (
        f"POST /process.Process/Connect HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: {sandbox.id}\r\n"
        f"E2b-Sandbox-Port: {ENVD}\r\nX-Access-Token: {sandbox.access_token}\r\n"
        f"Content-Type: {connect.STREAM}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    before = resident()
    connections = []
    for _ in range(1000):
        reader, writer = await asyncio.open_connection("127.0.0.1", roomy.port)
        writer.write(head)
        connections.append((reader, writer))
    for reader, _ in connections:
        await asyncio.wait_for(reader.readuntil(b'"start"'), 30)
    grown = resident() - before
    assert grown < 150 * 1024 * 1024, f"{grown >> 20} MiB with both ends"
    assert (await box.rpc("process.Process/List", {})).code == 200
    await command.signal("SIGKILL")
    for reader, writer in connections:
        assert b'"end"' in await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 30)
        writer.close()


# -- pauses


async def test_a_paused_sandbox(tmp_path: Any) -> None:
    """It is gone for its clients until it is resumed, by `connect`, and its tokens are the same."""
    driver = SavingDriver()
    async with serving(tmp_path, driver, max_paused=3) as service:
        box = await created(service)
        tokens = box.sandbox.access_token, box.sandbox.traffic_token
        assert (await service.call("POST", f"/sandboxes/{box.sandbox.id}/pause")).code == 204
        for port in (ENVD, INTERPRETER):
            assert (await box.call("GET", "/health", port=port, token=None)).code == 502
        answer = await box.rpc("process.Process/List", {})
        assert (answer.code, json.loads(answer.body)["message"]) == (502, "The sandbox was not found")
        listed = json.loads((await service.call("GET", "/v2/sandboxes?state=paused")).body)
        assert [each["sandboxID"] for each in listed] == [box.sandbox.id]
    async with serving(tmp_path, driver, max_paused=3) as service:
        path = f"/v2/sandboxes/{box.sandbox.id}/connect"
        answer = await service.call("POST", path, {"timeout": 60})
        assert answer.code == 201
        told = json.loads(answer.body)
        assert (told["envdAccessToken"], told["trafficAccessToken"]) == tokens
        assert (await service.call("POST", path, {"timeout": 60})).code == 200
        again = Box(service, service.sandboxes.get(service.owner, box.sandbox.id))
        assert (await again.rpc("process.Process/List", {})).code == 200
    await driver.close()


@pytest.mark.parametrize("way", ["health", "unary", "stream", "file", "cell"])
async def test_a_request_wakes_a_sandbox(tmp_path: Any, way: str) -> None:
    """With `autoResume` every kind of request to a plane resumes a paused sandbox and is answered by it."""
    driver = SavingDriver()
    async with serving(tmp_path, driver, max_paused=3) as service:
        box = await created(service, autoResume={"enabled": True})
        assert (await service.call("POST", f"/sandboxes/{box.sandbox.id}/pause")).code == 204
        match way:
            case "health":
                assert (await box.call("GET", "/health", token=None)).code == 204
            case "unary":
                assert (await box.rpc("filesystem.Filesystem/MakeDir", {"path": "d"})).code == 200
            case "stream":
                told, last = await box.stream("process.Process/Start", {"process": {"cmd": "true"}})
                assert (len(told), last) == (2, {})
            case "file":
                raw = {"Content-Type": "application/octet-stream"}
                assert (await box.call("POST", "/files?path=a", b"content", headers=raw)).code == 200
                assert (await box.call("GET", "/files?path=a")).body == b"content"
            case "cell":
                answer = await box.call("POST", "/execute", b'{"code": "1"}', port=INTERPRETER)
                assert b"end_of_execution" in answer.body
        assert box.sandbox.state == "running"
    await driver.close()
