"""Draw a page about a masker: heat maps, distributions, shapes, costs, warnings and a gallery.

B  images shown    H, W  the grid    h, w  sides in pixels
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jepa_kit.config import Config
from jepa_kit.data.shards.resolve import indexed_samples
from jepa_kit.engine.build import open_shards, training_views
from jepa_kit.evaluation.masks.report import MaskReport, warnings
from jepa_kit.evaluation.pictures.panels import DPI, dim_hidden, draw_blocks, show_image
from jepa_kit.from_config import build_masker
from jepa_kit.plotting import Axes, Figure, SubFigure, save_figure
from jepa_kit.rng import FloatArray, IntArray
from jepa_kit.scenes.scenes import render
from jepa_kit.structures import MaskBatch

GALLERY = 8
"""Images of the gallery."""
WIDTH = 8.0
"""Width of a report's column in inches."""


def shows_data(config: Config) -> bool:
    """Return whether pictures of a report show the config's own data: shards that have an index on this machine."""
    return config.data.shards is not None and indexed_samples(config.data.shards) is not None


def samples_of(config: Config, count: int, seed: int = 0) -> Tensor:
    """Return [B, 3, h, w] uint8: the first samples of the config's data, cropped as in training.

    Synthetic scenes if not ``shows_data(config)``: a report downloads nothing and runs no command.
    """
    if not shows_data(config):
        images = [render(seed, i, config.data.image_size).image for i in range(count)]
    else:
        data = open_shards(config)
        pipeline = next(view.pipeline for view in training_views(config) if view.masker)
        draws = pipeline.draws(np.arange(count), seed=config.train.seed, epoch=0)
        images = [pipeline(data.image_bytes(i % len(data)), draws[i]) for i in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def first_masks(config: Config, images_per_batch: int, count: int) -> MaskBatch:
    """Return the masks of the first ``count`` samples of epoch 0, in a batch of ``images_per_batch`` or ``count``."""
    samples = np.arange(max(images_per_batch, count))
    masks = build_masker(config)(samples, seed=config.train.seed, epoch=0, step=0)
    return masks.split([0, count])[0]


def mask_page(reports: Sequence[MaskReport], configs: Sequence[Config], names: Sequence[str], path: str | Path) -> Path:
    """Draw reports side by side, each with samples of its config's data, and return the path.

    Args:
        reports: one or two.
        configs: of the reports.
        names: headings of the columns.
        path: of the PNG; missing folders are made.
    """
    masks = [first_masks(c, r.images_per_batch, GALLERY) for c, r in zip(configs, reports, strict=True)]
    sets = max(int(np.bincount(m.context.image).max()) for m in masks)
    rows = [0.9, 3.9, 2.3, 2.1, 0.35 + 1.75 * 2 * sets, 1.6]
    figure = Figure(figsize=(WIDTH * len(reports), sum(rows)), layout="constrained")
    columns = figure.subfigures(1, len(reports), squeeze=False, wspace=0.03)[0]
    for column, report, config, name, drawn in zip(columns, reports, configs, names, masks, strict=True):
        bands = column.subfigures(len(rows), 1, height_ratios=rows)
        _heading(bands[0], report, name)
        _heat_maps(bands[1], report)
        _distributions(bands[2], report)
        _shapes_and_cost(bands[3], report)
        _gallery(bands[4], samples_of(config, GALLERY), drawn, sets)
        _warnings(bands[5], report)
    return save_figure(figure, path, dpi=DPI)


def _heading(band: SubFigure, report: MaskReport, name: str) -> None:
    h, w = report.grid
    band.text(0.02, 0.75, name, fontsize=15, weight="bold", va="center")
    line = (
        f"masker {report.masker['name']}, grid {h} x {w}, {report.images} images, {report.images_per_batch} a batch; "
        f"{report.sets_per_image[0]:.3g} context and {report.sets_per_image[1]:.3g} target sets an image"
    )
    band.text(0.02, 0.25, line, fontsize=9, va="center")


def _heat_maps(band: SubFigure, report: MaskReport) -> None:
    axes = band.subplots(1, 2)
    _heat_map(axes[0], report.probability.context, "P(patch in a context)", "Blues")
    _heat_map(axes[1], report.probability.target, "P(patch in a target of its image)", "Oranges")


def _heat_map(panel: Axes, table: FloatArray, title: str, colours: str) -> None:
    """Draw the table, with the means of rows on the right and of columns below, in hundredths."""
    h, w = table.shape
    panel.imshow(table, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    panel.set_title(f"{title}: mean {table.mean():.3f}", fontsize=9)
    size = float(np.clip(110 / max(h, w), 3.5, 7))
    for row, column in np.argwhere(table == 0):
        panel.text(column, row, "x", ha="center", va="center", fontsize=size, color="#b00020")
    right = panel.secondary_yaxis("right")
    right.set_yticks(range(h), [f"{v:.2f}" for v in table.mean(1)], fontsize=size)
    panel.set_xticks(range(w), [f"{v:.2f}" for v in table.mean(0)], fontsize=size, rotation=90)
    panel.set_yticks(range(h), [str(i) for i in range(h)], fontsize=size)
    for axis in (panel, right):
        axis.tick_params(length=0)
    panel.set_xlabel("mean of each column; of each row on the right; x: never", fontsize=7)


def _distributions(band: SubFigure, report: MaskReport) -> None:
    for panel, what, before, after, colours in zip(
        band.subplots(1, 2),
        ("context", "target"),
        (report.context_before, report.targets_before),
        (report.context, report.targets),
        (("#9dbfe0", "#1f5fa8"), ("#f3c79a", "#e6862c")),
        strict=True,
    ):
        cut = not np.array_equal(before, after)
        if cut:
            _histogram(panel, before, "before truncation", colours[0], report.grid)
        _histogram(panel, after, "after truncation" if cut else "as drawn", colours[1], report.grid)
        panel.set_title(f"patches in a {what} set", fontsize=9)
        panel.set_ylabel("fraction of sets", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(0, 1.3 * panel.get_ylim()[1])
        panel.legend(fontsize=7, frameon=False, loc="upper right")


def _histogram(panel: Axes, lengths: IntArray, label: str, colour: str, grid: tuple[int, int]) -> None:
    step = max(1, grid[0] * grid[1] // 98)
    edges = np.arange(0, grid[0] * grid[1] + step + 1, step) - 0.5
    text = f"{label}: mean {lengths.mean():.1f}, {lengths.min()} to {lengths.max()}"
    weights = np.full(len(lengths), 1 / len(lengths))
    panel.hist(lengths, edges.tolist(), weights=weights, color=colour, alpha=0.85, label=text)


def _shapes_and_cost(band: SubFigure, report: MaskReport) -> None:
    left, right = band.subplots(1, 2)
    common = sorted(report.shapes.items(), key=lambda item: -item[1])[:12]
    left.bar([f"{h}x{w}" for (h, w), _ in common], [fraction for _, fraction in common], color="#e6862c")
    left.set_title(_shape_title(report), fontsize=9)
    left.set_ylabel("fraction of target sets", fontsize=8)
    left.tick_params(labelsize=7)
    left.tick_params(axis="x", rotation=60)
    left.spines[["top", "right"]].set_visible(False)
    if not common:
        left.set_axis_off()
    right.set_axis_off()
    cells = [
        [name, f"{part.tokens:.1f}", "-" if part.gflop is None else f"{part.gflop:.2f}"]
        for name, part in (
            ("context encoder", report.cost.encoder),
            ("target encoder", report.cost.target_encoder),
            ("predictor", report.cost.predictor),
        )
    ]
    training = report.cost.training_gflop
    cells.append(["training step", "", "-" if training is None else f"{training:.2f}"])
    drawn = right.table(
        cells, colLabels=["of an image", "tokens", "GFLOP"], loc="upper center", cellLoc="right", edges="horizontal"
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    facts = (
        f"neither context nor target: {report.probability.unused.mean():.1%} of an image's patches\n"
        f"in more than one target: {report.overlap:.1%} of target patches"
    )
    right.text(0.5, 0.02, facts, fontsize=8, ha="center", va="bottom", transform=right.transAxes)


def _shape_title(report: MaskReport) -> str:
    filled = sum(report.shapes.values())
    if not report.shapes:
        return "targets are unions: no rectangles"
    return f"{len(report.shapes)} shapes of targets" + (f" ({filled:.0%} are rectangles)" if filled < 0.9995 else "")


def _gallery(band: SubFigure, images: Tensor, masks: MaskBatch, sets: int) -> None:
    shown = dim_hidden(images, masks)
    axes = band.subplots(2 * sets, GALLERY // 2, squeeze=False)
    band.suptitle("what the context encoder sees, and the target blocks", fontsize=9)
    for panel in axes.flat:
        panel.set_axis_off()
    for image in range(GALLERY):
        half, column = divmod(image, GALLERY // 2)
        for row, s in enumerate(np.flatnonzero(masks.context.image == image).tolist()):
            panel = axes[half * sets + row][column]
            show_image(panel, shown[s])
            draw_blocks(panel, masks, s, images.shape[2:], linewidths=1.2)


def _warnings(band: SubFigure, report: MaskReport) -> None:
    lines = warnings(report)
    texts = ["\n".join(textwrap.wrap(f"- {line}.", 118, subsequent_indent="  ")) for line in lines]
    text = "Warnings\n" + "\n".join(texts) if lines else "No warnings."
    colour = "#b00020" if lines else "#1a7f37"
    band.text(0.02, 0.97, text, fontsize=8, color=colour, va="top")
