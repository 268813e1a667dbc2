"""Whatever waits in the server for one key is bounded together, costs nobody else anything, and comes back to none."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from guest_agent import wire
from kernel_gateway.errors import SandboxDied, TooManyRequests
from kernel_gateway.held import Held
from kernel_gateway.kernel import message
from tests.api.clients import TIMEOUT, agent
from tests.fakes import HOME, Service, Stream, error_of, eventually, resident, serving

MIB = 1024 * 1024
WIDE = ("x" * 16383 + "😀").encode()
"""A piece of output with one rare character, which makes every character of a text wide."""


def kernel_of(service: Service, box: str):  # type: ignore[no-untyped-def]
    return service.sandboxes.get(service.owner, box).guest.kernel


def held(service: Service) -> int:
    return service.sandboxes.held.of(service.owner)


@asynccontextmanager
async def raw(service: Service, head: str, body: bytes = b"") -> AsyncIterator[socket.socket]:
    """A request whose client reads nothing by itself, over a connection that takes little."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", service.port))
        fields = f"Host: x\r\nX-API-Key: {service.key}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        await loop.sock_sendall(client, f"{head} HTTP/1.1\r\n{fields}\r\n".encode() + body)
        yield client


async def read_all(client: socket.socket) -> int:
    """Read an answer with its connection's end, and return its size."""
    size, loop = 0, asyncio.get_running_loop()
    while data := await loop.sock_recv(client, 256 * 1024):
        size += len(data)
    return size


@asynccontextmanager
async def peak() -> AsyncIterator[Callable[[], int]]:
    """Bytes by which this process has grown at most since the begin of the block."""
    before, most = resident(), 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, resident() - before)
            await asyncio.sleep(0.005)

    watching = asyncio.create_task(watch())
    try:
        yield lambda: max(most, resident() - before)
    finally:
        watching.cancel()


async def neighbour_works(service: Service) -> None:
    """Another key's create, cell, listing and delete succeed."""
    key = service.other_key
    answer = await service.call("POST", "/sandboxes", {"templateID": "base"}, key=key)
    assert answer.code == 201, answer.body
    box = json.loads(answer.body)["sandboxID"]
    cell = await service.call("POST", f"/sandboxes/{box}/execute", {"code": "1 + 1"}, key=key)
    assert json.loads(cell.body)["results"][0]["data"]["text/plain"] == "2"
    listing = await service.call("GET", f"/sandboxes/{box}/filesystem/list?path=/", key=key)
    assert listing.code == 200
    assert (await service.call("DELETE", f"/sandboxes/{box}", key=key)).code == 204


def queue_code(service: Service, box: str, size: int, most: int = 200) -> int:
    """Queue cells of that size behind one that sleeps, until one is refused, and return how many were taken."""
    kernel = kernel_of(service, box)
    kernel.run("time.sleep(60)")
    for taken in range(most):
        try:
            kernel.run(f"#{taken}" + "x" * size)
        except TooManyRequests:
            return taken
    return most


def send_headers(service: Service, box: str, size: int, most: int = 2000) -> None:
    """Send requests with headers of that size, whose answers do not come."""
    kernel = kernel_of(service, box)
    for number in range(most):
        header = {"msg_id": f"{box}{number}", "msg_type": "execute_request", "session": "s", "username": "u" * size}
        parts = [b"shell", json.dumps(header).encode(), b"{}", b"{}", b'{"code": "time.sleep(60)"}']
        if sending := kernel.send(parts, "s"):
            sending.close()


def fill(service: Service, box: str, folder: str, files: int) -> None:
    """Let a folder of the sandbox have many files."""
    found = service.guest(box).files
    found[folder] = None
    page = [
        wire.Entry(
            name=f"{number:06}{'n' * 200}", path=f"{folder}/{number:06}{'n' * 200}", kind="file", size=1, mode=0o644,
            owner="user", group="user", modified_ns=number,
        )
        for number in range(files)
    ]  # fmt: skip

    async def listed(stream: Stream, body: wire.ListDir) -> None:
        first = next((at for at, entry in enumerate(page) if entry.name > body.after), files)
        await stream.reply(wire.Entries(entries=page[first : first + 1000], more=first + 1000 < files))

    service.guest(box).script.handlers[wire.ListDir] = listed


# -- the bound


async def test_code_of_all_kernels_is_bounded_together(tmp_path: Path) -> None:
    """B5: cells that wait in several kernels of one key hold 64 MiB of code together, and then the answer is 429."""
    async with serving(tmp_path, max_sandboxes=9) as service:
        boxes = [await service.create() for _ in range(8)]
        before = resident()
        taken = [queue_code(service, box, 3 * MIB) for box in boxes]
        assert taken == [21, *[0] * 7]
        assert resident() - before < 72 * MIB
        answer = await service.call("POST", f"/sandboxes/{boxes[2]}/execute", {"code": "x" * (3 * MIB)})
        error = error_of(answer)
        assert (error["code"], error["error"], answer.headers["Retry-After"]) == (429, "too_many_requests", "5")
        assert str(64 * MIB) in error["message"]
        await neighbour_works(service)
        for box in boxes:
            assert (await service.call("DELETE", f"/sandboxes/{box}")).code == 204
        assert service.sandboxes.held.size == 0


async def test_a_mix_of_one_key_takes_64_mib_together(service: Service, box: str) -> None:
    """Code, headers and listings of one key draw on one account. At its bound other keys notice nothing."""
    other = await service.create()
    fill(service, other, "/big", 9000)
    async with peak() as grown, AsyncExitStack() as stack:
        send_headers(service, box, 60_000, most=400)
        for _ in range(2):
            listing = raw(service, f"GET /sandboxes/{other}/filesystem/list?path=/big")
            await stack.enter_async_context(listing)
        await eventually(lambda: held(service) > 40 * MIB)
        taken = queue_code(service, other, 3 * MIB)
        assert 0 < taken < 10
        await neighbour_works(service)
        assert held(service) <= 64 * MIB
        assert grown() <= 80 * MIB
    for each in (box, other):
        assert (await service.call("DELETE", f"/sandboxes/{each}")).code == 204
    await eventually(lambda: service.sandboxes.held.size == 0)


async def test_a_request_without_room_is_answered(tmp_path: Path) -> None:
    """A Jupyter client's request beyond the bound gets an error and never runs. Later ones run."""
    async with serving(tmp_path, held=Held(most=200_000)) as service:
        box = await service.create()
        kernel = kernel_of(service, box)
        send_headers(service, box, 60_000, most=5)
        assert len(kernel.pending) == 3
        refused = [record for record in kernel.journal.read(0) if record.parent == f"{box}3"]
        assert [record.kind for record in refused] == ["error", "execute_reply", "status"]
        reply = json.loads(refused[1].parts[4])
        assert (reply["status"], reply["ename"]) == ("error", "TooManyRequests")
        assert b'"outcome":"not_started"' in refused[1].parts[3]
        kernel.close(SandboxDied("of a test"))
        assert held(service) == 0


# -- output of commands


async def wide(stream: Stream, body: wire.Spawn) -> None:
    """A command that prints 8 MiB of wide text on both streams, and ends when it is signalled."""
    await stream.event(wire.Started(pid=1))
    for _ in range(8 * MIB // len(WIDE)):
        for sub in (wire.STDOUT, wire.STDERR):
            await stream.data(WIDE, sub)
    await stream.data(b"!", wire.STDERR)
    if body.argv[0] == "wait":
        await asyncio.sleep(60)
    await stream.reply(wire.Exited(code=0))


async def test_r8_a_command_with_wide_characters(service: Service, box: str) -> None:
    """S5: 8 MiB of text on both streams, with a rare character now and then, take 64 MiB at most."""
    service.guest(box).script.handlers[wire.Spawn] = wide
    async with peak() as grown, raw(service, f"POST /sandboxes/{box}/processes", b'{"cmd": "x"}') as client:
        size = await read_all(client)
    assert size > 2 * (8 * MIB // len(WIDE)) * len(WIDE)
    assert grown() <= 40 * MIB
    await eventually(lambda: held(service) == 0)
    result = await service.run(box, "x")
    assert result["stdout"] == (WIDE * (8 * MIB // len(WIDE))).decode()
    assert (result["stderr"], result["truncated"]) == (result["stdout"] + "!", None)


async def test_output_of_many_commands_is_bounded(service: Service, box: str) -> None:
    """S5: sixteen such commands at once keep 64 MiB together. What is left out is counted, and none is held up."""
    service.guest(box).script.handlers[wire.Spawn] = wide
    async with peak() as grown:
        results = [asyncio.create_task(service.call("POST", f"/sandboxes/{box}/processes", {"cmd": "wait"}))
                   for _ in range(16)]  # fmt: skip
        await eventually(lambda: held(service) > 60 * MIB, 30)
        commands = service.sandboxes.get(service.owner, box).guest.commands
        await eventually(lambda: sum(each.journal.end for each in commands) > 200 * MIB, 30)
        await neighbour_works(service)
        assert held(service) <= 64 * MIB
        assert grown() < 120 * MIB
    assert (await service.call("DELETE", f"/sandboxes/{box}")).code == 204
    await asyncio.gather(*results)
    await eventually(lambda: service.sandboxes.held.size == 0)


async def test_output_without_room_is_counted(tmp_path: Path) -> None:
    """Output beyond what may be held for the key is left out of the answer, and `truncated` has its size."""
    async with serving(tmp_path, held=Held(most=2 * MIB)) as service:
        box = await service.create()
        result = await service.run(box, "flood", "4")
        assert MIB < len(result["stdout"]) <= 2 * MIB
        assert len(result["stdout"]) + result["truncated"]["stdout"] == 4 * 16 * 7 * 9362
        cell = await service.execute(box, "flood(4)")
        assert MIB < len(cell["stdout"]) <= 2 * MIB
        assert len(cell["stdout"]) + cell["truncated"]["stdout"] == 4 * 16 * 7 * 9362
        await eventually(lambda: held(service) == 0)


# -- output on its way


async def test_clients_that_do_not_read_large_output(service: Service, box: str) -> None:
    """A dozen clients that do not read a message of 30 MiB keep what may be held for their key, and others go on."""
    kernel = kernel_of(service, box)
    fields = {"data": {"text/plain": "x" * (30 * MIB)}, "metadata": {}}
    kernel.journal.append(message.new("iopub", "display_data", fields, session="s"), "display_data")
    for _ in range(16):  # so that the large one is on disk, and each reader has a copy
        kernel._publish("stream", {"name": "stdout", "text": "y" * MIB}, {})
    del fields
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA=="
    before = resident()
    async with AsyncExitStack() as stack:
        for _ in range(12):
            path = f"GET /sandboxes/{box}/stream?since=0 HTTP/1.1\r\n{upgrade}\r\nX-Rest:"
            client = await stack.enter_async_context(raw(service, path))
            assert b" 101 " in await asyncio.get_running_loop().sock_recv(client, 16)
        await eventually(lambda: held(service) == 64 * MIB)
        await asyncio.sleep(0.3)
        assert held(service) == 64 * MIB
        assert resident() - before < 256 * MIB
        await neighbour_works(service)
    await eventually(lambda: held(service) == 0)
    async with agent(service, box, since=0) as client:
        *_, event = await client.until("display")
        assert len(event["data"]["text/plain"]) == 30 * MIB
    await eventually(lambda: held(service) == 0)


# -- messages and bodies


def frame_head(size: int) -> bytes:
    """The begin of a client's text message, masked with nothing."""
    return struct.pack("!BBQI", 0x81, 0x80 | 127, size, 0)


async def test_unfinished_messages_are_bounded(service: Service, box: str) -> None:
    """S8: of ten unfinished messages of 40 MiB one is taken. The others' connections are closed with 1013."""
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA=="
    closed = 0
    async with peak() as grown:
        writers = []
        for _ in range(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writers.append(writer)
            head = f"GET /sandboxes/{box}/stream?token={service.key} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n\r\n"
            writer.write(head.encode())
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(frame_head(40 * MIB))
            try:
                async with asyncio.timeout(TIMEOUT):
                    for _ in range(38):
                        writer.write(b" " * MIB)
                        await writer.drain()
            except OSError:
                closed += 1
        assert grown() < 90 * MIB
    assert (closed, held(service)) == (9, 40 * MIB - 64 * 1024)
    await neighbour_works(service)
    for writer in writers:
        writer.transport.abort()
    await eventually(lambda: service.sandboxes.held.size == 0)


async def test_bodies_are_bounded(tmp_path: Path) -> None:
    """Bodies that do not end count for their key. Small ones pass, so that the key can still act."""
    async with serving(tmp_path, held=Held(most=4 * MIB)) as service:
        box = await service.create()
        _, writer = await asyncio.open_connection("127.0.0.1", service.port)
        head = f"POST /sandboxes/{box}/execute HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n"
        writer.write(f"{head}Content-Length: {4 * MIB}\r\n\r\n".encode() + b" " * (3 * MIB))
        await eventually(lambda: held(service) == 3 * MIB - 64 * 1024)
        path = f"/sandboxes/{box}/filesystem/mkdir"
        answer = await service.call("POST", path, body=b" " * (2 * MIB))
        assert error_of(answer)["error"] == "too_many_requests"
        assert (await service.call("POST", path, {"path": "d"})).code == 200
        await neighbour_works(service)
        writer.transport.abort()
        await eventually(lambda: held(service) == 0)
        upload = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n%s\r\n--b--\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        path = f"/sandboxes/{box}/files"
        assert (await service.call("POST", path, body=upload % (b"x" * MIB), headers=headers)).code == 200
        with service.sandboxes.held.account(service.owner).hold("of a test", 4 * MIB):
            answer = await service.call("POST", path, body=upload % (b"y" * MIB), headers=headers)
            assert error_of(answer)["error"] == "too_many_requests"
            assert (await service.call("GET", f"/sandboxes/{box}/files?path=x")).code == 429
        assert service.guest(box).files[f"{HOME}/x"] == b"x" * MIB
        assert held(service) == 0


# -- every way of ending


Way = Callable[[Service, str, socket.socket], Awaitable[object]]


async def hang_up(service: Service, box: str, client: socket.socket) -> None:
    client.close()


async def delete(service: Service, box: str, client: socket.socket) -> None:
    await service.call("DELETE", f"/sandboxes/{box}")


async def die(service: Service, box: str, client: socket.socket) -> None:
    service.guest(box).die("of a test")


async def break_link(service: Service, box: str, client: socket.socket) -> None:
    service.guest(box).cut()


async def interrupt_and_read(service: Service, box: str, client: socket.socket) -> None:
    guest = service.sandboxes.get(service.owner, box).guest
    for cell in list(guest.kernel.executions.unfinished()):
        await eventually(lambda cell=cell: cell.is_started)
        await guest.kernel.interrupt(cell.id)
        await eventually(lambda cell=cell: cell.outcome is not None)
    for command in guest.commands:
        command.kill()


async def test_hang_ups_at_any_moment(service: Service, box: str) -> None:
    """A client that hangs up while its request begins leaves nothing held, and no command."""

    async def never(stream: Stream, body: wire.Body) -> None:
        await stream.event(wire.Started(pid=1))
        await asyncio.sleep(60)

    service.guest(box).script.handlers[wire.Spawn] = never
    body = json.dumps({"cmd": "cat", "stdin": "x" * 500_000}).encode()
    for turns in range(30):
        async with raw(service, f"POST /sandboxes/{box}/processes", body):
            for _ in range(turns):
                await asyncio.sleep(0)
    commands = service.sandboxes.get(service.owner, box).guest.commands
    await eventually(lambda: all(each.outcome is not None for each in commands))
    await eventually(lambda: held(service) == sum(each.size for each in commands))
    assert (await service.call("DELETE", f"/sandboxes/{box}")).code == 204
    assert held(service) == 0


@pytest.mark.parametrize("end", [hang_up, delete, die, break_link, interrupt_and_read])
@pytest.mark.parametrize("work", ["cell", "waiting", "command", "input", "listing", "download", "upload"])
async def test_nothing_stays_held(service: Service, box: str, work: str, end: Way) -> None:
    """However work ends, what was held for it is released."""
    long, guest = "x" * 300_000, service.guest(box)

    async def never(stream: Stream, body: wire.Body) -> None:
        await stream.event(wire.Started(pid=1))
        await asyncio.sleep(60)

    fill(service, box, "/big", 9000)
    guest.files[f"{HOME}/big"] = bytes(8 * MIB)
    if work == "waiting":
        kernel_of(service, box).run("time.sleep(60)")
    if work == "input":
        guest.script.handlers[wire.Spawn] = never
    head, body = {
        "cell": ("POST execute", {"code": f"time.sleep(60) #{long}"}),
        "waiting": ("POST execute", {"code": f"1 #{long}"}),
        "command": ("POST processes", {"cmd": "sleep", "args": ["60", "x" * 100_000]}),
        "input": ("POST processes", {"cmd": "cat", "stdin": long * 10}),
        "listing": ("GET filesystem/list?path=/big", None),
        "download": ("GET files?path=big", None),
        "upload": ("POST execute", None),
    }[work]
    method, path = head.split()
    data = b"" if body is None else json.dumps(body).encode()
    async with raw(service, f"{method} /sandboxes/{box}/{path}", data) as client:
        if work == "upload":  # a body that does not end
            client.close()
        else:
            await eventually(lambda: held(service) > 50_000)
        cells = {"cell": 1, "waiting": 2}.get(work, 0)
        await eventually(lambda: len(kernel_of(service, box).executions) == cells)
        commands = service.sandboxes.get(service.owner, box).guest.commands
        await eventually(lambda: any(each.pid for each in commands) is (work in ("command", "input")))
        await end(service, box, client)
        if end is interrupt_and_read and work in ("cell", "waiting", "command", "input"):
            await eventually(lambda: held(service) < 110_000)
        client.close()
    await eventually(lambda: held(service) < 110_000)
    assert (await service.call("DELETE", f"/sandboxes/{box}")).code in (204, 404)
    await eventually(lambda: service.sandboxes.held.size == 0)
