"""Pages of a journal are held while a client has them, and every client gets everything, with room or without."""

import asyncio
from contextlib import aclosing

import pytest

from kernel_gateway.held import SMALL, Held
from kernel_gateway.kernel.journal import Journal, Record
from kernel_gateway.kernel.pages import COPIES, pages

MIB = 1024 * 1024


@pytest.fixture
def journal() -> Journal:
    """A journal with two pages on disk and one in memory, of messages of 10 KB."""
    journal = Journal(memory=MIB)
    for number in range(300):
        journal.append([b"iopub", b"%05d" % number, b"x" * 10_000], "stream")
    return journal


async def read(journal: Journal, held: Held) -> tuple[list[int], list[int], list[int]]:
    """Numbers of all messages, sizes of pages, and what was held with each."""
    numbers, sizes, holdings = list[int](), list[int](), list[int]()
    with journal.reader(0) as reader:
        journal.close()  # what is on disk stays for readers that are there
        found = pages(reader, held.account("a"))
        async for page in found:
            numbers += [each.seq for each in page]
            sizes.append(sum(each.size for each in page if isinstance(each, Record)))
            holdings.append(held.of("a"))
    return numbers, sizes, holdings


async def test_a_page_is_held_while_a_client_has_it(journal: Journal) -> None:
    """Everything comes in pages, each counted twice while it is sent, and nothing is held afterwards."""
    held = Held()
    numbers, sizes, holdings = await read(journal, held)
    assert numbers == list(range(1, 301))
    assert len(sizes) <= 4
    assert all(holding >= COPIES * size for size, holding in zip(sizes, holdings, strict=True) if size > SMALL)
    assert held.size == 0


async def test_without_room_pages_are_small(journal: Journal) -> None:
    """A client of a key at its bound gets everything in small parts, in order, and holds nothing more."""
    held = Held(most=100)
    held.account("a").hold("of a test", 100)
    numbers, sizes, holdings = await read(journal, held)
    assert numbers == list(range(1, 301))
    assert max(sizes) <= SMALL
    assert set(holdings) == {100}


async def test_a_large_message_waits_for_room() -> None:
    """A message of many megabytes comes as soon as there is room, also one that is larger than the bound."""
    for is_on_disk in (False, True):
        journal = Journal(memory=MIB)
        journal.append([b"iopub", b"x" * (5 * MIB)], "display_data")
        if is_on_disk:
            journal.append([b"iopub", b"y"], "stream")
        held = Held(most=4 * MIB)
        other = held.account("a").hold("of a test", 3 * MIB)
        reading = asyncio.create_task(read(journal, held))
        await asyncio.sleep(0.2)
        assert not reading.done()
        other.release()
        numbers, sizes, holdings = await reading
        assert (numbers[0], sizes[0] > 5 * MIB, holdings[0]) == (1, True, 2 * MIB)
        assert held.size == 0


async def test_a_client_that_leaves_holds_nothing(journal: Journal) -> None:
    """A generator that is closed in the middle releases its page and its place."""
    held = Held()
    async with aclosing(pages(journal.reader(0), held.account("a"))) as found:
        await anext(found)
        assert held.size > 0
        assert len(journal._readers) == 1
    assert (held.size, len(journal._readers)) == (0, 0)
    journal.close()
