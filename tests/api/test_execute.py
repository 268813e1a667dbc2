"""Cells over HTTP: results, state, errors, timeouts, streams."""

import asyncio
import json
import time

import pytest
from tornado.httpclient import HTTPResponse

from guest_agent import wire
from kernel_gateway.api import rest
from kernel_gateway.kernel import message
from tests.fakes import Service, error_of, eventually, resident

FLOOD_200 = "flood(200)"


async def events_of(
    service: Service, box: str, code: str, accept: str = "application/x-ndjson", **body: object
) -> list:
    answer = await service.call("POST", f"/sandboxes/{box}/execute", {"code": code, **body}, headers={"Accept": accept})
    return events_in(answer, accept)


def events_in(answer: HTTPResponse, accept: str = "application/x-ndjson") -> list:
    """The events of a streamed answer."""
    assert answer.code == 200
    assert answer.headers["Content-Type"] == accept
    if accept == "application/x-ndjson":
        return [json.loads(line) for line in answer.body.splitlines()]
    blocks = answer.body.decode().split("\n\n")
    assert blocks.pop() == ""
    lines = [block.split("\n") for block in blocks]
    events = [json.loads(data.removeprefix("data: ")) for _, data in lines]
    assert [number for number, _ in lines] == [f"id: {event['seq']}" for event in events]
    return events


async def test_a_cell(service: Service, box: str) -> None:
    """Results, text and the count come back, and state stays from call to call."""
    cell = await service.execute(box, 'x = 41\nprint("hello")\ndisplay({"text/html": "<b>"})\nx + 1')
    assert cell == {
        "results": [
            {"type": "display", "data": {"text/html": "<b>"}, "metadata": {}},
            {"type": "result", "data": {"text/plain": "42"}, "metadata": {}},
        ],
        "stdout": "hello\n",
        "stderr": "",
        "error": None,
        "executionCount": 1,
        "truncated": None,
        "outcome": "finished",
        "late": [],
        "restarted": None,
        "changes": None,
    }
    cell = await service.execute(box, "x")
    assert (cell["results"][0]["data"], cell["executionCount"]) == ({"text/plain": "41"}, 2)


async def test_code_that_raises_is_no_error(service: Service, box: str) -> None:
    """An exception is 200 with its name, text and traceback, and the kernel goes on."""
    cell = await service.execute(box, "1 / 0")
    assert cell["error"]["name"] == "ZeroDivisionError"
    assert cell["error"]["traceback"]
    assert cell["error"]["code"] is None
    assert (await service.execute(box, "7"))["results"][0]["data"] == {"text/plain": "7"}


async def test_cells_take_turns(service: Service, box: str) -> None:
    """Cells that come at the same time run one after the other, in order."""
    cells = await asyncio.gather(*(service.execute(box, f"print({n}); time.sleep(0.02)") for n in range(8)))
    assert sorted(int(cell["stdout"]) for cell in cells) == list(range(8))
    assert sorted(cell["executionCount"] for cell in cells) == list(range(1, 9))


async def test_a_timeout_interrupts_and_keeps_state(service: Service, box: str) -> None:
    """At its timeout a cell is interrupted within a second, and variables survive."""
    await service.execute(box, "x = 5")
    begun = time.monotonic()
    cell = await service.execute(box, "time.sleep(60)", timeout=0.3)
    assert 0.3 <= time.monotonic() - begun < 1.3
    assert cell["error"]["code"] == "exec_timeout"
    assert cell["error"]["stateKept"] is True
    assert (await service.execute(box, "x"))["results"][0]["data"] == {"text/plain": "5"}


async def test_a_timeout_counts_from_the_start(service: Service, box: str) -> None:
    """A cell may wait for its turn longer than its timeout, and then has all of that time."""
    first = asyncio.create_task(service.execute(box, "time.sleep(0.8)"))
    await eventually(lambda: service.guest(box).kernel._cell is not None)
    cell = await service.execute(box, 'time.sleep(0.2)\nprint("whole")', timeout=0.5)
    assert (cell["error"], cell["stdout"]) == (None, "whole\n")
    assert (await first)["error"] is None
    begun = time.monotonic()
    assert (await service.execute(box, "time.sleep(60)", timeout=0.3))["error"]["code"] == "exec_timeout"
    assert time.monotonic() - begun >= 0.3


async def test_a_cell_that_ignores_interrupts_loses_its_kernel(service: Service, box: str) -> None:
    """If a cell does not stop, its kernel is replaced within a second of the timeout, and the answer says so."""
    await service.execute(box, "x = 5")
    service.guest(box).kernel.ignores_interrupts = True
    begun = time.monotonic()
    cell = await service.execute(box, "time.sleep(60)", timeout=0.2)
    assert time.monotonic() - begun < 1.3
    assert cell["error"]["code"] == "exec_timeout"
    assert cell["error"]["stateKept"] is False
    assert (await service.execute(box, "x"))["error"]["name"] == "NameError"


async def test_a_kernel_that_ends(service: Service, box: str) -> None:
    """When a kernel exits, the cell's error is kernel_restarted. The next cell runs in a new kernel."""
    cell = await service.execute(box, "import os; os._exit(3)")
    assert cell["error"]["code"] == "kernel_restarted"
    assert "3" in cell["error"]["value"]
    assert (await service.execute(box, "2"))["results"][0]["data"] == {"text/plain": "2"}


async def test_a_restart_that_fails(service: Service, box: str) -> None:
    """If a kernel can't be started again, the answer is 502 kernel_unavailable. Commands still work."""
    guest = service.guest(box)

    async def refuse(stream: object, body: wire.Restart) -> None:
        await stream.fail("kernel_unavailable", "no")  # type: ignore[attr-defined]

    guest.script.handlers[wire.Restart] = refuse
    dead = wire.KernelStatus(state="dead", reason="gone")
    await guest.send(wire.encode(wire.FrameType.EVENT, wire.EVENTS, dead))
    answer = await service.call("POST", f"/sandboxes/{box}/execute", {"code": "1"})
    error = error_of(answer)
    assert (error["code"], error["error"], error["outcome"]) == (502, "kernel_unavailable", "not_started")
    assert (await service.run(box, "true"))["exitCode"] == 0
    del guest.script.handlers[wire.Restart]
    assert (await service.execute(box, "1"))["error"] is None


@pytest.mark.parametrize("accept", ["application/x-ndjson", "text/event-stream"])
async def test_the_same_as_a_stream(service: Service, box: str, accept: str) -> None:
    """On request events come one by one, `end` last."""
    events = await events_of(service, box, 'print("a")\n1 / 0', accept)
    assert [event["type"] for event in events] == ["started", "stdout", "error", "end"]
    seqs = [event.pop("seq") for event in events]
    assert seqs == sorted(seqs)
    assert len({event.pop("id") for event in events}) == 1
    assert events[0] == {"type": "started", "executionCount": 1}
    assert events[1] == {"type": "stdout", "text": "a\n"}
    assert events[2]["error"]["name"] == "ZeroDivisionError"
    assert events[3] == {"type": "end", "executionCount": 1, "outcome": "finished"}


async def test_a_stream_is_live(service: Service, box: str) -> None:
    """The first line arrives while the cell still runs."""
    seen: list[tuple[float, bytes]] = []
    begun = time.monotonic()
    await service.call(
        "POST",
        f"/sandboxes/{box}/execute",
        {"code": 'print("first"); time.sleep(0.6); print("last")'},
        headers={"Accept": "application/x-ndjson"},
        streaming_callback=lambda data: seen.append((time.monotonic() - begun, data)),
    )
    first = next(at for at, data in seen if b"first" in data)
    last = next(at for at, data in seen if b"last" in data)
    assert first < 0.4
    assert last - first > 0.4


async def test_a_stream_whose_sandbox_dies(service: Service, box: str) -> None:
    """A stream whose machine ends says so, or ends without `end`, so that nobody takes it for whole."""
    events = await events_of(service, box, 'print("a"); die()')
    assert events[1]["text"] == "a\n"
    assert events[-2]["type"] == "error"
    assert events[-2]["error"]["code"] == "sandbox_died"


async def test_output_beyond_the_limit(service: Service, box: str) -> None:
    """R8: the first 8 Mi characters of 200 MB are kept, the others counted. Memory grows by 48 MiB at most."""
    await service.execute(box, "flood(20)")
    before = resident()
    cell = await service.execute(box, FLOOD_200, timeout=60)
    assert len(cell["stdout"]) == 8 << 20
    assert cell["truncated"]["stdout"] == len("flood! ") * 9362 * 16 * 200 - (8 << 20)
    assert resident() - before <= 48 << 20


@pytest.mark.alone
async def test_r8_a_slow_reader_of_a_stream(service: Service, box: str) -> None:
    """A client that does not read stops the guest, not the server. Memory stays, and others are served meanwhile."""
    before = resident()
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=65536)
    body = b'{"code": "%s", "timeout": 60}' % FLOOD_200.encode()
    head = (
        f"POST /sandboxes/{box}/execute HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n"
        f"Accept: application/x-ndjson\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    assert b"200" in await reader.readline()
    peak = 0
    other = await service.create()
    for _ in range(20):
        begun = time.monotonic()
        await service.run(other, "true")
        assert time.monotonic() - begun < 0.5
        peak = max(peak, resident())
        await asyncio.sleep(0.02)
    assert peak - before <= 32 << 20
    # When the client reads on, everything comes, in order.
    total = 0
    while data := await reader.read(1 << 20):
        total += data.count(b"flood! ")
        if b'{"type":"end"' in data:
            break
        peak = max(peak, resident())
    # A few may be cut in two by our reads.
    assert 9362 * 16 * 200 * 0.99 < total <= 9362 * 16 * 200
    assert peak - before <= 32 << 20
    writer.close()
    await writer.wait_closed()


async def test_a_client_that_hangs_up_interrupts_its_cell(service: Service, box: str) -> None:
    """Closing the connection interrupts the cell, and the next one runs at once."""
    guest = service.guest(box)
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    body = b'{"code": "time.sleep(60)"}'
    head = f"POST /sandboxes/{box}/execute HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\nContent-Length: "
    writer.write(head.encode() + b"%d\r\n\r\n%s" % (len(body), body))
    await eventually(lambda: guest.kernel._cell is not None)
    await asyncio.sleep(0.05)
    writer.close()
    await eventually(lambda: any(isinstance(request, wire.Interrupt) for request in guest.requests))
    begun = time.monotonic()
    await service.execute(box, "1")
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    "body", [{}, {"code": 1}, {"code": "1", "timeout": 0}, {"code": "1", "timeout": 3601}, {"code": None}]
)
async def test_refused(service: Service, box: str, body: dict[str, object]) -> None:
    """A cell without code, or with a timeout out of range, is 400."""
    answer = await service.call("POST", f"/sandboxes/{box}/execute", body)
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")


async def test_large_results(service: Service, box: str) -> None:
    """A display of 20 MB arrives whole."""
    cell = await service.execute(box, 'display({"text/plain": "x" * 20000000})')
    assert len(cell["results"][0]["data"]["text/plain"]) == 20_000_000


# -- executions with an id


async def execution(service: Service, box: str, name: str, **options: object) -> HTTPResponse:
    return await service.call("GET", f"/sandboxes/{box}/executions/{name}", **options)


async def execute_as(service: Service, box: str, name: str, code: str, **headers: str) -> HTTPResponse:
    sent = {"Idempotency-Key": name, **headers}
    return await service.call("POST", f"/sandboxes/{box}/execute", {"code": code}, headers=sent)


def count_of(service: Service, box: str) -> int:
    """How many cells the fake kernel has run."""
    return service.guest(box).kernel._count


async def test_the_same_request_twice_runs_once(service: Service, box: str) -> None:
    """A cell that is sent again with the same id, at once or afterwards, runs once, and all answers are the same."""
    code = 'time.sleep(0.2)\nprint("a")\n6 * 7'
    answers = await asyncio.gather(*(execute_as(service, box, "my:1.x_-", code) for _ in range(3)))
    answers.append(await execute_as(service, box, "my:1.x_-", code))
    assert len({answer.body for answer in answers}) == 1
    cell = json.loads(answers[0].body)
    assert (cell["stdout"], cell["executionCount"], count_of(service, box)) == ("a\n", 1, 1)
    found = json.loads((await execution(service, box, "my:1.x_-")).body)
    assert found == {"id": "my:1.x_-", "status": "finished", "retrySafe": True, "result": cell}


async def test_an_execution_is_found_while_it_runs(service: Service, box: str) -> None:
    """An execution is 404 before its start, then running without a result, then finished with a result or error."""
    assert (await execution(service, box, "e")).code == 404
    running = asyncio.create_task(execute_as(service, box, "e", "time.sleep(0.3)\n1 / 0"))
    await eventually(lambda: count_of(service, box) == 1)
    found = json.loads((await execution(service, box, "e")).body)
    assert found == {"id": "e", "status": "running", "retrySafe": True, "result": None}
    cell = json.loads((await running).body)
    assert cell["error"]["name"] == "ZeroDivisionError"
    assert json.loads((await execution(service, box, "e")).body)["result"] == cell


async def test_other_code_under_the_same_id(service: Service, box: str) -> None:
    """It is refused and not run, also if the id is that of a Jupyter client's request."""
    await execute_as(service, box, "e", "x = 1")
    answer = await execute_as(service, box, "e", "x = 2")
    assert (answer.code, error_of(answer)["error"]) == (409, "conflict")
    assert (await service.execute(box, "x"))["results"][0]["data"] == {"text/plain": "1"}


@pytest.mark.parametrize("name", ["a b", "ü", "x" * 129, "a/b", "\t"])
async def test_an_illegal_id(service: Service, box: str, name: str) -> None:
    """An id that can't be part of a path is refused."""
    answer = await execute_as(service, box, name, "1")
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")
    assert count_of(service, box) == 0


async def test_a_named_cell_outlives_its_client(service: Service, box: str) -> None:
    """A client that has sent an id may hang up. It stops nothing, and finds the outcome later."""
    body = b'{"code": "time.sleep(0.3)\\nprint(1)"}'
    head = f"POST /sandboxes/{box}/execute HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\nIdempotency-Key: e\r\n"
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    await eventually(lambda: count_of(service, box) == 1)
    writer.close()
    cell = json.loads((await execute_as(service, box, "e", "time.sleep(0.3)\nprint(1)")).body)
    assert (cell["stdout"], cell["error"]) == ("1\n", None)
    assert not any(isinstance(request, wire.Interrupt) for request in service.guest(box).requests)


async def test_a_cell_without_a_client_is_not_begun(service: Service, box: str) -> None:
    """A cell without an id never runs if its client hangs up while the cell waits for its turn."""
    first = asyncio.create_task(service.execute(box, "time.sleep(0.4)"))
    await eventually(lambda: count_of(service, box) == 1)
    body = b'{"code": "x = 1"}'
    head = f"POST /sandboxes/{box}/execute HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\nContent-Length: "
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(head.encode() + b"%d\r\n\r\n%s" % (len(body), body))
    kernel = service.sandboxes.get(service.owner, box).guest.kernel
    await eventually(lambda: len(kernel.executions) == 2)
    writer.close()
    assert (await first)["error"] is None
    assert (await service.execute(box, "x"))["error"]["name"] == "NameError"


async def test_an_execution_whose_kernel_ended(service: Service, box: str) -> None:
    """Its status is unknown and a retry is not safe, because nobody knows how far it came. It is not run again."""
    cell = json.loads((await execute_as(service, box, "e", "import os; os._exit(3)")).body)
    assert cell["error"]["code"] == "kernel_restarted"
    found = json.loads((await execution(service, box, "e")).body)
    assert (found["status"], found["retrySafe"], found["result"]) == ("unknown", False, cell)
    assert json.loads((await execute_as(service, box, "e", "import os; os._exit(3)")).body) == cell
    assert count_of(service, box) == 1


@pytest.mark.parametrize("accept", ["application/x-ndjson", "text/event-stream"])
async def test_events_of_an_execution_again(service: Service, box: str, accept: str) -> None:
    """The same events come again, from any number on, by query or by header."""
    answer = await execute_as(service, box, "e", 'print("a")\nprint("b")\n7', Accept=accept)
    events = events_in(answer, accept)
    assert [event["type"] for event in events] == ["started", "stdout", "stdout", "result", "end"]
    assert {event["id"] for event in events} == {"e"}
    assert events_in(await execution(service, box, "e", headers={"Accept": accept}), accept) == events
    for event in events[:-1]:
        after = [each for each in events if each["seq"] > event["seq"]]
        headers = {"Accept": accept, "Last-Event-ID": str(event["seq"])}
        assert events_in(await execution(service, box, "e", headers=headers), accept) == after
        answer = await execution(service, box, f"e?since={event['seq']}", headers={"Accept": accept})
        assert events_in(answer, accept) == after
    for last in (str(events[-1]["seq"]), "999999", str(10**30)):
        answer = await execution(service, box, "e", headers={"Accept": accept, "Last-Event-ID": last})
        assert [event["type"] for event in events_in(answer, accept)] == ["end"]


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "\u00b2", "9" * 5000, ""])
async def test_a_last_event_that_is_no_number(service: Service, box: str, last: str) -> None:
    """Such a header is ignored."""
    await execute_as(service, box, "e", "7")
    answer = await execution(service, box, "e", headers={"Accept": "application/x-ndjson", "Last-Event-ID": last})
    assert [event["type"] for event in events_in(answer)] == ["started", "result", "end"]


async def test_only_so_many_executions_are_remembered(
    service: Service, box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest finished execution is forgotten. While all of them run, another one is refused."""
    monkeypatch.setattr("kernel_gateway.kernel.executions.KEPT", 3)
    for name in "abcd":
        await execute_as(service, box, name, "1")
    assert [(await execution(service, box, name)).code for name in "abcd"] == [404, 200, 200, 200]
    running = [asyncio.create_task(execute_as(service, box, name, "time.sleep(0.3)")) for name in "efg"]
    executions = service.sandboxes.get(service.owner, box).guest.kernel.executions
    await eventually(lambda: {each.id for each in executions.unfinished()} == set("efg"))
    answer = await execute_as(service, box, "h", "1")
    assert (answer.code, error_of(answer)["error"]) == (429, "too_many_requests")
    assert {answer.code for answer in await asyncio.gather(*running)} == {200}


async def test_an_old_execution_tells_what_is_missing(service: Service, box: str) -> None:
    """Messages that the journal has dropped meanwhile are counted. The others, and the end, are there."""
    await execute_as(service, box, "e", 'print("a")\nflood(1)\n7')
    await service.execute(box, "flood(90)", timeout=60)
    found = json.loads((await execution(service, box, "e")).body)
    result = found["result"]
    assert (found["status"], result["executionCount"], result["stdout"]) == ("finished", 1, "")
    assert result["truncated"]["messages"] > 17


async def test_a_cell_among_very_many_requests(service: Service, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Very many requests of another client do not make the server forget the cell that runs."""
    monkeypatch.setattr("kernel_gateway.kernel.kernel.MAX_PENDING", 3)
    kernel = service.sandboxes.get(service.owner, box).guest.kernel
    running = asyncio.create_task(service.execute(box, "time.sleep(0.3)\n7", timeout=5))
    await eventually(lambda: count_of(service, box) == 1)
    for _ in range(10):
        if sending := kernel.send(message.new("shell", "kernel_info_request", {}, session="s"), "s"):
            await sending
    assert (await running)["results"][0]["data"] == {"text/plain": "7"}
    assert (await service.execute(box, "8"))["results"][0]["data"] == {"text/plain": "8"}


async def test_an_export_has_a_limit(service: Service, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs beyond it are counted and left out. The cells after them are there, and several may ask at once."""
    monkeypatch.setattr(rest, "EXPORT_LIMIT", 100_000)
    await service.execute(box, 'print("x" * 200_000)')
    await service.execute(box, "6 * 7")
    answers = await asyncio.gather(*(service.call("GET", f"/sandboxes/{box}/export") for _ in range(4)))
    assert {answer.code for answer in answers} == {200}
    first, second = (cell["outputs"] for cell in json.loads(answers[0].body)["cells"])
    assert "messages of output are missing" in first[-1]["text"]
    assert sum(len(output.get("text", "")) for output in first) < 100_000
    assert second[0]["data"]["text/plain"] == "42"


async def test_a_cell_that_ends_is_not_interrupted(service: Service, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a request interrupts its cell only if that still runs."""
    interrupts: list[float] = []
    monkeypatch.setattr(service.guest(box).kernel, "interrupt", lambda: interrupts.append(time.monotonic()))
    for timeout in (None, 5, None, 5):
        assert (await service.execute(box, "7", timeout=timeout))["error"] is None
    assert interrupts == []
