"""The checkpoints of a run: in its folder, or in ``checkpoint.dir``.

Another local folder takes the place of the run folder. For a URL, each checkpoint is written to the run folder,
verified, uploaded, and deleted locally. So the run folder contains what is not uploaded yet, after a failed copy or a
kill. A run resumes from the latest of both, and uploads what was left before anything new; if both have a checkpoint,
the local one is complete and is used.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from jepa_kit.config import Config
from jepa_kit.engine.checkpoint.files import verify
from jepa_kit.engine.checkpoint.format import load_checkpoint
from jepa_kit.engine.checkpoint.locate import recorded_checkpoint_dir
from jepa_kit.engine.checkpoint.storage import LocalStorage, Storage, checkpoint_names, is_url, open_storage
from jepa_kit.errors import CheckpointError, cause_of
from jepa_kit.files import PART, delete
from jepa_kit.run_folder import METRICS, RUN_CONFIG, step_of

ASIDE = ".set_aside"
"""Suffix of a checkpoint that the run was not resumed from."""

FETCHED = ".fetched"
"""In a run folder: downloaded checkpoints."""


@dataclass(frozen=True, eq=False)
class Location:
    """Where a checkpoint is; ``str`` gives its path or URL."""

    storage: Storage
    name: str
    step: int

    def __str__(self) -> str:
        return f"{self.storage}/{self.name}"


class Store:
    """The checkpoints of a run.

    Args:
        run: the run folder.
        checkpoint_dir: ``checkpoint.dir``: None for the run folder, another folder, or a URL.

    Attributes:
        folder: where checkpoints are written.
        target: where they stay.
        remote: whether they are uploaded.
        apart: whether they stay outside the run folder.

    Raises:
        ValueError: no handler is registered for the URL.
    """

    def __init__(self, run: Path, checkpoint_dir: str | None = None) -> None:
        self.run = run
        self.target = open_storage("checkpoint.dir", checkpoint_dir or run)
        self.local = self.target if isinstance(self.target, LocalStorage) else LocalStorage(run)
        self.folder, self.remote = self.local.folder, self.local is not self.target
        self.apart = self.remote or self.folder.resolve() != run.resolve()

    def __str__(self) -> str:
        return str(self.target)

    def checkpoints(self) -> list[Location]:
        """Return all checkpoints, by step.

        Raises:
            RemoteError: the remote storage cannot be listed.
        """
        storages = dict.fromkeys((self.target, self.local))  # the second wins: a remote copy may be cut short
        found = {name: Location(s, name, step) for s in storages for name, step in checkpoint_names(s).items()}
        return sorted(found.values(), key=lambda location: (location.step, location.name))

    def newest(self) -> Location | None:
        """Return the latest checkpoint."""
        return next(reversed(self.checkpoints()), None)

    def owns(self, named: str) -> bool:
        """Return whether a path or URL, which need not exist, would be a checkpoint of the run."""
        if step_of(named.rstrip("/")) is None:
            return False
        if is_url(named):
            return named.rstrip("/").rpartition("/")[0] == str(self.target)
        return Path(named).expanduser().parent.resolve() == self.folder.resolve()

    def begun(self) -> str | None:
        """Return the name of a file that shows that a run exists, even without a checkpoint; else None."""
        if (self.run / METRICS).exists():
            return METRICS
        return RUN_CONFIG if self.apart and self.target.exists(RUN_CONFIG) else None

    def fetch(self, location: Location) -> Path:
        """Return a path to read a checkpoint from; a download stays until ``clear_cache``.

        Raises:
            RemoteError: the download failed.
        """
        return location.storage.fetch(location.name, self.run / FETCHED)

    def last_good(self, before: Location | None = None) -> Location | None:
        """Return the latest checkpoint that passes verification; remote ones are downloaded for it.

        Args:
            before: consider only earlier ones than this.
        """
        for location in reversed(self.checkpoints()):
            if before is None or location.step < before.step:
                try:
                    load_checkpoint(self.fetch(location), with_state=False)
                except (CheckpointError, OSError):  # the caller reports another file
                    continue
                finally:
                    self.clear_cache()
                return location
        return None

    def begin(self, config: str) -> None:
        """Check, before the first step, that checkpoints can be written, and delete what a killed run left.

        Args:
            config: the resolved config, written beside checkpoints that are not in the run folder.

        Raises:
            ValueError: ``checkpoint.dir`` cannot be written to.
            OSError: the run folder cannot be written to.
        """
        if not self.apart:
            self.clear()
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.clear()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / RUN_CONFIG
                file.write_text(config, encoding="utf-8")
                self.target.write(file, RUN_CONFIG)
        except (OSError, NotImplementedError) as error:
            raise ValueError(f"checkpoint.dir (={str(self)!r}) cannot be written to: {cause_of(error)}") from error

    def clear_cache(self) -> None:
        """Delete what ``fetch`` downloaded."""
        delete(self.run / FETCHED)

    def clear(self) -> None:
        """Delete downloads, and what a killed run left half written."""
        self.clear_cache()
        for storage in {self.local, self.target}:
            for name in storage.names():
                if name.startswith((".checkpoint_", f".{RUN_CONFIG}")) and name.endswith(PART):
                    storage.delete(name)

    def pending_uploads(self) -> list[Path]:
        """Return local checkpoints that belong on remote storage, by step."""
        return [self.folder / name for name in checkpoint_names(self.local)] if self.remote else []

    def upload(self) -> None:
        """Move local checkpoints to remote storage, by step.

        Raises:
            RemoteError: a copy failed; what is not uploaded stays local.
            CheckpointError: a local checkpoint is damaged.
        """
        for path in self.pending_uploads():
            verify(path)
            self.target.write(path, path.name)
            delete(path)

    def prune(self, keep: int, keep_every: int | None = None) -> None:
        """Delete old checkpoints, and incomplete ones.

        Args:
            keep: how many of the latest stay, at least 1.
            keep_every: those whose step is a multiple of it stay; None for none.

        Raises:
            OSError: one could not be deleted.
        """
        names = checkpoint_names(self.target)
        kept = {*list(names)[-keep:], *(n for n, step in names.items() if keep_every and step % keep_every == 0)}
        for name in self.target.names():
            if step_of(name) is not None and name not in kept:
                self.target.delete(name)

    def set_aside(self, chosen: Location) -> list[str]:
        """Rename the checkpoints after the chosen one, so that no run resumes from them; return their old names."""
        later = [location for location in self.checkpoints() if location.step > chosen.step]
        taken = {*self.local.names(), *self.target.names()}
        for location in later:
            target, number = location.name + ASIDE, 1
            while target in taken:
                target, number = f"{location.name}{ASIDE}_{number}", number + 1
            location.storage.rename(location.name, target)
        return [location.name for location in later]


def store_of(config: Config) -> Store:
    """Return the checkpoints of a run.

    Raises:
        ValueError: no handler is registered for the URL.
    """
    return Store(Path(config.train.output_dir).expanduser(), config.checkpoint.dir)


def store_in(run: Path) -> Store:
    """Return the checkpoints of the run in a folder, by the config of its last start.

    Raises:
        ValueError: no handler is registered for the URL.
    """
    return Store(run, recorded_checkpoint_dir(run))
