"""The state of a run, sharded over processes (FSDP) or not, in the form of one file: whole tensors by name.

A state is two mappings, the same for one process, DDP and FSDP:

    model      name -> tensor, all of ``JEPA.state_dict()``
    optimizer  name of the parameter -> AdamW's state for it: exp_avg, exp_avg_sq, step

One file holds it whole: the form to take while one process's memory holds it (ViT-H/14 with its target encoder and
AdamW's moments: 10 GB). shard_files.py writes it shard by shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_kit.compat import with_local_part

ModelState = dict[str, Tensor]
OptimizerState = dict[str, dict[str, Tensor]]


def is_sharded(value: Tensor) -> TypeGuard[Any]:
    """Whether a tensor is a DTensor, told without an import that takes half a second."""
    return hasattr(value, "full_tensor")


def local_part(value: Tensor) -> Tensor:
    """What this process holds of a tensor; the tensor itself where it is not sharded."""
    return value.to_local() if is_sharded(value) else value


def with_local(value: Tensor, local: Tensor) -> Tensor:
    """Return ``local``, or, if ``value`` is sharded, a tensor sharded alike whose local part it is, to be written."""
    return with_local_part(value, local) if is_sharded(value) else local


def parameters_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's parameters by name, in its own order."""
    groups = optimizer.param_groups
    return {name: p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}


def state_of(jepa: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[ModelState, OptimizerState]:
    """(model, optimizer) as this process holds them: no copy, no communication; DTensors where they are sharded."""
    return jepa.state_dict(), {name: dict(optimizer.state.get(p, {})) for name, p in parameters_of(optimizer).items()}


def full_state(jepa: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[ModelState, OptimizerState]:
    """(model, optimizer) as one file holds them, on rank 0; two empty mappings on the other ranks.

    All ranks must call it. What is not sharded is not copied; shards are gathered tensor by tensor into rank 0's host
    memory, so that no device holds more than one whole tensor beside its own part.
    """
    model, optimizer_state = state_of(jepa, optimizer)
    main = not dist.is_initialized() or dist.get_rank() == 0

    def gathered(value: Tensor) -> Tensor:
        if not is_sharded(value):
            return value
        whole = value.full_tensor()
        return whole.cpu() if main else whole.new_empty(0)

    whole_model = {name: gathered(value) for name, value in model.items()}
    whole_optimizer = {
        name: {key: gathered(value) for key, value in state.items()} for name, state in optimizer_state.items()
    }
    return (whole_model, whole_optimizer) if main else ({}, {})


def load_full_state(
    jepa: nn.Module,
    model: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_state: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Gives a model and its optimiser, sharded or not, a state as one file holds it; no communication.

    Args:
        jepa: what gets ``model``.
        model: name -> whole tensor, on every rank. Names and shapes fit: checked before (``checkpoint.check_state``).
        optimizer, optimizer_state: the same for AdamW; both or neither.
    """
    if optimizer is not None:
        assert optimizer_state is not None
        set_optimizer_state(optimizer, optimizer_state)
    jepa.load_state_dict({name: _like(value, model[name]) for name, value in jepa.state_dict().items()})


def _like(own: Tensor, whole: Tensor) -> Tensor:
    """``whole`` on the device of ``own``, sharded as it is."""
    whole = whole.to(own.device)
    if not is_sharded(own):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)  # every rank has the whole


def set_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Gives the optimiser copies of its state by name: whole tensors, or sharded as its parameters are."""

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
