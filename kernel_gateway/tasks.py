"""Work that goes on when nobody waits for it any more."""

import asyncio
from typing import TypeVar

T = TypeVar("T")


async def to_its_end(task: asyncio.Task[T]) -> T:
    """The result of a task that goes on even if nobody waits for it any more."""
    # asyncio would complain of an exception that nobody has looked at.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(task)
