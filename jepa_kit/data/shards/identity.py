"""Identify a data set by the contents of its shards in order, whatever their paths and names.

A shard is compared by its number of samples and the SHA-256 in ``index.json``. A shard without one, whose index an
earlier release made, is compared by file name, number of samples and size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

SHARDS = "shards"


def identity(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the identity of a data set: ``samples``, a ``digest`` of all contents, and each of its ``shards``.

    Args:
        shards: their entries in the index.
    """
    entries = [[shard["file"], shard["samples"], shard["bytes"], shard["sha256"]] for shard in shards]
    contents = [[samples, sha256 or [file, size]] for file, samples, size, sha256 in entries]
    samples = sum(shard["samples"] for shard in shards)
    return {"samples": samples, "digest": _digest(contents), SHARDS: entries}


def brief(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without its list of shards."""
    return {key: value for key, value in found.items() if key != SHARDS}


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Compare the data set of a checkpoint with the current one.

    Args:
        then: the identity in the checkpoint; those of earlier releases have no list of shards.
        now: the identity of the current data set.

    Returns:
        The first difference, or None; and a note on what could not be compared, or None.
    """
    if SHARDS not in then:
        names = [[file, samples, size] for file, samples, size, _ in now[SHARDS]]
        if then.get("samples") != now["samples"]:
            return f"it had {then.get('samples')} samples, but here are {now['samples']}", None
        if then.get("digest") != _digest(names)[:16]:
            return "names, sample counts or sizes of its shards differ", None
        return None, (
            "the checkpoint is of an earlier version and has no checksums of its shards: their names, sample counts "
            "and sizes are equal, contents were not compared"
        )
    old, new, unsummed = then[SHARDS], now[SHARDS], 0
    for number, (before, after) in enumerate(zip(old, new, strict=False)):
        if before[3] and after[3]:
            parts = {"samples": (before[1], after[1]), "SHA-256": (before[3], after[3])}
        else:
            unsummed += 1
            parts = {what: (before[k], after[k]) for k, what in enumerate(("name", "samples", "bytes"))}
        for what, (was, is_now) in parts.items():
            if was != is_now:
                return f"shard {number} differs: {before[0]} had {what} {was}, but here {after[0]} has {is_now}", None
    if len(old) != len(new):
        first = (old[len(new) :] or new[len(old) :])[0][0]
        return (
            f"it had {len(old)} shards, but here are {len(new)}: the first that one side lacks is {first}",
            None,
        )
    note = f"{unsummed} of {len(new)} shards have no checksum in their index: compared by name, sample count and size"
    return None, note if unsummed else None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
