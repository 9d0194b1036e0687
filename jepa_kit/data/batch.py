"""``Batch``: the views of a rank's samples in one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jepa_kit.structures import MaskBatch, View


class Skipped(NamedTuple):
    """A sample missing from a batch: its index, key and the reason."""

    sample: int
    key: str
    reason: str


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of one rank.

    Args:
        views: of the same B samples, one or several: images [B, 3, h, w] uint8, channels last in memory.
        samples: [B] int64, the number of each image in its data set.
        skipped: samples of this batch that could not be used, and are missing from all views.
    """

    views: tuple[View, ...]
    samples: Tensor
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def images(self) -> Tensor:
        """[B, 3, h, w], the images of the first view."""
        return self.views[0].images

    @property
    def masks(self) -> MaskBatch | None:
        """The masks of the first view."""
        return self.views[0].masks

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """Return this batch with ``fn`` applied to all tensors."""
        return replace(self, views=tuple(view.map_tensors(fn) for view in self.views), samples=fn(self.samples))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self.map_tensors(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> Batch:
        return self.map_tensors(lambda x: x.pin_memory())
