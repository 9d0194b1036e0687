"""Compare VISReg, and its training loss, with recorded numbers of the released code.

A recording has embeddings of views ``z`` [V, B, D] and the directions that were drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.visreg"

import torch
from torch import nn

from jepa_kit.joint_embedding import JointEmbedding
from jepa_kit.losses import L2, VISReg
from jepa_kit.losses.sliced import quantiles
from jepa_kit.trials.recorded import Recorded, Report, run_check


def check(recorded: Recorded, report: Report) -> None:
    """Compare quantiles, the three terms, the regulariser, the whole loss, and gradients of both."""
    meta = recorded.meta
    z, directions = recorded["z"].requires_grad_(), recorded["directions"]
    width, slices = directions.shape
    report.compare("quantiles", quantiles(z.shape[1]), recorded["quantiles"])
    visreg = VISReg(embed_dim=width, out_dim=width, slices=slices)
    terms = visreg.terms(z.transpose(0, 1), directions)
    for name, term in terms.items():
        report.compare(name, term, recorded.numbers["visreg"][name])
    loss = visreg.compare(z.transpose(0, 1), directions)
    report.compare("loss", loss, recorded["loss"])
    report.compare("gradient", torch.autograd.grad(loss, z)[0], recorded["grad_z"])

    visreg.directions = lambda progress, like: directions  # type: ignore[method-assign]
    lamb = meta["lamb"]
    losses = [("l2", L2(), 1 - lamb), ("visreg", visreg, lamb)]
    recipe = JointEmbedding(encoder=nn.Identity(), losses=losses, centre=meta["n_global"])
    rows = z.flatten(0, 1)
    out = recipe.compare(rows, rows, meta["views"])
    report.compare("training: invariance", out.terms["l2"], recorded.numbers["full"]["invariance"])
    report.compare("training: loss", out.loss, recorded.numbers["full"]["loss"])
    report.compare("training: gradient", torch.autograd.grad(out.loss, z)[0], recorded["full/grad_z"])


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
