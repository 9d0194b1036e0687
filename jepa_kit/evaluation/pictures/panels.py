"""What pictures are made of: images, dimmed patches, outlines of sets of patches, principal components as colours.

B     images                  h, w  sides in pixels      p, q  height and width of a patch
H, W  rows, columns of patches    n  patches of an image, H * W    S  context sets
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.plotting import Axes, LineCollection
from jepa_kit.structures import Grid, MaskBatch

COLOURS = ("#e6194b", "#1f77ff", "#ff9f0a", "#2ca02c", "#b44be1", "#00b8c4", "#8c564b", "#f032e6")
"""Colours of target blocks, in turn."""
PALE = 214
"""Grey level of hidden patches."""
DPI = 130

Segment = tuple[tuple[float, float], tuple[float, float]]


def check_images(images: Tensor, grid: Grid) -> None:
    """Raise ValueError if images are not uint8 [B, 3, h, w], or the grid does not divide them."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images must be uint8 [B, 3, h, w], not {images.dtype} of shape {tuple(images.shape)}")
    if images.shape[2] % grid[0] or images.shape[3] % grid[1]:
        h, w = images.shape[2:]
        raise ValueError(f"images (={h} x {w} pixels) must divide into a grid of {grid[0]} x {grid[1]} patches")


def luminance(images: Tensor) -> Tensor:
    """Return the grey levels of RGB images (ITU-R 601): [..., 3, h, w] -> float [..., 1, h, w]."""
    return (images.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(-3, keepdim=True)


def pixel_mask(cells: Tensor, grid: Grid, size: Sequence[int]) -> Tensor:
    """Enlarge a table of patches bool [S, n] to pixels: [S, 1, h, w] for images of ``size`` (h, w)."""
    p, q = size[0] // grid[0], size[1] // grid[1]
    return cells.view(-1, 1, *grid).repeat_interleave(p, 2).repeat_interleave(q, 3)


def dim_hidden(images: Tensor, masks: MaskBatch) -> Tensor:
    """Return what each context shows: its patches unchanged, the others, also mask tokens, as a pale grey.

    Args:
        images: [B, 3, h, w] uint8.
        masks: of these images.

    Returns:
        [S, 3, h, w] uint8.

    Raises:
        ValueError: if images are not uint8, the grid does not divide them, or their number is not that of the masks.
    """
    check_images(images, masks.grid)
    count = int(masks.context.image.max()) + 1
    if len(images) != count:
        raise ValueError(f"images must be the {count} of the masks, not {len(images)}")
    cells = torch.zeros(len(masks.context), masks.grid[0] * masks.grid[1], dtype=torch.bool)
    for s, seen in enumerate(masks.context.shown()):
        cells[s, seen] = True
    shown = images[masks.context.image]  # [S, 3, h, w]
    pale = (0.25 * luminance(shown) + 0.75 * PALE).round().to(torch.uint8)
    return torch.where(pixel_mask(cells, masks.grid, images.shape[2:]), shown, pale)


def show_image(panel: Axes, image: Tensor) -> None:
    """Draw an image [3, h, w]: uint8, or float in [0, 1]."""
    panel.imshow(rearrange(image, "c h w -> h w c").numpy(), interpolation="nearest")


def outline(inside: NDArray[np.bool_], patch: tuple[float, float], inset: float) -> list[Segment]:
    """Return the border of a set of patches as lines ((x, y), (x, y)) in pixels, ``inset`` pixels inside the set.

    Args:
        inside: [H, W].
        patch: (p, q).
        inset: 0 for the border itself; different insets separate the borders of sets that share an edge.
    """
    grid = np.pad(inside, 1)
    p, q = patch
    lines: list[Segment] = []
    for row, column in np.argwhere(inside):
        for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if grid[row + 1 + dr, column + 1 + dc]:
                continue
            # the side is at the middle plus half a patch towards (dr, dc); its ends are across that, at -1 and 1
            ends = []
            for along in (-1, 1):
                ar, ac = (0, along) if dr else (along, 0)
                beside = grid[row + 1 + ar, column + 1 + ac]
                corner = grid[row + 1 + ar + dr, column + 1 + ac + dc]
                reach = -inset if not beside else inset if corner else 0.0  # convex, concave, straight
                y = (row + 0.5 + 0.5 * (dr + ar)) * p - dr * inset + ar * reach
                x = (column + 0.5 + 0.5 * (dc + ac)) * q - dc * inset + ac * reach
                ends.append((float(x), float(y)))
            lines.append((ends[0], ends[1]))
    return lines


def draw_outline(
    panel: Axes,
    patches: Sequence[int],
    grid: Grid,
    patch: tuple[float, float],
    colour: str,
    *,
    inset: float = 0.0,
    **style: Any,
) -> None:
    """Outline a set of patches; see ``outline``. ``style`` is passed to matplotlib's LineCollection."""
    inside = np.zeros(grid[0] * grid[1], dtype=bool)
    inside[list(patches)] = True
    lines = outline(inside.reshape(grid), patch, inset)
    shifted = [[(x - 0.5, y - 0.5) for x, y in line] for line in lines]  # imshow has the first pixel's centre at 0
    panel.add_collection(LineCollection(shifted, colors=colour, **style))


def draw_blocks(panel: Axes, masks: MaskBatch, context: int, size: Sequence[int], **style: Any) -> list[int]:
    """Outline the target blocks of a context set, each in its colour, and return their numbers of patches."""
    patch = size[0] / masks.grid[0], size[1] / masks.grid[1]
    of = masks.context_of.tolist()
    blocks = [block for block, owner in zip(masks.targets.split(), of, strict=True) if owner == context]
    # insets keep the borders of neighbours apart, all within a third of a patch
    step = min(patch) / (6 * max(len(blocks), 3))
    for m, block in enumerate(blocks):
        colour = COLOURS[m % len(COLOURS)]
        draw_outline(panel, block.tolist(), masks.grid, patch, colour, inset=step * (2 * m + 1), **style)
    return [len(block) for block in blocks]


def principal_components(tokens: NDArray[np.floating], count: int = 3) -> tuple[NDArray[np.float64], float]:
    """Return the first components of patch features, and the fraction of the variance that they explain.

    Args:
        tokens: [B, n, D].
        count: number of components.

    Returns:
        [B, n, count], each of mean 0, in the order of decreasing variance, with signs that make the largest weight of
        each positive; and the fraction in [0, 1].
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    flat -= flat.mean(axis=0)
    values, vectors = np.linalg.eigh(flat.T @ flat)  # ascending
    vectors = vectors[:, ::-1][:, :count]  # [D, count]
    vectors *= np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0))
    explained = float(values[::-1][:count].sum() / max(values.sum(), np.finfo(np.float64).tiny))
    return (flat @ vectors).reshape(*tokens.shape[:-1], count), explained


def to_colours(components: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale components [..., 3] to [0, 1] so that the middle 98 % of each fill the range."""
    low, high = np.percentile(components.reshape(-1, components.shape[-1]), (1, 99), axis=0)
    return np.clip((components - low) / np.maximum(high - low, np.finfo(np.float64).tiny), 0.0, 1.0)


def component_images(tokens: NDArray[np.floating], grid: Grid) -> tuple[Tensor, float]:
    """Return the first three principal components of tokens [B, n, D] as RGB images, and the variance they explain.

    Returns:
        float64 [B, 3, H, W] in [0, 1], and a fraction in [0, 1].
    """
    components, explained = principal_components(tokens)
    return torch.from_numpy(rearrange(to_colours(components), "b (h w) c -> b c h w", h=grid[0])), explained


def to_uint8(images: Tensor) -> Tensor:
    """Return images in [0, 1] as uint8; values outside are clipped."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
