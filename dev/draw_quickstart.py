#!/usr/bin/env python
"""Draw the results of the quickstart as one strip for the README: masks, loss, patch features, linear probe.

examples:
  make quickstart && python dev/draw_quickstart.py output/quickstart docs/images/quickstart.png
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
from draw_figure import BLUE, CARD, GREY, INK, save_small
from numpy.typing import NDArray
from PIL import Image

from jepa_kit.plotting import Axes, FancyBboxPatch, Figure

WIDTH, HEIGHT, DPI = 10.0, 2.35, 160
MASKS = (5, 195, 185, ((270, (1, 2, 6)), (270, (4, 5, 7))))
FEATURES = (47, 190, 179, ((38, (1, 2, 6)), (234, (1, 2, 6))))
"""Where samples are in masks.png and in patch_pca.png: left edge, distance and side in pixels; for two rows of tiles
the top edge, and which of the eight samples."""
NETWORKS = {"target": ("target encoder", BLUE), "untrained": ("untrained", "#9aa8bd"), "pixels": ("pixels", "#d3dae5")}


def tiles(picture: Path, places: tuple[int, int, int, tuple[tuple[int, tuple[int, ...]], ...]]) -> NDArray[np.uint8]:
    """Return the chosen samples of a picture, two rows of three: [h, w, 3]."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    left, distance, side, rows = places
    gap = 8
    canvas = np.full((2 * side + gap, 3 * side + 2 * gap, 3), 252, dtype=np.uint8)
    for row, (top, samples) in enumerate(rows):
        for column, sample in enumerate(samples):
            y, x, begin = row * (side + gap), column * (side + gap), left + sample * distance
            canvas[y : y + side, x : x + side] = pixels[top : top + side, begin : begin + side]
    return canvas


def draw_loss(axes: Axes, run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], color=BLUE, lw=1.5)
    axes.set(
        xlim=(0, lines[-1]["step"]), ylim=(0, None), xticks=(0, 1000, 2000), xticklabels=("0", "1000", "2000 steps")
    )


def draw_probe(axes: Axes, results: Path) -> None:
    rows = [row for row in json.loads(results.read_text())["rows"] if row["protocol"] == "logistic"]
    labels = ("count", "distance", "shape")
    for k, (network, (name, colour)) in enumerate(NETWORKS.items()):
        by_label = {row["label"]: row for row in rows if row["network"] == network}
        places = np.arange(3) + 0.27 * (k - 1)
        axes.bar(places, [100 * by_label[label]["accuracy"] for label in labels], 0.25, color=colour, label=name)
    chance = {row["label"]: 100 * row["chance"] for row in rows}
    for place, label in enumerate(labels):
        axes.plot((place - 0.42, place + 0.42), [chance[label]] * 2, color=INK, lw=1, ls=(0, (2, 1.5)))
    axes.set(xticks=range(3), xticklabels=labels, ylim=(0, 100), yticks=(0, 20, 40, 60))
    axes.legend(fontsize=9.5, frameon=False, loc="upper right", handlelength=0.9, handleheight=0.8, labelspacing=0.15,
                borderaxespad=0, handletextpad=0.4, labelcolor=INK)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="output of `make quickstart`")
    parser.add_argument("path", type=Path, help="PNG to write")
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
        "loss": (3.2, 1.55),
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
    for panel, picture, places in ((masks, "masks.png", MASKS), (features, "patch_pca.png", FEATURES)):
        panel.imshow(tiles(folder / picture, places), interpolation="lanczos")
        panel.set_axis_off()
    draw_loss(loss, folder / "run")
    draw_probe(probe, folder / "results.json")

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, transparent=True)
    save_small(Image.open(buffer), path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
