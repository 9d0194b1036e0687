"""Multi-group masking: G groups of n target blocks, each with its own context (V-JEPA). B images, N patches."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np

from jepa_kit.maskers.blocks import Blocks, BlockShape, BoolArray, corners, fewest_left
from jepa_kit.maskers.checks import check_aspect_ratio, check_at_least, check_at_most, check_grid, check_scale
from jepa_kit.maskers.packing import keep_first, lengths_of, mask_batch
from jepa_kit.registry import MASKERS, check_choice
from jepa_kit.rng import FloatArray, IntArray, Stream, uniforms
from jepa_kit.structures import Grid, MaskBatch

Predict = Literal["union", "blocks"]
SizePer = Literal["block", "batch"]
Truncation = Literal["none", "released"]

ATTEMPTS = 16  # redraws of a group's places before all its blocks go into one corner

RELEASED: dict[str, Any] = {"size_per": "batch", "truncation": "released"}
"""Options that draw as the released masker (facebookresearch/vjepa2, commit c2963a4) in one frame."""


@MASKERS.register("multigroup")
class MultiGroup:
    """Draw groups of target blocks; a group's context is every patch that none of its blocks covers.

    Source: V-JEPA (Bardes et al. 2024, arXiv 2404.08471), in space only: 8 short-range blocks of 0.15 of the image, 2
    long-range ones of 0.7, aspect ratios in (0.75, 1.5). The context encoder encodes an image once per group.
    The defaults are corrected; ``RELEASED`` lists the options of the released code.

    If a group leaves fewer than ``min_keep`` patches, its places are drawn again, with the same sizes; after 16 draws
    all its blocks go into one corner (the released code draws again until a patch is left). Results on images: not
    published, not measured here.

    Args:
        grid: (H, W), each at least 4.
        num_targets: number of blocks of each group.
        target_scale: for each group, the range of a block's area over the grid's, 0 to 1.
        target_aspect_ratio: height over width of every block. A block that does not fit keeps its area.
        min_keep: minimum number of context patches.
        predict: "union" makes one target set per group, as V-JEPA does; "blocks" one per block.
        size_per: "block" draws a size for each block; "batch" one for all blocks of a group in a batch, as released, as
            a function of (seed, step).
        truncation: "none" keeps sets of different lengths. "released" truncates contexts and targets of each group to
            the shortest of the batch, keeping the first patches in row-major order: the bottom of most images is in
            neither, and masks depend on the whole batch.

    Raises:
        ValueError: an option is out of its range or an unknown choice, the options differ in their number of groups, or
            blocks cannot leave ``min_keep`` patches.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        num_targets: tuple[int, ...] = (8, 2),
        target_scale: tuple[tuple[float, float], ...] = ((0.15, 0.15), (0.7, 0.7)),
        target_aspect_ratio: tuple[float, float] = (0.75, 1.5),
        min_keep: int = 1,
        predict: Predict = "union",
        size_per: SizePer = "block",
        truncation: Truncation = "none",
    ) -> None:
        self.grid = check_grid(grid)
        self.min_keep = check_at_least("min_keep", min_keep, 1)
        check_choice("predict", predict, Predict)
        check_choice("size_per", size_per, SizePer)
        check_choice("truncation", truncation, Truncation)
        self.size_per, self.truncation = size_per, truncation
        self.predict, self.num_targets = predict, tuple(num_targets)
        if not num_targets or len(num_targets) != len(target_scale):
            given = f"num_targets (={self.num_targets}) and target_scale (={target_scale})"
            raise ValueError(f"{given} must have an entry for each group")
        ratio = check_aspect_ratio("target_aspect_ratio", target_aspect_ratio)
        self.shapes: list[BlockShape] = []
        for g, (n, scale) in enumerate(zip(num_targets, target_scale, strict=True)):
            check_at_least(f"num_targets[{g}]", n, 1)
            shape = BlockShape(self.grid, check_scale(f"target_scale[{g}]", scale, self.grid), ratio, "inclusive")
            self.shapes.append(shape)
            stacked = n > 1 and size_per == "block"
            _, most = fewest_left([self.grid], shape.bounds(largest=True, coupled=False), self.grid, stacked=stacked)
            why = f"the largest blocks of target_scale[{g}] (={shape.scale}) may leave no more; or reduce it"
            check_at_most("min_keep", min_keep, most, f" on a grid of {grid[0]} x {grid[1]}: {why}")

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. ``step`` is used only with ``size_per="batch"``."""
        groups = [self._group(g, np.asarray(samples), seed, epoch, step) for g in range(len(self.shapes))]
        union = np.stack([covered for _, covered in groups])  # [G, B, N]
        targets = union if self.predict == "union" else np.concatenate([cells for cells, _ in groups])
        context = ~union
        if self.truncation == "released":
            context, targets = (keep_first(x, lengths_of(x).min(axis=1)[:, None, None]) for x in (context, targets))
        sets = [1 if self.predict == "union" else n for n in self.num_targets]  # of each group
        return mask_batch(context, targets, self.grid, of=np.repeat(range(len(sets)), sets).tolist())

    def before_truncation(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a call before truncation."""
        whole = copy.copy(self)
        whole.truncation = "none"
        return whole(samples, seed=seed, epoch=epoch, step=step)

    def _group(self, g: int, samples: IntArray, seed: int, epoch: int, step: int) -> tuple[BoolArray, BoolArray]:
        """Return the patches of each block of a group [n, B, N], and their union [B, N]."""
        n, groups = self.num_targets[g], len(self.shapes)
        u = uniforms(Stream.MASK, samples, 4 * n, seed=seed, epoch=epoch, attempt=g).T  # [4 * n, B]
        drawn = u[: 2 * n]
        if self.size_per == "batch":
            drawn = uniforms(Stream.MASK_SIZE, np.array([step]), 2, seed=seed, epoch=0, attempt=g).T.repeat(n, axis=0)
        size = np.stack(self.shapes[g].size(drawn[:n], drawn[n:]))  # [2, n, B], or [2, n, 1]
        size = np.broadcast_to(size, (2, n, len(samples)))
        cells = self._place(u[2 * n :], size)
        union = np.logical_or.reduce(cells)
        most = union.shape[1] - self.min_keep
        bad = np.flatnonzero(lengths_of(union) > most)
        for attempt in range(1, ATTEMPTS + 1):
            if not bad.size:
                break
            u = uniforms(Stream.MASK, samples[bad], 2 * n, seed=seed, epoch=epoch, attempt=attempt * groups + g).T
            if attempt == ATTEMPTS:  # all blocks into one corner
                u = np.where(u[[0] * n + [n] * n] < 0.5, 0.0, 1 - 2.0**-32)
            again = self._place(u, size[..., bad])
            cells[:, bad], union[bad] = again, np.logical_or.reduce(again)
            bad = bad[lengths_of(union[bad]) > most]
        return cells, union

    def _place(self, u: FloatArray, size: IntArray) -> BoolArray:
        """Place blocks of sizes [2, n, B] by numbers [2 * n, B], rows first: -> [n, B, N]."""
        top, left = corners(u.reshape(size.shape), size, np.array(self.grid)[:, None, None], "inclusive")
        return Blocks(top, left, size[0], size[1], self.grid).cells()
