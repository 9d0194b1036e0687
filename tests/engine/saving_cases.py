"""Cases that test_async_save.py runs in two processes: threads of both write shards while the steps continue.

saving_cases.py FOLDER CASE ..., with names of ``CASES``: each in a folder of its own, by two processes over gloo.
"""

import copy
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from parallel_cases import DEVICE, Training, launch, make, same_state
from places import Bucket
from torch.distributed.checkpoint import FileSystemWriter

from jepa_kit.data.remote.fetch import path_manager
from jepa_kit.distributed.collectives import barrier, broadcast_from_rank0, process_group
from jepa_kit.engine.checkpoint import async_save
from jepa_kit.engine.checkpoint.async_save import Saver
from jepa_kit.engine.checkpoint.dcp import load_sharded
from jepa_kit.engine.checkpoint.format import Checkpoint, checkpoints, load_checkpoint
from jepa_kit.engine.checkpoint.manager import Store
from jepa_kit.engine.checkpoint.state_dict import full_state
from jepa_kit.errors import SaveError


def save(saver, run, step):
    saver.save(run.jepa, run.optimizer, Checkpoint(step=step, model={}, optimizer={}, config={}, versions={}, data={}))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def beside(world, folder):
    """Each checkpoint has the state of its call, whatever the steps do meanwhile; of the older, every second stays."""
    run, plain, held = Training(world, "fsdp"), async_save._checksums, {}
    done = [threading.Event() for _ in range(7)]

    def late(part):
        assert done[int(part.name[-10:-5]) + 1].wait(60)  # all is written; and the next step done, with its collectives
        return plain(part)

    async_save._checksums = late
    with Saver(Store(folder), keep=1, keep_every=2, sharded=True) as saver:
        for step in range(1, 6):
            run.step(step)
            done[step].set()
            held[step] = copy.deepcopy(full_state(run.jepa, run.optimizer))
            save(saver, run, step)
        done[6].set()
    async_save._checksums = plain
    assert names(folder) == ["checkpoint_00000002", "checkpoint_00000004", "checkpoint_00000005"]
    if world.is_main:
        for path in checkpoints(folder):
            found = load_checkpoint(path)
            same_state((found.model, found.optimizer), held[found.step], path.name, atol=0)
    barrier()


def again(world, folder):
    """A checkpoint replaces an earlier one of the same step."""
    run = Training(world, "fsdp")
    with Saver(Store(folder), keep=1, sharded=True) as saver:
        save(saver, run, 1)
        run.step(0)
        save(saver, run, 1)
    assert names(folder) == ["checkpoint_00000001"]
    state, found = full_state(run.jepa, run.optimizer), load_checkpoint(folder)
    if world.is_main:
        same_state((found.model, found.optimizer), state, "the second", atol=0)
    barrier()


def fails(world, folder):
    """An error of one process ends both with the same message and loses nothing, also in the last checkpoint."""

    def full(*args):
        raise OSError(28, "No space left on device")

    run = Training(world, "fsdp")
    with Saver(Store(folder), keep=1, sharded=True) as saver:
        save(saver, run, 1)
    for owner, attribute in (
        (async_save, "_checksums"),
        (FileSystemWriter, "write_data"),
        (async_save, "write_archive"),
    ):
        plain = getattr(owner, attribute)
        if world.rank == (attribute != "write_archive"):  # rank 1, but for what rank 0 alone does
            setattr(owner, attribute, full)
        for later in (False, True):
            told = None
            try:
                with Saver(Store(folder), keep=1, sharded=True) as saver:
                    save(saver, run, 2)
                    if later:
                        save(saver, run, 3)
                        raise AssertionError("the first error should have been raised")
            except SaveError as error:
                told = str(error)
            answers = [None] * world.size
            dist.all_gather_object(answers, told)
            assert answers[0] == answers[1], answers
            assert "the checkpoint of step 2 could not be written" in answers[0], answers
            assert "No space left on device; the last good one is checkpoint_00000001" in answers[0], answers
            assert names(folder) == ["checkpoint_00000001"], names(folder)
            barrier()
        setattr(owner, attribute, plain)


def file_fails(world, folder):
    """The same for a file, which rank 0 writes alone."""

    def full(*args):
        raise OSError(28, "No space left on device")

    async_save.save_checkpoint = full
    with pytest.raises(SaveError, match="step 1 could not be written"), Saver(Store(folder), keep=1) as saver:
        save(saver, Training(world, "ddp"), 1)
    barrier()


def elsewhere(world, folder):
    """Shards of both are uploaded, and both resume from what rank 0 downloads."""
    path_manager.register_handler(Bucket(folder / "bucket"))
    store, run = Store(folder / "run", f"{Bucket.PREFIX}a"), Training(world, "fsdp")
    broadcast_from_rank0(lambda: store.begin(""))
    with Saver(store, keep=1, sharded=True) as saver:
        for step in (1, 2):
            run.step(step)
            save(saver, run, step)
    assert [str(location) for location in store.checkpoints()] == [f"{Bucket.PREFIX}a/checkpoint_00000002"]
    wanted = copy.deepcopy(full_state(run.jepa, run.optimizer))
    other = Training(world, "fsdp", jepa=make(seed=1))
    load_sharded(broadcast_from_rank0(lambda: store.fetch(store.newest())), other.jepa, other.optimizer)
    barrier()
    broadcast_from_rank0(store.clear_cache)
    same_state(full_state(other.jepa, other.optimizer), wanted, "elsewhere", atol=0)
    assert names(folder / "run") == []


def killed(world, folder, both=True):
    """Both die after all files of the second checkpoint are written, before its rename."""
    run = Training(world, "fsdp")
    with Saver(Store(folder), keep=1, sharded=True) as saver:
        save(saver, run, 1)
        saver.wait()
        barrier()
        if both or world.rank:
            async_save._checksums = lambda part: os.kill(os.getpid(), signal.SIGKILL)
        save(saver, run, 2)


def one_killed(world, folder):
    """Rank 1 alone dies."""
    killed(world, folder, both=False)


CASES = {case.__name__: case for case in (beside, again, fails, file_fails, elsewhere, killed, one_killed)}


def one_rank(world, cases, folder):
    with process_group(world, DEVICE):
        for case in cases:
            (folder / case).mkdir(exist_ok=True)
            CASES[case](world, folder / case)


if __name__ == "__main__":
    launch(2, one_rank, sys.argv[2:], Path(sys.argv[1]))
