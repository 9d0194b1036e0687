"""Trial calls of one part, with fixed random states and errors that name the part and its correct form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from jepa_kit.distributed.buffers import unchanged_buffers
from jepa_kit.errors import ContractError
from jepa_kit.random_state import seeded
from jepa_kit.registry import registry_of
from jepa_kit.structures import Grid, MaskBatch, PatchSets

FORMS = {
    "transform": "__call__(image, draws) -> RGB Pillow image, with num_draws; one that sets the size has window(size, "
    "draws) -> Window",
    "masker": "__call__(samples, *, seed, epoch, step=0) -> MaskBatch(context, targets, grid, context_of), a pure "
    "function of its arguments, with the attribute grid (jepa_kit/interfaces.py)",
    "encoder": "__call__(images, patches=None) -> [P, embed_dim] and forward_layers(images, patches=None, *, layers, "
    "norm=True) -> a list of these, with grid, patch_size, embed_dim and depth (jepa_kit/interfaces.py)",
    "target": "__call__(images, patches, encoder) -> [P_t, out_dim], or codes [P_t] below out_dim, with out_dim and "
    "needs_encoder (jepa_kit/interfaces.py)",
    "predictor": "__call__(context, masks) -> [P_t, out_dim] (jepa_kit/interfaces.py)",
    "head": "__call__(x [N, in_dim]) -> [N, out_dim], with out_dim (jepa_kit/interfaces.py)",
    "recipe": "a subclass of jepa_kit.recipe.Recipe, whose forward(*views, progress) returns an Output",
    "loss": "__call__(prediction) -> a scalar [], with is_distance (jepa_kit/interfaces.py)",
    "target_update": "make(encoder), momentum(where) -> float and update(target_encoder, encoder, momentum), with tied "
    "and stop_gradient (jepa_kit/interfaces.py)",
}
"""Slot -> the correct form of its parts, for messages."""

IMAGES = 4
"""Images of a trial's batch."""

CALL_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of a trial call that become a ContractError."""


@dataclass(frozen=True)
class Trial:
    """One part under trial.

    Args:
        slot, name: as in the config.
        jepa: its buffers are restored after each call; by default there are none.
    """

    slot: str
    name: str
    jepa: nn.Module = field(default_factory=nn.Module)

    @property
    def _kind(self) -> str:
        registry = registry_of(self.slot)
        return self.slot if registry is None else registry.slot

    def fail(self, why: str, cause: Exception | None = None) -> NoReturn:
        """Raise ContractError."""
        raise ContractError(f"{self.slot} {self.name!r} {why}. It must have the form {FORMS[self._kind]}") from cause

    def need(self, condition: bool, why: str) -> None:
        """Raise ContractError unless ``condition`` is true."""
        if not condition:
            self.fail(why)

    def need_sizes(self, part: object, *names: str) -> None:
        """Raise ContractError unless these attributes are ints of at least 1."""
        for name in names:
            value = getattr(part, name, None)
            self.need(type(value) is int and value >= 1, f"has {name} (={value!r}), not a whole number of at least 1")

    def need_flags(self, part: object, *names: str) -> None:
        """Raise ContractError unless these attributes are bools."""
        for name in names:
            self.need(isinstance(getattr(part, name, None), bool), f"has no {name} (true or false)")

    def need_grid(self, part: object, grid: Grid) -> None:
        """Raise ContractError unless the attribute ``grid`` is this one."""
        found = getattr(part, "grid", None)
        self.need(found is not None and tuple(found) == grid, f"has the attribute grid {found!r}, not {grid}")

    def call(self, do: Callable[[], Any]) -> Any:
        """Return the result of a call of the part; its errors become ContractError."""
        try:
            return do()
        except ContractError:
            raise
        except CALL_ERRORS as error:
            self.fail(f"failed in a trial call: {type(error).__name__}: {error}".rstrip(". \n"), error)

    def twice(self, do: Callable[[], Any], *, pure: bool = False) -> tuple[Any, Any]:
        """Return the results of two calls.

        Args:
            do: the call.
            pure: torch's random state differs between the calls, too.
        """

        def once(k: int) -> Any:
            with seeded(k if pure else 0, k), unchanged_buffers(self.jepa):
                return self.call(do)

        return once(1), once(2)

    def tensor(self, value: Any, shape: tuple[int, ...], what: str) -> None:
        """Raise ContractError unless a value is a finite floating-point tensor of a shape."""
        self.need(isinstance(value, Tensor), f"gave a {type(value).__name__} for {what}, not a tensor")
        found = tuple(value.shape)
        self.need(found == shape, f"gave a tensor of shape {list(found)} for {what}, not {list(shape)}")
        self.need(value.is_floating_point(), f"gave a tensor of {value.dtype} for {what}, not of floating point")
        self.need(bool(value.isfinite().all()), f"gave values that are not finite for {what}")

    def codes(self, value: Tensor, count: int, most: int) -> None:
        """Raise ContractError unless integers are ``count`` codes from 0 to ``most`` - 1."""
        right = value.dtype == torch.int64 and tuple(value.shape) in {(count,), (count, 1)}
        found = f"{value.dtype} of shape {list(value.shape)}"
        self.need(right, f"gave {found} for the targets: codes must be int64 of shape [{count}]")
        least, largest = int(value.min()), int(value.max())
        inside = least >= 0 and largest < most
        self.need(inside, f"gave codes from {least} to {largest}, but out_dim (={most}) means 0 to {most - 1}")

    def same(self, first: Any, second: Any, what: str = "calls") -> None:
        """Raise ContractError unless two results agree."""
        why = (
            f"gave different results in two {what} with the same arguments and the same state of torch: numbers that "
            "are drawn must come from torch (networks, losses) or from the arguments (maskers, transforms: "
            "jepa_kit.rng), or two runs of one command differ; arguments must not be changed in place"
        )
        self.need(agree(first, second), why)


def agree(first: Any, second: Any) -> bool:
    """Return whether two results are equal; on a GPU up to the rounding of sums in another order."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        rtol = 1e-3 if first.is_cuda else 1e-6
        scale = float(first.detach().abs().max()) if first.numel() else 0.0
        return first.shape == second.shape and torch.allclose(first, second, rtol=rtol, atol=rtol * scale)
    if isinstance(first, MaskBatch) and isinstance(second, MaskBatch):
        parts = ((first.context, second.context), (first.targets, second.targets))
        return torch.equal(first.context_of, second.context_of) and all(agree(a, b) for a, b in parts)
    if isinstance(first, PatchSets) and isinstance(second, PatchSets):
        equal = torch.equal(first.index, second.index) and torch.equal(first.image, second.image)
        return equal and first.lengths == second.lengths
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(agree(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)
