"""Recursion: a limit that is hit and survived, memoised functions, a trampoline."""

# %%
import sys
from functools import lru_cache


def depth(n):
    return depth(n + 1)


try:
    depth(0)
except RecursionError as error:
    print(error)


@lru_cache(maxsize=None)
def ways(left, coins=(50, 20, 10, 5, 2, 1)):
    if left == 0:
        return 1
    if left < 0 or not coins:
        return 0
    return ways(left - coins[0], coins) + ways(left, coins[1:])


print(ways(100), ways.cache_info().hits > 100)


# %%
def bounce(step):
    while callable(step):
        step = step()
    return step


def even(n):
    return True if n == 0 else lambda: odd(n - 1)


def odd(n):
    return False if n == 0 else lambda: even(n - 1)


bounce(even(20_001))

# %%
sys.setrecursionlimit(5000)
try:
    (lambda f: f(f, 4000))(lambda f, n: n and f(f, n - 1))
    print("4000 deep")
finally:
    sys.setrecursionlimit(1000)


def hanoi(n, a="A", b="B", c="C"):
    if n:
        yield from hanoi(n - 1, a, c, b)
        yield a + c
        yield from hanoi(n - 1, b, a, c)


" ".join(hanoi(3))
