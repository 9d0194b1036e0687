"""Lay out a page of sections, each a heading, a text and rows of panels, and draw maps and outlines in the panels.

h, w  sides in pixels    H, W  rows, columns of patches    p  patch size
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.evaluation.pictures.panels import DPI, PALE, draw_outline, luminance, pixel_mask
from jepa_kit.plotting import Axes, Figure, SubFigure, colormaps, save_figure
from jepa_kit.structures import Grid

COLUMNS = 8
PANEL = 1.5
"""Width of a panel in inches."""
LEFT = 1.15
"""Width of the names of rows in inches."""
WIDTH = LEFT + COLUMNS * PANEL + 0.2
"""Width of a page in inches."""
RED = "#e6194b"
MAP = "magma"


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a text on how to read it, and rows of panels.

    Args:
        name: the stem of its own picture's file.
        title, text: above the panels.
        rows: number of rows of panels.
        draw: fills the panels, given as rows of ``COLUMNS``.
        titles: of the columns, above the first row.
        captions: whether panels have a line of text below.
    """

    name: str
    title: str
    text: str
    rows: int
    draw: Callable[[list[list[Axes]]], None]
    titles: Sequence[str] = ()
    captions: bool = False

    @property
    def above(self) -> float:
        """Return the height of heading, text and column titles in inches."""
        return 0.55 + 0.19 * len(textwrap.wrap(self.text, 190)) + (0.38 if self.titles else 0.08)

    def height(self, aspect: float) -> float:
        """Return the height in inches, for images whose height divided by their width is ``aspect``."""
        return self.rows * (PANEL * aspect + (0.24 if self.captions else 0.06)) + self.above


def page(sections: Sequence[Section], path: Path, *, heading: str, lines: Sequence[str], aspect: float = 1.0) -> Path:
    """Draw all sections, one below the other, under a heading and lines of text, and return the path.

    Args:
        sections: from top to bottom.
        path: of the PNG.
        heading: of the page.
        lines: below the heading; long ones are wrapped.
        aspect: height of an image divided by its width.
    """
    heights = [section.height(aspect) for section in sections]
    wrapped = [piece for line in lines for piece in textwrap.wrap(line, 150)]
    top = 0.6 + 0.22 * len(wrapped)
    figure = Figure(figsize=(WIDTH, sum(heights) + top))
    parts = figure.subfigures(len(sections) + 1, 1, height_ratios=[top, *heights], squeeze=False)[:, 0]
    parts[0].text(0.5, 1 - 0.32 / top, heading, ha="center", va="center", fontsize=16, weight="bold")
    parts[0].text(0.5, 1 - 0.5 / top, "\n".join(wrapped), ha="center", va="top", fontsize=10, linespacing=1.4)
    for part, section, height in zip(parts[1:], sections, heights, strict=True):
        _draw(part, section, height)
    return save_figure(figure, path, dpi=DPI)


def single(section: Section, path: Path, *, aspect: float = 1.0) -> Path:
    """Draw a section alone and return the path; see ``page``."""
    figure = Figure(figsize=(WIDTH, section.height(aspect)))
    _draw(figure, section, section.height(aspect))
    return save_figure(figure, path, dpi=DPI)


def _draw(figure: Figure | SubFigure, section: Section, height: float) -> None:
    figure.text(0.02, 1 - 0.28 / height, section.title, ha="left", va="center", fontsize=13, weight="bold")
    text = "\n".join(textwrap.wrap(section.text, 190))
    figure.text(0.02, 1 - 0.45 / height, text, ha="left", va="top", fontsize=9, color="#333333", linespacing=1.35)
    grid = figure.add_gridspec(
        section.rows,
        COLUMNS,
        left=LEFT / WIDTH,
        right=1 - 0.1 / WIDTH,
        top=1 - section.above / height,
        bottom=(0.24 if section.captions else 0.06) / height,
        wspace=0.05,
        hspace=0.2 if section.captions else 0.05,
    )
    axes = grid.subplots(squeeze=False)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    for panel, title in zip(axes[0], section.titles, strict=False):
        panel.set_title(title, fontsize=8.5, pad=4)
    section.draw([list(row) for row in axes])


def show_map(panel: Axes, image: Tensor, values: NDArray[np.floating], low: float, high: float) -> None:
    """Draw a map [H, W] in colours over the image in grey: bright is high, dark hides the image, NaN shows it."""
    grey = luminance(image)[0].numpy() / 255
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    large = F.interpolate(torch.from_numpy(scaled)[None, None].float(), grey.shape, mode="nearest")[0, 0].numpy()
    colours = colormaps[MAP](large)[..., :3]
    mixed = np.where(np.isnan(large)[..., None], grey[..., None], 0.68 * colours + 0.32 * grey[..., None])
    panel.imshow(mixed, interpolation="nearest")


def frame(panel: Axes, patches: Sequence[int], grid: Grid, patch_size: int, colour: str, width: float = 1.8) -> None:
    """Outline a set of patches, and limit the panel to the image."""
    draw_outline(panel, patches, grid, (patch_size, patch_size), colour, linewidths=width, capstyle="round")
    panel.set(xlim=(-0.5, grid[1] * patch_size - 0.5), ylim=(grid[0] * patch_size - 0.5, -0.5))


def dimmed(image: Tensor, seen: Tensor, grid: Grid) -> Tensor:
    """Return an image or images [..., 3, h, w] uint8 with all patches except ``seen`` [L] in one grey."""
    cells = torch.zeros(1, grid[0] * grid[1], dtype=torch.bool)
    cells[0, seen] = True
    return torch.where(pixel_mask(cells, grid, image.shape[-2:])[0], image, torch.full_like(image, PALE))


def name_row(panel: Axes, text: str) -> None:
    """Write the name of a row to the left of its first panel."""
    panel.set_ylabel(text, fontsize=8.5, rotation=0, ha="right", va="center", labelpad=8)
