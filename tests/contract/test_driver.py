"""One suite for every driver that needs no machine: the promises that the gateway relies on, of fake and real agent.

The real agent runs as a plain process (driver `unisolated`), with a real IPython kernel.
"""

import asyncio
import dataclasses
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guest_agent import wire
from kernel_gateway.drivers import VmDriver
from kernel_gateway.drivers.unisolated import Unisolated
from kernel_gateway.errors import GuestFailure, GuestUnresponsive, SandboxDied, SandboxPaused
from kernel_gateway.guest.commands import Commands
from kernel_gateway.guest.guest import Guest, Guests, HostState
from kernel_gateway.guest.link import Link
from kernel_gateway.held import Held
from kernel_gateway.kernel import message
from kernel_gateway.kernel.events import Cell, Collector
from kernel_gateway.kernel.executions import Executions
from kernel_gateway.kernel.journal import Record, decode_page
from kernel_gateway.kernel.kernel import Kernel
from tests.fakes import PIECE, FakeDriver, FakeVm, eventually
from tests.unit.test_jupyter import text_of

REAL = "unisolated"


def driver_of(kind: str, directory: Path) -> VmDriver:
    return Unisolated(directory) if kind == REAL else FakeDriver()


@pytest.fixture(params=["fake", REAL])
async def driver(request: pytest.FixtureRequest, tmp_path: Path) -> VmDriver:
    """Each driver in turn."""
    return driver_of(request.param, tmp_path)


@pytest.fixture
async def guest(shared: Guest) -> AsyncIterator[Guest]:
    """The shared guest, whose home is an empty directory of the test's own."""
    home = f"{shared.home}/{os.urandom(4).hex()}"
    await shared.link.call(wire.MakeDir(path=home), wire.Entry)
    yield dataclasses.replace(shared, home=home)
    shared.kernel.adopt(shared.kernel.account, None)  # large output needs a file, and this one is no leak


@pytest.fixture(scope="module", params=["fake", REAL])
async def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    """One guest for all tests that leave it alive, because a kernel takes half a second to start."""
    driver = driver_of(request.param, tmp_path_factory.mktemp("agents"))
    guest = await Guests(driver).start("base")
    yield guest
    await guest.kill()


async def spawn(guest: Guest, *argv: str, stdin: bytes = b"", **fields: Any) -> tuple[wire.Exited, bytes, bytes]:
    """Run a program to its end, and return how it ended and its output."""
    request = wire.Spawn(argv=list(argv), **{"env": {}, "cwd": guest.home, **fields})
    out = {wire.STDOUT: b"", wire.STDERR: b""}
    async with guest.link.ask(request) as conversation:

        async def feed() -> None:
            await conversation.send(stdin)
            conversation.end()

        feeding = asyncio.create_task(feed())
        assert isinstance(await conversation.receive(), wire.Started)
        while not isinstance(item := await conversation.receive(), wire.Exited):
            assert isinstance(item, tuple)
            out[item[0]] += item[1]
        feeding.cancel()
    return item, out[wire.STDOUT], out[wire.STDERR]


async def execute(guest: Guest, code: str, timeout: float | None = 30) -> Cell:
    collector = Collector()
    async for event in guest.kernel.execute(code, timeout=timeout):
        collector.add(event)
    return collector.cell()


async def value(guest: Guest, code: str) -> str:
    """The text of a cell's value."""
    cell = await execute(guest, code)
    assert cell.error is None, cell.error
    return text_of(cell.results[-1])


async def write(guest: Guest, path: str, content: bytes) -> wire.Entry:
    async with guest.link.ask(wire.Write(path=path)) as conversation:
        await conversation.send(content)
        conversation.end()
        entry = await conversation.reply()
    assert isinstance(entry, wire.Entry)
    return entry


async def read(guest: Guest, path: str, **part: int) -> bytes:
    content = b""
    async with guest.link.ask(wire.Read(path=path, **part)) as conversation:
        assert isinstance(await conversation.receive(), wire.Entry)
        while isinstance(item := await conversation.receive(), tuple):
            content += item[1]
    assert item == wire.Done()
    return content


async def refused(guest: Guest, request: wire.Body) -> str:
    """The code that a request fails with."""
    with pytest.raises(GuestFailure) as caught:
        await guest.link.call(request, wire.Body)
    return caught.value.code


# -- a machine's life


async def test_start_wait_kill(driver: VmDriver) -> None:
    """A machine runs until it is killed. `wait` may be awaited often, before and after. `kill` is idempotent."""
    vm = await driver.start("base")
    waiting = [asyncio.create_task(vm.wait()) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    waiting[0].cancel()  # the others wait on when one is cancelled
    await asyncio.gather(vm.kill(), vm.kill())
    reason = await waiting[1]
    assert reason
    await vm.kill()
    assert await vm.wait() == reason


async def test_two_machines_are_distinct(driver: VmDriver) -> None:
    """Each machine has a channel, a home and randomness of its own."""
    first, second = await asyncio.gather(*(Guests(driver).start("base") for _ in range(2)))
    try:
        await write(first, f"{first.home}/mine", b"1")
        assert await refused(second, wire.Stat(path=f"{second.home}/mine")) == "not_found"
    finally:
        await first.kill()
        await second.kill()


async def test_the_link_tells_the_end_of_the_machine(driver: VmDriver) -> None:
    """When a machine is killed its link closes, and a request that waits on it is told."""
    guest = await Guests(driver).start("base")
    waiting = asyncio.create_task(spawn(guest, "sleep", "60"))
    await asyncio.sleep(0.1)
    await guest.vm.kill()
    with pytest.raises(SandboxDied):
        await asyncio.wait_for(waiting, 2)
    with pytest.raises(SandboxDied):
        await guest.link.call(wire.Ping(), wire.Done)
    guest.link.close()


async def test_the_channel_is_its_readers_to_close(driver: VmDriver) -> None:
    """Only the reader closes a channel, because its number could become another socket that the loop listens on."""
    vm = await driver.start("base")
    link = await Link.open(vm.open())
    await link.call(wire.Ping(), wire.Done)
    await vm.kill()
    await asyncio.wait_for(asyncio.shield(link.closed), 5)
    vm = await driver.start("base")
    sock = vm.open()
    await asyncio.sleep(0.05)  # an agent has begun
    await vm.kill()
    assert sock.fileno() >= 0
    sock.close()


async def test_resume(driver: VmDriver) -> None:
    """The handshake tells nonce, generation, a fresh sample and the home. It can be done again."""
    vm = await driver.start("base")
    link = await Link.open(vm.open())
    try:
        replies = [await link.resume(sandbox_id=f"sbx{n}", hostname="h", env={"N": str(n)}) for n in range(2)]
        assert {reply.generation for reply in replies} == {wire.GENERATION}
        assert len({reply.nonce for reply in replies}) == len({reply.sample for reply in replies}) == 2
        assert all(len(reply.sample) == 16 for reply in replies)
        assert replies[0].home == replies[1].home
        assert replies[0].home.startswith("/")
        entry = await link.call(wire.Stat(path=replies[0].home), wire.Entry)
        assert entry.kind == "dir"
    finally:
        link.close()
        await vm.kill()


async def test_requests_before_the_handshake_do_no_harm(driver: VmDriver) -> None:
    """A ping is answered though nobody has resumed the machine."""
    vm = await driver.start("base")
    link = await Link.open(vm.open())
    assert await link.call(wire.Ping(), wire.Done) == wire.Done()
    link.close()
    await vm.kill()


# -- programs


async def test_a_program(guest: Guest) -> None:
    """Output on both streams, and every way to end."""
    assert await spawn(guest, "echo", "a b") == (wire.Exited(code=0), b"a b\n", b"")
    assert await spawn(guest, "sh", "-c", "echo oops >&2") == (wire.Exited(code=0), b"", b"oops\n")
    assert (await spawn(guest, "sh", "-c", "exit 7"))[0] == wire.Exited(code=7)
    assert (await spawn(guest, "sh", "-c", "kill -15 $$"))[0] == wire.Exited(code=143, signal=15)


async def test_standard_input(guest: Guest) -> None:
    """Megabytes go in and come out unchanged. Without input a program reads the end at once."""
    content = random.Random(1).randbytes(3_000_000)
    assert await spawn(guest, "cat", stdin=content) == (wire.Exited(code=0), content, b"")
    assert (await spawn(guest, "cat"))[1] == b""


async def test_input_that_nobody_reads(guest: Guest) -> None:
    """A program may end without reading its input, and the link goes on."""
    assert (await spawn(guest, "true", stdin=bytes(5_000_000)))[0] == wire.Exited(code=0)
    assert await guest.link.call(wire.Ping(), wire.Done) == wire.Done()


async def test_environment(guest: Guest) -> None:
    """The sandbox's variables are there, and the request's win."""
    await guest.link.resume(sandbox_id="s", hostname="h", env={"A": "1", "B": "1", "LONG": "x" * 100_000})
    out = (await spawn(guest, "env", "-0", env={"B": "2"}))[1].decode()
    found = dict(pair.split("=", 1) for pair in out.split("\0") if pair)
    assert (found["A"], found["B"], found["E2B_SANDBOX"]) == ("1", "2", "true")
    assert guest.home.startswith(found["HOME"] + "/")
    assert found["LONG"] == "x" * 100_000


async def test_a_timeout(guest: Guest) -> None:
    """At its timeout a program is killed. Its output until then is there."""
    begun = time.monotonic()
    end, out, _ = await spawn(guest, "sh", "-c", "echo begun; sleep 30", timeout_ms=300)
    assert 0.3 <= time.monotonic() - begun < 0.3 + guest.link.time_scale
    assert (end.code, end.timed_out, out) == (124, True, b"begun\n")


async def test_what_can_not_be_run(guest: Guest) -> None:
    """A missing program or directory is refused by name, and nothing has started."""
    assert await refused(guest, wire.Spawn(argv=["frobnicate"], env={}, cwd=guest.home)) == "cannot_run"
    assert await refused(guest, wire.Spawn(argv=["true"], env={}, cwd="/no/such")) == "invalid"


async def test_leaving_a_conversation_cancels(guest: Guest) -> None:
    """A program whose reader leaves is ended, and the link goes on."""
    async with guest.link.ask(wire.Spawn(argv=["sleep", "60"], env={}, cwd=guest.home)) as conversation:
        await conversation.receive()
    assert (await spawn(guest, "echo", "next"))[1] == b"next\n"
    await eventually(lambda: not guest.link._conversations and not guest.link._cancelled)


# -- files


@pytest.mark.parametrize("size", [0, 1, 4096, 300_001, 10_000_000])
async def test_files_round_trip(guest: Guest, size: int) -> None:
    """A file of any size is read as it was written, whole and in parts. Its parents are made."""
    content = random.Random(size).randbytes(size)
    path = f"{guest.home}/a/b/ü {size}.bin"
    entry = await write(guest, path, content)
    assert (entry.name, entry.path, entry.kind, entry.size) == (f"ü {size}.bin", path, "file", size)
    assert await read(guest, path) == content
    assert await read(guest, path, offset=1, length=10) == content[1:11]
    assert await read(guest, path, offset=size) == b""
    assert (await write(guest, path, b"new")).size == 3
    assert await read(guest, path) == b"new"


async def test_a_write_that_is_cut_short_changes_nothing(guest: Guest) -> None:
    """Leaving in the middle of a write leaves the old content, and nothing beside it."""
    path = f"{guest.home}/f"
    await write(guest, path, b"old")
    async with guest.link.ask(wire.Write(path=path)) as conversation:
        await conversation.send(bytes(500_000))
    await guest.link.call(wire.Ping(), wire.Done)
    assert await read(guest, path) == b"old"

    async def names() -> list[str]:
        listed = await guest.link.call(wire.ListDir(path=guest.home), wire.Entries)
        return [entry.name for entry in listed.entries]

    for _ in range(100):
        if await names() == ["f"]:
            break
        await asyncio.sleep(0.02)
    assert await names() == ["f"]


async def test_directories(guest: Guest) -> None:
    """A directory is made, listed, moved and deleted with its content."""
    home = guest.home
    made = await guest.link.call(wire.MakeDir(path=f"{home}/d/e"), wire.Entry)
    assert (made.kind, made.path) == ("dir", f"{home}/d/e")
    assert await guest.link.call(wire.MakeDir(path=f"{home}/d/e"), wire.Entry)
    await write(guest, f"{home}/d/f", b"1")
    listed = await guest.link.call(wire.ListDir(path=f"{home}/d"), wire.Entries)
    assert [(entry.name, entry.kind) for entry in listed.entries] == [("e", "dir"), ("f", "file")]
    moved = await guest.link.call(wire.Move(source=f"{home}/d", destination=f"{home}/x/y"), wire.Entry)
    assert moved.path == f"{home}/x/y"
    assert await read(guest, f"{home}/x/y/f") == b"1"
    assert await refused(guest, wire.Stat(path=f"{home}/d")) == "not_found"
    await guest.link.call(wire.Delete(path=f"{home}/x"), wire.Done)
    assert await refused(guest, wire.Stat(path=f"{home}/x")) == "not_found"


async def test_a_directory_in_pages(guest: Guest) -> None:
    """A long directory comes in pages that together hold each name once, sorted."""
    names = sorted(f"{'x' * 200}{number}" for number in range(500))
    for name in names:
        await write(guest, f"{guest.home}/{name}", b"")
    found: list[str] = []
    pages = 0
    more = True
    while more:
        page = await guest.link.call(wire.ListDir(path=guest.home, after=found[-1] if found else ""), wire.Entries)
        found += [entry.name for entry in page.entries]
        more, pages = page.more, pages + 1
    assert found == names
    assert pages > 1


async def test_pages_of_a_size(guest: Guest) -> None:
    """A page has as many entries as were asked for, and tells whether there are more."""
    for name in "abcde":
        await write(guest, f"{guest.home}/{name}", b"")
    for after, limit, expected in (("", 2, ("ab", True)), ("b", 3, ("cde", False)), ("b", 2, ("cd", True))):
        page = await guest.link.call(wire.ListDir(path=guest.home, after=after, limit=limit), wire.Entries)
        assert ("".join(entry.name for entry in page.entries), page.more) == expected
    await write(guest, f"{guest.home}/bb", b"")  # between two pages
    page = await guest.link.call(wire.ListDir(path=guest.home, after="b", limit=2), wire.Entries)
    assert [entry.name for entry in page.entries] == ["bb", "c"]


async def test_files_refused(guest: Guest) -> None:
    """A refusal is a word of the wire."""
    home = guest.home
    await write(guest, f"{home}/f", b"1")
    assert await refused(guest, wire.Read(path=f"{home}/none")) == "not_found"
    assert await refused(guest, wire.Read(path=home)) == "is_directory"
    assert await refused(guest, wire.Read(path=f"{home}/f/x")) == "not_directory"
    assert await refused(guest, wire.Write(path=home)) == "is_directory"
    assert await refused(guest, wire.ListDir(path=f"{home}/f")) == "not_directory"
    assert await refused(guest, wire.ListDir(path=f"{home}/none")) == "not_found"
    assert await refused(guest, wire.Delete(path=f"{home}/none")) == "not_found"
    assert await refused(guest, wire.Move(source=f"{home}/none", destination=f"{home}/x")) == "not_found"
    assert await refused(guest, wire.MakeDir(path=f"{home}/f")) == "exists"


async def test_metrics(guest: Guest) -> None:
    """Readings are plausible."""
    found = await guest.link.call(wire.GetMetrics(), wire.Metrics)
    assert found.cpu_count >= 1
    assert 0 < found.mem_used < found.mem_total
    assert 0 < found.disk_used < found.disk_total
    assert abs(found.ts - time.time()) < 5


# -- the kernel


async def test_cells_keep_their_state(guest: Guest) -> None:
    """Values, text, errors and the count are right, and a cell knows the variables of earlier cells."""
    cell = await execute(guest, "x = 41\nprint('hello')\nx + 1")
    assert (cell.stdout, text_of(cell.results[0]), cell.error) == ("hello\n", "42", None)
    count = cell.executionCount
    assert count is not None
    failed = await execute(guest, "x / 0")
    assert failed.error is not None
    assert (failed.error.name, failed.error.value) == ("ZeroDivisionError", "division by zero")
    assert failed.error.traceback
    again = await execute(guest, "x")
    assert (text_of(again.results[0]), again.executionCount) == ("41", count + 2)


async def test_interrupt(guest: Guest) -> None:
    """A cell over its timeout is interrupted in time, and variables survive."""
    await execute(guest, "y = 5")
    begun = time.monotonic()
    cell = await execute(guest, "import time; time.sleep(60)", timeout=0.3)
    assert 0.3 <= time.monotonic() - begun < 0.3 + guest.link.time_scale
    assert cell.error is not None
    assert (cell.error.code, cell.error.stateKept) == ("exec_timeout", True)
    assert await value(guest, "y") == "5"


async def test_restart(guest: Guest) -> None:
    """After a restart the kernel is fresh and works at once."""
    await execute(guest, "z = 1")
    await guest.kernel.restart()
    cell = await execute(guest, "z")
    assert cell.error is not None
    assert cell.error.name == "NameError"
    assert cell.executionCount == 1


async def test_a_kernel_that_dies(guest: Guest) -> None:
    """The dead kernel's cell gets an error, and the next one runs in a new kernel. Files and programs stay."""
    await write(guest, f"{guest.home}/kept", b"1")
    cell = await execute(guest, "import os; os._exit(3)")
    assert cell.error is not None
    assert (cell.error.code, cell.error.stateKept) == ("kernel_restarted", False)
    assert "3" in cell.error.value
    assert await value(guest, "6 * 7") == "42"
    assert await read(guest, f"{guest.home}/kept") == b"1"


async def records_of(guest: Guest, request: str, after: int) -> list[Record]:
    """All messages that answer a request, up to the one that ends it."""
    found: list[Record] = []
    with guest.kernel.journal.reader(after) as reader:
        async with asyncio.timeout(20):
            while not found or not found[-1].ends:
                for each in await reader.next():
                    assert isinstance(each, Record)
                    if each.parent == request and not (found and found[-1].ends):
                        found.append(each)
    return found


async def ask(guest: Guest, kind: str, channel: str = "shell", **content: Any) -> list[Record]:
    """The answers to a message that is sent as a Jupyter client would."""
    after = guest.kernel.journal.last
    parts = message.new(channel, kind, content, session="theirs")
    if sending := guest.kernel.send(parts, "mine"):
        await sending
    return await records_of(guest, message.header(parts[1]).msg_id, after)


async def test_the_course_of_a_cell(guest: Guest) -> None:
    """A cell's messages come in Jupyter's order, each once, numbered, with the request as their parent."""
    after = guest.kernel.journal.last
    execution = guest.kernel.run("print('a')\n6 * 7")
    found = await records_of(guest, execution.id, after)
    kinds = [each.kind for each in found]
    assert kinds[:4] == ["status", "execute_input", "stream", "execute_result"]
    assert sorted(kinds[4:]) == ["execute_reply", "status"]
    assert [each.seq for each in found] == list(range(found[0].seq, found[0].seq + 6))
    assert [each.ends for each in found] == [False] * 5 + [True]
    assert {message.header(each.parts[2]).msg_id for each in found} == {execution.id}
    assert (execution.state, execution.last) == ("finished", found[-1].seq)


async def test_a_request_of_a_jupyter_client(guest: Guest) -> None:
    """The reply is for the asking session, published messages are for all. The request ends with the last of both."""
    found = await ask(guest, "kernel_info_request")
    assert sorted(each.kind for each in found) == ["kernel_info_reply", "status", "status"]
    for each in found:
        is_reply = each.kind == "kernel_info_reply"
        assert (each.parts[0], each.session) == ((b"shell", "mine") if is_reply else (b"iopub", None))
        assert message.header(each.parts[2]).session == "theirs"


async def test_the_control_channel_does_not_wait(guest: Guest) -> None:
    """While a cell runs, requests on the control channel are answered, and an interrupt ends the cell."""
    execution = guest.kernel.run("import time; time.sleep(60)")
    await eventually(lambda: execution.is_started)
    found = await ask(guest, "kernel_info_request", "control")
    assert [each.parts[0] for each in found if each.kind == "kernel_info_reply"] == [b"control"]
    assert execution.outcome is None
    await guest.kernel.interrupt()
    async with asyncio.timeout(5):
        await eventually(lambda: execution.outcome is not None)


async def test_input(guest: Guest) -> None:
    """A cell asks for a line, gets it, and goes on."""
    execution = guest.kernel.run("name = input('who? ')\nprint('hello', name)", with_input=True)
    told = []
    async for event in guest.kernel.events(execution):
        if event.type == "input_request":
            told.append((event.prompt, event.password))
            await guest.kernel.answer_input("Zoë")
        elif event.type == "stdout":
            told.append((event.text or "", None))
    assert told[0] == ("who? ", False)
    assert "".join(text for text, _ in told[1:]) == "hello Zoë\n"
    assert await value(guest, "name") == "'Zoë'"


async def test_the_kernels_state(guest: Guest) -> None:
    """The kernel is busy while a cell runs, and idle before and after."""
    assert guest.kernel.state == "idle"
    execution = guest.kernel.run("import time; time.sleep(0.2)")
    await eventually(lambda: execution.is_started)
    assert guest.kernel.state == "busy"
    await eventually(lambda: execution.outcome is not None)
    assert guest.kernel.state == "idle"


async def test_a_request_whose_kernel_ends(guest: Guest) -> None:
    """When a kernel ends, open requests of Jupyter's clients are answered with an error, and none waits on."""
    after = guest.kernel.journal.last
    first, second = (
        message.new("shell", "execute_request", {"code": code}, session="theirs")
        for code in ("import os; os._exit(3)", "1")
    )
    for parts in (first, second):
        if sending := guest.kernel.send(parts, "mine"):
            await sending
    for parts in (first, second):
        found = await records_of(guest, message.header(parts[1]).msg_id, after)
        (reply,) = (json.loads(each.parts[4]) for each in found if each.kind == "execute_reply")
        assert (reply["status"], reply["ename"]) == ("error", "KernelRestarted")
        assert json.loads(found[-1].parts[4]) == {"execution_state": "idle"}
    assert await value(guest, "6 * 7") == "42"


async def test_20_mb_arrive_intact(guest: Guest) -> None:
    """A display of 20 MB crosses in chunks unchanged."""
    cell = await execute(
        guest, "from IPython.display import display; display({'text/plain': 'ab' * 10000000}, raw=True)"
    )
    assert cell.error is None
    assert text_of(cell.results[0]) == "ab" * 10_000_000


async def test_control_passes_a_flood(guest: Guest) -> None:
    """While tens of megabytes wait to be read, a ping is answered at once."""
    content = bytes(30_000_000)
    await write(guest, f"{guest.home}/big", content)
    async with guest.link.ask(wire.Read(path=f"{guest.home}/big")) as conversation:
        assert isinstance(await conversation.receive(), wire.Entry)
        slowest = 0.0
        total = 0
        while isinstance(item := await conversation.receive(), tuple):
            total += len(item[1])
            if total % (1 << 20) < wire.CHUNK:
                begun = time.monotonic()
                await guest.link.call(wire.Ping(), wire.Done)
                slowest = max(slowest, time.monotonic() - begun)
    assert total == len(content)
    assert slowest < 0.5


async def test_many_conversations_at_once(guest: Guest) -> None:
    """Programs, files and a cell side by side do not mix."""
    contents = {f"{guest.home}/{n}": random.Random(n).randbytes(200_000) for n in range(10)}
    cell = asyncio.create_task(value(guest, "1 + 1"))
    await asyncio.gather(*(write(guest, path, content) for path, content in contents.items()))
    echoes, reads = await asyncio.gather(
        asyncio.gather(*(spawn(guest, "echo", str(n)) for n in range(10))),
        asyncio.gather(*(read(guest, path) for path in contents)),
    )
    assert [out for _, out, _ in echoes] == [f"{n}\n".encode() for n in range(10)]
    assert reads == list(contents.values())
    assert await cell == "2"


# -- rests and epochs


async def test_work_goes_on_after_a_rest(guest: Guest) -> None:
    """A cell, a command, an upload and a download are under way in a rest, and end as if there had been none."""
    content = random.Random(2).randbytes(5_000_000)
    await write(guest, f"{guest.home}/big", content)
    started = guest.kernel.journal.last
    execution = guest.kernel.run("print('begun')\nimport time\ntime.sleep(0.5)\nprint('done')")
    command = asyncio.create_task(spawn(guest, "sh", "-c", "echo begun; sleep 1"))
    echoed = asyncio.create_task(spawn(guest, "cat", stdin=content))
    reading = asyncio.create_task(read(guest, f"{guest.home}/big"))
    writing = asyncio.create_task(write(guest, f"{guest.home}/new", content))
    await eventually(lambda: execution.is_started)
    for _ in range(3):
        await guest.link.quiesce()
        asked = asyncio.create_task(guest.link.call(wire.Ping(), wire.Done))
        await asyncio.sleep(0.05)
        assert not asked.done()
        resumed = await guest.link.cont()
        assert resumed.home in guest.home
        assert await asked == wire.Done()
    assert await command == (wire.Exited(code=0), b"begun\n", b"")
    assert await echoed == (wire.Exited(code=0), content, b"")
    assert await reading == content
    assert (await writing).size == len(content)
    assert await read(guest, f"{guest.home}/new") == content
    found = await records_of(guest, execution.id, started)
    said = [json.loads(each.parts[4])["text"] for each in found if each.kind == "stream"]
    assert "".join(said) == "begun\ndone\n"


async def test_the_rest_of_a_flood(guest: Guest) -> None:
    """Output of a command that nobody reads, and of a cell, waits in the guest and comes whole after the rest."""
    code = "flood(4)" if isinstance(guest.vm, FakeVm) else "print('flood! ' * 600000)"
    cell = asyncio.create_task(execute(guest, code))
    program = ("flood", "4") if isinstance(guest.vm, FakeVm) else ("seq", "600000")
    async with guest.link.ask(wire.Spawn(argv=list(program), env={}, cwd=guest.home)) as conversation:
        assert isinstance(await conversation.receive(), wire.Started)
        await guest.link.quiesce()
        await guest.link.cont()
        size = 0
        while isinstance(item := await conversation.receive(), tuple):
            size += len(item[1])
    assert item == wire.Exited(code=0)
    assert size == (4 * 16 * len(PIECE) if isinstance(guest.vm, FakeVm) else 4_088_895)
    assert (await cell).error is None


async def test_a_new_epoch(driver: VmDriver) -> None:
    """A new link ends the commands of the old one. Environment, files, variables and the running cell stay."""
    vm = await driver.start("base")
    sock = vm.open()
    spare = sock.dup()
    link = await Link.open(sock)
    home = (await link.resume(sandbox_id="s", hostname="h", env={"MINE": "1"})).home
    old = Guest(vm, link, Kernel(link), home)
    await execute(old, "x = 41")
    await write(old, f"{home}/kept", b"1")
    running = asyncio.create_task(spawn(old, "sh", "-c", "echo begun; sleep 60"))
    old.kernel.run("import time; time.sleep(0.5)\nx = x + 1")
    async with link.ask(wire.Write(path=f"{home}/half")) as writing:
        await writing.send(bytes(2_000_000))
        await link.quiesce()
        link.close()
    with pytest.raises(SandboxDied):
        await running
    link = await Link.open(spare)
    assert (await link.cont()).home == home
    new = Guest(vm, link, Kernel(link), home)
    assert await value(new, "x") == "42"
    assert b"MINE=1\0" in (await spawn(new, "env", "-0"))[1]
    assert await read(new, f"{home}/kept") == b"1"
    assert await refused(new, wire.Stat(path=f"{home}/half")) == "not_found"
    assert link._strikes == 0
    await link.quiesce()
    await link.resume(sandbox_id="another", hostname="h", env={})
    assert b"MINE" not in (await spawn(new, "env", "-0"))[1]
    await new.kill()


# -- the real agent alone


@pytest.fixture
async def real(tmp_path: Path) -> AsyncIterator[Guest]:
    """A real agent of the test's own."""
    guest = await Guests(Unisolated(tmp_path)).start("base")
    yield guest
    await guest.kill()


async def test_a_timeout_ends_the_whole_group(real: Guest) -> None:
    """The children of a command die with it at its timeout, and so do those of one whose reader leaves."""
    script = "sleep 60 & echo $!; wait"
    _, out, _ = await spawn(real, "sh", "-c", script, timeout_ms=300)
    await eventually(lambda: not is_running(int(out)))
    async with real.link.ask(wire.Spawn(argv=["sh", "-c", script], env={}, cwd=real.home)) as conversation:
        assert isinstance(await conversation.receive(), wire.Started)
        item = await conversation.receive()
        assert isinstance(item, tuple)
        assert is_running(int(item[1]))
    await eventually(lambda: not is_running(int(item[1])))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def fill(directory: Path, files: int) -> None:
    """Make a directory with that many empty files in ten directories."""
    for number in range(files):
        if number < 10:
            (directory / f"{number}").mkdir(parents=True)
        (directory / f"{number % 10}" / f"{number}").touch()


async def test_a_delete_holds_up_nothing(real: Guest) -> None:
    """B7: while a large tree is deleted, the agent answers, and a command runs to its end."""
    fill(Path(real.home, "tree"), 20_000)
    deleting = asyncio.create_task(real.link.call(wire.Delete(path=f"{real.home}/tree"), wire.Done))
    await asyncio.sleep(0)  # its request is sent first
    assert await real.link.call(wire.Ping(), wire.Done) == wire.Done()
    assert (await spawn(real, "true", timeout_ms=1000))[0] == wire.Exited(code=0)
    assert not deleting.done()
    await deleting
    assert not Path(real.home, "tree").exists()


@pytest.mark.parametrize("kind", ["delete", "move"])
async def test_work_on_a_tree_ends_with_its_conversation(real: Guest, kind: str) -> None:
    """A delete, and a move to another file system, stop at the next entry when nobody wants their end any more."""
    tree = Path(real.home, "tree")
    fill(tree, 20_000)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert os.stat(other).st_dev != tree.stat().st_dev
        destination = Path(other, "tree")
        move = wire.Move(source=str(tree), destination=str(destination))
        async with real.link.ask(wire.Delete(path=str(tree)) if kind == "delete" else move):
            await real.link.call(wire.Ping(), wire.Done)
        await eventually(lambda: not real.link._cancelled, 20)
        left = sum(len(files) for _, _, files in os.walk(tree))
        if kind == "delete":
            assert 0 < left <= 20_000
        else:
            assert left == 20_000
            assert list(Path(other).iterdir()) == []


async def test_a_move_to_another_file_system(real: Guest) -> None:
    """Files, modes, times and links arrive, a file there is replaced, and nothing is left behind."""
    tree = Path(real.home, "tree")
    (tree / "empty").mkdir(parents=True)
    (tree / "script").write_text("content")
    (tree / "script").chmod(0o751)
    os.utime(tree / "script", ns=(5, 7))
    (tree / "link").symlink_to("nowhere")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        moved = Path(other, "a/b")
        entry = await real.link.call(wire.Move(source=str(tree), destination=str(moved)), wire.Entry)
        assert (entry.path, entry.kind) == (str(moved), "dir")
        assert sorted(each.name for each in moved.iterdir()) == ["empty", "link", "script"]
        found = (moved / "script").stat()
        assert ((moved / "script").read_text(), found.st_mode & 0o777, found.st_mtime_ns) == ("content", 0o751, 7)
        assert os.readlink(moved / "link") == "nowhere"
        assert not tree.exists()
        (tree.parent / "new").write_text("new")
        await real.link.call(wire.Move(source=str(tree.parent / "new"), destination=str(moved / "script")), wire.Entry)
        assert (moved / "script").read_text() == "new"
        assert len(os.listdir(moved)) == 3


async def test_random_state_stays_with_its_sandbox(real: Guest) -> None:
    """What user code has seeded, and the kernel's session, outlive a rest. Becoming another sandbox renews them."""
    draw = "random.getstate()[1][:5]"
    await execute(real, "import random; random.seed(1)")
    before, session = await value(real, draw), await value(real, "get_ipython().kernel.session.session")
    await real.link.quiesce()
    await real.link.cont()
    assert await value(real, draw) == before
    assert await value(real, "get_ipython().kernel.session.session") == session
    await real.link.quiesce()
    await real.link.resume(sandbox_id="another", hostname="h", env={})
    assert await value(real, draw) != before
    assert await value(real, "get_ipython().kernel.session.session") != session


async def test_a_new_epoch_ends_commands_and_tells_of_a_dead_kernel(tmp_path: Path) -> None:
    """The processes of an old link's commands are killed, and a new link hears that the kernel is dead."""
    vm = await Unisolated(tmp_path).start("base")
    sock = vm.open()
    spare = sock.dup()
    told: list[wire.Body] = []
    link = await Link.open(sock, on_event=told.append)
    guest = Guest(vm, link, Kernel(link), (await link.resume(sandbox_id="s", hostname="h", env={})).home)
    link.on_event = told.append
    async with link.ask(wire.Spawn(argv=["sleep", "60"], env={}, cwd=guest.home)) as conversation:
        started = await conversation.receive()
        assert isinstance(started, wire.Started)
        nursery = Path(f"/proc/{vm.pid}/task/{vm.pid}/children").read_text().split()[0]
        os.kill(int(nursery), signal.SIGKILL)
        await eventually(lambda: bool(told))
        assert is_running(started.pid)
        await link.quiesce()
        link.close()
    again: list[wire.Body] = []
    link = await Link.open(spare, on_event=again.append)
    await link.cont()
    await eventually(lambda: not is_running(started.pid))
    assert [each.state for each in again if isinstance(each, wire.KernelStatus)] == ["dead"]
    link.close()
    await vm.kill()


async def test_a_new_epoch_uses_numbers_again(tmp_path: Path) -> None:
    """A command of a new link is reached by its number, though an ended link's command had the same one."""
    vm = await Unisolated(tmp_path).start("base")
    sock = vm.open()
    spare = sock.dup()
    link = await Link.open(sock)
    home = (await link.resume(sandbox_id="s", hostname="h", env={})).home
    request = wire.Spawn(argv=["sleep", "60"], env={}, cwd=home)
    async with link.ask(request) as conversation:
        assert isinstance(await conversation.receive(), wire.Started)
        await link.quiesce()
        link.close()
    again = await Link.open(spare)
    continuing = asyncio.create_task(again.cont())
    await asyncio.sleep(0)  # both requests come with the Hello, before the old command has ended
    async with again.ask(request) as other:
        assert other.number == conversation.number
        await continuing
        assert isinstance(await other.receive(), wire.Started)
        await eventually(lambda: len(Path(f"/proc/{vm.pid}/task/{vm.pid}/children").read_text().split()) == 2)
        signalled = wire.Signal(stream=other.number, signal=signal.SIGTERM)
        assert await again.call(signalled, wire.Done) == wire.Done()
        assert await other.reply() == wire.Exited(code=143, signal=15)
    again.close()
    await vm.kill()


def is_clear(link: Link) -> bool:
    return not link._cancelled


async def test_another_link_goes_on_where_one_rests(tmp_path: Path) -> None:
    """With the rest of an earlier link a new one goes on: a command with its input and output, a cell, large messages.

    Whatever nobody waits for any more is cancelled in the guest.
    """
    vm = await Unisolated(tmp_path).start("base")
    sock = vm.open()
    account = Held().account("me")
    first = Guest(vm, link := await Link.open(sock), Kernel(link), Commands(link))
    first.home = (await link.resume(sandbox_id="s", hostname="h", env={})).home
    for _ in range(4):
        spare = sock.dup()
        mine = first.commands.start(["cat"], env={}, tag="cat", stdin=True)
        await mine.running()
        mine.write(b"x" * 3_000_000)
        flood = first.commands.start(["sh", "-c", "yes | head -c 30000000; sleep 1; exit 7"], env={}, tag="flood")
        await flood.running()
        cell = first.kernel.run("import time; print('y' * 3_000_000); time.sleep(0.5); 6 * 7", execution_id="cell")
        left = asyncio.create_task(link.call(wire.Spawn(argv=["sleep", "60"], env={}, cwd=first.home), wire.Exited, 99))
        await asyncio.sleep(random.random() / 5)
        async with link.at_rest():
            states, running = first.commands.at_rest()
            stored = msgspec.msgpack.encode(
                HostState(first.home, link.rest(running), first.kernel.state_at_rest(), states, b"")
            )
            dump = first.kernel.journal.dump()
            encoded = list(dump.pages())
            dump.close()
            error = SandboxPaused("paused")
            first.kernel.close(error)
            link.close(error)
        with pytest.raises(SandboxPaused):
            await left
        assert cell.outcome is not None
        assert cell.outcome.ending == "unknown"
        host = msgspec.msgpack.decode(stored, type=HostState)
        link = await Link.open(spare, rest=host.link)
        second = Guest(vm, link, Kernel(link), Commands(link), host.home)
        second.adopt(account, tmp_path)
        pages = map(decode_page, encoded)
        second.kernel.journal.restore(next(pages), pages, host.kernel.last, host.kernel.end)
        second.kernel.restore(host.kernel)
        second.commands.restore(host.commands, account)
        await link.cont()
        again = second.commands.find("cat")
        assert again.pid == mine.pid
        again.close_stdin()
        size = sum([len(each.parts[0]) if isinstance(each, Record) else 0 async for each in again.output()])
        assert size == 3_000_000
        over = second.commands.find("flood")
        async for _ in over.output():
            pass
        assert over.exited == wire.Exited(code=7)
        known = second.kernel.executions.get("cell")
        assert known is not None
        texts = [event async for event in second.kernel.events(known)]
        assert sum(len(each.text or "") for each in texts if each.type == "stdout") == 3_000_001
        assert texts[-1].outcome == "finished"
        await eventually(partial(is_clear, link))
        for each in list(second.commands):
            second.commands.forget(each)
        first, sock = second, spare
        first.kernel.executions = Executions(account)
    await first.kill()


async def test_killing_the_agent_leaves_no_process(real: Guest) -> None:
    """The kernel and its parent go with the agent."""
    pid = int(await value(real, "import os; os.getpid()"))
    parent = int(await value(real, "os.getppid()"))
    assert is_running(pid)
    await real.kill()
    await eventually(lambda: not is_running(pid) and not is_running(parent))


async def test_the_agent_survives_nonsense_without_answering(tmp_path: Path) -> None:
    """Bytes that are no frames end the agent's channel, and nothing hangs."""
    vm = await Unisolated(tmp_path).start("base")
    sock = vm.open()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_sendall(sock, os.urandom(5000))
    assert await asyncio.wait_for(vm.wait(), 10)
    await vm.kill()
    sock.close()


async def test_kernel_messages_hold_no_key(real: Guest, tmp_path: Path) -> None:
    """A message crosses without its signature, and the kernel's key stays inside."""
    seen: list[bytes] = []
    inner = real.link.on_kernel_message

    def tap(parts: list[memoryview]) -> None:
        seen.extend(bytes(part) for part in parts)
        inner(parts)

    real.link.on_kernel_message = tap
    assert (await execute(real, "print(1)")).stdout == "1\n"
    headers = [json.loads(part) for part in seen if part.startswith(b'{"msg_id"')]
    assert {header["msg_type"] for header in headers} >= {"status", "execute_input", "stream", "execute_reply"}
    (file,) = tmp_path.rglob("connection.json")
    key = json.loads(file.read_text())["key"].encode()
    assert len(key) >= 32
    assert key not in b"".join(seen)
    assert b"<IDS|MSG>" not in seen


async def test_an_answer_of_another_type_is_refused(guest: Guest) -> None:
    """`call` checks the type of the answer."""
    with pytest.raises(GuestUnresponsive, match="answered Ping with Done"):
        await guest.link.call(wire.Ping(), wire.Metrics)
