"""Folders elsewhere: of an object store, say, that a handler of iopath's ``path_manager`` reaches.

Register handlers as for shards: ``jepa_kit.data.remote.fetch.path_manager.register_handler(...)``, by a file under
``imports:``. Of one that checkpoints go to, ``_copy_from_local``, ``_open`` for reading, ``_ls``, ``_exists`` and
``_rm`` are asked for; ``_mkdirs``, ``_mv`` and ``_copy`` are used where it has them. What handlers do in different ways
is met here: some raise where others return False, and iopath's own for S3 lists whole keys, and a folder in itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import TracebackType

from jepa_kit.compat import prefixes_of
from jepa_kit.data.remote.fetch import Access, copy, path_manager
from jepa_kit.errors import RemoteError, UnableError

PART = ".part"
"""Ends the name of what is being copied; nothing takes it for what it will be."""


def is_address(text: object) -> bool:
    """Whether it names something that is in no folder of this machine."""
    return isinstance(text, str) and "://" in text


def check_address(option: str, address: str) -> None:
    """Raises ValueError where no handler is registered for an address that an option gives."""
    prefixes = prefixes_of(path_manager)  # what has no handler, the manager itself takes for a folder here
    if not address.startswith(prefixes):
        raise ValueError(
            f"{option} (={address!r}) must be a folder, or begin with a prefix that iopath has a handler for "
            f"({', '.join(prefixes)}); a file under `imports:` registers one: "
            "jepa_kit.data.remote.fetch.path_manager.register_handler(...)"
        )


class _Naming:
    """Makes of every error inside its ``with`` a RemoteError that says what could not be done.

    A handler is code of others, with errors of any kind: botocore's are no OSErrors. What is missing, or no folder,
    stays what it is, and NotImplementedError where the handler ``may_lack`` what was asked.
    """

    def __init__(self, what: str, *, may_lack: bool = False) -> None:
        self.what = what
        self.may_lack = may_lack

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, NotImplementedError):
            if self.may_lack:
                return
            raise UnableError(f"{self.what}: its handler cannot do that") from error
        if isinstance(error, Exception) and not isinstance(error, FileNotFoundError | NotADirectoryError | RemoteError):
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise RemoteError(f"{self.what}: {why or type(error).__name__}") from error


class RemoteFolder:
    """A folder elsewhere.

    Args:
        address: of it; it need not be there yet.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._renames: bool | None = None
        self._made: set[str] = set()

    def at(self, name: str) -> str:
        """The address of something in it."""
        return f"{self.address}/{name}"

    def names(self, inside: str = "") -> list[str]:
        """The names in it, or in a folder of it, sorted; none where there is no such folder.

        Raises:
            RemoteError: they cannot be listed.
        """
        folder = self.at(inside) if inside else self.address
        try:
            with _Naming(f"{folder} cannot be listed"):
                entries = path_manager.ls(folder + "/")
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {_last(entry) for entry in entries}
        return sorted(names - {_last(folder)} - {""})

    def holds(self, name: str) -> bool:
        """Whether a file is there.

        Raises:
            RemoteError: it cannot be told.
        """
        with _Naming(f"{self.at(name)} cannot be looked for"):
            return path_manager.exists(self.at(name))

    def put(self, file: Path, name: str) -> None:
        """Copies a file there, over one of the same name; it has its name only when all of it is there.

        Where the handler cannot rename, it is copied under its name at once. Object stores show a file when they
        have it whole; elsewhere a copy that was cut short is there, and is found out by whoever reads it.

        Raises:
            RemoteError: it failed; what there is of another name is untouched.
        """
        target = self.at(name)
        if not self._can_rename():
            self._copy(file, target)
            return
        folder, _, last = name.rpartition("/")
        part = self.at(f"{folder}/.{last}{PART}" if folder else f".{last}{PART}")
        try:
            self._copy(file, part)
            if self.holds(name):  # iopath's handlers refuse to rename over a file
                self.remove(name)
            self._rename(part, target)
        except RemoteError:
            with suppress(RemoteError, FileNotFoundError):
                self._remove(part)
            raise

    def get(self, name: str, file: Path) -> None:
        """Copies a file from there; a stream that breaks is tried again. It has its name only when it is whole.

        Raises:
            RemoteError: it failed.
            FileNotFoundError: it is not there.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + PART)
        try:
            with _Naming(f"{self.at(name)} could not be fetched"):
                if not self.holds(name):
                    raise FileNotFoundError(f"there is no {self.at(name)}")
                with part.open("wb") as out:
                    copy(self.at(name), out, Access())
                part.replace(file)
        finally:
            part.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Deletes a file.

        Raises:
            RemoteError: it failed.
        """
        self._remove(self.at(name))

    def rename(self, name: str, target: str) -> None:
        """Gives a file another name; where the handler cannot, by a copy there, else through this machine.

        Raises:
            RemoteError: it failed.
        """
        self._make(self.at(target))
        if self._can_rename():
            self._rename(self.at(name), self.at(target))
            return
        try:
            self._asked(
                lambda: path_manager.copy(self.at(name), self.at(target), overwrite=True),
                f"{self.at(name)} could not be copied to {self.at(target)}",
            )
        except NotImplementedError:
            with NamedTemporaryFile() as file:
                self.get(name, Path(file.name))
                self.put(Path(file.name), target)
        self.remove(name)

    def _can_rename(self) -> bool:
        """Tried once, with a file of one byte."""
        if self._renames is None:
            probe, renamed = (self.at(f".probe_{n}{PART}") for n in (0, 1))
            with NamedTemporaryFile() as file:
                file.write(b"0")
                file.flush()
                self._copy(Path(file.name), probe)
            try:
                self._rename(probe, renamed)
                self._renames = True
            except NotImplementedError:
                self._renames = False
            self._remove(renamed if self._renames else probe)
        return self._renames

    def _make(self, address: str) -> None:
        """The folder of a file, where the handler has folders."""
        folder = address.rpartition("/")[0] + "/"
        if folder not in self._made:
            with suppress(NotImplementedError), _Naming(f"{folder} cannot be made", may_lack=True):
                path_manager.mkdirs(folder)
            self._made.add(folder)

    def _copy(self, file: Path, address: str) -> None:
        self._make(address)
        try:
            self._asked(
                lambda: path_manager.copy_from_local(os.fspath(file), address, overwrite=True),
                f"{address} could not be written",
            )
        except NotImplementedError as error:
            raise UnableError(f"{address} could not be written: its handler only reads") from error

    def _rename(self, address: str, target: str) -> None:
        self._asked(lambda: path_manager.mv(address, target), f"{address} could not be renamed to {target}")

    def _remove(self, address: str) -> None:
        with _Naming(f"{address} could not be deleted"):
            path_manager.rm(address)

    def _asked(self, do: Callable[[], object], what: str) -> None:
        """Raises where the handler raises or answers False: it has logged the cause then."""
        with _Naming(what, may_lack=True):
            if do() is False:
                raise RemoteError(f"{what}: its handler refused; its log says why")


def _last(address: str) -> str:
    return address.rstrip("/").rpartition("/")[2]
