"""The kernel's two output streams, which also carry what child processes and C libraries write."""

import codecs
import os
import select
import threading
import time
from collections import defaultdict
from io import StringIO
from typing import Any

from ipykernel import iostream

PIPE = 64 * 1024
"""Bytes that a pipe of Linux holds."""
PATIENCE = 1.0
"""Seconds that a cell waits at most for the thread that reads the pipe."""


class OutStream(iostream.OutStream):
    """One output stream. A thread reads the pipe that stands in place of the process's descriptor.

    ipykernel decodes each read by itself, which damages characters that two reads share. It also lets a cell end while
    its children's last words are still in the pipe. The kernel calls `drain` for them. And it lets a cell print on
    before it has read what a child printed earlier, which changes their order.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._draining = threading.Lock()
        self._is_moving = False
        self._reads = 0
        self._thread = threading.get_ident()
        self._waiting = select.poll()
        # By itself ipykernel leaves the descriptor alone in an environment that looks like a test's.
        super().__init__(*args, **options | {"watchfd": "force"})  # type: ignore[no-untyped-call]
        os.register_at_fork(after_in_child=self._forked)

    _fid: int

    def _forked(self) -> None:
        """Forget what the parent has yet to send, and the locks of its threads, which do not run here."""
        self._draining, self._buffer_lock = threading.Lock(), threading.RLock()
        self._buffers = defaultdict(StringIO)

    def _watch_pipe_fd(self) -> None:
        os.set_blocking(self._fid, False)
        self._waiting.register(self._fid, select.POLLIN)
        poll = select.poll()
        poll.register(self._fid, select.POLLIN)
        while poll.poll() and self._should_watch and self.drain():
            pass

    def drain(self) -> bool:
        """Take what is in the pipe, and return whether more may come. It takes a pipe's size at most."""
        with self._draining:
            self._is_moving = True
            try:
                data = os.read(self._fid, PIPE)
                if text := self._decoder.decode(data, final=not data):
                    super().write(text)
                self._reads += 1
                return bool(data)
            except BlockingIOError:
                return True
            finally:
                self._is_moving = False

    def write(self, string: str) -> int:
        """Write text. What children have written before comes before it."""
        self._let_children_speak()
        super().write(string)
        return len(string)

    def flush(self) -> None:
        """Send what was written, by children too."""
        self._let_children_speak()
        super().flush()  # type: ignore[no-untyped-call]

    def _let_children_speak(self) -> None:
        """Wait until the thread has moved what is in the pipe. A cell does not do it, because an interrupt may come."""
        if threading.get_ident() != self._thread:  # its output may belong to another cell than that of children
            return
        if not (self._waiting.poll(0) or self._is_moving):
            return
        enough, until = self._reads + 2, time.monotonic() + PATIENCE  # a read takes all that a pipe holds
        while self._waiting.poll(0) or self._is_moving:
            if self._reads >= enough or time.monotonic() > until or not self.watch_fd_thread.is_alive():
                return
            time.sleep(0)  # gives way to the thread

    def set_parent(self, parent: dict[str, Any]) -> None:
        """Set the request that output belongs to. What children and threads print belongs to the newest cell."""
        cell = self._parent_header_global
        super().set_parent(parent)  # type: ignore[no-untyped-call]
        if self.parent_header.get("msg_type") != "execute_request":
            self._parent_header_global = cell
