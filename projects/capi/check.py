"""Compare CAPI's clusters, head and loss with recorded numbers of the released code.

The calls of a recording follow each other: after each, AdamW moves the clusters.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.capi"  # for the relative import

import torch
from torch import Tensor

from jepa_kit.config.sections import GroupConfig
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper, set_hyper
from jepa_kit.losses import CrossEntropy
from jepa_kit.registry import HEADS
from jepa_kit.structures import MaskBatch, PatchSets, Prediction
from jepa_kit.trials.recorded import Recorded, Report, run_check

from .recipe import Clusters

WEIGHT_DECAY = 0.01
"""Torch's default for AdamW, which applies to the bias too."""


def masks_of(indices: Tensor, images: int, patches: int) -> MaskBatch:
    """Return masks whose targets are the patches numbered image * patches + patch, in this order."""
    image = indices // patches
    sets, lengths = image.unique_consecutive(return_counts=True)
    targets = PatchSets.pack(list((indices % patches).split(lengths.tolist())), sets)
    return MaskBatch(PatchSets.full(images, patches), targets, (1, patches), sets)


def check(recorded: Recorded, report: Report) -> None:
    """Compare all calls, and the clusters at the end."""
    meta = recorded.meta
    clusters = Clusters(
        meta["dim"],
        meta["clusters"],
        teacher_temperature=meta["target_temp"],
        cluster_temperature=meta["pred_temp"],
        iterations=meta["n_sk_iter"],
        positionwise=meta["positionwise_sk"],
        bias=meta["bias"],
        eps=meta["eps"]["sinkhorn"],
    ).double()
    clusters.load_state_dict(recorded.under("clustering/state/"))
    head = HEADS.build("prototypes", {"out_dim": meta["clusters"], "learned_scale": True}, in_dim=meta["pred_dim"])
    state = recorded.under("head/state/last_layer.")
    head.double().load_state_dict({"weight": state["weight_v"], "scale": state["weight_g"]})
    loss = CrossEntropy(temperature=meta["student_temp"], average="patches")

    lr, *betas = map(float, re.findall(r"[\d.]+(?:e-?\d+)?", meta["clustering_optimizer"])[:3])
    everything = GroupConfig(match="*", weight_decay=1.0)
    optimizer = build_optimizer(clusters, betas=(betas[0], betas[1]), rules=(everything,))
    set_hyper(optimizer, Hyper(lr, WEIGHT_DECAY, momentum=1.0))

    for call in recorded.numbers["calls"]:
        name = f"call{call['call']}"
        assigned, fit = clusters(recorded[f"{name}/teacher_patches"])
        report.compare(f"{name}: assignments", assigned, recorded[f"{name}/assignments"])
        report.compare(f"{name}: loss of the clusters", fit, call["clustering_loss"])
        fit.backward()
        if call["call"] == 0:
            gradients = {key: p.grad for key, p in clusters.named_parameters() if p.grad is not None}
            report.compare("gradient of the clusters", gradients, recorded.under("clustering/grad/"))
        optimizer.step()
        optimizer.zero_grad()

        predictions = recorded[f"{name}/student_predictions"].requires_grad_()
        masks = masks_of(recorded[f"{name}/predict_indices"], *assigned.shape[:2])
        scores = head(predictions)
        report.compare(f"{name}: scores", scores, recorded[f"{name}/student_logits"])
        value = loss(Prediction(scores, masks.targets.gather(assigned), predictions, masks))
        report.compare(f"{name}: loss of the predictions", value, call["student_loss"])
        value.backward()
        assert isinstance(predictions.grad, torch.Tensor)
        report.compare(f"{name}: gradient", predictions.grad, recorded[f"{name}/grad_student_predictions"])
    report.compare("clusters at the end", dict(clusters.named_parameters()), recorded.under("clustering/final/"))


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
