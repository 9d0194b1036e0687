"""Write the checkpoints of a run in a thread, while the steps continue; errors of a run under way.

A checkpoint costs the run a copy of the state into host memory: of a file, all of it on rank 0; of shards, each rank's
part. The next checkpoint, and the end of the run, wait for the thread.

Rank 0 writes a file. Shards are written by a thread of each rank. These communicate in a gloo group of their own, so
that their collectives never mix with those of the steps; all call the same collectives in the same order, since each
rank has one such thread and starts it at the same step. Rank 0 renames the folder once all files of all ranks are on
the disk and their checksums are known.

A failed write ends the run: at the next step of one process, a few steps later of several. Earlier checkpoints are
deleted only after a newer one is on the disk, and uploaded if ``checkpoint.dir`` is a URL.

``torch.distributed.checkpoint.async_save`` is not used: it ends before the checksums, the header, the rename and the
upload, which need the same thread and group, and it does not write files.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_kit.compat import with_local_part
from jepa_kit.distributed.collectives import (
    PATIENCE,
    all_gather_object,
    broadcast_from_rank0,
    is_main,
    joined,
    run_on_all_ranks,
)
from jepa_kit.engine.checkpoint.files import FORMAT, checksum
from jepa_kit.engine.checkpoint.format import Checkpoint, checkpoint_path, save_checkpoint
from jepa_kit.engine.checkpoint.manager import Store, store_in
from jepa_kit.engine.checkpoint.state_dict import (
    ModelState,
    OptimizerState,
    full_state,
    is_sharded,
    local_part,
    state_of,
)
from jepa_kit.errors import CheckpointError, RunError, SaveError, cause_of
from jepa_kit.files import delete, flush, part_path, write_archive
from jepa_kit.run_folder import HEADER


class Saver:
    """Writes the checkpoints of a run.

    Its ``with`` block uploads what an earlier run left, and waits at its end for the last write; all ranks must enter
    and leave it.

    Args:
        store: the checkpoints of the run.
        keep: how many of the latest stay, at least 1.
        keep_every: those whose step is a multiple of it stay as well; None for none.
        sharded: write shards, not a file.
    """

    def __init__(self, store: Store, *, keep: int, keep_every: int | None = None, sharded: bool = False) -> None:
        self.store = store
        self.keep = keep
        self.keep_every = keep_every
        self.sharded = sharded
        self.pending: Future[None] | None = None
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._copies: dict[str, Tensor] = {}

    def __enter__(self) -> Saver:
        if is_main() and self.store.pending_uploads():
            self.pending = self._executor.submit(self._upload_and_prune)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for the last write; its error is raised on all ranks, or printed if there is another one already."""
        try:
            if error is None:
                self._join()
                broadcast_from_rank0(self.wait)
            elif self.pending is not None and (failure := self.pending.exception()) is not None:
                print(failure, file=sys.stderr)
        finally:
            self._executor.shutdown()

    @property
    def failed(self) -> bool:
        """Whether the last write has failed, as far as rank 0 knows."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Wait until this rank writes nothing.

        Raises:
            SaveError: the last write failed; raised once, on rank 0.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _join(self) -> None:
        if self.pending is not None:
            wait([self.pending])

    def save(self, jepa: nn.Module, optimizer: torch.optim.Optimizer, header: Checkpoint) -> None:
        """Copy the state of the run, and start to write it; all ranks must call it.

        Args:
            jepa, optimizer: the state.
            header: the rest of the checkpoint, with empty ``model`` and ``optimizer``.

        Raises:
            SaveError: the write before failed; on every rank.
            FloatingPointError: weights or moments are not finite, so that no run could resume; nothing is written.
        """
        self._join()
        broadcast_from_rank0(self.wait)
        run_on_all_ranks(lambda: check_finite(*state_of(jepa, optimizer), header.step))
        if self.sharded:
            group = _background_group(dist.group.WORLD) if joined() else None
            copies = self._copy_to_host(*state_of(jepa, optimizer))
            self.pending = self._executor.submit(self._write, header.step, self._write_shards, *copies, header, group)
            return
        state = full_state(jepa, optimizer)
        if is_main():
            model, moments = self._copy_to_host(*state)
            checkpoint = replace(header, model=model, optimizer=moments)
            self.pending = self._executor.submit(
                self._write, header.step, save_checkpoint, self.store.folder, checkpoint
            )

    def _write(self, step: int, write: Callable[..., object], *arguments: Any) -> None:
        """Write the checkpoint of a step; rank 0 raises the error of any rank, or uploads and deletes checkpoints."""
        try:
            write(*arguments)
        except (OSError, RuntimeError, CheckpointError) as error:
            if is_main():
                with suppress(OSError):
                    delete(part_path(checkpoint_path(self.store.folder, step, sharded=self.sharded)))
                raise save_error(self.store, step, error) from error
            return
        if is_main():
            self._upload_and_prune()

    def _upload_and_prune(self) -> None:
        try:
            self.store.upload()
            self.store.prune(self.keep, self.keep_every)
        except (OSError, NotImplementedError, CheckpointError) as error:
            raise upload_error(self.store, error) from error

    def _copy_to_host(self, model: ModelState, optimizer: OptimizerState) -> tuple[ModelState, OptimizerState]:
        """Return the state in host memory; the host waits once, for all copies together."""
        moments = {name: self._start_copies(f"optimizer {name}", state) for name, state in optimizer.items()}
        copied = self._start_copies("model", model), moments
        if any(value.is_cuda for state in (model, *optimizer.values()) for value in state.values()):
            torch.cuda.current_stream().synchronize()
        return copied

    def _start_copies(self, kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Start copies into host memory that every checkpoint reuses, and return them; of shards, this rank's."""
        copies = {}
        for name, value in state.items():
            key, local = f"{kind} {name}", local_part(value.detach())
            copy = self._copies.get(key)
            if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
                copy = self._copies[key] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            copy.copy_(local, non_blocking=True)
            copies[name] = with_local_part(value, copy) if is_sharded(value) else copy
        return copies

    def _write_shards(self, model: ModelState, optimizer: OptimizerState, header: Checkpoint, group: Any) -> None:
        """Write this rank's shards; rank 0 completes the checkpoint."""
        from jepa_kit.engine.checkpoint.dcp import save_sharded  # a second to import

        path = checkpoint_path(self.store.folder, header.step, sharded=True)
        part = part_path(path)

        def create() -> None:
            if is_main():
                delete(part)
                part.mkdir(parents=True)

        run_on_all_ranks(create, group)
        save_sharded(part, model, optimizer, group)
        sums = all_gather_object(run_on_all_ranks(lambda: _checksums(part), group), group)
        if is_main():
            _complete(path, header, {name: entry for of_rank in sums for name, entry in of_rank.items()})


def _complete(path: Path, header: Checkpoint, files: dict[str, list[int]]) -> None:
    """Add the header to the temporary folder of a sharded checkpoint, and rename the folder to ``path``."""
    part = part_path(path)
    about = {key: value for key, value in asdict(header).items() if key not in ("model", "optimizer")}
    write_archive({"format": FORMAT, **about, "files": files}, part / HEADER)
    flush(part)
    before = path.with_name(f".{path.name}.before.part")
    if path.exists():  # a folder cannot be renamed to one that is not empty
        path.rename(before)
    part.rename(path)
    flush(path.parent)
    delete(before)


@lru_cache(maxsize=1)
def _background_group(world: Any) -> Any:
    """Return the gloo group of the threads beside the steps; all ranks must call it."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Return name -> [bytes, CRC-32] of this rank's files; rank 0 adds the metadata."""
    from jepa_kit.engine.checkpoint.dcp import METADATA

    rank = dist.get_rank() if joined() else 0
    own = [*([folder / METADATA] if rank == 0 else []), *sorted(folder.glob(f"__{rank}_*"))]
    return {path.name: [path.stat().st_size, checksum(path)] for path in own}


def check_finite(model: ModelState, optimizer: OptimizerState, step: int) -> None:
    """Check this process's part of weights and moments; waits for the device once.

    Raises:
        FloatingPointError: some are NaN or infinite.
    """
    moments = {f"{key} of {name}": value for name, state in optimizer.items() for key, value in state.items()}
    local = {name: local_part(value) for name, value in {**model, **moments}.items()}
    device = next(iter(local.values())).device  # AdamW counts its steps on the host
    finite = torch.stack([torch.isfinite(value).all().to(device) for value in local.values()])
    broken = [name for name, good in zip(local, finite.tolist(), strict=True) if not good]
    if broken:
        raise FloatingPointError(
            f"{len(broken)} of {len(local)} weights and moments are not finite after {step} steps, first {broken[0]}: "
            "the run has diverged, and no checkpoint is written"
        )


FULL_OR_BROKEN = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO)
"""Errors after which nothing more can be written to a folder."""


@contextmanager
def under_way(folder: Path) -> Iterator[None]:
    """Wrap the errors of the steps of a run in ``folder``.

    Raises:
        RunError: for a ValueError, OSError or RuntimeError, with the same message.
        SaveError: as it is; also for an OSError after which nothing more can be written to the folder.
    """
    try:
        yield
    except (RunError, SaveError):
        raise
    except OSError as error:
        if error.errno not in FULL_OR_BROKEN:
            raise RunError(str(error)) from error
        left = _resumable(store_in(folder), "checkpoint", "there is no checkpoint")
        raise SaveError(f"{folder} cannot be written to: {error.strerror}; {left}") from error
    except (ValueError, RuntimeError) as error:
        raise RunError(str(error)) from error


def save_error(store: Store, step: int, error: BaseException) -> SaveError:
    """Return the error of a checkpoint that could not be written."""
    return SaveError(
        f"the checkpoint of step {step} could not be written to {store.folder}: {cause_of(error)}; "
        f"{_resumable(store, 'one', 'there is no earlier one')}"
    )


def upload_error(store: Store, error: BaseException) -> SaveError:
    """Return the error of checkpoints that could not be uploaded, or of old ones that could not be deleted."""
    if not store.remote:
        return SaveError(
            f"old checkpoints could not be deleted from {store}: {cause_of(error)}; "
            f"{_resumable(store, 'checkpoint', 'there is no checkpoint')}"
        )
    left = ", ".join(map(str, store.pending_uploads())) or "none"
    return SaveError(
        f"checkpoints could not be uploaded to {store}: {cause_of(error)}; still in the run folder: {left}; "
        "--resume continues from the latest of all, and uploads them"
    )


def _resumable(store: Store, what: str, none: str) -> str:
    """Say which checkpoint the run can be resumed from. Remote ones are not downloaded to verify them."""
    if not store.remote:
        good = store.last_good()
        return f"the last good {what} is {good.name}" if good else none
    try:
        latest = store.newest()
    except OSError as error:
        return cause_of(error)
    return f"the latest {what} is {latest}" if latest else none
