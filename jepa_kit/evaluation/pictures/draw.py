"""Galleries: masks over images, and principal components of patch features.

``jepa_kit.engine.logging.curves.plot_curves`` draws training curves.

    B  images    h, w  sides in pixels    n  patches of an image    D  width of a feature
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.config import DataConfig
from jepa_kit.evaluation.features import extract_features
from jepa_kit.evaluation.pictures.panels import (
    COLOURS,
    DPI,
    check_images,
    component_images,
    dim_hidden,
    draw_blocks,
    show_image,
    to_uint8,
)
from jepa_kit.interfaces import Encoder
from jepa_kit.plotting import Axes, Figure, Line2D, Patch, save_figure
from jepa_kit.structures import MaskBatch

GREY = "#c9c9c9"
PANEL = 1.45
"""Width of a panel in inches."""
LABEL = 1.9
"""Width of the legend's longest entry in inches."""


def mask_gallery(images: Tensor, masks: MaskBatch, path: str | Path, **options: Any) -> Path:
    """Write ``mask_figure(images, masks, **options)`` as a PNG and return the path; missing folders are made."""
    return save_figure(mask_figure(images, masks, **options), path, dpi=DPI)


def mask_figure(
    images: Tensor,
    masks: MaskBatch,
    *,
    titles: Sequence[str] | None = None,
    columns: int = 8,
    heading: str = "What the context encoder sees, and what is predicted",
) -> Figure:
    """Draw images, and below each what its contexts show, with every target block outlined in its own colour.

    Args:
        images: [B, 3, h, w] uint8.
        masks: of these images.
        titles: one for each image.
        columns: images side by side.
        heading: of the picture.

    Raises:
        ValueError: see ``dim_hidden``; also if there are not as many titles as images.
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
    seen = masks.context.shown()
    most = 0
    for b, sets in enumerate(contexts):
        band, column = divmod(b, columns)
        _show(axes[band * rows][column], images[b], titles[b] if titles is not None else "")
        for row, s in enumerate(sets, start=1):
            panel = axes[band * rows + row][column]
            _show(panel, shown[s])
            blocks = draw_blocks(panel, masks, s, images.shape[2:], linewidths=1.4, capstyle="round")
            most = max(most, len(blocks))
            panel.set_xlabel(_caption(len(seen[s]), blocks), fontsize=7, labelpad=3)
    legend: list[Patch | Line2D] = [Patch(facecolor=GREY, edgecolor="none", label="hidden from the context encoder")]
    for m, colour in enumerate(COLOURS[:most], start=1):
        legend.append(Line2D([], [], color=colour, linewidth=2, label=f"target block {m}"))
    in_a_row = int(figure.get_figwidth() // LABEL)
    figure.legend(handles=legend, loc="outside lower center", ncols=in_a_row, frameon=False, fontsize=8)
    return figure


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
) -> Path:
    """Write ``patch_figure`` of encoders as a PNG and return the path.

    Args:
        images: [B, 3, h, w] uint8; the components are of all of them.
        encoders: by the name to print.
        path: of the PNG; missing folders are made.
        mean, std: of the channels, as in training.
        shown: how many of the images are drawn, from the first.
        device: where the encoders run.

    Raises:
        ValueError: if images are not uint8, there is no encoder, or an encoder's patches do not divide the images.
    """
    sources = {
        name: partial(extract_features, one, mean=mean, std=std, device=device) for name, one in encoders.items()
    }
    sizes = {name: one.patch_size for name, one in encoders.items()}
    return save_figure(patch_figure(images, sources, sizes, shown=shown), path, dpi=DPI)


def patch_figure(
    images: Tensor,
    sources: Mapping[str, Callable[..., NDArray[np.float32]]],
    patch_sizes: Mapping[str, int],
    *,
    shown: int = 8,
    heading: str = "First three principal components of patch features, as red, green and blue",
) -> Figure:
    """Draw images, and below each the principal components of its patch features, in a row for every encoder.

    Components are of all patches of all images together, so a colour has the same meaning throughout a row.

    Args:
        images: [B, 3, h, w] uint8; the components are of all of them.
        sources: name to print -> function from (images, pooling="none") to patch features [B, n, D].
        patch_sizes: name -> side of a patch in pixels.
        shown: how many of the images are drawn, from the first.
        heading: of the picture.

    Raises:
        ValueError: if images are not uint8, there is no encoder, or an encoder's patches do not divide the images.
    """
    if not sources:
        raise ValueError("encoders (={}) must have at least one")
    check_images(images, (1, 1))
    columns = min(shown, len(images))
    captions = [0.08] * (1 + len(sources))
    figure, axes = _panels(captions, columns, images.shape[2] / images.shape[3], around=0.3, heading=heading)
    axes[0][0].set_ylabel("image", fontsize=8)
    for column in range(columns):
        _show(axes[0][column], images[column])
    for row, (name, source) in zip(axes[1:], sources.items(), strict=True):
        tokens, side = source(images, pooling="none"), patch_sizes[name]  # [B, n, D]
        colours, explained = component_images(tokens, (images.shape[2] // side, images.shape[3] // side))
        large = F.interpolate(colours[:columns], images.shape[2:], mode="bicubic", antialias=False)
        for column, picture in enumerate(to_uint8(large)):
            _show(row[column], picture)
        row[0].set_ylabel(f"{name}\n{100 * explained:.0f} % of variance", fontsize=8)
    return figure


def _panels(
    captions: Sequence[float], columns: int, aspect: float, *, around: float, heading: str
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure and its empty panels, with a row for each of ``captions``: the heights of its texts in inches.

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
    panel.spines[:].set_visible(False)
    panel.set_title(title, fontsize=7, pad=3)
    show_image(panel, image)
