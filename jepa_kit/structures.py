"""Data types that packages exchange: masks of a batch, views, predictions, outputs; ``PatchSets`` is in patch_sets.py.

Legend of shapes:

    B  images in a batch            S  sets (a context, or one target block, of one image)
    N  patches of an image, H * W   P  patches of all sets together, packed one set after another
    D  width of a token             L  length of a set
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_kit.patch_sets import PatchSets
from jepa_kit.rng import Stream, generator
from jepa_kit.set_lengths import SetLengths, unchecked

__all__ = [
    "START",
    "Grid",
    "MaskBatch",
    "Output",
    "PatchSets",
    "Pooling",
    "Precision",
    "Prediction",
    "Progress",
    "Tokens",
    "Update",
    "View",
]

Grid = tuple[int, int]
"""(H, W): rows and columns of patches."""

Precision = Literal["float32", "tf32", "bf16"]
"""Of the factors of matrix products (jepa_kit/precision.py)."""

Pooling = Literal["mean", "class", "quarters", "none"]
"""Whether a feature is the mean over an image's patches, its class token, the means over the patches of its four
quarters side by side, or there is one for each patch."""


def _outside(x: Tensor, end: int) -> int | None:
    """Return a value of ``x`` that is not in [0, end), or None."""
    values = x.numpy()  # on the host, and faster than torch for a few numbers
    lowest, highest = int(values.min()), int(values.max())
    return lowest if lowest < 0 else highest if highest >= end else None


@dataclass(frozen=True, eq=False)
class MaskBatch:
    """Context and target patches of every image of a batch.

    Args:
        context: the context sets, one or several per image.
        targets: the target sets (target blocks).
        grid: (H, W) patches of every image.
        context_of: [S_t] int64, the context set from which each target set is predicted.

    Raises:
        ValueError: a patch is outside the grid, or a target set has no context set of its own image. Checked on the
            host, at construction.
    """

    context: PatchSets
    targets: PatchSets
    grid: Grid
    context_of: Tensor
    on_host: MaskBatch | None = field(init=False, default=None)
    """The host's copy of masks that were moved to a device."""

    def __post_init__(self) -> None:
        h, w = self.grid
        if self.context_of.device.type != "cpu":
            raise ValueError(f"context_of is on {self.context_of.device}: make masks on the host, then call to(device)")
        if self.context_of.dtype != torch.int64 or self.context_of.shape != self.targets.image.shape:
            raise ValueError(
                f"context_of must be int64 with one entry for each of the {len(self.targets)} target sets, "
                f"not {self.context_of.dtype} of shape {tuple(self.context_of.shape)}"
            )
        for name, sets in (("context", self.context), ("targets", self.targets)):
            if (bad := _outside(sets.index, h * w)) is not None:
                raise ValueError(f"{name} holds patch {bad}, but a grid of {h} x {w} has patches 0 to {h * w - 1}")
        if (bad := _outside(self.context_of, len(self.context))) is not None:
            raise ValueError(f"context_of names context set {bad}, but there are sets 0 to {len(self.context) - 1}")
        if not torch.equal(self.context.image[self.context_of], self.targets.image):
            raise ValueError("context_of pairs a target set with the context of another image")

    @cached_property
    def sequences(self) -> SetLengths:
        """Lengths of the predictor's sequences: for each target set, its context's length plus its own."""
        context, own = self.context.lengths.each, self.targets.lengths.each
        return SetLengths(context[self.context_of.numpy()] + own)

    @cached_property
    def shares(self) -> Tensor | None:
        """[S_t] int64: a loss weights target set s by 1 / shares[s], so that every image has the same weight.

        shares[s] is the number of images times the number of target sets of the image of s; None if every image has
        equally many target sets, as all weights are 1 / S_t then.
        """
        image = self.targets.image.numpy()
        sets = np.bincount(image)  # of each image
        if (sets == sets[0]).all():
            return None
        return torch.from_numpy(np.count_nonzero(sets) * sets[image])

    def map_tensors(self, fn: Any) -> MaskBatch:
        """Return these masks with ``fn`` applied to the tensors."""
        return unchecked(
            MaskBatch,
            context=self.context.map_tensors(fn),
            targets=self.targets.map_tensors(fn),
            grid=self.grid,
            context_of=fn(self.context_of),
            sequences=self.sequences.map_tensors(fn),
            shares=None if self.shares is None else fn(self.shares),
            on_host=self.host(),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MaskBatch:
        """Return the masks of ``to_dict``."""
        context, targets = (PatchSets.from_dict(values[name]) for name in ("context", "targets"))
        return cls(context, targets, tuple(values["grid"]), values["context_of"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values and tensors of these masks, for a file."""
        sets = {"context": self.context.to_dict(), "targets": self.targets.to_dict()}
        return {**sets, "grid": list(self.grid), "context_of": self.context_of}

    def host(self) -> MaskBatch | None:
        """Return these masks on the host without a copy from the device; None if they were made on the device."""
        return self if self.context_of.device.type == "cpu" else self.on_host

    def split(self, ends: Sequence[int]) -> list[MaskBatch]:
        """Return the masks of images ``ends[k]`` to ``ends[k + 1]`` - 1 for each k, without waiting for a device.

        Args:
            ends: ascending, from 0 to B: n + 1 numbers for n parts.
        """
        host = self.host()
        assert host is not None, "masks are made on the host"
        parts = []
        for first, end in itertools.pairwise(ends):
            context, targets = (sets.of_images(first, end) for sets in (host.context, host.targets))
            of_part = (host.context.image >= first) & (host.context.image < end)
            context_of = host.context_of[(host.targets.image >= first) & (host.targets.image < end)]
            part = MaskBatch(context, targets, host.grid, (of_part.cumsum(0) - 1)[context_of])
            parts.append(part.to(self.context_of.device, non_blocking=True))
        return parts

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskBatch:
        return self.map_tensors(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> MaskBatch:
        return self.map_tensors(lambda x: x.pin_memory())


class Tokens(NamedTuple):
    """Output of an encoder with its prefix.

    Attributes:
        patches: [P, D], one token for each patch.
        prefix: [S, k, D], the tokens before those of each set: the class token if there is one, then the registers.
    """

    patches: Tensor
    prefix: Tensor


@dataclass(frozen=True, eq=False)
class View:
    """One view of the images of a batch.

    Args:
        images: [B, 3, h, w].
        masks: of the B images; None if the whole image is seen.
        action: [B, A] float32, numbers that say how the view was made (docs/data.md); None without ``action: true``.
    """

    images: Tensor
    masks: MaskBatch | None = None
    action: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def map_tensors(self, fn: Any) -> View:
        """Return this view with ``fn`` applied to the tensors."""
        masks = None if self.masks is None else self.masks.map_tensors(fn)
        return View(fn(self.images), masks, None if self.action is None else fn(self.action))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> View:
        return self.map_tensors(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> View:
        return self.map_tensors(lambda x: x.pin_memory())

    def split(self, ends: Sequence[int]) -> list[View]:
        """Return the view of images ``ends[k]`` to ``ends[k + 1]`` - 1 for each k, without waiting for a device."""
        masks = [None] * (len(ends) - 1) if self.masks is None else self.masks.split(ends)
        parts = [slice(*pair) for pair in itertools.pairwise(ends)]
        return [
            View(self.images[part], mask, None if self.action is None else self.action[part])
            for part, mask in zip(parts, masks, strict=True)
        ]


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Args:
        step: number of updates before this one.
        where: fraction of the planned updates before this one, in [0, 1].
        epoch, epochs: the current one from 0, and their number.
        seed: of the run.
    """

    step: int = 0
    where: float = 0.0
    epoch: int = 0
    epochs: int = 1
    seed: int = 0

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a generator whose numbers are a function of seed and step: the same on all ranks."""
        seed = int(generator(Stream.COMMON, seed=self.seed, epoch=self.step).integers(2**63))
        return torch.Generator(device).manual_seed(seed)


START = Progress()
"""Before the first update."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a loss is given.

    Args:
        prediction: s_hat_y [P_t, ...], packed as ``masks.targets``.
        target: s_y [P_t, ...], without a gradient unless targets are trained. Its width may differ: a loss may compare
            scores of classes with the number of one.
        context: s_x [P_c, D_e], tokens of the context encoder, packed as ``masks.context``.
        masks: the masks of the batch.
        progress: of the run; for losses whose weights or random numbers depend on it.

    Raises:
        ValueError: prediction and target do not have equally many rows.
    """

    prediction: Tensor
    target: Tensor
    context: Tensor
    masks: MaskBatch
    progress: Progress = START

    def __post_init__(self) -> None:
        if len(self.prediction) != len(self.target):
            raise ValueError(
                f"prediction {tuple(self.prediction.shape)} and target {tuple(self.target.shape)} differ in rows"
            )

    @property
    def step(self) -> int:
        """Number of updates before this one."""
        return self.progress.step

    @property
    def where(self) -> float:
        """Progress of training, in [0, 1]."""
        return self.progress.where

    def mean(self, values: Tensor) -> Tensor:
        """Average a value per target patch [P_t] over the patches of a set, then an image's sets, then images: -> [].

        All images have the same weight, and all target blocks of an image, whatever their lengths. So an image's loss
        does not depend on the rest of its batch, and ranks with equally many images can average theirs. If all sets
        have one length and all images equally many sets, this is the plain mean.

        Raises:
            ValueError: ``values`` are not one number per target patch.
        """
        lengths, shares = self.masks.targets.lengths, self.masks.shares
        count = self.masks.targets.num_patches
        if values.shape != (count,):
            raise ValueError(
                f"values {tuple(values.shape)} must be one number for each of the {count} target patches [{count}]: "
                "average over their width first, without keepdim"
            )
        if lengths.uniform and shares is None:
            return values.mean()
        length = (lengths.offsets[1:] - lengths.offsets[:-1]).to(values.dtype)
        weight = (1.0 / ((len(lengths) if shares is None else shares) * length))[lengths.set_of_token]
        return (values * weight).sum()


@dataclass(frozen=True, eq=False)
class Output:
    """What a recipe returns for a batch.

    Args:
        loss: [].
        terms: [] by name, unweighted.
        prediction: None for a recipe that predicts no patches.
        figures: [] by name, further numbers for the log.

    Raises:
        ValueError: a term or a figure is no tensor [].
    """

    loss: Tensor
    terms: dict[str, Tensor]
    prediction: Prediction | None = None
    figures: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, values in (("terms", self.terms), ("figures", self.figures)):
            if not isinstance(values, dict):
                raise ValueError(f"{what} (={type(values).__name__}) must be a mapping from names to tensors []")
            for name, value in values.items():
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                if shape != ():
                    raise ValueError(f"{what}[{name!r}] (={shape}) must be a tensor []")


@dataclass(frozen=True, eq=False)
class Update(Output):
    """What the forward pass of an update gave, and grad_norm []: of all gradients, over all ranks, before clipping."""

    grad_norm: Tensor = field(kw_only=True)


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if it has half precision, in which small differences would be rounded away."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
