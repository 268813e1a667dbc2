"""A kernel's journal: every message, numbered and kept for readers that come late or read slowly.

The newest messages are in memory. Older ones are in a file without a name, which goes with the process. The file is a
ring of pages of a megabyte. A message that falls out of it is gone, unless it tells the course of things (`ESSENTIAL`).
A reader that needs the others gets a Gap, once, with their count. Readers read at their own speed. While even the
fastest of them is far behind, the journal asks to hold the guest (`on_pressure`), so output waits in the guest.
"""

import asyncio
import errno
import logging
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import msgspec

from kernel_gateway.kernel import message
from kernel_gateway.kernel.message import CONTENT, PARENT

log = logging.getLogger(__name__)

MEMORY = 8 * 1024 * 1024
DISK = 72 * 1024 * 1024  # more than the largest message
PAGE = 1024 * 1024
"""Bytes that are moved to disk, given to a reader, or joined to one message of text, at once."""
DUMPED = 500
"""Number of messages of a dump's page, if they are from memory."""
OVERHEAD = 1000
"""Bytes that a message costs in memory besides its parts."""
HIGH_WATER = 4 * 1024 * 1024
"""Bytes that the fastest reader may be behind before the guest is held."""
ESSENTIAL = frozenset(
    "status execute_input execute_reply error input_request clear_output comm_open comm_close "
    "shutdown_reply interrupt_reply kernel_info_reply debug_event".split()
)
ESSENTIAL_MESSAGE = 16 * 1024
ESSENTIAL_MEMORY = 2 * 1024 * 1024


class Record(msgspec.Struct, array_like=True):
    """One message of `size` bytes. `end` counts the bytes of all messages up to it.

    `session` is the client session that it is for (None: all). `ends` marks the message that ends a request, which is
    the later one of its reply and its `idle`.
    """

    seq: int
    size: int
    end: int
    kind: str
    parent: str
    session: str | None
    ends: bool
    parts: list[bytes]

    @property
    def cost(self) -> int:
        return self.size + OVERHEAD


class Gap(NamedTuple):
    """A number of messages, the last of them number `seq`, that are not kept any more.

    `parent` is the header of their request. It is the header of the next message's request, because most often the
    request is the same. It is empty if the next message has no such part.
    """

    seq: int
    messages: int
    parent: bytes


class Segment(NamedTuple):
    """A page in the file: numbers of its first and last message, bytes of messages before it, place and size."""

    first: int
    last: int
    start: int
    at: int
    size: int


_page = msgspec.msgpack.Decoder(list[Record])


class Journal:
    """Messages of one kernel, or the output of one command.

    `last` is the newest message's number, `end` counts the bytes of all messages ever, `held_bytes` is the cost of
    what is in memory. While it `is_pressed`, the guest must be held.

    Args:
        directory: the directory of the file, which is made when memory does not suffice.
        memory, disk: bytes to keep in each. Without a disk the oldest messages are gone when memory does not suffice.
        page, high_water: PAGE and HIGH_WATER unless given.
        on_pressure: called with True when the guest must be held, with False when it may go on.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        memory: int = MEMORY,
        disk: int = DISK,
        page: int | None = None,
        high_water: int | None = None,
        on_pressure: Callable[[bool], None] = lambda held: None,
    ) -> None:
        self.last = 0
        self.end = 0
        self.is_closed = False
        self._directory = directory
        self._memory = memory
        self._disk = disk
        self._page = page or PAGE
        self._high_water = high_water or HIGH_WATER
        self._on_pressure = on_pressure
        self._records: dict[int, Record] = {}
        self._first = 1
        self.held_bytes = 0
        self._file: BinaryIO | None = None
        self._tail = 0
        self._segments: deque[Segment] = deque()
        self._essentials: deque[Record] = deque()
        self._essential_bytes = 0
        self._readers: set[Reader] = set()
        self.is_pressed = False
        self._press_at = math.inf

    def append(
        self, parts: list[bytes], kind: str, parent: str = "", session: str | None = None, ends: bool = False
    ) -> Record:
        """Number a message and keep it."""
        size = sum(map(len, parts))
        self.last += 1
        self.end += size
        record = Record(self.last, size, self.end, kind, parent, session, ends, parts)
        self._records[record.seq] = record
        cost = record.cost
        self.held_bytes += cost
        if kind in ESSENTIAL and cost <= ESSENTIAL_MESSAGE:
            self._essentials.append(record)
            self._essential_bytes += cost
            while self._essential_bytes > ESSENTIAL_MEMORY:
                self._essential_bytes -= self._essentials.popleft().cost
        while self.held_bytes > self._memory and len(self._records) > 1:
            self.spill()
        for reader in self._readers:
            reader.wake()
        if self.end > self._press_at:
            self._press()
        return record

    @property
    def disk_bytes(self) -> int:
        """Bytes of the file."""
        return 0 if self._file is None else os.fstat(self._file.fileno()).st_size

    def spill(self) -> None:
        """Move the oldest page to disk. The newest message stays."""
        page: list[Record] = []
        size = 0
        while size < self._page and len(self._records) > 1:
            record = self._records.pop(self._first)
            self._first += 1
            size += record.cost
            page.append(record)
        self.held_bytes -= size
        if not self._disk:
            return
        try:
            self._store(page, msgspec.msgpack.encode(page))
        except OSError as error:  # a full disk may cost old output, which readers are told, but no sandbox
            log.warning("%d messages of a journal could not be written: %s", len(page), error)

    def _store(self, page: list[Record], data: bytes) -> None:
        if self._tail + len(data) > self._disk:
            self._tail = 0
        if len(data) > self._disk:
            return
        at, end = self._tail, self._tail + len(data)
        while any(segment.at < end and at < segment.at + segment.size for segment in self._segments):
            self._segments.popleft()
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory, prefix="journal-")  # noqa: SIM115
        if os.pwrite(self._file.fileno(), data, at) < len(data):
            raise OSError(errno.ENOSPC, "the disk is full")
        start = page[0].end - page[0].size
        self._segments.append(Segment(page[0].seq, page[-1].seq, start, at, len(data)))
        self._tail = end

    def _load(self, segment: Segment) -> list[Record]:
        assert self._file is not None
        return _page.decode(os.pread(self._file.fileno(), segment.size, segment.at))

    def in_memory(self) -> list[Record]:
        """The messages that are in memory, oldest first."""
        return list(self._records.values())

    def dump(self) -> "Dump":
        """All that is kept, for `restore`, as it is now. Close it after use."""
        fd = None if self._file is None else os.dup(self._file.fileno())
        return Dump(fd, list(self._segments), list(self._essentials), self.in_memory())

    def restore(self, essentials: list[Record], pages: Iterable[list[Record]], last: int, end: int) -> None:
        """Go on with what another journal has kept. This one must be new.

        Args:
            essentials: the first page of a `Dump`.
            pages: the others.
            last, end: as they were.
        """
        self._first = last + 1
        for page in pages:
            for record in page:
                if record.seq != self._first + len(self._records):  # what was between could not be kept
                    self._forget_memory()
                    self._first = record.seq
                self._records[record.seq] = record
                self.held_bytes += record.cost
                while self.held_bytes > self._memory and len(self._records) > 1:
                    self.spill()
        self._essentials.extend(essentials)
        self._essential_bytes = sum(record.cost for record in essentials)
        self.last, self.end = last, end

    def _forget_memory(self) -> None:
        while len(self._records) > 1:
            self.spill()
        self._records.clear()
        self.held_bytes = 0

    def read(self, after: int) -> list[Record | Gap]:
        """About a page of the messages after number `after`, with a Gap for missing ones; empty if there are none."""
        if after >= self.last:
            return []
        segment = self._segment_after(after)
        if segment is not None:
            records = [record for record in self._load(segment) if record.seq > after]
        else:
            records, size, seq = [], 0, max(after + 1, self._first)
            while size < self._page and seq <= self.last:
                records.append(self._records[seq])
                size += records[-1].cost
                seq += 1
        kept: list[Record] = []
        if records[0].seq > after + 1:
            kept = [record for record in self._essentials if after < record.seq < records[0].seq]
        found: list[Record | Gap] = []
        for record in [*kept, records[0]]:
            if record.seq > after + 1:
                parent = record.parts[PARENT] if len(record.parts) > PARENT else b""
                found.append(Gap(record.seq - 1, record.seq - after - 1, parent))
            found.append(record)
            after = record.seq
        return found + records[1:]

    def size_after(self, after: int) -> int:
        """Bytes of the page that `read` gives, roughly."""
        if after >= self.last:
            return 0
        segment = self._segment_after(after)
        if segment is not None:
            return segment.size
        oldest = self._records[max(after + 1, self._first)]
        return max(oldest.size, min(self._page, self.end - oldest.end + oldest.size))

    def _segment_after(self, after: int) -> Segment | None:
        """The page in the file with the message after that number; None if that is in memory, or is not kept."""
        if after + 1 >= self._first:
            return None
        return next((segment for segment in self._segments if segment.last > after), None)

    def reader(self, after: int, *, holds: bool = True) -> "Reader":
        """A reader of the messages after number `after`. One that does not hold the guest may miss some."""
        return Reader(self, min(after, self.last), holds=holds)

    def position(self, after: int) -> int:
        """Bytes of the messages up to number `after`, as far as it is still known."""
        if after >= self._first:
            return self._records[after].end
        if after + 1 >= self._first:
            oldest = self._records.get(self._first)
            return self.end if oldest is None else oldest.end - oldest.size
        return next((segment.start for segment in self._segments if segment.last > after), 0)

    def add(self, reader: "Reader") -> None:
        self._readers.add(reader)
        self._press()

    def remove(self, reader: "Reader") -> None:
        self._readers.discard(reader)
        self._press()
        self._release()

    def moved(self) -> None:
        """Take note that a reader has read on."""
        if self.is_pressed:
            self._press()

    def _press(self) -> None:
        fastest = max((reader.position for reader in self._readers if reader.holds), default=None)
        self._press_at = math.inf if fastest is None else fastest + self._high_water
        if (self.end > self._press_at) is not self.is_pressed:
            self.is_pressed = self.end > self._press_at
            self._on_pressure(self.is_pressed)

    def close(self) -> None:
        """End the journal. Readers still get the rest and then the end. The file goes with the last of them."""
        self.is_closed = True
        for reader in self._readers:
            reader.wake()
        self._release()

    def _release(self) -> None:
        if self.is_closed and not self._readers and self._file is not None:
            self._segments.clear()
            self._file.close()
            self._file = None


class Dump(NamedTuple):
    """A journal as it was at one moment. Any thread may read it, as long as nobody adds to the journal."""

    fd: int | None
    segments: list[Segment]
    essentials: list[Record]
    records: list[Record]

    def pages(self) -> Iterator[bytes]:
        """The essential messages, then all others, in encoded pages."""
        yield msgspec.msgpack.encode(self.essentials)
        for segment in self.segments:
            assert self.fd is not None
            yield os.pread(self.fd, segment.size, segment.at)
        for at in range(0, len(self.records), DUMPED):
            yield msgspec.msgpack.encode(self.records[at : at + DUMPED])

    def detached(self) -> "Dump":
        """This dump with its part of the file in memory, so that it stays as it is when the journal goes on."""
        if self.fd is None:
            return self
        copy = os.memfd_create("journal", os.MFD_CLOEXEC)
        try:
            for segment in self.segments:
                os.pwrite(copy, os.pread(self.fd, segment.size, segment.at), segment.at)
        except BaseException:
            os.close(copy)
            raise
        finally:
            os.close(self.fd)
        return self._replace(fd=copy)

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)


def decode_page(data: bytes) -> list[Record]:
    """A page of a `Dump`.

    Raises:
        msgspec.MsgspecError: it is none.
    """
    return _page.decode(data)


class Reader:
    """A place in a journal that moves at its own speed. Use it as a context manager."""

    def __init__(self, journal: Journal, after: int, *, holds: bool = True) -> None:
        self.after = after
        self.holds = holds
        self.position = journal.position(after)
        self._journal = journal
        self._wakened = asyncio.Event()

    def wake(self) -> None:
        self._wakened.set()

    async def next(self) -> list[Record | Gap]:
        """The next messages, as soon as there are any; empty when the journal has ended."""
        return self.take() if await self.arrived() else []

    async def arrived(self) -> bool:
        """Whether there are more messages. It returns as soon as that is known."""
        while self.after >= self._journal.last:
            if self._journal.is_closed:
                return False
            self._wakened.clear()
            await self._wakened.wait()
        return True

    @property
    def ahead(self) -> int:
        """Bytes of the page that is next, roughly."""
        return self._journal.size_after(self.after)

    def take(self, most: float = math.inf) -> list[Record | Gap]:
        """The page that is next, or of a page with more than `most` bytes the first messages, at least one."""
        found = first(self._journal.read(self.after), most)
        last = found[-1]
        self.after = last.seq
        if isinstance(last, Record):
            self.position = last.end
        self._journal.moved()
        return found

    def __enter__(self) -> Self:
        self._journal.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._journal.remove(self)


def first(found: list[Record | Gap], most: float) -> list[Record | Gap]:
    """The first of these, up to `most` bytes, and at least one."""
    size = 0
    for number, each in enumerate(found):
        size += each.size if isinstance(each, Record) else 0
        if number and size > most:
            return found[:number]
    return found


def merged(records: list[Record | Gap], after: int = 0) -> list[Record | Gap]:
    """The records with neighbouring `stream` messages of one request joined, up to a page each.

    So a reader that is behind gets few large messages instead of thousands of small ones. A joined message has the
    number of its last one. Messages up to number `after` are not joined, because the client may have some of them and
    must be able to tell them apart.
    """
    found: list[Record | Gap] = []
    run: list[Record] = []
    size = 0

    def close_run() -> None:
        nonlocal size
        text = message.joined([record.parts[CONTENT] for record in run]) if len(run) > 1 else None
        if text is None:
            found.extend(run)
        else:
            last = run[-1]
            parts = [*last.parts[:CONTENT], text]
            found.append(Record(last.seq, last.size, last.end, last.kind, last.parent, last.session, last.ends, parts))
        run.clear()
        size = 0

    for record in records:
        if not isinstance(record, Record) or record.kind != "stream" or len(record.parts) > CONTENT + 1:
            close_run()
            found.append(record)
            continue
        if run and (
            record.parent != run[0].parent or record.session != run[0].session or size > PAGE or run[0].seq <= after
        ):
            close_run()
        run.append(record)
        size += len(record.parts[CONTENT])
    close_run()
    return found
