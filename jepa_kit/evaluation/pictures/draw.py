"""Pictures: masks over images, and principal components of patch features.

Training curves are drawn by ``jepa_kit.engine.logging.curves.plot_curves``.

    B     images                  h, w  sides in pixels      p, q  height and width of a patch
    H, W  rows, columns of patches    n  patches of an image, H * W    S  context sets
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.config import DataConfig
from jepa_kit.evaluation.features import extract_features
from jepa_kit.interfaces import Encoder
from jepa_kit.plotting import Axes, Figure, Line2D, LineCollection, Patch, save_figure
from jepa_kit.structures import Grid, MaskBatch

COLOURS = ("#e6194b", "#1f77ff", "#ff9f0a", "#2ca02c", "#b44be1", "#00b8c4", "#8c564b", "#f032e6")
"""Of target blocks, in turn."""
GREY = "#c9c9c9"
PANEL = 1.45
"""Width of a panel in inches."""
LABEL = 1.9
"""Width of the legend's longest entry in inches."""
DPI = 130

Pixels = NDArray[np.uint8]
Segment = tuple[tuple[float, float], tuple[float, float]]


def dim_hidden(images: Tensor, masks: MaskBatch) -> Tensor:
    """What each context shows: its patches as they are, the rest as a pale grey.

    Args:
        images: [B, 3, h, w] uint8.
        masks: of these images.

    Returns:
        [S, 3, h, w] uint8.

    Raises:
        ValueError: images that are not uint8, that the grid does not divide, or not as many as the masks are for.
    """
    check_images(images, masks.grid)
    count = int(masks.context.image.max()) + 1
    if len(images) != count:
        raise ValueError(f"images must be the {count} of the masks, not {len(images)}")
    grid_h, grid_w = masks.grid
    seen = torch.zeros(len(masks.context), grid_h * grid_w, dtype=torch.bool)
    seen[masks.context.lengths.set_of_token, masks.context.index] = True
    p, q = images.shape[2] // grid_h, images.shape[3] // grid_w
    seen = seen.view(-1, 1, grid_h, grid_w).repeat_interleave(p, 2).repeat_interleave(q, 3)  # [S, 1, h, w]
    shown = images[masks.context.image]  # [S, 3, h, w]
    luminance = (shown.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)  # ITU-R 601
    pale = (0.25 * luminance + 0.75 * 214).round().to(torch.uint8)
    return torch.where(seen, shown, pale)


def check_images(images: Tensor, grid: Grid) -> None:
    """Raises ValueError for images that are not uint8 [B, 3, h, w], or that the grid does not divide."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images must be uint8 [B, 3, h, w], not {images.dtype} of shape {tuple(images.shape)}")
    if images.shape[2] % grid[0] or images.shape[3] % grid[1]:
        h, w = images.shape[2:]
        raise ValueError(f"images (={h} x {w} pixels) must divide into a grid of {grid[0]} x {grid[1]} patches")


def outline(inside: NDArray[np.bool_], patch: tuple[float, float], inset: float) -> list[Segment]:
    """The border of a set of patches as lines ((x, y), (x, y)) in pixels, drawn ``inset`` pixels inside it.

    Args:
        inside: [H, W].
        patch: (p, q).
        inset: so that borders of sets that share an edge lie side by side.
    """
    grid = np.pad(inside, 1)
    p, q = patch
    lines: list[Segment] = []
    for row, column in np.argwhere(inside):
        for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if grid[row + 1 + dr, column + 1 + dc]:
                continue
            # the side lies at the middle plus half a patch towards (dr, dc); its ends lie across that, at -1 and 1
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


def mask_gallery(
    images: Tensor,
    masks: MaskBatch,
    path: str | Path,
    *,
    titles: Sequence[str] | None = None,
    columns: int = 8,
    heading: str = "What the context encoder sees, and what is predicted",
) -> Path:
    """Draws images, and under each what its contexts show, with every target block outlined in a colour of its own.

    Args:
        images: [B, 3, h, w] uint8.
        masks: of these images.
        path: of the PNG; folders are made where they are missing.
        titles: a line for each image.
        columns: images side by side.
        heading: of the picture.

    Returns:
        the path.

    Raises:
        ValueError: see ``dim_hidden``; another number of titles than of images.
    """
    shown = dim_hidden(images, masks)
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"titles must be one for each of the {len(images)} images, not {len(titles)}")
    contexts = [[s for s, image in enumerate(masks.context.image.tolist()) if image == b] for b in range(len(images))]
    rows = 1 + max(len(sets) for sets in contexts)
    columns = min(columns, len(images))
    bands = -(-len(images) // columns)
    captions = [0.06 if titles is None else 0.2, *[0.42] * (rows - 1)] * bands
    figure, axes = _panels(captions, columns, images.shape[2] / images.shape[3], around=0.7, heading=heading)
    most = 0
    for b, sets in enumerate(contexts):
        band, column = divmod(b, columns)
        top = axes[band * rows][column]
        _show(top, images[b], titles[b] if titles is not None else "")
        for row, s in enumerate(sets, start=1):
            panel = axes[band * rows + row][column]
            _show(panel, shown[s])
            blocks = _draw_blocks(panel, masks, s, images.shape[2:])
            most = max(most, len(blocks))
            panel.set_xlabel(_caption(masks.context.lengths.on_host[s], blocks), fontsize=7, labelpad=3)
    legend: list[Patch | Line2D] = [Patch(facecolor=GREY, edgecolor="none", label="hidden from the context encoder")]
    legend += [
        Line2D([], [], color=COLOURS[m % len(COLOURS)], linewidth=2, label=f"target block {m + 1}")
        for m in range(min(most, len(COLOURS)))
    ]
    in_a_row = int(figure.get_figwidth() // LABEL)
    figure.legend(handles=legend, loc="outside lower center", ncols=in_a_row, frameon=False, fontsize=8)
    return save_figure(figure, path, dpi=DPI)


def _draw_blocks(panel: Axes, masks: MaskBatch, context: int, size: Sequence[int]) -> list[int]:
    """Outlines the target blocks of a context set; how many patches each has."""
    grid_h, grid_w = masks.grid
    patch = size[0] / grid_h, size[1] / grid_w
    blocks = [set_ for set_, of in zip(masks.targets.split(), masks.context_of.tolist(), strict=True) if of == context]
    # fewer pixels than a screen has: a border of up to a sixth of a patch, one beside the other
    step = min(patch) / (6 * max(len(blocks), 3))
    for m, block in enumerate(blocks):
        inside = np.zeros(grid_h * grid_w, dtype=bool)
        inside[block.numpy()] = True
        lines = outline(inside.reshape(grid_h, grid_w), patch, inset=step * (2 * m + 1))
        # imshow puts the middle of the first pixel at 0
        shifted = [[(x - 0.5, y - 0.5) for x, y in line] for line in lines]
        panel.add_collection(
            LineCollection(shifted, colors=COLOURS[m % len(COLOURS)], linewidths=1.4, capstyle="round")
        )
    return [len(block) for block in blocks]


def _caption(context: int, blocks: Sequence[int]) -> str:
    if len(blocks) <= 6:
        targets = ", ".join(map(str, blocks))
    else:
        targets = f"{len(blocks)} of {min(blocks)} to {max(blocks)}"
    return f"context {context}\ntargets {targets}"


def patch_pca(
    images: Tensor,
    encoders: Mapping[str, Encoder],
    path: str | Path,
    *,
    mean: Sequence[float] = DataConfig.mean,
    std: Sequence[float] = DataConfig.std,
    shown: int = 8,
    device: torch.device | str = "cpu",
    heading: str = "First three principal components of patch features, as red, green and blue",
) -> Path:
    """Draws images, and under each the principal components of its patches' features, for every encoder.

    Components are those of all patches of all images together, so that one colour means one thing in a row.

    Args:
        images: [B, 3, h, w] uint8; all count for the components.
        encoders: by what to call them.
        path: of the PNG; folders are made where they are missing.
        mean, std: of the channels, as in training.
        shown: the first so many images are drawn.
        device: where the encoders run.
        heading: of the picture.

    Returns:
        the path.

    Raises:
        ValueError: images that are not uint8, no encoder, or an encoder whose patches do not fit the images.
    """
    if not encoders:
        raise ValueError("encoders (={}) must hold at least one")
    check_images(images, (1, 1))
    columns = min(shown, len(images))
    aspect = images.shape[2] / images.shape[3]
    figure, axes = _panels([0.08] * (1 + len(encoders)), columns, aspect, around=0.3, heading=heading)
    _label(axes[0][0], "image")
    for column in range(columns):
        _show(axes[0][column], images[column])
    for row, (name, encoder) in zip(axes[1:], encoders.items(), strict=True):
        tokens = extract_features(encoder, images, pooling="none", device=device, mean=mean, std=std)  # [B, n, D]
        components, share = principal_components(tokens)
        grid = images.shape[2] // encoder.patch_size, images.shape[3] // encoder.patch_size
        colours = rearrange(to_colours(components), "b (h w) c -> b c h w", h=grid[0], w=grid[1])
        large = F.interpolate(torch.from_numpy(colours[:columns]), images.shape[2:], mode="bicubic", antialias=False)
        for column, picture in enumerate((large.clamp(0, 1) * 255).round().to(torch.uint8)):
            _show(row[column], picture)
        _label(row[0], f"{name}\n{100 * share:.0f} % of variance")
    return save_figure(figure, path, dpi=DPI)


def principal_components(tokens: NDArray[np.floating], count: int = 3) -> tuple[NDArray[np.float64], float]:
    """The first components of patch features, and the share of the variance that they hold.

    Args:
        tokens: [B, n, D].
        count: components.

    Returns:
        [B, n, count], each of mean 0, the first with the largest variance; the largest weight of each is positive.
        And a number in [0, 1].
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    flat -= flat.mean(axis=0)
    values, vectors = np.linalg.eigh(flat.T @ flat)  # ascending
    vectors = vectors[:, ::-1][:, :count]  # [D, count]
    vectors *= np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0))
    share = float(values[::-1][:count].sum() / max(values.sum(), np.finfo(np.float64).tiny))
    return (flat @ vectors).reshape(*tokens.shape[:-1], count), share


def to_colours(components: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., 3] components -> [..., 3] in [0, 1]: the middle 98 % of each fill the range."""
    low, high = np.percentile(components.reshape(-1, components.shape[-1]), (1, 99), axis=0)
    return np.clip((components - low) / np.maximum(high - low, np.finfo(np.float64).tiny), 0.0, 1.0)


def _panels(
    captions: Sequence[float], columns: int, aspect: float, *, around: float, heading: str
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of empty panels, in a row for each entry of ``captions``: the height of its texts in inches.

    ``around`` is the height of the heading and the legend.
    """
    size = max(PANEL * columns + 0.4, 5.0), len(captions) * PANEL * aspect + sum(captions) + around
    figure = Figure(figsize=size, layout="compressed")
    figure.suptitle(heading, fontsize=11)
    axes = figure.subplots(len(captions), columns, squeeze=False)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
        panel.set_axis_off()
    return figure, [list(row) for row in axes]


def _show(panel: Axes, image: Tensor, title: str = "") -> None:
    panel.set_axis_on()
    for spine in panel.spines.values():
        spine.set_visible(False)
    panel.imshow(rearrange(image, "c h w -> h w c").numpy(), interpolation="nearest")
    if title:
        panel.set_title(title, fontsize=7, pad=3)


def _label(panel: Axes, text: str) -> None:
    panel.set_ylabel(text, fontsize=8)
