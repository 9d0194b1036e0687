"""``attend``: the one operation that looks at set boundaries, and its backends.

Legend of shapes:

    P = packed tokens of all sets    S = sets         L = tokens of a set
    h = heads                        d = width of a head

Every backend computes, for each set by itself, softmax(q k^T / sqrt(d)) v.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kit.structures import SetLengths

Backend = Literal["auto", "xformers", "sdpa", "reference"]

STEP = 8
"""Padded sets have a length that is a multiple of this."""
MOST_PADDING = 2.0
"""Sets are not padded where that would make their tokens more than so many times as many."""
SHORT = 128
"""Up to so many tokens two products are faster than torch's fused kernel on a CPU in float32; at 200 slower."""


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths | Sequence[int], backend: Backend = "auto") -> Tensor:
    """Attention inside each set, over packed tokens.

    Equivalent plain code::

        sets = zip(q.split(lengths), k.split(lengths), v.split(lengths))
        torch.cat([torch.einsum("hij,jhd->ihd", (torch.einsum("ihd,jhd->hij", q, k) / d**0.5).softmax(-1), v)
                   for q, k, v in sets])

    Args:
        q, k, v: [P, h, d].
        lengths: the length of each set; they add up to P.
        backend: ``auto`` takes the fastest that can run; another name takes that one or raises.

    Returns:
        [P, h, d].

    Raises:
        ValueError: shapes that differ, lengths that do not add up to P, an unknown backend or one that
            cannot run here (with the reason).
    """
    if not isinstance(lengths, SetLengths):
        lengths = SetLengths(lengths, q.device)
    if not q.shape == k.shape == v.shape or q.ndim != 3:
        raise ValueError(
            f"q, k and v must be [P, heads, head_dim] alike, not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if lengths.total != q.shape[0]:
        raise ValueError(f"lengths add up to {lengths.total}, but q holds {q.shape[0]} tokens")
    if backend == "auto":
        backend = "xformers" if why_not("xformers", q) is None else "sdpa"
    else:
        reason = why_not(backend, q)
        if reason is not None:
            raise ValueError(f"attention backend {backend!r} cannot run: {reason}")
    return BACKENDS[backend](q, k, v, lengths)


def why_not(backend: str, q: Tensor) -> str | None:
    """Why a backend cannot run on tensors like ``q``, or None where it can."""
    if backend not in BACKENDS:
        return f"there is no such backend; there are auto, {', '.join(BACKENDS)}"
    if backend == "xformers":
        if q.device.type != "cuda":
            return f"it has kernels for CUDA only, and the tokens are on {q.device.type}; use 'sdpa'"
        if q.dtype == torch.float64:
            return "it has no float64 kernels; use 'sdpa' or 'reference'"
        return _xformers()[1]
    return None


@lru_cache(maxsize=1)
def _xformers() -> tuple[Any, str | None]:
    """(xformers.ops, None), or (None, why it cannot be used). Imported only where it will be used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import xformers.ops as ops
    except ImportError as error:
        return None, f"xformers does not import ({error})"
    from xformers.ops import fmha

    # An operator that was built for another torch imports, and then is missing.
    available = [op for op in fmha.ALL_FW_OPS if op.is_available()]
    return (ops, None) if available else (None, "this xformers has no operators for this torch and device")


def _attend_xformers(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    ops, _ = _xformers()
    if lengths.uniform:
        shape = (len(lengths), lengths.longest, *q.shape[1:])  # [S, L, h, d]
        out = ops.memory_efficient_attention(q.reshape(shape), k.reshape(shape), v.reshape(shape))
        return out.reshape(q.shape)
    bias = lengths.layouts.get("xformers")
    if bias is None:
        bias = ops.fmha.BlockDiagonalMask.from_seqlens(list(lengths.on_host), device=q.device)
        lengths.layouts["xformers"] = bias
    return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    if lengths.uniform:
        q, k, v = (x.reshape(len(lengths), lengths.longest, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return _dense(q, k, v).transpose(1, 2).flatten(0, 1)  # [S, h, L, d] -> [P, h, d]
    varlen = _torch_varlen(q)
    if varlen is not None:
        return varlen(q, k, v, lengths.offsets, lengths.offsets, lengths.longest, lengths.longest)
    if _plain_products(q) and _padded_length(lengths) * len(lengths) <= MOST_PADDING * lengths.total:
        return _attend_padded(q, k, v, lengths)
    if q.device.type == "cpu" and not _plain_products(q):
        return _attend_in_turn(q, k, v, lengths)
    return _attend_by_length(q, k, v, lengths)


def _plain_products(q: Tensor) -> bool:
    """Whether two products and a softmax are faster than torch's fused kernel."""
    return q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention over [S, h, L, d]; mask [S, 1, L] is 0 where there is a key and -inf where there is none."""
    if _plain_products(q):
        # torch's fused kernel does not use the CPU's matrix units in its backward pass: with 40 to 200 tokens a set it
        # takes 2 to 4 times as long as two plain products, with 700 as long (benchmarks/bench_attention.py).
        return _products(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask).view(q.shape)
    assert mask is None
    return F.scaled_dot_product_attention(q, k, v)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention over [n, L, d] by two products; mask [S, 1, L] as in ``_dense``, where n is S times the heads."""
    scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)  # [n, L, L]
    if mask is not None:
        scores = (scores.view(len(mask), -1, scores.shape[-1]) + mask).view(scores.shape)
    return torch.bmm(scores.softmax(-1), v)


def _torch_varlen(q: Tensor) -> Callable[..., Tensor] | None:
    """torch's own attention over packed sets: CUDA in half precision, since torch 2.10."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn  # type: ignore[return-value]


@dataclass(frozen=True)
class _Padded:
    """All sets padded to one length, a multiple of ``STEP``.

    token: [S * L] the packed token at each place; a padded place repeats the first token of its set.
    mask: [S, 1, L] 0 where there is a token, -inf where there is none.
    place: [P] where each packed token stands.
    """

    token: Tensor
    mask: Tensor
    place: Tensor


def _padded_length(lengths: SetLengths) -> int:
    return -(-lengths.longest // STEP) * STEP


def _padded(lengths: SetLengths) -> _Padded:
    """The layout of these lengths, made once and kept with them."""
    layout = lengths.layouts.get("padded")
    if layout is None:
        each = np.array(lengths.on_host)[:, None]
        column = np.arange(_padded_length(lengths))
        real = column < each  # [S, L]
        token = np.cumsum(each)[:, None] - each + np.where(real, column, 0)
        mask = np.where(real, np.float32(0), np.float32(-np.inf))[:, None]
        parts = (token.ravel(), mask, np.flatnonzero(real))
        layout = _Padded(*(torch.from_numpy(x).to(lengths.device) for x in parts))
        lengths.layouts["padded"] = layout
    return layout


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    """One product for all sets. Its sizes are few, where those of ``_attend_by_length`` are new at every step:
    on a CPU in half precision a kernel is compiled for each size, about half a millisecond."""
    layout = _padded(lengths)
    shape = (len(lengths), layout.mask.shape[-1])
    packed = torch.stack((q, k, v), dim=1).index_select(0, layout.token)  # [S * L, 3, h, d]
    qs, ks, vs = packed.unflatten(0, shape).permute(2, 0, 3, 1, 4)  # 3 x [S, h, L, d]
    out = _dense(qs, ks, vs, layout.mask.to(q.dtype)).transpose(1, 2).flatten(0, 1)
    return out.index_select(0, layout.place)


def _attend_in_turn(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    """Set after set, without a copy. On one core in float32 this takes 0.5 to 0.9 of the time of
    ``_attend_by_length``, and 0.8 to 0.9 of the reference's."""
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
    """Sets in the order of their length: those of one length stand together and need no padding and no mask.

    order: [P] the packed token at each place; None where the sets stand in that order already.
    place: [P] where each packed token stands.
    groups: (sets, length) of the sets of each length.
    """

    order: Tensor | None
    place: Tensor
    groups: tuple[tuple[int, int], ...]


def _by_length(lengths: SetLengths) -> _ByLength:
    """The layout of these lengths, made once and kept with them."""
    layout = lengths.layouts.get("by_length")
    if layout is None:
        each = np.array(lengths.on_host)
        length, sets = np.unique(each, return_counts=True)
        token = np.argsort(np.repeat(each, each), kind="stable")  # [P]
        place = np.empty_like(token)
        place[token] = np.arange(len(token))
        order = None if (np.diff(each) >= 0).all() else torch.from_numpy(token).to(lengths.device)
        groups = tuple(zip(sets.tolist(), length.tolist(), strict=True))
        layout = _ByLength(order, torch.from_numpy(place).to(lengths.device), groups)
        lengths.layouts["by_length"] = layout
    return layout


class _Reorder(torch.autograd.Function):
    """x[order] for a permutation. Its backward is a gather by the inverse, where torch's would scatter and add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(grad, inverse, order), None, None


def _attend_by_length(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    layout = _by_length(lengths)
    # On a CPU this takes 0.9 (bf16) of the time of padding to buckets of about one length.
    if layout.order is not None:
        q, k, v = (_Reorder.apply(x, layout.order, layout.place) for x in (q, k, v))
    sizes = [sets * length for sets, length in layout.groups]
    out = []
    for group, *qkv in zip(layout.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        qg, kg, vg = (x.unflatten(0, group).transpose(1, 2) for x in qkv)  # 3 x [S_g, h, L_g, d]
        out.append(_dense(qg, kg, vg).transpose(1, 2).flatten(0, 1))
    y = torch.cat(out)
    return y if layout.order is None else _Reorder.apply(y, layout.place, layout.order)


def _attend_reference(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    out = []
    for qs, ks, vs in zip(*(x.split(lengths.on_host) for x in (q, k, v)), strict=True):
        weight = (torch.einsum("ihd,jhd->hij", qs, ks) * qs.shape[-1] ** -0.5).softmax(-1)
        out.append(torch.einsum("hij,jhd->ihd", weight, vs))
    return torch.cat(out)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, SetLengths], Tensor]] = {
    "xformers": _attend_xformers,
    "sdpa": _attend_sdpa,
    "reference": _attend_reference,
}
"""Backends by name; each is tested against plain maths in float64."""
