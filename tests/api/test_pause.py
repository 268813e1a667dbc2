"""Pause and resume over a driver whose machines are fakes: states, pairs of operations, faults, restarts."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from tornado.simple_httpclient import HTTPTimeoutError
from websockets.exceptions import InvalidStatus

from kernel_gateway.drivers import DriverError, Incompatible, NoSpace
from kernel_gateway.network.policy import Floor
from kernel_gateway.sandbox.lifecycle import State
from tests.api.clients import channels
from tests.fakes import FakeDriver, FakeNetwork, SavingDriver, Script, Service, error_of, eventually, serving


@pytest.fixture
async def service(tmp_path: Path, driver: SavingDriver) -> AsyncIterator[Service]:
    """A service that can pause sandboxes, four of them at once and three paused."""
    async with serving(tmp_path, driver, max_paused=3) as running:
        yield running


async def status(service: Service, box: str) -> str:
    answer = await service.call("GET", f"/sandboxes/{box}")
    return str(json.loads(answer.body)["status"]) if answer.code == 200 else str(answer.code)


async def post(service: Service, box: str, what: str, **fields: Any) -> int:
    return int((await service.call("POST", f"/sandboxes/{box}/{what}", fields)).code)


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "paused").iterdir())


async def test_pause_and_resume(service: Service, driver: SavingDriver, tmp_path: Path) -> None:
    """A paused sandbox has files and no machine. It goes on with its variables, and its files are gone."""
    box = await service.create(metadata={"a": "b"})
    await service.execute(box, "x = 41")
    assert await post(service, box, "pause") == 204
    assert (await status(service, box), files(tmp_path)) == ("paused", [box])
    await eventually(lambda: not driver.alive)
    assert len(service.sandboxes.places) == 0
    described = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)
    assert (described["state"], described["metadata"]) == ("paused", {"a": "b"})
    resumed = await service.call("POST", f"/sandboxes/{box}/resume", {"timeout": 77})
    assert resumed.code == 201
    assert json.loads(resumed.body)["state"] == "running"
    assert 70 < service.sandboxes.get(service.owner, box).deadline - time.monotonic() <= 77
    assert (await service.execute(box, "x + 1"))["results"][0]["data"]["text/plain"] == "42"
    await eventually(lambda: files(tmp_path) == [])
    assert len(driver.alive) == 1


async def test_events_of_a_pause(service: Service) -> None:
    """Pause and resume are events, each written with the change, so that none is told that did not happen."""
    box = await service.create()
    assert await post(service, box, "pause") == 204
    assert await post(service, box, "pause") == 409
    assert await post(service, box, "resume") == 201
    assert await post(service, box, "pause") == 204
    await service.call("DELETE", f"/sandboxes/{box}")
    await service.store.flush(5)
    events = json.loads((await service.call("GET", f"/events/sandboxes/{box}?orderAsc=true")).body)
    told = [event["type"].rpartition(".")[2] for event in events]
    assert told == ["created", "paused", "resumed", "paused", "killed"]


async def test_every_answer(service: Service) -> None:
    """Pausing a paused one and resuming a running one are conflicts, and `connect` takes either."""
    box = await service.create()
    assert await post(service, box, "resume") == 409
    assert await post(service, box, "connect", timeout=900) == 200
    assert await post(service, box, "pause", memory=False) == 501
    assert await post(service, box, "pause") == 204
    assert await post(service, box, "pause") == 409
    answer = await service.call("POST", f"/sandboxes/{box}/execute", {"code": "1"})
    assert (answer.code, error_of(answer)["error"]) == (409, "sandbox_paused")
    assert "resume" in error_of(answer)["hint"]
    assert await post(service, box, "timeout", timeout=60) == 409
    assert (await service.call("GET", f"/sandboxes/{box}/health")).code == 502
    assert await post(service, box, "connect") == 201
    assert await post(service, box, "connect") == 200
    assert await post(service, "sbxnone", "pause") == 404
    stranger = await service.call("POST", f"/sandboxes/{box}/pause", {}, key=service.other_key)
    assert stranger.code == 404


async def test_lists(service: Service) -> None:
    """Lists tell both kinds, and filter by either word."""
    first, second = await service.create(), await service.create()
    await post(service, first, "pause")

    async def listed(query: str) -> list[str]:
        answer = await service.call("GET", f"/sandboxes{query}")
        return [each["sandboxID"] for each in json.loads(answer.body)]

    assert await listed("") == [second, first]
    assert await listed("?status=paused") == await listed("?state=paused") == [first]
    assert await listed("?status=running") == await listed("?state=running") == [second]
    assert await listed("?state=running%2Cpaused") == [second, first]
    assert await listed("?state=frozen") == []


async def test_a_driver_that_can_not(tmp_path: Path) -> None:
    """Without machines that can be saved, a pause and what asks for one is refused, and the sandbox runs on."""
    async with serving(tmp_path, FakeDriver()) as service:
        box = await service.create()
        answer = await service.call("POST", f"/sandboxes/{box}/pause", {})
        assert (answer.code, error_of(answer)["error"]) == (501, "not_implemented")
        body = {"templateID": "code_interpreter", "autoPause": True}
        assert (await service.call("POST", "/sandboxes", body)).code == 501
        assert await status(service, box) == "running"


async def test_a_paused_sandbox_takes_no_place(service: Service) -> None:
    """As many may be paused as the setting says, and none of them takes a place. A resume needs one."""
    boxes = [await service.create() for _ in range(4)]
    for box in boxes[:3]:
        assert await post(service, box, "pause") == 204
    assert await post(service, boxes[3], "pause") == 429
    more = [await service.create() for _ in range(3)]
    answer = await service.call("POST", f"/sandboxes/{boxes[0]}/resume", {})
    assert answer.code == 503
    assert await status(service, boxes[0]) == "paused"
    await service.call("DELETE", f"/sandboxes/{more[0]}")
    assert await post(service, boxes[0], "resume") == 201


async def test_delete(service: Service, tmp_path: Path) -> None:
    """A paused sandbox that is deleted leaves no files, and is not found any more."""
    box = await service.create()
    await post(service, box, "pause")
    assert (await service.call("DELETE", f"/sandboxes/{box}")).code == 204
    assert (await status(service, box), files(tmp_path)) == ("404", [])


async def test_expiry(service: Service) -> None:
    """With `autoPause` the end of a lifetime is a pause, and paused time does not count."""
    box = await service.create(timeout=1, autoPause=True)
    other = await service.create(timeout=1)
    await eventually(lambda: service.sandboxes.find(box).state is State.PAUSED)
    await eventually(lambda: service.sandboxes.find(other) is None)
    await asyncio.sleep(1.2)
    assert await post(service, box, "resume", timeout=100) == 201
    assert await status(service, box) == "running"


@pytest.mark.parametrize("count", [1, 8])
async def test_any_request_wakes_it(service: Service, driver: SavingDriver, count: int) -> None:
    """With `autoResume` requests wake it, many at once by one resume, and it lives five minutes at least."""
    box = await service.create(timeout=60, autoResume={"enabled": True})
    await service.execute(box, "x = 5")
    await post(service, box, "pause")
    before = len(driver.machines)
    results = await asyncio.gather(*(service.execute(box, "x") for _ in range(count)))
    assert {each["results"][0]["data"]["text/plain"] for each in results} == {"5"}
    assert len(driver.machines) == before + 1
    assert 290 < service.sandboxes.get(service.owner, box).deadline - time.monotonic() <= 300


async def test_a_request_during_a_pause_wakes_it_after(service: Service, driver: SavingDriver) -> None:
    """A request that meets a sandbox on its way to a pause waits for that, and wakes it."""
    box = await service.create(autoResume={"enabled": True})
    driver.script = Script(save_delay=0.3)
    pausing = asyncio.create_task(post(service, box, "pause"))
    await eventually(lambda: service.sandboxes.find(box).state is State.PAUSING)
    assert (await service.execute(box, "1 + 1"))["error"] is None
    assert await pausing == 204


async def test_a_full_disk(service: Service, driver: SavingDriver, tmp_path: Path) -> None:
    """Without room the answer is 507. The sandbox runs on with all that went on in it, and nothing is left on disk."""
    box = await service.create()
    running = asyncio.create_task(service.execute(box, "time.sleep(0.5)\nprint(7)"))
    await asyncio.sleep(0.2)
    driver.script = Script(save_error=NoSpace("the disk has 0 MiB free"))
    answer = await service.call("POST", f"/sandboxes/{box}/pause", {})
    assert (answer.code, error_of(answer)["error"]) == (507, "insufficient_storage")
    assert (await status(service, box), files(tmp_path)) == ("running", [])
    assert (await running)["stdout"] == "7\n"
    driver.script = Script()
    assert await post(service, box, "pause") == 204


async def test_a_pause_that_fails_at_the_end_of_a_lifetime(service: Service, driver: SavingDriver) -> None:
    """It is tried again later, and meanwhile the sandbox runs."""
    driver.script = Script(save_error=DriverError("no"))
    box = await service.create(timeout=1, autoPause=True)
    sandbox = service.sandboxes.get(service.owner, box)
    await eventually(lambda: sandbox.pauses_failed == 1)
    assert sandbox.state is State.RUNNING
    assert 25 < sandbox.deadline - time.monotonic() <= 30
    sandbox.pauses_failed = 10
    sandbox.set_timeout(0)
    await eventually(lambda: service.sandboxes.find(box) is None)


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (Incompatible("it was saved with another processor than this host has now"), 409, "snapshot_incompatible"),
        (DriverError("no"), 503, "host_full"),
    ],
)
async def test_a_resume_that_fails(
    service: Service, driver: SavingDriver, error: Exception, code: int, word: str
) -> None:
    """The sandbox stays paused, takes no place, and can be resumed when the fault is gone."""
    box = await service.create()
    await post(service, box, "pause")
    driver.script = Script(start_error=error)
    answer = await service.call("POST", f"/sandboxes/{box}/resume", {})
    assert (answer.code, error_of(answer)["error"]) == (code, word)
    assert await status(service, box) == "paused"
    assert not service.sandboxes.places
    driver.script = Script()
    assert await post(service, box, "resume") == 201


@pytest.mark.parametrize("name", ["host", "journal"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
async def test_damaged_files(service: Service, tmp_path: Path, name: str, damage: str) -> None:
    """Damaged files are refused by their name in the log, and the machine is never started."""
    box = await service.create()
    await service.execute(box, "1")
    await post(service, box, "pause")
    path = tmp_path / "paused" / box / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    answer = await service.call("POST", f"/sandboxes/{box}/resume", {})
    assert (answer.code, error_of(answer)["error"]) == (409, "snapshot_corrupt")
    path.write_bytes(content)
    assert await post(service, box, "resume") == 201


async def test_no_handshake_no_sandbox(service: Service, driver: SavingDriver) -> None:
    """A machine whose random sample was seen before is not used, and the sandbox stays paused."""
    box = await service.create()
    await post(service, box, "pause")
    (known,) = list(service.sandboxes._machines.guests._samples)[-1:]
    driver.script = Script(sample=lambda: known)
    answer = await service.call("POST", f"/sandboxes/{box}/resume", {})
    assert answer.code == 502
    assert await status(service, box) == "paused"


# -- pairs


async def test_two_pauses(service: Service) -> None:
    """One of two is done, the other is a conflict."""
    box = await service.create()
    assert sorted(await asyncio.gather(post(service, box, "pause"), post(service, box, "pause"))) == [204, 409]


async def test_two_resumes(service: Service, driver: SavingDriver) -> None:
    """Both are answered by one resume."""
    box = await service.create()
    await post(service, box, "pause")
    before = len(driver.machines)
    codes = await asyncio.gather(post(service, box, "connect"), post(service, box, "resume"))
    assert codes == [201, 201]
    assert len(driver.machines) == before + 1


@pytest.mark.parametrize("first", ["pause", "resume"])
async def test_a_delete_meanwhile(service: Service, driver: SavingDriver, tmp_path: Path, first: str) -> None:
    """A delete during a pause or a resume wins, and leaves neither machine nor files."""
    box = await service.create()
    if first == "resume":
        await post(service, box, "pause")
    driver.script = Script(save_delay=5, start_delay=5)
    doing = asyncio.create_task(post(service, box, first))
    await eventually(lambda: service.sandboxes.find(box).state in (State.PAUSING, State.RESUMING))
    assert (await service.call("DELETE", f"/sandboxes/{box}")).code == 204
    assert await doing == 502
    assert (await status(service, box), files(tmp_path), driver.alive) == ("404", [], [])


@pytest.mark.parametrize("what", ["pause", "resume"])
async def test_a_client_that_hangs_up(service: Service, driver: SavingDriver, what: str) -> None:
    """A pause or a resume is done to its end, even if nobody waits for it."""
    box = await service.create()
    if what == "resume":
        await post(service, box, "pause")
    driver.script = Script(save_delay=0.3, start_delay=0.3)
    with pytest.raises(HTTPTimeoutError):
        await service.call("POST", f"/sandboxes/{box}/{what}", {}, timeout=0.1)
    wanted = State.PAUSED if what == "pause" else State.RUNNING
    await eventually(lambda: service.sandboxes.find(box).state is wanted)


async def test_a_machine_that_ends_during_a_pause(service: Service, driver: SavingDriver, tmp_path: Path) -> None:
    """The sandbox has ended then, and nothing is left of it."""
    box = await service.create()
    driver.script = Script(save_delay=0.3)
    pausing = asyncio.create_task(post(service, box, "pause"))
    await eventually(lambda: service.sandboxes.find(box).state is State.PAUSING)
    driver.alive[0].die("killed by a test")
    assert await pausing == 502
    assert (await status(service, box), files(tmp_path)) == ("404", [])


async def test_a_cell_goes_on(service: Service) -> None:
    """A cell that runs is told as unknown to who waits, goes on after the resume, and can be attached to."""
    box = await service.create()
    code = {"code": "time.sleep(0.6)\nprint(9)"}
    headers = {"Idempotency-Key": "long"}
    running = asyncio.create_task(service.call("POST", f"/sandboxes/{box}/execute", code, headers=headers))
    await asyncio.sleep(0.2)
    queued = asyncio.create_task(service.call("POST", f"/sandboxes/{box}/execute", {"code": "2"}))
    await asyncio.sleep(0.05)
    assert await post(service, box, "pause") == 204
    answer = await running
    assert (answer.code, error_of(answer)["error"], error_of(answer)["outcome"]) == (409, "sandbox_paused", "unknown")
    assert error_of(await queued)["outcome"] == "not_started"
    assert await post(service, box, "resume") == 201
    path, wanted = f"/sandboxes/{box}/executions/long", {"Accept": "application/x-ndjson"}
    events = [json.loads(line) for line in (await service.call("GET", path, headers=wanted)).body.splitlines()]
    assert events[-1]["outcome"] == "finished"
    assert json.loads((await service.call("GET", path)).body)["result"]["stdout"] == "9\n"


async def test_a_command_goes_on(service: Service) -> None:
    """A command lives through a pause with its conversation: input, output, exit and numbers go on."""
    box = await service.create()
    started = await service.call("POST", f"/sandboxes/{box}/commands", {"cmd": "cat", "stdin": True, "tag": "c"})
    path = f"/sandboxes/{box}/commands/c"
    await service.call("POST", f"{path}/stdin", {"text": "one\n"})
    await asyncio.sleep(0.1)
    for word in ("two\n", "three\n"):
        assert await post(service, box, "pause") == 204
        assert await post(service, box, "resume") == 201
        answer = await service.call("POST", f"{path}/stdin", {"text": word})
        assert answer.code == 204, (await service.call("GET", path)).body
        await asyncio.sleep(0.1)
    await service.call("DELETE", f"{path}/stdin")
    lines = (await service.call("GET", path, headers={"Accept": "application/x-ndjson"})).body.splitlines()
    events = [json.loads(line) for line in lines]
    assert "".join(each.get("text", "") for each in events) == "one\ntwo\nthree\n"
    assert events[-1]["exitCode"] == 0
    assert json.loads(started.body)["pid"] == json.loads((await service.call("GET", path)).body)["pid"]


async def test_clients_are_told_and_come_back(service: Service) -> None:
    """A WebSocket is closed with 4411. With `since` it gets what it has missed, by numbers that go on."""
    box = await service.create()
    kernel = service.sandboxes.get(service.owner, box).kernel_id
    async with channels(service, kernel) as client:
        assert (await client.run("print(1)")).text == "1\n"
        seen = client.seq
        assert await post(service, box, "pause") == 204
        assert await client.close_code() == 4411
    with pytest.raises(InvalidStatus) as refused:
        async with channels(service, kernel):
            pass
    assert refused.value.response.status_code == 409
    await post(service, box, "resume")
    await service.execute(box, "print(2)")
    async with channels(service, kernel, since=seen) as client:
        found = await client.until(lambda message: message.kind == "stream")
        assert found[-1].content["text"] == "2\n"
        assert found[0].seq == seen + 1


# -- restarts of the server


async def test_the_server_comes_back(tmp_path: Path, driver: SavingDriver) -> None:
    """Paused sandboxes are there after a restart with all that belongs to them, and go on."""
    async with serving(tmp_path, driver) as service:
        box = await service.create(metadata={"k": "v"}, envVars={"E": "1"}, timeout=120)
        await service.execute(box, "x = 'kept'\nprint(x)")
        sandbox = service.sandboxes.get(service.owner, box)
        sandbox.open_port(8000, True)
        last = sandbox.guest.kernel.journal.last
        await post(service, box, "pause")
        doomed = await service.create()
    async with serving(tmp_path, driver) as service:
        assert await status(service, doomed) == "404"
        found = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)
        assert (found["state"], found["metadata"]) == ("paused", {"k": "v"})
        assert await post(service, box, "resume") == 201
        sandbox = service.sandboxes.get(service.owner, box)
        assert sandbox.open_ports == {8000}
        assert sandbox.timeout == 120
        assert sandbox.guest.kernel.journal.last >= last
        assert [each.seq for each in sandbox.guest.kernel.journal.read(0)][:3] == [1, 2, 3]
        assert (await service.execute(box, "print(x)"))["stdout"] == "kept\n"


async def test_what_is_left_is_swept(tmp_path: Path, driver: SavingDriver) -> None:
    """Files that no paused sandbox has are deleted at the start. A paused sandbox without files has ended."""
    async with serving(tmp_path, driver) as service:
        box = await service.create()
        await post(service, box, "pause")
    (tmp_path / "paused" / box).rename(tmp_path / "paused" / ".sbxhalf-12345678")
    async with serving(tmp_path, driver) as service:
        assert files(tmp_path) == []
        answer = await service.call("GET", f"/sandboxes/{box}")
        assert answer.code == 404
        assert error_of(answer)["hint"].endswith("files_lost")


async def test_records_and_folders_that_do_not_fit(tmp_path: Path, driver: SavingDriver) -> None:
    """A folder without a record is deleted, a record that can't be read is left alone, and a start never fails."""
    async with serving(tmp_path, driver, network=FakeNetwork()) as service:
        first, second, third = [await service.create(network={"allowOut": ["93.184.215.14"]}) for _ in range(3)]
        for box in (first, second, third):
            await post(service, box, "pause")
        await service.store.sandbox_paused(first, None)  # the server died between the folder and the record
        await service.store.sandbox_paused(second, '{"of": "a later version"}')
    narrow = FakeNetwork(floor=Floor(near=(IPv4Network("93.184.0.0/16"),)))
    async with serving(tmp_path, driver, network=narrow) as service:
        assert files(tmp_path) == sorted([second, third])
        assert [await status(service, box) for box in (first, second, third)] == ["404", "404", "paused"]
        assert not service.sandboxes.get(service.owner, third).policy.allow_internet
        assert await post(service, third, "resume") == 201


async def test_a_server_that_is_stopped_pauses(tmp_path: Path, driver: SavingDriver) -> None:
    """With the setting, sandboxes that run are paused when the server goes down, and are there afterwards."""
    async with serving(tmp_path, driver, pause_at_close=True) as service:
        boxes = [await service.create() for _ in range(3)]
        await service.execute(boxes[0], "x = 3")
    assert files(tmp_path) == sorted(boxes)
    async with serving(tmp_path, driver) as service:
        assert (await service.execute(boxes[0], "print(x)"))["stdout"] == "3\n"  # any request wakes it
        assert await post(service, boxes[0], "pause") == 204
        assert (await service.call("POST", f"/sandboxes/{boxes[0]}/execute", {"code": "1"})).code == 409


async def test_a_pause_leaves_room_for_others(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that would leave too little of the disk for sandboxes that run are not kept."""
    box = await service.create()
    monkeypatch.setattr(service.sandboxes.places, "_space", lambda: (100 << 20, 1 << 30))
    assert await post(service, box, "pause") == 507
    assert (await status(service, box), files(tmp_path)) == ("running", [])
