"""MoCo against recorded numbers of the released code, and against plain maths."""

from __future__ import annotations

import json
from pathlib import Path

import contrast_recordings as recordings
import pytest
import torch
import torch.nn.functional as F

from jepa_kit.encoders import ViT
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.heads import MLPHead
from jepa_kit.structures import View
from jepa_kit.target_updates import EMA, NoTargetEncoder
from projects.moco.check import main
from projects.moco.recipe import MoCo, MoCoV3

METHODS = Path(__file__).parents[1] / "fixtures" / "methods"


def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(image_size=(8, 8), patch_size=4, embed_dim=8, depth=1, num_heads=2)


def head(in_dim: int = 8, norm: str = "none") -> MLPHead:
    return MLPHead(in_dim=in_dim, hidden=6, out_dim=5, norm=norm)


def moco(encoder=None, target_update=None, **options) -> MoCo:
    return MoCo(encoder=encoder or vit(), head=head(), target_update=target_update or EMA(), **options)


def moco_v3(encoder=None, **options) -> MoCoV3:
    heads = {"head": head(norm="batch"), "prediction_head": head(5, "batch")}
    return MoCoV3(encoder=encoder or vit(), **heads, target_update=EMA(), **options)


def views(images: int = 3, seed: int = 0) -> list[View]:
    noise = torch.Generator().manual_seed(seed)
    return [View(torch.randn(images, 3, 8, 8, generator=noise)) for _ in range(2)]


def test_recorded_numbers_of_the_queue(capsys):
    assert main([str(METHODS / "moco"), "--tolerance", "1e-12"]) == 0
    printed = capsys.readouterr().out
    for quantity in ("call0: gradients", "call3: queue afterwards", "call3: pointer", "final momentum encoder"):
        assert quantity in printed
    assert "not read" not in printed


@pytest.mark.integration
def test_recorded_numbers_of_version_3_in_two_processes(capsys):
    assert main([str(METHODS / "moco_v3"), "--tolerance", "1e-12"]) == 0
    printed = capsys.readouterr().out
    for quantity in ("loss of q2 and k1", "gradient of q1", "predictor", "statistics of the projector"):
        assert quantity in printed
    assert "not read" not in printed


def test_other_settings_and_wrong_ones(tmp_path, capsys):
    path = recordings.moco(tmp_path / "other")
    assert main([str(path), "--tolerance", "1e-12"]) == 0
    content = json.loads(path.with_suffix(".json").read_text())
    settings = content["meta"]
    path.with_suffix(".json").write_text(json.dumps({**content, "meta": {**settings, "momentum": 0.6}}))
    assert main([str(path)]) == 1
    path.with_suffix(".json").write_text(json.dumps({**content, "meta": {**settings, "optimizer": "AdamW"}}))
    assert main([str(path)]) == 2
    assert (
        "meta.optimizer (='AdamW') must be 'SGD(lr, momentum NUMBER, weight decay NUMBER)'" in capsys.readouterr().err
    )


def test_the_queue_is_a_ring_of_the_last_keys():
    """Also if the images of a step, of which some may be unusable, do not divide it."""
    recipe = moco(queue=7)
    keys = []
    for step, images in enumerate((3, 3, 2, 3)):
        x = views(images, seed=step)
        keys += F.normalize(recipe.keys(x[1]), dim=1)
        recipe(*x)
    wanted = {(number % 7): key for number, key in enumerate(keys)}
    torch.testing.assert_close(recipe.queue, torch.stack([wanted[row] for row in range(7)]))
    assert recipe.pointer == 11 % 7
    assert {"queue", "pointer"} <= recipe.state_dict().keys()


def test_evaluation_leaves_the_queue_as_it_is():
    recipe = moco(queue=4).eval()
    before = recipe.queue.clone()
    recipe(*views())
    assert torch.equal(recipe.queue, before)


def test_a_step_that_is_not_finite_leaves_the_queue_as_it_is():
    recipe = moco(queue=6)
    optimizer = build_optimizer(recipe, name="sgd")
    train_step(recipe, optimizer, Hyper(0.1, 0.0, 0.9), views())
    before = {name: x.clone() for name, x in recipe.state_dict().items() if not name.startswith("target_")}
    bad = [View(torch.full_like(view.images, torch.nan)) for view in views()]
    train_step(recipe, optimizer, Hyper(0.1, 0.0, 0.9), bad)
    assert all(torch.equal(recipe.state_dict()[name], x) for name, x in before.items())
    assert recipe.pointer == 3


def test_version_3_predicts_the_keys_of_each_view_from_the_other():
    recipe = moco_v3()
    recipe.update_target(0.0)
    x = views()
    tokens = [recipe.encoder(view.images).unflatten(0, (3, 4)).mean(1) for view in x]
    projected = [recipe.head(h) for h in tokens]
    q, k = ([F.normalize(y, dim=1) for y in z] for z in (map(recipe.prediction_head, projected), projected))
    losses = [F.cross_entropy(q[i] @ k[1 - i].T / 0.2, torch.arange(3)) for i in range(2)]
    torch.testing.assert_close(recipe(*x).loss, 2 * 0.2 * (losses[0] + losses[1]))
    torch.testing.assert_close(recipe(*reversed(x)).loss, recipe(*x).loss)


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_trained_in_version_3(frozen):
    recipe = moco_v3(freeze_patch_embed=frozen)
    recipe(*views()).loss.backward()
    trained = {name for name, p in recipe.named_parameters() if p.grad is not None}
    names = {name for name, _ in recipe.named_parameters() if not name.startswith("target_")}
    assert trained == {name for name in names if not (frozen and "patch_embed" in name)}
    assert recipe.target_head.training
    assert recipe.target_encoder.training


def test_half_precision_does_not_round_the_cosines():
    recipe = moco(queue=9, temperature=0.01)
    q, k = torch.randn(2, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = recipe.logits(q, k)
    torch.testing.assert_close(rounded, recipe.logits(q, k), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature \(=0.0\) must be above 0"),
        ({"queue": 0}, r"queue \(=0\) must be at least 1"),
        ({"target_update": NoTargetEncoder()}, "target_update makes no target encoder, which this recipe needs"),
    ],
)
def test_options_that_are_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        moco(**options)


def test_a_queue_shorter_than_a_step():
    with pytest.raises(ValueError, match=r"queue \(=2\) must be at least the number of images in a step, 3"):
        moco(queue=2)(*views())


def test_an_encoder_without_patch_embedding():
    with pytest.raises(
        ValueError, match=r"freeze_patch_embed \(=True\) must be False: the encoder has no module patch"
    ):
        moco_v3(torch.nn.Linear(2, 2))
