"""Attention over packed sets with dense kernels: padded, set by set, or grouped by length.

For devices and precisions without a kernel for packed sets, and for a bias, which no such kernel takes. Legend of
shapes as in attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kit.set_lengths import SetLengths, token_pairs

STEP = 8
"""The padded length is a multiple of this."""
MOST_PADDING = 2.0
"""Sets are not padded if that would multiply the number of tokens by more than this."""
SHORT = 128
"""Up to this length, two products are faster than torch's fused kernel on a CPU in float32; at 200 slower."""


def attend_dense(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    """Attend by the fastest method of this file for device, precision and lengths: [P, h, d] -> [P, h, d]."""
    if lengths.uniform:
        q, k, v = (x.unflatten(0, (len(lengths), lengths.longest)).transpose(1, 2) for x in (q, k, v))  # [S, h, L, d]
        return _dense(q, k, v).transpose(1, 2).flatten(0, 1)
    if _plain_products(q) and _padded_length(lengths) * len(lengths) <= MOST_PADDING * lengths.total:
        return _attend_padded(q, k, v, lengths)
    if q.device.type == "cpu" and not _plain_products(q):
        return _attend_in_turn(q, k, v, lengths)
    return _attend_by_length(q, k, v, lengths)


def _plain_products(q: Tensor) -> bool:
    """Whether two products and a softmax are faster than torch's fused kernel."""
    return q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend over q [S, h, L, d], k and v [S, h, Lk, d]; mask [S, 1, Lk] is 0 for keys and -inf for padding."""
    if _plain_products(q):
        # The backward pass of torch's fused kernel does not use the CPU's matrix units: with 40 to 200 tokens per set
        # it takes 2 to 4 times as long as two plain products, with 700 as long (benchmarks/bench_attention.py).
        return _products(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask).view(q.shape)
    assert mask is None
    return F.scaled_dot_product_attention(q, k, v)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend over [n, L, d] by two products; mask [S, 1, L] as in ``_dense``, with n = S * heads."""
    scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)  # [n, L, L]
    if mask is not None:
        scores = (scores.view(len(mask), -1, scores.shape[-1]) + mask).view(scores.shape)
    return torch.bmm(scores.softmax(-1), v)


@dataclass(frozen=True)
class _Padded:
    """All sets padded to one length, a multiple of ``STEP``.

    token: [S * L] the packed token at each place; padding repeats the first token of its set.
    mask: [S, 1, L] 0 for tokens, -inf for padding.
    place: [P] the place of each packed token.
    """

    token: Tensor
    mask: Tensor
    place: Tensor


def _padded_length(lengths: SetLengths) -> int:
    return -(-lengths.longest // STEP) * STEP


def _padded(lengths: SetLengths) -> _Padded:
    """Return the padded layout of these lengths."""
    each = np.array(lengths.on_host)[:, None]
    column = np.arange(_padded_length(lengths))
    real = column < each  # [S, L]
    token = np.cumsum(each)[:, None] - each + np.where(real, column, 0)
    mask = np.where(real, np.float32(0), np.float32(-np.inf))[:, None]
    parts = (token.ravel(), mask, np.flatnonzero(real))
    return _Padded(*(torch.from_numpy(x).to(lengths.device) for x in parts))


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    """Attend with one product for all sets.

    Padded lengths take few values, while groups of ``_attend_by_length`` have new sizes at every step; on a CPU in half
    precision oneDNN compiles a kernel for each size, about half a millisecond.
    """
    layout = lengths.layout(_padded)
    shape = (len(lengths), layout.mask.shape[-1])
    packed = torch.stack((q, k, v), dim=1).index_select(0, layout.token)  # [S * L, 3, h, d]
    qs, ks, vs = packed.unflatten(0, shape).permute(2, 0, 3, 1, 4)  # 3 x [S, h, L, d]
    out = _dense(qs, ks, vs, layout.mask.to(q.dtype)).transpose(1, 2).flatten(0, 1)
    return out.index_select(0, layout.place)


def _attend_in_turn(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    """Attend set by set, without a copy.

    On one core in float32 this takes 0.5 to 0.9 of the time of ``_attend_by_length``, and 0.8 to 0.9 of the
    reference's.
    """
    out = []
    for one in zip(*(x.split(lengths.on_host) for x in (q, k, v)), strict=True):
        qs, ks, vs = (x.transpose(0, 1) for x in one)  # 3 x [h, L, d]
        if qs.shape[1] <= SHORT:
            y = _products(qs, ks, vs)
        else:
            y = F.scaled_dot_product_attention(qs[None], ks[None], vs[None])[0]
        out.append(y.transpose(0, 1))
    return torch.cat(out)


@dataclass(frozen=True)
class _ByLength:
    """Sets sorted by length: those of equal length form a group, which needs neither padding nor mask.

    order: [P] the packed token at each place; None if the sets are sorted already.
    place: [P] the place of each packed token.
    groups: (number of sets, length) of each group.
    """

    order: Tensor | None
    place: Tensor
    groups: tuple[tuple[int, int], ...]


def _by_length(lengths: SetLengths) -> _ByLength:
    """Return the sorted layout of these lengths."""
    each = np.array(lengths.on_host)
    length, sets = np.unique(each, return_counts=True)
    token = np.argsort(np.repeat(each, each), kind="stable")  # [P]
    place = np.empty_like(token)
    place[token] = np.arange(len(token))
    order = None if (np.diff(each) >= 0).all() else torch.from_numpy(token).to(lengths.device)
    groups = tuple(zip(sets.tolist(), length.tolist(), strict=True))
    return _ByLength(order, torch.from_numpy(place).to(lengths.device), groups)


class _Reorder(torch.autograd.Function):
    """x[order] for a permutation; the backward gathers by the inverse, while torch's would scatter and add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(grad, inverse, order), None, None


def reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return x[order] for a permutation and its inverse, two [P] int64: [P, ...] -> [P, ...]."""
    return _Reorder.apply(x, order, inverse)


def _attend_by_length(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    layout = lengths.layout(_by_length)
    # On a CPU in bf16 this takes 0.9 of the time of padding to buckets of similar length.
    if layout.order is not None:
        q, k, v = (reorder(x, layout.order, layout.place) for x in (q, k, v))
    sizes = [sets * length for sets, length in layout.groups]
    out = []
    for group, *qkv in zip(layout.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        qg, kg, vg = (x.unflatten(0, group).transpose(1, 2) for x in qkv)  # 3 x [S_g, h, L_g, d]
        out.append(_dense(qg, kg, vg).transpose(1, 2).flatten(0, 1))
    y = torch.cat(out)
    return y if layout.order is None else reorder(y, layout.place, layout.order)


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


def attend_dense_with_terms(
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
        return _attend_in_turn_with_terms(q, k, v, lengths, key_lengths, bias, causal)
    return _attend_padded_with_terms(q, k, v, lengths, key_lengths, bias, causal)


def _dense_with_terms(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """Attend over q [S, h, L, d], k and v [S, h, Lk, d], bias broadcastable to [S, h, L, Lk]."""
    if bias is None and not causal:
        return _dense(q, k, v)
    if bias is not None:
        bias = bias.unsqueeze(0) if bias.ndim == 3 else bias
        if causal:  # torch takes one of the two
            bias, causal = bias + causal_mask(q.shape[2], bias), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)


def _attend_in_turn_with_terms(
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


def _attend_padded_with_terms(
    q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths, key_lengths: SetLengths, bias: Tensor | None, causal: bool
) -> Tensor:
    """Attend in one launch over sets padded to the longest; padding repeats the first token of its set."""
    queries, keys = lengths.layout(_padded), key_lengths.layout(_padded)
    sets, h = len(lengths), q.shape[1]
    qs = q.index_select(0, queries.token).unflatten(0, (sets, -1)).transpose(1, 2)  # [S, h, L, d]
    ks, vs = (x.index_select(0, keys.token).unflatten(0, (sets, -1)).transpose(1, 2) for x in (k, v))
    mask = keys.mask.unsqueeze(1).to(q.dtype)  # [S, 1, 1, Lk]
    if bias is not None:
        size = len(queries.token) * ks.shape[2]
        full = bias.new_zeros(h, size).index_copy(1, lengths.layout_with(_pair_places, key_lengths), bias)
        mask = full.view(h, sets, qs.shape[2], -1).transpose(0, 1) + mask  # [S, h, L, Lk]
    return _dense_with_terms(qs, ks, vs, mask, causal).transpose(1, 2).flatten(0, 1).index_select(0, queries.place)


def _pair_places(lengths: SetLengths, key_lengths: SetLengths) -> Tensor:
    """Return the place of each entry of a flat bias among all S * L * Lk padded pairs: [N]."""
    i, j = token_pairs(lengths, key_lengths)
    queries, keys = lengths.layout(_padded), key_lengths.layout(_padded)
    width = keys.mask.shape[-1]
    return queries.place.index_select(0, i) * width + keys.place.index_select(0, j) % width
