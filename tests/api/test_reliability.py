"""Promises R2, R9, R10, R18, R28 and the resume handshake, over machines that misbehave."""

import asyncio
import json
import logging
import random
import statistics
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guest_agent import wire
from guest_agent.wire import FrameType
from kernel_gateway.api.app import ROUTES
from kernel_gateway.api.base import Route
from kernel_gateway.sandbox.sandbox import kernel_id
from tests.fakes import FakeDriver, FakeGuest, Service, Stream, error_of, eventually, own_frame, resident, serving

# -- R2: the machine ends


@pytest.mark.alone
@pytest.mark.parametrize(
    ("path", "body"),
    [("processes", {"cmd": "die"}), ("processes", {"cmd": "sleep", "args": ["60"]}), ("execute", {"code": "die()"})],
)
async def test_r2_the_machine_dies_during_a_request(pooled: Service, path: str, body: dict[str, object]) -> None:
    """The request ends with sandbox_died and unknown outcome in 200 ms. The slot is free, the pool refilled."""
    pool = pooled.sandboxes.pools["code_interpreter"]
    await eventually(lambda: pool.ready == 1)
    box = await pooled.create()
    vm = pooled.driver.machines[0]
    died: list[float] = []
    ended = asyncio.create_task(vm.wait())
    ended.add_done_callback(lambda _: died.append(time.monotonic()))
    running = asyncio.create_task(pooled.call("POST", f"/sandboxes/{box}/{path}", body))
    if "sleep" in str(body):
        await eventually(lambda: any(getattr(r, "argv", None) == ["sleep", "60"] for r in vm.guest.requests))
        vm.die("killed by a test")
    answer = await running
    assert time.monotonic() - died[0] <= 0.2
    error = error_of(answer)
    assert (answer.code, error["error"], error.get("outcome")) == (502, "sandbox_died", "unknown")
    answer = await pooled.call("GET", f"/sandboxes/{box}")
    assert (answer.code, error_of(answer)["hint"].split(": ")[1]) == (404, "died")
    assert len(pooled.sandboxes) == 0
    await eventually(lambda: pool.ready == 1)
    assert (await pooled.run(await pooled.create(), "true"))["exitCode"] == 0


async def test_a_machine_that_dies_on_stock_is_replaced(pooled: Service) -> None:
    """A dead machine of the pool is never handed out."""
    pool = pooled.sandboxes.pools["code_interpreter"]
    await eventually(lambda: pool.ready == 1)
    pooled.driver.machines[0].die("killed by a test")
    box = await pooled.create()
    assert (await pooled.run(box, "true"))["exitCode"] == 0
    await eventually(lambda: pool.ready == 1 and len(pooled.driver.alive) == 2)


async def test_whatever_happens_the_pool_is_filled(
    pooled: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The pool's task survives an unexpected exception, and logs it."""
    pool = pooled.sandboxes.pools["code_interpreter"]
    await eventually(lambda: pool.ready == 1)
    start, failures = pooled.driver.start, iter([RuntimeError("can't start new thread"), OSError("EBADF")])

    async def failing(template_id: str) -> Any:
        if failure := next(failures, None):
            raise failure
        return await start(template_id)

    monkeypatch.setattr(pooled.driver, "start", failing)
    monkeypatch.setattr("kernel_gateway.sandbox.pool.RETRY_AFTER_FAILURE", (0.01, 0.1))
    pooled.driver.machines[0].die("killed by a test")
    await eventually(lambda: pool.ready == 1 and len(pooled.driver.machines) == 2, 10)
    assert caplog.text.count("could not be prepared") == 2


async def test_the_pool_hands_out_a_machine_that_runs(pooled: Service) -> None:
    """A machine in stock stands still, and was exercised before. The create lets it go on."""
    pool = pooled.sandboxes.pools["code_interpreter"]
    await eventually(lambda: pool.ready == 1)
    vm = pooled.driver.machines[0]
    assert vm.is_stopped
    assert any(isinstance(request, wire.Spawn) for request in vm.guest.requests)
    box = await pooled.create()
    assert not vm.is_stopped
    assert pooled.guest(box) is vm.guest
    resumes = [request for request in vm.guest.requests if isinstance(request, wire.Resume)]
    assert resumes[-1].sandbox_id == resumes[-1].env["E2B_SANDBOX_ID"] == box
    assert len({request.entropy for request in resumes}) == len({request.nonce for request in resumes}) == len(resumes)
    assert (await pooled.execute(box, "1"))["executionCount"] == 1  # the exercise left no trace


async def test_other_sandboxes_do_not_notice(service: Service) -> None:
    """The end of one machine, or its nonsense, does not disturb the others."""
    first, second = await service.create(), await service.create()
    slow = asyncio.create_task(service.run(second, "sleep", "0.3"))
    await service.guest(first).send(random.Random(5).randbytes(100_000))
    await eventually(lambda: len(service.sandboxes) == 1)
    assert (await slow)["exitCode"] == 0


# -- the resume handshake: fail closed


def changed(**fields: object) -> Callable[[wire.Resumed], wire.Resumed]:
    def change(reply: wire.Resumed) -> wire.Resumed:
        for name, value in fields.items():
            setattr(reply, name, value)
        return reply

    return change


@pytest.mark.parametrize(
    "resumed",
    [lambda reply: None, changed(nonce=b"x" * 16), changed(nonce=b""), changed(generation=2), changed(sample=b"")],
    ids=["silent", "other nonce", "no nonce", "other generation", "no sample"],
)
async def test_a_machine_that_does_not_acknowledge_is_destroyed(
    tmp_path: Path, resumed: Callable[[wire.Resumed], wire.Resumed | None]
) -> None:
    """A machine without a proper acknowledgement is never used. After two of them the create gets 503."""
    driver = FakeDriver(time_scale=0.02)
    driver.script.resumed = resumed
    async with serving(tmp_path, driver) as service:
        answer = await service.call("POST", "/sandboxes", {"templateID": "base"})
        assert (answer.code, error_of(answer)["error"]) == (503, "host_full")
        assert len(driver.machines) == 2
        assert driver.alive == []
        assert len(service.sandboxes) == 0
        driver.script.resumed = lambda reply: reply
        await service.create()


async def test_a_repeated_sample_is_never_used(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """The second of two machines with the same randomness is destroyed, with a critical line in the log."""
    await service.create()
    first = next(iter(service.sandboxes._machines.guests._samples))
    service.driver.script.sample = lambda: first
    with caplog.at_level(logging.CRITICAL):
        answer = await service.call("POST", "/sandboxes", {"templateID": "base"})
    assert answer.code == 503
    assert len(service.driver.alive) == 1
    assert "reseeded" in caplog.text


async def test_one_bad_machine_is_replaced_by_another(service: Service) -> None:
    """A create whose first machine fails the handshake uses a second one."""
    bad = changed(nonce=b"")
    tried: list[int] = []
    service.driver.script.resumed = lambda reply: bad(reply) if not tried and not tried.append(1) else reply
    box = await service.create()
    assert (await service.run(box, "true"))["exitCode"] == 0
    assert (len(service.driver.machines), len(service.driver.alive)) == (2, 1)


async def test_a_bad_machine_from_the_pool_is_replaced(pooled: Service) -> None:
    """The handshake is the same for machines from the pool."""
    await eventually(lambda: pooled.sandboxes.pools["code_interpreter"].ready == 1)
    pooled.driver.machines[0].guest.script = type(pooled.driver.script)(resumed=changed(nonce=b""))
    box = await pooled.create()
    assert pooled.guest(box) is not pooled.driver.machines[0].guest
    assert not pooled.driver.machines[0].is_alive


async def test_a_pool_that_can_not_be_filled_goes_on_trying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Failures are logged, and starts are retried with pauses until machines start again."""
    monkeypatch.setattr("kernel_gateway.sandbox.pool.RETRY_AFTER_FAILURE", (0.05, 0.1))
    driver = FakeDriver()
    driver.script.resumed = changed(nonce=b"")
    async with serving(tmp_path, driver, pool_size=2) as service:
        await eventually(lambda: len(driver.machines) >= 3)
        assert len(driver.alive) <= 1
        assert "could not be prepared" in caplog.text
        driver.script.resumed = lambda reply: reply
        await eventually(lambda: service.sandboxes.pools["code_interpreter"].ready == 2)


# -- hostile guests


def nonsense(kind: str) -> bytes:
    rng = random.Random(9)
    bomb = struct.pack(">I", 65_000) + bytes(4 * 65_000)
    return {
        "random bytes": rng.randbytes(10_000),
        "other generation": b"\x02" + own_frame(FrameType.END, 16)[1:],
        "unknown type": b"\x01\x63" + bytes(10),
        "length over the limit": wire.header(FrameType.DATA, 16, wire.MAX_DATA + 1),
        "replies nobody asked for": own_frame(FrameType.REPLY, 99_999, b"\x80") * 200,
        "requests of its own": wire.encode(FrameType.REQUEST, 16, wire.Ping()) * 200,
        "data nobody asked for": own_frame(FrameType.DATA, 4_000_000_000, b"x") * 200,
        "an event that is none": own_frame(FrameType.EVENT, wire.EVENTS, b"\xc0"),
        "a kernel message that is none": own_frame(FrameType.DATA, wire.KERNEL, b"\0\0\0\1"),
        "a kernel message of nothing": own_frame(FrameType.DATA, wire.KERNEL, bomb),
        "a kernel message without end": own_frame(FrameType.DATA, wire.KERNEL, bytes(wire.CHUNK), wire.MORE)
        * (wire.MAX_MESSAGE // wire.CHUNK + 1),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "random bytes", "other generation", "unknown type", "length over the limit", "replies nobody asked for",
        "requests of its own", "data nobody asked for", "an event that is none", "a kernel message that is none",
        "a kernel message without end",
    ],
)  # fmt: skip
async def test_a_guest_that_breaks_the_protocol_is_destroyed(service: Service, box: str, kind: str) -> None:
    """Whatever the nonsense, requests end with guest_unresponsive, the machine is destroyed, the server lives."""
    running = asyncio.create_task(service.call("POST", f"/sandboxes/{box}/processes", {"cmd": "sleep", "args": ["60"]}))
    guest = service.guest(box)
    await eventually(lambda: any(isinstance(request, wire.Spawn) for request in guest.requests))
    try:
        await guest.send(nonsense(kind))
    except OSError:
        pass  # the guest was cut off in the middle
    error = error_of(await running)
    assert (error["code"], error["error"], error["outcome"]) == (502, "guest_unresponsive", "unknown")
    await eventually(lambda: not service.driver.alive and len(service.sandboxes) == 0)
    assert (await service.call("GET", "/health")).code == 200


async def test_kernel_messages_with_strange_content_are_harmless(service: Service, box: str) -> None:
    """Messages of the right form with any content never end a request with 500. Others are ignored."""
    guest = service.guest(box)
    strange = [b"", b"null", b"[]", b"{", b"\xff", b'{"msg_id": 3}', b"[" * 5000, b'{"msg_type": null}', b"1e999"]
    rng = random.Random(11)

    async def spoil(stream: object) -> None:
        for _ in range(300):
            parts = [b"iopub", *(rng.choice(strange) for _ in range(4))]
            for frame in wire.chunk(wire.KERNEL, wire.pack_parts(parts)):
                await guest.send(b"".join(frame))

    await spoil(None)
    assert (await service.execute(box, "6 * 7"))["results"][0]["data"] == {"text/plain": "42"}


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{", b"\xff\xfe", b'{"data": 3}', b'{"text": 5, "name": 7}',
    b'{"execution_state": []}', b'{"execution_count": "x", "status": 5}', b'{"ename": {}, "traceback": "abc"}',
    b'{"data": {"text/plain": 1e999}}', b'{"data": {"a": NaN}}', b'{"name": "stdout", "text": "\\ud800"}'])  # fmt: skip
async def test_a_lying_kernel_gets_no_500(service: Service, box: str, content: bytes) -> None:
    """A cell of ours that is answered with nonsense gets 200 or 502, never 500."""
    guest = service.guest(box)
    execute = guest.kernel._execute

    async def lie(parent: memoryview, request: dict[str, object]) -> None:
        kinds = ["stream", "execute_result", "display_data", "error", "execute_input", "status", "execute_reply"]
        for kind in kinds:
            head = json.dumps({"msg_id": "x", "msg_type": kind}).encode()
            for frame in wire.chunk(wire.KERNEL, wire.pack_parts([b"iopub", head, bytes(parent), b"{}", content])):
                await guest.send(b"".join(frame))
        await execute(parent, request)  # type: ignore[arg-type]

    guest.kernel._execute = lie  # type: ignore[method-assign, assignment]
    answer = await service.call("POST", f"/sandboxes/{box}/execute", {"code": "1"})
    assert answer.code in (200, 502), answer.body
    for accept in ("application/x-ndjson", "text/event-stream"):
        answer = await service.call("POST", f"/sandboxes/{box}/execute", {"code": "1"}, headers={"Accept": accept})
        assert answer.code == 200


@pytest.mark.parametrize(
    ("path", "request_type", "reply"),
    [
        ("filesystem/stat?path=x", wire.Stat, wire.Done()),
        ("filesystem/list?path=x", wire.ListDir, wire.Done()),
        ("filesystem?path=x", wire.Read, wire.Done()),
        ("files?path=x", wire.Read, wire.Done()),
        ("metrics", wire.GetMetrics, wire.Done()),
        ("health", wire.Ping, wire.Exited(code=0)),
        ("envs", wire.Spawn, wire.Done()),
    ],
)
async def test_an_answer_of_another_type_gets_no_500(
    service: Service, box: str, path: str, request_type: type[wire.Body], reply: wire.Body
) -> None:
    """A guest that answers with the wrong body gives 502 guest_unresponsive, never 500."""

    async def wrong(stream: Stream, body: wire.Body) -> None:
        await stream.reply(reply)

    service.guest(box).script.handlers[request_type] = wrong
    answer = await service.call("GET", f"/sandboxes/{box}/{path}")
    assert answer.code in (200, 502), answer.body
    if answer.code == 502:
        assert error_of(answer)["error"] == "guest_unresponsive"
    else:
        assert path.startswith("filesystem?")


WILD = wire.Entry(
    name="\0", path="\r\nX: y", kind="other", size=2**63 - 1, mode=0, owner="", group="", modified_ns=2**63 - 1
)
IMPOSSIBLE: list[dict[str, Any]] = [
    {"kind": "?"},
    {"size": -1},
    {"mode": -(2**60)},
    {"name": "x" * (wire.MAX_TEXT + 1)},
    {"path": "ü" * (wire.MAX_TEXT + 1)},
    {"owner": "x" * 50_000},
    {"target": "x" * 50_000},
]


@pytest.mark.parametrize("fields", [{}, *IMPOSSIBLE], ids=lambda fields: next(iter(fields), "wild"))
@pytest.mark.parametrize("path", ["filesystem/stat", "filesystem/list", "filesystem", "files"])
async def test_hostile_entries_get_no_500(service: Service, box: str, path: str, fields: dict[str, Any]) -> None:
    """Odd entries are passed on. Impossible ones break the protocol, so the answer is 502 and the sandbox ends."""
    entry = msgspec.structs.replace(WILD, **fields)

    async def lie(stream: Stream, body: wire.Body) -> None:
        if isinstance(body, wire.Read):
            await stream.event(entry)
            await stream.fail("failed", "no content")
        elif isinstance(body, wire.ListDir):
            await stream.reply(wire.Entries(entries=[entry]))
        else:
            await stream.reply(entry)

    for kind in (wire.Stat, wire.ListDir, wire.Read):
        service.guest(box).script.handlers[kind] = lie
    answer = await service.call("GET", f"/sandboxes/{box}/{path}?path=x")
    if fields:
        assert (answer.code, error_of(answer)["error"]) == (502, "guest_unresponsive")
        assert (await service.call("GET", f"/sandboxes/{box}")).code == 404
    elif path in ("filesystem/stat", "filesystem/list"):
        assert answer.code == 200, answer.body
    else:
        assert answer.code != 500, answer.body


# -- R9, R10: floods and stalls


async def test_r9_a_guest_that_floods_against_the_credit_is_cut_off(service: Service, box: str) -> None:
    """A guest that sends 200 MB beyond its credit, to a client that reads nothing, is ended. Memory stays."""
    guest = service.guest(box)
    guest.files["/big"] = bytes(10)
    sent = 0

    async def flood(stream: Stream, body: wire.Read) -> None:
        nonlocal sent
        entry = guest._entry("/big")
        entry.size = 200 << 20
        await stream.event(entry)
        frame = own_frame(FrameType.DATA, stream.number, bytes(1 << 20))
        for _ in range(200):
            await guest.send(frame)
            sent += 1

    guest.script.handlers[wire.Read] = flood
    before, peak = resident(), 0
    _, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=65536)
    head = f"GET /sandboxes/{box}/files?path=/big HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n\r\n"
    writer.write(head.encode())
    while service.driver.alive:
        peak = max(peak, resident())
        await asyncio.sleep(0.01)
    assert sent < 50
    assert peak - before <= 16 << 20
    writer.transport.abort()


async def test_r9_a_guest_that_floods_kernel_messages(service: Service, box: str) -> None:
    """Memory stays and other requests are answered while unwanted messages come against all credit."""
    guest = service.guest(box)
    text = json.dumps({"name": "stdout", "text": "x" * 200_000}).encode()
    head = b'{"msg_type": "stream", "msg_id": "1"}'
    parts = [b"iopub", head, b'{"msg_id": "nobody"}', b"{}", text]
    message = b"".join(b"".join(frame) for frame in wire.chunk(wire.KERNEL, wire.pack_parts(parts)))
    before, peak = resident(), 0
    for number in range(400):  # 80 MB
        try:
            await guest.send(message)
        except OSError:
            break  # the guest may also be cut off for this
        if number % 50 == 0:
            assert (await service.call("GET", "/health", timeout=2)).code == 200
        peak = max(peak, resident())
    assert peak - before <= 16 << 20


async def test_r10_a_guest_that_stops_reading(tmp_path: Path) -> None:
    """Input that the guest does not take ends in guest_unresponsive at the deadline. Memory hardly grows."""
    driver = FakeDriver(time_scale=0.05)  # 10 s become half a second
    async with serving(tmp_path, driver) as service:
        box = await service.create()
        guest = service.guest(box)

        async def stop(stream: Stream, body: wire.Write) -> None:
            await guest.send(wire.credit(stream.number, 1 << 30))
            guest.stall()
            await asyncio.sleep(60)

        guest.script.handlers[wire.Write] = stop
        piece, first = bytes(1 << 20), b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'

        async def produce(write: Callable[[bytes], Awaitable[None]]) -> None:
            await write(first)
            for _ in range(64):
                await write(piece)

        before, begun = resident(), time.monotonic()
        answer = await service.call(
            "POST",
            f"/sandboxes/{box}/files",
            body_producer=produce,
            headers={"Content-Type": "multipart/form-data; boundary=b", "Content-Length": str(len(first) + (64 << 20))},
            timeout=10,
        )
        assert error_of(answer)["error"] == "guest_unresponsive"
        assert time.monotonic() - begun < 5
        assert resident() - before <= 16 << 20
        await eventually(lambda: not driver.alive)


@pytest.mark.parametrize("path", ["health", "metrics", "filesystem/stat?path=x"])
async def test_a_guest_that_does_not_answer(tmp_path: Path, path: str) -> None:
    """A request that the guest does not answer ends in guest_unresponsive in time."""
    driver = FakeDriver(time_scale=0.02)
    async with serving(tmp_path, driver) as service:
        box = await service.create()
        service.guest(box).stall()
        answer = await service.call("GET", f"/sandboxes/{box}/{path}", timeout=5)
        assert (answer.code, error_of(answer)["error"]) == (502, "guest_unresponsive")


# -- R18


async def test_r18_200_creates_at_capacity_4(service: Service) -> None:
    """There are never more than 4. The others get 503 with Retry-After quickly. Afterwards there is room for 4."""
    service.driver.script.start_delay = 0.05
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, len(service.driver.alive), len(service.sandboxes))
            await asyncio.sleep(0.001)

    async def create() -> tuple[int, float, str | None]:
        begun = time.monotonic()
        answer = await service.call("POST", "/sandboxes", {"templateID": "base"})
        if answer.code != 201:
            assert error_of(answer)["error"] == "host_full"
        return answer.code, time.monotonic() - begun, answer.headers.get("Retry-After")

    watching = asyncio.create_task(watch())
    results = await asyncio.gather(*(create() for _ in range(200)))
    codes = [code for code, _, _ in results]
    assert codes.count(201) == 4
    assert codes.count(503) == 196
    assert all(retry and int(retry) > 0 for code, _, retry in results if code == 503)
    for sandbox in json.loads((await service.call("GET", "/sandboxes")).body):
        await service.call("DELETE", f"/sandboxes/{sandbox['sandboxID']}")
    assert service.driver.alive == []
    assert [await service.create() for _ in range(4)]
    watching.cancel()
    assert most == 4


# -- R28


UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}
FIELDS = {
    "cmd": "true",
    "code": "1",
    "timeout": 10,
    "path": "x",
    "content": "",
    "source": "a",
    "destination": "b",
    "text": "x",
    "signal": "SIGTERM",
}


async def every_answer(service: Service, route: Route, path: str) -> tuple[int, bytes]:
    query = "" if route.query is None else "?path=x"
    kind = "multipart/form-data; boundary=b" if route.upload else "application/json"
    sent = json.dumps(FIELDS).encode() if route.body is not None else b"--b--" if route.upload else None
    answer = await service.call(route.method, path + query, body=sent, headers={"Content-Type": kind})
    return answer.code, answer.body


async def foreign_boxes(service: Service) -> tuple[str, str]:
    """Two sandboxes of somebody else: one that runs, one that has ended."""
    fields = json.dumps({"templateID": "base"}).encode()
    created = [await service.call("POST", "/sandboxes", body=fields, key=service.other_key) for _ in range(2)]
    running, ended = (json.loads(answer.body)["sandboxID"] for answer in created)
    await service.call("DELETE", f"/sandboxes/{ended}", key=service.other_key)
    return running, ended


def routes_with(name: str) -> list[Route]:
    return [route for route in ROUTES if name in route.names]


def named(route: Route) -> str:
    return f"{route.method} {route.path}"


NO_SANDBOX = (404, b'{"code":404,"message":"sandbox not found","error":"not_found","reason":"Not Found"}')
NO_SESSION = (404, b'{"code":404,"message":"session not found","error":"not_found","reason":"Not Found"}')


def no_kernel(kernel: str) -> tuple[int, bytes]:
    """The answer for a kernel that one does not have. It repeats the id that was asked for."""
    return 404, NO_SANDBOX[1].replace(b"sandbox not found", f"kernel not found: '{kernel}'".encode())


@pytest.mark.parametrize("route", routes_with("id"), ids=named)
async def test_r28_a_foreign_sandbox_is_like_none(service: Service, route: Route) -> None:
    """On every route somebody else's sandbox, running or ended, and a random id get the same 404, byte for byte."""
    foreign, ended = await foreign_boxes(service)
    for box in (foreign, ended, "sbx" + "a" * 20, "x"):
        path = route.path.format_map(dict.fromkeys(route.names, "1") | {"id": box})
        assert await every_answer(service, route, path) == NO_SANDBOX
    assert (await service.call("GET", f"/sandboxes/{foreign}", key=service.other_key)).code == 200


@pytest.mark.parametrize("route", routes_with("kernel"), ids=named)
async def test_r28_a_foreign_kernel_is_like_none(service: Service, route: Route) -> None:
    """The same holds for kernels, also for an id that no kernel can have."""
    foreign, ended = await foreign_boxes(service)
    for kernel in (kernel_id(foreign), kernel_id(ended), kernel_id("sbx" + "a" * 20), foreign, "x"):
        assert await every_answer(service, route, route.path.format(kernel=kernel)) == no_kernel(kernel)
    answer = await service.call("GET", f"/api/kernels/{kernel_id(foreign)}", key=service.other_key)
    assert json.loads(answer.body)["execution_state"] == "idle"


@pytest.mark.parametrize("route", routes_with("session"), ids=named)
async def test_r28_a_foreign_session_is_like_none(service: Service, route: Route) -> None:
    """The same holds for sessions. A session can't be moved to somebody else's kernel either."""
    foreign, _ = await foreign_boxes(service)
    kernel = {"id": kernel_id(foreign)}
    theirs = {"path": "a.ipynb", "kernel": kernel}
    answer = await service.call("POST", "/api/sessions", theirs, key=service.other_key)
    session = json.loads(answer.body)["id"]
    for each in (session, "0" * 32, "x"):
        assert await every_answer(service, route, route.path.format(session=each)) == NO_SESSION
    mine = json.loads((await service.call("POST", "/api/sessions", {"path": "a.ipynb"})).body)
    assert mine["id"] != session
    for method, path in (("POST", "/api/sessions"), ("PATCH", f"/api/sessions/{mine['id']}")):
        answer = await service.call(method, path, {"path": "b.ipynb", "kernel": kernel})
        assert (answer.code, answer.body) == no_kernel(kernel["id"])
    assert (await service.call("GET", f"/api/sessions/{session}", key=service.other_key)).code == 200


@pytest.mark.parametrize("query", ["", "?session_id=s", "?since=0", "?since=99999"])
async def test_r28_foreign_sockets_are_like_none(service: Service, query: str) -> None:
    """WebSockets refuse somebody else's sandbox and a random one alike, before the upgrade."""
    foreign, ended = await foreign_boxes(service)
    for box in (foreign, ended, "sbx" + "a" * 20, "x"):
        kernel = kernel_id(box) if box != "x" else "x"
        paths = {f"/api/kernels/{kernel}/channels": no_kernel(kernel), f"/sandboxes/{box}/stream": NO_SANDBOX}
        for path, none in paths.items():
            answer = await service.call("GET", path + query, headers=UPGRADE)
            assert (answer.code, answer.body) == none, path
            answer = await service.call("GET", path + query, headers=UPGRADE, key=None)
            assert (answer.code, error_of(answer)["error"]) == (401, "unauthorized")


async def test_r28_lists_show_what_is_ones_own(service: Service) -> None:
    """Neither sandboxes nor kernels, dead or alive, nor sessions of others are listed or counted."""
    foreign, _ = await foreign_boxes(service)
    theirs = {"path": "a.ipynb", "kernel": {"id": kernel_id(foreign)}}
    await service.call("POST", "/api/sessions", theirs, key=service.other_key)
    for path in ("/sandboxes", "/api/kernels", "/api/sessions"):
        assert (await service.call("GET", path)).body == b"[]"
    service.driver.alive[0].die("killed by a test")
    await eventually(lambda: len(service.sandboxes) == 0)
    assert (await service.call("GET", "/api/kernels")).body == b"[]"
    assert json.loads((await service.call("GET", "/api/status")).body)["kernels"] == 0
    listed = json.loads((await service.call("GET", "/api/kernels", key=service.other_key)).body)
    assert [(each["sandbox_id"], each["execution_state"]) for each in listed] == [(foreign, "dead")]


@pytest.mark.alone
@pytest.mark.parametrize("path", ["/sandboxes/{id}", "/api/kernels/{kernel}"])
async def test_r28_time_tells_nothing(service: Service, path: str) -> None:
    """The median answers to a foreign and a random id are less than a millisecond apart."""
    foreign, _ = await foreign_boxes(service)
    ids = {"foreign": foreign, "random": "sbx" + "b" * 20}
    times: dict[str, list[float]] = {"foreign": [], "random": []}
    for _ in range(60):
        for name, box in ids.items():
            begun = time.perf_counter()
            await service.call("GET", path.format(id=box, kernel=kernel_id(box)))
            times[name].append(time.perf_counter() - begun)
    gap = abs(statistics.median(times["foreign"]) - statistics.median(times["random"]))
    assert gap < 0.001


# -- what is under way when something else happens


async def test_r26_random_requests_end_in_order(service: Service) -> None:
    """Creates, deletes, commands and deaths come at random. Every answer is documented, and nothing is left."""
    rng = random.Random(26)
    codes: list[int] = []
    known = [await service.create()]

    async def one() -> None:
        await asyncio.sleep(rng.random() * 0.05)
        what = rng.choices(range(5), (4, 1, 5, 5, 1))[0]
        box = rng.choice(known[-6:])  # some of them live, some have ended
        if what == 0:
            answer = await service.call("POST", "/sandboxes", {"templateID": "base"})
            if answer.code == 201:
                known.append(json.loads(answer.body)["sandboxID"])
        elif what == 1:
            answer = await service.call("DELETE", f"/sandboxes/{box}")
        elif what == 2:
            answer = await service.call("POST", f"/sandboxes/{box}/processes", {"cmd": "sleep", "args": ["0.05"]})
        elif what == 3:
            answer = await service.call("POST", f"/sandboxes/{box}/execute", {"code": "time.sleep(0.05)"})
        else:
            answer = await service.call("POST", f"/sandboxes/{box}/processes", {"cmd": "die"})
        codes.append(answer.code)
        if answer.code >= 400:
            assert error_of(answer)["error"] in {"not_found", "host_full", "sandbox_died", "conflict"}

    async def client() -> None:
        # Requests begin one after another, so that their number at a time does not depend on the machine's load.
        while len(codes) < 300 or not {200, 201, 204, 404} <= set(codes):
            await one()

    async with asyncio.timeout(60):
        await asyncio.gather(*(client() for _ in range(30)))
    assert set(codes) <= {200, 201, 204, 404, 409, 502, 503}
    for sandbox in json.loads((await service.call("GET", "/sandboxes")).body):
        await service.call("DELETE", f"/sandboxes/{sandbox['sandboxID']}")
    await eventually(lambda: not service.driver.alive)


async def test_a_cut_link_ends_the_sandbox(service: Service, box: str) -> None:
    """A machine that lives on without its channel is destroyed, because it is of no use."""
    guest: FakeGuest = service.guest(box)
    guest.cut()
    await eventually(lambda: not service.driver.alive and len(service.sandboxes) == 0)
