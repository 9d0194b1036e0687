"""Compare a data2vec of jepa_kit's ordinary parts with recorded numbers of the released code.

Compared are all layers of the target encoder, targets, predictions and gradients of the first step; then a training
run: learning rates, momenta, weight decay, losses, targets, norms of the gradients, and the last weights of both
networks.

    B images    N patches of an image    P masked patches    D width
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.data2vec"

import torch

from jepa_kit.config import Config, config_from_dict
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper, Schedule
from jepa_kit.engine.step import train_step
from jepa_kit.from_config import build_recipe
from jepa_kit.structures import View
from jepa_kit.trials.recorded import Recorded, Report, run_check, sums

from ..beit.check import compare_gradients, encoder_of, load, masks_in_place, released_names

ONLY = {
    "l2_loss": False,
    "layer_results": "end",
    "loss_scale": -1,
    "target_layer_norm_last": True,
    "target_batch_norm": False,
    "target_instance_norm": False,
    "post_target_instance_norm": False,
    "post_target_layer_norm": True,
}
"""Settings of the released run for B; other values of them are not built here."""


def config_of(meta: Mapping[str, Any]) -> Config:
    """Return the config of a recording's settings; they are those of configs/in1k_vitb16.yaml but for sizes."""
    if other := [f"{name} (={meta[name]!r})" for name, value in ONLY.items() if meta[name] != value]:
        raise ValueError(f"settings other than those of the released run for B: {', '.join(other)}")
    betas = [float(x) for x in re.findall(r"betas=\(([\d.]+), ?([\d.]+)\)", meta["optimizer"])[0]]
    steps = meta["epochs"] * meta["iterations_per_epoch"]
    ramp = [meta["ema_decay_init"] if meta["ema_start_at"] else meta["ema_decay"], meta["ema_decay"]]
    return config_from_dict(
        {
            "masker": {"name": "in_place", "masker": {"name": "blockwise", "ratio": meta["mask_share"]}},
            "encoder": encoder_of(meta),
            "predictor": {"name": "tokens"},
            "target": {
                "name": "representation",
                "layers": [n + 1 for n in meta["target_layers"]],
                "final_norm": False,
                "mean_norm": "layer",
            },
            "loss": {"name": "smooth_l1", "beta": meta["l1_beta"], "average": "patches"},
            "target_update": {"name": "ema", "momentum": ramp, "until": meta["ema_start_at"] / steps or 1.0},
            "data": {"image_size": meta["img_size"]},
            "optim": {
                "lr": meta["lr"],
                "start_lr": 0.0,
                "final_lr": meta["min_lr"],
                "warmup_epochs": meta["warmup_epochs"],
                "counting": "both_ends",
                "weight_decay": [meta["weight_decay"]] * 2,
                "betas": betas,
                "clip_grad": meta["clip_grad"],
            },
            "train": {"epochs": meta["epochs"], "batch_size": meta["batch_size"]},
        }
    )


def check_first_step(recorded: Recorded, report: Report, recipe: Any, view: View) -> None:
    """Compare outputs and gradients of step 0."""
    depth = recorded.meta["depth"]
    layers = recipe.target_encoder.forward_layers(view.images, layers=range(1, depth + 1), norm=False)
    report.compare("layers of the target encoder", torch.stack(layers), recorded["step0/teacher_layers"].flatten(1, 2))
    out = recipe(view)
    out.loss.backward()
    report.compare("targets", out.prediction.target, recorded["step0/target"])
    report.compare("predictions", out.prediction.prediction, recorded["step0/prediction"])
    compare_gradients(report, recipe, recorded.under("step0/grad/"))
    recipe.zero_grad(set_to_none=True)


def check_run(recorded: Recorded, report: Report, recipe: Any, config: Config, views: Sequence[View]) -> None:
    """Train with the recorded learning rates and momenta; compare schedules, losses, and the weights afterwards."""
    meta, numbers, looser = recorded.meta, recorded.numbers, 10 * report.tolerance
    trajectory, momenta = numbers["trajectory"], numbers["ema_decay_used"]
    schedule = Schedule.of(config, meta["iterations_per_epoch"], recipe.momentum)
    report.compare("learning rates", [schedule(i).lr for i in range(len(views))], [step["lr"] for step in trajectory])
    ours = [schedule(momentum_step(i, meta)).momentum for i in range(len(views))]
    report.compare("momenta", ours, momenta)
    optimizer = build_optimizer(recipe, betas=config.optim.betas, eps=config.optim.eps)
    decayed = {
        name: torch.tensor(float(group["decayed"]))
        for group in optimizer.param_groups
        for name in released_names(dict(zip(group["param_names"], group["params"], strict=True)))
    }
    released = {name: torch.tensor(float(name not in meta["no_weight_decay"])) for name in decayed}
    report.compare("weight decay", decayed, released)
    found: dict[str, list[float]] = {"loss": [], "grad_norm_before_clipping": [], "target_sum_of_squares": []}
    for view, step, momentum in zip(views, trajectory, momenta, strict=True):
        hyper = Hyper(step["lr"], meta["weight_decay"], momentum)
        update: Any = train_step(recipe, optimizer, hyper, [view], clip_grad=config.optim.clip_grad)
        values = (update.loss, update.grad_norm, update.prediction.target.square().sum())
        for each, value in zip(found.values(), values, strict=True):
            each.append(value.item())
    for key, each in found.items():
        report.compare(key, each, [step[key] for step in trajectory], relative=True, tolerance=looser)
    for name, network in (("student", recipe), ("teacher", recipe.target_encoder)):
        final = {
            k: torch.tensor(x, dtype=torch.float64) for k, x in numbers[f"final_{name}_sum_and_sum_of_squares"].items()
        }
        weights = sums(released_names(dict(network.named_parameters())))
        theirs = {k: x for k, x in final.items() if k in weights or name == "student"}
        report.compare(f"final weights of the {name}", weights, theirs, relative=True, tolerance=looser)


def momentum_step(step: int, meta: Mapping[str, Any]) -> int:
    """Return the step whose momentum the release uses: the last of the ramp stays until the end of its epoch."""
    start, length = meta["ema_start_at"], meta["iterations_per_epoch"]
    return start - 1 if start and start <= step < (start // length + 1) * length else step


def check(recorded: Recorded, report: Report) -> None:
    """Compare one recording; see the module."""
    meta = recorded.meta
    config = config_of(meta)
    recipe: Any = build_recipe(config)
    load(recipe, recorded.under("student/"))
    load(recipe.target_encoder, recorded.under("teacher/"))
    side = meta["img_size"] // meta["patch_size"]
    masks = recorded["masks"].flatten(2)
    views = [View(x, masks_in_place(m, side)) for x, m in zip(recorded["images"], masks, strict=True)]
    check_first_step(recorded, report, recipe, views[0])
    check_run(recorded, report, recipe, config, views)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
