"""Solve linear equations by LU with pivots, over floats and exactly over fractions."""

# %%
from fractions import Fraction


def lu(matrix):
    rows = [list(row) for row in matrix]
    order, size = list(range(len(rows))), len(rows)
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(rows[row][column]))
        if not rows[pivot][column]:
            raise ZeroDivisionError("the matrix is singular")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        order[column], order[pivot] = order[pivot], order[column]
        for row in range(column + 1, size):
            rows[row][column] /= rows[column][column]
            for other in range(column + 1, size):
                rows[row][other] -= rows[row][column] * rows[column][other]
    return rows, order


def solve(matrix, right):
    rows, order = lu(matrix)
    found = [right[each] for each in order]
    for row in range(len(rows)):
        found[row] -= sum(rows[row][column] * found[column] for column in range(row))
    for row in reversed(range(len(rows))):
        found[row] = (
            found[row] - sum(rows[row][column] * found[column] for column in range(row + 1, len(rows)))
        ) / rows[row][row]
    return found


# %%
hilbert = [[Fraction(1, row + column + 1) for column in range(6)] for row in range(6)]
exact = solve(hilbert, [Fraction(1)] * 6)
rough = solve([[float(each) for each in row] for row in hilbert], [1.0] * 6)
for one, other in zip(exact, rough):
    print(f"{str(one):>8} {other:>16.6f}")
exact[-1]

# %%
solve([[1, 2], [2, 4]], [1, 2])
