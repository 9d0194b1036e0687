"""Compare StoP's predictor, and jepa_kit's ordinary parts around it, with recorded numbers of the released code.

Compared are position tables, context tokens, the queries of the recorded noise, targets, predictions, the loss and all
gradients.

    B images    L patches of a set    M target sets of an image    D width
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.stop"

import torch
from torch import Tensor

from jepa_kit.config import Config, config_from_dict
from jepa_kit.from_config import build_recipe
from jepa_kit.interop.official import encoder_from_official, predictor_from_official
from jepa_kit.structures import Grid, MaskBatch, PatchSets, View
from jepa_kit.trials.recorded import Recorded, Report, run_check

from . import predictor  # noqa: F401 (registers it)

TABLES = {
    "encoder": "encoder/pos_embed",
    "target_encoder": "target_encoder/pos_embed",
    "predictor": "predictor/predictor_pos_embed",
}


def config_of(meta: Mapping[str, Any]) -> Config:
    """Return the config of a recording's settings; they are those of configs/in1k_vitb16.yaml but for sizes."""
    blocks = meta["target_blocks"]
    return config_from_dict(
        {
            "masker": {"name": "multiblock", "num_targets": meta["num_targets"]},
            "encoder": {
                "name": "vit",
                "patch_size": meta["patch_size"],
                "embed_dim": meta["embed_dim"],
                "depth": meta["depth"],
                "num_heads": meta["num_heads"],
                "norm_eps": meta["layer_norm_eps"],
            },
            "predictor": {
                "name": "stop",
                "width": meta["predictor_embed_dim"],
                "depth": meta["predictor_depth"],
                "num_heads": meta["predictor_num_heads"],
                "norm_eps": meta["layer_norm_eps"],
                "noise_std": meta["var"],
            },
            # of one block, this is norm: layer
            "target": {"name": "representation", "layers": blocks, "norm": "none", "mean_norm": "layer"},
            "loss": {"name": "smooth_l1"},
            "target_update": {"name": "ema"},
            "data": {"image_size": meta["img_size"]},
        }
    )


def masks_of(recorded: Recorded, grid: Grid) -> MaskBatch:
    """Return the recorded masks: the first target set of every image, then the second, and so on."""
    context = recorded["masks/context/0"]  # [B, L]
    targets = [recorded[f"masks/target/{m}"] for m in range(recorded.meta["num_targets"])]
    image = torch.arange(len(context)).repeat(len(targets))
    return MaskBatch(PatchSets.from_padded(context), PatchSets.from_padded(torch.cat(targets), image), grid, image)


def our_names(recorded: Recorded, prefix: str = "") -> dict[str, Tensor]:
    """Return the recorded weights, or gradients, by our names."""
    found: dict[str, Tensor] = {}
    for part in ("encoder", "predictor", *([] if prefix else ["target_encoder"])):
        state = recorded.under(f"{prefix}{part}/")
        ours = predictor_from_official(state) if part == "predictor" else encoder_from_official(state)
        found |= {f"{part}.{name}": value for name, value in ours.items()}
    return found


def check(recorded: Recorded, report: Report) -> None:
    """Compare one recording; see the module."""
    meta = recorded.meta
    recipe: Any = build_recipe(config_of(meta)).double()
    recipe.load_state_dict(our_names(recorded))
    for part, name in TABLES.items():
        table, released = getattr(recipe, part).pos_embed, recorded[name][0]
        report.compare(f"positions of {part}", table, released, tolerance=1e-6)  # computed in float32
        table.copy_(released)
    side = meta["img_size"] // meta["patch_size"]
    masks, images, noise = masks_of(recorded, (side, side)), recorded["images"], recorded["noise"].flatten(0, 2)
    recipe.predictor.noise = lambda _: noise
    out = recipe(View(images, masks))
    out.loss.backward()
    prediction = out.prediction
    _, queries = recipe.predictor.tokens(prediction.context, masks, None)
    last = range(meta["depth"] - meta["target_blocks"] + 1, meta["depth"] + 1)
    whole = torch.stack(recipe.target_encoder.forward_layers(images, layers=last)).mean(0)
    report.compare("context tokens", prediction.context, recorded["context_tokens"].flatten(0, 1))
    report.compare("queries", queries, recorded["mask_tokens"].flatten(0, 2))
    report.compare("target tokens", whole, recorded["target_tokens"].flatten(0, 1))
    report.compare("targets", prediction.target, recorded["target"].flatten(0, 1))
    report.compare("predictions", prediction.prediction, recorded["prediction"].flatten(0, 1))
    report.compare("loss", out.loss, recorded["loss"])
    gradients = {name: p.grad for name, p in recipe.named_parameters() if p.grad is not None}
    report.compare("gradients", gradients, our_names(recorded, "grad/"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
