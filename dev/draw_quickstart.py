#!/usr/bin/env python
"""Draw the results of the quickstart as one strip for the README: masks, loss, patch features, linear probe.

The grey line of the loss and the last row of patch features are the reference run's, if it ships with jepa_kit.

examples:
  make quickstart && python dev/draw_quickstart.py output/quickstart docs/images/quickstart.png
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from draw_figure import BLUE, CARD, GREY, INK, save_small
from numpy.typing import NDArray
from PIL import Image

from jepa_kit.config.shipped import PREFIX, find_reference, reference_names
from jepa_kit.engine.logging.telemetry import Record, read_metrics
from jepa_kit.plotting import Axes, FancyBboxPatch, Figure, MaxNLocator

WIDTH, HEIGHT, DPI = 10.0, 2.35, 160
REFERENCE = "ijepa_scenes"
SAMPLES = (1, 2, 6, 4, 5, 7)
"""Of the eight samples in masks.png and patch_pca.png, those that are shown, from the first."""
LEAST = 100
"""Height and width in pixels from which something in a picture is a panel, not text."""
SIDE, GAP = 180, 8
"""Of a panel in the strip, and between panels, in pixels."""
NETWORKS = {
    "target": ("target encoder", BLUE),
    "context": ("context encoder", BLUE),
    "untrained": ("untrained", "#9aa8bd"),
    "pixels": ("pixels", "#d3dae5"),
    "patches": ("k-means on patches", "#e9b872"),
}
"""Network of a row of results -> its name and colour, in the order of the bars."""

Pixels = NDArray[np.uint8]


def spans(used: NDArray[np.bool_]) -> list[slice]:
    """Return the runs of True, from ``LEAST`` on."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], used.astype(np.int8), [0]])))
    return [slice(first, last) for first, last in edges.reshape(-1, 2) if last - first >= LEAST]


def panels(picture: Path) -> list[list[Pixels]]:
    """Return the panels of a picture by row: large parts that are hardly white, between white lines and text."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    used = (pixels != 255).any(axis=2)
    return [[pixels[row, x] for x in spans(used[row].mean(axis=0) > 0.8)] for row in spans(used.mean(axis=1) > 0.5)]


def tiled(rows: Sequence[Sequence[Pixels]]) -> Pixels:
    """Return panels side by side, in rows below each other: [h, w, 3]. They get ``SIDE`` pixels."""
    canvas = np.full((len(rows) * (SIDE + GAP) - GAP, len(rows[0]) * (SIDE + GAP) - GAP, 3), 252, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, panel in enumerate(row):
            top, left = y * (SIDE + GAP), x * (SIDE + GAP)
            canvas[top : top + SIDE, left : left + SIDE] = Image.fromarray(panel).resize((SIDE, SIDE))
    return canvas


def draw_masks(axes: Axes, picture: Path) -> None:
    """Draw six samples with their first context."""
    _, masked, *_ = panels(picture)
    axes.imshow(tiled([[masked[k] for k in SAMPLES[:3]], [masked[k] for k in SAMPLES[3:]]]), interpolation="lanczos")
    axes.set_axis_off()


def draw_features(axes: Axes, picture: Path) -> None:
    """Draw samples, with the features of the run below them, and below these those of the reference run."""
    images, own, _, *reference = panels(picture)
    rows = [images, own, *reference[:1]]
    shown = SAMPLES[: 3 if len(rows) == 2 else 4]
    axes.imshow(tiled([[row[k] for k in shown] for row in rows]), interpolation="lanczos")
    names = ("image", "this run", "reference")[: len(rows)]
    axes.set_yticks([(k + 0.5) * SIDE + k * GAP for k in range(len(rows))], names, rotation=90, va="center")
    axes.tick_params(labelsize=8, length=0)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)


def draw_loss(axes: Axes, own: Sequence[Record], reference: Sequence[Record]) -> None:
    """Draw the loss over the updates of the run."""
    last = own[-1]["step"]
    beside = [line for line in reference if line["step"] <= last]
    if beside:
        axes.plot([x["step"] for x in beside], [x["loss"] for x in beside], color="0.75", lw=2.2, label="reference run")
    axes.plot([line["step"] for line in own], [line["loss"] for line in own], color=BLUE, lw=1.5, label="this run")
    axes.set(xlim=(0, last), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if beside:
        axes.legend(
            fontsize=9.5,
            frameon=False,
            loc="upper right",
            handlelength=0.9,
            handletextpad=0.4,
            labelspacing=0.15,
            borderaxespad=0,
            labelcolor=INK,
        )


def draw_probe(axes: Axes, results: Path, pooling: str) -> None:
    """Draw a bar for each network and label: logistic regression on features of one pooling."""
    rows = [row for row in json.loads(results.read_text())["rows"] if row["protocol"] == "logistic"]
    rows = [row for row in rows if row["options"]["pooling"] == pooling]
    if not rows:
        raise SystemExit(f"{results} has no rows of the protocol logistic with pooling {pooling!r}")
    labels = list(dict.fromkeys(row["label"] for row in rows))
    networks = [network for network in NETWORKS if any(row["network"] == network for row in rows)]
    width = 0.84 / len(networks)
    for k, network in enumerate(networks):
        name, colour = NETWORKS[network]
        by_label = {row["label"]: row for row in rows if row["network"] == network}
        places = np.arange(len(labels)) + width * (k - (len(networks) - 1) / 2)
        axes.bar(places, [100 * by_label[one]["accuracy"] for one in labels], 0.92 * width, color=colour, label=name)
    chance = {row["label"]: 100 * row["chance"] for row in rows}
    for place, label in enumerate(labels):
        axes.plot((place - 0.44, place + 0.44), [chance[label]] * 2, color=INK, lw=1, ls=(0, (2, 1.5)))
    most = max(100 * row["accuracy"] for row in rows)
    ticks = range(0, int(most) + 1, 20)
    axes.set(xticks=range(len(labels)), xticklabels=labels, ylim=(0, most + 14 * len(networks)), yticks=ticks)
    axes.legend(fontsize=8.5, frameon=False, loc="upper left", handlelength=0.9, handleheight=0.8, labelspacing=0.15,
                borderaxespad=0, handletextpad=0.4, labelcolor=INK)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="output of `make quickstart`")
    parser.add_argument("path", type=Path, help="PNG to write")
    parser.add_argument("--pooling", default="mean", choices=("mean", "quarters"), help="of the bars (default: mean)")
    arguments = parser.parse_args()
    folder, path = arguments.folder, arguments.path
    figure = Figure(figsize=(WIDTH, HEIGHT))
    card = figure.add_axes((0, 0, 1, 1))
    card.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    card.set_axis_off()
    style = "round,pad=0,rounding_size=0.18"
    card.add_patch(
        FancyBboxPatch((0.03, 0.03), WIDTH - 0.06, HEIGHT - 0.06, boxstyle=style, fc=CARD, ec="#d0d7e2", lw=1.2)
    )

    bottom, height = 0.32, 1.62
    panels = {
        "masks": (0.22, 2.5),
        "loss, over updates": (3.2, 1.5),
        "patch features (PCA)": (4.97, 2.5),
        "linear probe accuracy, %": (7.85, 1.95),
    }
    axes = {}
    for title, (x, width) in panels.items():
        axes[title] = figure.add_axes((x / WIDTH, bottom / HEIGHT, width / WIDTH, height / HEIGHT))
        axes[title].set_facecolor(CARD)
        axes[title].spines[["top", "right"]].set_visible(False)
        axes[title].tick_params(labelsize=10.5, colors=GREY, length=2, pad=2)
        card.text(x + width / 2, bottom + height + 0.19, title, ha="center", va="center", fontsize=11, color=INK)
    masks, loss, features, probe = axes.values()
    draw_masks(masks, folder / "masks.png")
    draw_features(features, folder / "patch_pca.png")
    known = REFERENCE in reference_names()
    draw_loss(loss, read_metrics(folder / "run"), read_metrics(find_reference(PREFIX + REFERENCE)) if known else [])
    draw_probe(probe, folder / "results.json", arguments.pooling)

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, transparent=True)
    save_small(Image.open(buffer), path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
