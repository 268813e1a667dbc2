"""Answers for models: a cell's text within a limit. What the text leaves out is in a file of the sandbox.

The file is written only then. It has all of the cell's output, so that a model can search it with code.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple

from kernel_gateway.errors import CellvmError
from kernel_gateway.guest.files import Files
from kernel_gateway.guest.guest import Guest
from kernel_gateway.kernel.events import StreamEvent, values
from kernel_gateway.kernel.executions import Execution
from kernel_gateway.kernel.shape import Image, Shaper, plain, text_of

FOLDER = ".cellvm/out"
"""The folder of output in the sandbox user's home."""
KEPT = 20
"""Files of output that are kept. Older ones are deleted."""
WHOLE = 8 * 1024 * 1024
"""Bytes of output that a file holds."""
STORE_LIMIT = 10.0
"""Seconds that the guest has to store a file, times the driver's time scale."""


class Answer(NamedTuple):
    """A cell's text, the path of the file with all of it (None if nothing is left out), and its images."""

    text: str
    output_file: str | None
    images: list[Image]


async def answer(guest: Guest, execution: Execution, shaper: Shaper) -> Answer:
    """The text of the events that a shaper has got. Output that it leaves out is stored."""
    shaper.finish()
    path: str | None = None
    where = ""
    if shaper.is_cut:
        name = f"{FOLDER}/{execution.count or execution.id}.txt"
        try:
            async with asyncio.timeout(STORE_LIMIT * guest.link.time_scale):
                path = await _store(guest, execution, name)
            where = f"; all of it: {path}"
        except TimeoutError:
            where = "; it could not be stored in time"
        except CellvmError as error:
            where = f"; it could not be stored: {error!s:.60}"
    shaped = shaper.shaped(where)
    return Answer(shaped.text, path, shaped.images)


async def whole_answer(guest: Guest, execution: Execution, limit: int) -> Answer:
    """The text of all that the journal knows of an execution."""
    with guest.kernel.account.hold("answers of cells", 2 * limit):
        shaper = Shaper(limit)
        async for event in guest.kernel.events(execution, until=guest.kernel.journal.last):
            shaper.add(event)
        return await answer(guest, execution, shaper)


async def _store(guest: Guest, execution: Execution, name: str) -> str:
    """Write what an execution has put out so far, and return the file's path."""
    files = Files(guest)
    room = WHOLE
    async with files.write(name) as writing:
        async for data in _output(guest.kernel.events(execution, until=guest.kernel.journal.last)):
            await writing.send(data[:room])
            room -= len(data)
            if room <= 0:
                break
        await writing.finish()
    with guest.kernel.account.hold("listings of directories") as holding:
        listing = await files.list(FOLDER, holding=holding)
        for entry in sorted(listing.entries, key=lambda entry: entry.modified_ns)[:-KEPT]:
            await files.delete(entry.path)
    return files.resolve(name)


async def _output(events: AsyncIterator[StreamEvent]) -> AsyncIterator[bytes]:
    """What a cell has put out, as text. Tracebacks are whole."""
    async for event in events:
        text: str | None = None
        match event.type:
            case "stdout" | "stderr":
                text = event.text
            case "result" | "display":
                text = text_of(values(event.data))
            case "error" if event.error is not None:
                text = plain("\n".join(event.error.traceback)) or f"{event.error.name}: {event.error.value}"
        if text:
            yield (text if event.type in ("stdout", "stderr") else f"{text}\n").encode()
