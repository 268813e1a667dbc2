"""Which templates machines can be started from, and the making of those that can't be used yet.

The server is ready with its first template. The others follow in the background, one after the other; whoever asks for
one of them meanwhile waits a little, and is then told how far it is.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from kernel_gateway.errors import TemplateNotReady
from kernel_gateway.images.templates import Template

log = logging.getLogger(__name__)

PATIENCE = 20.0
"""Seconds that a request waits for its template."""

Prepare = Callable[[Template, Callable[[str], None]], Awaitable[None]]
"""Builds what a template lacks and offers it on the driver; tells its steps."""


class Preparation:
    """The templates of one server, ready or being made."""

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare
        self._one_at_a_time = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._steps: dict[str, tuple[str, float]] = {}

    async def make(self, template: Template, step: Callable[[str], None]) -> None:
        """Make one and tell its steps; its failure is the caller's."""
        await self._begin(template, step)

    async def make_all(self, templates: Iterable[Template]) -> None:
        """Make them in turn. A failure is logged, and tried again when somebody asks for that template."""
        for template in templates:
            await asyncio.wait({self._begin(template, log.info)})

    async def require(self, template: Template) -> None:
        """Return when machines of the template can be started.

        Raises:
            TemplateNotReady: they can't yet.
        """
        task = self._begin(template, log.info)
        if not task.done():
            await asyncio.wait({task}, timeout=PATIENCE)
        if not task.done():
            step, since = self._steps[template.id]
            raise TemplateNotReady(
                f"template {template.id} is being built for the first time: {step} ({time.monotonic() - since:.0f} s)",
                hint="try again in some seconds; a template is built once",
            )
        if task.cancelled() or task.exception() is not None:
            raise TemplateNotReady(
                f"template {template.id} could not be built",
                hint="the server's log says why; the next request for the template tries again",
            )

    async def close(self) -> None:
        """Give up what is being made; the next start goes on from there."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _begin(self, template: Template, step: Callable[[str], None]) -> asyncio.Task[None]:
        """The task that makes the template: the one under way or done, a new one after a failure."""
        task = self._tasks.get(template.id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._tasks[template.id] = asyncio.create_task(self._make(template, step))
        return task

    async def _make(self, template: Template, step: Callable[[str], None]) -> None:
        def told(text: str) -> None:
            self._steps[template.id] = text.removeprefix(f"{template.id}: "), time.monotonic()
            step(text)

        self._steps[template.id] = "it waits for another template", time.monotonic()
        async with self._one_at_a_time:
            try:
                await self._prepare(template, told)
            except Exception as error:
                log.error("template %s could not be built: %s", template.id, error)
                raise
