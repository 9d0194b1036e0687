"""The state of a run, sharded over processes (FSDP) or not, as whole tensors by name.

A state is two mappings, the same for one process, DDP and FSDP:

    model      name -> tensor, all of ``Recipe.state_dict()``
    optimizer  name of the parameter -> its state: exp_avg, exp_avg_sq and step of AdamW; velocity of SGD and LARS

A checkpoint file contains it whole, which fits one process's memory (ViT-H/14 with its target encoder and AdamW's
moments: 10 GB); dcp.py writes it shard by shard.

``torch.distributed.checkpoint.state_dict`` returns and loads the same bits if every parameter has had a gradient. It is
not used: before the first step, ``get_state_dict`` makes a step of the optimiser, which then counts one more, and
``set_state_dict`` fails for a state in which a parameter never had a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

ModelState = dict[str, Tensor]
OptimizerState = dict[str, dict[str, Tensor]]


def is_sharded(value: Tensor) -> TypeGuard[Any]:
    """Return whether a tensor is a DTensor, without an import that takes half a second."""
    return hasattr(value, "full_tensor")


def local_part(value: Tensor) -> Tensor:
    """Return this process's part of a tensor; the tensor itself if it is not sharded."""
    return value.to_local() if is_sharded(value) else value


def parameters_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's parameters by name, in its order."""
    groups = optimizer.param_groups
    return {name: p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}


def optimizer_state(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Return the state by the name of the parameter, so that the order of parameters does not matter. No copy."""
    return {name: dict(optimizer.state.get(p, {})) for name, p in parameters_of(optimizer).items()}


def state_of(jepa: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[ModelState, OptimizerState]:
    """Return (model, optimizer) of this process: no copy, no communication; DTensors if they are sharded."""
    return jepa.state_dict(), optimizer_state(optimizer)


def full_state(jepa: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[ModelState, OptimizerState]:
    """Return (model, optimizer) as whole tensors on rank 0, and two empty mappings on the other ranks.

    All ranks must call it. Tensors that are not sharded are not copied. Shards are gathered tensor by tensor into rank
    0's host memory, so that a device has at most one whole tensor beside its own part.
    """
    model, moments = state_of(jepa, optimizer)
    main = not dist.is_initialized() or dist.get_rank() == 0

    def gather(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {}
        for name, value in state.items():
            if is_sharded(value):
                value = value.full_tensor()
                value = value.cpu() if main else value.new_empty(0)
            whole[name] = value
        return whole

    whole = gather(model), {name: gather(state) for name, state in moments.items()}
    return whole if main else ({}, {})


def load_full_state(
    jepa: nn.Module,
    model: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_state: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Load whole tensors into a model and its optimiser, sharded or not; no communication.

    Args:
        jepa: gets ``model``.
        model: name -> whole tensor, on every rank; names and shapes must fit (``format.check_state``).
        optimizer, optimizer_state: the same for AdamW; both or neither.
    """
    if optimizer is not None and optimizer_state is not None:
        set_optimizer_state(optimizer, optimizer_state)
    jepa.load_state_dict({name: _like(value, model[name]) for name, value in jepa.state_dict().items()})


def _like(own: Tensor, whole: Tensor) -> Tensor:
    """Return ``whole`` on the device of ``own``, sharded alike."""
    whole = whole.to(own.device)
    if not is_sharded(own):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)  # every rank has the whole


def set_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load copies of a state by name into the optimiser: whole tensors, or sharded as its parameters."""

    def own(parameter: Tensor, value: Tensor) -> Tensor:
        if is_sharded(value) or value.shape != parameter.shape:
            return value.clone()
        return _like(parameter, value).clone()

    content = optimizer.state_dict()
    content["state"] = {
        number: {key: own(parameter, value) for key, value in state[name].items()}
        for number, (name, parameter) in enumerate(parameters_of(optimizer).items())
        if state.get(name)
    }
    optimizer.load_state_dict(content)
