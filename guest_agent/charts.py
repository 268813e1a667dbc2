"""What a matplotlib figure shows, as data that a client can draw again: its axes, their labels, and their elements.

Only the kinds of charts are told that can be told apart with certainty. Everything else is of type "unknown".
"""

import re
from collections.abc import Iterable
from typing import Any

MAX_POINTS = 10_000
"""Points of one figure. A figure with more is sent as an image alone."""


def chart(figure: Any) -> dict[str, Any] | None:
    """The chart of a figure; None if it has no axes, too many points, or something in it that nobody has thought of."""
    try:
        charts = [of_axes(axes) for axes in figure.axes]
    except (AttributeError, IndexError, TypeError, ValueError):
        return None  # the image shows it
    if not charts or _size(charts) > MAX_POINTS:
        return None
    if len(charts) == 1:
        return charts[0]
    title = figure._suptitle.get_text() if figure._suptitle else None
    return {"type": "superchart", "title": title, "elements": charts}


def of_axes(axes: Any) -> dict[str, Any]:
    """The chart in one pair of axes."""
    from matplotlib.collections import PathCollection  # type: ignore[import-not-found]
    from matplotlib.container import BarContainer  # type: ignore[import-not-found]
    from matplotlib.patches import Wedge  # type: ignore[import-not-found]

    title = axes.get_title() or None
    wedges = [each for each in axes.patches if isinstance(each, Wedge)]
    if wedges:
        return {"type": "pie", "title": title, "elements": [_slice(each, axes) for each in wedges]}
    labels = {
        "x_label": axes.get_xlabel() or None,
        "y_label": axes.get_ylabel() or None,
        "x_unit": _unit(axes.get_xlabel()),
        "y_unit": _unit(axes.get_ylabel()),
    }
    if boxes := _boxes(axes):
        return {"type": "box_and_whisker", "title": title, **labels, "elements": boxes}
    bars = [each for each in axes.containers if isinstance(each, BarContainer)]
    if bars:
        return {
            "type": "bar",
            "title": title,
            **labels,
            "elements": [each for bar in bars for each in _bars(bar, axes)],
        }
    clouds = [each for each in axes.collections if isinstance(each, PathCollection)]
    if clouds:
        points = [_points(each.get_label(), each.get_offsets().tolist(), axes) for each in clouds]
        return {"type": "scatter", "title": title, **labels, **_scales(axes), "elements": points}
    if axes.lines:
        points = [_points(each.get_label(), each.get_xydata().tolist(), axes) for each in axes.lines]
        return {"type": "line", "title": title, **labels, **_scales(axes), "elements": points}
    return {"type": "unknown", "title": title, "elements": []}


def _size(charts: Iterable[dict[str, Any]]) -> int:
    return sum(len(each.get("points", "1")) for found in charts for each in found["elements"])


def _unit(label: str) -> str | None:
    """The text in brackets of a label."""
    found = re.search(r"\(([^()]+)\)|\[([^\[\]]+)\]", label)
    return None if found is None else found[1] or found[2]


# -- scales


def _scale(axis: Any, name: str) -> str:
    from matplotlib.category import StrCategoryConverter  # type: ignore[import-not-found]
    from matplotlib.dates import DateConverter, _SwitchableDateConverter  # type: ignore[import-not-found]

    converter = axis.get_converter() if hasattr(axis, "get_converter") else axis.converter
    if isinstance(converter, StrCategoryConverter):
        return "categorical"
    return "datetime" if isinstance(converter, DateConverter | _SwitchableDateConverter) else name


def _scales(axes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for letter, axis, scale in (("x", axes.xaxis, axes.get_xscale()), ("y", axes.yaxis, axes.get_yscale())):
        kind = _scale(axis, scale)
        found[f"{letter}_ticks"] = [_value(each, kind) for each in map(float, axis.get_ticklocs())]
        found[f"{letter}_tick_labels"] = [each.get_text() for each in axis.get_ticklabels()]
        found[f"{letter}_scale"] = kind
    return found


def _value(number: float, kind: str) -> Any:
    from matplotlib.dates import num2date

    return num2date(number).isoformat() if kind == "datetime" else number


# -- elements


def _points(label: Any, pairs: list[list[float]], axes: Any) -> dict[str, Any]:
    kinds = (_scale(axes.xaxis, axes.get_xscale()), _scale(axes.yaxis, axes.get_yscale()))
    names = [{index: name for name, index in (getattr(axis.units, "_mapping", None) or {}).items()}
             for axis in (axes.xaxis, axes.yaxis)]  # fmt: skip
    points = [
        [names[i].get(value, value) if kinds[i] == "categorical" else _value(value, kinds[i])
         for i, value in enumerate(pair)]
        for pair in pairs
    ]  # fmt: skip
    return {"label": str(label), "points": points}


def _bars(container: Any, axes: Any) -> list[dict[str, Any]]:
    is_flat = container.orientation == "horizontal"
    axis = axes.yaxis if is_flat else axes.xaxis
    ticks = dict(
        zip(map(float, axis.get_ticklocs()), (each.get_text() for each in axis.get_ticklabels()), strict=False)
    )
    group = str(container.get_label())
    found = []
    for bar in container.patches:
        middle = bar.get_y() + bar.get_height() / 2 if is_flat else bar.get_x() + bar.get_width() / 2
        near = min(ticks, key=lambda tick: abs(tick - middle), default=None)
        size = bar.get_height() if is_flat else bar.get_width()
        name = ticks[near] if near is not None and abs(near - middle) < size else ""
        found.append(
            {
                "label": name or f"{middle:g}",
                "value": float(bar.get_width() if is_flat else bar.get_height()),
                "group": "" if group.startswith("_") else group,
            }
        )
    return found


def _slice(wedge: Any, axes: Any) -> dict[str, Any]:
    label = str(wedge.get_label())
    angle = float(abs(wedge.theta2 - wedge.theta1))
    return {"label": "" if label.startswith("_") else label, "angle": angle, "radius": float(wedge.r)}


def _boxes(axes: Any) -> list[dict[str, Any]]:
    """The boxes of a box plot, from the lines that `boxplot` draws in order: box, whiskers, caps, median, fliers."""
    lines = [line.get_xydata().tolist() for line in axes.lines]
    names = [each.get_text() for each in axes.get_xticklabels()]
    found: list[dict[str, Any]] = []
    for at, box in enumerate(lines):
        if len(box) != 5 or box[0] != box[4] or at + 5 >= len(lines) or len(lines[at + 5]) != 2:
            continue
        low, high, median = lines[at + 3], lines[at + 4], lines[at + 5]
        fliers = lines[at + 6] if at + 6 < len(lines) and len(lines[at + 6]) != 5 else []
        heights = [point[1] for point in box]
        found.append(
            {
                "label": names[len(found)] if len(found) < len(names) else "",
                "min": low[0][1],
                "first_quartile": min(heights),
                "median": median[0][1],
                "third_quartile": max(heights),
                "max": high[0][1],
                "outliers": [point[1] for point in fliers],
            }
        )
    return found
