"""The identity of data sets, and what two of them share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jepa_kit.data.shards.dataset import ShardDataset


def identity(dataset: ShardDataset) -> dict[str, Any]:
    """Return the identity of a data set: its length, and a digest of the shards in its index; and its path."""
    entries = json.dumps([[shard[key] for key in ("file", "samples", "bytes", "sha256")] for shard in dataset.shards])
    return {
        "shards": dataset.path,
        "samples": len(dataset),
        "index_sha256": hashlib.sha256(entries.encode()).hexdigest(),
    }


def shared_samples(train: ShardDataset, test: ShardDataset) -> int:
    """Count test samples in shards that the training set has too, by digest (or name and size without a digest)."""

    def content(shard: Mapping[str, Any]) -> tuple[Any, ...]:
        return (shard["sha256"],) if shard["sha256"] else (shard["file"], shard["samples"], shard["bytes"])

    known = {content(shard) for shard in train.shards}
    return sum(shard["samples"] for shard in test.shards if content(shard) in known)
