"""`GET /metrics`: the server's figures for Prometheus."""

from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kernel_gateway.metrics import Metrics
from kernel_gateway.sandbox.key import new_key, parse_scope
from tests.fakes import Service, error_of


class Reader:
    """A client with a key for the figures."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.key = new_key()
        service.store.add_key(self.key, "reader", scope=parse_scope("metrics"))

    async def read(self) -> dict[tuple[str, ...], float]:
        """Every figure, by its name and the values of its labels, which are in the order of their names."""
        answer = await self.service.call("GET", "/metrics", key=self.key)
        assert (answer.code, answer.headers["Content-Type"].partition(";")[0]) == (200, "text/plain")
        families = text_string_to_metric_families(answer.body.decode())
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


async def test_what_is_counted(service: Service) -> None:
    """Creates, ends, requests and errors are counted, and the present state is told."""
    reader = Reader(service)
    box = await service.create()
    await service.create(templateID="base")
    await service.call("POST", f"/sandboxes/{box}/execute", {"code": "1"})
    await service.call("GET", f"/sandboxes/{'sbx' + 'a' * 20}")
    await service.call("GET", "/nowhere/in/particular")
    await service.call("DELETE", f"/sandboxes/{box}")
    found = await reader.read()
    created = {key[1:]: value for key, value in found.items() if key[0] == "cellvm_create_seconds_count"}
    assert sum(created.values()) == 2
    assert {template for _, template in created} == {"code_interpreter", "base"}
    assert found["cellvm_sandboxes_ended_total", "kill"] == 1
    assert found["cellvm_sandboxes", "running", "base"] == 1
    assert ("cellvm_sandboxes", "running", "code_interpreter") not in found
    assert found["cellvm_kernels", "idle"] == 1
    assert found["cellvm_errors_total", "not_found"] == 2
    assert found["cellvm_requests_total", "POST", "/sandboxes/{id}/execute", "200"] == 1
    assert found["cellvm_requests_total", "", "", "404"] == 1
    assert found["cellvm_request_seconds_count", "POST", "/sandboxes"] == 2
    assert (found["cellvm_places",], found["cellvm_trouble",]) == (service.sandboxes.places.maximum, 0)
    assert found["process_resident_memory_bytes",] > 1e6


async def test_what_users_choose_is_in_no_figure(service: Service) -> None:
    """Neither paths nor ids, names, keys and methods of users make labels, so nobody can fill the server's memory."""
    reader = Reader(service)
    box = await service.create(metadata={"a": "canary-1"}, envVars={"CANARY": "canary-2"})
    await service.call("GET", f"/canary-3?token={service.key}")
    await service.call("CANARY", "/sandboxes")
    await service.call("POST", f"/sandboxes/{box}/processes", {"cmd": "canary-4"})
    before = len(await reader.read())
    for number in range(20):
        await service.call("GET", f"/canary-{number}")
        await service.call("DELETE", f"/sandboxes/{await service.create()}")
    text = (await service.call("GET", "/metrics", key=reader.key)).body.decode()
    assert not [word for word in ("canary", "CANARY", box, service.key, service.owner) if word in text]
    assert len(await reader.read()) <= before + 60  # the new routes and reasons of this test


@pytest.mark.parametrize(("scope", "status"), [("", 403), ("read-only", 403), (None, 401)])
async def test_who_may_read(service: Service, scope: str | None, status: int) -> None:
    """The figures count the sandboxes of all owners, so an owner's key is not enough."""
    key = new_key()
    if scope is not None:
        service.store.add_key(key, "x", scope=parse_scope(scope))
    refused = await service.call("GET", "/metrics", key=key)
    assert refused.code == status
    assert "cellvm_" not in error_of(refused)["message"]


async def test_the_servers_own_key_may_read(service: Service) -> None:
    """So may the key that the operator has started the server with."""
    key = new_key()
    service.store.lend_key(key)
    assert (await service.call("GET", "/metrics", key=key)).code == 200


async def test_a_key_for_figures_does_nothing_else(service: Service, box: str) -> None:
    """It sees no sandbox, not even of an owner whose name it carries, and changes nothing."""
    key = new_key()
    service.store.add_key(key, "x", owner=service.owner, scope=parse_scope("metrics"))
    assert (await service.call("GET", "/sandboxes", key=key)).body == b"[]"
    assert (await service.call("GET", f"/sandboxes/{box}", key=key)).code == 404
    for method, path in (("POST", "/sandboxes"), ("DELETE", f"/sandboxes/{box}"), ("POST", "/api/kernels")):
        body: Any = {"templateID": "base"}
        assert (await service.call(method, path, body, key=key)).code == 403, (method, path)


def test_two_servers_in_one_process() -> None:
    """Each has figures of its own."""
    first, second = Metrics(), Metrics()
    first.ends.labels("kill").inc()
    assert b'cellvm_sandboxes_ended_total{reason="kill"} 1.0' in generate_latest(first.registry)
    assert b"cellvm_sandboxes_ended_total{" not in generate_latest(second.registry)
