"""Compare the loss ``vicreg`` with recorded numbers of the released code of VICReg.

C-JEPA has no public code. A recording has two branches of embeddings, ``x`` and ``y`` [B, D], the loss and its
gradients, its terms, and the output of a projector.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.cjepa"

import itertools

import torch
from torch import nn

from jepa_kit.heads import MLPHead
from jepa_kit.losses import VICReg
from jepa_kit.structures import MaskBatch, PatchSets, Prediction
from jepa_kit.trials.recorded import Recorded, Report, run_check


def check(recorded: Recorded, report: Report) -> None:
    """Compare terms, loss, gradients and the projector."""
    meta = recorded.meta
    x, y = recorded["x"].requires_grad_(), recorded["y"].requires_grad_()
    weights = dict(zip(("invariance", "variance", "covariance"), meta["coefficients"], strict=True))
    loss = VICReg(embed_dim=meta["dim"], out_dim=meta["dim"], **weights)
    one_patch = PatchSets.from_padded(torch.zeros(len(x), 1, dtype=torch.int64))
    prediction = Prediction(x, y, x, MaskBatch(one_patch, one_patch, (1, 1), torch.arange(len(x))))
    for name, term in loss.terms(prediction).items():
        report.compare(name, term, meta["terms"][name])
    total = loss(prediction)
    total.backward()
    report.compare("loss", total, recorded["loss"])
    for name, z in (("x", x), ("y", y)):
        assert z.grad is not None
        report.compare(f"gradient of {name}", z.grad, recorded[f"grad_{name}"])
    widths = [meta["in_dim"], *map(int, meta["mlp"].split("-"))]
    report.compare("projector", projector(recorded, widths)(recorded["projector_input"]), recorded["projector_output"])


def projector(recorded: Recorded, widths: list[int]) -> nn.Module:
    """Return linear layers with batch norm and ReLU between them, of these widths, with the recorded weights."""
    *hidden, last = itertools.pairwise(widths)
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(hidden):
        layer = MLPHead(in_dim=before, out_dim=after, layers=1, last_norm="batch").double()
        for k in (0, 1):
            layer.layers[k].load_state_dict(recorded.under(f"projector/{3 * i + k}."))
        layers += [layer, nn.ReLU()]
    layer = MLPHead(in_dim=last[0], out_dim=last[1], layers=1, bias=False).double()
    layer.layers[0].load_state_dict(recorded.under(f"projector/{3 * len(hidden)}."))
    return nn.Sequential(*layers, layer)


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
