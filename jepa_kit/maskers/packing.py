"""From tables of booleans, one row of patches a set, to packed sets of patches; and the ways to cut sets.

Legend of shapes: as in blocks.py, and

    C  contexts of an image     M  target blocks of an image     S  sets     P  patches of all sets together
"""

from __future__ import annotations

import numpy as np
import torch

from jepa_kit.maskers.blocks import BoolArray
from jepa_kit.rng import FloatArray, IntArray
from jepa_kit.structures import Grid, MaskBatch, PatchSets, SetLengths


def mask_batch(context: BoolArray, targets: BoolArray, grid: Grid) -> MaskBatch:
    """Packs the masks of a batch, block by block as the release orders them.

    Args:
        context: [C, B, N], the patches of each context.
        targets: [M, B, N], the patches of each target block.

    Returns:
        Context set c * B + b; target set (m * C + c) * B + b, predicted from context set c * B + b. Patches ascend.

    Raises:
        ValueError: an empty set, or no image.
    """
    contexts, batch_size, patches = context.shape
    if not batch_size:
        raise ValueError("samples (=[]) must name at least one image")
    blocks = len(targets)
    if contexts > 1:
        targets = np.repeat(targets, contexts, axis=0)  # [M * C, B, N]
    pair = torch.arange(contexts * batch_size).repeat(blocks)
    return MaskBatch(
        _pack(context.reshape(-1, patches), batch_size),
        _pack(targets.reshape(-1, patches), batch_size),
        grid,
        pair,
    )


def _pack(sets: BoolArray, batch_size: int) -> PatchSets:
    """[S, N] booleans to packed sets; set s belongs to image s % B."""
    count, patches = sets.shape
    flat = np.flatnonzero(sets)  # [P]
    starts = np.arange(count + 1) * patches
    lengths = np.diff(np.searchsorted(flat, starts))
    index = flat - np.repeat(starts[:-1], lengths)
    return PatchSets(
        torch.from_numpy(index),
        torch.arange(batch_size).repeat(count // batch_size),
        SetLengths(lengths.tolist()),
    )


def keep_first(sets: BoolArray, count: int) -> BoolArray:
    """The first ``count`` patches of each set in row-major order. [..., N] -> [..., N]"""
    return sets & (np.cumsum(sets, axis=-1, dtype=np.int32) <= count)


def keep_random(sets: BoolArray, count: int, u: FloatArray) -> BoolArray:
    """``count`` patches of each set, every choice equally likely; no set may hold fewer.

    Args:
        sets: [..., N].
        u: [..., N] in [0, 1), multiples of 2**-32 as ``rng.uniforms`` gives them.
    """
    patches = sets.shape[-1]
    # Patches that drew the same number are told apart by their place: N is below 2**20, so the sum is exact.
    keys = np.where(sets, u + np.arange(patches) * 2.0**-52, 2.0)
    last: FloatArray = np.partition(keys, count - 1, axis=-1)[..., count - 1 : count]
    return keys <= last


def lengths_of(sets: BoolArray) -> IntArray:
    """[..., N] -> [...]: patches in each set."""
    lengths: IntArray = sets.view(np.uint8).sum(axis=-1, dtype=np.int64)
    return lengths


def shortest(sets: BoolArray) -> int:
    """[..., N]: patches in the smallest of the sets; N where there is none."""
    return int(lengths_of(sets).min(initial=sets.shape[-1]))
