"""Answers for models: a cell's text within a limit. What the text leaves out is in a file of the sandbox.

The file is written only then. It has all of the cell's output, so that a model can search it with code.
"""

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import NamedTuple

import msgspec

from kernel_gateway.errors import CellvmError
from kernel_gateway.guest.files import Files
from kernel_gateway.guest.guest import Guest
from kernel_gateway.kernel.events import StreamEvent, values
from kernel_gateway.kernel.executions import Execution
from kernel_gateway.kernel.shape import TABLE, Image, Shaper, plain, text_of

FOLDER = ".cellvm/out"
"""The folder of output in the sandbox user's home."""
KEPT = 20
"""Files of output that are kept. Older ones are deleted."""
WHOLE = 8 * 1024 * 1024
"""Bytes of output that a file holds."""
STORE_LIMIT = 10.0
"""Seconds that the guest has to store a file, times the driver's time scale."""


class Link(NamedTuple):
    """An image that is not shown, as a file of the sandbox."""

    number: int
    mime: str
    path: str


class Answer(NamedTuple):
    """A cell's text, the path of the file with all of it (None if nothing is left out), and its images."""

    text: str
    output_file: str | None
    images: list[Image]


async def told(events: AsyncIterator[StreamEvent], wait: float | None, *takers: Callable[[StreamEvent], None]) -> int:
    """Give events to all takers, for `wait` seconds at most; return the journal's number of the last, 0 without any."""
    last = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(wait):
            async for event in events:
                last = max(last, event.seq)
                for take in takers:
                    take(event)
    return last


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


async def images_as_files(guest: Guest, execution: Execution, wanted: list[int], since: int) -> list[Link]:
    """Store the images of these numbers, counted from the journal's number `since` on, and return where they are."""
    links: list[Link] = []
    number = 0
    async for event in guest.kernel.events(execution, since, until=guest.kernel.journal.last):
        data = values(event.data) if event.type in ("result", "display") and TABLE not in values(event.data) else {}
        mime = next((each for each in data if each.startswith("image/")), None)
        if mime is None:
            continue
        number += 1
        if number in wanted:
            raw = bytes(data[mime])
            content = raw if not raw.startswith(b'"') else str(msgspec.json.decode(raw)).encode()
            if not mime.endswith("xml"):
                try:
                    content = base64.b64decode(content)
                except binascii.Error:
                    continue
            suffix = re.sub("[^a-z0-9]", "", mime.removeprefix("image/").partition("+")[0])[:8] or "bin"
            name = f"{FOLDER}/{execution.count or execution.id}-{number}.{suffix}"
            async with Files(guest).write(name) as writing:
                await writing.send(content)
                await writing.finish()
            links.append(Link(number, mime, Files(guest).resolve(name)))
    return links


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
