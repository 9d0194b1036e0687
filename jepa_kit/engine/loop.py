"""The training loop: from a config to a run folder.

    train(config) -> build_run -> run_steps -> train_step -> JEPA.forward

A run folder holds ``config.yaml`` (resolved), ``run.json`` (where and what), ``metrics.jsonl``, the latest
``checkpoint_<step>.pt`` and, at the end, ``curves.png``.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from jepa_kit.config import Config, versions
from jepa_kit.data.device import to_device
from jepa_kit.data.errors import Allowance
from jepa_kit.data.loader import Batch
from jepa_kit.data.transforms import normalize
from jepa_kit.distributed.collectives import (
    barrier,
    broadcast_from_rank0,
    choose_device,
    process_group,
    read_environment,
    restarted,
)
from jepa_kit.distributed.signals import Decision, Signals, StopConsensus, preempted
from jepa_kit.engine.build import Run, build_run, data_identity, start_from
from jepa_kit.engine.checkpoint.async_save import Saver
from jepa_kit.engine.checkpoint.failures import under_way
from jepa_kit.engine.checkpoint.format import Checkpoint, step_of
from jepa_kit.engine.checkpoint.lock import only_run_in
from jepa_kit.engine.checkpoint.manager import Store, Where, store_of
from jepa_kit.engine.checkpoint.resume import check_folders, plan_resume
from jepa_kit.engine.consistency import check_command
from jepa_kit.engine.deterministic import deterministic
from jepa_kit.engine.hooks import build_hooks, due_hooks, run_hooks
from jepa_kit.engine.logging.announce import announce
from jepa_kit.engine.logging.curves import drawn, plot_curves
from jepa_kit.engine.logging.loggers import check_boards, open_boards
from jepa_kit.engine.logging.telemetry import Journal, Meter, Record
from jepa_kit.engine.logging.topology import find_places
from jepa_kit.engine.nonfinite.detect import Watch
from jepa_kit.engine.nonfinite.policy import BadSteps
from jepa_kit.engine.skipped_samples import SkippedSamples
from jepa_kit.engine.step import train_step
from jepa_kit.engine.workers import limit_threads
from jepa_kit.interop.start import Start
from jepa_kit.planning.flops import flops_of
from jepa_kit.planning.peak_flops import matrix_peak
from jepa_kit.precision import autocast_of, precision_of, products_in, resolve_precision
from jepa_kit.rng import Stream, generator


def train(config: Config, *, resume: bool = False, resume_from: str | None = None) -> Path:
    """Trains a config, in this process or, under torchrun, in all of its processes.

    Args:
        config: checked.
        resume: go on with the run in ``train.output_dir``; the policy is in resume.py.
        resume_from: a checkpoint of the run folder, to go on from that one; or a released one, to go on from it while
            the run folder holds none of its own.

    Returns:
        the run folder.

    Raises:
        ValueError: the config does not fit the data, the machine or the run in the folder; processes differ in config,
            data or code (consistency.py); or another process has a run in the folder.
        StartError: the processes could not join.
        PeerError: another process failed before the first step, with the reason.
        RunError: the run failed under way: too many samples that cannot be used, a cache that takes no more, a loader
            worker that died, ...
        FloatingPointError: loss, gradient or weights are not finite, and the run stops for it (bad_steps.py).
        SaveError: a checkpoint could not be written.
        Preempted: SIGTERM, SIGINT, SIGHUP or SIGUSR1 (signals.py); the checkpoint is written.
        KeyboardInterrupt: SIGINT before the first step, or a second one.
    """
    limit_threads()
    check_boards(tensorboard=config.train.tensorboard, wandb=config.train.wandb)
    world = read_environment()
    device = choose_device(config.train.device, world)
    store = store_of(config.train)
    folder = store.run
    with deterministic(config.train.deterministic), process_group(world, device), ExitStack() as held:
        again = restarted()
        check_command(config, {"resume": resume, "resume_from": resume_from})
        consensus = StopConsensus()  # one for all stretches: a group of processes stays until they part

        def begin() -> Where | None:
            check_folders(store)
            held.enter_context(only_run_in(folder))
            return plan_resume(store, resume, resume_from, again=again)

        latest = broadcast_from_rank0(begin)
        signals = held.enter_context(Signals())  # from here on: a signal ends a start that waits for another run

        if world.is_main:  # the rest may take a while, and is silent
            print("starting: opens the data, builds the networks, measures the machine", flush=True)

        def stretch(latest: Where | None, resume: bool) -> End:
            run = build_run(config, world, device)
            start = start_from(run, store, latest, resume_from)
            run = replace(run, config=resolve_precision(config, device, start.precision))
            with products_in(precision_of(run.config), device):
                places = find_places(world, device, precision_of(run.config))
                broadcast_from_rank0(lambda: announce(run, store, start, places, resume, resume_from))
                return run_steps(run, folder, store, start, resume_from, signals, consensus)

        end = stretch(latest, resume)
        while end is End.ROLL_BACK:
            end = stretch(broadcast_from_rank0(store.newest), True)
        if world.is_main:
            if end is End.DONE:  # after a signal there are seconds left, and matplotlib takes some
                drawn("curves.png", lambda: plot_curves(folder))
            print(f"{end.value}: {folder}", flush=True)
        barrier()
        if end is End.STOPPED:
            raise preempted(signals.number, signals.step)
    return folder


def open_journal(run: Run, folder: Path, first_step: int) -> Journal:
    """The run's lines, from ``first_step`` on, and its boards."""
    settings = run.config.train
    boards = open_boards(
        folder,
        first_step=first_step,
        tensorboard=settings.tensorboard,
        wandb=settings.wandb,
        config=run.config.to_dict(),
    )
    return Journal(folder, first_step=first_step, steps=run.schedule.steps, boards=boards)


def seed_torch(seed: int, step: int, rank: int) -> None:
    """Makes torch's random numbers (stochastic depth, dropout) a function of seed, step and rank."""
    torch.manual_seed(int(generator(Stream.STEP, seed=seed, epoch=step, lane=rank).integers(2**63)))


class End(Enum):
    """How a stretch of steps ended."""

    DONE = "done"
    STOPPED = "stopped"
    ROLL_BACK = "roll back"


def run_steps(
    run: Run,
    folder: Path,
    store: Store,
    start: Start,
    resume_from: str | None,
    signals: Signals,
    consensus: StopConsensus,
) -> End:
    """The steps from the start's to the last, with lines, hooks and checkpoints, or to where the run must end before.

    Raises:
        ValueError: the hooks do not fit the data, or a file of the run folder cannot be read.
        RunError: the run failed under way (failures.py), also by TooManySkippedError: more samples could not be used
            than ``data.max_skipped`` allows.
        FloatingPointError: loss, gradient or weights are not finite, and the run stops for it (bad_steps.py).
        SaveError: a checkpoint could not be written.
    """
    settings, first, last = run.config.train, start.step, run.schedule.steps - 1
    every = settings.checkpoint_every or run.steps_per_epoch
    autocast = autocast_of(settings.precision, run.device)
    hooks = build_hooks(run)
    flops = flops_of(run.config, run.jepa, run.device)
    meter = Meter(flops=flops, peak=matrix_peak(run.device, precision_of(run.config)))
    saver, watch = build_saver(run, store), Watch()
    bad_steps = build_bad_steps(run, folder, saver, start, resume_from)
    skipped = build_skipped(run, folder, first)
    journal = open_journal(run, folder, first) if run.world.is_main else None
    signals.stepping = True
    consensus.wait()  # to what was asked before a roll back; who still wants it asks again
    with under_way(folder), journal or nullcontext(), saver:
        batches = to_device(run.loader.batches(first), run.device, prefetch=run.config.data.prefetch)
        for step in range(first, run.schedule.steps):
            hyper = run.schedule(step)
            with meter.waiting():
                _, batch = next(batches)
            skipped.add(step, batch.skipped)
            out = None
            if step in bad_steps.left_out:
                run.jepa.update_target(hyper.momentum)
            else:
                assert batch.masks is not None  # the loader has a masker
                images = normalize(batch.images, run.config.data.mean, run.config.data.std)
                seed_torch(settings.seed, step, run.world.rank)
                out = train_step(
                    run.jepa,
                    run.optimizer,
                    hyper,
                    images,
                    batch.masks,
                    forward=run.forward,
                    autocast=autocast,
                    clip_grad=run.config.optim.clip_grad,
                )
                meter.count(batch.masks, len(batch))
                watch.add(step, hyper, batch, out, out.grad_norm)

            decision = consensus.poll(step, saver.failed, signals.number is not None)
            if decision is Decision.FAILED:
                broadcast_from_rank0(saver.wait)  # raises
            stopping = decision is Decision.STOP
            saving = stopping or (step + 1) % every == 0 or step == last
            due = due_hooks(hooks, step, last)
            logging = saving or bool(due) or step % settings.log_every == 0
            for suspect in watch.found(flush=logging):
                message = bad_steps.handle(suspect)
                if journal:
                    journal.info(message)
                if settings.bad_numbers == "rollback":
                    return End.ROLL_BACK
            record: Record = {}
            if logging and out is not None and step not in bad_steps.left_out:
                assert batch.masks is not None
                record = meter.record(hyper, out, batch.masks)
            if logging:
                so_far = skipped.collect(journal.info if journal else print)
                record |= {"data/skipped": so_far} if record else {}
            with meter.pausing():
                record.update(run_hooks(due, run, step))
            if journal:
                if record:
                    journal.write({**where(run, step), **record})
                journal.advance()
            if saving:
                with meter.pausing():
                    if journal:
                        journal.flush()
                    saver.save(run.jepa, run.optimizer, header(run, step + 1, start.origin))
            if stopping and step != last:
                signals.step = step + 1
                return End.STOPPED
        consensus.wait()
    return End.DONE


def where(run: Run, step: int) -> Record:
    """How every line begins; a step whose batch is left out has no more than that, and what hooks give."""
    return {"step": step, "epoch": step // run.steps_per_epoch, "samples": (step + 1) * run.config.train.batch_size}


def header(run: Run, step: int, origin: dict[str, Any]) -> Checkpoint:
    """What a checkpoint of ``step`` updates says besides the state; ``origin`` is where the weights came from."""
    epoch, in_epoch = divmod(step, run.loader.steps_per_epoch)  # of the data: train.steps_per_epoch moves no order
    return Checkpoint(
        step=step,
        model={},
        optimizer={},
        config=run.config.to_dict(),
        versions=versions(),
        data=data_identity(run.dataset),
        origin=origin,
        position={"epoch": epoch, "step_in_epoch": in_epoch, "samples": step * run.config.train.batch_size},
    )


def build_saver(run: Run, store: Store) -> Saver:
    """Writes the run's checkpoints as its config says."""
    settings = run.config.train
    sharded = settings.checkpoint == "sharded" or (settings.checkpoint == "auto" and settings.parallel == "fsdp")
    return Saver(store, keep=settings.keep_checkpoints, keep_every=settings.keep_every, sharded=sharded)


def build_skipped(run: Run, folder: Path, first_step: int) -> SkippedSamples:
    """The run's list of samples that cannot be used, and how many there may be."""
    loader = run.loader
    samples = loader.steps_per_epoch * loader.batch_size
    return SkippedSamples(
        folder,
        first_step=first_step,
        steps_per_epoch=loader.steps_per_epoch,
        allowance=Allowance(run.config.data.max_skipped, samples),
        device=run.device,
    )


def build_bad_steps(run: Run, folder: Path, saver: Saver, start: Start, resume_from: str | None) -> BadSteps:
    """What the run's config says about numbers that are not finite."""

    def checkpoint() -> int | None:
        saver.wait()
        latest = saver.store.newest()
        return None if latest is None else step_of(latest)

    def facts(batch: Batch) -> dict[str, Any]:
        return {
            "rank": run.world.rank,
            "world_size": run.world.size,
            "keys": [run.dataset.key(int(i)) for i in batch.samples],
            "folder": str(folder.resolve()),
            "config": run.config.to_dict(),
            "data": data_identity(run.dataset),
            "versions": versions(),
            "origin": start.origin,
            "resume_from": resume_from,
        }

    return BadSteps(
        policy=run.config.train.bad_numbers,
        limit=run.config.train.bad_numbers_limit,
        folder=folder,
        rank=run.world.rank,
        device=run.device,
        checkpoint=checkpoint,
        facts=facts,
    )
