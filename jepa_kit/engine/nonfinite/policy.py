"""Handle a step whose loss or gradient is not finite: record it, keep its batch, and stop, skip or roll back.

``train.on_nonfinite`` chooses:

    stop      raise FloatingPointError; the last checkpoint is from before the step
    skip      continue without the batch; more than ``train.nonfinite_limit`` such steps in a row stop the run
    rollback  resume from the last checkpoint without the batch; more than ``train.nonfinite_limit`` roll-backs to the
              same checkpoint stop the run

A step without its batch updates only the target encoder. So ``skip`` and ``rollback`` give the same weights if the
batch is the cause. ``rollback`` is for weights that were damaged before a gradient showed it.

The step is recorded in ``bad_steps.jsonl`` of the run folder, and a resumed run leaves its batch out as well. The batch
is saved in ``bad_step_<step>/rank_<rank>.pt``, by the ranks whose loss is not finite, or by all if only the gradient is
not; ``tools/replay_step.py`` runs it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jepa_kit.config import versions
from jepa_kit.data.batch import Batch
from jepa_kit.distributed.collectives import all_gather, broadcast_from_rank0, run_on_all_ranks
from jepa_kit.engine.nonfinite.detect import Suspect
from jepa_kit.engine.run import Run
from jepa_kit.files import atomic_write, read_json_lines, write_archive, write_json_lines
from jepa_kit.run_folder import RECORD

Policy = Literal["stop", "skip", "rollback"]


@dataclass(frozen=True)
class BadStep:
    """A line of ``bad_steps.jsonl``.

    Args:
        step: counted from 0.
        policy: how it was handled.
        losses: of every rank, as text, because JSON has no nan.
        grad_norm: over all ranks, as text.
        checkpoint: updates in the last checkpoint before it, or None if there was none.
    """

    step: int
    policy: Policy
    losses: tuple[str, ...]
    grad_norm: str
    checkpoint: int | None = None

    @property
    def ranks(self) -> list[int]:
        """Ranks whose loss was not finite; none if only the gradient was not."""
        return [rank for rank, loss in enumerate(self.losses) if not math.isfinite(float(loss))]

    def __str__(self) -> str:
        """Return a message: which number is not finite, and at which step."""
        at = f" of rank {', '.join(map(str, self.ranks))} of {len(self.losses)}" if len(self.losses) > 1 else ""
        if self.ranks:
            return f"the loss{at} is {self.losses[self.ranks[0]]} at step {self.step}"
        return f"the gradient's norm is {self.grad_norm} at step {self.step}, but the loss is finite"


def read_record(folder: Path) -> list[BadStep]:
    """Return the bad steps of a run folder, in the order in which they occurred.

    Raises:
        ValueError: a line is no record; a last line that is cut short, by a killed run, is dropped.
    """
    path = folder / RECORD
    record = []
    for number, fields in enumerate(read_json_lines(path), start=1):
        try:
            record.append(BadStep(**{**fields, "losses": tuple(fields["losses"])}))
        except (TypeError, KeyError) as error:  # noqa: PERF203 (the message names the line)
            raise ValueError(f"{path}, line {number} is no record of a bad step: {error}") from error
    return record


def append_record(folder: Path, bad: BadStep) -> None:
    """Append a line, flushed to the disk; drop a last line that a killed run left incomplete."""
    path = folder / RECORD
    write_json_lines(path, [*read_json_lines(path), vars(bad)])


def left_out(record: Sequence[BadStep]) -> frozenset[int]:
    """Return the steps whose batch is left out."""
    return frozenset(bad.step for bad in record if bad.policy != "stop")


def over_limit(record: Sequence[BadStep], bad: BadStep, limit: int) -> str | None:
    """Return why a bad step exceeds ``train.nonfinite_limit`` and stops the run, or None if it does not.

    A function of the record of earlier steps, so that resumes count too.
    """
    if bad.policy == "skip":
        steps = left_out(record) | {bad.step}
        row = next(n for n in range(1, len(steps) + 2) if bad.step - n not in steps)
        if row > limit:
            return f"{row} bad steps in a row are more than train.nonfinite_limit (={limit})"
    if bad.policy == "rollback":
        times = len({b.step for b in (*record, bad) if b.policy == "rollback" and b.checkpoint == bad.checkpoint})
        if times > limit:
            return f"{times} times back to step {bad.checkpoint or 0} are more than train.nonfinite_limit (={limit})"
    return None


DUMP_FORMAT = "jepa_kit/bad_step/2"


def dump_path(folder: Path, step: int, rank: int) -> Path:
    """Return the path of a rank's batch of a bad step."""
    return folder / f"bad_step_{step:08d}" / f"rank_{rank:04d}.pt"


def write_dump(path: Path, suspect: Suspect, bad: BadStep, facts: dict[str, Any]) -> None:
    """Save the batch of a bad step: all views, sample numbers, learning rate, weight decay and momentum.

    Args:
        path: of the file, ``dump_path``.
        suspect: the step, of this rank.
        bad: the same, as recorded.
        facts: ``rank``, ``world_size``, ``keys`` of the samples, ``folder`` of the run, ``config``, ``data``,
            ``versions``, ``progress``; ``origin`` of the weights, as in a checkpoint; and ``resume_from``, the released
            checkpoint that the run started from, or None.

    Raises:
        OSError: it could not be written; no part of it is left then.
    """
    batch = suspect.batch.to("cpu")
    content = {
        "format": DUMP_FORMAT,
        "step": suspect.step,
        "bad": {**vars(bad), "losses": list(bad.losses)},
        "hyper": vars(suspect.hyper),
        "numbers": dict(zip(("loss", "grad_norm", *suspect.terms), suspect.numbers.tolist(), strict=True)),
        "samples": batch.samples,
        "views": [
            {"images": view.images, "masks": view.masks and view.masks.to_dict(), "action": view.action}
            for view in batch.views
        ],
        **facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        write_archive(content, part)


class BadSteps:
    """The bad steps of a run, and the policy for new ones.

    Args:
        run: whose steps these are.
        folder: of the run.
        checkpoint: returns the updates in the checkpoint that a roll-back resumes from, or None; called on rank 0.
        origin: of the run's weights, as in a checkpoint.
        resume_from: the released checkpoint that the run started from, or None.

    Attributes:
        left_out: steps whose batch is left out.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        *,
        checkpoint: Callable[[], int | None],
        origin: dict[str, Any],
        resume_from: str | None,
    ) -> None:
        self.run, self.folder, self.checkpoint = run, folder, checkpoint
        self.started = {"origin": origin, "resume_from": resume_from}
        self.record = broadcast_from_rank0(lambda: read_record(folder))
        self.left_out = left_out(self.record)

    def facts(self, step: int, batch: Batch) -> dict[str, Any]:
        """Return what is saved of a batch besides the numbers of its step (``write_dump``)."""
        return {
            "rank": self.run.world.rank,
            "world_size": self.run.world.size,
            "keys": [self.run.dataset.key(int(i)) for i in batch.samples],
            "folder": str(self.folder.resolve()),
            "config": self.run.config.to_dict(),
            "data": self.run.data_identity,
            "versions": versions(),
            "progress": vars(self.run.progress(step)),
            **self.started,
        }

    def handle(self, suspect: Suspect) -> str:
        """Save the batch, record the step and return a message; all ranks must call it for the same step.

        Raises:
            FloatingPointError: the run must stop.
        """
        settings, rank = self.run.config.train, self.run.world.rank
        numbers = all_gather(suspect.numbers[:2].to(self.run.device))  # [ranks, 2]
        losses = tuple(str(value) for value in numbers[:, 0].tolist())
        latest = broadcast_from_rank0(self.checkpoint)
        bad = BadStep(suspect.step, settings.on_nonfinite, losses, str(float(numbers[0, 1])), latest)
        own = dump_path(self.folder, bad.step, rank)
        writes = rank in bad.ranks or not bad.ranks
        run_on_all_ranks(lambda: write_dump(own, suspect, bad, self.facts(bad.step, suspect.batch)) if writes else None)
        broadcast_from_rank0(lambda: append_record(self.folder, bad))
        dump = dump_path(self.folder, bad.step, (bad.ranks or [0])[0])
        replay = f"`jepa-replay {dump}` shows where the first bad number arises"
        message = f"{bad} (lr {suspect.hyper.lr:.3g}, momentum {suspect.hyper.momentum:.6g})"
        if settings.on_nonfinite == "stop":
            raise FloatingPointError(
                f"{message}: weights were not updated with it, and no checkpoint was written after it. {replay}. "
                "A run that has diverged may want a smaller optim.lr, a longer warm-up or optim.clip_grad; "
                "train.on_nonfinite=skip continues without such batches"
            )
        why = over_limit(self.record, bad, settings.nonfinite_limit)
        self.record.append(bad)
        self.left_out = left_out(self.record)
        if why is not None:
            raise FloatingPointError(f"{message}, and {why}. {replay}")
        done = "its batch is skipped"
        if settings.on_nonfinite == "rollback":
            done = f"back to step {bad.checkpoint or 0}, to continue without its batch"
        return f"{message}: {done}; {dump.parent.name} contains it"
