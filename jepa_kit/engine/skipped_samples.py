"""Record the samples that a run could not use in ``skipped.jsonl``, and stop the run if there are too many.

One line for each: ``step``, ``epoch`` (of the data), ``sample`` (its number), ``key`` and ``reason``. A resumed run
drops the lines of the steps that it repeats.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jepa_kit.data.batch import Skipped
from jepa_kit.distributed.collectives import all_gather_object, is_main, mean_over_ranks
from jepa_kit.errors import TooManySkippedError
from jepa_kit.files import read_json_lines, write_json_lines
from jepa_kit.run_folder import SKIPPED

SHOWN = 3
"""So many reasons are printed at a time; the file has all."""
AT_LEAST = 8
"""Skipped samples that are tolerated in the smallest epoch, unless none are."""

Line = dict[str, Any]


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


class SkippedSamples:
    """The skipped samples of all processes.

    Args:
        folder: of the run.
        first_step: lines at or after it are dropped.
        steps_per_epoch: of the data.
        allowance: how many samples of an epoch may be skipped.
        device: of the all-reduce.
    """

    def __init__(
        self, folder: Path, *, first_step: int, steps_per_epoch: int, allowance: Allowance, device: torch.device
    ) -> None:
        self.path = folder / SKIPPED
        self.steps_per_epoch, self.allowance, self.device = steps_per_epoch, allowance, device
        lines = [line for line in read_skipped(folder) if line["step"] < first_step]
        self.total = len(lines)
        self._of_epoch = Counter(line["epoch"] for line in lines)
        self._new: list[Line] = []
        if is_main() and self.path.exists():
            write_json_lines(self.path, lines)

    def add(self, step: int, skipped: Sequence[Skipped]) -> None:
        """Note the samples that are missing in this process's batch of a step."""
        epoch = step // self.steps_per_epoch
        self._new += [{"step": step, "epoch": epoch, **entry._asdict()} for entry in skipped]

    def collect(self, info: Callable[[str], None]) -> int:
        """Write the lines that the processes have noted; every process must call it.

        Args:
            info: prints a message, on the main process.

        Returns:
            samples skipped since the run began.

        Raises:
            TooManySkippedError: on every process.
        """
        new = self._joined()
        if not new:
            return self.total
        self.total += len(new)
        self._of_epoch.update(line["epoch"] for line in new)
        if is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in new)
            for line in new[:SHOWN]:
                info(f"skipped {line['key']!r}: {line['reason']}")
            if len(new) > SHOWN:
                info(f"skipped {len(new) - SHOWN} more: {self.path}")
        for epoch in sorted({line["epoch"] for line in new}):
            if self._of_epoch[epoch] > self.allowance.count:
                raise TooManySkippedError(self._why(epoch, new))
        return self.total

    def _joined(self) -> list[Line]:
        """Return the new lines of all processes, in the order of their steps."""
        own, self._new = self._new, []
        # one mean over ranks is cheap, and lists are sent only if it is above 0
        if not float(mean_over_ranks(torch.tensor(float(len(own)), dtype=torch.float64, device=self.device))):
            return []
        return sorted((line for lines in all_gather_object(own) for line in lines), key=lambda line: line["step"])

    def _why(self, epoch: int, new: Sequence[Line]) -> str:
        shown = [line for line in new if line["epoch"] == epoch][:SHOWN]
        allowed = self.allowance
        return (
            f"{self._of_epoch[epoch]} of the {allowed.samples} samples of epoch {epoch} could not be used, more than "
            f"the {allowed.count} that data.max_skipped (={allowed.share:g}) allows. {self.path} lists all; the last: "
            + "; ".join(f"{line['key']!r}: {line['reason']}" for line in shown)
        )


def read_skipped(folder: Path) -> list[Line]:
    """Return the lines of a run, without a last one that is cut short.

    Raises:
        ValueError: another line is not JSON.
    """
    return read_json_lines(folder / SKIPPED)
