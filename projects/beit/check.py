"""Compare a BEiT of jepa_kit's ordinary parts with recorded numbers of the released code: scores, loss, gradients.

The recorded codes of the patches replace those of the tokenizer.

    B images    N patches of an image    P masked patches    K codes    D width
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.beit"

import torch
from torch import Tensor, nn

from jepa_kit.config import Config, config_from_dict
from jepa_kit.from_config import build_recipe
from jepa_kit.interfaces import Encoder
from jepa_kit.maskers.in_place import in_place
from jepa_kit.maskers.packing import mask_batch
from jepa_kit.registry import TARGETS
from jepa_kit.structures import MaskBatch, PatchSets, View
from jepa_kit.trials.recorded import Recorded, Report, run_check

NAMES = {
    r"^encoder\.": "",
    r"^predictor\.proj\.": "lm_head.",
    r"\.scale([12])$": r".gamma_\1",
    r"relative\.tables\.0$": "rel_pos_bias.relative_position_bias_table",
    r"relative\.tables\.(\d+)$": r"blocks.\1.attn.relative_position_bias_table",
}
"""Patterns in our names, and the released ones."""


@TARGETS.register("recorded_codes")
class RecordedCodes(nn.Module):
    """Return the recorded codes [B, N] of the batch, given as the attribute ``codes``, as targets."""

    needs_encoder = False
    codes: Tensor

    def __init__(self, *, vocabulary: int) -> None:
        super().__init__()
        self.out_dim = vocabulary

    def forward(self, images: Tensor, patches: PatchSets, encoder: Encoder | None) -> Tensor:
        """[B, 3, h, w] -> [P] int64."""
        return patches.gather(self.codes)


def released_names(values: Mapping[str, Tensor], names: Mapping[str, str] = NAMES) -> dict[str, Tensor]:
    """Return tensors by their released names, as views of ours.

    Args:
        values: by our names; those of a target encoder are left out. Released biases of queries and values are
            parameters of their own, and keys have none.
        names: regular expressions, and what replaces them.
    """
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if name.startswith("target_encoder."):
            continue
        for pattern, released in names.items():
            name = re.sub(pattern, released, name)
        if name.endswith("attn.qkv.bias"):
            found |= {
                name.replace("qkv.bias", f"{kind}_bias"): x for kind, x in zip("qkv", value.chunk(3), strict=True)
            }
            del found[name.replace("qkv.bias", "k_bias")]
        else:
            found[name] = value[None] if name.endswith(("cls_token", "mask_token")) else value
    return found


def load(module: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str] = NAMES) -> None:
    """Copy released weights into the parameters of a module in float64; the bias of keys becomes 0."""
    module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("qkv.bias"):
                parameter.zero_()
        for name, view in released_names(dict(module.named_parameters()), names).items():
            if name not in state:
                raise ValueError(f"the recording has no weight {name}")
            view.copy_(state[name])


def compare_gradients(
    report: Report, module: nn.Module, recorded: Mapping[str, Tensor], names: Mapping[str, str] = NAMES
) -> None:
    """Compare the gradients of a module with those recorded, by released name; a recording may lack some."""
    ours = released_names({name: p.grad for name, p in module.named_parameters() if p.grad is not None}, names)
    report.compare("gradients", {name: x for name, x in ours.items() if name in recorded}, recorded)


def masks_in_place(masked: Tensor, side: int) -> MaskBatch:
    """Return masks in which the encoder sees all patches, those of ``masked`` [B, N] as mask tokens."""
    hidden = masked.bool().numpy()[None]
    return in_place(mask_batch(~hidden, hidden, (side, side)))


def encoder_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the encoder of BEiT and data2vec."""
    if meta["abs_pos"] or meta["rel_pos_bias"] or not meta["shared_rel_pos_bias"]:
        raise ValueError("abs_pos and rel_pos_bias must be false and shared_rel_pos_bias true, as in the released runs")
    return {
        "name": "vit",
        "patch_size": meta["patch_size"],
        "embed_dim": meta["embed_dim"],
        "depth": meta["depth"],
        "num_heads": meta["num_heads"],
        "mlp_ratio": meta.get("mlp_ratio", 4.0),
        "norm_eps": meta["layer_norm_eps"],
        "layer_scale": meta["layer_scale"],
        "class_token": True,
        "mask_token": True,
        "positions": "none",
        "relative_bias": "shared",
        "decay_tokens": False,
    }


def config_of(meta: Mapping[str, Any]) -> Config:
    """Return the config of a recording's settings; they are those of configs/in1k_vitb16.yaml but for sizes."""
    return config_from_dict(
        {
            "masker": {"name": "in_place", "masker": {"name": "blockwise"}},
            "encoder": encoder_of(meta),
            "predictor": {"name": "tokens"},
            "target": {"name": "recorded_codes", "vocabulary": meta["vocabulary"]},
            "loss": {"name": "cross_entropy", "average": "patches"},
            "target_update": {"name": "none"},
            "data": {"image_size": meta["img_size"]},
        }
    )


def check(recorded: Recorded, report: Report) -> None:
    """Compare one recording; see the module."""
    meta = recorded.meta
    recipe: Any = build_recipe(config_of(meta))
    load(recipe, recorded.under("state/"))
    recipe.target.codes = recorded["token_ids"]
    masks = masks_in_place(recorded["masks"], meta["img_size"] // meta["patch_size"])
    out = recipe(View(recorded["images"], masks))
    out.loss.backward()
    report.compare("scores", out.prediction.prediction, recorded["logits"])
    report.compare("loss", out.loss, recorded["loss"])
    compare_gradients(report, recipe, recorded.under("grad/"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
