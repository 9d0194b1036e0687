"""Compare DINO's parts with recorded numbers of the released code.

A recording contains either loss, head, schedules and clipping by themselves (``call0/``, ``head/``, ...), or whole
training steps of a small ViT (``global_crops``).

    V views    T global views    B images    K prototypes
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.dino"  # for the relative import

import torch
from torch import Tensor, nn

from jepa_kit.config import Config, config_from_dict
from jepa_kit.engine.optimizer import clip_gradients, optimizer_of
from jepa_kit.engine.schedules import Schedule
from jepa_kit.engine.step import train_step
from jepa_kit.from_config import build_recipe
from jepa_kit.structures import Progress, View
from jepa_kit.trials.recorded import Recorded, Report, run_check, sums

from .recipe import DINO

ANY_ENCODER = {"img_size": 16, "patch_size": 4, "local_size": 8, "depth": 1, "num_heads": 1}
"""For a recording of single parts, which has no encoder."""

LAST_OF_RUN = 1e-7
"""Largest relative difference of numbers after several updates: AdamW magnifies rounding errors of small gradients."""


def config_of(meta: Mapping[str, Any], views: int) -> Config:
    """Return the config of a recording's settings, with two global views and ``views`` - 2 local ones."""
    layers = meta.get("nlayers", 3)
    between = {"hidden": meta["hidden_dim"], "norm": "batch" if meta.get("use_bn") else "none"} if layers > 1 else {}
    local = [{"count": views - 2, "image_size": meta["local_size"]}] if views > 2 else []
    return config_from_dict(
        {
            "recipe": {
                "name": "dino",
                "student_temperature": meta["student_temp"],
                "teacher_temperature": [meta["warmup_teacher_temp"], meta["teacher_temp"]],
                "warmup_epochs": meta["warmup_teacher_temp_epochs"],
                "centre_momentum": meta["center_momentum"],
                "freeze_epochs": meta.get("freeze_last_layer", 1),
            },
            "encoder": {
                "name": "vit",
                "patch_size": meta["patch_size"],
                "embed_dim": meta["embed_dim"],
                "depth": meta["depth"],
                "num_heads": meta["num_heads"],
                "qkv_bias": meta.get("qkv_bias", True),
                "norm_eps": meta.get("layer_norm_eps", 1e-6),
                "class_token": True,
                "positions": "learned",
                "interpolation_offset": 0.1,
            },
            "head": {
                "name": "mlp",
                "layers": layers,
                "out_dim": meta["bottleneck_dim"],
                "activation": "gelu",
                **between,
            },
            "prototype_head": {
                "name": "prototypes",
                "out_dim": meta["out_dim"],
                "learned_scale": not meta.get("norm_last_layer", True),
            },
            "target_update": {
                "name": "ema",
                "momentum": [meta.get("momentum_teacher", 0.996), 1.0],
                "schedule": "cosine",
            },
            "data": {"image_size": meta["img_size"], "views": [{"count": 2}, *local]},
            "optim": {
                "lr": meta.get("lr", 1e-3),
                "start_lr": 0.0,
                "final_lr": meta.get("min_lr", 0.0),
                "warmup_epochs": meta.get("warmup_epochs", 0),
                "weight_decay": [meta.get("wd", 0.0), meta.get("wd_end", 0.0)],
                "clip_grad": meta.get("clip_grad"),
                "clip_each": bool(meta.get("clip_grad")),
                "counting": "both_ends",
            },
            "train": {
                "batch_size": meta["batch_size"],
                "epochs": meta.get("epochs", 1),
                "steps_per_epoch": meta.get("iterations_per_epoch", 1),
                "precision": "float32",
                "attention": "reference",
            },
        },
        source="the recording's meta",
    )


def build(config: Config) -> DINO:
    """Return the recipe of a config in float64."""
    recipe = build_recipe(config).double()
    assert isinstance(recipe, DINO)
    return recipe


def our_name(released: str) -> str:
    """Return the name of a released parameter of student or teacher here."""
    for theirs, ours in (
        ("backbone.", "encoder."),
        ("head.mlp.weight", "head.layers.0.weight"),  # of a single layer
        ("head.mlp.bias", "head.layers.0.bias"),
        ("head.mlp.", "head.layers."),
        ("head.last_layer.weight_v", "prototype_head.weight"),
        ("head.last_layer.weight_g", "prototype_head.scale"),
    ):
        if released.startswith(theirs):
            return ours + released.removeprefix(theirs)
    raise ValueError(f"the recording has a parameter {released!r}, which DINO does not have")


@torch.no_grad()
def load(recipe: DINO, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, nn.Parameter]:
    """Load released weights; return our parameters by their released names.

    Args:
        recipe: of the recording's sizes.
        state: released name -> weight.
        prefix: ``target_`` for the teacher.

    Raises:
        ValueError: a weight does not fit or is missing.
    """
    own = recipe.state_dict(keep_vars=True)
    loaded = {}
    for name, value in state.items():
        ours = prefix + our_name(name)
        if ours.endswith("prototype_head.scale") and ours not in own:
            if not (value == 1).all():
                raise ValueError(f"the recording's {name} must be 1: norm_last_layer is true")
            continue
        weight = own.pop(ours, None)
        if weight is None or value.numel() != weight.numel():
            raise ValueError(f"the recording's {name} {list(value.shape)} does not fit its meta")
        weight.copy_(value.reshape(weight.shape))
        if isinstance(weight, nn.Parameter):
            loaded[name] = weight
    parts = {(prefix + our_name(name)).split(".")[0] for name in state}
    if missing := [name for name in own if name.split(".")[0] in parts]:
        raise ValueError(f"the recording lacks weights of {missing[0]}")
    return loaded


def gradients(parameters: Mapping[str, nn.Parameter], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients by released name, in the recorded shapes."""
    return {
        name: p.grad.reshape(like[name].shape) if name in like else p.grad
        for name, p in parameters.items()
        if p.grad is not None
    }


def check_parts(recorded: Recorded, report: Report) -> None:
    """Compare loss, centre, head, schedules and clipping."""
    meta = {**ANY_ENCODER, **recorded.meta, "embed_dim": recorded.meta["in_dim"]}
    recipe, k = build(config_of(meta, meta["ncrops"])), meta["out_dim"]
    for call in recorded.numbers["calls"]:
        name = f"call{call['call']}"
        teacher = recorded[f"{name}/teacher"].reshape(2, -1, k)
        student = recorded[f"{name}/student"].requires_grad_()
        progress = Progress(epoch=call["epoch"], epochs=meta["nepochs"])
        out = recipe.compare(teacher, student.unflatten(0, (meta["ncrops"], -1)), progress)
        out.loss.backward()
        assert student.grad is not None
        report.compare(f"{name}: temperature", recipe.targets.temperature_at(call["epoch"]), call["teacher_temp"])
        report.compare(f"{name}: loss", out.loss, call["loss"])
        report.compare(f"{name}: gradient", student.grad, recorded[f"{name}/grad_student"])
        report.compare(f"{name}: centre afterwards", recipe.targets.centre[None], recorded[f"{name}/center_after"])

    recipe = build(config_of({**meta, "out_dim": meta["head_out"]}, meta["ncrops"]))
    parameters = load(recipe, {f"head.{name}": value for name, value in recorded.under("head/state/").items()})
    x = recorded["head/input"].requires_grad_()
    y = recipe.prototype_head(recipe.head(x))
    y.backward(recorded["head/cotangent"])
    assert x.grad is not None
    report.compare("head: output", y, recorded["head/output"])
    report.compare("head: gradient of the input", x.grad, recorded["head/grad_input"])
    theirs = {f"head.{name}": value for name, value in recorded.under("head/grad/").items()}
    report.compare("head: gradients", gradients(parameters, theirs), theirs)

    lr, wd, momentum = (meta[f"{name}_schedule"] for name in ("lr", "wd", "momentum"))
    run = {"lr": lr[0], "min_lr": lr[1], "epochs": lr[2], "iterations_per_epoch": lr[3], "warmup_epochs": lr[4]}
    config = config_of({**meta, **run, "wd": wd[0], "wd_end": wd[1], "momentum_teacher": momentum[0]}, meta["ncrops"])
    schedule = Schedule.of(config, lr[3], build(config).momentum)
    for name in ("lr", "weight_decay", "momentum"):
        ours = [getattr(schedule(step), name) for step in range(schedule.steps)]
        report.compare(f"schedule of {name}", ours, recorded[f"schedule/{name}"], relative=True)

    model = nn.ParameterDict({name: recorded[f"clip/{name}_grad"] for name in ("weight", "bias")})
    for name, p in model.items():
        p.grad = recorded[f"clip/{name}_grad"].clone()
    clip_gradients(model, meta["clip"], each=True)
    for name, p in model.items():
        report.compare(f"clipped gradient of the {name}", p.grad, recorded[f"clip/{name}_grad_after"])


def check_steps(recorded: Recorded, report: Report) -> None:
    """Compare outputs and gradients of the first step, then every step and the final weights."""
    meta = recorded.meta
    config = config_of(meta, 2 + meta["local_crops"])
    recipe = build(config)
    student, teacher = (
        load(recipe, recorded.under(f"{of}/"), p) for of, p in (("student", ""), ("teacher", "target_"))
    )
    crops = [recorded[name] for name in ("global_crops", "local_crops") if name in recorded]
    views = [[View(images) for of_size in crops for images in of_size[step]] for step in range(len(crops[0]))]

    with torch.no_grad():
        outputs = recipe.scores(views[0][:2], recipe.network), recipe.scores(views[0], recipe.get_submodule)
    for name, output in zip(("teacher", "student"), outputs, strict=True):
        report.compare(f"step 0: output of the {name}", output.flatten(0, 1), recorded[f"step0/{name}_output"])

    largest: list[float] = []  # norm of a parameter's gradient
    adjust = recipe.adjust_gradients

    def watch(progress: Progress) -> None:
        if not largest:
            theirs = recorded.under("step0/grad/")
            report.compare("step 0: gradients", gradients(student, theirs), theirs)
        largest.append(max(float(p.grad.norm()) for p in student.values() if p.grad is not None))
        adjust(progress)

    recipe.adjust_gradients = watch  # type: ignore[method-assign]
    optimizer = optimizer_of(recipe, config.optim)
    schedule = Schedule.of(config, meta["iterations_per_epoch"], recipe.momentum)
    ours: dict[str, list[float]] = {}
    for step in range(schedule.steps):
        epoch, batch = divmod(step, meta["iterations_per_epoch"])
        hyper = schedule(step)
        out = train_step(
            recipe,
            optimizer,
            hyper,
            views[batch],
            progress=Progress(step, step / schedule.steps, epoch, meta["epochs"]),
            clip_grad=config.optim.clip_grad,
            clip_each=config.optim.clip_each,
        )
        for name, value in {
            "loss": out.loss,
            **vars(hyper),
            "largest_gradient_norm_of_a_parameter": largest[-1],
            "centre_sum_of_squares": recipe.targets.centre.square().sum(),
        }.items():
            ours.setdefault(name, []).append(float(torch.as_tensor(value).detach()))
    for name, values in ours.items():
        theirs = [step[name] for step in recorded.numbers["trajectory"]]
        report.compare(f"{len(theirs)} steps: {name}", values, theirs, relative=True, tolerance=LAST_OF_RUN)
    for of, parameters in (("student", student), ("teacher", teacher)):
        final = recorded.numbers[f"final_{of}_sum_and_sum_of_squares"]
        wanted = {name: torch.tensor(final[name], dtype=torch.float64) for name in parameters}
        report.compare(f"final {of}", sums(parameters), wanted, relative=True, tolerance=LAST_OF_RUN)


def check(recorded: Recorded, report: Report) -> None:
    """Compare everything that a recording contains."""
    (check_steps if "global_crops" in recorded else check_parts)(recorded, report)


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
