"""The driver when a machine can't be begun, and when QEMU tells of one. Other tests of it are in tests/guest."""

import asyncio
import json
import os
import socket
from collections import deque
from contextlib import suppress
from pathlib import Path

import pytest

from kernel_gateway.drivers import DriverError
from kernel_gateway.drivers.base import Image
from kernel_gateway.drivers.jail import Jail, Users
from kernel_gateway.drivers.qemu import Qemu
from kernel_gateway.drivers.qemu_argv import Machine
from kernel_gateway.drivers.qmp import FATAL, Qmp
from tests.fakes import eventually


class Card:
    """A network card that is its own source."""

    mechanism = "netns"
    tap = 0
    is_closed = False

    async def take(self) -> "Card":
        return self

    def close(self) -> None:
        self.is_closed = True


async def test_a_machine_that_can_not_be_begun_takes_no_card(tmp_path: Path) -> None:
    """The machine's card is closed, because nothing else would close it."""
    gone, other = os.pipe()
    os.close(gone)
    os.close(other)
    card = Card()
    driver = Qemu("qemu", "tcg", tmp_path, Jail(Users(0, gone), None, None, 0), nics=card)
    with pytest.raises(DriverError, match=r"could not be started: .*Bad file descriptor"):
        await driver.boot(Image(0, 0, 0), Machine("tcg", 1, 64), memory=0, disk=gone)
    assert card.is_closed


class FakeQemu:
    """Speaks QMP like QEMU, but says what the test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.deaths: list[str] = []

    @classmethod
    async def open(cls, version: tuple[int, int] = (7, 2)) -> tuple["FakeQemu", Qmp]:
        ours, theirs = socket.socketpair()
        self = cls(*await asyncio.open_connection(sock=theirs))
        numbers = {"major": version[0], "minor": version[1], "micro": 0}
        self.say({"QMP": {"version": {"qemu": numbers}}})
        opening = asyncio.create_task(Qmp.open(ours, self.deaths.append))
        await self.answer({})
        return self, await opening

    def say(self, message: object) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")

    def event(self, name: str, **data: object) -> None:
        self.say({"event": name, "data": data})

    async def answer(self, value: object) -> str:
        """Answer the next command, and return its name."""
        command = json.loads(await self.reader.readline())
        self.say({"return": value})
        return str(command["execute"])

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


async def test_events_that_nobody_waits_for_are_not_kept() -> None:
    """Events are not kept, because a guest can cause any number. On a full host's disk each write causes one."""
    qemu, qmp = await FakeQemu.open()

    def kept() -> int:
        return sum(len(value) for name, value in vars(qmp).items() if isinstance(value, (list, deque, dict)))

    for _ in range(1000):
        qemu.event("BLOCK_IO_ERROR", status="completed")
    qemu.event("MIGRATION", status="completed")
    await qmp.migrated()
    assert kept() == 0
    asking = asyncio.create_task(qmp.execute("cont"))
    await qemu.reader.readline()
    await qemu.close()
    for question in (asking, qmp.execute("cont")):
        with pytest.raises(DriverError, match="ended"):
            await asyncio.wait_for(question, 5)
    qmp.close()


async def test_long_lines_are_read() -> None:
    """A line may be longer than 64 KiB, which is where a reader of asyncio gives up by itself."""
    qemu, qmp = await FakeQemu.open()
    asking = asyncio.create_task(qmp.execute("query-version"))
    await qemu.answer({"package": "x" * 200_000})
    assert len((await asyncio.wait_for(asking, 5))["package"]) == 200_000
    assert qemu.deaths == []
    qmp.close()
    await qemu.close()


@pytest.mark.parametrize(
    "said",
    [
        *(b"no json\n", b"[]\n", b"1\n", b"\xff\n", b"[" * 100_000 + b"\n", b"x" * 3_000_000),
        *(b'{"event": "MIGRATION", "data": 1}\n', b'{"error": 1}\n', b"{}\n", b'{"event": []}\n'),
    ],
    ids=lambda said: repr(said[:30]),
)
async def test_a_qemu_that_speaks_no_qmp(said: bytes) -> None:
    """A QEMU that can't be controlled any more is ended. Whoever waits for an answer is told."""
    qemu, qmp = await FakeQemu.open()
    asking = asyncio.create_task(qmp.execute("cont"))
    await qemu.reader.readline()
    qemu.writer.write(said)
    with pytest.raises(DriverError, match="ended"):
        await asyncio.wait_for(asking, 5)
    (why,) = qemu.deaths
    assert why.startswith("its QEMU says what is no QMP")
    assert len(why) <= 200
    qmp.close()
    with suppress(ConnectionError):  # bytes that were not read any more
        await qemu.close()


@pytest.mark.parametrize("said", [b"hello\n", b"{}\n", b'{"QMP": []}\n', b"x" * 3_000_000, b""])
async def test_a_qemu_that_begins_otherwise(said: bytes) -> None:
    """What does not begin as QEMU does is not controlled."""
    ours, theirs = socket.socketpair()
    _, writer = await asyncio.open_connection(sock=theirs)
    writer.write(said)
    if not said:
        writer.write_eof()
    with pytest.raises(DriverError, match=r"begin|ended before"):
        await asyncio.wait_for(Qmp.open(ours, lambda why: None), 5)
    writer.close()


async def test_a_qemu_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that does not answer is given up in time."""
    qemu, qmp = await FakeQemu.open()
    monkeypatch.setattr("kernel_gateway.drivers.qmp.ANSWER_TIMEOUT", 0.1)
    with pytest.raises(DriverError, match="did not answer cont"):
        await qmp.execute("cont")
    qmp.close()
    await qemu.close()


async def test_a_migration_that_fails_says_why() -> None:
    """The caller that waits for a state to be moved gets its failure, in QEMU's words."""
    qemu, qmp = await FakeQemu.open()
    waiting = asyncio.create_task(qmp.migrated())
    for status in ("setup", "active", "failed"):
        qemu.event("MIGRATION", status=status)
    assert await qemu.answer({"status": "failed", "error-desc": "No space left on device"}) == "query-migrate"
    with pytest.raises(DriverError, match="could not be moved: No space left on device"):
        await asyncio.wait_for(waiting, 5)
    qmp.close()
    await qemu.close()


@pytest.mark.parametrize("event", [*FATAL, "WATCHDOG", "SHUTDOWN", "RESUME"])
async def test_events_that_end_a_machine(event: str) -> None:
    """An event that makes a machine useless ends it, with the reason. Other events do not."""
    qemu, qmp = await FakeQemu.open()
    qemu.event(event, guest=True)
    await eventually(lambda: qemu.deaths == ([FATAL[event]] if event in FATAL else []))
    qmp.close()
    await qemu.close()


async def test_only_a_stop_that_was_asked_for_is_none() -> None:
    """A STOP after our own command is expected. A STOP after the machine went on is its end."""
    qemu, qmp = await FakeQemu.open()
    for call, name in ((qmp.stop, "STOP"), (qmp.cont, "RESUME")):
        asking = asyncio.create_task(call())
        qemu.event(name)
        await qemu.answer({})
        await asking
    assert qemu.deaths == []
    qemu.event("STOP")
    await eventually(lambda: qemu.deaths == [FATAL["STOP"]])
    qmp.close()
    await qemu.close()


@pytest.mark.parametrize(
    ("version", "command", "uri"),
    [((7, 2), "getfd", "fd:state"), ((8, 1), "getfd", "fd:state"), ((8, 2), "add-fd", "file:/dev/fdset/7"),
     ((10, 0), "add-fd", "file:/dev/fdset/7")],
)  # fmt: skip
async def test_a_state_is_passed_as_this_qemu_wants_it(version: tuple[int, int], command: str, uri: str) -> None:
    """Newer versions of QEMU take the state as a file. Older ones take only a descriptor."""
    qemu, qmp = await FakeQemu.open(version)
    passing = asyncio.create_task(qmp.pass_state(0))
    assert await qemu.answer({}) == command
    assert await passing == uri
    qmp.close()
    await qemu.close()
