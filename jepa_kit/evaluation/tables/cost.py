"""Cost of training a run, from the lines of its ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.evaluation.tables.runs import Run
from jepa_kit.run_folder import METRICS


class Cost(NamedTuple):
    """Cost of training up to a checkpoint.

    Args:
        steps: updates.
        images: seen, with repetitions.
        tflop: model TFLOP, forward and backward, all processes; None if the run does not know them.
        hours: of the steps, without checkpoints and evaluations.
    """

    steps: float
    images: float
    tflop: float | None
    hours: float

    def texts(self) -> list[str]:
        """Return steps, images, TFLOP and hours for a table."""
        tflop = "" if self.tflop is None else f"{self.tflop:,.3g}" if self.tflop < 1000 else f"{self.tflop:,.0f}"
        return [f"{self.steps:,.0f}", f"{self.images:,.0f}", tflop, f"{self.hours:.3g}"]


def cost_of(run: Run) -> Cost | None:
    """Return the cost of a run up to its checkpoint; None if its metrics are not there.

    They are looked for beside the checkpoint, and in the folder of the results. Lines are written every few steps: what
    lies between the last line and the checkpoint is extrapolated.

    Raises:
        ValueError: a damaged file of metrics.
    """
    folders = [*([run.checkpoint.parent] if run.checkpoint else []), run.place / "run", run.place]
    folder = next((one for one in folders if (one / METRICS).is_file()), None)
    if folder is None or not run.step:
        return None
    needed = ("samples", "images_per_second")
    lines = [r for r in read_metrics(folder) if r["step"] < run.step and all(r.get(key) for key in needed)]
    if not lines:
        return None
    images = np.diff([line["samples"] for line in lines], prepend=0.0)
    whole = run.step / (lines[-1]["step"] + 1)
    gflop = [line.get("gflop_per_image") for line in lines]
    tflop = None if None in gflop else whole * float(images @ np.array(gflop, dtype=float)) / 1e3
    seconds = float((images / [line["images_per_second"] for line in lines]).sum())
    return Cost(run.step, whole * float(images.sum()), tflop, whole * seconds / 3600)


def mean_cost(costs: Sequence[Cost | None]) -> Cost | None:
    """Return the mean over runs; None if that of any is unknown."""
    known = [cost for cost in costs if cost is not None]
    if not known or len(known) < len(costs):
        return None
    flops = [cost.tflop for cost in known if cost.tflop is not None]
    tflop = float(np.mean(flops)) if len(flops) == len(known) else None
    steps, images, hours = (float(np.mean([getattr(c, name) for c in known])) for name in ("steps", "images", "hours"))
    return Cost(steps, images, tflop, hours)
