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

PADDING = 1.125
"""A bucket of sets of unlike length is cut where padding it would cost more than this factor."""


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
        return _dense(q, k, v, None).transpose(1, 2).flatten(0, 1)  # [S, h, L, d] -> [P, h, d]
    varlen = _torch_varlen(q)
    if varlen is not None:
        return varlen(q, k, v, lengths.offsets, lengths.offsets, lengths.longest, lengths.longest)
    return _attend_padded(q, k, v, lengths)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over [S, h, L, d]; mask [S, 1, 1, L] is True where there is a key."""
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        # torch's fused kernel does not use the CPU's matrix units in its backward pass: at these lengths it takes
        # 1.4 to 9 times as long as two plain products (benchmarks/bench_attention.py).
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


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
    """Sets sorted by length and cut into buckets, each padded to its longest set.

    token: [Q] the packed token at each place of all buckets, one bucket after another (a padded place
        repeats the first token of its set).
    shapes: (sets, longest) of each bucket; the products add up to Q.
    masks: for each bucket [S_b, 1, 1, L_b], True where there is a token; None where nothing is padded.
    place: [P] where each packed token stands among the Q.
    """

    token: Tensor
    shapes: tuple[tuple[int, int], ...]
    masks: tuple[Tensor | None, ...]
    place: Tensor


def _padded(lengths: SetLengths) -> _Padded:
    """The layout of these lengths, made once and kept with them."""
    layout = lengths.layouts.get("padded")
    if layout is None:
        each = np.array(lengths.on_host)
        start = np.cumsum(each) - each
        order = np.argsort(each, kind="stable")
        tokens, shapes, masks = [], [], []
        place, seen, first = np.empty(lengths.total, dtype=np.int64), 0, 0
        while first < len(order):
            last = int(np.searchsorted(each[order], PADDING * each[order[first]], side="right"))
            sets = order[first:last]
            column = np.arange(each[sets[-1]])
            real = column < each[sets, None]  # [S_b, L_b]
            token = start[sets, None] + np.where(real, column, 0)
            place[token[real]] = seen + np.flatnonzero(real)
            tokens.append(token.ravel())
            shapes.append(token.shape)
            masks.append(None if real.all() else torch.from_numpy(real[:, None, None]).to(lengths.device))
            seen, first = seen + token.size, last
        token = torch.from_numpy(np.concatenate(tokens)).to(lengths.device)
        layout = _Padded(token, tuple(shapes), tuple(masks), torch.from_numpy(place).to(lengths.device))
        lengths.layouts["padded"] = layout
    return layout


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    layout = _padded(lengths)
    # One gather and one split: their backward passes are one scatter and one concatenation.
    packed = torch.stack((q, k, v), dim=1).index_select(0, layout.token)  # [Q, 3, h, d]
    out = []
    for x, shape, mask in zip(
        packed.split([sets * longest for sets, longest in layout.shapes]), layout.shapes, layout.masks, strict=True
    ):
        qb, kb, vb = x.unflatten(0, shape).permute(2, 0, 3, 1, 4)  # 3 x [S_b, h, L_b, d]
        out.append(_dense(qb, kb, vb, mask).transpose(1, 2).flatten(0, 1))
    return torch.cat(out).index_select(0, layout.place)


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
