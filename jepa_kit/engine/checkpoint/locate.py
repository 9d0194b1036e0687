"""Find the checkpoint that a user names, and download it if it is remote."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from jepa_kit.config.load import parse_yaml
from jepa_kit.config.renamed import modernize
from jepa_kit.config.shipped import find_reference, is_reference
from jepa_kit.engine.checkpoint.storage import RemoteStorage, checkpoint_names, is_url, open_storage
from jepa_kit.run_folder import HEADER, RUN_CONFIG, WEIGHTS, step_of


def recorded_checkpoint_dir(run: Path) -> str | None:
    """Return ``checkpoint.dir`` of the config in a run folder, or None."""
    file = run / RUN_CONFIG
    config = parse_yaml(file.read_text(encoding="utf-8"), str(file)) if file.exists() else None
    settings = modernize(config).get("checkpoint") if isinstance(config, dict) else None
    return settings.get("dir") if isinstance(settings, dict) else None


def to_read(named: str | Path) -> Path:
    """Return a local path of what a user named. A download stays until this process ends.

    Args:
        named: a path or URL of a file, a checkpoint or a folder, or ``reference:NAME``. A folder stands for its latest
            checkpoint, if it has one; a run folder whose checkpoints are elsewhere stands for the latest of those.

    Raises:
        FileNotFoundError: there is nothing at the URL, or no reference run of this name.
        RemoteError: a download failed.
        ValueError: no handler is registered for the URL.
    """
    if is_reference(named):
        return find_reference(named) / WEIGHTS
    place = str(named).rstrip("/") if is_url(named) else str(Path(named).expanduser())
    storage = open_storage("an address", place)
    remote = isinstance(storage, RemoteStorage)
    above, _, name = place.rpartition("/")
    if not remote:
        path = Path(place)
        if not path.is_dir() or (path / HEADER).exists():
            return path
        if not checkpoint_names(storage):
            storage = open_storage("checkpoint.dir", recorded_checkpoint_dir(path) or path)
    elif step_of(name) is not None:
        return RemoteStorage(above).fetch(name, _download_folder())
    if found := checkpoint_names(storage):
        return storage.fetch([*found][-1], _download_folder())
    return RemoteStorage(above).fetch(name, _download_folder()) if remote else Path(place)


@cache
def _downloads() -> tempfile.TemporaryDirectory[str]:
    """Return the folder of this process's downloads, which is removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="jepa_kit-")


def _download_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=_downloads().name))
