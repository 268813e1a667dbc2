"""A cell's events as one text that fits a model's context. Pure: events in, text out.

    events ──▶ Terminal (a line as a terminal shows it) ──▶ equal neighbours are one ──▶ Page (the first and last lines)

The same events give the same text, however they are cut into pieces. Memory is bounded by the limit, not by the output.
Nothing of the guest's is parsed but text, the head of a PNG, and tables of at most 16 KiB.
"""

import base64
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Annotated, NamedTuple

import msgspec

from kernel_gateway.kernel.events import OUTPUTS, RESTARTED, CellError, StreamEvent, values

TABLE = "application/vnd.cellvm.table+json"
"""The type of a data frame's first and last rows, which the kernel makes."""
MAX_TABLE = 16 * 1024
LONG_LINE, LINE_HEAD, LINE_TAIL = 2000, 1200, 400
"""Characters from which on a line is cut, and how many of its beginning and of its end are left."""
LINE_KEPT = 64 * 1024
"""Characters of an unfinished line that can still be overwritten."""
HEAD_SHARE = 0.4
"""The part of a text that is left out's beginning. Results and errors are at the end, so the end gets more."""
ERROR_LIMIT = 1500
VALUE_LIMIT = 600
"""Characters of an exception's text."""
TRACEBACK_READ = 256 * 1024
"""Characters of a traceback that are read, at its end."""
IMAGES = 4
"""Images of one answer that are kept to be shown."""
UNSHOWN = 20
"""Images beyond these that can still be told of as files."""
IMAGE_LIMIT = 300 * 1000
"""Characters in base64 of an image that is kept to be shown."""

UPDATES = 20
"""Displays whose last state is remembered."""

_ESCAPE = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[PX^_][^\x1b]*\x1b\\|[ -/]*[0-OQ-WYZ\\`-~])"
_ansi = re.compile(_ESCAPE)
_control = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_token = re.compile(r"[\t\x20-\x7e\xa0-\U0010ffff]+|" + _ESCAPE + r"|.", re.DOTALL)
_partial = re.compile(r"\x1b(?:\[[0-?]{0,64}[ -/]{0,16}|\][^\x07\x1b]{0,4096}\x1b?|[PX^_][^\x1b]{0,4096}\x1b?|[ -/]*)$")
"""The beginning of an escape sequence, at the end of a text."""


class Image(NamedTuple):
    """An image to be shown. `data` is base64."""

    number: int
    mime: str
    data: str


class Shaped(NamedTuple):
    """A text of at most the limit's characters, the lines that it leaves out, and the first images."""

    text: str
    omitted: int
    images: list[Image]


class Column(msgspec.Struct):
    name: str
    dtype: str


class Table(msgspec.Struct):
    """A data frame's first and last rows, each with its label in front. `shape` is rows and columns of the whole."""

    kind: str
    shape: tuple[int, int]
    columns: Annotated[list[Column], msgspec.Meta(max_length=30)]
    first: Annotated[list[list[str]], msgspec.Meta(max_length=20)]
    last: Annotated[list[list[str]], msgspec.Meta(max_length=20)]


def shape(events: Iterable[StreamEvent], limit: int) -> Shaped:
    """The text of events."""
    shaper = Shaper(limit)
    for event in events:
        shaper.add(event)
    shaper.finish()
    return shaper.shaped()


def plain(text: str) -> str:
    """Text without the escape sequences of a terminal."""
    return _ansi.sub("", text)


class Terminal:
    """A line as a terminal shows it: carriage returns and backspaces leave its last state."""

    def __init__(self) -> None:
        self._line: list[str] = []
        self._at = 0
        self._beyond = 0
        self._end = ""
        self._rest = ""

    def write(self, text: str) -> Iterator[str]:
        """Take text, and yield the lines that it ends."""
        text = self._rest + text
        self._rest = ""
        if _control.search(text) is None and not self._line:
            *lines, text = text.split("\n")
            yield from lines
            self._put(text)
            return
        if found := _partial.search(text):
            text, self._rest = text[: found.start()], found[0]
        for token in _token.finditer(text):
            piece = token[0]
            match piece[0]:
                case "\n":
                    yield self._take()
                case "\r":
                    self._return(0)
                case "\b":
                    self._return(max(self._at - 1, 0))
                case "\x1b" if piece.endswith("K") and len(piece) > 1:
                    del self._line[0 if piece == "\x1b[2K" else self._at :]
                    self._line += " " * (self._at - len(self._line))
                case first if first == "\t" or (first >= " " and not _control.match(first)):
                    self._put(piece)

    def _return(self, at: int) -> None:
        if self._beyond:  # what is beyond can't be overwritten, so the line begins anew
            self._line, self._beyond, self._end = [], 0, ""
        self._at = min(at, len(self._line))

    def _put(self, text: str) -> None:
        kept = text[: LINE_KEPT - self._at]
        self._line[self._at : self._at + len(kept)] = kept
        self._at += len(kept)
        if len(kept) < len(text):
            self._beyond += len(text) - len(kept)
            self._end = (self._end + text[len(kept) :])[-LINE_TAIL:]

    def _take(self) -> str:
        line = "".join(self._line)
        if self._beyond:
            left_out = len(line) + self._beyond - LINE_HEAD - LINE_TAIL
            line = line[:LINE_HEAD] + f"[… {left_out:,} characters …]" + (line + self._end)[-LINE_TAIL:]
        self._line, self._at, self._beyond, self._end = [], 0, 0, ""
        return line

    def finish(self) -> Iterator[str]:
        """The line that has not ended, if there is one."""
        if self._line:
            yield self._take()

    def lines(self, text: str) -> Iterator[str]:
        """The lines of a whole text."""
        yield from self.write(text)
        yield from self.finish()


def cut(line: str) -> str:
    """A line without its middle, if it is long."""
    if len(line) <= LONG_LINE:
        return line
    return line[:LINE_HEAD] + f"[… {len(line) - LINE_HEAD - LINE_TAIL:,} characters …]" + line[-LINE_TAIL:]


class Page:
    """Lines up to a limit of characters, line ends included. Beyond it the first and the last ones are kept."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._first: list[str] = []
        self._last: deque[str] = deque()
        self._last_size = 0
        self.lines = 0
        self.size = -1

    def add(self, line: str) -> None:
        self.lines += 1
        self.size += len(line) + 1
        if self.size <= self._limit:
            self._first.append(line)
            return
        self._last.append(line)
        self._last_size += len(line) + 1
        while self._last_size - len(self._last[0]) > self._limit:
            self._last_size -= len(self._last.popleft()) + 1

    def text(self, limit: int, where: str) -> tuple[str, int]:
        """A text of at most `limit` characters, and the number of lines that are left out. `where` says where they are.

        Args:
            limit: not more than the page's own.
        """
        if self.size <= limit:
            return "\n".join([*self._first, *self._last]), 0
        marker = f"[… {self.lines:,} lines, {size_text(self.size)} left out{where} …]"  # as long as it can be
        if len(marker) > limit // 2:
            where, marker = "", marker.replace(where, "")
        room = max(limit - len(marker) - 2, 2)
        lines = [*self._first, *self._last]
        head = self._fitting(lines, int(room * HEAD_SHARE))
        tail = self._fitting(lines[: len(head) - 1 if head else None : -1], room - sum(map(len, head)) - len(head))
        head = head or [lines[0][: int(room * HEAD_SHARE)]]
        tail = tail or [lines[-1][-max(room - sum(map(len, head)) - len(head), 1) :]]
        omitted = self.lines - len(head) - len(tail)
        size = self.size - sum(len(line) + 1 for line in (*head, *tail))
        marker = f"[… {max(omitted, 1):,} lines, {size_text(size)} left out{where} …]"
        return "\n".join([*head, marker, *reversed(tail)]), max(omitted, 1)

    @staticmethod
    def _fitting(lines: Iterable[str], room: int) -> list[str]:
        found = []
        for line in lines:
            room -= len(line) + 1
            if room < 0:
                break
            found.append(line)
        return found


def size_text(size: int) -> str:
    """A number of bytes for people."""
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:.0f} KB" if size < 1_000_000 else f"{size / 1_000_000:.1f} MB"


class Shaper:
    """The maker of a text. `add` events in their order, then ask for what is `shaped`.

    Each stream has a line of its own, so that a progress bar on stderr stays one line beside what is printed.

    `unshown` has the numbers of images that are too large or too many to be shown.

    Args:
        limit: characters that the text may have.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._notes: list[str] = []
        self._endings: list[str] = []
        self._updated: dict[str, list[str]] = {}
        self._clear()

    def _clear(self) -> None:
        self._is_clear_due = False
        self._page = Page(self._limit)
        self._streams: dict[str, Terminal] = {}
        self._line, self._times = "", 0
        self._owner: str | None = None
        self._number = 0
        self._images: list[Image] = []
        self.unshown: list[int] = []

    def add(self, event: StreamEvent) -> None:
        """Take the next event."""
        if self._is_clear_due and event.type in OUTPUTS:
            self._clear()
        match event.type:
            case "stdout" | "stderr":
                self._told_by(event)
                for line in self._streams.setdefault(event.type, Terminal()).write(event.text or ""):
                    self._say(line)
            case "result" | "display":
                self._told_by(event)
                self._end_lines()
                self._say(*self._rich(values(event.data)))
            case "update" if len(self._updated) < UPDATES or event.displayId in self._updated:
                self._updated[event.displayId or ""] = self._rich(values(event.data), is_new=False)
            case "clear" if event.wait:
                self._is_clear_due = True
            case "clear":
                self._clear()
            case "error" if event.error is not None:
                self._failed(event.error)
            case "input_request":
                self._end_lines()
                self._say(f"[the cell waits for input: {event.prompt or '':.200}]")
            case "status" if event.state == RESTARTED:
                self._notes.append(restarted(event.reason or ""))
            case "gap":
                self._end_lines()
                self._say(f"[{event.messages} messages are not kept any more]")

    def _told_by(self, event: StreamEvent) -> None:
        """Say whose output follows, where that changes."""
        owner = f"cell {event.executionCount}" if event.late else None
        if owner != self._owner:
            self._end_lines()
            self._say(f"[{owner} goes on:]" if owner else "[this cell:]")
            self._owner = owner

    def _failed(self, error: CellError) -> None:
        match error.code:
            case "exec_timeout":
                kept = "variables are kept" if error.stateKept else "variables are lost, files are kept"
                time = re.search(r"after ([\d.e+]+) s", error.value)
                self._endings.append(f"[stopped after {time[1] if time else '?'} s; {kept}]")
            case "kernel_restarted":
                self._notes.append(restarted(error.value))
            case _:
                self._end_lines()
                self._say(*error_lines(error))

    def _rich(self, data: dict[str, msgspec.Raw], is_new: bool = True) -> list[str]:
        """The lines of a MIME bundle: a table, or the name of an image, or text. HTML is never shown."""
        if (table := read_table(data.get(TABLE))) is not None:
            return table
        for mime in (each for each in data if each.startswith("image/")):
            kind = mime.removeprefix("image/").partition("+")[0].upper()
            size = image_size(data[mime]) if mime == "image/png" else ""
            self._number += is_new
            size = size or size_text(len(bytes(data[mime])))
            encoded = bytes(data[mime])
            is_small = mime in ("image/png", "image/jpeg") and len(encoded) <= IMAGE_LIMIT
            if is_new and is_small and len(self._images) < IMAGES:
                self._images.append(Image(self._number, mime, encoded[1:-1].decode().replace("\\n", "")))
            elif is_new and len(self.unshown) < UNSHOWN:
                self.unshown.append(self._number)
            return [f"[image {self._number}: {size} {kind}]"]
        shown = text_of(data)
        return [] if shown is None else [*Terminal().lines(shown)]

    def _say(self, *lines: str) -> None:
        for line in lines:
            if self._times and line == self._line:
                self._times += 1
            else:
                self._end_run()
                self._line, self._times = line, 1

    def _end_run(self) -> None:
        """Put equal lines on the page: three and more as one with their number, blank ones as one."""
        line, times = cut(self._line), self._times
        self._times = 0
        if times >= 3:
            line, times = (f"{line} [x {times}]", 1) if line.strip() else ("", 1)
        for _ in range(times):
            self._page.add(line)

    def _end_lines(self) -> None:
        for stream in self._streams.values():
            self._say(*stream.finish())
        self._streams = {}

    def finish(self) -> None:
        """End what is unfinished, because no more events come."""
        self._end_lines()
        for lines in self._updated.values():
            self._say(*lines)
        self._updated = {}
        self._end_run()

    @property
    def is_cut(self) -> bool:
        """Whether something is left out, after `finish`."""
        return self._page.size > self._room

    @property
    def _room(self) -> int:
        """Characters for what is between the notes and the endings."""
        return self._limit - sum(len(line) + 1 for line in (*self._notes, *self._endings))

    def shaped(self, where: str = "") -> Shaped:
        """The text of all events, after `finish`.

        Args:
            where: a clause that says where the rest is, if something is left out.
        """
        text, omitted = self._page.text(self._room, where)
        parts = [*self._notes, *([text.rstrip("\n")] if text.strip("\n") else []), *self._endings]
        return Shaped("\n".join(parts), omitted, self._images)


def restarted(reason: str) -> str:
    """The line that tells of a lost kernel."""
    reason = re.sub("^the kernel (was )?", "", reason)[:200]
    return f"[the kernel was restarted ({reason}): variables are lost, files are kept]"


def text_of(data: dict[str, msgspec.Raw]) -> str | None:
    """The text of a MIME bundle, or what there is in its place."""
    order = ["text/plain", "text/markdown", "text/latex", "application/json"]
    if bytes(data.get("text/plain", b"")).startswith(b'"<IPython.core.display.'):  # the others say more
        order = [*order[1:], "text/html"]
    mime = next((each for each in order if each in data), None)
    if mime is None or mime == "text/html":
        return f"[{mime or next(iter(data))}]" if data else None
    raw = bytes(data[mime])
    try:
        return str(msgspec.json.decode(raw, type=str)) if raw.startswith(b'"') else raw.decode()
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return f"[{mime} that can't be read]"


def image_size(data: msgspec.Raw) -> str:
    """Width and height of a PNG, from its first 24 bytes; empty if it has none."""
    try:
        head = base64.b64decode(bytes(data)[1:33])
    except ValueError:
        return ""
    if len(head) < 24 or head[:4] != b"\x89PNG":
        return ""
    return f"{int.from_bytes(head[16:20], 'big')}x{int.from_bytes(head[20:24], 'big')}"


_table = msgspec.json.Decoder(Table)


def read_table(data: msgspec.Raw | None) -> list[str] | None:
    """The lines of a data frame's rows, with tabs between cells; None if there are none that can be read."""
    if data is None or len(bytes(data)) > MAX_TABLE:
        return None
    try:
        table = _table.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return None
    rows, columns = table.shape
    gap = [["…"]] if table.last else []
    names, dtypes = ([getattr(each, name) for each in table.columns] for name in ("name", "dtype"))
    left_out = ["…"] if columns > len(names) else []
    lines = [["", *names, *left_out], ["", *dtypes, *left_out], *table.first, *gap, *table.last]
    return [f"{table.kind} {rows} x {columns}", *("\t".join(map(one_line, line)) for line in lines)]


def one_line(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f]", " ", text)


_cell = re.compile(r"\s*Cell In\[\d+\], line (\d+)")
_frame = re.compile(r"\s*File (.+?):(\d+), in ([^(\n]+)")
_arrow = re.compile(r"-+> *(\d+) ?(.*)")
_header = re.compile(r"([\w.]+)\s+Traceback \(most recent call last\)")
_chained = re.compile(
    r"\n(?:The above exception was the direct cause of|During handling of the above exception, another)[^\n]*\n"
)


def error_lines(error: CellError) -> list[str]:
    """An exception in the cell's own words: what it is, the cell's line, the innermost other place, its causes."""
    told = f"{error.name}: {error.value}".strip(": \n")
    traceback = plain("\n".join(error.traceback)[-TRACEBACK_READ:])
    *causes, last = _chained.split(traceback)
    lines = [*plain(told if len(told) <= VALUE_LIMIT else told[:VALUE_LIMIT] + " …").split("\n"), *places(last)]
    seen = [told.split("\n")[0]]
    for cause in reversed(causes):
        text = cause_of(cause)
        if text != seen[-1]:
            seen.append(text)
    because = [f"because of {text}" for text in seen[1:]]
    most = ERROR_LIMIT - sum(len(line) + 1 for line in lines) - 40
    left_out = 0
    while because and sum(len(line) + 1 for line in because) > most:
        del because[len(because) // 2]  # the nearest and the first causes say most
        left_out += 1
    if left_out:
        because.insert((len(because) + 1) // 2, f"[… {left_out} exceptions …]")
    return [*lines, *because]


def places(traceback: str) -> Iterator[str]:
    """The line of the cell in which an exception came, and the innermost place outside of the cell."""
    lines = traceback.split("\n")
    cell = frame = ""
    for number, line in enumerate(lines):
        if found := _cell.match(line):
            cell, frame = f"cell line {found[1]}: {source(lines[number + 1 : number + 12], found[1])}", ""
        elif found := _frame.match(line):
            path = re.sub(r"^.*/(?:site-packages|dist-packages|python3\.\d+)/", "", found[1])[-150:]
            frame = f"{path}:{found[2]} {found[3].strip().rpartition('.')[2][:100]}"
    yield from filter(None, (cell.rstrip(": "), frame))


def source(lines: list[str], number: str) -> str:
    """The code of a line, of those that a traceback shows; empty if it shows none."""
    for line in lines:
        found = _arrow.match(line.lstrip())
        if found and found[1] == number:
            return found[2].strip()[:200]
    return lines[0].strip()[:200] if lines and not _arrow.match(lines[0].lstrip()) else ""


def cause_of(traceback: str) -> str:
    """The line in which a part of a traceback tells its exception."""
    head = _header.search(traceback)
    lines = [line for line in traceback.split("\n") if line.strip()]
    for line in reversed(lines):
        if head and line.startswith(head[1]) and line != head[0]:
            return line.strip()[:200]
    return head[1] if head else lines[-1].strip()[:200] if lines else ""
