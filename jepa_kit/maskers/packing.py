"""Convert boolean tables of patches to packed sets, and truncate sets.

Legend of shapes: as in blocks.py, and

    C  contexts of an image     M  target blocks of an image     S  sets     P  patches of all sets together
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from jepa_kit.maskers.blocks import BoolArray
from jepa_kit.rng import FloatArray, IntArray
from jepa_kit.structures import Grid, MaskBatch, PatchSets


def mask_batch(context: BoolArray, targets: BoolArray, grid: Grid, *, of: Sequence[int] | None = None) -> MaskBatch:
    """Pack the masks of a batch, block by block, in the order of the release.

    Args:
        context: [C, B, N], the patches of each context.
        targets: [M, B, N], the patches of each target block.
        of: for each of the M blocks, the context that it is predicted from; None for all C.

    Returns:
        Context set c * B + b; target set (m * C + c) * B + b, predicted from context set c * B + b. With ``of``,
        target set m * B + b, predicted from context set of[m] * B + b. Patches ascend.

    Raises:
        ValueError: a set is empty, or there is no image.
    """
    contexts, batch_size, patches = context.shape
    if not batch_size:
        raise ValueError("samples (=[]) must name at least one image")
    if of is None:
        of = [*range(contexts)] * len(targets)
        targets = targets if contexts == 1 else np.repeat(targets, contexts, axis=0)  # [M * C, B, N]
    pair = (torch.tensor(of)[:, None] * batch_size + torch.arange(batch_size)).flatten()
    sets = (context.reshape(-1, patches), targets.reshape(-1, patches))
    first, second = (PatchSets.from_mask(x, np.arange(len(x)) % batch_size) for x in sets)
    return MaskBatch(first, second, grid, pair)


def keep_first(sets: BoolArray, count: int | IntArray) -> BoolArray:
    """Keep the first ``count`` patches (a number, or [..., 1]) of each set in row-major order: [..., N] -> [..., N]."""
    return sets & (np.cumsum(sets, axis=-1, dtype=np.int32) <= count)


def keep_random(sets: BoolArray, count: int, u: FloatArray) -> BoolArray:
    """Keep ``count`` random patches of each set; no set may have fewer.

    Args:
        sets: [..., N].
        u: [..., N] in [0, 1), multiples of 2**-32 as ``rng.uniforms`` gives them.
    """
    patches = sets.shape[-1]
    # The place breaks ties between equal numbers: N is below 2**20, so the sum is exact.
    keys = np.where(sets, u + np.arange(patches) * 2.0**-52, 2.0)
    last: FloatArray = np.partition(keys, count - 1, axis=-1)[..., count - 1 : count]
    return keys <= last


def lengths_of(sets: BoolArray) -> IntArray:
    """Return the number of patches of each set: [..., N] -> [...]."""
    narrow = np.uint16 if sets.shape[-1] < 2**16 else np.int64  # narrow sums are several times as fast
    return sets.view(np.uint8).sum(axis=-1, dtype=narrow).astype(np.int64)


def shortest(sets: BoolArray) -> int:
    """Return the number of patches of the smallest set [..., N]; N if there is no set."""
    return int(lengths_of(sets).min(initial=sets.shape[-1]))


def join(parts: Sequence[tuple[MaskBatch, IntArray]], grid: Grid) -> MaskBatch:
    """Join masks of parts of a batch.

    Args:
        parts: masks, and the index in the batch of each of their images; every image once.

    Returns:
        The first context set of every image, then the second of those that have one, and so on; targets likewise.

    Raises:
        ValueError: there is no image.
    """
    if not parts:
        raise ValueError("samples (=[]) must name at least one image")
    context, place = _interleave([(masks.context, at) for masks, at in parts])
    targets, target_place = _interleave([(masks.targets, at) for masks, at in parts])
    first = np.cumsum([0, *(len(masks.context) for masks, _ in parts)])
    of = np.concatenate([masks.context_of.numpy() + start for (masks, _), start in zip(parts, first, strict=False)])
    pair = np.empty(len(targets), dtype=np.int64)
    pair[target_place] = place[of]
    return MaskBatch(context, targets, grid, torch.from_numpy(pair))


def _interleave(parts: Sequence[tuple[PatchSets, IntArray]]) -> tuple[PatchSets, IntArray]:
    """Return the sets of all parts, ordered by index within the image, then by image; and the new index of each [S]."""
    image = np.concatenate([at[sets.image.numpy()] for sets, at in parts])
    ascending = np.arange(len(image))
    order = np.argsort(image, kind="stable")
    count = np.bincount(image)
    if len(count) < len(image):  # else the sets are one of each image
        number = np.empty_like(image)  # of each set within its image
        number[order] = ascending - np.repeat(np.cumsum(count) - count, count)
        number *= len(count)
        number += image
        order = np.argsort(number)
    place = np.empty_like(order)
    place[order] = ascending
    numbered = [replace(sets, image=torch.from_numpy(at[sets.image.numpy()])) for sets, at in parts]
    return PatchSets.cat(numbered).take(order), place
