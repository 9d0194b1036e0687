"""Names of the files in a run folder."""

from __future__ import annotations

import re
from pathlib import Path

HEADER = "run.pt"
"""In a sharded checkpoint: everything but the state, with the sizes and checksums of the shards."""

FACTS = "run.json"
"""What ran where, and from which checkpoint it was resumed."""

LOCK = ".lock"
"""Locked by the process that writes to the folder."""

METRICS = "metrics.jsonl"
"""One line per logged step."""

RECORD = "bad_steps.jsonl"
"""Steps whose loss or gradient was not finite, and what the run did about them."""

RUN_CONFIG = "config.yaml"
"""The resolved config; also written beside checkpoints that are not in the run folder."""

SKIPPED = "skipped.jsonl"
"""Samples that could not be used."""

WEIGHTS = "weights.safetensors"
"""In the folder of a reference run: its weights, without those of an optimiser."""


_CHECKPOINT = re.compile(r"checkpoint_(\d+)(\.pt)?")


def step_of(path: Path | str) -> int | None:
    """Return the step in the name of a checkpoint (a path, a URL, or the name), or None for another name."""
    match = _CHECKPOINT.fullmatch(path.name if isinstance(path, Path) else path.rpartition("/")[2])
    return int(match[1]) if match else None
