"""The cell that a kernel runs, told through memory that the kernel shares with the agent.

An interrupt is meant for one cell. The agent must know whether the kernel is in that cell at this moment, because a
signal between two cells would be lost, or would hit the next one. The kernel can't answer a message while it runs a
cell, so it writes into shared memory. Each field is one aligned word, so no reader sees half of it.
"""

import hashlib
import mmap
from pathlib import Path

RUNNING, ENDED, INTERRUPTED, STOPPED = range(4)
SIZE = 4 * 8


def word(message_id: str) -> int:
    """A cell's message id as a word. It is never 0, which stands for no cell."""
    return int.from_bytes(hashlib.blake2b(message_id.encode("utf-8", "replace"), digest_size=8).digest(), "big") | 1


class Cells:
    """The shared words. The agent creates the file, and the kernel opens it.

    `running` and `ended` are the cell that the kernel is in, and the one that it was in before. In the cell
    `interrupted` a signal has arrived. The user's code of the cell `stopped` is over by an error, which is being shown.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), SIZE)).cast("Q")

    @classmethod
    def create(cls, path: Path) -> "Cells":
        path.write_bytes(bytes(SIZE))
        return cls(path)

    @property
    def running(self) -> int:
        return self._words[RUNNING]

    @property
    def ended(self) -> int:
        return self._words[ENDED]

    @property
    def interrupted(self) -> int:
        return self._words[INTERRUPTED]

    @property
    def stopped(self) -> int:
        return self._words[STOPPED]

    # -- written by the kernel

    def begin(self, message_id: str) -> None:
        self._words[RUNNING] = word(message_id)

    def end(self) -> None:
        self._words[ENDED] = self._words[RUNNING]
        self._words[RUNNING] = 0

    def signal_arrived(self) -> None:
        self._words[INTERRUPTED] = self._words[RUNNING]

    def stop(self) -> None:
        self._words[STOPPED] = self._words[RUNNING]

    # -- written by the agent

    def expect_signal(self) -> None:
        self._words[INTERRUPTED] = 0
