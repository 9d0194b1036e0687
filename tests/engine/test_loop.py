"""Whole runs, tiny: what is in a run folder, resuming bit for bit, and one process against two."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from jepa_kit.config import load_config
from jepa_kit.data.shards.index import identity
from jepa_kit.distributed.collectives import World
from jepa_kit.engine import build, loop
from jepa_kit.engine import step as update
from jepa_kit.engine import train as training
from jepa_kit.engine.build import build_run
from jepa_kit.engine.checkpoint.format import checkpoints, load_checkpoint
from jepa_kit.engine.logging.telemetry import MEASURED, read_metrics
from jepa_kit.engine.run import Run
from jepa_kit.engine.step import seed_torch
from jepa_kit.errors import CheckpointError, RunError
from jepa_kit.training import train


def numbers(folder):
    """The lines of a run without what a clock measured."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in read_metrics(folder)]


def train_until(config, step):
    """Trains, with a KeyboardInterrupt in the given step."""
    count = iter(range(step + 1))
    plain = update.train_step

    def counted(*args, **kwargs):
        if next(count) == step:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "train_step", counted)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def test_a_run_folder(tiny, whole_runs, capsys):
    config = tiny()
    folder = train(config)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint_00000003.pt",
        "checkpoint_00000006.pt",
        "config.yaml",
        "curves.png",
        "metrics.jsonl",
        "run.json",
        "tensorboard",
    ]
    assert load_config(folder) == load_config(folder / "checkpoint_00000006.pt") == config
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["device"], facts["world_size"], facts["data"]["samples"]) == ("cpu", 1, 20)
    assert facts["attention"] == "sdpa (dense products and scaled_dot_product_attention)"
    lines = numbers(folder)
    assert [line["step"] for line in lines] == list(range(6))
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1]
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/smooth_l1"] + 0.5 * line["loss/cosine"], rel=1e-5)
    printed = capsys.readouterr().out
    for text in (
        "starting: ",
        "torch ",
        "device: CPU, 1 process\n",
        f"attention: {facts['attention']}\n",
        "data: 20 samples",
        "parameters: encoder ",
        "steps: 6 (2 epochs of",
    ):
        assert text in printed
    assert "step 6/6  epoch 1  loss " in printed


def test_a_backend_that_cannot_run_ends_the_start(tiny):
    config = tiny("train.attention=xformers")
    with pytest.raises(ValueError, match=r"train: attention \(='xformers'\) cannot run: it has kernels for CUDA only"):
        train(config)
    assert not (Path(config.train.output_dir) / "run.json").exists()


def test_a_resumed_run_is_the_run(tiny, tmp_path, capsys):
    whole = train(tiny())
    other = f"train.output_dir={tmp_path / 'other'}"
    train_until(tiny(other), 4)
    assert len(numbers(tmp_path / "other")) == 4
    torch.manual_seed(99)  # the state of this process must not matter
    resumed = train(tiny(other, "data.num_workers=1"), resume=True)
    assert "resumed at step 3\n" in capsys.readouterr().out
    assert numbers(resumed) == numbers(whole)
    first, second = (load_checkpoint(folder) for folder in (whole, resumed))
    assert first.step == second.step == 6
    for name, value in first.model.items():
        assert torch.equal(value, second.model[name]), name
    for name, state in first.optimizer.items():
        assert all(torch.equal(value, second.optimizer[name][key]) for key, value in state.items()), name


def test_resuming_a_complete_run_does_nothing(tiny):
    folder = train(tiny())
    before = numbers(folder), checkpoints(folder)[-1].stat().st_mtime_ns
    train(tiny(), resume=True)
    assert (numbers(folder), checkpoints(folder)[-1].stat().st_mtime_ns) == before


def test_compiling_is_announced(tiny, monkeypatch, capsys):
    monkeypatch.setattr(training, "run_steps", lambda *args: loop.End.DONE)
    folder = train(tiny("encoder.compile=true"))
    assert json.loads((folder / "run.json").read_text())["compiled"] == ["encoder"]
    assert "compiling: the blocks of encoder, in the first steps, which may take minutes\n" in capsys.readouterr().out


def test_nothing_to_resume_is_said(tiny, capsys):
    train_until(tiny(), 2)
    folder = train(tiny(), resume=True)
    assert f"nothing to resume: {folder} has no checkpoint; starting at step 0\n" in capsys.readouterr().out
    assert [line["step"] for line in numbers(folder)] == list(range(6))


def test_a_second_run_in_the_same_folder(tiny):
    train_until(tiny(), 1)
    with pytest.raises(ValueError, match=r"run already contains a run \(metrics.jsonl\): give --resume"):
        train(tiny())


def test_another_config_cannot_resume(tiny):
    train(tiny("train.epochs=1", "optim.warmup_epochs=0"))
    with pytest.raises(
        CheckpointError, match=r"another config, .*:\n  optim.warmup_epochs: 0.0 .*\n  train.epochs: 1 "
    ):
        train(tiny(), resume=True)


def test_another_data_set_cannot_resume(tiny, monkeypatch):
    """One bit of a pixel: names, counts and sizes of the shards are the same."""
    train(tiny())

    def changed(run):
        shards = [dict(entry) for entry in run.dataset.shards]
        shards[0]["sha256"] = shards[0]["sha256"][::-1]
        return identity(shards)

    monkeypatch.setattr(Run, "data_identity", property(changed))
    with pytest.raises(CheckpointError, match=r"had another data set than .*: shard 0 differs: .* had SHA-256 "):
        train(tiny(), resume=True)


def test_a_checkpoint_of_a_version_without_checksums_is_resumed_with_a_note(tiny, monkeypatch, capsys):
    dataset = build.open_shards(tiny())
    names = json.dumps([[shard["file"], shard["samples"], shard["bytes"]] for shard in dataset.shards])
    before = {"samples": len(dataset), "digest": hashlib.sha256(names.encode()).hexdigest()[:16]}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "data_identity", property(lambda _: before))
        train_until(tiny(), 4)
    train(tiny(), resume=True)
    assert "note: the checkpoint is of an earlier version and has no checksums of its shards" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(tiny):
    config = tiny("optim.lr=1e30", "optim.start_lr=1e30", "train.log_every=100", "checkpoint.every=6")
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step [1-5] "):
        train(config)
    assert checkpoints(Path(config.train.output_dir)) == []


def test_weights_that_are_not_finite_are_not_saved(tiny):
    config = tiny("optim.lr=1e39", "optim.start_lr=1e39", "checkpoint.every=1")
    with pytest.raises(
        FloatingPointError, match=r"\d+ of \d+ weights and moments are not finite after 1 steps, first encoder."
    ):
        train(config)
    assert checkpoints(Path(config.train.output_dir)) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.shards=null"], r"data.shards \(=None\) must name a folder of images or of shards to train; jepa-"),
        (["data.shards=/nowhere"], r"'/nowhere'\) must be a folder of .tar shards, but there is no such folder"),
        (["train.batch_size=21"], r"batch_size \(=21\) must be at most the data set's 20 samples"),
        (["train.device=tpu"], r"device \(='tpu'\) must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        (["masker.min_keep=17"], "masker: .*min_keep"),
    ],
)
def test_what_cannot_be_trained(tiny, overrides, message):
    config = tiny(*overrides)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not Path(config.train.output_dir).exists()


def test_checkpoints_that_would_not_be_kept(tiny):
    """Of an epoch's steps, here 3."""
    message = r"checkpoint.keep_every \(=4\) must be a multiple of the steps between two checkpoints \(=3, an epoch\)"
    with pytest.raises(ValueError, match=message):
        train(tiny("checkpoint.keep_every=4"))
    build_run(tiny("checkpoint.keep_every=6"), World(), torch.device("cpu"))


def test_a_run_folder_at_home(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert train(tiny("train.output_dir=~/out", "train.epochs=1", "optim.warmup_epochs=0")) == tmp_path / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_batch_that_processes_cannot_share(tiny):
    with pytest.raises(ValueError, match=r"batch_size \(=4\) must be divisible by the number of ranks \(=3\)"):
        build_run(tiny(), World(size=3), torch.device("cpu"))


def test_lines_and_checkpoints_come_when_they_are_due(tiny):
    folder = train(tiny("train.log_every=4", "checkpoint.every=2", "checkpoint.keep=5"))
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint_0000000{step}.pt" for step in (2, 4, 6)]
    assert [line["step"] for line in numbers(folder)] == [0, 1, 3, 4, 5]  # each 4th, and with each checkpoint


def test_the_position_is_that_in_the_data(tiny):
    """20 samples make 5 steps of 4, whatever is called an epoch of the schedules (3 steps here)."""
    run = build_run(tiny(), World(), torch.device("cpu"))
    positions = [loop.header(run, step, {}).position for step in range(7)]
    asked = [(request.epoch, request.step % 5) for request, _ in zip(run.loader.requests(0), range(7), strict=False)]
    assert [(p["epoch"], p["step_in_epoch"]) for p in positions] == asked
    assert positions[6] == {"epoch": 1, "step_in_epoch": 1, "samples": 24}


@pytest.mark.parametrize("error", [ValueError, RuntimeError, ConnectionError], ids=lambda error: error.__name__)
def test_what_fails_under_way_is_no_mistake_in_the_config(tiny, monkeypatch, error):
    def fail(*args, **options):
        raise error("gone")

    monkeypatch.setattr(update, "train_step", fail)
    with pytest.raises(RunError, match=r"^gone$") as failed:
        train(tiny())
    assert isinstance(failed.value.__cause__, error)


def test_first_weights_are_a_function_of_the_seed(tiny):
    def weights(*overrides):
        return build_run(tiny(*overrides), World(), torch.device("cpu")).jepa.state_dict()

    first, second, other = weights(), weights(), weights("train.seed=1")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["encoder.patch_embed.proj.weight"], other["encoder.patch_embed.proj.weight"])


def test_random_numbers_are_a_function_of_seed_step_and_rank():
    def draw(*key):
        seed_torch(*key)
        return torch.rand(1).item()

    drawn = [draw(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)]
    assert len(set(drawn)) == 8
    assert draw(1, 0, 1) == drawn[5]


def test_bf16_and_clipping_reach_the_step(tiny, tmp_path):
    plain = numbers(train(tiny()))
    for name, override in (("bf16", "train.precision=bf16"), ("clip", "optim.clip_grad=1e-4")):
        other = numbers(train(tiny(override, f"train.output_dir={tmp_path / name}")))
        assert [line["loss"] for line in other] != [line["loss"] for line in plain]
        assert other[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.2)


def test_other_recipes_run(tiny):
    folder = train(
        tiny("target={name: pixel}", "target_update={name: none}", "train.epochs=1", "optim.warmup_epochs=0")
    )
    assert {line["momentum"] for line in numbers(folder)} == {1.0}
    assert not any(name.startswith("target_encoder.") for name in load_checkpoint(folder).model)


def test_batches_of_two_ranks_are_the_batch_of_one(tiny):
    runs = [build_run(tiny(), world, torch.device("cpu")) for world in (World(), World(0, 0, 2), World(1, 1, 2))]
    for (_, whole), (_, first), (_, second) in zip(*(run.loader.batches(3) for run in runs), strict=False):
        assert torch.equal(whole.images, torch.cat([first.images, second.images]))
        for name in ("context", "targets"):
            sets = {}
            for offset, batch in ((0, first), (2, second)):
                part = getattr(batch.masks, name)
                for image, patches in zip(part.image.tolist(), part.split(), strict=True):
                    sets.setdefault(image + offset, []).append(patches.tolist())
            wanted = {}
            part = getattr(whole.masks, name)
            for image, patches in zip(part.image.tolist(), part.split(), strict=True):
                wanted.setdefault(image, []).append(patches.tolist())
            assert sets == wanted
        break


@pytest.mark.integration
def test_two_processes_train_as_one(tiny, torchrun, tmp_path, repository):
    still = "encoder.drop_path=0.0"  # what it drops is drawn for each process
    one = train(tiny(still))
    two = tmp_path / "two"
    torchrun(2, repository / "tools" / "train_net.py", "--config-file", one / "config.yaml", "--output-dir", two)
    assert json.loads((two / "run.json").read_text())["world_size"] == 2
    for line, other in zip(numbers(one), numbers(two), strict=True):
        assert other == pytest.approx(line, rel=0, abs=1e-6)
    first, second = (load_checkpoint(folder).model for folder in (one, two))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-5, msg=name)
