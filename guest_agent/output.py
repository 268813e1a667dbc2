"""The kernel's two output streams, which also carry what child processes and C libraries write."""

import codecs
import os
import select
import threading
from collections import defaultdict
from io import StringIO
from typing import Any

from ipykernel import iostream

PIPE = 64 * 1024
"""Bytes that a pipe of Linux holds."""


class OutStream(iostream.OutStream):
    """One output stream. A thread reads the pipe that stands in place of the process's descriptor.

    ipykernel decodes each read by itself, which damages characters that two reads share. It also lets a cell end while
    its children's last words are still in the pipe. The kernel calls `drain` for them. And it lets a cell print on
    before it has read what a child printed earlier, which changes their order.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._draining = threading.RLock()  # a signal's handler may print while a cell drains
        self._thread = threading.get_ident()
        self._waiting = select.poll()
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        os.register_at_fork(after_in_child=self._forked)

    _fid: int

    def _forked(self) -> None:
        """Forget what the parent has yet to send, and the locks of its threads, which do not run here."""
        self._draining, self._buffer_lock = threading.RLock(), threading.RLock()
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
            try:
                data = os.read(self._fid, PIPE)
            except BlockingIOError:
                return True
            if text := self._decoder.decode(data, final=not data):
                super().write(text)
            return bool(data)

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
        if threading.get_ident() != self._thread:  # its output may belong to another cell than that of children
            return
        with self._draining:  # what has been read may not be written yet
            if self._waiting.poll(0) and os.getpid() == self._master_pid:
                self.drain()

    def set_parent(self, parent: dict[str, Any]) -> None:
        """Set the request that output belongs to. What children and threads print belongs to the newest cell."""
        cell = self._parent_header_global
        super().set_parent(parent)  # type: ignore[no-untyped-call]
        if self.parent_header.get("msg_type") != "execute_request":
            self._parent_header_global = cell
