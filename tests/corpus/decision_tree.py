"""A decision tree by entropy over the weather data that textbooks use, tested with doctest and unittest."""

# %%
import doctest
import unittest
from collections import Counter
from math import log2

ROWS = [
    row.split()
    for row in """sunny hot high no|sunny hot high no|overcast hot high yes|rain mild high yes|rain cool normal yes
sunny mild high no|sunny cool normal yes|rain mild normal yes|overcast mild high yes|overcast hot normal yes""".replace(
        "\n", "|"
    ).split("|")
]


def entropy(labels):
    """How mixed labels are, in bits.

    >>> entropy("aabb")
    1.0
    >>> entropy("aaaa") == 0
    True
    """
    counts = Counter(labels).values()
    total = sum(counts)
    return -sum(count / total * log2(count / total) for count in counts)


def tree(rows, columns):
    labels = [row[-1] for row in rows]
    if len(set(labels)) == 1 or not columns:
        return Counter(labels).most_common(1)[0][0]

    def rest(column):
        kinds = {row[column] for row in rows}
        parts = [[row[-1] for row in rows if row[column] == kind] for kind in kinds]
        return sum(len(part) / len(rows) * entropy(part) for part in parts)

    best = min(columns, key=rest)
    return {
        (best, kind): tree([row for row in rows if row[best] == kind], [each for each in columns if each != best])
        for kind in sorted({row[best] for row in rows})
    }


# %%
print(tree(ROWS, [0, 1, 2]))
doctest.testmod().failed


# %%
class TreeTest(unittest.TestCase):
    def test_pure(self):
        self.assertEqual(tree([["a", "x"]], [0]), "x")

    def test_majority(self):
        self.assertEqual(tree([["a", "x"], ["a", "x"], ["a", "y"]], []), "x")

    @unittest.expectedFailure
    def test_empty(self):
        tree([], [0])


result = unittest.main(argv=["tests"], exit=False, verbosity=1).result
result.testsRun
