"""How the target encoder follows the context encoder."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from jepa_kit.registry import TARGET_UPDATES


def _local(module: nn.Module) -> list[Tensor]:
    """Parameters as this process holds them: those of FSDP are DTensors, and this is their local part, not a copy."""
    return [getattr(p, "to_local", lambda p=p: p)() for p in module.parameters()]


def _persistent(module: nn.Module) -> list[Tensor]:
    """Buffers of the state dict, in order. The others are tables of the constructor."""
    return [
        value
        for part in module.modules()
        for name, value in part._buffers.items()
        if value is not None and name not in part._non_persistent_buffers_set
    ]


@TARGET_UPDATES.register("ema")
class EMA:
    """An exponential moving average of the context encoder, from a copy of it (I-JEPA, A.1).

    theta_target <- m theta_target + (1 - m) theta, with m rising linearly. Buffers of the state dict (statistics of
    batch norm) are copied: the target encoder runs as in evaluation, so its own would stay at their first values.

    Args:
        momentum: (first, last) m, each in [0, 1]; the released run goes from 0.996 to 1.

    Raises:
        ValueError: a momentum outside [0, 1].
    """

    tied = False
    stop_gradient = True

    def __init__(self, *, momentum: tuple[float, float] = (0.996, 1.0)) -> None:
        for m in momentum:
            if not 0.0 <= m <= 1.0:
                raise ValueError(f"momentum (={momentum}) must go from one number in [0, 1] to another")
        self.first, self.last = momentum

    def make(self, encoder: nn.Module) -> nn.Module:
        """A copy of the encoder that no optimiser trains."""
        return copy.deepcopy(encoder).requires_grad_(False)

    def momentum(self, where: float) -> float:
        """first + where * (last - first)."""
        return self.first + where * (self.last - self.first)

    @torch.no_grad()
    def update(self, target_encoder: nn.Module | None, encoder: nn.Module, momentum: float) -> None:
        """One step of the average, over all parameters at once; where they are sharded, over this process's part."""
        assert target_encoder is not None
        # theta_target + (1 - m) (theta - theta_target): equal weights stay as they are. As a sum of two products, with
        # m and 1 - m rounded to float32, they drift apart: by up to 2e-4 of a weight in 5,000 updates at m = 0.9999.
        torch._foreach_lerp_(_local(target_encoder), _local(encoder), 1.0 - momentum)
        for own, value in zip(_persistent(target_encoder), _persistent(encoder), strict=True):
            own.copy_(value)


@TARGET_UPDATES.register("tied")
class Tied:
    """The context encoder is its own target encoder, as in SimSiam (Chen and He 2021).

    Args:
        stop_gradient: without it, targets are trained too, and the easiest answer is a constant: a run that
            is made to collapse, to see what collapse looks like.
    """

    tied = True

    def __init__(self, *, stop_gradient: bool = True) -> None:
        self.stop_gradient = stop_gradient

    def make(self, encoder: nn.Module) -> None:
        """None: it is the encoder itself."""
        return None

    def momentum(self, where: float) -> float:
        """1: nothing moves."""
        return 1.0

    def update(self, target_encoder: nn.Module | None, encoder: nn.Module, momentum: float) -> None:
        """Does nothing."""


@TARGET_UPDATES.register("frozen")
class Frozen:
    """A copy of the first weights that stays as it is: targets are random features, or loaded ones."""

    tied = False
    stop_gradient = True

    def __init__(self) -> None:
        pass

    def make(self, encoder: nn.Module) -> nn.Module:
        """A copy of the encoder that nothing changes."""
        return copy.deepcopy(encoder).requires_grad_(False)

    def momentum(self, where: float) -> float:
        """1: nothing moves."""
        return 1.0

    def update(self, target_encoder: nn.Module | None, encoder: nn.Module, momentum: float) -> None:
        """Does nothing."""


@TARGET_UPDATES.register("none")
class NoTargetEncoder:
    """No target encoder: for targets that need none, such as pixels."""

    tied = False
    stop_gradient = True

    def __init__(self) -> None:
        pass

    def make(self, encoder: nn.Module) -> None:
        """None."""
        return None

    def momentum(self, where: float) -> float:
        """1: nothing moves."""
        return 1.0

    def update(self, target_encoder: nn.Module | None, encoder: nn.Module, momentum: float) -> None:
        """Does nothing."""
