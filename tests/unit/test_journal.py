"""A kernel's journal: numbers, memory and disk, gaps, readers at their own speeds, pressure, bounds."""

import asyncio
import errno
import json
import os
import random
import resource
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_gateway.kernel import journal as module
from kernel_gateway.kernel.journal import Gap, Journal, Reader, Record, decode_page, merged

MIB = 1 << 20
Make = Callable[..., Journal]


def parts(text: str = "", parent: str = "p", name: str = "stdout") -> list[bytes]:
    """A `stream` message's parts."""
    content = json.dumps({"name": name, "text": text}).encode()
    return [b"iopub", b"{}", json.dumps({"msg_id": parent}).encode(), b"{}", content]


def say(journal: Journal, text: str = "", parent: str = "p", name: str = "stdout") -> Record:
    return journal.append(parts(text, parent, name), "stream", parent)


def size_of(record: Record) -> int:
    return sum(map(len, record.parts))


def now(reading: Coroutine[Any, Any, list[Record | Gap]]) -> list[Record | Gap]:
    """The messages that a reader gets without waiting."""
    try:
        reading.send(None)
    except StopIteration as done:
        return list(done.value)
    reading.close()
    raise AssertionError("it waits")


def all_after(journal: Journal, after: int) -> list[Record | Gap]:
    """Everything that is kept after a number."""
    found: list[Record | Gap] = []
    while page := journal.read(found[-1].seq if found else after):
        found += page
    return found


def check_cover(found: list[Record | Gap], after: int, last: int) -> tuple[list[int], int]:
    """Check that every number is there or counted by a gap. Return the numbers that are there, and the count."""
    seqs, missing = [], 0
    for each in found:
        if isinstance(each, Gap):
            assert each.messages == each.seq - after > 0
            missing += each.messages
        else:
            assert each.seq == after + 1
            seqs.append(each.seq)
        after = each.seq
    assert after == last
    return seqs, missing


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Journals that are closed after the test. They are small unless a test says otherwise."""
    with ExitStack() as stack:

        def made(directory: Path = tmp_path, memory: int = 20_000, disk: int = 50_000, **options: Any) -> Journal:
            journal = Journal(directory, memory=memory, disk=disk, **options)
            stack.callback(journal.close)
            return journal

        yield made


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 5 KB instead of a megabyte, and room for 20 KB of essentials."""
    monkeypatch.setattr(module, "PAGE", 5_000)
    monkeypatch.setattr(module, "ESSENTIAL_MEMORY", 20_000)


def open_in(directory: Path) -> list[str]:
    """Files of that directory which this process has open."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            pass  # this descriptor lists the directory
    return [link for link in links if link.startswith(str(directory))]


def file_size(journal: Journal) -> int:
    return 0 if journal._file is None else os.fstat(journal._file.fileno()).st_size


# -- numbers, memory, disk


def test_numbers(make: Make) -> None:
    """Messages are numbered from 1 without holes, and bytes are counted."""
    journal = make()
    assert (journal.last, journal.end, journal.read(0)) == (0, 0, [])
    records = [say(journal, "x" * n) for n in range(5)]
    assert [record.seq for record in records] == [1, 2, 3, 4, 5]
    ends = [sum(map(size_of, records[: n + 1])) for n in range(5)]
    assert [record.end for record in records] == ends
    assert (journal.last, journal.end) == (5, ends[-1])
    assert journal.read(0) == records


def test_what_is_kept_of_a_message(small: None, make: Make) -> None:
    """A message comes back from the disk unchanged: any bytes, buffers, kind, request, session, end."""
    journal = make()
    odd = [[b"shell", b"", b"\xff", bytes(range(256)), b"x", b"", bytes(300)], [b"iopub"] + [b""] * 4]
    for each in odd:
        journal.append(each, "comm_msg", "pä", "sé", ends=True)
    while journal._first <= 2:
        say(journal, "x" * 1000)
    found = journal.read(0)[:2]
    assert [each.parts for each in found if isinstance(each, Record)] == odd
    assert [(each.kind, each.parent, each.session, each.ends) for each in found if isinstance(each, Record)] == [
        ("comm_msg", "pä", "sé", True)
    ] * 2


def test_memory_first_then_a_file_without_a_name(small: None, make: Make, tmp_path: Path) -> None:
    """While memory suffices there is no file. Then there is one that no other process sees."""
    journal = make()
    while journal.held_bytes < 15_000:
        say(journal, "x" * 500)
    assert open_in(tmp_path) == []
    while journal.last < 30:
        say(journal, "x" * 500)
    assert len(open_in(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []
    assert check_cover(all_after(journal, 0), 0, 30) == (list(range(1, 31)), 0)
    journal.close()
    assert open_in(tmp_path) == []


def test_the_file_is_a_ring(small: None, make: Make) -> None:
    """The file does not grow beyond its size. The newest messages are there, the oldest are not."""
    journal = make()
    for n in range(2000):
        say(journal, str(n) * 50)
        assert file_size(journal) <= 50_000
        assert journal.held_bytes <= 20_000
    seqs, missing = check_cover(all_after(journal, 0), 0, 2000)
    assert seqs == list(range(missing + 1, 2001))
    kept = sum(size_of(record) for record in all_after(journal, 0) if isinstance(record, Record))
    assert kept > 30_000


def test_since_anywhere(small: None, make: Make) -> None:
    """The same messages follow any number, whether it is gone, on disk or in memory. None follow the last."""
    journal = make()
    for n in range(300):
        say(journal, str(n) * random.Random(n).randrange(300))
    whole = [each for each in all_after(journal, 0) if isinstance(each, Record)]
    assert 10 < len(whole) < 290
    for after in range(300):
        found = all_after(journal, after)
        seqs, _ = check_cover(found, after, 300)
        assert [each for each in found if isinstance(each, Record)] == [each for each in whole if each.seq > after]
        assert seqs[0] == max(whole[0].seq, after + 1)
    assert journal.read(300) == journal.read(301) == journal.read(10**30) == []
    assert journal.reader(10**30).after == 300


def test_where_a_reader_stands(small: None, make: Make) -> None:
    """A reader's distance from the end is known to the byte in memory, and to the page on disk."""
    journal = make()
    ends = [0, *(say(journal, "x" * 300).end for _ in range(300))]
    oldest = next(each.seq for each in all_after(journal, 0) if isinstance(each, Record))
    for after in range(301):
        wrong = ends[max(after, oldest - 1)] - journal.reader(after).position
        assert wrong == 0 if after + 1 >= journal._first else 0 <= wrong < 6_000
    journal.close()
    assert make().reader(0).position == 0


def test_a_gap_names_the_request_that_follows(small: None, make: Make) -> None:
    """A gap carries the header of the request it most likely belongs to."""
    journal = make()
    for n in range(200):
        say(journal, "x" * 1000, parent=f"p{n}")
    gap, following = journal.read(0)[:2]
    assert isinstance(gap, Gap)
    assert isinstance(following, Record)
    assert gap.parent == following.parts[2] == b'{"msg_id": "p%d"}' % (following.seq - 1)


# -- essentials


def cell(journal: Journal, name: str, texts: int) -> None:
    """The messages of a cell that prints a lot."""
    for kind in ("status", "execute_input", *["stream"] * texts, "execute_reply", "status"):
        journal.append(parts("x" * 500, name), kind, name)


def test_essentials_survive(small: None, make: Make) -> None:
    """The essentials of an old cell are still kept, with a gap in place of its output, and no gap before them."""
    journal = make()
    cell(journal, "a", 150)
    cell(journal, "b", 150)
    found = all_after(journal, 0)
    check_cover(found, 0, 308)
    told = [(each.kind, each.parent) if isinstance(each, Record) else each.messages for each in found[:6]]
    assert told == [("status", "a"), ("execute_input", "a"), 150, ("execute_reply", "a"), ("status", "a"),
                    ("status", "b")]  # fmt: skip
    assert isinstance(found[2], Gap)
    assert found[2].parent == b'{"msg_id": "a"}'


def test_essentials_are_bounded(small: None, make: Make) -> None:
    """Only the newest essentials are kept, and no large ones. Missing ones are counted like other messages."""
    journal = make()
    for n in range(500):
        journal.append(parts("x" * 100, f"p{n}"), "status", f"p{n}")
    for _ in range(100):
        journal.append(parts("x" * module.ESSENTIAL_MESSAGE), "error")
    found = all_after(journal, 0)
    check_cover(found, 0, 600)
    kept = [each for each in found if isinstance(each, Record) and each.kind == "status"]
    assert [each.seq for each in kept] == list(range(501 - len(kept), 501))
    assert 10 < len(kept) < 21
    assert journal._essential_bytes <= 20_000


# -- a disk that fails


def no_directory(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Path:
    return directory / "none"


def no_space(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Path:
    def fail(fd: int, data: bytes, at: int) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    return directory


def short_writes(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Path:
    """Writes like those of a kernel whose disk becomes full in the middle of a write."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: len(data) // 2], at))
    return directory


@pytest.mark.parametrize("breaks", [no_directory, no_space, short_writes])
def test_a_full_disk(
    small: None,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    breaks: Callable[[pytest.MonkeyPatch, Path], Path],
) -> None:
    """Messages that can't be written become a gap. Memory, essentials and numbers are not affected."""
    journal = make(breaks(monkeypatch, tmp_path))
    cell(journal, "a", 200)
    found = all_after(journal, 0)
    seqs, missing = check_cover(found, 0, 204)
    assert seqs[:2] == [1, 2]
    assert missing + len(seqs) == 204
    assert seqs[-8:] == list(range(197, 205))
    assert journal.held_bytes <= 20_000
    assert "could not be written" in caplog.text
    assert not any(record.exc_info for record in caplog.records)


def test_a_disk_that_is_full_for_a_while(small: None, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only messages of that time are missing. Readers get the rest, in order."""
    journal = make(disk=200_000)
    while journal.last < 40:
        say(journal, "x" * 1000)
    with monkeypatch.context() as patch:
        no_space(patch, Path())
        while journal.last < 60:
            say(journal, "x" * 1000)
    while journal.last < 90:
        say(journal, "x" * 1000)
    seqs, missing = check_cover(all_after(journal, 0), 0, 90)
    assert 15 <= missing <= 25
    assert seqs[0] == 1


def test_a_limit_on_the_files_size(make: Make) -> None:
    """A real limit of the system in the middle of a page makes a gap. Earlier and later pages are not harmed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = make(memory=2 * MIB, disk=20 * MIB)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MIB // 2, before[1]))
    try:
        for _ in range(100):
            say(journal, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    seqs, missing = check_cover(all_after(journal, 0), 0, 100)
    assert seqs[:20] == list(range(1, 21))
    assert 50 < missing < 70


# -- very large messages


def test_messages_larger_than_everything(small: None, make: Make) -> None:
    """The newest message is kept whatever its size. If it fits neither memory nor disk, it becomes a gap later."""
    journal = make()
    sizes = [100, 30_000, 100, 60_000, 100, 49_000, 100, 100_000, 100, 200_000]
    for n, size in enumerate(sizes, 1):
        record = say(journal, "x" * size)
        assert all_after(journal, n - 1) == [record]
        check_cover(all_after(journal, 0), 0, n)
    say(journal, "end")
    seqs, _ = check_cover(all_after(journal, 0), 0, 11)
    assert {8, 10}.isdisjoint(seqs)
    assert {9, 11} <= set(seqs)


def test_the_largest_message_there_can_be(make: Make) -> None:
    """64 MiB go to disk and come back."""
    journal = make(memory=module.MEMORY, disk=module.DISK)
    content = os.urandom(MIB) * 63
    for each in (content, b"x" * (MIB - 1000), b"y" * (15 * MIB // 2), b"z"):
        journal.append([b"iopub", b"{}", b"{}", b"{}", each], "display_data")
    found = all_after(journal, 0)
    assert check_cover(found, 0, 4) == ([1, 2, 3, 4], 0)
    assert isinstance(found[0], Record)
    assert found[0].parts[4] == content


# -- readers


def test_readers_at_different_speeds(small: None, make: Make) -> None:
    """Each reader gets everything at its own speed. Only a reader that is too far behind has gaps."""
    journal = make()
    readers = {pause: journal.reader(0) for pause in (1, 3, 150)}
    found: dict[int, list[Record | Gap]] = {pause: [] for pause in readers}
    with ExitStack() as stack:
        for reader in readers.values():
            stack.enter_context(reader)
        for n in range(1, 301):
            say(journal, str(n) * 200)
            for pause, reader in readers.items():
                while n % pause == 0 and reader.after < journal.last:
                    found[pause] += now(reader.next())
    for pause in readers:
        _, missing = check_cover(found[pause], 0, 300)
        assert (missing > 0) is (pause == 150)


def test_a_page_at_a_time(make: Make) -> None:
    """A reader that is far behind is not handed everything at once, from memory or from disk."""
    journal = make(memory=4 * MIB, disk=10 * MIB)
    while journal.end < 9 * MIB:
        say(journal, "x" * 100_000)
    after = 0
    while found := journal.read(after):
        assert sum(size_of(each) for each in found if isinstance(each, Record)) < 1.2 * MIB
        after = found[-1].seq
    assert after == journal.last


async def test_a_reader_waits(make: Make) -> None:
    """A reader that has everything waits for the next message, and wakes once for several."""
    journal = make()
    with journal.reader(0) as reader, journal.reader(0) as other:
        waiting = asyncio.create_task(reader.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        first, second = say(journal), say(journal)
        assert await waiting == await other.next() == [first, second]
        assert (reader.after, reader.position) == (2, second.end)


async def test_a_wait_that_is_given_up(make: Make) -> None:
    """A reader whose wait was cancelled loses nothing."""
    journal = make()
    with journal.reader(0) as reader:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await reader.next()
        record = say(journal)
        assert await reader.next() == [record]


# -- the end


async def test_a_journal_ends(small: None, make: Make, tmp_path: Path) -> None:
    """A waiting reader is told, and one that is behind gets the rest first. The file goes with the last reader."""
    journal = make(disk=200_000)
    for _ in range(50):
        say(journal, "x" * 1000)
    with journal.reader(0) as slow, journal.reader(50) as waiting:
        end = asyncio.create_task(waiting.next())
        await asyncio.sleep(0)
        journal.close()
        assert await end == []
        assert len(open_in(tmp_path)) == 1
        found: list[Record | Gap] = []
        while page := await slow.next():
            found += page
        assert check_cover(found, 0, 50) == (list(range(1, 51)), 0)
        assert await slow.next() == []
    assert open_in(tmp_path) == []
    journal.close()


def test_a_journal_ends_without_readers(small: None, make: Make, tmp_path: Path) -> None:
    """The journal's file goes at once. A later reader gets the messages in memory, and a gap."""
    journal = make()
    for _ in range(50):
        say(journal, "x" * 1000)
    journal.close()
    assert open_in(tmp_path) == []
    _, missing = check_cover(all_after(journal, 0), 0, 50)
    assert missing > 0
    with journal.reader(50) as reader:
        assert now(reader.next()) == []


# -- pressure


@dataclass
class Held:
    """The last word to the guest, with a check that no word comes twice."""

    calls: list[bool] = field(default_factory=list)

    def __call__(self, held: bool) -> None:
        assert held is not self.now
        self.calls.append(held)

    @property
    def now(self) -> bool:
        return bool(self.calls) and self.calls[-1]


def test_nobody_reads(make: Make) -> None:
    """Without a reader the guest is never held."""
    held = Held()
    journal = make(memory=MIB, on_pressure=held)
    for _ in range(100):
        say(journal, "x" * 100_000)
    assert held.calls == []


def test_without_a_disk(make: Make) -> None:
    """Without a disk the newest messages are kept in memory, a page is dropped at a time, and there is no file."""
    journal = make(memory=20_000, disk=0, page=4_000, high_water=500)
    for n in range(50):
        journal.append([b"%d" % n], "stdout")
        assert journal.held_bytes <= 20_000
    assert file_size(journal) == 0
    gap, *kept = journal.read(0)
    assert gap == Gap(32, 32, b"")
    assert [each.parts for each in kept if isinstance(each, Record)] == [[b"%d" % n] for n in range(32, 36)]
    journal.spill()
    assert journal.held_bytes == 14 * (module.OVERHEAD + 2)


def test_held_to_the_byte(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader may be exactly HIGH_WATER bytes behind. At one more the guest is held until the reader has read."""
    monkeypatch.setattr(module, "HIGH_WATER", 1000)
    held = Held()
    journal = make(on_pressure=held)
    with journal.reader(0) as reader:
        journal.append([b"x" * 1000], "stream")
        assert held.calls == []
        journal.append([b"x"], "stream")
        assert held.calls == [True]
        journal.append([b"x"], "stream")
        now(reader.next())
        assert held.calls == [True, False]
        journal.append([b"x" * 1001], "stream")
        assert held.calls == [True, False, True]
    assert held.calls == [True, False, True, False]


def test_only_the_fastest_counts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that stands still does not hold the guest while another reads. When the other leaves, it does."""
    monkeypatch.setattr(module, "HIGH_WATER", 1000)
    held = Held()
    journal = make(on_pressure=held)
    with journal.reader(0) as slow:
        with journal.reader(0) as fast:
            for _ in range(10):
                journal.append([b"x" * 1000], "stream")
                now(fast.next())
            assert held.calls == []
        assert held.calls == [True]
        with journal.reader(journal.last):
            assert held.calls == [True, False]
        now(slow.next())
        assert held.calls == [True, False, True, False]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 1500)),
        st.tuples(st.sampled_from(["enter", "leave", "read"]), st.integers(0, 3)),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(OPERATIONS)
def test_held_exactly_when_the_fastest_is_behind(operations: list[tuple[str, int]]) -> None:
    """The guest is held if and only if every reader is too far behind, however readers come, read and go."""
    held, readers = Held(), dict[int, Reader]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HIGH_WATER", 2000)
        patch.setattr(module, "PAGE", 1500)
        journal = Journal(on_pressure=held)
        ends = [0]
        for what, number in operations:
            if what == "append":
                ends.append(journal.append([b"x" * number], "stream").end)
            elif what == "enter" and number not in readers:
                readers[number] = journal.reader(journal.last if number % 2 else 0).__enter__()
            elif what == "leave" and number in readers:
                readers.pop(number).__exit__(None, None, None)
            elif what == "read" and number in readers and readers[number].after < journal.last:
                now(readers[number].next())
            behind = [ends[-1] - ends[reader.after] for reader in readers.values()]
            assert held.now is (min(behind, default=0) > 2000)
        journal.close()


# -- joined text


def texts(found: list[Record | Gap]) -> list[tuple[int, str, str]]:
    """The number, request and text of each message, and the count of each gap."""
    return [
        (each.seq, each.parent, json.loads(each.parts[4])["text"])
        if isinstance(each, Record)
        else (each.seq, "", str(each.messages))
        for each in found
    ]


def test_neighbours_are_joined(make: Make) -> None:
    """Neighbouring text of one request becomes one message with the last number. Everything else stays."""
    journal = make()
    for letter, parent in (("a", "p"), ("b", "p"), ("c", "q"), ("d", "q"), ("e", "p")):
        say(journal, letter, parent)
    journal.append(parts("!", "p"), "display_data", "p")
    for letter in "fg":
        say(journal, letter)
    records = journal.read(0)
    before = [list(each.parts) for each in records if isinstance(each, Record)]
    assert texts(merged(records)) == [(2, "p", "ab"), (4, "q", "cd"), (5, "p", "e"), (6, "p", "!"), (8, "p", "fg")]
    assert [each.parts for each in records if isinstance(each, Record)] == before
    assert merged([]) == []


def test_a_joined_message_is_the_last_one_but_for_its_text(make: Make) -> None:
    """Channel, header, parent, metadata, end and number are the last one's."""
    journal = make()
    records = [say(journal, letter) for letter in "abc"]
    records[2].parts[1:4] = [b'{"msg_id": "m"}', b'{"msg_id": "p"}', b'{"k": 1}']
    (joined,) = merged(list(records))
    assert isinstance(joined, Record)
    assert joined.parts[:4] == records[2].parts[:4]
    assert (joined.seq, joined.end, joined.kind, joined.parent) == (3, records[2].end, "stream", "p")


def test_streams_are_not_mixed(make: Make) -> None:
    """stdout and stderr stay in order, however they alternate."""
    journal = make()
    for n, name in enumerate(["stdout", "stderr", "stdout", "stdout", "stderr", "stderr", "stdout"]):
        say(journal, str(n), name=name)
    found = merged(journal.read(0))
    pieces = [(json.loads(each.parts[4])["name"], json.loads(each.parts[4])["text"]) for each in found]
    flat = [(name, letter) for name, text in pieces for letter in text]
    assert "".join(letter for _, letter in flat) == "0123456"
    assert [letter for name, letter in flat if name == "stderr"] == ["1", "4", "5"]


def test_a_gap_separates(small: None, make: Make) -> None:
    """Text before and after missing messages is not joined over them."""
    first, last = (
        Record(1, 0, 0, "stream", "p", None, False, parts("a")),
        Record(5, 0, 0, "stream", "p", None, False, parts("b")),
    )
    gap = Gap(4, 3, b"{}")
    assert merged([first, gap, last]) == [first, gap, last]


def test_joined_text_has_a_size(make: Make) -> None:
    """With 10 MB of text, no message becomes much larger than a page."""
    journal = make(memory=20 * MIB)
    for n in range(1000):
        say(journal, f"{n:10000}")
    records = [each for page in [all_after(journal, 0)] for each in page]
    found = merged(records)
    assert max(size_of(each) for each in found if isinstance(each, Record)) < 1.1 * MIB
    assert len(found) < 15
    assert "".join(text for _, _, text in texts(found)) == "".join(f"{n:10000}" for n in range(1000))


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"{}", b'{"text": 3, "name": "stdout"}', b'{"name": "stdout"}', b'{"text": "a"}', b"\xff",
     b'{"name": "stdout", "text": "a", "more": [1]}'],
)  # fmt: skip
def test_text_that_is_none(make: Make, content: bytes) -> None:
    """A kernel's nonsense is passed on as it is."""
    journal = make()
    say(journal, "a")
    journal.append([*parts()[:4], content], "stream", "p")
    say(journal, "b")
    assert merged(journal.read(0)) == journal.read(0)


def test_nothing_of_a_message_is_lost_by_joining(make: Make) -> None:
    """Text with buffers, or for one session only, is not joined with other text."""
    journal = make()
    say(journal, "a")
    journal.append([*parts("b"), b"buffer"], "stream", "p")
    journal.append(parts("c"), "stream", "p", "mine")
    say(journal, "d")
    found = merged(journal.read(0))
    assert [each.session for each in found if isinstance(each, Record) and b"c" in each.parts[4]] == ["mine"]
    assert b"buffer" in [part for each in found if isinstance(each, Record) for part in each.parts[5:]]


PIECES = st.lists(
    st.tuples(
        st.sampled_from(["stream", "stream", "stream", "display_data", "gap"]),
        st.sampled_from(["p", "q"]),
        st.sampled_from(["stdout", "stderr"]),
        st.text(max_size=5),
    ),
    max_size=30,
)


@given(PIECES)
def test_joining_keeps_text_and_numbers(pieces: list[tuple[str, str, str, str]]) -> None:
    """For any messages: text per request, stream and stretch is the same, the others are untouched, numbers rise."""
    records: list[Record | Gap] = [
        Gap(seq, 1, b"{}") if kind == "gap" else Record(seq, 0, 0, kind, parent, None, False, parts(text, parent, name))
        for seq, (kind, parent, name, text) in enumerate(pieces, 1)
    ]
    found = merged(records)

    def stretches(records: list[Record | Gap]) -> list[Any]:
        """A reader's view, in which neighbouring text of one stream is one piece."""
        seen: list[Any] = []
        for each in records:
            if isinstance(each, Gap) or each.kind != "stream":
                seen.append(each)
                continue
            content = json.loads(each.parts[4])
            if seen and isinstance(seen[-1], tuple) and seen[-1][:2] == (each.parent, content["name"]):
                seen[-1] = (*seen[-1][:2], seen[-1][2] + content["text"])
            else:
                seen.append((each.parent, content["name"], content["text"]))
        return seen

    assert stretches(found) == stretches(records)
    seqs = [each.seq for each in found]
    assert seqs == sorted(set(seqs))
    assert set(seqs) <= {each.seq for each in records}
    assert seqs[-1:] == [each.seq for each in records][-1:]


# -- all of it, against a list


@dataclass
class Model:
    """All messages so far, and the messages that each reader has seen."""

    journal: Journal
    memory: int
    disk: int
    messages: list[Record] = field(default_factory=list)
    readers: dict[int, Reader] = field(default_factory=dict)
    costs: list[int] = field(default_factory=lambda: [0])
    essential: list[int] = field(default_factory=lambda: [0])
    largest: int = 0

    def append(self, size: int, kind: str) -> None:
        seq = len(self.messages) + 1
        content = [b"iopub", b"%d" % seq, b'{"msg_id": "%d"}' % (seq // 5), b"{}", b"x" * size]
        record = self.journal.append(content, kind, str(seq // 5), ends=seq % 7 == 0)
        assert (record.seq, record.end) == (seq, size_of(record) + (self.messages[-1].end if self.messages else 0))
        self.messages.append(record)
        self.costs.append(self.costs[-1] + record.cost)
        self.essential.append(self.essential[-1] + (record.cost if kind == "status" else 0))
        self.largest = max(self.largest, record.cost)

    def start(self, number: int, after: int) -> None:
        self.stop(number)
        self.readers[number] = self.journal.reader(after).__enter__()
        assert self.readers[number].after == min(after, len(self.messages))

    def stop(self, number: int) -> None:
        if number in self.readers:
            self.readers.pop(number).__exit__(None, None, None)

    def read(self, number: int) -> None:
        reader = self.readers.get(number)
        if reader is None or reader.after == len(self.messages):
            return
        after = reader.after
        found = now(reader.next())
        seqs, _ = check_cover(found, after, reader.after)
        assert [each for each in found if isinstance(each, Record)] == [self.messages[seq - 1] for seq in seqs]
        assert reader.position == self.messages[reader.after - 1].end
        for seq in set(range(after + 1, reader.after + 1)) - set(seqs):
            assert self.may_be_missing(seq), seq

    def may_be_missing(self, seq: int) -> bool:
        """Whether so much has come since that a message need not be kept. Up to a page each is lost at the ring's
        end, at its front, and in memory."""
        is_essential = self.essential[seq] > self.essential[seq - 1]
        if is_essential and self.essential[-1] - self.essential[seq - 1] <= module.ESSENTIAL_MEMORY:
            return False
        return self.costs[-1] - self.costs[seq - 1] > self.memory + self.disk - 3 * (module.PAGE + self.largest)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 3000), st.sampled_from(["stream", "stream", "status"])),
        st.tuples(st.just("append"), st.sampled_from([0, 12_000]), st.just("stream")),
        st.tuples(st.just("start"), st.integers(0, 2), st.integers(0, 200)),
        st.tuples(st.just("read"), st.integers(0, 2)),
        st.tuples(st.just("stop"), st.integers(0, 2)),
    ),
    max_size=80,
)


@settings(max_examples=200)
@given(STEPS, st.sampled_from([(10_000, 60_000), (30_000, 15_000), (1, 40_000), (20_000, 0)]))
def test_any_readers_of_any_messages(steps: list[tuple[Any, ...]], room: tuple[int, int]) -> None:
    """A reader that starts anywhere and reads at any times gets what is kept, in order, and gaps for all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAGE", 4_000)
        patch.setattr(module, "ESSENTIAL_MEMORY", 10_000)
        journal = Journal(memory=room[0], disk=room[1])
        model = Model(journal, *room)
        try:
            for name, *arguments in steps:
                getattr(model, name)(*arguments)
            model.start(3, 0)
            while model.readers[3].after < journal.last:
                model.read(3)
        finally:
            for number in list(model.readers):
                model.stop(number)
            journal.close()


def test_a_long_life(small: None, make: Make) -> None:
    """The same holds over thousands of messages, with readers that come and go."""
    rng = random.Random(7)
    model = Model(make(), 20_000, 50_000)
    for _ in range(8000):
        what = rng.choices(["append", "start", "read", "stop"], (70, 2, 25, 1))[0]
        if what == "append":
            model.append(rng.choice([0, 100, 1000, 1000, 20_000]), rng.choice(["stream", "stream", "status"]))
        elif what == "start":
            model.start(rng.randrange(4), rng.randrange(len(model.messages) + 2))
        else:
            getattr(model, what)(rng.randrange(4))
        assert model.journal.held_bytes == sum(each.cost for each in model.journal._records.values())
    for number in range(4):
        model.stop(number)


# -- memory


@pytest.mark.parametrize(
    ("size", "count", "limit"),
    [(1000, 200_000, 12), (MIB, 200, 12), (20 * MIB, 10, 80)],
    ids=["small", "MiB", "20 MiB"],
)
def test_200_mb(make: Make, size: int, count: int, limit: int) -> None:
    """With 200 MB of small or of large messages, memory stays within its bound, read or unread."""
    journal = make(memory=module.MEMORY, disk=module.DISK)
    tracemalloc.start()
    try:
        with journal.reader(0) as reader:
            for n in range(count):
                content = n.to_bytes(8, "big") + bytes(size)
                journal.append([b"iopub", b"{}", b"{}", b"{}", content], "stream", "p")
                if n % (count // 10) == 0:
                    now(reader.next())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit * MIB
    assert file_size(journal) <= module.DISK
    check_cover(all_after(journal, 0), 0, count)


@given(sizes=st.lists(st.integers(0, 3000), max_size=60), data=st.data())
def test_a_journal_goes_on(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject) -> None:
    """A journal that is restored from a dump gives what the first one gave, and goes on with its numbers."""
    bounds = {"memory": data.draw(st.integers(2000, 40_000)), "disk": data.draw(st.integers(0, 30_000)), "page": 4000}
    directory = tmp_path_factory.mktemp("journal")
    first, second = Journal(directory, **bounds), Journal(directory, **bounds)
    for size in sizes:
        first.append(parts("x" * size), data.draw(st.sampled_from(["stream", "status"])), "p")
    dump = first.dump()
    pages = iter([decode_page(page) for page in dump.pages()])
    dump.close()
    second.restore(next(pages), pages, first.last, first.end)
    assert (second.last, second.end) == (first.last, first.end)
    for after in range(first.last + 1):
        ours, theirs = all_after(second, after), all_after(first, after)
        seen = {each.seq for each in ours if isinstance(each, Record)}
        assert {each.seq for each in theirs if isinstance(each, Record) and each.kind == "status"} <= seen
        check_cover(ours, after, first.last)
        if bounds["disk"] > 25_000:
            assert seen == {each.seq for each in theirs if isinstance(each, Record)}
    assert say(second, "next").seq == first.last + 1
    for journal in (first, second):
        journal.close()
