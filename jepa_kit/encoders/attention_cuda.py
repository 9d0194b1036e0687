"""CUDA kernels for attention over packed sets: torch's FlashAttention and memory-efficient attention, and xformers.

Legend of shapes as in attention.py. xformers is imported, and the driver called, only for tokens on a CUDA device.
"""

from __future__ import annotations

import logging
import warnings
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from jepa_kit.set_lengths import SetLengths

HALF = (torch.bfloat16, torch.float16)
WIDTH_MULTIPLE = 8
"""The kernels need a head width that is a multiple of this."""


class _Flash(torch.autograd.Function):
    """torch's FlashAttention-2.

    ``torch.nn.attention.varlen`` calls the same two operators, but its custom-operator wrapper takes ten times their
    host time (dev/LOG.md).
    """

    title = "FlashAttention"

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: Tensor,
        key_offsets: Tensor,
        longest: tuple[int, int],
        scale: float | None,
        causal: bool,
    ) -> Tensor:
        """q [P, h, d], k, v [Pk, h, d], offsets [S + 1] int32, longest set of each -> [P, h, d]."""
        # 0.0, False: no dropout, no debug mask
        out, logsumexp, *rng, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, offsets, key_offsets, *longest, 0.0, causal, False, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, logsumexp, offsets, key_offsets, *rng)
        ctx.longest, ctx.scale, ctx.causal = longest, scale, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, logsumexp, offsets, key_offsets, *rng = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, logsumexp, offsets, key_offsets, *ctx.longest, 0.0, ctx.causal, *rng, scale=ctx.scale
        )
        return (*grads, None, None, None, None, None)


class _Efficient(torch.autograd.Function):
    """torch's memory-efficient attention: for float32, and for half precision on GPUs before Ampere."""

    title = "memory-efficient attention"

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: Tensor,
        key_offsets: Tensor,
        longest: tuple[int, int],
        scale: float | None,
        causal: bool,
    ) -> Tensor:
        """q [P, h, d], k, v [Pk, h, d], offsets [S + 1] int32, longest set of each -> [P, h, d]."""
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))  # [1, P, h, d]
        needed = any(ctx.needs_input_grad)
        # None, 0.0: no bias, no dropout; int(causal): 1 is a mask from the top left; `needed`: compute the logsumexp,
        # for the backward pass
        out, logsumexp, *rng, _, _ = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, offsets, key_offsets, *longest, 0.0, int(causal), needed, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, logsumexp, offsets, key_offsets, *rng)
        ctx.longest, ctx.scale, ctx.causal = longest, scale, causal
        return out.squeeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, logsumexp, offsets, key_offsets, *rng = ctx.saved_tensors
        grad = grad.contiguous().unsqueeze(0)
        *grads, _ = torch.ops.aten._efficient_attention_backward(
            grad,
            *(q, k, v),
            None,
            out,
            *(offsets, key_offsets),
            *ctx.longest,
            logsumexp,
            0.0,
            *rng,
            int(ctx.causal),
            False,
            scale=ctx.scale,
        )
        return (*(x.squeeze(0) for x in grads), None, None, None, None, None)


def packed_kernel(q: Tensor) -> type[_Flash | _Efficient] | None:
    """Return torch's kernel for packed sets of tensors like ``q`` [P, h, d], or None if there is none."""
    if q.device.type != "cuda":
        return None
    recent = _is_recent(q.device)
    if q.dtype in HALF and recent and _has_flash() and q.shape[-1] <= 256:
        return _Flash
    has_kernel = q.dtype in (torch.float32, torch.float16) or (q.dtype == torch.bfloat16 and recent)
    return _Efficient if has_kernel and torch.version.hip is None else None


@lru_cache
def _is_recent(device: torch.device) -> bool:
    """Whether the GPU is Ampere (compute capability 8.0) or newer; True for fake tensors without a GPU."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def _has_flash() -> bool:
    return not torch.cuda.is_available() or torch.backends.cuda.is_flash_attention_available()


def attend_packed(
    kernel: type[_Flash | _Efficient],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: SetLengths,
    key_lengths: SetLengths | None = None,
    causal: bool = False,
) -> Tensor:
    """Attend over all sets in one launch: q [P, h, d], k and v [Pk, h, d] -> [P, h, d]."""
    keys = lengths if key_lengths is None else key_lengths
    width = q.shape[-1]
    missing = -width % WIDTH_MULTIPLE
    scale = None  # by default d ** -0.5 of the padded d
    if missing:  # zeros change no product of q and k; their outputs are removed below
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
        scale = width**-0.5
    out: Tensor = kernel.apply(q, k, v, lengths.offsets, keys.offsets, (lengths.longest, keys.longest), scale, causal)
    return out.narrow(-1, 0, width) if missing else out


def attend_xformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: SetLengths,
    *,
    key_lengths: SetLengths | None = None,
    causal: bool = False,
) -> Tensor:
    """Attend with xformers' ``memory_efficient_attention``: q [P, h, d], k and v [Pk, h, d] -> [P, h, d]."""
    ops, _ = _xformers()
    keys = lengths if key_lengths is None else key_lengths
    if lengths.uniform and keys.uniform:
        qs, ks, vs = (x.reshape(len(lengths), -1, *x.shape[1:]) for x in (q, k, v))  # [S, L or Lk, h, d]
        mask = ops.fmha.attn_bias.LowerTriangularMask() if causal else None
        return ops.memory_efficient_attention(qs, ks, vs, attn_bias=mask).reshape(q.shape)
    mask = lengths.layout_with(_block_mask, keys)
    if causal:
        mask = mask.make_causal()  # another view of the same offsets
    return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]


def _block_mask(lengths: SetLengths, key_lengths: SetLengths) -> Any:
    """Return xformers' mask of these lengths."""
    return _xformers()[0].fmha.BlockDiagonalMask.from_seqlens(list(lengths), list(key_lengths), device=lengths.device)


def why_not_xformers(q: Tensor, causal: bool = False) -> str | None:
    """Return why xformers cannot attend over tensors like ``q`` [P, h, d], or None if it can."""
    if q.device.type != "cuda":
        return f"it has kernels for CUDA only, and the tokens are on {q.device.type}; use 'sdpa'"
    if q.dtype == torch.float64:
        return "it has no float64 kernels; use 'sdpa' or 'reference'"
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _xformers()[1] or _refusal(q.device, q.dtype, q.shape[-1], deterministic, causal)


@lru_cache
def _xformers() -> tuple[Any, str | None]:
    """Return (xformers.ops, None), or (None, why it cannot be used)."""
    log = logging.getLogger("xformers")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns if its library does not load; this function returns the reason
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import xformers.ops as ops
    except ImportError as error:
        return None, f"xformers does not import ({error})"
    finally:
        log.setLevel(level)
    import xformers._cpp_lib as library

    # Its attention operators are registered even if its library did not load; they reject every input then.
    if not library._built_with_cuda:
        return None, (
            "the kernels of this xformers do not load. xformers 0.0.35 loads beside torch 2.10 (CUDA 12.8); beside "
            "torch for CUDA 13, install nvidia-cuda-runtime-cu12==12.8.90 and add its folder nvidia/cuda_runtime/lib "
            "to LD_LIBRARY_PATH. Or use 'sdpa'"
        )
    return ops, None


@lru_cache
def _refusal(device: torch.device, dtype: torch.dtype, width: int, deterministic: bool, causal: bool) -> str | None:
    """Return why none of xformers' operators supports such tensors, forward and backward, or None if one does.

    Args:
        deterministic: whether torch uses deterministic algorithms; part of the cache key, as operators depend on it.
        causal: whether attention is causal.
    """
    fmha = _xformers()[0].fmha
    x = torch.empty(1, 1, 1, width, device=device, dtype=dtype)
    mask = fmha.BlockDiagonalMask.from_seqlens([1], device=device)
    inputs = fmha.Inputs(x, x, x, attn_bias=mask.make_causal() if causal else mask)
    for operators in (fmha.ALL_FW_OPS, fmha.ALL_BW_OPS):
        reasons = {op.NAME: op.not_supported_reasons(inputs) for op in operators}
        if all(reasons.values()):
            each = "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items())
            return f"none of its operators supports {str(dtype).removeprefix('torch.')} with heads of {width} ({each})"
    return None
