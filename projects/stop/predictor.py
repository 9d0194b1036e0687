"""StoP's predictor: the positions of target patches are random, with a learned covariance.

P_t = packed target patches    D = encoder's width    E = predictor's width
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jepa_kit.encoders.blocks import Compile, Init
from jepa_kit.encoders.packed import fill_rows, take_rows
from jepa_kit.predictors import ViTPredictor
from jepa_kit.registry import PREDICTORS, Backend
from jepa_kit.structures import Grid, MaskBatch


@PREDICTORS.register("stop")
class StochasticPredictor(ViTPredictor):
    """I-JEPA's predictor whose mask tokens are noise (Bar et al. 2024, arXiv 2308.00566, section 3).

    The query of a target patch is psi + B n + b: its position, and noise n [D] ~ N(0, noise_std^2 I), mapped by B and b
    as the context's tokens are. So a query is drawn from N(psi + b, noise_std^2 B B^T). The weights are tied because a
    covariance of its own would shrink to zero. No mask token is added; as in the released code it is a parameter that
    nothing trains.

    Noise is drawn in training only, from torch's random state, which is a function of seed, step and process. In
    evaluation mode queries are at their mean, psi + b.

    Args:
        noise_std: standard deviation of n; the option ``var`` of the released code, 0.25 for ViT-B. 0 for no noise.
        others: see ``ViTPredictor``.

    Raises:
        ValueError: ``noise_std`` is negative or not finite; or as ``ViTPredictor``.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        out_dim: int,
        grid: Grid,
        width: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        noise_std: float = 0.25,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        init: Init = "released",
        compile: Compile = "auto",
        attention: Backend = "auto",
    ) -> None:
        if not 0 <= noise_std < math.inf:
            raise ValueError(f"noise_std (={noise_std}) must be at least 0 and finite")
        super().__init__(
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
        self.noise_std = noise_std
        self.mask_token.requires_grad_(False)

    def masked(self, masks: MaskBatch) -> Tensor:
        """Return the noise of each target patch in the predictor's width: [P_t, E]."""
        noise = fill_rows(self.noise(masks))
        return take_rows(self.embed(noise), masks.targets.num_patches)

    def noise(self, masks: MaskBatch) -> Tensor:
        """Return n of each target patch: [P_t, D], zeros in evaluation mode."""
        weight = self.embed.weight
        shape = (masks.targets.num_patches, weight.shape[1])
        if not self.training:
            return weight.new_zeros(shape)
        return torch.randn(shape, dtype=weight.dtype, device=weight.device) * self.noise_std
