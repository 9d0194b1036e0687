"""Checks that a checkpoint keeps what user-defined parts draw and change, and that an optimiser has what they train."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kit.compat import persistent_names
from jepa_kit.errors import ContractError
from jepa_kit.trials.part_trial import Trial, agree


def attributes(part: object) -> dict[str, Any]:
    """Return copies of a part's numbers, texts and tensors, and lists of these, that are not in its state dict."""
    owners = part.named_modules() if isinstance(part, nn.Module) else [("", part)]
    found: dict[str, Any] = {}
    for prefix, owner in owners:
        values = {name: value for name, value in vars(owner).items() if name not in vars(nn.Module())}
        if isinstance(owner, nn.Module):
            kept = persistent_names(owner)
            values |= {name: value for name, value in owner._buffers.items() if name not in kept}
        found |= {f"{prefix}.{name}".lstrip("."): _copied(value) for name, value in values.items()}
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return [_copied(item) for item in value.items()]
    if isinstance(value, list | tuple | deque):
        return [_copied(item) for item in value]
    return repr(value) if isinstance(value, bool | int | float | str) else None  # nan is equal to itself


def check_attributes(trial: Trial, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Check ``attributes`` of a part after a call, and after another one with the same arguments and random state.

    Raises:
        ContractError: they differ.
    """
    for name, value in after.items():
        trial.need(
            agree(before.get(name), value),
            f"changes its attribute {name} in each call, and no checkpoint has it, so a resumed run differs: keep "
            "it in a buffer (self.register_buffer) of a torch.nn.Module",
        )


def restore(other: nn.Module, jepa: nn.Module, named: str) -> None:
    """Load the state dict of a recipe after forward passes into another build.

    Raises:
        ContractError: forward passes made parameters or buffers; the message names the user-defined parts.
    """
    state = jepa.state_dict()
    if made := state.keys() - other.state_dict().keys():
        raise ContractError(
            f"{min(made)} is made in a forward pass, with {named}: make parameters and buffers in the constructor, or "
            "the optimiser does not have them, and checkpoints do not fit"
        )
    other.load_state_dict(state)


def check_restored(recipes: Sequence[nn.Module], losses: Sequence[Tensor], named: str) -> None:
    """Check that two builds, of which the second had other random numbers before ``restore``, have equal gradients.

    The loss alone is not enough: with first weights it hardly depends on some parts.

    Args:
        recipes: after the backward pass.
        losses: of the same images.
        named: the user-defined parts, for the message.

    Raises:
        ContractError: losses or gradients differ.
    """
    one, other = (torch.cat([p.grad.flatten() for p in x.parameters() if p.grad is not None]) for x in recipes)
    tolerance = 2e-2 if one.is_cuda else 1e-6  # on a GPU, bf16 is summed in another order each time
    if not agree(*losses) or (one - other).norm() > tolerance * one.norm():
        first, second = (float(loss.detach()) for loss in losses)
        raise ContractError(
            f"if another build loads the state dict, its gradients or its loss ({second:.6g}, not {first:.6g}) differ, "
            f"with {named}: a part draws numbers that its checkpoints lack. Layers in a list belong in nn.ModuleList, "
            "other tensors in nn.Parameter or in a buffer (self.register_buffer) that is persistent"
        )


def check_trained(jepa: nn.Module, loss: Tensor, named: str) -> None:
    """Check that a loss trains no tensor of a part that is no parameter of the recipe.

    Raises:
        ContractError: it does.
    """
    known = {id(p) for p in jepa.parameters()}
    plain = {id(value): name for module in jepa.modules() for name, value in vars(module).items()}
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        leaf = getattr(node, "variable", None)  # of a node that accumulates the gradient of a leaf
        if not isinstance(leaf, Tensor) or id(leaf) in known:
            continue
        if isinstance(leaf, nn.Parameter) or id(leaf) in plain:
            name = plain.get(id(leaf), "of a layer")
            raise ContractError(
                f"a tensor ({name}) of shape {list(leaf.shape)} has a gradient, but is no parameter of the recipe, so "
                f"it would not be trained, with {named}: keep it as nn.Parameter, and layers in nn.ModuleList or "
                "nn.ModuleDict"
            )
