"""The steps of a run: load, train, agree, watch, log, save."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

from jepa_kit.config import versions
from jepa_kit.data.device import to_device
from jepa_kit.distributed.collectives import broadcast_from_rank0
from jepa_kit.distributed.signals import Decision, Signals, StopConsensus
from jepa_kit.engine.checkpoint.async_save import Saver, under_way
from jepa_kit.engine.checkpoint.format import Checkpoint
from jepa_kit.engine.logging.telemetry import Journal, Meter, Record
from jepa_kit.engine.nonfinite.detect import Watch
from jepa_kit.engine.nonfinite.policy import BadSteps
from jepa_kit.engine.run import Hook, Run, Start, due_hooks, run_hooks
from jepa_kit.engine.skipped_samples import SkippedSamples
from jepa_kit.engine.step import train_on


class End(Enum):
    """How the steps ended."""

    DONE = "done"
    STOPPED = "stopped"
    ROLL_BACK = "roll back"


@dataclass(frozen=True, eq=False)
class Session:
    """A run with everything that logs, saves and watches its steps; ``build_session`` makes it.

    Args:
        run, start: what is trained, and from which step.
        hooks: called every so many steps.
        meter: measures speed.
        saver: writes checkpoints in the background.
        bad_steps: handles steps whose loss or gradient is not finite.
        skipped: records unusable samples.
        journal: writes ``metrics.jsonl`` and shows progress; None but on the main process.
        signals: of this process.
        consensus: of all processes, on whether to stop.
    """

    run: Run
    start: Start
    hooks: list[Hook]
    meter: Meter
    saver: Saver
    bad_steps: BadSteps
    skipped: SkippedSamples
    journal: Journal | None
    signals: Signals
    consensus: StopConsensus

    def info(self, text: str) -> None:
        """Print a message, on the main process."""
        if self.journal is not None:
            self.journal.info(text)


def run_steps(session: Session) -> End:
    """Run the steps from the start's to the last one, or until the run has to stop earlier.

    Raises:
        RunError: the run failed (async_save.py); TooManySkippedError if more samples are unusable than
            ``data.max_skipped`` allows.
        FloatingPointError: loss, gradient or weights are not finite, and the run stops for it (nonfinite/policy.py).
        SaveError: a checkpoint could not be written.
    """
    s, run, settings, meter, journal = session, session.run, session.run.config.train, session.meter, session.journal
    first, last = s.start.step, run.schedule.steps - 1
    every = run.config.checkpoint.every or run.steps_per_epoch
    watch = Watch()
    s.signals.stepping = True
    s.consensus.wait()  # a reduction from before a roll-back; a rank that still wants to stop polls again
    # Each step:
    #   1. load    this rank's batch, on its device
    #   2. train   one update; if the batch is left out, only the target encoder moves
    #   3. agree   with all ranks on whether to stop
    #   4. watch   the numbers of earlier steps, which have reached the host by now
    #   5. log     a line of metrics.jsonl, with what the hooks return
    #   6. save    a checkpoint
    with under_way(s.saver.store.run), journal or nullcontext(), s.saver:
        batches = to_device(run.loader.batches(first), run.device, prefetch=run.config.data.prefetch)
        for step in range(first, last + 1):
            with meter.waiting():
                _, batch = next(batches)
            s.skipped.add(step, batch.skipped)

            out = None
            if step in s.bad_steps.left_out:
                run.jepa.update_target(run.schedule(step).momentum)
            else:
                out = train_on(run, step, batch)
                meter.count(batch.views)
                watch.add(step, run.schedule(step), batch, out)

            decision = s.consensus.poll(step, s.saver.failed, s.signals.number is not None)
            if decision is Decision.FAILED:
                broadcast_from_rank0(s.saver.wait)  # raises
            stopping = decision is Decision.STOP
            saving = stopping or (step + 1) % every == 0 or step == last
            due = due_hooks(s.hooks, step, last)
            logging = saving or bool(due) or step % settings.log_every == 0

            for suspect in watch.found(flush=logging):
                s.info(s.bad_steps.handle(suspect))
                if settings.on_nonfinite == "rollback":
                    return End.ROLL_BACK

            if logging:
                finite = out if step not in s.bad_steps.left_out else None
                record: Record = {} if finite is None else meter.record(run.schedule(step), finite, batch.views)
                skipped = s.skipped.collect(s.info)
                record |= {"data/skipped": skipped} if record else {}
                with meter.pausing():
                    record |= run_hooks(due, run, step)
                if journal and record:
                    journal.write({**position(run, step), **record})
            if journal:
                journal.advance()

            if saving:
                with meter.pausing():
                    if journal:
                        journal.flush()  # a checkpoint must not outlive the lines before it
                    s.saver.save(run.jepa, run.optimizer, header(run, step + 1, s.start.origin))
            if stopping and step != last:
                s.signals.step = step + 1
                return End.STOPPED
        s.consensus.wait()
    return End.DONE


def position(run: Run, step: int) -> Record:
    """Return how every line begins; that of a step without its batch has only what hooks return besides."""
    return {"step": step, "epoch": step // run.steps_per_epoch, "samples": (step + 1) * run.config.train.batch_size}


def header(run: Run, step: int, origin: dict[str, Any]) -> Checkpoint:
    """Return a checkpoint after ``step`` updates without its state.

    Args:
        run: to be saved.
        step: updates so far.
        origin: of the run's first weights.
    """
    epoch, in_epoch = divmod(step, run.loader.steps_per_epoch)  # of the data: train.steps_per_epoch changes no order
    return Checkpoint(
        step=step,
        model={},
        optimizer={},
        config=run.config.to_dict(),
        versions=versions(),
        data=run.data_identity,
        origin=origin,
        position={"epoch": epoch, "step_in_epoch": in_epoch, "samples": step * run.config.train.batch_size},
    )
