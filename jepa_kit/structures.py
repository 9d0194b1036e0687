"""The only data that cross rooms: sets of patches, the masks of a batch, and what a loss may look at.

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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Grid = tuple[int, int]
"""(H, W): rows and columns of patches."""


class SetLengths:
    """Lengths of packed sets: on the host as integers, on the device as boundaries.

    The host knows every length, so that nothing waits for the device to tell it one.

    Args:
        lengths: S positive integers.
        device: where ``offsets`` lives.
        whole: each set is all patches of an image, so that the lengths are the same at every step.

    Raises:
        ValueError: no set, a set without a patch, or lengths that are no integers.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        device: torch.device | str = "cpu",
        *,
        whole: bool = False,
    ) -> None:
        self.whole = whole
        each = np.asarray(lengths)
        if not each.size:
            raise ValueError("lengths (=()) must name at least one set")
        if each.dtype.kind not in "iu":
            raise ValueError(f"lengths (={each[0]}, ...) must be integers, not {each.dtype}")
        each = each.astype(np.int64, copy=False)
        self.longest: int = int(each.max())
        shortest = int(each.min())
        if shortest < 1:
            at = int(each.argmin())
            raise ValueError(f"lengths[{at}] (={shortest}) must be at least 1: a set holds at least one patch")
        self.each = each
        """[S] int64, on the host."""
        self.on_host: tuple[int, ...] = tuple(each.tolist())
        self.total: int = int(each.sum())
        self.uniform: bool = self.longest == shortest
        self.offsets: Tensor
        """[S + 1] int32: set s is tokens offsets[s] to offsets[s + 1]."""
        if self.uniform and torch.device(device).type != "cpu":  # made on the device: no copy that it would wait for
            self.offsets = torch.arange(each.size + 1, device=device, dtype=torch.int32) * self.longest
        else:
            offsets = np.zeros(each.size + 1, dtype=np.int32)
            np.cumsum(each, out=offsets[1:])
            self.offsets = torch.from_numpy(offsets).to(device)
        self.layouts: dict[str, Any] = {}
        """What an attention backend derives from the lengths, made once and used by every layer."""

    def __len__(self) -> int:
        return len(self.on_host)

    def __iter__(self) -> Any:
        return iter(self.on_host)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SetLengths) and self.on_host == other.on_host

    def __hash__(self) -> int:
        return hash(self.on_host)

    def __repr__(self) -> str:
        return f"SetLengths({len(self)} sets, {self.total} tokens, uniform={self.uniform})"

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    @cached_property
    def set_of_token(self) -> Tensor:
        """[P] int64: the set that each token belongs to. Made where it is asked for, so that it need not be copied."""
        if self.uniform:
            return torch.arange(self.total, device=self.device) // self.longest
        sets = torch.arange(len(self), device=self.device)
        return sets.repeat_interleave(self.offsets.diff(), output_size=self.total)

    @cached_property
    def position(self) -> Tensor:
        """[P] int64: the place of each token inside its own set."""
        starts = self.offsets[:-1].long()[self.set_of_token]
        return torch.arange(self.total, device=self.device) - starts

    def map_tensors(self, fn: Any) -> SetLengths:
        """The same lengths with ``fn`` applied to the tensors (``.to``, ``.pin_memory``)."""
        other = object.__new__(SetLengths)
        other.each, other.on_host = self.each, self.on_host
        other.total, other.longest, other.uniform = self.total, self.longest, self.uniform
        other.whole = self.whole
        other.offsets = fn(self.offsets)
        other.layouts = {}
        return other


@dataclass(frozen=True, eq=False)
class PatchSets:
    """Sets of patches of a batch of images, packed one after another.

    Args:
        index: [P] int64, row-major patch number inside its image.
        image: [S] int64, the image (0 to B - 1) that each set belongs to.
        lengths: S integers that add up to P.

    Raises:
        ValueError: ill-typed or misshapen tensors, an empty set, lengths that do not add up.
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
        """Every patch of every image: B sets of N patches."""
        index = torch.arange(num_patches, device=device).repeat(batch_size)
        return cls(
            index,
            torch.arange(batch_size, device=device),
            SetLengths([num_patches] * batch_size, device, whole=True),
        )

    @classmethod
    def from_padded(cls, index: Tensor, image: Tensor | None = None) -> PatchSets:
        """Uniform sets from a table [S, L]; set s belongs to ``image[s]``, or to image s."""
        s, n = index.shape
        image = torch.arange(s, device=index.device) if image is None else image
        return cls(index.reshape(-1), image, SetLengths([n] * s, index.device))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def uniform(self) -> bool:
        """All sets have one length, so a packed [P, ...] is a view [S, L, ...] without a copy."""
        return self.lengths.uniform

    @property
    def num_patches(self) -> int:
        """P, the patches of all sets together."""
        return self.lengths.total

    @property
    def image_of_token(self) -> Tensor:
        """[P] int64: the image that each patch belongs to."""
        return self.image[self.lengths.set_of_token]

    def gather(self, x: Tensor) -> Tensor:
        """Takes these patches out of dense tokens: [B, N, ...] -> [P, ...]."""
        flat = self.image_of_token * x.shape[1] + self.index
        return x.flatten(0, 1).index_select(0, flat)

    def split(self) -> list[Tensor]:
        """Patch numbers set by set: S tensors [L_s]."""
        return list(self.index.split(self.lengths.on_host))

    def of_images(self, first: int, end: int) -> PatchSets:
        """The sets of images ``first`` to ``end`` - 1, which are numbered from 0 then. On the host only."""
        chosen = (self.image >= first) & (self.image < end)  # [S]
        lengths = SetLengths(self.lengths.each[chosen.numpy()])
        return PatchSets(self.index[chosen[self.lengths.set_of_token]], self.image[chosen] - first, lengths)

    def map_tensors(self, fn: Any) -> PatchSets:
        other = object.__new__(PatchSets)
        for name, value in (
            ("index", fn(self.index)),
            ("image", fn(self.image)),
            ("lengths", self.lengths.map_tensors(fn)),
        ):
            object.__setattr__(other, name, value)
        return other

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PatchSets:
        return self.map_tensors(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> PatchSets:
        return self.map_tensors(lambda x: x.pin_memory())


def _extremes(x: Tensor) -> tuple[int, int]:
    values = x.numpy()  # on the host; several times as fast as torch's for so few numbers
    return int(values.min()), int(values.max())


@dataclass(frozen=True, eq=False)
class MaskBatch:
    """What is seen and what is predicted, for every image of a batch.

    Args:
        context: the context sets (one or several an image).
        targets: the target sets (target blocks).
        grid: (H, W) patches of every image.
        context_of: [S_t] int64, for each target set the context set that it is predicted from.

    Raises:
        ValueError: a patch outside the grid, a target set without its context set, or one predicted
            from another image's context. (Checked on the host, at construction.)
    """

    context: PatchSets
    targets: PatchSets
    grid: Grid
    context_of: Tensor
    on_host: MaskBatch | None = field(init=False, default=None)
    """What masks on a device were moved from."""

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
            lowest, highest = _extremes(sets.index)
            if lowest < 0 or highest >= h * w:
                bad = lowest if lowest < 0 else highest
                raise ValueError(f"{name} holds patch {bad}, but a grid of {h} x {w} has patches 0 to {h * w - 1}")
        lowest, highest = _extremes(self.context_of)
        if lowest < 0 or highest >= len(self.context):
            bad = lowest if lowest < 0 else highest
            raise ValueError(f"context_of names context set {bad}, but there are sets 0 to {len(self.context) - 1}")
        if not torch.equal(self.context.image[self.context_of], self.targets.image):
            raise ValueError("context_of pairs a target set with the context of another image")

    @cached_property
    def sequences(self) -> SetLengths:
        """For each target set, the length of its context plus its own: what a predictor reads at once."""
        context, own = self.context.lengths.each, self.targets.lengths.each
        return SetLengths(context[self.context_of.numpy()] + own)

    @cached_property
    def shares(self) -> Tensor | None:
        """[S_t] int64: target set s counts 1 / shares[s] in a loss, so that every image counts the same.

        They are the number of images times the target sets of the set's image. None where all images have as many
        target sets: each counts 1 / S_t then.
        """
        image = self.targets.image.numpy()
        sets = np.bincount(image)  # of each image
        if (sets == sets[0]).all():
            return None
        return torch.from_numpy(np.count_nonzero(sets) * sets[image])

    def map_tensors(self, fn: Any) -> MaskBatch:
        """These masks with ``fn`` applied to the tensors."""
        other = object.__new__(MaskBatch)
        for name, value in (
            ("context", self.context.map_tensors(fn)),
            ("targets", self.targets.map_tensors(fn)),
            ("grid", self.grid),
            ("context_of", fn(self.context_of)),
            ("sequences", self.sequences.map_tensors(fn)),
            ("shares", None if self.shares is None else fn(self.shares)),
            ("on_host", self.host()),
        ):
            object.__setattr__(other, name, value)
        return other

    def host(self) -> MaskBatch | None:
        """These masks on the host, without a copy from the device; None where they were not moved from there."""
        return self if self.context_of.device.type == "cpu" else self.on_host

    def split(self, ends: Sequence[int]) -> list[MaskBatch]:
        """The masks of images ``ends[k]`` to ``ends[k + 1]`` - 1 for each k, on the same device; waits for no device.

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
    """What a loss may look at.

    Args:
        prediction: s_hat_y [P_t, D], packed as ``masks.targets``.
        target: s_y [P_t, D], without a gradient unless the target encoder is trained.
        context: s_x [P_c, D_e], the context encoder's tokens, packed as ``masks.context``.
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
        """Mean of a value for each target patch [P_t] over the patches of a set, an image's sets, and the images.

        Every image counts the same, and every target block of an image, whatever its length: an image's loss then does
        not depend on who shares its batch, and ranks with as many images each may average theirs. Where all sets
        are of one length and all images have as many, this is the plain mean.
        """
        lengths, shares = self.masks.targets.lengths, self.masks.shares
        if lengths.uniform and shares is None:
            return values.mean()
        length = (lengths.offsets[1:] - lengths.offsets[:-1]).to(values.dtype)
        weight = (1.0 / ((len(lengths) if shares is None else shares) * length))[lengths.set_of_token]
        return (values * weight).sum()


@dataclass(frozen=True, eq=False)
class Output:
    """loss [] is the weighted sum of the terms [], by name; prediction is what they were taken from."""

    loss: Tensor
    terms: dict[str, Tensor]
    prediction: Prediction
