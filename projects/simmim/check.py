"""Compare a SimMIM of jepa_kit's ordinary parts with recorded numbers of the released code.

Compared are encoded patches, reconstructions of hidden ones, the loss and all gradients.

    B images    N patches of an image    D width    p side of a patch
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from jepa_kit.config import Config, config_from_dict
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.maskers.in_place import in_place
from jepa_kit.recipe import JEPA
from jepa_kit.structures import MaskBatch, PatchSets, View
from jepa_kit.trials.recorded import Recorded, Report, run_check

NAMES = {
    "encoder.relative.tables.0": "encoder.rel_pos_bias.relative_position_bias_table",
    "predictor.proj.weight": "decoder.0.weight",
    "predictor.proj.bias": "decoder.0.bias",
}
"""Our names, and the released ones, if they differ by more than parts of them."""

PARTS = {".scale1": ".gamma_1", ".scale2": ".gamma_2"}


def released_name(name: str) -> str:
    """Return the released name of a parameter."""
    for ours, released in PARTS.items():
        name = name.replace(ours, released)
    return NAMES.get(name, name)


def config_of(meta: Mapping[str, Any]) -> Config:
    """Return the config of a recording's settings; they are those of configs/in1k_vitb16.yaml but for sizes."""
    unit = {"name": "random", "ratio": meta["mask_ratio"], "unit": meta["mask_patch_size"]}
    return config_from_dict(
        {
            "masker": {"name": "in_place", "masker": unit},
            "encoder": {
                "name": "vit",
                "patch_size": meta["patch_size"],
                "embed_dim": meta["embed_dim"],
                "depth": meta["depth"],
                "num_heads": meta["num_heads"],
                "mlp_ratio": float(meta["mlp_ratio"]),
                "norm_eps": meta["layer_norm_eps"],
                "drop_path": meta["drop_path"],
                "class_token": True,
                "mask_token": True,
                "positions": "learned" if meta["abs_pos"] else "none",
                "relative_bias": "shared" if meta["shared_rel_pos_bias"] else "none",
                "layer_scale": meta["layer_scale"] or None,
                "decay_tokens": False,
            },
            "predictor": {"name": "tokens"},
            "target": {"name": "pixel", "norm": "none"},
            "loss": {"name": "l1", "average": "patches"},
            "target_update": {"name": "none"},
            "data": {"image_size": meta["img_size"]},
        }
    )


def masks_of(mask: Tensor) -> MaskBatch:
    """Return in-place masks from [B, H, W] with 1 at the hidden patches."""
    hidden = mask.flatten(1).bool().numpy()  # [B, N]
    image = np.arange(len(hidden))
    shown, targets = (PatchSets.from_mask(chosen, image) for chosen in (~hidden, hidden))
    return in_place(MaskBatch(shown, targets, (mask.shape[1], mask.shape[2]), torch.from_numpy(image)))


def our_rows(decoder: Tensor, patch_size: int) -> Tensor:
    """Return rows of the released decoder (channel, row, column of a pixel) in our order (row, column, channel)."""
    return rearrange(decoder, "(c p q) ... -> (p q c) ...", p=patch_size, q=patch_size)


def ours_of(released: Mapping[str, Tensor], names: Mapping[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """Return released weights or gradients by our names and in our shapes; those of key biases are zero."""
    found = {}
    for name, like in names.items():
        if name.endswith("attn.qkv.bias"):
            q, v = (released[name.replace("qkv.bias", f"{part}_bias")] for part in "qv")
            value = torch.cat([q, torch.zeros_like(q), v])
        else:
            value = released[released_name(name)]
            if name.startswith("predictor."):
                value = our_rows(value, patch_size)
        found[name] = value.reshape(like.shape)
    return found


def check(recorded: Recorded, report: Report) -> None:
    """Compare one recording; see the module."""
    meta = recorded.meta
    p = meta["patch_size"]
    config = config_of(meta)
    recipe = build_recipe(config)
    assert isinstance(recipe, JEPA)
    recipe.double()
    parameters = dict(recipe.named_parameters())
    recipe.load_state_dict(ours_of(recorded.under("state/"), parameters, p), strict=False)
    masks = masks_of(recorded["mask"])
    drawn = build_masker(config)(np.zeros(1, dtype=np.int64), seed=0, epoch=0)
    report.compare("masked patches", [drawn.targets.num_patches], recorded["mask"][0].sum(), tolerance=0)

    view = View(recorded["images"], masks)
    out = recipe(view)
    prediction = out.prediction
    assert prediction is not None
    encoded = rearrange(recorded["encoded"], "b d h w -> (b h w) d")
    report.compare("encoder", prediction.context, encoded)
    pixels = rearrange(recorded["reconstruction"], "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
    report.compare("reconstruction", prediction.prediction, masks.targets.gather(pixels))

    count = masks.targets.num_patches * p**2
    loss = out.loss * (count / (count + 1e-5))  # the released quirk
    loss.backward()
    report.compare("loss", loss, recorded["loss"])
    gradients = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in parameters.items()}
    report.compare("gradients", gradients, ours_of(recorded.under("grad/"), parameters, p))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
