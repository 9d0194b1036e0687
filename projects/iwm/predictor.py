"""IWM's predictor: I-JEPA's, which is given an action.

B = images    A = numbers of an action    E = predictor's width    P_c, P_t = packed context and target patches
S_c = context sets
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from jepa_kit.encoders.blocks import Compile, Init
from jepa_kit.encoders.prefix import add_prefix
from jepa_kit.heads import MLPHead
from jepa_kit.predictors import ViTPredictor
from jepa_kit.registry import PREDICTORS, Backend, check_choice
from jepa_kit.structures import Grid, MaskBatch

Conditioning = Literal["features", "sequence"]


@PREDICTORS.register("iwm")
class ActionPredictor(nn.Module):
    """The predictor ``vit`` with an action (IWM, section 4.2).

    ``features``: the action is put beside each mask token with its position, [E + A], and an MLP maps the two to E: the
    paper's 1 x 1 convolutions. ``sequence``: the MLP maps the action to a token of its own before each context.

    Args:
        embed_dim, out_dim, grid, attention: see ``ViTPredictor``; supplied by the recipe.
        action_size: A; supplied by the recipe.
        conditioning: ``features`` or ``sequence``.
        layers: linear layers of the MLP, with GELUs between them, 1 and up.
        width, depth, num_heads, mlp_ratio, norm_eps, drop_path, init, compile: see ``ViTPredictor``.

    Raises:
        ValueError: no view has an action, or a value is outside its range.
    """

    uses_action = True

    def __init__(
        self,
        *,
        embed_dim: int,
        out_dim: int,
        grid: Grid,
        action_size: int,
        conditioning: Conditioning = "features",
        layers: int = 3,
        width: int = 384,
        depth: int = 18,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        init: Init = "released",
        compile: Compile = "auto",
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        check_choice("conditioning", conditioning, Conditioning)
        if action_size < 1:
            raise ValueError(
                f"action_size (={action_size}) must be at least 1: data.views needs action: true in both views"
            )
        self.action_size, self.conditioning = action_size, conditioning
        self.vit = ViTPredictor(
            embed_dim=embed_dim,
            out_dim=out_dim,
            grid=grid,
            width=width,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            norm_eps=norm_eps,
            drop_path=drop_path,
            init=init,
            compile=compile,
            attention=attention,
        )
        in_dim = action_size + (width if conditioning == "features" else 0)
        self.mix = MLPHead(
            in_dim=in_dim, out_dim=width, layers=layers, hidden=width if layers > 1 else None, activation="gelu"
        )

    def forward(self, context: Tensor, masks: MaskBatch, *, action: Tensor | None) -> Tensor:
        """Predict: s_x [P_c, D], a [B, A] -> s_hat_y [P_t, out_dim]; without an action, nothing differs: a = 0.

        Raises:
            ValueError: the masks have another grid, or the action another number of numbers.
        """
        if masks.grid != self.vit.grid:
            raise ValueError(f"masks.grid (={masks.grid}) must be the predictor's (={self.vit.grid})")
        if action is not None and action.shape[1] != self.action_size:
            raise ValueError(f"the action (of {action.shape[1]} numbers) must have action_size (={self.action_size})")
        seen, hidden = self.vit.tokens(context, masks, None)  # [P_c, E], [P_t, E]
        of = masks.targets.image_of_token if self.conditioning == "features" else masks.context.image
        a = hidden.new_zeros(len(of), self.action_size) if action is None else action[of].to(hidden.dtype)
        if self.conditioning == "features":
            hidden = self.mix(torch.cat([hidden, a], dim=1)).to(seen.dtype)
        else:
            seen = add_prefix(self.mix(a)[:, None].to(seen.dtype), seen, masks.context.lengths)  # [S_c + P_c, E]
        return self.vit.run(seen, hidden, masks)
