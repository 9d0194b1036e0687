"""Tensors as one block of bytes for a page; static/tensors.js reads them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Entry = tuple[str, int, int, int]
"""(kind, offset in bytes, rows, columns); kinds are those of static/tensors.js."""
LEVELS = 32767
"""Largest integer of a weight."""


class TensorBlock:
    """Packs tensors one after another, little-endian, each at a multiple of 4 bytes.

    Attributes:
        entries: name -> where the tensor is.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._parts: list[bytes] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, name: str, values: Tensor) -> None:
        """Append a tensor.

        Bytes stay bytes. Of other types, a vector is stored in float32, and a matrix as integers of 16 bits with a
        scale for each row: an error of at most 1 / 65,534 of the row's largest value.

        Args:
            name: not used before.
            values: [n] or [rows, columns].
        """
        assert name not in self.entries
        assert values.ndim in (1, 2)
        table = values.detach().cpu() if values.ndim == 2 else values.detach().cpu()[None]
        rows, columns = table.shape
        if values.dtype == torch.uint8:
            kind, data = "u8", table.numpy().tobytes()
        elif values.ndim == 1:
            kind, data = "f32", table.numpy().astype("<f4").tobytes()
        else:
            kind, data = "i16", _as_integers(table.double().numpy())
        self.entries[name] = (kind, self._size, rows, columns)
        padded = data + bytes(-len(data) % 4)
        self._parts.append(padded)
        self._size += len(padded)

    def to_bytes(self) -> bytes:
        """Return all tensors."""
        return b"".join(self._parts)


def _as_integers(table: NDArray[np.float64]) -> bytes:
    """Return the scales of the rows, then the integers."""
    largest = np.abs(table).max(axis=1, keepdims=True)
    scale = (np.where(largest > 0, largest, 1) / LEVELS).astype("<f4")
    return scale.tobytes() + np.rint(table / scale).clip(-LEVELS, LEVELS).astype("<i2").tobytes()
