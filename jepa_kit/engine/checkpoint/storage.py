"""Folders of checkpoints, on this machine or remote, with the same methods; names of checkpoints.

An entry of a storage is a file, or a folder of files (a sharded checkpoint). Remote storage is what a handler of
iopath's ``path_manager`` reaches; register handlers as for shards, in a file under ``imports:``:
``jepa_kit.data.remote.fetch.path_manager.register_handler(...)``. A handler needs ``_copy_from_local``, ``_open`` for
reading, ``_ls``, ``_exists`` and ``_rm``; ``_mkdirs``, ``_mv`` and ``_copy`` are used if it has them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from jepa_kit.compat import can_rename, prefixes_of
from jepa_kit.data.remote.fetch import Access, copy, path_manager
from jepa_kit.errors import RemoteError, UnableError, cause_of
from jepa_kit.files import PART, atomic_write, delete
from jepa_kit.run_folder import HEADER, step_of


class LocalStorage:
    """A folder of this machine, or of a file system that it mounts. ``RemoteStorage`` has the same methods."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> list[str]:
        """Return the names of its entries, sorted; none if there is no such folder."""
        return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []

    def exists(self, name: str) -> bool:
        """Return whether a file exists."""
        return (self.folder / name).exists()

    def complete(self, name: str) -> bool:
        """Return whether an entry was written to its end."""
        return True  # an entry gets its name by one rename

    def fetch(self, name: str, folder: Path) -> Path:
        """Return a local path of an entry, which is downloaded into ``folder`` if it is remote.

        Raises:
            FileNotFoundError: there is no such entry; only if it is remote.
        """
        return self.folder / name

    def write(self, source: Path, name: str) -> None:
        """Copy a local file or folder to an entry, which replaces one of the same name."""
        with atomic_write(self.folder / name) as part:
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, part)

    def rename(self, name: str, target: str) -> None:
        """Rename an entry."""
        (self.folder / name).rename(self.folder / target)

    def delete(self, name: str) -> None:
        """Delete an entry."""
        delete(self.folder / name)


class RemoteStorage:
    """A folder that a handler of iopath reaches. Every operation raises RemoteError if it fails.

    Handlers differ: some raise an error where others return False, and iopath's own for S3 lists whole keys, and a
    folder as its own entry. A folder is written with ``run.pt`` last, and deleted or renamed with ``run.pt`` first, so
    that it is complete if it contains ``run.pt``.

    Args:
        url: of the folder, which need not exist yet.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._renames = can_rename(path_manager, self.url)
        self._created: set[str] = set()

    def __str__(self) -> str:
        return self.url

    def names(self, inside: str = "") -> list[str]:
        folder = self._at(inside) if inside else self.url
        try:
            with _Naming(f"{folder} cannot be listed"):
                entries = path_manager.ls(folder + "/")
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({name_of(entry) for entry in entries} - {name_of(folder), ""})

    def exists(self, name: str) -> bool:
        with _Naming(f"{self._at(name)} cannot be looked for"):
            return path_manager.exists(self._at(name))

    def complete(self, name: str) -> bool:
        return "." in name or self.exists(f"{name}/{HEADER}")

    def fetch(self, name: str, folder: Path) -> Path:
        """A broken stream is tried again; a file has its name only when it is complete."""
        delete(folder / name)
        for file in self._files(name) or [name]:  # a file without a suffix, if not a folder
            if not file.endswith(PART):
                self._download(file, folder / file)
        return folder / name

    def write(self, source: Path, name: str) -> None:
        """If the handler cannot rename, each file is copied under its name at once.

        Object stores show a file when they have all of it; on other storage a copy that was cut short is found when it
        is verified.
        """
        if not source.is_dir():
            self._upload(source, name)
            return
        for file in sorted(source.iterdir(), key=lambda file: (file.name == HEADER, file.name)):
            self._upload(file, f"{name}/{file.name}")

    def rename(self, name: str, target: str) -> None:
        """If the handler cannot rename, by a remote copy, else through this machine."""
        for file in reversed(self._files(name)):
            self._move(file, target + file.removeprefix(name))

    def delete(self, name: str) -> None:
        """Of a deleted folder, an empty one may stay if the storage has folders."""
        for file in reversed(self._files(name)):
            self._remove(self._at(file))

    def _at(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _files(self, name: str) -> list[str]:
        """Return the files of an entry, the header last; a name without a suffix is a folder."""
        if "." in name:
            return [name]
        return [f"{name}/{file}" for file in sorted(self.names(name), key=lambda file: (file == HEADER, file))]

    def _upload(self, file: Path, name: str) -> None:
        target = self._at(name)
        if self._renames:
            above, _, last = target.rpartition("/")
            part = f"{above}/.{last}{PART}"
            try:
                self._copy(file, part)
                if self.exists(name):  # iopath's handlers do not replace a file by a rename
                    self._remove(target)
                self._mv(part, target)
                return
            except NotImplementedError:
                self._renames = False
                self._remove(part)
            except RemoteError:
                with suppress(RemoteError, FileNotFoundError):
                    self._remove(part)
                raise
        self._copy(file, target)

    def _download(self, name: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _Naming(f"{self._at(name)} could not be fetched"):
            if not self.exists(name):
                raise FileNotFoundError(f"there is no {self._at(name)}")
            with atomic_write(file) as part, part.open("wb") as out:
                copy(self._at(name), out, Access())

    def _move(self, name: str, target: str) -> None:
        source, goal = self._at(name), self._at(target)
        self._mkdir(goal)
        if self._renames:
            with suppress(NotImplementedError):
                self._mv(source, goal)
                return
            self._renames = False
        try:
            _call(lambda: path_manager.copy(source, goal, overwrite=True), f"{source} could not be copied to {goal}")
        except NotImplementedError:
            with NamedTemporaryFile() as file:
                self._download(name, Path(file.name))
                self._upload(Path(file.name), target)
        self._remove(source)

    def _mkdir(self, url: str) -> None:
        """Create the folder of a file, if the handler has folders."""
        folder = url.rpartition("/")[0] + "/"
        if folder not in self._created:
            with suppress(NotImplementedError), _Naming(f"{folder} cannot be made", optional=True):
                path_manager.mkdirs(folder)
            self._created.add(folder)

    def _copy(self, file: Path, url: str) -> None:
        self._mkdir(url)
        what = f"{url} could not be written"
        try:
            _call(lambda: path_manager.copy_from_local(os.fspath(file), url, overwrite=True), what)
        except NotImplementedError as error:
            raise UnableError(f"{what}: its handler only reads") from error

    def _mv(self, url: str, target: str) -> None:
        _call(lambda: path_manager.mv(url, target), f"{url} could not be renamed to {target}")

    def _remove(self, url: str) -> None:
        with _Naming(f"{url} could not be deleted"):
            path_manager.rm(url)


Storage = LocalStorage | RemoteStorage


def is_url(text: object) -> bool:
    """Return whether a text is a URL, not a path."""
    return isinstance(text, str) and "://" in text


def open_storage(option: str, place: str | Path) -> Storage:
    """Return the storage of a path or URL.

    Args:
        option: what the message calls ``place``.
        place: a path or a URL.

    Raises:
        ValueError: no handler is registered for the URL.
    """
    if not is_url(place):
        return LocalStorage(Path(place).expanduser())
    prefixes = prefixes_of(path_manager)  # iopath takes a URL without a handler for a local path
    if not str(place).startswith(prefixes):
        raise ValueError(
            f"{option} (={place!r}) must be a folder, or begin with a prefix that iopath has a handler for "
            f"({', '.join(prefixes)}); a file under `imports:` registers one: "
            "jepa_kit.data.remote.fetch.path_manager.register_handler(...)"
        )
    return RemoteStorage(str(place))


@dataclass(frozen=True)
class _Naming(AbstractContextManager[None]):
    """Turn an error inside the ``with`` block into a RemoteError that says what failed.

    A handler is other people's code and raises errors of any class: those of botocore are not OSErrors.
    FileNotFoundError and NotADirectoryError stay as they are; so does NotImplementedError if the operation is
    ``optional``.
    """

    what: str
    optional: bool = False

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NotImplementedError):
            if self.optional:
                return
            raise UnableError(f"{self.what}: its handler cannot do that") from error
        if isinstance(error, Exception) and not isinstance(error, FileNotFoundError | NotADirectoryError | RemoteError):
            raise RemoteError(f"{self.what}: {cause_of(error)}") from error


def _call(do: Callable[[], object], what: str) -> None:
    """Call a handler; False from it is a failure that it has logged.

    Raises:
        NotImplementedError: the handler lacks the operation.
    """
    with _Naming(what, optional=True):
        if do() is False:
            raise RemoteError(f"{what}: its handler refused; its log says why")


def name_of(place: str) -> str:
    """Return the last part of a path or URL."""
    return place.rstrip("/").rpartition("/")[2]


def checkpoint_names(storage: Storage) -> dict[str, int]:
    """Return name -> step of the complete checkpoints of a storage, by step.

    Raises:
        RemoteError: the storage cannot be listed.
    """
    found = sorted((step, name) for name in storage.names() if (step := step_of(name)) is not None)
    return {name: step for step, name in found if storage.complete(name)}
