#!/usr/bin/env python
"""Draw I-JEPA on a real sample, the figure of the README: a synthetic scene and masks of the multi-block masker.

examples:
  python dev/draw_figure.py docs/images/ijepa.png
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jepa_kit.maskers.multiblock import MultiBlock
from jepa_kit.plotting import Axes, FancyArrowPatch, FancyBboxPatch, Figure, Rectangle
from jepa_kit.scenes.scenes import render

WIDTH, HEIGHT, DPI = 10.0, 5.05, 180
"""Inches; at 800 pixels of width a point is 1.1 pixels."""
SIDE = 1.7
"""Of an image panel, in inches."""
GRID, PATCH = 14, 16
SCENE, SAMPLE = 2, 231
"""A scene and a mask in which the four blocks hardly overlap."""
INK, QUIET, CARD, EMPTY = "#1f2733", "#667085", "#fbfcfe", "#e9edf3"
BLUE, GREY, TEAL = "#2f6fde", "#5b6b84", "#0f8b8d"
BLOCKS = ("#e4572e", "#eda320", "#2a9d67", "#8a5bd1")

UPPER, LOWER = 2.97, 0.5
"""Lower edges of the two rows of panels."""
BETWEEN = (LOWER + SIDE + UPPER) / 2
X_IMAGE, X_ENCODER, X_TOKENS, X_PREDICTOR, X_BLOCKS = 0.3, 2.4, 4.05, 6.15, 7.92
TOP, RIGHT = (0, 2), (2, 3)
"""Blocks in the upper row and in the right column when each is drawn alone."""

PLACES = [(row, column) for row in range(GRID) for column in range(GRID)]
Block = tuple[int, int, int, int]
Cells = dict[tuple[int, int], str]


def shade(colour: str, light: float) -> str:
    """Return the colour mixed with white: `light` 0 is the colour, 1 is white."""
    return "#" + "".join(f"{round(part + (255 - part) * light):02x}" for part in rgb(colour))


def rgb(colour: str) -> list[int]:
    """Return red, green and blue of "#rrggbb", 0 to 255."""
    return [int(colour[k : k + 2], 16) for k in (1, 3, 5)]


class Drawing:
    """The figure: one axis in inches, and helpers that draw on it."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH, HEIGHT))
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axes.set_axis_off()
        self.box(0.03, 0.03, WIDTH - 0.06, HEIGHT - 0.06, face=CARD, edge="#d0d7e2", rounding=0.18, width=1.2)

    def box(
        self, x: float, y: float, w: float, h: float, *, face: str, edge: str, rounding: float = 0.1, width: float = 1.6
    ) -> None:
        style = f"round,pad=0,rounding_size={rounding}"
        self.axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, fc=face, ec=edge, lw=width))

    def text(self, x: float, y: float, text: str, size: float = 11, colour: str = INK, **options: object) -> None:
        self.axes.text(x, y, text, fontsize=size, color=colour, **{"ha": "center", "va": "center", **options})

    def arrow(self, a: tuple[float, float], b: tuple[float, float], colour: str = INK, **options: object) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 13, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
        self.axes.add_patch(FancyArrowPatch(a, b, color=colour, **{**style, **options}))

    def image(self, pixels: NDArray[np.uint8], x: float, y: float) -> None:
        self.axes.imshow(pixels, extent=(x, x + SIDE, y, y + SIDE), interpolation="lanczos", zorder=2, aspect="auto")
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))

    def cells(self, cells: Cells, x: float, y: float, side: float) -> None:
        """Draw tokens: (row, column) -> colour; `side` is that of a cell, (x, y) the top left corner."""
        gap = 0.1 * side
        for (row, column), colour in cells.items():
            corner = (x + column * side + gap / 2, y - (row + 1) * side + gap / 2)
            self.axes.add_patch(Rectangle(corner, side - gap, side - gap, fc=colour, ec="none", zorder=2))

    def outline(self, block: Block, colour: str, x: float, y: float) -> None:
        """Draw a block (top, left, height, width) over the image whose top left corner is (x, y)."""
        top, left, h, w = block
        side, inset = SIDE / GRID, 0.012
        corner = (x + left * side + inset, y - (top + h) * side + inset)
        size = (w * side - 2 * inset, h * side - 2 * inset)
        self.axes.add_patch(Rectangle(corner, *size, fc="none", ec="white", lw=3.6, zorder=3))
        self.axes.add_patch(Rectangle(corner, *size, fc="none", ec=colour, lw=2.2, zorder=3))

    def network(self, x: float, middle: float, w: float, name: str, symbol: str, colour: str) -> None:
        self.box(x, middle - 0.53, w, 1.06, face=shade(colour, 0.86), edge=colour)
        self.text(x + w / 2, middle + 0.15, name, weight="bold", linespacing=1.05)
        self.text(x + w / 2, middle - 0.27, symbol, 13)


class Sample:
    """A scene and its masks: image [224, 224, 3], the context's patches, target blocks (top, left, height, width)."""

    def __init__(self) -> None:
        self.image = render(7, SCENE, GRID * PATCH).image
        masks = MultiBlock(grid=(GRID, GRID))([SAMPLE], seed=0, epoch=0)
        self.context = {divmod(int(patch), GRID) for patch in masks.context.index}
        self.blocks = []
        for patches in masks.targets.split():
            (top, left), (bottom, right) = (divmod(int(p), GRID) for p in (patches[0], patches[-1]))
            self.blocks.append((top, left, bottom - top + 1, right - left + 1))
        light = self.image.reshape(GRID, PATCH, GRID, PATCH, 3).mean((1, 3, 4))
        self.light = (light - light.min()) / np.ptp(light)  # [14, 14], 0 to 1: tokens are shaded by it

    def visible(self) -> NDArray[np.uint8]:
        """Return the image without the patches that the context lacks."""
        shown = self.image.copy()
        for row, column in set(PLACES) - self.context:
            shown[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = rgb(EMPTY)
        return shown

    def tokens(self, block: Block, colour: str, blur: float = 0.0) -> Cells:
        """Return the tokens of a block; `blur` 1 gives all of them the same shade."""
        top, left, h, w = block
        values = self.light[top : top + h, left : left + w]
        values = (1 - blur) * values + blur * values.mean()
        return {(r, c): shade(colour, 0.62 * float(values[r, c])) for r in range(h) for c in range(w)}


def draw_inputs(d: Drawing, sample: Sample) -> None:
    """Draw the input of each encoder."""
    centre = X_IMAGE + SIDE / 2
    d.image(sample.visible(), X_IMAGE, UPPER)
    d.image(sample.image, X_IMAGE, LOWER)
    for block, colour in zip(sample.blocks, BLOCKS, strict=True):
        d.outline(block, colour, X_IMAGE, LOWER + SIDE)
    d.text(centre, UPPER + SIDE + 0.17, "context block")
    d.text(centre, LOWER - 0.19, "four target blocks")
    d.arrow((centre, LOWER + SIDE + 0.1), (centre, UPPER - 0.1), QUIET)
    d.text(centre + 0.1, BETWEEN, "masker", 11, QUIET, ha="left")


def draw_encoders(d: Drawing, sample: Sample) -> None:
    """Draw both encoders and their tokens."""
    upper, lower = UPPER + SIDE / 2, LOWER + SIDE / 2
    networks = ((upper, "encoder", r"$f_\theta$", BLUE), (lower, "target\nencoder", r"$f_{\bar\theta}$", GREY))
    for y, name, symbol, colour in networks:
        d.arrow((X_IMAGE + SIDE + 0.06, y), (X_ENCODER - 0.05, y))
        d.network(X_ENCODER, y, 1.25, name, symbol, colour)
        d.arrow((X_ENCODER + 1.3, y), (X_TOKENS - 0.06, y))
    centre = X_ENCODER + 0.62
    d.arrow((centre, upper - 0.58), (centre, lower + 0.6), GREY, linestyle=(0, (4, 2)))
    d.text(centre + 0.1, BETWEEN, "EMA", 11, QUIET, ha="left")
    d.text(centre, lower - 0.7, "no gradient", 11, QUIET)

    side = SIDE / GRID
    d.cells(dict.fromkeys(PLACES, EMPTY), X_TOKENS, UPPER + SIDE, side)
    d.cells({p: shade(BLUE, 0.7 * sample.light[p]) for p in sample.context}, X_TOKENS, UPPER + SIDE, side)
    d.cells({p: shade(GREY, 0.5 + 0.4 * sample.light[p]) for p in PLACES}, X_TOKENS, LOWER + SIDE, side)
    for block, colour in zip(sample.blocks, BLOCKS, strict=True):
        d.cells(sample.tokens(block, colour), X_TOKENS + block[1] * side, LOWER + SIDE - block[0] * side, side)
    d.text(X_TOKENS + SIDE / 2, UPPER + SIDE + 0.17, r"context tokens $s_x$")
    d.text(X_TOKENS + SIDE / 2, LOWER - 0.19, "tokens of the image")


def draw_predictor(d: Drawing, sample: Sample) -> None:
    """Draw the predictor with a mask token for each target patch, and the path of the targets below it."""
    upper, lower = UPPER + SIDE / 2, LOWER + SIDE / 2
    d.arrow((X_TOKENS + SIDE + 0.06, upper), (X_PREDICTOR - 0.05, upper))
    d.network(X_PREDICTOR, upper, 1.35, "predictor", r"$g_\phi$", TEAL)
    d.arrow((X_PREDICTOR + 1.4, upper), (X_BLOCKS - 0.08, upper))
    side, centre = 0.058, X_PREDICTOR + 0.675
    x, y = centre - GRID * side / 2, UPPER - 0.02
    d.cells(dict.fromkeys(PLACES, EMPTY), x, y, side)
    for (top, left, h, w), colour in zip(sample.blocks, BLOCKS, strict=True):
        masked = {(r, c): shade(colour, 0.45) for r in range(h) for c in range(w)}
        d.cells(masked, x + left * side, y - top * side, side)
    d.arrow((centre, UPPER + 0.03), (centre, upper - 0.57))
    d.text(centre, y - GRID * side - 0.23, "mask tokens at the\ntarget positions", 11, QUIET, linespacing=1.05)
    d.arrow((X_TOKENS + SIDE + 0.06, lower), (X_BLOCKS - 0.08, lower))
    d.text((X_TOKENS + SIDE + X_BLOCKS) / 2, lower - 0.17, "at the target patches", 11, QUIET)


def draw_loss(d: Drawing, sample: Sample) -> None:
    """Draw predictions and targets, block by block, and the loss between them."""
    centre, side, gap = X_BLOCKS + SIDE / 2, 0.1, 0.09
    for y, blur in ((UPPER + SIDE / 2, 0.6), (LOWER + SIDE / 2, 0.0)):
        for k, (block, colour) in enumerate(zip(sample.blocks, BLOCKS, strict=True)):
            h, w = block[2:]
            left = centre + (gap if k in RIGHT else -gap - w * side)
            top = y + (gap + h * side if k in TOP else -gap)
            d.cells(sample.tokens(block, colour, blur), left, top, side)
    d.text(centre, UPPER + SIDE + 0.17, r"predictions $\hat s_y$")
    d.text(centre, LOWER - 0.19, r"targets $s_y$")
    d.box(centre - 0.72, BETWEEN - 0.19, 1.44, 0.38, face=INK, edge=INK, rounding=0.19)
    d.text(centre, BETWEEN, r"loss $D(\hat s_y, s_y)$", 11, "white")
    d.arrow((centre, UPPER + 0.04), (centre, BETWEEN + 0.23))
    d.arrow((centre, LOWER + SIDE - 0.04), (centre, BETWEEN - 0.23))


def save_small(picture: Image.Image, path: Path) -> None:
    """Save with a palette of 255 colours, and one that is transparent outside the card's round corners."""
    alpha = np.asarray(picture.getchannel("A"))
    palette = picture.convert("RGB").quantize(255, kmeans=2)
    flat = picture.convert("RGB").quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    indices = np.asarray(flat).copy()
    indices[alpha < 128] = 255
    result = Image.fromarray(indices, mode="P")
    result.putpalette([*(flat.getpalette() or [])[: 3 * 255], 255, 255, 255])
    result.save(path, optimize=True, transparency=255)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "path", type=Path, nargs="?", default=ROOT / "docs" / "images" / "ijepa.png", help="PNG to write"
    )
    path = parser.parse_args().path
    buffer = io.BytesIO()
    drawing, sample = Drawing(), Sample()
    for part in (draw_inputs, draw_encoders, draw_predictor, draw_loss):
        part(drawing, sample)
    drawing.figure.savefig(buffer, dpi=DPI, transparent=True)
    save_small(Image.open(buffer), path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
