"""The sections of the page about a run: patch features, predictions, attention, and predictions of a hidden block.

m   images shown       h, w  sides in pixels     p  patch size
H, W  rows, columns of patches                   n  patches of an image, H * W
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.evaluation.pictures.maps import Guess
from jepa_kit.evaluation.pictures.panels import (
    DPI,
    PALE,
    component_images,
    draw_outline,
    luminance,
    pixel_mask,
    show_image,
    to_uint8,
)
from jepa_kit.plotting import Axes, Figure, SubFigure, colormaps, save_figure
from jepa_kit.structures import Grid

COLUMNS = 8
PANEL = 1.5
"""Width of a panel in inches."""
LEFT = 1.15
"""Width of the names of rows in inches."""
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
    titles: Sequence[str] = field(default=())
    captions: bool = False


def page(sections: Sequence[Section], path: Path, *, heading: str, lines: Sequence[str], aspect: float = 1.0) -> Path:
    """Draw all sections, one below the other, under a heading and lines of text, and return the path.

    Args:
        sections: from top to bottom.
        path: of the picture, with a suffix that matplotlib knows.
        heading: of the page.
        lines: below the heading; long ones are wrapped.
        aspect: height of an image divided by its width.
    """
    heights = [_height(section, aspect) for section in sections]
    wrapped = [piece for line in lines for piece in textwrap.wrap(line, 150)]
    top = 0.6 + 0.22 * len(wrapped)
    figure = Figure(figsize=(LEFT + COLUMNS * PANEL + 0.2, sum(heights) + top))
    parts = figure.subfigures(len(sections) + 1, 1, height_ratios=[top, *heights], squeeze=False)[:, 0]
    parts[0].text(0.5, 1 - 0.32 / top, heading, ha="center", va="center", fontsize=16, weight="bold")
    parts[0].text(0.5, 1 - 0.5 / top, "\n".join(wrapped), ha="center", va="top", fontsize=10, linespacing=1.4)
    for part, section, height in zip(parts[1:], sections, heights, strict=True):
        _draw(part, section, height)
    return save_figure(figure, path, dpi=DPI, format=path.suffix[1:] or "png")


def single(section: Section, path: Path, *, aspect: float = 1.0) -> Path:
    """Draw a section alone and return the path; see ``page``."""
    height = _height(section, aspect)
    figure = Figure(figsize=(LEFT + COLUMNS * PANEL + 0.2, height))
    _draw(figure, section, height)
    return save_figure(figure, path, dpi=DPI, format=path.suffix[1:] or "png")


def _height(section: Section, aspect: float) -> float:
    row = PANEL * aspect + (0.24 if section.captions else 0.06)
    return section.rows * row + _above(section)


def _above(section: Section) -> float:
    """Return the height of heading, text and column titles in inches."""
    lines = len(textwrap.wrap(section.text, 190))
    return 0.55 + 0.19 * lines + (0.38 if section.titles else 0.08)


def _draw(figure: Figure | SubFigure, section: Section, height: float) -> None:
    width = LEFT + COLUMNS * PANEL + 0.2
    figure.text(0.02, 1 - 0.28 / height, section.title, ha="left", va="center", fontsize=13, weight="bold")
    text = "\n".join(textwrap.wrap(section.text, 190))
    figure.text(0.02, 1 - 0.45 / height, text, ha="left", va="top", fontsize=9, color="#333333", linespacing=1.35)
    grid = figure.add_gridspec(
        section.rows,
        COLUMNS,
        left=LEFT / width,
        right=1 - 0.1 / width,
        top=1 - _above(section) / height,
        bottom=(0.24 if section.captions else 0.06) / height,
        wspace=0.05,
        hspace=0.2 if section.captions else 0.05,
    )
    axes = [[figure.add_subplot(grid[row, column]) for column in range(COLUMNS)] for row in range(section.rows)]
    for panel in (panel for row in axes for panel in row):
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    for panel, title in zip(axes[0], section.titles, strict=False):
        panel.set_title(title, fontsize=8.5, pad=4)
    section.draw(axes)


def show_map(panel: Axes, image: Tensor, values: NDArray[np.floating], low: float, high: float) -> None:
    """Draw a map [H, W] in colours over the image in grey: bright is high, dark hides the image."""
    grey = luminance(image)[0].numpy() / 255
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    size = (image.shape[1], image.shape[2])
    large = F.interpolate(torch.from_numpy(scaled)[None, None].float(), size, mode="nearest")[0, 0].numpy()
    colours = colormaps[MAP](large)[..., :3]
    panel.imshow(0.68 * colours + 0.32 * grey[..., None], interpolation="nearest")


def frame(panel: Axes, patches: Sequence[int], grid: Grid, patch_size: int, colour: str, width: float = 1.8) -> None:
    """Outline a set of patches, and limit the panel to the image."""
    draw_outline(panel, patches, grid, (patch_size, patch_size), colour, linewidths=width, capstyle="round")
    panel.set(xlim=(-0.5, grid[1] * patch_size - 0.5), ylim=(grid[0] * patch_size - 0.5, -0.5))


def dimmed(image: Tensor, seen: Tensor, grid: Grid) -> Tensor:
    """Return an image [3, h, w] uint8 with all patches except ``seen`` [L] in one grey."""
    cells = torch.zeros(1, grid[0] * grid[1], dtype=torch.bool)
    cells[0, seen] = True
    return torch.where(pixel_mask(cells, grid, image.shape[1:])[0], image, torch.full_like(image, PALE))


def name_row(panel: Axes, text: str) -> None:
    """Write the name of a row to the left of its first panel."""
    panel.set_ylabel(text, fontsize=8.5, rotation=0, ha="right", va="center", labelpad=8)


def components_section(images: Tensor, tokens: dict[str, NDArray[np.floating]], grid: Grid) -> Section:
    """Return the section of principal components of patch features as colours.

    Args:
        images: [m, 3, h, w] uint8, of which the first eight are shown.
        tokens: name of an encoder -> [B, n, D] of all images for the components; the first m are ``images``.
    """

    def draw(axes: list[list[Axes]]) -> None:
        for column, image in enumerate(images[:COLUMNS]):
            show_image(axes[0][column], image)
        name_row(axes[0][0], "image")
        for row, (name, features) in zip(axes[1:], tokens.items(), strict=True):
            colours, explained = component_images(features, grid)
            for panel, picture in zip(row, to_uint8(colours[: len(images)]), strict=False):
                show_image(panel, picture)
                panel.set(xlim=(-0.5, grid[1] - 0.5), ylim=(grid[0] - 0.5, -0.5))
            name_row(row[0], f"{name}\n({100 * explained:.0f} % of\nvariance)")

    return Section(
        name="patch_pca",
        title="1  Patch features",
        text="The first three principal components of the features of all patches and images, as red, green and blue. "
        "Patches of one colour have similar features. If the network knows objects, colours follow them across images; "
        "if it knows positions, all images look the same.",
        rows=1 + len(tokens),
        draw=draw,
    )


def guess_section(
    images: Tensor, found: Sequence[Guess], grid: Grid, patch_size: int, *, ranks: Sequence[int]
) -> Section:
    """Return the section of cosine maps of predictions over their own image and those with the nearest patches.

    Args:
        images: [B, 3, h, w] uint8 that were searched.
        found: the guesses to draw.
        grid, patch_size: of the images.
        ranks: ranks of all guesses, also of those not drawn; the text has their median.
    """

    def draw(axes: list[list[Axes]]) -> None:
        for row, guess in zip(axes, found, strict=True):
            low = float(np.percentile(guess.cosine.numpy(), 50))
            high = float(guess.cosine.max())
            show_image(row[0], dimmed(images[guess.image], guess.context, grid))
            frame(row[0], [guess.patch], grid, patch_size, RED)
            own = guess.cosine[guess.image]
            show_map(row[1], images[guess.image], own.view(grid).numpy(), low, high)
            frame(row[1], [guess.patch], grid, patch_size, RED)
            row[1].set_xlabel(f"{own[guess.patch]:.2f}; rank {guess.rank:,} of {guess.total:,}", fontsize=7)
            for panel, (image, patch) in zip(row[2:], guess.nearest, strict=False):
                show_map(panel, images[image], guess.cosine[image].view(grid).numpy(), low, high)
                frame(panel, [patch], grid, patch_size, "white")
                panel.set_xlabel(f"cosine {guess.cosine[image, patch]:.2f}", fontsize=7)

    others = ["nearest patch\nof other images", "second", "third", "fourth", "fifth", "sixth"]
    return Section(
        name="predictor_guess",
        title="2  The predictor's guess",
        text="For one hidden patch (red), the cosine between its prediction and the target of every patch of "
        f"{found[0].cosine.shape[0]} images, after subtraction of the mean target; black is below the median. "
        "Rank 1: no other patch of all images fits the prediction better than the true one; the median over "
        f"{len(ranks)} images is {float(np.median(ranks)):,.0f} (by chance: {found[0].total // 2:,}). White frames: "
        "the best patch of the six other images that fit best. If nearest patches have the same position but other "
        "content, the predictor knows only positions.",
        rows=len(found),
        draw=draw,
        titles=["context; hidden patch", "own image", *others],
        captions=True,
    )


def attention_section(
    images: Tensor,
    weights: NDArray[np.floating],
    queries: Sequence[int],
    grid: Grid,
    patch_size: int,
    block: int,
    *,
    name: str = "target encoder",
) -> Section:
    """Return the section of a block's attention: some heads for one patch, their mean, and the mean of all patches.

    Args:
        images: [m, 3, h, w] uint8.
        weights: [m, heads, n, n].
        queries: [m] the patch of each image whose attention is drawn.
        grid, patch_size: of the images.
        block: its number, from 1.
        name: of the encoder.
    """
    heads = min(weights.shape[1], COLUMNS - 3)

    def draw(axes: list[list[Axes]]) -> None:
        for row, image, weight, patch in zip(axes, images, weights, queries, strict=True):
            show_image(row[0], image)
            frame(row[0], [patch], grid, patch_size, RED)
            maps = [*weight[:heads, patch], weight[:, patch].mean(0), weight.mean((0, 1))]
            for panel, values in zip(row[1:], maps, strict=False):
                show_map(panel, image, values.reshape(grid), 0.0, float(np.percentile(values, 99)))
                frame(panel, [patch], grid, patch_size, RED, 1.0)
            for panel in row[1 + len(maps) :]:
                panel.set_visible(False)

    return Section(
        name="attention",
        title=f"3  Attention of the {name}, block {block}",
        text="Attention of one patch (red, as above) to every patch: some heads, the mean of all heads, and the mean "
        "of all heads and patches. Each map has its own scale from 0 (black) to its 99th percentile (bright).",
        rows=len(images),
        draw=draw,
        titles=["image; patch", *[f"head {k + 1}" for k in range(heads)], "mean of heads", "mean of all\npatches"],
    )


@dataclass(frozen=True, eq=False)
class Drawing:
    """A decoder's drawings of a hidden block of an image.

    Args:
        image: [3, h, w] uint8.
        seen: [L] patches of the context.
        hidden: [T] patches of the block.
        drawn: [3, h, w] uint8 each, for the section's columns after the first two.
    """

    image: Tensor
    seen: Tensor
    hidden: Tensor
    drawn: Sequence[Tensor]


def decoder_section(
    drawings: Sequence[Drawing], titles: Sequence[str], grid: Grid, patch_size: int, *, text: str
) -> Section:
    """Return the section of hidden blocks that a decoder drew.

    Args:
        drawings: one for each row.
        titles: of the columns after the first two.
        grid, patch_size: of the images.
        text: above the panels.
    """

    def draw(axes: list[list[Axes]]) -> None:
        for row, drawing in zip(axes, drawings, strict=True):
            show_image(row[0], drawing.image)
            show_image(row[1], dimmed(drawing.image, drawing.seen, grid))
            for panel, image in zip(row[2:], drawing.drawn, strict=False):
                show_image(panel, image)
            for panel in row[: 2 + len(drawing.drawn)]:
                frame(panel, drawing.hidden.tolist(), grid, patch_size, RED, 1.2)

    return Section(
        name="decoder",
        title="4  What the predictor expects in a hidden block",
        text=text,
        rows=len(drawings),
        draw=draw,
        titles=["image", "context", *titles],
    )
