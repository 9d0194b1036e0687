"""Default shards of the evaluation tools: those of the run, and held-out ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jepa_kit.data.remote.fetch import is_remote, is_shard

Shards = str | Sequence[str]
"""Value of ``data.shards``: a folder, a shard, a pattern, or a list of these."""
BESIDE = ("test", "val")
"""Names of folders of held-out shards beside the training shards, in order of preference."""


def held_out(shards: Shards) -> str | None:
    """Return the folder ``test``, else ``val``, beside that of the training shards; None if there is neither.

    Remote shards and lists of several places have none.
    """
    names = [shards] if isinstance(shards, str) else list(shards)
    if len(names) != 1 or is_remote(names[0]):
        return None
    own = Path(names[0]).expanduser().resolve()
    own = own.parent if is_shard(names[0]) else own
    beside = (own.parent / name for name in BESIDE)
    return next((str(path) for path in beside if path.is_dir() and path != own), None)


def training_shards(given: str | None, of_run: Shards | None, option: str = "--train-shards") -> Shards:
    """Return the training shards of protocols: ``given``, else ``data.shards`` of the run.

    Raises:
        ValueError: both are None; ``option`` is the one to use.
    """
    found = of_run if given is None else given
    if found is None:
        raise ValueError(f"{option} must name a folder of shards: the run's config has none (data.shards is null)")
    return found


def evaluation_shards(given: str | None, train: Shards, option: str = "--test-shards") -> str:
    """Return the test shards of protocols: ``given``, else held-out shards beside the training shards.

    Raises:
        ValueError: there are none; ``option`` is the one to use.
    """
    found = given or held_out(train)
    if found is None:
        shown = train if isinstance(train, str) else ", ".join(train)
        raise ValueError(f"{option} must name a folder of shards: there is no {' or '.join(BESIDE)} beside {shown}")
    return found


def shown_shards(given: str | None, of_run: Shards | None, option: str = "--shards") -> Shards:
    """Return shards for health and pictures: ``given``, else held-out shards beside the run's, else the run's.

    Raises:
        ValueError: there are none.
    """
    found = training_shards(given, of_run, option)
    return found if given is not None else held_out(found) or found
