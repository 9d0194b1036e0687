"""Train four runs on scenes and draw their health: the numbers of docs/evaluation.md and docs/images/health.png.

    make quickstart
    python dev/draw_health.py output/quickstart/shards output/health --picture docs/images/health.png

Each run is `tools/train_net.py` on the quickstart's network with random masks; it measures itself on held-out scenes
(`evaluate.every`).
Complete runs are not repeated. A collapse happens early, so those runs stop after two of their sixteen epochs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jepa_kit.engine.logging.curves import Panel
from jepa_kit.engine.logging.telemetry import Record, read_metrics
from jepa_kit.evaluation.health.verdict import CONSTANT, DIMENSIONAL, LEARNED
from jepa_kit.evaluation.online import STATES
from jepa_kit.plotting import Figure

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "projects" / "ijepa" / "studies" / "bases" / "random_masks.yaml"
WIDTH = 96
"""Of the quickstart's encoder."""


class Case(NamedTuple):
    """A run: its name, its overrides of that config, and the style of its line."""

    name: str
    overrides: tuple[str, ...]
    line: str


SHORT = ("train.epochs=2", "optim.stretch=8", "evaluate.every=10")
CASES = (
    Case("a run that learns", ("evaluate.every=40",), "-"),
    Case("no stop-gradient", ("target_update={name: tied, stop_gradient: false}", *SHORT), "-"),
    Case("momentum 0", ("target_update={name: ema, momentum: [0.0, 0.0]}", *SHORT), "--"),
    Case(
        "whole-image brightness",
        (
            "encoder.input_norm=none",
            "optim.lr=2e-3",
            "target_update.momentum=[0.98, 1.0]",
            "masker={name: multiblock, truncation: fixed, context_length: 20, target_length: 9}",
            "train.epochs=4",
            "optim.stretch=4",
            "evaluate.every=20",
        ),
        "-.",
    ),
)

PANELS = (
    (Panel("loss", ("eval/loss",)), "log", None),
    (Panel("varying: share of tokens that varies", ("eval/varying",)), "log", CONSTANT),
    (Panel(f"token_rank: directions, of {WIDTH}", ("eval/token_rank",)), "linear", DIMENSIONAL * WIDTH),
    (Panel("loss / best of positions alone", ("eval/relative_to_position",)), "log", 1.0),
    (Panel("cross-sample gap", ("eval/cross_sample_gap",)), "linear", LEARNED),
    (Panel("effective rank of features (misleading)", ("eval/effective_rank",)), "linear", None),
)
"""Each with its scale, and the line that the verdict draws."""

TABLE = ("loss", "varying", "of_images", "within_images", "token_rank", "relative_to_position", "cross_sample_gap")


def measured(case: Case, shards: Path, out: Path) -> list[Record]:
    """Return the metrics with the health of a run; train it if it does not exist."""
    folder = out / case.name.replace(" ", "_")
    own = (f"data.shards={shards / 'train'}", f"evaluate.shards={shards / 'test'}", f"train.output_dir={folder}")
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", str(CONFIG), "--resume"]
    subprocess.run([*command, *own, *case.overrides], check=True)
    return [line for line in read_metrics(folder) if "eval/varying" in line]


def draw(runs: Sequence[tuple[Case, list[Record]]], picture: Path) -> None:
    """Draw a panel for each measurement, with a line for each run over the logarithm of the step."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, 3)
    for ax, (panel, scale, line) in zip(axes.flat, PANELS, strict=True):
        for case, lines in runs:
            (key,) = panel.keys
            points = [(update(x), x[key]) for x in lines if key in x]
            ax.plot(*zip(*points, strict=True), case.line, label=case.name, linewidth=1.5)
        if line is not None:
            ax.axhline(line, color="black", linestyle=":", linewidth=0.8)
        ax.set(title=panel.title, xscale="log", yscale=scale)
        ax.title.set_fontsize(10)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.2)
    for ax in axes[1]:
        ax.set_xlabel("updates", fontsize=8)
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    figure.savefig(picture, dpi=100)


def update(line: Record) -> int:
    """Return the number of updates before a line was written."""
    return int(line["step"]) + 1


def table(case: Case, lines: Sequence[Record]) -> str:
    """Return the measurements at about ten steps, and the steps at which the verdict changes."""
    rows = [f"{case.name}: update, {', '.join(TABLE)}"]
    shown = max(1, len(lines) // 10)
    before: Any = None
    for k, line in enumerate(lines):
        verdict = STATES[int(line["eval/verdict"])]
        if verdict != before or k % shown == 0 or k == len(lines) - 1:
            figures = "".join(f"{line.get(f'eval/{name}', float('nan')):10.4f}" for name in TABLE)
            rows.append(f"{update(line):6d}{figures}  {verdict}")
        before = verdict
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a folder with train and test")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the runs")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="default: health.png in OUT")
    arguments = parser.parse_args(argv)
    runs = [(case, measured(case, arguments.shards, arguments.out)) for case in CASES]
    for case, lines in runs:
        print(f"\n{table(case, lines)}")
    draw(runs, arguments.picture or arguments.out / "health.png")


if __name__ == "__main__":
    main()
