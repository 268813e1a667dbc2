"""Network policies over HTTP: at creation and later, policies that can't be enforced, refusals."""

import asyncio
import json
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import HTTPResponse
from tornado.simple_httpclient import HTTPTimeoutError

from kernel_gateway.drivers import DriverError
from kernel_gateway.errors import CellvmError
from kernel_gateway.network.policy import Floor, Policy, Refusal
from tests.fakes import FakeDriver, FakeNetwork, Service, error_of, eventually, serving

FLOOR = Floor(exceptions=(IPv4Network("10.20.0.0/16"),), host=frozenset({IPv4Address("8.8.4.4")}))
RULES = {"allowOut": ["Example.com.", "1.1.1.1"], "denyOut": ["0.0.0.0/0"]}
POLICY = Policy(allow_internet=False, allow=(IPv4Network("1.1.1.1/32"),), allow_names=("example.com",))
NO_INTERNET = Policy(allow_internet=False)


@pytest.fixture
async def filtered(tmp_path: Path) -> AsyncIterator[Service]:
    """A service whose machines have network cards."""
    async with serving(tmp_path, FakeDriver(network="netns"), network=FakeNetwork("netns", FLOOR)) as running:
        yield running


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Service]:
    """A service whose machines use the host's own network."""
    async with serving(tmp_path, FakeDriver(network="host")) as running:
        yield running


async def put(service: Service, box: str, fields: dict[str, Any], **options: Any) -> HTTPResponse:
    return await service.call("PUT", f"/sandboxes/{box}/network", fields, **options)


async def network(service: Service, box: str) -> dict[str, Any]:
    answer = await service.call("GET", f"/sandboxes/{box}/network")
    assert answer.code == 200, answer.body
    return dict(json.loads(answer.body))


async def detail(service: Service, box: str) -> dict[str, Any]:
    return dict(json.loads((await service.call("GET", f"/sandboxes/{box}")).body))


# -- at creation


async def test_a_policy_is_in_force_before_anything_runs(filtered: Service) -> None:
    """A sandbox that runs has the policy that it was created with, and tells it."""
    box = await filtered.create(network=RULES)
    assert filtered.slot(box).applied == [POLICY]
    assert await network(filtered, box) == {
        "mechanism": "netns",
        "allowInternetAccess": False,
        "allowOut": ["example.com", "1.1.1.1"],
        "denyOut": ["0.0.0.0/0"],
        "refused": [],
        "refusedTotal": 0,
    }
    told = await detail(filtered, box)
    assert told["allowInternetAccess"] is False
    assert told["network"] == {
        "allowOut": ["example.com", "1.1.1.1"],
        "denyOut": ["0.0.0.0/0"],
        "allowPublicTraffic": False,
    }


async def test_a_policy_that_can_not_be_applied_fails_the_create(filtered: Service) -> None:
    """A guest whose policy can't be applied is destroyed before it gets the environment. Another one is tried."""
    filtered.driver.script.filter_error = DriverError("not yet")
    answer = await filtered.call("POST", "/sandboxes", {"templateID": "base", "network": RULES, "envVars": {"T": "x"}})
    assert (answer.code, error_of(answer)["error"]) == (503, "host_full")
    assert len(filtered.driver.machines) == 2
    assert filtered.driver.alive == []
    assert all("T" not in vm.guest.env for vm in filtered.driver.machines)
    assert len(filtered.sandboxes) == 0
    filtered.driver.script.filter_error = None
    assert await filtered.create(network=RULES)


async def test_a_host_without_room_for_a_process(filtered: Service) -> None:
    """An error of the host fails the create, too, and the machine is gone."""
    filtered.driver.script.filter_error = OSError("no more processes")
    answer = await filtered.call("POST", "/sandboxes", {"templateID": "base", "allow_internet_access": False})
    assert (answer.code, error_of(answer)["error"]) == (503, "host_full")
    assert (filtered.driver.alive, len(filtered.sandboxes)) == ([], 0)


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({"allow_internet_access": False}, NO_INTERNET),
        ({"allowInternetAccess": False}, NO_INTERNET),
        ({"allow_internet_access": False, "allowInternetAccess": False}, NO_INTERNET),
        ({"network": {"denyOut": ["0.0.0.0/0"]}}, NO_INTERNET),
        ({"network": {"denyOut": ["8.8.8.0/24"]}}, Policy(deny=(IPv4Network("8.8.8.0/24"),))),
        ({"network": {"denyOut": ["*.example.com"]}}, Policy(deny_names=("*.example.com",))),
        ({"network": {"allowOut": ["10.20.1.0/24"]}}, Policy(allow=(IPv4Network("10.20.1.0/24"),))),
    ],
)
async def test_policies(filtered: Service, fields: dict[str, Any], policy: Policy) -> None:
    """Each field reaches the filter."""
    assert filtered.slot(await filtered.create(**fields)).applied == [policy]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"allow_internet_access": True},
        {"allow_internet_access": None, "allowInternetAccess": None, "network": None},
        {"network": {}},
        {"network": {"denyOut": ["::/0"], "rules": {}, "maskRequestHost": None, "egressProxy": None}},
    ],
)
async def test_the_default_needs_no_applying(filtered: Service, fields: dict[str, Any]) -> None:
    """Every filter begins with the default policy."""
    box = await filtered.create(**fields)
    assert filtered.slot(box).applied == []
    assert (await network(filtered, box))["allowInternetAccess"] is True


BAD = [
    ({"allowOut": ["1.1.1.1/24"]}, "network.allowOut[0]: '1.1.1.1/24' is not where its block begins; did you mean"),
    ({"allowOut": ["a.b", "10.0.0.1"]}, "network.allowOut[1]: '10.0.0.1' can't be allowed: it is private"),
    ({"allowOut": ["8.8.4.4"]}, "network.allowOut[0]: '8.8.4.4' can't be allowed"),
    ({"allowOut": ["169.254.169.254"]}, "network.allowOut[0]: '169.254.169.254' can't be allowed"),
    ({"allowOut": ["::1"]}, "network.allowOut[0]: '::1' can't be allowed: IPv6 is off in sandboxes"),
    ({"denyOut": ["evil\0.example.com"]}, r"network.denyOut[0]: 'evil\x00.example.com' holds a blank or a control"),
    ({"denyOut": ["user@example.com"]}, "network.denyOut[0]: 'user@example.com' holds a user's name"),
    ({"denyOut": ["010.0.0.1"]}, "network.denyOut[0]: '010.0.0.1' is not an address as it must be written"),
    ({"denyOut": ["a.b"] * 10_000}, "may have 500 entries together, not 10000"),
    ({"allowOut": "a.b"}, "allowOut"),
    ({"allowOut": [1]}, "allowOut[0]"),
    ({"denyOut": [None]}, "denyOut[0]"),
    ({"allowPublicTraffic": "yes"}, "allowPublicTraffic"),
]


@pytest.mark.parametrize(("rules", "says"), BAD)
async def test_a_bad_policy_starts_nothing(filtered: Service, rules: dict[str, Any], says: str) -> None:
    """The create gets 400 that names the entry."""
    body = json.dumps({"templateID": "base", "network": rules}).encode()
    answer = await filtered.call("POST", "/sandboxes", body=body)
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")
    assert says in error_of(answer)["message"]
    assert filtered.driver.machines == []


@pytest.mark.parametrize(("rules", "says"), BAD)
async def test_a_bad_policy_changes_nothing(filtered: Service, rules: dict[str, Any], says: str) -> None:
    """A later request gets the same 400, and the policy stays."""
    box = await filtered.create(network=RULES)
    answer = await filtered.call("PUT", f"/sandboxes/{box}/network", body=json.dumps(rules).encode())
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")
    assert says in error_of(answer)["message"]
    assert filtered.slot(box).applied == [POLICY]
    assert (await network(filtered, box))["allowOut"] == ["example.com", "1.1.1.1"]


async def test_spellings_that_contradict_each_other(filtered: Service) -> None:
    """A contradiction is refused, so that nobody has to guess which of the two counts."""
    fields = {"allow_internet_access": True, "allowInternetAccess": False}
    for answer in (
        await filtered.call("POST", "/sandboxes", {"templateID": "base", **fields}),
        await put(filtered, await filtered.create(), fields),
    ):
        assert answer.code == 400
        assert "contradict each other" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        ({"rules": {"api.example.com": [{"transform": {}}]}}, "network.rules"),
        ({"rules": [{}]}, "network.rules"),
        ({"maskRequestHost": "localhost:3000"}, "network.maskRequestHost"),
        ({"maskRequestHost": ""}, "network.maskRequestHost"),
        ({"egressProxy": {"address": "192.0.2.1:1080"}}, "network.egressProxy"),
    ],
)
async def test_what_is_not_offered_is_not_ignored(filtered: Service, rules: dict[str, Any], name: str) -> None:
    """E2B's fields that would change a sandbox's rights get 501 that names them."""
    box = await filtered.create()
    before = len(filtered.driver.machines)
    for answer in (
        await filtered.call("POST", "/sandboxes", {"templateID": "base", "network": rules}),
        await put(filtered, box, rules),
    ):
        assert (answer.code, error_of(answer)["error"]) == (501, "not_implemented")
        assert name in error_of(answer)["message"]
    assert len(filtered.driver.machines) == before
    assert filtered.slot(box).applied == []


async def test_a_full_and_a_draining_server(filtered: Service) -> None:
    """A server that is full or going down answers 503, whatever the policy."""
    for _ in range(4):
        await filtered.create(allow_internet_access=False)
    answer = await filtered.call("POST", "/sandboxes", {"templateID": "base", "network": RULES})
    assert (answer.code, error_of(answer)["error"]) == (503, "host_full")
    filtered.sandboxes.places.is_draining = True
    answer = await filtered.call("POST", "/sandboxes", {"templateID": "base", "network": RULES})
    assert (answer.code, error_of(answer)["error"]) == (503, "draining")
    assert len(filtered.driver.machines) == 4


async def test_a_machine_from_the_pool_gets_the_policy(tmp_path: Path) -> None:
    """Machines in stock have the default policy. A machine gets its own policy before it becomes a sandbox."""
    driver = FakeDriver(network="passt")
    async with serving(tmp_path, driver, pool_size=1, network=FakeNetwork("passt")) as service:
        await eventually(lambda: service.sandboxes.pools["code_interpreter"].ready == 1)
        box = await service.create(network=RULES)
        assert service.slot(box) is driver.machines[0].nic
        assert service.slot(box).applied == [POLICY]
        assert (await network(service, box))["mechanism"] == "passt"


# -- later


async def test_replace(filtered: Service) -> None:
    """A PUT replaces everything. A field that is absent has its default again."""
    box = await filtered.create(network=RULES)
    for fields, policy in (
        ({"denyOut": ["8.8.8.8"]}, Policy(deny=(IPv4Network("8.8.8.8/32"),))),
        ({"allow_internet_access": False, "allowOut": ["a.b"]}, Policy(allow_internet=False, allow_names=("a.b",))),
        ({"allowInternetAccess": False}, NO_INTERNET),
        ({}, Policy()),
    ):
        answer = await put(filtered, box, fields)
        assert (answer.code, answer.body) == (204, b"")
        assert filtered.slot(box).applied[-1] == policy
        told = await network(filtered, box)
        assert told["allowInternetAccess"] is policy.allow_internet
        assert (told["allowOut"], told["denyOut"]) == (fields.get("allowOut", []), fields.get("denyOut", []))
    assert len(filtered.slot(box).applied) == 5


async def test_ports_are_opened_and_closed_by_the_same_routes(filtered: Service) -> None:
    """Ports are closed by default. A PUT without `allowPublicTraffic` leaves the ports unchanged."""

    async def is_open(box: str) -> bool:
        return bool((await detail(filtered, box))["network"]["allowPublicTraffic"])

    opened = await filtered.create(network={"allowPublicTraffic": True})
    assert filtered.sandboxes.get(filtered.owner, opened).all_ports_open is True
    assert await is_open(opened)
    box = await filtered.create(network={"allowPublicTraffic": False})
    assert not await is_open(box)
    for fields, expected in (
        ({"allowPublicTraffic": True}, True),
        ({"allowOut": ["a.b"]}, True),
        ({"allowPublicTraffic": False}, False),
        ({"allowPublicTraffic": None}, False),
    ):
        assert (await put(filtered, box, fields)).code == 204
        assert await is_open(box) is expected


@pytest.mark.parametrize("error", [DriverError("nft: busy"), CellvmError("no"), OSError("no more processes")])
async def test_a_put_that_fails(filtered: Service, error: Exception) -> None:
    """The PUT gets 502. The old policy stays in force and is told, and the next PUT works."""
    box = await filtered.create(network=RULES)
    filtered.driver.script.filter_error = error
    answer = await put(filtered, box, {"allowPublicTraffic": True})
    assert (answer.code, error_of(answer)["error"]) == (502, "failed")
    assert "still in force" in error_of(answer)["message"]
    assert "nft" not in str(answer.body)
    assert filtered.slot(box).applied == [POLICY]
    filtered.driver.script.filter_error = None
    told = await detail(filtered, box)
    assert told["network"] == {
        "allowOut": ["example.com", "1.1.1.1"],
        "denyOut": ["0.0.0.0/0"],
        "allowPublicTraffic": False,
    }
    assert (await put(filtered, box, {})).code == 204
    assert (await filtered.run(box, "true"))["exitCode"] == 0


async def test_puts_come_one_after_the_other(filtered: Service) -> None:
    """The second of two PUTs is applied after the first one, and is told."""
    box = await filtered.create()
    slot = filtered.slot(box)
    slot.may_apply.clear()
    first = asyncio.create_task(put(filtered, box, {"denyOut": ["1.1.1.1"]}))
    await eventually(lambda: filtered.sandboxes.get(filtered.owner, box).applying.locked())
    second = asyncio.create_task(put(filtered, box, {"denyOut": ["2.2.2.2"]}))
    assert (await network(filtered, box))["denyOut"] == [], "until it is in force it is not told"
    slot.may_apply.set()
    assert [(await first).code, (await second).code] == [204, 204]
    assert [str(policy.deny[0]) for policy in slot.applied] == ["1.1.1.1/32", "2.2.2.2/32"]
    assert (await network(filtered, box))["denyOut"] == ["2.2.2.2"]


async def test_a_client_that_hangs_up(filtered: Service) -> None:
    """A PUT whose client has gone is done to its end, so that the told policy is the one in force."""
    box = await filtered.create()
    slot = filtered.slot(box)
    slot.may_apply.clear()
    with pytest.raises(HTTPTimeoutError):
        await put(filtered, box, {"denyOut": ["1.1.1.1"]}, timeout=0.3)
    await eventually(lambda: "Endpoint._run" not in {task.get_coro().__qualname__ for task in asyncio.all_tasks()})
    assert slot.applied == []
    slot.may_apply.set()
    await eventually(lambda: slot.applied)
    assert (await network(filtered, box))["denyOut"] == ["1.1.1.1"]


async def test_a_sandbox_that_ends_under_a_put(filtered: Service) -> None:
    """The answer says that the sandbox has ended, and nothing hangs."""
    box = await filtered.create()
    slot = filtered.slot(box)
    slot.may_apply.clear()
    asking = asyncio.create_task(put(filtered, box, {"allow_internet_access": False}))
    await eventually(lambda: filtered.sandboxes.get(filtered.owner, box).applying.locked())
    assert (await filtered.call("DELETE", f"/sandboxes/{box}")).code == 204
    slot.may_apply.set()
    answer = await asking
    assert (answer.code, error_of(answer)["error"]) == (502, "sandbox_died")


async def test_an_ended_sandbox(filtered: Service) -> None:
    """Its owner gets 404 with the reason on both routes."""
    box = await filtered.create()
    await filtered.call("DELETE", f"/sandboxes/{box}")
    for answer in (await put(filtered, box, RULES), await filtered.call("GET", f"/sandboxes/{box}/network")):
        assert (answer.code, error_of(answer)["error"]) == (404, "not_found")
        assert "kill" in error_of(answer)["hint"]


async def test_r28_somebody_elses_sandbox(filtered: Service) -> None:
    """The answer is 404, also for a policy that would get 400 or 501, and nothing is applied."""
    box = await filtered.create()
    for fields in (RULES, {"allowOut": ["::1"]}, {"rules": [1]}):
        answer = await put(filtered, box, fields, key=filtered.other_key)
        assert (answer.code, error_of(answer)["message"]) == (404, "sandbox not found")
    answer = await filtered.call("GET", f"/sandboxes/{box}/network", key=filtered.other_key)
    assert (answer.code, error_of(answer)["message"]) == (404, "sandbox not found")
    assert filtered.slot(box).applied == []


async def test_a_sandbox_that_is_being_created(filtered: Service) -> None:
    """Its policy can't be replaced before it runs."""
    filtered.driver.script.start_delay = 0.5
    creating = asyncio.create_task(filtered.create(network=RULES))
    await eventually(lambda: len(filtered.sandboxes) == 1)
    (listed,) = json.loads((await filtered.call("GET", "/sandboxes")).body)
    answer = await put(filtered, listed["sandboxID"], {})
    assert (answer.code, error_of(answer)["error"]) == (409, "conflict")
    assert filtered.slot(await creating).applied == [POLICY]


# -- what was refused


async def test_refusals(filtered: Service) -> None:
    """Refusals are listed and counted as the filter tells them, with times that people can read."""
    box = await filtered.create(network=RULES)
    filtered.slot(box).refused = [
        Refusal("10.0.0.1", 80, "tcp", "floor", 3, 1_700_000_000.25),
        Refusal("evil.example", 0, "dns", "policy", 2, 1_600_000_000.0),
    ]
    told = await network(filtered, box)
    assert told["refused"] == [
        {
            "destination": "10.0.0.1",
            "port": 80,
            "protocol": "tcp",
            "reason": "floor",
            "count": 3,
            "last": "2023-11-14T22:13:20.250000Z",
        },
        {
            "destination": "evil.example",
            "port": 0,
            "protocol": "dns",
            "reason": "policy",
            "count": 2,
            "last": "2020-09-13T12:26:40Z",
        },
    ]
    assert told["refusedTotal"] == 5


async def test_a_refusal_of_what_is_no_text(filtered: Service) -> None:
    """The list can be read, whatever a guest has asked for."""
    box = await filtered.create()
    filtered.slot(box).refused = [Refusal("\ud800\0<b>" + "x" * 5000, 443, "tcp", "policy", 1, 0.0)]
    (refused,) = (await network(filtered, box))["refused"]
    assert refused["destination"] == "?\0<b>" + "x" * 250


async def test_refusals_that_can_not_be_read(filtered: Service) -> None:
    """The answer is 502, because an empty list would be untrue."""
    box = await filtered.create()
    filtered.driver.script.filter_error = DriverError("nft: no")
    answer = await filtered.call("GET", f"/sandboxes/{box}/network")
    assert (answer.code, error_of(answer)["error"]) == (502, "failed")


# -- without a filter


async def test_without_a_network_every_policy_is_kept(service: Service) -> None:
    """Any policy is accepted and told, because machines without a card reach nothing."""
    box = await service.create(network=RULES)
    told = await network(service, box)
    assert (told["mechanism"], told["allowOut"], told["refused"]) == ("off", ["example.com", "1.1.1.1"], [])
    assert (await put(service, box, {"allowInternetAccess": False})).code == 204
    assert (await network(service, box))["allowInternetAccess"] is False
    answer = await put(service, box, {"denyOut": ["127.1"]})
    assert answer.code == 400


async def test_on_the_hosts_network_nothing_can_be_restricted(host: Service) -> None:
    """A policy gets 501 with a sentence, at creation and later, unless it restricts nothing."""
    for fields in ({"allow_internet_access": False}, {"network": RULES}, {"network": {"denyOut": ["a.b"]}}):
        answer = await host.call("POST", "/sandboxes", {"templateID": "base", **fields})
        assert (answer.code, error_of(answer)["error"]) == (501, "not_implemented")
        assert "can't restrict what sandboxes reach" in error_of(answer)["message"]
    assert host.driver.machines == []
    box = await host.create(network={"allowOut": ["1.1.1.1"]})
    answer = await put(host, box, {"denyOut": ["1.1.1.1"]})
    assert (answer.code, error_of(answer)["error"]) == (501, "not_implemented")
    assert (await put(host, box, {})).code == 204
    assert (await network(host, box))["mechanism"] == "host"


async def test_a_machine_without_its_filter_is_not_used(filtered: Service) -> None:
    """Where machines have filters, a machine without one never becomes a sandbox with a policy."""
    filtered.driver.has_cards = False
    answer = await filtered.call("POST", "/sandboxes", {"templateID": "base", "network": RULES})
    assert (answer.code, error_of(answer)["error"]) == (503, "host_full")
    assert filtered.driver.alive == []


async def test_health_tells_the_mechanism(filtered: Service, host: Service) -> None:
    """Health tells how the server's sandboxes reach the internet."""
    for service, mechanism in ((filtered, "netns"), (host, "host")):
        assert json.loads((await service.call("GET", "/health", key=None)).body)["network"] == mechanism
