"""``PatchSets``: sets of patches of a batch of images, and what can be done with them.

Legend of shapes:

    B  images in a batch            S  sets (a context, or one target block, of one image)
    N  patches of an image, H * W   P  patches of all sets together, packed one set after another
    D  width of a token             L  length of a set
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.rng import IntArray
from jepa_kit.set_lengths import SetLengths, unchecked


@dataclass(frozen=True, eq=False)
class PatchSets:
    """Sets of patches of a batch of images, packed one after another.

    Args:
        index: [P] int64, row-major index of each patch in its image.
        image: [S] int64, the image (0 to B - 1) that each set belongs to.
        lengths: S integers that add up to P.
        hidden: [P] bool, the patches that an encoder is shown as a mask token (``masker: {name: in_place}``); None if
            no patch is.

    Raises:
        ValueError: tensors have a wrong type or shape, a set is empty, or lengths do not add up.
    """

    index: Tensor
    image: Tensor
    lengths: SetLengths
    hidden: Tensor | None = None

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
        hidden = self.hidden
        if hidden is not None and (hidden.dtype != torch.bool or hidden.shape != self.index.shape):
            raise ValueError(
                f"hidden must be bool of the shape of index {tuple(self.index.shape)}, not {hidden.dtype} of shape "
                f"{tuple(hidden.shape)}"
            )

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

    @classmethod
    def pack(cls, sets: Sequence[Tensor], image: Tensor | None = None) -> PatchSets:
        """Return sets from the patch indices of each, [L_s]; set s belongs to ``image[s]``, by default to image s."""
        index = torch.cat(list(sets))
        image = torch.arange(len(sets), device=index.device) if image is None else image
        return cls(index, image, SetLengths([len(x) for x in sets], index.device))

    @classmethod
    def from_mask(cls, chosen: NDArray[np.bool_], image: IntArray) -> PatchSets:
        """Return the true patches of each row of booleans [S, N], in ascending order; set s belongs to ``image[s]``."""
        count, patches = chosen.shape
        flat = np.flatnonzero(chosen)  # [P]
        starts = np.arange(count + 1) * patches
        lengths = np.diff(np.searchsorted(flat, starts))
        index = flat - np.repeat(starts[:-1], lengths)
        return cls(torch.from_numpy(index), torch.from_numpy(image), SetLengths(lengths))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PatchSets:
        """Return the sets of ``to_dict``."""
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields on the host, lengths as a tuple, without ``hidden`` if no patch is."""
        values = {"index": self.index.cpu(), "image": self.image.cpu(), "lengths": self.lengths.on_host}
        return values if self.hidden is None else {**values, "hidden": self.hidden.cpu()}

    @classmethod
    def cat(cls, parts: Sequence[PatchSets]) -> PatchSets:
        """Return the sets of all parts, one part after another; images keep their numbers.

        No patch of a part without ``hidden`` is hidden.
        """
        lengths = SetLengths(np.concatenate([part.lengths.each for part in parts]), parts[0].index.device)
        index, image = (torch.cat([getattr(part, name) for part in parts]) for name in ("index", "image"))
        if all(part.hidden is None for part in parts):
            return cls(index, image, lengths)
        seen = [torch.zeros_like(part.index, dtype=torch.bool) for part in parts]
        hidden = [none if part.hidden is None else part.hidden for part, none in zip(parts, seen, strict=True)]
        return cls(index, image, lengths, torch.cat(hidden))

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

    @property
    def number(self) -> Tensor:
        """[S] int64: for each set, how many sets of its image come before it. Without waiting for a device."""
        image, order = self.image.sort(stable=True)
        number = torch.arange(len(image), device=image.device) - torch.searchsorted(image, image)
        return torch.empty_like(number).index_copy(0, order, number)

    def gather(self, x: Tensor) -> Tensor:
        """Select these patches from dense tokens: [B, N, ...] -> [P, ...]."""
        flat = self.image_of_token * x.shape[1] + self.index
        return x.flatten(0, 1).index_select(0, flat)

    def split(self) -> list[Tensor]:
        """Return the patch indices of each set: S tensors [L_s]."""
        return list(self.index.split(self.lengths.on_host))

    def shown(self) -> list[Tensor]:
        """Return the patches of each set whose content an encoder sees, which are not hidden: S tensors [L_s]."""
        if self.hidden is None:
            return self.split()
        hidden = self.hidden.split(self.lengths.on_host)
        return [index[~own] for index, own in zip(self.split(), hidden, strict=True)]

    def pool(self, tokens: Tensor) -> Tensor:
        """Average tokens over each set: [P, D] -> [S, D], in the order of the sets."""
        if self.uniform:
            return tokens.unflatten(0, (len(self), -1)).mean(1)
        sums = tokens.new_zeros(len(self), tokens.shape[1]).index_add(0, self.lengths.set_of_token, tokens)
        return sums / self.lengths.offsets.diff()[:, None]

    def select(self, keep: Tensor) -> PatchSets:
        """Return the patches of each set that ``keep`` [P] bool names; each set must keep one. On the host only.

        Raises:
            ValueError: a set keeps no patch.
        """
        lengths = np.bincount(self.lengths.set_of_token[keep].numpy(), minlength=len(self))
        hidden = None if self.hidden is None else self.hidden[keep]
        return PatchSets(self.index[keep], self.image, SetLengths(lengths), hidden)

    def take(self, order: IntArray) -> PatchSets:
        """Return the sets of these numbers, [n], in this order. On the host only."""
        starts = np.cumsum(self.lengths.each) - self.lengths.each
        lengths = self.lengths.each[order]
        token = np.repeat(starts[order] - (np.cumsum(lengths) - lengths), lengths)  # [P]
        token += np.arange(len(token))
        rows = torch.from_numpy(token)
        hidden = None if self.hidden is None else self.hidden[rows]
        return PatchSets(
            self.index[rows], self.image[torch.from_numpy(order)], SetLengths(lengths, whole=self.lengths.whole), hidden
        )

    def of_images(self, first: int, end: int) -> PatchSets:
        """Return the sets of images ``first`` to ``end`` - 1, renumbered from 0. On the host only."""
        sets = self.take(np.flatnonzero((self.image >= first) & (self.image < end)))
        return replace(sets, image=sets.image - first)

    def map_tensors(self, fn: Any) -> PatchSets:
        """Return these sets with ``fn`` applied to the tensors."""
        hidden = None if self.hidden is None else fn(self.hidden)
        lengths = self.lengths.map_tensors(fn)
        return unchecked(PatchSets, index=fn(self.index), image=fn(self.image), lengths=lengths, hidden=hidden)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PatchSets:
        return self.map_tensors(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> PatchSets:
        return self.map_tensors(lambda x: x.pin_memory())
