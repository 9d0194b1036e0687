"""One vector for each image, or set of patches: what heads of joint-embedding methods map, and probes classify.

S = sets of patches    D = width of the encoder    H, W = rows and columns of patches
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.interfaces import Encoder
from jepa_kit.structures import PatchSets, View


def pooled(encoder: nn.Module, images: Tensor, patches: PatchSets | None = None) -> Tensor:
    """Return the class token of each set if the encoder has one, else the mean over the set's patches: -> [S, D].

    Args:
        encoder: has a class token if its attribute ``class_token`` is true.
        images: [B, C, h, w], normalised.
        patches: the sets to encode; None for all patches of each image, so that S is B.
    """
    network = cast(Encoder, encoder)
    if getattr(encoder, "class_token", False):
        return network.forward_tokens(images, patches)[0].prefix[:, 0]
    tokens = network(images, patches)
    return tokens.unflatten(0, (len(images), -1)).mean(1) if patches is None else patches.pool(tokens)


def pooled_views(encoder: nn.Module, views: Sequence[View]) -> Tensor:
    """Return ``pooled`` of each view, view by view: -> [V * B, D] if masks have one context for each image.

    Of a view with masks, the encoder is given the context patches. Consecutive views of one size without masks are
    encoded at once.
    """
    parts = []
    for (_, whole), group in groupby(views, key=lambda view: (view.images.shape, view.masks is None)):
        if whole:
            parts.append(pooled(encoder, torch.cat([view.images for view in group])))
        else:
            parts += [pooled(encoder, view.images, view.masks.context) for view in group if view.masks is not None]
    return torch.cat(parts)


def quarters(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the means over the quarters of each image, side by side: [B, H * W, D] -> [B, 4 * D].

    The order is top left, top right, bottom left, bottom right. Of an odd number of rows or columns, the middle one
    belongs to both halves, as in torch's ``adaptive_avg_pool2d``.

    Args:
        tokens: of patches, row by row.
        grid: (H, W).

    Raises:
        ValueError: fewer than 2 x 2 patches.
    """
    if min(grid) < 2:
        raise ValueError(
            f"pooling (='quarters') needs at least 2 x 2 patches, and these images have {grid[0]} x {grid[1]}"
        )
    x = tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # [B, D, H, W]
    return F.adaptive_avg_pool2d(x, 2).permute(0, 2, 3, 1).flatten(1)  # [B, 2, 2, D] -> [B, 4 * D]
