"""A run whose target encoder is that of a file: trained beside it, kept out of checkpoints, and compared on resume."""

import re

import numpy as np
import pytest
import torch

from jepa_kit.config import load_config
from jepa_kit.engine.checkpoint.format import checkpoints, load_checkpoint
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.errors import CheckpointError, ConfigError
from jepa_kit.evaluation.feature_sources import encoder_named
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.frozen import FrozenNetwork
from jepa_kit.interop import convert, load_encoder, read_encoder
from jepa_kit.interop.start import init_from
from jepa_kit.planning.flops import Lengths, count_flops, flops_of
from jepa_kit.planning.memory import training_memory
from jepa_kit.structures import PatchSets
from jepa_kit.target_updates import Frozen
from jepa_kit.training import train


@pytest.fixture(scope="module")
def teacher(tiny):
    """The run of a deeper encoder with other heads."""
    return train(tiny("encoder.depth=3", "encoder.num_heads=4", "train.epochs=1", "optim.warmup_epochs=0.5"))


@pytest.fixture
def student(tiny, teacher):
    """Makes the config of a run with that teacher, or another."""

    def make(*overrides, weights=teacher):
        return tiny(f"target_update={{name: frozen, weights: {weights}}}", *overrides)

    return make


@pytest.mark.parametrize("format", ["jepa_kit", "safetensors"])
def test_its_targets_are_those_of_the_file(student, teacher, tmp_path, format):
    weights = teacher
    if format != "jepa_kit":
        weights = tmp_path / "teacher"
        convert(teacher, weights, to=format)
    recipe = build_recipe(student(weights=weights)).train()
    assert isinstance(recipe.target_encoder, FrozenNetwork)
    assert (recipe.target_encoder.depth, recipe.encoder.depth) == (3, 2)
    images, patches = torch.randn(2, 3, 16, 16), PatchSets.full(2, 16)
    wanted = load_encoder(teacher).forward_features(images).flatten(0, 1)
    torch.testing.assert_close(recipe.target_encoder(images), wanted, rtol=0, atol=1e-6)
    normalised = torch.nn.functional.layer_norm(wanted, (16,))
    torch.testing.assert_close(recipe.targets_at(images, patches), normalised, rtol=0, atol=1e-5)


def test_it_is_in_no_checkpoint_and_never_moves(student, teacher, tmp_path):
    config = student()
    folder = train(config)
    content = load_checkpoint(folder)
    parts = {name.partition(".")[0] for name in content.model}
    assert parts == {"encoder", "predictor", "target_encoder"}
    assert content.part("target_encoder").keys() == {"_extra_state"}
    whole = sum(x.numel() for x in content.model.values())
    assert whole < sum(x.numel() for name, x in load_checkpoint(teacher).model.items() if "target" not in name)
    recipe = build_recipe(config)
    before = {name: value.clone() for name, value in recipe.target_encoder.network.state_dict().items()}
    recipe.update_target(0.0)
    torch.testing.assert_close(recipe.target_encoder.network.state_dict(), before, rtol=0, atol=0)
    assert load_config(str(folder / "config.yaml")).slots["target_update"].options["weights"] == str(teacher)


def test_a_resumed_run_has_the_same_teacher(student, tiny, teacher, tmp_path):
    run = f"train.output_dir={tmp_path / 'run'}"
    file = tmp_path / "teacher.safetensors"
    convert(teacher, file, to="safetensors")
    whole = train(student())
    folder = train(student(run, weights=file))
    checkpoints(folder)[-1].unlink()
    train(student(run, weights=file), resume=True)
    ours, theirs = load_checkpoint(folder), load_checkpoint(whole)
    torch.testing.assert_close(ours.model["encoder.norm.weight"], theirs.model["encoder.norm.weight"], rtol=0, atol=0)
    file.unlink()
    convert(train(tiny("train.seed=5")), file, to="safetensors")
    checkpoints(folder)[-1].unlink()
    with pytest.raises(CheckpointError, match=rf"the frozen network {re.escape(str(file))} is not that of the check"):
        train(student(run, weights=file), resume=True)


def test_what_is_evaluated_is_the_encoder_that_is_trained(student):
    recipe = build_recipe(student())
    assert recipe.encoder_for("target") is recipe.encoder_for("context") is recipe.encoder
    assert encoder_named(recipe) == "context"
    with pytest.raises(ValueError, match=r"recipe has no target encoder .*it is that of another file"):
        encoder_named(recipe, "target")


def test_its_run_as_a_source_of_weights(student, tiny):
    folder = train(student())
    assert read_encoder(folder, None).provenance.encoder == "context"
    with pytest.raises(CheckpointError, match="has no target encoder; it contains 'context'"):
        read_encoder(folder, "target")
    content, recipe = load_checkpoint(folder), build_recipe(tiny())
    init_from(recipe, folder)  # the average begins at the encoder
    for network in (recipe.encoder, recipe.target_encoder):
        torch.testing.assert_close(dict(network.state_dict()), content.part("encoder"), rtol=0, atol=0)
    again = build_recipe(student())
    before = again.target_encoder.digest.clone()
    init_from(again, train(tiny()))  # and the teacher stays
    assert torch.equal(again.target_encoder.digest, before)


@pytest.fixture(scope="module")
def other(tiny):
    """The run of a wider encoder with larger patches, whose images were normalised in another way."""
    norm = ("data.mean=[0.4, 0.5, 0.6]", "data.std=[0.2, 0.3, 0.25]")
    sizes = ("encoder.embed_dim=24", "encoder.depth=3", "encoder.patch_size=8", "masker={name: random}")
    return train(tiny(*sizes, *norm, "data.image_size=32", "train.epochs=1", "optim.warmup_epochs=0.5"))


def test_a_teacher_of_any_width_depth_patches_and_normalisation(student, other):
    """Targets have its width, layers are counted in it, and it sees the images as its own training would show them."""
    target = "target={name: representation, layers: [1, 3], combine: concat}"
    recipe = build_recipe(student("target_update.resize=true", target, weights=other)).train()
    assert recipe.target.out_dim == recipe.predictor.proj.out_features == 48
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    own_mean, own_std = (torch.tensor(x)[:, None, None] for x in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    larger = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    encoder = load_encoder(other, image_size=32).vit
    layers = encoder.forward_layers((larger - own_mean) / own_std, layers=(1, 3))
    wanted = torch.cat([torch.nn.functional.layer_norm(x, (24,)) for x in layers], -1)
    found = recipe.targets_at((pixels - mean) / std, PatchSets.full(2, 16))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    images = (pixels - mean) / std
    torch.testing.assert_close(recipe.target_encoder(images), encoder((larger - own_mean) / own_std), rtol=0, atol=1e-4)


def test_a_run_with_another_teacher(student, other):
    folder = train(student("target_update.resize=true", weights=other))
    assert all(np.isfinite(line["loss"]) for line in read_metrics(folder))
    assert load_checkpoint(folder).part("predictor")["proj.weight"].shape[0] == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [],
            "has patches of 8 pixels, and the run's encoder of 4: the two must see the same grid of patches. Take "
            "encoder.patch_size and data.image_size of the teacher, or target_update.resize=true, which shows it the "
            "same images resized to images of 32 x 32 pixels",
        ),
        (
            ["encoder.patch_size=8", "data.image_size=32", "target_update.resize=true"],
            "has patches of 8 pixels, and the run's encoder of 8: resize (=True) would do nothing",
        ),
    ],
)
def test_a_teacher_that_does_not_fit(student, other, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        build_recipe(student(*options, weights=other))
    assert str(error.value).startswith(f"target_update: weights (={str(other)!r}) has patches of 8 pixels, and the run")


def test_a_missing_teacher_hides_no_other_mistake(student):
    with pytest.raises(FileNotFoundError, match=r"^target_update: there is no file nowhere\.pt"):
        build_recipe(student(weights="nowhere.pt"))
    with pytest.raises(ConfigError) as caught:
        build_recipe(student("encoder.depth=0", weights="nowhere.pt"))
    depth, missing = caught.value.problems
    assert depth.startswith("encoder: depth (=0)")
    assert missing == "target_update: there is no file nowhere.pt"


def test_layers_that_the_teacher_does_not_have(student, teacher):
    build_recipe(student("target={name: representation, layers: 3}"))
    with pytest.raises(ConfigError, match=re.escape("target: layers (=4) must be at most the encoder's depth (=3)")):
        build_recipe(student("target={name: representation, layers: 4}"))


def test_resize_is_for_a_teacher():
    with pytest.raises(ValueError, match=re.escape("resize (=True) is for a teacher from a file, and there are")):
        Frozen(resize=True)


def test_another_image_size_interpolates_positions(student, teacher):
    recipe = build_recipe(student("data.image_size=32"))
    images = torch.randn(2, 3, 32, 32)
    wanted = load_encoder(teacher, image_size=32).forward_features(images).flatten(0, 1)
    torch.testing.assert_close(recipe.target_encoder(images), wanted, rtol=0, atol=0)


def test_a_file_that_is_missing(student, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        build_recipe(student(weights=tmp_path / "nothing"))


def test_only_an_encoder_is_replaced_by_a_file(student):
    update = build_recipe(student()).target_update
    with pytest.raises(ValueError, match="can stand for an encoder, but not for a Linear, which follows another one"):
        update.make(torch.nn.Linear(2, 2))


def test_on_meta_it_has_shapes(student):
    with torch.device("meta"):
        recipe = build_recipe(student())
    assert recipe.target_encoder.encoder.norm.weight.is_meta
    assert recipe.target_encoder.digest.any()


def test_its_cost_is_counted(student, tiny):
    """It has another depth than the encoder, and FSDP does not shard it."""
    flops, twin = (flops_of(config, build_recipe(config), torch.device("cpu")) for config in (student(), tiny()))
    assert not flops.has_formula
    assert flops.counted is not None
    assert flops.counted > count_flops(tiny(), torch.device("cpu"))
    assert twin.has_formula
    recipe = build_recipe(student())
    masks = build_masker(student())(np.arange(4), seed=0, epoch=0)
    one, two = (
        training_memory(recipe, Lengths.of(masks, 4), precision="float32", shards=shards, kept_per_image=0.0)
        for shards in (1, 2)
    )
    assert (
        one.target_encoder
        == two.target_encoder
        == 4 * sum(p.numel() for p in recipe.target_encoder.network.parameters())
    )


SCRIPT = """
import sys
from jepa_kit.config import load_config
from jepa_kit.training import train
train(load_config(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.integration
def test_two_processes(student, tmp_path, ranks):
    """Sharded, with an evaluation; one process resumes from the shards."""
    (tmp_path / "two.py").write_text(SCRIPT)
    together = tmp_path / "together"
    options = ("train.precision=float32", "encoder.drop_path=0.0", "evaluate.every=3", "evaluate.samples=16")
    alone = train(student(*options))
    saved = student(*options).save(tmp_path)
    ranks(2, tmp_path / "two.py", saved, f"train.output_dir={together}", "train.parallel=fsdp")
    for ours, theirs in zip(read_metrics(together), read_metrics(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    content = load_checkpoint(together)
    torch.testing.assert_close(content.part("target_encoder"), load_checkpoint(alone).part("target_encoder"))
    train(student(*options, f"train.output_dir={together}", "train.parallel=none"), resume=True)
