"""Pipelines with itertools and functools, structural matching, context variables, weak references."""

# %%
import contextvars
import gc
import weakref
from functools import reduce, singledispatch
from itertools import accumulate, count, groupby, islice, pairwise, takewhile


def primes():
    found = []
    for number in count(2):
        if all(number % prime for prime in takewhile(lambda prime: prime * prime <= number, found)):
            found.append(number)
            yield number


print(list(islice(primes(), 10)))
print([b - a for a, b in pairwise(islice(primes(), 10))])
print({key: len(list(group)) for key, group in groupby(sorted("mississippi"))})
list(accumulate(range(1, 7), max)), reduce(int.__mul__, range(1, 6))


# %%
@singledispatch
def describe(value):
    return type(value).__name__


@describe.register
def _(value: list):
    match value:
        case []:
            return "empty"
        case [only]:
            return f"one: {describe(only)}"
        case [first, *rest]:
            return f"{describe(first)} and {len(rest)} more"


for value in ([], [1], ["a", 2, 3], {"x": 1}, [[2]]):
    print(describe(value))

# %%
user = contextvars.ContextVar("user", default="nobody")


def greet():
    return f"hello {user.get()}"


context = contextvars.copy_context()
context.run(user.set, "ann")
print(context.run(greet), greet())


class Node:
    pass


node = Node()
gone = weakref.ref(node)
print(gone() is node)
del node
gc.collect()
gone() is None
