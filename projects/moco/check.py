"""Compare MoCo's parts with recorded numbers of the released code.

A recording is either of versions 1 and 2 (it has a ``queue``), whole steps of a small encoder, or of version 3: the
loss in several processes, which are started here too, and both heads in one process.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.moco"  # for the relative import

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from jepa_kit.distributed.buffers import unchanged_buffers
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.registry import HEADS
from jepa_kit.structures import View
from jepa_kit.target_updates import EMA
from jepa_kit.trials.recorded import Recorded, Report, run_check

from .recipe import MoCo, MoCoV3


class Body(nn.Module):
    """The recorded encoder without its last layer or layers: tanh of a linear map, one token for each row."""

    def __init__(self, in_dim: int, width: int) -> None:
        super().__init__()
        self.body = nn.Linear(in_dim, width)

    def forward(self, rows: Tensor, patches: None = None) -> Tensor:
        """[B, in_dim] -> [B, D]."""
        return self.body(rows).tanh()


def our_names(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return released weights of an encoder by our names; ``prefix`` is ``target_`` for the momentum encoder."""
    head = "head.layers." if any(name.startswith("fc.0.") for name in state) else "head.layers.0."
    return {
        prefix + (head + name.removeprefix("fc.") if name.startswith("fc.") else f"encoder.{name}"): value
        for name, value in state.items()
    }


def check_queue(recorded: Recorded, report: Report) -> None:
    """Compare the logits, loss and queue of every call, the gradients of the first, and the final weights."""
    meta = recorded.meta
    hidden, momentum = meta["hidden"], meta["momentum"]
    layers = {"layers": 2, "hidden": hidden} if meta["mlp"] else {"layers": 1}
    recipe = MoCo(
        encoder=Body(meta["in_dim"], hidden),
        head=HEADS.build("mlp", {"out_dim": meta["dim"], **layers}, in_dim=hidden),
        target_update=EMA(momentum=(momentum, momentum)),
        queue=meta["queue"],
        temperature=meta["temperature"],
    ).double()
    query, key = (our_names(recorded.under(f"encoder_{of}/"), prefix) for of, prefix in (("q", ""), ("k", "target_")))
    buffers = {"queue": recorded["queue"].T, "pointer": recipe.pointer}
    recipe.load_state_dict({**query, **key, **buffers})
    settings = re.fullmatch(r"SGD\(lr, momentum (\S+), weight decay (\S+)\)", meta["optimizer"])
    if settings is None:
        raise ValueError(
            f"meta.optimizer (={meta['optimizer']!r}) must be 'SGD(lr, momentum NUMBER, weight decay NUMBER)'"
        )
    optimizer = build_optimizer(recipe, name="sgd", momentum=float(settings[1]))
    for group in optimizer.param_groups:
        group["decayed"] = True  # the release decays biases too
    recipe.update_target(momentum)  # the release does it at the start of a call, jepa_kit at the end
    for call in recorded.numbers["calls"]:
        name = f"call{call['call']}"
        views = [View(recorded[f"{name}/x_{of}"]) for of in "qk"]
        with unchanged_buffers(recipe):
            logits = recipe.logits(recipe.embed(views[0], recipe.get_submodule), recipe.keys(views[1]))
            report.compare(f"{name}: logits", logits, recorded[f"{name}/logits"])
            if any(other.startswith(f"{name}/grad/") for other in recorded.unread):
                recipe(*views).loss.backward()
                gradients = {name: cast(Tensor, p.grad) for name, p in recipe.named_parameters() if p.requires_grad}
                report.compare(f"{name}: gradients", gradients, our_names(recorded.under(f"{name}/grad/")))
                recipe.zero_grad()
        moved = {name: recipe.state_dict()[name].clone() for name in key}
        out = train_step(recipe, optimizer, Hyper(meta["lr"], float(settings[2]), momentum), views)
        report.compare(f"{name}: loss", out.loss, call["loss"])
        report.compare(f"{name}: queue afterwards", recipe.queue.T, recorded[f"{name}/queue_after"])
        report.compare(f"{name}: pointer afterwards", recipe.pointer, call["pointer_after"])
    final = {name: recipe.state_dict()[name] for name in query}
    report.compare("final encoder", final, our_names(recorded.under("final/encoder_q/")))
    report.compare("final momentum encoder", moved, our_names(recorded.under("final/encoder_k/"), "target_"))


def v3(meta: Mapping[str, Any], head: nn.Module, prediction_head: nn.Module) -> MoCoV3:
    """Return the recipe of a recording's settings."""
    return MoCoV3(
        encoder=nn.Identity(),
        head=head,
        prediction_head=prediction_head,
        target_update=EMA(),
        temperature=meta["temperature"],
        freeze_patch_embed=False,
    ).double()


def run_process(rank: int, meta: Mapping[str, Any], embeddings: dict[str, Tensor], folder: str) -> None:
    """Compute both losses of a process from its rows, and the gradients of their sum; save them in the folder."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=meta["processes"])
    own = {name: x.split(meta["batch_size"])[rank].clone() for name, x in embeddings.items()}
    queries = [own[name].requires_grad_() for name in ("q1", "q2")]
    recipe = v3(meta, nn.Identity(), nn.Identity())
    losses = torch.stack([recipe.contrast(q, k) for q, k in zip(queries, (own["k2"], own["k1"]), strict=True)])
    losses.sum().backward()
    torch.save((losses.detach(), [q.grad for q in queries]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def check_v3(recorded: Recorded, report: Report) -> None:
    """Compare the losses and gradients of all processes, and both heads."""
    meta = recorded.meta
    embeddings = {name: recorded[name] for name in ("q1", "q2", "k1", "k2")}
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(run_process, (dict(meta), embeddings, folder), nprocs=meta["processes"])
        results = [torch.load(f"{folder}/{rank}.pt") for rank in range(meta["processes"])]
    losses = torch.stack([of_rank for of_rank, _ in results])  # [processes, 2]
    report.compare("loss of q1 and k2", losses[:, 0], recorded["loss_q1_k2"])
    report.compare("loss of q2 and k1", losses[:, 1], recorded["loss_q2_k1"])
    for k, name in enumerate(("q1", "q2")):
        report.compare(
            f"gradient of {name}", torch.cat([of_rank[k] for _, of_rank in results]), recorded[f"grad_{name}"]
        )

    states = {of: recorded.under(f"{of}/") for of in ("projector", "predictor")}
    heads = []
    for state, in_dim in zip(states.values(), (meta["in_dim"], meta["dim"]), strict=True):
        options = {
            "layers": sum(x.ndim == 2 for x in state.values()),
            "hidden": meta["mlp_dim"],
            "out_dim": meta["dim"],
        }
        fixed = {"norm": "batch", "last_norm": "batch", "affine": False, "bias": False}
        heads.append(HEADS.build("mlp", {**options, **fixed}, in_dim=in_dim).double())
        heads[-1].layers.load_state_dict(state)
    recipe = v3(meta, *heads)
    projected = recipe.head(recorded["head/input"])
    report.compare("projector", projected, recorded["head/projected"])
    report.compare("predictor", recipe.prediction_head(projected), recorded["head/predicted"])
    statistics = recorded.under("after/projector/")
    report.compare(
        "statistics of the projector", {name: heads[0].layers.state_dict()[name] for name in statistics}, statistics
    )


def check(recorded: Recorded, report: Report) -> None:
    """Compare everything that a recording contains."""
    (check_queue if "queue" in recorded else check_v3)(recorded, report)


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return its exit status."""
    return run_check(__doc__, check, argv)


if __name__ == "__main__":
    sys.exit(main())
