"""Runs with a bad step: each policy, its record, its limits, and the replay of its batch."""

import errno
import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jepa_kit.distributed.signals import StopConsensus
from jepa_kit.engine import step as update
from jepa_kit.engine import train as training
from jepa_kit.engine.checkpoint.format import checkpoints, load_checkpoint
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.engine.nonfinite import policy
from jepa_kit.engine.nonfinite.policy import BadStep, append_record, left_out, over_limit, read_record
from jepa_kit.engine.replay import as_in_run, config_of, read_dump, weights_before
from jepa_kit.errors import SaveError
from jepa_kit.interop import start as foreign
from jepa_kit.interop.formats import convert
from jepa_kit.training import train

ROOT = Path(__file__).parents[3]


@pytest.fixture
def replay_tool():
    return importlib.import_module("jepa_kit.tools.replay_step")


@pytest.fixture
def bad_at(monkeypatch):
    """Puts a NaN into the images of some steps, each time that they are run; called again, of other steps."""
    steps, now = set(), []
    seed, step_function = update.seed_torch, update.train_step

    def seed_torch(of_run, step, rank):
        now[:] = [step]
        seed(of_run, step, rank)

    def train_step(jepa, optimizer, hyper, views, **options):
        if now[0] in steps:
            images = views[0].images.clone()
            images[0] = math.nan
            views = [replace(views[0], images=images), *views[1:]]
        return step_function(jepa, optimizer, hyper, views, **options)

    def arm(*chosen):
        steps.clear()
        steps.update(chosen)

    monkeypatch.setattr(update, "seed_torch", seed_torch)
    monkeypatch.setattr(update, "train_step", train_step)
    return arm


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder)}


def final(folder):
    checkpoint = load_checkpoint(folder)
    moments = {f"{n} {k}": v for n, state in checkpoint.optimizer.items() for k, v in state.items()}
    return checkpoint.model | moments


def assert_same(first, second):
    for name, value in final(first).items():
        assert torch.equal(value, final(second)[name]), name


def test_stop(tiny, bad_at):
    bad_at(4)
    config = tiny("train.log_every=100", "checkpoint.every=2")
    folder = Path(config.train.output_dir)
    message = (
        r"the loss is nan at step 4 \(lr .*, momentum .*\): weights were not updated with it, and no checkpoint was "
        r"written after it. `jepa-replay .*bad_step_00000004/rank_0000.pt` shows .* train.on_nonf"
    )
    with pytest.raises(FloatingPointError, match=message):
        train(config)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint_00000002.pt", "checkpoint_00000004.pt"]
    assert [(bad.step, bad.policy) for bad in read_record(folder)] == [(4, "stop")]
    with pytest.raises(FloatingPointError, match="the loss is nan at step 4 "):  # it is not left out
        train(config, resume=True)


def test_skip_goes_on_and_a_resumed_run_skips_too(tiny, bad_at, tmp_path, capsys):
    overrides = ("train.on_nonfinite=skip", "checkpoint.every=2", "checkpoint.keep=9")
    bad_at(1, 3)
    folder = train(tiny(*overrides))
    printed = capsys.readouterr().out
    assert "the loss is nan at step 3 (lr" in printed
    assert "): its batch is skipped; bad_step_00000003 contains it" in printed
    assert sorted(losses(folder)) == [0, 2, 4, 5]
    assert [bad.step for bad in read_record(folder)] == [1, 3]

    for path in checkpoints(folder)[1:]:  # as if it had been killed after step 2, or 3: the record is there
        path.unlink()
    before, lines = losses(folder), read_metrics(folder)
    whole = tmp_path / "whole"
    other = train(tiny(*overrides, f"train.output_dir={whole}"))
    bad_at()  # the step would be good now, and is left out all the same
    train(tiny(*overrides), resume=True)
    assert losses(folder) == before == losses(other)
    assert [line["step"] for line in read_metrics(folder)] == [line["step"] for line in lines]
    assert_same(folder, other)


def test_rollback_gives_the_weights_of_skip(tiny, bad_at, tmp_path, capsys):
    bad_at(4)
    skipped = train(tiny("train.on_nonfinite=skip", "checkpoint.every=2"))
    capsys.readouterr()
    back = f"train.output_dir={tmp_path / 'back'}"
    folder = train(tiny("train.on_nonfinite=rollback", "checkpoint.every=2", back))
    printed = capsys.readouterr().out
    assert "): back to step 4, to continue without its batch; bad_step_00000004 contains it" in printed
    assert "resumed at step 4\n" in printed
    assert losses(folder) == losses(skipped)
    assert_same(folder, skipped)
    assert [(bad.step, bad.checkpoint) for bad in read_record(folder)] == [(4, 4)]


def test_rollback_to_the_first_weights(tiny, bad_at):
    bad_at(1)
    folder = train(tiny("train.on_nonfinite=rollback"))
    assert sorted(losses(folder)) == [0, 2, 3, 4, 5]
    assert [bad.checkpoint for bad in read_record(folder)] == [None]


def test_a_roll_back_makes_no_new_group_of_processes(tiny, bad_at, monkeypatch):
    made = []
    monkeypatch.setattr(training, "StopConsensus", lambda: made.append(StopConsensus()) or made[-1])
    bad_at(2)
    folder = train(tiny("train.on_nonfinite=rollback"))
    assert sorted(losses(folder)) == [0, 1, 3, 4, 5]
    assert len(made) == 1


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            "skip",
            r"the loss is nan at step 3 .*, and 2 bad steps in a row are more than train.nonfinite_limit \(=1\)",
        ),
        ("rollback", r"at step 3 .*, and 2 times back to step 0 are more than train.nonfinite_limit \(=1\)"),
    ],
)
def test_limits(tiny, bad_at, policy, message):
    bad_at(2, 3)
    with pytest.raises(FloatingPointError, match=message):
        train(tiny(f"train.on_nonfinite={policy}", "train.nonfinite_limit=1", "checkpoint.every=6"))


def test_the_limit_counts_over_resumes():
    def bad(step, checkpoint=None, policy="skip"):
        return BadStep(step, policy, ("nan",), "nan", checkpoint)

    assert over_limit([bad(1), bad(2)], bad(3), 3) is None
    assert "3 bad steps in a row" in over_limit([bad(1), bad(2)], bad(3), 2)
    assert over_limit([bad(1), bad(2)], bad(4), 1) is None
    again = [bad(3, 2, "rollback"), bad(5, 4, "rollback")]
    assert over_limit(again, bad(6, 4, "rollback"), 2) is None
    assert "2 times back to step 4" in over_limit(again, bad(6, 4, "rollback"), 1)
    assert left_out([bad(1), bad(2, policy="stop")]) == {1}


def test_the_record_outlives_a_kill(tmp_path):
    first = BadStep(3, "skip", ("nan", "1.5"), "nan", 2)
    append_record(tmp_path, first)
    path = tmp_path / "bad_steps.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "pol')
    assert read_record(tmp_path) == [first]
    append_record(tmp_path, first)
    assert read_record(tmp_path) == [first, first]
    path.write_text('{"step": 1}\n' + path.read_text())
    with pytest.raises(ValueError, match=r"bad_steps.jsonl, line 1 is no record of a bad step: "):
        read_record(tmp_path)


def test_what_is_said():
    assert str(BadStep(3, "skip", ("1.0", "nan", "inf"), "nan")) == "the loss of rank 1, 2 of 3 is nan at step 3"
    assert str(BadStep(3, "skip", ("1.0",), "inf")) == ("the gradient's norm is inf at step 3, but the loss is finite")


def test_a_dump_holds_the_batch(tiny, bad_at):
    bad_at(2)
    folder = train(tiny("train.on_nonfinite=skip"))
    dump = read_dump(folder / "bad_step_00000002" / "rank_0000.pt")
    assert (dump["step"], dump["rank"], dump["world_size"]) == (2, 0, 1)
    assert len(dump["keys"]) == len(dump["samples"]) == 4
    assert all(key.count("-") == 1 for key in dump["keys"])
    assert math.isnan(dump["numbers"]["loss"])
    (view,) = dump["views"]
    assert view["images"].dtype == torch.uint8
    assert view["images"].shape == (4, 3, 16, 16)
    assert view["masks"]["grid"] == [4, 4]
    assert view["action"] is None
    assert dump["progress"] == {"step": 2, "where": 2 / 6, "epoch": 0, "epochs": 2, "seed": 0}
    assert dump["config"]["train"]["batch_size"] == 4


def test_replay_finds_the_first_bad_number(tiny, replay_tool, capsys):
    config = tiny("optim.lr=1e18", "optim.start_lr=1e18", "train.log_every=100", "checkpoint.every=6")
    with pytest.raises(FloatingPointError) as caught:
        train(config)
    dump = str(caught.value).split("jepa-replay ")[1].split("`")[0]
    step = read_dump(Path(dump))["step"]
    capsys.readouterr()
    assert replay_tool.main([dump]) == 0
    printed = capsys.readouterr().out
    assert f"weights: the first weights, from the seed, and {step} steps done again\n" in printed
    assert "values are not finite, the first is" in printed
    found = json.loads(Path(dump + ".replay.json").read_text())["found"]
    assert found[0]["phase"] in ("forward", "loss", "backward")
    assert found[0]["where"].split()[0] in ("output", "gradient") or found[0]["phase"] == "loss"
    assert replay_tool.main([dump, "--at-once"]) == 3  # the first weights were good
    printed = capsys.readouterr().out
    assert f"weights: the first weights, from the seed, {step} steps before the bad one\n" in printed
    assert "all numbers are finite this time: the run had other weights, another device, or a hardware fault" in printed


def weights_again(tiny_config, step, **options):
    """The weights that a replay gets without the run's checkpoints up to a step, and those that the run had there."""
    folder = Path(tiny_config.train.output_dir)
    had = load_checkpoint(folder / f"checkpoint_{step:08d}.pt").model
    for path in checkpoints(folder)[: [p.name for p in checkpoints(folder)].index(f"checkpoint_{step:08d}.pt") + 1]:
        path.unlink()
    dump, said = read_dump(folder / f"bad_step_{step:08d}" / "rank_0000.pt"), []
    got = weights_before(dump, folder, torch.device("cpu"), foreign=foreign, say=said.append, **options).state_dict()
    return got, had, said[0]


KEPT = ("train.on_nonfinite=skip", "checkpoint.every=1", "checkpoint.keep=9")


def test_replay_begins_from_what_the_run_began_from(tiny, bad_at, tmp_path):
    """And leaves out the batch that the run left out: it is good now."""
    weights = tmp_path / "weights.pt"
    first = train(tiny(f"train.output_dir={tmp_path / 'first'}", "train.seed=7"))
    checkpoints(first)[-1].rename(weights)
    bad_at(1, 3)
    config = tiny(*KEPT, f"train.init_from={weights}")
    train(config)
    got, had, said = weights_again(config, 3, again=True)
    assert said == f"weights: those of {weights}, and 3 steps done again"
    for name, value in had.items():
        assert torch.equal(got[name], value), name
    folder = Path(config.train.output_dir)
    dump = read_dump(folder / "bad_step_00000003" / "rank_0000.pt")
    got = weights_before(dump, folder, torch.device("cpu"), foreign=foreign, again=False, say=print).state_dict()
    for name, value in load_checkpoint(weights).model.items():
        assert torch.equal(got[name], value), name
    with pytest.raises(FileNotFoundError, match=r"there is no file nothing\.pt"):
        weights_before(
            dump, folder, torch.device("cpu"), foreign=foreign, again=False, say=print, start_file="nothing.pt"
        )


def test_replay_of_a_run_that_went_on_from_a_released_checkpoint(tiny, bad_at, tmp_path, replay_tool, capsys):
    released = tmp_path / "epoch1.pth.tar"
    first = train(tiny(f"train.output_dir={tmp_path / 'first'}"))
    convert(checkpoints(first)[0], released, to="official")
    bad_at(5)
    config = tiny(*KEPT)
    folder = train(config, resume_from=str(released))
    got, had, said = weights_again(config, 5, again=True)
    assert said == f"weights: those of {released}, and 2 steps done again"
    for name, value in had.items():
        assert torch.equal(got[name], value), name

    path = folder / "bad_step_00000005" / "rank_0000.pt"
    dump = read_dump(path)
    del dump["resume_from"]  # the run was resumed without it
    torch.save(dump, path)
    capsys.readouterr()
    assert replay_tool.main([str(path)]) == 2
    assert capsys.readouterr().err == (
        "replay_step.py: the run began with the weights of epoch1.pth.tar, no checkpoint of it is left from before "
        "step 5, and the dump does not name that file: name it with --start\n"
    )
    for options in ([], ["--at-once"]):
        assert replay_tool.main([str(path), "--start", str(released), *options]) == 3  # only the run put a NaN there
        assert f"weights: those of {released}, " in capsys.readouterr().out
    torch.save(dump | {"step": 2}, path)
    assert replay_tool.main([str(path), "--start", str(released)]) == 2
    assert "is at step 3, after the bad one (2): the run did not begin from it" in capsys.readouterr().err


def test_a_start_that_would_do_nothing(tiny, bad_at, replay_tool, capsys):
    bad_at(1, 4)
    folder = train(tiny("train.on_nonfinite=skip", "checkpoint.keep=9"))
    for step, message in (
        (1, "--start (='weights.pt') does nothing: the run began with weights from its seed"),
        (4, f"--start (='weights.pt') does nothing: {folder}/checkpoint_00000003.pt is left from before step 4"),
    ):
        dump = folder / f"bad_step_{step:08d}" / "rank_0000.pt"
        assert replay_tool.main([str(dump), "--start", "weights.pt"]) == 2
        assert message in capsys.readouterr().err


def test_replay_is_one_process_whatever_the_run_was(tiny, bad_at, tmp_path):
    bad_at(4)
    folder = train(tiny("train.on_nonfinite=skip", "encoder.drop_path=0.0", "checkpoint.keep=9"))
    dump = read_dump(folder / "bad_step_00000004" / "rank_0000.pt")
    dump["config"]["train"]["parallel"], dump["world_size"] = "fsdp", 2
    config = config_of(dump)
    assert (config.train.parallel, config.train.accumulate) == ("auto", 2)
    said = []
    got = weights_before(dump, folder, torch.device("cpu"), foreign=foreign, again=True, say=said.append).state_dict()
    one = read_dump(folder / "bad_step_00000004" / "rank_0000.pt")
    wanted = weights_before(one, folder, torch.device("cpu"), foreign=foreign, again=True, say=said.append).state_dict()
    assert said[0].endswith("1 steps done again (by one process, within rounding of the 2)")
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5, msg=name)


def test_a_dump_that_cannot_be_written_leaves_nothing(tiny, bad_at, monkeypatch):
    def full(content, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(policy, "write_archive", full)
    bad_at(2)
    config = tiny("train.on_nonfinite=skip")
    with pytest.raises(SaveError, match="cannot be written to: No space left on device; there is no checkpoint"):
        train(config)
    assert list((Path(config.train.output_dir) / "bad_step_00000002").iterdir()) == []


def test_replay_computes_as_the_run_did(tiny, bad_at, replay_tool, monkeypatch):
    bad_at(1)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with pytest.raises(FloatingPointError):
        train(tiny("train.deterministic=true"))
    path, seen = Path(tiny().train.output_dir) / "bad_step_00000001" / "rank_0000.pt", []

    def note(*arguments, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return []

    monkeypatch.setattr(replay_tool, "replay", note)
    assert replay_tool.main([str(path)]) == 3
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()

    dump = read_dump(path)
    dump["config"]["train"] |= {"precision": "tf32", "deterministic": False}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for device, flag in (("cuda:0", "high"), ("cpu", "highest")):
        with as_in_run(dump, torch.device(device)):
            assert torch.get_float32_matmul_precision() == flag


def test_replay_names_the_module(tiny, bad_at, replay_tool, capsys):
    bad_at(4)
    folder = train(tiny("train.on_nonfinite=skip", "checkpoint.keep=9"))
    dump = folder / "bad_step_00000004" / "rank_0000.pt"
    path = folder / "checkpoint_00000003.pt"
    content = torch.load(path, weights_only=True)
    content["model"]["predictor.blocks.0.mlp.fc1.weight"][0, 0] = math.inf
    torch.save(content, path)
    capsys.readouterr()
    assert replay_tool.main([str(dump), "--at-once"]) == 0
    printed = capsys.readouterr().out
    assert "weights: run/checkpoint_00000003.pt, 1 steps before the bad one\n" in printed
    assert "weights: predictor.blocks.0.mlp.fc1.weight: 1 of " in printed
    assert "forward: output of predictor.blocks.0.mlp.fc1 [Linear]: " in printed


@pytest.mark.parametrize("content", [None, b"text", {"a": 1}], ids=["missing", "text", "other"])
def test_not_a_dump(tmp_path, replay_tool, capsys, request, content):
    path = tmp_path / "rank_0000.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert replay_tool.main([str(path)]) == 2
    message = capsys.readouterr().err
    wanted = {"missing": "there is no file", "text": "or is cut short", "other": "its format is not"}
    assert wanted[request.node.callspec.id] in message


def test_a_dump_that_lacks_something(tiny, bad_at, tmp_path, replay_tool, capsys):
    bad_at(1)
    with pytest.raises(FloatingPointError):
        train(tiny())
    dump = tmp_path / "run" / "bad_step_00000001" / "rank_0000.pt"
    for more in ([], ["--at-once"]):  # and not the first weights, of a seed, in place of the run's
        assert replay_tool.main([str(dump), "--run", str(tmp_path / "none"), *more]) == 2
        told = capsys.readouterr().err
        assert f"there is no run in {tmp_path / 'none'} (no config.yaml): name the run's folder with --run" in told
    content = torch.load(dump, weights_only=True)
    torch.save({name: value for name, value in content.items() if name not in ("views", "keys")}, dump)
    assert replay_tool.main([str(dump)]) == 2
    assert "rank_0000.pt is not the dump of a bad step: it has no views, keys\n" in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_nan_in_the_batch_of_one_rank(tiny, ranks, tmp_path, policy, replay_tool):
    script = tmp_path / "bad_rank.py"
    script.write_text(
        "import math, sys\n"
        "from jepa_kit.config import load_config\n"
        "from jepa_kit.distributed.collectives import read_environment\n"
        "from jepa_kit.engine import step as update\n"
        "from jepa_kit.training import train\n"
        "plain = update.normalize\n"
        "calls = []\n"
        "def normalize(images, mean, std):\n"
        "    calls.append(1)\n"
        "    images = plain(images, mean, std)\n"
        "    if len(calls) == 4 and sys.argv[2] == str(read_environment().rank):\n"
        "        images[0] = math.nan\n"
        "    return images\n"
        "update.normalize = normalize\n"
        "try:\n"
        "    train(load_config(sys.argv[1]))\n"
        "except FloatingPointError as error:\n"
        "    sys.stdout.write(f'STOPPED {read_environment().rank} {error}\\n')  # at once: two write to one pipe\n"
        "    sys.stdout.flush()\n"
    )
    policies = (f"train.on_nonfinite={policy}", "train.parallel=ddp")
    config = tiny(*policies, "train.log_every=100", "encoder.drop_path=0.0")
    folder = Path(config.train.output_dir)
    config.save(tmp_path)
    printed = ranks(2, script, tmp_path / "config.yaml", 1)
    assert "the loss of rank 1 of 2 is nan at step 3 (lr" in printed
    assert [path.name for path in (folder / "bad_step_00000003").iterdir()] == ["rank_0001.pt"]
    assert len(read_dump(folder / "bad_step_00000003" / "rank_0001.pt")["keys"]) == 2
    (bad,) = read_record(folder)
    assert bad.ranks == [1]
    for options in ([], ["--at-once"]):  # by one process; the NaN was never in the images
        assert replay_tool.main([str(folder / "bad_step_00000003" / "rank_0001.pt"), *options]) == 3
    if policy == "stop":
        assert printed.count("STOPPED") == 2
        assert [path.name for path in checkpoints(folder)] == ["checkpoint_00000003.pt"]
    else:
        assert checkpoints(folder)[-1].name == "checkpoint_00000006.pt"
        assert all(value.isfinite().all() for value in load_checkpoint(folder).model.values())
