"""How a piece of accepted work ended: a cell or a command. Pure.

Every piece of work gets one Outcome, once. All that tell of it (answers, streams, idempotent requests, lists) tell that
value.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from kernel_gateway import errors
from kernel_gateway.errors import CellvmError

Packed = tuple[str, str, str, str, str | None]
"""An outcome as it is stored: its ending, and its error's class, text, code and hint, empty without an error."""


class Ending(StrEnum):
    """What is known of work that is over.

    FINISHED: it ran to its end, whatever the end was. NOT_STARTED: it never ran, so repeating it is safe. UNKNOWN: it
    may have run, in part or as a whole, because its kernel or its machine ended first.
    """

    FINISHED = "finished"
    NOT_STARTED = "not_started"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one piece of work. `error` is what the server has to say of it, None if the work speaks for itself."""

    ending: Ending
    error: CellvmError | None = None

    @classmethod
    def failed(cls, ending: Ending, error: CellvmError) -> Self:
        """An outcome whose error tells the ending, too."""
        told = type(error).__new__(type(error), *error.args)  # several outcomes may come of one error
        told.__dict__ |= error.__dict__
        told.outcome = ending
        return cls(ending, told)

    def packed(self) -> Packed:
        error = self.error
        if error is None:
            return self.ending, "", "", "", None
        return self.ending, type(error).__name__, str(error), error.code, error.hint

    @classmethod
    def unpacked(cls, packed: Packed) -> Self:
        """The outcome that was packed."""
        ending, kind, text, code, hint = packed
        if not kind:
            return cls(Ending(ending))
        known: type[CellvmError] = getattr(errors, kind, CellvmError)
        error = known.__new__(known, text)
        error.code, error.hint, error.outcome = code, hint, ending
        return cls(Ending(ending), error)


FINISHED = Outcome(Ending.FINISHED)
