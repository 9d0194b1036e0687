"""The parts of matplotlib that this package uses, without pyplot: no window, no global state, drawn by Agg.

Import them from here. matplotlib is imported without MPLBACKEND: Jupyter sets it, also for child processes, to a module
that their environment may lack, and matplotlib then fails at import.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path

_imported_before = "matplotlib" in sys.modules
_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib import colormaps as colormaps
    from matplotlib.axes import Axes as Axes
    from matplotlib.collections import LineCollection as LineCollection
    from matplotlib.figure import Figure as _Figure
    from matplotlib.figure import SubFigure as SubFigure
    from matplotlib.lines import Line2D as Line2D
    from matplotlib.patches import FancyArrowPatch as FancyArrowPatch
    from matplotlib.patches import FancyBboxPatch as FancyBboxPatch
    from matplotlib.patches import Patch as Patch
    from matplotlib.patches import Rectangle as Rectangle
    from matplotlib.ticker import MaxNLocator as MaxNLocator
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
if _backend is not None and not _imported_before:
    with suppress(ValueError):  # the backend for the user's own figures
        matplotlib.rcParams["backend"] = _backend


class Figure(_Figure):
    """matplotlib's figure, which notebooks also show if pyplot is not imported."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", facecolor="white")
        return out.getvalue()


def save_figure(figure: Figure, path: str | Path, *, dpi: int, format: str = "png") -> Path:
    """Write a figure on a white background and return the path; a missing folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"savefig.facecolor": "white"}):
        figure.savefig(path, dpi=dpi, format=format)
    return path
