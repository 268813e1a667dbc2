"""Checkpoints and the way back over a driver whose machines are fakes: states, pairs of operations, faults, budgets."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tornado.simple_httpclient import HTTPTimeoutError

from kernel_gateway.drivers import DriverError, Incompatible, NoSpace
from kernel_gateway.errors import InsufficientStorage, NotFound, SandboxDied, TooManyRequests
from kernel_gateway.sandbox import shelf
from kernel_gateway.sandbox.lifecycle import State
from kernel_gateway.sandbox.timeline import KEPT, MARKS, Checkpoint, Return, Timeline
from tests.api.clients import agent, channels
from tests.fakes import FakeDriver, FakeNetwork, SavingDriver, Script, Service, error_of, eventually, serving

MB = 1 << 20


@pytest.fixture
async def service(tmp_path: Path, driver: SavingDriver) -> AsyncIterator[Service]:
    """A service where the checkpoints of a sandbox may take 10 MiB."""
    async with serving(tmp_path, driver, checkpoint_bytes=10 * MB, network=FakeNetwork()) as running:
        yield running


async def post(service: Service, box: str, what: str, **fields: Any) -> int:
    return int((await service.call("POST", f"/sandboxes/{box}/{what}", fields)).code)


async def taken(service: Service, box: str) -> int:
    """The number of a new checkpoint."""
    answer = await service.call("POST", f"/sandboxes/{box}/checkpoints")
    assert answer.code == 201, answer.body
    return int(json.loads(answer.body)["number"])


async def timeline(service: Service, box: str) -> Any:
    return json.loads((await service.call("GET", f"/sandboxes/{box}/timeline")).body)


async def kept(service: Service, box: str) -> list[int]:
    entries = (await timeline(service, box))["entries"]
    return [each["number"] for each in entries if each["type"] == "checkpoint" and each["state"] == "kept"]


async def works(service: Service, box: str) -> None:
    """Return when the sandbox's kernel has a cell."""
    kernel = service.sandboxes.get(service.owner, box).kernel
    assert kernel is not None
    await eventually(lambda: kernel.has_cells)


async def at_rest(service: Service) -> None:
    """Return when no checkpoint is being taken."""
    await eventually(lambda: not service.sandboxes.checkpoints._following)


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


async def text(service: Service, box: str, code: str) -> str:
    return str((await service.execute(box, code))["results"][0]["data"]["text/plain"])


async def told(service: Service, box: str) -> list[Any]:
    await service.store.flush(5)
    events = json.loads((await service.call("GET", f"/events/sandboxes/{box}?orderAsc=true")).body)
    return [event["data"] for event in events if event["type"].endswith("updated")]


async def test_back_and_on(service: Service, driver: SavingDriver, tmp_path: Path) -> None:
    """A sandbox goes back as itself: its variables and files are of then, all else of it is as it was."""
    box = await service.create(metadata={"a": "b"}, timeout=900, network={"denyOut": ["93.184.215.14"]})
    before = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)
    await service.execute(box, "x = 1")
    assert await taken(service, box) == 1
    await service.execute(box, "x = 2\ny = 3")
    await service.call("POST", f"/sandboxes/{box}/filesystem", {"path": "/tmp/new", "content": ""})
    applied = service.slot(box).applied
    for _ in range(2):
        assert await post(service, box, "checkpoints/1/restore") == 204
        assert await text(service, box, "x") == "1"
        assert (await service.execute(box, "y"))["error"]["name"] == "NameError"
        assert (await service.call("GET", f"/sandboxes/{box}/files?path=/tmp/new")).code == 404
    assert service.slot(box).applied == applied
    after = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)
    for name in ("sandboxID", "kernelID", "envdAccessToken", "metadata", "startedAt", "network"):
        assert after[name] == before[name]
    assert after["endAt"][:19] >= before["endAt"][:19]
    assert (len(driver.alive), len(service.sandboxes.places)) == (1, 1)
    await service.call("DELETE", f"/sandboxes/{box}")
    assert (files(tmp_path), driver.alive) == ([], [])
    size = 64 * 1024
    found = await told(service, box)
    assert [each["reason"] for each in found] == ["checkpoint", "restored", "restored"]
    assert (found[0]["checkpoint"], found[1]["checkpoint"], 0 < found[0]["bytes"] < size) == (1, 1, True)


async def test_the_timeline(service: Service) -> None:
    """It has the cells of all clients, checkpoints and returns, in order."""
    box = await service.create()
    kernel = service.sandboxes.get(service.owner, box).kernel_id
    await service.execute(box, "x = 1")
    async with channels(service, kernel) as client:
        await client.run("nothing")
    await taken(service, box)
    async with agent(service, box) as client:
        await client.run("y = 1 #" + "€" * 300, id="mine")
    await post(service, box, "checkpoints/1/restore")
    found = await timeline(service, box)
    first, second, checkpoint, third, restored = found["entries"]
    assert (first["type"], first["number"], first["code"], first["status"]) == ("cell", 1, "x = 1", "ok")
    assert (second["code"], second["status"]) == ("nothing", "error")
    assert (checkpoint["type"], checkpoint["number"], checkpoint["cell"]) == ("checkpoint", 1, second["id"])
    assert (checkpoint["automatic"], checkpoint["state"], checkpoint["bytes"]) == (False, "kept", found["bytes"])
    assert (third["id"], third["number"], third["status"], len(third["code"])) == ("mine", 3, "ok", 200)
    assert (restored["type"], restored["checkpoint"], found["budget"]) == ("restored", 1, 10 * MB)
    assert [each["at"] for each in found["entries"]] == sorted(each["at"] for each in found["entries"])
    await post(service, box, "pause")
    assert [each["type"] for each in (await timeline(service, box))["entries"]] == ["checkpoint", "restored"]
    await post(service, box, "resume")
    assert (await timeline(service, box))["entries"] == found["entries"]


async def test_every_refusal(service: Service, tmp_path: Path) -> None:
    """Unknown numbers, deleted ones, other owners, paused and ended sandboxes."""
    box = await service.create()
    for number in ("1", "0", "-1", "x", "1" * 30, "²"):
        assert await post(service, box, f"checkpoints/{number}/restore") == 404
        assert (await service.call("DELETE", f"/sandboxes/{box}/checkpoints/{number}")).code == 404
    assert await taken(service, box) == 1
    for method, path in (
        ("POST", "checkpoints"), ("POST", "checkpoints/1/restore"), ("DELETE", "checkpoints/1"), ("GET", "timeline"),
    ):  # fmt: skip
        assert (await service.call(method, f"/sandboxes/{box}/{path}", key=service.other_key)).code == 404
    await post(service, box, "pause")
    assert await post(service, box, "checkpoints") == 409
    assert await post(service, box, "checkpoints/1/restore") == 409
    assert (await service.call("DELETE", f"/sandboxes/{box}/checkpoints/1")).code == 409
    await post(service, box, "resume")
    assert (await service.call("DELETE", f"/sandboxes/{box}/checkpoints/1")).code == 204
    refused = await service.call("POST", f"/sandboxes/{box}/checkpoints/1/restore")
    assert (refused.code, error_of(refused)["hint"], files(tmp_path)) == (404, "it was deleted", [])
    assert await taken(service, box) == 2
    await service.call("DELETE", f"/sandboxes/{box}")
    assert await post(service, box, "checkpoints") == 404


async def test_a_driver_that_can_not(tmp_path: Path) -> None:
    """Without machines that can be saved there are no checkpoints."""
    async with serving(tmp_path, FakeDriver()) as service:
        wanted = {"templateID": "code_interpreter", "checkpoints": "cell"}
        assert (await service.call("POST", "/sandboxes", wanted)).code == 501
        box = await service.create()
        assert await post(service, box, "checkpoints") == 501
        assert await post(service, box, "checkpoints/1/restore") == 501
        assert await kept(service, box) == []


# -- work that is under way


async def test_work_under_way_ends_with_the_truth(service: Service) -> None:
    """A cell that runs may have run, one that waits has not, and a command is undone. All are told once."""
    box = await service.create()
    await service.execute(box, "x = 1")
    await taken(service, box)
    path, stream = f"/sandboxes/{box}/execute", {"Accept": "application/x-ndjson"}
    running = asyncio.create_task(service.call("POST", path, {"code": "x = 2\ntime.sleep(60)"}))
    await works(service, box)
    waiting = [
        asyncio.create_task(service.call("POST", path, {"code": "x = 3"})),
        asyncio.create_task(service.call("POST", path, {"code": "x = 4"}, headers=stream)),
    ]
    command = asyncio.create_task(service.call("POST", f"/sandboxes/{box}/processes", {"cmd": "sleep", "args": ["60"]}))
    await eventually(lambda: len(service.guest(box).programs) == 1)
    assert await post(service, box, "checkpoints/1/restore") == 204
    answer = await running
    assert (answer.code, error_of(answer)["error"], error_of(answer)["outcome"]) == (409, "sandbox_restored", "unknown")
    answer = await waiting[0]
    assert (answer.code, error_of(answer)["error"], error_of(answer)["outcome"]) == (
        409, "sandbox_restored", "not_started",
    )  # fmt: skip
    last = json.loads((await waiting[1]).body.splitlines()[-1])
    assert "not_started" in (last.get("outcome"), last.get("error", {}).get("outcome"))
    answer = await command
    assert (answer.code, error_of(answer)["error"], error_of(answer)["outcome"]) == (409, "sandbox_restored", "unknown")
    assert await text(service, box, "x") == "1"
    entries = [each for each in (await timeline(service, box))["entries"] if each["type"] == "cell"]
    assert [each["status"] for each in entries] == ["ok", "unknown", "ok"]


async def test_clients_stay(service: Service) -> None:
    """WebSockets stay open, are told, and messages are numbered on."""
    box = await service.create()
    kernel = service.sandboxes.get(service.owner, box).kernel_id
    async with channels(service, kernel) as jupyter, agent(service, box) as stream:
        await jupyter.run("x = 1")
        await taken(service, box)
        assert (await jupyter.run("x = 2\nprint(x)")).text == "2\n"
        seen = jupyter.seq
        asked = await jupyter.start("time.sleep(60)")
        await works(service, box)
        await stream.send("execute", code="x = 3", id="second")
        assert await post(service, box, "checkpoints/1/restore") == 204
        back = await jupyter.until(lambda message: "checkpoint 1" in message.metadata["cellvm"].get("reason", ""))
        assert (back[-1].state, back[-1].seq > seen) == ("idle", True)
        assert jupyter.answers[asked].reply["ename"] == "SandboxRestored"
        ends = await stream.until("end", id="second")
        assert ends[-1]["outcome"] == "unknown"  # the kernel has got it, behind the other client's cell
        reason = "the sandbox went back to checkpoint 1"
        assert (await stream.until("status", reason=reason))[-1]["state"] == "idle"
        assert (await jupyter.run("print(x)")).text == "1\n"
        numbers = [message.seq for message in jupyter.messages]
        assert numbers == sorted(set(numbers))
        assert (await stream.run("x = 5"))[-1]["outcome"] == "finished"
    assert await text(service, box, "x") == "5"


async def test_a_kernel_that_is_being_replaced(service: Service) -> None:
    """A restart under way ends with the return, and the kernel is the one of then."""
    box = await service.create()
    await service.execute(box, "x = 1")
    await taken(service, box)
    kernel = service.sandboxes.get(service.owner, box).kernel
    assert kernel is not None
    service.guest(box).stall()
    restarting = asyncio.create_task(service.call("POST", f"/api/kernels/{kernel_of(service, box)}/restart"))
    await eventually(lambda: kernel.state == "starting")
    assert await post(service, box, "checkpoints/1/restore") == 204
    assert (await restarting).code == 409
    assert (kernel.state, await text(service, box, "x")) == ("idle", "1")


def kernel_of(service: Service, box: str) -> str:
    return service.sandboxes.get(service.owner, box).kernel_id


# -- pairs of operations


async def test_beside_a_return(service: Service, driver: SavingDriver) -> None:
    """While a sandbox goes back, other work, a pause, a checkpoint and another return are conflicts."""
    box = await service.create()
    await service.execute(box, "x = 1")
    await taken(service, box)
    driver.script = Script(start_delay=0.2)
    sandbox = service.sandboxes.get(service.owner, box)
    back = asyncio.create_task(post(service, box, "checkpoints/1/restore"))
    await eventually(lambda: sandbox.state is State.RESTORING)
    described = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)
    assert (described["status"], described["state"]) == ("running", "running")
    answers = await asyncio.gather(
        post(service, box, "execute", code="1"), post(service, box, "pause"), post(service, box, "connect"),
        post(service, box, "checkpoints"), post(service, box, "checkpoints/1/restore"), post(service, box, "fork"),
        post(service, box, "processes", cmd="true"), post(service, box, "snapshots"),
    )  # fmt: skip
    assert answers == [409] * 8
    assert (await service.call("DELETE", f"/sandboxes/{box}/checkpoints/1")).code == 409
    policy = await service.call("PUT", f"/sandboxes/{box}/network", {"denyOut": ["93.184.215.14"]})
    assert (policy.code, await back) == (204, 204)  # it waits, and then holds for the machine that is there
    assert [str(each) for each in service.slot(box).applied[-1].deny_out] == ["93.184.215.14"]
    assert await text(service, box, "x") == "1"


async def test_two_returns_at_once(service: Service, driver: SavingDriver) -> None:
    """One of two is done, and the other refused."""
    box = await service.create()
    await taken(service, box)
    driver.script = Script(start_delay=0.1)
    codes = await asyncio.gather(*(post(service, box, "checkpoints/1/restore") for _ in range(3)))
    assert sorted(codes) == [204, 409, 409]
    assert len(driver.alive) == 1


async def test_returns_that_wait_stop_no_others(service: Service) -> None:
    """Sandboxes that wait for their own checkpoints leave the turns to others."""
    first, second, other = boxes = [await service.create() for _ in range(3)]
    for box in boxes:
        await taken(service, box)
    busy = [service.sandboxes.get(service.owner, box) for box in (first, second)]
    async with busy[0].checkpointing, busy[1].checkpointing:
        waiting = [asyncio.create_task(post(service, each.id, "checkpoints/1/restore")) for each in busy]
        await eventually(lambda: all(each.state is State.RESTORING for each in busy))
        assert await post(service, other, "checkpoints/1/restore") == 204
    assert await asyncio.gather(*waiting) == [204, 204]


async def test_a_checkpoint_beside_a_pause(service: Service, driver: SavingDriver) -> None:
    """A pause waits for a checkpoint that is being taken, and the checkpoint is there after the resume."""
    box = await service.create()
    await service.execute(box, "x = 1")
    driver.script = Script(save_delay=0.1)
    taking = asyncio.create_task(taken(service, box))
    await eventually(lambda: service.sandboxes.get(service.owner, box).checkpointing.locked())
    late = asyncio.create_task(post(service, box, "checkpoints"))
    assert await post(service, box, "pause") == 204
    assert (await taking, await late) == (1, 409)
    assert await post(service, box, "resume") == 201
    await service.execute(box, "x = 2")
    assert await post(service, box, "checkpoints/1/restore") == 204
    assert await text(service, box, "x") == "1"


@pytest.mark.parametrize("what", ["checkpoints", "checkpoints/1/restore"])
async def test_a_delete_meanwhile(service: Service, driver: SavingDriver, tmp_path: Path, what: str) -> None:
    """A sandbox that ends meanwhile leaves neither machines nor files."""
    box = await service.create()
    await taken(service, box)
    driver.script = Script(save_delay=0.2, start_delay=0.2)
    doing = asyncio.create_task(service.call("POST", f"/sandboxes/{box}/{what}"))
    sandbox = service.sandboxes.get(service.owner, box)
    await eventually(lambda: sandbox.state is State.RESTORING or sandbox.checkpointing.locked())
    assert (await service.call("DELETE", f"/sandboxes/{box}")).code == 204
    answer = await doing
    assert (answer.code, len(service.sandboxes.places), driver.alive, files(tmp_path)) == (502, 0, [], [])


async def test_a_machine_that_ends_meanwhile(service: Service, driver: SavingDriver, tmp_path: Path) -> None:
    """A sandbox whose machine ends while it goes back has ended."""
    box = await service.create()
    await taken(service, box)
    driver.script = Script(start_delay=0.2)
    back = asyncio.create_task(service.call("POST", f"/sandboxes/{box}/checkpoints/1/restore"))
    await eventually(lambda: service.sandboxes.get(service.owner, box).state is State.RESTORING)
    driver.machines[0].die("killed by a test")
    assert (await back).code == 502
    await eventually(lambda: len(service.sandboxes.places) == 0)
    assert (driver.alive, files(tmp_path)) == ([], [])


async def test_a_machine_that_ends_in_the_last_moment(
    service: Service, driver: SavingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When clients have been told that the sandbox has ended, it does not come back."""
    box = await service.create()
    await taken(service, box)
    sandbox, machines = service.sandboxes.get(service.owner, box), service.sandboxes._machines
    now, saved = sandbox.guest, machines.saved

    async def saved_too_late(*args: Any) -> Any:
        guest = await saved(*args)
        now.link.close(SandboxDied("killed by a test"))
        return guest

    monkeypatch.setattr(machines, "saved", saved_too_late)
    assert await post(service, box, "checkpoints/1/restore") == 502
    await eventually(lambda: len(service.sandboxes.places) == 0)
    assert driver.alive == []


async def test_a_checkpoint_that_makes_room_meanwhile(service: Service, driver: SavingDriver) -> None:
    """A return that has waited for another checkpoint finds out that its own had to make room."""
    driver.script = Script(save_size=6 * MB)
    box = await service.create(checkpoints="cell")
    await service.execute(box, "x = 1")
    await at_rest(service)
    driver.script.save_delay = 0.1
    taking = asyncio.create_task(taken(service, box))
    await eventually(lambda: service.sandboxes.get(service.owner, box).checkpointing.locked())
    answer = await service.call("POST", f"/sandboxes/{box}/checkpoints/1/restore")
    assert (answer.code, error_of(answer)["hint"], await taking) == (404, "it was thinned", 2)
    assert (await text(service, box, "x"), len(driver.alive)) == ("1", 1)


@pytest.mark.parametrize("what", ["checkpoints", "checkpoints/1/restore"])
async def test_a_client_that_hangs_up(service: Service, driver: SavingDriver, what: str) -> None:
    """A checkpoint and a return are done to their end."""
    box = await service.create()
    await service.execute(box, "x = 1")
    await taken(service, box)
    await service.execute(box, "x = 2")
    driver.script = Script(save_delay=0.3, start_delay=0.3)
    with pytest.raises(HTTPTimeoutError):
        await service.call("POST", f"/sandboxes/{box}/{what}", timeout=0.1)
    wanted = ("2", [1, 2]) if what == "checkpoints" else ("1", [1])
    sandbox = service.sandboxes.get(service.owner, box)
    await eventually(lambda: sandbox.state is State.RUNNING and not sandbox.checkpointing.locked())
    assert (await text(service, box, "x"), await kept(service, box)) == wanted


async def test_requests_share_a_checkpoint(service: Service, tmp_path: Path) -> None:
    """Those that wait for another one get the same, also when who asked first has hung up."""
    box = await service.create()
    sandbox = service.sandboxes.get(service.owner, box)
    async with sandbox.checkpointing:
        with pytest.raises(HTTPTimeoutError):
            await service.call("POST", f"/sandboxes/{box}/checkpoints", timeout=0.1)
        asked = [asyncio.create_task(service.sandboxes.checkpoints.take(sandbox)) for _ in range(3)]
        await asyncio.sleep(0)  # they have asked
    assert [each.number for each in await asyncio.gather(*asked)] == [1, 1, 1]
    assert (await taken(service, box), files(tmp_path)) == (2, [f"{box}.1", f"{box}.2"])


async def test_no_machine_stops_for_nothing(
    service: Service, driver: SavingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint too many is refused before the machine is captured."""
    box = await service.create()
    line = service.sandboxes.get(service.owner, box).timeline
    line.marks = [checkpoint(number, automatic=False) for number in range(KEPT)]
    monkeypatch.setattr(driver, "capture", None)
    assert await post(service, box, "checkpoints") == 429


async def test_operations_at_once(service: Service, driver: SavingDriver) -> None:
    """Whatever comes together has documented answers, and ends in a legal state with one machine."""
    box = await service.create(checkpoints="cell")
    await taken(service, box)
    driver.script = Script(save_delay=0.05, start_delay=0.05)
    path = f"/sandboxes/{box}/checkpoints/1"
    answers = await asyncio.gather(
        post(service, box, "checkpoints"), post(service, box, "execute", code="1"),
        post(service, box, "checkpoints/1/restore"), post(service, box, "snapshots"), post(service, box, "fork"),
        post(service, box, "pause"), post(service, box, "connect"), post(service, box, "checkpoints"),
    )  # fmt: skip
    assert set(answers) <= {200, 201, 204, 409, 502}
    await at_rest(service)
    assert (await service.call("DELETE", path)).code in (204, 409)
    await eventually(lambda: all(each.state in (State.RUNNING, State.PAUSED) for each in service.sandboxes))
    running = [each for each in service.sandboxes if each.state is State.RUNNING]
    assert len(driver.alive) == len(running) == len(service.sandboxes.places)


# -- faults


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (Incompatible("it was saved with another processor than this host has now"), 409, "snapshot_incompatible"),
        (DriverError("no"), 503, "host_full"),
    ],
)
async def test_a_return_that_fails(
    service: Service, driver: SavingDriver, error: Exception, code: int, word: str
) -> None:
    """The machine of now goes on, with its cells and clients."""
    box = await service.create()
    await taken(service, box)
    await service.execute(box, "x = 2")
    running = asyncio.create_task(service.execute(box, "time.sleep(0.3)\nprint(x)"))
    await works(service, box)
    driver.script = Script(start_error=error)
    answer = await service.call("POST", f"/sandboxes/{box}/checkpoints/1/restore")
    assert (answer.code, error_of(answer)["error"]) == (code, word)
    assert (await running)["stdout"] == "2\n"
    assert (len(driver.alive), await text(service, box, "x")) == (1, "2")


async def test_no_handshake_no_return(service: Service, driver: SavingDriver) -> None:
    """A machine whose random sample was seen before is not used."""
    box = await service.create()
    await taken(service, box)
    known = next(iter(service.sandboxes._machines.guests._samples))
    driver.script = Script(sample=lambda: known)
    assert await post(service, box, "checkpoints/1/restore") == 502
    assert (len(driver.alive), await text(service, box, "7")) == (1, "7")


@pytest.mark.parametrize("name", ["host", "machine"])
async def test_damaged_files(service: Service, driver: SavingDriver, tmp_path: Path, name: str) -> None:
    """A damaged checkpoint is refused, and the sandbox goes on."""
    box = await service.create()
    await taken(service, box)
    await service.execute(box, "x = 2")
    path = tmp_path / "checkpoints" / f"{box}.1" / name
    path.write_bytes(path.read_bytes()[:-1])
    answer = await service.call("POST", f"/sandboxes/{box}/checkpoints/1/restore")
    assert (answer.code, error_of(answer)["error"]) == (409, "snapshot_corrupt")
    assert "checkpoint" in error_of(answer)["message"]
    assert (len(driver.alive), await text(service, box, "x")) == (1, "2")


@pytest.mark.parametrize("kind", ["save_error", "write_error"])
async def test_a_full_disk(service: Service, driver: SavingDriver, tmp_path: Path, kind: str) -> None:
    """Without room the answer is 507, the sandbox goes on, and nothing is left on disk."""
    box = await service.create(checkpoints="cell")
    driver.script = Script(**{kind: NoSpace("the disk has 0 MiB free")})  # type: ignore[arg-type]
    answer = await service.call("POST", f"/sandboxes/{box}/checkpoints")
    assert (answer.code, error_of(answer)["error"]) == (507, "insufficient_storage")
    assert await text(service, box, "1") == "1"
    await at_rest(service)
    found = await timeline(service, box)
    assert (files(tmp_path), [each["type"] for each in found["entries"]]) == ([], ["cell"])
    assert "0 MiB free" in found["trouble"]
    driver.script = Script()
    assert await taken(service, box) == 1


async def test_a_disk_that_refuses_at_the_last_moment(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder that has its name already is deleted, because the next checkpoint gets that name."""
    box = await service.create()
    to_disk = shelf._to_disk

    def refused(directory: Path) -> None:
        if directory == tmp_path / "checkpoints":
            raise OSError("no")
        to_disk(directory)

    with monkeypatch.context() as disk:
        disk.setattr(shelf, "_to_disk", refused)
        assert (await post(service, box, "checkpoints"), files(tmp_path)) == (502, [])
    assert await taken(service, box) == 1


async def test_a_disk_that_is_nearly_full(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Below the floor that is kept for running sandboxes nothing is taken."""
    box = await service.create()
    monkeypatch.setattr(service.sandboxes.places, "_space", lambda: (900 * MB, 1 << 30))
    assert (await post(service, box, "checkpoints"), files(tmp_path)) == (507, [])


# -- a checkpoint after each cell


async def test_after_each_cell(service: Service) -> None:
    """A checkpoint follows each cell of any client. The sandbox goes back to what was after any of them."""
    box = await service.create(checkpoints="cell")
    await service.execute(box, "x = 1")
    await at_rest(service)
    async with channels(service, kernel_of(service, box)) as jupyter:
        await jupyter.run("x = 2")
    await at_rest(service)
    async with agent(service, box) as stream:
        await stream.run("x = 3")
    await at_rest(service)
    entries = (await timeline(service, box))["entries"]
    assert [each["type"] for each in entries] == ["cell", "checkpoint"] * 3
    assert [each["cell"] for each in entries[1::2]] == [each["id"] for each in entries[::2]]
    assert all(each["automatic"] for each in entries[1::2])
    for number in (2, 1, 3):
        assert await post(service, box, f"checkpoints/{number}/restore") == 204
        service.sandboxes.get(service.owner, box).timeline.is_automatic = False
        assert await text(service, box, "x") == str(number)


async def test_no_checkpoint_within_a_cell(service: Service, driver: SavingDriver) -> None:
    """Cells that come at once share checkpoints, and each checkpoint stands between two cells."""
    box = await service.create(checkpoints="cell")
    driver.script = Script(save_delay=0.02)
    async with channels(service, kernel_of(service, box)) as jupyter:
        await asyncio.gather(
            *(service.execute(box, "x = 1\ntime.sleep(0.01)\ny = 2") for _ in range(4)),
            *(jupyter.start("x = 1\ntime.sleep(0.01)\ny = 2") for _ in range(4)),
        )
        assert (await jupyter.run("print(y)")).text == "2\n"  # the others are over, too
    await at_rest(service)
    entries = (await timeline(service, box))["entries"]
    assert entries[-1]["type"] == "checkpoint"
    over: set[str] = set()
    for each in entries:
        if each["type"] == "cell":
            over.add(each["id"])
        else:
            assert each["cell"] in over
    assert sum(each["type"] == "cell" for each in entries) == 9


async def test_the_budget(service: Service, driver: SavingDriver, tmp_path: Path) -> None:
    """The oldest automatic checkpoints make room, never those that were asked for, and this is told."""
    driver.script = Script(save_size=2 * MB)
    box = await service.create(checkpoints="cell")
    driver.machines[-1].guest.script = driver.script
    assert await taken(service, box) == 1
    for _ in range(8):
        await service.execute(box, "1")
        await at_rest(service)
        assert service.sandboxes.get(service.owner, box).timeline.size <= 10 * MB
    assert await kept(service, box) == [1, 7, 8, 9]
    assert files(tmp_path) == [f"{box}.{number}" for number in (1, 7, 8, 9)]
    found = await timeline(service, box)
    states = {each["number"]: each["state"] for each in found["entries"] if each["type"] == "checkpoint"}
    assert states == {1: "kept", **dict.fromkeys(range(2, 7), "thinned"), 7: "kept", 8: "kept", 9: "kept"}
    thinned = [each["checkpoints"] for each in await told(service, box) if each["reason"] == "checkpoints_thinned"]
    assert thinned == [[2], [3], [4], [5], [6]]
    assert service.sandboxes.get(service.owner, box).disk_bytes >= found["bytes"] > 8 * MB
    driver.script.save_size = 9 * MB
    answer = await service.call("POST", f"/sandboxes/{box}/checkpoints")
    assert (answer.code, error_of(answer)["error"]) == (507, "insufficient_storage")
    assert "--max-checkpoints-mb" in error_of(answer)["hint"]
    assert await kept(service, box) == [1, 7, 8, 9]


NOW = datetime.now(UTC)


def checkpoint(number: int, *, automatic: bool = True) -> Checkpoint:
    return Checkpoint(number, NOW, 1, "", automatic)


def test_which_goes_first() -> None:
    """The oldest automatic ones go, that of the last return after the others, and none if it would not help."""
    line = Timeline(marks=[checkpoint(1), checkpoint(2, automatic=False), checkpoint(3), checkpoint(4)])
    assert line.in_the_way(1, 5) == []
    assert [each.number for each in line.in_the_way(1, 4)] == [1]
    line.add(Return(1, NOW))
    assert [each.number for each in line.in_the_way(2, 4)] == [3, 4]
    assert [each.number for each in line.in_the_way(3, 4)] == [3, 4, 1]
    with pytest.raises(InsufficientStorage):
        line.in_the_way(4, 4)
    assert line.size == 4
    with pytest.raises(NotFound):
        line.find(5)


def test_a_timeline_is_bounded() -> None:
    """There are KEPT checkpoints at most, and MARKS marks. Those that are there are never forgotten."""
    line = Timeline(marks=[checkpoint(number, automatic=False) for number in range(KEPT)])
    with pytest.raises(TooManyRequests):
        line.in_the_way(1, 1 << 30)
    for _ in range(2 * MARKS):
        line.add(Return(1, NOW))
    assert (len(line.marks), len(line.kept)) == (MARKS, KEPT)


# -- pause, fork and the server's end


async def test_checkpoints_of_a_paused_sandbox(tmp_path: Path, driver: SavingDriver) -> None:
    """They are there after a pause, also after a restart of the server. What else is on the shelf is swept."""
    async with serving(tmp_path, driver) as service:
        box, other = await service.create(checkpoints="cell"), await service.create()
        await service.execute(box, "x = 1")
        await at_rest(service)
        await taken(service, box)
        await taken(service, other)
        await post(service, box, "pause")
        before = (await timeline(service, box))["entries"]
        (tmp_path / "checkpoints" / f"{box}.2").rename(tmp_path / "checkpoints" / ".half")
    async with serving(tmp_path, driver) as service:
        assert files(tmp_path) == [f"{box}.1"]
        assert (await timeline(service, box))["entries"] == [before[0], {**before[1], "state": "deleted"}]
        assert await post(service, box, "resume") == 201
        await service.execute(box, "x = 2")
        await at_rest(service)
        assert await kept(service, box) == [1, 3]
        assert await post(service, box, "checkpoints/1/restore") == 204
        assert await text(service, box, "x") == "1"


async def test_a_server_of_an_earlier_version_meanwhile(tmp_path: Path, driver: SavingDriver) -> None:
    """It leaves the checkpoints alone of sandboxes whose records it can't read."""
    async with serving(tmp_path, driver) as service:
        box = await service.create()
        await service.execute(box, "x = 1")
        await taken(service, box)
        await service.execute(box, "x = 2")
        await post(service, box, "pause")
        record = service.store.paused()[box]
        await service.store.sandbox_paused(box, '{"of": "a later version"}')
    async with serving(tmp_path, driver) as service:
        assert files(tmp_path) == [f"{box}.1"]
        await service.store.sandbox_paused(box, record)
    async with serving(tmp_path, driver) as service:
        assert await post(service, box, "resume") == 201
        assert await post(service, box, "checkpoints/1/restore") == 204
        assert await text(service, box, "x") == "1"


async def test_a_fork_has_none(service: Service) -> None:
    """A copy begins without checkpoints, and takes its own if its parent does."""
    box = await service.create(checkpoints="cell")
    await service.execute(box, "x = 1")
    await at_rest(service)
    made = json.loads((await service.call("POST", f"/sandboxes/{box}/fork", {})).body)[0]["sandbox"]["sandboxID"]
    assert await kept(service, made) == []
    assert await post(service, made, "checkpoints/1/restore") == 404
    await service.execute(made, "x = 2")
    await at_rest(service)
    assert await post(service, made, "checkpoints/1/restore") == 204
    assert (await text(service, made, "x"), await text(service, box, "x")) == ("2", "1")
