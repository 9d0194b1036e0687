"""Compare a MAE of jepa_kit's ordinary parts with recorded numbers of the released code.

Compared are position tables and masks; the encoder's output, targets, predictions, loss and gradients of the first
step; then a training run in which every step uses the same images and its own masks: learning rates, weight decay,
losses and the weights after the last step.

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
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper, Schedule
from jepa_kit.engine.step import train_step
from jepa_kit.from_config import build_recipe
from jepa_kit.recipe import JEPA
from jepa_kit.structures import Grid, MaskBatch, PatchSets, View
from jepa_kit.trials.recorded import Recorded, Report, run_check, sums

PREFIXES = {
    "predictor.embed.": "decoder_embed.",
    "predictor.blocks.": "decoder_blocks.",
    "predictor.norm.": "decoder_norm.",
    "predictor.proj.": "decoder_pred.",
    "predictor.pos_embed": "decoder_pos_embed",
    "predictor.": "",  # the mask token
    "encoder.": "",
}
"""Beginnings of our names, and the released ones."""


def released_name(name: str) -> str:
    """Return the released name of a parameter or position table."""
    ours = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    return PREFIXES[ours] + name.removeprefix(ours)


def config_of(meta: Mapping[str, Any]) -> Config:
    """Return the config of a recording's settings; they are those of configs/in1k_vitb16.yaml but for sizes."""
    optimizer = re.fullmatch(r"AdamW\(betas=\(([\d.]+), ?([\d.]+)\), eps=([\d.e-]+)\).*", meta["optimizer"])
    if optimizer is None:
        raise ValueError(f"optimizer (={meta['optimizer']!r}) of the recording must begin AdamW(betas=(B1,B2), eps=E)")
    beta1, beta2, eps = map(float, optimizer.groups())
    return config_from_dict(
        {
            "masker": {"name": "random", "ratio": meta["mask_ratio"]},
            "encoder": {
                "name": "vit",
                "patch_size": meta["patch_size"],
                "embed_dim": meta["embed_dim"],
                "depth": meta["depth"],
                "num_heads": meta["num_heads"],
                "mlp_ratio": meta["mlp_ratio"],
                "qkv_bias": meta["qkv_bias"],
                "norm_eps": meta["layer_norm_eps"],
                "class_token": True,
            },
            "predictor": {
                "name": "vit",
                "width": meta["decoder_embed_dim"],
                "depth": meta["decoder_depth"],
                "num_heads": meta["decoder_num_heads"],
                "mlp_ratio": meta["mlp_ratio"],
                "norm_eps": meta["layer_norm_eps"],
                "prefix": True,
            },
            "target": {"name": "pixel", "norm": "patch" if meta["norm_pix_loss"] else "none"},
            "loss": {"name": "l2", "average": "patches"},
            "target_update": {"name": "none"},
            "data": {"image_size": meta["img_size"]},
            "optim": {
                "lr": meta["lr"],
                "start_lr": 0.0,
                "final_lr": meta["min_lr"],
                "warmup_epochs": meta["warmup_epochs"],
                "counting": "from_0",
                "weight_decay": [meta["weight_decay"]] * 2,
                "betas": [beta1, beta2],
                "eps": eps,
            },
            "train": {"epochs": meta["epochs"], "batch_size": meta["batch_size"]},
        }
    )


def masks_of(noise: Tensor, ratio: float, grid: Grid) -> MaskBatch:
    """Return the masks of numbers [B, N]: the patches of the smallest are kept, int(N * (1 - ratio)) of them."""
    order = noise.argsort(dim=1)
    kept = int(noise.shape[1] * (1 - ratio))
    sets = (order[:, :kept], order[:, kept:])
    context, targets = (PatchSets.from_padded(part.sort(dim=1).values) for part in sets)
    return MaskBatch(context, targets, grid, torch.arange(len(noise)))


def load(recipe: JEPA, state: Mapping[str, Tensor]) -> None:
    """Load the released weights and position tables, whose row of the class token is zero."""
    recipe.double()
    with torch.no_grad():
        for name, value in [*recipe.named_parameters(), *recipe.named_buffers()]:
            released = state[released_name(name)]
            value.copy_(released[0, 1:] if name.endswith("pos_embed") else released.reshape(value.shape))


def under_released_names(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their released names and in the released shapes, in which tokens have leading ones."""
    return {released_name(name): value.reshape(like[released_name(name)].shape) for name, value in values.items()}


def check_first_step(recorded: Recorded, report: Report, recipe: JEPA, view: View) -> None:
    """Compare outputs, loss and gradients of step 0."""
    masks = view.masks
    assert masks is not None
    out = recipe(view)
    out.loss.backward()
    prediction = out.prediction
    assert prediction is not None
    tokens = recipe.encoder.forward_tokens(view.images, masks.context)[0]  # type: ignore[operator]
    latent = recorded["step0/latent"]  # [B, 1 + K, D], in the order of the noise
    ascending = recorded["noise"][0].argsort(dim=1)[:, : latent.shape[1] - 1].argsort(dim=1)
    kept = latent[:, 1:].gather(1, ascending[..., None].expand(-1, -1, latent.shape[-1]))
    hidden = torch.zeros_like(recorded["step0/mask"])  # [B, N]
    hidden[masks.targets.image_of_token, masks.targets.index] = 1
    report.compare("hidden patches", hidden, recorded["step0/mask"], tolerance=0)
    report.compare("class token", tokens.prefix[:, 0], latent[:, 0])
    report.compare("encoder", tokens.patches, kept.flatten(0, 1))
    report.compare("target", prediction.target, masks.targets.gather(recorded["step0/target"]))
    report.compare("prediction", prediction.prediction, masks.targets.gather(recorded["step0/prediction"]))
    report.compare("loss", out.loss, recorded["step0/loss"])
    gradients = recorded.under("step0/grad/")
    ours = {name: p.grad for name, p in recipe.named_parameters() if p.grad is not None}
    report.compare("gradients", under_released_names(ours, gradients), gradients)
    recipe.zero_grad(set_to_none=True)


def check_run(recorded: Recorded, report: Report, recipe: JEPA, config: Config, views: Sequence[View]) -> None:
    """Train on the recorded masks with the recorded learning rates; compare losses, and the weights afterwards."""
    meta, trajectory = recorded.meta, recorded.numbers["trajectory"]
    schedule = Schedule.of(config, meta["iterations_per_epoch"])
    report.compare("learning rates", [schedule(i).lr for i in range(len(trajectory))], [s["lr"] for s in trajectory])
    optimizer = build_optimizer(recipe, betas=config.optim.betas, eps=config.optim.eps)
    decayed = {
        released_name(name): group["decayed"] for group in optimizer.param_groups for name in group["param_names"]
    }
    released = {name: name not in meta["no_weight_decay"] for name in decayed}
    report.compare("weight decay", list(decayed.values()), list(released.values()), tolerance=0)
    losses = [
        train_step(recipe, optimizer, Hyper(step["lr"], meta["weight_decay"], 1.0), [view]).loss.item()
        for step, view in zip(trajectory, views, strict=True)
    ]
    report.compare("losses", losses, [s["loss"] for s in trajectory], relative=True, tolerance=10 * report.tolerance)
    final = {name: torch.tensor(s, dtype=torch.float64) for name, s in _final(recorded).items()}
    ours = sums({released_name(name): p for name, p in recipe.named_parameters()})
    report.compare("final weights", ours, final, relative=True, tolerance=10 * report.tolerance)


def _final(recorded: Recorded) -> Mapping[str, list[float]]:
    values: Mapping[str, list[float]] = recorded.numbers["final_sum_and_sum_of_squares"]
    return values


def check(recorded: Recorded, report: Report) -> None:
    """Compare one recording; see the module."""
    config = config_of(recorded.meta)
    recipe = build_recipe(config)
    assert isinstance(recipe, JEPA)
    state = recorded.under("state/")
    tables = {released_name(name): table for name, table in recipe.named_buffers() if name.endswith("pos_embed")}
    released = {name: state[name][0, 1:] for name in tables}  # computed in float32
    report.compare("position tables", tables, released, tolerance=max(1e-6, report.tolerance))
    load(recipe, state)
    side = recorded.meta["img_size"] // recorded.meta["patch_size"]
    images = recorded["images"]
    views = [View(images, masks_of(noise, recorded.meta["mask_ratio"], (side, side))) for noise in recorded["noise"]]
    check_first_step(recorded, report, recipe, views[0])
    check_run(recorded, report, recipe, config, views)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
