"""Events of sandboxes: listed, as a stream, and sent to receivers that are of this test."""

import asyncio
import hashlib
import hmac
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.testing import bind_unused_port

from kernel_gateway.drivers import DriverError
from kernel_gateway.network.policy import Floor
from kernel_gateway.sandbox.key import new_key, parse_scope
from kernel_gateway.sandbox.sandboxes import supervised
from kernel_gateway.sandbox.store import Store
from kernel_gateway.settings import Settings
from kernel_gateway.webhooks import Deliveries, Sender, Targets
from tests.fakes import Service, error_of, eventually, serving

SECRET = "a secret of the receiver"
HERE = Targets(Floor, Settings(webhook_allow="127.0.0.1").webhook_exceptions)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """A service whose webhooks may be sent to this host."""
    async with serving(tmp_path, max_sandboxes=12, targets=HERE) as service:
        yield service


async def requests(service: Service) -> int:
    """Requests that the server is answering, without the one that asks."""
    used: int = json.loads((await service.call("GET", "/limits")).body)["requests"]["used"]
    return used - 1


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("sandbox.lifecycle.") for event in events]


async def listed(service: Service, path: str = "/events/sandboxes", **options: Any) -> list[dict[str, Any]]:
    answer = await service.call("GET", path, **options)
    assert answer.code == 200, answer.body
    events: list[dict[str, Any]] = json.loads(answer.body)
    return events


# -- listed


async def test_a_life(service: Service) -> None:
    """A sandbox's events tell its life, newest first, with the names of SandBase and of E2B, also after its end."""
    box = await service.create()
    await service.call("POST", f"/sandboxes/{box}/timeout", {"timeout": 60})
    await service.call("PUT", f"/sandboxes/{box}/network", {"allowOut": ["example.com"]})
    await service.call("DELETE", f"/sandboxes/{box}")
    await service.store.flush(5)
    events = await listed(service, f"/events/sandboxes/{box}")
    assert kinds(events) == ["killed", "updated", "updated", "created"]
    assert [event["data"].get("reason") for event in events] == ["kill", "network", "timeout", None]
    assert [event["seq"] for event in events] == [4, 3, 2, 1]
    first = events[-1]
    assert (first["sandboxID"], first["sandboxId"], first["resourceID"], first["resourceType"]) == (
        *[box] * 3,
        "sandbox",
    )
    assert (first["sandboxTemplateId"], first["version"]) == ("code_interpreter", "v1")
    assert (first["timestamp"], first["eventData"]) == (first["createdAt"], first["data"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", first["createdAt"])


async def test_every_end_has_its_event(service: Service) -> None:
    """However a sandbox ends, one event says why; also if its machine did not start, or its server was killed."""
    died, expired = await service.create(), await service.create()
    service.guest(died).die("it died")
    service.sandboxes.get(service.owner, expired).set_timeout(0)
    await eventually(lambda: not len(service.sandboxes))
    service.driver.script.start_error = DriverError("no")
    assert (await service.call("POST", "/sandboxes", {"templateID": "base"})).code == 503
    service.driver.script.start_error = None
    left = await service.create()
    await service.store.flush(5)
    with closing(Store(service.store.path)) as another:  # a server that starts after this one was killed
        assert another.end_all("host_restart") == 1
        assert another.end_all("host_restart") == 0
    ends = {event["sandboxID"]: event["data"]["reason"] for event in await listed(service) if "killed" in event["type"]}
    assert sorted(ends.values()) == ["died", "host_restart", "start_failed", "timeout"]
    assert (ends[died], ends[expired], ends[left]) == ("died", "timeout", "host_restart")
    await service.call("DELETE", f"/sandboxes/{left}")
    await service.store.flush(5)
    assert kinds(await listed(service, f"/events/sandboxes/{left}")) == ["killed", "created"]


async def test_events_wait_for_the_database(service: Service) -> None:
    """An end while the database can't be written has its event later. Nothing waits for it."""
    box = await service.create()
    with closing(sqlite3.connect(service.store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        async with asyncio.timeout(4):
            assert (await service.call("DELETE", f"/sandboxes/{box}")).code == 204
        other.execute("ROLLBACK")
    await service.store.flush(20)
    assert kinds(await listed(service, f"/events/sandboxes/{box}")) == ["killed", "created"]


async def test_pages_and_types(service: Service) -> None:
    """A list has limits, an offset, an order and types. What is wrong gets 400 and is named."""
    boxes = [await service.create() for _ in range(3)]
    await service.call("DELETE", f"/sandboxes/{boxes[0]}")
    await service.store.flush(5)
    assert kinds(await listed(service, "/events/sandboxes?limit=2")) == ["killed", "created"]
    assert [
        each["sandboxID"] for each in await listed(service, "/events/sandboxes?orderAsc=true&offset=1&limit=2")
    ] == (boxes[1:])
    assert kinds(await listed(service, "/events/sandboxes?types=sandbox.lifecycle.killed")) == ["killed"]
    for query in ("limit=0", "limit=x", "offset=-1", "types=sandbox.lifecycle.eaten", "orderAsc=maybe"):
        assert (await service.call("GET", f"/events/sandboxes?{query}")).code == 400, query


async def test_whose_events(service: Service) -> None:
    """A key sees the events of its owner, within its scope. Another's sandbox is as unknown as none at all."""
    box = await service.create()
    other = await service.create(templateID="base")
    assert await listed(service, key=service.other_key) == []
    unknown = await service.call("GET", f"/events/sandboxes/sbx{'a' * 20}", key=service.other_key)
    theirs = await service.call("GET", f"/events/sandboxes/{box}", key=service.other_key)
    assert (theirs.code, theirs.body) == (404, unknown.body)
    for scope, seen in ((f"sandbox={box}", [box]), ("template=base", [other]), ("read-only", [other, box])):
        key = new_key()
        service.store.add_key(key, scope, owner=service.owner, scope=parse_scope(scope))
        assert [each["sandboxID"] for each in await listed(service, key=key)] == seen
        hidden = await service.call("GET", f"/events/sandboxes/{other if seen == [box] else 'sbxnone'}", key=key)
        assert hidden.code == 404
        may_not = await service.call("GET", "/events/webhooks", key=key)
        assert may_not.code == (200 if scope == "read-only" else 403)


# -- as a stream


@asynccontextmanager
async def stream(service: Service, query: str = "", **headers: str) -> AsyncIterator[asyncio.StreamReader]:
    """The body of `GET /events`, from its first byte."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    lines = [f"GET /events{query} HTTP/1.0", f"X-API-Key: {service.key}", *(f"{n}: {v}" for n, v in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head, head
    try:
        yield reader
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def next_event(reader: asyncio.StreamReader) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while not (line := await reader.readline()).startswith((b"data: ", b"{")):
            assert line, "the stream has ended"
    event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
    return event


async def test_a_stream_tells_what_happens_next(service: Service) -> None:
    """It tells of each event once, from its beginning on or from the number that the client has."""
    before = await service.create()
    async with stream(service) as live, stream(service, Accept="application/x-ndjson") as lines:
        box = await service.create()
        await service.call("DELETE", f"/sandboxes/{before}")
        for reader in (live, lines):
            told = [await next_event(reader) for _ in range(2)]
            assert [(event["sandboxID"], event["seq"]) for event in told] == [(box, 2), (before, 3)]
    async with stream(service, "?since=1") as again, stream(service, **{"Last-Event-ID": "2"}) as last:
        assert (await next_event(again))["seq"] == 2
        assert (await next_event(last))["seq"] == 3
    async with stream(service, "?since=1000") as beyond:  # numbers began anew, because all events were forgotten
        assert (await next_event(beyond))["seq"] == 1


async def test_a_stream_ends_with_its_client_and_its_server(service: Service) -> None:
    """Nothing goes on for a client that has gone, and a server that goes down does not wait for its clients."""
    async with stream(service):
        assert await requests(service) == 1
    for _ in range(100):
        if not await requests(service):
            break
        await asyncio.sleep(0.05)
    assert await requests(service) == 0
    async with stream(service) as reader:
        service.sandboxes.places.is_draining = True
        async with asyncio.timeout(5):
            assert await reader.read() == b""


# -- to receivers


class Receiver:
    """A web server that takes events. `behave` answers for it; without, it answers 204 at once."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.requests: list[HTTPServerRequest] = []
        self.behave: Callable[[HTTPServerRequest], Awaitable[int]] | None = None
        self.sock, self.port = bind_unused_port()
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self._server = HTTPServer(lambda request: asyncio.ensure_future(self._handle(request)) and None)
        self._server.add_sockets([self.sock])

    async def _handle(self, request: HTTPServerRequest) -> None:
        status = 204 if self.behave is None else await self.behave(request)
        self.requests.append(request)
        if status < 300:
            self.got.append(json.loads(request.body))
        where = f"Location: http://127.0.0.1:{self.port}/elsewhere\r\n" if status == 302 else ""
        connection: Any = request.connection
        await connection.stream.write(f"HTTP/1.1 {status} x\r\n{where}Content-Length: 0\r\n\r\n".encode())
        connection.finish()

    async def close(self) -> None:
        self._server.stop()
        await self._server.close_all_connections()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver that answers 204."""
    receiver = Receiver()
    yield receiver
    await receiver.close()


@asynccontextmanager
async def delivering(service: Service, **options: Any) -> AsyncIterator[None]:
    """Events are delivered within the block, to this host as well."""
    task = asyncio.create_task(supervised("delivery", Deliveries(service.store, Sender(HERE), **options).run))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def add(service: Service, url: str, *events: str, **options: Any) -> dict[str, Any]:
    body = {"name": "mine", "url": url, "signatureSecret": SECRET, "events": list(events)}
    answer = await service.call("POST", "/events/webhooks", body, **options)
    assert answer.code == 201, answer.body
    webhook: dict[str, Any] = json.loads(answer.body)
    return webhook


async def test_an_event_is_delivered(service: Service, receiver: Receiver) -> None:
    """A receiver gets each event as JSON, with its id and a signature, and the deliveries can be seen."""
    async with delivering(service):
        webhook = await add(service, receiver.url)
        box = await service.create()
        await service.call("DELETE", f"/sandboxes/{box}")
        await eventually(lambda: len(receiver.got) == 2)
        assert kinds(receiver.got) == ["created", "killed"]
        assert receiver.got == list(reversed(await listed(service)))
        request = receiver.requests[0]
        assert request.headers["X-Event-ID"] == receiver.got[0]["id"]
        signed = hmac.new(SECRET.encode(), request.body, hashlib.sha256).hexdigest()
        assert request.headers["X-Signature"] == signed
        assert request.headers["Content-Type"] == "application/json"

        async def arrived() -> list[dict[str, Any]]:
            return await listed(service, f"/events/webhooks/{webhook['id']}/deliveries")

        for _ in range(100):
            if not any(each["isWaiting"] for each in await arrived()):
                break
            await asyncio.sleep(0.02)
        assert [(each["eventID"], each["attempts"], each["status"], each["error"]) for each in await arrived()] == [
            (event["id"], 1, 204, None) for event in reversed(receiver.got)
        ]
        assert all(each["deliveredAt"] for each in await arrived())


async def test_webhooks_are_their_owners(service: Service, receiver: Receiver) -> None:
    """Another owner neither sees, removes nor feeds a webhook. Nobody is told its secret."""
    async with delivering(service):
        webhook = await add(service, receiver.url)
        path = f"/events/webhooks/{webhook['id']}"
        for method, where in (("GET", path), ("DELETE", path), ("GET", f"{path}/deliveries")):
            assert (await service.call(method, where, key=service.other_key)).code == 404
        assert await listed(service, "/events/webhooks", key=service.other_key) == []
        assert await listed(service, "/events/webhooks") == [webhook]
        assert json.loads((await service.call("GET", path)).body) == webhook
        assert SECRET not in json.dumps(webhook)
        await service.call("POST", "/sandboxes", {"templateID": "base"}, key=service.other_key)
        box = await service.create()
        await eventually(lambda: len(receiver.got) == 1)
        assert receiver.got[0]["sandboxID"] == box
        assert (await service.call("DELETE", path)).code == 204
        assert (await service.call("DELETE", path)).code == 404
        await service.create()
        await asyncio.sleep(0.2)
        assert len(receiver.got) == 1


async def test_types_of_a_webhook(service: Service, receiver: Receiver) -> None:
    """A receiver gets the types that it asked for."""
    async with delivering(service):
        await add(service, receiver.url, "sandbox.lifecycle.killed")
        box = await service.create()
        await service.call("DELETE", f"/sandboxes/{box}")
        await eventually(lambda: len(receiver.got) == 1)
        assert kinds(receiver.got) == ["killed"]


async def test_a_receiver_that_was_down_for_an_hour(service: Service, receiver: Receiver) -> None:
    """It gets every event, those of a sandbox in order, within a minute of its time. Others notice nothing."""
    clock = [1_000_000.0]
    down, other = Receiver(), receiver
    attempts: list[float] = []

    async def refuse(request: HTTPServerRequest) -> int:
        attempts.append(clock[0])
        return 503

    down.behave = refuse
    async with AsyncExitStack() as undo:
        undo.push_async_callback(down.close)
        await undo.enter_async_context(delivering(service, clock=lambda: clock[0]))
        webhook = await add(service, down.url)
        await add(service, other.url)
        boxes = [await service.create() for _ in range(3)]
        for box in boxes:
            await service.call("POST", f"/sandboxes/{box}/timeout", {"timeout": 600})
            await service.call("DELETE", f"/sandboxes/{box}")
        await eventually(lambda: len(other.got) == 9)
        while clock[0] < 1_003_600:  # the clock goes on only when all that is due has been tried
            tried = len(attempts)
            clock[0] += 30
            service.store._wake()
            with suppress(AssertionError):
                await eventually(lambda tried=tried: len(attempts) >= tried + 1, timeout=0.05)
        assert down.got == []
        assert len(attempts) < 400
        shown = await listed(service, f"/events/webhooks/{webhook['id']}/deliveries")
        assert {(each["isWaiting"], each["error"]) for each in shown if each["attempts"]} == {
            (True, "the receiver answered 503")
        }
        down.behave = None
        for _ in range(3):  # a minute
            clock[0] += 30
            service.store._wake()
            await asyncio.sleep(0.1)
        await eventually(lambda: len(down.got) >= 9)
        for box in boxes:
            mine = [event for event in down.got if event["sandboxID"] == box]
            assert kinds(mine) == ["created", "updated", "killed"]
        assert {event["id"] for event in down.got} == {event["id"] for event in other.got}


async def test_a_slow_receiver_delays_no_other(service: Service, receiver: Receiver) -> None:
    """Receivers that take all their time have two deliveries each, and others don't wait for them."""
    slow = Receiver()
    at_once, most = 0, 0

    async def wait(request: HTTPServerRequest) -> int:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(1)
        at_once -= 1
        return 200

    slow.behave = wait
    async with AsyncExitStack() as undo:
        undo.push_async_callback(slow.close)
        await undo.enter_async_context(delivering(service))
        for _ in range(3):
            await add(service, slow.url)
        await add(service, receiver.url)
        for _ in range(4):
            await service.create()
        async with asyncio.timeout(2):
            while len(receiver.got) < 4:
                await asyncio.sleep(0.02)
        assert len(slow.got) < 12
        await eventually(lambda: len(slow.got) == 12)
        assert most <= 6


@pytest.mark.parametrize("status", [302, 400, 404, 500])
async def test_what_is_no_success(service: Service, receiver: Receiver, status: int) -> None:
    """An answer that is not 2xx is tried again. A redirect is not followed."""

    async def once(request: HTTPServerRequest) -> int:
        return status if not receiver.requests else 200

    receiver.behave = once
    async with delivering(service):
        await add(service, receiver.url)
        await service.create()
        await eventually(lambda: len(receiver.got) == 1)
    assert [request.path for request in receiver.requests] == ["/hook", "/hook"]
    assert len({request.headers["X-Event-ID"] for request in receiver.requests}) == 1


async def test_a_server_that_dies_between_delivery_and_note(service: Service, receiver: Receiver) -> None:
    """The next server sends the event again, with the same id."""
    held = asyncio.Event()

    async def hold(request: HTTPServerRequest) -> int:
        await held.wait()
        return 200

    receiver.behave = hold
    async with delivering(service):
        await add(service, receiver.url)
        await service.create()
        await asyncio.sleep(0.3)
    held.set()
    receiver.behave = None
    async with delivering(service):
        await eventually(lambda: len(receiver.got) == 2)
    assert receiver.got[0]["id"] == receiver.got[1]["id"]


async def test_a_removed_key_has_no_webhooks(service: Service, receiver: Receiver) -> None:
    """With an owner's last key its webhooks go, and what waits for them."""
    key = new_key()
    owner = service.store.add_key(key, "short-lived")
    async with delivering(service):
        await add(service, receiver.url, key=key)
        await service.call("POST", "/sandboxes", {"templateID": "base"}, key=key)
        await eventually(lambda: len(receiver.got) == 1)
        service.store.remove_key(owner, with_sandboxes=True)
        await asyncio.sleep(0.3)
    assert len(receiver.got) == 1
    for table in ("webhooks", "deliveries", "lanes"):
        assert service.store._db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"url": "ftp://example.com/"}, "url"),
        ({"url": "https://"}, "url"),
        ({"url": "https://me:pw@example.com/"}, "user"),
        ({"url": "https://example.com/#part"}, "url"),
        ({"url": "https://example.com/a b"}, "blank"),
        ({"url": "https://exämple.com/"}, "ASCII"),
        ({"url": "https://example.com/" + "a" * 2000}, "2000"),
        ({"url": "https://example.com:99999/"}, "url"),
        ({"events": ["sandbox.lifecycle.eaten"]}, "eaten"),
        ({"resourceType": "volume"}, "resourceType"),
        ({"signatureSecret": ""}, "signatureSecret"),
        ({"name": "x" * 201}, "name"),
    ],
)
async def test_what_is_no_webhook(service: Service, fields: dict[str, Any], word: str) -> None:
    """It gets 400, and the message names what is wrong."""
    body = {"name": "a", "url": "https://example.com/", "signatureSecret": "s", **fields}
    told = error_of(await service.call("POST", "/events/webhooks", body))
    assert (told["code"], word in told["message"]) == (400, True), told


@pytest.mark.parametrize("url", ["http://example.com/", "https://example.com:1/", "http://127.0.0.1/"])
async def test_receivers_are_public(tmp_path: Path, url: str) -> None:
    """Without the operator's leave a receiver is https on a usual port, and the refusal says who may allow more."""
    async with serving(tmp_path) as service:
        body = {"name": "a", "url": url, "signatureSecret": "s"}
        told = error_of(await service.call("POST", "/events/webhooks", body))
        assert (told["code"], "https, on port 443 or 8443" in told["message"]) == (400, True)
        assert "--webhook-allow" in told["hint"]
