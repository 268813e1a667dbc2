"""Jupyter's REST operations, as every client may rely on them: models, keys, origins, the server's address."""

import asyncio
import base64
import json
import logging
import re
import ssl
import subprocess
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from websockets.exceptions import InvalidStatus

from kernel_gateway.api import jupyter
from kernel_gateway.drivers import DriverError
from kernel_gateway.drivers.unisolated import Unisolated
from kernel_gateway.sandbox.sandbox import kernel_id
from kernel_gateway.server import running
from kernel_gateway.settings import Settings
from tests.api.clients import address, agent, channels, opening, raw
from tests.fakes import Service, error_of, eventually, serving

UNKNOWN = "01234567-89ab-cdef-0123-456789abcdef"


async def get(service: Service, path: str, **options: Any) -> Any:
    """The answer to a GET."""
    answer = await service.call("GET", path, **options)
    assert answer.code == 200, answer.body
    return json.loads(answer.body)


async def start(service: Service, body: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A new kernel's model."""
    answer = await service.call("POST", "/api/kernels", body, **options)
    assert answer.code == 201, answer.body
    return checked(json.loads(answer.body))


def checked(model: dict[str, Any]) -> dict[str, Any]:
    """A kernel's model, checked to be as Jupyter's clients parse it."""
    assert re.fullmatch(r"\w+-\w+-\w+-\w+-\w+", model["id"])
    assert datetime.strptime(model["last_activity"], "%Y-%m-%dT%H:%M:%S.%fZ")  # noqa: DTZ007  as jupyter_server does
    assert model["execution_state"] in ("starting", "idle", "busy", "restarting", "dead")
    assert isinstance(model["connections"], int)
    return model


# -- versions, kernelspecs, status


async def test_the_version_needs_no_key(service: Service) -> None:
    """Clients find out by `GET /api` whether this is a Jupyter server."""
    assert set(await get(service, "/api", key=None)) == {"version"}


async def test_kernelspecs(service: Service) -> None:
    """There is a kernelspec for each template, and `python3`, with a name that clients take and a logo."""
    specs = await get(service, "/api/kernelspecs")
    assert specs["default"] == "code_interpreter"
    assert set(specs["kernelspecs"]) == {"code_interpreter", "base", "python3"}
    for name, spec in specs["kernelspecs"].items():
        assert re.fullmatch(r"[\w.\-%]+", name)
        assert spec["name"] == name
        assert {"argv", "display_name", "language", "env", "metadata", "interrupt_mode"} <= set(spec["spec"])
        assert spec == await get(service, f"/api/kernelspecs/{name}")
        (logo,) = spec["resources"].values()
        assert "/kernelspecs/" in logo
        answer = await service.call("GET", logo, key=None)
        assert (answer.code, answer.headers["Content-Type"]) == (200, "image/svg+xml")
        assert b"<svg" in answer.body
    assert (await service.call("GET", "/api/kernelspecs/nope")).code == 404
    assert (await service.call("GET", "/kernelspecs/base/nope.png")).code == 404
    assert await get(service, "/api/kernelspecs?user=bob/base") == specs  # jupyter_server with KERNEL_USERNAME


async def test_the_server_tells_its_status(service: Service) -> None:
    """`GET /api/status` counts only this owner's kernels and connections."""
    kernel = await start(service)
    async with channels(service, kernel["id"]):
        status = await get(service, "/api/status")
        assert (status["kernels"], status["connections"]) == (1, 1)
    status = await get(service, "/api/status", key=service.other_key)
    assert (status["kernels"], status["connections"]) == (0, 0)


# -- the life of a kernel


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b'{"name": null, "path": null}', b'{"name": "base", "kernel_id": null, "path": "/a", "x": [1]}',
     b'{"name": "ci-v1", "env": {"KERNEL_LAUNCH_TIMEOUT": "40", "KERNEL_WORKING_DIR": "/no/such"}}'],
)  # fmt: skip
async def test_starts_of_all_clients(service: Service, body: bytes) -> None:
    """A start gets 201 with the model, also without body or content type, with nulls, or with unknown keys."""
    head = f"POST /api/kernels?token={service.key} HTTP/1.1\nContent-Length: {len(body)}"
    status, answer = await raw(service, head, body)
    assert status == 201
    model = checked(json.loads(answer))
    assert (model["execution_state"], model["connections"]) == ("idle", 0)
    assert model == await get(service, f"/api/kernels/{model['id']}")


async def test_an_unknown_name(service: Service) -> None:
    """An unknown kernelspec is 404, and nothing is started."""
    answer = await service.call("POST", "/api/kernels", {"name": "julia-1.10"})
    assert (answer.code, error_of(answer)["error"]) == (404, "not_found")
    assert service.driver.machines == []


async def test_the_name_that_notebooks_have(service: Service) -> None:
    """`python3` means the default template."""
    answer = await service.call("POST", "/api/kernels", {"name": "python3"})
    assert (answer.code, json.loads(answer.body)["name"]) == (201, "python3")
    box = json.loads((await service.call("GET", f"/sandboxes/{json.loads(answer.body)['sandbox_id']}")).body)
    assert box["templateID"] == "code_interpreter"


async def test_from_start_to_end(service: Service) -> None:
    """A kernel is listed, found, interrupted (204), restarted (200 and the model), deleted (204), and then 404."""
    kernel = await start(service)
    path = f"/api/kernels/{kernel['id']}"
    assert await get(service, "/api/kernels") == [kernel]
    assert (await service.call("POST", f"{path}/interrupt", {})).code == 204
    await service.execute(kernel["sandbox_id"], "x = 1")
    answer = await service.call("POST", f"{path}/restart", {})
    assert answer.code == 200
    assert checked(json.loads(answer.body))["id"] == kernel["id"]
    assert (await service.execute(kernel["sandbox_id"], "x"))["error"]["name"] == "NameError"
    assert (await service.call("DELETE", path)).code == 204
    assert service.driver.alive == []
    for method, of in (("GET", path), ("DELETE", path), ("POST", f"{path}/interrupt"), ("POST", f"{path}/restart")):
        assert (await service.call(method, of)).code == 404
    assert await get(service, "/api/kernels") == []


async def test_a_kernel_is_a_sandbox(service: Service) -> None:
    """A client that makes one gets both, and each id can be made from the other."""
    kernel = await start(service)
    box = await get(service, f"/sandboxes/{kernel['sandbox_id']}")
    assert box["kernelID"] == kernel["id"]
    other = await service.create(templateID="base")
    models = {model["sandbox_id"]: model for model in await get(service, "/api/kernels")}
    assert set(models) == {kernel["sandbox_id"], other}
    assert (models[other]["name"], models[other]["execution_state"]) == ("base", "idle")
    await service.call("DELETE", f"/api/kernels/{models[other]['id']}")
    await service.call("DELETE", f"/sandboxes/{kernel['sandbox_id']}")
    assert (await get(service, "/api/kernels"), await get(service, "/sandboxes")) == ([], [])


async def test_the_model_tells_what_goes_on(service: Service) -> None:
    """The model says busy while a cell runs, and counts connections. Cells move last_activity, reading does not."""
    kernel = await start(service)
    path = f"/api/kernels/{kernel['id']}"
    async with channels(service, kernel["id"]) as client, channels(service, kernel["id"]):
        await client.ask("kernel_info_request")
        model = await get(service, path)
        assert (model["connections"], model["execution_state"]) == (2, "idle")
        assert model["last_activity"] == kernel["last_activity"]
        request = await client.start("time.sleep(0.2)")
        await client.until_kind("execute_input")
        assert (await get(service, path))["execution_state"] == "busy"
        await client.answer(request)
        model = await get(service, path)
        assert model["execution_state"] == "idle"
        assert model["last_activity"] > kernel["last_activity"]
    await eventually(lambda: service.sandboxes.get(service.owner, kernel["sandbox_id"]).kernel.connections == 0)


async def test_a_kernel_that_died(service: Service) -> None:
    """It stays listed as dead, with the reason, until its owner deletes it. A restart gets 404."""
    kernel = await start(service)
    path = f"/api/kernels/{kernel['id']}"
    service.guest(kernel["sandbox_id"]).die("killed by a test")
    await eventually(lambda: len(service.sandboxes) == 0)
    for model in (await get(service, path), *await get(service, "/api/kernels")):
        assert checked(model)["execution_state"] == "dead"
        assert (model["name"], model["connections"]) == (kernel["name"], 0)
        assert "died" in model["reason"]
    assert (await service.call("POST", f"{path}/restart")).code == 404
    assert (await service.call("GET", path, key=service.other_key)).code == 404
    assert (await service.call("DELETE", path)).code == 204
    assert (await service.call("GET", path)).code == 404
    assert await get(service, "/api/kernels") == []


async def test_the_journal(service: Service) -> None:
    """All messages of the kernel, without a WebSocket: numbered, from a number on, and with waiting for new ones."""
    kernel = await start(service)
    path = f"/api/kernels/{kernel['id']}/journal"
    await service.execute(kernel["sandbox_id"], 'print("a")\n1 + 1')
    page = await get(service, path)
    kinds = [message["header"]["msg_type"] for message in page["messages"]]
    assert kinds == ["status", "execute_input", "stream", "execute_result", "execute_reply", "status"]
    numbers = [message["seq"] for message in page["messages"]]
    assert numbers == sorted(set(numbers))
    assert (page["next"], page["last"], page["missing"]) == (numbers[-1], numbers[-1], 0)
    assert (await get(service, f"{path}?since={numbers[2]}"))["messages"] == page["messages"][3:]
    waiting = asyncio.create_task(get(service, f"{path}?since={page['next']}&wait=10"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await service.execute(kernel["sandbox_id"], "2")
    assert (await waiting)["messages"][0]["content"] == {"execution_state": "busy"}
    for query in ("since=-1", "since=x", "wait=61"):
        assert (await service.call("GET", f"{path}?{query}")).code == 400


async def test_idle_kernels_end(tmp_path: Path) -> None:
    """A kernel lives on while somebody is connected or a cell runs, and kernel_idle_timeout longer."""
    async with serving(tmp_path, kernel_idle_timeout=1) as service:
        begun = time.monotonic()
        unused, connected, busy = [await start(service) for _ in range(3)]
        async with channels(service, connected["id"]):
            async with channels(service, busy["id"]) as client:
                await client.start("time.sleep(2)")
                await client.until_kind("execute_input")
            alive = service.sandboxes._sandboxes
            await eventually(lambda: unused["sandbox_id"] not in alive)
            assert 1 <= time.monotonic() - begun < 2
            await asyncio.sleep(2.2 - (time.monotonic() - begun))
            assert set(alive) == {connected["sandbox_id"], busy["sandbox_id"]}
            await eventually(lambda: busy["sandbox_id"] not in alive)
            model = await get(service, f"/api/kernels/{unused['id']}")
            assert (model["execution_state"], "timeout" in model["reason"]) == ("dead", True)
            assert [model["id"] for model in await get(service, "/api/kernels")] == [connected["id"]]
        await eventually(lambda: not alive)


async def test_the_longest_life_of_a_kernel(tmp_path: Path) -> None:
    """A kernel of a Jupyter client ends after kernel_max_life, though a cell runs, somebody is connected, and REST has
    prolonged its sandbox. Sandboxes of agents have no such limit."""
    async with serving(tmp_path, kernel_max_life=1) as service:
        box = await service.create()
        kernel = await start(service)
        async with channels(service, kernel["id"]) as client:
            await client.start("time.sleep(600)")
            await client.until_kind("execute_input")
            answer = await service.call("POST", f"/sandboxes/{kernel['sandbox_id']}/timeout", {"timeout": 3600})
            assert answer.code == 204
            assert await client.close_code() == 4410
            assert "timeout" in (client.socket.close_reason or "")
        assert set(service.sandboxes._sandboxes) == {box}


async def test_a_sandbox_keeps_to_its_timeout(service: Service) -> None:
    """A sandbox that was made with a lifetime ends after it, whoever is connected, and says why."""
    box = await service.create(timeout=1)
    kernel = (await get(service, f"/sandboxes/{box}"))["kernelID"]
    begun = time.monotonic()
    async with channels(service, kernel) as client:
        assert await client.close_code() == 4410
        assert "timeout" in (client.socket.close_reason or "")
    assert 0.5 < time.monotonic() - begun < 2


async def test_environments_do_not_mix(tmp_path: Path) -> None:
    """Eight kernels start at once with a secret each. Each sees its own, and a kernel without one sees none."""
    async with serving(tmp_path, Unisolated(tmp_path), max_sandboxes=9) as service:
        kernels = await asyncio.gather(*(start(service, {"env": {"KERNEL_SECRET": f"s{n}"}}) for n in range(8)))
        kernels.append(await start(service))
        code = 'import os; print(os.environ.get("KERNEL_SECRET"))'
        cells = await asyncio.gather(*(service.execute(kernel["sandbox_id"], code) for kernel in kernels))
        assert [cell["stdout"] for cell in cells] == [*(f"s{n}\n" for n in range(8)), "None\n"]


# -- sessions


async def test_sessions(service: Service) -> None:
    """A path has one session. It can be renamed and moved to another kernel, and ends with its kernel."""
    body = {"path": "a.ipynb", "type": "notebook", "name": "", "kernel": {"name": "base"}}
    answer = await service.call("POST", "/api/sessions", body)
    assert answer.code == 201
    session = json.loads(answer.body)
    assert (session["path"], session["type"], session["notebook"]["path"]) == ("a.ipynb", "notebook", "a.ipynb")
    assert checked(session["kernel"])["name"] == "base"
    assert json.loads((await service.call("POST", "/api/sessions", body)).body)["id"] == session["id"]
    path = f"/api/sessions/{session['id']}"
    assert await get(service, path) == session
    assert await get(service, "/api/sessions") == [session]
    other = await start(service)
    change = {"path": "b.ipynb", "name": "b", "kernel": {"id": other["id"]}}
    changed = json.loads((await service.call("PATCH", path, change)).body)
    assert (changed["id"], changed["path"], changed["name"], changed["kernel"]["id"]) == (
        session["id"], "b.ipynb", "b", other["id"]
    )  # fmt: skip
    for method in ("GET", "PATCH", "DELETE"):
        answer = await service.call(method, path, None if method != "PATCH" else {}, key=service.other_key)
        assert answer.code == 404
    assert await get(service, "/api/sessions", key=service.other_key) == []
    assert (await service.call("DELETE", path)).code == 204
    assert (await service.call("GET", path)).code == 404
    assert await get(service, "/api/kernels") == []  # the first kernel has ended with the change
    await service.call("POST", "/api/sessions", {"path": "c", "kernel": {"id": session["kernel"]["id"]}})
    await service.call("DELETE", f"/api/kernels/{session['kernel']['id']}")
    assert await get(service, "/api/sessions") == []


async def test_sessions_are_bounded_by_owner(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key with too many sessions loses its own oldest one. Sessions of other keys stay."""
    monkeypatch.setattr(jupyter, "MAX_SESSIONS", 3)
    foreign = (await start(service, key=service.other_key))["id"]
    await service.call("POST", "/api/sessions", {"path": "x", "kernel": {"id": foreign}}, key=service.other_key)
    kernel = (await start(service))["id"]
    for path in "abcde":
        answer = await service.call("POST", "/api/sessions", {"path": path, "kernel": {"id": kernel}})
        assert answer.code == 201
    assert [each["path"] for each in await get(service, "/api/sessions")] == ["c", "d", "e"]
    assert [each["path"] for each in await get(service, "/api/sessions", key=service.other_key)] == ["x"]


async def test_one_path_at_once(service: Service) -> None:
    """Requests for the same path that come together share one session and one kernel. Another key has its own."""
    service.driver.script.start_delay = 0.3
    asked = [service.call("POST", "/api/sessions", {"path": "a.ipynb"}) for _ in range(3)]
    other = service.call("POST", "/api/sessions", {"path": "a.ipynb"}, key=service.other_key)
    *mine, foreign = [json.loads(answer.body) for answer in await asyncio.gather(*asked, other)]
    assert [mine[0]] * 3 == mine
    assert foreign["kernel"]["id"] != mine[0]["kernel"]["id"]
    assert len(service.driver.machines) == 2


async def test_the_first_of_many_hangs_up(service: Service) -> None:
    """A session that several requests wait for is made to its end, though the client that asked first has gone."""
    service.driver.script.start_delay = 0.5
    _, first = await asyncio.open_connection("127.0.0.1", service.port)
    body = b'{"path": "a.ipynb"}'
    head = f"POST /api/sessions?token={service.key} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    first.write(head.encode() + body)
    await eventually(lambda: len(service.sandboxes) == 1)
    others = [asyncio.create_task(service.call("POST", "/api/sessions", {"path": "a.ipynb"})) for _ in range(2)]
    await asyncio.sleep(0.1)
    first.close()
    await first.wait_closed()
    answers = await asyncio.gather(*others)
    assert [answer.code for answer in answers] == [201, 201]
    assert answers[0].body == answers[1].body
    assert len(service.driver.machines) == len(service.sandboxes) == 1
    assert (await service.execute(json.loads(answers[0].body)["kernel"]["sandbox_id"], "1"))["error"] is None


async def test_a_session_that_can_not_be_made(service: Service) -> None:
    """All who wait for a session get the error when it can't be made, and the next request tries again."""
    service.driver.script.start_delay, service.driver.script.start_error = 0.1, DriverError("no room")
    answers = await asyncio.gather(*(service.call("POST", "/api/sessions", {"path": "a"}) for _ in range(3)))
    assert [error_of(answer)["error"] for answer in answers] == ["host_full"] * 3
    service.driver.script.start_error = None
    assert (await service.call("POST", "/api/sessions", {"path": "a"})).code == 201


async def test_too_many_sessions_in_the_making(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that are being made for one key are bounded, because they are made though their clients have gone."""
    monkeypatch.setattr(jupyter, "MAX_MAKING", 1)
    service.driver.script.start_delay = 0.3
    first = asyncio.create_task(service.call("POST", "/api/sessions", {"path": "a"}))
    await eventually(lambda: len(service.sandboxes) == 1)
    refused = await service.call("POST", "/api/sessions", {"path": "b"})
    assert (refused.code, error_of(refused)["error"]) == (429, "too_many_requests")
    assert (await service.call("POST", "/api/sessions", {"path": "b"}, key=service.other_key)).code == 201
    assert (await first).code == 201
    assert (await service.call("POST", "/api/sessions", {"path": "b"})).code == 201


@pytest.mark.parametrize(
    ("body", "status"),
    [({}, 400), ({"path": ""}, 400), ({"path": "p" * 4097}, 400), ({"path": "a", "name": "n" * 4097}, 400),
     ({"path": "a", "kernel": {"id": UNKNOWN}}, 404),
     ({"path": "a", "kernel": {"name": "nope"}}, 404), ({"path": 3}, 400)],
)  # fmt: skip
async def test_sessions_that_can_not_be(service: Service, body: dict[str, Any], status: int) -> None:
    """A session without a path, with too long a text, or with an unknown kernel is refused and starts nothing."""
    assert (await service.call("POST", "/api/sessions", body)).code == status
    assert await get(service, "/api/sessions") == []
    assert service.driver.machines == []


# -- who may


async def test_a_foreign_kernel_is_like_none(service: Service) -> None:
    """On every route, also on WebSockets, somebody else's kernel gets the same 404 as one that never existed."""
    kernel = await start(service)
    other = service.other_key
    assert await get(service, "/api/kernels", key=other) == []
    routes = [("GET", ""), ("DELETE", ""), ("POST", "/interrupt"), ("POST", "/restart"), ("GET", "/journal")]
    names = (kernel["id"], UNKNOWN, "no-kernel")
    for method, rest in routes:
        answers: list[HTTPResponse] = [
            await service.call(method, f"/api/kernels/{name}{rest}", key=other) for name in names
        ]
        told = {answer.body.replace(name.encode(), b"ID") for name, answer in zip(names, answers, strict=True)}
        assert ({answer.code for answer in answers}, len(told)) == ({404}, 1)
    answer = await service.call("POST", "/api/sessions", {"path": "a", "kernel": {"id": kernel["id"]}}, key=other)
    assert answer.code == 404
    foreign = (f"/api/kernels/{kernel['id']}/channels", f"/sandboxes/{kernel['sandbox_id']}/stream")
    refusals = []
    for path in (*foreign, f"/api/kernels/{UNKNOWN}/channels"):
        with pytest.raises(InvalidStatus) as refused:
            await opening(address(service, path), other)
        refusals.append((refused.value.response.status_code, json.loads(refused.value.response.body)))
    told = {(status, re.sub("'.*'", "ID", error["message"]), error.get("hint")) for status, error in refusals}
    assert told == {(404, "kernel not found: ID", None), (404, "sandbox not found", None)}
    assert (await service.execute(kernel["sandbox_id"], "1"))["error"] is None


CARRIERS = [
    ("", "Authorization: token {}"), ("", "Authorization: Bearer {}"), ("", "authorization: bearer {}"),
    ("", "AUTHORIZATION: TOKEN {}"), ("", "X-API-Key: {}"), ("", "x-api-key: {}"), ("?token={}", "X-Other: 1"),
    ("/t/{}", "X-Other: 1"), ("/t/{}", "Authorization: token "),
]  # fmt: skip
"""Places of a key: in the query or the path, or in a header."""


@pytest.mark.parametrize(("place", "header"), CARRIERS, ids=lambda text: text)
async def test_every_way_to_carry_a_key(
    service: Service, place: str, header: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each way works for REST and for WebSockets. A wrong key gets 401, and no key is ever in the log."""
    kernel = await start(service)
    wrong = "sk-sb-wrong"
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "tornado"), caplog.at_level(logging.DEBUG, "kernel_gateway"):
        for key, rest, upgrade in ((service.key, 200, 101), (wrong, 401, 401)):
            prefix, query = (place.format(key), "") if place.startswith("/") else ("", place.format(key))
            carrier = header.format(key)
            assert (await raw(service, f"GET {prefix}/api/kernels{query} HTTP/1.1\n{carrier}"))[0] == rest
            assert (await raw(service, f"GET {prefix}/nope{query} HTTP/1.1\n{carrier}"))[0] == 404
            name, _, value = carrier.partition(": ")
            for path in (f"/api/kernels/{kernel['id']}/channels", f"/sandboxes/{kernel['sandbox_id']}/stream"):
                uri = address(service, prefix + path) + query
                try:
                    async with opening(uri, None, headers={name: value.strip()}, user_agent_header=None) as socket:
                        assert socket.response is not None
                        assert socket.response.status_code == upgrade
                except InvalidStatus as refused:
                    assert refused.response.status_code == upgrade  # noqa: PT017
    logged = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("websockets"))
    assert "/api/kernels" in logged
    assert service.key not in logged
    assert wrong not in logged


@pytest.mark.parametrize("path", ["/t/{}", "/t/{}/", "/T/{}/api", "//T/{}/api", "/t/{}/t/{}/api", "/t/{}/%zz"])
async def test_a_key_in_a_broken_path(service: Service, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """A path with a key but no route is refused, and the key is not in the log."""
    with caplog.at_level(logging.DEBUG):
        status, body = await raw(service, f"GET {path.replace('{}', service.key)} HTTP/1.1")
    assert status in (400, 404)
    assert service.key not in caplog.text
    assert service.key.encode() not in body


@pytest.mark.parametrize("headers", [{}, {"Authorization": "token "}, {"Authorization": "None x"}])
async def test_without_a_key(service: Service, box: str, headers: dict[str, str]) -> None:
    """Routes and WebSockets answer 401 before they look at anything else."""
    for path in ("/api/kernels", "/api/kernelspecs", f"/api/kernels/{UNKNOWN}", "/api/sessions"):
        assert (await service.call("GET", path, key=None, headers=headers)).code == 401
    for path in (f"/api/kernels/{UNKNOWN}/channels", f"/sandboxes/{box}/stream", "/sandboxes/x/stream"):
        with pytest.raises(InvalidStatus) as refused:
            await opening(address(service, path), None, headers=headers)
        assert refused.value.response.status_code == 401


# -- origins and addresses


async def test_web_pages(tmp_path: Path) -> None:
    """Pages of allowed origins may send every request, pages of others none. A WebSocket of others gets 403."""
    good, bad = "https://lab.example:8443", "https://evil.example"
    async with serving(tmp_path, origins=frozenset({good})) as service:
        kernel = await start(service)
        for origin, allowed in ((good, good), (bad, None), (good + ".evil.example", None), ("null", None)):
            answer = await service.call("GET", "/api/kernels", headers={"Origin": origin})
            assert answer.headers.get("Access-Control-Allow-Origin") == allowed
            sent = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            answer = await service.call("OPTIONS", "/api/kernels", key=None, headers=sent)
            assert answer.code == (204 if allowed else 405)
            assert ("POST" in answer.headers.get("Access-Control-Allow-Methods", "")) is bool(allowed)
            assert ("Authorization" in answer.headers.get("Access-Control-Allow-Headers", "")) is bool(allowed)
        for connecting in (
            channels(service, kernel["id"], origin=bad),
            agent(service, kernel["sandbox_id"], origin=bad),
        ):
            with pytest.raises(InvalidStatus) as refused:
                await connecting.__aenter__()
            assert refused.value.response.status_code == 403
        for origin in (good, service.url):  # the second is the origin of the server's own pages
            async with channels(service, kernel["id"], origin=origin) as client:
                assert (await client.run("1 + 1")).value == "2"


async def test_under_a_path(tmp_path: Path) -> None:
    """With a base URL everything is under it: routes, WebSockets, and the addresses in answers."""
    async with serving(tmp_path, base_url="/some/Where") as service:
        service.url += "/some/Where"
        answer = await service.call("POST", "/api/kernels")
        kernel = json.loads(answer.body)["id"]
        assert answer.headers["Location"] == f"/some/Where/api/kernels/{kernel}"
        (logo,) = (await get(service, "/api/kernelspecs/base"))["resources"].values()
        assert logo.startswith("/some/Where/kernelspecs/")
        for via in ("", f"/t/{service.key}"):
            assert (await service.call("GET", f"{via}/api/kernels/{kernel}", key=None if via else "")).code == 200
            async with channels(service, kernel, via=via, key=None if via else "") as client:
                assert (await client.run("1")).value == "1"


async def test_tls(tmp_path: Path) -> None:
    """With a certificate the server speaks HTTPS and WebSockets over it, and nothing else."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)  # noqa: ASYNC221
    settings = Settings(
        port=0, data_dir=str(tmp_path / "data"), isolation="unisolated", pool_size=0, api_key="sk-sb-over-tls-01234",
        tls_cert=str(certificate), tls_key=str(key),
    )  # fmt: skip
    async with running(settings, lambda text: None) as server:
        assert server.url.startswith("https://")
        service = SimpleNamespace(url=server.url, key="sk-sb-over-tls-01234")
        http = AsyncHTTPClient(force_instance=True)
        url = f"{server.url}/api/kernels?token={service.key}"
        answer = await http.fetch(url, method="POST", body=b"", ca_certs=str(certificate))
        http.close()
        trusted = ssl.create_default_context(cafile=str(certificate))
        async with channels(service, json.loads(answer.body)["id"], ssl=trusted) as client:
            assert (await client.run("6 * 7")).value == "42"
        with pytest.raises((OSError, IndexError)):  # a connection with plain HTTP is closed without an answer
            await raw(service, "GET /api HTTP/1.1")


@pytest.mark.parametrize(
    ("asked", "told"),
    [("python3", "python3"), ("python", "python3"), ("base", "base"), ("ci-v1", "code_interpreter"),
     (None, "code_interpreter")],
)  # fmt: skip
async def test_a_kernel_keeps_its_name(service: Service, asked: str | None, told: str) -> None:
    """A kernel that was asked for as `python3` says so, because clients write the name into notebooks."""
    kernel = json.loads((await service.call("POST", "/api/kernels", {"name": asked})).body)
    assert kernel["name"] == told
    assert json.loads((await service.call("GET", f"/api/kernels/{kernel['id']}")).body)["name"] == told
    session = {"path": "x.ipynb", "kernel": {"id": kernel["id"]}}
    assert json.loads((await service.call("POST", "/api/sessions", session)).body)["kernel"]["name"] == told


async def test_a_session_of_an_old_client(service: Service) -> None:
    """Old clients send the path in `notebook`."""
    body = {"notebook": {"path": "old.ipynb"}, "kernel": {"name": "python"}}
    answer = await service.call("POST", "/api/sessions", body)
    assert (answer.code, json.loads(answer.body)["path"]) == (201, "old.ipynb")
    answer = await service.call("POST", "/api/sessions", {"notebook": {}})
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")


async def test_the_kernel_before_ends_with_its_last_session(service: Service) -> None:
    """A session that gets another kernel ends the one before, unless another session or REST has that one."""

    async def session(path: str, **kernel: str) -> Any:
        answer = await service.call("POST", "/api/sessions", {"path": path, "kernel": kernel})
        return json.loads(answer.body)

    first = await session("a")
    second = await session("b", id=first["kernel"]["id"])
    for each, left in ((first, 2), (second, 2)):
        answer = await service.call("PATCH", f"/api/sessions/{each['id']}", {"kernel": {"name": "base"}})
        assert json.loads(answer.body)["kernel"]["name"] == "base"
        assert len(service.sandboxes) == left
    box = await service.create()
    third = await session("c", id=kernel_id(box))
    answer = await service.call("PATCH", f"/api/sessions/{third['id']}", {"kernel": {"id": first["kernel"]["id"]}})
    assert (answer.code, error_of(answer)["error"]) == (404, "not_found")
    answer = await service.call("PATCH", f"/api/sessions/{third['id']}", {"kernel": {"name": "base"}})
    assert answer.code == 200
    assert service.sandboxes.find(box) is not None


# -- what other Jupyter servers do


@pytest.mark.parametrize("wanted", [UNKNOWN, "mine", "../x", "x" * 500])
async def test_the_server_chooses_ids(service: Service, wanted: str) -> None:
    """An id that a client chooses for a new kernel is refused and not passed over, because the client relies on it."""
    answer = await service.call("POST", "/api/kernels", {"kernel_id": wanted})
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")
    assert "kernel_id" in error_of(answer)["hint"]
    assert service.driver.machines == []


async def test_a_start_with_the_id_of_a_kernel(service: Service) -> None:
    """The id of a kernel that lives gets this kernel, as from jupyter_server. It must be the key's own."""
    kernel = await start(service, {"name": "base"})
    assert await start(service, {"kernel_id": kernel["id"]}) == kernel
    answer = await service.call("POST", "/api/kernels", {"kernel_id": kernel["id"]}, key=service.other_key)
    assert answer.code == 400
    assert len(service.sandboxes) == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"),
    [("GET", f"/api/kernels/{UNKNOWN}", None, 404, "Not Found"),
     ("POST", "/api/kernels", {"name": "julia"}, 404, "Not Found"),
     ("GET", "/api/nope", None, 404, "Not Found"), ("PUT", "/api/kernels", {}, 405, "Method Not Allowed"),
     ("POST", "/api/sessions", {}, 400, "Bad Request")],
)  # fmt: skip
async def test_errors_have_a_reason(
    service: Service, method: str, path: str, body: Any, status: int, reason: str
) -> None:
    """Errors have `reason` and `message`, which Jupyter's clients show."""
    answer = await service.call(method, path, body)
    assert (answer.code, error_of(answer)["reason"]) == (status, reason)
    assert error_of(answer)["message"]


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [("GET", "/api/kernels/{}", UNKNOWN), ("DELETE", "/api/kernels/{}", "nope"),
     ("POST", "/api/kernels/{}/restart", UNKNOWN), ("GET", "/api/kernels/{}/journal", "nope")],
)  # fmt: skip
async def test_the_error_names_the_kernel(service: Service, method: str, path: str, name: str) -> None:
    """An error of an unknown kernel says that a kernel is unknown, and which."""
    answer = await service.call(method, path.format(name))
    assert (answer.code, error_of(answer)["message"]) == (404, f"kernel not found: '{name}'")


async def test_what_clients_look_for(service: Service) -> None:
    """The descriptions of the API, where other servers have them; the identity; a kernelspec's command. No contents."""
    document = await get(service, "/openapi.json")
    for path in ("/api/swagger.json", "/api/spec.yaml"):  # JSON is YAML, too
        assert await get(service, path, key=None) == document
    me = await get(service, "/api/me")
    assert (me["identity"]["username"], me["permissions"]) == (service.owner, {})
    assert {"name", "display_name", "initials", "avatar_url", "color"} <= set(me["identity"])
    assert (await service.call("GET", "/api/me", key=None)).code == 401
    assert "{connection_file}" in (await get(service, "/api/kernelspecs/python3"))["spec"]["argv"]
    assert (await service.call("GET", "/api/contents")).code == 404  # VS Code takes 405 for an error


@pytest.mark.parametrize(
    "carried",
    [{"credentials": "include"}, {"header": "X-XSRFToken"}, {"header": "x-xsrftoken, authorization"},
     {"header": "X-XSRFToken", "method": "DELETE"}],
)  # fmt: skip
async def test_web_pages_with_credentials(tmp_path: Path, carried: dict[str, str]) -> None:
    """A page of an allowed origin may let the browser send credentials, and Jupyter's header. No other page may."""
    good, bad = "https://lab.example:8443", "https://evil.example"
    async with serving(tmp_path, origins=frozenset({good})) as service:
        asked = {"Access-Control-Request-Method": carried.get("method", "POST")}
        asked |= {"Access-Control-Request-Headers": carried["header"]} if "header" in carried else {}
        for origin, allowed in ((good, "true"), (bad, None), ("null", None)):
            answers = [
                await service.call("OPTIONS", "/api/kernels/x", key=None, headers={"Origin": origin, **asked}),
                await service.call("GET", "/api/kernels", headers={"Origin": origin}),
                await service.call("GET", "/api/kernels", key=None, headers={"Origin": origin, "Cookie": "a=b"}),
            ]
            assert [each.headers.get("Access-Control-Allow-Credentials") for each in answers] == [allowed] * 3
            assert "*" not in answers[0].headers.get_list("Access-Control-Allow-Origin")
            may = {
                name.strip().lower() for name in answers[0].headers.get("Access-Control-Allow-Headers", "").split(",")
            }
            for name in carried.get("header", "authorization").split(","):
                assert (name.strip().lower() in may) is bool(allowed)


@pytest.mark.parametrize("made", ["by REST", "as a kernel", "by a session", "twice"])
async def test_every_kernel_has_a_session(service: Service, made: str) -> None:
    """VS Code finds kernels by their sessions. One that nobody has made a session for is listed with one."""
    if made == "by a session":
        await service.call("POST", "/api/sessions", {"path": "x.ipynb", "kernel": {"name": "base"}})
    else:
        box = await service.create() if made != "as a kernel" else (await start(service))["sandbox_id"]
        if made == "twice":
            await service.call("POST", "/api/sessions", {"path": "x.ipynb", "kernel": {"id": kernel_id(box)}})
    (session,) = await get(service, "/api/sessions")
    expected = "x.ipynb" if made in ("by a session", "twice") else session["kernel"]["sandbox_id"]
    assert (session["path"], session["notebook"]["path"]) == (expected, expected)
    assert checked(session["kernel"])["execution_state"] == "idle"
    assert await get(service, f"/api/sessions/{session['id']}") == session
    assert await get(service, "/api/sessions", key=service.other_key) == []
    again = await service.call("POST", "/api/sessions", {"path": session["path"]})
    assert json.loads(again.body) == session
    assert (await service.call("DELETE", f"/api/sessions/{session['id']}")).code == 204
    assert (await get(service, "/api/sessions"), await get(service, "/sandboxes")) == ([], [])


async def test_a_sandboxes_session_is_changed(service: Service) -> None:
    """What a client changes in the session of an agent's sandbox stays. The sandbox outlives another kernel there."""
    box = await service.create()
    path = f"/api/sessions/{kernel_id(box)}"
    assert (await service.call("PATCH", path, {"path": "a.ipynb"})).code == 200
    assert [each["path"] for each in await get(service, "/api/sessions")] == ["a.ipynb"]
    changed = json.loads((await service.call("PATCH", path, {"kernel": {"name": "base"}})).body)
    assert (changed["kernel"]["name"], len(service.sandboxes)) == ("base", 2)
    assert len({each["id"] for each in await get(service, "/api/sessions")}) == len(await get(service, "/api/sessions"))
    assert service.sandboxes.find(box) is not None


@pytest.mark.parametrize("outside", ["/api", "/health", "/", "/some/Wherever/api", "/some", "/t/KEY/api/kernels"])
async def test_outside_of_the_path(tmp_path: Path, outside: str) -> None:
    """With a base URL the rest of the host is not the server's."""
    async with serving(tmp_path, base_url="/some/Where") as service:
        answer = await service.call("GET", outside.replace("KEY", service.key))
        assert (answer.code, "/some/Where" in error_of(answer)["message"]) == (404, True)
        assert (await service.call("GET", "/some/Where/api")).code == 200


async def test_no_key_by_basic(service: Service) -> None:
    """A key as the password of HTTP Basic is refused, because browsers send such a password for any page."""
    for name in ("", "user", service.key):
        carried = base64.b64encode(f"{name}:{service.key}".encode()).decode()
        answer = await service.call("GET", "/api/kernels", key=None, headers={"Authorization": f"Basic {carried}"})
        assert (answer.code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
