"""What a sample may lack without stopping a run, and how much of that stops it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

AT_LEAST = 8
"""So many samples of an epoch may be skipped however few it has, unless none may."""


class Skipped(NamedTuple):
    """A sample that a batch lacks: its number, its key and the reason."""

    sample: int
    key: str
    reason: str


@dataclass(frozen=True)
class Allowance:
    """How many samples of an epoch may be skipped.

    Args:
        share: of the samples of an epoch, 0 to 1; 0 allows none.
        samples: of an epoch, over all ranks.

    Raises:
        ValueError: a share outside its range.
    """

    share: float
    samples: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"max_skipped (={self.share}) must be a share of the samples, 0 to 1")

    @property
    def count(self) -> int:
        """The largest number that is allowed."""
        return max(int(self.share * self.samples), AT_LEAST) if self.share else 0
