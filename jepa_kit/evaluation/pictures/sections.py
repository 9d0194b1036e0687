"""One page about a run: patch features, predictions, attention, and what the predictor expects where nothing is seen.

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
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.evaluation.pictures.draw import DPI, outline, principal_components, to_colours
from jepa_kit.evaluation.pictures.maps import Guess
from jepa_kit.plotting import Axes, Figure, LineCollection, SubFigure, colormaps, save_figure
from jepa_kit.structures import Grid

COLUMNS = 8
PANEL = 1.5
"""Width of a panel in inches."""
LEFT = 1.15
"""Width of the names of rows."""
RED, BLUE = "#e6194b", "#1f77ff"
MAP = "magma"


@dataclass(frozen=True)
class Section:
    """A part of the page: its heading, a text that says how to read it, and what draws it.

    Args:
        name: of its own picture, a file's stem.
        title, text: above the panels.
        rows: of panels.
        draw: fills the rows of panels that it is given.
        titles: of the columns; the first row carries them.
    """

    name: str
    title: str
    text: str
    rows: int
    draw: Callable[[list[list[Axes]]], None]
    titles: Sequence[str] = field(default=())
    captions: bool = False


def page(sections: Sequence[Section], path: Path, *, heading: str, lines: Sequence[str], aspect: float = 1.0) -> Path:
    """All sections, one below the other, under a heading and lines of text.

    Args:
        aspect: height of an image over its width.
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
    """A section alone."""
    height = _height(section, aspect)
    figure = Figure(figsize=(LEFT + COLUMNS * PANEL + 0.2, height))
    _draw(figure, section, height)
    return save_figure(figure, path, dpi=DPI, format=path.suffix[1:] or "png")


def _height(section: Section, aspect: float) -> float:
    row = PANEL * aspect + (0.24 if section.captions else 0.06)
    return section.rows * row + _above(section)


def _above(section: Section) -> float:
    """Inches of heading, text and titles of columns."""
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


def show(panel: Axes, image: Tensor) -> None:
    """[3, h, w] uint8."""
    panel.imshow(rearrange(image, "c h w -> h w c").numpy(), interpolation="nearest")


def show_map(panel: Axes, image: Tensor, values: NDArray[np.floating], low: float, high: float) -> None:
    """A map [H, W] in colours over the image in grey: brighter is more, dark hides the image."""
    grey = (image.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0).numpy() / 255  # ITU-R 601
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    size = (image.shape[1], image.shape[2])
    large = F.interpolate(torch.from_numpy(scaled)[None, None].float(), size, mode="nearest")[0, 0].numpy()
    colours = colormaps[MAP](large)[..., :3]
    panel.imshow(0.68 * colours + 0.32 * grey[..., None], interpolation="nearest")


def frame(panel: Axes, patches: Sequence[int], grid: Grid, patch_size: int, colour: str, width: float = 1.8) -> None:
    """Outlines a set of patches."""
    inside = np.zeros(grid[0] * grid[1], dtype=bool)
    inside[list(patches)] = True
    lines = outline(inside.reshape(grid), (patch_size, patch_size), 0.0)
    shifted = [[(x - 0.5, y - 0.5) for x, y in line] for line in lines]  # imshow puts the first pixel's middle at 0
    panel.add_collection(LineCollection(shifted, colors=colour, linewidths=width, capstyle="round"))
    panel.set(xlim=(-0.5, grid[1] * patch_size - 0.5), ylim=(grid[0] * patch_size - 0.5, -0.5))


def dimmed(image: Tensor, seen: Tensor, grid: Grid, patch_size: int) -> Tensor:
    """An image [3, h, w] uint8 with all but the patches ``seen`` [L] as a pale grey."""
    shown = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    shown[seen] = True
    large = shown.view(1, *grid).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return torch.where(large, image, torch.full_like(image, 214))


def name_row(panel: Axes, text: str) -> None:
    """The name of a row, left of its first panel."""
    panel.set_ylabel(text, fontsize=8.5, rotation=0, ha="right", va="center", labelpad=8)


def components_section(images: Tensor, tokens: dict[str, NDArray[np.floating]], grid: Grid) -> Section:
    """Principal components of patch features as colours.

    Args:
        images: [m, 3, h, w] uint8, of which the first eight are shown.
        tokens: name of an encoder -> [B, n, D] of all images that count; the first m are those shown.
    """

    def draw(axes: list[list[Axes]]) -> None:
        for column, image in enumerate(images[:COLUMNS]):
            show(axes[0][column], image)
        name_row(axes[0][0], "image")
        for row, (name, features) in zip(axes[1:], tokens.items(), strict=True):
            components, share = principal_components(features)
            colours = rearrange(to_colours(components), "b (h w) c -> b c h w", h=grid[0])
            for column in range(min(len(images), COLUMNS)):
                show(row[column], (torch.from_numpy(colours[column]) * 255).round().to(torch.uint8))
                row[column].set(xlim=(-0.5, grid[1] - 0.5), ylim=(grid[0] - 0.5, -0.5))
            name_row(row[0], f"{name}\n({100 * share:.0f} % of\nvariance)")

    return Section(
        name="patch_pca",
        title="1  Patch features",
        text="The first three principal components of the features of all patches and images, as red, green and blue. "
        "Patches of one colour are alike to the network. Where it knows objects, colours follow them across images; "
        "where it knows positions, every image has the same picture.",
        rows=1 + len(tokens),
        draw=draw,
    )


def guess_section(
    images: Tensor, found: Sequence[Guess], grid: Grid, patch_size: int, *, median: Sequence[int]
) -> Section:
    """Where predictions would fit: cosine maps over the own image and those with the nearest patches.

    Args:
        images: [B, 3, h, w] uint8 that were looked through.
        found: those to draw.
        grid, patch_size: of the images.
        median: places of more guesses than are drawn, whose median is told.
    """

    def draw(axes: list[list[Axes]]) -> None:
        for row, guess in zip(axes, found, strict=True):
            low = float(np.percentile(guess.cosine.numpy(), 50))
            high = float(guess.cosine.max())
            show(row[0], dimmed(images[guess.image], guess.context, grid, patch_size))
            frame(row[0], [guess.patch], grid, patch_size, RED)
            own = guess.cosine[guess.image]
            show_map(row[1], images[guess.image], own.view(grid).numpy(), low, high)
            frame(row[1], [guess.patch], grid, patch_size, RED)
            row[1].set_xlabel(f"{own[guess.patch]:.2f}; place {guess.place:,} of {guess.among:,}", fontsize=7)
            for panel, (image, patch) in zip(row[2:], guess.nearest, strict=False):
                show_map(panel, images[image], guess.cosine[image].view(grid).numpy(), low, high)
                frame(panel, [patch], grid, patch_size, "white")
                panel.set_xlabel(f"cosine {guess.cosine[image, patch]:.2f}", fontsize=7)

    others = ["nearest patch\nof other images", "second", "third", "fourth", "fifth", "sixth"]
    return Section(
        name="predictor_guess",
        title="2  The predictor's guess",
        text="For one hidden patch (red), the cosine between its prediction and the target of every patch of "
        f"{found[0].cosine.shape[0]} images, each less the mean target; bright is near, black is below the median. "
        "Place 1: no other patch of all images fits the prediction better than the true one; the median over "
        f"{len(median)} images is {float(np.median(median)):,.0f} (by chance: {found[0].among // 2:,}). White frames: "
        "the best patch of the six other images that fit best. Nearest patches that share the place and not the "
        "content are the mark of a predictor that knows positions.",
        rows=len(found),
        draw=draw,
        titles=["what was seen; asked", "own image", *others],
        captions=True,
    )


def attention_section(
    images: Tensor,
    weights: NDArray[np.floating],
    asked: Sequence[int],
    grid: Grid,
    patch_size: int,
    block: int,
    *,
    name: str = "target encoder",
) -> Section:
    """Attention of a block: some heads for one patch, their mean, and what all patches attend to.

    Args:
        images: [m, 3, h, w] uint8.
        weights: [m, heads, n, n].
        asked: [m] the patch of each image whose attention is drawn.
        block: its number, from 1.
        name: of the encoder.
    """
    heads = min(weights.shape[1], COLUMNS - 3)

    def draw(axes: list[list[Axes]]) -> None:
        for row, image, weight, patch in zip(axes, images, weights, asked, strict=True):
            show(row[0], image)
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
        text="How much one patch (red, as above) takes from every other: some heads, the mean of all heads, what all "
        "patches take on average. Each map has its own scale from 0 (black) to its 99th percentile (bright).",
        rows=len(images),
        draw=draw,
        titles=["image; asked", *[f"head {k + 1}" for k in range(heads)], "mean of heads", "mean of all\npatches"],
    )


@dataclass(frozen=True, eq=False)
class Drawing:
    """What a decoder draws of a hidden block of an image.

    Args:
        image: [3, h, w] uint8.
        seen: [L] patches of the context.
        hidden: [T] patches of the block.
        drawn: [3, h, w] uint8 each, in the order of the section's columns after the first two.
    """

    image: Tensor
    seen: Tensor
    hidden: Tensor
    drawn: Sequence[Tensor]


def decoder_section(
    drawings: Sequence[Drawing], titles: Sequence[str], grid: Grid, patch_size: int, *, text: str
) -> Section:
    """Hidden blocks as a decoder draws them."""

    def draw(axes: list[list[Axes]]) -> None:
        for row, drawing in zip(axes, drawings, strict=True):
            show(row[0], drawing.image)
            show(row[1], dimmed(drawing.image, drawing.seen, grid, patch_size))
            for panel, image in zip(row[2:], drawing.drawn, strict=False):
                show(panel, image)
            for panel in row[: 2 + len(drawing.drawn)]:
                frame(panel, drawing.hidden.tolist(), grid, patch_size, RED, 1.2)

    return Section(
        name="decoder",
        title="4  What the predictor expects in a hidden block",
        text=text,
        rows=len(drawings),
        draw=draw,
        titles=["image", "what was seen", *titles],
    )
