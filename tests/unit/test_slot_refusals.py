"""Readings of a slot's filter are shared, because each takes two processes of root. The filter here is a fake."""

import asyncio
import json

import pytest

from kernel_gateway.drivers import DriverError
from kernel_gateway.network import slot as module
from kernel_gateway.network.policy import Floor
from kernel_gateway.network.slot import Slot


class FakeFilter(Slot):
    """A slot whose filter answers with one more refusal each time it is read."""

    def __init__(self) -> None:
        super().__init__("netns", -1, -1, -1, [], Floor(), to_gate=False)
        self.runs: list[str] = []
        self.fails = False
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def run(self, *argv: str, text: str = "") -> str:
        self.runs.append(argv[-1])
        await self.may_answer.wait()
        if self.fails:
            raise DriverError("of a test")
        value = {"concat": [1, f"192.0.2.{len(self.runs)}", 6, 443]}
        element = {"elem": {"val": value, "counter": {"packets": 1}, "expires": 1}}
        return json.dumps({"nftables": [{"set": {"timeout": 2, "elem": [element]}}]})


async def test_many_at_once_are_one_reading() -> None:
    """S16: 150 requests at once read the filter once, which is two processes, and each gets the answer."""
    slot = FakeFilter()
    slot.may_answer.clear()
    asking = [asyncio.create_task(slot.refusals()) for _ in range(150)]
    await asyncio.sleep(0)
    asking[0].cancel()  # the others do not depend on who has asked first
    await asyncio.sleep(0)
    slot.may_answer.set()
    first, *others = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(first, asyncio.CancelledError)
    assert slot.runs == ["refused", "refused_other"]
    assert all(isinstance(each, list) and len(each) == 2 for each in others)


async def test_a_reading_is_shared_for_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request within the second gets the same reading, with names up to date. A later one gets another."""
    slot = FakeFilter()
    await slot.refusals()
    slot.refused("x.example.net", 0, "dns", "floor")
    assert "x.example.net" in [each.destination for each in await slot.refusals()]
    assert len(slot.runs) == 2
    monkeypatch.setattr(module, "REFUSALS_SHARED", 0)
    await asyncio.sleep(0.001)
    assert "192.0.2.4" in [each.destination for each in await slot.refusals()]
    assert len(slot.runs) == 4


async def test_a_reading_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """All who wait for a reading are told that it failed, and a later one may succeed."""
    slot = FakeFilter()
    slot.fails = True
    found = await asyncio.gather(*(slot.refusals() for _ in range(3)), return_exceptions=True)
    assert [str(each) for each in found] == ["of a test"] * 3
    assert len(slot.runs) == 1
    slot.fails = False
    monkeypatch.setattr(module, "REFUSALS_SHARED", 0)
    await asyncio.sleep(0.001)
    assert len(await slot.refusals()) == 2
