"""What a recipe needs from its parts, as Protocols; `jepa_kit/trials` checks user-defined parts against them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from jepa_kit.rng import IntArray
from jepa_kit.structures import Grid, MaskBatch, PatchSets


class Encoder(Protocol):
    """What a recipe asks of an encoder (a module that is registered in ``ENCODERS``).

    Attributes:
        grid: (H, W) patches of a training image.
        patch_size: side of a patch in pixels.
        embed_dim: D, the width of its tokens.
        depth: how many layers ``forward_layers`` can give.
    """

    grid: Grid
    patch_size: int
    embed_dim: int
    depth: int

    def __call__(self, images: Tensor, patches: PatchSets | None = None) -> Tensor:
        """[B, C, h, w] -> [P, D], packed as ``patches``; every patch where it is None."""
        ...

    def forward_layers(self, images: Tensor, patches: PatchSets | None = None, *, last: int) -> list[Tensor]:
        """The last ``last`` layers' tokens, each [P, D] as ``__call__`` would give it."""
        ...


@runtime_checkable
class Masker(Protocol):
    """Draws the masks of a batch as a pure function of its arguments.

    One that truncates sets may also have ``before_truncation``, called alike, for the sets with all their patches:
    tools/mask_report.py shows both.
    """

    grid: Grid
    """(H, W): rows and columns of patches."""

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """The masks of a batch.

        Args:
            samples: [B] index of each image in its data set; image b of the masks is samples[b].
            seed: of the run.
            epoch: in which the images are drawn.
            step: of the run, for what a strategy shares across a batch.
        """
        ...


class TargetUpdate(Protocol):
    """What a recipe asks of a target update (a class that is registered in ``TARGET_UPDATES``).

    Attributes:
        tied: the target encoder is the context encoder itself.
        stop_gradient: targets carry no gradient.
    """

    tied: bool
    stop_gradient: bool

    def make(self, encoder: nn.Module) -> nn.Module | None:
        """The target encoder as a module of its own, or None where there is none (or ``tied``)."""
        ...

    def momentum(self, where: float) -> float:
        """The momentum when a share ``where`` in [0, 1] of the planned updates is done."""
        ...

    def update(self, target_encoder: nn.Module | None, encoder: nn.Module, momentum: float) -> None:
        """Moves the target encoder after an optimiser step."""
        ...
