"""Scores of prototypes against plain float64 maths, and torch's weight norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from jepa_kit.heads import Prototypes


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_scores_are_cosines() -> None:
    head = Prototypes(in_dim=4, out_dim=7).double()
    x, w = rows(5, 4).numpy(), head.weight.detach().numpy()
    wanted = x @ w.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(head(rows(5, 4)).detach(), wanted, rtol=0, atol=1e-14)
    assert [name for name, _ in head.named_parameters()] == ["weight"]


def test_a_learned_scale_is_torchs_weight_norm() -> None:
    head = Prototypes(in_dim=4, out_dim=7, learned_scale=True).double()
    nn.init.uniform_(head.scale, 0.5, 2)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(4, 7, bias=False, dtype=torch.float64))
    theirs.load_state_dict(
        {f"parametrizations.weight.original{i}": value for i, value in enumerate((head.scale, head.weight))}
    )
    x, cotangent = rows(5, 4), rows(5, 7)
    wanted = theirs(nn.functional.normalize(x))
    torch.testing.assert_close(head(x), wanted, rtol=0, atol=1e-14)
    head(x).backward(cotangent), wanted.backward(cotangent)
    for ours, released in zip((head.scale, head.weight), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, released.grad, rtol=0, atol=1e-13)


def test_without_prototypes() -> None:
    with pytest.raises(ValueError, match=r"out_dim \(=0\) must be at least 1"):
        Prototypes(in_dim=4, out_dim=0)
