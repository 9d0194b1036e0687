"""How the target encoder follows the context encoder."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from jepa_kit.compat import foreach_lerp_, persistent_names
from jepa_kit.frozen import FrozenNetwork
from jepa_kit.registry import READERS, TARGET_UPDATES
from jepa_kit.structures import Grid


def _local(module: nn.Module) -> list[Tensor]:
    """Return this process's part of each parameter (FSDP's are DTensors), not a copy."""
    return [getattr(p, "to_local", lambda p=p: p)() for p in module.parameters()]


def _persistent(module: nn.Module) -> list[Tensor]:
    """Return the buffers of the state dict, in order; others are constants of the constructor."""
    return [part.get_buffer(name) for part in module.modules() for name in persistent_names(part)]


class TargetUpdate:
    """Base of the target updates: no target encoder, and nothing that moves."""

    tied = False
    stop_gradient = True

    def make(self, encoder: nn.Module) -> nn.Module | None:
        """Return the target encoder as a separate module, or None."""
        return None

    def momentum(self, where: float) -> float:
        """Return the momentum at progress ``where`` in [0, 1] of training."""
        return 1.0

    def update(self, target_encoder: nn.Module | None, encoder: nn.Module, momentum: float) -> None:
        """Update the target encoder after an optimiser step."""


@TARGET_UPDATES.register("ema")
class EMA(TargetUpdate):
    """An exponential moving average of the context encoder, from a copy of it (I-JEPA, A.1).

    theta_target <- m theta_target + (1 - m) theta, with m rising. Buffers of the state dict (batch norm's
    statistics) are copied, because the target encoder runs in eval mode and never updates its own.

    Args:
        momentum: first and last m, each in [0, 1]; 0.996 and 1 in the released run.
        schedule: how m gets from the first to the last: ``linear``, or half a ``cosine`` (DINO, MoCo v3).
        until: fraction of training after which m stays at the last, in (0, 1] (data2vec: a number of steps).

    Raises:
        ValueError: a value is outside its range.
    """

    def __init__(
        self,
        *,
        momentum: tuple[float, float] = (0.996, 1.0),
        schedule: Literal["linear", "cosine"] = "linear",
        until: float = 1.0,
    ) -> None:
        for m in momentum:
            if not 0.0 <= m <= 1.0:
                raise ValueError(f"momentum (={momentum}) must be two numbers in [0, 1]")
        if not 0.0 < until <= 1.0:
            raise ValueError(f"until (={until}) must be a fraction of training, above 0 and at most 1")
        self.first, self.last = momentum
        self.until, self.cosine = until, schedule == "cosine"

    def make(self, encoder: nn.Module) -> nn.Module:
        """Return a copy of the encoder that is not trained."""
        return copy.deepcopy(encoder).requires_grad_(False)

    def momentum(self, where: float) -> float:
        """Return the momentum at progress ``where`` in [0, 1] of training."""
        done = min(where / self.until, 1.0)
        if self.cosine:
            done = 0.5 * (1.0 - math.cos(math.pi * done))
        return self.first + done * (self.last - self.first)

    @torch.no_grad()
    def update(self, target_encoder: nn.Module | None, encoder: nn.Module, momentum: float) -> None:
        """Update all parameters at once; if they are sharded, this process's part."""
        assert target_encoder is not None
        # theta_target + (1 - m) (theta - theta_target) keeps equal weights equal. The sum of two products, with m and
        # 1 - m rounded to float32, makes them drift: by up to 2e-4 of a weight in 5,000 updates at m = 0.9999.
        foreach_lerp_(_local(target_encoder), _local(encoder), 1.0 - momentum)
        for own, value in zip(_persistent(target_encoder), _persistent(encoder), strict=True):
            own.copy_(value)


@TARGET_UPDATES.register("tied")
class Tied(TargetUpdate):
    """Use the context encoder as target encoder, as SimSiam does (Chen and He 2021).

    Args:
        stop_gradient: False trains targets too, which makes a run collapse to a constant: useful to see what
            collapse looks like.
    """

    tied = True

    def __init__(self, *, stop_gradient: bool = True) -> None:
        self.stop_gradient = stop_gradient


@TARGET_UPDATES.register("frozen")
class Frozen(TargetUpdate):
    """Keep a target encoder as it is: that of a file, or a copy of the encoder with its first weights.

    A file's encoder, a teacher (SALT, arXiv 2509.24317), has its own architecture, of any width and depth. It sees the
    images as in its own training: normalised by its mean and std, and resized if its patches have another size. It
    stays outside of checkpoints, which have a digest of it (``FrozenNetwork``).

    Args:
        weights: a file or folder in any format that ``jepa_kit.load_encoder`` reads, or a folder of any vision model of
            transformers; None for a copy, whose targets are random features, or those of loaded weights
            (``train.init_from``).
        resize: whether a teacher with patches of another size is shown images of another size, which have as many of
            its patches as the run's images have of the encoder's; without it, such a teacher is refused.
        patch_size, grid: of the encoder; supplied by the recipe.
        mean, std: of the channels of the images; supplied by the recipe.

    Attributes:
        sizes: ``embed_dim`` and ``depth`` of the teacher; empty for a copy.

    Raises:
        ValueError: the file cannot be read, its patches have another size than the encoder's and ``resize`` is false,
            or ``resize`` would do nothing.
        FileNotFoundError: there is no such file.
    """

    def __init__(
        self,
        *,
        weights: str | None = None,
        resize: bool = False,
        patch_size: int | None = None,
        grid: Grid | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        self.weights = weights
        self.teacher: FrozenNetwork | None = None
        self.sizes: dict[str, int] = {}
        if weights is None:
            if resize:
                raise ValueError("resize (=True) is for a teacher from a file, and there are no weights")
            return
        run = {"patch_size": patch_size, "grid": grid, "mean": mean, "std": std}
        # A digest needs weights, also if the recipe is built on ``meta``. The first weights of parts that are built
        # later must not depend on the teacher.
        with torch.device("cpu"), torch.random.fork_rng([]):
            teacher = READERS.build("encoder", {"weights": weights, "resize": resize, **run})
            self.teacher = FrozenNetwork(teacher, weights)
        self.sizes = {"embed_dim": teacher.embed_dim, "depth": teacher.depth}

    def make(self, encoder: nn.Module) -> nn.Module:
        """Return a network that never changes.

        Raises:
            ValueError: there is a teacher, and ``encoder`` is no encoder.
        """
        if self.teacher is None:
            return copy.deepcopy(encoder).requires_grad_(False)
        if not hasattr(encoder, "patch_size"):
            raise ValueError(
                f"target_update.weights (={self.weights!r}) can stand for an encoder, but not for a "
                f"{type(encoder).__name__}, which follows another one in this recipe"
            )
        return self.teacher.to(torch.empty(0).device)


@TARGET_UPDATES.register("none")
class NoTargetEncoder(TargetUpdate):
    """Make no target encoder, for targets that need none, such as pixels."""
