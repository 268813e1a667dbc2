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
from kernel_gateway.errors import GuestFailure, GuestUnresponsive, InvalidRequest, TooLarge
from kernel_gateway.guest.guest import Guest
from kernel_gateway.guest.link import Conversation, Link
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


def resolve(home: str, path: str) -> str:
    """An absolute path in the guest; `~` and relative paths mean the home directory. The guest resolves the rest."""
    if "\0" in path:
        raise InvalidRequest("a path can't hold a NUL")
    if path == "~" or path.startswith("~/"):
        path = home + path[1:]
    return posixpath.join(home, path) if path else home


def cost(entry: Entry) -> int:
    """Bytes that an entry of a listing costs, roughly. Its texts are in the answer, too."""
    texts = (entry.name, entry.path, entry.target, *entry.metadata, *entry.metadata.values())
    return ENTRY_COST + 2 * sum(map(sys.getsizeof, texts))


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
    """A file that is being written. Its old content stays until `finish`, unless it is written in place."""

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
    """The files of one guest, with the rights of one user. Relative paths begin in the user's home.

    Every method raises InvalidRequest for a path that can't be, GuestFailure when the guest refuses, and
    GuestUnresponsive or SandboxDied when it does not answer as it must.
    """

    def __init__(self, guest: Guest, user: str = "", home: str = "") -> None:
        self._guest = guest
        self._link = guest.link
        self._user = user
        self._home = home or guest.home

    @classmethod
    async def of(cls, guest: Guest, user: str) -> "Files":
        """The files with the rights of the user of that name. A user that does not exist is a GuestFailure."""
        if user in ("", guest.user):
            return cls(guest)
        return cls(guest, user, (await guest.link.call(wire.GetUser(name=user), wire.User)).home)

    def resolve(self, path: str) -> str:
        """The absolute path, as the guest gets it."""
        return resolve(self._home, path)

    async def stat(self, path: str) -> Entry:
        """The entry at a path."""
        return await self._link.call(wire.Stat(path=self.resolve(path), user=self._user), Entry)

    async def tree(self, path: str, depth: int, *, holding: Holding) -> list[Entry]:
        """The entries of a directory and, up to `depth`, of those in it, each before what is in it.

        Links are not followed.

        Args:
            holding: counts the entries, as for `list`.

        Raises:
            TooLarge: there are more than MAX_ENTRIES.
        """
        path = self.resolve(path)
        levels = [iter((await self.list(path, holding=holding)).entries)]
        found: list[Entry] = []
        while levels:
            entry = next(levels[-1], None)
            if entry is None:
                levels.pop()
                continue
            found.append(entry)
            if len(found) > MAX_ENTRIES:
                raise TooLarge(f"a listing has at most {MAX_ENTRIES} entries", hint="list with a smaller depth")
            if entry.kind == "dir" and entry.target is None and len(levels) < depth:
                levels.append(iter((await self.list(entry.path, holding=holding)).entries))
        return found

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
                    request = wire.ListDir(path=path, after=after, limit=limit - len(entries), user=self._user)
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
        request = wire.Read(path=path, offset=offset, length=length if is_sent else 0, user=self._user)
        async with self._link.ask(request) as conversation:
            entry = await conversation.receive()
            if not isinstance(entry, Entry):
                raise GuestUnresponsive("the guest answered a read with something that is not a file")
            size: int | None = length if length >= 0 else max(entry.size - offset, 0)
            if not size and path.startswith(("/proc/", "/sys/")):
                size = None  # these files have size 0 and hold something
            yield Content(entry, size, conversation)

    @asynccontextmanager
    async def write(
        self, path: str, *, in_place: bool = False, metadata: dict[str, str] | None = None
    ) -> AsyncIterator[Writing]:
        """Open a file for new content. Its parents are made. Without `finish` the old content stays.

        Args:
            in_place: the old content goes at once, and no other name appears in the directory.
            metadata: what the file has as its metadata afterwards, if it is written in place; None leaves them.
        """
        request = wire.Write(path=self.resolve(path), user=self._user, in_place=in_place, metadata=metadata)
        async with self._link.ask(request) as conversation:
            yield Writing(conversation)

    async def make_dir(self, path: str, *, exclusive: bool = False) -> Entry:
        """Make a directory with its parents. One that exists already is an error only if this is `exclusive`."""
        request = wire.MakeDir(path=self.resolve(path), user=self._user, exclusive=exclusive)
        return await self._link.call(request, Entry)

    async def move(self, source: str, destination: str) -> Entry:
        """Move a file or a tree, and return its entry at its new place."""
        request = wire.Move(source=self.resolve(source), destination=self.resolve(destination), user=self._user)
        return await self._link.call(request, Entry, TREE_TIMEOUT)

    async def delete(self, path: str) -> None:
        """Delete a file, or a directory with its content."""
        await self._link.call(wire.Delete(path=self.resolve(path), user=self._user), wire.Done, TREE_TIMEOUT)

    @asynccontextmanager
    async def watch(
        self, path: str, *, is_recursive: bool = False, with_entries: bool = False
    ) -> AsyncIterator["Watch"]:
        """Take note of what happens in a directory for the time of the block.

        Args:
            is_recursive: also in the directories in it.
            with_entries: the reader wants the entry of each file that changed.
        """
        request = wire.Watch(path=self.resolve(path), recursive=is_recursive, user=self._user)
        async with self._link.ask(request) as conversation:
            if not isinstance(await conversation.receive(), wire.Watching):
                raise GuestUnresponsive("the guest did not answer Watch as it must")
            yield Watch(self._link, conversation.number, request.path, with_entries)


@dataclass(frozen=True, slots=True)
class Watch:
    """A directory that is watched. What has changed waits in the guest."""

    _link: Link
    _number: int
    path: str
    with_entries: bool

    async def changes(self) -> wire.Changes:
        """What has changed since the last call; nothing if nothing has."""
        return await self._link.call(wire.GetChanges(stream=self._number), wire.Changes)

    async def closed(self) -> None:
        """Return when the guest can tell no more changes, because the link to it is closed."""
        await asyncio.wait({self._link.closed})

    async def next(self) -> wire.Changes:
        """What has changed since the last call, as soon as something has."""
        async with self._link.ask(wire.GetChanges(stream=self._number, wait=True)) as conversation:
            found = await conversation.reply()
        if not isinstance(found, wire.Changes):
            raise GuestUnresponsive(f"the guest answered GetChanges with {type(found).__name__}")
        return found
