"""Results as E2B's clients expect them: data frames as columns, lists and dictionaries as JSON, figures as charts.

Nobody but them wants these types beside the usual ones, so they are made only from the first cell on whose request has
`e2b` in its metadata, the variables that hold while it runs.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def shown(shell: Any, env: dict[str, str]) -> Iterator[None]:
    """While a cell of theirs runs: results are shown like this, and the variables `env` hold."""
    show(shell)
    before = {name: os.environ.get(name) for name in env}
    try:
        os.environ.update(env)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
