"""What tests of attention on fake CUDA tensors share."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_kit.set_lengths import SetLengths


class Launched(TorchDispatchMode):
    """Collects the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def attention(self) -> list[str]:
        return [name for name in self.names if "attention" in name]


def on_cuda(lengths: SetLengths) -> SetLengths:
    return lengths.map_tensors(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
