"""Folders of shards in one process: what is written is read, no code runs, and every error names its file.

Several processes: test_parallel.py.
"""

import os
import pickle
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from parallel_cases import SAVED, Training, make
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from jepa_kit.engine.checkpoint.dcp import METADATA, layout, load_sharded, read_full, save_sharded
from jepa_kit.engine.checkpoint.state_dict import full_state, load_full_state, state_of
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.errors import CheckpointError


@pytest.fixture
def run():
    run = Training()
    run.steps(0, SAVED)
    return run


@pytest.fixture
def folder(run, tmp_path):
    save_sharded(tmp_path / "shards", *state_of(run.jepa, run.optimizer))
    return tmp_path / "shards"


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert same(value, second[name]) if isinstance(value, dict) else torch.equal(value, second[name]), name
    return True


def test_what_is_written_is_read(run, folder, recwarn):
    model, optimizer_state = full_state(run.jepa, run.optimizer)
    again = Training(jepa=make(seed=1))
    load_sharded(folder, again.jepa, again.optimizer)
    for found in (read_full(folder), full_state(again.jepa, again.optimizer)):
        assert same(found[0], model)
        assert same(found[1], optimizer_state)
    assert torch.equal(again.step(SAVED), run.step(SAVED))
    assert not [w for w in recwarn if "torch.distributed is disabled" in str(w.message)]


def test_weights_alone(run, folder):
    other = make(seed=1)
    load_sharded(folder, other)
    assert same(other.state_dict(), run.jepa.state_dict())


def test_the_layout_is_read_without_the_shards(run, folder):
    for path in folder.glob("*.distcp"):
        path.unlink()
    model, optimizer_state = layout(folder)
    assert {n: (v.shape, v.dtype, v.device.type) for n, v in model.items()} == {
        n: (v.shape, v.dtype, "meta") for n, v in run.jepa.state_dict().items()
    }
    assert optimizer_state.keys() == {n for n, p in run.jepa.named_parameters() if p.requires_grad}
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer_state.values())


def test_a_parameter_that_never_had_a_gradient(tmp_path):
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "predictor": nn.Linear(2, 2)})
    optimizer = build_optimizer(model)
    model["encoder"].weight.grad = torch.ones(2, 2)
    optimizer.step()
    save_sharded(tmp_path, *state_of(model, optimizer))
    assert read_full(tmp_path)[1].keys() == {"encoder.weight"}
    other = build_optimizer(model)
    load_sharded(tmp_path, model, other)
    assert len(other.state) == 1
    last = build_optimizer(model)
    load_full_state(model, model.state_dict(), last, full_state(model, optimizer)[1])
    assert len(last.state) == 1


def test_what_the_optimiser_does_later_does_not_change_what_was_loaded(run):
    model, optimizer_state = full_state(run.jepa, run.optimizer)
    again = Training(jepa=make(seed=1))
    load_full_state(again.jepa, model, again.optimizer, optimizer_state)
    before = optimizer_state["encoder.norm.weight"]["exp_avg"].clone()
    again.step(SAVED)
    assert torch.equal(optimizer_state["encoder.norm.weight"]["exp_avg"], before)


# --- what is no folder of ours ---


class Touch:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_metadata(folder, content):
    (folder / METADATA).write_bytes(pickle.dumps(content))


def test_metadata_that_would_run_code(folder, tmp_path):
    write_metadata(folder, Metadata({}, planner_data=Touch(tmp_path / "ran")))
    with pytest.raises(
        CheckpointError, match=r"\.metadata is damaged, or contains more than metadata of tensors: it names posix.mkdir"
    ):
        read_full(folder)
    assert not (tmp_path / "ran").exists()


def test_bytes_that_would_be_unpickled(folder):
    write_metadata(folder, Metadata({"model/a": BytesStorageMetadata()}))
    with pytest.raises(CheckpointError, match=r"it names torch.distributed.checkpoint.metadata.BytesStorageMetadata"):
        layout(folder)


def test_a_shard_that_would_run_code(run, folder, tmp_path):
    """DCP reads tensors with weights_only; this test fails if that changes."""
    (shard,) = folder.glob("*.distcp")
    torch.save(Touch(tmp_path / "ran"), shard)
    with pytest.raises((CheckpointError, OSError), match=re.escape(str(folder))):
        load_sharded(folder, run.jepa, run.optimizer)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / METADATA).unlink(),
            r"shards is not a sharded checkpoint, or was not written to its end: no .metadata",
        ),
        (
            lambda f: (f / METADATA).write_bytes((f / METADATA).read_bytes()[:-40]),
            r".metadata is damaged, or contains more",
        ),
        (lambda f: (f / METADATA).write_bytes(b""), r".metadata is damaged, or contains more"),
        (lambda f: write_metadata(f, {"a": 1}), r".metadata contains a dict, not metadata of tensors"),
        (lambda f: os.truncate(next(f.glob("*.distcp")), 1000), r"shards: rank 0: "),
    ],
    ids=["no metadata", "cut metadata", "empty metadata", "other metadata", "cut shard"],
)
def test_damaged_folders(folder, spoil, message):
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        read_full(folder)


def test_a_shard_that_is_missing(folder):
    for path in folder.glob("*.distcp"):
        path.unlink()
    with pytest.raises(OSError, match=r"shards: rank 0: .*No such file or directory.*distcp"):
        read_full(folder)


def test_a_folder_of_something_else(tmp_path):
    dcp.save({"weights": torch.zeros(2)}, checkpoint_id=tmp_path)
    with pytest.raises(CheckpointError, match=r"contains 'weights', which is not part of a run of jepa_kit"):
        layout(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(run, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="Permission denied"):
        save_sharded(tmp_path / "shards", *state_of(run.jepa, run.optimizer))


def test_a_file_where_the_folder_should_be(run, tmp_path):
    (tmp_path / "shards").write_text("")
    with pytest.raises(OSError, match="shards"):
        save_sharded(tmp_path / "shards", *state_of(run.jepa, run.optimizer))
