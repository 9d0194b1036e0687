"""Biases of a masker, found in a report on its masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jepa_kit.rng import FloatArray

if TYPE_CHECKING:
    from jepa_kit.evaluation.masks.report import MaskReport

UNEVEN = 0.2
"""Relative difference of P(context) between halves of the grid, above which the context counts as lopsided."""
UNSURE = 0.01
"""Relative standard error of the mean context, above which the report recommends more images."""


def warnings(report: MaskReport) -> list[str]:
    """Return a message for each bias of the masker, with its figures."""
    lines = _dead(report)
    if len(report.by_batch) > 1:
        figures = ", ".join(f"{mean:.1f} at {size}" for size, mean in report.by_batch.items())
        lines.append(
            f"the context depends on the images per batch: for the same images it has {figures} patches on average, "
            "so training differs with the number of GPUs"
        )
    for axis, first, second in ((0, "upper", "lower"), (1, "left", "right")):
        lines += _lopsided(report.probability.context, axis, first, second)
    if report.reached is not None and report.reached[0] < report.reached[1]:
        lines.append(
            "scale and aspect ratio of targets come from one number: {} of the {} shapes that their ranges allow "
            "occur".format(*report.reached)
        )
    low, high = report.masker.get("context_scale", (0, 0))
    if report.context_blocks == 1 and low < high:
        lines.append(
            f"the context block is the same in every image: context_scale (={low}, {high}) has no effect on this grid"
        )
    if report.shared_size:
        lines.append(f"all targets of a batch have one shape, of {len(report.shapes)} that occur over batches")
    error, mean = report.standard_errors.get("context", 0.0), float(report.context.mean())
    if error > UNSURE * mean:
        lines.append(
            f"images of a batch share what is drawn, so the mean context ({mean:.1f}) has a standard error of "
            f"{error:.1f} over {report.images // report.images_per_batch} batches: draw more images"
        )
    return lines


def _dead(report: MaskReport) -> list[str]:
    dead = np.asarray((report.probability.context == 0) & (report.probability.target == 0))
    if not dead.any():
        return []
    sides = {
        "the first row": dead[0],
        "the last row": dead[-1],
        "the first column": dead[:, 0],
        "the last column": dead[:, -1],
    }
    edges = [name for name, line in sides.items() if line.all()]
    place = f"{' and '.join(edges)}: " if edges else ""
    return [
        f"{place}{dead.sum()} of {dead.size} patches ({dead.mean():.1%}) are never context and never target, "
        f"in {report.images} images"
    ]


def _lopsided(context: FloatArray, axis: int, first: str, second: str) -> list[str]:
    half = context.shape[axis] // 2
    a, b = (context.take(ends, axis=axis).mean() for ends in (range(half), range(-half, 0)))
    if abs(a - b) <= UNEVEN * (a + b) / 2:
        return []
    more = first if a > b else second
    return [
        f"the context lies in the {more} half: P(context) of a patch is {a:.2f} in the {first} half, "
        f"{b:.2f} in the {second} half"
    ]
