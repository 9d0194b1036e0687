"""Data types that packages exchange: sets of patches, masks of a batch, predictions, outputs.

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
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jepa_kit.set_lengths import SetLengths, unchecked

Grid = tuple[int, int]
"""(H, W): rows and columns of patches."""

Precision = Literal["float32", "tf32", "bf16"]
"""Of the factors of matrix products (jepa_kit/precision.py)."""

Pooling = Literal["mean", "none"]
"""Whether a feature is the mean over an image's patches, or there is one for each patch."""


@dataclass(frozen=True, eq=False)
class PatchSets:
    """Sets of patches of a batch of images, packed one after another.

    Args:
        index: [P] int64, row-major index of each patch in its image.
        image: [S] int64, the image (0 to B - 1) that each set belongs to.
        lengths: S integers that add up to P.

    Raises:
        ValueError: tensors have a wrong type or shape, a set is empty, or lengths do not add up.
    """

    index: Tensor
    image: Tensor
    lengths: SetLengths

    def __post_init__(self) -> None:
        if not isinstance(self.lengths, SetLengths):
            object.__setattr__(self, "lengths", SetLengths(self.lengths, self.index.device))
        for name, x in (("index", self.index), ("image", self.image)):
            if x.dtype != torch.int64 or x.ndim != 1:
                raise ValueError(f"{name} must be a 1-D int64 tensor, not {x.dtype} of shape {tuple(x.shape)}")
        if self.index.numel() != self.lengths.total:
            raise ValueError(f"lengths add up to {self.lengths.total}, but index holds {self.index.numel()} patches")
        if self.image.numel() != len(self.lengths):
            raise ValueError(f"image names {self.image.numel()} sets, but there are {len(self.lengths)} lengths")

    @classmethod
    def full(cls, batch_size: int, num_patches: int, device: torch.device | str = "cpu") -> PatchSets:
        """Return every patch of every image: B sets of N patches."""
        index = torch.arange(num_patches, device=device).repeat(batch_size)
        return cls(
            index,
            torch.arange(batch_size, device=device),
            SetLengths([num_patches] * batch_size, device, whole=True),
        )

    @classmethod
    def from_padded(cls, index: Tensor, image: Tensor | None = None) -> PatchSets:
        """Return sets of equal length from a table [S, L]; set s belongs to ``image[s]``, by default to image s."""
        s, n = index.shape
        image = torch.arange(s, device=index.device) if image is None else image
        return cls(index.reshape(-1), image, SetLengths([n] * s, index.device))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def uniform(self) -> bool:
        """Whether all sets have one length, so that a packed [P, ...] can be viewed as [S, L, ...]."""
        return self.lengths.uniform

    @property
    def num_patches(self) -> int:
        """P, the number of patches of all sets together."""
        return self.lengths.total

    @property
    def image_of_token(self) -> Tensor:
        """[P] int64: the image of each patch."""
        return self.image[self.lengths.set_of_token]

    def gather(self, x: Tensor) -> Tensor:
        """Select these patches from dense tokens: [B, N, ...] -> [P, ...]."""
        flat = self.image_of_token * x.shape[1] + self.index
        return x.flatten(0, 1).index_select(0, flat)

    def split(self) -> list[Tensor]:
        """Return the patch indices of each set: S tensors [L_s]."""
        return list(self.index.split(self.lengths.on_host))

    def of_images(self, first: int, end: int) -> PatchSets:
        """Return the sets of images ``first`` to ``end`` - 1, renumbered from 0. On the host only."""
        chosen = (self.image >= first) & (self.image < end)  # [S]
        lengths = SetLengths(self.lengths.each[chosen.numpy()])
        return PatchSets(self.index[chosen[self.lengths.set_of_token]], self.image[chosen] - first, lengths)

    def map_tensors(self, fn: Any) -> PatchSets:
        """Return these sets with ``fn`` applied to the tensors."""
        return unchecked(PatchSets, index=fn(self.index), image=fn(self.image), lengths=self.lengths.map_tensors(fn))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PatchSets:
        return self.map_tensors(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> PatchSets:
        return self.map_tensors(lambda x: x.pin_memory())


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


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a loss is given.

    Args:
        prediction: s_hat_y [P_t, D], packed as ``masks.targets``.
        target: s_y [P_t, D], without a gradient unless targets are trained.
        context: s_x [P_c, D_e], tokens of the context encoder, packed as ``masks.context``.
        masks: the masks of the batch.
    """

    prediction: Tensor
    target: Tensor
    context: Tensor
    masks: MaskBatch

    def __post_init__(self) -> None:
        if self.prediction.shape != self.target.shape:
            raise ValueError(
                f"prediction {tuple(self.prediction.shape)} and target {tuple(self.target.shape)} differ in shape"
            )

    def mean(self, values: Tensor) -> Tensor:
        """Average a value per target patch [P_t] over the patches of a set, then an image's sets, then images: -> [].

        All images have the same weight, and all target blocks of an image, whatever their lengths. So an image's loss
        does not depend on the rest of its batch, and ranks with equally many images can average theirs. If all sets
        have one length and all images equally many sets, this is the plain mean.
        """
        lengths, shares = self.masks.targets.lengths, self.masks.shares
        if lengths.uniform and shares is None:
            return values.mean()
        length = (lengths.offsets[1:] - lengths.offsets[:-1]).to(values.dtype)
        weight = (1.0 / ((len(lengths) if shares is None else shares) * length))[lengths.set_of_token]
        return (values * weight).sum()


@dataclass(frozen=True, eq=False)
class Output:
    """What a recipe returns for a batch: the loss [], its terms [] by name (unweighted), and the prediction."""

    loss: Tensor
    terms: dict[str, Tensor]
    prediction: Prediction


@dataclass(frozen=True, eq=False)
class Update(Output):
    """What the forward pass of an update gave, and grad_norm []: of all gradients, over all ranks, before clipping."""

    grad_norm: Tensor
