"""A journal's pages on their way to one client. They are held for the kernel's owner until the client has taken them.

A client that does not read keeps what it was given last. Hundreds of such clients could keep very much, because a page
has a megabyte, and a large message is a page of its own. So a page is counted before it is taken. Without room for it,
it is taken in small parts, which are not counted. So every client goes on. Only a large message waits for room.
"""

import asyncio
from collections.abc import AsyncGenerator

from kernel_gateway.held import SMALL, Account
from kernel_gateway.kernel.journal import PAGE, Gap, Reader, Record

COPIES = 2
"""How often the bytes of a page are in memory while they are sent."""
LARGE = 2 * PAGE
"""Bytes from which on a page holds a message that can't be taken in small parts."""
PAUSE = 0.05
"""Seconds between looks for room."""


def cost(size: int, account: Account) -> int:
    """Bytes to hold for a page: at most half of what the account may, so that there can be room beside other things."""
    return min(COPIES * size, account.held.most // 2)


async def pages(reader: Reader, account: Account) -> AsyncGenerator[list[Record | Gap], None]:
    """What the reader finds, until the journal's end. Close it after use.

    A page is held until the next one is asked for.
    """
    with reader, account.hold("output on its way to clients") as holding:
        while await reader.arrived():
            size = reader.ahead
            if size <= SMALL or holding.grow(cost(size, account)):
                yield reader.take(max(size, SMALL))
                holding.resize(0)
            elif size <= LARGE:
                yield reader.take(SMALL)
            else:
                await asyncio.sleep(PAUSE)
