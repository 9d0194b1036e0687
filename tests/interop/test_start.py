"""Runs that begin from weights of other formats, and runs in the released layout that go on."""

import pytest
import torch

from jepa_kit.engine.checkpoint.format import checkpoints, load_checkpoint
from jepa_kit.engine.logging.telemetry import MEASURED, read_metrics
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.errors import CheckpointError
from jepa_kit.from_config import build_recipe
from jepa_kit.interop.formats import convert, read_encoder
from jepa_kit.interop.start import init_from, resume_official
from jepa_kit.training import train


def numbers(folder):
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in read_metrics(folder)]


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def whole(tiny):
    """A run of 6 steps, 3 an epoch, with its two checkpoints."""
    return train(tiny())


@pytest.fixture
def noted(whole, tmp_path):
    """Its first epoch in the released layout."""
    convert(checkpoints(whole)[0], tmp_path / "epoch1.pth.tar", to="official")
    return tmp_path / "epoch1.pth.tar"


@pytest.fixture
def as_released(noted, tmp_path):
    """The same without our note, as the release would have written it."""
    content = torch.load(noted, weights_only=True)
    del content["jepa_kit"]
    torch.save(content, tmp_path / "released.pth.tar")
    return tmp_path / "released.pth.tar"


@pytest.mark.parametrize("ours", [True, False])
def test_a_released_run_goes_on_exactly(tiny, tmp_path, whole, noted, as_released, ours, capsys):
    path = noted if ours else as_released
    other = f"train.output_dir={tmp_path / 'other'}"
    resumed = train(tiny(other), resume_from=str(path))
    assert f"resumed from {path}" in capsys.readouterr().out
    assert numbers(resumed) == numbers(whole)[3:]
    first, second = (load_checkpoint(folder) for folder in (whole, resumed))
    assert_same_weights(first.model, second.model)
    for name, state in first.optimizer.items():
        assert_same_weights(state, second.optimizer[name])
    train(tiny(other), resume_from=str(path))  # its own checkpoint counts from now on
    assert "resumed at step 6" in capsys.readouterr().out


def test_the_licence_stays_with_the_run(tiny, tmp_path, as_released):
    path = as_released.with_name("IN1K-vit.h.14-300e.pth.tar")
    as_released.rename(path)
    resumed = train(tiny(f"train.output_dir={tmp_path / 'other'}"), resume_from=str(path))
    found = read_encoder(resumed).provenance
    assert found.licence == "CC-BY-NC-4.0"
    assert found.notes == ("its run began from IN1K-vit.h.14-300e.pth.tar (released layout)",)


def test_a_complete_run_has_nothing_left(tiny, tmp_path, whole):
    convert(whole, tmp_path / "epoch2.pth.tar", to="official")
    with pytest.raises(
        CheckpointError, match=r"at step 6, and a run of train.epochs \(=2\) ends at step 6: there is no"
    ):
        train(tiny(f"train.output_dir={tmp_path / 'other'}"), resume_from=str(tmp_path / "epoch2.pth.tar"))


def test_another_length_of_an_epoch_is_said(tiny, tmp_path, as_released, capsys):
    more = ("train.steps_per_epoch=5", f"train.output_dir={tmp_path / 'other'}")
    train(tiny(*more), resume_from=str(as_released))
    printed = capsys.readouterr().out
    assert "after 1 epochs, step 5" in printed
    assert "note: AdamW has counted 3 updates, and 5 are 1 epochs of this run" in printed


@pytest.mark.parametrize("part", ["predictor", "target_encoder", "opt"])
def test_a_part_is_missing(tiny, as_released, part):
    content = torch.load(as_released, weights_only=True)
    del content[part]
    if part == "predictor":
        del content["opt"]
    torch.save(content, as_released)
    config = tiny()
    jepa = build_recipe(config)
    with pytest.raises(
        CheckpointError, match=rf"has no {part}.*, so its run cannot be resumed; train.init_from starts a new"
    ):
        resume_official(jepa, build_optimizer(jepa), as_released, 3)


def test_only_a_released_checkpoint_is_gone_on_with(tiny, whole):
    jepa = build_recipe(tiny())
    with pytest.raises(CheckpointError, match="is not in the format 'official': by its content it is 'jepa_kit'"):
        resume_official(jepa, build_optimizer(jepa), whole, 3)


def test_a_released_checkpoint_has_the_moments_of_adamw(tiny, as_released):
    jepa = build_recipe(tiny())
    with pytest.raises(CheckpointError, match=r"optim\.name must be 'adamw' to resume a released checkpoint"):
        resume_official(jepa, build_optimizer(jepa, name="sgd"), as_released, 3)


def test_the_released_layout_has_no_other_optimiser(tiny, tmp_path):
    folder = train(tiny("optim.name=lars", "train.epochs=1", "optim.warmup_epochs=0"))
    with pytest.raises(CheckpointError, match=r"released layout: optim.name \(='lars'\) must be 'adamw'"):
        convert(folder, tmp_path / "a", to="official")


@pytest.mark.parametrize("format", ["official", "jepa_kit"])
def test_a_new_run_from_all_parts(tiny, tmp_path, whole, format, capsys):
    convert(checkpoints(whole)[0], tmp_path / "a", to=format)
    held = load_checkpoint(checkpoints(whole)[0])
    jepa = build_recipe(tiny())
    assert init_from(jepa, tmp_path / "a").step == 0
    assert_same_weights(jepa.state_dict(), held.model)
    folder = train(tiny(f"train.init_from={tmp_path / 'a'}", f"train.output_dir={tmp_path / 'other'}"))
    assert "weights: context encoder of a (jepa_kit); ViT of width 16" in capsys.readouterr().out
    assert len(numbers(folder)) == 6
    assert numbers(folder)[0]["loss"] != numbers(whole)[0]["loss"]
    assert load_checkpoint(folder).origin == {"source": "a"}


@pytest.mark.parametrize("format", ["hf", "timm", "safetensors", "onnx"])
def test_a_new_run_from_an_encoder(tiny, tmp_path, whole, format):
    convert(whole, tmp_path / "a", to=format)
    jepa = build_recipe(tiny())
    before = {name: value.clone() for name, value in jepa.predictor.state_dict().items()}
    start = init_from(jepa, tmp_path / "a")
    expected = load_checkpoint(whole).part("target_encoder")
    assert_same_weights(jepa.encoder.state_dict(), expected)
    assert_same_weights(jepa.target_encoder.state_dict(), expected)
    assert_same_weights(jepa.predictor.state_dict(), before)
    assert start.lines[-1] == "not in the file, newly initialised: predictor"


def test_a_resumed_run_does_not_read_the_first_weights_again(tiny, tmp_path, whole, capsys):
    convert(whole, tmp_path / "a", to="safetensors")
    options = (f"train.init_from={tmp_path / 'a'}", f"train.output_dir={tmp_path / 'other'}")
    train(tiny(*options))
    (tmp_path / "a").unlink()
    train(tiny(*options), resume=True)
    assert "resumed at step 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder.embed_dim=32"], r"the run's encoder \(train.init_from: .*misshapen: patch_embed.proj.weight"),
        (["encoder.depth=3"], "missing: blocks.2.norm1.weight"),
        (["encoder.num_heads=4"], r"encoder.num_heads \(=4\) must be 2, as in the weights of .*"),
        (["encoder.norm_eps=1e-5"], r"encoder.norm_eps \(=1e-05\) must be 1e-06, as in the weights of .*"),
        (["predictor.width=16"], r"the run's predictor \(train.init_from: .*misshapen: mask_token"),
    ],
)
def test_weights_that_do_not_fit_the_run(tiny, tmp_path, whole, overrides, message):
    jepa = build_recipe(tiny(*overrides))
    before = {name: value.clone() for name, value in jepa.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        init_from(jepa, checkpoints(whole)[0])
    assert_same_weights(jepa.state_dict(), before)


def test_another_image_size_is_said(tiny, whole):
    start = init_from(build_recipe(tiny("data.image_size=24")), checkpoints(whole)[0])
    assert (
        "note: the weights were trained on 4 x 4 patches; this run has the formula's positions of 6 x 6" in start.lines
    )


def test_another_number_of_heads_than_usual_is_said(tiny, as_released):
    from jepa_kit.interop.start import _check_architecture
    from jepa_kit.interop.weights import architecture_of_vit

    jepa = build_recipe(tiny("encoder.size=tiny", "encoder.embed_dim=192", "encoder.depth=12", "encoder.num_heads=12"))
    lines = _check_architecture(jepa, architecture_of_vit(jepa.encoder), "x")
    assert lines == ["note: encoders of this width and depth have 3 heads; this run has 12"]


def test_another_encoder(tiny, whole, tmp_path):
    jepa = build_recipe(tiny())
    jepa.encoder = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"the run's encoder is a Linear, but that of .* is 'vit': they must be"):
        init_from(jepa, whole)
    convert(whole, tmp_path / "a", to="timm")
    with pytest.raises(CheckpointError, match="the run's encoder is a Linear, but weights of other formats need"):
        init_from(jepa, tmp_path / "a")


def test_the_released_layout_has_no_groups_with_factors(tiny, tmp_path):
    folder = train(tiny("optim.groups=[{match: encoder.*, lr: 0.5}]", "train.epochs=1", "optim.warmup_epochs=0"))
    with pytest.raises(CheckpointError, match=r"released layout, which has no learning rates of optim.groups"):
        convert(folder, tmp_path / "a", to="official")
