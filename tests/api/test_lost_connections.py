"""Promises R8, R9, R10, R14, R15, R23: connections that break, stall or are slow, and servers that end."""

import asyncio
import json
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from guest_agent import wire
from kernel_gateway.drivers.unisolated import Unisolated
from tests.api.clients import (
    TIMEOUT,
    Agent,
    Client,
    Message,
    Proxy,
    ServerProcess,
    agent,
    channels,
    favour,
    measure,
    peer,
    read_for_ever,
    server_process,
)
from tests.fakes import FakeDriver, Service, eventually, resident, serving

MIB = 1 << 20
CUTS = 200


# -- R15: half-open connections. This begins before all other tests and ends after them, because it takes 40 s.

FLOOD_FOR_EVER = """
import time
for n in range(20):
    print("x" * 1_000_000, flush=True)  # more than the two sockets hold
while True:
    print("y" * 10_000, flush=True)
    time.sleep(0.1)
"""


@pytest.fixture(scope="module", autouse=True)
async def stopped_client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SimpleNamespace]:
    """A client that is stopped while output flows to it, and its server's memory and time to notice."""
    async with server_process(tmp_path_factory.mktemp("server") / "data") as server:
        kernel = await server.kernel()
        async with peer(read_for_ever, server, kernel) as other:
            before = server.memory()
            async with channels(server, kernel) as client:
                await client.start(FLOOD_FOR_EVER)
                await client.until_kind("stream")
            other.process.send_signal(signal.SIGSTOP)
            noticing = asyncio.create_task(nobody_there(server, kernel))
            yield SimpleNamespace(server=server, kernel=kernel, before=before, noticing=noticing)
            noticing.cancel()


async def nobody_there(server: ServerProcess, kernel: str) -> float:
    """Wait until nobody is connected, and return the seconds that it took."""
    begun = time.monotonic()
    while json.loads((await server.call("GET", f"/api/kernels/{kernel}")).body)["connections"]:
        await asyncio.sleep(0.5)
    return time.monotonic() - begun


async def new_kernel(service: Service) -> tuple[str, str]:
    """A kernel's and its sandbox's id."""
    model = json.loads((await service.call("POST", "/api/kernels")).body)
    return model["id"], model["sandbox_id"]


# -- R14: nobody loses output

Connect = Callable[[int | None], AbstractAsyncContextManager[Client | Agent]]


def told(got: Message | dict[str, Any], request: str) -> tuple[int, str, bool]:
    """The number of a message or an event, the text that it prints, and whether the cell is over."""
    if isinstance(got, dict):
        mine = got.get("id") == request
        return got["seq"], got.get("text", "") if mine else "", mine and got["type"] == "end"
    mine = got.parent.get("msg_id") == request
    return got.seq, got.content.get("text", "") if mine else "", mine and got.state == "idle"


async def follow(connect: Connect, request: str, seen: int, *, says_where: bool = True) -> str:
    """The text that a cell prints, over as many connections as it takes.

    The client tells its last number, or leaves that to the server and drops the messages that it has already.
    """
    text = ""
    while True:
        try:
            async with connect(seen if says_where else None) as client:
                while True:
                    seq, piece, is_over = told(await client.receive(), request)
                    assert seq > seen or not (piece and says_where), "came twice"
                    text += piece if seq > seen else ""
                    seen = max(seq, seen)
                    if is_over:
                        return text
        except TimeoutError:
            raise
        except (WebSocketException, OSError, EOFError):
            pass  # the connection was cut


PRINT_LINES = """
import os, sys, time
n = 0
while not os.path.exists({stop!r}):
    for _ in range(10):
        print("line", n, "-" * (n % 90))
        n += 1
    sys.stdout.flush()
    time.sleep(0.003)
"""


async def test_r14_200_cuts(tmp_path: Path) -> None:
    """Connections are cut at 200 random points, and each client gets every byte once.

    Three clients tell their last number: one with the same session, one with a new one each time (a page reload), one
    on the stream for agents. A fourth does not tell it. One stays all the time. One leaves politely again and again.
    """
    rng, stop = random.Random(14), tmp_path / "stop"
    async with serving(tmp_path, Unisolated(tmp_path)) as service, AsyncExitStack() as stack:
        kernel, box = await new_kernel(service)
        proxies: list[Proxy] = []

        async def cutting() -> SimpleNamespace:
            """The service behind a proxy of its own that cuts after 1 to 100 000 bytes."""
            proxy = Proxy(service.port, lambda: int(10 ** rng.uniform(0, 5)) if proxy.cuts < CUTS else None)
            proxies.append(await stack.enter_async_context(proxy))
            return SimpleNamespace(url=proxy.url, key=service.key)

        first = await stack.enter_async_context(channels(service, kernel))
        for session in ("silent", "polite"):  # this is where a session without a number begins
            async with channels(service, kernel, session):
                pass
        request = await first.start(PRINT_LINES.format(stop=str(stop)))
        since = (await first.until_kind("execute_input")).seq
        servers = [await cutting() for _ in range(4)]
        stays = asyncio.create_task(first.answer(request))
        followers = [
            follow(lambda seen: channels(servers[0], kernel, "same", since=seen), request, since),
            follow(lambda seen: channels(servers[1], kernel, since=seen), request, since),
            follow(lambda seen: agent(servers[2], box, since=seen), request, since),
            follow(lambda _: channels(servers[3], kernel, "silent"), request, since, says_where=False),
            leaving(service, kernel, request, since, rng),
        ]
        following = [asyncio.create_task(each) for each in followers]
        await eventually(lambda: all(proxy.cuts == CUTS for proxy in proxies), 90)
        stop.touch()
        texts = await asyncio.gather(*following)
        count = int((await first.run("n")).value)
        expected = "".join(f"line {n} {'-' * (n % 90)}\n" for n in range(count))
        assert (await stays).text == expected
        assert [text == expected for text in texts] == [True] * 5, [len(text) for text in (*texts, expected)]


async def leaving(service: Service, kernel: str, request: str, seen: int, rng: random.Random) -> str:
    """The text of a cell for a session that closes its connection properly and connects again, many times."""
    text, is_over = "", False
    while not is_over:
        async with channels(service, kernel, "polite") as client:
            leaves_at = time.monotonic() + rng.uniform(0, 0.4)
            with suppress(ConnectionClosed):
                while not is_over:
                    if time.monotonic() > leaves_at:
                        await client.socket.close()  # messages that came before can still be read
                    number, piece, is_over = told(await client.receive(), request)
                    text += piece if number > seen else ""
                    seen = max(number, seen)
    return text


@pytest.mark.parametrize("reply_comes", ["before", "after"])
async def test_a_page_reload_hears_the_reply(service: Service, reply_comes: str) -> None:
    """A new session with `since` gets the replies to the old one, also those of cells that still run."""
    kernel, _ = await new_kernel(service)
    async with channels(service, kernel) as client:
        request = await client.start('time.sleep(0.3); print("done")')
        since = (await client.until_kind("execute_input")).seq
    if reply_comes == "before":
        await asyncio.sleep(0.5)
    async with channels(service, kernel, since=since) as client:
        answer = await client.answer(request, 3)
        assert (answer.text, answer.reply["status"]) == ("done\n", "ok")


async def test_replies_wait_for_their_session(service: Service) -> None:
    """A session that comes back without a number gets the replies and input requests that it missed."""
    kernel, _ = await new_kernel(service)
    async with channels(service, kernel, "mine") as client:
        request = await client.start('print(input("name: "))')
        await client.until_kind("execute_input")
        client.socket.transport.abort()
    async with channels(service, kernel, "another") as other, channels(service, kernel, "mine") as client:
        asked = await client.until_kind("input_request")
        await client.send("input_reply", {"value": "x"}, "stdin", parent=asked.header)
        assert (await client.answer(request)).text == "x\n"
        assert (await other.run("1")).value == "1"
        assert {message.channel for message in other.messages if message.parent["msg_id"] == request} == {"iopub"}


async def test_a_new_session_begins_at_the_present(service: Service) -> None:
    """A new session without a number gets no messages of the past."""
    kernel, box = await new_kernel(service)
    await service.execute(box, 'print("old")')
    async with channels(service, kernel) as client:
        answer = await client.run("1")
        assert client.messages == answer.messages


FLOOD_LINES = """
import sys
line = "-" * 89
for n in range(200):
    sys.stdout.write("".join(f"{m:09d} {line}\\n" for m in range(n * 10_000, n * 10_000 + 10_000)))
    sys.stdout.flush()
"""
LINE, LINES = 100, 2_000_000
"""Bytes of a line, and the number of lines: 200 MB in all."""


def check_lines(text: str, first: int = 0) -> None:
    """Check that lines are whole, in order, each once, up to the last."""
    line = "-" * 89
    assert len(text) == (LINES - first) * LINE
    for at in range(first, LINES, 10_000):
        block = text[(at - first) * LINE : (at - first + 10_000) * LINE]
        assert block == "".join(f"{n:09d} {line}\n" for n in range(at, min(at + 10_000, LINES)))


async def idle(server: ServerProcess, kernel: str, timeout: float = 60) -> None:
    """Wait until the kernel has nothing to do."""
    async with asyncio.timeout(timeout):
        while json.loads((await server.call("GET", f"/api/kernels/{kernel}")).body)["execution_state"] != "idle":
            await asyncio.sleep(0.1)


async def test_r14_200_mb_with_nobody_there(tmp_path: Path) -> None:
    """Memory grows by 80 MB at most. A client that comes back is told once of the gap, and gets the rest."""
    async with server_process(tmp_path / "data") as server:
        kernel = await server.kernel()
        async with channels(server, kernel) as client:
            await client.run("1")
            since = client.seq
            earlier = [await client.start(f"x = {n}") for n in range(5)]
            flood = await client.start(FLOOD_LINES)
            await client.until(lambda message: message.kind == "execute_input" and message.parent["msg_id"] == flood)
        async with server.grows_at_most(80_000_000):
            await idle(server, kernel)
        async with channels(server, kernel, since=since) as client:
            answer = await client.answer(flood)
            for request in earlier:
                assert (await client.answer(request)).reply["status"] == "ok"
        (notice,) = [message for message in client.messages if "missing" in message.metadata["cellvm"]]
        assert (notice.kind, notice.content["name"]) == ("stream", "stderr")
        assert str(notice.metadata["cellvm"]["missing"]) in notice.content["text"]
        text = "".join(m.content["text"] for m in answer.all("stream") if m.content["name"] == "stdout")
        assert answer.messages.index(notice) < answer.messages.index(answer.all("stream")[1])
        assert len(text) > 50_000_000
        check_lines(text, LINES - len(text) // LINE)


# -- R8: slow readers


@pytest.mark.alone
@pytest.mark.parametrize("others", [0, 1], ids=["alone", "beside a fast reader"])
async def test_r8_a_client_that_does_not_read(tmp_path: Path, others: int) -> None:
    """While 200 MB are printed the server grows by 32 MiB at most, and another sandbox's round trips stay short.

    Alone, the slow client gets everything when it reads on; beside a fast one, which gets everything, it may be told
    what is missing.
    """
    async with server_process(tmp_path / "data") as server, AsyncExitStack() as stack:
        kernel, other = await server.kernel(), await server.kernel()
        slow = await stack.enter_async_context(channels(server, kernel, max_queue=1))
        fast = [await stack.enter_async_context(channels(server, kernel)) for _ in range(others)]
        measuring = await stack.enter_async_context(peer(measure, server, other))
        # The server has precedence, because the test measures it and not the competition for two processors.
        with suppress(PermissionError):
            favour(server.process.pid)
            favour(measuring.process.pid)
        await slow.run("import os; os.nice(39)")
        async with server.grows_at_most(32 * MIB):
            request = await slow.start(FLOOD_LINES)
            for client in fast:
                await client.until(lambda message: told(message, request)[2])
            await asyncio.sleep(0 if others else 3)
            times = json.loads(await measuring.line(b"enough\n"))
        for client in fast:
            check_lines(client.answers[request].text)
        assert len(times) > 50
        assert statistics.quantiles(times, n=20)[18] < 0.1
        assert max(times) < 1
        answer = await slow.answer(request)
        numbers = [message.seq for message in slow.messages]
        assert numbers == sorted(set(numbers))
        missing = [message for message in answer.messages if "missing" in message.metadata["cellvm"]]
        text = "".join(m.content["text"] for m in answer.all("stream") if m.content["name"] == "stdout")
        assert len(missing) <= others
        if not missing:
            check_lines(text)
        assert (await slow.run("6 * 7")).value == "42"


# -- R9, R10: floods and stalls of the guest


async def test_r9_a_flood_that_nobody_takes(service: Service) -> None:
    """With all clients stalled the guest is stopped and memory stays. When they read on, all is there, in order."""
    kernel, box = await new_kernel(service)
    guest = service.guest(box)
    pieces = 0
    publish = guest.kernel.publish

    async def counted(*args: Any, **fields: Any) -> None:
        nonlocal pieces
        await publish(*args, **fields)
        pieces += 1

    guest.kernel.publish = counted  # type: ignore[method-assign]
    async with channels(service, kernel, max_queue=1) as first, agent(service, box, max_queue=1) as second:
        await first.run("flood(10)")
        while second.events[-1:] != [{}] and not any(event["type"] == "end" for event in second.events):
            await second.receive()
        before = resident()
        request = await first.start("flood(200)")
        while True:
            stood = pieces
            await asyncio.sleep(0.5)
            if stood == pieces:
                break
        assert pieces < 10 * 16 + 1000  # of 3200
        assert resident() - before <= 16 * MIB
        reading = asyncio.create_task(second.until("end", id=request))
        answer = await first.answer(request)
        events = await reading
        assert answer.text.count("flood! ") == 200 * 16 * 9362
        assert sum(event.get("text", "").count("flood! ") for event in events) == 200 * 16 * 9362


async def test_r9_a_guest_that_sends_against_the_credit(service: Service) -> None:
    """The guest is destroyed, its clients are closed with 4410, and memory stays."""
    kernel, box = await new_kernel(service)
    guest = service.guest(box)
    parts = [
        b"iopub",
        guest.kernel.header("stream"),
        b"{}",
        b"{}",
        b'{"name": "stdout", "text": "%s"}' % (b"x" * 200_000),
    ]
    message = b"".join(b"".join(frame) for frame in wire.chunk(wire.KERNEL, wire.pack_parts(parts)))
    before = resident()
    async with channels(service, kernel, max_queue=1) as client:
        with pytest.raises(OSError):  # noqa: PT011, PT012  the guest's end of the stream is closed
            for _ in range(400):  # 80 MB
                await guest.send(message)
        assert resident() - before <= 16 * MIB
        assert await client.close_code() == 4410


async def test_r10_a_guest_that_stops_reading(tmp_path: Path) -> None:
    """20 MB that the guest does not take stay with the client. At the deadline the sandbox is given up with 4410."""
    driver = FakeDriver(time_scale=0.05)  # 10 s become half a second
    async with serving(tmp_path, driver) as service:
        kernel, box = await new_kernel(service)
        async with channels(service, kernel) as client, channels(service, kernel) as other:
            await client.run("1")
            service.guest(box).stall()
            before, begun, sent = resident(), time.monotonic(), 0
            with pytest.raises(ConnectionClosed):  # noqa: PT012
                async with asyncio.timeout(5):
                    while True:
                        await client.send("comm_msg", {"comm_id": "c", "data": {}}, buffers=[bytes(MIB)])
                        sent += 1
            assert sent < 20
            assert resident() - before <= 16 * MIB
            assert (client.socket.close_code, await other.close_code()) == (4410, 4410)
            assert time.monotonic() - begun < 3
        await eventually(lambda: not driver.alive)


async def test_r10_a_guest_that_pauses_reading(service: Service) -> None:
    """20 MB that are sent while the guest does not read arrive whole when it goes on."""
    kernel, box = await new_kernel(service)
    guest = service.guest(box)
    async with channels(service, kernel) as client:
        guest.stall()
        buffers = [bytes([n]) * MIB for n in range(20)]

        async def send() -> None:
            for n, buffer in enumerate(buffers):
                await client.send("comm_msg", {"comm_id": "c", "data": {"n": n}}, buffers=[buffer])

        sending = asyncio.create_task(send())
        await asyncio.sleep(0.3)
        assert not sending.done()
        guest.go_on()
        for n, buffer in enumerate(buffers):
            echoed = await client.until_kind("comm_msg")
            assert (echoed.content["data"], echoed.buffers) == ({"n": n}, [buffer])
        await sending


# -- R1, R23: the server goes


async def upgrade_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: ServerProcess, path: str
) -> bytes:
    """The status line of an upgrade on an existing connection."""
    head = f"GET {path} HTTP/1.1\nHost: localhost\nX-API-Key: {server.key}\nUpgrade: websocket\nConnection: Upgrade\n"
    head += f"Sec-WebSocket-Version: 13\nSec-WebSocket-Key: {'A' * 22}==\n\n"
    writer.write(head.replace("\n", "\r\n").encode())
    async with asyncio.timeout(TIMEOUT):
        return await reader.readline()


async def test_r23_the_server_is_stopped(tmp_path: Path) -> None:
    """Upgrades are 503 while running requests finish, then WebSockets are closed with 1012, and it exits with 0."""
    async with server_process(tmp_path / "data") as server:
        kernel = await server.kernel()
        box = json.loads((await server.call("GET", f"/api/kernels/{kernel}")).body)["sandbox_id"]
        port = int(server.url.rsplit(":", 1)[1])
        async with channels(server, kernel) as client, agent(server, box) as other:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /api HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" in (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0]
            await reader.readuntil(b"}")
            body = {"code": "import time; print('begun', flush=True); time.sleep(1); print('whole')"}
            running = asyncio.create_task(server.call("POST", f"/sandboxes/{box}/execute", body))
            await client.until_kind("stream")
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            assert b" 503 " in await upgrade_on(reader, writer, server, f"/api/kernels/{kernel}/channels")
            assert json.loads((await running).body)["stdout"] == "begun\nwhole\n"
            with pytest.raises(ConnectionClosed):
                await other.until("nothing more")
            assert [await client.close_code(), other.socket.close_code] == [1012, 1012]
            writer.close()
        assert await server.process.wait() == 0


async def test_r1_the_server_is_killed(tmp_path: Path) -> None:
    """The next server tells that the kernel is dead, and why. The kernel's WebSocket is 404."""
    async with server_process(tmp_path / "data") as server:
        kernel = await server.kernel()
        async with channels(server, kernel) as client:
            await server.end(signal.SIGKILL)
            assert await client.close_code() == 1006
    async with server_process(tmp_path / "data") as server:  # with another key of the same owner
        model = json.loads((await server.call("GET", f"/api/kernels/{kernel}")).body)
        assert (model["execution_state"], "host_restart" in model["reason"]) == ("dead", True)
        with pytest.raises(InvalidStatus) as refused:
            await channels(server, kernel).__aenter__()
        assert refused.value.response.status_code == 404


# -- R15, begun at the top


async def test_r15_a_client_that_stands_still(stopped_client: SimpleNamespace) -> None:
    """A stopped client is noticed within 45 s while output flows. Its memory is freed, and the kernel goes on."""
    async with asyncio.timeout(60):
        assert 5 < await stopped_client.noticing <= 45  # a client that is only slow must not be given up
    assert stopped_client.server.memory() - stopped_client.before <= 32 * MIB
    answer = await stopped_client.server.call("POST", f"/api/kernels/{stopped_client.kernel}/interrupt")
    assert answer.code == 204
    await idle(stopped_client.server, stopped_client.kernel)
