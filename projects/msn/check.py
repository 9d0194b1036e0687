"""Compare MSN's loss, targets and gradients with recorded numbers of the released code.

Each call of a recording has its own sharpening, and Sinkhorn and the entropy term may be on or off.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.msn"  # for the relative import

import torch
from torch import nn

from jepa_kit.registry import HEADS
from jepa_kit.target_updates import EMA
from jepa_kit.trials.recorded import Recorded, Report, run_check

from .recipe import MSN

ITERATIONS = 3
"""Of Sinkhorn in the released code."""


def check(recorded: Recorded, report: Report) -> None:
    """Compare all calls."""
    meta = recorded.meta
    smoothing, k = meta["label_smoothing"], meta["num_proto"]
    labels = (1 - smoothing) * torch.eye(k, dtype=torch.float64) + smoothing / k
    report.compare("labels of prototypes", labels, recorded["prototype_labels"])
    for call in recorded.numbers["calls"]:
        name = f"call{call['call']}"
        recipe = MSN(
            encoder=nn.Identity(),
            head=nn.Identity(),
            prototype_head=HEADS.build("prototypes", {"out_dim": k}, in_dim=meta["dim"]),
            target_update=EMA(),
            temperature=meta["temperature"],
            sharpening=call["sharpen"],
            sinkhorn=ITERATIONS if call["use_sinkhorn"] else 0,
            label_smoothing=smoothing,
            me_max=meta["memax_weight"],
            entropy=meta["ent_weight"] if call["use_entropy"] else 0.0,
        ).double()
        recipe.prototype_head.load_state_dict({"weight": recorded["prototypes"]})
        anchors = recorded[f"{name}/anchors"].requires_grad_()
        targets = recipe.targets(recorded[f"{name}/targets"])
        out = recipe.compare(anchors, targets)
        out.loss.backward()
        report.compare(f"{name}: targets", targets.repeat(meta["num_views"], 1), recorded[f"{name}/assignments"])
        for term, value in out.terms.items():
            if term != "entropy" or call["use_entropy"]:
                report.compare(f"{name}: {term}", value, call[term])
        report.compare(f"{name}: loss", out.loss, call["loss"])
        gradients = {"anchors": anchors.grad, "prototypes": recipe.prototype_head.weight.grad}
        for of, gradient in gradients.items():
            assert isinstance(gradient, torch.Tensor)
            report.compare(f"{name}: gradient of {of}", gradient, recorded[f"{name}/grad_{of}"])


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
