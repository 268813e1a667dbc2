"""The kernel's two output streams, which also carry what child processes and C libraries write."""

import codecs
import os
import select
import threading
from typing import Any

from ipykernel import iostream

PIPE = 64 * 1024
"""Bytes that a pipe of Linux holds."""


class OutStream(iostream.OutStream):
    """One output stream. A thread reads the pipe that stands in place of the process's descriptor.

    ipykernel decodes each read by itself, which damages characters that two reads share. It also lets a cell end while
    its children's last words are still in the pipe. The kernel calls `drain` for them.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._draining = threading.Lock()
        # By itself ipykernel leaves the descriptor alone in an environment that looks like a test's.
        super().__init__(*args, **options | {"watchfd": "force"})  # type: ignore[no-untyped-call]

    _fid: int

    def _watch_pipe_fd(self) -> None:
        os.set_blocking(self._fid, False)
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
            self.write(self._decoder.decode(data, final=not data))
            return bool(data)

    def set_parent(self, parent: dict[str, Any]) -> None:
        """Set the request that output belongs to. What children and threads print belongs to the newest cell."""
        cell = self._parent_header_global
        super().set_parent(parent)  # type: ignore[no-untyped-call]
        if self.parent_header.get("msg_type") != "execute_request":
            self._parent_header_global = cell
