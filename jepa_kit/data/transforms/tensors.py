"""Arrays of pixels to batches, and their normalisation.

Legend of shapes: B images, h, w rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info


class Stack:
    """As ``stack``, for images that come one by one: each is copied to its place at once, where the batch stays.

    Pixels lie in memory as decoders give them, channels last: ``normalize`` puts them in order, on the device.

    Args:
        count: how many there can be.
    """

    def __init__(self, count: int) -> None:
        self.count, self.filled = count, 0
        self._pixels: NDArray[np.uint8] | None = None

    def add(self, image: NDArray[np.uint8] | Image.Image) -> None:
        """The next image, [h, w, 3] or Pillow's, of the size of the others."""
        pixels = np.asarray(image)
        if self._pixels is None:
            self._room = _room((self.count, *pixels.shape))
            self._pixels = self._room.numpy()
        self._pixels[self.filled] = pixels
        self.filled += 1

    def tensor(self) -> Tensor:
        """[B, 3, h, w] uint8 of those that came, channels last in memory."""
        assert self._pixels is not None, "no image came"
        return self._room[: self.filled].permute(0, 3, 1, 2)


def _room(shape: tuple[int, ...]) -> Tensor:
    """Memory for bytes; in a loader worker, such as its batches are sent in, or they would be copied once more."""
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collation does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]


def stack(images: Sequence[NDArray[np.uint8] | Image.Image]) -> Tensor:
    """[B, 3, h, w] uint8 of RGB images of one size, each an array [h, w, 3] or Pillow's; channels last in memory."""
    stacked = Stack(len(images))
    for image in images:
        stacked.add(image)
    return stacked.tensor()


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std, on the device where the images are.

    Args:
        images: [B, 3, h, w] uint8, in any order in memory.
        mean, std: of each channel, for values in [0, 1].

    Returns:
        [B, 3, h, w] float32, contiguous.
    """
    centre, scale = _statistics(tuple(mean), tuple(std), images.device)
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0).sub_(centre).div_(scale)


@lru_cache(maxsize=16)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # kept, since making them copies to the device, which waits for it
    return tuple(torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))  # type: ignore[return-value]
