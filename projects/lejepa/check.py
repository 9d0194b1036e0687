"""Compare SIGReg, and the loss of LeJEPA's minimal example, with recorded numbers of the released code.

A recording has the directions that each call drew, and under ``lejepa/`` projections of views [V, B, D].
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.lejepa"

from torch import nn

from jepa_kit.joint_embedding import JointEmbedding
from jepa_kit.losses import L2, SIGReg
from jepa_kit.trials.recorded import Recorded, Report, run_check


def check(recorded: Recorded, report: Report) -> None:
    """Compare the tables, all calls, and the whole loss."""
    meta = recorded.meta
    width = meta["dim"]
    loss = SIGReg(
        embed_dim=width,
        out_dim=width,
        slices=meta["num_slices"],
        points=meta["n_points"],
        t_max=meta["t_max"],
    ).double()
    for name, table in (("t", loss.t), ("phi", loss.normal), ("weights", loss.weights)):
        report.compare(name, table, recorded[name])
    for call in range(meta["calls"]):
        of = f"call{call}/"
        x, directions = recorded[of + "x"].requires_grad_(), recorded[of + "directions"]
        statistics = loss.statistics(x[:, None], directions)[0]
        report.compare(of + "per_slice", statistics, recorded[of + "per_slice"])
        statistics.mean().backward()
        assert x.grad is not None
        report.compare(of + "loss", statistics.mean(), recorded[of + "loss"])
        report.compare(of + "gradient", x.grad, recorded[of + "grad_x"])
    check_whole(recorded, report)


def check_whole(recorded: Recorded, report: Report) -> None:
    """Compare the loss of the minimal example, and its terms, which have 17 points to 3."""
    meta, numbers = recorded.meta, recorded.numbers["lejepa"]
    z, directions = recorded["lejepa/proj"].requires_grad_(), recorded["lejepa/directions"]
    width, slices = directions.shape
    sigreg = SIGReg(embed_dim=width, out_dim=width, slices=slices).double()
    sigreg.directions = lambda progress, like: directions  # type: ignore[method-assign]
    lamb = meta["lamb"]
    recipe = JointEmbedding(encoder=nn.Identity(), losses=[("l2", L2(), 1 - lamb), ("sigreg", sigreg, lamb)])
    rows = z.flatten(0, 1)
    out = recipe.compare(rows, rows, meta["lejepa_views"])
    out.loss.backward()
    assert z.grad is not None
    for name, value in (("sigreg", out.terms["sigreg"]), ("invariance", out.terms["l2"]), ("loss", out.loss)):
        report.compare(f"lejepa: {name}", value, numbers[name])
    report.compare("lejepa: gradient", z.grad, recorded["lejepa/grad_proj"])


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
