"""Check before the first step that all processes of a run have the same config, data set and code.

Nothing later would notice: ranks with different learning rates or maskers train to the end, and ranks with different
numbers of steps wait for each other forever.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jepa_kit
from jepa_kit.config import Config, versions
from jepa_kit.config.imports import find_source
from jepa_kit.distributed.collectives import all_gather_object

MAY_DIFFER = frozenset(
    {
        "data.cache",
        "data.cache_gb",
        "data.num_workers",
        "data.prefetch",
        "data.shards",
        "evaluate.shards",
        "train.device",
    }
)
"""Options that may differ between processes: paths of data and caches, and how the machine is used.

``data.shards`` and ``evaluate.shards`` are compared by content. ``resume.FREE`` is another list: its options may change
when a run is resumed, but must be the same in all its processes.
"""

_CODE = ("jepa_kit", "torch", "numpy", "xformers")
"""Keys of ``versions()`` whose packages affect numbers. Instead of the commit, the sources are compared."""


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b[0]": 1}; a tuple is a list."""
    if isinstance(value, Mapping) and value:
        items = [(f"{path}.{key}" if path else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(f"{path}[{number}]", inner) for number, inner in enumerate(value)]
    else:
        return {path: list(value) if isinstance(value, tuple) else value}
    return {key: leaf for name, inner in items for key, leaf in flatten(inner, name).items()}


@functools.cache
def sources_digest() -> str:
    """SHA-256 (16 digits) of the names and bytes of jepa_kit's own source files."""
    root = Path(jepa_kit.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def code_version(config: Config) -> dict[str, Any]:
    """Versions of what decides numbers, and digests of the sources: of jepa_kit, and of each entry of ``imports``."""
    found = versions()
    imported = {}
    for name in config.imports:
        file = find_source(name)
        content = None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        imported[Path(name).name if name.endswith(".py") else name] = content
    return {name: found.get(name) for name in _CODE} | {"sources": sources_digest(), "imports": imported}


def check_command(config: Config, command: Mapping[str, Any]) -> None:
    """Compare config, code and command over all processes; all must call it, before anything that one waits for.

    Args:
        config: resolved, of this process.
        command: other arguments that decide what the run does.

    Raises:
        ValueError: they differ; the same message on every rank, with each key, its values and their ranks.
    """
    raw = {key: value for key, value in config.to_dict().items() if key not in ("imports", "versions")}
    settings = {key: value for key, value in flatten(raw).items() if key.partition("[")[0] not in MAY_DIFFER}
    check_same({**settings, **flatten({"command": dict(command), "code": code_version(config)})})


def check_same(facts: Mapping[str, Any]) -> None:
    """Compare plain values by name over all processes; all must call it.

    Raises:
        ValueError: they differ; the same message on every rank.
    """
    if lines := differences(all_gather_object(dict(facts))):
        raise ValueError("the processes of this run must agree, but these differ:\n  " + "\n  ".join(lines))


def differences(of_ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each key whose value is not the same on all ranks: the values, the most frequent last."""
    unset = "(not set)"
    lines = []
    for key in sorted({key for facts in of_ranks for key in facts}):
        holders: dict[str, list[int]] = {}
        for rank, facts in enumerate(of_ranks):
            holders.setdefault(repr(facts[key]) if key in facts else unset, []).append(rank)
        if len(holders) > 1:
            groups = sorted(holders.items(), key=lambda item: (len(item[1]), item[1]))
            lines.append(f"{key}: " + ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in groups))
    return lines


def _ranks(ranks: Sequence[int], most: int = 8) -> str:
    named = ", ".join(map(str, ranks[:most]))
    return f"rank {named}" + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
