"""Tracebacks with lines of code, as IPython's look, made in time for slow machines.

IPython parses the whole source file of each frame, and works on each frame of a recursion. In an emulated machine a
KeyError in pandas takes it 20 seconds, and a RecursionError more than a minute. These tracebacks read lines only, and
leave out the middle of a long one.
"""

import inspect
import linecache
import os
from collections import Counter
from types import FrameType, TracebackType
from typing import Any

import IPython
from IPython.core.tbtools import FrameInfo, _simple_format_traceback_lines, _tokens_filename
from IPython.core.ultratb import AutoFormattedTB
from IPython.utils.PyColorize import Parser, theme_table
from pygments.token import Token  # type: ignore[import-untyped]

FIRST, LAST = 10, 30
"""Number of frames that are shown of a traceback that has more."""
AROUND = 2
"""Number of lines that are shown before the current one, and after it."""
HIDDEN = (os.path.dirname(IPython.__file__) + os.sep, os.path.dirname(__file__) + os.sep)
"""Folders of code that is between a cell and what it calls, and nobody's mistake."""


class Tracebacks(AutoFormattedTB):
    """IPython's renderer of tracebacks. `%xmode Verbose`, which shows variables, works as it does there."""

    def get_records(self, etb: TracebackType, context: int, tb_offset: int) -> Any:
        if self.include_vars:
            return super().get_records(etb, context, tb_offset)
        place: TracebackType | None = etb
        walked: list[tuple[FrameType, int]] = []
        while place is not None:
            if not place.tb_frame.f_code.co_filename.startswith(HIDDEN):
                walked.append((place.tb_frame, place.tb_lineno))
            place = place.tb_next
        if len(walked) <= FIRST + LAST + 1:
            return [record(*each) for each in walked]
        middle = walked[FIRST:-LAST]
        names = Counter(f"{frame.f_code.co_qualname} at line {line}" for frame, line in middle).most_common(3)
        told = ", ".join(f"{name} ({count} times)" for name, count in names)
        left_out = record(*middle[0], f"[... {len(middle)} frames are left out: {told}]")
        return [*(record(*each) for each in walked[:FIRST]), left_out, *(record(*each) for each in walked[-LAST:])]

    def format_record(self, frame_info: FrameInfo) -> str:
        if frame_info._sd is not LINES:
            return super().format_record(frame_info)
        theme = theme_table[self._theme_name]
        if frame_info.description is not None:
            return str(theme.format([(Token, "    "), (Token.ExcName, frame_info.description), (Token, "\n")]))
        code, line = frame_info.code, frame_info.lineno
        assert code is not None
        head = _tokens_filename(True, code.co_filename, lineno=line)
        if code.co_name != "<module>":
            head += [(Token, ", in "), (Token.VName, code.co_qualname), (Token.ValEm, arguments(frame_info.frame))]
        linecache.checkcache(code.co_filename)
        source = linecache.getlines(code.co_filename, frame_info.frame.f_globals)
        first = max(line - AROUND, 1)
        shown = [text if text.endswith("\n") else text + "\n" for text in source[first - 1 : line + AROUND]]
        coloured = Parser(theme_name=self._theme_name).format2
        lines = [(text, (coloured(text, "str")[0] or text, False)) for text in shown]
        tokens = _simple_format_traceback_lines(line, line - first, lines, [], theme)
        return str(theme.format([*head, (Token, "\n"), *tokens]))


LINES = object()
"""The mark of our records, where IPython's have a frame of `stack_data`."""


def record(frame: FrameType, line: int, description: str | None = None) -> FrameInfo:
    return FrameInfo(description, frame.f_code.co_filename, line, frame, frame.f_code, sd=LINES)


def arguments(frame: FrameType) -> str:
    """The names of a function's parameters, in parentheses."""
    found = inspect.getargvalues(frame)
    names = [*found.args, *(["*" + found.varargs] if found.varargs else [])]
    return f"({', '.join([*names, *(['**' + found.keywords] if found.keywords else [])])})"
