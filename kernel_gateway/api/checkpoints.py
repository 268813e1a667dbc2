"""Undo: a sandbox's checkpoints, the way back to one, and what happened in the sandbox, in order."""

from msgspec import Struct

from kernel_gateway.api.base import Call
from kernel_gateway.errors import NotFound
from kernel_gateway.kernel.history import Cell
from kernel_gateway.sandbox.timeline import Checkpoint, Return


class TimelineModel(Struct):
    """Cells, checkpoints and returns to them, the oldest first.

    `bytes` is what the checkpoints take of the server's disk, and `budget` what they may take. `trouble` says why there
    is no checkpoint after the last cell though the sandbox asks for them; it is empty if there is one.
    """

    entries: list[Cell | Checkpoint | Return]
    bytes: int
    budget: int
    trouble: str


def number_of(call: Call) -> int:
    """The number of the checkpoint that the path names."""
    text = call.path["checkpoint"]
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise NotFound("checkpoint not found")
    return int(text)


async def take(call: Call) -> Checkpoint:
    """Keep the sandbox as it stands, so that it can go back to this moment. It stands still for a moment, and goes on.

    A checkpoint has the memory, the disk and all processes. It ends with the sandbox.
    """
    return await call.sandboxes.checkpoints.take(call.sandbox)


async def restore(call: Call) -> None:
    """Let the sandbox go back to a checkpoint: variables, files and processes are as they were then.

    It stays itself, with its id, tokens, settings and lifetime. Clients stay connected, and messages are numbered on.
    Cells that run end with `outcome: unknown`, those that wait with `not_started`.
    """
    await call.sandboxes.checkpoints.restore(call.sandbox, number_of(call))


async def delete(call: Call) -> None:
    """Delete a checkpoint."""
    await call.sandboxes.checkpoints.delete(call.sandbox, number_of(call))


async def timeline(call: Call) -> TimelineModel:
    """The cells that ran in the sandbox, whoever sent them, and its checkpoints. Of a paused one it has no cells."""
    sandbox = call.sandbox
    marks, kernel = sandbox.timeline, sandbox.kernel
    return TimelineModel(
        entries=sorted([*(kernel.history if kernel else ()), *marks.marks], key=lambda entry: entry.at),
        bytes=marks.size,
        budget=call.sandboxes.checkpoints.budget,
        trouble=marks.trouble,
    )
