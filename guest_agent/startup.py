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
from importlib import invalidate_caches
from importlib.machinery import PathFinder

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

Stamp = tuple[int, int, int]


def read_once(env: dict[str, str]) -> dict[str, str]:
    """The variables that a process must be started with, because nothing reads them again."""
    return {
        name: value for name, value in env.items() if READ_ONCE.fullmatch(name) and value not in TAKEN_ON.get(name, ())
    }


def python_path(env: dict[str, str]) -> list[str]:
    """The directories of PYTHONPATH, as the interpreter puts them into `sys.path`."""
    value = env.get("PYTHONPATH", "")
    return list(dict.fromkeys(os.path.abspath(part) for part in value.split(os.pathsep))) if value else []


class Imported:
    """The modules that this process has imported, and how their files were then.

    Args:
        unasked: names of modules that every kernel imports for itself, whatever its user does.
    """

    def __init__(self, unasked: Iterable[str]) -> None:
        files = {name: file for name, module in list(sys.modules.items()) if (file := _file(module))}
        self._stamps = {file: _stamp(file) for file in files.values()}
        self._firsts = {name: files[name] for name in files.keys() - set(unasked) if "." not in name}

    def are_current(self, path: list[str], directory: str) -> bool:
        """Whether a fresh interpreter with this `sys.path` would import the same files with the same content.

        Args:
            directory: the working directory, which the shell puts before the first site-packages.
        """
        at = next((at for at, part in enumerate(path) if part.endswith("-packages")), 0)
        path = [*path[:at], directory, *path[at:]]
        if any(_stamp(file) != stamp for file, stamp in self._stamps.items()):
            return False
        invalidate_caches()
        for name, file in self._firsts.items():
            spec = PathFinder.find_spec(name, path)
            if spec is not None and spec.origin != file:  # None: it was put into sys.modules by another module
                return False
        return True


def _file(module: object) -> str:
    file = getattr(module, "__dict__", {}).get("__file__")  # no getattr, because lazy modules would import themselves
    return file if isinstance(file, str) else ""


def _stamp(file: str) -> Stamp | None:
    """None if there is no such file."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size
