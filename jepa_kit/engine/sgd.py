"""SGD with momentum, and LARS: the same with a rate for each weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jepa_kit.engine.checkpoint.state_dict import is_sharded, local_part

TRUST = 0.001
"""LARS's coefficient (You et al. 2017, arXiv 1708.03888)."""


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of each tensor, over all shards if they are sharded (one all-reduce): -> [number of tensors]."""
    norms = torch.stack([torch.linalg.vector_norm(local_part(x)) for x in tensors])
    if any(map(is_sharded, tensors)):
        norms = norms.square()
        dist.all_reduce(norms)
        norms = norms.sqrt()
    return norms


def trust_ratio(weight: Tensor, update: Tensor) -> Tensor:
    """Return LARS's factor of an update from the norms of weights and updates; 1 if one of the two is 0."""
    return torch.where((weight > 0) & (update > 0), TRUST * weight / update, 1.0)


class SGD(torch.optim.Optimizer):
    """SGD with momentum: velocity <- momentum * velocity + update, weight <- weight - lr * velocity.

    The update is the gradient plus ``weight_decay`` times the weight. With ``layerwise`` this is LARS (You et al. 2017,
    arXiv 1708.03888): in groups that are ``decayed``, the update of each weight is scaled to ``TRUST`` times the norm
    of the weight. Torch's own SGD, if it is to skip a step by ``found_inf``, keeps an uninitialised velocity.

    Args:
        params: groups; those with ``decayed`` true have weight decay.
        momentum: in [0, 1).
        layerwise: LARS.

    Attributes:
        found_inf: [] on the device, or None; if it is not 0, a step changes neither weights nor velocities.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[dict[str, Any]], *, momentum: float = 0.9, layerwise: bool = False) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "layerwise": layerwise})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step; never waits for the device."""
        for group in self.param_groups:
            self._step_of(group, [p for p in group["params"] if p.grad is not None])

    def _step_of(self, group: dict[str, Any], params: list[Tensor]) -> None:
        updates = [p.grad.add(p, alpha=group["weight_decay"]) for p in params if p.grad is not None]
        if group["layerwise"] and group["decayed"] and params:
            ratios = trust_ratio(norms_of(params), norms_of(updates))
            for update, ratio in zip(updates, ratios, strict=True):
                local_part(update).mul_(ratio)
        momentum, lr = group["momentum"], group["lr"]
        bad = None if self.found_inf is None else self.found_inf > 0
        if bad is not None:  # then velocity * 1 + 0, and weight - 0 * velocity; in float64, to round neither
            momentum, lr = (
                torch.full_like(bad, x, dtype=torch.float64).masked_fill_(bad, y) for x, y in ((momentum, 1), (lr, 0))
            )
        for p, update in zip(params, updates, strict=True):
            state = self.state[p]
            if not state:
                state["velocity"] = torch.zeros_like(p)
            velocity, change = local_part(state["velocity"]), local_part(update)
            if bad is not None:
                change.masked_fill_(bad, 0.0)
            velocity.mul_(momentum).add_(change)
            local_part(p).sub_(torch.mul(velocity, lr, out=change))
