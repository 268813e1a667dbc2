"""Links to a sandbox for other people: what they reach, what they count, and how they end."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import HTTPResponse
from tornado.simple_httpclient import HTTPStreamClosedError
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from guest_agent import wire
from kernel_gateway.api.app import ROUTES, watch_keys
from kernel_gateway.api.socket import MAX_VIEWERS, WATCHERS_MESSAGE
from kernel_gateway.sandbox.key import hashed, new_key, parse_scope
from kernel_gateway.sandbox.lifecycle import State
from kernel_gateway.sandbox.shares import MAX_SHARES
from tests.api.clients import Agent, address, agent, opening
from tests.fakes import ENDLESS, SavingDriver, Service, cancel, error_of, eventually, serving


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """A service that looks at its keys, as a server does."""
    async with serving(tmp_path) as running:
        watching = asyncio.create_task(watch_keys(running.app))
        yield running
        await cancel(watching)


@pytest.fixture
async def box(service: Service) -> str:
    return await service.create(metadata={"name": "shared"})


class Link:
    """Whoever has a link."""

    def __init__(self, service: Service, box: str, made: dict[str, Any]) -> None:
        self.service, self.box, self.id, self.key = service, box, made["shareID"], made["token"]

    async def call(self, method: str, path: str = "", body: Any = None, **options: Any) -> HTTPResponse:
        """A request to a part of the sandbox."""
        return await self.service.call(method, f"/sandboxes/{self.box}{path}", body, key=self.key, **options)

    def stream(self, **options: Any) -> Any:
        return agent(self.service, self.box, key=self.key, **options)


async def share(service: Service, box: str, **body: Any) -> Link:
    answer = await service.call("POST", f"/sandboxes/{box}/share", body)
    assert answer.code == 201, answer.body
    made = json.loads(answer.body)
    assert made["url"] == f"{service.url}/#{made['mode']}={made['token']}&at={box}"
    return Link(service, box, made)


async def listed(service: Service, box: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((await service.call("GET", f"/sandboxes/{box}/share")).body)
    return found


async def closed(client: Agent) -> int:
    """The code with which a stream is closed."""
    with pytest.raises(ConnectionClosedError) as ended:
        await client.until("never")
    assert ended.value.rcvd is not None
    return ended.value.rcvd.code


@pytest.mark.parametrize("mode", ["watch", "use"])
async def test_what_a_link_reaches(service: Service, box: str, mode: str) -> None:
    """On every route a link does what its mode says, in its sandbox. All else is 403, another sandbox 404."""
    other = await service.create()
    kernel = service.sandboxes.get(service.owner, box).kernel_id
    link = await share(service, box, mode=mode)
    looks = ["", "/export", "/files", "/filesystem", "/filesystem/list", "/filesystem/stat", "/filesystem/download"]
    allowed = {("GET", f"/sandboxes/{{id}}{each}") for each in [*looks, "/health", "/metrics"]}
    for route in ROUTES:
        path = re.sub(r"\{\w+\}", "x", route.path.replace("{id}", box).replace("{kernel}", kernel))
        answer = await service.call("HEAD" if route.path == ENDLESS else route.method, path, key=link.key)
        if mode == "use" and re.match(r"/sandboxes/\{id\}/(commands|execut|files|processes)", route.path):
            allowed.add((route.method, route.path))
        if mode == "use" and route.path.startswith("/sandboxes/{id}/filesystem"):
            allowed.add((route.method, route.path))
        may = route.public or (route.method, route.path) in allowed
        assert (answer.code == 403) != may, (route.method, route.path, answer.body)
        if may and "{id}" in route.path and not route.upload:
            away = await service.call(route.method, path.replace(box, other), {"path": "x"}, key=link.key)
            assert away.code in (400, 404), (route.method, route.path)
    assert len(service.sandboxes) == 2
    async with link.stream() as theirs:
        await theirs.until("status")
    with pytest.raises(InvalidStatus, match="404"):
        await agent(service, other, key=link.key).__aenter__()
    with pytest.raises(InvalidStatus, match="403"):
        await opening(address(service, f"/api/kernels/{kernel}/channels"), link.key)
    assert "Token" not in (await link.call("GET")).body.decode()


async def test_a_watcher(service: Service, box: str) -> None:
    """A watcher sees all cells and may send no command, also not as the session of another client."""
    link = await share(service, box)
    service.guest(box).script.handlers[wire.Connect] = refuse
    async with (
        agent(service, box, query={"session_id": "page"}) as mine,
        link.stream(query={"session_id": "page"}) as theirs,
    ):
        await mine.run("print('seen')", id="page-1")
        assert (await theirs.until("stdout"))[-1]["text"] == "seen\n"
        commands: list[tuple[str, dict[str, Any]]] = [
            ("execute", {"code": "1"}), ("input", {"text": "x"}), ("interrupt", {}), ("restart", {}), ("hold", {}),
            ("release", {}), ("variables", {}), ("complete", {"code": "a", "cursor": 1}),
        ]  # fmt: skip
        for kind, fields in commands:
            await theirs.send(kind, **fields)
            assert (await theirs.until("refused"))[-1]["error"]["code"] == "forbidden"
        assert [each["type"] for each in await mine.run("1 + 1")] == ["started", "result", "end"]
    port = f"/sandboxes/{box}/ports/8000/"
    assert (await service.call("GET", port, key=link.key)).code == 403
    assert (await service.call("GET", port, key=(await share(service, box, mode="use")).key)).code == 502


async def refuse(stream: Any, body: wire.Connect) -> None:
    await stream.fail("port_closed", "no")


async def test_a_watcher_holds_nobody(service: Service, box: str) -> None:
    """A cell does not wait for a watcher that reads nothing."""
    link = await share(service, box)
    async with link.stream() as theirs:
        theirs.socket.transport.pause_reading()
        running = await service.execute(box, "flood(40)")
        assert running["outcome"] == "finished"


async def test_a_watcher_is_nobody(tmp_path: Path, driver: SavingDriver) -> None:
    """A watcher keeps no sandbox alive and wakes none, and leaves no place in the kernel's list of sessions."""
    async with serving(tmp_path, driver) as service:
        box = await service.create(autoResume={"enabled": True})
        link, kernel = await share(service, box), service.sandboxes.get(service.owner, box).kernel
        assert kernel is not None
        async with link.stream() as theirs:
            await theirs.until("status")
            assert (kernel.connections, kernel._sessions) == (0, {})
        assert (await service.call("POST", f"/sandboxes/{box}/pause")).code == 204
        for path in ("", "/files?path=x", "/health"):
            await link.call("GET", path)
        with pytest.raises(InvalidStatus, match="409"):
            await link.stream().__aenter__()
        assert service.sandboxes.get(service.owner, box).state is State.PAUSED


async def test_a_link_leaves_room(service: Service, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests and messages that whoever has a link never finishes shut nobody out, least of all the owner."""
    monkeypatch.setattr("kernel_gateway.api.base.MAX_OF_LINK", 3)
    link = await share(service, box)
    head = f"GET /sandboxes/{box} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {link.key}\r\nContent-Length: 1\r\n\r\n"
    begun = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(3)]
    for _, writer in begun:
        writer.write(head.encode())
    await eventually(lambda: service.app.settings["requests"].of(service.owner) == 3)
    assert error_of(await link.call("GET"))["error"] == "too_many_requests"
    async with link.stream() as theirs:
        await theirs.socket.send("x" * (WATCHERS_MESSAGE + 1))
        assert await closed(theirs) == 1009
    assert service.sandboxes.held.size == 0
    assert (await service.call("DELETE", f"/sandboxes/{box}/share/{link.id}")).code == 204
    for _, writer in begun:
        writer.close()


async def test_a_link_without_a_time_limit(service: Service, box: str) -> None:
    """One that the command line has made is listed and revoked like others."""
    key = new_key()
    made = service.store.add_key(key, "desk", owner=service.owner, scope=parse_scope(f"use={box}"))
    assert [(each["shareID"], each["expiresAt"]) for each in await listed(service, box)] == [(made, None)]
    assert (await service.call("DELETE", f"/sandboxes/{box}/share/{made}")).code == 204
    await eventually(lambda: service.store.find_key(key) is None)


async def test_uses_and_events(service: Service, box: str) -> None:
    """A link counts its streams and changes. Making and revoking are events, and no list or database has the token."""
    link = await share(service, box, mode="use", seconds=60)
    async with link.stream() as theirs:
        await theirs.run("1")
    await link.call("GET")
    await link.call("POST", "/execute", {"code": "1"})
    await eventually(lambda: service.store.list_keys() != [] and uses(service, link) == 2)
    (told,) = await listed(service, box)
    assert told.keys() == {"shareID", "mode", "createdAt", "expiresAt", "uses"}
    assert (told["shareID"], told["mode"], told["uses"]) == (link.id, "use", 2)
    rows = service.store._db.execute("SELECT * FROM keys").fetchall()
    assert link.key not in str(rows)
    assert hashed(link.key) in [row[0] for row in rows]
    assert (await service.call("DELETE", f"/sandboxes/{box}/share/{link.id}")).code == 204
    assert (await service.call("DELETE", f"/sandboxes/{box}/share/{link.id}")).code == 404
    events = json.loads((await service.call("GET", f"/events/sandboxes/{box}?orderAsc=true")).body)
    data = [each["data"] for each in events if each["type"].endswith("updated")]
    assert data == [
        {"reason": "share", "shareID": link.id, "mode": "use"}, {"reason": "share_revoked", "shareID": link.id}
    ]  # fmt: skip


def uses(service: Service, link: Link) -> int:
    return int(service.store._db.execute("SELECT uses FROM keys WHERE id = ?", (link.id,)).fetchone()[0])


async def test_a_link_is_revoked_while_a_cell_runs(service: Service, box: str) -> None:
    """Its stream and its requests are cut within a second. Those of others, and the sandbox, go on."""
    link, other = await share(service, box, mode="use"), await share(service, box, mode="watch")
    async with link.stream() as theirs, other.stream() as watcher, agent(service, box) as mine:
        kernel = service.sandboxes.get(service.owner, box).guest.kernel
        await theirs.send("hold", seconds=600)
        await theirs.send("execute", code="time.sleep(60)", id="theirs")
        await watcher.until("started")
        await theirs.send("execute", code="print('after all')", id="next")
        asking = asyncio.create_task(link.call("POST", "/execute", {"code": "1"}))
        await eventually(lambda: len(kernel.waiting()) == 2)
        began = asyncio.get_running_loop().time()
        assert (await service.call("DELETE", f"/sandboxes/{box}/share/{link.id}")).code == 204
        assert error_of(await link.call("GET"))["error"] == "unauthorized"
        assert await closed(theirs) == 1008
        with pytest.raises(HTTPStreamClosedError):
            await asking
        assert asyncio.get_running_loop().time() - began < 1.5
        assert (kernel.hold, kernel.waiting()) == (None, [])
        await mine.send("interrupt")
        await mine.until("end", id="theirs")
        assert (await watcher.until("end", id="theirs"))[-1]["outcome"] == "finished"
    assert [each["shareID"] for each in await listed(service, box)] == [other.id]


async def test_a_link_expires_while_somebody_is_attached(service: Service, box: str) -> None:
    """When its time is over a link is as if it were revoked, and is not listed."""
    link = await share(service, box, seconds=1)
    async with link.stream() as theirs:
        assert await closed(theirs) == 1008
    assert error_of(await link.call("GET"))["error"] == "unauthorized"
    assert await listed(service, box) == []
    await service.store.forget()
    assert link.id not in [row[0] for row in service.store._db.execute("SELECT id FROM keys")]


async def test_a_link_ends_with_its_sandbox(service: Service, box: str) -> None:
    """When the sandbox ends, its links are gone from the database, and no other sandbox's are."""
    link, kept = await share(service, box), await share(service, await service.create())
    async with link.stream() as theirs:
        await service.call("DELETE", f"/sandboxes/{box}")
        assert await closed(theirs) == 4410
    await eventually(lambda: link.id not in {key.id for key in service.store.list_keys()})
    assert (await kept.call("GET")).code == 200


async def test_limits(service: Service, box: str) -> None:
    """A sandbox has so many links, and a link so many viewers. A key with limits makes none."""
    links = await asyncio.gather(*(service.call("POST", f"/sandboxes/{box}/share", {}) for _ in range(MAX_SHARES + 3)))
    assert sorted(each.code for each in links) == [201] * MAX_SHARES + [429] * 3
    link = Link(service, box, json.loads(next(each for each in links if each.code == 201).body))
    viewers = [link.stream() for _ in range(MAX_VIEWERS)]
    for each in viewers:
        await each.__aenter__()
    with pytest.raises(InvalidStatus) as refused:
        await link.stream().__aenter__()
    assert refused.value.response.status_code == 429
    for each in viewers:
        await each.__aexit__(None, None, None)
    limited = "e2b_" + "1" * 40
    service.store.add_key(limited, "limited", owner=service.owner, scope=parse_scope(f"sandbox={box}"))
    for method, path in (("POST", "share"), ("DELETE", f"share/{link.id}")):
        assert (await service.call(method, f"/sandboxes/{box}/{path}", {}, key=limited)).code == 403
    for body in ({"mode": "own"}, {"seconds": 0}, {"seconds": 10**9}):
        assert (await service.call("POST", f"/sandboxes/{box}/share", body)).code == 400
    assert (await service.call("POST", f"/sandboxes/sbx{'a' * 20}/share", {})).code == 404
