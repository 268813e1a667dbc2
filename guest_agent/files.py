"""Files of the sandbox. The guest's own kernel resolves paths, with the sandbox user's rights.

Work on files can take long: a tree has many entries, a disk is busy, a file system of the user's answers late. Commands
and cells must not wait for it, so it is done in a few threads, never in the agent's event loop. Only one thread holds
the interpreter's lock at a time. A long loop therefore makes a system call, which gives up the lock, for every entry.
Such a loop ends at the next entry when the gateway does not want the answer any more.
"""

import asyncio
import errno
import grp
import os
import pwd
import shutil
import stat
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Literal, ParamSpec, TypeVar

from guest_agent import limits, resume, wire
from guest_agent.channel import AgentError, Stream
from guest_agent.wire import Delete, Entries, Entry, ListDir, MakeDir, Move, Read, Stat, Write

THREADS = 8
TREES = THREADS // 2
"""Deletes and moves at once. They may take long, and the other threads stay free for short work."""
SANDBOX_USER = "user"
PIECE = 1024 * 1024
"""Bytes of a file that are read or written at a time. The change of threads would cost more than a smaller piece."""
PAGE = 200_000
"""Characters, roughly, of the directory entries in one answer. They are far below the limit of a frame."""
MAX_NAMES = 1_000_000
"""Largest directory that is listed, in entries, because its names are kept and sorted in memory."""
KEPT_NAMES = 200_000
"""Names of older scans that are kept beside the newest scan."""
KEPT_SECONDS = 60.0
"""Time after the last page of any directory until all scans are forgotten."""
SETTLED_NS = 100_000_000
"""Age of a directory's last change, in ns, from which a later change certainly has another time."""
RUN = 10_000
"""Names that are sorted, or directories that are remembered for deletion, at a time."""

P = ParamSpec("P")
T = TypeVar("T")
Check = Callable[[], None]
"""Raises AgentError when the work is not wanted any more."""

_FAILURES = {
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_directory",
    errno.EISDIR: "is_directory",
    errno.EEXIST: "exists",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.EROFS: "permission_denied",
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "no_space",
    errno.ENAMETOOLONG: "invalid",
    errno.ELOOP: "invalid",
    errno.ENXIO: "not_regular",
    errno.EINVAL: "invalid",
}


class Files:
    """The answers to all requests for files.

    Args:
        uid: the sandbox user, whose rights count; None for those of the agent.
    """

    def __init__(self, uid: int | None) -> None:
        self._uid = uid
        self._threads = ThreadPoolExecutor(THREADS, "files", _begin_thread, (uid,))
        self._trees = asyncio.Semaphore(TREES)
        self._scans: dict[str, Scan] = {}
        self._forgetting: asyncio.TimerHandle | None = None

    async def answer(self, stream: Stream, request: Stat | ListDir | Read | Write | MakeDir | Move | Delete) -> None:
        """Answer one request on its stream.

        Raises:
            AgentError: the system refused, or the gateway has cancelled the request.
        """
        uid = self._uid_of(request.user)
        match request:
            case Stat():
                stream.reply(await self._work(uid, entry, request.path))
            case ListDir():
                await self._list(stream, request, uid)
            case Read():
                await self._read(stream, request, uid)
            case Write():
                await self._write(stream, request, uid)
            case MakeDir():
                stream.reply(await self._work(uid, make_dir, request))
            case Move():
                async with self._trees:
                    stream.reply(await self._work(uid, move, request, stream.raise_if_cancelled))
            case Delete():
                async with self._trees:
                    await self._work(uid, delete, request.path, stream.raise_if_cancelled)
                stream.reply(wire.Done())

    def _uid_of(self, user: str) -> int | None:
        if self._uid is None or user in ("", SANDBOX_USER):
            return self._uid
        try:
            return pwd.getpwnam(user).pw_uid
        except KeyError:
            raise AgentError("invalid", f"there is no user {user!r}") from None

    async def _work(self, uid: int | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in one of the threads, with the rights of that user."""

        def work() -> T:
            if uid is None or self._uid is None or uid == self._uid:
                return function(*args, **kwargs)
            resume.act_as(uid)
            try:
                return function(*args, **kwargs)
            finally:
                resume.act_as(self._uid)

        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _list(self, stream: Stream, request: ListDir, uid: int | None) -> None:
        """Send one page. The scan is kept for the next page, so that all pages together cost one scan."""
        path = request.path
        kept = self._scans.get(path) if request.after else None
        scan, page = await self._work(uid, list_dir, request, kept, stream.raise_if_cancelled)
        self._scans.pop(path, None)
        if page.more:
            self._keep(path, scan)
        stream.reply(page)

    def _keep(self, path: str, scan: "Scan") -> None:
        """Keep a scan, and older ones beside it only as far as KEPT_NAMES allows."""
        while self._scans and sum(len(each.names) for each in self._scans.values()) > KEPT_NAMES:
            del self._scans[next(iter(self._scans))]
        self._scans[path] = scan
        if self._forgetting is not None:
            self._forgetting.cancel()
        self._forgetting = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._scans.clear)

    async def _read(self, stream: Stream, request: Read, uid: int | None) -> None:
        """Send a part of a regular file. If the file shrinks or grows meanwhile, the bytes that are found are sent.

        Files of /proc and /sys, whose size is 0, are read to their end.
        """
        path, offset, left = request.path, request.offset, request.length
        fd, found = await self._work(uid, _open, path)
        try:
            stream.event(found)
            while left and not stream.cancelled.is_set():
                data = memoryview(
                    await self._work(uid, _read, path, fd, min(left, PIECE) if left > 0 else PIECE, offset)
                )
                if not data:
                    break
                offset += len(data)
                left -= len(data) if left > 0 else 0
                await self._send(stream, data)
            stream.end()
            stream.reply(wire.Done())
        finally:
            await self._work(uid, os.close, fd)

    async def _send(self, stream: Stream, data: memoryview) -> None:
        """Send a piece as credit allows, or until the stream is cancelled."""
        while data:
            await stream.wait_for_room()
            if stream.cancelled.is_set():
                return
            piece = data[: stream.room]
            stream.send_now(piece)
            data = data[len(piece) :]

    async def _write(self, stream: Stream, request: Write, uid: int | None) -> None:
        """Take a file's new content. The old content stays until all of the new is there, unless it is `in_place`."""
        path = request.path
        if request.in_place:
            await self._write_in_place(stream, request, uid)
            return
        fd, part, real = await self._work(uid, _open_part, path)
        try:
            while pieces := await stream.receive_many(PIECE):
                await self._work(uid, _write, path, fd, pieces)
            if stream.cancelled.is_set():
                raise AgentError("failed", f"{path}: the upload was cut short, the old content stays")
            await self._work(uid, _replace, path, part, real)
        except BaseException:
            await self._work(uid, os.unlink, part)
            raise
        finally:
            await self._work(uid, os.close, fd)
        stream.reply(await self._work(uid, entry, path))

    async def _write_in_place(self, stream: Stream, request: Write, uid: int | None) -> None:
        path = request.path
        fd = await self._work(uid, _open_in_place, path, request.metadata)
        try:
            while pieces := await stream.receive_many(PIECE):
                await self._work(uid, _write, path, fd, pieces)
            stream.raise_if_cancelled()
        finally:
            await self._work(uid, os.close, fd)
        stream.reply(await self._work(uid, entry, path))


def _begin_thread(uid: int | None) -> None:
    """Rights and priority belong to a thread, so each of them gets its own."""
    if uid is not None:
        limits.prefer_thread()
        resume.act_as(uid)


@contextmanager
def errors(path: str) -> Iterator[None]:
    """Turn the system's errors into ours, naming the path."""
    try:
        yield
    except OSError as error:
        code = _FAILURES.get(error.errno or 0, "failed")
        raise AgentError(code, f"{_text(path)}: {os.strerror(error.errno) if error.errno else error}") from error


# -- entries


@lru_cache(64)
def _owner(uid: int) -> str:
    try:
        return _text(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)


@lru_cache(64)
def _group(gid: int) -> str:
    try:
        return _text(grp.getgrgid(gid).gr_name)
    except KeyError:
        return str(gid)


def _kind(mode: int) -> Literal["dir", "file", "other"]:
    return "dir" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def _text(name: str) -> str:
    """A name as text that fits an Entry. Bytes that are not UTF-8 become U+FFFD."""
    return (name if name.isascii() else os.fsencode(name).decode("utf-8", "replace"))[: wire.MAX_TEXT]


def entry(path: str) -> Entry:
    """The entry at `path`. A symbolic link is described by its target, or by itself if the target is missing."""
    with errors(path):
        return _entry(_text(os.path.basename(os.path.normpath(path))) or "/", path)


def _entry(name: str, path: str) -> Entry:
    own = os.lstat(path)
    target = None
    found = own
    if stat.S_ISLNK(own.st_mode):
        target = os.path.realpath(path)
        found = os.stat(path) if os.path.exists(path) else own
    return Entry(
        name=name,
        path=_text(path),
        kind=_kind(found.st_mode),
        size=max(found.st_size, 0),
        mode=stat.S_IMODE(found.st_mode),
        owner=_owner(found.st_uid),
        group=_group(found.st_gid),
        modified_ns=max(-(2**63), min(found.st_mtime_ns, 2**63 - 1)),  # a file system may say anything
        target=target and _text(target),
        metadata=_metadata(path) if found is own or os.path.exists(path) else {},
    )


def _metadata(path: str) -> dict[str, str]:
    """The extended attributes that are a file's metadata. Some file systems have none, and say so by an error."""
    found: dict[str, str] = {}
    with suppress(OSError):
        for name in os.listxattr(path):
            if name.startswith(wire.METADATA) and len(found) < wire.MAX_METADATA:
                value = os.getxattr(path, name).decode("utf-8", "replace")
                found[_text(name.removeprefix(wire.METADATA))] = value[: wire.MAX_TEXT]
    return found


def _set_metadata(fd: int, metadata: dict[str, str]) -> None:
    for name in os.listxattr(fd):
        if name.startswith(wire.METADATA) and name.removeprefix(wire.METADATA) not in metadata:
            os.removexattr(fd, name)
    for name, value in metadata.items():
        os.setxattr(fd, wire.METADATA + name, value.encode())


# -- listings


@dataclass(frozen=True, slots=True)
class Scan:
    """All names of a directory, as text and sorted, and the true name of each.

    Names that read alike as text are one, because no request can tell them apart. `state` is the directory's identity
    and the time of its last change.
    """

    state: tuple[int, int, int]
    texts: list[str]
    names: dict[str, str]
    is_settled: bool

    def is_valid_for(self, found: os.stat_result) -> bool:
        """Whether a scan would find the same names."""
        return self.is_settled and self.state == _state(found)


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _scan(path: str, found: os.stat_result, check: Check) -> Scan:
    is_settled = time.time_ns() - found.st_ctime_ns > SETTLED_NS
    names: dict[str, str] = {}
    with os.scandir(path) as entries:
        while run := [each.name for each in islice(entries, RUN)]:
            check()
            names |= {_text(name): name for name in run}
            if len(names) > MAX_NAMES:
                raise AgentError("too_large", f"{_text(path)}: has over {MAX_NAMES} entries, list it with a command")
    # One sort would hold the interpreter's lock too long. Sorted runs are merged in a fraction of that time.
    unsorted = list(names)
    texts = [text for start in range(0, len(names), RUN) for text in sorted(unsorted[start : start + RUN])]
    texts.sort()
    return Scan(_state(found), texts, names, is_settled)


def list_dir(request: ListDir, kept: Scan | None, check: Check) -> tuple[Scan, Entries]:
    """One page of a directory, and the scan that it is taken from, which is `kept` if that is still valid."""
    path = request.path
    entries: list[Entry] = []
    size = 0
    with errors(path):
        found = os.stat(path)
        scan = kept if kept is not None and kept.is_valid_for(found) else _scan(path, found, check)
        start = bisect_right(scan.texts, request.after) if request.after else 0
        for number in range(start, len(scan.texts)):
            if size > PAGE or (request.limit and len(entries) == request.limit):
                return scan, Entries(entries=entries, more=True)
            check()
            try:
                text = scan.texts[number]
                each = _entry(text, os.path.join(path, scan.names[text]))
            except FileNotFoundError:
                continue  # deleted since the scan
            entries.append(each)
            size += 200 + len(each.name) + len(each.path) + len(each.target or "")
            size += sum(len(name) + len(value) for name, value in each.metadata.items())
    return scan, Entries(entries=entries)


# -- content


def _open(path: str) -> tuple[int, Entry]:
    """A regular file, open for reading, and its entry."""
    with errors(path):
        # O_NONBLOCK keeps the thread from hanging on a pipe that nobody writes.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise AgentError("is_directory", f"{path}: is a directory")
        if not stat.S_ISREG(mode):
            raise AgentError("not_regular", f"{path}: is not a regular file")
        return fd, entry(path)
    except BaseException:
        os.close(fd)
        raise


def _read(path: str, fd: int, size: int, offset: int) -> bytes:
    with errors(path):
        return os.pread(fd, size, offset)


def _part(path: str) -> str:
    """A name beside `path` for what will take its place."""
    return os.path.join(os.path.dirname(path), f".{os.urandom(6).hex()}.part")


def _make_parents(path: str) -> None:
    parent = os.path.dirname(path) or "/"
    try:
        os.makedirs(parent, exist_ok=True)
    except FileExistsError:
        raise AgentError("not_directory", f"{_text(parent)}: is not a directory") from None


def _open_part(path: str) -> tuple[int, str, str]:
    """An empty file, open for writing, its name, and the path where it belongs when it is complete."""
    with errors(path):
        if os.path.isdir(path):
            raise AgentError("is_directory", f"{path}: is a directory")
        real = os.path.realpath(path)
        mode = stat.S_IMODE(os.stat(real).st_mode) if os.path.exists(real) else 0o644
        if os.path.exists(real) and not os.path.isfile(real):
            raise AgentError("not_regular", f"{path}: is not a regular file")
        _make_parents(real)
        part = _part(real)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            os.fchmod(fd, mode)
        except BaseException:
            os.close(fd)
            os.unlink(part)
            raise
    return fd, part, real


def _open_in_place(path: str, metadata: dict[str, str] | None) -> int:
    """A file, empty and open for writing, that belongs to this thread's user if that is possible."""
    with errors(path):
        if os.path.isdir(path):
            raise AgentError("is_directory", f"{path}: is a directory")
        _make_parents(path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise AgentError("not_regular", f"{path}: is not a regular file")
            with suppress(PermissionError):  # another user's file, which this one may write
                os.fchown(fd, resume.acting_as(), -1)
            if metadata is not None:
                with nullcontext() if metadata else suppress(OSError):  # some file systems have no attributes to clear
                    _set_metadata(fd, metadata)
        except BaseException:
            os.close(fd)
            raise
    return fd


def _write(path: str, fd: int, pieces: list[bytes]) -> None:
    with errors(path):
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[os.write(fd, view) :]


def _replace(path: str, part: str, real: str) -> None:
    with errors(path):
        os.rename(part, real)


# -- directories and trees


def make_dir(request: MakeDir) -> Entry:
    """Make a directory with its parents. One that exists already is an error only if the request is exclusive."""
    path = request.path
    with errors(path):
        if request.exclusive and os.path.exists(path) and not os.path.isdir(path):
            raise AgentError("not_directory", f"{_text(path)}: is not a directory")
        os.makedirs(path, exist_ok=not request.exclusive)
    return entry(path)


def move(request: Move, check: Check) -> Entry:
    """Rename, across file systems, too. Missing parents of the destination are made.

    A directory whose destination is a directory is moved into it.
    """
    source, destination = request.source, request.destination
    check()  # it may have waited for other trees
    with errors(source):
        os.lstat(source)
    with errors(destination):
        if os.path.isdir(destination):
            if not os.path.isdir(source):
                raise AgentError("is_directory", f"{destination}: is a directory")
            if not os.path.samefile(source, destination):
                destination = os.path.join(destination, os.path.basename(os.path.normpath(source)))
                if os.path.lexists(destination):
                    raise AgentError("exists", f"{_text(destination)}: exists")
        _make_parents(destination)
        try:
            os.rename(source, destination)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _move_by_copy(source, destination, check)
    return entry(destination)


def _move_by_copy(source: str, destination: str, check: Check) -> None:
    """Copy, and then delete the source. The destination stays as it is until the copy is complete."""
    part = _part(destination)
    try:
        _copy(source, part, check)
        os.rename(part, destination)
    except BaseException:
        if os.path.lexists(part):
            _delete(part, lambda: None)
        raise
    _delete(source, check)


def _copy(source: str, destination: str, check: Check) -> None:
    check()
    if not _is_dir(source):
        shutil.copy2(source, destination, follow_symlinks=False)
        return
    os.mkdir(destination)
    for name in os.listdir(source):
        _copy(os.path.join(source, name), os.path.join(destination, name), check)
    shutil.copystat(source, destination)


def _is_dir(path: str) -> bool:
    """Whether this is a directory itself, not a link to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def delete(path: str, check: Check) -> None:
    """Delete a file, or a directory with its content."""
    check()  # it may have waited for other trees
    with errors(path):
        _delete(path, check)


def _delete(path: str, check: Check) -> None:
    if not _is_dir(path):
        os.unlink(path)
        return
    left = [path]
    while left:
        below = _empty(left[-1], check)
        if below:
            left += below
        else:
            with suppress(FileNotFoundError):  # somebody else deletes it, too
                os.rmdir(left[-1])
            left.pop()


def _empty(path: str, check: Check) -> list[str]:
    """Delete what is in a directory, except for directories. Return those, RUN of them at most."""
    below: list[str] = []
    with suppress(FileNotFoundError), os.scandir(path) as entries:
        for each in entries:
            check()
            if each.is_dir(follow_symlinks=False):
                below.append(each.path)
                if len(below) == RUN:
                    break
            else:
                with suppress(FileNotFoundError):
                    os.unlink(each.path)
    return below
