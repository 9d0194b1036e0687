"""A head on the encoder's own tokens of the target patches, for masks in place.

P_c, P_t = packed context and target patches    S_c, S_t = context and target sets    D = encoder's width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa_kit.encoders.packed import fill_rows, take_rows
from jepa_kit.encoders.products import Linear
from jepa_kit.registry import PREDICTORS
from jepa_kit.structures import MaskBatch


@PREDICTORS.register("tokens")
class TokenPredictor(nn.Module):
    """Map the encoder's token of each target patch to a prediction, by one linear map as in BEiT, SimMIM and data2vec.

    Target patches must be in their context, hidden by a mask token: masker ``in_place``.

    Args:
        embed_dim: D; supplied by the recipe.
        out_dim: width of targets; supplied by the recipe.
        hidden: width of a hidden layer with a GELU between two linear maps; null for one linear map.

    Raises:
        ValueError: ``hidden`` is below 1.
    """

    def __init__(self, *, embed_dim: int, out_dim: int, hidden: int | None = None) -> None:
        super().__init__()
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden (={hidden}) must be at least 1, or null for one linear map")
        self.fc = None if hidden is None else Linear(embed_dim, hidden)
        self.proj = Linear(embed_dim if hidden is None else hidden, out_dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw weights from a truncated normal (0.02), with zero biases."""
        for m in (self.fc, self.proj):
            if m is not None:
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, context: Tensor, masks: MaskBatch) -> Tensor:
        """Predict: [P_c, D] packed as ``masks.context`` -> [P_t, out_dim] packed as ``masks.targets``.

        Raises:
            ValueError: a target patch is not in its context.
        """
        rows = rows_of_targets(masks)
        x = fill_rows(context.index_select(0, rows))
        if self.fc is not None:
            x = self.fc.gelu(x)
        return take_rows(self.proj(x), len(rows))


def rows_of_targets(masks: MaskBatch) -> Tensor:
    """Return the place of each target patch in its context: [P_t] indices of the packed context tokens.

    Raises:
        ValueError: a target patch is not in its context, as far as the host knows the masks.
    """
    host = masks.host()
    if host is not None and not host.context.lengths.whole and bool((_rows(host) < 0).any()):
        raise ValueError("a target patch is not in its context: predictor 'tokens' needs masker {name: in_place, ...}")
    return _rows(masks)


def _rows(masks: MaskBatch) -> Tensor:
    """Return as ``rows_of_targets``, with -1 for a patch that is not in its context."""
    context, targets = masks.context, masks.targets
    of = masks.context_of[targets.lengths.set_of_token]  # [P_t]
    if context.lengths.whole:
        return context.lengths.offsets[of] + targets.index
    patches = masks.grid[0] * masks.grid[1]
    place = torch.full((len(context) * patches,), -1, device=of.device)
    order = torch.arange(context.num_patches, device=of.device)
    place[context.lengths.set_of_token * patches + context.index] = order  # [S_c * N]
    return place[of * patches + targets.index]
