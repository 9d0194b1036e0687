"""Compare SimCLR's loss and its gradients with recorded numbers of two other implementations.

A recording has embeddings of two or more views, as ``z0``, ``z1``, ... [B, D], or as ``NAME/z`` [V * B, D], view by
view.
"""

from __future__ import annotations

import sys
from itertools import count, takewhile
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.simclr"  # for the relative import

import torch
from torch import nn

from jepa_kit.trials.recorded import Recorded, Report, run_check

from .recipe import SimCLR


def check(recorded: Recorded, report: Report) -> None:
    """Compare the loss and the gradient of each set of views."""
    recipe = SimCLR(encoder=nn.Identity(), head=nn.Identity(), temperature=recorded.meta["temperature"])
    names = [f"z{k}" for k in takewhile(lambda k: f"z{k}" in recorded, count())]
    sets = {"": ([recorded[name] for name in names], [recorded[f"grad_{name}"] for name in names])} if names else {}
    for prefix in sorted({name.removesuffix("z") for name in recorded.unread if name.endswith("/z")}):
        sets[prefix] = [recorded[f"{prefix}z"]], [recorded[f"{prefix}grad_z"]]
    for prefix, (z, gradient) in sets.items():
        own = torch.cat(z).requires_grad_()
        views, rest = divmod(len(own), recorded.meta["batch_size"])
        if rest:
            raise ValueError(
                f"{prefix}z has {len(own)} rows, which is no multiple of batch_size (={recorded.meta['batch_size']})"
            )
        loss = recipe.nt_xent(own, views)
        loss.backward()
        assert own.grad is not None
        report.compare(f"{views} views: loss", loss, recorded[f"{prefix}loss"])
        report.compare(f"{views} views: gradient", own.grad, torch.cat(gradient))


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
