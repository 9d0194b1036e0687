"""Attention with keys of other lengths, a bias or a causal mask, by dense kernels; the shapes of a bias.

Legend of shapes as in attention.py. Besides:

    Pk = packed keys of all sets    Lk = keys of a set    N = sum of L * Lk over sets
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kit.encoders.attention_dense import dense, padded
from jepa_kit.set_lengths import SetLengths

K = TypeVar("K")


def token_pairs(lengths: SetLengths, key_lengths: SetLengths | None = None) -> tuple[Tensor, Tensor]:
    """Return the packed query and the packed key of each entry of a flat bias: two [N] int64 tensors.

    The order is by set, then query, then key. Computed once per pair of lengths, without waiting for the device. With
    relative positions of patches, a flat bias is one gather::

        i, j = token_pairs(lengths)
        bias = table[:, relative[patch[i], patch[j]]]  # [h, N]

    Args:
        lengths: lengths of the sets of queries.
        key_lengths: lengths of the sets of keys; ``lengths`` by default.
    """
    return _layout(_pairs, lengths, lengths if key_lengths is None else key_lengths)


def _layout(make: Callable[[SetLengths, SetLengths], K], lengths: SetLengths, key_lengths: SetLengths) -> K:
    """Return ``make(lengths, key_lengths)``, computed once."""
    name = (make, key_lengths.on_host)  # not key_lengths itself: a cycle would keep device memory until a collection
    if name not in lengths.layouts:
        lengths.layouts[name] = make(lengths, key_lengths)
    return lengths.layouts[name]


def _pairs(lengths: SetLengths, key_lengths: SetLengths) -> tuple[Tensor, Tensor]:
    starts, key_starts = (x.offsets.narrow(0, 0, len(x)).long() for x in (lengths, key_lengths))  # [S]
    keys = key_lengths.offsets.diff().long()  # [S]
    sizes = lengths.offsets.diff() * keys  # [S]
    n = bias_size(lengths, key_lengths)
    sets = torch.arange(len(lengths), device=lengths.device).repeat_interleave(sizes, output_size=n)  # [N]
    before, i, j, keys = torch.stack((sizes.cumsum(0) - sizes, starts, key_starts, keys)).index_select(1, sets)
    inside = torch.arange(n, device=lengths.device) - before
    return i + inside // keys, j + inside % keys


def bias_size(lengths: SetLengths, key_lengths: SetLengths) -> int:
    """Return N, the number of pairs of a query and a key of the same set."""
    return int((lengths.each * key_lengths.each).sum())


def check_terms(
    q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths, key_lengths: SetLengths, bias: Tensor | None, causal: bool
) -> None:
    """Raise ValueError if keys, bias or causal mask do not fit q [P, h, d] and its lengths."""
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or k.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"q must be [P, heads, head_dim], and k and v [Pk, heads, head_dim], not {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    for name, each, tensor, x in (("lengths", lengths, "q", q), ("key_lengths", key_lengths, "k", k)):
        if each.total != len(x):
            raise ValueError(f"{name} add up to {each.total}, but {tensor} has {len(x)} tokens")
    if len(key_lengths) != len(lengths):
        raise ValueError(f"key_lengths has {len(key_lengths)} sets, but lengths has {len(lengths)}: give as many")
    if causal and key_lengths != lengths:
        raise ValueError(
            "causal attention needs key_lengths equal to lengths: otherwise it is not defined which keys come before "
            "a query; use a bias of 0 and -inf"
        )
    if bias is not None:
        _check_bias(bias, q.shape[1], lengths, key_lengths)


def _check_bias(bias: Tensor, heads: int, lengths: SetLengths, key_lengths: SetLengths) -> None:
    if not bias.is_floating_point():
        raise ValueError(f"bias is added to the scores, so it must be floating point, not {bias.dtype}")
    shapes: list[tuple[int, ...]] = [(heads, bias_size(lengths, key_lengths))]
    if lengths.uniform and key_lengths.uniform:
        image = (heads, lengths.longest, key_lengths.longest)
        shapes += [image, (len(lengths), *image)]
    if tuple(bias.shape) not in shapes:
        kind = "sets of equal lengths" if len(shapes) > 1 else "sets of different lengths"
        raise ValueError(f"bias for {kind} must be {' or '.join(map(str, shapes))}, not {tuple(bias.shape)}")


def bias_of_sets(bias: Tensor, lengths: SetLengths, key_lengths: SetLengths) -> list[Tensor]:
    """Return the bias of each set, [h, L, Lk], as views."""
    if bias.ndim == 3:
        return [bias] * len(lengths)
    if bias.ndim == 4:
        return list(bias.unbind())
    shapes = list(zip(lengths, key_lengths, strict=True))
    return [b.unflatten(1, s) for b, s in zip(bias.split([i * j for i, j in shapes], dim=1), shapes, strict=True)]


def causal_mask(n: int, like: Tensor) -> Tensor:
    """Return [n, n]: 0 for keys up to the query, -inf for later ones."""
    return like.new_full((n, n), -torch.inf).triu(1)


def attend_general(
    q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths, key_lengths: SetLengths, bias: Tensor | None, causal: bool
) -> Tensor:
    """Attend by scaled_dot_product_attention: q [P, h, d], k and v [Pk, h, d] -> [P, h, d]; bias as in ``attend``."""
    if lengths.uniform and key_lengths.uniform:
        shape = (len(lengths), lengths.longest)
        if bias is not None and bias.ndim == 2:
            bias = bias.unflatten(1, (*shape, -1)).transpose(0, 1)  # [S, h, L, Lk]
        qs = q.unflatten(0, shape).transpose(1, 2)  # [S, h, L, d]
        ks, vs = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (k, v))  # [S, h, Lk, d]
        return _dense_with_terms(qs, ks, vs, bias, causal).transpose(1, 2).flatten(0, 1)
    if q.device.type == "cpu":
        return _attend_in_turn(q, k, v, lengths, key_lengths, bias, causal)
    return _attend_padded(q, k, v, lengths, key_lengths, bias, causal)


def _dense_with_terms(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """Attend over q [S, h, L, d], k and v [S, h, Lk, d], bias broadcastable to [S, h, L, Lk]."""
    if bias is None and not causal:
        return dense(q, k, v)
    if bias is not None:
        bias = bias.unsqueeze(0) if bias.ndim == 3 else bias
        if causal:  # torch takes one of the two
            bias, causal = bias + causal_mask(q.shape[2], bias), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)


def _attend_in_turn(
    q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths, key_lengths: SetLengths, bias: Tensor | None, causal: bool
) -> Tensor:
    """Attend set by set, without a copy."""
    biases = [None] * len(lengths) if bias is None else bias_of_sets(bias, lengths, key_lengths)
    keys = key_lengths.on_host
    out = []
    for *one, b in zip(q.split(lengths.on_host), k.split(keys), v.split(keys), biases, strict=True):
        qs, ks, vs = (x.transpose(0, 1)[None] for x in one)  # [1, h, L or Lk, d]
        out.append(_dense_with_terms(qs, ks, vs, b, causal)[0].transpose(0, 1))
    return torch.cat(out)


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths, key_lengths: SetLengths, bias: Tensor | None, causal: bool
) -> Tensor:
    """Attend in one launch over sets padded to the longest; padding repeats the first token of its set."""
    queries, keys = lengths.layout(padded), key_lengths.layout(padded)
    sets, h = len(lengths), q.shape[1]
    qs = q.index_select(0, queries.token).unflatten(0, (sets, -1)).transpose(1, 2)  # [S, h, L, d]
    ks, vs = (x.index_select(0, keys.token).unflatten(0, (sets, -1)).transpose(1, 2) for x in (k, v))
    mask = keys.mask.unsqueeze(1).to(q.dtype)  # [S, 1, 1, Lk]
    if bias is not None:
        size = len(queries.token) * ks.shape[2]
        full = bias.new_zeros(h, size).index_copy(1, _layout(_pair_places, lengths, key_lengths), bias)
        mask = full.view(h, sets, qs.shape[2], -1).transpose(0, 1) + mask  # [S, h, L, Lk]
    return _dense_with_terms(qs, ks, vs, mask, causal).transpose(1, 2).flatten(0, 1).index_select(0, queries.place)


def _pair_places(lengths: SetLengths, key_lengths: SetLengths) -> Tensor:
    """Return the place of each entry of a flat bias among all S * L * Lk padded pairs: [N]."""
    i, j = token_pairs(lengths, key_lengths)
    queries, keys = lengths.layout(padded), key_lengths.layout(padded)
    width = keys.mask.shape[-1]
    return queries.place.index_select(0, i) * width + keys.place.index_select(0, j) % width
