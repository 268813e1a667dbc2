"""Snapshots and forks over a driver whose machines are fakes: states, pairs of operations, faults, restarts."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tornado.simple_httpclient import HTTPTimeoutError

from guest_agent import wire
from kernel_gateway.drivers import DriverError, Incompatible, NoSpace
from kernel_gateway.sandbox.lifecycle import State
from tests.api.clients import channels
from tests.fakes import (
    FakeCaptured,
    FakeDriver,
    FakeNetwork,
    SavingDriver,
    Script,
    Service,
    error_of,
    eventually,
    serving,
)


@pytest.fixture
async def service(tmp_path: Path, driver: SavingDriver) -> AsyncIterator[Service]:
    """A service with six places, where a key may have three snapshots."""
    async with serving(tmp_path, driver, max_sandboxes=6, max_snapshots=3, network=FakeNetwork()) as running:
        yield running


async def post(service: Service, box: str, what: str, **fields: Any) -> int:
    return int((await service.call("POST", f"/sandboxes/{box}/{what}", fields)).code)


async def taken(service: Service, box: str, **fields: Any) -> Any:
    answer = await service.call("POST", f"/sandboxes/{box}/snapshots", fields)
    assert answer.code == 201, answer.body
    return json.loads(answer.body)


async def listed(service: Service, query: str = "", key: str = "") -> list[str]:
    answer = await service.call("GET", f"/snapshots{query}", key=key)
    return [each["snapshotID"] for each in json.loads(answer.body)]


async def forked(service: Service, box: str, **fields: Any) -> list[Any]:
    answer = await service.call("POST", f"/sandboxes/{box}/fork", fields)
    assert answer.code == 201, answer.body
    return list(json.loads(answer.body))


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "snapshots").iterdir())


async def text(service: Service, box: str, code: str) -> str:
    return str((await service.execute(box, code))["results"][0]["data"]["text/plain"])


async def told(service: Service, box: str) -> list[tuple[str, Any]]:
    await service.store.flush(5)
    events = json.loads((await service.call("GET", f"/events/sandboxes/{box}?orderAsc=true")).body)
    return [(event["type"].rpartition(".")[2], event["data"]) for event in events]


async def test_a_snapshot_is_a_template(service: Service, tmp_path: Path) -> None:
    """Sandboxes start from a snapshot by id or name with all that its sandbox had, and each goes its own way."""
    box = await service.create(envVars={"A": "1", "B": "1"})
    await service.execute(box, "x = 41")
    snapshot = await taken(service, box, name="first")
    assert (snapshot["names"], snapshot["sandboxID"], snapshot["templateID"]) == (["first"], box, "code_interpreter")
    assert files(tmp_path) == [snapshot["snapshotID"]]
    await service.execute(box, "x = 0")
    for name in (snapshot["snapshotID"], "first"):
        other = await service.create(templateID=name, envVars={"B": "2"}, metadata={"m": "1"})
        assert await text(service, other, "x + 1") == "42"
        await service.execute(other, "x = 7")
        guest = service.guest(other)
        assert (guest.env["A"], guest.env["B"], guest.env["E2B_SANDBOX_ID"]) == ("1", "2", other)
        resume = next(each for each in guest.requests if isinstance(each, wire.Resume))
        assert (resume.is_copy, resume.hostname, resume.sandbox_id) == (True, other, other)
    assert await text(service, box, "x") == "0"
    assert (await told(service, other))[0] == ("created", {"snapshotID": snapshot["snapshotID"]})
    await service.call("DELETE", f"/sandboxes/{box}")
    await service.call("DELETE", "/snapshots/first")
    of_snapshot = [data for kind, data in await told(service, box) if kind == "updated"]
    assert of_snapshot == [
        {"reason": reason, "snapshotID": snapshot["snapshotID"]} for reason in ("snapshot", "snapshot_deleted")
    ]


async def test_lists_and_owners(service: Service) -> None:
    """Snapshots are listed newest first, in pages and by filters, and only their owner sees and uses them."""
    first, second = await service.create(), await service.create()
    ids = [(await taken(service, box, name=name))["snapshotID"] for box, name in ((first, "a"), (second, "b"))]
    assert await listed(service) == ids[::-1]
    assert await listed(service, f"?sandboxID={first}") == await listed(service, "?name=a") == [ids[0]]
    page = await service.call("GET", "/snapshots?limit=1")
    assert page.headers["X-Next-Token"] == ids[1]
    assert await listed(service, f"?limit=1&nextToken={ids[1]}") == [ids[0]]
    assert await listed(service, "?nextToken=none") == []
    assert await listed(service, key=service.other_key) == []
    for method, path, body in (
        ("DELETE", f"/snapshots/{ids[0]}", None),
        ("DELETE", "/templates/a", None),
        ("POST", f"/sandboxes/{first}/snapshots", {}),
        ("POST", f"/sandboxes/{first}/fork", {}),
    ):
        assert (await service.call(method, path, body, key=service.other_key)).code == 404
    body = {"templateID": ids[0]}
    assert (await service.call("POST", "/sandboxes", body, key=service.other_key)).code == 400
    limits = json.loads((await service.call("GET", "/limits")).body)
    assert limits["snapshots"] == {"limit": 3, "used": 2}


async def test_every_refusal(service: Service, driver: SavingDriver, tmp_path: Path) -> None:
    """Names that can't be, names that are taken, too many, no memory, and forks beyond what may be."""
    box = await service.create()
    for name in ("a/b", "-a", "a" * 65, "ü", "a b"):
        assert await post(service, box, "snapshots", name=name) == 400
    assert await post(service, box, "snapshots", name="base") == 409
    assert await post(service, box, "snapshots", memory=False) == 501
    await taken(service, box, name="a")
    assert await post(service, box, "snapshots", name="a") == 409
    codes = await asyncio.gather(*(post(service, box, "snapshots", name=name) for name in ("b", "b", "c", "d")))
    assert sorted(codes) in ([201, 201, 409, 429], [201, 201, 429, 429])
    assert await post(service, box, "snapshots") == 429
    for count in (0, 101):
        assert await post(service, box, "fork", count=count) == 400
    assert await post(service, box, "fork", timeout=3601) == 400
    assert await post(service, box, "fork", count=6) == 503
    await post(service, box, "pause")
    for what in ("snapshots", "fork"):
        assert await post(service, box, what) in (409, 429)
    await service.call("DELETE", f"/sandboxes/{box}")
    assert await post(service, box, "fork") == 404
    assert await post(service, box, "snapshots") == 404
    assert len(driver.alive) == 0
    assert len(files(tmp_path)) == 3


async def test_a_driver_that_can_not(tmp_path: Path) -> None:
    """Without machines that can be saved, snapshots and forks are refused."""
    async with serving(tmp_path, FakeDriver()) as service:
        box = await service.create()
        for what in ("snapshots", "fork"):
            answer = await service.call("POST", f"/sandboxes/{box}/{what}", {})
            assert (answer.code, error_of(answer)["error"]) == (501, "not_implemented")


async def test_delete(service: Service, driver: SavingDriver, tmp_path: Path) -> None:
    """Sandboxes that were made from a deleted snapshot go on, paused ones too. One that is starting still starts."""
    box = await service.create()
    await service.execute(box, "x = 5")
    snapshot = (await taken(service, box))["snapshotID"]
    running, paused = [await service.create(templateID=snapshot) for _ in range(2)]
    await post(service, paused, "pause")
    driver.script = Script(start_delay=0.3)
    starting = asyncio.create_task(service.create(templateID=snapshot))
    await eventually(lambda: service.sandboxes.snapshots._users[snapshot] == 1)
    assert (await service.call("DELETE", f"/templates/{snapshot}")).code == 204
    assert files(tmp_path) == [snapshot]
    assert await listed(service) == []
    assert (await service.call("DELETE", f"/snapshots/{snapshot}")).code == 404
    driver.script = Script()
    started = await starting
    await eventually(lambda: files(tmp_path) == [])
    assert (await service.call("POST", "/sandboxes", {"templateID": snapshot})).code == 400
    assert await post(service, paused, "resume") == 201
    for each in (running, paused, started):
        assert await text(service, each, "x") == "5"


async def test_the_server_comes_back(tmp_path: Path, driver: SavingDriver) -> None:
    """Snapshots are there after a restart. What is left of others is swept."""
    async with serving(tmp_path, driver) as service:
        box = await service.create()
        await service.execute(box, "x = 5")
        snapshot = (await taken(service, box, name="kept"))["snapshotID"]
        lost = (await taken(service, box, name="lost"))["snapshotID"]
        (tmp_path / "snapshots" / lost).rename(tmp_path / "snapshots" / ".half")
    async with serving(tmp_path, driver) as service:
        assert (await listed(service), files(tmp_path)) == ([snapshot], [snapshot])
        other = await service.create(templateID="kept")
        assert await text(service, other, "x") == "5"


@pytest.mark.parametrize("kind", ["save_error", "write_error"])
async def test_a_full_disk(service: Service, driver: SavingDriver, tmp_path: Path, kind: str) -> None:
    """Without room the answer is 507, the sandbox goes on, and nothing is left on disk."""
    box = await service.create()
    driver.script = Script(**{kind: NoSpace("the disk has 0 MiB free")})  # type: ignore[arg-type]
    answer = await service.call("POST", f"/sandboxes/{box}/snapshots", {"name": "a"})
    assert (answer.code, error_of(answer)["error"]) == (507, "insufficient_storage")
    assert files(tmp_path) == []
    driver.script = Script()
    assert await text(service, box, "1") == "1"
    await taken(service, box, name="a")


async def test_a_disk_that_is_nearly_full(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Below the floor that is kept for running sandboxes nothing is taken."""
    box = await service.create()
    monkeypatch.setattr(service.sandboxes.places, "_space", lambda: (900 << 20, 1 << 30))
    assert (await post(service, box, "snapshots"), files(tmp_path)) == (507, [])


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (Incompatible("it was saved with another processor than this host has now"), 409, "snapshot_incompatible"),
        (DriverError("no"), 503, "host_full"),
    ],
)
async def test_a_start_that_fails(
    service: Service, driver: SavingDriver, error: Exception, code: int, word: str
) -> None:
    """It is told as a resume is, and leaves no sandbox and no place taken."""
    box = await service.create()
    snapshot = (await taken(service, box))["snapshotID"]
    driver.script = Script(start_error=error)
    answer = await service.call("POST", "/sandboxes", {"templateID": snapshot})
    assert (answer.code, error_of(answer)["error"]) == (code, word)
    assert len(service.sandboxes.places) == 1


async def test_a_damaged_snapshot(service: Service, tmp_path: Path) -> None:
    """It is refused before a machine starts."""
    snapshot = (await taken(service, await service.create()))["snapshotID"]
    path = tmp_path / "snapshots" / snapshot / "host"
    path.write_bytes(path.read_bytes()[:-1])
    answer = await service.call("POST", "/sandboxes", {"templateID": snapshot})
    assert (answer.code, error_of(answer)["error"]) == (409, "snapshot_corrupt")


# -- forks


async def test_children(service: Service, driver: SavingDriver) -> None:
    """Children have the parent's variables and settings, and their own id, kernel, tokens and policy's filter."""
    network = {"allowOut": ["93.184.215.14"], "denyOut": ["0.0.0.0/0"]}
    box = await service.create(metadata={"a": "b"}, envVars={"E": "1"}, timeout=500, network=network)
    await service.execute(box, "x = 41\nprint(x)")
    told_by = (await service.call("GET", f"/sandboxes/{box}")).body
    children = [each["sandbox"] for each in await forked(service, box, count=3, timeout=77)]
    for field in ("sandboxID", "kernelID", "envdAccessToken", "trafficAccessToken"):
        assert len({each[field] for each in children} | {json.loads(told_by).get(field)}) >= 4
    for number, each in enumerate(children):
        child = each["sandboxID"]
        assert (each["metadata"], each["state"], each["templateID"]) == ({"a": "b"}, "running", "code_interpreter")
        await service.execute(child, f"x = x + {number}")
        async with channels(service, each["kernelID"], since=0) as client:
            assert (await client.until(lambda message: message.kind == "stream"))[-1].content["text"] == "41\n"
            assert (await client.run("print(x)")).text == f"{41 + number}\n"
        assert service.guest(child).env["E2B_SANDBOX_ID"] == child
        assert service.slot(child).applied == service.slot(box).applied
        assert 70 < service.sandboxes.get(service.owner, child).deadline - asyncio.get_running_loop().time() <= 77
        assert (await told(service, child))[0] == ("created", {"parent": box})
    assert await text(service, box, "x") == "41"
    assert len(driver.alive) == 4
    kernels = json.loads((await service.call("GET", "/api/kernels")).body)
    assert {each["id"] for each in kernels} >= {each["kernelID"] for each in children}


async def test_a_cell_of_the_parent_goes_on(service: Service) -> None:
    """A cell, a command and a WebSocket of the parent do not notice its forks."""
    box = await service.create()
    kernel = service.sandboxes.get(service.owner, box).kernel_id
    async with channels(service, kernel) as client:
        running = asyncio.create_task(client.run("time.sleep(0.4)\nprint(7)"))
        await asyncio.sleep(0.1)
        await asyncio.gather(forked(service, box), taken(service, box), forked(service, box))
        assert (await running).text == "7\n"


async def test_a_cell_that_comes_while_the_parent_stands_still(service: Service, driver: SavingDriver) -> None:
    """It runs in the parent alone. The child, whose kernel has not got it, waits for nothing."""
    box = await service.create()
    driver.script.save_delay = 0.2
    vm = driver.alive[0]
    forking = asyncio.create_task(forked(service, box))
    await eventually(lambda: vm.is_stopped)
    kernel = service.sandboxes.get(service.owner, box).kernel_id
    async with channels(service, kernel) as client:
        cells = service.execute(box, "1 + 1"), client.run("print(3)")
        rest, jupyter = await asyncio.gather(*cells)
    assert (rest["outcome"], jupyter.text) == ("finished", "3\n")
    child = (await forking)[0]["sandbox"]["sandboxID"]
    found = service.sandboxes.get(service.owner, child).kernel
    assert found is not None
    assert (found.state, found.pending) == ("idle", frozenset())


async def test_a_kernel_that_is_restarted_while_it_is_captured(service: Service, driver: SavingDriver) -> None:
    """The parent has its new kernel, and the child makes one for its first cell."""
    box = await service.create()
    driver.script.save_delay = 0.2
    vm, kernel = driver.alive[0], service.sandboxes.get(service.owner, box).kernel_id
    forking = asyncio.create_task(forked(service, box))
    await eventually(lambda: vm.is_stopped)
    answer = await service.call("POST", f"/api/kernels/{kernel}/restart")
    assert answer.code == 200
    for each in (box, (await forking)[0]["sandbox"]["sandboxID"]):
        assert await text(service, each, "1 + 1") == "2"


async def test_a_kernel_that_counts_beyond_all_bounds(service: Service) -> None:
    """A number that can't be stored keeps no sandbox from being copied or paused."""
    box = await service.create()
    service.guest(box).kernel._count = 10**30
    assert await text(service, box, "1 + 1") == "2"
    child = (await forked(service, box))[0]["sandbox"]["sandboxID"]
    assert await text(service, child, "1 + 1") == "2"
    assert await post(service, box, "pause") == 204


async def test_children_that_do_not_start(service: Service, driver: SavingDriver) -> None:
    """The answer tells for each child why it did not start, and the parent goes on."""
    box = await service.create()
    driver.script = Script(start_error=DriverError("no"))
    made = await forked(service, box, count=2)
    assert [each["error"]["error"] for each in made] == ["host_full", "host_full"]
    assert [each["error"]["code"] for each in made] == [503, 503]
    driver.script = Script(save_error=DriverError("no"))
    assert await post(service, box, "fork") == 502
    assert len(service.sandboxes.places) == len(driver.alive) == 1
    assert await text(service, box, "1") == "1"


async def test_no_handshake_no_child(service: Service, driver: SavingDriver) -> None:
    """A child whose random sample was seen before is not used."""
    box = await service.create()
    known = next(iter(service.sandboxes._machines.guests._samples))
    driver.script = Script(sample=lambda: known)
    made = await forked(service, box)
    assert made[0]["error"]["error"] == "guest_unresponsive"
    assert len(driver.alive) == 1


async def test_a_client_that_hangs_up(service: Service, driver: SavingDriver, tmp_path: Path) -> None:
    """A snapshot and a fork are done to their end, and the parent goes on."""
    box = await service.create()
    driver.script = Script(save_delay=0.3)
    for what in ("snapshots", "fork"):
        with pytest.raises(HTTPTimeoutError):
            await service.call("POST", f"/sandboxes/{box}/{what}", {}, timeout=0.1)
    await eventually(lambda: len(service.sandboxes.places) == 2)
    await eventually(lambda: all(each.state is State.RUNNING for each in service.sandboxes))
    await eventually(lambda: len(files(tmp_path)) == 1 and not files(tmp_path)[0].startswith("."))
    assert await text(service, box, "1") == "1"


@pytest.mark.parametrize("what", ["snapshots", "fork"])
async def test_a_delete_meanwhile(service: Service, driver: SavingDriver, tmp_path: Path, what: str) -> None:
    """A parent that ends meanwhile leaves neither children nor files."""
    box = await service.create()
    driver.script = Script(save_delay=0.3)
    doing = asyncio.create_task(service.call("POST", f"/sandboxes/{box}/{what}", {}))
    await eventually(lambda: driver.machines[0].is_stopped)
    assert (await service.call("DELETE", f"/sandboxes/{box}")).code == 204
    assert (await doing).code == 502
    assert (len(service.sandboxes.places), driver.alive, files(tmp_path)) == (0, [], [])


@pytest.mark.parametrize("what", ["snapshots", "fork"])
async def test_a_return_meanwhile(
    service: Service, driver: SavingDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A machine that was captured is not kept if its sandbox went back meanwhile, because its kernel has another."""
    box = await service.create()
    await post(service, box, "checkpoints")
    capture = driver.capture

    async def captured_too_late(vm: Any, *, goes_on: bool) -> FakeCaptured:
        captured = await capture(vm, goes_on=goes_on)
        assert await post(service, box, "checkpoints/1/restore") == 204
        return captured

    monkeypatch.setattr(driver, "capture", captured_too_late)
    answer = await service.call("POST", f"/sandboxes/{box}/{what}", {})
    assert (answer.code, error_of(answer)["error"]) == (409, "sandbox_restored")
    assert (len(service.sandboxes.places), len(driver.alive), files(tmp_path)) == (1, 1, [])
    assert await text(service, box, "1") == "1"


async def test_operations_at_once(service: Service, driver: SavingDriver) -> None:
    """Snapshots, forks, a pause and cells at once have documented answers, and end in legal states."""
    box = await service.create()
    driver.script = Script(save_delay=0.05)
    answers = await asyncio.gather(
        post(service, box, "snapshots"), post(service, box, "fork", count=2), post(service, box, "pause"),
        post(service, box, "execute", code="1"), post(service, box, "snapshots"), post(service, box, "connect"),
    )  # fmt: skip
    assert set(answers) <= {200, 201, 204, 409, 502}
    await eventually(lambda: all(each.state in (State.RUNNING, State.PAUSED) for each in service.sandboxes))
    running = [each for each in service.sandboxes if each.state is State.RUNNING]
    assert len(driver.alive) == len(running) == len(service.sandboxes.places)
