"""What is in a namespace, and what a cell changed there, without running anybody's code.

A report is made after every cell, so it must be cheap, and must not do what a user's class would do if it were asked.
Only the exact types of Python and of known libraries are asked for their size. They are found by identity, because
hashing or comparing a type may run the code of its metaclass. Libraries are found where the user has imported them.
"""

import sys
from collections.abc import Callable
from itertools import islice
from types import ModuleType
from typing import Any
from weakref import ref

MAX_NAMES = 5000
"""Names of a namespace beyond which it is not looked at."""
MAX_TOLD = 50
"""Names that a report tells. It counts the others."""
MAX_NAME, MAX_DIMENSIONS = 100, 8
"""Characters of a name or a type, and numbers of a shape, that a report has."""
MAX_LISTED, MAX_SHOWN, MAX_ITEMS, MAX_BITS = 500, 300, 10, 1000
"""Variables of a list, characters of a value in it, members of a collection that are shown, and bits of a number."""
MAX_KEPT = 1000
"""Characters or bytes of a text that is kept alive while a cell runs, so that another one can't take its place."""

Sized = dict[int, tuple[type, Callable[[Any], Any]]]
Mark = tuple[int, int, Any, Any]
"""What tells later whether a name still has the same value: its address, its type's, its size, and what holds it.

A small value is kept alive, and the end of a large one is noticed, because it may leave its address to another. Large
values are not kept alive, because a cell that deletes them wants their memory.
"""

ATOMS = frozenset(id(kind) for kind in (type(None), bool, int, float, complex))
TEXTS = frozenset(id(kind) for kind in (str, bytes))
BRACKETS = {id(list): "[]", id(tuple): "()", id(dict): "{}", id(set): "{}", id(frozenset): "{}"}
LENGTHS: Sized = {id(kind): (kind, len) for kind in (str, bytes, bytearray, list, tuple, dict, set, frozenset, range)}
SHAPES = {
    "numpy": ("ndarray",),
    "pandas": ("DataFrame", "Series", "Index"),
    "polars": ("DataFrame", "Series"),
    "pyarrow": ("Table",),
    "torch": ("Tensor",),
}
"""Types that have a shape, by their libraries."""
NUMBERS = {"numpy": ("bool_", "int32", "int64", "float32", "float64")}
name_of, module_of = type.__dict__["__name__"].__get__, type.__dict__["__module__"].__get__
"""A type's own words for itself, past its metaclass. A type that was made without a module has none of that."""


def shape(value: Any) -> list[int]:
    return [int(each) for each in value.shape[:MAX_DIMENSIONS]]


def kept(value: Any) -> tuple[Any]:
    """A number in place of its size, which keeps it alive. Tuples compare what they hold by identity first."""
    return (value,)


def sized() -> Sized:
    """Types that may be asked for their size, by their identity, with what asks."""
    found = dict(LENGTHS)
    for ask, libraries in ((shape, SHAPES), (kept, NUMBERS)):
        for library, names in libraries.items():
            module = sys.modules.get(library)
            if type(module) is ModuleType:
                kinds = [vars(module).get(name) for name in names]
                found.update({id(kind): (kind, ask) for kind in kinds if kind is not None})
    return found


def made(shell: Any) -> dict[str, Any]:
    """The variables that the user has made."""
    # A copy, because other threads may change the namespace meanwhile.
    variables, hidden = shell.user_ns.copy(), shell.user_ns_hidden
    return {
        name: value
        for name, value in variables.items()
        if type(name) is str and not name.startswith("_") and (name not in hidden or hidden[name] is not value)
    }


def marks(shell: Any) -> dict[str, Mark] | None:
    """The marks of all variables that the user has made; None if there are too many."""
    if len(shell.user_ns) > MAX_NAMES:
        return None
    kinds = sized()
    return {name: mark(value, kinds) for name, value in made(shell).items()}


def mark(value: Any, kinds: Sized) -> Mark:
    kind = id(type(value))
    if kind in ATOMS:
        return id(value), kind, None, value
    size = size_of(value, kinds)
    if kind in LENGTHS:
        return id(value), kind, size, value if kind in TEXTS and size <= MAX_KEPT else None
    try:
        return id(value), kind, size, ref(value)
    except TypeError:  # it takes no references that are weak
        return id(value), kind, size, None


def size_of(value: Any, kinds: Sized) -> Any:
    """The length of a value, or its shape as a list; None if it can't be told, or must not be asked."""
    kind = id(type(value))
    try:
        return kinds[kind][1](value) if kind in kinds else None
    except Exception:  # noqa: BLE001  a library of another version, or a table that is broken
        return None


def is_same(before: Mark, after: Mark) -> bool:
    held = before[3]
    return before[:3] == after[:3] and (type(held) is not ref or held() is not None)


def changes(shell: Any, before: dict[str, Mark]) -> dict[str, Any] | None:
    """What has become of variables since their marks were made; None if there are too many by now.

    A variable is changed if it is another object, or if its length or shape is another one.
    """
    after = marks(shell)
    if after is None:
        return None
    names = {
        "added": [name for name in after if name not in before],
        "changed": [name for name in after if name in before and not is_same(before[name], after[name])],
        "removed": [name for name in before if name not in after],
    }
    told: dict[str, Any] = {}
    room, kinds = MAX_TOLD, sized()
    for what, found in names.items():
        told[what] = [name for name in found if len(name) <= MAX_NAME][:room]
        room -= len(told[what])
    omitted = sum(map(len, names.values())) - sum(map(len, told.values()))
    variables = shell.user_ns.copy()
    for what in ("added", "changed"):
        told[what] = [described(name, variables[name], kinds) for name in told[what] if name in variables]
    return {**told, "omitted": omitted}


def described(name: str, value: Any, kinds: Sized) -> dict[str, Any]:
    kind = type(value)
    size = size_of(value, kinds)
    told = {"name": name, "type": word(name_of, kind), "module": word(module_of, kind)}
    if type(size) in (int, list):
        told["shape" if type(size) is list else "length"] = size
    return told


def word(ask: Callable[[type], Any], kind: type) -> str:
    """What a type says of itself, if that is plain text."""
    try:
        told = ask(kind)
    except AttributeError:
        return ""
    return told[:MAX_NAME] if type(told) is str else ""


def listed(shell: Any) -> list[dict[str, str]]:
    """The user's variables with their types and values as text. `…` is one that only its own code could tell."""
    kinds = sized()
    return [
        {"name": name, "type": word(name_of, type(value)), "value": shown(value, kinds)[:MAX_SHOWN]}
        for name, value in islice(made(shell).items(), MAX_LISTED)
    ]


def shown(value: Any, kinds: Sized, depth: int = 2) -> str:
    """A value as text: numbers and texts themselves, the first members of collections, the size of other data."""
    kind = type(value)
    if id(kind) in TEXTS:
        return repr(value[:MAX_SHOWN])
    if kind is int and value.bit_length() > MAX_BITS:
        return f"{value.bit_length()} bits"
    if id(kind) in ATOMS:
        return repr(value)
    brackets = BRACKETS.get(id(kind))
    if brackets and depth:
        try:
            members = list(islice(value.items() if kind is dict else value, MAX_ITEMS))
        except RuntimeError:  # a cell changes it meanwhile
            members = []
        parts = [
            ": ".join(shown(each, kinds, depth - 1) for each in (member if kind is dict else (member,)))
            for member in members
        ]
        return f"{brackets[0]}{', '.join(parts)}{', …' if len(value) > len(members) else ''}{brackets[1]}"
    size = size_of(value, kinds)
    if type(size) is list:
        return " × ".join(map(str, size))
    if type(size) is tuple:
        return repr(size[0])
    return "…" if size is None else f"{size} item{'s' * (size != 1)}"
