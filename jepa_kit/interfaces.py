"""Interfaces of a recipe's parts, as Protocols; ``jepa_kit/trials`` checks user-defined parts against them.

B  images of a batch    C, h, w  channels and sides of an image in pixels    D  width of tokens
P  packed patches: those of all sets, one after another (P_c of contexts, P_t of targets), see ``PatchSets``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from jepa_kit.rng import IntArray
from jepa_kit.structures import START, Grid, MaskBatch, Output, PatchSets, Prediction, Progress, Tokens, View


@runtime_checkable
class Masker(Protocol):
    """Interface of a masker, a class registered in ``MASKERS``: masks are a pure function of its arguments.

    A masker that truncates sets may also have ``before_truncation``, with the same arguments, which returns the
    complete sets; tools/mask_report.py shows both. One whose contexts may contain patches of their targets has
    ``allow_overlap``, true; otherwise a run with such masks does not start.
    """

    grid: Grid
    """(H, W): rows and columns of patches."""

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch.

        Args:
            samples: [B] index of each image in its data set; image b of the masks is samples[b].
            seed: seed of the run.
            epoch: epoch of the images.
            step: step of the run, for draws that a batch has in common.
        """
        ...


class Encoder(Protocol):
    """Interface of an encoder, a module registered in ``ENCODERS``.

    Attributes:
        grid: (H, W) patches of a training image.
        patch_size: side of a patch in pixels.
        embed_dim: D, the width of its tokens.
        depth: number of layers; ``forward_layers`` returns any of them.

    With ``patches``, tokens may depend on the pixels of these alone, and not on those of ``patches.hidden``. An encoder
    for which this does not hold has ``mixes_patches``, true; otherwise a run with masks does not start.
    """

    grid: Grid
    patch_size: int
    embed_dim: int
    depth: int

    def __call__(self, images: Tensor, patches: PatchSets | None = None) -> Tensor:
        """Encode [B, C, h, w] -> [P, D], packed as ``patches``; all patches if None."""
        ...

    def forward_tokens(
        self,
        images: Tensor,
        patches: PatchSets | None = None,
        *,
        layers: Sequence[int] | None = None,
        norm: bool = True,
    ) -> list[Tokens]:
        """Return ``forward_layers``, or the last layer, with the prefix of each set; only of an encoder with one."""
        ...

    def forward_layers(
        self, images: Tensor, patches: PatchSets | None = None, *, layers: Sequence[int], norm: bool = True
    ) -> list[Tensor]:
        """Return the outputs of some layers, each [P, D], in the order of ``layers``.

        Args:
            images, patches: as for ``__call__``, which returns layer ``depth`` with the norm.
            layers: from 1 to ``depth``; 0 is the embedding before the first.
            norm: whether the encoder's final norm is applied to each.
        """
        ...


class Predictor(Protocol):
    """Interface of a predictor, a module registered in ``PREDICTORS``.

    An attribute that is true, or a tuple that is not empty, gives it more, by name:

    uses_prefix   ``prefix``: the tokens [S_c, k, D] that the encoder puts before the patches of each context.
    uses_layers   ``layers``: the ``Tokens`` of each of these layers of the encoder (numbers as in ``forward_layers``),
                  after its final norm if it has one. Without ``uses_prefix`` their prefix is empty.
    uses_action   ``action``: [B, A] of the view, or of the difference between two views; None for a view without one,
                  as in evaluations: nothing is done to the image. Its constructor is supplied with ``action_size``, A.
    """

    def __call__(self, context: Tensor, masks: MaskBatch) -> Tensor:
        """Predict: [P_c, D] packed as ``masks.context`` -> [P_t, out_dim] packed as ``masks.targets``."""
        ...


class Target(Protocol):
    """Interface of a target, a module registered in ``TARGETS``.

    Attributes:
        out_dim: width of a target, and so of a prediction.
        needs_encoder: whether it needs a target encoder; a recipe without one is rejected then.
    """

    out_dim: int
    needs_encoder: bool

    def __call__(self, images: Tensor, patches: PatchSets, encoder: Encoder | None) -> Tensor:
        """Return s_y [P_t, out_dim], packed as ``patches``, from images [B, C, h, w]."""
        ...


class Loss(Protocol):
    """Interface of a loss, a module registered in ``LOSSES``.

    Attributes:
        is_distance: whether it measures how far predictions are from targets: deterministic, and minimal if they are
            equal. True if not declared; a loss that is or contains a regulariser (VICReg, SIGReg) declares False.
            Health compares distances only (jepa_kit/evaluation/health/measure.py).

    A distance may have ``values(prediction, target)``, [P, D] twice -> [P], one for each patch: pictures draw it.
    """

    is_distance: bool

    def __call__(self, prediction: Prediction) -> Tensor:
        """Return a scalar []; ``prediction.mean`` averages one value per target patch."""
        ...


class Head(Protocol):
    """Interface of a head, a module registered in ``HEADS``.

    Attributes:
        out_dim: width of its output.
    """

    out_dim: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map [N, in_dim] -> [N, out_dim]."""
        ...


@runtime_checkable
class Recipe(Protocol):
    """What the engine needs of a recipe, a module registered in ``RECIPES``; ``jepa_kit.recipe.Recipe`` is its base.

    A recipe that predicts patches may also have ``predict(view) -> Prediction`` and ``targets_at(images, patches)``,
    which health and pictures call.
    """

    num_views: ClassVar[tuple[int, int | None]]
    masked: ClassVar[bool]
    head_inputs: ClassVar[Mapping[str, str]]
    encoder: nn.Module

    def __call__(self, *views: View, progress: Progress = START) -> Output:
        """Return the loss of a batch of normalised images; all views are of the same images."""
        ...

    def update_target(self, momentum: float) -> None:
        """Update the networks that follow others."""
        ...

    def momentum(self, where: float) -> float:
        """Return the momentum at progress ``where`` in [0, 1] of training."""
        ...

    def adjust_gradients(self, progress: Progress) -> None:
        """Change gradients after the backward pass and before they are clipped; may set some to None."""
        ...

    def encoder_for(self, which: Literal["target", "context"]) -> nn.Module:
        """Return the encoder to evaluate; the context encoder if there is no target encoder."""
        ...


class TargetUpdate(Protocol):
    """Interface of a target update, a class registered in ``TARGET_UPDATES``.

    Attributes:
        tied: whether the target encoder is the context encoder itself.
        stop_gradient: whether targets carry no gradient.

    If the target encoder is not a copy of the encoder, the update may have ``sizes``, a mapping with its ``embed_dim``
    and ``depth``: a target is given these.
    """

    tied: bool
    stop_gradient: bool

    def make(self, encoder: nn.Module) -> nn.Module | None:
        """Return what follows a network as a separate module, or None if there is none or it is tied."""
        ...

    def momentum(self, where: float) -> float:
        """Return the momentum at progress ``where`` in [0, 1] of training."""
        ...

    def update(self, target_encoder: nn.Module | None, encoder: nn.Module, momentum: float) -> None:
        """Update the target encoder after an optimiser step."""
        ...
