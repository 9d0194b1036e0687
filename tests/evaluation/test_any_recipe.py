"""Health, pictures, protocols and evaluation inside a run, for recipes of every kind."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from jepa_kit.config import config_from_dict
from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.transforms import normalize
from jepa_kit.distributed.collectives import World
from jepa_kit.encoders.pooling import pooled, pooled_views
from jepa_kit.engine.build import build_run
from jepa_kit.engine.checkpoint.format import Checkpoint, save_checkpoint
from jepa_kit.errors import ConfigError
from jepa_kit.evaluation.evaluate import evaluate
from jepa_kit.evaluation.feature_cache import FeatureStore
from jepa_kit.evaluation.feature_sources import run_networks
from jepa_kit.evaluation.features import load_run
from jepa_kit.evaluation.health.measure import measure_health, several_masks
from jepa_kit.evaluation.health.measures import lidar
from jepa_kit.evaluation.health.verdict import judge
from jepa_kit.evaluation.masks.statistics import mask_report
from jepa_kit.evaluation.online import online_evaluation
from jepa_kit.evaluation.pictures.material import gather
from jepa_kit.evaluation.pictures.run_page import draw_run
from jepa_kit.evaluation.protocols import build_protocols
from jepa_kit.evaluation.tables.table import format_table
from jepa_kit.from_config import build_masker, build_recipe, masker_of
from jepa_kit.losses import info_nce
from jepa_kit.recipe import PatchRecipe, Recipe
from jepa_kit.registry import RECIPES, TARGETS
from jepa_kit.scenes.scenes import render
from jepa_kit.structures import START, Output, View
from jepa_kit.tools import health as health_tool

CODES = 6


@RECIPES.register("two_views")
class TwoViews(Recipe):
    """Views of an image find each other: no masks, no predictions."""

    num_views = (2, 2)
    masked = False

    def __init__(self, *, encoder: nn.Module) -> None:
        super().__init__(encoder=encoder)

    def forward(self, *views, progress=START):
        first, second = pooled_views(self.encoder, views).chunk(2)
        loss = info_nce(first, second, torch.eye(len(first), dtype=torch.bool), temperature=0.2).mean()
        return Output(loss, {"info_nce": loss})


@RECIPES.register("masked_views")
class MaskedViews(Recipe):
    """Features of two contexts agree: masks, but no predictions."""

    def __init__(self, *, encoder: nn.Module) -> None:
        super().__init__(encoder=encoder)

    def forward(self, *views, progress=START):
        (view,) = views
        loss = pooled(self.encoder, view.images, view.masks.context).var()
        return Output(loss, {"variance": loss})


@TARGETS.register("brightness")
class Brightness(nn.Module):
    """Codes of patches: their brightness in steps."""

    needs_encoder = False
    out_dim = CODES

    def __init__(self, *, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images, patches, encoder):
        means = nn.functional.avg_pool2d(images.mean(1, keepdim=True), self.patch_size).flatten(1)  # [B, N]
        return patches.gather((means * 2 + CODES / 2).long().clamp(0, CODES - 1))


VIT = {"name": "vit", "embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 4}
BASE = {
    "data": {"image_size": 16, "num_workers": 0, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
    "optim": {"warmup_epochs": 0},
    "train": {"batch_size": 4, "epochs": 1, "precision": "float32", "device": "cpu"},
}
JEPA = {
    "masker": {"name": "multiblock"},
    "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
    "target": {"name": "representation"},
    "loss": {"name": "smooth_l1"},
    "target_update": {"name": "ema"},
}
IN_PLACE = {"masker": {"name": "in_place", "masker": {"name": "random", "ratio": 0.5}}, "predictor": {"name": "tokens"}}
TWO_VIEWS = {"data": {**BASE["data"], "views": [{"count": 2}]}}
CASES = {
    "jepa": {"encoder": VIT, **JEPA},
    "pixels, prefix": {
        "encoder": {**VIT, "class_token": True, "registers": 2, "positions": "learned"},
        **JEPA,
        "masker": {"name": "random"},
        "target": {"name": "pixel"},
        "target_update": {"name": "none"},
    },
    "conv, layers side by side": {
        "encoder": {"name": "conv", "embed_dim": 16, "depth": 4, "kernel": 3, "patch_size": 4},
        **JEPA,
        "target": {"name": "representation", "layers": [1, 3, 4], "combine": "concat"},
    },
    "pixels in place": {
        "encoder": {**VIT, "mask_token": True, "relative_bias": "shared", "positions": "none"},
        **IN_PLACE,
        "target": {"name": "pixel"},
        "loss": {"name": "l1"},
        "target_update": {"name": "none"},
    },
    "codes in place": {
        "encoder": {**VIT, "mask_token": True, "class_token": True, "positions": "rotary"},
        **IN_PLACE,
        "target": {"name": "brightness"},
        "loss": {"name": "cross_entropy"},
        "target_update": {"name": "none"},
    },
    "two views": {"recipe": {"name": "two_views"}, "encoder": {**VIT, "class_token": True}, **TWO_VIEWS},
    "two views and their mean": {
        "recipe": {"name": "joint_embedding"},
        "encoder": {**VIT, "class_token": True},
        "loss": [{"name": "l2"}, {"name": "vicreg"}],
        **TWO_VIEWS,
    },
    "two views, one token": {"recipe": {"name": "two_views"}, "encoder": {**VIT, "patch_size": 16}, **TWO_VIEWS},
    "masked views": {"recipe": {"name": "masked_views"}, "encoder": VIT, "masker": {"name": "random"}},
}
PREDICTS = [name for name in CASES if "view" not in name]


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def config_of(name, *overrides):
    return config_from_dict({**BASE, **CASES[name]}, overrides)


@pytest.fixture(scope="module")
def images():
    """[24, 3, 16, 16] scenes."""
    return torch.from_numpy(np.stack([render(0, i, (16, 16)).image for i in range(24)])).permute(0, 3, 1, 2)


@pytest.fixture
def run_folder(tmp_path):
    """Return a function that writes a checkpoint of an untrained recipe and returns its folder."""

    def make(name):
        config = config_of(name)
        torch.manual_seed(0)
        model = build_recipe(config).state_dict()
        save_checkpoint(tmp_path, Checkpoint(3, model, {}, config.to_dict(), {}, {}))
        return tmp_path

    return make


def test_every_recipe_of_the_core_is_a_case():
    core = {name for name in RECIPES.names() if RECIPES.get(name).__module__.startswith("jepa_kit.")}
    assert core <= {config_of(name).recipe.name for name in CASES}


def test_health(name, images):
    config = config_of(name)
    torch.manual_seed(0)
    jepa = build_recipe(config)
    health = measure_health(jepa, images, masker_of(config), encoder="context", masks=2)
    verdict = judge(health)
    assert health.predicts_patches is (name in PREDICTS)
    assert (health.lidar is None) is (health.masks == 0) is (name.startswith("two views"))
    assert (health.of_images is None) is (name == "two views, one token")
    continuous = name in PREDICTS and not name.startswith("codes")
    assert (health.loss_position is None) is not continuous
    if name in PREDICTS:
        assert health.loss > 0
        assert health.loss_other > 0
        assert "not judged" not in verdict.reason
    else:
        assert verdict.state != "not learned"
        assert health.loss is health.cross_sample_gap is health.relative_to_mean is None
        assert "predictions: the recipe predicts no patches" in health.not_measured
    json.dumps(health.to_dict())


def test_codes_have_cross_entropies(images):
    config = config_of("codes in place")
    torch.manual_seed(0)
    jepa = build_recipe(config)
    nn.init.normal_(jepa.predictor.proj.weight)
    masker = build_masker(config)
    health = measure_health(jepa, images, masker, encoder="context", masks=2, seed=5)
    masks = several_masks(masker, np.arange(24), 2, seed=5)
    assert masks.context.hidden.sum() == len(masks.targets.index) == 24 * 2 * 8
    x = normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    brightness = x.double().unflatten(2, (4, 4)).unflatten(4, (4, 4)).mean((1, 3, 5)).flatten(1).numpy()  # [B, N]
    codes = np.clip(np.trunc(brightness * 2 + CODES / 2), 0, CODES - 1).astype(int)
    own, other, used = [], [], []
    with torch.no_grad():
        tokens = jepa.eval().encoder(x, masks.context).view(48, 16, 16)
        scores = jepa.predictor.proj(tokens).double().log_softmax(-1).numpy()  # [2 * B, N, K]
    for k, chosen in enumerate(masks.targets.split()):
        for patch in chosen.tolist():
            image = k % 24
            used.append(codes[image, patch])
            own.append(-scores[k, patch, used[-1]])
            other.append(-scores[k, patch, codes[(image + 1) % 24, patch]])
    share = np.bincount(used) / len(used)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    found = (health.loss, health.loss_mean, health.loss_other)
    assert found == pytest.approx((np.mean(own), entropy, np.mean(other)), rel=1e-5)
    assert health.cross_sample_gap == pytest.approx(1 - np.mean(own) / np.mean(other), rel=1e-4)
    assert health.relative_to_position is None
    assert health.not_measured == (
        "loss of each position's frequencies: targets are codes, and so few images do not determine these",
    )
    assert f"and the loss is {np.mean(own) / entropy:.2f} of the entropy of the codes" in judge(health).reason
    contexts = tokens.mean(1).double().numpy().reshape(2, 24, 16).transpose(1, 0, 2)
    assert health.lidar == pytest.approx(lidar(contexts), rel=1e-4)


class Collapsed(nn.Module):
    """An encoder whose features [B, D] are nearly constant, or nearly multiples of one vector; other tokens are not."""

    def __init__(self, encoder, state):
        super().__init__()
        self.inner, self.state = encoder, state
        self.class_token = getattr(encoder, "class_token", False)

    def change(self, x):
        if self.state == "constant":
            return x[:1] + 1e-3 * x
        return (x[:, :1] - x[:, :1].mean()) * torch.linspace(1, 2, x.shape[1]) + 1e-6 * x

    def forward_tokens(self, images):
        (found,) = self.inner.forward_tokens(images)
        return [found._replace(prefix=self.change(found.prefix[:, 0])[:, None])]

    def forward(self, images, patches=None):
        return self.change(self.inner(images, patches))


@pytest.mark.parametrize("state", ["constant", "dimensional collapse"])
@pytest.mark.parametrize("name", ["two views", "two views, one token"])
def test_a_collapse_of_features(name, state, images):
    """All class tokens are equal, although patch tokens differ."""
    torch.manual_seed(0)
    jepa = build_recipe(config_of(name))
    verdict = judge(measure_health(jepa, images, None))
    assert verdict.state == "healthy"
    assert verdict.reason.endswith("; positions and predictions are not judged: the recipe predicts no patches")
    before = measure_health(jepa, images, None)
    jepa.encoder = Collapsed(jepa.encoder, state)
    after = measure_health(jepa, images, None)
    assert judge(after).state == state
    assert "features" in judge(after).reason
    if name == "two views":
        assert (after.varying, after.token_rank) == (before.varying, before.token_rank)


def test_pictures(name, run_folder, scenes, monkeypatch, tmp_path):
    monkeypatch.setattr("jepa_kit.evaluation.pictures.sections.DPI", 20)
    monkeypatch.setattr("jepa_kit.evaluation.pictures.run_page.page", lambda sections, path, **options: path)
    run = load_run(run_folder(name))
    material = gather(run, scenes[0], images=16, others=8, device=torch.device("cpu"))
    content = draw_run(material, tmp_path / "pictures", name="tiny", steps=1)
    sections = {file.removesuffix(".png") for file in content["files"]} - {"page"}
    wanted = {"patch_pca", "predictor_guess", "energy", "attention", "decoder"}
    if name.startswith("conv"):
        wanted.remove("attention")
    if name not in PREDICTS or name.startswith("codes"):
        wanted -= {"predictor_guess", "decoder"}
        energies = "" if name in PREDICTS else ", energy"
        start = f"the predictor's guess{energies} and the hidden block ("
        assert any(line.startswith(start) for line in content["left_out"])
    if name not in PREDICTS:
        wanted.remove("energy")
    if name == "two views, one token":
        wanted.remove("patch_pca")
    assert sections == wanted
    assert bool(content["left_out"]) is (len(wanted) < 5)
    assert (content["energy"] is None) is (name not in PREDICTS)
    assert (content["decoder_explains"] is None) is ("decoder" not in wanted)


def test_protocols(name, run_folder, scenes):
    loaded = load_run(run_folder(name))
    networks = run_networks(loaded)
    specs = ["knn", {"name": "linear", "epochs": 1, "lrs": [0.1]}, {"name": "attentive", "epochs": 1}]
    pooling = "class" if getattr(loaded.jepa.encoder, "class_token", False) else "mean"
    specs += [{"name": "knn", "pooling": pooling}] if pooling == "class" else []
    rows = evaluate(networks, *scenes, ImageOptions(image_size=(16, 16)), protocols=specs, labels=["count"])
    assert len(rows) == len(specs) * 3
    assert {row.network for row in rows} == {networks[0].name, "untrained", "pixels"}


@pytest.mark.parametrize("protocol", ["knn", "logistic", "linear", "finetune"])
def test_pooling_of_an_encoder_without_a_class_token(protocol, run_folder, scenes):
    networks = run_networks(load_run(run_folder("jepa")), baselines=["pixels"])
    images, specs = ImageOptions(image_size=(16, 16)), [{"name": protocol, "pooling": "class"}]
    with pytest.raises(ValueError) as error:
        evaluate(networks, *scenes, images, protocols=specs, labels=["count"])
    assert f"protocol {protocol!r}" in str(error.value)
    assert "pooling (='class') needs an encoder with a class token, and this one has none" in str(error.value)
    with pytest.raises(ValueError, match=r"pooling \(='none'\) must be one of 'mean', 'class', 'quarters'"):
        build_protocols([{"name": protocol, "pooling": "none"}])


def test_features_of_both_poolings_are_cached(run_folder, scenes, tmp_path):
    """Figures are those of a call without a cache, and the table says which row is of class tokens."""
    networks = run_networks(load_run(run_folder("two views")), baselines=["pixels"], checkpoint_sha256="a")
    specs = ["knn", {"name": "knn", "pooling": "class"}]
    found = []
    for store in (FeatureStore(), FeatureStore(tmp_path / "features"), FeatureStore(tmp_path / "features")):
        images = ImageOptions(image_size=(16, 16))
        rows = evaluate(networks, *scenes, images, protocols=specs, labels=["count"], store=store)
        found.append([(row.variant, row.network, row.pooling, row.accuracy) for row in rows])
    assert found[0] == found[1] == found[2]
    assert [row[:3] for row in found[0]] == [
        (f"pooling={pooling}", network, pooling if network == "context" else None)
        for pooling in ("mean", "class")
        for network in ("context", "pixels")
    ]
    assert len(list((tmp_path / "features").glob("*.npy"))) == 2 * 3
    assert "| knn pooling=class | context encoder, class token |" in format_table(rows)


def test_inside_a_run(name, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jepa_kit.engine.build.check_parts", lambda *arguments, **options: None)  # takes time
    overrides = [f"data.shards={scenes[0].path}", f"train.output_dir={tmp_path}"]
    config = config_of(name, *overrides, "evaluate={every: 5, samples: 16, probe: knn, label: count}")
    run = build_run(config, World(), torch.device("cpu"))
    record = online_evaluation(run)(run, 4)
    assert all(np.isfinite(value) for value in record.values())
    assert ("eval/cross_sample_gap" in record) is (name in PREDICTS)
    assert "eval/knn" in record
    assert ("cross_sample_gap" in capsys.readouterr().out) is (name in PREDICTS)


def test_masks_for_a_recipe_without_a_masker(run_folder, scenes, capsys):
    folder = str(run_folder("two views"))
    options = ["--checkpoint", folder, "--shards", scenes[0].path, "--images", "16"]
    assert health_tool.main([*options, "--masks", "2"]) == 2
    wrong = f"--masks (=2) would do nothing: the recipe 'two_views' of {folder} has no masker"
    assert wrong in capsys.readouterr().err
    assert health_tool.main(options) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("images, context encoder\n")
    assert printed.endswith("\n  not measured: predictions: the recipe predicts no patches\n")
    with pytest.raises(ConfigError, match="the recipe 'two_views' has no masker: its views have no masks"):
        mask_report(config_of("two views"))


def test_report_of_masks_in_place():
    """Patches of a context are those that the encoder sees; its cost is of all tokens."""
    report = mask_report(config_of("pixels in place"), images=32, images_per_batch=8)
    assert set(report.context) == {8}
    assert report.probability.context.mean() == 0.5
    np.testing.assert_allclose(report.probability.context + report.probability.target, 1)
    assert report.cost.encoder.tokens == 16


@pytest.mark.parametrize(("varying", "state"), [(0.024, "healthy"), (0.013, "constant")])
def test_a_large_common_mean_of_features_alone_is_no_collapse(varying, state, images):
    """MSN on scenes, whose probes are good, had 0.024, and a run without anything against collapse 0.013."""
    health = measure_health(build_recipe(config_of("two views")), images, None)
    assert judge(replace(health, feature_varying=varying)).state == state


def test_predictions_are_of_what_the_encoder_was_shown(images):
    """Hidden patches do not reach the predictions, and health does not show them."""
    config = config_of("pixels in place")
    jepa = build_recipe(config)
    nn.init.normal_(jepa.predictor.proj.weight)
    assert isinstance(jepa, PatchRecipe)
    masks = build_masker(config)(np.arange(24), seed=0, epoch=0)
    hidden = masks.context.hidden.view(24, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    x = normalize(images, (0.4,) * 3, (0.2,) * 3)
    with torch.no_grad():
        first, second = (jepa.predict(View(y, masks)).prediction for y in (x, torch.where(hidden, -x, x)))
    assert torch.equal(first, second)
