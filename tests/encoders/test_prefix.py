"""Prefix tokens of packed sets, set by set."""

from __future__ import annotations

import pytest
import torch

from jepa_kit.encoders.prefix import add_prefix, split_prefix
from jepa_kit.set_lengths import SetLengths


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("each", [(4, 1, 2), (3, 3)])
def test_the_prefix_of_a_set_comes_before_its_tokens(each: tuple[int, ...], k: int) -> None:
    lengths = SetLengths(each)
    prefix = torch.randn(len(each), k, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(sum(each), 5, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([x for pair in zip(prefix, tokens.split(each), strict=True) for x in pair])
    joined = add_prefix(prefix, tokens, lengths)
    assert torch.equal(joined, expected)
    found = split_prefix(joined, lengths.plus(k), k)
    assert torch.equal(found[0], tokens)
    assert torch.equal(found[1], prefix)
    assert torch.autograd.gradcheck(lambda p, t: add_prefix(p, t, lengths), (prefix, tokens))
    assert torch.autograd.gradcheck(lambda x: split_prefix(x, lengths.plus(k), k), joined.detach().requires_grad_())
