"""Where the checkpoints of a run are: in its folder, or where ``checkpoint.dir`` says.

Another folder of this machine takes the run folder's part. To an address (remote.py) checkpoints are carried: each is
written into the run folder as ever, verified, copied there, and deleted here. So the run folder holds what is not
there yet, whatever kept it: a copy that failed, a kill. A run goes on from the latest of both, and carries what was
left before anything new; where both hold a checkpoint, this folder's is whole, and is the one.

A checkpoint in shards is a folder, and complete with its header, ``run.pt``: copied last, deleted first.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

from jepa_kit.config import Config, modernize
from jepa_kit.config.yaml_text import parse_yaml
from jepa_kit.engine.checkpoint.format import (
    HEADER,
    checkpoints,
    delete_old,
    load_checkpoint,
    old_ones,
    step_of,
    verify,
)
from jepa_kit.engine.checkpoint.remote import PART, RemoteFolder, check_address, is_address
from jepa_kit.errors import CheckpointError
from jepa_kit.files import delete, write_text
from jepa_kit.run_folder import METRICS, RUN_CONFIG

Where = Path | str
"""A checkpoint: in a folder here, or at an address."""

ASIDE = ".set_aside"
"""Added to the name of a checkpoint that a run did not go on from."""


FETCHED = ".fetched"
"""In a run folder: checkpoints that came from elsewhere to be read."""


class Store:
    """The checkpoints of a run.

    Args:
        run: the run folder.
        elsewhere: ``checkpoint.dir``: None for the run folder, another folder, or an address.

    Attributes:
        folder: where checkpoints are written.
        place: where they go from there, or None: they stay.

    Raises:
        ValueError: an address that nothing is registered for.
    """

    def __init__(self, run: Path, elsewhere: str | None = None) -> None:
        self.run, self.folder = run, run
        self.place: RemoteFolder | None = None
        if is_address(elsewhere):
            assert elsewhere is not None
            check_address("checkpoint.dir", elsewhere)
            self.place = RemoteFolder(elsewhere)
        elif elsewhere is not None:
            self.folder = Path(elsewhere).expanduser()

    def __str__(self) -> str:
        """Where they are, for people."""
        return str(self.folder) if self.place is None else self.place.address

    @property
    def apart(self) -> bool:
        """Whether they are not in the run folder."""
        return self.place is not None or self.folder.resolve() != self.run.resolve()

    def checkpoints(self) -> list[Where]:
        """All, by step.

        Raises:
            RemoteError: the place cannot be listed.
        """
        here = checkpoints(self.folder)
        held = {path.name for path in here}
        there = [name for name in remote_checkpoints(self.place) if name not in held] if self.place else []
        found: list[Where] = [*here, *(self.place.at(name) for name in there if self.place)]
        return sorted(found, key=lambda where: (step_of(where) or 0, str(where)))

    def newest(self) -> Where | None:
        """The latest of them."""
        return next(reversed(self.checkpoints()), None)

    def owns(self, named: str) -> bool:
        """Whether a path or an address that someone gave would be a checkpoint of the run."""
        if step_of(Path(named)) is None:
            return False
        above = named.rstrip("/").rpartition("/")[0]
        if is_address(named):
            return self.place is not None and above == self.place.address
        return Path(named).expanduser().parent.resolve() == self.folder.resolve()

    def begun(self) -> str | None:
        """A file that tells that a run has begun, though it may have no checkpoint; None where there is none."""
        if (self.run / METRICS).exists():
            return METRICS
        noted = self.apart and (self.place.holds(RUN_CONFIG) if self.place else (self.folder / RUN_CONFIG).exists())
        return RUN_CONFIG if noted else None

    def local(self, where: Where) -> Path:
        """A path to read a checkpoint from; one from elsewhere is fetched into the run folder, until ``forget``.

        Raises:
            RemoteError: it did not come.
        """
        if isinstance(where, Path):
            return where
        assert self.place is not None
        return fetch_checkpoint(self.place, name_of(where), self.run / FETCHED)

    def last_good(self, before: Where | None = None) -> Where | None:
        """The latest that is one of ours and as it was written; those elsewhere are fetched for it.

        Args:
            before: only those earlier than this one.
        """
        for where in reversed(self.checkpoints()):
            if before is None or (step_of(where) or 0) < (step_of(before) or 0):
                try:
                    load_checkpoint(self.local(where), with_state=False)
                except (CheckpointError, OSError):  # said by the caller, who has a message about another file
                    continue
                finally:
                    self.forget()
                return where
        return None

    def begin(self, config: str) -> None:
        """Makes sure, before the first step, that checkpoints can be written, and notes whose they are.

        Args:
            config: the resolved config, kept with checkpoints that are not in the run folder.

        Raises:
            ValueError: nothing can be written there.
            OSError: nothing can be written to the run folder.
        """
        if not self.apart:
            self.clear()
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.clear()
            if self.place is None:
                write_text(self.folder / RUN_CONFIG, config)
            else:
                note = self.folder / f".{RUN_CONFIG}{PART}"
                note.write_text(config, encoding="utf-8")
                self.place.put(note, RUN_CONFIG)
                note.unlink()
        except (OSError, NotImplementedError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ValueError(f"checkpoint.dir (={str(self)!r}) cannot be written to: {why}") from error

    def forget(self) -> None:
        """Deletes what ``local`` fetched."""
        if (self.run / FETCHED).exists():
            shutil.rmtree(self.run / FETCHED)

    def clear(self) -> None:
        """Deletes what a killed run left half written, and what it had fetched."""
        self.forget()
        for part in self.folder.glob(".checkpoint_*.part"):
            delete(part)
        if self.place is not None:
            for name in self.place.names():
                if name.startswith(".") and name.endswith(PART):
                    self.place.remove(name)

    def here(self) -> list[Path]:
        """Those that are in ``folder``, by step."""
        return checkpoints(self.folder)

    def leftover(self) -> bool:
        """Whether checkpoints lie here that belong elsewhere."""
        return self.place is not None and bool(self.here())

    def carry(self, keep: int, keep_every: int | None) -> None:
        """Takes the checkpoints that are here to where they belong, by step, and deletes older ones there.

        Args:
            keep, keep_every: see ``delete_old``.

        Raises:
            RemoteError: one could not be copied, or an older one not deleted; what is not there stays here.
            CheckpointError: one here is damaged.
        """
        assert self.place is not None
        for path in checkpoints(self.folder):
            verify(path)
            put_checkpoint(self.place, path)
            delete(path)
        held = remote_checkpoints(self.place)
        kept = set(held) - set(old_ones(held, keep, keep_every))
        for name in self.place.names():
            if step_of(name) is not None and name not in kept:  # of shards, also what a kill left of them
                remove_checkpoint(self.place, name)

    def tidy(self, keep: int, keep_every: int | None) -> None:
        """Deletes older checkpoints where they are written; where they are carried elsewhere, ``carry`` does."""
        if self.place is None:
            delete_old(self.folder, keep, keep_every)

    def set_aside(self, chosen: Where) -> list[str]:
        """Renames the checkpoints after the chosen one, so that they are none of the run any more; their names."""
        later = [where for where in self.checkpoints() if (step_of(where) or 0) > (step_of(chosen) or 0)]
        taken = set(self.place.names()) if self.place else set()
        for where in later:
            name = name_of(where)
            target, number = name + ASIDE, 1
            while (self.folder / target).exists() or target in taken:
                target, number = f"{name}{ASIDE}_{number}", number + 1
            if isinstance(where, Path):
                where.rename(where.with_name(target))
            else:
                assert self.place is not None
                rename_checkpoint(self.place, name, target)
        return [name_of(where) for where in later]


def store_of(config: Config) -> Store:
    """Return the store of the checkpoints of a run.

    Raises:
        ValueError: an address that nothing is registered for.
    """
    return Store(Path(config.train.output_dir).expanduser(), config.checkpoint.dir)


def store_in(run: Path) -> Store:
    """Where the run in a folder had its checkpoints the last time that it went, as its ``config.yaml`` tells.

    Raises:
        ValueError: no handler is registered for it.
    """
    file = run / RUN_CONFIG
    if not file.exists():
        return Store(run)
    held = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    settings = modernize(held).get("checkpoint") if isinstance(held, dict) else None
    return Store(run, settings.get("dir") if isinstance(settings, dict) else None)


def name_of(where: Where) -> str:
    """The last part of a path or an address."""
    return where.name if isinstance(where, Path) else where.rstrip("/").rpartition("/")[2]


# --- checkpoints elsewhere: a file, or a folder of files ---


def remote_checkpoints(place: RemoteFolder) -> list[str]:
    """The names of complete checkpoints, by step.

    Raises:
        RemoteError: the place cannot be listed.
    """
    found = [(step, name) for name in place.names() if (step := step_of(name)) is not None]
    return [name for _, name in sorted(found) if name.endswith(".pt") or place.holds(f"{name}/{HEADER}")]


def put_checkpoint(place: RemoteFolder, path: Path) -> None:
    """Copies a checkpoint there; ``run.pt`` of shards last.

    Raises:
        RemoteError: it failed.
    """
    if not path.is_dir():
        place.put(path, path.name)
        return
    files = sorted(path.iterdir(), key=lambda file: (file.name == HEADER, file.name))
    for file in files:
        place.put(file, f"{path.name}/{file.name}")


def fetch_checkpoint(place: RemoteFolder, name: str, folder: Path) -> Path:
    """Copies a checkpoint from there into a folder; its path.

    Raises:
        RemoteError: it failed.
        FileNotFoundError: it is not there.
    """
    path = folder / name
    delete(path)
    if name.endswith(".pt"):
        place.get(name, path)
        return path
    files = [file for file in place.names(name) if not file.endswith(PART)]
    if not files:
        raise FileNotFoundError(f"there is no {place.at(name)}")
    for file in files:
        place.get(f"{name}/{file}", path / file)
    return path


def remove_checkpoint(place: RemoteFolder, name: str) -> None:
    """Deletes a checkpoint there; of shards, an empty folder may stay where the handler has folders.

    Raises:
        RemoteError: it failed.
    """
    if name.endswith(".pt"):
        place.remove(name)
        return
    for file in sorted(place.names(name), key=lambda file: file != HEADER):
        place.remove(f"{name}/{file}")


def rename_checkpoint(place: RemoteFolder, name: str, target: str) -> None:
    """Gives a checkpoint there another name; ``run.pt`` of shards first, so that no half of one passes for whole.

    Raises:
        RemoteError: it failed.
    """
    if name.endswith(".pt"):
        place.rename(name, target)
        return
    for file in sorted(place.names(name), key=lambda file: file != HEADER):
        place.rename(f"{name}/{file}", f"{target}/{file}")


# --- for readers of any kind ---


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """For what this process fetches; removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="jepa_kit-")


def to_read(named: str | Path) -> Path:
    """A path of this machine for what someone named; what lies elsewhere is fetched, and kept while this process runs.

    Args:
        named: a path or an address: of a file, a checkpoint, or a folder, which stands for its latest checkpoint if
            it has one. A run folder whose checkpoints are elsewhere is followed there.

    Raises:
        FileNotFoundError: there is nothing at the address.
        RemoteError: it did not come.
        ValueError: nothing is registered for the address.
    """
    if not is_address(named):
        return _newest_of(Path(named).expanduser())
    address = str(named).rstrip("/")
    check_address("an address", address)
    above, _, name = address.rpartition("/")
    folder = Path(tempfile.mkdtemp(dir=_temporary().name))
    if step_of(name) is not None:
        return fetch_checkpoint(RemoteFolder(above), name, folder)
    if held := remote_checkpoints(RemoteFolder(address)):
        return fetch_checkpoint(RemoteFolder(address), held[-1], folder)
    RemoteFolder(above).get(name, folder / name)
    return folder / name


def _newest_of(path: Path) -> Path:
    if not path.is_dir() or (path / HEADER).exists():
        return path
    if held := checkpoints(path):
        return held[-1]
    newest = store.newest() if (store := store_in(path)).apart else None
    return path if newest is None else to_read(newest)
