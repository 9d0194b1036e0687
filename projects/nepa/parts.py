"""What NEPA adds to jepa_kit: all patches of an image as one sequence, and predictions one patch ahead.

P_c, P_t = packed patches of the sequences, and all of them but the first of each    D = width
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from jepa_kit.maskers.checks import check_grid
from jepa_kit.registry import MASKERS, PREDICTORS
from jepa_kit.rng import IntArray
from jepa_kit.structures import Grid, MaskBatch, PatchSets


@MASKERS.register("sequence")
class Sequence:
    """Show all patches, in raster order, and predict all but the first: nothing is hidden and nothing is drawn.

    The encoder must be causal, or it sees what it predicts.

    Args:
        grid: (H, W), each at least 4.
    """

    allow_overlap = True

    def __init__(self, *, grid: Grid) -> None:
        self.grid = check_grid(grid)

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. Only the number of samples counts."""
        images, patches = len(samples), self.grid[0] * self.grid[1]
        later = np.broadcast_to(np.arange(patches) > 0, (images, patches))
        targets = PatchSets.from_mask(later, np.arange(images))
        return MaskBatch(PatchSets.full(images, patches), targets, self.grid, torch.arange(images))


@PREDICTORS.register("next_patch")
class NextPatch(nn.Module):
    """Take the encoder's token of the patch before as the prediction of a patch; there are no weights.

    With other masks than those of ``sequence``, as pictures of a run have them, it is the last patch before the target
    that is in the context.

    Args:
        embed_dim, out_dim: D, the encoder's and the target's width, which must be equal; supplied by the recipe.

    Raises:
        ValueError: the widths differ; or, in a call, no patch of the context is before a target.
    """

    def __init__(self, *, embed_dim: int, out_dim: int) -> None:
        super().__init__()
        if out_dim != embed_dim:
            raise ValueError(f"out_dim (={out_dim}) of the target must be the encoder's width (={embed_dim})")

    def forward(self, context: Tensor, masks: MaskBatch) -> Tensor:
        """[P_c, D] packed as ``masks.context`` -> [P_t, D] packed as ``masks.targets``."""
        host = masks.host()
        if host is not None and not _are_before(host):
            raise ValueError(
                "predictor 'next_patch' needs masker {name: sequence}: patches of a context must be in raster order, "
                "and one of them before each target"
            )
        return context.index_select(0, rows_before(masks))


def rows_before(masks: MaskBatch) -> Tensor:
    """Return the row of the last patch before each target in its context, [P_t] indices of the packed context."""
    keys, targets = _keys(masks)
    return torch.searchsorted(keys, targets) - 1


def _keys(masks: MaskBatch) -> tuple[Tensor, Tensor]:
    """Return numbers of context patches [P_c], which ascend, and of targets [P_t]: set by set, then in raster order."""
    patches = masks.grid[0] * masks.grid[1]
    of_targets = masks.context_of[masks.targets.lengths.set_of_token]
    context = masks.context.lengths.set_of_token * patches + masks.context.index
    return context, of_targets * patches + masks.targets.index


def _are_before(masks: MaskBatch) -> bool:
    """Return whether context patches are in raster order and one is before each target, of masks on the host."""
    rows, (keys, _) = rows_before(masks), _keys(masks)
    first = masks.context.lengths.offsets[masks.context_of][masks.targets.lengths.set_of_token]
    return bool((keys.diff() > 0).all() and (rows >= first).all())
