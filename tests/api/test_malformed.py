"""R11: whatever a client sends, the answer is documented, without 5xx or traceback, and memory is bounded."""

import asyncio
import json
import random
import re
import time
from collections.abc import Awaitable, Callable

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.specs.openapi import checks

from kernel_gateway.api.app import ROUTES
from kernel_gateway.api.base import JSON_LIMIT, STATUS, Route
from tests.fakes import ENDLESS, Service, error_of, resident

EXPECTED = {501, 502, 503, 507}
"""Statuses 5xx that are documented answers: not offered, the guest refused, no room."""
BODIES = [route for route in ROUTES if route.body is not None]

VALID: dict[str, dict[str, object]] = {
    "CreateSandbox": {
        "templateID": "base",
        "timeout": 60,
        "metadata": {"a": "b"},
        "envVars": {"A": "b"},
        "network": {"allowOut": ["example.com"], "denyOut": ["0.0.0.0/0"]},
    },
    "SetNetwork": {"allowOut": ["example.com"], "denyOut": ["0.0.0.0/0"], "allow_internet_access": True},
    "SetPort": {"port": 8000, "public": True},
    "SetTimeout": {"timeout": 60},
    "Connect": {"timeout": 60},
    "Refresh": {"duration": 60},
    "Pause": {"memory": True, "requireHealthyGuest": True},
    "Resume": {"timeout": 60, "autoPause": True},
    "MakeShare": {"mode": "use", "seconds": 60},
    "TakeSnapshot": {"name": "a", "memory": True},
    "Fork": {"count": 1, "timeout": 60},
    "RequestBuild": {"name": "a:b", "tags": ["c"], "cpuCount": 1, "memoryMB": 512, "minFreeDiskMb": 1},
    "StartBuild": {
        "fromTemplate": "base",
        "startCmd": "true",
        "readyCmd": "true",
        "force": True,
        "steps": [{"type": "RUN", "args": ["true"], "force": False}],
    },
    "AssignTags": {"target": "a:b", "tags": ["c"]},
    "RemoveTags": {"name": "a", "tags": ["c"]},
    "WebhookBody": {
        "name": "a",
        "url": "https://example.com/",
        "signatureSecret": "s",
        "resourceType": "sandbox",
        "events": ["sandbox.lifecycle.killed"],
    },
    "RunProcess": {"cmd": "true", "args": ["a"], "envVars": {"A": "b"}, "cwd": "/tmp", "timeout": 5, "stdin": "x"},
    "StartCommand": {
        "cmd": "true",
        "args": ["a"],
        "envVars": {"A": "b"},
        "cwd": "/tmp",
        "timeout": 5,
        "user": "root",
        "tag": "x",
        "pty": {"rows": 24, "cols": 80},
        "stdin": True,
        "killOnHangUp": False,
    },
    "Input": {"text": "x"},
    "SendSignal": {"signal": "SIGCONT"},
    "Size": {"rows": 24, "cols": 80},
    "Execute": {"code": "1", "timeout": 5, "wait": 5, "maxOutput": 1000},
    "InlineFile": {"path": "x", "content": "YQ=="},
    "MakeDir": {"path": "d"},
    "Move": {"source": "x", "destination": "y"},
    "StartKernel": {"name": "base", "env": {"A": "b"}, "path": "x"},
    "SessionBody": {"path": "x", "name": "y", "type": "notebook", "kernel": {"name": "base"}},
}
BUILD = {"template": "none", "build": "none"}
TEXTS = [
    b"", b" ", b"{", b"}", b"[]", b"null", b"3", b'"x"', b"true", b"{}{}", b"{]", b'{"a"}', b"{'a': 1}", b"{,}",
    b'{"a": 1,}', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"\0", b"{\0}", b"[" * 10_000, b'{"a":' * 10_000, b"NaN",
    b'{"timeout": NaN}', b'{"timeout": Infinity}', b'{"timeout": 1e999}', b'{"timeout": 01}', b'{"timeout": 0x1}',
    b'{"timeout": 1' + b"0" * 5000 + b"}", b'{"timeout": -' + b"9" * 100 + b"}", b'{"timeout": 1e400000}',
    b'{"path": "\\ud800"}', b'{"path": "\\u0000"}', b'{"path": "\xff"}', b'{"path": "\xed\xa0\x80"}',
    b'{"path": "\\x"}',
    b'{"cmd": "true", "cmd": "false"}', b'{"cmd": "\\udfff"}', b'{"code": "\\ud83d"}', b"<xml/>", b"a=b&c=d",
    b'{"templateID": "\\ud800"}', b'{"templateID": "base", "metadata": {"\\ud800": "x"}}',
    b'{"templateID": "base", "envVars": {"A": "\\udc00"}}', b'{"templateID": "base", "timeout": 1e2}',
    b'{"templateID": "base", "timeout": 100.0}', b'{"templateID": "base", "timeout": true}',
    b'{"cmd": "true", "args": ["\\ud800"]}', b'{"cmd": "true", "stdin": "\\ud800"}',
    b'{"cmd": "true", "cwd": "\\ud800"}',
    b'{"cmd": "true", "timeout": 1e-300}', b'{"cmd": "true", "timeout": -0.0}', b'{"cmd": "true", "timeout": 1e308}',
    b'{"source": "\\ud800", "destination": "x"}', b'{"path": "' + b"x/" * 100_000 + b'", "content": ""}',
    b'{"path": "x", "content": "\\ud800"}', b'{"path": "x", "content": "' + b"A" * 5 + b'"}',
]  # fmt: skip
VALUES: list[object] = [
    None, True, 0, -1, 1, 3600, 3601, 2**31, 2**63, 2**64, 10**40, 1.5, -0.0, 1e-9, 1e300, "", "x", "\0", "\ud800", "ü",
    "x" * 5000, [], {}, [None], ["\0"], [1], [[]], {"": ""}, {"A": None}, {"A=": "x"}, {"\0": "\0"},
    {"\ud800": "\ud800"},
    "../" * 500, "/proc/self/mem", "~", "~root", "%00", "\n\r\n", "-", ".", "..", "/", "//",
]  # fmt: skip


def bodies(rng: random.Random, route: Route) -> bytes:
    """A body that is most likely wrong: raw text, or a valid body with a spoiled field or changed bytes."""
    valid = dict(VALID[route.body.__name__])
    how = rng.randrange(4)
    if how == 0:
        return rng.choice(TEXTS)
    if how == 1:
        del valid[rng.choice(list(valid))]
    else:
        valid[rng.choice(list(valid))] = rng.choice(VALUES)
    data = bytearray(json.dumps(valid).encode())
    if how == 3:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


async def address(service: Service, box: str) -> dict[str, str]:
    """Values for the names in routes' paths while `box` runs: its id, its kernel's, a session's, a command's."""
    kernel = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)["kernelID"]
    answer = await service.call("POST", "/api/sessions", {"path": "a.ipynb", "kernel": {"id": kernel}})
    await service.call(
        "POST", f"/sandboxes/{box}/commands", {"cmd": "sleep", "args": ["600"], "tag": "c", "stdin": True}
    )
    return {"id": box, "kernel": kernel, "session": json.loads(answer.body)["id"], "command": "c", **BUILD}


@pytest.mark.alone
async def test_r11_1000_malformed_bodies(service: Service, box: str) -> None:
    """None of 1,000 bodies gets an undocumented 5xx. Errors have the schema, p99 < 50 ms, memory + <= 16 MiB."""
    rng = random.Random(11)
    times: list[float] = []
    counts: dict[int, int] = {}
    names = await address(service, box)

    async def one(route: Route) -> None:
        body = bodies(rng, route)
        begun = time.perf_counter()
        answer = await service.call(route.method, route.path.format(**names), body=body)
        times.append(time.perf_counter() - begun)
        counts[answer.code] = counts.get(answer.code, 0) + 1
        assert answer.code < 500 or answer.code in EXPECTED, (route.path, body[:200], answer.body)
        if answer.code >= 400:
            error = error_of(answer)
            assert STATUS[error["error"]] == answer.code
            assert len(error["message"]) < 9000, "an error does not repeat all of the request"
        elif answer.code == 201:
            for sandbox in json.loads((await service.call("GET", "/sandboxes")).body):
                if sandbox["sandboxID"] != box:
                    await service.call("DELETE", f"/sandboxes/{sandbox['sandboxID']}")

    for route in BODIES:
        await one(route)
    before = resident()
    for number in range(1000):
        await one(BODIES[number % len(BODIES)])
    assert resident() - before <= 16 << 20
    assert counts[400] > 500, counts
    assert sorted(times)[int(len(times) * 0.99)] < 0.05
    assert (await service.run(box, "true"))["exitCode"] == 0


async def test_malformed_queries_and_paths(service: Service, box: str) -> None:
    """Queries and paths with any content get documented answers."""
    pieces = [
        "",
        "%00",
        "%ff",
        "%ed%a0%80",
        "%",
        "%zz",
        "+",
        "a" * 3000,
        "%2e%2e%2f",
        "ü",
        "%0d%0aX:y",
        "=",
        "&",
        ";",
        "#",
    ]
    for route in ROUTES:
        for piece in pieces:
            for query in (f"?path={piece}&{piece}", f"?path=a&path={piece}&status={piece}&metadata={piece}"):
                path = re.sub(r"\{\w+\}", box, route.path)
                if route.method == "GET" and route.path != ENDLESS:
                    answer = await service.call("GET", path + query.replace("ü", "%C3%BC"))
                    assert answer.code < 500 or answer.code in EXPECTED, (path, query, answer.body)
                    if answer.code >= 400:
                        error_of(answer)
            odd = re.sub(r"\{\w+\}", piece.replace("ü", "%C3%BC") or "%20", route.path)
            if route.path == ENDLESS:
                continue
            answer = await service.call(route.method, odd.replace("#", "%23"))
            assert answer.code < 500 or answer.code in EXPECTED, (odd, answer.body)
            if answer.code >= 400 and answer.body and route.refusal is None:
                error_of(answer)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("since=0&wait=0", 200),
        ("since=999999999999999999999999999999", 200),
        ("wait=0.01", 200),
        ("since=-1", 400),
        ("since=1.5", 400),
        ("since=", 400),
        ("since=x", 400),
        ("since=" + "9" * 5000, 400),
        ("wait=-1", 400),
        ("wait=61", 400),
        ("wait=nan", 400),
        ("wait=inf", 400),
        ("wait=-inf", 400),
    ],
)
async def test_queries_of_the_journal(service: Service, box: str, query: str, status: int) -> None:
    """A number that is malformed or out of range gets 400. A number ahead of the journal is no error."""
    kernel = (await address(service, box))["kernel"]
    answer = await service.call("GET", f"/api/kernels/{kernel}/journal?{query}", timeout=5)
    assert answer.code == status, answer.body
    if status == 200:
        page = json.loads(answer.body)
        assert (page["messages"], page["next"], page["last"], page["missing"]) == ([], 0, 0, 0)


RAW = [
    b"GET / HTTP/9.9\r\n\r\n",
    b"\r\n\r\n\r\n",
    b"\0\0\0\0\r\n\r\n",
    b"GET /health\r\n\r\n",
    b"GET  /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nA\r\n\r\n",
    b"GET /health HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST /sandboxes HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n{}",
    b"POST /sandboxes HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"POST /sandboxes HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /sandboxes HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n{}",
    b"POST /sandboxes HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * 70_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
    b"GET http://other/health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
]


@pytest.mark.parametrize("data", RAW, ids=range(len(RAW)))
async def test_what_is_no_http(service: Service, data: bytes) -> None:
    """Bytes that are no proper request end the connection or get a 4xx, and the server goes on."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(data)
    writer.write_eof()
    try:
        answer = await asyncio.wait_for(reader.read(), 5)
    except ConnectionResetError:
        answer = b""
    writer.close()
    assert not re.match(rb"HTTP/1.1 5", answer), answer[:200]
    assert (await service.call("GET", "/health")).code == 200


# -- size


@pytest.mark.parametrize("route", BODIES, ids=lambda route: f"{route.method} {route.path}")
async def test_a_json_body_too_large(service: Service, route: Route) -> None:
    """On every route a body over the limit gets 413, whether its length is announced or it comes in chunks."""
    box = await service.create()
    path = route.path.replace("{id}", box)
    body = b'{"x": "' + b"a" * JSON_LIMIT + b'"}'
    answer = await service.call(route.method, path, body=body)
    assert (answer.code, error_of(answer)["error"]) == (413, "too_large")

    async def produce(write: Callable[[bytes], Awaitable[None]]) -> None:
        for at in range(0, len(body), 1 << 18):
            await write(body[at : at + (1 << 18)])

    if route.method == "DELETE":  # this client sends chunks with no DELETE
        return
    answer = await service.call(route.method, path, body_producer=produce)
    assert (answer.code, error_of(answer)["error"]) == (413, "too_large")


async def test_a_json_body_at_the_limit(service: Service, box: str) -> None:
    """A body of exactly the limit is read."""
    body = b'{"cmd": "true", "x": "' + b"a" * (JSON_LIMIT - 24) + b'"}'
    assert len(body) == JSON_LIMIT
    answer = await service.call("POST", f"/sandboxes/{box}/processes", body=body)
    assert answer.code == 200


async def test_a_body_without_end_in_chunks(service: Service, box: str) -> None:
    """A chunked body that never ends is refused at the limit, and nothing of it is kept."""
    before = resident()
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    head = f"POST /sandboxes/{box}/execute HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n"
    writer.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
    reading = asyncio.create_task(reader.read(1000))
    chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    sent = 0
    while not reading.done() and sent < 64 << 20:
        writer.write(chunk)
        sent += len(chunk)
        try:
            await asyncio.wait_for(writer.drain(), 2)
        except ConnectionError:
            break
        await asyncio.sleep(0)
    answer = await asyncio.wait_for(reading, 2)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert resident() - before <= 16 << 20
    writer.transport.abort()


async def test_a_body_that_stops_halfway(service: Service, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends half a JSON body and then nothing is cut off after a while."""
    monkeypatch.setattr("kernel_gateway.api.base.JSON_BODY_TIMEOUT", 0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    head = (
        f"POST /sandboxes/{box}/execute HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\nContent-Length: 100\r\n\r\n"
    )
    writer.write(head.encode() + b'{"code"')
    begun = time.monotonic()
    await asyncio.wait_for(reader.read(), 5)
    assert time.monotonic() - begun < 2
    writer.close()


# -- from the document itself

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
]


async def test_requests_made_from_the_document(service: Service, box: str) -> None:
    """Schemathesis makes valid and invalid requests from /openapi.json, which documents every answer to them."""
    document = json.loads((await service.call("GET", "/openapi.json", key=None)).body)
    schema = schemathesis.openapi.from_dict(document)
    names = await address(service, box)
    loop = asyncio.get_running_loop()
    problems: list[str] = []
    checked = 0

    def run(operation: object, headers: dict[str, str], examples: int) -> None:
        """Test one operation. This runs in a thread, because the client blocks."""
        label = operation.label  # type: ignore[attr-defined]
        both = st.one_of(
            operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE),  # type: ignore[attr-defined]
            operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE),  # type: ignore[attr-defined]
        )

        @hypothesis.settings(
            max_examples=examples,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(both)
        def each(case: schemathesis.Case) -> None:
            nonlocal checked
            if not label.startswith("DELETE ") and not label.endswith("/shutdown"):
                for name in names.keys() & (case.path_parameters or {}).keys():
                    case.path_parameters[name] = names[name]
            wait = (case.query or {}).get("wait")
            if isinstance(wait, int | float) and 0 <= wait <= 60:
                case.query["wait"] = 0  # this is valid as well, and ends sooner
            response = case.call(base_url=service.url, headers=headers, timeout=10)
            checked += 1
            if response.status_code >= 500 and response.status_code not in EXPECTED:
                problems.append(f"{label}: {response.status_code} {response.text[:300]}")
                return
            # A list or an object becomes a parameter that is sent several times, which is legal. The last one counts.
            is_repeated = any(isinstance(value, list | dict) for value in (case.query or {}).values())
            judged = [check for check in CHECKS if not is_repeated or check is not checks.negative_data_rejection]
            try:
                case.validate_response(response, checks=judged)
            except BaseExceptionGroup as error:
                problems.append(f"{label}: {error!s:.600}")

        each()

    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path == ENDLESS:
            continue
        await loop.run_in_executor(None, run, operation, {"X-API-Key": service.key}, 12)
    assert not problems, f"{len(problems)} of {checked}:\n" + "\n".join(problems[:10])
    assert checked > 200
