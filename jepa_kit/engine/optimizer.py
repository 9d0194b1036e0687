"""The optimiser of a run, over the parameter groups of the released I-JEPA code, and the norms of gradients.

Groups, in order: encoder weights, predictor weights, encoder biases and 1-D, predictor biases and 1-D. Weight decay
applies to the first two; the mask token has more than one dimension and is among them. A parameter whose attribute
``no_decay`` is True belongs to the others. Parameters that do not require a gradient (those of the target encoder) are
left out. All that are not the encoder's (also those of a loss or a target) are grouped with the predictor's. Groups of
``optim.groups`` (``GroupConfig``) follow, with learning rates and weight decays of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kit.config.sections import GroupConfig, OptimConfig, OptimizerName
from jepa_kit.engine.checkpoint.state_dict import is_sharded, local_part
from jepa_kit.engine.sgd import SGD, norms_of


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: two dimensions or more, not named a bias, and no attribute ``no_decay``."""
    return parameter.ndim > 1 and "bias" not in name.rpartition(".")[2] and not getattr(parameter, "no_decay", False)


def parameter_groups(model: nn.Module, rules: Sequence[GroupConfig] = ()) -> list[dict[str, Any]]:
    """Return the four groups of parameters that no rule matches, then those of each rule, without the empty ones.

    Args:
        model: a module whose context encoder is its child ``encoder``.
        rules: factors by name; of several rules that match a parameter, the first counts.

    Returns:
        dicts with ``params`` as (name, parameter), ``decayed``, and ``weight_decay`` 0; of a rule also ``lr_scale`` and
        ``decay_scale``, by which ``set_hyper`` multiplies.

    Raises:
        ValueError: no parameter requires a gradient, or a rule is the first to match none.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to train")
    rule_of = {name: next((i for i, r in enumerate(rules) if fnmatchcase(name, r.match)), None) for name, _ in trained}
    for i, rule in enumerate(rules):
        if i not in rule_of.values():
            raise ValueError(
                f"optim.groups[{i}].match (={rule.match!r}) must match a trained parameter that no entry before it "
                f"matches; there are {', '.join(dict.fromkeys(map(_beginning, rule_of)))}"
            )
    groups: list[dict[str, Any]] = []
    for i in (None, *range(len(rules))):
        decay = None if i is None else rules[i].weight_decay
        scales = {} if i is None else {"lr_scale": rules[i].lr, "decay_scale": 1.0 if decay is None else decay}
        own = [(name, p) for name, p in trained if rule_of[name] == i]
        decayed = {name: is_decayed(name, p) if decay is None else decay > 0 for name, p in own}
        for kind in itertools.product((True, False), repeat=2):  # decayed, of the encoder
            params = [(name, p) for name, p in own if (decayed[name], name.startswith("encoder.")) == kind]
            if params:
                groups.append({"params": params, "decayed": kind[0], "weight_decay": 0.0, **scales})
    return groups


def _beginning(name: str) -> str:
    """Return the first two parts of a parameter's name and, if there are more, a star: 'encoder.patch_embed.*'."""
    parts = name.split(".")
    return name if len(parts) < 3 else f"{parts[0]}.{parts[1]}.*"


def build_optimizer(
    model: nn.Module,
    *,
    name: OptimizerName = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
    rules: Sequence[GroupConfig] = (),
) -> torch.optim.Optimizer:
    """Return an optimiser of ``parameter_groups``; ``set_hyper`` sets learning rates and weight decays, now 0.

    AdamW is fused on CPU and CUDA: bit-reproducible, and on two CPU cores several times faster than ``foreach`` or the
    plain loop for the parameters of a ViT-S. ``foreach`` on other devices.

    Args:
        model: see ``parameter_groups``.
        name: ``adamw``; ``sgd`` or ``lars`` of sgd.py.
        betas, eps: of AdamW.
        momentum: of SGD and LARS.
        rules: see ``parameter_groups``.
    """
    groups = parameter_groups(model, rules)
    if name != "adamw":
        return SGD(groups, momentum=momentum, layerwise=name == "lars")
    on = {p.device.type for group in groups for _, p in group["params"]}
    fused = on <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=fused, foreach=not fused)


def optimizer_of(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimiser of a config."""
    return build_optimizer(
        model,
        name=optim.name,
        betas=optim.betas,
        eps=optim.eps,
        momentum=optim.momentum,
        rules=optim.groups or (),
    )


def clip_gradients(model: nn.Module, max_norm: float | None = None, *, each: bool = False) -> Tensor:
    """Scale gradients down to a norm of at most ``max_norm``, and return the norm [] of all before that.

    Under FSDP norms are over all shards (one all-reduce); all ranks must call it. It never waits for the device, so a
    norm that is not finite is not noticed here (engine/nonfinite).

    Args:
        model: with gradients.
        max_norm: above 0, or None to scale nothing.
        each: ``max_norm`` is for the gradient of each parameter, as in DINO's released code; else for that of all.
    """
    trained = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in trained if p.grad is not None]
    if each and max_norm is not None:
        norms = norms_of(gradients)
        for gradient, scale in zip(gradients, (max_norm / (norms + 1e-6)).clamp(max=1.0), strict=True):
            local_part(gradient).mul_(scale)
        return torch.linalg.vector_norm(norms)
    norm = nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm.full_tensor() if is_sharded(norm) else norm
