"""A multilayer perceptron over features.

N = features (of images, views or patches)    D = width
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from jepa_kit.distributed.batch_norm import SyncedBatchNorm
from jepa_kit.registry import HEADS

Norm = Literal["none", "batch", "layer"]

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


@HEADS.register("mlp")
class MLPHead(nn.Module):
    """Linear layers [-> norm] -> activation, and a last linear layer [-> norm]: [N, in_dim] -> [N, out_dim].

    With options as below it is the head of these methods; nothing is normalised to unit length here:

        SimCLR     layers 2, norm batch, bias false, last_bias true; or last_norm batch, last_bias false
        BYOL       layers 2, norm batch, last_bias false, both projector and predictor (arXiv 2006.07733)
        MoCo v3    layers 3 (projector), 2 (predictor), norm and last_norm batch, affine and bias false (2104.02057)
        VICReg     layers 3, norm batch, last_bias false (2105.04906)
        MSN        layers 3, norm batch, activation gelu (2204.07141)
        LeJEPA     layers 3, norm batch (2511.08544)
        DINO       layers 3, activation gelu, init_std 0.02, before its normalised last layer (2104.14294)

    Args:
        in_dim: width of the features.
        out_dim: width of the result.
        hidden: width of the layers between; None for a single layer.
        layers: number of linear layers, 1 and up.
        norm: of the layers before the last: ``batch`` is over the rows of all processes.
        activation: ``relu`` or ``gelu``, after each layer but the last.
        last_norm: of the result.
        affine: whether the last norm has a scale and a shift, which are trained.
        bias: of the linear layers.
        last_bias: of the last one; None for ``bias``.
        init_std: weights start normally distributed with this standard deviation, biases as 0; None for torch's start.

    Raises:
        ValueError: a value outside its range, or an option that would do nothing.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        hidden: int | None = None,
        layers: int = 2,
        norm: Norm = "none",
        activation: Literal["relu", "gelu"] = "relu",
        last_norm: Norm = "none",
        affine: bool = True,
        bias: bool = True,
        last_bias: bool | None = None,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("out_dim", out_dim), ("layers", layers), ("hidden", hidden)):
            if value is not None and value < 1:
                raise ValueError(f"{name} (={value}) must be at least 1")
        if layers > 1 and hidden is None:
            raise ValueError(f"hidden (=None) must be the width of the layers between, as there are {layers} layers")
        if layers == 1 and (hidden is not None or norm != "none"):
            name, given = ("hidden", hidden) if hidden is not None else ("norm", repr(norm))
            raise ValueError(f"{name} (={given}) has no effect if layers is 1: last_norm is the norm of the last layer")
        if not affine and last_norm == "none":
            raise ValueError("affine (=False) has no effect if last_norm is none")
        if init_std is not None and init_std <= 0:
            raise ValueError(f"init_std (={init_std}) must be above 0")
        self.out_dim = out_dim
        parts: list[nn.Module] = []
        width = in_dim
        for _ in range(layers - 1):
            assert hidden is not None
            parts += [nn.Linear(width, hidden, bias=bias), *_norm(norm, hidden), ACTIVATIONS[activation]()]
            width = hidden
        last = nn.Linear(width, out_dim, bias=bias if last_bias is None else last_bias)
        self.layers = nn.Sequential(*parts, last, *_norm(last_norm, out_dim, affine))
        if init_std is not None:
            for linear in self.layers:
                if isinstance(linear, nn.Linear):
                    nn.init.trunc_normal_(linear.weight, std=init_std)
                    if linear.bias is not None:
                        nn.init.zeros_(linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[N, in_dim] -> [N, out_dim]; without batch norm, any number of dimensions in front."""
        return self.layers(features)


def _norm(name: Norm, width: int, affine: bool = True) -> list[nn.Module]:
    """Return the norm of a width in a list, or an empty list."""
    if name == "none":
        return []
    return [
        SyncedBatchNorm(width, affine=affine) if name == "batch" else nn.LayerNorm(width, elementwise_affine=affine)
    ]
