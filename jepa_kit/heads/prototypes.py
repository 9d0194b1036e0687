"""Scores of prototypes: a linear layer between unit vectors.

R = rows    D = width of a row    K = prototypes
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.registry import HEADS


@HEADS.register("prototypes")
class Prototypes(nn.Module):
    """Return the cosine between each row and each of K prototypes.

    Source: the last layer of DINO's head (Caron et al. 2021, arXiv 2104.14294, appendix C), weight-normalised (Salimans
    and Kingma 2016) after l2-normalised features; the prototypes of MSN (Assran et al. 2022, arXiv 2204.07141). The
    length of a weight has no effect, so weight decay changes only how fast its direction turns.

    Args:
        in_dim: D; supplied by the recipe.
        out_dim: K.
        learned_scale: whether each prototype's scores are multiplied by a trained number, 1 at first (DINO with
            ``norm_last_layer`` off).

    Raises:
        ValueError: K is below 1.
    """

    def __init__(self, *, in_dim: int, out_dim: int, learned_scale: bool = False) -> None:
        super().__init__()
        if out_dim < 1:
            raise ValueError(f"out_dim (={out_dim}) must be at least 1")
        self.out_dim = out_dim
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.scale = nn.Parameter(torch.ones(out_dim, 1)) if learned_scale else None
        nn.init.uniform_(self.weight, -(in_dim**-0.5), in_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[R, D] -> [R, K]."""
        weight = F.normalize(self.weight, dim=1)
        return F.linear(F.normalize(x, dim=1), weight if self.scale is None else self.scale * weight)
