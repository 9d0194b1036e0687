"""``attend``: attention over packed sets, the only operation that depends on set boundaries, and its backends.

Legend of shapes:

    P = packed tokens of all sets    S = sets         L = tokens of a set
    h = heads                        d = width of a head

Every backend computes softmax(q k^T / sqrt(d)) v within each set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jepa_kit.encoders.attention_cuda import attend_packed, attend_xformers, packed_kernel, why_not_xformers
from jepa_kit.encoders.attention_dense import attend_dense
from jepa_kit.registry import Backend
from jepa_kit.set_lengths import SetLengths


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths | Sequence[int], backend: Backend = "auto") -> Tensor:
    """Attend within each set of packed tokens.

    Equivalent plain code::

        sets = zip(q.split(lengths), k.split(lengths), v.split(lengths))
        torch.cat([torch.einsum("hij,jhd->ihd", (torch.einsum("ihd,jhd->hij", q, k) / d**0.5).softmax(-1), v)
                   for q, k, v in sets])

    Args:
        q, k, v: [P, h, d].
        lengths: the length of each set; they add up to P.
        backend: ``auto`` uses xformers if its kernels load, else ``sdpa``, torch's own kernels. Any other name uses
            that backend or raises.

    Returns:
        [P, h, d].

    Raises:
        ValueError: shapes differ, lengths do not add up to P, or the backend is unknown or cannot run here (with the
            reason).
    """
    if not isinstance(lengths, SetLengths):
        lengths = SetLengths(lengths, q.device)
    if not q.shape == k.shape == v.shape or q.ndim != 3:
        raise ValueError(
            f"q, k and v must have one shape [P, heads, head_dim], not {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if lengths.total != q.shape[0]:
        raise ValueError(f"lengths add up to {lengths.total}, but q has {q.shape[0]} tokens")
    return BACKENDS[_choose(backend, q)](q, k, v, lengths)


def why_not(backend: str, q: Tensor) -> str | None:
    """Return why a backend cannot run on tensors like ``q`` [P, h, d], or None if it can."""
    if backend not in BACKENDS:
        return f"there is no such backend; there are auto, {', '.join(BACKENDS)}"
    return why_not_xformers(q) if backend == "xformers" else None


def _choose(backend: Backend, q: Tensor) -> str:
    """Return the name of the backend to use; it depends on what can run, never on timing, so that all ranks agree."""
    if backend == "auto":
        return "xformers" if why_not("xformers", q) is None else "sdpa"
    if (reason := why_not(backend, q)) is not None:
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


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    kernel = packed_kernel(q)
    # Whole images have the same shape at every step, so cuDNN builds its plan (23 to 37 ms of host time on Hopper)
    # once. All other lengths change from step to step, also those of uniform sets, and each would need a new plan.
    if kernel is None or lengths.whole:
        return attend_dense(q, k, v, lengths)
    return attend_packed(kernel, q, k, v, lengths)


def _attend_reference(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    out = []
    for qs, ks, vs in zip(*(x.split(lengths.on_host) for x in (q, k, v)), strict=True):
        weight = (torch.einsum("ihd,jhd->hij", qs, ks) * qs.shape[-1] ** -0.5).softmax(-1)
        out.append(torch.einsum("hij,jhd->ihd", weight, vs))
    return torch.cat(out)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, SetLengths], Tensor]] = {
    "xformers": attend_xformers,
    "sdpa": _attend_sdpa,
    "reference": _attend_reference,
}
"""Backends by name; each is tested against plain maths in float64."""
