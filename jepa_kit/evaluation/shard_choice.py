"""Which shards an evaluation looks at: what the user names, else those of the run, and held-out ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jepa_kit.data.remote.fetch import is_remote, is_shard

Shards = str | Sequence[str]
"""What ``data.shards`` takes: a folder, a shard, a pattern, or a list of these."""
BESIDE = ("test", "val")
"""Folders that hold held-out shards, looked for beside the training shards in this order."""


def held_out(shards: Shards) -> str | None:
    """The folder ``test``, else ``val``, beside that of the training shards; None where there is neither.

    Shards of other machines, and those of several places, have none.
    """
    names = [shards] if isinstance(shards, str) else list(shards)
    if len(names) != 1 or is_remote(names[0]):
        return None
    own = Path(names[0]).expanduser().resolve()
    own = own.parent if is_shard(names[0]) else own
    beside = (own.parent / name for name in BESIDE)
    return next((str(path) for path in beside if path.is_dir() and path != own), None)


def training_shards(given: str | None, of_run: Shards | None) -> Shards:
    """What protocols learn from: ``given``, else ``data.shards`` of the run.

    Raises:
        ValueError: there is neither.
    """
    if given is not None:
        return given
    if of_run is None:
        raise ValueError("--train-shards must name a folder of shards: the run's config has none (data.shards is null)")
    return of_run


def asked_shards(given: str | None, train: Shards) -> str:
    """What protocols are asked about: ``given``, else what is held out beside the training shards.

    Raises:
        ValueError: none is given, and none lies there.
    """
    found = given or held_out(train)
    if found is None:
        shown = train if isinstance(train, str) else ", ".join(train)
        raise ValueError(
            f"--test-shards must name a folder of shards: there is no {' or '.join(BESIDE)} beside {shown}"
        )
    return found


def images_to_look_at(given: str | None, of_run: Shards | None) -> Shards:
    """Images for health and pictures: ``given``, else what is held out beside the run's shards, else those themselves.

    Raises:
        ValueError: there are none.
    """
    if given is not None:
        return given
    if of_run is None:
        raise ValueError("--shards must name a folder of shards: the run's config has none (data.shards is null)")
    return held_out(of_run) or of_run
