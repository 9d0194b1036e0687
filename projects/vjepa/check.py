"""Compare a V-JEPA 2 of jepa_kit's ordinary parts with recorded numbers of the released code.

The recording is of clips of one temporal slot: a frame of patches, whose pixels are those of ``tubelet_size`` images.
They are given to the encoder as channels of one image. Compared are the target encoder's normalised tokens; context
tokens, predictions and targets of each mask configuration; the loss and all gradients.

    B clips    G mask configurations    L tokens of a set    N patches of a frame    D width    T images of a slot
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from jepa_kit.config import Config, config_from_dict
from jepa_kit.encoders.patch_embed import PatchEmbed
from jepa_kit.from_config import build_recipe
from jepa_kit.losses.distances import Distance
from jepa_kit.registry import LOSSES
from jepa_kit.structures import Grid, MaskBatch, PatchSets, View
from jepa_kit.trials.recorded import Recorded, Report, run_check

PREFIXES = {
    "predictor.embed.": "predictor/predictor_embed.",
    "predictor.blocks.": "predictor/predictor_blocks.",
    "predictor.norm.": "predictor/predictor_norm.",
    "predictor.proj.": "predictor/predictor_proj.",
    "predictor.pos_embed": "predictor/predictor_pos_embed",
    "predictor.": "predictor/",
    "target_encoder.": "target_encoder/",
    "encoder.": "encoder/",
}
"""Beginnings of our names, and the released ones."""


@LOSSES.register("recorded_power")
class RecordedPower(Distance):
    """|error|**exponent / exponent, mean over the width, for recordings with another exponent than that of ``l1``."""

    def __init__(self, *, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        """[P, D] twice -> [P, D]."""
        return (prediction - target).abs() ** self.exponent / self.exponent


def config_of(meta: Mapping[str, Any], tokens: int) -> Config:
    """Return the config of a recording's settings; they are those of configs/in1k_vitl16.yaml but for sizes.

    Args:
        meta: of the recording.
        tokens: number of mask tokens.

    Raises:
        ValueError: clips have several temporal slots.
    """
    if meta["num_frames"] != meta["tubelet_size"]:
        frames = f"num_frames (={meta['num_frames']}) must be tubelet_size (={meta['tubelet_size']})"
        raise ValueError(f"{frames}: patches of several slots are not built")
    positions = {"positions": "rotary_video", "rotary_base": 10000.0} if meta["use_rope"] else {}
    masks = meta["masks"]
    power = {"name": "recorded_power", "exponent": meta["loss_exp"]}
    return config_from_dict(
        {
            "masker": {
                "name": "multigroup",
                "num_targets": [mask["num_blocks"] for mask in masks],
                "target_scale": [mask["spatial_scale"] for mask in masks],
                "target_aspect_ratio": masks[0]["aspect_ratio"],
                "size_per": "batch",
                "truncation": "released",
            },
            "encoder": {
                "name": "vit",
                "patch_size": meta["patch_size"],
                "embed_dim": meta["embed_dim"],
                "depth": meta["depth"],
                "num_heads": meta["num_heads"],
                "mlp_ratio": meta.get("mlp_ratio", 4.0),
                "norm_eps": meta["layer_norm_eps"],
                **positions,
            },
            "predictor": {
                "name": "vit",
                "width": meta["predictor_embed_dim"],
                "depth": meta["predictor_depth"],
                "num_heads": meta["predictor_num_heads"],
                "mlp_ratio": meta.get("mlp_ratio", 4.0),
                "norm_eps": meta["layer_norm_eps"],
                "mask_tokens": tokens,
                "mask_std": 0.0,
                **positions,
            },
            "target": {"name": "representation"},
            "loss": {"name": "l1"} if meta["loss_exp"] == 1 else power,
            "target_update": {"name": "ema", "momentum": [0.99925, 0.99925]},
            "data": {"image_size": meta["img_size"]},
        }
    )


def masks_of(recorded: Recorded, groups: int, grid: Grid) -> MaskBatch:
    """Return the recorded masks: context set g * B + b, and a target set for each."""
    context, targets = (
        PatchSets.cat([PatchSets.from_padded(recorded[f"masks/{kind}/{g}"]) for g in range(groups)])
        for kind in ("context", "target")
    )
    return MaskBatch(context, targets, grid, torch.arange(len(context)))


def released(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their released names, as views of ours: a mask token is a parameter of its own there."""
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        ours = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        name = PREFIXES[ours] + name.removeprefix(ours)
        if name == "predictor/mask_token":
            found |= {f"predictor/mask_tokens.{i}": token for i, token in enumerate(value)}
        else:
            found[name] = value
    return found


def check(recorded: Recorded, report: Report) -> None:
    """Compare one recording; see the module."""
    meta = recorded.meta
    groups, tokens = len(meta["masks"]), sum(name.startswith("mask_tokens.") for name in recorded.under("predictor/"))
    jepa: Any = build_recipe(config_of(meta, tokens))
    for vit in (jepa.encoder, jepa.target_encoder):
        vit.in_chans = 3 * meta["tubelet_size"]
        vit.patch_embed = PatchEmbed(vit.patch_size, vit.in_chans, vit.embed_dim)
    jepa.target_encoder.requires_grad_(False)
    jepa.double()
    named = dict(jepa.named_parameters())
    with torch.no_grad():
        for name, value in released({**named, **dict(jepa.named_buffers())}).items():
            value.copy_(recorded[name].reshape(value.shape))
    side = meta["img_size"] // meta["patch_size"]
    masks = masks_of(recorded, groups, (side, side))
    images = recorded["clips"].flatten(1, 2)  # [B, 3 * T, h, w]
    every = jepa.targets_at(images, PatchSets.full(len(images), side * side))
    report.compare("normalised tokens", every, recorded["target_tokens_normed"].flatten(0, 1))
    out = jepa(View(images, masks))
    found = out.prediction
    for name, values in (
        ("context_tokens", found.context),
        ("prediction", found.prediction),
        ("target", found.target),
    ):
        parts = [recorded[f"{name}/{g}"].flatten(0, 1) for g in range(groups)]
        for g, (own, part) in enumerate(zip(values.split([len(x) for x in parts]), parts, strict=True)):
            report.compare(f"{name} of configuration {g}", own, part)
    report.compare("loss", out.loss, recorded["loss"])
    out.loss.backward()
    theirs = recorded.under("grad/")
    ours = released({name: p.grad for name, p in named.items() if p.grad is not None})
    report.compare("gradients", {name: x.reshape(theirs[name].shape) for name, x in ours.items()}, theirs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
