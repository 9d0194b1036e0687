"""Count what a masker draws, over many masks.

B  images of a batch      H, W  the grid, N = H * W patches     S  sets
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.config import Config
from jepa_kit.evaluation.masks.cost import Lengths, cost_of
from jepa_kit.evaluation.masks.report import MaskReport, Probabilities
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.interfaces import Masker
from jepa_kit.maskers import MultiBlock
from jepa_kit.rng import IntArray
from jepa_kit.structures import Grid, MaskBatch, PatchSets

SMALL_BATCH = 8
"""Images of the small batch that ``_by_batch`` compares with."""


def mask_report(config: Config, *, images: int = 2048, images_per_batch: int = 128) -> MaskReport:
    """Return statistics of the masks that a config's masker draws.

    Args:
        config: its masker, grid, networks (for the cost) and seed are used.
        images: how many to draw, rounded up to whole batches; the first samples of epoch 0.
        images_per_batch: of a process; matters to maskers that share something across a batch.

    Raises:
        ValueError: if a number is below 1, or the masker rejects its options.
    """
    for name, value in (("images", images), ("images_per_batch", images_per_batch)):
        if value < 1:
            raise ValueError(f"{name} (={value}) must be at least 1")
    masker = build_masker(config)
    part = config.slots["masker"]
    with torch.device("meta"):
        jepa = build_recipe(config)
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
    context, targets = lengths["context"], lengths["targets"]
    encoded, sequences = lengths.pop("encoded"), lengths.pop("sequences")
    by_batch = _by_batch(masker, config.train.seed, images_per_batch, batches)
    shared_size = _shared_size(counts.sides)
    sides = np.concatenate(counts.sides)  # [S_t, 2], zero where a target is no rectangle
    shapes = Counter(map(tuple, sides[sides[:, 0] > 0].tolist()))
    tables = (counts.in_context / len(context), counts.in_target / total, counts.in_none / total)
    return MaskReport(
        masker={"name": part.name, **part.options},
        grid=masker.grid,
        images=total,
        images_per_batch=images_per_batch,
        probability=Probabilities(*(table.reshape(masker.grid) for table in tables)),
        **lengths,
        standard_errors=counts.standard_errors(lengths) if shared_size or len(by_batch) > 1 else {},
        sets_per_image=(len(context) / total, len(targets) / total),
        shapes={(h, w): n / len(targets) for (h, w), n in shapes.items()},
        overlap=counts.covered_twice / counts.covered,
        context_blocks=_context_blocks(masker, config.train.seed),
        reached=_missing_shapes(masker, config.train.seed),
        by_batch=by_batch,
        shared_size=shared_size,
        cost=cost_of(jepa, Lengths(encoded, targets, sequences, total, masker.grid[0] * masker.grid[1])),
    )


class _Counts:
    """Counts of patches and lengths of sets, over batches."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        patches = grid[0] * grid[1]
        self.in_context, self.in_target, self.in_none = np.zeros((3, patches), dtype=np.int64)
        self.lengths: defaultdict[str, list[IntArray]] = defaultdict(list)  # of each kind of set, batch by batch
        self.sides: list[IntArray] = []
        self.covered = self.covered_twice = 0

    def add(self, masks: MaskBatch, before: MaskBatch) -> None:
        batch_size = int(masks.context.image.max()) + 1
        shown = _shown(masks.context)
        seen = self._count(shown, shown.image, batch_size)  # [B, N], as the next
        aimed_at = self._count(masks.targets, masks.targets.image, batch_size)
        self.in_context += seen.sum(0)
        self.in_target += (aimed_at > 0).sum(0)
        self.in_none += (seen + aimed_at == 0).sum(0)
        times = self._count(masks.targets, masks.context_of, len(masks.context))  # [S_c, N]: targets of a context
        self.covered += int((times > 0).sum())
        self.covered_twice += int((times > 1).sum())
        for name, sets in (
            ("context_before", _shown(before.context).lengths),
            ("context", shown.lengths),
            ("encoded", masks.context.lengths),
            ("targets_before", before.targets.lengths),
            ("targets", masks.targets.lengths),
            ("sequences", masks.sequences),
        ):
            self.lengths[name].append(sets.each)
        cells = self._count(masks.targets, torch.arange(len(masks.targets)), len(masks.targets))  # [S_t, N], 0 or 1
        self.sides.append(rectangles(cells > 0, self.grid))

    def _count(self, sets: PatchSets, owner: Tensor, owners: int) -> IntArray:
        """Return [owners, N]: in how many sets of each owner a patch is; ``owner`` [S] is the owner of each set."""
        patches = self.grid[0] * self.grid[1]
        at = owner.numpy()[sets.lengths.set_of_token.numpy()] * patches + sets.index.numpy()
        return np.bincount(at, minlength=owners * patches).reshape(owners, patches)

    def standard_errors(self, names: Iterable[str]) -> dict[str, float]:
        """Return the standard errors of mean lengths, from the means of batches."""
        means = {name: np.array([batch.mean() for batch in self.lengths[name]]) for name in names}
        return {name: float(x.std(ddof=1) / len(x) ** 0.5) for name, x in means.items() if len(x) > 1}


def _shown(sets: PatchSets) -> PatchSets:
    """Return the sets without their mask tokens."""
    return sets if sets.hidden is None else sets.select(~sets.hidden)


def rectangles(sets: NDArray[np.bool_], grid: Grid) -> IntArray:
    """Return [S, 2]: height and width of each set [S, N] that is a filled rectangle, (0, 0) for the others."""
    cells = sets.reshape(-1, *grid)
    sides = []
    for axis in (2, 1):
        line: NDArray[np.bool_] = np.asarray(cells.any(axis=axis))  # [S, H], then [S, W]
        first, last = line.argmax(1), line.shape[1] - line[:, ::-1].argmax(1)
        sides.append(last - first)
    size = np.stack(sides, axis=1)
    return np.where((size.prod(1) == sets.sum(1))[:, None], size, 0)


def _context_blocks(masker: Masker, seed: int) -> int | None:
    """Return the number of different context blocks in 1024 images; None if the masker is no ``multiblock``."""
    if not isinstance(masker, MultiBlock):
        return None
    blocks = []
    for step in range(64):
        samples = np.arange(16 * step, 16 * step + 16)
        sizes = masker.sizes(samples, seed=seed, epoch=0, step=step)
        drawn = masker.place(samples, *sizes, seed=seed, epoch=0).contexts
        blocks.append(np.stack([drawn.top, drawn.left, drawn.height, drawn.width]).reshape(4, -1))
    return np.unique(np.concatenate(blocks, axis=1), axis=1).shape[1]


def _missing_shapes(masker: Masker, seed: int) -> tuple[int, int] | None:
    """Return the numbers of shapes that targets have, and would have if scale and aspect ratio were independent.

    The latter includes shapes that at least one block in 100 would have.
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
    """Return the mean context of the same images by the size of batches; only the given size if it never differs."""
    sizes = sorted({1, 32, 128, images_per_batch})
    other = SMALL_BATCH if images_per_batch != SMALL_BATCH else 2 * SMALL_BATCH
    given, small = (_contexts(masker, seed, size, max(sizes), steps=2) for size in (images_per_batch, other))
    if np.array_equal(given, small):
        return {images_per_batch: float(given.mean())}
    return {size: float(_contexts(masker, seed, size, max(sizes), steps=steps).mean()) for size in sizes}


def _contexts(masker: Masker, seed: int, images_per_batch: int, images_per_step: int, *, steps: int) -> IntArray:
    """Return the lengths of contexts in the order of images, drawn ``images_per_batch`` at a time.

    The step depends on the image alone, so that batches of any size draw the same.
    """
    lengths = []
    for step in range(steps):
        of_step = np.arange(step * images_per_step, (step + 1) * images_per_step)
        for samples in np.split(of_step, range(images_per_batch, images_per_step, images_per_batch)):
            sets = _shown(masker(samples, seed=seed, epoch=0, step=step).context)
            lengths.append(sets.lengths.each[np.argsort(sets.image.numpy(), kind="stable")])
    return np.concatenate(lengths)


def _shared_size(sides: list[IntArray]) -> bool:
    shapes = [np.unique(batch, axis=0) for batch in sides if len(batch) > 1]
    if not all(len(shape) == 1 and shape[0, 0] for shape in shapes):
        return False
    return len({tuple(shape[0]) for shape in shapes}) > 1
