"""Eight queens by backtracking with bit masks, and the shortest way of a knight by A*."""

# %%
import heapq


def queens(size, row=0, columns=0, down=0, up=0, placed=()):
    if row == size:
        yield placed
        return
    free = ~(columns | down | up) & ((1 << size) - 1)
    while free:
        bit = free & -free
        free ^= bit
        yield from queens(
            size, row + 1, columns | bit, (down | bit) << 1, (up | bit) >> 1, (*placed, bit.bit_length() - 1)
        )


first = next(queens(8))
print("\n".join("." * at + "♛" + "." * (7 - at) for at in first))
sum(1 for _ in queens(8))


# %%
def knight(start, goal):
    moves = [(a * s, b * t) for a, b in ((1, 2), (2, 1)) for s in (1, -1) for t in (1, -1)]
    queue, seen = [(0, 0, start, ())], set()
    while queue:
        _, steps, at, path = heapq.heappop(queue)
        if at == goal:
            return [*path, at]
        if at in seen:
            continue
        seen.add(at)
        for dx, dy in moves:
            x, y = at[0] + dx, at[1] + dy
            if 0 <= x < 8 and 0 <= y < 8:
                far = (abs(goal[0] - x) + abs(goal[1] - y)) / 3
                heapq.heappush(queue, (steps + 1 + far, steps + 1, (x, y), (*path, at)))


knight((0, 0), (7, 7))
