"""Training from a config to a run folder: set-up, resume and roll-back around the steps of loop.py.

    train(config) -> build_run -> start_from -> run_steps -> train_step -> Recipe.forward

A run folder has ``config.yaml`` (resolved), ``run.json`` (versions, machine, data), ``metrics.jsonl``, the latest
``checkpoint_<step>.pt`` and, at the end, ``curves.png``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

from jepa_kit.config import Config
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.workers import limit_threads
from jepa_kit.distributed.collectives import (
    barrier,
    broadcast_from_rank0,
    choose_device,
    process_group,
    read_environment,
    restarted,
)
from jepa_kit.distributed.signals import Signals, StopConsensus, preempted
from jepa_kit.engine.build import build_run
from jepa_kit.engine.checkpoint.async_save import Saver
from jepa_kit.engine.checkpoint.manager import Location, Store, store_of
from jepa_kit.engine.checkpoint.resume import check_folders, plan_resume
from jepa_kit.engine.consistency import check_command
from jepa_kit.engine.estimate import estimate_step
from jepa_kit.engine.logging.announce import announce, find_places
from jepa_kit.engine.logging.curves import Panel, drawn, plot_curves
from jepa_kit.engine.logging.loggers import check_loggers, open_loggers
from jepa_kit.engine.logging.telemetry import Journal, Meter
from jepa_kit.engine.loop import End, Session, run_steps
from jepa_kit.engine.nonfinite.policy import BadSteps
from jepa_kit.engine.run import ForeignWeights, HookFactory, Run, Start, check_hooks
from jepa_kit.engine.skipped_samples import Allowance, SkippedSamples
from jepa_kit.engine.start import start_from
from jepa_kit.interfaces import Encoder
from jepa_kit.lock import only_run_in
from jepa_kit.planning.flops import flops_of
from jepa_kit.planning.peak_flops import matrix_peak
from jepa_kit.precision import deterministic, precision_of, products_in, resolve_precision


def train(
    config: Config,
    *,
    resume: bool = False,
    resume_from: str | None = None,
    hooks: Sequence[HookFactory] = (),
    panels: Sequence[Panel] = (),
    foreign: ForeignWeights | None = None,
    dataset: ShardDataset | None = None,
) -> Path:
    """Train a config, in this process or, under torchrun or srun, in all of its processes; return the run folder.

    ``jepa_kit.training.train`` calls this with the hooks and readers of files that jepa_kit has.

    Args:
        config: checked.
        resume: resume the run in ``train.output_dir``; the policy is in checkpoint/resume.py.
        resume_from: a checkpoint of the run to resume from; or a released one, from which the run starts if it has no
            checkpoint of its own.
        hooks: called with the run before its first step; each returns a hook, or None (run.py).
        panels: of ``curves.png``, for the values that the hooks return.
        foreign: reads released checkpoints and the file of ``train.init_from``.
        dataset: the images, in place of ``data.shards``; the same on all processes.

    Raises:
        ValueError: the config does not fit the data, the machine or the run in the folder; processes differ in config,
            data or code (consistency.py); or another process runs in the folder.
        StartError: the processes could not join.
        PeerError: another process failed before the first step; has its message.
        RunError: the run failed after its first step began: too many unusable samples, a full cache, a loader worker
            that died, ...
        FloatingPointError: loss, gradient or weights are not finite, and the run stops for it (nonfinite/policy.py).
        SaveError: a checkpoint could not be written.
        Preempted: SIGTERM, SIGINT, SIGHUP or SIGUSR1 (signals.py); the checkpoint is written.
        KeyboardInterrupt: SIGINT before the first step, or a second one.
    """
    limit_threads()
    check_loggers(tensorboard=config.train.tensorboard, wandb=config.train.wandb)
    check_hooks(config, hooks)
    world = read_environment()
    device = choose_device(config.train.device, world)
    store = store_of(config)
    with deterministic(config.train.deterministic), process_group(world, device), ExitStack() as stack:
        again = restarted()
        check_command(config, {"resume": resume, "resume_from": resume_from})
        consensus = StopConsensus()  # one for all attempts: torch keeps a group of processes until they part

        def lock_and_plan() -> Location | None:
            check_folders(store)
            stack.enter_context(only_run_in(store.run))
            return plan_resume(store, resume, resume_from, again=again)

        latest = broadcast_from_rank0(lock_and_plan)
        signals = stack.enter_context(Signals())  # not earlier: a signal ends a start that waits for another run

        if world.is_main:  # the rest may take a while, and prints nothing
            print("starting: opens the data, builds the networks, measures the machine", flush=True)

        def attempt(latest: Location | None, resume: bool) -> End:
            run = build_run(config, world, device, dataset)
            start = start_from(run, store, latest, resume_from, foreign)
            run = replace(run, config=resolve_precision(config, device, start.precision))
            with products_in(precision_of(run.config), device):
                places = find_places(world, device, precision_of(run.config))
                broadcast_from_rank0(lambda: announce(run, store, start, places, resume, resume_from))
                estimate = estimate_step(run)
                if world.is_main and estimate is not None:
                    print(estimate.describe(run.schedule.steps - start.step), flush=True)
                return run_steps(build_session(run, store, start, hooks, signals, consensus, resume_from))

        end = attempt(latest, resume)
        while end is End.ROLL_BACK:
            end = attempt(broadcast_from_rank0(store.newest), True)
        if world.is_main:
            if end is End.DONE:  # after a signal there are seconds left, and matplotlib takes some
                drawn("curves.png", lambda: plot_curves(store.run, panels))
            print(f"{end.value}: {store.run}", flush=True)
        barrier()
        if end is End.STOPPED:
            raise preempted(signals.number, signals.step)
    return store.run


def build_session(
    run: Run,
    store: Store,
    start: Start,
    hooks: Sequence[HookFactory],
    signals: Signals,
    consensus: StopConsensus,
    resume_from: str | None,
) -> Session:
    """Return the run with everything that logs, saves and watches its steps.

    Raises:
        ValueError: the hooks do not fit the data, or a file of the run folder cannot be read.
    """
    config, folder, loader = run.config, store.run, run.loader
    settings, checkpoint = config.train, config.checkpoint
    sharded = checkpoint.format == "sharded" or (checkpoint.format == "auto" and settings.parallel == "fsdp")
    built = [hook for factory in hooks if (hook := factory(run)) is not None]
    flops = flops_of(config, run.jepa, run.device)
    peak = matrix_peak(run.device, precision_of(config))
    patch_size = cast(Encoder, run.jepa.encoder).patch_size
    saver = Saver(store, keep=checkpoint.keep, keep_every=checkpoint.keep_every, sharded=sharded)

    def latest_checkpoint() -> int | None:
        saver.wait()
        latest = store.newest()
        return None if latest is None else latest.step

    bad_steps = BadSteps(run, folder, checkpoint=latest_checkpoint, origin=start.origin, resume_from=resume_from)
    skipped = SkippedSamples(
        folder,
        first_step=start.step,
        steps_per_epoch=loader.steps_per_epoch,
        allowance=Allowance(config.data.max_skipped, loader.steps_per_epoch * loader.batch_size),
        device=run.device,
    )
    journal = None
    if run.world.is_main:
        loggers = open_loggers(
            folder, start.step, tensorboard=settings.tensorboard, wandb=settings.wandb, config=config.to_dict()
        )
        journal = Journal(folder, first_step=start.step, steps=run.schedule.steps, loggers=loggers)
    return Session(
        run=run,
        start=start,
        hooks=built,
        meter=Meter(patch_size=patch_size, flops=flops.of_batch if flops else None, peak=peak),
        saver=saver,
        bad_steps=bad_steps,
        skipped=skipped,
        journal=journal,
        signals=signals,
        consensus=consensus,
    )
