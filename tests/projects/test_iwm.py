"""IWM against float64 formulas: conditioning, action, loss and mean reciprocal ranks; the tool; every message."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import erf
from scipy.stats import rankdata
from torch import Tensor, nn

import projects.iwm.predictor
import projects.iwm.recipe
from jepa_kit.config import Config, load_config
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.transforms import build_pipeline, normalize
from jepa_kit.engine.checkpoint.format import Checkpoint, save_checkpoint
from jepa_kit.evaluation.features import LoadedRun
from jepa_kit.evaluation.health.measure import EPOCH
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.losses import L2
from jepa_kit.recipe import JEPA
from jepa_kit.structures import MaskBatch, Prediction, View
from jepa_kit.tools import make_shards
from projects.iwm import equivariance as tool
from projects.iwm.measure import bank_of, chance, equivariance, figures, reciprocal_ranks
from projects.iwm.recipe import difference

QUICK = Path(__file__).parents[2] / "projects" / "iwm" / "configs" / "quick.yaml"
SMALL = ["encoder.embed_dim=12", "encoder.depth=2", "encoder.num_heads=2", "predictor.width=8", "predictor.num_heads=2"]
NO_ACTION = "predictor={name: vit, width: 8, depth: 2, num_heads: 2}"
CPU = torch.device("cpu")


def config_of(*overrides: str) -> Config:
    return load_config(QUICK, [*SMALL, "train.device=cpu", *overrides])


def made(config: Config) -> Any:
    torch.manual_seed(0)
    jepa: Any = build_recipe(config)
    nn.init.normal_(jepa.target_encoder.blocks[0].attn.proj.weight)
    for part in jepa.predictor.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.3)
    return jepa.eval().double()


def two_views(config: Config, count: int = 3) -> tuple[View, View]:
    """A source and a target of noise, with ragged masks and actions."""
    noise = torch.Generator().manual_seed(1)
    source, target = torch.randn(2, count, 3, 64, 64, generator=noise, dtype=torch.float64)
    a, b = torch.randn(2, count, config.data.action_size, generator=noise)
    masks = build_masker(config)(np.arange(count), seed=0, epoch=0)
    return View(source, masks, a), View(target, None, b)


def mlp(layers: nn.Module, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Three linear layers with GELUs between them."""
    linear = [m for m in layers.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 3
    for k, m in enumerate(linear):
        x = x @ m.weight.detach().numpy().T + m.bias.detach().numpy()
        x = x * (1 + erf(x / np.sqrt(2))) / 2 if k < 2 else x
    return x


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("iwm") / "test"
    assert make_shards.main(["synthetic:scenes", str(folder), "--num-scenes", "6", "--image-size", "64"]) == 0
    return str(folder)


def test_features_mix_the_action_with_each_mask_token() -> None:
    config = config_of()
    jepa = made(config)
    source, _ = two_views(config)
    masks, action = source.masks, source.action
    assert masks is not None
    assert action is not None
    assert not masks.targets.uniform
    vit = jepa.predictor.vit
    s_x = torch.randn(masks.context.num_patches, 12, dtype=torch.float64)
    with torch.no_grad():
        found = jepa.predictor(s_x, masks, action=action)
        without = jepa.predictor(s_x, masks, action=None)
        seen, _ = vit.tokens(s_x, masks, None)
        mask_token, positions = (x.double().numpy() for x in (vit.mask_token, vit.pos_embed))
        for a, result in ((action.double().numpy(), found), (np.zeros(action.shape), without)):
            rows = []
            for image, patches in enumerate(masks.targets.split()):
                beside = [np.concatenate([mask_token[0] + positions[p], a[image]]) for p in patches.tolist()]
                rows.append(mlp(jepa.predictor.mix, np.stack(beside)))
            expected = vit.run(seen, torch.from_numpy(np.concatenate(rows)), masks)
            torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)
    assert float((found - without).abs().mean()) > 1e-3


def test_sequence_puts_the_action_before_each_context() -> None:
    config = config_of("predictor.conditioning=sequence")
    jepa = made(config)
    source, _ = two_views(config)
    masks, action = source.masks, source.action
    assert masks is not None
    assert action is not None
    assert not masks.context.uniform
    vit = jepa.predictor.vit
    s_x = torch.randn(masks.context.num_patches, 12, dtype=torch.float64)
    with torch.no_grad():
        found = jepa.predictor(s_x, masks, action=action)
        seen, hidden = vit.tokens(s_x, masks, None)
        tokens = torch.from_numpy(mlp(jepa.predictor.mix, action.double().numpy()))
        parts = [
            torch.cat([a[None], x]) for a, x in zip(tokens, seen.split(masks.context.lengths.on_host), strict=True)
        ]
        expected = vit.run(torch.cat(parts), hidden, masks)
        none = jepa.predictor(s_x, masks, action=None)
        zero = jepa.predictor(s_x, masks, action=torch.zeros_like(action))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(none, zero)
    assert float((found - none).abs().mean()) > 1e-3


def test_the_loss_is_of_the_other_view() -> None:
    """|s_hat_y - s_y|^2 / D with the layer-normalised tokens of the target's view, averaged by image."""
    config = config_of()
    jepa = made(config)
    source, target = two_views(config)
    masks = source.masks
    assert masks is not None
    out = jepa(source, target)
    assert target.action is not None
    assert source.action is not None
    with torch.no_grad():
        tokens = jepa.target_encoder(target.images).view(3, 64, 12).numpy()
        guess = jepa.predictor(jepa.encoder(source.images, masks.context), masks, action=target.action - source.action)
    centred = tokens - tokens.mean(-1, keepdims=True)
    s_y = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)
    losses = []
    for image, (rows, patches) in enumerate(
        zip(guess.split(masks.targets.lengths.on_host), masks.targets.split(), strict=True)
    ):
        losses.append(np.square(rows.numpy() - s_y[image, patches.numpy()]).mean())
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-9)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in jepa.predictor.parameters())


def test_the_action_is_the_difference_of_the_views() -> None:
    """Crops agree, so that their numbers cancel; jitter, grey and solarisation of the source are taken back."""
    (_, one), (_, two) = config_of().data.entries()
    assert two.same_draws == ("random_resized_crop",)
    actions = []
    draws = [0.1, 0.2, 0.3, 0.4, *[0.9] * 18]  # of the crop
    for view, jitter in ((one, [0.0, 0.25, 0.5, 0.75, 1.0]), (two, [0.79, 1.0, 0.0, 0.5, 0.0])):
        pipeline = build_pipeline(view.transforms or (), image_size=(64, 64))
        crop, colours = pipeline.transforms[0], [*jitter, *[0.5] * 4, 0.1, 0.1]
        image = np.zeros((64, 64, 3), dtype=np.uint8)
        action: list[float] = []
        pipeline.apply(image, [*draws[: crop.num_draws], *colours], action)
        actions.append(torch.tensor([action]))
    found = difference(*actions)
    assert found is not None
    # factors 0.6 + 0.8 u, hue 0.1 (2 u - 1); differences of u: 0.75, -0.5, -0.25 and -1
    expected = [0.0] * 4 + [0.0, 0.6, -0.4, -0.2, -0.2] + [-1.0, -1.0]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_ranks_agree_with_scipy() -> None:
    random = np.random.default_rng(0)
    distances = random.integers(0, 12, (40, 40)).astype(float)  # with ties
    expected = [1 / rankdata(row)[m] for m, row in enumerate(distances)]
    np.testing.assert_allclose(reciprocal_ranks(torch.from_numpy(distances)).numpy(), expected, rtol=1e-14)


def test_the_value_by_chance() -> None:
    """Over all orders of four targets, and in simulations of 256; it is also that of one prediction for all targets."""
    orders = list(itertools.permutations(range(1, 5)))
    assert chance(4) == pytest.approx(float(sum(Fraction(1, order[0]) for order in orders) / len(orders)))
    random = np.random.default_rng(0)
    simulated = [float(reciprocal_ranks(torch.from_numpy(random.random((256, 256)))).mean()) for _ in range(40)]
    assert chance(256) == pytest.approx(np.mean(simulated), rel=0.05)
    row = torch.from_numpy(random.random(256))
    assert float(reciprocal_ranks(row.expand(256, 256)).mean()) == pytest.approx(chance(256), rel=1e-12)


def test_figures() -> None:
    values = np.array([[0.1, 0.5], [0.2, 0.5], [0.6, 0.8]])
    means = {"mrr": 0.3, "error": np.sqrt(0.07 / 3), "explained": 0.6, "explained_error": 0.1}
    assert figures(values, 4) == pytest.approx({**means, "images": 3, "bank": 4, "chance": 25 / 48})


def test_a_bank_has_one_crop_and_every_change_of_colour() -> None:
    transforms = [
        {"name": "random_resized_crop"},
        {"name": "horizontal_flip"},
        {"name": "color_jitter", "p": 0.01},
        {"name": "grayscale", "p": 0.0},
    ]
    pipeline = build_pipeline(transforms, image_size=(64, 64))
    draws, clean = bank_of(pipeline, np.arange(5), seed=3)
    image = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    actions: list[list[float]] = [[] for _ in range(6)]
    pixels = [pipeline.apply(image, row.tolist(), a) for row, a in zip([clean, *draws], actions, strict=True)]
    assert len({tuple(action[:5]) for action in actions}) == 1  # crop and flip
    assert [action[5] for action in actions] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # whether there is a jitter
    assert actions[0][5:] == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert len({tuple(action[5:10]) for action in actions}) == 6
    assert all(action[10] == 0 for action in actions)  # p is 0
    assert len({pixel.tobytes() for pixel in pixels}) == 6


def by_hand(jepa: Any, config: Config, dataset: ShardDataset, sample: int, bank: int, seed: int) -> list[float]:
    """The mean reciprocal rank of an image, and R^2 of the differences, one prediction at a time."""
    entry = config.data.entries()[1][1]
    pipeline = build_pipeline(entry.transforms or (), image_size=(64, 64))
    draws, clean = bank_of(pipeline, sample * bank + np.arange(bank), seed=seed)
    before: list[float] = []
    x, masks = pipeline.apply(dataset.image(sample), clean.tolist(), before), build_masker(config)
    own = masks(np.array([sample]), seed=seed, epoch=EPOCH)

    def tensor(pixels: NDArray[np.uint8]) -> Tensor:
        return normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], config.data.mean, config.data.std)

    guesses, truths = [], []
    for row in draws:
        after: list[float] = []
        y = tensor(pipeline.apply(dataset.image(sample), row.tolist(), after))
        action = torch.from_numpy(np.subtract(after, before)[None]).float()
        with torch.no_grad():
            more = {"action": action} if hasattr(jepa.predictor, "uses_action") else {}
            guesses.append(jepa.predictor(jepa.encoder(tensor(x), own.context), own, **more).double().numpy())
            truths.append(jepa.targets_at(y, own.targets).double().numpy())
    ranks = [rankdata([np.linalg.norm(guess - truth) for truth in truths])[m] for m, guess in enumerate(guesses)]
    moves, changes = (np.stack(x) - np.mean(x, axis=0) for x in (guesses, truths))
    return [np.mean(1 / np.array(ranks)), 1 - np.square(moves - changes).sum() / np.square(changes).sum()]


@pytest.mark.parametrize("overrides", [[], ["masker={name: multiblock}"]], ids=["one target set", "four target sets"])
def test_equivariance_agrees_with_one_prediction_at_a_time(shards: str, overrides: list[str]) -> None:
    config = config_of(*overrides)
    jepa = made(config).float()
    dataset = ShardDataset(shards)
    run = LoadedRun(config, jepa, 0)
    found = equivariance(run, dataset, np.array([4, 1]), bank=6, seed=2, device=CPU)
    expected = [by_hand(jepa, config, dataset, sample, 6, 2) for sample in (4, 1)]
    np.testing.assert_allclose(found[:, 0], np.array(expected)[:, 0], rtol=1e-12)
    np.testing.assert_allclose(found[:, 1], np.array(expected)[:, 1], atol=1e-6)


def test_equivariance_without_an_action_is_the_value_by_chance(shards: str) -> None:
    config = load_config(QUICK, [*SMALL[:3], NO_ACTION])
    run = LoadedRun(config, made(config).float(), 0)
    found = equivariance(run, ShardDataset(shards), np.arange(3), bank=16, seed=0, device=CPU)
    np.testing.assert_allclose(found[:, 0], chance(16), rtol=1e-12)
    np.testing.assert_allclose(found[:, 1], 0, atol=1e-6)


def test_equivariance_of_right_predictions_is_1(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    jepa = made(config).float()

    def right(view: View, of: Tensor) -> Prediction:
        masks: Any = view.masks
        truth = jepa.targets_at(of, masks.targets)
        return Prediction(truth + 1e-4, truth, truth, masks)

    monkeypatch.setattr(jepa, "predict", right)
    found = equivariance(LoadedRun(config, jepa, 0), ShardDataset(shards), np.arange(2), bank=8, seed=0, device=CPU)
    assert found[:, 0].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(found[:, 1], 1, atol=1e-6)


def saved(folder: Path, *overrides: str) -> str:
    config = load_config(QUICK, [*SMALL[:3], "train.device=cpu", *overrides])
    folder.mkdir()
    torch.manual_seed(0)
    save_checkpoint(folder, Checkpoint(3, build_recipe(config).state_dict(), {}, config.to_dict(), {}, {}))
    return str(folder)


def test_the_tool(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [saved(tmp_path / "a"), saved(tmp_path / "b", NO_ACTION)]
    file = tmp_path / "figures.json"
    few = ["--shards", shards, "--images", "3", "--bank", "8"]
    assert tool.main(["--checkpoint", *names, *few, "--output", str(file)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{names[0]}, step 3, predictor iwm: MRR 0.")
    assert second == (
        f"{names[1]}, step 3, predictor vit: MRR 0.340 +- 0.000 (by chance 0.340), explained 0.00 +- 0.00; "
        "3 images, 8 targets each"
    )
    content = json.loads(file.read_text())
    assert content["equivariance"][1]["mrr"] == pytest.approx(chance(8))
    assert [entry["checkpoint"] for entry in content["equivariance"]] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "1"], "--images (=1) must be at least 2"),
        (["--bank", "1"], "--bank (=1) must be at least 2"),
        ([], "RUN must be a run of the recipe 'iwm', which has two views, not of 'jepa'"),
    ],
)
def test_mistakes_of_the_command(
    arguments: list[str], message: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(QUICK.parents[2] / "mae" / "configs" / "quick.yaml", ["encoder.depth=1", "predictor.depth=1"])
    save_checkpoint(tmp_path, Checkpoint(3, build_recipe(config).state_dict(), {}, config.to_dict(), {}, {}))
    assert tool.main(["--checkpoint", str(tmp_path), "--shards", shards, *arguments]) == 2
    assert f"equivariance.py: {message.replace('RUN', str(tmp_path))}" in capsys.readouterr().err


def test_messages() -> None:
    config = config_of()
    jepa = made(config)
    source, target = two_views(config)
    a, masks = source.action, source.masks
    assert a is not None
    assert masks is not None
    wrong = "data.views must have masked: true in the first view, the source, and not in the second"
    small = View(target.images[..., :32, :32], None, a)
    actions = "must be of the same transforms, with action: true in both views; p: 0 leaves a transform out of a view"
    for views, message in (
        ((View(source.images, None, a), target), wrong),
        ((source, View(target.images, masks, a)), wrong),
        ((source, small), "the views' image_size (=[(64, 64), (32, 32)]) must be the same, because patches correspond"),
        ((source, View(target.images)), f"the views' actions (of {a.shape[1]} and 0 numbers) {actions}"),
        ((source, View(target.images, None, a[:, 1:])), f"(of {a.shape[1]} and {a.shape[1] - 1} numbers) {actions}"),
        (
            (View(source.images, masks, a[:, 1:]), View(target.images, None, a[:, 1:])),
            f"the action (of {a.shape[1] - 1} numbers) must have action_size (={a.shape[1]})",
        ),
    ):
        with pytest.raises(ValueError) as error:
            jepa(*views)
        assert message in str(error.value)
    other: Any = SimpleNamespace(grid=(4, 4))
    with pytest.raises(ValueError, match=r"masks.grid \(=\(4, 4\)\) must be the predictor's \(=\(8, 8\)\)"):
        jepa.predictor(torch.zeros(1, 12), other, action=None)
    sizes: dict[str, Any] = {"embed_dim": 12, "out_dim": 12, "grid": (8, 8), "width": 8, "depth": 1, "num_heads": 2}
    for options, message in (
        ({"action_size": 0}, r"action_size \(=0\) must be at least 1: data.views needs action: true"),
        ({"action_size": 3, "conditioning": "none"}, r"conditioning \(='none'\) must be one of 'features', 'sequence'"),
        ({"action_size": 3, "layers": 0}, r"layers \(=0\) must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            projects.iwm.predictor.ActionPredictor(**sizes, **options)


def test_a_whole_view_has_no_action() -> None:
    """Health and pictures predict an image from itself: the action is 0."""
    config = config_of()
    jepa = made(config)
    assert isinstance(jepa, JEPA)
    source, _ = two_views(config)
    masks: MaskBatch | None = source.masks
    assert source.action is not None
    with torch.no_grad():
        alone = jepa.predict(View(source.images, masks))
        zero = jepa.predict(View(source.images, masks, torch.zeros_like(source.action)))
        twice = jepa(source, View(source.images, None, source.action))
    assert torch.equal(alone.prediction, zero.prediction)
    assert float(twice.loss) == pytest.approx(float(L2()(alone)), rel=1e-12)
