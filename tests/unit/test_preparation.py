"""Templates that are not ready yet: requests wait for them, and are told about progress and failures."""

import asyncio
from collections.abc import Callable

import pytest

from kernel_gateway.errors import TemplateNotReady
from kernel_gateway.images import preparation
from kernel_gateway.images.preparation import Preparation
from kernel_gateway.images.templates import Template
from tests.fakes import eventually

FIRST, SECOND, THIRD = (
    Template(id=name, description="", vcpus=1, memory_mb=1, disk_mb=1) for name in ("first", "second", "third")
)


class Workshop:
    """Makes templates when it is told to."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.busy = 0
        self.go = asyncio.Event()
        self.failure: Exception | None = None

    async def prepare(self, template: Template, step: Callable[[str], None]) -> None:
        self.begun.append(template.id)
        self.busy += 1
        assert self.busy == 1, "one at a time"
        step(f"{template.id}: boot the template")
        try:
            await self.go.wait()
            if self.failure is not None:
                raise self.failure
        finally:
            self.busy -= 1


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


async def test_a_template_that_is_ready(workshop: Workshop) -> None:
    """A template is made once, however many requests ask for it."""
    workshop.go.set()
    told: list[str] = []
    making = Preparation(workshop.prepare)
    await making.make(FIRST, told.append)
    assert told == ["first: boot the template"]
    await asyncio.gather(*(making.require(FIRST) for _ in range(5)))
    assert workshop.begun == ["first"]
    await making.close()


async def test_whoever_asks_early_waits_a_little(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request gets its template when it is made in time. Otherwise the request is told the progress."""
    making = Preparation(workshop.prepare)
    rest = asyncio.create_task(making.make_all([FIRST, SECOND]))
    await asyncio.sleep(0)
    early = asyncio.create_task(making.require(FIRST))
    await asyncio.sleep(0.05)
    assert not early.done()
    monkeypatch.setattr(preparation, "PATIENCE", 0.05)
    with pytest.raises(
        TemplateNotReady, match=r"first is being built for the first time: boot the template \(0 s\)"
    ) as caught:
        await making.require(FIRST)
    assert caught.value.retry_after == 10
    with pytest.raises(TemplateNotReady, match=r"third is being built .*: it waits for another template"):
        await making.require(THIRD)
    workshop.go.set()
    await early
    await rest
    await making.require(SECOND)
    await making.require(THIRD)
    assert sorted(workshop.begun) == ["first", "second", "third"]
    await making.close()


async def test_the_one_that_is_asked_for_is_next(workshop: Workshop) -> None:
    """A request waits for the template that is being made, not for all others that nobody has asked for."""
    making = Preparation(workshop.prepare)
    rest = asyncio.create_task(making.make_all([FIRST, SECOND, THIRD]))
    await eventually(lambda: workshop.begun == ["first"])
    asked = asyncio.create_task(making.require(THIRD))
    await asyncio.sleep(0)
    workshop.go.set()
    await asked
    await rest
    assert workshop.begun == ["first", "third", "second"]
    await making.close()


async def test_a_failure_is_told_and_tried_again(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    """A request for a template that can't be built fails, and the log says why. The next request tries again."""
    workshop.go.set()
    workshop.failure = RuntimeError("no space left")
    making = Preparation(workshop.prepare)
    await making.make_all([FIRST])
    assert "template first could not be built: no space left" in caplog.text
    with pytest.raises(TemplateNotReady, match="could not be built"):
        await making.require(FIRST)
    workshop.failure = None
    await making.require(FIRST)
    assert workshop.begun == ["first"] * 3
    await making.close()


async def test_the_first_templates_failure_is_the_callers(workshop: Workshop) -> None:
    """A start without its template fails with the reason."""
    workshop.go.set()
    workshop.failure = RuntimeError("no space left")
    making = Preparation(workshop.prepare)
    with pytest.raises(RuntimeError, match="no space left"):
        await making.make(FIRST, lambda _: None)
    await making.close()


async def test_closing_gives_up(workshop: Workshop) -> None:
    """A server that stops does not wait for a build, and tells the request that waits for it."""
    making = Preparation(workshop.prepare)
    waiting = asyncio.create_task(making.require(FIRST))
    await asyncio.sleep(0.02)
    await making.close()
    with pytest.raises(TemplateNotReady):
        await asyncio.wait_for(waiting, 5)
    assert workshop.busy == 0
