"""The parts of a data set: shards that share an index; or samples in no shard (``jepa_kit/data/listed.py``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jepa_kit.data.shards.index import read_arrays
from jepa_kit.rng import IntArray


class Part(Protocol):
    """Samples of a data set, N of them."""

    @property
    def path(self) -> str:
        """The name that the user gave, for messages."""

    @property
    def shards(self) -> Sequence[dict[str, Any]]:
        """The entries of its shards in the index, or one entry for all samples."""

    @property
    def places(self) -> Sequence[str]:
        """Path or URL of each."""

    @property
    def unit_sizes(self) -> IntArray:
        """[units] samples of each unit, which are read one after another: a shard, or a file in none."""

    @property
    def classes(self) -> Mapping[str, tuple[str, ...]]:
        """Label name -> the names of its classes."""

    @property
    def mask_classes(self) -> tuple[str, ...] | None:
        """Names of the classes of masks; None if there are no masks."""

    @property
    def links(self) -> Mapping[str, Sequence[str]]:
        """Key -> other names that the tar headers of its members may have."""

    @property
    def read(self) -> Callable[[int], bytes] | None:
        """Sample -> bytes of its image file; None if it is read at its offset in a shard."""

    def arrays(self, *, verified: bool = False) -> dict[str, NDArray[Any]]:
        """Return the arrays of an index by name; of samples in no shard, the offset is the number of the sample."""


@dataclass(frozen=True, eq=False)
class ShardPart:
    """Shards that share an index.

    Args:
        path: the name that the user gave, for messages.
        folder: local folder of the index.
        shards: their entries in the index.
        places: path or URL of each shard.
        rows: [N] their rows in the arrays of the index; None for all rows.
        index: the content of ``index.json``.
    """

    path: str
    folder: str
    shards: list[dict[str, Any]]
    places: list[str]
    rows: IntArray | None
    index: dict[str, Any]

    @property
    def unit_sizes(self) -> IntArray:
        """[shards] samples of each shard, which are read one after another."""
        return np.array([entry["samples"] for entry in self.shards], dtype=np.int64)

    @property
    def mask_classes(self) -> tuple[str, ...] | None:
        """Names of the classes of masks; None if there are no masks."""
        return tuple(self.index["masks"]["classes"]) if "masks" in self.index else None

    @property
    def links(self) -> dict[str, list[str]]:
        """Key -> other names that the tar headers of its members may have."""
        found: dict[str, list[str]] = self.index.get("links", {})
        return found

    @property
    def read(self) -> None:
        """Nothing: samples are read at their offsets."""

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Label name -> the names of its classes."""
        return {k: tuple(v) for k, v in self.index["labels"].items()}

    def arrays(self, *, verified: bool = False) -> dict[str, NDArray[Any]]:
        """Return the arrays of the index by name, memory-mapped if the part has all rows; see ``read_arrays``."""
        found = read_arrays(self.folder, self.index, verified=verified)
        return found if self.rows is None else {name: array[self.rows] for name, array in found.items()}
