"""Names that the imports of a cell will bind, for completion before the cell has run.

IPython completes from live objects and infers much of the cell, but not what imports bind. Jedi would know it, because
it reads sources, but that takes seconds in which no cell runs, and half a minute in an emulated machine. Here a loaded
module is itself, which is so for all that a template warms. Of another module only its own source file is read. Nothing
is imported, because an import runs code that the user has not run yet.
"""

import ast
import importlib.machinery
import re
import sys
from pathlib import Path
from types import ModuleType

LARGEST_SOURCE = 256 * 1024
"""Bytes of a module's source that are read for its names."""
LARGEST_CODE = 64 * 1024
"""Characters of a cell in which imports are looked for."""
IMPORT = re.compile(
    r"(?:^|[;:])[ \t]*((?:from[ \t]+[\w.]+[ \t]+)?import[ \t]+(?:\([^()]*\)|(?:\\\n|[^\n;#()\\])+))", re.MULTILINE
)


def imported(code: str) -> dict[str, object]:
    """What the imports in unfinished code would bind, as far as that is known."""
    found: dict[str, object] = {}
    for text in IMPORT.findall(code[:LARGEST_CODE]):
        try:
            (statement,) = ast.parse(text.strip()).body
        except (SyntaxError, ValueError):
            continue  # it is not finished, or it is text that looks like an import
        if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            for alias in statement.names:
                if alias.name == "*":
                    names = vars(module(statement.module) or ModuleType(""))
                    found |= {name: value for name, value in names.items() if not name.startswith("_")}
                elif (value := member(statement.module, alias.name)) is not None:
                    found[alias.asname or alias.name] = value
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                if (value := module(name)) is not None:
                    found[alias.asname or name] = value
    return found


def member(of: str, name: str) -> object | None:
    """What `from of import name` would bind."""
    value: object | None = vars(module(of) or ModuleType("")).get(name)
    return module(f"{of}.{name}") if value is None else value


def module(name: str) -> ModuleType | None:
    """The module of that name, or one with the names that are in its source, or None."""
    if name in sys.modules:
        return sys.modules[name]
    path: list[str] | None = None
    origin = ""
    for part in name.split("."):
        # This finder looks into folders only. Others may run code, and find_spec of importlib imports packages.
        spec = importlib.machinery.PathFinder.find_spec(part, path)
        if spec is None:
            return None
        path, origin = list(spec.submodule_search_locations or []), spec.origin or ""
    source = Path(origin)
    try:
        if source.suffix != ".py" or source.stat().st_size > LARGEST_SOURCE:
            return None
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # an import would fail, too; the parser says MemoryError where nesting is too deep
    outline = ModuleType(name)
    vars(outline).clear()
    vars(outline).update(dict.fromkeys(names_in(tree), ...))
    return outline


def names_in(tree: ast.Module) -> list[str]:
    """The names that a module's own statements bind."""
    found = []
    for each in tree.body:
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append(each.name)
        elif isinstance(each, ast.Import | ast.ImportFrom):
            found += [alias.asname or alias.name.partition(".")[0] for alias in each.names if alias.name != "*"]
        elif isinstance(each, ast.Assign | ast.AnnAssign):
            targets = each.targets if isinstance(each, ast.Assign) else [each.target]
            found += [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return found
