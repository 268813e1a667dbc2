"""Sandboxes over HTTP (create, find, list, lifetimes, keys), templates, and the server's own routes."""

import asyncio
import json
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kernel_gateway.api.app import ROUTES
from kernel_gateway.drivers import DriverError
from kernel_gateway.sandbox.sandbox import kernel_id
from tests.fakes import FakeDriver, Service, error_of, eventually, serving


def moment(text: str) -> datetime:
    assert text.endswith("Z")
    return datetime.fromisoformat(text)


async def test_create(service: Service) -> None:
    """A create answers 201 with the whole sandbox, running already, and its environment is in the guest."""
    fields = {"templateID": "ci-v1", "timeout": 120, "metadata": {"k": "v"}, "envVars": {"A": "ü"}}
    answer = await service.call("POST", "/sandboxes", fields)
    assert answer.code == 201
    assert answer.headers["Content-Type"] == "application/json"
    body = json.loads(answer.body)
    assert re.fullmatch("sbx[a-z0-9]+", body["sandboxID"])
    started, ends = moment(body.pop("startedAt")), moment(body.pop("endAt"))
    assert abs(started - datetime.now(UTC)) < timedelta(seconds=5)
    assert timedelta(seconds=119) < ends - started < timedelta(seconds=125)
    tokens = {body.pop("envdAccessToken"), body.pop("trafficAccessToken")}
    assert len(tokens) == 2
    assert all(re.fullmatch("[0-9a-f]{48}", token) for token in tokens)
    assert body.pop("domain") == "localhost"
    assert abs(body["kernel"].pop("since") - started.timestamp()) < 5
    assert body == {
        "sandboxID": body["sandboxID"],
        "templateID": "code_interpreter",
        "alias": "ci-v1",
        "clientID": body["clientID"],
        "status": "running",
        "state": "running",
        "metadata": {"k": "v"},
        "cpuCount": 2,
        "memoryMB": 2048,
        "diskSizeMB": 10240,
        "envdVersion": body["envdVersion"],
        "kernelID": kernel_id(body["sandboxID"]),
        "kernel": {"state": "idle"},
    }
    assert service.guest(body["sandboxID"]).env == {
        "HOME": "/home/user",
        "E2B_SANDBOX": "true",
        "E2B_SANDBOX_ID": body["sandboxID"],
        "E2B_TEMPLATE_ID": "code_interpreter",
        "A": "ü",
    }


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "templateID"),
        ({"templateID": 3}, "templateID"),
        ({"templateID": "nope"}, "unknown template: nope"),
        ({"templateID": "base", "timeout": 0}, ">= 1"),
        ({"templateID": "base", "timeout": -1}, ">= 1"),
        ({"templateID": "base", "timeout": 3601}, "<= 3600"),
        ({"templateID": "base", "timeout": "60"}, "timeout"),
        ({"templateID": "base", "timeout": 1.5}, "timeout"),
        ({"templateID": "base", "metadata": {"a": 1}}, "metadata"),
        ({"templateID": "base", "metadata": []}, "metadata"),
        ({"templateID": "base", "envVars": {"": "x"}}, "environment variable"),
        ({"templateID": "base", "envVars": {"A=B": "x"}}, "environment variable"),
        ({"templateID": "base", "envVars": {"A": "\0"}}, "NUL"),
        ({"templateID": "base", "envVars": {"A": "x" * 1_000_000}}, "environment variables"),
    ],
)
async def test_create_refuses(service: Service, fields: dict[str, object], says: str) -> None:
    """A bad field gets 400 with a message that names it, and nothing is started."""
    answer = await service.call("POST", "/sandboxes", fields)
    assert answer.code == 400
    error = error_of(answer)
    assert error["error"] == "invalid_request"
    assert says in error["message"]
    assert service.driver.machines == []


async def test_limits_of_the_timeout_are_allowed(service: Service) -> None:
    """1 and 3600 seconds are in the range."""
    for timeout in (1, 3600):
        await service.create(timeout=timeout)
    assert len(service.sandboxes) == 2


async def test_unknown_template_names_those_there_are(service: Service) -> None:
    """The hint names this server's templates."""
    answer = await service.call("POST", "/sandboxes", {"templateID": "x"})
    assert "code_interpreter, base" in error_of(answer)["hint"]


async def test_get_list_and_filters(service: Service) -> None:
    """A list is newest first, of this key only, and can be narrowed by status and metadata."""
    first = await service.create(metadata={"team": "a b", "n": "1"})
    second = await service.create(metadata={"team": "c"})

    async def ids(query: str = "", key: str = "") -> list[str]:
        answer = await service.call("GET", f"/sandboxes{query}", key=key)
        assert answer.code == 200
        return [each["sandboxID"] for each in json.loads(answer.body)]

    assert await ids() == [second, first]
    assert await ids(key=service.other_key) == []
    assert await ids("?status=running") == [second, first]
    assert await ids("?status=paused") == []
    assert await ids("?metadata=team%3Da%2520b%26n%3D1") == [first]
    assert await ids("?metadata=team%3Dc%26n%3D1") == []
    answer = await service.call("GET", "/sandboxes?status=asleep")
    assert (answer.code, error_of(answer)["message"]) == (400, "invalid status filter: asleep")
    one = json.loads((await service.call("GET", f"/sandboxes/{first}")).body)
    assert one["metadata"] == {"team": "a b", "n": "1"}


@pytest.mark.parametrize(("method", "suffix"), [("DELETE", ""), ("POST", "/shutdown")])
async def test_delete(service: Service, box: str, method: str, suffix: str) -> None:
    """A delete answers 204 without a body when the machine is gone. Afterwards 404 says how it ended."""
    answer = await service.call(method, f"/sandboxes/{box}{suffix}")
    assert (answer.code, answer.body) == (204, b"")
    assert "Content-Type" not in answer.headers
    assert service.driver.alive == []
    answer = await service.call(method, f"/sandboxes/{box}{suffix}")
    assert answer.code == 404
    assert re.fullmatch(r"it ended \d s ago: kill", error_of(answer)["hint"])


async def test_delete_twice_at_once(service: Service, box: str) -> None:
    """Two deletes at the same time destroy one machine, and get 204 or 404."""
    answers = await asyncio.gather(*(service.call("DELETE", f"/sandboxes/{box}") for _ in range(2)))
    assert {answer.code for answer in answers} in ({204}, {204, 404})
    assert service.driver.alive == []


async def test_delete_ends_what_is_under_way(service: Service, box: str) -> None:
    """A command that runs while its sandbox is deleted is answered with sandbox_died, not left hanging."""
    running = asyncio.create_task(service.call("POST", f"/sandboxes/{box}/processes", {"cmd": "sleep", "args": ["60"]}))
    await eventually(lambda: any(type(r).__name__ == "Spawn" for r in service.guest(box).requests))
    await service.call("DELETE", f"/sandboxes/{box}")
    assert error_of(await running)["error"] == "sandbox_died"


# -- lifetimes


async def ends_in(service: Service, box: str) -> float:
    body = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)
    return (moment(body["endAt"]) - datetime.now(UTC)).total_seconds()


async def test_expiry_to_the_second(service: Service) -> None:
    """A sandbox ends at its timeout, not before and within a second after. The owner is told why."""
    before = time.monotonic()
    box = await service.create(timeout=1)
    after = time.monotonic()
    await eventually(lambda: not service.driver.alive)
    assert time.monotonic() >= before + 1
    assert time.monotonic() <= after + 2
    answer = await service.call("GET", f"/sandboxes/{box}")
    assert answer.code == 404
    assert error_of(answer)["hint"].endswith("timeout")


async def test_timeout_connect_and_refreshes(service: Service) -> None:
    """`timeout` sets the end, sooner or later. `connect` and `refreshes` can only put it off."""
    box = await service.create(timeout=100)
    answer = await service.call("POST", f"/sandboxes/{box}/timeout", {"timeout": 50})
    assert (answer.code, answer.body) == (204, b"")
    assert 48 < await ends_in(service, box) <= 50
    answer = await service.call("POST", f"/sandboxes/{box}/connect", {"timeout": 10})
    assert answer.code == 200
    assert json.loads(answer.body)["sandboxID"] == box
    assert 48 < await ends_in(service, box) <= 50
    await service.call("POST", f"/sandboxes/{box}/connect", {"timeout": 200})
    assert 198 < await ends_in(service, box) <= 200
    assert (await service.call("POST", f"/sandboxes/{box}/connect")).code == 200
    assert (await service.call("POST", f"/sandboxes/{box}/refreshes", {"duration": 300})).code == 204
    assert 298 < await ends_in(service, box) <= 300
    assert (await service.call("POST", f"/sandboxes/{box}/refreshes")).code == 204
    assert 298 < await ends_in(service, box) <= 300
    for suffix, body in (("timeout", {"timeout": 0}), ("timeout", {}), ("connect", {"timeout": 3601})):
        assert (await service.call("POST", f"/sandboxes/{box}/{suffix}", body)).code == 400
    assert (await service.call("POST", f"/sandboxes/{box}/refreshes", {"duration": -1})).code == 400


async def test_a_step_of_the_wall_clock_moves_no_deadline(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of an hour forward ends nothing, because lifetimes are on the monotonic clock."""
    box = await service.create(timeout=60)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    await asyncio.sleep(0.4)
    assert (await service.call("GET", f"/sandboxes/{box}")).code == 200


async def test_lifetime_counts_from_the_end_of_the_create(tmp_path: Path) -> None:
    """A slow start does not eat the sandbox's time."""
    driver = FakeDriver()
    driver.script.start_delay = 0.8
    async with serving(tmp_path, driver) as service:
        box = await service.create(timeout=1)
        await asyncio.sleep(0.5)
        assert (await service.call("GET", f"/sandboxes/{box}")).code == 200


# -- capacity


async def test_full(tmp_path: Path) -> None:
    """Beyond the maximum a create gets 503 with Retry-After. A delete makes room."""
    async with serving(tmp_path, max_sandboxes=1) as service:
        box = await service.create()
        answer = await service.call("POST", "/sandboxes", {"templateID": "base"})
        assert (answer.code, error_of(answer)["error"], answer.headers["Retry-After"]) == (503, "host_full", "5")
        await service.call("DELETE", f"/sandboxes/{box}")
        await service.create()


async def test_draining(service: Service, box: str) -> None:
    """A server that goes down creates no sandboxes, says so in its health, and still serves existing ones."""
    service.sandboxes.places.is_draining = True
    answer = await service.call("POST", "/sandboxes", {"templateID": "base"})
    assert (answer.code, error_of(answer)["error"], answer.headers["Retry-After"]) == (503, "draining", "10")
    answer = await service.call("GET", "/health")
    assert (answer.code, json.loads(answer.body)["ready"]) == (503, False)
    assert (await service.call("GET", f"/sandboxes/{box}")).code == 200


async def test_a_machine_that_does_not_start(service: Service) -> None:
    """When no machine can be started the create gets 503, nothing is left, and the slot is free again."""
    service.driver.script.start_error = DriverError("no room")
    answer = await service.call("POST", "/sandboxes", {"templateID": "base"})
    assert (answer.code, error_of(answer)["error"]) == (503, "host_full")
    assert len(service.sandboxes) == 0
    service.driver.script.start_error = None
    await service.create()


async def test_a_client_that_hangs_up_during_create(service: Service) -> None:
    """R27: a create whose client has gone leaves no machine that nobody knows of for long."""
    service.driver.script.start_delay = 0.3
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    body = b'{"templateID": "base", "timeout": 300}'
    writer.write(
        b"POST /sandboxes HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s"
        % (service.key.encode(), len(body), body)
    )
    await writer.drain()
    await eventually(lambda: len(service.sandboxes) == 1)
    writer.close()
    await eventually(lambda: not service.driver.alive and len(service.sandboxes) == 0, 4)
    assert await reader.read() == b""


# -- keys


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer KEY"},
        {"authorization": "bearer KEY"},
        {"AUTHORIZATION": "BEARER  KEY "},
        {"X-API-Key": "KEY"},
        {"x-api-key": "KEY"},
        {"X-API-KEY": "KEY"},
        {"Authorization": "token KEY"},
        {"Authorization": "Token KEY"},
        {"Authorization": "Basic x", "X-API-Key": "KEY"},
    ],
)
@pytest.mark.parametrize("which", ["key", "other_key"])
async def test_all_forms_of_a_key(service: Service, headers: dict[str, str], which: str) -> None:
    """Either header is accepted, in any case, with keys of both forms."""
    sent = {name: value.replace("KEY", getattr(service, which)) for name, value in headers.items()}
    assert (await service.call("GET", "/sandboxes", key=None, headers=sent)).code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/sandboxes?token=KEY", 200),
        ("/sandboxes?status=running&token=KEY", 200),
        ("/t/KEY/sandboxes", 200),
        ("/t/KEY/api/kernels", 200),
        ("/t/wrong/health", 200),
        ("/sandboxes?token=", 401),
        ("/sandboxes?token=wrong", 401),
        ("/sandboxes?token=%ff%fe", 401),
        ("/sandboxes?key=KEY", 401),
        ("/t/wrong/sandboxes", 401),
        ("/t/%ff/sandboxes", 401),
        ("/t//sandboxes", 404),
        ("/t/KEY", 400),  # the page would be there
    ],
)
async def test_a_key_in_the_address(service: Service, caplog: pytest.LogCaptureFixture, path: str, status: int) -> None:
    """Clients that can't set headers put the key into the query or the path. It never gets into the log."""
    with caplog.at_level("INFO"):
        answer = await service.call("GET", path.replace("KEY", service.key), key=None)
    assert answer.code == status
    assert service.key not in caplog.text


async def test_a_header_is_stronger_than_the_address(service: Service) -> None:
    """A wrong key in the header is refused, even with a right one in the address."""
    for path in (f"/sandboxes?token={service.key}", f"/t/{service.key}/sandboxes"):
        assert (await service.call("GET", path, key="wrong")).code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic KEY"},
        {"Authorization": "KEY"},
        {"X-API-Key": "wrong"},
        {"X-API-Key": "KEYx"},
        {"X-API-Key": "\u00ff"},
        {"Cookie": "X-API-Key=KEY"},
    ],
)
async def test_no_key_no_entry(service: Service, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a known key every route but the public ones answers 401, before anything else is looked at."""
    monkeypatch.setattr("kernel_gateway.api.guesses.LIMIT", len(ROUTES))
    sent = {name: value.replace("KEY", service.key) for name, value in headers.items()}
    for route in ROUTES:
        path = re.sub(r"\{\w+\}", "x", route.path)
        answer = await service.call(route.method, path, key=None, headers=sent)
        if route.public:
            assert answer.code == (401 if 401 in route.errors else 404 if route.names else 200)
        else:
            assert (answer.code, error_of(answer)["error"]) == (401, "unauthorized"), route.path
            assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_a_removed_key_is_out_at_once(service: Service) -> None:
    """Removing a key needs no restart."""
    service.store.remove_key(service.owner)
    assert (await service.call("GET", "/sandboxes")).code == 401


# -- the server's own routes


async def test_the_list_as_a_stream(service: Service) -> None:
    """A client that follows the list is told what there is, then what is new, another, or gone. A HEAD ends at once."""
    told: list[dict[str, Any]] = []
    headers = {"Accept": "application/x-ndjson"}
    first = await service.create()
    assert (await service.call("HEAD", "/sandboxes", headers=headers)).code == 200
    following = asyncio.create_task(
        service.call(
            "GET",
            "/sandboxes",
            headers=headers,
            streaming_callback=lambda data: told.extend(map(json.loads, data.splitlines())),
        )
    )
    await eventually(lambda: told)
    assert [each["sandboxID"] for each in told[0]["sandboxes"]] == [first]
    second = await service.create(metadata={"a": "b"})
    await eventually(lambda: {"sandbox"} == {each["type"] for each in told[1:]})
    assert told[1]["sandbox"]["sandboxID"] == second
    await service.call("DELETE", f"/sandboxes/{first}")
    await eventually(lambda: {"type": "gone", "sandboxID": first} in told)
    service.sandboxes.places.is_draining = True
    assert (await following).code == 200


async def test_health(pooled: Service) -> None:
    """Health needs no key and tells readiness, isolation, accelerator, network, use and stock."""
    await eventually(lambda: pooled.sandboxes.pools["code_interpreter"].ready == 1)
    answer = await pooled.call("GET", "/health", key=None)
    body = json.loads(answer.body)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", body.pop("version"))
    assert (answer.code, body) == (
        200,
        {
            "ready": True,
            "isolation": "none",
            "accelerator": "fake",
            "network": "off",
            "sandboxes": 0,
            "maxSandboxes": 4,
            "pool": [{"template": "code_interpreter", "ready": 1, "size": 1}],
            "capabilities": ["pty", "hold", "variables", "complete", "share"],
            "trouble": None,
        },
    )


async def test_templates(service: Service) -> None:
    """Templates are listed and found by id and by alias."""
    listed = json.loads((await service.call("GET", "/templates")).body)
    assert [each["templateID"] for each in listed] == ["code_interpreter", "base"]
    assert listed[0]["cpuCount"] == 2
    for path in ("/templates/ci-v1", "/templates/aliases/ci-v1", "/templates/code_interpreter"):
        assert json.loads((await service.call("GET", path)).body) == listed[0]
    for path in ("/templates/x", "/templates/aliases/x"):
        assert error_of(await service.call("GET", path))["error"] == "not_found"


async def test_a_stranger_sends_little(service: Service) -> None:
    """Bodies of strangers are not held for anybody, so a public route takes small ones only."""
    for size, code in ((60_000, 200), (100_000, 413)):
        answer = await service.call("GET", "/health", body=b"x" * size, key=None)
        assert answer.code == code


async def test_the_library_of_charts(service: Service, tmp_path: Path) -> None:
    """plotly.js is there as soon as an image has brought it. A frame, whose origin is opaque, may load it."""
    path, file = "/ui/lib/plotly.min.js", tmp_path / "plotly.min.js"
    assert (await service.call("GET", path, key=None)).code == 404
    service.app.settings["library"] = lambda: file
    file.write_bytes(b"Plotly = {}")
    answer = await service.call("GET", path, key=None)
    assert (answer.code, answer.body, answer.headers["Content-Type"]) == (200, b"Plotly = {}", "text/javascript")
    assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    again = await service.call("GET", path, key=None, headers={"If-None-Match": answer.headers["Etag"]})
    assert again.code == 304


async def test_unknown_paths_and_methods(service: Service) -> None:
    """An unknown path gets 404, an unknown method 405 with the allowed ones. Both have the error's shape."""
    for path in ("/nope", "/ui/nope.js", "/sandboxes/a/b/c", "/sandboxes/a/files/x", "//", "/sandbox%65s%00"):
        assert (await service.call("GET", path)).code == 404
        assert error_of(await service.call("GET", path))["error"] == "not_found"
    for method in ("PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = await service.call(method, "/sandboxes")
        assert answer.code == 405, method
        assert error_of(answer)["error"] == "method_not_allowed"
        assert answer.headers["Allow"] == "GET, HEAD, POST"
    answer = await service.call("BREW", "/sandboxes")
    assert answer.code == 405
    assert error_of(answer)["error"] == "method_not_allowed"
    assert (await service.call("GET", "/health/")).code == 200


async def test_openapi_lists_every_route(service: Service) -> None:
    """The document is OpenAPI 3.1 and has every route of the table, each with a summary and unique operation id."""
    document = json.loads((await service.call("GET", "/openapi.json", key=None)).body)
    assert document["openapi"].startswith("3.1")
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == {(route.method, route.path) for route in ROUTES}
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    assert all(operation["summary"] for operation in operations)
    ids = [operation["operationId"] for operation in operations]
    assert sorted(ids) == sorted(set(ids))


@pytest.mark.parametrize("box_id", ["a.b", "%00", "x" * 65, "%2e%2e", "%C3%A4", "%ff", "a%20b", "a%2fb"])
async def test_illegal_ids(service: Service, box_id: str) -> None:
    """A text that can't be an id gets 400 in the error's shape."""
    answer = await service.call("GET", f"/sandboxes/{box_id}")
    assert answer.code in (400, 404)
    assert error_of(answer)["code"] == answer.code
    if "%2f" not in box_id:
        assert answer.code == 400


async def test_every_answer_has_its_headers(service: Service, box: str) -> None:
    """Answers forbid sniffing and hide the web server's version, also on errors."""
    for path in ("/health", f"/sandboxes/{box}", "/nope", f"/sandboxes/{box}/files?path=/none"):
        answer = await service.call("GET", path)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Server"] == "CellVM"
