"""A backend of matplotlib that saves figures. `cellvm run` puts it into the sandbox, where scripts use it.

Whatever shows figures saves them, as `1.png`, `2.png` and so on in the directory CELLVM_FIGURES, and closes them. What
a script leaves open is saved when it ends.
"""

import atexit
import os
from pathlib import Path
from typing import Any

from matplotlib._pylab_helpers import Gcf  # type: ignore[import-not-found]  # it is in the sandbox
from matplotlib.backend_bases import FigureManagerBase  # type: ignore[import-not-found]
from matplotlib.backends.backend_agg import FigureCanvasAgg  # type: ignore[import-not-found]

DIRECTORY = Path(os.environ["CELLVM_FIGURES"])


def save() -> None:
    """Save and close the figures that are open."""
    for manager in Gcf.get_all_fig_managers():
        number = len(list(DIRECTORY.glob("*.png"))) + 1
        manager.canvas.figure.savefig(DIRECTORY / f"{number}.png", bbox_inches="tight")
    Gcf.destroy_all()


class FigureManager(FigureManagerBase):  # type: ignore[misc]
    """What `plt.show()` and `figure.show()` call."""

    @classmethod
    def pyplot_show(cls, *, block: bool | None = None) -> None:
        save()

    def show(self) -> None:
        save()


class FigureCanvas(FigureCanvasAgg):  # type: ignore[misc]
    """A canvas in memory."""

    manager_class: Any = FigureManager


atexit.register(save)
