"""A package that is written, imported, changed and imported again; type hints and help of what is in it."""

# %%
import importlib
import inspect
import sys
import typing
from pathlib import Path

sys.dont_write_bytecode = True
Path("shapes").mkdir()
Path("shapes/__init__.py").write_text('"""Shapes."""\nfrom shapes.square import area\n__version__ = "1"\n')
Path("shapes/square.py").write_text(
    "def area(side: float, *, scale: int = 1) -> float:\n"
    '    """The area of a square."""\n    return side * side * scale\n'
)
Path("shapes/__main__.py").write_text('import shapes, sys\nprint("as a program:", shapes.area(3), sys.argv[1:])\n')
importlib.invalidate_caches()
import shapes

print(shapes.area(2), shapes.__name__, Path(shapes.__file__).name)

# %%
print(inspect.signature(shapes.area), typing.get_type_hints(shapes.area))
print(inspect.getsource(shapes.area).splitlines()[1].strip())
help(shapes.area)

# %%
Path("shapes/square.py").write_text(
    "def area(side: float, *, scale: int = 2) -> float:\n    return side * side * scale  # longer than before\n"
)
importlib.reload(shapes.square)
importlib.reload(shapes)
shapes.area(2)

# %%
import subprocess

print(subprocess.run([sys.executable, "-B", "-m", "shapes", "x"], capture_output=True, text=True).stdout.strip())
[name for name in sys.modules if name.startswith("shapes")]
