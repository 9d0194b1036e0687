"""Prefix tokens: a class token and registers at the beginning of each packed set.

S = sets    k = prefix tokens of a set    P = packed tokens of all sets without the prefix    D = width
"""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_kit.encoders.attention_dense import reorder
from jepa_kit.set_lengths import SetLengths


def add_prefix(prefix: Tensor, tokens: Tensor, lengths: SetLengths) -> Tensor:
    """Put its prefix before the tokens of each set: [S, k, D] and [P, D] -> [S * k + P, D].

    Args:
        prefix: of each set.
        tokens: packed.
        lengths: of the sets without the prefix; the result is packed by ``lengths.plus(k)``.
    """
    if not prefix.shape[1]:
        return tokens
    if lengths.uniform:
        return torch.cat([prefix, tokens.unflatten(0, (len(lengths), -1))], dim=1).flatten(0, 1)
    order, place = _order(lengths.plus(prefix.shape[1]), prefix.shape[1])
    return reorder(torch.cat([prefix.flatten(0, 1), tokens]), order, place)


def split_prefix(x: Tensor, lengths: SetLengths, k: int) -> tuple[Tensor, Tensor]:
    """Separate what ``add_prefix`` joined: [S * k + P, D] -> tokens [P, D] and prefix [S, k, D].

    Args:
        lengths: of the sets with the prefix.
    """
    if not k:
        return x, x.new_empty(len(lengths), 0, x.shape[-1])
    if lengths.uniform:
        x = x.unflatten(0, (len(lengths), -1))  # [S, k + L, D]
        return x[:, k:].flatten(0, 1), x[:, :k]
    order, place = _order(lengths, k)
    prefix, tokens = reorder(x, place, order).split([len(lengths) * k, lengths.total - len(lengths) * k])
    return tokens, prefix.unflatten(0, (len(lengths), k))


def _order(lengths: SetLengths, k: int) -> tuple[Tensor, Tensor]:
    """Return the permutation from all prefixes, then all tokens, to sets of these lengths, and its inverse.

    Two [S * k + P] int64, computed once.
    """
    if (name := (_order, k)) not in lengths.layouts:
        own = lengths.plus(-k)
        ascending = torch.arange(lengths.total, device=lengths.device)
        before = (lengths.offsets[:-1, None] + ascending[:k]).flatten()  # [S * k]
        place = torch.cat([before, ascending[: own.total] + k * (own.set_of_token + 1)])
        lengths.layouts[name] = (torch.empty_like(place).index_copy(0, place, ascending), place)
    return lengths.layouts[name]
