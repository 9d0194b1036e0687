"""Report on the masks of a masker, and warnings about its biases."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jepa_kit.evaluation.masks.cost import Cost
from jepa_kit.planning.flops import FORMULA
from jepa_kit.rng import FloatArray, IntArray
from jepa_kit.structures import Grid

UNEVEN = 0.2
"""Relative difference of P(context) between halves of the grid, above which the context counts as lopsided."""
UNSURE = 0.01
"""Relative standard error of the mean context, above which the report recommends more images."""


@dataclass(frozen=True)
class Probabilities:
    """Frequencies of each patch, [H, W] in [0, 1].

    Args:
        context: fraction of the context sets that contain it.
        target: fraction of the images that have it in any target set.
        unused: fraction of the images that have it in no context and no target.
    """

    context: FloatArray
    target: FloatArray
    unused: FloatArray


@dataclass(frozen=True)
class MaskReport:
    """Statistics of masks.

    Args:
        masker: name and options.
        grid: (H, W).
        images, images_per_batch: number of images, in total and at a time.
        probability: of each patch to be in a context, in a target, or unused.
        context_before, context, targets_before, targets: [S] lengths of sets before and after truncation; of contexts
            without mask tokens, also in ``probability``.
        standard_errors: of the means of these, by name, over batches; empty if images of a batch are independent, or
            there is one batch.
        sets_per_image: (contexts, targets), means.
        shapes: (height, width) -> fraction of the target sets that are a filled rectangle of that size.
        overlap: of the patches in targets of a context, the fraction that is in more than one of them.
        context_blocks: number of different sizes and places of context blocks before targets are removed from them;
            None for other maskers than ``multiblock``.
        reached: (shapes that targets have, shapes they would have if scale and aspect ratio were independent); None
            for other maskers than ``multiblock``.
        by_batch: images in a batch -> mean context of the same images; one entry if it makes no difference.
        shared_size: whether all target sets of a batch have one shape, which differs between batches.
        cost: tokens and FLOP.
    """

    masker: dict[str, Any]
    grid: Grid
    images: int
    images_per_batch: int
    probability: Probabilities
    context_before: IntArray
    context: IntArray
    targets_before: IntArray
    targets: IntArray
    standard_errors: dict[str, float]
    sets_per_image: tuple[float, float]
    shapes: dict[tuple[int, int], float]
    overlap: float
    context_blocks: int | None
    reached: tuple[int, int] | None
    by_batch: dict[int, float]
    shared_size: bool
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the warnings."""
        return {
            "masker": self.masker,
            "grid": list(self.grid),
            "images": self.images,
            "images_per_batch": self.images_per_batch,
            "warnings": warnings(self),
            "probability": {
                name: {
                    "mean": float(table.mean()),
                    "by_row": table.mean(1).tolist(),
                    "by_column": table.mean(0).tolist(),
                    "by_patch": table.tolist(),
                }
                for name, table in vars(self.probability).items()
            },
            "lengths": {
                name: _summary(getattr(self, lengths), self.standard_errors.get(lengths))
                for name, lengths in (
                    ("context_before_truncation", "context_before"),
                    ("context", "context"),
                    ("target_before_truncation", "targets_before"),
                    ("target", "targets"),
                )
            },
            "sets_per_image": {"context": self.sets_per_image[0], "target": self.sets_per_image[1]},
            "target_shapes": [
                {"height": h, "width": w, "share": fraction}
                for (h, w), fraction in sorted(self.shapes.items(), key=lambda item: -item[1])
            ],
            "target_overlap": self.overlap,
            "distinct_context_blocks": self.context_blocks,
            "target_shapes_reached_of": self.reached,
            "mean_context_by_images_per_batch": {str(k): v for k, v in self.by_batch.items()},
            "cost_per_image": asdict(self.cost) | {"formula": FORMULA},
        }


def _summary(lengths: IntArray, standard_error: float | None) -> dict[str, Any]:
    values, counts = np.unique(lengths, return_counts=True)
    return {
        "mean": float(lengths.mean()),
        "standard_error_over_batches": standard_error,
        "standard_deviation": float(lengths.std()),
        "least": int(values[0]),
        "most": int(values[-1]),
        "distribution": {str(v): n / len(lengths) for v, n in zip(values.tolist(), counts.tolist(), strict=True)},
    }


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
    names = ("the first row", "the last row", "the first column", "the last column")
    sides = (dead[0], dead[-1], dead[:, 0], dead[:, -1])
    edges = [name for name, line in zip(names, sides, strict=True) if line.all()]
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
