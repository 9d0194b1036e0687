"""The equations against the released code's numbers, every legal recipe, and what a recipe refuses."""

from __future__ import annotations

import itertools
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from jepa_kit.config import Config, config_from_dict
from jepa_kit.encoders import ViT
from jepa_kit.engine.build import training_views
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.interop.official import encoder_from_official, predictor_from_official
from jepa_kit.losses import L2, SmoothL1, is_distance
from jepa_kit.predictors import ViTPredictor
from jepa_kit.recipe import JEPA
from jepa_kit.registry import LOSSES, TARGET_UPDATES, TARGETS, PartRegistry
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import MaskBatch, Output, PatchSets, View
from jepa_kit.target_updates import EMA, Frozen, NoTargetEncoder, Tied
from jepa_kit.targets import PixelTarget, RepresentationTarget

FIXTURE = Path(__file__).parent / "fixtures" / "released_step"

# --- against the released code ---


@lru_cache(maxsize=1)
def released() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads(FIXTURE.with_suffix(".json").read_text()), load_file(FIXTURE.with_suffix(".safetensors"))


def group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def released_jepa() -> JEPA:
    meta, tensors = released()[0]["meta"], released()[1]
    side = meta["img_size"]
    encoder = ViT(
        image_size=(side, side),
        patch_size=meta["patch_size"],
        embed_dim=meta["embed_dim"],
        depth=meta["depth"],
        num_heads=meta["num_heads"],
    )
    predictor = ViTPredictor(
        embed_dim=encoder.embed_dim,
        out_dim=encoder.embed_dim,
        grid=encoder.grid,
        width=meta["predictor_embed_dim"],
        depth=meta["predictor_depth"],
        num_heads=meta["predictor_num_heads"],
    )
    target = RepresentationTarget(embed_dim=encoder.embed_dim)
    jepa = JEPA(
        encoder=encoder,
        predictor=predictor,
        target=target,
        losses=[("smooth_l1", SmoothL1(), 1.0)],
        target_update=EMA(),
    ).double()
    encoder.load_state_dict(encoder_from_official(group(tensors, "init/encoder/")))
    predictor.load_state_dict(predictor_from_official(group(tensors, "init/predictor/")))
    assert jepa.target_encoder is not None
    jepa.target_encoder.load_state_dict(encoder_from_official(group(tensors, "init/target_encoder/")))
    return jepa


def released_masks(step: int) -> MaskBatch:
    meta, tensors = released()[0]["meta"], released()[1]
    context = tensors[f"masks/{step}/context/0"]  # [B, L]
    blocks = [tensors[f"masks/{step}/target/{j}"] for j in range(meta["num_target_blocks"])]
    image = torch.arange(len(context)).repeat(len(blocks))  # block by block, all images of block 1 first
    side = meta["img_size"] // meta["patch_size"]
    return MaskBatch(
        PatchSets.from_padded(context), PatchSets.from_padded(torch.cat(blocks), image), (side, side), image
    )


@lru_cache(maxsize=1)
def released_step() -> tuple[JEPA, Output]:
    jepa = released_jepa()
    out = jepa(View(released()[1]["images"][0], released_masks(0)))
    out.loss.backward()
    return jepa, out


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("context_encoder_output", lambda jepa, out: out.prediction.context),
        ("prediction", lambda jepa, out: out.prediction.prediction),
        ("target", lambda jepa, out: out.prediction.target),
        ("encoder_full_output", lambda jepa, out: jepa.encoder(released()[1]["images"][0])),
        ("target_encoder_output", lambda jepa, out: jepa.target_encoder(released()[1]["images"][0])),
    ],
)
def test_step_0_has_the_released_codes_outputs(name: str, ours: Any) -> None:
    theirs = released()[1][f"step0/{name}"].flatten(0, 1)  # [sets, L, D] -> [P, D]
    torch.testing.assert_close(ours(*released_step()), theirs, rtol=0, atol=1e-10)


def test_step_0_has_the_released_codes_loss() -> None:
    _, out = released_step()
    assert out.loss.item() == pytest.approx(released()[0]["trajectory"][0]["loss"], abs=1e-12)
    error = (out.prediction.prediction - out.prediction.target).square().mean()
    assert error.item() == pytest.approx(released()[0]["meta"]["step0_mean_squared_error"], abs=1e-12)


@pytest.mark.parametrize("part", ["encoder", "predictor"])
def test_step_0_has_the_released_codes_gradients(part: str) -> None:
    theirs = group(released()[1], f"step0/grad/{part}/")
    theirs = encoder_from_official(theirs) if part == "encoder" else predictor_from_official(theirs)
    ours = dict(getattr(released_step()[0], part).named_parameters())
    assert set(ours) == set(theirs)
    for name, p in ours.items():
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, theirs[name], rtol=0, atol=1e-10, msg=name)


# --- every recipe ---

BASE: dict[str, Any] = {
    "masker": {"name": "multiblock"},
    "encoder": {"name": "vit", "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path": 0.1},
    "predictor": {"name": "vit", "width": 12, "depth": 1, "num_heads": 2},
    "target": {"name": "representation"},
    "loss": {"name": "smooth_l1"},
    "target_update": {"name": "ema"},
    "data": {"image_size": [48, 64]},
}


def config_with(**changes: Any) -> Config:
    return config_from_dict({**BASE, **changes})


def draw(config: Config, batch_size: int = 3) -> tuple[Tensor, MaskBatch]:
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, *config.data.image_size)
    return images, build_masker(config)(np.arange(batch_size), seed=0, epoch=0)


def is_legal(target: str, update: str) -> bool:
    return update != "none" or not TARGETS.get(target).needs_encoder


def shipped(registry: PartRegistry) -> list[str]:
    """Return the parts of jepa_kit; tests of projects register others."""
    return [name for name in registry.names() if registry.get(name).__module__.startswith("jepa_kit.")]


DISTANCES = [name for name in shipped(LOSSES) if is_distance(LOSSES.get(name))]
COMBINATIONS = [
    c for c in itertools.product(shipped(TARGETS), DISTANCES, shipped(TARGET_UPDATES)) if is_legal(c[0], c[2])
]


@pytest.mark.parametrize(("target", "loss", "update"), COMBINATIONS)
def test_every_legal_recipe_trains_every_parameter(target: str, loss: str, update: str) -> None:
    config = config_with(target={"name": target}, loss={"name": loss}, target_update={"name": update})
    jepa = build_recipe(config)
    images, masks = draw(config)
    out = jepa(View(images, masks))
    assert out.loss.ndim == 0
    assert torch.isfinite(out.loss)
    assert out.prediction.prediction.shape == (masks.targets.num_patches, jepa.target.out_dim)
    assert not out.prediction.target.requires_grad
    out.loss.backward()
    for name, p in jepa.named_parameters():
        if name.startswith("target_encoder."):
            assert p.grad is None, name
            assert not p.requires_grad, name
        else:
            assert p.grad is not None, f"no gradient for {name}"
            assert torch.isfinite(p.grad).all(), name
    trained = {n for n, p in jepa.named_parameters() if p.requires_grad}
    assert all(n.startswith(("encoder.", "predictor.")) for n in trained)


@pytest.mark.parametrize("update", TARGET_UPDATES.names())
def test_evaluates_the_target_encoder_or_the_context_encoder_where_there_is_none(update: str) -> None:
    jepa = build_recipe(config_with(target={"name": "pixel"}, target_update={"name": update}))
    assert jepa.encoder_for("context") is jepa.encoder
    own = jepa.target_encoder is not None
    assert jepa.encoder_for("target") is (jepa.target_encoder if own else jepa.encoder)
    assert own is (update in ("ema", "frozen"))


def test_without_stop_gradient_the_target_is_trained() -> None:
    """A tied encoder that is asked for its own output: the gradient is that of both sides."""
    config = config_with(target_update={"name": "tied", "stop_gradient": False})
    jepa = build_recipe(config).eval()
    images, masks = draw(config)
    both = torch.autograd.grad(jepa(View(images, masks)).loss, list(jepa.encoder.parameters()))
    jepa.target_update = Tied(stop_gradient=True)
    one = torch.autograd.grad(jepa(View(images, masks)).loss, list(jepa.encoder.parameters()))
    assert any(not torch.allclose(a, b) for a, b in zip(both, one, strict=True))


@pytest.mark.parametrize("encoder", ["vit", "conv"])
def test_a_tied_encoder_gets_all_gradients_under_autocast(encoder: str) -> None:
    """Older torch leaves out the weights whose copies in bf16 were made for targets, without gradients."""
    own = BASE["encoder"] if encoder == "vit" else {"name": "conv", "patch_size": 8, "embed_dim": 16, "depth": 2}
    config = config_with(encoder=own, target_update={"name": "tied"})
    jepa = build_recipe(config).eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss = jepa(View(*draw(config))).loss
    torch.autograd.grad(loss, list(jepa.encoder.parameters()))  # an error for a parameter without a gradient


def test_a_tied_encoder_is_in_the_weights_once() -> None:
    jepa = build_recipe(config_with(target_update={"name": "tied"}))
    assert not any(k.startswith("target_encoder") for k in jepa.state_dict())


def test_terms_add_up_with_their_weights() -> None:
    config = config_with(loss=[{"name": "smooth_l1", "weight": 0.5}, {"name": "cosine", "weight": 2.0}])
    out = build_recipe(config)(View(*draw(config)))
    assert list(out.terms) == ["smooth_l1", "cosine"]
    assert out.loss.item() == pytest.approx(0.5 * out.terms["smooth_l1"].item() + 2 * out.terms["cosine"].item())


def test_an_image_costs_the_same_in_any_batch() -> None:
    """Ragged contexts and blocks: the loss of a batch is the mean of the losses of its images."""
    config = config_with(encoder={**BASE["encoder"], "drop_path": 0.0})
    jepa = build_recipe(config).double()
    images, masks = draw(config)
    images = images.double()
    assert not masks.context.uniform
    assert not masks.targets.uniform
    together = jepa(View(images, masks)).loss.item()
    alone = []
    for b in range(len(images)):
        one = build_masker(config)(np.array([b]), seed=0, epoch=0)
        alone.append(jepa(View(images[b][None], one)).loss.item())
    assert together == pytest.approx(sum(alone) / len(alone), abs=1e-12)


def test_the_target_encoder_has_no_stochastic_depth() -> None:
    jepa = build_recipe(config_with(encoder={**BASE["encoder"], "drop_path": 0.9}))
    assert jepa.target_encoder is not None
    assert jepa.training
    assert not jepa.target_encoder.training
    assert not jepa.train().target_encoder.training  # type: ignore[union-attr]
    assert not jepa.eval().encoder.training
    images, masks = draw(config_with())
    target = jepa.train()(View(images, masks)).prediction.target
    assert torch.equal(jepa(View(images, masks)).prediction.target, target)


def test_update_target_moves_the_target_encoder_towards_the_encoder() -> None:
    jepa = build_recipe(config_with(target_update={"name": "ema", "momentum": [0.9, 1.0]}))
    assert jepa.target_encoder is not None
    with torch.no_grad():
        for p in jepa.encoder.parameters():
            p.add_(1.0)
    before = [p.clone() for p in jepa.target_encoder.parameters()]
    jepa.update_target(jepa.momentum(0.0))
    for old, new in zip(before, jepa.target_encoder.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)
    assert jepa.momentum(0.5) == pytest.approx(0.95)


def test_half_precision_ends_before_the_distance() -> None:
    config = config_with()
    jepa = build_recipe(config)
    with torch.autocast("cpu", torch.bfloat16):
        out = jepa(View(*draw(config)))
    assert out.loss.dtype == torch.float32
    assert out.prediction.prediction.dtype == torch.float32
    assert out.prediction.target.dtype == torch.float32


def test_builds_without_memory_for_its_weights() -> None:
    config = config_with(encoder={"name": "vit", "patch_size": 16, "size": "gigantic"})
    with torch.device("meta"):
        jepa = build_recipe(config)
    assert jepa.encoder.embed_dim == 1664
    assert {p.device.type for p in jepa.parameters()} == {"meta"}


def test_the_same_seed_builds_the_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_recipe(config_with()).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


# --- refusals ---


def parts(**changes: Any) -> dict[str, Any]:
    encoder = ViT(image_size=(32, 32), patch_size=8, embed_dim=16, depth=1, num_heads=2)
    predictor = ViTPredictor(embed_dim=16, out_dim=16, grid=(4, 4), width=8, depth=1, num_heads=2)
    target = RepresentationTarget(embed_dim=16)
    losses = [("l2", L2(), 1.0)]
    return {
        "encoder": encoder,
        "predictor": predictor,
        "target": target,
        "losses": losses,
        "target_update": EMA(),
        **changes,
    }


def test_refuses_no_loss() -> None:
    with pytest.raises(ValueError, match=r"losses \(=\[\]\) must contain at least one term"):
        JEPA(**parts(losses=[]))


def test_refuses_two_losses_of_one_name() -> None:
    with pytest.raises(ValueError, match=r"losses \(=\['l2', 'l2'\]\) must have different names"):
        JEPA(**parts(losses=[("l2", L2(), 1.0), ("l2", L2(), 0.5)]))


def test_refuses_a_representation_without_a_target_encoder() -> None:
    message = r"target needs a target encoder, and target_update makes none; take target_update=\{name: ema\}, or "
    with pytest.raises(ValueError, match=message):
        JEPA(**parts(target_update=NoTargetEncoder()))
    JEPA(**parts(target_update=Tied()))
    JEPA(**parts(target_update=Frozen()))
    JEPA(**parts(target=PixelTarget(patch_size=8), target_update=NoTargetEncoder()))


def test_refuses_masks_of_another_grid_than_the_images() -> None:
    sets = PatchSets(torch.arange(2), torch.zeros(1).long(), SetLengths([2]))
    masks = MaskBatch(sets, sets, (4, 4), torch.zeros(1).long())
    with pytest.raises(ValueError, match=r"masks.grid \(=\(4, 4\)\) must be that of the images \(=\(4, 6\)\)"):
        JEPA(**parts())(View(torch.zeros(1, 3, 32, 48), masks))


def test_refuses_an_encoder_that_is_neither() -> None:
    with pytest.raises(ValueError, match=r"which \(='teacher'\) must be 'target' or 'context'"):
        JEPA(**parts()).encoder_for("teacher")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {**BASE["encoder"], "num_heads": 3}}, r"encoder: num_heads \(=3\) must divide the width \(=16\)"),
        ({"data": {"image_size": 50}}, r"encoder: patch_size \(=8\) must divide the height \(=50\)"),
        ({"predictor": {**BASE["predictor"], "width": 10}}, r"predictor: width \(=10\) must be a multiple of 4"),
        ({"target": {"name": "representation", "layers": 3}}, r"target: layers \(=3\) must be at most the encoder's"),
        ({"loss": {"name": "smooth_l1", "beta": 0.0}}, r"loss: beta \(=0.0\) must be above 0"),
        (
            {"target_update": {"name": "ema", "momentum": [2.0, 1.0]}},
            r"^target_update: momentum \(=\(2.0, 1.0\)\)",
        ),
        ({"target_update": {"name": "none"}}, r"recipe: target needs a target encoder"),
        ({"encoder": {**BASE["encoder"], "in_chans": 1}}, r"encoder: in_chans \(=1\) must be 3: the data are colour"),
        ({"target": {"name": "pixel", "in_chans": 0}}, r"target: in_chans \(=0\) must be 3: the data are colour"),
    ],
)
def test_says_which_slot_of_a_config_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_recipe(config_with(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masker": {"name": "multiblock", "num_targets": 0}}, r"masker: num_targets \(=0\) must be at least 1"),
        ({"encoder": {**BASE["encoder"], "patch_size": 7}}, r"encoder: patch_size \(=7\) must divide"),
        ({"encoder": {**BASE["encoder"], "patch_size": 16}}, r"masker: grid \(=\(3, 4\)\) must be"),
    ],
)
def test_says_what_is_wrong_with_a_masker(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_masker(config_with(**changes))


def test_the_masker_has_the_grid_of_the_config() -> None:
    assert build_masker(config_with()).grid == (6, 8)


def test_every_part_reports_its_range() -> None:
    """At once, each under its own name, whichever part is built first."""
    config = config_with(
        masker={"name": "multiblock", "num_targets": 0},
        encoder={"name": "vit", "patch_size": 4, "embed_dim": 16, "depth": 0, "num_heads": 2},
        predictor={"name": "vit", "width": 6, "depth": 1, "num_heads": 2},
        target={"name": "representation", "layers": 0},
        loss={"name": "smooth_l1", "beta": -1.0},
        data={"image_size": [24, 32], "transforms": [{"name": "resize"}, {"name": "horizontal_flip", "p": 7}]},
    )
    for build in (build_masker, build_recipe, training_views):
        with pytest.raises(ConfigError) as caught:
            build(config)
        starts = sorted(line.split(" (=")[0] for line in caught.value.problems)
        data = "data: transforms[1]: p"
        assert starts == [
            data,
            "encoder: depth",
            "loss: beta",
            "masker: num_targets",
            "predictor: width",
            "target: layers",
        ]


@pytest.mark.parametrize(("slot", "width"), [("encoder", "embed_dim"), ("predictor", "width")])
def test_weights_larger_than_the_machine(slot: str, width: str) -> None:
    part = {
        "name": "vit",
        "depth": 1000,
        "num_heads": 64,
        width: 65536,
        **({"patch_size": 4} if slot == "encoder" else {}),
    }
    with pytest.raises(ConfigError, match=rf"{slot}: depth \(=1000\) blocks of {width} \(=65536\) need [\d,]+ GB for"):
        build_recipe(config_with(**{slot: part}))


def test_an_image_of_too_many_patches() -> None:
    with pytest.raises(ConfigError, match=r"data.image_size \(=\[60000, 60000\]\) .* gives 56,250,000 patches"):
        config_with(data={"image_size": 60000})


class Told(torch.nn.Module):
    """Predicts the action of each image, or that there is none."""

    uses_action = True

    def forward(self, context: Tensor, masks: MaskBatch, *, action: Tensor | None) -> Tensor:
        none = torch.full((len(masks.context), 8), -1.0)
        return (none if action is None else action)[masks.targets.image_of_token]


def test_a_predictor_is_given_the_action_that_it_uses() -> None:
    config = config_with(masker={"name": "random"})
    jepa = build_recipe(config)
    jepa.predictor = Told()
    images, masks = draw(config)
    action = torch.arange(24.0).view(3, 8)
    guess = jepa.predict(View(images, masks, action)).prediction
    assert torch.equal(guess, action[masks.targets.image_of_token])
    assert bool((jepa.predict(View(images, masks)).prediction == -1).all())


def test_targets_of_other_images_than_those_of_the_context() -> None:
    config = config_with(masker={"name": "random"})
    jepa = build_recipe(config).eval()
    images, masks = draw(config)
    other = torch.randn_like(images)
    found, own, of_other = (
        jepa.predict(View(images, masks), of=other),
        jepa.predict(View(images, masks)),
        jepa.predict(View(other, masks)),
    )
    assert torch.equal(found.prediction, own.prediction)
    assert torch.equal(found.target, of_other.target)
    assert not torch.equal(found.target, own.target)
