"""Files of the sandbox. The guest's own kernel resolves paths, with the sandbox user's rights."""

import errno
import grp
import os
import pwd
import shutil
import stat
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from guest_agent import wire
from guest_agent.channel import AgentError, Stream
from guest_agent.wire import Entries, Entry, ListDir, Move, Read, Write

PAGE = 200_000
"""Characters, roughly, of the directory entries in one answer. They are far below the limit of a frame."""

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


@contextmanager
def errors(path: str) -> Iterator[None]:
    """Turn the system's errors into ours, naming the path."""
    try:
        yield
    except OSError as error:
        code = _FAILURES.get(error.errno or 0, "failed")
        raise AgentError(code, f"{_text(path)}: {os.strerror(error.errno) if error.errno else error}") from error


@lru_cache(64)
def _owner(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@lru_cache(64)
def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _kind(mode: int) -> str:
    return "dir" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def _text(name: str) -> str:
    """A name as text. Bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


def entry(path: str) -> Entry:
    """The entry at `path`. A symbolic link is described by its target, or by itself if the target is missing."""
    with errors(path):
        own = os.lstat(path)
        target = None
        found = own
        if stat.S_ISLNK(own.st_mode):
            target = os.path.realpath(path)
            found = os.stat(path) if os.path.exists(path) else own
    return Entry(
        name=_text(os.path.basename(os.path.normpath(path))) or "/",
        path=_text(path),
        kind=_kind(found.st_mode),
        size=found.st_size,
        mode=stat.S_IMODE(found.st_mode),
        owner=_owner(found.st_uid),
        group=_group(found.st_gid),
        modified_ns=found.st_mtime_ns,
        target=target and _text(target),
    )


def list_dir(request: ListDir) -> Entries:
    """One page of a directory."""
    with errors(request.path):
        names = sorted(os.listdir(request.path), key=_text)
    start = bisect_right(names, request.after, key=_text) if request.after else 0
    entries: list[Entry] = []
    size = 0
    for name in names[start:]:
        if size > PAGE:
            return Entries(entries=entries, more=True)
        try:
            entries.append(entry(os.path.join(request.path, name)))
        except AgentError as error:
            if error.code != "not_found":  # deleted since the listing
                raise
        else:
            size += 200 + sum(len(text or "") for text in (entries[-1].name, entries[-1].path, entries[-1].target))
    return Entries(entries=entries)


async def read(stream: Stream, request: Read) -> None:
    """Send a part of a regular file. If the file shrinks or grows meanwhile, the bytes that are found are sent.

    Files of /proc and /sys, whose size is 0, are read to their end.
    """
    with errors(request.path):
        # O_NONBLOCK keeps the agent from hanging on a pipe that nobody writes.
        fd = os.open(request.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise AgentError("is_directory", f"{request.path}: is a directory")
        if not stat.S_ISREG(found.st_mode):
            raise AgentError("not_regular", f"{request.path}: is not a regular file")
        stream.event(entry(request.path))
        offset, left = request.offset, request.length
        while left and not stream.cancelled.is_set():
            await stream.wait_for_room()
            size = max(stream.room, 0) if left < 0 else min(stream.room, left)
            with errors(request.path):
                data = os.pread(fd, size, offset)
            if not data:
                break
            stream.send_now(data)
            offset += len(data)
            left -= len(data) if left > 0 else 0
        stream.end()
        stream.reply(wire.Done())
    finally:
        os.close(fd)


def _make_parents(path: str) -> None:
    parent = os.path.dirname(path) or "/"
    try:
        os.makedirs(parent, exist_ok=True)
    except FileExistsError:
        raise AgentError("not_directory", f"{_text(parent)}: is not a directory") from None


async def write(stream: Stream, request: Write) -> None:
    """Take a file's new content. The old content stays until all of the new is there."""
    path = request.path
    with errors(path):
        if os.path.isdir(path):
            raise AgentError("is_directory", f"{path}: is a directory")
        real = os.path.realpath(path)
        mode = stat.S_IMODE(os.stat(real).st_mode) if os.path.exists(real) else 0o644
        if os.path.exists(real) and not os.path.isfile(real):
            raise AgentError("not_regular", f"{path}: is not a regular file")
        _make_parents(real)
        part = os.path.join(os.path.dirname(real), f".{os.urandom(6).hex()}.part")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with errors(path):
            os.fchmod(fd, mode)
            while data := await stream.receive():
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
            if stream.cancelled.is_set():
                raise AgentError("failed", f"{path}: the upload was cut short, the old content stays")
            os.rename(part, real)
    except BaseException:
        os.unlink(part)
        raise
    finally:
        os.close(fd)
    stream.reply(entry(path))


def make_dir(path: str) -> Entry:
    """Make a directory with its parents, unless it exists already."""
    with errors(path):
        os.makedirs(path, exist_ok=True)
    return entry(path)


def move(request: Move) -> Entry:
    """Rename, across file systems, too. Missing parents of the destination are made."""
    with errors(request.source):
        os.lstat(request.source)
    with errors(request.destination):
        if os.path.isdir(request.destination) and not os.path.isdir(request.source):
            raise AgentError("is_directory", f"{request.destination}: is a directory")
        _make_parents(request.destination)
        shutil.move(request.source, request.destination)
    return entry(request.destination)


def delete(path: str) -> None:
    """Delete a file, or a directory with its content."""
    with errors(path):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
