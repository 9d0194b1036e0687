"""iBOT against recorded numbers of the released code, and what it rejects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jepa_kit.config import config_from_dict
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import build_recipe
from jepa_kit.structures import MaskBatch, Progress, View
from projects.ibot.check import main, masks_of
from projects.ibot.recipe import IBOT

METHODS = Path(__file__).parents[1] / "fixtures/methods"

RAW: dict[str, Any] = {
    "recipe": {"name": "ibot", "freeze_epochs": 1},
    "masker": {"name": "in_place", "masker": {"name": "random", "ratio": 0.3}},
    "encoder": {
        "name": "vit",
        "patch_size": 4,
        "embed_dim": 8,
        "depth": 1,
        "num_heads": 1,
        "class_token": True,
        "mask_token": True,
    },
    "head": {"name": "mlp", "layers": 2, "hidden": 8, "out_dim": 4},
    "prototype_head": {"name": "prototypes", "out_dim": 6},
    "target_update": {"name": "ema"},
    "data": {"image_size": 16, "views": [{"count": 2, "masked": True}, {"count": 2, "image_size": 8}]},
    "train": {"batch_size": 4, "epochs": 50},
}
NO_MASKS = (
    r"the first num_global \(=2\) views must have hidden patches, in one context for each image: "
    "set masked: true in their "
    "entry of data.views, and take the masker in_place"
)
PATCH_HEAD = {"patch_head": {"name": "prototypes", "out_dim": 6}}


def ibot(**changes: Any) -> IBOT:
    torch.manual_seed(0)
    recipe = build_recipe(config_from_dict({**RAW, **changes}))
    assert isinstance(recipe, IBOT)
    return recipe


def options(**changes: Any) -> dict[str, Any]:
    return RAW["recipe"] | changes


def masks(seed: int, share: float = 0.3) -> MaskBatch:
    return masks_of(torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(seed)) < share)


def views(*given: MaskBatch | None) -> list[View]:
    """Two large views, with these masks or with some, and two small ones."""
    noise = torch.Generator().manual_seed(0)
    both = given or (masks(1), masks(2))
    images = [torch.randn(4, 3, size, size, generator=noise) for size in (16, 16, 8, 8)]
    return [View(x, m) for x, m in zip(images, (*both, None, None), strict=True)]


@pytest.mark.parametrize("name", ["ibot", "ibot_step"])
def test_all_recorded_numbers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(METHODS / name)]) == 0
    assert "are within their tolerances" in capsys.readouterr().out


def change(folder: Path, name: str, meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Write a copy of a recording with other settings and tensors; return its path."""
    facts = json.loads((METHODS / f"{name}.json").read_text())
    facts["meta"] |= meta
    (folder / f"{name}.json").write_text(json.dumps(facts))
    save_file({**load_file(METHODS / f"{name}.safetensors"), **tensors}, folder / f"{name}.safetensors")
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "meta", "row"),
    [
        ("ibot", {"teacher_patch_temp": 0.08}, "call2: patch"),
        ("ibot", {"center_momentum2": 0.8}, "call0: centre of patches"),
        ("ibot", {"lambda1": 0.5}, "call0: loss"),
        ("ibot_step", {"layer_norm_eps": 1e-3}, "student_patch"),
        ("ibot_step", {"teacher_patch_temp": 0.04}, "gradients"),
    ],
)
def test_another_setting_is_a_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, meta: dict[str, Any], row: str
) -> None:
    assert main([change(tmp_path, name, meta, {})]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(row))
    assert "ABOVE" in line


@pytest.mark.parametrize(
    ("meta", "tensors", "message"),
    [
        ({"mim_start_epoch": 2}, {}, "mim_start_epoch (=2) must be 0: patches are hidden from the first epoch"),
        (
            {},
            {"teacher/head.last_layer2.weight_v": torch.ones(24, 16, dtype=torch.float64)},
            "head.last_layer2.weight_v differs from target_prototype_head.weight",
        ),
        (
            {},
            {"student/head.last_layer.weight_g": torch.full((24, 1), 2.0, dtype=torch.float64)},
            "head.last_layer.weight_g differs from prototype_head.scale",
        ),
        ({}, {"student/head.other": torch.ones(1)}, "the recording has a parameter 'head.other', which iBOT does not"),
        ({"hidden_dim": 8}, {}, "the recording's head.mlp.0.bias [32] does not fit its meta"),
        ({"depth": 1}, {}, "the recording's backbone.blocks.1.attn.proj.bias [32] does not fit its meta"),
        ({"depth": 3}, {}, "the recording lacks the weights of encoder.blocks.2.norm1.weight"),
    ],
)
def test_recordings_that_do_not_fit(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    meta: dict[str, Any],
    tensors: dict[str, Tensor],
    message: str,
) -> None:
    assert main([change(tmp_path, "ibot_step", meta, tensors)]) == 2
    assert message in capsys.readouterr().err


def plain_patch_term(recipe: IBOT, batch: list[View]) -> Tensor:
    """The patch term image by image, from scores of all patches."""
    terms = []
    for view in batch[:2]:
        assert view.masks is not None
        hidden = view.masks.context.hidden
        assert hidden is not None
        for image, of_image in zip(view.images, hidden.unflatten(0, (4, -1)), strict=True):
            shown = masks_of(of_image.view(1, 4, 4))
            student = recipe.scores(recipe.encode(image[None], [shown]).patches, recipe.get_submodule)
            teacher = recipe.scores(recipe.target_encoder.forward_tokens(image[None])[0].patches, recipe.network)
            errors = -((teacher / 0.04).softmax(-1) * (student / 0.1).log_softmax(-1)).sum(-1)  # [N]
            terms.append((errors * of_image).sum() / of_image.sum().clamp(min=1))
    return torch.stack(terms).mean()


def test_the_patch_term_is_the_mean_over_images_of_the_mean_over_hidden_patches() -> None:
    recipe = ibot()
    none = masks_of(torch.zeros(4, 4, 4))
    for batch in (views(), views(masks(1, 0.1), none)):
        assert batch[0].masks is not None
        recipe.eval()
        torch.testing.assert_close(recipe(*batch).terms["patch"], plain_patch_term(recipe, batch))
    assert recipe(*views(none, none)).terms["patch"] == 0


def test_terms_weights_and_figures() -> None:
    out = ibot(recipe=options(class_weight=2.0, patch_weight=0.5))(*views())
    assert out.prediction is None
    torch.testing.assert_close(out.loss, 2 * out.terms["class"] + 0.5 * out.terms["patch"])
    torch.testing.assert_close(out.figures["kl"], out.terms["class"] - out.figures["teacher_entropy"])
    assert out.figures.keys() == {"teacher_entropy", "patch_teacher_entropy", "kl"}


def test_only_the_student_sees_mask_tokens() -> None:
    recipe = ibot()
    out = recipe(*views())
    with torch.no_grad():
        recipe.target_encoder.mask_token.fill_(torch.nan)
    again = recipe.eval()(*views())
    assert again.loss.isfinite()
    out.loss.backward()
    assert recipe.encoder.mask_token.grad.any()


def update(recipe: IBOT, batch: list[View], epoch: int) -> dict[str, Tensor]:
    """Run one update and return the state before it."""
    before = {name: value.clone() for name, value in recipe.state_dict().items()}
    hyper = Hyper(lr=0.1, weight_decay=0.1, momentum=0.9)
    train_step(recipe, build_optimizer(recipe), hyper, batch, progress=Progress(epoch=epoch, epochs=3))
    return before


@pytest.mark.parametrize("epoch", [0, 1])
def test_both_kinds_of_prototypes_are_frozen_in_the_first_epoch(epoch: int) -> None:
    recipe = ibot(**PATCH_HEAD)
    before = update(recipe, views(), epoch)
    changed = {name for name, value in recipe.state_dict().items() if not torch.equal(value, before[name])}
    for head in ("prototype_head", "patch_head"):
        assert (f"{head}.weight" in changed) == (epoch == 1)
    assert {"encoder.mask_token", "head.layers.0.weight", "targets.centre", "patch_targets.centre"} <= changed


@pytest.mark.parametrize("shared", [True, False])
def test_prototypes_of_the_teacher(shared: bool) -> None:
    recipe = ibot(recipe=options(shared_teacher=shared), **PATCH_HEAD)
    followers = {name for name, _ in recipe.named_children() if name.startswith("target_")}
    heads = {"target_encoder", "target_head", "target_prototype_head"}
    assert followers == (heads if shared else heads | {"target_patch_head"})
    before = update(recipe, views(), 1)
    if not shared:
        wanted = before["target_patch_head.weight"].lerp(recipe.patch_head.weight, 0.1)
        torch.testing.assert_close(recipe.target_patch_head.weight, wanted, rtol=0, atol=1e-7)


def test_a_batch_that_is_not_finite_moves_no_centre() -> None:
    recipe, batch = ibot(), views()
    batch[0].images[0] = torch.nan
    before = update(recipe, batch, 1)
    for name in ("targets.centre", "patch_targets.centre"):
        assert torch.equal(recipe.get_buffer(name), before[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masker": None}, "masker is missing: give it a mapping with a name"),
        ({"prototype_head": None}, "prototype_head is missing: give it a mapping with a name"),
        (
            {"data": {"image_size": 16, "views": [{"count": 2}]}},
            "data.views must have an entry with masked: true, for the masker of 'ibot'",
        ),
        ({"encoder": RAW["encoder"] | {"class_token": False}}, "recipe: encoder.class_token must be true"),
        (
            {"target_update": {"name": "none"}},
            r"recipe: target_update makes no target encoder, which this recipe needs",
        ),
        ({"recipe": options(num_global=0)}, r"recipe: num_global \(=0\) must be at least 1 and finite"),
        ({"recipe": options(patch_weight=-1.0)}, r"recipe: patch_weight \(=-1.0\) must be at least 0 and finite"),
        ({"recipe": options(student_temperature=0.0)}, r"recipe: student_temperature \(=0.0\) must be above 0"),
        (
            {"patch_head": {"name": "prototypes", "out_dim": 5}},
            r"patch_head.out_dim \(=5\) must be prototype_head.out_dim \(=6\), because the teacher uses the latter",
        ),
    ],
)
def test_configs_that_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ibot(**changes)


@pytest.mark.parametrize(
    "given", [(masks(1), None), (masks(1), MaskBatch(*[masks(1).targets] * 2, (4, 4), torch.arange(4)))]
)
def test_views_without_hidden_patches(given: tuple[MaskBatch | None, ...]) -> None:
    with pytest.raises(ValueError, match=NO_MASKS):
        ibot()(*views(*given))


def test_several_contexts_of_an_image() -> None:
    batch = views()
    batch[0] = View(batch[0].images[:2], batch[0].masks)
    with pytest.raises(ValueError, match=NO_MASKS):
        ibot()(*batch)


def test_global_views_of_two_sizes() -> None:
    batch = views()
    masks_of_small = masks_of(torch.ones(4, 2, 2))
    with pytest.raises(
        ValueError, match=r"the first num_global \(=2\) views must have one size, not \[\(8, 8\), \(16, 16\)\]"
    ):
        ibot()(batch[0], View(batch[2].images, masks_of_small), batch[3])


def test_too_few_views() -> None:
    message = r"views \(=2 in all\) must be at least 2, and num_global \(=3\)"
    with pytest.raises(ValueError, match=message):
        ibot(recipe=options(num_global=3))(*views()[:2])
