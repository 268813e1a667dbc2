"""Keys with limits: read-only, one template, one sandbox. Each limit is tried on every route."""

import json
import re
from typing import Any

import pytest
from tornado.httpclient import HTTPResponse
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from guest_agent import wire
from kernel_gateway.api.app import ROUTES
from kernel_gateway.sandbox.key import new_key, parse_scope
from tests.api.clients import address
from tests.fakes import ENDLESS, Service, error_of


class Limited:
    """A client whose key sees the service's sandboxes within a scope."""

    def __init__(self, service: Service, scope: str) -> None:
        self.service = service
        self.key = new_key()
        self.id = service.store.add_key(self.key, scope, owner=service.owner, scope=parse_scope(scope))

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> HTTPResponse:
        return await self.service.call(method, path, body, key=self.key, **options)

    async def listed(self) -> list[str]:
        return [each["sandboxID"] for each in json.loads((await self.call("GET", "/sandboxes")).body)]

    async def socket(self, path: str) -> int:
        """The status of an upgrade."""
        try:
            async with connect(address(self.service, path, token=self.key)):
                return 101
        except InvalidStatus as refused:
            return refused.response.status_code


def refused(answer: HTTPResponse) -> bool:
    if answer.code < 400:
        return False
    told = error_of(answer)
    return (answer.code, told["error"]) == (403, "forbidden") and bool(told["hint"])


async def closed(stream: Any, body: wire.Connect) -> None:
    """An agent in whose sandbox nothing listens."""
    await stream.fail("port_closed", "no")


ONLY_SOME = ("/metrics", "/templates/{template}/files/{files}")
"""What is read by keys for it, and what makes a link for uploads."""


def sockets(service: Service, box: str) -> list[str]:
    kernel = service.sandboxes.get(service.owner, box).kernel_id
    return [f"/sandboxes/{box}/stream", f"/api/kernels/{kernel}/channels"]


async def test_read_only(service: Service, box: str) -> None:
    """The key reads what its owner has. A route that does more, or tells of all owners, answers 403 at once."""
    reader = Limited(service, "read-only")
    assert await reader.listed() == [box]
    assert (await reader.call("GET", f"/sandboxes/{box}/metrics")).code == 200
    kernel = service.sandboxes.get(service.owner, box).kernel_id
    for route in ROUTES:
        path = re.sub(r"\{\w+\}", "x", route.path.replace("{id}", box).replace("{kernel}", kernel))
        answer = await reader.call("HEAD" if route.path == ENDLESS else route.method, path)
        is_refused = (route.method != "GET" or route.path in ONLY_SOME) and not route.public
        assert refused(answer) == is_refused, (route.method, route.path)
    for path in sockets(service, box):
        assert await reader.socket(path) == 403
    service.guest(box).script.handlers[wire.Connect] = closed
    port = f"/sandboxes/{box}/ports/8000/"
    assert refused(await reader.call("POST", port))
    assert refused(await reader.call("GET", port, headers={"Connection": "Upgrade", "Upgrade": "websocket"}))
    assert (await reader.call("GET", port)).code == 502
    assert len(service.sandboxes) == 1


async def test_one_template(service: Service) -> None:
    """The key creates sandboxes of that template only, by every route that creates, and sees no others."""
    other = await service.create(templateID="base")
    builder = Limited(service, "template=code_interpreter")
    assert await builder.listed() == []
    for path, wrong, right in (
        ("/sandboxes", {"templateID": "base"}, {"templateID": "code_interpreter"}),
        ("/api/kernels", {"name": "base"}, {"name": "python3"}),
        ("/api/sessions", {"path": "a", "kernel": {"name": "base"}}, {"path": "a"}),
    ):
        assert refused(await builder.call("POST", path, wrong))
        assert (await builder.call("POST", path, right)).code == 201
    mine = await builder.listed()
    assert len(mine) == 3
    assert other not in mine
    assert (await builder.call("DELETE", f"/sandboxes/{other}")).code == 404
    assert (await builder.call("DELETE", f"/sandboxes/{mine[0]}")).code == 204
    assert len(service.sandboxes) == 3


async def test_one_sandbox(service: Service, box: str) -> None:
    """The key uses that sandbox. All others are unknown to it, as another owner's are, and it creates none."""
    other = await service.create()
    service.guest(box).script.handlers[wire.Connect] = closed
    user = Limited(service, f"sandbox={box}")
    assert await user.listed() == [box]
    kernels = json.loads((await user.call("GET", "/api/kernels")).body)
    assert [each["sandbox_id"] for each in kernels] == [box]
    cell = await user.call("POST", f"/sandboxes/{box}/execute", {"code": "1 + 1"})
    assert json.loads(cell.body)["results"][0]["data"] == {"text/plain": "2"}
    for path in sockets(service, box):
        assert await user.socket(path) == 101
    for path in sockets(service, other):
        assert await user.socket(path) == 404
    for body, path in (({"templateID": "base"}, "/sandboxes"), ({}, "/api/kernels"), ({"path": "a"}, "/api/sessions")):
        assert refused(await user.call("POST", path, body))
    kernel = service.sandboxes.get(service.owner, other).kernel_id
    session = json.loads((await service.call("POST", "/api/sessions", {"path": "p", "kernel": {"id": kernel}})).body)
    never = f"sbx{'a' * 20}"
    for route in ROUTES:
        if not {"id", "kernel", "session"} & set(route.names) or route.upload:
            continue
        path = route.path.replace("{kernel}", kernel).replace("{session}", session["id"])
        path = re.sub(r"\{\w+\}", "x", path.replace("{id}", other))
        query = "?path=x" if route.query is not None else ""
        answer = await user.call(route.method, path + query, {"code": "1", "cmd": "x", "path": "x", "to": "x"})
        assert answer.code in (400, 404, 501), (route.method, route.path, answer.body)
        assert answer.code != 501 or "{id}" not in route.path
    unknown = await user.call("GET", f"/sandboxes/{never}")
    hidden = await user.call("GET", f"/sandboxes/{other}")
    assert (hidden.code, hidden.body) == (unknown.code, unknown.body) == (404, unknown.body)
    assert (await user.call("GET", f"/sandboxes/{other}/ports/8000/")).body == unknown.body
    await service.call("DELETE", f"/sandboxes/{other}")
    assert (await user.call("GET", f"/sandboxes/{other}")).body == unknown.body
    assert (await user.call("GET", f"/sandboxes/{box}/ports/8000/")).code == 502


@pytest.mark.parametrize("scope", ["read-only", "template=base", "sandbox=sbxabc"])
async def test_an_open_port_is_open_to_them(service: Service, box: str, scope: str) -> None:
    """Whoever may visit a port without a key may visit it with any."""
    service.guest(box).script.handlers[wire.Connect] = closed
    await service.call("PUT", f"/sandboxes/{box}/ports", {"port": 8000, "public": True})
    assert (await Limited(service, scope).call("POST", f"/sandboxes/{box}/ports/8000/")).code == 502
