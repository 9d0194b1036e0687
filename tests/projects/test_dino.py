"""DINO against recorded numbers of the released code, and what it rejects."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jepa_kit.config import config_from_dict
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import build_recipe
from jepa_kit.structures import Progress, View
from projects.dino.check import main
from projects.dino.recipe import DINO

METHODS = Path(__file__).parents[1] / "fixtures/methods"

RAW: dict[str, Any] = {
    "recipe": {"name": "dino", "freeze_epochs": 1},
    "encoder": {"name": "vit", "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "class_token": True},
    "head": {"name": "mlp", "layers": 2, "hidden": 8, "out_dim": 4, "norm": "batch"},
    "prototype_head": {"name": "prototypes", "out_dim": 6},
    "target_update": {"name": "ema"},
    "data": {"image_size": 16, "views": [{"count": 2}, {"count": 2, "image_size": 8}]},
    "train": {"batch_size": 4, "epochs": 50},
}


def dino(**changes: Any) -> DINO:
    torch.manual_seed(0)
    recipe = build_recipe(config_from_dict({**RAW, **changes}))
    assert isinstance(recipe, DINO)
    return recipe


def views(*sizes: int) -> list[View]:
    noise = torch.Generator().manual_seed(0)
    return [View(torch.randn(4, 3, size, size, generator=noise)) for size in sizes or (16, 16, 8, 8)]


def options(**changes: Any) -> dict[str, Any]:
    return RAW["recipe"] | changes


@pytest.mark.parametrize("name", ["dino", "dino_step"])
def test_all_recorded_numbers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(METHODS / name)]) == 0
    assert "are within their tolerances" in capsys.readouterr().out


def change(folder: Path, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    """Write a copy of a recording with other tensors and other settings; return its path."""
    facts = json.loads((METHODS / f"{name}.json").read_text())
    facts["meta"] |= meta
    (folder / f"{name}.json").write_text(json.dumps(facts))
    save_file({**load_file(METHODS / f"{name}.safetensors"), **tensors}, folder / f"{name}.safetensors")
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "meta", "row"),
    [
        ("dino", {"student_temp": 0.11}, "call0: loss"),
        ("dino", {"center_momentum": 0.8}, "call0: centre afterwards"),
        ("dino", {"clip": 2.0}, "clipped gradient of the weight"),
        ("dino_step", {"freeze_last_layer": 0}, "9 steps: loss"),
        ("dino_step", {"clip_grad": 0.31}, "final student"),
        ("dino_step", {"momentum_teacher": 0.98}, "final teacher"),
    ],
)
def test_another_setting_is_a_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, meta: dict[str, Any], row: str
) -> None:
    assert main([change(tmp_path, name, {}, meta)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(row))
    assert "ABOVE" in line


def head_of(meta: dict[str, Any], noise: torch.Generator) -> dict[str, Tensor]:
    """What a recording has of a projection head, computed with torch's own layers; in training mode."""
    widths = [meta["in_dim"], *[meta["hidden_dim"]] * (meta["nlayers"] - 1), meta["bottleneck_dim"]]
    layers: list[nn.Module] = []
    for i, (width, following) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(width, following)]
        if i < meta["nlayers"] - 1:
            layers += [nn.BatchNorm1d(following), nn.GELU()]
    single = len(layers) == 1
    mlp = (layers[0] if single else nn.Sequential(*layers)).double()
    last = nn.Linear(widths[-1], meta["head_out"], bias=False).double()
    scale = torch.rand(meta["head_out"], 1, dtype=torch.float64, generator=noise).requires_grad_()
    state = {f"mlp.{name}": value.clone() for name, value in mlp.state_dict().items()}
    state |= {"last_layer.weight_v": last.weight.detach(), "last_layer.weight_g": scale.detach()}
    x = torch.randn(6, meta["in_dim"], dtype=torch.float64, generator=noise).requires_grad_()
    cotangent = torch.randn(6, meta["head_out"], dtype=torch.float64, generator=noise)
    weight = scale * last.weight / last.weight.norm(dim=1, keepdim=True)
    y = nn.functional.normalize(mlp(x)) @ weight.T
    y.backward(cotangent)
    named = {f"mlp.{name}": p for name, p in mlp.named_parameters()}
    named |= {"last_layer.weight_v": last.weight, "last_layer.weight_g": scale}
    assert x.grad is not None
    return {
        **{f"head/state/{name}": value for name, value in state.items()},
        **{f"head/grad/{name}": p.grad for name, p in named.items() if p.grad is not None},
        **{"head/input": x.detach(), "head/output": y.detach(), "head/cotangent": cotangent, "head/grad_input": x.grad},
    }


def plain_recording(folder: Path, **changes: Any) -> Path:
    """Write a recording of single parts with sizes of our own, computed with plain code; return its path."""
    noise = torch.Generator().manual_seed(1)
    meta: dict[str, Any] = json.loads((METHODS / "dino.json").read_text())["meta"]
    meta |= {
        "out_dim": 7,
        "batch_size": 3,
        "ncrops": 4,
        "in_dim": 6,
        "hidden_dim": 5,
        "bottleneck_dim": 3,
        "head_out": 4,
    }
    meta |= {"use_bn": True, "norm_last_layer": False, "nlayers": 2, "clip": 0.5, "student_temp": 0.2}
    meta |= {"warmup_teacher_temp_epochs": 2, "nepochs": 4, "lr_schedule": [0.01, 0.001, 4, 3, 1]}
    meta |= {"wd_schedule": [0.1, 0.2, 4, 3], "momentum_schedule": [0.9, 1, 4, 3], **changes}
    centre, tensors, calls = torch.zeros(7, dtype=torch.float64), head_of(meta, noise), []
    for call, (epoch, temperature) in enumerate([(0, 0.04), (1, 0.07), (3, 0.07)]):
        student = torch.randn(4, 3, 7, dtype=torch.float64, generator=noise).requires_grad_()
        teacher = torch.randn(2, 3, 7, dtype=torch.float64, generator=noise)
        q, log_p = ((teacher - centre) / temperature).softmax(-1), (student / 0.2).log_softmax(-1)
        loss = -sum((q[i] * log_p[j]).sum(-1).mean() for i in range(2) for j in range(4) if i != j) / 6
        loss.backward()
        centre = meta["center_momentum"] * centre + (1 - meta["center_momentum"]) * teacher.mean((0, 1))
        calls.append({"call": call, "epoch": epoch, "teacher_temp": temperature, "loss": loss.item()})
        tensors |= {f"call{call}/student": student.detach().flatten(0, 1), f"call{call}/teacher": teacher.flatten(0, 1)}
        tensors |= {f"call{call}/grad_student": student.grad.flatten(0, 1), f"call{call}/center_after": centre[None]}
    i = np.arange(12)
    fall = 0.001 + 0.009 * (1 + np.cos(np.pi * np.arange(9) / 9)) / 2
    cosine = (1 + np.cos(np.pi * i / 12)) / 2
    schedules = {"lr": np.concatenate([np.linspace(0, 0.01, 3), fall]), "weight_decay": 0.2 - 0.1 * cosine}
    schedules["momentum"] = 1 - 0.1 * cosine
    tensors |= {f"schedule/{name}": torch.from_numpy(values) for name, values in schedules.items()}
    for name, shape in (("weight", (4, 5)), ("bias", (4,))):
        g = torch.randn(*shape, dtype=torch.float64, generator=noise) * (1 if name == "weight" else 0.01)
        tensors |= {f"clip/{name}_grad": g, f"clip/{name}_grad_after": g * min(1.0, 0.5 / (g.norm().item() + 1e-6))}
    (folder / "plain.json").write_text(json.dumps({"meta": meta, "numbers": {"calls": calls}}))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "plain.safetensors")
    return folder / "plain"


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_recording_of_other_sizes(tmp_path: Path, layers: int) -> None:
    assert main([str(plain_recording(tmp_path, nlayers=layers))]) == 0


def test_a_head_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(plain_recording(tmp_path, norm_last_layer=True))]) == 2
    assert "head.last_layer.weight_g must be 1: norm_last_layer is true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"hidden_dim": 8}, "the recording's head.mlp.0.bias [32] does not fit its meta"),
        ({"depth": 1}, "the recording's backbone.blocks.1.attn.proj.bias [32] does not fit its meta"),
        ({"depth": 3}, "the recording lacks weights of encoder.blocks.2.norm1.weight"),
    ],
)
def test_settings_of_other_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], meta: dict[str, Any], message: str
) -> None:
    assert main([change(tmp_path, "dino_step", {}, meta)]) == 2
    assert message in capsys.readouterr().err


def test_a_parameter_without_a_name_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([change(tmp_path, "dino_step", {"student/neck.bias": torch.zeros(1)}, {})]) == 2
    assert "the recording has a parameter 'neck.bias', which DINO does not have" in capsys.readouterr().err


def test_the_loss_of_views_and_its_figures() -> None:
    out = dino()(*views())
    assert out.prediction is None
    assert out.terms.keys() == {"cross_entropy"}
    assert out.figures.keys() == {"teacher_entropy", "kl"}
    torch.testing.assert_close(out.figures["teacher_entropy"] + out.figures["kl"], out.loss)
    assert out.figures["kl"] > 0
    assert 0 <= out.figures["teacher_entropy"] <= np.log(6)


def update(recipe: DINO, batch: list[View], epoch: int) -> dict[str, Tensor]:
    """Run one update and return the state before it."""
    before = {name: value.clone() for name, value in recipe.state_dict().items()}
    hyper = Hyper(lr=0.1, weight_decay=0.1, momentum=0.9)
    train_step(recipe, build_optimizer(recipe), hyper, batch, progress=Progress(epoch=epoch, epochs=3))
    return before


@pytest.mark.parametrize("epoch", [0, 1])
def test_prototypes_are_frozen_in_the_first_epoch(epoch: int) -> None:
    recipe = dino()
    before = update(recipe, views(), epoch)
    changed = {name for name, value in recipe.state_dict().items() if not torch.equal(value, before[name])}
    assert ("prototype_head.weight" in changed) == (epoch == 1)
    assert {"encoder.cls_token", "head.layers.0.weight", "target_head.layers.0.weight", "targets.centre"} <= changed


def test_the_teacher_follows_encoder_and_heads() -> None:
    recipe = dino()
    before, after = update(recipe, views(), 1), recipe.state_dict()
    for name, p in recipe.named_parameters():
        if not name.startswith("target_"):
            wanted = before[f"target_{name}"].lerp(p, 0.1)
            torch.testing.assert_close(after[f"target_{name}"], wanted, rtol=0, atol=1e-7)


def test_a_batch_that_is_not_finite_moves_no_centre() -> None:
    recipe, batch = dino(), views()
    batch[3].images[0] = torch.nan
    before = update(recipe, batch, 1)
    assert torch.equal(recipe.targets.centre, before["targets.centre"])
    update(recipe, views(), 1)
    assert recipe.targets.centre.isfinite().all()
    assert not torch.equal(recipe.targets.centre, before["targets.centre"])


def test_the_teacher_sees_only_the_first_views() -> None:
    recipe, batch = dino(), views()
    recipe(*batch)
    centre = recipe.targets.centre.clone()
    again = dino()
    again(*batch[:2], *(View(-view.images) for view in batch[2:]))
    assert torch.equal(again.targets.centre, centre)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"image_size": 16}}, r"data.views \(=1 in all\) must give at least 2 to the recipe 'dino'"),
        ({"prototype_head": None}, "prototype_head is missing: give it a mapping with a name"),
        ({"head": None}, "head is missing: give it a mapping with a name"),
        (
            {"data": {"image_size": 16, "views": [{"count": 2}, {"image_size": 10}]}},
            r"data.views\[1\].image_size \(=\[10, 10\]\) must be divisible by encoder.patch_size \(=4\)",
        ),
        (
            {"target_update": {"name": "none"}},
            r"recipe: target_update makes no target encoder, which this recipe needs",
        ),
        ({"recipe": options(num_global=0)}, r"recipe: num_global \(=0\) must be at least 1"),
        ({"recipe": options(freeze_epochs=-1)}, r"recipe: freeze_epochs \(=-1\) must be at least 0"),
        ({"recipe": options(student_temperature=0.0)}, r"recipe: student_temperature \(=0.0\) must be above 0"),
        ({"recipe": options(teacher_temperature=[0.04, 0.0])}, r"recipe: temperature \(=0.0\) must be above 0"),
    ],
)
def test_configs_that_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dino(**changes)


@pytest.mark.parametrize(("num_global", "sizes"), [(2, [16]), (1, [16]), (3, [16, 16])])
def test_too_few_views(num_global: int, sizes: list[int]) -> None:
    recipe = dino(recipe=options(num_global=num_global))
    message = rf"views \(={len(sizes)} in all\) must be at least 2, and num_global \(={num_global}\)"
    with pytest.raises(ValueError, match=message):
        recipe(*views(*sizes))
