"""Lengths of packed sets, kept on the host and on the device.

S  sets    P  patches of all sets together, packed one set after another
L, Lk  queries and keys of a set    N  pairs of a query and a key of the same set: the sum of L * Lk over sets
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

K = TypeVar("K")


def unchecked(kind: type[K], **fields: Any) -> K:
    """Return an object without running its checks, which would wait for a device; the host's copy has passed them."""
    made = object.__new__(kind)
    made.__dict__.update(fields)
    return made


class SetLengths:
    """Lengths of packed sets: integers on the host, offsets on the device.

    The host keeps every length, so that no operation has to read one back from the device.

    Args:
        lengths: S positive integers.
        device: device of ``offsets``.
        whole: whether each set is all patches of an image, so that lengths are the same at every step.

    Raises:
        ValueError: there is no set, a set is empty, or lengths are not integers.
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
            raise ValueError(f"lengths[{at}] (={shortest}) must be at least 1")
        self.each = each
        """[S] int64, on the host."""
        self.on_host: tuple[int, ...] = tuple(each.tolist())
        self.total: int = int(each.sum())
        self.uniform: bool = self.longest == shortest
        self.offsets: Tensor
        """[S + 1] int32: set s is tokens offsets[s] to offsets[s + 1]."""
        if self.uniform and torch.device(device).type != "cpu":  # a copy from the host would wait
            self.offsets = torch.arange(each.size + 1, device=device, dtype=torch.int32) * self.longest
        else:
            offsets = np.zeros(each.size + 1, dtype=np.int32)
            np.cumsum(each, out=offsets[1:])
            self.offsets = torch.from_numpy(offsets).to(device)
        self.layouts: dict[Any, Any] = {}
        """What an attention backend derives from the lengths: computed once, used by every layer."""

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
        """[P] int64: the set of each token. Computed on the device at first use, so it is never copied."""
        if self.uniform:
            return torch.arange(self.total, device=self.device) // self.longest
        sets = torch.arange(len(self), device=self.device)
        return sets.repeat_interleave(self.offsets.diff(), output_size=self.total)

    @cached_property
    def position(self) -> Tensor:
        """[P] int64: the index of each token inside its own set."""
        starts = self.offsets[:-1].long()[self.set_of_token]
        return torch.arange(self.total, device=self.device) - starts

    def layout(self, make: Callable[[SetLengths], K]) -> K:
        """Return ``make(self)``, computed once."""
        if make not in self.layouts:
            self.layouts[make] = make(self)
        return self.layouts[make]

    def layout_with(self, make: Callable[[SetLengths, SetLengths], K], key_lengths: SetLengths) -> K:
        """Return ``make(self, key_lengths)``, computed once per pair of lengths."""
        name = (make, key_lengths.on_host)  # not key_lengths: a cycle would keep device memory until a collection
        if name not in self.layouts:
            self.layouts[name] = make(self, key_lengths)
        return self.layouts[name]

    def plus(self, count: int) -> SetLengths:
        """Return these lengths with ``count`` more tokens in each set; computed once, without waiting for a device."""
        if not count:
            return self
        if (name := (SetLengths.plus, count)) not in self.layouts:
            more = torch.arange(len(self) + 1, device=self.device, dtype=torch.int32) * count
            self.layouts[name] = unchecked(
                SetLengths,
                each=self.each + count,
                on_host=tuple(n + count for n in self.on_host),
                total=self.total + len(self) * count,
                longest=self.longest + count,
                uniform=self.uniform,
                whole=self.whole,
                offsets=self.offsets + more,
                layouts={},
            )
        return self.layouts[name]

    def minus(self, other: SetLengths) -> SetLengths:
        """Return these lengths less those of as many sets that are shorter, without waiting for a device."""
        each = self.each - other.each
        assert (each > 0).all(), "each set of the other lengths is shorter"
        return unchecked(
            SetLengths,
            each=each,
            on_host=tuple(each.tolist()),
            total=self.total - other.total,
            longest=int(each.max()),
            uniform=bool((each == each[0]).all()),
            whole=False,
            offsets=self.offsets - other.offsets,
            layouts={},
        )

    def map_tensors(self, fn: Any) -> SetLengths:
        """Return these lengths with ``fn`` applied to the tensors (``.to``, ``.pin_memory``)."""
        on_host = {name: getattr(self, name) for name in ("each", "on_host", "total", "longest", "uniform", "whole")}
        return unchecked(SetLengths, **on_host, offsets=fn(self.offsets), layouts={})


def token_pairs(lengths: SetLengths, key_lengths: SetLengths | None = None) -> tuple[Tensor, Tensor]:
    """Return the packed query and the packed key of each entry of a flat bias: two [N] int64 tensors.

    The order is by set, then query, then key. Computed once per pair of lengths, without waiting for the device. With
    relative positions of patches, a flat bias is one gather::

        i, j = token_pairs(lengths)
        bias = table[:, relative[patch[i], patch[j]]]  # [h, N]

    Args:
        lengths: lengths of the sets of queries.
        key_lengths: lengths of the sets of keys; ``lengths`` by default.
    """
    return lengths.layout_with(_pairs, lengths if key_lengths is None else key_lengths)


def _pairs(lengths: SetLengths, key_lengths: SetLengths) -> tuple[Tensor, Tensor]:
    starts, key_starts = (x.offsets.narrow(0, 0, len(x)).long() for x in (lengths, key_lengths))  # [S]
    keys = key_lengths.offsets.diff().long()  # [S]
    sizes = lengths.offsets.diff() * keys  # [S]
    n = count_pairs(lengths, key_lengths)
    sets = torch.arange(len(lengths), device=lengths.device).repeat_interleave(sizes, output_size=n)  # [N]
    before, i, j, keys = torch.stack((sizes.cumsum(0) - sizes, starts, key_starts, keys)).index_select(1, sets)
    inside = torch.arange(n, device=lengths.device) - before
    return i + inside // keys, j + inside % keys


def count_pairs(lengths: SetLengths, key_lengths: SetLengths) -> int:
    """Return N, the number of pairs of a query and a key of the same set."""
    return int((lengths.each * key_lengths.each).sum())
