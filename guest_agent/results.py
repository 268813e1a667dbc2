"""Results as E2B's clients expect them: data frames as columns, lists and dictionaries as JSON, figures as charts.

Nobody but them wants these types beside the usual ones, so they are made only after `show`.
"""

import hashlib
import json
import os
from typing import Any

from guest_agent.charts import chart

LIMIT = 10_000
"""Rows of a data frame that are sent as data. A larger one is sent as text and HTML alone."""


def show(shell: Any) -> None:
    """Add E2B's types to a shell's results."""
    from IPython.core.formatters import BaseFormatter

    formatters = shell.display_formatter.formatters
    if "e2b/data" in formatters:
        return

    class Data(BaseFormatter):
        """Columns of a data frame."""

        format_type = "e2b/data"
        print_method = "_repr_e2b_data_"
        _return_type = (dict, list)

    class Chart(BaseFormatter):
        """What a figure shows."""

        format_type = "e2b/chart"
        print_method = "_repr_e2b_chart_"
        _return_type = (dict, list)

    data, charts = Data(parent=shell.display_formatter), Chart(parent=shell.display_formatter)
    for module in ("pandas", "pandas.core.frame"):  # where pandas 3 says that its class is, and where pandas 2 does
        data.for_type_by_name(module, "DataFrame", columns)  # type: ignore[no-untyped-call]
    charts.for_type_by_name("matplotlib.figure", "Figure", chart)  # type: ignore[no-untyped-call]
    for kind in (list, dict):
        formatters["application/json"].for_type(kind, plain)
    formatters |= {"e2b/data": data, "e2b/chart": charts}


def columns(frame: Any) -> dict[str, list[Any]] | None:
    """A data frame's columns as lists."""
    if len(frame) > LIMIT:
        return None
    found = {str(name): column.astype(object).where(column.notna(), None).tolist() for name, column in frame.items()}
    return dict(json.loads(json.dumps(found, default=str)))


def plain(value: Any) -> Any:
    """The value, if JSON can have it as it is; otherwise None."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return value


class NextCell:
    """Variables that hold while the next cell of a certain code runs.

    Args:
        digest: SHA-256 of the cell's code, in hexadecimal digits.
    """

    def __init__(self, shell: Any, digest: str, env: dict[str, str]) -> None:
        self._shell = shell
        self._digest = digest
        self._env = env
        self._before: dict[str, str | None] = {}
        shell.events.register("pre_run_cell", self._begins)

    def _begins(self, info: Any) -> None:
        if hashlib.sha256(info.raw_cell.encode("utf-8", "surrogatepass")).hexdigest() != self._digest:
            return
        self._shell.events.unregister("pre_run_cell", self._begins)
        self._before = {name: os.environ.get(name) for name in self._env}
        os.environ.update(self._env)
        self._shell.events.register("post_run_cell", self._ends)

    def _ends(self, result: Any) -> None:
        self._shell.events.unregister("post_run_cell", self._ends)
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
