"""Samples that cannot be read, and how many of them a run tolerates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

AT_LEAST = 8
"""Skipped samples that are tolerated in the smallest epoch, unless none are."""


class Skipped(NamedTuple):
    """A sample missing from a batch: its index, key and the reason."""

    sample: int
    key: str
    reason: str


class Refusal(NamedTuple):
    """Something that does not become part of a shard or of its index: its name and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Allowance:
    """How many samples of an epoch may be skipped.

    Args:
        share: fraction of an epoch's samples in [0, 1]; 0 allows none.
        samples: samples of an epoch, over all ranks.

    Raises:
        ValueError: ``share`` is outside [0, 1].
    """

    share: float
    samples: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"max_skipped (={self.share}) must be a fraction in [0, 1]")

    @property
    def count(self) -> int:
        """The largest number of skipped samples per epoch."""
        return max(int(self.share * self.samples), AT_LEAST) if self.share else 0
