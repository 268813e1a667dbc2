"""What the driver does when a machine can't even be begun, and what it hears of one; the rest is in tests/guest."""

import asyncio
import json
import os
import socket
from pathlib import Path

import pytest

from kernel_gateway.drivers import DriverError
from kernel_gateway.drivers.jail import Jail, Users
from kernel_gateway.drivers.qemu import Image, Qemu
from kernel_gateway.drivers.qemu_argv import Machine
from kernel_gateway.drivers.qmp import Qmp


class Card:
    """A network card, and where it comes from."""

    mechanism = "netns"
    tap = 0
    is_closed = False

    async def take(self) -> "Card":
        return self

    def close(self) -> None:
        self.is_closed = True


async def test_a_machine_that_can_not_be_begun_takes_no_card(tmp_path: Path) -> None:
    """A card that was made for it is closed, for nobody else would."""
    gone, other = os.pipe()
    os.close(gone)
    os.close(other)
    card = Card()
    driver = Qemu("qemu", "tcg", tmp_path, Jail(Users(0, gone), None, None), nics=card)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await driver.boot(Image(0, 0, 0), Machine("tcg", 1, 64), memory=0, disk=gone)
    assert card.is_closed


async def test_events_that_nobody_waits_for_are_not_kept() -> None:
    """A guest can cause any number of them: with a host's disk that is full, one for every block it writes."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    writer.write(b'{"QMP": {}}\n')

    async def answer(*events: str) -> None:
        command = json.loads(await reader.readline())
        lines = [{"event": name, "data": {"status": "completed"}} for name in events]
        for line in (*lines, {"return": command["execute"]}):
            writer.write(json.dumps(line).encode() + b"\n")

    opening = asyncio.create_task(Qmp.open(ours))
    await answer()
    qmp = await opening
    asking = asyncio.create_task(qmp.execute("stop"))
    await answer("MIGRATION", *["BLOCK_IO_ERROR"] * 1000)
    assert await asking == "stop"
    await qmp.migrated()
    assert len(qmp._events) == 1
    asking = asyncio.create_task(qmp.execute("cont"))
    await reader.readline()
    writer.close()
    await writer.wait_closed()
    for question in (asking, qmp.execute("cont")):
        with pytest.raises(DriverError, match="ended"):
            await asyncio.wait_for(question, 5)
    qmp.close()


async def test_a_qemu_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up in time."""
    monkeypatch.setattr("kernel_gateway.drivers.qmp.ANSWER_TIMEOUT", 0.1)
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    writer.write(b'{"QMP": {}}\n')
    opening = asyncio.create_task(Qmp.open(ours))
    await reader.readline()
    writer.write(b'{"return": {}}\n')
    qmp = await opening
    with pytest.raises(DriverError, match="did not answer cont"):
        await qmp.execute("cont")
    qmp.close()
    writer.close()
