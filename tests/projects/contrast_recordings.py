"""Recordings of plain float64 maths for the checks of simclr, moco and msn, with other settings than the released."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def write(path: Path, meta: dict[str, Any], tensors: dict[str, Tensor], numbers: dict[str, Any] | None = None) -> Path:
    """Write a recording and return its path without an ending."""
    save_file({name: x.detach().clone().contiguous() for name, x in tensors.items()}, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps({"meta": meta, "numbers": numbers}))
    return path


def nt_xent(z: Tensor, images: int, temperature: float) -> Tensor:
    """One row and one pair after another, as equation 1 of SimCLR."""
    z = unit(z)
    losses = []
    for i in range(len(z)):
        share = {j: (z[i] @ z[j] / temperature).exp() for j in range(len(z)) if j != i}
        same = sum(value for j, value in share.items() if j % images == i % images)
        losses.append(-torch.log(same / sum(share.values())))
    return sum(losses) / len(losses)


def simclr(path: Path) -> Path:
    """Two views as ``z0``, ``z1``, and four one after another."""
    meta = {"batch_size": 3, "temperature": 0.5}
    z, four = noise(6, 5, seed=1).requires_grad_(), noise(12, 5, seed=2).requires_grad_()
    losses = [nt_xent(x, 3, 0.5) for x in (z, four)]
    sum(losses).backward()
    tensors = {"loss": losses[0][None], "four/loss": losses[1][None], "four/z": four, "four/grad_z": four.grad}
    for k in range(2):
        tensors |= {f"z{k}": z[3 * k : 3 * k + 3], f"grad_z{k}": z.grad[3 * k : 3 * k + 3]}
    return write(path, meta, tensors)


def moco(path: Path) -> Path:
    """A head of two layers and a queue of two batches; keys are computed after the momentum encoder has moved."""
    b, dim, in_dim, hidden, size, m, t = 3, 4, 5, 6, 6, 0.7, 0.2
    settings = {"batch_size": b, "dim": dim, "in_dim": in_dim, "hidden": hidden, "queue": size, "momentum": m}
    optimizer = "SGD(lr, momentum 0.8, weight decay 1e-2)"
    meta = {**settings, "temperature": t, "mlp": True, "lr": 0.1, "optimizer": optimizer, "calls": 3}
    shapes = {"body.weight": (hidden, in_dim), "body.bias": (hidden,), "fc.0.weight": (hidden, hidden)}
    shapes |= {"fc.0.bias": (hidden,), "fc.2.weight": (dim, hidden), "fc.2.bias": (dim,)}
    q = {name: noise(*shape, seed=k).requires_grad_() for k, (name, shape) in enumerate(shapes.items())}
    k = {name: noise(*shape, seed=10 + k) for k, (name, shape) in enumerate(shapes.items())}
    queue = unit(noise(size, dim, seed=30)).T.clone()
    tensors = {"queue": queue.clone(), **{f"encoder_q/{n}": x.detach().clone() for n, x in q.items()}}
    tensors |= {f"encoder_k/{n}": x for n, x in k.items()}
    sgd = torch.optim.SGD(q.values(), lr=0.1, momentum=0.8, weight_decay=1e-2)
    calls = []

    def embed(w: dict[str, Tensor], x: Tensor) -> Tensor:
        x = torch.tanh(x @ w["body.weight"].T + w["body.bias"])
        x = (x @ w["fc.0.weight"].T + w["fc.0.bias"]).clamp(min=0)
        return unit(x @ w["fc.2.weight"].T + w["fc.2.bias"])

    for call in range(3):
        x_q, x_k = noise(b, in_dim, seed=40 + call), noise(b, in_dim, seed=50 + call)
        k = {name: m * x + (1 - m) * q[name].detach() for name, x in k.items()}
        a, key = embed(q, x_q), embed(k, x_k)
        logits = torch.cat([(a * key).sum(1, keepdim=True), a @ queue], 1) / t
        loss = (logits.exp().sum(1).log() - logits[:, 0]).mean()
        sgd.zero_grad()
        loss.backward()
        pointer = call * b % size
        queue[:, pointer : pointer + b] = key.T
        values = {"x_q": x_q, "x_k": x_k, "logits": logits, "queue_after": queue}
        tensors |= {f"call{call}/{name}": x.detach().clone() for name, x in values.items()}
        if call == 0:
            tensors |= {f"call0/grad/{name}": x.grad.clone() for name, x in q.items()}
        calls.append({"call": call, "loss": loss.item(), "pointer_after": (pointer + b) % size})
        sgd.step()
    tensors |= {f"final/encoder_q/{name}": x for name, x in q.items()} | {
        f"final/encoder_k/{n}": x for n, x in k.items()
    }
    return write(path, meta, tensors, {"calls": calls})


def msn(path: Path) -> Path:
    """Smoothed labels, both regularisers, and targets balanced by divisions."""
    b, views, dim, k, t, smoothing, memax, ent = 4, 2, 5, 6, 0.2, 0.1, 0.5, 0.3
    meta = {"batch_size": b, "num_views": views, "dim": dim, "num_proto": k, "temperature": t}
    meta |= {"label_smoothing": smoothing, "memax_weight": memax, "ent_weight": ent}
    labels = (1 - smoothing) * torch.eye(k, dtype=torch.float64) + smoothing / k
    tensors, calls = {"prototypes": noise(k, dim, seed=1), "prototype_labels": labels}, []
    for call, (sharpen, balanced, use_entropy) in enumerate([(0.5, True, True), (0.25, False, False)]):
        prototypes, anchors = tensors["prototypes"].clone(), noise(views * b, dim, seed=2 + call)
        targets = noise(b, dim, seed=8 + call)
        prototypes.requires_grad_(), anchors.requires_grad_()

        def probabilities(x: Tensor, prototypes: Tensor = prototypes) -> Tensor:
            e = (unit(x) @ unit(prototypes).T / t).exp()
            return e / e.sum(1, keepdim=True) @ labels

        with torch.no_grad():
            q = probabilities(targets) ** (1 / sharpen)
            q = q / q.sum(1, keepdim=True)
            for _ in range(3 * balanced):
                q = q / q.sum(0) / k
                q = q / q.sum(1, keepdim=True)
            q = q.repeat(views, 1)
        p = probabilities(anchors)
        cross, mean = -(q * p.log()).sum(1).mean(), p.mean(0)
        me_max, entropy = math.log(k) + (mean * mean.log()).sum(), -(p * p.log()).sum(1).mean()
        loss = cross + memax * me_max + ent * use_entropy * entropy
        loss.backward()
        values = {"anchors": anchors, "targets": targets, "assignments": q}
        values |= {"grad_anchors": anchors.grad, "grad_prototypes": prototypes.grad}
        tensors |= {f"call{call}/{name}": x for name, x in values.items()}
        terms = {"cross_entropy": cross, "me_max": me_max, "entropy": entropy * use_entropy, "loss": loss}
        facts = {"call": call, "sharpen": sharpen, "use_entropy": use_entropy, "use_sinkhorn": balanced}
        calls.append({**facts, **{name: x.item() for name, x in terms.items()}})
    return write(path, meta, tensors, {"calls": calls})
