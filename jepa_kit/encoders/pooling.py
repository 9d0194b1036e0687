"""One vector for each image, or set of patches: what heads of joint-embedding methods map.

S = sets of patches    D = width of the encoder
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import cast

import torch
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
