"""Compare a CAE of jepa_kit's ordinary parts with recorded numbers of the released code.

Compared are position tables, and for each step predicted and target tokens, scores of the codes, and both losses; the
gradients of the first step. In the first step the targets are those of another encoder, as in the released code; from
the second on they are those of the current encoder. The recorded codes of the patches replace those of the tokenizer.

    B images    N patches of an image    K codes    D width
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.cae"

import torch
from torch import Tensor

from jepa_kit.config import Config, config_from_dict
from jepa_kit.encoders.positions import sincos_2d
from jepa_kit.from_config import build_recipe
from jepa_kit.maskers.packing import mask_batch
from jepa_kit.structures import View
from jepa_kit.trials.recorded import Recorded, Report, run_check

from ..beit.check import compare_gradients, load  # its recorded codes too
from . import parts, recipe  # noqa: F401 (registers them)

NAMES = {
    r"^predictor\.mask_token": "mask_token",
    r"^predictor\.": "regresser.",
    r"^code_predictor\.": "decoder.",
    r"^regresser\.blocks\.(\d+)\.attn\.(q|v)\.bias": r"regresser.blocks.\1.cross_attn.\2_bias",
    r"^regresser\.blocks\.(\d+)\.attn\.": r"regresser.blocks.\1.cross_attn.",
    r"^regresser\.blocks\.(\d+)\.norm_(q|k|v)\.": r"regresser.blocks.\1.norm1_\2.",
    r"^regresser\.blocks\.(\d+)\.(norm2|mlp)\.": r"regresser.blocks.\1.\2_cross.",
    r"^regresser\.blocks\.(\d+)\.scale([12])$": r"regresser.blocks.\1.gamma_\2_cross",
    r"^regresser\.blocks\.": "regresser.regressor_blocks.",
    r"^decoder\.blocks\.": "decoder.decoder_blocks.",
    r"^decoder\.proj\.": "decoder.head.",
    r"\.scale([12])$": r".gamma_\1",
}
"""Patterns in our names, and the released ones."""


def config_of(meta: Mapping[str, Any]) -> Config:
    """Return the config of a recording's settings; they are those of configs/in1k_vitb16.yaml but for sizes."""
    if meta["decoder_embed_dim"] != meta["embed_dim"]:
        raise ValueError("decoder_embed_dim must be embed_dim, as in the released runs: no map between them is built")
    decoder = {"num_heads": meta["decoder_num_heads"], "norm_eps": meta["layer_norm_eps"]}
    decoder["layer_scale"] = meta["decoder_layer_scale"]
    return config_from_dict(
        {
            "recipe": {"name": "cae"},
            "masker": {"name": "blockwise", "ratio": 0.5},
            "encoder": {
                "name": "vit",
                "patch_size": meta["patch_size"],
                "embed_dim": meta["embed_dim"],
                "depth": meta["depth"],
                "num_heads": meta["num_heads"],
                "norm_eps": meta["layer_norm_eps"],
                "layer_scale": meta["layer_scale"],
                "class_token": True,
            },
            "predictor": {"name": "cae_regressor", "depth": meta["regressor_depth"], **decoder},
            "target": {"name": "representation", "masked_at": "input", "norm": "none"},
            "code_predictor": {"name": "cae_decoder", "depth": meta["decoder_depth"], **decoder},
            "code_target": {"name": "recorded_codes", "vocabulary": meta["vocabulary"]},
            "loss": {"name": "l2", "weight": meta["align_loss_weight"], "average": "patches"},
            "target_update": {"name": "tied"},
            "data": {"image_size": meta["img_size"]},
        }
    )


def columns_first(table: Tensor) -> Tensor:
    """Return released positions [1 + N, D] as ours [N, D]: the halves swap, and the class token's are zero."""
    return torch.cat(table[1:].chunk(2, dim=1)[::-1], dim=1)


def compare_step(report: Report, recorded: Recorded, i: int, cae: Any, view: View) -> Tensor:
    """Compare outputs and losses of step ``i``; return the loss."""
    out, step = cae(view), recorded.numbers["steps"][i]
    tokens, weight = out.prediction.prediction, recorded.meta["align_loss_weight"]
    for name, ours, theirs in (
        ("predicted tokens", tokens, recorded[f"step{i}/latent_prediction"].flatten(0, 1)),
        ("target tokens", out.prediction.target, recorded[f"step{i}/latent_target"].flatten(0, 1)),
        ("scores", cae.code_predictor(tokens, view.masks), recorded[f"step{i}/logits"]),
        ("loss of codes", out.terms["codes"], step["loss_main"]),
        ("loss of alignment", weight * out.terms["l2"], step["loss_align"]),
        ("loss", out.loss, step["loss"]),
    ):
        report.compare(f"step {i}: {name}", ours, theirs)
    return out.loss


def check(recorded: Recorded, report: Report) -> None:
    """Compare one recording; see the module."""
    meta, state = recorded.meta, recorded.under("state/")
    cae: Any = build_recipe(config_of(meta))
    load(cae, state, NAMES)
    side = meta["img_size"] // meta["patch_size"]
    table = sincos_2d(meta["embed_dim"], (side, side))
    for part, name in {
        "encoder": "encoder.pos_embed",
        "predictor": "rd_pos_embed",
        "code_predictor": "rd_pos_embed",
    }.items():
        report.compare(f"positions of {part}", table, columns_first(state[name][0]), tolerance=1e-6)
        getattr(cae, part).pos_embed.copy_(state[name][0, 1:])
    first = copy.deepcopy(cae.encoder)  # computes the targets of the first step
    load(first, state, {"^": "alignment_encoder.", **NAMES})
    optimizer = torch.optim.SGD(cae.parameters(), lr=meta["lr"])
    for i in range(len(recorded.numbers["steps"])):
        hidden = recorded["masks"][i].bool().numpy()[None]
        view = View(recorded["images"][i], mask_batch(~hidden, hidden, (side, side)))
        cae.code_target.codes = recorded["token_ids"][i]
        if i:
            loss = compare_step(report, recorded, i, cae, view)
        else:
            with patch.object(cae, "targets_at", lambda *where: cae.target(*where, first).detach()):
                loss = compare_step(report, recorded, i, cae, view)
        optimizer.zero_grad()
        loss.backward()
        if not i:
            compare_gradients(report, cae, recorded.under("step0/grad/"), NAMES)
        optimizer.step()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
