"""Multi-block masking: several target blocks, and a large context block without them (I-JEPA, section 3, figure 4).

Legend of shapes:

    B  images in a batch        C     contexts of an image       M  target blocks of an image
    N  patches of an image      H, W  the grid, N = H * W        K  C + M blocks, the contexts first
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jepa_kit.maskers.blocks import Blocks, BoolArray, Edges, block_shape, corners, fewest_left, reach
from jepa_kit.maskers.checks import check_at_least, check_at_most, check_grid
from jepa_kit.maskers.packing import keep_first, keep_random, lengths_of, mask_batch, shortest
from jepa_kit.registry import MASKERS, check_choice
from jepa_kit.rng import IntArray, Stream, uniforms
from jepa_kit.structures import Grid, MaskBatch

SizePer = Literal["block", "image", "batch"]
Truncation = Literal["none", "released", "random", "fixed"]

ATTEMPTS = 16
"""Maximum number of draws of an image's places; then the blocks are placed so that enough context is left."""

RELEASED: dict[str, Any] = {
    "edges": "released",
    "coupled_scale_and_aspect": True,
    "size_per": "batch",
    "truncation": "released",
    "min_keep": 11,
    "min_keep_target": 11,
}
"""Options that reproduce the released masker (facebookresearch/ijepa, commit 52c1ae9; its min_keep of 10 means more
than 10). Other options have the same default there."""


@dataclass(frozen=True)
class Placement:
    """Blocks of a batch, and the number of draws of each image.

    Args:
        contexts: C blocks per image, before targets are removed.
        targets: M blocks per image.
        attempts: [B], 1 if the first draw was accepted; ``ATTEMPTS`` + 1 if none was and blocks were placed in corners.
    """

    contexts: Blocks
    targets: Blocks
    attempts: IntArray


@MASKERS.register("multiblock")
class MultiBlock:
    """Draw target blocks and context blocks; a context excludes every patch of a target.

    The defaults are the released masker's ranges without its quirks, each of which is an option; ``RELEASED`` sets all
    of them. With the defaults, the masks of an image are a pure function of (seed, epoch, sample).

    If a context has fewer than ``min_keep`` (or ``context_length``) patches, the places of the image are drawn again,
    with the same sizes. After 16 draws, all targets go into one corner of the grid and the contexts into the opposite
    one; the constructor checks that this leaves enough for all possible sizes. (The release draws the context 20 times,
    then stops excluding the last target.) Measured with the defaults over 10^6 images: none is redrawn at 14 x 14; at
    4 x 4, 1.6 % are, at most four times, and none needs the corners.

    Equivalent code for one image, if ``rng`` draws from ``Stream.MASK_SIZE``, then attempt by attempt from
    ``Stream.MASK``::

        def multiblock(rng, grid, num_targets=4, target_scale=(0.15, 0.2), target_aspect_ratio=(0.75, 1.5),
                       context_scale=(0.85, 1.0), context_aspect_ratio=(1.0, 1.0), min_keep=4):
            rows, columns = grid
            blocks = [(context_scale, context_aspect_ratio)] + num_targets * [(target_scale, target_aspect_ratio)]
            sizes = []
            for (scale, ratio), (u, v) in zip(blocks, rng.random((len(blocks), 2)), strict=True):
                area = max(1.0, rows * columns * (scale[0] + u * (scale[1] - scale[0])))
                aspect = ratio[0] + v * (ratio[1] - ratio[0])
                height = max(math.sqrt(area * aspect), area / columns)
                width = max(math.sqrt(area / aspect), area / rows)
                sizes.append((min(max(round(height), 1), rows), min(max(round(width), 1), columns)))
            for attempt in range(17):
                places = rng.random((len(blocks), 2))
                if attempt == 16:
                    places[0] = places[0] >= 0.5
                    places[1:] = 1.0 - places[0]
                cells = np.zeros((len(blocks), rows, columns), dtype=bool)
                for block, (h, w), (u, v) in zip(cells, sizes, places, strict=True):
                    top, left = min(int(u * (rows - h + 1)), rows - h), min(int(v * (columns - w + 1)), columns - w)
                    block[top : top + h, left : left + w] = True
                context = cells[0] & ~cells[1:].any(axis=0)
                if context.sum() >= min_keep:
                    return np.flatnonzero(context), [np.flatnonzero(block) for block in cells[1:]]

    Results of the paper (table 6; ImageNet 1 %, frozen linear, ViT-B/16, 300 epochs, as released): multi-block 54.2,
    rasterized 15.5, block 20.2, random 17.6. Tables 8 to 10, same protocol: target scale (0.125, 0.2) 42.4,
    (0.2, 0.25) 38.9; context scale (0.75, 1.0) 49.3, (0.4, 1.0) 31.2; targets 1, 2, 3, 4: 9.0, 22.0, 48.5, 54.2.
    The effect of the corrections on these numbers is not known.

    Args:
        grid: (H, W), each at least 4.
        num_targets: M, target blocks of an image. They may overlap.
        target_scale: area of a target block over the grid's, 0 to 1.
        target_aspect_ratio: height over width of a target block.
        num_contexts: C. Each target block is predicted from each context of its image.
        context_scale: area of a context block over the grid's, before targets are removed.
        context_aspect_ratio: height over width of a context block.
        min_keep: minimum number of context patches, before truncation.
        min_keep_target: minimum number of patches of a target block.
        allow_overlap: whether contexts may contain patches of targets.
        edges: "inclusive" places blocks anywhere in the grid; "released" never touches the last row and the last column
            of patches (see blocks.py).
        coupled_scale_and_aspect: use one random number for scale and aspect ratio, as released, so that larger blocks
            are always taller.
        size_per: which blocks have the same size (contexts and targets are drawn separately): "block" none, "image"
            those of an image, "batch" those of a batch, as released, as a function of (seed, step).
        truncation: "none" keeps contexts of different lengths. "released" truncates each context to the shortest of the
            batch, keeping the first patches in row-major order, which drops the bottom of the image. "random" drops
            random patches instead. "fixed" keeps ``context_length`` random patches. With "released" and "random",
            masks depend on the whole batch. Targets are not truncated (the released ones have one size).
        context_length: patches of a context, for truncation "fixed". Images with fewer are redrawn, so that targets
            overlap more: at 14 x 14, 0.5 % of the images for 50 patches, 3.5 % for 60, 30 % for 80, and 70 % for 100
            (of which 19 % need the corners).
        target_length: random patches of a target, for truncation "fixed"; None keeps whole targets.

    Raises:
        ValueError: an option is out of its range or an unknown choice; some sizes cannot leave ``min_keep`` or
            ``context_length`` patches of context, or ``min_keep_target`` or ``target_length`` of a target; a length is
            given without truncation "fixed", or "fixed" without ``context_length``.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect_ratio: tuple[float, float] = (0.75, 1.5),
        num_contexts: int = 1,
        context_scale: tuple[float, float] = (0.85, 1.0),
        context_aspect_ratio: tuple[float, float] = (1.0, 1.0),
        min_keep: int = 4,
        min_keep_target: int = 1,
        allow_overlap: bool = False,
        edges: Edges = "inclusive",
        coupled_scale_and_aspect: bool = False,
        size_per: SizePer = "block",
        truncation: Truncation = "none",
        context_length: int | None = None,
        target_length: int | None = None,
    ) -> None:
        self.grid = check_grid(grid)
        self.num_targets = check_at_least("num_targets", num_targets, 1)
        self.num_contexts = check_at_least("num_contexts", num_contexts, 1)
        self.min_keep = check_at_least("min_keep", min_keep, 1)
        self.min_keep_target = check_at_least("min_keep_target", min_keep_target, 1)
        check_choice("edges", edges, Edges)
        check_choice("size_per", size_per, SizePer)
        check_choice("truncation", truncation, Truncation)
        self.allow_overlap, self.edges, self.size_per, self.truncation = allow_overlap, edges, size_per, truncation
        self.coupled = coupled_scale_and_aspect
        self.context_length, self.target_length = context_length, target_length
        self.needed = max(self.min_keep, context_length or 0)
        """Minimum number of context patches, before truncation."""
        self._check_lengths()

        self.target_shape = block_shape("target", self.grid, target_scale, target_aspect_ratio, edges)
        self.context_shape = block_shape("context", self.grid, context_scale, context_aspect_ratio, edges)
        self._check_targets()
        self._check_context()

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch.

        Args:
            samples: [B] index of each image in its data set.
            seed: seed of the run.
            epoch: epoch of the images.
            step: step of the run; used only with ``size_per="batch"``.
        """
        placement = self.place(samples, *self.sizes(samples, seed=seed, epoch=epoch, step=step), seed=seed, epoch=epoch)
        return self.cut(samples, placement, seed=seed, epoch=epoch)

    def before_truncation(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a call before truncation."""
        whole = copy.copy(self)
        whole.truncation = "none"
        return whole(samples, seed=seed, epoch=epoch, step=step)

    def sizes(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> tuple[IntArray, IntArray]:
        """Return height and width of all blocks, [K, B] each, contexts first."""
        contexts, blocks = self.num_contexts, self.num_contexts + self.num_targets
        if self.size_per == "batch":
            u = uniforms(Stream.MASK_SIZE, np.array([step]), 4, seed=seed, epoch=0).reshape(2, 2, 1)
        else:
            drawn = 2 if self.size_per == "image" else blocks
            u = uniforms(Stream.MASK_SIZE, samples, 2 * drawn, seed=seed, epoch=epoch).T.reshape(drawn, 2, -1)
        if self.size_per != "block":
            u = np.repeat(u, (contexts, self.num_targets), axis=0)
        u_scale, u_aspect = u[:, 0], u[:, 0 if self.coupled else 1]  # [K, B]
        c = self.context_shape.size(u_scale[:contexts], u_aspect[:contexts])
        t = self.target_shape.size(u_scale[contexts:], u_aspect[contexts:])
        height, width = np.broadcast_to(np.hstack([c, t]), (2, blocks, len(samples)))
        return height, width

    def place(self, samples: IntArray, height: IntArray, width: IntArray, *, seed: int, epoch: int) -> Placement:
        """Draw the places of blocks of these sizes.

        Args:
            samples: [B].
            height, width: [K, B], contexts first, from ``sizes``.
        """
        samples, size = np.asarray(samples), np.stack([height, width])  # [2, K, B]
        corner = self._draw(samples, size, seed=seed, epoch=epoch, attempt=0)
        attempts = np.ones(len(samples), dtype=np.int64)
        bad = np.flatnonzero(self._too_short(corner, size))
        for attempt in range(1, ATTEMPTS + 1):
            if not bad.size:
                break
            attempts[bad] += 1
            draw = self._draw if attempt < ATTEMPTS else self._opposite
            again = draw(samples[bad], size[..., bad], seed=seed, epoch=epoch, attempt=attempt)
            corner[..., bad] = again
            bad = bad[self._too_short(again, size[..., bad])]
        c = self.num_contexts
        contexts, targets = (self._blocks(corner[:, k], size[:, k]) for k in (slice(c), slice(c, None)))
        return Placement(contexts, targets, attempts)

    def cut(self, samples: IntArray, placement: Placement, *, seed: int, epoch: int) -> MaskBatch:
        """Remove targets from contexts, truncate sets, and pack them."""
        targets = placement.targets.cells()  # [M, B, N]
        context = placement.contexts.cells()  # [C, B, N]
        if not self.allow_overlap:
            context &= ~targets.any(axis=0)
        if self.truncation == "released":
            context = keep_first(context, shortest(context))
        elif self.truncation == "random":
            context = self._keep(samples, context, shortest(context), lane=0, seed=seed, epoch=epoch)
        elif self.truncation == "fixed":
            context = self._keep(samples, context, self.context_length, lane=0, seed=seed, epoch=epoch)
            targets = self._keep(samples, targets, self.target_length, lane=1, seed=seed, epoch=epoch)
        return mask_batch(context, targets, self.grid)

    def _keep(
        self, samples: IntArray, sets: BoolArray, count: int | None, *, lane: int, seed: int, epoch: int
    ) -> BoolArray:
        """Keep ``count`` random patches of each set [*, B, N]; all if it is None."""
        if count is None:
            return sets
        k, b, n = sets.shape
        u = uniforms(Stream.MASK_DROP, samples, k * n, seed=seed, epoch=epoch, attempt=lane)  # [B, K * N]
        return keep_random(sets, count, np.moveaxis(u.reshape(b, k, n), 1, 0))

    def _blocks(self, corner: IntArray, size: IntArray) -> Blocks:
        return Blocks(corner[0], corner[1], size[0], size[1], self.grid)

    def _draw(self, samples: IntArray, size: IntArray, *, seed: int, epoch: int, attempt: int) -> IntArray:
        """Draw the first row and column of blocks of these sizes: [2, K, B] -> [2, K, B]."""
        k = size.shape[1]
        u = uniforms(Stream.MASK, samples, 2 * k, seed=seed, epoch=epoch, attempt=attempt).T  # [2 * K, B]
        return corners(u.reshape(k, 2, -1).swapaxes(0, 1), size, np.array(self.grid)[:, None, None], self.edges)

    def _opposite(self, samples: IntArray, size: IntArray, *, seed: int, epoch: int, attempt: int) -> IntArray:
        """Place contexts at one end of each side of the grid, targets at the other: -> [2, K, B]."""
        u = uniforms(Stream.MASK, samples, 2, seed=seed, epoch=epoch, attempt=attempt).T  # [2, B]
        at_start = np.repeat(np.stack([u < 0.5, u >= 0.5], axis=1), (self.num_contexts, self.num_targets), axis=1)
        return np.where(at_start, 0, np.array(reach(self.grid, self.edges))[:, None, None] - size)

    def _too_short(self, corner: IntArray, size: IntArray) -> BoolArray:
        """Return whether a context of the image has too few patches, [B]."""
        c = self.num_contexts
        area = size[0] * size[1]
        covered = 0 if self.allow_overlap else area[c:].sum(axis=0)
        short: BoolArray = (area[:c] - covered).min(axis=0) < self.needed
        # Count patches only if targets without overlap would leave too few.
        at = np.flatnonzero(short)
        if at.size and not self.allow_overlap:
            cells = self._blocks(corner[..., at], size[..., at]).cells()
            left_over = cells[:c] & ~cells[c:].any(axis=0)
            short[at] = lengths_of(left_over).min(axis=0) < self.needed
        return short

    def _check_lengths(self) -> None:
        if self.truncation == "fixed" and self.context_length is None:
            raise ValueError("context_length (=None) must be a number of patches for truncation='fixed'")
        for name, value in (("context_length", self.context_length), ("target_length", self.target_length)):
            if value is not None and self.truncation != "fixed":
                raise ValueError(
                    f"{name} (={value}) is only for truncation='fixed', not {self.truncation!r}; leave it out"
                )
            if value is not None:
                check_at_least(name, value, 1)

    def _check_targets(self) -> None:
        """Check that the smallest possible target block has enough patches."""
        h, w = min(self.target_shape.bounds(largest=False, coupled=self.coupled), key=lambda size: size[0] * size[1])
        rows, columns = self.grid
        why = f"target_scale (={self.target_shape.scale}) can draw a block of {h} x {w} patches"
        for name, least in (("min_keep_target", self.min_keep_target), ("target_length", self.target_length or 0)):
            check_at_most(name, least, h * w, f": on a grid of {rows} x {columns}, {why}")

    def _check_context(self) -> None:
        """Check that blocks in opposite corners leave enough patches to every possible context."""
        contexts = self.context_shape.bounds(largest=False, coupled=self.coupled)
        targets = [] if self.allow_overlap else self.target_shape.bounds(largest=True, coupled=self.coupled)
        stacked = self.size_per == "block" and self.num_targets > 1
        (h, w), most = fewest_left(contexts, targets, reach(self.grid, self.edges), stacked=stacked)
        name = "context_length" if (self.context_length or 0) > self.min_keep else "min_keep"
        why = (
            f" on a grid of {self.grid[0]} x {self.grid[1]}: "
            f"a context block of {h} x {w} patches, the smallest of context_scale (={self.context_shape.scale}), "
            f"may be left with no more beside the largest targets of target_scale (={self.target_shape.scale}); "
            "or make targets smaller, or the context larger"
        )
        check_at_most(name, self.needed, most, why)
