"""The stream for agents, and executions as a resource: every event, also after a break at any place."""

import asyncio
import base64
import json
from typing import Any

import pytest
from tornado.httpclient import HTTPResponse
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from guest_agent import wire
from tests.api.clients import TIMEOUT, agent, channels
from tests.fakes import Service, error_of, eventually


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def bare(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without the fields that differ from run to run."""
    return without(events, "seq", "id", "executionCount", "at")


def without(events: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in each.items() if name not in names} for each in events]


# -- events

EVERYTHING = """
import sys
from getpass import getpass
from IPython.display import clear_output, update_display
print("out", flush=True)
print("err", file=sys.stderr, flush=True)
display({"text/plain": "a"}, raw=True, display_id="d")
update_display({"text/plain": "b"}, raw=True, display_id="d")
clear_output(wait=True)
input("name: ") + getpass("secret: ")
"""


async def test_every_event(real: Service, real_box: str) -> None:
    """Each thing that happens in a kernel comes as its event, with its fields, numbered and named."""
    async with agent(real, real_box) as client:
        first = await client.receive()
        assert (first["type"], first["state"]) == ("status", "idle")
        await client.send("execute", code=EVERYTHING, id="all")
        events = await client.until("input_request")
        await client.send("input", text="x")
        events += await client.until("input_request")
        await client.send("input", text="y")
        events += await client.until("end", id="all")
        assert all(event["id"] == "all" for event in events)
        numbers = [event["seq"] for event in client.events]
        assert numbers == sorted(numbers)
        count = events[0]["executionCount"]
        events.sort(key=lambda event: event["type"] == "input_request")  # stdin is another channel: no fixed order
        assert without(events, "seq", "id", "at", "changes") == [
            {"type": "started", "executionCount": count, "code": EVERYTHING, "by": {"via": "stream", "name": "cellvm"}},
            {"type": "stdout", "text": "out\n"},
            {"type": "stderr", "text": "err\n"},
            {"type": "display", "data": {"text/plain": "a"}, "metadata": {}, "displayId": "d"},
            {"type": "update", "data": {"text/plain": "b"}, "metadata": {}, "displayId": "d"},
            {"type": "clear", "wait": True},
            {"type": "result", "data": {"text/plain": "'xy'"}, "metadata": {}, "executionCount": count},
            {"type": "end", "executionCount": count, "outcome": "finished"},
            {"type": "input_request", "prompt": "name: ", "password": False},
            {"type": "input_request", "prompt": "secret: ", "password": True},
        ]
        failed = await client.run("1 / 0")
        assert kinds(failed) == ["started", "error", "end"]
        assert failed[1]["error"]["name"] == "ZeroDivisionError"
        assert kinds(await client.run("input()", allowInput=False)) == ["started", "error", "end"]


async def test_who_has_sent_a_cell_and_when(real: Service, real_box: str) -> None:
    """A cell tells its code, its time, and who has sent it by which way. What a client calls itself is cut."""
    kernel = json.loads((await real.call("GET", f"/sandboxes/{real_box}")).body)["kernelID"]
    async with agent(real, real_box, query={"client": "page"}) as client, channels(real, kernel) as jupyter:
        await client.run("1")
        await real.call("POST", f"/sandboxes/{real_box}/execute", {"code": "2"}, headers={"X-Client-Name": "a" * 99})
        await jupyter.ask("execute_request", {"code": "3"})
        for _ in range(2):
            await client.until("end")
        started = [event for event in client.events if event["type"] == "started"]
        assert [(event["code"], event["by"]["via"], event["by"]["name"]) for event in started] == [
            ("1", "stream", "page"), ("2", "execute", "a" * 64), ("3", "jupyter", "tests"),
        ]  # fmt: skip
        moments = [event["at"] for event in client.events if event["type"] in ("started", "end")]
        assert moments == sorted(moments)
        assert len(moments) == 6


async def test_held_cells_wait(real: Service, real_box: str) -> None:
    """Cells of others wait while a client holds them, and its own run. Waiting ones are told. One client holds."""
    async with agent(real, real_box, query={"client": "me", "state": "true"}) as mine, agent(real, real_box) as other:
        await mine.send("hold", seconds=60)
        assert (await mine.until("state", asks=""))[-1]["waiting"] == []
        await other.send("execute", code="print('theirs')", id="theirs")
        await other.send("hold", seconds=60)
        refused = (await other.until("refused"))[-1]
        assert refused["error"]["value"] == "me holds the cells of others"
        (waiting,) = (await mine.until("state", waitingCount=1))[-1]["waiting"]
        assert (waiting["id"], waiting["code"]) == ("theirs", "print('theirs')")
        assert kinds(await mine.run("'mine'")) == ["started", "result", "end"]
        await mine.send("release")
        assert kinds(await other.until("end", id="theirs"))[-3:] == ["started", "stdout", "end"]


async def test_a_hold_ends_with_its_connection(real: Service, real_box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is gone holds nobody for long."""
    monkeypatch.setattr("kernel_gateway.kernel.kernel.HOLD_GRACE", 0.1)
    async with agent(real, real_box) as mine:
        await mine.send("hold", seconds=3600)
        await mine.run("0")
    assert (await real.execute(real_box, "'free'"))["outcome"] == "finished"


async def test_variables(real: Service, real_box: str) -> None:
    """The variables are told to the one who asks, also while a cell runs. Nobody's own code tells a value."""
    async with agent(real, real_box) as client, agent(real, real_box) as other:
        await client.run(
            "import time\n"
            "class Slow:\n    def __repr__(self): ran.append(1); time.sleep(60)\n    __str__ = __len__ = __repr__\n"
            "class Heirs(list):\n    def __iter__(self): ran.append(1); time.sleep(60)\n"
            "ran, slow, heirs = [], Slow(), Heirs('ab')\n"
            "number, text, huge = 6 * 7, 'x' * 10_000, 10 ** 5000\n"
            "rows = [{'a': 1.5, 'b': None}, slow, *range(20)]\n"
            "deep = [[[1]]]; deep.append(deep)"
        )
        await client.send("execute", code="time.sleep(60)", id="runs")
        await client.until("started", id="runs")
        await client.send("variables")
        told = (await client.until("variables"))[-1]["variables"]
        found = {each["name"]: each for each in told}
        assert {name: found[name]["value"] for name in ("ran", "slow", "heirs", "number", "huge", "rows", "deep")} == {
            "ran": "[]",
            "slow": "…",
            "heirs": "…",
            "number": "42",
            "huge": f"{(10**5000).bit_length()} bits",
            "rows": "[{'a': 1.5, 'b': None}, …, 0, 1, 2, 3, 4, 5, 6, 7, …]",
            "deep": "[[1 item], [1 item, 2 items]]",
        }
        assert (found["number"]["type"], found["slow"]["type"]) == ("int", "Slow")
        assert found["text"]["value"] == "'" + "x" * 299
        assert not [name for name in found if name.startswith("_")]
        await client.send("interrupt")
        await other.until("end", id="runs")
        assert "variables" not in kinds(other.events)
        assert {event["id"] for event in other.events if event["type"] == "end"} <= {"runs", client.events[1]["id"]}


async def test_completion(real: Service, real_box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are completed for the one who asks. A busy kernel gives no match, and its cells are as they were."""
    async with agent(real, real_box) as client, agent(real, real_box) as other:
        await client.run("häuser_count = 3")
        await client.send("complete", code="print(häuser_c)", cursor=14, id="one")
        told = (await client.until("completions"))[-1]
        assert (told["matches"], told["start"], told["end"], told["id"]) == (["häuser_count"], 6, 14, "one")
        monkeypatch.setattr("kernel_gateway.api.stream.COMPLETING", 0.2)
        await client.send("execute", code="import time; time.sleep(60)", id="busy")
        await client.until("started", id="busy")
        for cursor, name in ((0, "replaced"), (10_000, "last")):
            await client.send("complete", code="h", cursor=cursor, id=name)
        told = (await client.until("completions", id="last"))[-1]
        assert told["matches"] == []
        await client.send("interrupt")
        await other.until("end", id="busy")
        assert not {"completions", "refused"} & set(kinds(other.events))
        assert "replaced" not in [event.get("id") for event in client.events]


async def test_ends_of_other_requests(real: Service, real_box: str) -> None:
    """What Jupyter's clients ask besides cells has no end in the stream, because it never began there."""
    kernel = json.loads((await real.call("GET", f"/sandboxes/{real_box}")).body)["kernelID"]
    async with agent(real, real_box) as client, channels(real, kernel) as jupyter:
        await jupyter.ask("kernel_info_request")
        assert kinds(await client.run("1")) == ["started", "result", "end"]
        assert kinds(client.events) == ["status", "started", "result", "end"]


async def test_input_is_told_to_all(real: Service, real_box: str) -> None:
    """All clients are told which cell asks, and who has answered, but not what."""
    async with (
        agent(real, real_box, query={"state": "true"}) as asked,
        agent(real, real_box, query={"client": "b"}) as other,
    ):
        await other.send("execute", code="len(input('? '))", id="asks")
        await asked.until("state", asks="asks")
        await other.until("input_request")
        await other.send("input", text="hunter2")
        told = (await asked.until("state", asks=""))[-1]
        assert told["answered"] == {"id": "asks", "by": {"via": "stream", "name": "b"}}
        await other.until("end", id="asks")
        assert "hunter2" not in str(asked.events)


async def test_a_key_in_the_subprotocol(real: Service, real_box: str) -> None:
    """A web page sends its key as a subprotocol, and is answered with the other one."""
    key = base64.urlsafe_b64encode(real.key.encode()).decode().rstrip("=")
    address = f"ws://127.0.0.1:{real.port}/sandboxes/{real_box}/stream"
    async with connect(address, subprotocols=["cellvm.v1", f"cellvm.key.{key}"]) as socket:
        assert socket.subprotocol == "cellvm.v1"
    for wrong in ("cellvm.key.a", "cellvm.key.eA"):
        with pytest.raises(InvalidStatus, match="401"):
            await connect(address, subprotocols=["cellvm.v1", wrong])


async def test_every_event_has_a_number(service: Service, box: str) -> None:
    """Every event has `seq`, also on a silent kernel and in a refusal, because clients resume by it."""
    async with agent(service, box) as client:
        await client.run("1")
        await client.send("execute", code="1", id="not legal!")
        await client.until("refused")
        assert all("seq" in event for event in client.events)
        assert client.events[-1].get("seq", 0) in (0, client.events[-2]["seq"])


async def test_the_kernel_s_own_states(real: Service) -> None:
    """A kernel's end and restart are told, with reason and exit code, and again when there is another kernel."""
    box = await real.create()
    async with agent(real, box) as client:
        events = await client.run("import os; os._exit(3)")
        error = events[-2]["error"]
        assert (error["code"], error["stateKept"]) == ("kernel_restarted", False)
        await client.until("status", state="idle")
        (ended,) = [event for event in client.events if event.get("state") == "restarting"]
        assert (ended["exitCode"], "status 3" in ended["reason"]) == (3, True)
        await client.send("execute", code="import time; time.sleep(60)", id="slow")
        await client.until("started")
        await client.send("restart")
        events = await client.until("status", state="idle")
        assert [event["error"]["code"] for event in events if event["type"] == "error"] == ["kernel_restarted"]
        assert "starting" in [event.get("state") for event in events]
        assert kinds(await client.run("1")) == ["started", "result", "end"]
    await real.call("DELETE", f"/sandboxes/{box}")


async def test_an_interrupt(real: Service, real_box: str) -> None:
    """The running cell ends with KeyboardInterrupt, and its variables stay."""
    async with agent(real, real_box) as client:
        await client.send("execute", code="kept = 1; print('.', flush=True)\nimport time; time.sleep(60)", id="i")
        await client.until("stdout")
        await client.send("interrupt")
        (error,) = [event["error"] for event in await client.until("end", id="i") if event["type"] == "error"]
        assert error["name"] == "KeyboardInterrupt"
        assert (await client.run("kept"))[1]["data"] == {"text/plain": "1"}


async def test_a_timeout(service: Service, box: str) -> None:
    """A cell with a `timeout` is interrupted when it is over."""
    async with agent(service, box) as client:
        events = await client.run("time.sleep(60)", timeout=0.2)
        assert (events[1]["error"]["code"], events[1]["error"]["stateKept"]) == ("exec_timeout", True)


async def test_the_end_of_the_sandbox(service: Service, box: str) -> None:
    """When the sandbox ends its clients hear `dead` and are closed with 4410."""
    async with agent(service, box) as client:
        await client.receive()
        await service.call("DELETE", f"/sandboxes/{box}")
        assert (await client.until("status"))[-1]["state"] == "dead"
        assert await close_code(client.socket) == 4410


async def close_code(socket: Any) -> int:
    async with asyncio.timeout(TIMEOUT):
        await socket.wait_closed()
    return int(socket.close_code)


async def test_a_timeout_counts_from_the_start(service: Service, box: str) -> None:
    """While somebody else's cell runs in the kernel, a cell waits, and its time has not begun."""
    kernel = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)["kernelID"]
    async with channels(service, kernel) as jupyter:
        slow = await jupyter.start("time.sleep(0.6)")
        await jupyter.until_kind("execute_input")
        cell = await service.execute(box, "1", timeout=0.2)
        assert (cell["error"], cell["results"][0]["data"]) == (None, {"text/plain": "1"})
        assert (await jupyter.answer(slow)).reply["status"] == "ok"


# -- one id, one run


async def test_an_id_runs_once(service: Service, box: str) -> None:
    """The same id and code again, while it runs or later, runs nothing. The id with other code is refused."""
    async with agent(service, box) as client, agent(service, box) as other:
        await client.run("n = 0")
        for sender in (client, other, client):
            await sender.send("execute", code="time.sleep(0.1); n = n + 1; print(n)", id="once")
        await client.until("end", id="once")
        await client.send("execute", code="time.sleep(0.1); n = n + 1; print(n)", id="once")
        await client.send("execute", code="n = 100", id="once")
        (refused,) = await client.until("refused")
        assert (refused["id"], refused["error"]["code"]) == ("once", "conflict")
        assert (await client.run("n"))[1]["data"] == {"text/plain": "1"}


@pytest.mark.parametrize("name", ["", "a" * 129, "a b", "a/b", "ä", "\0"])
async def test_ids_that_can_not_be(service: Service, box: str, name: str) -> None:
    """They are refused, and the connection stays."""
    async with agent(service, box) as client:
        await client.send("execute", code="1", id=name)
        assert (await client.until("refused"))[-1]["error"]["code"] == "invalid_request"
        assert kinds(await client.run("1")) == ["started", "result", "end"]


MALFORMED = [
    "", "{", "[]", "7", "null", '{"type": "nope"}', '{"code": "1"}', '{"type": "execute"}', b"\xff\xfe", b"",
    '{"type": "execute", "code": 1}', '{"type": "execute", "code": "1", "timeout": 0}', '{"type": "input"}',
    '{"type": "execute", "code": "1", "timeout": "x"}', '{"type": "execute", "code": "1", "id": 5}', "[" * 100_000,
    '{"type": "' + "ä" * 300 + '"}',
]  # fmt: skip


@pytest.mark.parametrize("frame", MALFORMED, ids=lambda frame: str(frame[:40]))
async def test_malformed_commands(service: Service, box: str, frame: str | bytes) -> None:
    """The connection is closed with 1007. Other clients and the kernel are unharmed."""
    async with agent(service, box) as other:
        async with agent(service, box) as client:
            await client.socket.send(frame)
            assert await close_code(client.socket) == 1007
        assert kinds(await other.run("1")) == ["started", "result", "end"]


async def test_code_that_is_no_text(service: Service, box: str) -> None:
    """Half a surrogate pair is refused or closes the connection, and never reaches the kernel."""
    async with agent(service, box) as client:
        await client.socket.send('{"type": "execute", "code": "\\ud800"}')
        assert await close_code(client.socket) == 1007


# -- several clients, and coming back


async def test_everybody_sees_the_same(service: Service, box: str) -> None:
    """Two clients of the stream see the same events, wherever the cells came from."""
    kernel = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)["kernelID"]
    async with agent(service, box) as first, agent(service, box) as second, channels(service, kernel) as jupyter:
        await first.run('print("a"); 1 / 0')
        await jupyter.run("2")
        await service.execute(box, 'print("c")')
        await second.run('"last"', id="last")
        await first.until("end", id="last")
        assert first.events == second.events
        shown = [event.get("text") or event.get("data") for event in first.events if "text" in event or "data" in event]
        assert shown == ["a\n", {"text/plain": "2"}, "c\n", {"text/plain": "'last'"}]


async def test_from_every_number_on(service: Service, box: str) -> None:
    """A client that comes back with any number gets the following events once, and then new ones."""
    async with agent(service, box, since=0) as client:
        for code in ('print("a"); display({"text/plain": "b"}); 1', "1 / 0", "2"):
            await client.run(code)
        events = client.events[1:]
    for since in sorted({event["seq"] for event in events} | {0, 1}):
        async with agent(service, box, since=since) as late:
            await late.run("3", id=f"new-{since}")
            new = next(at for at, event in enumerate(late.events) if event.get("id") == f"new-{since}")
            old = [event for event in late.events[1:new] if event["seq"] <= events[-1]["seq"]]
            assert old == [event for event in events if event["seq"] > since]


async def test_a_gap_is_told(service: Service, box: str) -> None:
    """A gap tells how much is missing and where. Events that tell the course of things are never missing."""
    async with agent(service, box) as client:
        await client.run('print("early")', id="early")
        await client.send("execute", code="flood(100)", id="flood")
        await client.until("started", id="flood")
    await eventually(lambda: service.sandboxes._sandboxes[box].kernel.executions.get("flood").outcome, 30)
    async with agent(service, box, since=0) as client:
        events = await client.until("end", id="flood")
    missing = sum(event["messages"] for event in events if event["type"] == "gap")
    text = "".join(event["text"] for event in events if event["type"] == "stdout")
    assert missing > 0
    assert missing + text.count("flood! ") // 9362 + text.count("early") == 1601
    course = [(event["type"], event["id"]) for event in events if event["type"] in ("started", "end")]
    assert course == [(kind, name) for name in ("early", "flood") for kind in ("started", "end")]


async def test_a_client_that_leaves_does_not_stop_its_cell(service: Service, box: str) -> None:
    """The client may come back with its number and send its command again, and gets the events it missed."""
    code = 'time.sleep(0.3); print("done")'
    async with agent(service, box) as client:
        await client.send("execute", code=code, id="mine")
        since = (await client.until("started"))[-1]["seq"]
    async with agent(service, box, since=since) as client:
        await client.send("execute", code=code, id="mine")
        events = (await client.until("end", id="mine"))[1:]
        assert bare(events) == [{"type": "stdout", "text": "done\n"}, {"type": "end", "outcome": "finished"}]
    assert not [request for request in service.guest(box).requests if isinstance(request, wire.Interrupt)]


# -- the same over HTTP

CELL = 'print("a")\ndisplay({"text/html": "<b>"})\n1 / 0'


def ndjson(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in body.splitlines()]


def sse(body: bytes) -> list[dict[str, Any]]:
    """Events of a stream of server-sent events, whose ids are their numbers."""
    events = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        events.append(json.loads(fields["data"]))
        assert int(fields["id"]) == events[-1]["seq"]
    return events


async def test_all_ways_carry_the_same_events(service: Service, box: str) -> None:
    """NDJSON, server-sent events and the WebSocket tell the same of the same cell. The last adds whose it is."""
    path = f"/sandboxes/{box}/execute"
    async with agent(service, box) as client:
        found = []
        for accept, read in (("application/x-ndjson", ndjson), ("text/event-stream", sse)):
            answer = await service.call("POST", path, {"code": CELL}, headers={"Accept": accept})
            events = read(answer.body)
            socket = [event for event in await client.until("end") if event.get("id") == events[0]["id"]]
            assert events == without(socket, "code", "by", "at")
            found.append(bare(events))
    assert found[0] == found[1]
    assert kinds(found[0]) == ["started", "stdout", "display", "error", "end"]


async def test_an_execution_from_every_event_on(service: Service, box: str) -> None:
    """With Last-Event-ID, or `since`, an execution's stream goes on where it broke off."""
    headers = {"Idempotency-Key": "k", "Accept": "text/event-stream"}
    whole = sse((await service.call("POST", f"/sandboxes/{box}/execute", {"code": CELL}, headers=headers)).body)
    path = f"/sandboxes/{box}/executions/k"
    for event in whole[:-1]:
        last = {"Accept": "text/event-stream", "Last-Event-ID": str(event["seq"])}
        rest = [each for each in whole if each["seq"] > event["seq"]]
        assert sse((await service.call("GET", path, headers=last)).body) == rest
        lines = await service.call("GET", f"{path}?since={event['seq']}", headers={"Accept": "application/x-ndjson"})
        assert ndjson(lines.body) == rest


async def keyed(service: Service, box: str, code: str, key: str = "k-1") -> HTTPResponse:
    """Run a cell under a key."""
    return await service.call("POST", f"/sandboxes/{box}/execute", {"code": code}, headers={"Idempotency-Key": key})


async def execution(service: Service, box: str, key: str = "k-1") -> dict[str, Any]:
    """The execution with that key, as the server tells it."""
    answer = await service.call("GET", f"/sandboxes/{box}/executions/{key}")
    assert answer.code == 200, answer.body
    return dict(json.loads(answer.body))


async def test_an_execution_outlives_its_client(service: Service, box: str) -> None:
    """With an Idempotency-Key a cell goes on when the client hangs up. The same request again finds the same run."""
    await service.execute(box, "n = 0")
    code = "time.sleep(0.5); n = n + 1; n"
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    body = json.dumps({"code": code}).encode()
    head = f"POST /sandboxes/{box}/execute HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\nIdempotency-Key: k-1\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    guest = service.guest(box)
    await eventually(lambda: guest.kernel._count == 2)
    writer.transport.abort()
    assert await execution(service, box) == {"id": "k-1", "status": "running", "retrySafe": True, "result": None}
    for answer in await asyncio.gather(*(keyed(service, box, code) for _ in range(3))):
        assert json.loads(answer.body)["results"][0]["data"] == {"text/plain": "1"}
    over = await execution(service, box)
    assert (over["status"], over["retrySafe"], over["result"]) == ("finished", True, json.loads(answer.body))
    assert (await keyed(service, box, code)).body == answer.body
    assert not [request for request in guest.requests if isinstance(request, wire.Interrupt)]
    other = await keyed(service, box, "2")
    assert (other.code, error_of(other)["error"]) == (409, "conflict")


async def test_an_execution_whose_kernel_ended(service: Service, box: str) -> None:
    """Its status is unknown and a repeat is not safe. An execution that never existed is 404 and safe to start."""
    answer = await keyed(service, box, "import os; os._exit(3)")
    assert json.loads(answer.body)["error"]["code"] == "kernel_restarted"
    over = await execution(service, box)
    assert (over["status"], over["retrySafe"]) == ("unknown", False)
    answer = await service.call("GET", f"/sandboxes/{box}/executions/never")
    assert (answer.code, "safe to start" in error_of(answer)["hint"]) == (404, True)
    assert (await keyed(service, box, "1", key="a b")).code == 400


async def test_executions_on_the_stream_and_over_http_are_the_same(service: Service, box: str) -> None:
    """A cell started on the WebSocket can be asked for over HTTP by its id, and the other way round."""
    async with agent(service, box) as client:
        await client.run("1 + 1", id="ws")
        status = json.loads((await service.call("GET", f"/sandboxes/{box}/executions/ws")).body)
        assert (status["status"], status["result"]["results"][0]["data"]) == ("finished", {"text/plain": "2"})
        await service.call("POST", f"/sandboxes/{box}/execute", {"code": "3"}, headers={"Idempotency-Key": "http"})
        await client.until("end", id="http")
        await client.send("execute", code="4", id="http")
        assert (await client.until("refused"))[-1]["error"]["code"] == "conflict"
