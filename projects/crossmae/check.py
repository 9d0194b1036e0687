"""Compare a CrossMAE of jepa_kit's ordinary parts with recorded numbers of the released code.

Compared are position tables, masks, the outputs of all blocks of the encoder, their mix for each block of the decoder,
targets, predictions, the loss and all gradients.

    B images    N patches of an image    K = kept patches    D width
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from jepa_kit.config import Config, config_from_dict
from jepa_kit.from_config import build_recipe
from jepa_kit.structures import Grid, MaskBatch, PatchSets, View
from jepa_kit.trials.recorded import Recorded, Report, run_check

NAMES = {
    r"^decoder_(pos_embed|blocks|norm)": r"predictor.\1",
    r"^decoder_pred\.": "predictor.proj.",
    r"^dec_norms\.(\d+)\.": r"predictor.blocks.\1.norm_context.",
    r"^mask_token": "predictor.mask_token",
    r"^wfm\.linear\.weight": "predictor.mix",
    r"^(?!predictor\.)": "encoder.",
}
"""Patterns in released names, and ours."""


def our_names(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return released weights, tables or gradients by our names, in our shapes.

    Keys and values have one projection there, tokens and tables have leading dimensions, and tables a row of zeros.
    """
    found: dict[str, Tensor] = {}
    for name, value in released.items():
        for pattern, ours in NAMES.items():
            name = re.sub(pattern, ours, name)
        if ".cross_attn.kv." in name:
            found |= {name.replace(".kv.", f".{part}."): x for part, x in zip("kv", value.chunk(2), strict=True)}
        elif name.endswith("pos_embed"):
            found[name] = value[0, 1:]
        else:
            found[name] = value[0] if name.endswith("token") else value
    return found


def layers_of(meta: Mapping[str, Any]) -> list[int]:
    """Return the layers of a recording's feature maps: 0 is the input of the first block."""
    return [0] * meta["use_input"] + [block + 1 for block in meta["used_feature_maps"]]


def config_of(meta: Mapping[str, Any]) -> Config:
    """Return the config of a recording's settings; they are those of configs/in1k_vitb16.yaml but for sizes."""
    if meta["self_attn"]:
        raise ValueError("self_attn must be false, as in the released runs")
    random = {"name": "random", "ratio": meta["mask_ratio"]}
    fraction = meta["kept_mask_ratio"] / meta["mask_ratio"]
    return config_from_dict(
        {
            "masker": {"name": "subset", "masker": random, "fraction": fraction} if fraction < 1 else random,
            "encoder": {
                "name": "vit",
                "patch_size": meta["patch_size"],
                "embed_dim": meta["embed_dim"],
                "depth": meta["depth"],
                "num_heads": meta["num_heads"],
                "norm_eps": meta["layer_norm_eps"],
                "class_token": True,
                "final_norm": False,
            },
            "predictor": {
                "name": "cross",
                "width": meta["decoder_embed_dim"],
                "depth": meta["decoder_depth"],
                "num_heads": meta["decoder_num_heads"],
                "norm_eps": meta["layer_norm_eps"],
                "layers": layers_of(meta),
                "prefix": True,
            },
            "target": {"name": "pixel", "norm": "patch" if meta["norm_pix_loss"] else "none"},
            "loss": {"name": "l2", "average": "patches"},
            "target_update": {"name": "none"},
            "data": {"image_size": meta["img_size"]},
        }
    )


def masks_of(noise: Tensor, meta: Mapping[str, Any], grid: Grid) -> MaskBatch:
    """Return the masks of numbers [B, N]: the patches of the smallest are kept, those of the largest predicted."""
    order, patches = noise.argsort(dim=1), noise.shape[1]
    kept = int(patches * (1 - meta["mask_ratio"]))
    skipped = int(patches * (meta["mask_ratio"] - meta["kept_mask_ratio"]))
    sets = (order[:, :kept], order[:, kept + skipped :])
    context, targets = (PatchSets.from_padded(part.sort(dim=1).values) for part in sets)
    return MaskBatch(context, targets, grid, torch.arange(len(noise)))


def load(recipe: Any, state: Mapping[str, Tensor], report: Report) -> None:
    """Load the released weights and position tables; compare the tables, which were computed in float32."""
    recipe.double()
    released, tables = our_names(state), {n: x for n, x in recipe.named_buffers() if n.endswith("pos_embed")}
    own = dict(recipe.named_parameters()) | tables
    if own.keys() != released.keys():
        raise ValueError(f"weights of one side alone: {', '.join(sorted(own.keys() ^ released.keys()))}")
    report.compare("position tables", tables, {name: released[name] for name in tables}, tolerance=1e-6)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(released[name])


def check(recorded: Recorded, report: Report) -> None:
    """Compare one recording; see the module."""
    meta = recorded.meta
    recipe: Any = build_recipe(config_of(meta))
    load(recipe, recorded.under("state/"), report)
    side = meta["img_size"] // meta["patch_size"]
    masks = masks_of(recorded["noise"], meta, (side, side))
    predicted = torch.zeros_like(recorded["mask"])  # [B, N]
    predicted[masks.targets.image_of_token, masks.targets.index] = 1
    report.compare("predicted patches", predicted, recorded["mask"], tolerance=0)
    mixed: list[Tensor] = []
    for block in recipe.predictor.blocks:
        block.norm_context.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0]))
    out = recipe(View(recorded["images"], masks))
    out.loss.backward()

    def ascending(x: Tensor) -> Tensor:
        """[..., B, 1 + K, D] in the order of the noise -> class token, then patches as here."""
        order = recorded["noise"].argsort(dim=1)[:, : x.shape[-2] - 1].argsort(dim=1) + 1
        order = torch.cat([torch.zeros_like(order[:, :1]), order], dim=1)  # [B, 1 + K]
        return x.gather(-2, order[..., None].expand_as(x))

    maps = recipe.encoder.forward_tokens(recorded["images"], masks.context, layers=layers_of(meta))
    ours = [torch.cat([x.prefix, x.patches.unflatten(0, (len(x.prefix), -1))], dim=1) for x in maps]  # [B, 1 + K, D]
    report.compare("outputs of blocks", torch.stack(ours), ascending(recorded["feature_maps"]))
    weighted = ascending(recorded["weighted_feature_maps"].movedim(-1, 0))  # [depth, B, 1 + K, D]
    report.compare("mixes", torch.stack(mixed), weighted.flatten(1, 2))
    report.compare("target", out.prediction.target, recorded["target"].flatten(0, 1))
    report.compare("prediction", out.prediction.prediction, recorded["prediction"].flatten(0, 1))
    report.compare("loss", out.loss, recorded["loss"])
    gradients = {name: p.grad for name, p in recipe.named_parameters() if p.grad is not None}
    report.compare("gradients", gradients, our_names(recorded.under("grad/")))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
