"""When and how a run writes its checkpoints: one at a time, beside the steps.

A thread writes, from a copy of the state in host memory, while the next steps run: what a checkpoint costs the run is
the copy. It takes as much host memory as the checkpoint is long; of shards, as what the process holds of it. The next
checkpoint, and the end of the run, wait for the thread.

A file is written by rank 0. Shards are written by a thread of each rank. These have to speak with one another, and do
so in a group of their own (gloo) that nothing else uses, so that their words never come between those of the steps;
they all say the same in the same order, for each rank has one thread at a time and begins it with the same step. Rank 0
gives the folder its name when all files of all ranks are on the disk, and their checksums known.

A checkpoint that could not be written ends the run, at the next step on one process, a few steps later on several;
earlier ones are untouched, for they are deleted only once a newer one is on the disk, and where it belongs
(store.py)."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_kit.distributed.collectives import PATIENCE, broadcast_from_rank0, is_main, joined, run_on_all_ranks
from jepa_kit.engine.checkpoint.dcp import save_sharded
from jepa_kit.engine.checkpoint.format import (
    FORMAT,
    HEADER,
    Checkpoint,
    checkpoint_path,
    checksum,
    save_checkpoint,
)
from jepa_kit.engine.checkpoint.manager import Store, store_in
from jepa_kit.engine.checkpoint.state_dict import (
    ModelState,
    OptimizerState,
    full_state,
    local_part,
    state_of,
    with_local,
)
from jepa_kit.errors import CheckpointError, SaveError, ShardError
from jepa_kit.files import delete, flush, part_path, write_archive

T = TypeVar("T")


def save_error(store: Store, step: int, error: BaseException) -> SaveError:
    """For a checkpoint of ``step`` updates that could not be written."""
    return SaveError(
        f"the checkpoint of step {step} could not be written to {store.folder}: {_why(error)}; "
        f"{_left(store, 'one', 'there is no earlier one')}"
    )


def carry_error(store: Store, error: BaseException) -> SaveError:
    """For checkpoints that are written, and could not be brought to where they belong."""
    kept = ", ".join(str(path) for path in store.here()) or "none"
    return SaveError(
        f"checkpoints could not be brought to {store}: {_why(error)}; still here: {kept}; --resume goes on from the "
        "latest of all, and brings them there"
    )


def folder_error(folder: Path, error: OSError) -> OSError:
    """For a run folder that takes no more; another error is given back as it is."""
    if isinstance(error, SaveError) or error.errno not in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO):
        return error
    left = _left(store_in(folder), "checkpoint", "there is no checkpoint")
    return SaveError(f"{folder} cannot be written to: {error.strerror}; {left}")


def _why(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _left(store: Store, what: str, none: str) -> str:
    """Which checkpoint a run can go on from; one elsewhere is not fetched to be looked at."""
    if store.place is None:
        good = store.last_good()
        return f"the last good {what} is {good.name}" if isinstance(good, Path) else none
    try:
        latest = store.newest()
    except OSError as error:
        return _why(error)
    return f"the latest {what} is {latest}" if latest else none


class Saver:
    """Writes the checkpoints of a run.

    Its ``with`` brings what an earlier run left here to where it belongs, and waits at its end for what is being
    written; all ranks must enter and leave it.

    Args:
        store: where they go.
        keep: how many of the latest stay, at least 1.
        keep_every: those of a step that divides by it stay for good; None for none.
        sharded: shards in place of a file.
    """

    def __init__(self, store: Store, *, keep: int, keep_every: int | None = None, sharded: bool = False) -> None:
        self.store = store
        self.keep = keep
        self.keep_every = keep_every
        self.sharded = sharded
        self.thread: threading.Thread | None = None
        self.error: SaveError | None = None
        self.copy: dict[str, Tensor] = {}

    def __enter__(self) -> Saver:
        if is_main() and self.store.leftover():
            self._start(self._carry)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for what is being written; its error is raised on all ranks, or printed beside another one."""
        if error is None:
            self._join()
            broadcast_from_rank0(self.wait)
        elif self.thread is not None:
            self.thread.join()
            if self.error is not None:
                print(self.error, file=sys.stderr)

    @property
    def failed(self) -> bool:
        """Whether the last one could not be written, as far as is known by now; rank 0 knows."""
        return self.error is not None

    def wait(self) -> None:
        """Until nothing is being written by this rank.

        Raises:
            SaveError: the last one could not be written; said once, and on rank 0.
        """
        self._join()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        self.thread = threading.Thread(target=work, args=arguments, name="checkpoint")
        self.thread.start()

    def save(self, jepa: nn.Module, optimizer: torch.optim.Optimizer, header: Checkpoint) -> None:
        """Copies the state of the run, and begins to write it; all ranks must call it.

        Args:
            jepa, optimizer: the state.
            header: all the rest, with empty ``model`` and ``optimizer``.

        Raises:
            SaveError: the one before could not be written; the same on every rank.
            FloatingPointError: weights or moments are not finite, so that no run could resume; nothing is written.
        """
        self._join()
        broadcast_from_rank0(self.wait)
        run_on_all_ranks(lambda: check_finite(*state_of(jepa, optimizer), header.step))
        if self.sharded:
            group = background_group()
            self._start(self._write_shards, *self._held(*state_of(jepa, optimizer)), header, group)
            return
        state = full_state(jepa, optimizer)
        if is_main():
            model, moments = self._held(*state)
            self._start(self._write, replace(header, model=model, optimizer=moments))

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            keep = self.keep if self.store.place is None else None  # what is carried away is deleted after that
            save_checkpoint(self.store.folder, checkpoint, keep, self.keep_every)
        except (OSError, RuntimeError) as error:
            self.error = save_error(self.store, checkpoint.step, error)
            return
        self._carry()

    def _carry(self) -> None:
        if self.store.place is None:
            return
        try:
            self.store.carry(self.keep, self.keep_every)
        except (OSError, NotImplementedError, CheckpointError) as error:
            self.error = carry_error(self.store, error)

    def _held(self, model: ModelState, optimizer: OptimizerState) -> tuple[ModelState, OptimizerState]:
        """Return the state in host memory; the host waits once, for all copies together."""
        moments = {name: self._copied(f"optimizer {name}", state) for name, state in optimizer.items()}
        held = self._copied("model", model), moments
        if any(value.is_cuda for state in (model, *optimizer.values()) for value in state.values()):
            torch.cuda.current_stream().synchronize()
        return held

    def _copied(self, kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Start copies into host memory that every checkpoint uses again, and return them; of shards, this rank's."""
        copies = {}
        for name, value in state.items():
            key, local = f"{kind} {name}", local_part(value.detach())
            copy = self.copy.get(key)
            if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
                copy = self.copy[key] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            copies[name] = with_local(value, copy.copy_(local, non_blocking=True))
        return copies

    def _write_shards(self, model: ModelState, optimizer: OptimizerState, header: Checkpoint, group: Any) -> None:
        """The work of each rank's thread; rank 0 keeps the error of any."""
        folder, main = self.store.folder, is_main()
        path = checkpoint_path(folder, header.step, sharded=True)
        part = part_path(path)

        def clear() -> None:
            if main and part.exists():
                delete(part)

        def make() -> None:
            part.mkdir(parents=True, exist_ok=True)

        def finish(files: dict[str, list[int]]) -> None:
            about = {key: value for key, value in asdict(header).items() if key not in ("model", "optimizer")}
            write_archive({"format": FORMAT, **about, "files": files}, part / HEADER)
            flush(part)
            before = path.with_name(f".{path.name}.before.part")
            if path.exists():
                path.rename(before)
            part.rename(path)
            flush(folder)
            if before.exists():
                delete(before)
            self.store.tidy(self.keep, self.keep_every)

        try:
            agreed(group, clear)
            agreed(group, make)
            save_sharded(part, model, optimizer, group)
            own = agreed(group, lambda: _checksums(part))
            if main:
                finish({name: sums for rank in own for name, sums in rank.items()})
        except (OSError, RuntimeError, ShardError) as error:
            if main:
                with suppress(OSError):
                    clear()
                self.error = save_error(self.store, header.step, error)
            return
        if main:
            self._carry()


_groups: dict[Any, Any] = {}


def background_group() -> Any:
    """The group of processes that threads beside the steps speak in; all ranks must call it. None for one process."""
    if not joined():
        return None
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()
        _groups[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups[world]


def agreed(group: Any, do: Callable[[], T]) -> list[T]:
    """What ``do`` gives on each rank, on every one; all raise where it raised on one.

    Raises:
        OSError: the first rank's own.
    """
    result: Any = None
    failed: OSError | None = None
    try:
        result = do()
    except OSError as error:
        failed = error
    answers: list[Any] = [(result, failed)]
    if group is not None:
        answers = [None] * dist.get_world_size(group)
        dist.all_gather_object(answers, (result, failed), group=group)
    first = next((error for _, error in answers if error is not None), None)
    if first is not None:
        raise first
    return [answer for answer, _ in answers]


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Name -> [bytes, CRC-32] of this rank's files; rank 0 also takes those that are nobody's."""
    rank = dist.get_rank() if joined() else 0
    own = {path.name: path for path in folder.iterdir() if path.name.startswith(f"__{rank}_")}
    if rank == 0:
        own |= {path.name: path for path in folder.iterdir() if not path.name.startswith("__")}
    return {name: [path.stat().st_size, checksum(path)] for name, path in sorted(own.items())}


def check_finite(model: ModelState, optimizer: OptimizerState, step: int) -> None:
    """Check weights and moments, as this process has them; waits for the device once.

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
