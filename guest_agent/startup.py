"""What a process reads when it starts, and keeps. A kernel is forked from one that started earlier, so we look again.

A kernel is what a freshly started interpreter would be, only sooner. Three things decide whether a fork can be that:

- the environment. Some variables are read again after a fork (`kernel_main.adopt`). Others can't be, and `read_once`
  tells them. Where they differ, the kernel comes from a nursery that was started with them.
- the files of what the nursery has imported. Where one has changed since, as after `pip install -U`, or where a fresh
  interpreter would find another one first, the kernel comes from a nursery that has imported nothing.
- `sys.path`, open files and the like, which `kernel_main` sets.
"""

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import invalidate_caches
from importlib.machinery import PathFinder

from guest_agent.imports import file_of, stamp

INLINE = "module://matplotlib_inline.backend_inline"
READ_ONCE = re.compile(
    # Python. PYTHONPATH and PYTHONDONTWRITEBYTECODE are read again. Four change nothing in a kernel: its output goes
    # through no file, and the others are read when they are used.
    r"PYTHON(?!(PATH|DONTWRITEBYTECODE|UNBUFFERED|IOENCODING|BREAKPOINT|NODEBUGRANGES)$)\w+"
    # the loader and the C library
    r"|LD_\w+|MALLOC_\w+|GLIBC_TUNABLES"
    # threads of numerical libraries, and other settings that libraries read when they are imported
    r"|(OMP|KMP|GOMP|OPENBLAS|GOTO|MKL|BLIS|NUMEXPR|RAYON|POLARS|ARROW|NPY|NUMPY|PANDAS|SCIPY|SKLEARN|PLOTLY|XGBOOST)_\w+"
    r"|MPLBACKEND|MPLCONFIGDIR|MATPLOTLIBRC|OPENSSL_CONF|IPYTHONDIR|JUPYTER_\w+"
    # the encoding of everything
    r"|LANG|LC_ALL|LC_CTYPE"
)
LOCALES = ("C.UTF-8", "en_US.UTF-8")
TAKEN_ON = {"MPLBACKEND": ("agg", "Agg", INLINE), "LANG": LOCALES, "LC_ALL": LOCALES, "LC_CTYPE": LOCALES}
"""Values that a fork can take on, though it can't take on every value."""


def read_once(env: dict[str, str]) -> dict[str, str]:
    """The variables that a process must be started with, because nothing reads them again."""
    return {
        name: value for name, value in env.items() if READ_ONCE.fullmatch(name) and value not in TAKEN_ON.get(name, ())
    }


def python_path(env: dict[str, str]) -> list[str]:
    """The directories of PYTHONPATH, as the interpreter puts them into `sys.path`."""
    value = env.get("PYTHONPATH", "")
    return list(dict.fromkeys(os.path.abspath(part) for part in value.split(os.pathsep))) if value else []


INTERPRETERS = ("python", "python3", "python3.11")
SWITCH = "CELLVM_INSTANT_PYTHON"
"""A variable of the sandbox or of the command. `0` starts programs as any others."""
ALSO_READ = re.compile(r"PYTHON(?!(PATH|DONTWRITEBYTECODE|UNBUFFERED|BREAKPOINT)$)\w+")


@dataclass(frozen=True, slots=True)
class Program:
    """What an interpreter's arguments ask it to run.

    `kind` is `command` (its text is `what`), `module` (a name), `script` (a path) or `stdin`. `argv` is `sys.argv`.
    """

    kind: str
    what: str
    argv: list[str]
    unbuffered: bool
    no_bytecode: bool


def program(argv: list[str], env: dict[str, str], *, terminal: bool) -> Program | None:
    """What `argv` runs in the environment `env`, or None if a fork can't be that interpreter.

    Args:
        terminal: whether its standard input is a terminal.
    """
    if argv[0].rpartition("/")[2] not in INTERPRETERS or env.get(SWITCH) == "0":
        return None
    if any("\0" in part for part in (*argv, *env.values())):
        return None
    locales = [env[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if env.get(name)]
    if not locales or locales[0] not in LOCALES or any(ALSO_READ.fullmatch(name) for name in env):
        return None
    found = _what_runs(argv[1:])
    if found is None or (found[0] == "stdin" and terminal):
        return None
    kind, what, arguments, letters = found
    unbuffered = "u" in letters or bool(env.get("PYTHONUNBUFFERED"))
    return Program(kind, what, arguments, unbuffered, "B" in letters or bool(env.get("PYTHONDONTWRITEBYTECODE")))


def _what_runs(arguments: list[str]) -> tuple[str, str, list[str], str] | None:
    letters = ""
    for at, argument in enumerate(arguments):
        rest = arguments[at + 1 :]
        if argument == "-":
            return "stdin", "", ["-", *rest], letters
        if not argument.startswith("-"):
            return "script", argument, [argument, *rest], letters
        before, letter, value = re.fullmatch(r"-([uB]*)([cm]?)(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
        letters += before
        if letter:
            if not value:
                if not rest:
                    return None
                value, *rest = rest
            return ("command" if letter == "c" else "module"), value, [f"-{letter}", *rest], letters
        if value or not before:
            return None
    return "stdin", "", [""], letters


def names_variables(text: str, read: Iterable[str]) -> set[str]:
    """The variables in a program's text that matter to what is imported before it runs.

    Args:
        read: names of variables that imports have read.
    """
    words = set(re.findall(r"[A-Z][A-Z0-9_]+", text))
    return (words & set(read)) | {word for word in words if READ_ONCE.fullmatch(word)}


class Imported:
    """The modules that this process has imported, and how their files were then.

    Args:
        unasked: names of modules that every kernel imports for itself, whatever its user does.
    """

    def __init__(self, unasked: Iterable[str]) -> None:
        files = {name: file for name, module in list(sys.modules.items()) if (file := file_of(module))}
        self._stamps = {file: stamp(file) for file in files.values()}
        self._firsts = {name: files[name] for name in files.keys() - set(unasked) if "." not in name}

    def are_current(self, path: list[str], directory: str) -> bool:
        """Whether a fresh interpreter with this `sys.path` would import the same files with the same content.

        Args:
            directory: the working directory, which the shell puts before the first site-packages.
        """
        at = next((at for at, part in enumerate(path) if part.endswith("-packages")), 0)
        path = [*path[:at], directory, *path[at:]]
        if any(stamp(file) != before for file, before in self._stamps.items()):
            return False
        invalidate_caches()
        for name, file in self._firsts.items():
            spec = PathFinder.find_spec(name, path)
            if spec is not None and spec.origin != file:  # None: it was put into sys.modules by another module
                return False
        return True
