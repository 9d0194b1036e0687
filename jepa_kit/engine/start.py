"""Where a run begins: at its own checkpoint, a released one, the weights of a file, or its first weights."""

from __future__ import annotations

from typing import Any

from jepa_kit.distributed.collectives import broadcast_from_rank0, run_on_all_ranks
from jepa_kit.engine.checkpoint.files import reading, verify
from jepa_kit.engine.checkpoint.format import check_finite, check_state, load_checkpoint, restore
from jepa_kit.engine.checkpoint.manager import Location, Store
from jepa_kit.engine.checkpoint.resume import advice, check_resumable, note_of_start
from jepa_kit.engine.checkpoint.state_dict import local_part, state_of
from jepa_kit.engine.run import ORIGIN, ForeignWeights, Run, Start
from jepa_kit.errors import CheckpointError
from jepa_kit.precision import resolve_precision
from jepa_kit.run_folder import step_of


def resume_run(run: Run, store: Store, latest: Location) -> Start:
    """Load the state of one of the run's own checkpoints, a file or shards; all ranks must call it.

    Raises:
        CheckpointError: it is damaged (the message names the last one that is not), or it is of another run.
        RemoteError: it is remote, and the download failed.
    """
    path = broadcast_from_rank0(lambda: store.fetch(latest))
    try:
        # A file is verified by rank 0. Of a folder of shards, each rank verifies some.
        rank, size = (run.world.rank, run.world.size) if path.is_dir() else (0, 1)
        run_on_all_ranks(lambda: verify(path, rank=rank, size=size) if run.world.is_main or size > 1 else None)
        checkpoint = load_checkpoint(path, verified=True, with_state=not path.is_dir())
    except CheckpointError as error:
        message = str(error).replace(str(path), str(latest))  # its URL, and not the local copy
        raise CheckpointError(f"{message}; {broadcast_from_rank0(lambda: advice(store, latest))}") from error
    precision = checkpoint.config["train"]["precision"]
    config = resolve_precision(run.config, run.device, precision)
    notes = check_resumable(checkpoint, config.to_dict(), run.data_identity)
    if checkpoint.step != step_of(path) or checkpoint.step > run.schedule.steps:
        raise CheckpointError(
            f"{latest} contains step {checkpoint.step}, which is not that of its name, or is after the run's last "
            f"(={run.schedule.steps}); {broadcast_from_rank0(lambda: advice(store, latest))}"
        )
    if path.is_dir():
        from jepa_kit.engine.checkpoint.dcp import layout, load_sharded  # a second to import

        with reading(path):
            check_state(run.jepa.state_dict(), layout(path)[0], "the model")
            load_sharded(path, run.jepa, run.optimizer)
    else:
        restore(checkpoint, run.jepa, run.optimizer)
    run_on_all_ranks(lambda: _check_finite(run, str(latest)))
    broadcast_from_rank0(store.clear_cache)  # all ranks have read it
    origin: dict[str, Any] = {key: checkpoint.origin[key] for key in ORIGIN if key in checkpoint.origin}
    return Start(checkpoint.step, origin, [*notes, f"resumed at step {checkpoint.step:,}"], precision)


def _check_finite(run: Run, what: str) -> None:
    """Raise CheckpointError if weights or moments of this process are NaN or infinite."""
    model, optimizer = state_of(run.jepa, run.optimizer)
    check_finite({name: local_part(x) for name, x in model.items()}, what)
    for name, state in optimizer.items():
        check_finite({key: local_part(x) for key, x in state.items()}, f"the optimiser's state for {name} of {what}")


def start_from(
    run: Run,
    store: Store,
    latest: Location | None,
    resume_from: str | None = None,
    foreign: ForeignWeights | None = None,
) -> Start:
    """Load the run's weights: of its own checkpoint, of a released one, of ``train.init_from``, or keep its first ones.

    Args:
        run: with its first weights.
        store: where the run has its checkpoints.
        latest: the checkpoint to resume from, or None (``plan_resume``).
        resume_from: what ``--resume`` named: a checkpoint of the run, or a released one.
        foreign: reads released checkpoints and ``train.init_from``.

    Raises:
        CheckpointError: a file that cannot be read, or does not fit.
        FileNotFoundError: there is no such file.
        ValueError: ``resume_from`` is neither a checkpoint of the run nor what it began from; or weights of a file are
            needed and nothing is given to read them.
    """
    if latest is not None:
        start = resume_run(run, store, latest)
        if resume_from is not None and not store.owns(resume_from):
            start.lines.append(broadcast_from_rank0(lambda: note_of_start(store, resume_from, start.origin)))
        aside = broadcast_from_rank0(lambda: store.set_aside(latest))
        return start._replace(lines=[*start.lines, *(f"set aside: {name}" for name in aside)])
    init_from = run.config.train.init_from
    if resume_from is None and init_from is None:
        return Start(0, {}, [])
    if foreign is None:
        named = f"resume_from (={resume_from!r})" if resume_from else f"train.init_from (={init_from!r})"
        raise ValueError(f"{named} needs `foreign`, which reads such files: jepa_kit.training.train passes it")
    if resume_from is not None:
        start = foreign.resume_official(run.jepa, run.optimizer, resume_from, run.steps_per_epoch)
        if start.step >= run.schedule.steps:
            raise CheckpointError(
                f"{resume_from} is at step {start.step}, and a run of train.epochs (={run.config.train.epochs}) ends "
                f"at step {run.schedule.steps}: there is nothing left to do"
            )
        return start
    assert init_from is not None
    return foreign.init_from(run.jepa, init_from)
