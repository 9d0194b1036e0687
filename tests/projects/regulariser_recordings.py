"""Recordings of plain float64 maths for the checks of cjepa, lejepa and visreg, with settings of their own."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from contrast_recordings import noise, unit, write
from torch import Tensor, nn


def vicreg(path: Path) -> Path:
    """One feature, and one pair of features, after another; a projector of torch's layers, with unequal widths."""
    b, d, coefficients = 6, 4, [10.0, 5.0, 2.0]
    x, y = (0.6 * noise(b, d, seed=k).requires_grad_() for k in (1, 2))
    x.retain_grad(), y.retain_grad()

    def covariance(z: Tensor, i: int, j: int) -> Tensor:
        return ((z[:, i] - z[:, i].mean()) * (z[:, j] - z[:, j].mean())).sum() / (b - 1)

    hinges = [torch.relu(1 - (covariance(z, i, i) + 1e-4).sqrt()) for z in (x, y) for i in range(d)]
    pairs = [covariance(z, i, j) ** 2 for z in (x, y) for i in range(d) for j in range(d) if i != j]
    terms = {
        "invariance": ((x - y) ** 2).sum() / (b * d),
        "variance": sum(hinges) / (2 * d),
        "covariance": sum(pairs) / d,
    }
    loss = sum(weight * term for weight, term in zip(coefficients, terms.values(), strict=True))
    loss.backward()
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU()]
    stack = nn.Sequential(*layers, nn.Linear(7, d, bias=False)).double()
    weights = {f"projector/{name}": value.clone() for name, value in stack.state_dict().items()}
    rows = noise(b, 5, seed=3)
    tensors = {"x": x, "y": y, "loss": loss[None], "grad_x": x.grad, "grad_y": y.grad, **weights}
    meta = {"dim": d, "in_dim": 5, "mlp": f"6-7-{d}", "coefficients": coefficients}
    meta["terms"] = {name: term.item() for name, term in terms.items()}
    return write(path, meta, {**tensors, "projector_input": rows, "projector_output": stack(rows)})


def tables(points: int, t_max: float) -> tuple[Tensor, Tensor, Tensor]:
    """Points, values of the normal distribution and weights of the trapezoid rule, in float32."""
    t = torch.linspace(0, t_max, points)
    phi = torch.exp(-0.5 * t**2)
    ends = torch.tensor([0.5] + [1.0] * (points - 2) + [0.5])
    return t, phi, phi * ends * (2 * t_max / (points - 1))


def statistic(values: Tensor, t: Tensor, phi: Tensor, weights: Tensor) -> Tensor:
    """Epps and Pulley's, of values [N], with a complex characteristic function."""
    found = torch.stack([torch.exp(1j * point * values).mean() for point in t.double()])
    return len(values) * (weights.double() * (found - phi.double()).abs() ** 2).sum()


def sigreg(path: Path) -> Path:
    b, d, m, points, t_max, views, lamb = 5, 4, 3, 9, 2.0, 2, 0.1
    own = tables(points, t_max)
    tensors = dict(zip(("t", "phi", "weights"), (table.double() for table in own), strict=True))
    for call in range(2):
        x, directions = noise(b, d, seed=call).requires_grad_(), unit(noise(m, d, seed=9 + call)).T
        each = torch.stack([statistic(x @ direction, *own) for direction in directions.T])
        each.mean().backward()
        values = {"x": x, "directions": directions, "per_slice": each, "loss": each.mean()[None], "grad_x": x.grad}
        tensors |= {f"call{call}/{name}": value for name, value in values.items()}
    z, directions = noise(views, b, d, seed=5).requires_grad_(), unit(noise(6, d, seed=6)).T
    each = [statistic(view @ direction, *tables(17, 3.0)) for view in z for direction in directions.T]
    regulariser = sum(each) / len(each)
    mean = sum(z) / views
    invariance = sum(((view - mean) ** 2).sum() for view in z) / z.numel()
    loss = lamb * regulariser + (1 - lamb) * invariance
    loss.backward()
    tensors |= {"lejepa/proj": z, "lejepa/directions": directions, "lejepa/grad_proj": z.grad}
    whole = {"sigreg": regulariser.item(), "invariance": invariance.item(), "loss": loss.item()}
    meta = {
        "dim": d,
        "num_slices": m,
        "t_max": t_max,
        "n_points": points,
        "calls": 2,
        "lejepa_views": views,
        "lamb": lamb,
    }
    return write(path, meta, tensors, {"lejepa": whole})


def visreg(path: Path) -> Path:
    views, b, d, m, first, lamb = 3, 5, 4, 3, 2, 0.7
    z, directions = (0.7 * noise(views, b, d, seed=1) + 0.2).requires_grad_(), unit(noise(m, d, seed=2)).T
    levels = torch.arange(1, b + 1) / (b + 1)
    q = (math.sqrt(2) * torch.special.erfinv(2 * levels - 1)).double()
    scale, shape, centre = [], [], []
    for view in z:
        means = [view[:, i].sum() / b for i in range(d)]
        deviations = [((view[:, i] - means[i]) ** 2).sum().div(b).sqrt() + 1e-6 for i in range(d)]
        scale += [(1 - s) ** 2 for s in deviations]
        centre += [mean**2 for mean in means]
        x = torch.stack([(view[:, i] - means[i]) / deviations[i].detach() for i in range(d)], 1)
        shape += [((x @ direction).sort().values - q).pow(2).mean() for direction in directions.T]
    terms = {name: sum(x) / len(x) for name, x in (("scale", scale), ("shape", shape), ("centre", centre))}
    loss = sum(terms.values())
    (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
    target = sum(z[:first]) / first
    invariance = sum(((view - target) ** 2).sum() for view in z) / z.numel()
    full = lamb * loss + (1 - lamb) * invariance
    (of_full,) = torch.autograd.grad(full, z)
    tensors = {"z": z, "directions": directions, "quantiles": q, "loss": loss[None], "grad_z": gradient}
    numbers = {"visreg": {name: term.item() for name, term in terms.items()}}
    numbers["full"] = {"invariance": invariance.item(), "loss": full.item()}
    meta = {"views": views, "n_global": first, "lamb": lamb}
    return write(path, meta, {**tensors, "full/grad_z": of_full}, numbers)
