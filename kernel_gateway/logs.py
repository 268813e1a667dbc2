"""The form of the log. Guests and strangers choose words in it, so nothing of theirs may look like a line of ours."""

import logging
from types import TracebackType

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def printable(text: str) -> str:
    """Text with everything escaped that is not printable: line ends, control characters, terminal escapes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class Escaped(logging.Formatter):
    """One record a line. The lines of a traceback begin with a bar."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(  # noqa: N802
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        return "\n".join(f"| {printable(line)}" for line in super().formatException(ei).split("\n"))
