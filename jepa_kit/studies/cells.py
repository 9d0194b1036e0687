"""The cells and baselines of a checked study, with what each needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jepa_kit.config import Config
from jepa_kit.studies.arms import Arm
from jepa_kit.studies.matching import Length
from jepa_kit.studies.spec import Protocol, Study

Shards = str | Sequence[str]
"""Value of ``data.shards``."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A cell (one arm with one seed) or a baseline.

    Args:
        id: its digest.
        kind: what it is.
        title: of the arm or baseline.
        baseline: its name; None for a cell.
        seed: of the run, or of an untrained network.
        config: of the run; of a baseline, the config whose images and encoder it has.
        length: of the run; None for a baseline.
        evaluations: digest of each evaluation -> its protocol.
        arms: numbers of the arms whose network and images a baseline has; those of a cell are empty.
    """

    id: str
    kind: Literal["cell", "baseline"]
    title: str
    baseline: str | None = None
    seed: int
    config: Config
    length: Length | None
    evaluations: Mapping[str, Protocol]
    arms: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked study.

    Args:
        study: as in its file.
        name: that of the file.
        arms: the base arm first.
        lengths: of each arm.
        cells: of each arm, by seed.
        baselines: each once.
        train, test: shards of the protocols.
        data: path of shards -> ``samples``, ``digest``, ``labels`` and ``masks``; paths as ``place_of`` has them.
    """

    study: Study
    name: str
    arms: Sequence[Arm]
    lengths: Sequence[Length]
    cells: Sequence[Sequence[Job]]
    baselines: Sequence[Job]
    train: Shards
    test: Shards
    data: Mapping[str, Any]

    @property
    def jobs(self) -> list[Job]:
        """Return all jobs: baselines, then the first seed of every arm, then the second, ..."""
        return [*self.baselines, *(job for seed in zip(*self.cells, strict=True) for job in seed)]


def place_of(shards: Shards) -> str:
    """Return the key of shards in a mapping."""
    return shards if isinstance(shards, str) else json.dumps(list(shards))
