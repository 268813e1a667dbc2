"""Watches on directories, by inotify. What has changed waits in the sandbox until the gateway asks for it.

Changes are read from the kernel at once, because a directory that is new in a recursive watch must be watched before
something happens in it. At most KEPT wait here, and then the kernel's own queue fills. When that overflows the reader
is told that something was lost.
"""

import asyncio
import ctypes
import os
import struct
from collections import deque
from contextlib import suppress

from guest_agent.channel import AgentError, Stream
from guest_agent.wire import MAX_CHANGES, MAX_TEXT, Change, Changes, GetChanges, Watch, Watching

MAX_DIRECTORIES = 8192
"""Directories of one recursive watch. Those beyond are not watched, and the reader is told that changes are lost."""
MAX_WATCHES = 64
KEPT = 10_000
"""Changes that wait here for the gateway, for each watch."""
READ_SIZE = 64 * 1024

MODIFY, ATTRIB, MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
OVERFLOW, IGNORED, ONLYDIR, ISDIR = 0x4000, 0x8000, 0x01000000, 0x40000000
MASK = MODIFY | ATTRIB | MOVED_FROM | MOVED_TO | CREATE | DELETE | ONLYDIR
KINDS = {CREATE: "create", MOVED_TO: "create", MODIFY: "write", DELETE: "remove", MOVED_FROM: "rename", ATTRIB: "chmod"}
HEADER = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)


class Watched:
    """One watch.

    Raises:
        AgentError: not_found, not_directory, permission_denied.
    """

    def __init__(self, root: str, *, is_recursive: bool) -> None:
        self._root = root
        self._is_recursive = is_recursive
        self._loop = asyncio.get_running_loop()
        self._paths: dict[int, str] = {}
        self._changes: deque[Change] = deque()
        self._lost = False
        self._is_reading = False
        self.changed = asyncio.Event()
        if not os.path.exists(root):
            raise AgentError("not_found", f"{root}: No such file or directory")
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise AgentError("failed", f"no more directories can be watched: {os.strerror(ctypes.get_errno())}")
        try:
            if number := self._add(""):
                code = {20: "not_directory", 13: "permission_denied", 2: "not_found"}.get(number, "failed")
                raise AgentError(code, f"{root}: {os.strerror(number)}")
            if is_recursive:
                self._add_below("", is_new=False)
        except BaseException:
            os.close(self._fd)
            raise
        self._read_on()

    def close(self) -> None:
        self._pause()
        os.close(self._fd)

    def take(self) -> Changes:
        """The oldest changes, at most MAX_CHANGES of them."""
        self.read()
        found = [self._changes.popleft() for _ in range(min(len(self._changes), MAX_CHANGES))]
        lost, self._lost = self._lost, False
        if not self._changes:
            self.changed.clear()
        self._read_on()
        return Changes(changes=found, lost=lost)

    def read(self) -> None:
        """Take note of all that has happened until now, as far as there is room."""
        while len(self._changes) < KEPT:
            try:
                data = os.read(self._fd, READ_SIZE)
            except BlockingIOError:
                return
            at = 0
            while at < len(data):
                directory, mask, _, length = HEADER.unpack_from(data, at)
                name = os.fsdecode(data[at + HEADER.size : at + HEADER.size + length].rstrip(b"\0"))
                at += HEADER.size + length
                self._received(directory, mask, name)
        self._pause()

    def _received(self, directory: int, mask: int, name: str) -> None:
        if mask & OVERFLOW:
            self._lose()
        if mask & IGNORED:
            self._paths.pop(directory, None)
        parent = self._paths.get(directory)
        kind = KINDS.get(mask & (MODIFY | ATTRIB | MOVED_FROM | MOVED_TO | CREATE | DELETE))
        if parent is None or kind is None or not name:
            return
        path = os.path.join(parent, name)
        self._note(kind, path)
        if self._is_recursive and mask & ISDIR and kind == "create" and not self._add(path):
            self._add_below(path, is_new=True)

    def _note(self, kind: str, path: str) -> None:
        self._changes.append(Change(kind=kind, name=os.fsencode(path).decode("utf-8", "replace")[:MAX_TEXT]))  # type: ignore[arg-type]
        self.changed.set()

    def _lose(self) -> None:
        self._lost = True
        self.changed.set()

    def _add(self, path: str) -> int:
        """Watch a directory, and return the system's error number, 0 if there is none."""
        if len(self._paths) >= MAX_DIRECTORIES:
            self._lose()
            return 0
        whole = os.fsencode(os.path.join(self._root, path))
        number = _libc.inotify_add_watch(self._fd, whole, MASK)
        if number < 0:
            return ctypes.get_errno()
        self._paths[number] = path
        return 0

    def _add_below(self, path: str, *, is_new: bool) -> None:
        """Watch the directories in a directory. What is found in a new one was made before it was watched."""
        with suppress(OSError), os.scandir(os.path.join(self._root, path)) as entries:
            for each in entries:
                below = os.path.join(path, each.name)
                if is_new:
                    self._note("create", below)
                    with suppress(OSError):
                        if each.is_file(follow_symlinks=False) and each.stat(follow_symlinks=False).st_size:
                            self._note("write", below)
                if each.is_dir(follow_symlinks=False) and len(self._paths) < MAX_DIRECTORIES and not self._add(below):
                    self._add_below(below, is_new=is_new)

    def _read_on(self) -> None:
        if not self._is_reading and len(self._changes) < KEPT:
            self._is_reading = True
            self._loop.add_reader(self._fd, self.read)

    def _pause(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._fd)


class Watches:
    """The watches of a sandbox, by the number of their stream."""

    def __init__(self) -> None:
        self._watched: dict[int, Watched] = {}

    async def answer(self, stream: Stream, request: Watch | GetChanges) -> None:
        """Answer one request on its stream; `_watch` and `_tell` say with which errors."""
        await (self._watch(stream, request) if isinstance(request, Watch) else self._tell(stream, request))

    async def _watch(self, stream: Stream, request: Watch) -> None:
        """Watch a directory until the stream is cancelled.

        Raises:
            AgentError: it can't be watched, or there are MAX_WATCHES already.
        """
        if len(self._watched) >= MAX_WATCHES:
            raise AgentError("too_large", f"{MAX_WATCHES} directories are watched already")
        watched = self._watched[stream.number] = Watched(request.path, is_recursive=request.recursive)
        try:
            stream.event(Watching())
            await stream.cancelled.wait()
        finally:
            watched.close()
            if self._watched.get(stream.number) is watched:  # a new epoch may have given the number to another
                del self._watched[stream.number]
        stream.raise_if_cancelled()

    async def _tell(self, stream: Stream, request: GetChanges) -> None:
        """Tell what has changed.

        Raises:
            AgentError: not_found (nothing is watched on that stream), or the gateway does not want the answer any more.
        """
        watched = self._watched.get(request.stream)
        if watched is None:
            raise AgentError("not_found", "nothing is watched there")
        watched.read()
        if request.wait and not watched.changed.is_set():
            waiting = {asyncio.ensure_future(watched.changed.wait()), asyncio.ensure_future(stream.cancelled.wait())}
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in waiting:
                    each.cancel()
            stream.raise_if_cancelled()
        stream.reply(watched.take())
