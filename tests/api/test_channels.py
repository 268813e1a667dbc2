"""Kernel messages over WebSockets, in both layouts: everything that Jupyter's clients do, and must not do."""

import asyncio
import json
import logging
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from guest_agent import wire
from kernel_gateway.api.channels import Channels
from kernel_gateway.held import Held
from tests.api.clients import TIMEOUT, V1, Client, address, agent, channels, opening, raw, read
from tests.fakes import Service, error_of, eventually, serving

ALL_BYTES = bytes(range(256))
TEXT, CLOSE = 1, 8
LAYOUTS = pytest.mark.parametrize("v1", [True, False], ids=["v1", "legacy"])


async def new_kernel(service: Service, **body: Any) -> str:
    answer = await service.call("POST", "/api/kernels", body)
    assert answer.code == 201, answer.body
    return str(json.loads(answer.body)["id"])


@pytest.fixture(scope="module")
async def kernel(real: Service) -> str:
    """One kernel for all tests that leave it alive, because it takes half a second to start."""
    return await new_kernel(real)


@pytest.fixture
async def own(real: Service) -> AsyncIterator[str]:
    """A kernel of the test's own, for a test that would disturb others."""
    kernel = await new_kernel(real)
    yield kernel
    await real.call("DELETE", f"/api/kernels/{kernel}")


@pytest.fixture(params=[True, False], ids=["v1", "legacy"])
async def client(request: pytest.FixtureRequest, real: Service, kernel: str) -> AsyncIterator[Client]:
    """A client of that kernel in each layout. Afterwards the kernel must still work."""
    async with channels(real, kernel, v1=request.param) as client:
        yield client
        assert (await client.run("6 * 7")).value == "42"


# -- messages


async def test_the_messages_of_a_cell(client: Client) -> None:
    """The messages come in Jupyter's order, busy first and idle last, and their numbers never fall."""
    code = "import sys\nprint('a', flush=True)\nprint('b', file=sys.stderr, flush=True)\ndisplay({'x': 1})\n1 + 1"
    answer = await client.run(code)
    kinds = [message.state or message.kind for message in answer.messages if message.channel == "iopub"]
    assert kinds == ["busy", "execute_input", "stream", "stream", "display_data", "execute_result", "idle"]
    assert [message.content["name"] for message in answer.all("stream")] == ["stdout", "stderr"]
    assert (answer.text, answer.value, answer.reply["status"]) == ("a\nb\n", "2", "ok")
    assert [message.channel for message in answer.replies] == ["shell"]
    numbers = [message.seq for message in client.messages]
    assert numbers == sorted(set(numbers))
    assert len({message.header["session"] for message in client.messages}) == 1


async def test_a_cell_that_raises(client: Client) -> None:
    """The error is published and replied. Cells that wait behind it are aborted, as their client asked."""
    first = await client.start("import time; time.sleep(0.3); 1 / 0")
    second = await client.start("print('never')")
    answer = await client.answer(first)
    (error,) = answer.all("error")
    assert error.content["ename"] == answer.reply["ename"] == "ZeroDivisionError"
    aborted = await client.answer(second)
    assert (aborted.reply["status"], aborted.text) == ("aborted", "")


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("kernel_info_request", {}, {"implementation": "ipython", "status": "ok"}),
        ("complete_request", {"code": "zip", "cursor_pos": 3}, {"matches": ["zip"], "cursor_start": 0}),
        ("inspect_request", {"code": "zip", "cursor_pos": 3, "detail_level": 0}, {"found": True}),
        ("history_request", {"hist_access_type": "tail", "n": 1, "output": False, "raw": True}, {"status": "ok"}),
        ("is_complete_request", {"code": "for x in y:"}, {"status": "incomplete", "indent": "    "}),
        ("comm_info_request", {}, {"comms": {}}),
    ],
)
async def test_requests(client: Client, kind: str, content: dict[str, Any], expected: dict[str, Any]) -> None:
    """Completion, inspection, history and the like are answered by the kernel itself."""
    answer = await client.ask(kind, content)
    assert answer.replies[0].kind == kind.replace("request", "reply")
    assert expected.items() <= answer.reply.items()
    assert [message.state for message in answer.messages if message.channel == "iopub"] == ["busy", "idle"]


@pytest.mark.parametrize(
    ("code", "match"),
    [
        ("import json; json.lo", "loads"),
        ("import json\njson.lo", "loads"),
        ("import colorsys as c\nc.rgb_to_h", "rgb_to_hsv"),
        ("from os import path\nprint(path.joi", "join"),
        ("from collections import Counter\nCounter().most_c", "most_common"),
        ("from collections import Counter as Tally\nTal", "Tally"),
        ("class A:\n    def method(self): pass\na = A()\na.me", "method"),
    ],
)
async def test_completion_in_the_first_cell(client: Client, code: str, match: str) -> None:
    """What a cell imports is completed before the cell has run, and nothing is imported for it."""
    await client.run("import sys; before = set(sys.modules)")
    answer = await client.ask("complete_request", {"code": code, "cursor_pos": len(code)})
    assert match in [text.rpartition(".")[2] for text in answer.reply["matches"]]
    assert (await client.run("'colorsys' in set(sys.modules) - before, 'json' in globals()")).value == "(False, False)"


async def test_completion_of_the_users_own_names(client: Client) -> None:
    """A name of the user's own comes before an import of the same name, and goes with its variable."""
    await client.run("json = 'text'")
    code = "import json\njson."
    matches = (await client.ask("complete_request", {"code": code, "cursor_pos": len(code)})).reply["matches"]
    assert any(text.endswith("upper") for text in matches)
    await client.run("del json")
    matches = (await client.ask("complete_request", {"code": code, "cursor_pos": len(code)})).reply["matches"]
    assert any(text.endswith("loads") for text in matches)


ECHO = """
from comm import create_comm
def opened(comm, message):
    comm.on_msg(lambda message: comm.send({"n": len(message["buffers"])}, buffers=message["buffers"]))
    comm.send({"opened": message["content"]["data"]}, buffers=message["buffers"])
get_ipython().kernel.comm_manager.register_target("echo", opened)
"""


async def test_comms_carry_all_bytes(client: Client) -> None:
    """Buffers of all byte values go both ways unchanged, also empty and large ones, whoever opened the comm."""
    await client.run(ECHO)
    comm = uuid.uuid4().hex
    await client.send("comm_open", {"comm_id": comm, "target_name": "echo", "data": {"a": 1}}, buffers=[ALL_BYTES])
    opened = await client.until_kind("comm_msg")
    assert (opened.content["data"], opened.buffers) == ({"opened": {"a": 1}}, [ALL_BYTES])
    buffers = [ALL_BYTES, b"", b"\xff\xfe", ALL_BYTES * 4000]
    await client.send("comm_msg", {"comm_id": comm, "data": {}}, buffers=buffers)
    echoed = await client.until_kind("comm_msg")
    assert (echoed.content["data"], echoed.buffers) == ({"n": 4}, buffers)
    await client.send("comm_msg", {"comm_id": comm, "data": {}})
    assert (await client.until_kind("comm_msg")).content["data"] == {"n": 0}
    answer = await client.run("c = create_comm('front', data={'b': 2}, buffers=[bytes(range(256))])")
    (own,) = answer.all("comm_open")
    assert (own.content["target_name"], own.content["data"], own.buffers) == ("front", {"b": 2}, [ALL_BYTES])
    await client.send("comm_close", {"comm_id": comm, "data": {}})


@LAYOUTS
async def test_large_messages(real: Service, own: str, v1: bool) -> None:
    """20 MB of display and a buffer of 20 MB each way arrive whole."""
    async with channels(real, own, v1=v1) as client:
        answer = await client.run("display({'text/plain': 'x' * 20_000_000}, raw=True)")
        assert len(answer.all("display_data")[0].content["data"]["text/plain"]) == 20_000_000
        await client.run(ECHO)
        buffer = ALL_BYTES * 80_000
        fields = {"comm_id": uuid.uuid4().hex, "target_name": "echo", "data": {}}
        await client.send("comm_open", fields, buffers=[buffer])
        assert (await client.until_kind("comm_msg")).buffers == [buffer]


# -- input


async def test_input(client: Client, real: Service, kernel: str) -> None:
    """A cell asks and its client answers. A password is marked as one. Other clients are not asked."""
    async with channels(real, kernel) as other:
        request = await client.start("from getpass import getpass\nprint(input('name: ') + getpass('secret: '))")
        for prompt, password, value in (("name: ", False, "a\u00e4"), ("secret: ", True, "b")):
            asked = await client.until_kind("input_request")
            assert (asked.channel, asked.parent["msg_id"]) == ("stdin", request)
            assert (asked.content["prompt"], asked.content["password"]) == (prompt, password)
            await client.send("input_reply", {"value": value, "status": "ok"}, "stdin", parent=asked.header)
        assert (await client.answer(request)).text == "aäb\n"
        await other.until(lambda message: message.state == "idle" and message.parent.get("msg_id") == request)
        assert {message.channel for message in other.messages} == {"iopub"}


async def test_nobody_to_ask(client: Client) -> None:
    """A client that can't answer says so, and its cell fails at once."""
    answer = await client.run("input()", allow_stdin=False)
    assert answer.reply["ename"] == "StdinNotImplementedError"


# -- control


async def test_control_passes_a_busy_shell(client: Client) -> None:
    """A request on the control channel is answered while a cell runs."""
    request = await client.start("import time; time.sleep(1.5)")
    await client.until_kind("execute_input")
    begun = time.monotonic()
    answer = await client.ask("kernel_info_request", channel="control")
    assert [message.channel for message in answer.replies] == ["control"]
    debugger = await client.ask("debug_request", {"type": "request", "seq": 1, "command": "debugInfo"}, "control")
    assert debugger.reply["success"] is True
    assert "breakpoints" in debugger.reply["body"]
    assert time.monotonic() - begun < 1
    assert not client.answers[request].is_over
    await client.answer(request)


async def test_subshells(client: Client) -> None:
    """A subshell runs cells beside the main shell. The header, which passes untouched, says which one is meant."""
    created = await client.ask("create_subshell_request", channel="control")
    subshell = created.reply["subshell_id"]
    slow = await client.start("import time; time.sleep(1.5)")
    await client.until_kind("execute_input")
    content = {"code": "6 * 7", "silent": False, "store_history": False, "allow_stdin": False}
    answer = await client.answer(await client.send("execute_request", content, subshell_id=subshell))
    assert answer.value == "42"
    assert answer.messages[0].parent["subshell_id"] == subshell
    assert not client.answers[slow].is_over
    listed = await client.ask("list_subshell_request", channel="control")
    assert listed.reply["subshell_id"] == [subshell]
    await client.ask("delete_subshell_request", {"subshell_id": subshell}, "control")
    await client.answer(slow)


@pytest.mark.parametrize("by", ["message", "REST"])
async def test_an_interrupt(client: Client, real: Service, kernel: str, by: str) -> None:
    """An interrupt, by message or by REST, raises KeyboardInterrupt in the running cell, and variables stay."""
    await client.run("kept = 1")
    request = await client.start("import time; print('.', flush=True); time.sleep(60)")
    await client.until_kind("stream")
    begun = time.monotonic()
    if by == "message":
        await client.ask("interrupt_request", channel="control")
    else:
        assert (await real.call("POST", f"/api/kernels/{kernel}/interrupt")).code == 204
    answer = await client.answer(request)
    assert answer.reply["ename"] == "KeyboardInterrupt"
    assert time.monotonic() - begun < 1.5
    assert (await client.run("kept")).value == "1"


async def test_an_interrupt_overtakes_output(real: Service, own: str) -> None:
    """While 20 MB are under way to the client, an interrupt reaches the kernel in under a second."""
    async with channels(real, own) as client:
        code = """
            import time
            try:
                for _ in range(20):
                    print("x" * 1_000_000, flush=True)
                time.sleep(30)
            except KeyboardInterrupt:
                at = time.time()
        """
        for by in ("message", "REST"):
            request = await client.start(code)
            await client.until_kind("stream")
            sent = time.time()
            if by == "message":
                await client.send("interrupt_request", {}, "control")
            else:
                await real.call("POST", f"/api/kernels/{client.kernel}/interrupt")
            await client.answer(request)
            assert 0 < float((await client.run("at")).value) - sent < 1


async def test_20_000_flushed_prints(real: Service, own: str) -> None:
    """Not one line is dropped, and they come in order."""
    async with channels(real, own) as client:
        answer = await client.run("for n in range(20_000): print(n, flush=True)", timeout=60)
        assert answer.text == "".join(f"{n}\n" for n in range(20_000))


# -- the end of a kernel


@LAYOUTS
async def test_a_shutdown_ends_the_sandbox(real: Service, own: str, v1: bool) -> None:
    """The reply comes, every client is closed with 4410, and the kernel is gone for good."""
    async with channels(real, own, v1=v1) as client, channels(real, own) as other:
        await client.send("shutdown_request", {"restart": False}, "control")
        await client.until(lambda message: (message.kind, message.channel) == ("shutdown_reply", "control"))
        assert [await client.close_code(), await other.close_code()] == [4410, 4410]
    await eventually(lambda: len(real.sandboxes) <= 1)
    assert (await real.call("GET", f"/api/kernels/{own}")).code == 404


DEATHS = [
    ("os._exit(3)", {"exitCode": 3}, "status 3"),
    ("os.kill(os.getpid(), 9)", {"exitCode": 137, "signal": 9}, "SIGKILL"),
]


@LAYOUTS
@pytest.mark.parametrize(("code", "cause", "says"), DEATHS, ids=["exit", "SIGKILL"])
async def test_a_kernel_that_ends(
    real: Service, own: str, v1: bool, code: str, cause: dict[str, int], says: str
) -> None:
    """Its requests end with an error. All clients hear `restarting` and why, then `idle`. The next cell works."""
    async with channels(real, own, v1=v1) as client, channels(real, own) as other:
        running = await client.start(f"import os, time; print('.', flush=True); time.sleep(0.2); {code}")
        waiting = await other.start("print('never')")
        restarting = (await client.until_state("restarting"))[-1]
        assert cause.items() <= restarting.metadata["cellvm"].items()
        assert says in restarting.metadata["cellvm"]["reason"]
        answer = await client.answer(running)
        kinds = [message.state or message.kind for message in answer.messages]
        assert kinds == ["busy", "execute_input", "stream", "error", "execute_reply", "idle"]
        assert says in answer.reply["evalue"]
        lost = await other.answer(waiting)
        assert (lost.reply["status"], lost.text) == ("error", "")
        early = await client.start("1 + 1")  # there is no kernel now
        await client.until_state("idle")
        assert (await client.answer(early)).value == "2"
        assert (await other.run("2 + 2")).value == "4"


async def test_a_shutdown_for_a_restart(real: Service, own: str) -> None:
    """A shutdown that announces a restart is followed by a fresh kernel."""
    async with channels(real, own) as client:
        await client.run("x = 1")
        await client.send("shutdown_request", {"restart": True}, "control")
        await client.until_state("idle")
        assert (await client.run("x")).reply["ename"] == "NameError"


@LAYOUTS
async def test_a_restart(real: Service, own: str, v1: bool) -> None:
    """Running cells end with an error, clients hear `starting` and `idle`, and requests sent meanwhile wait."""
    async with channels(real, own, v1=v1) as client:
        running = await client.start("import time; x = 1; time.sleep(60)")
        await client.until_kind("execute_input")
        restarting = asyncio.create_task(real.call("POST", f"/api/kernels/{client.kernel}/restart"))
        answer = await client.answer(running)
        assert (answer.reply["ename"], answer.all("error")[0].content["ename"]) == ("KernelRestarted",) * 2
        early = await client.start("x")
        told = await client.until_state("idle")
        assert "starting" in [message.state for message in told]
        assert (await restarting).code == 200
        assert (await client.answer(early)).reply["ename"] == "NameError"


# -- connections


async def test_a_session_connects_again(service: Service) -> None:
    """The newer connection of a session closes the older one with 1000. Other sessions stay."""
    kernel = await new_kernel(service)
    async with channels(service, kernel, "mine") as first, channels(service, kernel, "other") as other:
        async with channels(service, kernel, "mine") as second:
            assert await first.close_code() == 1000
            assert (await second.run("1")).value == "1"
        assert (await other.run("2")).value == "2"
        model = json.loads((await service.call("GET", f"/api/kernels/{kernel}")).body)
        assert model["connections"] == 1


async def test_connections_of_one_key_are_bounded(tmp_path: Path) -> None:
    """A connection beyond the limit is refused with 429 before the upgrade, and nobody else notices."""
    async with serving(tmp_path, max_connections=2) as service:
        box = await service.create()
        kernel = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)["kernelID"]
        answer = await service.call("POST", "/api/kernels", {}, key=service.other_key)
        foreign = json.loads(answer.body)["id"]
        async with channels(service, kernel) as first:
            async with agent(service, box) as second:
                for path in (f"/api/kernels/{kernel}/channels", f"/sandboxes/{box}/stream"):
                    with pytest.raises(InvalidStatus) as refused:
                        await opening(address(service, path), service.key)
                    error = json.loads(refused.value.response.body)
                    assert (refused.value.response.status_code, error["error"]) == (429, "too_many_requests")
                    assert "2 WebSockets" in error["message"]
                async with channels(service, foreign, key=service.other_key) as other:
                    assert (await other.run("1")).value == "1"
                assert (await first.run("2")).value == "2"
                assert (await second.run("3"))[-1]["type"] == "end"
            await eventually(lambda: next(iter(service.sandboxes._sandboxes.values())).kernel.connections == 1)
            async with channels(service, kernel) as third:
                assert (await third.run("4")).value == "4"


async def test_large_messages_of_one_key_are_bounded(tmp_path: Path) -> None:
    """A key's unfinished messages are what may be held for it at most. The connection that goes beyond is closed with
    1013. Small messages, other keys and later large ones pass."""
    async with serving(tmp_path, held=Held(most=4 << 20)) as service:
        kernel = await new_kernel(service)
        answer = await service.call("POST", "/api/kernels", {}, key=service.other_key)
        foreign = json.loads(answer.body)["id"]
        large, finished = "1" + " " * 1_000_000, asyncio.Event()

        async def half() -> AsyncIterator[str]:
            yield large
            await finished.wait()

        async with channels(service, kernel) as other, AsyncExitStack() as stack:
            for _ in range(4):
                client = await stack.enter_async_context(channels(service, kernel, v1=False))
                sending = asyncio.create_task(client.socket.send(half()))
                stack.push_async_callback(asyncio.wait, [sending])
                stack.callback(finished.set)
                await (await client.socket.ping())
            async with channels(service, kernel) as fifth:
                await fifth.start(large)
                assert await fifth.close_code() == 1013
            assert (await other.run("2")).value == "2"
            async with channels(service, foreign, key=service.other_key) as neighbour:
                assert (await neighbour.run(large)).value == "1"
        async with channels(service, kernel) as later:
            assert (await later.run(large)).value == "1"


async def test_clients_that_go_during_the_upgrade(service: Service, box: str) -> None:
    """A client that resets its connection at any moment of the upgrade leaves no traceback in the log and no count."""
    head = (
        f"GET /sandboxes/{box}/stream?token={service.key} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    )
    for turns in range(20):
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(head.encode())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a close is a reset
            for _ in range(turns):
                await asyncio.sleep(0)
    sandbox = service.sandboxes.get(service.owner, box)
    async with agent(service, box) as last:
        await last.run("1")
        await eventually(lambda: sandbox.guest.kernel.connections == 1)


async def test_a_connection_that_fails(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the server closes the connection with 1011 and is logged. Other connections and the kernel go on."""
    logged = BufferingHandler(10)
    logger = logging.Logger("apart from the tests' own check for tracebacks")
    logger.addHandler(logged)
    monkeypatch.setattr("kernel_gateway.api.socket.log", logger)
    box = await service.create()
    kernel = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)["kernelID"]

    def frames(channels: Channels, records: object) -> list[str | bytes]:
        raise RuntimeError("said by a test")

    async with channels(service, kernel) as client, agent(service, box) as other:
        monkeypatch.setattr(Channels, "frames", frames)
        await client.start("1")
        assert await client.close_code() == 1011
        assert (await other.run("2"))[-1]["type"] == "end"
    (record,) = logged.buffer
    assert (record.levelno, "said by a test" in str(record.exc_info)) == (logging.ERROR, True)


def masked(opcode: int, payload: bytes) -> bytes:
    """A client's frame (RFC 6455, 5.2). A mask of zeros leaves the payload as it is."""
    size = len(payload)
    head = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return bytes([0x80 | opcode]) + head + bytes(4) + payload


async def opcode(reader: asyncio.StreamReader) -> int | None:
    """Read one frame of the server and return what it is; None at the end."""
    try:
        first, size = await reader.readexactly(2)
        if size > 125:
            size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
        await reader.readexactly(size)
    except asyncio.IncompleteReadError:
        return None
    return first & 0xF


@pytest.mark.parametrize("closes", ["server", "newer", "client"])
async def test_no_data_follows_a_close_frame(service: Service, closes: str) -> None:
    """Whoever closes a connection in the middle of a flood, the server's Close frame is the last that comes. Another
    client gets the whole flood meanwhile."""
    kernel = await new_kernel(service)
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=1 << 20)
    head = (
        f"GET /api/kernels/{kernel}/channels?session_id=mine&token={service.key} HTTP/1.1\r\nHost: x\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    )
    writer.write(head.encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
    async with AsyncExitStack() as stack:
        other = await stack.enter_async_context(channels(service, kernel))
        flood = asyncio.create_task(other.run("flood(20)"))
        assert await opcode(reader) == TEXT
        if closes == "newer":
            await stack.enter_async_context(channels(service, kernel, "mine"))
        else:
            writer.write(masked(CLOSE, b"") if closes == "client" else masked(TEXT, b"nonsense"))
        while (last := await opcode(reader)) == TEXT:
            pass
        rest = asyncio.create_task(reader.read())
        assert len((await flood).text) > 20_000_000
        writer.write(masked(CLOSE, b""))  # the answer, for which the server keeps the connection open
        assert (last, await rest) == (CLOSE, b"")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("state", ["idle", "busy", "stalled", "restarting", "dead"])
async def test_an_upgrade_does_not_wait(service: Service, state: str) -> None:
    """Whatever the kernel does, the connection opens at once, and tells the kernel's state."""
    kernel = await new_kernel(service)
    guest = service.driver.machines[0].guest
    async with AsyncExitStack() as stack:
        if state == "busy":
            other = await stack.enter_async_context(channels(service, kernel))
            await other.start("time.sleep(1)")
            await other.until_kind("execute_input")
        elif state == "stalled":
            guest.stall()
        elif state in ("restarting", "dead"):
            status = wire.KernelStatus(state=state, reason="said by a test")
            await guest.send(wire.encode(wire.FrameType.EVENT, wire.EVENTS, status))
            sandbox = next(iter(service.sandboxes._sandboxes.values()))
            await eventually(lambda: sandbox.kernel.state == state)
        begun = time.monotonic()
        async with channels(service, kernel) as client:
            assert time.monotonic() - begun < 0.5
            if state in ("restarting", "dead"):
                told = await client.receive()
                assert told.state == {"restarting": "starting", "dead": "dead"}[state]


async def test_a_dead_kernel_answers(service: Service) -> None:
    """Requests to a kernel that is dead for good end with an error that says so. A restart revives the kernel."""
    kernel = await new_kernel(service)
    status = wire.KernelStatus(state="dead", reason="said by a test")
    await service.driver.machines[0].guest.send(wire.encode(wire.FrameType.EVENT, wire.EVENTS, status))
    async with channels(service, kernel) as client:
        await client.until_state("dead")
        answer = await client.run("1")
        assert (answer.reply["status"], "said by a test" in answer.reply["evalue"]) == ("error", True)
        assert (await service.call("POST", f"/api/kernels/{kernel}/restart")).code == 200
        assert (await client.run("1")).value == "1"


async def test_interleaved_clients(real: Service, kernel: str) -> None:
    """Published messages go to everybody. A reply goes only to the client that asked."""
    async with channels(real, kernel, v1=True) as first, channels(real, kernel, v1=False) as second:
        cells = [(client, n, await client.start(f"print({n})")) for n in range(20) for client in (first, second)]
        for asking, n, request in cells:
            assert (await asking.answer(request)).text == f"{n}\n"
        last = await first.run("'last'")  # no message of another cell can come after this one
        await second.until(lambda message: message.parent.get("msg_id") == last.messages[0].parent["msg_id"])
        for asking, n, request in cells:
            other = second if asking is first else first
            assert (other.answers[request].text, other.answers[request].replies) == (f"{n}\n", [])


async def test_forged_sessions(real: Service, kernel: str) -> None:
    """A client may write another's session or message id into its headers, but replies go to the right client."""
    async with channels(real, kernel) as victim, channels(real, kernel) as forger:
        slow = await victim.start("import time; time.sleep(0.5); 'mine'")
        await victim.until_kind("execute_input")
        content = {"code": "'forged'", "silent": False, "store_history": True, "allow_stdin": False}
        await forger.send("execute_request", content, session=victim.session, msg_id=slow)
        forged = await forger.send("execute_request", content, session=victim.session)
        answer = await forger.answer(forged)
        assert (answer.value, len(answer.replies)) == ("'forged'", 1)
        answer = await victim.answer(slow)
        assert answer.all("execute_result")[0].content["data"]["text/plain"] == "'mine'"
        assert (await victim.run("1")).value == "1"
        assert not victim.answers[forged].replies
        assert not forger.answers[slow].replies


# -- clients as they are

CELL = {"silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
CLIENTS: dict[str, dict[str, Any]] = {
    "smolagents": {
        "header": {"username": "anonymous", "session": "s", "msg_type": "execute_request", "version": "5.0"},
        "parent_header": {}, "metadata": {},
    },
    "AutoGen": {
        "header": {"username": "autogen", "version": "5.0", "session": "s", "msg_type": "execute_request",
                   "date": "2026-01-01T00:00:00+00:00"},
        "parent_header": {}, "channel": "shell", "metadata": {}, "buffers": {},
    },
    "Open WebUI": {
        "header": {"msg_type": "execute_request", "username": "user", "session": "s", "date": "", "version": "5.3"},
        "parent_header": {}, "metadata": {}, "channel": "shell",
    },
    "Enterprise Gateway": {
        "header": {"username": "", "version": "5.0", "session": "", "msg_type": "execute_request"},
        "parent_header": {}, "channel": "shell", "metadata": {}, "buffers": {},
    },
    "jupyter_kernel_client": {
        "header": {"username": "me", "version": "5.3", "session": "s", "msg_type": "execute_request",
                   "date": "2026-01-01T00:00:00Z"},
        "msg_type": "execute_request", "parent_header": {}, "channel": "shell", "metadata": {}, "buffers": [],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CLIENTS)
async def test_clients_as_they_are(real: Service, kernel: str, name: str) -> None:
    """Channel, buffers, date and session may be missing. One-part frames, keys in the query and compression work."""
    message = {**CLIENTS[name], "content": {**CELL, "code": "print(6 * 7)"}}
    message["header"] = {**message["header"], "msg_id": uuid.uuid4().hex}
    uri = address(real, f"/api/kernels/{kernel}/channels", token=real.key)
    async with opening(uri, None, v1=False, compression="deflate") as socket, asyncio.timeout(TIMEOUT):
        text = json.dumps(message).encode()
        one_part = (1).to_bytes(4, "big") + (8).to_bytes(4, "big") + text
        await socket.send(one_part if name == "jupyter_kernel_client" else text.decode())
        found = {"stream": "", "execute_reply": ""}
        is_idle = False
        while not (is_idle and found["execute_reply"]):
            got = json.loads(await socket.recv())
            if got["parent_header"].get("msg_id") != message["header"]["msg_id"]:
                continue
            if got["msg_type"] in found:
                found[got["msg_type"]] += got["content"].get("text", "") or got["content"]["status"]
            is_idle = is_idle or got["content"].get("execution_state") == "idle"
    assert found == {"stream": "42\n", "execute_reply": "ok"}


# -- what is refused

HEADER = b'{"msg_id": "1", "msg_type": "execute_request", "session": "s", "username": "u", "version": "5.4"}'


def v1_frame(*parts: bytes) -> bytes:
    offsets = [8 * (len(parts) + 2)]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    return b"".join(number.to_bytes(8, "little") for number in (len(offsets), *offsets)) + b"".join(parts)


GOOD = [b"shell", HEADER, b"{}", b"{}", b"{}"]
MALFORMED_V1 = {
    "empty": b"",
    "short": b"\x01\x02",
    "no table": (1 << 62).to_bytes(8, "little"),
    "huge count": (2**64 - 1).to_bytes(8, "little") * 4,
    "offsets beyond the end": v1_frame(*GOOD)[:-1],
    "offsets that fall": (6).to_bytes(8, "little")
    + b"".join(n.to_bytes(8, "little") for n in (56, 90, 60, 61, 62, 63)),
    "too few parts": v1_frame(b"shell", HEADER, b"{}"),
    "header is no JSON": v1_frame(b"shell", b"{", b"{}", b"{}", b"{}"),
    "header is a list": v1_frame(b"shell", b"[]", b"{}", b"{}", b"{}"),
    "header without an id": v1_frame(b"shell", b'{"msg_type": "x"}', b"{}", b"{}", b"{}"),
    "content is null": v1_frame(*GOOD[:4], b"null"),
    "metadata is deep": v1_frame(*GOOD[:3], b'{"a":' + b"[" * 100_000, b"{}"),
    "content is not UTF-8": v1_frame(*GOOD[:4], b'{"a": "\xff"}'),
    "header is not UTF-8": v1_frame(b"shell", HEADER.replace(b'"u"', b'"\xff"'), b"{}", b"{}", b'{"code": "1"}'),
}
LEGACY = {"header": json.loads(HEADER), "parent_header": {}, "metadata": {}, "content": {}, "channel": "shell"}
MALFORMED_LEGACY: dict[str, str | bytes] = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "a number": "7",
    "deep": "[" * 100_000,
    "no header": json.dumps({**LEGACY, "header": None}),
    "header without an id": json.dumps({**LEGACY, "header": {"msg_type": "x"}}),
    "content is a list": json.dumps({**LEGACY, "content": []}),
    "channel is a number": json.dumps({**LEGACY, "channel": 3}),
    "binary, empty": b"",
    "binary, huge count": b"\xff" * 12,
    "binary, offsets beyond the end": b"\0\0\0\1\0\0\0\xff{}",
    "binary, no JSON": b"\0\0\0\1\0\0\0\x08\xff\xfe\xfd",
}
FORBIDDEN = [b"iopub", b"hb", b"", b"SHELL", b"shell\0", b"no" * 5]


async def refused(service: Service, kernel: str, frame: str | bytes, v1: bool) -> int:
    """The code with which a frame is answered. Another client of the kernel must not notice."""
    async with channels(service, kernel) as other:
        async with channels(service, kernel, v1=v1) as client:
            await client.socket.send(frame)
            code = await client.close_code(5)
        assert (await other.run("1 + 1")).value == "2"
    return code


@pytest.mark.parametrize("name", MALFORMED_V1)
async def test_malformed_v1_frames(real: Service, kernel: str, name: str) -> None:
    """1007, and the kernel is unharmed."""
    assert await refused(real, kernel, MALFORMED_V1[name], v1=True) == 1007


@pytest.mark.parametrize("name", MALFORMED_LEGACY)
async def test_malformed_legacy_frames(real: Service, kernel: str, name: str) -> None:
    """1007, and the kernel is unharmed."""
    assert await refused(real, kernel, MALFORMED_LEGACY[name], v1=False) == 1007


@LAYOUTS
@pytest.mark.parametrize("channel", FORBIDDEN)
async def test_channels_that_are_not_for_clients(real: Service, kernel: str, channel: bytes, v1: bool) -> None:
    """The connection is closed with 1008, and the kernel is unharmed."""
    frame = v1_frame(channel, *GOOD[1:]) if v1 else json.dumps({**LEGACY, "channel": channel.decode()})
    expected = 1008 if v1 or channel else None  # in the legacy layout no channel means shell
    if expected:
        assert await refused(real, kernel, frame, v1) == expected


@pytest.mark.parametrize("fragmented", [False, True])
@LAYOUTS
async def test_oversized_messages(tmp_path: Path, v1: bool, fragmented: bool) -> None:
    """A message over the limit, in one frame or many, closes the connection with 1009. One just below passes."""
    async with serving(tmp_path, max_message=1 << 20) as service:
        kernel = await new_kernel(service)
        async with channels(service, kernel) as other:
            async with channels(service, kernel, v1=v1) as client:
                assert (await client.run("1" + " " * ((1 << 20) - 2000))).value == "1"
                frame: Any = b"x" * (2 << 20) if v1 else "x" * (2 << 20)
                try:
                    await client.socket.send([frame[:1000], frame[1000:]] if fragmented else frame)
                except ConnectionClosed:
                    pass  # the server has closed before all of it was sent
                assert await client.close_code() == 1009
            assert (await other.run("2")).value == "2"


@pytest.mark.parametrize(
    ("name", "query", "status"),
    [("x", "", 404), ("01234567-89ab-cdef-0123-456789abcdef", "", 404), ("{box}", "", 404), ("..", "", 404),
     ("{kernel}", "since=-1", 400), ("{kernel}", "since=x", 400), ("{kernel}", "since=999", 400),
     ("{kernel}", "since=99999999999999999999", 400), ("{kernel}", "session_id=" + "s" * 201, 400)],
)  # fmt: skip
async def test_upgrades_that_are_refused(service: Service, box: str, name: str, query: str, status: int) -> None:
    """A missing kernel or an invalid query is an HTTP error before the upgrade."""
    kernel = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)["kernelID"]
    path = f"/api/kernels/{name.format(box=box, kernel=kernel)}/channels?{query}"
    with pytest.raises(InvalidStatus) as error:
        await opening(address(service, path), service.key)
    assert error.value.response.status_code == status
    assert json.loads(error.value.response.body)["code"] == status


async def test_what_is_no_upgrade(service: Service, box: str) -> None:
    """A plain request, or another method, on a WebSocket's path gets 400 in the error's shape."""
    kernel = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)["kernelID"]
    for method in ("GET", "POST"):
        answer = await service.call(method, f"/api/kernels/{kernel}/channels")
        assert error_of(answer)["error"] in ("invalid_request", "method_not_allowed")
    status, _ = await raw(
        service, f"GET /api/kernels/{kernel}/channels?token={service.key} HTTP/1.1\nUpgrade: websocket"
    )
    assert status == 400


def test_the_layouts_are_what_clients_offer() -> None:
    """The subprotocol's name is Jupyter's, and these tests read what Jupyter's own functions write."""
    assert V1 == "v1.kernel.websocket.jupyter.org"
    assert read(v1_frame(*GOOD), is_v1=True).header["msg_id"] == "1"
