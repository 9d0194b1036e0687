"""When and how a run writes its checkpoints: one at a time, beside the steps where that is safe.

A file is written by a thread of rank 0, from a copy of the state in host memory, while the next steps run: what it
costs the run is the copy. The copy takes as much host memory as the checkpoint is long. A thread writes one file; the
next checkpoint, and the end of the run, wait for it. Shards are written by all ranks together, and the steps wait:
their writers have to speak with one another.

A checkpoint that could not be written ends the run, at the next step on one process, a few steps later on several;
earlier ones are untouched, for they are deleted only once a newer one is on the disk."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_kit.engine.checkpoint import (
    FORMAT,
    HEADER,
    Checkpoint,
    checkpoint_path,
    checkpoints,
    checksum,
    delete,
    delete_old,
    flush_folder,
    part_path,
    save_checkpoint,
    write_archive,
)
from jepa_kit.engine.distributed import from_main, is_main, joined, together
from jepa_kit.engine.resume import last_good
from jepa_kit.engine.shard_files import ShardError, save_sharded
from jepa_kit.engine.sharded import full_state


class SaveError(OSError):
    """A checkpoint that could not be written; the message says which, why, and what the last good one is."""


def save_error(folder: Path, step: int, error: BaseException) -> SaveError:
    """For a checkpoint of ``step`` updates that could not be written."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    good = last_good(folder)
    left = f"the last good one is {good.name}" if good else "there is no earlier one"
    return SaveError(f"the checkpoint of step {step} could not be written to {folder}: {why}; {left}")


def folder_error(folder: Path, error: OSError) -> OSError:
    """For a run folder that takes no more; another error is given back as it is."""
    if isinstance(error, SaveError) or error.errno not in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO):
        return error
    good = last_good(folder)
    left = f"the last good checkpoint is {good.name}" if good else "there is no checkpoint"
    return SaveError(f"{folder} cannot be written to: {error.strerror}; {left}")


class Saver:
    """Writes the checkpoints of a run.

    Args:
        folder: of the run.
        keep: how many of the latest stay, at least 1.
        keep_every: those of a step that divides by it stay for good; None for none.
        sharded: shards in place of a file.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int | None = None, sharded: bool = False) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self.sharded = sharded
        self.thread: threading.Thread | None = None
        self.error: SaveError | None = None
        self.copy: dict[str, Tensor] = {}

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for what is being written; its error is raised, or printed where another one is on its way."""
        if error is None:
            self.wait()
        elif self.thread is not None:
            self.thread.join()
            if self.error is not None:
                print(self.error, file=sys.stderr)

    @property
    def failed(self) -> bool:
        """Whether the last file could not be written, as far as is known by now."""
        return self.error is not None

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            SaveError: the last file could not be written; said once.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    def save(self, jepa: nn.Module, optimizer: torch.optim.Optimizer, header: Checkpoint) -> None:
        """Writes the state of the run, or begins to; all ranks must call it.

        Args:
            jepa, optimizer: the state.
            header: all the rest, with empty ``model`` and ``optimizer``.

        Raises:
            SaveError: this one (shards) or the one before (a file) could not be written; the same on every rank.
            FloatingPointError: weights are not finite, so that nothing could go on from them; nothing is written.
        """
        from_main(self.wait)
        check_finite(jepa, header.step)
        if self.sharded:
            self._save_shards(jepa, optimizer, header)
            return
        model, moments = full_state(jepa, optimizer)
        if is_main():
            held = replace(
                header,
                model=self._copied("model", model),
                optimizer={name: self._copied(f"optimizer {name}", state) for name, state in moments.items()},
            )
            self.thread = threading.Thread(target=self._write, args=(held,), name="checkpoint")
            self.thread.start()

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            save_checkpoint(self.folder, checkpoint, self.keep, self.keep_every)
        except (OSError, RuntimeError) as error:
            self.error = save_error(self.folder, checkpoint.step, error)

    def _copied(self, kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in host memory that stays the same from one checkpoint to the next."""
        copies = {}
        for name, value in state.items():
            key = f"{kind} {name}"
            copy = self.copy.get(key)
            if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
                copy = self.copy[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            copies[name] = copy.copy_(value.detach(), non_blocking=True)
        if any(value.is_cuda for value in state.values()):
            torch.cuda.current_stream().synchronize()
        return copies

    def _save_shards(self, jepa: nn.Module, optimizer: torch.optim.Optimizer, header: Checkpoint) -> None:
        path = checkpoint_path(self.folder, header.step, sharded=True)
        part = part_path(path)

        def clear() -> None:
            if part.exists():
                delete(part)

        def finish() -> None:
            about = {key: value for key, value in asdict(header).items() if key not in ("model", "optimizer")}
            write_archive({"format": FORMAT, **about, "files": files}, part / HEADER)
            flush_folder(part)
            if path.exists():
                delete(path)
            part.rename(path)
            flush_folder(self.folder)
            delete_old(self.folder, self.keep, self.keep_every)

        try:
            from_main(clear)
            save_sharded(part, jepa, optimizer)
            files = _checksums(part)
            from_main(finish)
        except (OSError, RuntimeError, ShardError) as error:
            with suppress(OSError):
                from_main(clear)
            raise save_error(self.folder, header.step, error) from error


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Name -> [bytes, CRC-32] of all files; each rank reads its own, rank 0 those that are nobody's."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if joined() else (0, 1)
    files = {path.name: path for path in folder.iterdir()}
    own = {name for name in files if name.startswith(f"__{rank}_")}
    if rank == 0:
        own |= {name for name in files if not name.startswith("__")}
    found = together(lambda: {name: [files[name].stat().st_size, checksum(files[name])] for name in sorted(own)})
    parts: list[Any] = [found]
    if joined():
        parts = [None] * size
        dist.all_gather_object(parts, found)
    return {name: value for part in parts for name, value in part.items()}


def check_finite(jepa: nn.Module, step: int) -> None:
    """Raises FloatingPointError, on every rank, where a weight is not finite; waits for the device once."""
    local = {name: getattr(v, "to_local", lambda v=v: v)() for name, v in jepa.state_dict().items()}
    finite = torch.stack([torch.isfinite(value).all() for value in local.values()])
    if joined():
        finite = finite.to(torch.int32)
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    broken = [name for name, good in zip(local, finite.tolist(), strict=True) if not good]
    if broken:
        raise FloatingPointError(
            f"{len(broken)} of {len(local)} weights are not finite after {step} steps, first {broken[0]}: "
            "the run has diverged, and no checkpoint is written"
        )


def write_text(path: Path, text: str) -> None:
    """Writes a small file in one piece."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def clear_parts(folder: Path) -> None:
    """Deletes what a killed run left half written."""
    for part in folder.glob(".checkpoint_*.part"):
        delete(part)


def newest(folder: Path) -> Path | None:
    """The latest checkpoint of a run folder."""
    found = checkpoints(folder)
    return found[-1] if found else None
