"""The log of a run that writes shards, from which the run resumes after an interruption, SIGKILL or power cut.

A folder that is being written contains ``UNFINISHED``: a line of JSON with all that determines the bytes, then a line
for each complete shard. It is deleted once ``index.json`` is written.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jepa_kit.data.shards.indexing import scan
from jepa_kit.data.shards.tars import Refusal
from jepa_kit.data.shards.writing import INDEX, KEYS, LABELS, MASKS, OFFSETS, UNFINISHED, Rows, Shard
from jepa_kit.files import read_json_lines, write_json_lines
from jepa_kit.lock import LockedError, lock_file
from jepa_kit.rng import IntArray

LOCK = ".make_shards.lock"
WRITTEN = ("shard-*.tar", ".*.part*", INDEX, OFFSETS, LABELS, KEYS, MASKS, UNFINISHED)
"""Names of all files that a writer creates in a folder of shards."""


class WriteLog:
    """The file ``UNFINISHED`` of one folder, and the state of the folder that it records.

    Args:
        folder: of the shards.
        numbers: of the samples of the folder, in the order of its shards.
        made_by: the options that determine the bytes.

    Attributes:
        end: the number of samples that are in shards or refused.
        complete: whether the index is written.
        shards, rows: of the complete shards.
        refused: samples that were left out.
        notes: note on an image -> number of images of this run.
    """

    def __init__(self, folder: str, numbers: IntArray, made_by: Mapping[str, Any]) -> None:
        self.folder, self.numbers, self.made_by = folder, numbers, json.loads(json.dumps(made_by))
        self.path, self.index = Path(folder, UNFINISHED), Path(folder, INDEX)
        self.end, self.complete = 0, False
        self.shards: list[Shard] = []
        self.rows: list[Rows] = []
        self.refused: list[Refusal] = []
        self.notes: Counter[str] = Counter()
        self._logged = 0  # refused samples that are in the log

    def begin(self) -> None:
        """Create the folder and ``UNFINISHED``, unless they exist or the folder is finished."""
        os.makedirs(self.folder, exist_ok=True)
        if not self.path.exists() and not self.index.exists():
            self._append({"made_by": self.made_by})

    def differs(self) -> str | None:
        """Return why this run cannot use the folder, or None if it is empty or the same command wrote it."""
        found = [path for path in existing(self.folder) if not fnmatch(os.path.basename(path), ".*.part*")]
        if not found:
            return None
        if self.path.exists():
            lines = read_json_lines(self.path)
            before = lines[0].get("made_by") if lines else self.made_by  # killed before its first line was complete
            verb = "has an unfinished run of another command"
        elif self.index.exists():
            before = json.loads(self.index.read_text(encoding="utf-8")).get("made_by")
            verb = f"already has shards ({found[0]}) of another command"
        else:
            return f"already has shards ({found[0]}) of unknown origin"
        if before == self.made_by:
            return None
        return f"{verb} ({difference(before or {}, self.made_by)})"

    def open(self) -> None:
        """Read the state of the folder, and delete incomplete files.

        Raises:
            ValueError: a shard in the log is missing or has changed.
        """
        if not self.path.exists():
            self.refused = [Refusal(**entry) for entry in json.loads(self.index.read_text(encoding="utf-8"))["refused"]]
            self.end, self.complete = len(self.numbers), True
            return
        lines = read_json_lines(self.path)
        for line in lines[1:]:
            shard = Shard(**line["shard"])
            path = os.path.join(self.folder, shard.file)
            if not os.path.isfile(path) or os.path.getsize(path) != shard.bytes:
                raise ValueError(
                    f"{path} of the interrupted run is missing or has changed: start again with --overwrite"
                )
            self.shards.append(shard)
            self.rows.append(scan(path, shard.file).rows)
            self.refused += [Refusal(**entry) for entry in line["refused"]]
            self.end = line["end"]
        self._logged = len(self.refused)
        keep = {UNFINISHED, *(shard.file for shard in self.shards)}
        for path in existing(self.folder):
            if os.path.basename(path) not in keep:
                os.remove(path)
        write_json_lines(self.path, lines or [{"made_by": self.made_by}])  # without an incomplete last line

    def add(self, shard: Shard, rows: Rows) -> None:
        """Add a complete shard to the log and to the state."""
        refused = [entry._asdict() for entry in self.refused[self._logged :]]
        self._append({"shard": asdict(shard), "end": self.end, "refused": refused})
        self._logged = len(self.refused)
        self.shards.append(shard)
        self.rows.append(rows)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


@contextlib.contextmanager
def lock_output(out: str) -> Iterator[None]:
    """Lock the output folder; the lock ends with the process.

    Raises:
        ValueError: another process has the lock.
    """
    try:
        with lock_file(Path(out, LOCK)):
            yield
    except LockedError as error:
        raise ValueError(f"OUT_DIR (={out!r}) is being written by another make_shards: wait, or stop it") from error


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the options in which two commands differ, as one line."""
    names = [name for name in [*now, *(k for k in before if k not in now)] if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)


def existing(folder: str) -> list[str]:
    """Return the paths of all files in a folder that a writer created."""
    return sorted(path for name in WRITTEN for path in glob.glob(os.path.join(glob.escape(folder), name)))


def folders_with_shards(out: str) -> list[str]:
    """Return the folder itself and its subfolders with an index or ``UNFINISHED``, if they have files of a writer."""
    inner = sorted(entry.path for entry in os.scandir(out) if entry.is_dir()) if os.path.isdir(out) else []
    marked = [folder for folder in inner if any(os.path.exists(os.path.join(folder, f)) for f in (INDEX, UNFINISHED))]
    return [folder for folder in [out, *marked] if existing(folder)]


def prepare_folders(out: str, logs: Sequence[WriteLog], *, overwrite: bool) -> None:
    """Create the folders of a run, or keep those of an interrupted run of the same command.

    Args:
        out: the output folder.
        logs: of all folders.
        overwrite: whether to delete the shards of other commands.

    Raises:
        ValueError: the folder has shards of another command, finished or not.
    """
    found = folders_with_shards(out)
    if overwrite:
        clear(found)
    own = [log.folder for log in logs]
    reasons = [log.differs() for log in logs]
    reasons += [f"already has shards in {folder}" for folder in found if not overwrite and folder not in own]
    for reason in filter(None, reasons):
        raise ValueError(f"OUT_DIR (={out!r}) {reason}: name another folder, or --overwrite")
    for log in logs:
        log.begin()


def unfinished(out: str) -> bool:
    """Return whether a run into this folder was interrupted."""
    return any(os.path.exists(os.path.join(folder, UNFINISHED)) for folder in folders_with_shards(out))


def clear(folders: Sequence[str]) -> None:
    """Delete the files of an earlier run, ``UNFINISHED`` last: without it, shards without an index look foreign."""
    for folder in folders:
        mark = os.path.join(folder, UNFINISHED)
        Path(mark).write_bytes(b"")  # an empty log: a run that resumes starts at the first sample
        for path in sorted(existing(folder), key=lambda path: path == mark):
            os.remove(path)
