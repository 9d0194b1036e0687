"""What a masker really draws: numbers over many masks, and warnings in words where it is biased.

B  images of a batch      H, W  the grid, N = H * W patches     S  sets
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.build import build_masker
from jepa_kit.config import Config
from jepa_kit.evaluation.masks.cost import Cost, Lengths, cost_of
from jepa_kit.interfaces import Masker
from jepa_kit.maskers import MultiBlock
from jepa_kit.rng import FloatArray, IntArray
from jepa_kit.structures import Grid, MaskBatch, PatchSets

SMALL_BATCH = 8
"""Images of the small batch that a context of the large one is held against."""


@dataclass(frozen=True)
class Shares:
    """How often each patch has a part: [H, W], 0 to 1.

    context: the share of context sets that hold it.   target: the share of images with it in any target set.
    unused: the share of images where it is neither in a context nor in a target.
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
        images, images_per_batch: that were drawn, and how many at a time.
        shares: how often each patch is what.
        context_before, context, targets_before, targets: [S] lengths of sets before and after truncation.
        standard_errors: of the means of these, by name, over batches; empty where the images of a batch share
            nothing, or there is one batch.
        sets_per_image: (contexts, targets), means.
        shapes: (height, width) -> share of the target sets that are a filled rectangle of that size.
        overlap: share of the patches in targets of a context that are in more than one of them.
        context_blocks: how many sizes and places the context blocks have (before targets are left out); None for
            a masker without such blocks.
        reached: (shapes that targets have, shapes they would have were scale and aspect ratio drawn apart), for
            ``multiblock``; None for another masker.
        by_batch: images in a batch -> mean context, for the same images; one entry where it makes no difference.
        shared_size: every target set of a batch has one shape, which is another one in another batch.
        cost: tokens and FLOP.
    """

    masker: dict[str, Any]
    grid: Grid
    images: int
    images_per_batch: int
    shares: Shares
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
        """Plain values, with the warnings."""
        tables = {"context": self.shares.context, "target": self.shares.target, "unused": self.shares.unused}
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
                for name, table in tables.items()
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
                {"height": h, "width": w, "share": share}
                for (h, w), share in sorted(self.shapes.items(), key=lambda item: -item[1])
            ],
            "target_overlap": self.overlap,
            "distinct_context_blocks": self.context_blocks,
            "target_shapes_reached_of": self.reached,
            "mean_context_by_images_per_batch": {str(k): v for k, v in self.by_batch.items()},
            "cost_per_image": self.cost.to_dict(),
        }


def mask_report(config: Config, *, images: int = 2048, images_per_batch: int = 128) -> MaskReport:
    """Draws the masks of a config's masker and counts.

    Args:
        config: its masker, its grid, its networks (for the cost) and its seed are looked at.
        images: how many to draw, in whole batches; the first samples of epoch 0.
        images_per_batch: of a process; matters to maskers that share something across a batch.

    Raises:
        ValueError: a number below 1, or what the masker refuses.
    """
    for name, value in (("images", images), ("images_per_batch", images_per_batch)):
        if value < 1:
            raise ValueError(f"{name} (={value}) must be at least 1")
    masker = build_masker(config)
    part = config.slots["masker"]
    batches = -(-images // images_per_batch)
    counts = _Counts(masker.grid)
    for step in range(batches):
        samples = np.arange(step * images_per_batch, (step + 1) * images_per_batch)
        arguments = {"seed": config.train.seed, "epoch": 0, "step": step}
        masks = masker(samples, **arguments)
        before = getattr(masker, "before_truncation", masker)(samples, **arguments)
        counts.add(masks, before)
    total = batches * images_per_batch
    lengths = {name: np.concatenate(of_batches) for name, of_batches in counts.lengths.items()}
    context, targets, sequences = lengths["context"], lengths["targets"], lengths.pop("sequences")
    by_batch = _by_batch(masker, config.train.seed, images_per_batch, batches)
    shared_size = _shared_size(counts.sides)
    sides = np.concatenate(counts.sides)  # [S_t, 2], zero where a target is no rectangle
    shapes = Counter(map(tuple, sides[sides[:, 0] > 0].tolist()))
    return MaskReport(
        masker={"name": part.name, **part.options},
        grid=masker.grid,
        images=total,
        images_per_batch=images_per_batch,
        shares=counts.shares(len(context), total),
        **lengths,
        standard_errors=counts.standard_errors(lengths) if shared_size or len(by_batch) > 1 else {},
        sets_per_image=(len(context) / total, len(targets) / total),
        shapes={(h, w): n / len(targets) for (h, w), n in shapes.items()},
        overlap=counts.covered_twice / counts.covered,
        context_blocks=_context_blocks(masker, config.train.seed),
        reached=_missing_shapes(masker, config.train.seed),
        by_batch=by_batch,
        shared_size=shared_size,
        cost=cost_of(config, Lengths(context, targets, sequences, total, masker.grid[0] * masker.grid[1])),
    )


class _Counts:
    """Sums over batches."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        patches = grid[0] * grid[1]
        self.in_context, self.in_target, self.in_none = np.zeros((3, patches), dtype=np.int64)
        self.lengths: defaultdict[str, list[IntArray]] = defaultdict(list)  # of each kind of set, batch by batch
        self.sides: list[IntArray] = []
        self.covered = self.covered_twice = 0

    def add(self, masks: MaskBatch, before: MaskBatch) -> None:
        batch_size = int(masks.context.image.max()) + 1
        seen = self._count(masks.context, masks.context.image, batch_size)  # [B, N], as the next
        aimed_at = self._count(masks.targets, masks.targets.image, batch_size)
        self.in_context += seen.sum(0)
        self.in_target += (aimed_at > 0).sum(0)
        self.in_none += (seen + aimed_at == 0).sum(0)
        times = self._count(masks.targets, masks.context_of, len(masks.context))  # [S_c, N]: targets of a context
        self.covered += int((times > 0).sum())
        self.covered_twice += int((times > 1).sum())
        for name, sets in (
            ("context_before", before.context.lengths),
            ("context", masks.context.lengths),
            ("targets_before", before.targets.lengths),
            ("targets", masks.targets.lengths),
            ("sequences", masks.sequences),
        ):
            self.lengths[name].append(sets.each)
        self.sides.append(rectangles(table(masks.targets, self.grid), self.grid))

    def _count(self, sets: PatchSets, owner: Tensor, owners: int) -> IntArray:
        """[owners, N]: in how many of its sets each owner (``owner`` [S]) has the patch."""
        patches = self.grid[0] * self.grid[1]
        at = owner.numpy()[sets.lengths.set_of_token.numpy()] * patches + sets.index.numpy()
        return np.bincount(at, minlength=owners * patches).reshape(owners, patches)

    def standard_errors(self, names: Iterable[str]) -> dict[str, float]:
        """Of the mean lengths, from those of the batches."""
        means = {name: np.array([batch.mean() for batch in self.lengths[name]]) for name in names}
        return {name: float(x.std(ddof=1) / len(x) ** 0.5) for name, x in means.items() if len(x) > 1}

    def shares(self, contexts: int, images: int) -> Shares:
        counts = (self.in_context / contexts, self.in_target / images, self.in_none / images)
        return Shares(*(count.reshape(self.grid) for count in counts))


def table(sets: PatchSets, grid: Grid) -> NDArray[np.bool_]:
    """[S, N]: which patches each set holds."""
    cells = np.zeros((len(sets), grid[0] * grid[1]), dtype=bool)
    cells[sets.lengths.set_of_token.numpy(), sets.index.numpy()] = True
    return cells


def rectangles(sets: NDArray[np.bool_], grid: Grid) -> IntArray:
    """[S, N] -> [S, 2]: height and width of each set that is a filled rectangle, (0, 0) for another."""
    cells = sets.reshape(-1, *grid)
    sides = []
    for axis in (2, 1):
        line: NDArray[np.bool_] = np.asarray(cells.any(axis=axis))  # [S, H], then [S, W]
        first, last = line.argmax(1), line.shape[1] - line[:, ::-1].argmax(1)
        sides.append(last - first)
    size = np.stack(sides, axis=1)
    return np.where((size.prod(1) == sets.sum(1))[:, None], size, 0)


def _context_blocks(masker: Masker, seed: int) -> int | None:
    if not isinstance(masker, MultiBlock):
        return None
    blocks = set()
    for step in range(64):
        samples = np.arange(16 * step, 16 * step + 16)
        sizes = masker.sizes(samples, seed=seed, epoch=0, step=step)
        drawn = masker.place(samples, *sizes, seed=seed, epoch=0).contexts
        blocks |= set(
            zip(*(x.ravel().tolist() for x in (drawn.top, drawn.left, drawn.height, drawn.width)), strict=True)
        )
    return len(blocks)


def _missing_shapes(masker: Masker, seed: int) -> tuple[int, int] | None:
    """(shapes that targets have, shapes that they would have if scale and aspect ratio were drawn apart).

    Of the latter, those that one block in 100 or more would have.
    """
    if not isinstance(masker, MultiBlock):
        return None
    sizes = [masker.sizes(np.arange(4 * k, 4 * k + 4), seed=seed, epoch=0, step=k) for k in range(512)]
    h, w = (np.concatenate([size[i][masker.num_contexts :].ravel() for size in sizes]) for i in (0, 1))
    drawn = set(zip(h.tolist(), w.tolist(), strict=True))
    u = (np.arange(200) + 0.5) / 200
    h, w = (side.ravel().tolist() for side in masker.target_shape.size(*np.meshgrid(u, u)))
    common = {shape for shape, n in Counter(zip(h, w, strict=True)).items() if n >= 0.01 * len(h)}
    return len(drawn), len(drawn | common)


def _by_batch(masker: Masker, seed: int, images_per_batch: int, steps: int) -> dict[int, float]:
    """Mean context of the same images in batches of several sizes; only the one asked for where it is all the same."""
    sizes = sorted({1, 32, 128, images_per_batch})
    other = SMALL_BATCH if images_per_batch != SMALL_BATCH else 2 * SMALL_BATCH
    asked, small = (_contexts(masker, seed, size, max(sizes), steps=2) for size in (images_per_batch, other))
    if np.array_equal(asked, small):
        return {images_per_batch: float(asked.mean())}
    return {size: float(_contexts(masker, seed, size, max(sizes), steps=steps).mean()) for size in sizes}


def _contexts(masker: Masker, seed: int, images_per_batch: int, images_per_step: int, *, steps: int) -> IntArray:
    """Lengths of contexts image by image, drawn so many images at a time; the step is told by the image alone."""
    lengths = []
    parts = [
        (step, np.arange(first, min(first + images_per_batch, (step + 1) * images_per_step)))
        for step in range(steps)
        for first in range(step * images_per_step, (step + 1) * images_per_step, images_per_batch)
    ]
    for step, samples in parts:
        sets = masker(samples, seed=seed, epoch=0, step=step).context
        lengths.append(np.array(sets.lengths.on_host)[np.argsort(sets.image.numpy(), kind="stable")])
    return np.concatenate(lengths)


def _shared_size(sides: list[IntArray]) -> bool:
    shapes = [np.unique(batch, axis=0) for batch in sides if len(batch) > 1]
    if not all(len(shape) == 1 and shape[0, 0] for shape in shapes):
        return False
    return len({tuple(shape[0]) for shape in shapes}) > 1


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


# --- in words ---

UNEVEN = 0.2
"""Relative difference between the halves of an image from which a context counts as lopsided."""
UNSURE = 0.01
"""Relative standard error of the mean context above which more images are asked for."""


def warnings(report: MaskReport) -> list[str]:
    """Where the masker is biased, each with its figure."""
    lines = _dead(report)
    if len(report.by_batch) > 1:
        figures = ", ".join(f"{mean:.1f} at {size}" for size, mean in report.by_batch.items())
        lines.append(
            f"the context depends on the images per batch: for the same images it has {figures} patches on average; "
            "so training differs with the number of GPUs"
        )
    for axis, first, second in ((0, "upper", "lower"), (1, "left", "right")):
        lines += _lopsided(report.shares.context, axis, first, second)
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
    dead = np.asarray((report.shares.context == 0) & (report.shares.target == 0))
    if not dead.any():
        return []
    sides = {
        "the first row": dead[0],
        "the last row": dead[-1],
        "the first column": dead[:, 0],
        "the last column": dead[:, -1],
    }
    edges = [name for name, line in sides.items() if line.all()]
    where = f"{' and '.join(edges)}: " if edges else ""
    return [
        f"{where}{dead.sum()} of {dead.size} patches ({dead.mean():.1%}) are never context and never target, "
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
