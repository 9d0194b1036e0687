"""``attend``: attention over packed sets, the only operation that depends on set boundaries, and its backends.

Legend of shapes:

    P = packed tokens of all sets    S = sets         L = tokens of a set
    h = heads                        d = width of a head
    Pk, Lk = keys instead of tokens; P and L unless ``key_lengths`` is given

Every backend computes softmax(q k^T / sqrt(d) + bias) v within each set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jepa_kit.encoders.attention_cuda import attend_packed, attend_xformers, packed_kernel, why_not_xformers
from jepa_kit.encoders.attention_dense import attend_dense, attend_dense_with_terms, bias_of_sets, causal_mask
from jepa_kit.registry import Backend
from jepa_kit.set_lengths import SetLengths, count_pairs


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: SetLengths | Sequence[int],
    backend: Backend = "auto",
    *,
    key_lengths: SetLengths | Sequence[int] | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attend within each set of packed tokens.

    Equivalent plain code, with the bias of each set, [h, L, Lk], in ``biases``::

        sets = zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), biases)
        later = [torch.full((i, j), -torch.inf).triu(1) if causal else 0 for i, j in zip(lengths, key_lengths)]
        torch.cat([torch.einsum("hij,jhd->ihd", (torch.einsum("ihd,jhd->hij", q, k) / d**0.5 + b + m).softmax(-1), v)
                   for (q, k, v, b), m in zip(sets, later)])

    Args:
        q: [P, h, d].
        k, v: [Pk, h, d].
        lengths: the length of each set of queries; they add up to P.
        backend: ``auto`` uses xformers if its kernels load and there is no bias, else ``sdpa``, torch's own kernels.
            Any other name uses that backend or raises.
        key_lengths: the length of each set of keys; as many, and they add up to Pk. ``lengths`` by default.
        bias: added to the scores, in the dtype of q. [h, L, Lk] for all sets or [S, h, L, Lk] for each, if sets have
            equal lengths. Flat for any sets: [h, N], N = sum of L * Lk over sets, by set, then query, then key
            (``token_pairs``). With a bias, ragged sets are padded on CUDA: no kernel for packed sets takes one.
        causal: whether a query attends only to the keys up to its own position in the set.

    Returns:
        [P, h, d].

    Raises:
        ValueError: shapes or lengths do not fit, causal sets have keys of other lengths, or the backend is unknown or
            cannot run here (with the reason).
    """
    if not isinstance(lengths, SetLengths):
        lengths = SetLengths(lengths, q.device)
    if key_lengths is not None or bias is not None or causal:
        return _attend_with_terms(q, k, v, lengths, backend, key_lengths, bias, causal)
    if not q.shape == k.shape == v.shape or q.ndim != 3:
        raise ValueError(
            f"q, k and v must have one shape [P, heads, head_dim], not {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if lengths.total != q.shape[0]:
        raise ValueError(f"lengths add up to {lengths.total}, but q has {q.shape[0]} tokens")
    return BACKENDS[_choose(backend, q)](q, k, v, lengths)


def _attend_with_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: SetLengths,
    backend: Backend,
    key_lengths: SetLengths | Sequence[int] | None,
    bias: Tensor | None,
    causal: bool,
) -> Tensor:
    if key_lengths is None:
        key_lengths = lengths
    elif not isinstance(key_lengths, SetLengths):
        key_lengths = SetLengths(key_lengths, q.device)
    _check_terms(q, k, v, lengths, key_lengths, bias, causal)
    name = _choose(backend, q, bias=bias is not None, causal=causal)
    terms: dict[str, Any] = {"key_lengths": key_lengths, "causal": causal}
    if bias is not None:
        terms["bias"] = bias.to(q.dtype)
    return BACKENDS[name](q, k, v, lengths, **terms)


def _check_terms(
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
    shapes: list[tuple[int, ...]] = [(heads, count_pairs(lengths, key_lengths))]
    if lengths.uniform and key_lengths.uniform:
        image = (heads, lengths.longest, key_lengths.longest)
        shapes += [image, (len(lengths), *image)]
    if tuple(bias.shape) not in shapes:
        kind = "sets of equal lengths" if len(shapes) > 1 else "sets of different lengths"
        raise ValueError(f"bias for {kind} must be {' or '.join(map(str, shapes))}, not {tuple(bias.shape)}")


def why_not(backend: str, q: Tensor, *, bias: bool = False, causal: bool = False) -> str | None:
    """Return why a backend cannot run on tensors like ``q`` [P, h, d], or None if it can.

    Args:
        bias: whether there is a bias.
        causal: whether attention is causal.
    """
    if backend not in BACKENDS:
        return f"there is no such backend; there are auto, {', '.join(BACKENDS)}"
    if backend != "xformers":
        return None
    return why_not_xformers(q, causal) or ("it takes no bias over packed sets; use 'sdpa'" if bias else None)


def _choose(backend: Backend, q: Tensor, *, bias: bool = False, causal: bool = False) -> str:
    """Return the name of the backend to use; it depends on what can run, never on timing, so that all ranks agree."""
    if backend == "auto":
        return "xformers" if why_not("xformers", q, bias=bias, causal=causal) is None else "sdpa"
    if (reason := why_not(backend, q, bias=bias, causal=causal)) is not None:
        raise ValueError(f"attention (={backend!r}) cannot run: {reason}")
    return backend


def describe_backend(device: torch.device, dtype: torch.dtype, backend: Backend = "auto") -> str:
    """Return the backend that ``attend`` uses on this device in this precision, its kernels, and why not xformers.

    Raises:
        ValueError: as ``attend`` does.
    """
    q = torch.empty(1, 1, 64, device=device, dtype=dtype)
    name = _choose(backend, q)
    if name != "sdpa":
        return name
    kernel = packed_kernel(q)
    if kernel is None:
        text = "sdpa (dense products and scaled_dot_product_attention)"
    else:
        text = f"sdpa ({kernel.title} over packed sets, scaled_dot_product_attention over whole images)"
    if backend == "auto" and device.type == "cuda":
        text += f"; not xformers: {why_not('xformers', q)}"
    return text


def _attend_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: SetLengths,
    *,
    key_lengths: SetLengths | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    kernel = packed_kernel(q)
    # Whole images have the same shape at every step, so cuDNN builds its plan (23 to 37 ms of host time on Hopper)
    # once. All other lengths change from step to step, also those of uniform sets, and each would need a new plan.
    if kernel is not None and bias is None and not (lengths.whole and (key_lengths is None or key_lengths.whole)):
        return attend_packed(kernel, q, k, v, lengths, key_lengths, causal)
    if key_lengths is None:
        return attend_dense(q, k, v, lengths)
    return attend_dense_with_terms(q, k, v, lengths, key_lengths, bias, causal)


def _attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: SetLengths,
    *,
    key_lengths: SetLengths | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    keys = lengths if key_lengths is None else key_lengths
    biases = [None] * len(lengths) if bias is None else bias_of_sets(bias, lengths, keys)
    packed = (x.split(each.on_host) for x, each in ((q, lengths), (k, keys), (v, keys)))
    out = []
    for qs, ks, vs, b in zip(*packed, biases, strict=True):
        scores = torch.einsum("ihd,jhd->hij", qs, ks) * qs.shape[-1] ** -0.5
        if b is not None:
            scores = scores + b
        if causal:
            scores = scores + causal_mask(len(qs), scores)
        out.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), vs))
    return torch.cat(out)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "xformers": attend_xformers,
    "sdpa": _attend_sdpa,
    "reference": _attend_reference,
}
"""Backends by name; each is tested against plain maths in float64. They take (q, k, v, lengths), and by keyword
``key_lengths``, ``causal`` and, except xformers, ``bias``."""
