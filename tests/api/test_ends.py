"""Every accepted cell ends once, with the truth, whatever happens beside it. The kernels are real.

Most cases are pairs of operations: a cell and a delete, two restarts, a restart and a hang-up, an interrupt
and a start.
"""

import asyncio
import gc
import json
import os
import signal
import weakref
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tornado.httpclient import HTTPResponse

from kernel_gateway.kernel import message
from kernel_gateway.sandbox.lifecycle import Event
from tests.api.clients import agent
from tests.fakes import FakeDriver, Service, error_of, eventually, serving

SLEEP = "import time; print('begun', flush=True); time.sleep(60)"


@pytest.fixture
async def sandbox(real: Service) -> str:
    """A sandbox for a test that ends it."""
    return await real.create()


def kernel_of(service: Service, box: str) -> Any:
    return service.sandboxes.get(service.owner, box).guest.kernel


async def started(service: Service, box: str, path: str = "execute", **options: Any) -> asyncio.Task[HTTPResponse]:
    """A cell that sleeps for a minute, and has begun to."""
    kernel = kernel_of(service, box)
    running = asyncio.create_task(service.call("POST", f"/sandboxes/{box}/{path}", {"code": SLEEP}, **options))
    await eventually(lambda: kernel.state == "busy" and any(each.is_started for each in kernel.executions.unfinished()))
    return running


async def sent(service: Service, box: str, *codes: str) -> list[asyncio.Task[Any]]:
    """Cells that the kernel's queue has taken in this order."""
    kernel = kernel_of(service, box)
    cells = []
    for code in codes:
        before = len(kernel.executions)
        cells.append(asyncio.create_task(service.execute(box, code)))
        await eventually(lambda before=before: len(kernel.executions) > before)
    return cells


def lines(answer: HTTPResponse) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.body.splitlines()]


# -- the end of a sandbox


async def delete(service: Service, box: str) -> None:
    assert (await service.call("DELETE", f"/sandboxes/{box}")).code == 204


async def expire(service: Service, box: str) -> None:
    service.sandboxes.get(service.owner, box).set_timeout(0)
    await eventually(lambda: service.sandboxes.find(box) is None)


async def stop_the_server(service: Service, box: str) -> None:
    service.sandboxes.get(service.owner, box).apply(Event.SERVER_STOPPED)
    await asyncio.sleep(0)


async def kill_the_machine(service: Service, box: str) -> None:
    os.kill(service.sandboxes.get(service.owner, box).guest.vm.pid, signal.SIGKILL)
    await eventually(lambda: service.sandboxes.find(box) is None)


ENDS = [delete, expire, stop_the_server, kill_the_machine]


@pytest.mark.parametrize("end", ENDS)
async def test_a_cell_whose_sandbox_ends(
    real: Service, sandbox: str, end: Callable[[Service, str], Awaitable[None]]
) -> None:
    """A cell that runs gets 502 and `unknown`, one that waits for its turn gets 502 and `not_started`."""
    running = await started(real, sandbox)
    waiting = asyncio.create_task(real.call("POST", f"/sandboxes/{sandbox}/execute", {"code": "1"}))
    await eventually(lambda: len(list(kernel_of(real, sandbox).executions.unfinished())) == 2)
    await end(real, sandbox)
    first, second = error_of(await running), error_of(await waiting)
    assert (first["code"], first["error"], first["outcome"]) == (502, "sandbox_died", "unknown")
    assert (second["code"], second["error"], second["outcome"]) == (502, "sandbox_died", "not_started")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", ["application/x-ndjson", "text/event-stream"])
async def test_a_streamed_cell_whose_sandbox_ends(
    real: Service, sandbox: str, kind: str, end: Callable[[Service, str], Awaitable[None]]
) -> None:
    """A stream ends with the output so far, one error and one end, which says `unknown`."""
    running = await started(real, sandbox, headers={"Accept": kind})
    await eventually(lambda: any(each.kind == "stream" for each in records(real, sandbox)))
    await end(real, sandbox)
    body = (await running).body.decode()
    events = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if "{" in line]
    assert [event["type"] for event in events] == ["started", "stdout", "error", "end"]
    assert (events[2]["error"]["code"], events[3]["outcome"]) == ("sandbox_died", "unknown")


def records(service: Service, box: str, after: int = 0) -> list[Any]:
    return [each for each in kernel_of(service, box).journal.read(after) if hasattr(each, "parts")]


async def test_attachments_get_the_same_end(real: Service, sandbox: str) -> None:
    """All requests with one Idempotency-Key, and a stream of the execution, get the same outcome."""
    options = {"headers": {"Idempotency-Key": "one"}}
    running = [await started(real, sandbox, **options) for _ in range(2)]
    headers = {"Accept": "application/x-ndjson"}
    attached = asyncio.create_task(real.call("GET", f"/sandboxes/{sandbox}/executions/one", headers=headers))
    await asyncio.sleep(0.1)
    await delete(real, sandbox)
    for each in running:
        error = error_of(await each)
        assert (error["error"], error["outcome"]) == ("sandbox_died", "unknown")
    *_, error, end = lines(await attached)
    assert (error["error"]["code"], end["type"], end["outcome"]) == ("sandbox_died", "end", "unknown")


async def test_the_stream_tells_each_end(real: Service, sandbox: str) -> None:
    """The agents' stream tells the end of every cell before it closes: of one that ran, and of one that waited."""
    async with agent(real, sandbox) as client:
        await client.send("execute", id="ran", code=SLEEP)
        await client.until("stdout")
        await client.send("execute", id="waited", code="1")
        await eventually(lambda: "waited" in kernel_of(real, sandbox).executions)
        await delete(real, sandbox)
        await client.until("end", id="ran")
        await client.until("end", id="waited")
        seen = client.events
    ends = {event["id"]: event.get("outcome") for event in seen if event["type"] == "end"}
    assert ends == {"ran": "unknown", "waited": "not_started"}
    errors = {event["id"]: event["error"]["code"] for event in seen if event["type"] == "error"}
    assert errors == {"ran": "sandbox_died", "waited": "sandbox_died"}


async def test_a_request_after_the_end_has_not_run(real: Service, sandbox: str) -> None:
    """A request that comes while the machine is on its way out is refused as one that never ran."""
    box = real.sandboxes.get(real.owner, sandbox)
    box.apply(Event.KILL)
    assert str(box.state) == "stopping"
    answer = await real.call("POST", f"/sandboxes/{sandbox}/execute", {"code": "1"})
    assert answer.code == 404
    await box.gone()
    assert str(box.state) == "stopped"


# -- restarts


async def restart(service: Service, box: str) -> HTTPResponse:
    name = service.sandboxes.get(service.owner, box).kernel_id
    return await service.call("POST", f"/api/kernels/{name}/restart", {})


async def test_two_restarts_and_a_cell(real: Service, real_box: str) -> None:
    """Overlapping restarts join, and cells that are sent at any moment beside them run once each."""
    await real.execute(real_box, "kept = 1")
    for pause in (0.0, 0.02, 0.1):
        first = asyncio.create_task(restart(real, real_box))
        await asyncio.sleep(pause)
        second = asyncio.create_task(restart(real, real_box))
        cells = [asyncio.create_task(real.execute(real_box, f"{number} * 2")) for number in range(3)]
        assert [(await each).code for each in (first, second)] == [200, 200]
        assert [(await each)["results"][0]["data"]["text/plain"] for each in cells] == ["0", "2", "4"]
    assert (await real.execute(real_box, "kept"))["error"]["name"] == "NameError"


async def test_a_restart_outlives_its_client(real: Service, real_box: str) -> None:
    """A client that hangs up leaves the restart and the next cells as they are."""
    for _ in range(3):
        asking = asyncio.create_task(restart(real, real_box))
        await eventually(lambda: kernel_of(real, real_box).state == "starting")
        asking.cancel()
        answer = await real.execute(real_box, "6 * 7", timeout=20)
        assert (answer["results"][0]["data"]["text/plain"], answer["error"]) == ("42", None)


async def test_a_restart_ends_the_running_cell_only(real: Service, real_box: str) -> None:
    """The running cell ends with an unknown outcome, the waiting one runs in the next kernel."""
    running = await started(real, real_box)
    waiting = asyncio.create_task(real.execute(real_box, "6 * 7"))
    assert (await restart(real, real_box)).code == 200
    cell = json.loads((await running).body)
    assert (cell["error"]["code"], cell["outcome"]) == ("kernel_restarted", "unknown")
    after = await waiting
    assert (after["results"][0]["data"]["text/plain"], after["outcome"]) == ("42", "finished")


async def test_the_end_of_a_sandbox_during_a_restart(real: Service, sandbox: str) -> None:
    """A restart, and a cell that waits for it, learn of the sandbox's end."""
    asking = asyncio.create_task(restart(real, sandbox))
    await eventually(lambda: kernel_of(real, sandbox).state == "starting")
    waiting = asyncio.create_task(real.call("POST", f"/sandboxes/{sandbox}/execute", {"code": "1"}))
    await eventually(lambda: any(kernel_of(real, sandbox).executions.unfinished()))
    await delete(real, sandbox)
    assert error_of(await asking)["error"] == "sandbox_died"
    assert error_of(await waiting)["outcome"] == "not_started"


async def test_a_kernel_that_ends_by_itself(real: Service, real_box: str) -> None:
    """The cell in it ends with an unknown outcome, and cells that are sent meanwhile run in the next kernel."""
    cells = await sent(real, real_box, "import os; os._exit(3)", "1 + 1", "2 + 2")
    first, *others = [await each for each in cells]
    assert (first["error"]["code"], first["outcome"]) == ("kernel_restarted", "unknown")
    assert [each["results"][0]["data"]["text/plain"] for each in others] == ["2", "4"]
    answer = await real.call("GET", f"/api/kernels/{real.sandboxes.get(real.owner, real_box).kernel_id}")
    assert json.loads(answer.body)["execution_state"] == "idle"


async def test_a_cell_that_does_not_stop(real: Service, real_box: str) -> None:
    """Its kernel is replaced, it ends with an unknown outcome, and the next cell runs in the next kernel."""
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    stuck = asyncio.create_task(real.execute(real_box, code, timeout=0.5))
    after = asyncio.create_task(real.execute(real_box, "6 * 7"))
    cell = await stuck
    assert (cell["error"]["code"], cell["error"]["stateKept"], cell["outcome"]) == ("exec_timeout", False, "unknown")
    assert (await after)["results"][0]["data"]["text/plain"] == "42"


async def test_a_cell_that_stops_at_its_timeout_has_finished(real: Service, real_box: str) -> None:
    """A cell that was interrupted at its timeout has finished, because its end is known."""
    cell = await real.execute(real_box, SLEEP, timeout=0.5)
    assert (cell["error"]["code"], cell["error"]["stateKept"], cell["outcome"]) == ("exec_timeout", True, "finished")


async def test_a_reply_that_comes_late_after_its_error(real: Service, real_box: str) -> None:
    """A cell whose error has been told has stopped. Its reply may take longer than the grace of a cell that runs on."""
    code = """
import time
def slow(result):
    get_ipython().events.unregister("post_run_cell", slow)
    time.sleep(1.5)
get_ipython().events.register("post_run_cell", slow)
kept = 7
time.sleep(60)
"""
    headers = {"Accept": "application/x-ndjson"}
    answer = await real.call("POST", f"/sandboxes/{real_box}/execute", {"code": code, "timeout": 0.5}, headers=headers)
    events = [json.loads(line) for line in answer.body.splitlines()]
    errors = [each["error"] for each in events if each["type"] == "error"]
    assert [(each["code"], each["stateKept"]) for each in errors] == [("exec_timeout", True)]
    assert events[-1]["outcome"] == "finished"
    assert (await real.execute(real_box, "kept"))["results"][0]["data"]["text/plain"] == "7"


async def test_the_last_words_of_a_kernel(service: Service, box: str) -> None:
    """The old kernel's word that it has begun a cell does not make the next kernel busy, whenever it arrives."""
    kernel = kernel_of(service, box)
    running = asyncio.create_task(service.execute(box, "time.sleep(60)"))
    await eventually(lambda: kernel.state == "busy")
    (name,) = kernel.pending
    header = json.dumps({"msg_id": name, "msg_type": "execute_request", "session": "s"}).encode()
    late = message.new("iopub", "status", {"execution_state": "busy"}, session="s", parent=header)
    restarting = asyncio.create_task(kernel.restart())
    await asyncio.sleep(0)
    assert kernel.state == "starting"
    kernel._message_received(late.copy())
    await restarting
    kernel._message_received(late.copy())
    assert kernel.state == "idle"
    assert (await running)["outcome"] == "unknown"


# -- interrupts


async def interrupt(service: Service, box: str) -> None:
    name = service.sandboxes.get(service.owner, box).kernel_id
    assert (await service.call("POST", f"/api/kernels/{name}/interrupt", {})).code == 204


@pytest.mark.parametrize("pause", [0.0, 0.03, 0.06, 0.1, 0.15, 0.2])
async def test_interrupts_during_a_restart(real: Service, real_box: str, pause: float) -> None:
    """A kernel that is starting survives any number of interrupts, and the restart succeeds."""
    before = kernel_of(real, real_box).journal.last
    asking = asyncio.create_task(restart(real, real_box))
    await asyncio.sleep(pause)
    for _ in range(7):
        await interrupt(real, real_box)
    assert (await asking).code == 200
    assert (await real.execute(real_box, "6 * 7"))["results"][0]["data"]["text/plain"] == "42"
    statuses = [each for each in records(real, real_box, before) if each.kind == "status"]
    assert "dead" not in [json.loads(each.parts[4])["execution_state"] for each in statuses]


@pytest.mark.parametrize("pause", [0.0, 0.01, 0.05, 0.2])
async def test_an_interrupt_right_after_run(real: Service, real_box: str, pause: float) -> None:
    """An interrupt stops the cell that was sent before it, even if the kernel has not begun it."""
    running = asyncio.create_task(real.execute(real_box, SLEEP))
    await eventually(lambda: kernel_of(real, real_box).pending)
    await asyncio.sleep(pause)
    await interrupt(real, real_box)
    cell = await running
    assert (cell["error"]["name"], cell["outcome"]) == ("KeyboardInterrupt", "finished")


async def test_an_interrupt_reaches_no_other_cell(real: Service, real_box: str) -> None:
    """However interrupts fall between short cells, each hits the cell of its moment or none, and all cells answer."""
    cells = [asyncio.create_task(real.execute(real_box, f"sum(range(2000)) + {number}")) for number in range(100)]
    for _ in range(30):
        await interrupt(real, real_box)
    marked = asyncio.create_task(real.execute(real_box, "import time; time.sleep(0.3); 'mine'"))
    answers = [await each for each in cells]
    assert {answer["outcome"] for answer in answers} == {"finished"}
    for number, answer in enumerate(answers):
        hit = answer["error"] is not None
        assert (
            answer["error"]["name"] == "KeyboardInterrupt"
            if hit
            else answer["results"][-1]["data"]["text/plain"] == (str(1999000 + number))
        )
    assert (await marked)["error"] is None


async def test_an_interrupt_of_an_idle_kernel_is_spent(real: Service, real_box: str) -> None:
    """An interrupt that finds nothing to stop stops nothing later."""
    await real.execute(real_box, "1")
    for _ in range(5):
        await interrupt(real, real_box)
    assert (await real.execute(real_box, "import time; time.sleep(0.7); 1"))["error"] is None


async def test_a_second_interrupt_hides_nothing(real: Service, real_box: str) -> None:
    """A cell that two interrupts have stopped has an error, however close they are to each other."""
    for number in range(20):
        running = asyncio.create_task(real.execute(real_box, SLEEP))
        await eventually(lambda: kernel_of(real, real_box).state == "busy")
        await interrupt(real, real_box)
        await asyncio.sleep(number * 0.001)
        await interrupt(real, real_box)
        assert (await running)["error"]["name"] == "KeyboardInterrupt"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("raise ExceptionGroup('x', [ValueError(1)])", "ExceptionGroup"),
        ("%nosuch", "UsageError"),
        ("1/0", "ZeroDivisionError"),
    ],
)
async def test_every_failed_cell_has_an_error(real: Service, real_box: str, code: str, name: str) -> None:
    """A cell whose reply says that it failed has one error, although IPython only prints some of them."""
    cell = await real.execute(real_box, code)
    assert (cell["error"]["name"], cell["outcome"]) == (name, "finished")
    answer = await real.call(
        "POST", f"/sandboxes/{real_box}/execute", {"code": code}, headers={"Accept": "application/x-ndjson"}
    )
    errors = [event["error"]["name"] for event in lines(answer) if event["type"] == "error"]
    assert errors == [name]


# -- exit() means the end of the cell


@pytest.mark.parametrize("leave", ["exit()", "quit()", "exit", "get_ipython().ask_exit()", "import sys; sys.exit()"])
async def test_exit_ends_the_cell_alone(real: Service, real_box: str, leave: str) -> None:
    """`exit()` ends its cell as `sys.exit()` does. Variables stay, and later cells run."""
    _, left, after = [await each for each in await sent(real, real_box, "kept = 1", leave, "kept")]
    assert (left["error"]["name"], left["outcome"]) == ("SystemExit", "finished")
    assert "To exit" not in left["stderr"]
    assert after["results"][0]["data"]["text/plain"] == "1"
    assert (await real.execute(real_box, "kept"))["results"][0]["data"]["text/plain"] == "1"


# -- bounds


async def test_code_of_hung_up_clients_is_not_kept(real: Service, real_box: str) -> None:
    """A cell whose client hangs up while it waits never runs, and its code does not count any more."""
    running = await started(real, real_box)
    kernel = kernel_of(real, real_box)
    body = json.dumps({"code": "ran = 1 #" + "x" * (3 * 1024 * 1024)}).encode()
    head = f"POST /sandboxes/{real_box}/execute HTTP/1.1\r\nAuthorization: Bearer {real.key}\r\nHost: x\r\n"
    for _ in range(2 * real.sandboxes.held.most // len(body)):
        _, writer = await asyncio.open_connection("127.0.0.1", real.port)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await eventually(lambda: len(list(kernel.executions.unfinished())) == 2)
        writer.close()
        await eventually(lambda: len(list(kernel.executions.unfinished())) == 1)
        await eventually(lambda: real.sandboxes.held.of(real.owner) < 1000)
    await interrupt(real, real_box)
    assert json.loads((await running).body)["error"]["name"] == "KeyboardInterrupt"
    assert (await real.execute(real_box, "ran"))["error"]["name"] == "NameError"


async def test_a_generator_that_is_closed_early_keeps_its_cell_from_running(real: Service, real_box: str) -> None:
    """A cell whose caller leaves before its turn ends at once as not started, and never runs."""
    running = await started(real, real_box)
    kernel = kernel_of(real, real_box)
    async with aclosing(kernel.execute("ran = 1")) as events:
        reading = asyncio.create_task(anext(events))
        await eventually(lambda: len(list(kernel.executions.unfinished())) == 2)
        (waiting,) = [each for each in kernel.executions.unfinished() if not each.is_sent]
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    assert (waiting.state, waiting.code) == ("not_started", b"")
    await interrupt(real, real_box)
    await running
    assert (await real.execute(real_box, "ran"))["error"]["name"] == "NameError"


# -- places


async def test_a_place_is_free_when_its_machine_is_gone(tmp_path: Path) -> None:
    """Sandboxes that are deleted while they are being created keep their places until their machines have ended.

    A create that finds no other place waits for them.
    """
    driver = FakeDriver()
    driver.script.start_delay = 0.5
    async with serving(tmp_path, driver, max_sandboxes=2) as service:
        creating = [asyncio.create_task(service.call("POST", "/sandboxes", {"templateID": "base"})) for _ in range(2)]
        await eventually(lambda: len(service.sandboxes) == 2)
        boxes = service.sandboxes.list(service.owner)
        deleting = [asyncio.create_task(service.call("DELETE", f"/sandboxes/{each.id}")) for each in boxes]
        await eventually(lambda: len(service.sandboxes) == 0)
        third = asyncio.create_task(service.call("POST", "/sandboxes", {"templateID": "base"}))
        assert [(await each).code for each in creating] == [409, 409]
        assert [(await each).code for each in deleting] == [204, 204]
        assert driver.alive == []
        assert (await third).code == 201


async def test_a_place_whose_machine_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A create waits a bounded time for it, and is refused then. The place is free as soon as the machine has ended."""
    monkeypatch.setattr("kernel_gateway.sandbox.places.ROOM_LIMIT", 0.2)
    driver = FakeDriver()
    async with serving(tmp_path, driver, max_sandboxes=1) as service:
        box = await service.create()
        held = asyncio.Event()
        vm = driver.machines[0]
        kill = vm.kill

        async def stuck() -> None:
            await held.wait()
            await kill()

        monkeypatch.setattr(vm, "kill", stuck)
        deleting = asyncio.create_task(service.call("DELETE", f"/sandboxes/{box}"))
        await eventually(lambda: len(service.sandboxes) == 0)
        refused = await service.call("POST", "/sandboxes", {"templateID": "base"})
        assert error_of(refused)["error"] == "host_full"
        waiting = asyncio.create_task(service.call("POST", "/sandboxes", {"templateID": "base"}))
        held.set()
        assert (await waiting).code == 201
        assert (await deleting).code == 204


async def test_a_full_disk_costs_its_greatest_user_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below half the floor one sandbox is ended and its owner is told why. Those that take little are never ended."""
    driver = FakeDriver()
    mib, total = 1 << 20, 10_000 << 20  # so the floor is 500 MiB

    def disk_usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(total=total, free=others_leave - sum(vm.disk_bytes for vm in driver.alive))

    monkeypatch.setattr("kernel_gateway.sandbox.places.shutil.disk_usage", disk_usage)
    async with serving(tmp_path, driver, journals=tmp_path) as service:
        others_leave = 2_000 * mib
        boxes = [await service.create() for _ in range(3)]
        for vm, size in zip(driver.machines, (300, 900, 550), strict=True):
            vm.disk_bytes = size * mib
        await asyncio.sleep(1)
        assert len(driver.alive) == 3, "half the floor is free"
        refused = await service.call("POST", "/sandboxes", {"templateID": "base"})
        assert error_of(refused)["error"] == "host_full"
        driver.machines[0].disk_bytes += 10 * mib
        await eventually(lambda: len(driver.alive) == 2)
        gone = await service.call("GET", f"/sandboxes/{boxes[1]}")
        assert (gone.code, "disk_full" in error_of(gone)["hint"]) == (404, True)
        await service.create()
        others_leave = 0
        await eventually(lambda: len(driver.alive) == 1)
        await asyncio.sleep(1)
        assert len(driver.alive) == 1, "ending one that takes nothing would not help"


async def test_a_key_may_have_so_many_sandboxes(tmp_path: Path) -> None:
    """A key beyond its share gets 429, and another key still gets a sandbox."""
    async with serving(tmp_path, max_sandboxes=4, per_owner=2) as service:
        first, _ = await service.create(), await service.create()
        error = error_of(await service.call("POST", "/sandboxes", {"templateID": "base"}))
        assert (error["code"], error["error"]) == (429, "too_many_requests")
        answer = await service.call("POST", "/sandboxes", {"templateID": "base"}, key=service.other_key)
        assert answer.code == 201
        await delete(service, first)
        await service.create()


async def test_nothing_is_kept_of_an_ended_sandbox(service: Service) -> None:
    """The last sandbox that ended is not kept in memory until another one exists."""
    box = weakref.ref(service.sandboxes.get(service.owner, await service.create()))
    await asyncio.sleep(0.3)  # the watch over lifetimes has looked at it
    found = box()
    assert found is not None
    name = found.id
    del found
    assert (await service.call("DELETE", f"/sandboxes/{name}")).code == 204
    gc.collect()
    assert box() is None


async def test_the_watch_over_lifetimes_goes_on(service: Service, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task that ends sandboxes at their time survives a failure, and the log tells of it."""
    monkeypatch.setattr("kernel_gateway.sandbox.sandboxes.PAUSE", 0.01)
    told: list[str] = []
    monkeypatch.setattr("kernel_gateway.sandbox.sandboxes.log.exception", lambda text, *what: told.append(text % what))
    failures = iter([RuntimeError("can't start new thread")])
    check = service.sandboxes._check_deadlines

    def failing() -> None:
        if failure := next(failures, None):
            raise failure
        check()

    monkeypatch.setattr(service.sandboxes, "_check_deadlines", failing)
    service.sandboxes.get(service.owner, box).set_timeout(0)
    await eventually(lambda: len(service.sandboxes) == 0)
    assert told == ["the watch over lifetimes failed and is started again"]
