"""What strangers and web pages get: unknown keys, foreign host names, and nothing for a cache to keep."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import HTTPResponse
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from guest_agent import wire
from kernel_gateway.api.app import ROUTES
from kernel_gateway.api.guesses import LIMIT
from tests.api.clients import address
from tests.fakes import ENDLESS, Service, error_of, serving

WRONG = "e2b_" + "0" * 40


async def test_many_unknown_keys(service: Service, box: str) -> None:
    """After thirty unknown keys in a minute an address gets 429 instead of 401, whatever it asks. Keys that are known
    work on, and so do open ports."""
    port = f"/sandboxes/{box}/ports/8000/"
    for number in range(LIMIT):
        answer = await service.call("GET", ("/sandboxes", port)[number % 2], key=f"wrong-{number}")
        assert answer.code == 401
    for path, options in (("/sandboxes", {"key": WRONG}), (port, {"key": WRONG}), ("/sandboxes", {"key": None})):
        answer = await service.call("GET", path, **options)
        assert (answer.code, error_of(answer)["error"]) == (429, "too_many_requests")
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
    with pytest.raises(InvalidStatus) as refused:
        async with connect(address(service, f"/sandboxes/{box}/stream", token=WRONG)):
            pass
    assert refused.value.response.status_code == 429
    assert (await service.call("GET", "/sandboxes")).code == 200
    assert (await service.call("GET", "/sandboxes", key=service.other_key)).code == 200
    assert (await service.call("GET", "/health", key=None)).code == 200

    async def closed(stream: Any, body: wire.Connect) -> None:
        await stream.fail("port_closed", "no")

    service.guest(box).script.handlers[wire.Connect] = closed
    await service.call("PUT", f"/sandboxes/{box}/ports", {"port": 8000, "public": True})
    assert (await service.call("GET", port, key=WRONG)).code == 502


async def test_requests_without_a_key_are_no_guesses(service: Service) -> None:
    """A page that is loaded without a key does not lock its address out."""
    for _ in range(LIMIT + 5):
        assert (await service.call("GET", "/sandboxes", key=None)).code == 401


async def test_a_query_of_many_keys(service: Service, box: str) -> None:
    """Only a few texts that could be keys are looked up for a stranger. Short ones are the service's own."""
    port = f"/sandboxes/{box}/ports/8000/"
    looked: list[str] = []
    find = service.store.find_key
    service.store.find_key = lambda key: (looked.append(key), find(key))[1]  # type: ignore[method-assign]
    answer = await service.call("GET", f"{port}?" + "&".join(["token=a"] * 999), key=None)
    assert answer.code == 401
    assert len(looked) <= 1  # the last one is also the key that the API would read
    answer = await service.call("GET", f"{port}?" + "&".join([f"token={WRONG}"] * 999), key=None)
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")
    assert len(looked) <= 6


# -- host names


@pytest.fixture
async def named(tmp_path: Path) -> AsyncIterator[Service]:
    """A service that knows its names."""
    async with serving(tmp_path, domain="box.example.com:8443", hosts=frozenset({"api.example.com"})) as running:
        yield running


async def by_host(service: Service, host: str, path: str = "/health") -> HTTPResponse:
    return await service.call("GET", path, headers={"Host": host})


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "10.1.2.3:8888", "[::1]:8888", "[fe80::1]", "localhost", "localhost:1", "LOCALHOST.",
        "a.localhost", "api.example.com", "API.example.com:443", "api.example.com.",
    ],
)  # fmt: skip
async def test_our_names(named: Service, host: str) -> None:
    """Addresses, localhost and the operator's names are answered."""
    assert (await by_host(named, host)).code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "api.example.co", "x"]
)
async def test_other_names(named: Service, host: str) -> None:
    """Another name is refused on every path, with a hint, because a web page could have chosen it."""
    box = await named.create()
    paths = (
        "/health",
        "/",
        "/sandboxes",
        f"/sandboxes/{box}/ports/80/",
        f"/t/{named.key}/sandboxes",
        f"/sandboxes/{box}/stream",
    )
    for path in paths:
        answer = await by_host(named, host, path)
        assert (answer.code, error_of(answer)["error"]) == (421, "misdirected")
        assert "--allow-host" in error_of(answer)["hint"]


# -- caches


async def test_no_cache_keeps_our_answers(service: Service, box: str) -> None:
    """Every answer of ours says so, errors as well."""
    for route in ROUTES:
        path = re.sub(r"\{\w+\}", "x", route.path.replace("{id}", box))
        for key in ("", None):
            if route.method == "DELETE" and not key:
                continue
            answer = await service.call("HEAD" if route.path == ENDLESS else route.method, path, key=key)
            assert answer.headers.get_list("Cache-Control") == ["no-store"], (route.method, route.path)
    assert (await service.call("GET", "/nowhere")).headers["Cache-Control"] == "no-store"
    answer = await service.call("GET", f"/sandboxes/{box}/ports/8000/", key=None)
    assert (answer.code, answer.headers["Cache-Control"]) == (401, "no-store")


async def test_metadata_are_bounded(service: Service) -> None:
    """Over 64 KiB of them are refused, because every listing repeats them. Just as many are taken."""
    whole = {"a": "ü" * ((64 * 1024 - 1) // 2)}
    answer = await service.call("POST", "/sandboxes", {"templateID": "base", "metadata": whole})
    assert answer.code == 201
    assert json.loads(answer.body)["metadata"] == whole
    for metadata in ({"a": whole["a"] + "üü"}, {str(number): "x" * 10 for number in range(10_000)}):
        answer = await service.call("POST", "/sandboxes", {"templateID": "base", "metadata": metadata})
        assert (answer.code, error_of(answer)["error"]) == (413, "too_large")
    assert len(service.sandboxes) == 1
