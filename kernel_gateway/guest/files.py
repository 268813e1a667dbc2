"""The files of a guest, below any dialect of HTTP.

The guest is hostile. The wire bounds every text of an entry, and `Files.list` bounds how many entries there are, how
large they are together, and how long they may take.
"""

import asyncio
import posixpath
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise

from guest_agent import wire
from guest_agent.wire import Entries, Entry
from kernel_gateway.errors import GuestFailure, GuestUnresponsive, InvalidRequest
from kernel_gateway.guest.guest import Guest
from kernel_gateway.guest.link import Conversation
from kernel_gateway.held import Holding

MAX_ENTRIES = 10_000
"""Entries of one listing."""
LISTING_SIZE = 8 * 1024 * 1024
"""Characters of names, paths and targets in one listing, roughly."""
ENTRY_COST = 1000
"""Bytes that an entry costs in memory besides its texts, with the answer that is made of it."""
LIST_TIMEOUT = 30.0
"""Seconds for one listing, times the driver's time scale."""
TREE_TIMEOUT = 600.0
"""Seconds for deleting or moving a tree, times the driver's time scale. The agent stops when the client hangs up."""


def resolve(guest: Guest, path: str) -> str:
    """An absolute path in the guest; `~` and relative paths mean the home directory. The guest resolves the rest."""
    if "\0" in path:
        raise InvalidRequest("a path can't hold a NUL")
    if path == "~" or path.startswith("~/"):
        path = guest.home + path[1:]
    return posixpath.join(guest.home, path)


def cost(entry: Entry) -> int:
    """Bytes that an entry of a listing costs, roughly. Its texts are in the answer, too."""
    return ENTRY_COST + 2 * sum(map(sys.getsizeof, (entry.name, entry.path, entry.target)))


@dataclass(frozen=True, slots=True)
class Listing:
    """A part of a directory, sorted by name. With `more`, entries follow after the last of these."""

    entries: list[Entry]
    more: bool


@dataclass(frozen=True, slots=True)
class Content:
    """A file that is being read. `pieces` gives `size` bytes, or those to the file's end if `size` is None."""

    entry: Entry
    size: int | None
    _conversation: Conversation

    async def pieces(self) -> AsyncIterator[bytes]:
        """The bytes, as they come.

        Raises:
            GuestFailure: the file shrank meanwhile.
        """
        left = self.size
        while isinstance(item := await self._conversation.receive(), tuple):
            data = item[1][:left]
            if left is not None:
                left -= len(data)
            yield data
        if left:
            raise GuestFailure("failed", "the file shrank while it was being read")


@dataclass(frozen=True, slots=True)
class Writing:
    """A file that is being written. Its old content stays until `finish`."""

    _conversation: Conversation

    async def send(self, data: bytes) -> None:
        """Send some content, as fast as the guest takes it. A refusal of the guest is raised by `finish`."""
        await self._conversation.send(data)

    async def finish(self) -> Entry:
        """Put the content in its place, and return the file's entry."""
        self._conversation.end()
        entry = await self._conversation.reply()
        if not isinstance(entry, Entry):
            raise GuestUnresponsive(f"the guest answered a write with {type(entry).__name__}")
        return entry


class Files:
    """The files of one guest. Relative paths begin in its home.

    Every method raises InvalidRequest for a path that can't be, GuestFailure when the guest refuses, and
    GuestUnresponsive or SandboxDied when it does not answer as it must.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._link = guest.link

    def resolve(self, path: str) -> str:
        """The absolute path, as the guest gets it."""
        return resolve(self._guest, path)

    async def stat(self, path: str) -> Entry:
        """The entry at a path."""
        return await self._link.call(wire.Stat(path=self.resolve(path)), Entry)

    async def list(self, path: str, *, holding: Holding, after: str = "", limit: int = MAX_ENTRIES) -> Listing:
        """The entries of a directory with names after `after`.

        There are fewer than `limit` when there are no more, or when they are over LISTING_SIZE together.

        Args:
            holding: counts the entries. The caller releases it when it needs them no more.

        Raises:
            TooManyRequests, HostFull: there is no room for so many entries.
        """
        path = self.resolve(path)
        entries: list[Entry] = []
        size = 0
        more = True
        try:
            async with asyncio.timeout(LIST_TIMEOUT * self._link.time_scale):
                while more and len(entries) < limit and size < LISTING_SIZE:
                    request = wire.ListDir(path=path, after=after, limit=limit - len(entries))
                    page = await self._link.call(request, Entries)
                    self._check(page, request)
                    after = page.entries[-1].name if page.entries else after
                    holding.resize(holding.size + sum(map(cost, page.entries)))
                    entries += page.entries
                    size += sum(len(each.name) + len(each.path) + len(each.target or "") for each in page.entries)
                    more = page.more
        except TimeoutError:
            raise GuestUnresponsive("the guest did not list a directory in time") from None
        return Listing(entries, more)

    def _check(self, page: Entries, request: wire.ListDir) -> None:
        """Give up a guest whose page can't be right, because such pages may go on for ever."""
        names = [request.after, *(each.name for each in page.entries)]
        is_sorted = all(earlier < later for earlier, later in pairwise(names))
        if not is_sorted or len(page.entries) > request.limit or (page.more and not page.entries):
            error = GuestUnresponsive("the guest broke the protocol: a page of a directory that can't be right")
            self._link.close(error)
            raise error

    @asynccontextmanager
    async def read(
        self, path: str, offset: int = 0, length: int = -1, *, is_sent: bool = True
    ) -> AsyncIterator[Content]:
        """Open a regular file for the time of the block.

        Args:
            length: bytes from `offset`; negative for all up to the file's end.
            is_sent: False to learn how many bytes there are, and get none.
        """
        path = self.resolve(path)
        async with self._link.ask(wire.Read(path=path, offset=offset, length=length if is_sent else 0)) as conversation:
            entry = await conversation.receive()
            if not isinstance(entry, Entry):
                raise GuestUnresponsive("the guest answered a read with something that is not a file")
            size: int | None = length if length >= 0 else max(entry.size - offset, 0)
            if not size and path.startswith(("/proc/", "/sys/")):
                size = None  # these files have size 0 and hold something
            yield Content(entry, size, conversation)

    @asynccontextmanager
    async def write(self, path: str) -> AsyncIterator[Writing]:
        """Open a file for new content. Its parents are made. Without `finish` the old content stays."""
        async with self._link.ask(wire.Write(path=self.resolve(path))) as conversation:
            yield Writing(conversation)

    async def make_dir(self, path: str) -> Entry:
        """Make a directory with its parents, unless it exists already."""
        return await self._link.call(wire.MakeDir(path=self.resolve(path)), Entry)

    async def move(self, source: str, destination: str) -> Entry:
        """Move a file or a tree, and return its entry at its new place."""
        request = wire.Move(source=self.resolve(source), destination=self.resolve(destination))
        return await self._link.call(request, Entry, TREE_TIMEOUT)

    async def delete(self, path: str) -> None:
        """Delete a file, or a directory with its content."""
        await self._link.call(wire.Delete(path=self.resolve(path)), wire.Done, TREE_TIMEOUT)
