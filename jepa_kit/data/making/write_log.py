"""The record of a run that writes shards, from which it goes on after an interruption, SIGKILL and power cuts included.

A folder that is being written holds ``UNFINISHED``: a line of JSON that says what decides about the bytes, then a line
for each shard that has its final name. It goes when ``index.json`` comes.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jepa_kit.data.shards.indexing import scan
from jepa_kit.data.shards.writing import INDEX, KEYS, LABELS, MASKS, OFFSETS, UNFINISHED, Rows, Shard
from jepa_kit.files import read_json_lines, write_json_lines
from jepa_kit.lock import LockedError, lock_file

LOCK = ".make_shards.lock"
WRITTEN = ("shard-*.tar", ".*.part*", INDEX, OFFSETS, LABELS, KEYS, MASKS, UNFINISHED)
"""Names of what a writer leaves in a folder of shards."""


@dataclass
class Standing:
    """How far a folder of shards is.

    Attributes:
        total: samples that it is to hold, the refused ones included.
        end: how many of them are in shards, or refused.
        whole: whether its index is there.
        shards, rows: what is written.
        refused: ``name`` and ``reason`` of what was left out.
        notes: what the user should know of images -> how many of this run it is about.
    """

    total: int
    end: int = 0
    whole: bool = False
    shards: list[Shard] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    _told: int = 0
    """So many refusals are in the journal."""


class Journal:
    """``UNFINISHED`` of one folder.

    Args:
        folder: of the shards.
        made_by: what decides about the bytes.
    """

    def __init__(self, folder: str, made_by: Mapping[str, Any]) -> None:
        self.folder, self.made_by = folder, json.loads(json.dumps(made_by))
        self.path = os.path.join(folder, UNFINISHED)

    def begin(self) -> None:
        """Makes the folder and its mark, unless they are there."""
        os.makedirs(self.folder, exist_ok=True)
        if not os.path.exists(self.path) and not os.path.exists(os.path.join(self.folder, INDEX)):
            self._append({"made_by": self.made_by})

    def differs(self) -> str | None:
        """What the folder holds that this run would not go on with, for a message; None where it may go on.

        A folder without anything, and one that the same command finished, are nothing to complain about.
        """
        held = [path for path in existing(self.folder) if not fnmatch(os.path.basename(path), ".*.part*")]
        if not held:
            return None
        if os.path.exists(self.path):
            lines = self._lines()
            before = lines[0].get("made_by") if lines else self.made_by  # killed before its first line was whole
            verb = "holds an unfinished run of another command"
        elif os.path.exists(os.path.join(self.folder, INDEX)):
            with open(os.path.join(self.folder, INDEX), encoding="utf-8") as stream:
                before = json.load(stream).get("made_by")
            verb = f"already holds shards ({held[0]}) of another command"
        else:
            return f"already holds shards ({held[0]}) of unknown origin"
        if before == self.made_by:
            return None
        return f"{verb} ({difference(before or {}, self.made_by)})"

    def open(self, total: int) -> Standing:
        """How far the folder is; what a run left half-written is removed.

        Raises:
            ValueError: a shard that was written is gone, or has changed.
        """
        standing = Standing(total)
        if not os.path.exists(self.path):
            with open(os.path.join(self.folder, INDEX), encoding="utf-8") as stream:
                standing.refused = json.load(stream)["refused"]
            standing.end, standing.whole = total, True
            return standing
        lines = self._lines()
        for line in lines[1:]:
            shard = Shard(**line["shard"])
            path = os.path.join(self.folder, shard.file)
            if not os.path.isfile(path) or os.path.getsize(path) != shard.bytes:
                raise ValueError(f"{path} of the interrupted run is gone, or has changed: start anew with --overwrite")
            standing.shards.append(shard)
            standing.rows.append(scan(path, shard.file).rows)
            standing.refused += line["refused"]
            standing.end = line["end"]
        standing._told = len(standing.refused)
        keep = {UNFINISHED, *(shard.file for shard in standing.shards)}
        for path in existing(self.folder):
            if os.path.basename(path) not in keep:
                os.remove(path)
        write_json_lines(Path(self.path), lines or [{"made_by": self.made_by}])  # without a line that was cut short
        return standing

    def add(self, standing: Standing, shard: Shard, rows: Rows) -> None:
        """Records a shard that has its final name."""
        refused = standing.refused[standing._told :]
        self._append({"shard": asdict(shard), "end": standing.end, "refused": refused})
        standing._told = len(standing.refused)
        standing.shards.append(shard)
        standing.rows.append(rows)

    def _append(self, line: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _lines(self) -> list[dict[str, Any]]:
        """The whole lines of the file."""
        return read_json_lines(Path(self.path))


@contextlib.contextmanager
def alone(out: str) -> Iterator[None]:
    """Makes sure that nobody else writes shards into a folder; the lock goes with the process, however that ends.

    Raises:
        ValueError: somebody does.
    """
    try:
        with lock_file(Path(out, LOCK)):
            yield
    except LockedError as error:
        raise ValueError(f"OUT_DIR (={out!r}) is being written by another make_shards: wait, or stop it") from error


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two commands differ in, as a user wrote it."""
    names = [name for name in [*now, *(k for k in before if k not in now)] if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)


def existing(folder: str) -> list[str]:
    """What a writer has left in a folder."""
    return sorted(path for name in WRITTEN for path in glob.glob(os.path.join(glob.escape(folder), name)))


def folders_with_shards(out: str) -> list[str]:
    """The folder and those in it that hold shards with an index, or with the mark of an unfinished run."""
    inner = sorted(entry.path for entry in os.scandir(out) if entry.is_dir()) if os.path.isdir(out) else []
    marked = [folder for folder in inner if any(os.path.exists(os.path.join(folder, f)) for f in (INDEX, UNFINISHED))]
    return [folder for folder in [out, *marked] if existing(folder)]


def make_room(out: str, journals: Sequence[Journal], *, overwrite: bool) -> None:
    """Begins anew, or where the same command was interrupted; what another one made is not touched without a word.

    Raises:
        ValueError: the folder holds shards, or the beginning of some, of another command.
    """
    held = folders_with_shards(out)
    if overwrite:
        clear(held)
    own = [journal.folder for journal in journals]
    reasons = [journal.differs() for journal in journals]
    reasons += [f"already holds shards in {folder}" for folder in held if not overwrite and folder not in own]
    for reason in filter(None, reasons):
        raise ValueError(f"OUT_DIR (={out!r}) {reason}: name another folder, or --overwrite")
    for journal in journals:
        journal.begin()


def unfinished(out: str) -> bool:
    """Whether a run into this folder was interrupted."""
    return any(os.path.exists(os.path.join(folder, UNFINISHED)) for folder in folders_with_shards(out))


def clear(folders: Sequence[str]) -> None:
    """Removes what an earlier run wrote. The mark goes last: shards without their index pass for foreign ones."""
    for folder in folders:
        mark = os.path.join(folder, UNFINISHED)
        with open(mark, "w", encoding="utf-8"):
            pass  # an empty one: whoever goes on from here begins at the first sample
        for path in existing(folder):
            if path != mark:
                os.remove(path)
        os.remove(mark)
