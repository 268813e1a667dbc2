"""Shortest ways in a net of roads, and the order of tasks that depend on each other."""

# %%
import heapq
import math
from graphlib import CycleError, TopologicalSorter

ROADS = {
    ("A", "B"): 7,
    ("A", "C"): 9,
    ("A", "F"): 14,
    ("B", "C"): 10,
    ("B", "D"): 15,
    ("C", "D"): 11,
    ("C", "F"): 2,
    ("D", "E"): 6,
    ("E", "F"): 9,
}
near = {}
for (one, other), length in ROADS.items():
    near.setdefault(one, {})[other] = length
    near.setdefault(other, {})[one] = length


def distances(start):
    far = dict.fromkeys(near, math.inf) | {start: 0}
    queue = [(0, start)]
    while queue:
        length, at = heapq.heappop(queue)
        if length > far[at]:
            continue
        for other, more in near[at].items():
            if length + more < far[other]:
                far[other] = length + more
                heapq.heappush(queue, (far[other], other))
    return far


print(distances("A"))

# %%
tasks = {"deploy": {"test", "package"}, "test": {"build"}, "package": {"build"}, "build": {"fetch"}, "fetch": set()}
order = list(TopologicalSorter(tasks).static_order())
print(order[:2], order[-1])

# %%
try:
    list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
except CycleError as error:
    print("a cycle:", sorted(set(error.args[1])))
distances("E")["A"]
