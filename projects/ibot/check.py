"""Compare iBOT's parts with recorded numbers of the released code.

A recording contains either the loss by itself (names ``call0/``, ...), or one forward and backward pass of a small ViT
(``global_crops``).

    V views    T global views    B images    N patches of a view    K prototypes
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.ibot"  # for the relative import

import numpy as np
import torch
from torch import Tensor, nn

from jepa_kit.config import config_from_dict
from jepa_kit.encoders.pooling import pooled_views
from jepa_kit.from_config import build_recipe
from jepa_kit.interfaces import Encoder
from jepa_kit.losses.self_distillation import at_targets
from jepa_kit.structures import MaskBatch, PatchSets, Progress, View
from jepa_kit.trials.recorded import Recorded, Report, run_check

from .recipe import IBOT

ANY_NETWORK = {
    "img_size": 16,
    "patch_size": 4,
    "local_size": 8,
    "embed_dim": 8,
    "depth": 1,
    "num_heads": 1,
    "hidden_dim": 8,
    "bottleneck_dim": 4,
}
"""For a recording of the loss, which has no network."""


def build(meta: Mapping[str, Any], num_local: int) -> IBOT:
    """Return the recipe of a recording's settings in float64, with two global views.

    Raises:
        ValueError: a setting that iBOT does not have here.
    """
    if meta.get("mim_start_epoch", 0) != 0:
        raise ValueError(
            f"mim_start_epoch (={meta['mim_start_epoch']}) must be 0: patches are hidden from the first epoch"
        )
    prototypes = {"name": "prototypes", "learned_scale": not meta.get("norm_last_layer", True)}
    views = [{"count": meta.get("ngcrops", 2), "masked": True}]
    if num_local:
        views.append({"count": num_local, "image_size": meta["local_size"]})
    config = config_from_dict(
        {
            "recipe": {
                "name": "ibot",
                "num_global": meta.get("ngcrops", 2),
                "student_temperature": meta["student_temp"],
                "teacher_temperature": [meta.get("warmup_teacher_temp", meta["teacher_temp"]), meta["teacher_temp"]],
                "patch_temperature": [
                    meta.get("warmup_teacher_patch_temp", meta["teacher_patch_temp"]),
                    meta["teacher_patch_temp"],
                ],
                "warmup_epochs": meta.get("warmup_teacher_temp_epochs", 0),
                "centre_momentum": meta.get("center_momentum", 0.9),
                "patch_centre_momentum": meta.get("center_momentum2", 0.9),
                "class_weight": meta["lambda1"],
                "patch_weight": meta["lambda2"],
                "shared_teacher": meta.get("shared_head_teacher", False),
            },
            "masker": {"name": "in_place", "masker": {"name": "blockwise", "ratio": 0.3}},
            "encoder": {
                "name": "vit",
                "patch_size": meta["patch_size"],
                "embed_dim": meta["embed_dim"],
                "depth": meta["depth"],
                "num_heads": meta["num_heads"],
                "qkv_bias": meta.get("qkv_bias", True),
                "norm_eps": meta.get("layer_norm_eps", 1e-6),
                "class_token": True,
                "mask_token": True,
                "positions": "learned",
                "interpolation_offset": 0.1,
            },
            "head": {
                "name": "mlp",
                "layers": meta.get("nlayers", 3),
                "hidden": meta["hidden_dim"],
                "out_dim": meta["bottleneck_dim"],
                "activation": "gelu",
            },
            "prototype_head": prototypes | {"out_dim": meta["out_dim"]},
            "patch_head": None if meta.get("shared_head") else prototypes | {"out_dim": meta["patch_out_dim"]},
            "target_update": {"name": "ema"},
            "data": {"image_size": meta["img_size"], "views": views},
            "train": {"batch_size": meta["batch_size"], "epochs": 100, "precision": "float32"},
        },
        source="the recording's meta",
    )
    recipe = build_recipe(config).double()
    assert isinstance(recipe, IBOT)
    return recipe


def masks_of(masked: Tensor) -> MaskBatch:
    """Return the masks of a view from [B, h, w], 1 for hidden; an image without any has a target that is not hidden."""
    hidden = masked.flatten(1).bool()  # [B, N]
    count, patches = hidden.shape
    chosen = hidden.clone()
    chosen[:, 0] |= ~hidden.any(1)
    context = replace(PatchSets.full(count, patches), hidden=hidden.flatten())
    targets = PatchSets.from_mask(chosen.numpy(), np.arange(count))
    return MaskBatch(context, targets, (masked.shape[1], masked.shape[2]), torch.arange(count))


def check_loss(recorded: Recorded, report: Report) -> None:
    """Compare both terms, their gradients and both centres over several calls."""
    meta = {**ANY_NETWORK, "shared_head": False, "shared_head_teacher": False, **recorded.meta}
    recipe = build(meta, meta["nlcrops"])
    for call in recorded.numbers["calls"]:
        name = f"call{call['call']}"
        masks = [masks_of(of_view) for of_view in recorded[f"{name}/masks"]]
        rows = {key: recorded[f"{name}/student_{key}"].requires_grad_() for key in ("cls", "local_cls", "patch")}
        teacher = recorded[f"{name}/teacher_cls"], recorded[f"{name}/teacher_patch"].flatten(0, 1)
        student = torch.cat([rows["cls"], rows["local_cls"]]), at_targets(rows["patch"].flatten(0, 1), masks)
        out = recipe.compare(teacher, student, masks, Progress(epoch=call["epoch"], epochs=meta["nepochs"]))
        out.loss.backward()
        ours = [out.terms["class"], out.terms["patch"], out.loss]
        temperatures = [x.temperature_at(call["epoch"]) for x in (recipe.targets, recipe.patch_targets)]
        theirs = [call["teacher_temp"], call["teacher_patch_temp"]]
        report.compare(f"{name}: temperatures", temperatures, theirs)
        for term, value in zip(("cls", "patch", "loss"), ours, strict=True):
            report.compare(f"{name}: {term}", value, call[term])
        for key, x in rows.items():
            assert x.grad is not None
            report.compare(f"{name}: gradient of {key}", x.grad, recorded[f"{name}/grad_student_{key}"])
        centres = recipe.targets.centre[None], recipe.patch_targets.centre[None, None]
        report.compare(f"{name}: centre of class tokens", centres[0], recorded[f"{name}/center_after"])
        report.compare(f"{name}: centre of patches", centres[1], recorded[f"{name}/center2_after"])


def our_name(released: str, own: Mapping[str, nn.Parameter], prefix: str) -> str:
    """Return the name of a released parameter here; shared prototypes have one name."""
    patch_head = "patch_head" if f"{prefix}patch_head.weight" in own else "prototype_head"
    for theirs, ours in (
        ("backbone.masked_embed", "encoder.mask_token"),
        ("backbone.", "encoder."),
        ("head.mlp.", "head.layers."),
        ("head.last_layer.weight_v", "prototype_head.weight"),
        ("head.last_layer.weight_g", "prototype_head.scale"),
        ("head.last_layer2.weight_v", f"{patch_head}.weight"),
        ("head.last_layer2.weight_g", f"{patch_head}.scale"),
    ):
        if released.startswith(theirs):
            return prefix + ours + released.removeprefix(theirs)
    raise ValueError(f"the recording has a parameter {released!r}, which iBOT does not have")


@torch.no_grad()
def load(recipe: IBOT, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, nn.Parameter]:
    """Load released weights; return our parameters by their released names, each once.

    Args:
        recipe: of the recording's sizes.
        state: released name -> weight.
        prefix: ``target_`` for the teacher.

    Raises:
        ValueError: weights that are one here differ, or one does not fit or is missing.
    """
    own = dict(recipe.named_parameters())
    loaded: dict[str, nn.Parameter] = {}
    taken: set[str] = set()
    for name, value in state.items():
        ours = our_name(name, own, prefix)
        fixed = ours.endswith("_head.scale") and ours not in own  # not trained, and 1
        weight = nn.Parameter(torch.ones_like(value)) if fixed else own.get(ours)
        if weight is None or value.numel() != weight.numel():
            raise ValueError(f"the recording's {name} {list(value.shape)} does not fit its meta")
        value = value.reshape(weight.shape)
        if not fixed and ours not in taken:
            weight.copy_(value)
            loaded[name] = weight
        if not torch.equal(weight, value):
            raise ValueError(f"the recording's {name} differs from {ours}, as which it is loaded")
        taken.add(ours)
    networks = {ours.split(".")[0] for ours in taken}
    own.pop("target_encoder.mask_token")  # the released teacher has none, and needs none
    if missing := [name for name in own if name.split(".")[0] in networks and name not in taken]:
        raise ValueError(f"the recording lacks the weights of {missing[0]}")
    return loaded


def check_step(recorded: Recorded, report: Report) -> None:
    """Compare outputs, losses and gradients of one forward and backward pass."""
    meta = recorded.meta
    recipe = build(meta, meta["local_crops"])
    student = load(recipe, recorded.under("student/"))
    load(recipe, recorded.under("teacher/"), "target_")
    masks = [masks_of(of_view) for of_view in recorded["masks"]]
    views = [View(images, of_view) for images, of_view in zip(recorded["global_crops"], masks, strict=True)]
    local = [View(images) for images in recorded["local_crops"]]
    images = recorded["global_crops"].flatten(0, 1)
    own, teacher = partial(getattr, recipe), cast(Encoder, recipe.target_encoder)
    with torch.no_grad():
        tokens, whole = recipe.encode(images, masks), teacher.forward_tokens(images)[0]
        outputs = {
            "student_cls": recipe.scores(tokens.prefix[:, 0], own),
            "student_patch": recipe.scores(tokens.patches, own, patch=True),
            "student_local_cls": recipe.scores(pooled_views(recipe.encoder, local), own),
            "teacher_cls": recipe.scores(whole.prefix[:, 0], recipe.network),
            "teacher_patch": recipe.scores(whole.patches, recipe.network, patch=True),
        }
    for name, output in outputs.items():
        report.compare(name, output.reshape(recorded[name].shape), recorded[name])
    out = recipe(*views, *local)
    out.loss.backward()
    for name, value in (("cls", out.terms["class"]), ("patch", out.terms["patch"]), ("loss", out.loss)):
        report.compare(f"loss: {name}", value, recorded.numbers[name])
    theirs = recorded.under("grad/")
    ours = {name: p.grad.reshape(theirs[name].shape) for name, p in student.items() if p.grad is not None}
    report.compare("gradients", ours, theirs)


def check(recorded: Recorded, report: Report) -> None:
    """Compare everything that a recording contains."""
    (check_step if "global_crops" in recorded else check_loss)(recorded, report)


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
