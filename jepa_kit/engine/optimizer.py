"""AdamW over the parameter groups of the released I-JEPA code, and the norm of all gradients.

Groups, in order: encoder weights, predictor weights, encoder biases and 1-D, predictor biases and 1-D. Weight decay
applies to the first two; the mask token has more than one dimension and is among them. Parameters that do not require a
gradient (those of the target encoder) are left out. All that are not the encoder's (also those of a loss or a target)
are grouped with the predictor's.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kit.engine.checkpoint.state_dict import is_sharded


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: two dimensions or more, and not named a bias."""
    return parameter.ndim > 1 and "bias" not in name.rpartition(".")[2]


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the four groups without the empty ones.

    Args:
        model: a module whose context encoder is its child ``encoder``.

    Returns:
        dicts with ``params`` as (name, parameter), ``decayed``, and ``weight_decay`` 0.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    groups: list[dict[str, Any]] = []
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for kind in itertools.product((True, False), repeat=2):  # decayed, of the encoder
        params = [(name, p) for name, p in trained if (is_decayed(name, p), name.startswith("encoder.")) == kind]
        if params:
            groups.append({"params": params, "decayed": kind[0], "weight_decay": 0.0})
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to train")
    return groups


def build_optimizer(
    model: nn.Module, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.AdamW:
    """Return AdamW over ``parameter_groups(model)``; ``set_hyper`` sets its learning rate and weight decay, 0 at first.

    Fused on CPU and CUDA: bit-reproducible, and on two CPU cores several times faster than ``foreach`` or the plain
    loop for the parameters of a ViT-S. ``foreach`` on other devices.
    """
    groups = parameter_groups(model)
    on = {p.device.type for group in groups for _, p in group["params"]}
    fused = on <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=fused, foreach=not fused)


def clip_gradients(model: nn.Module, max_norm: float | None = None) -> Tensor:
    """Scale all gradients down to a joint norm of at most ``max_norm``, and return their norm [] before that.

    Under FSDP it is the norm over all shards (an all-reduce of one number); all ranks must call it. It never waits for
    the device, so a norm that is not finite is not noticed here (engine/nonfinite).

    Args:
        model: with gradients.
        max_norm: above 0, or None to scale nothing.
    """
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm.full_tensor() if is_sharded(norm) else norm
