"""Replacements of torch's calls of a CUDA driver, so that code runs on fake CUDA tensors without one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)

HOPPER = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
)
"""Properties of a card, as far as torch and its compiler ask for them."""


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run the kernel of ``scaled_dot_product_attention`` on a GPU; without a driver, torch chooses plain products."""
    if q.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, q.requires_grad)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


class IndexByOperators(TorchFunctionMode):
    """Index tensors by operators: in a CPU build of torch, ``x[...]`` refuses a CUDA tensor, fake or not."""

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, keys = args
        tensors: list[Tensor | None] = []  # one for each dimension of the result so far
        for key in keys if isinstance(keys, tuple) else (keys,):
            dim = len(tensors)
            if isinstance(key, int):
                x = x.select(dim, key)
                continue
            if key is None:
                x = x.unsqueeze(dim)
            elif isinstance(key, slice):
                x = torch.ops.aten.slice(x, dim, key.start, key.stop, key.step or 1)
            tensors.append(key if isinstance(key, Tensor) else None)
        return torch.ops.aten.index(x, tensors) if any(t is not None for t in tensors) else x


@contextmanager
def as_if_on_hopper() -> Iterator[None]:
    """Replace calls of the driver: for autocast, foreach operators and the choice of an attention kernel."""
    foreach = torch.utils._foreach_utils
    with (
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=HOPPER),
        mock.patch.object(foreach, "_foreach_supported_types", [*foreach._foreach_supported_types, FakeTensor]),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", fused_attention),
        nullcontext() if torch.version.cuda else IndexByOperators(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


def on_fake_cuda(module: Module) -> Module:
    """Replace parameters and buffers of a module, inside a FakeTensorMode; ``Module.to`` cannot do it."""
    for part in module.modules():
        tables: tuple[Any, Any] = (part._parameters, part._buffers)
        for tensors in tables:
            for name, x in tensors.items():
                if x is not None:
                    fake = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                    tensors[name] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
    return module
