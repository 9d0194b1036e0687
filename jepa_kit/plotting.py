"""matplotlib as this package uses it: figures without pyplot (no window, no global state), which Agg draws.

MPLBACKEND moves none of that. Jupyter sets it, for its child processes too, to a module that their environment may
lack, with which matplotlib cannot even be imported; so it is imported without it. Import from here.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

_there_already = "matplotlib" in sys.modules
_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib import colormaps as colormaps
    from matplotlib.axes import Axes as Axes
    from matplotlib.collections import LineCollection as LineCollection
    from matplotlib.figure import Figure as Figure
    from matplotlib.figure import SubFigure as SubFigure
    from matplotlib.lines import Line2D as Line2D
    from matplotlib.patches import Patch as Patch
    from matplotlib.ticker import MaxNLocator as MaxNLocator
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
if _backend is not None and not _there_already:
    with suppress(ValueError):  # the user's own figures are drawn as they asked for
        matplotlib.rcParams["backend"] = _backend


def save_figure(figure: Figure, path: str | Path, *, dpi: int, format: str = "png") -> Path:
    """Write a figure on white and return the path; its folder is made if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"savefig.facecolor": "white"}):
        figure.savefig(path, dpi=dpi, format=format)
    return path
