"""Figures of matplotlib as charts, read by the SDK's own classes."""

import datetime

import matplotlib.pyplot as plt
from e2b_code_interpreter.charts import ChartType
from e2b_code_interpreter.charts import _deserialize_chart as read

from guest_agent.charts import chart


def drawn(draw) -> object:
    figure, axes = plt.subplots()
    draw(axes)
    axes.set(title="Heat", xlabel="Time (s)", ylabel="Heat [J]")
    found = chart(figure)
    assert found is not None
    plt.close(figure)
    return read(found)


line = drawn(lambda axes: axes.plot([1, 2, 3], [4, 5, 6], label="first"))
assert line.type == ChartType.LINE
assert (line.title, line.x_label, line.x_unit, line.y_unit) == ("Heat", "Time (s)", "s", "J")
assert line.x_scale.value == "linear"
assert [(each.label, each.points) for each in line.elements] == [("first", [(1, 4), (2, 5), (3, 6)])] or [
    list(map(list, line.elements[0].points))
] == [[[1, 4], [2, 5], [3, 6]]]
scatter = drawn(lambda axes: axes.scatter([1, 2], [3, 4]))
assert scatter.type == ChartType.SCATTER
days = drawn(lambda axes: axes.plot([datetime.date(2026, 1, day) for day in (1, 2)], [1, 2]))
assert days.x_scale.value == "datetime"
bars = drawn(lambda axes: axes.bar(["a", "b"], [1, 2], label="group"))
assert bars.type == ChartType.BAR
assert [(each.label, each.value, each.group) for each in bars.elements] == [("a", 1, "group"), ("b", 2, "group")]
pie = drawn(lambda axes: axes.pie([1, 3], labels=["a", "b"]))
assert pie.type == ChartType.PIE
assert [(each.label, round(each.angle)) for each in pie.elements] == [("a", 90), ("b", 270)]
boxes = drawn(lambda axes: axes.boxplot([[1, 2, 3, 4, 20], [1, 2, 3]]))
assert boxes.type == ChartType.BOX_AND_WHISKER
assert [(each.median, each.min) for each in boxes.elements] == [(3, 1), (2, 1)]
assert boxes.elements[0].outliers == [20]
figure, both = plt.subplots(1, 2)
both[0].plot([1], [1])
both[1].bar(["a"], [1])
several = read(chart(figure))
assert several.type == ChartType.SUPERCHART
assert [each.type for each in several.elements] == [ChartType.LINE, ChartType.BAR]
