"""Count operators: kernels, bytes, products' FLOP, zero fills and waits of the host, by phase of a step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

TENSORS_A_LAUNCH = {"_foreach": 110, "_fused_adamw": 36}
"""Tensors that fit one launch of a multi-tensor operator, by the start of its name."""

MATRIX_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_mm"})

FREE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"})
"""Operators that launch nothing. Views are found by their schema."""

COPIES = frozenset({"copy_", "_foreach_copy_"})
"""Operators that do not read what they write to."""

WRITTEN = {"_fused_adamw_": (0, 2, 3)}
"""Arguments that an operator without a result writes to, by position; the first by default."""

ZERO_FILLS = frozenset({"zeros", "zeros_like", "new_zeros", "zero", "zero_", "select_backward", "slice_backward"})

WAITS = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "repeat_interleave"}
)
"""Operators whose result or size the host must know; ``repeat_interleave`` only if no output size is given."""


@dataclass
class Phase:
    """Sums over the operators of one part of a step."""

    kernels: int = 0
    gigabytes: float = 0.0
    tflop: float = 0.0
    zero_fills: float = 0.0
    syncs: int = 0

    def __add__(self, other: Phase) -> Phase:
        return Phase(*(getattr(self, name) + getattr(other, name) for name in vars(self)))


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def tensors_on(device: str, tree: object) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type == device]


def launches(name: str, args: Sequence[Any]) -> int:
    """Return the number of kernel launches of a call of an operator."""
    for start, tensors in TENSORS_A_LAUNCH.items():
        if name.startswith(start):
            return -(-len(args[0]) // tensors)
    return 1


def waits(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether the host waits for the device during this operator."""
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("_to_copy", "copy_"):
        target, source = (args[0].device, args[1]) if name == "copy_" else (kwargs.get("device"), args[0])
        asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        to_host = target is not None and torch.device(target).type == "cpu"
        return to_host and source.device.type != "cpu" and not asynchronous
    if name == "index":
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return name in WAITS


@dataclass(frozen=True)
class Scheduled:
    """Counts of one graph after inductor scheduled it."""

    kernels: int
    gigabytes: float


@dataclass
class CountOperators(TorchDispatchMode):
    """Count every operator with a tensor on a device, under the name of the present phase."""

    device: str = "cuda"
    phase: str = "other"
    phases: dict[str, Phase] = field(default_factory=lambda: defaultdict(Phase))
    kernels_of: Counter[str] = field(default_factory=Counter)
    bytes_of: Counter[str] = field(default_factory=Counter)
    compiled: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def clear(self) -> None:
        """Reset all counts."""
        for counts in (self.phases, self.kernels_of, self.bytes_of):
            counts.clear()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: functions are compiled although this mode is active."""
        return True

    def tensors(self, tree: object) -> list[Tensor]:
        return tensors_on(self.device, tree)

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if self.tensors((args, kwargs)):
            # Before it runs: on fake tensors, an operator whose result the host must know raises.
            self.phases[self.phase].syncs += waits(name, args, kwargs)
        out = func(*args, **kwargs)
        if func.namespace != "prim" and (self.tensors((args, kwargs)) or self.tensors(out)):
            self.count(func, name, args, kwargs, out)
        return out

    def count(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: object) -> None:
        now = self.phases[self.phase]
        if name in FREE or is_view(func, args, out):
            return
        if func._overloadpacket in flop_registry:
            now.tflop += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) / 1e12
        if self.compiled:
            return
        n = launches(name, args)
        now.kernels += n
        self.kernels_of[name] += n
        if name in MATRIX_PRODUCTS or "attention" in name or "attn" in name:
            return
        written = {id(x): size(x) for x in self.tensors(out)}
        read = sum(size(x) for x in self.tensors(args[1] if name in COPIES else (args, kwargs)))
        read = 0 if name in ZERO_FILLS or name == "fill_" else read
        in_place = [args[i] for i in WRITTEN.get(name, (0,))]
        moved = read + (sum(written.values()) or sum(size(x) for x in self.tensors(in_place)))
        now.gigabytes += moved / 1e9
        self.bytes_of[name] += moved
        if name in ZERO_FILLS:
            now.zero_fills += sum(written.values()) / 1e9

    def add_compiled(self, scheduled: Scheduled) -> None:
        """Count one call of a compiled graph."""
        self.phases[self.phase] += Phase(scheduled.kernels, scheduled.gigabytes)
        self.kernels_of["compiled graphs"] += scheduled.kernels
        self.bytes_of["compiled graphs"] += int(scheduled.gigabytes * 1e9)

    @contextmanager
    def without_kernels(self) -> Iterator[None]:
        """Count only FLOP of products and waits, inside a compiled graph."""
        self.compiled = True
        try:
            yield
        finally:
            self.compiled = False


def is_view(func: Any, args: Sequence[Any], out: object) -> bool:
    """Return whether an operator only returns a view of its argument."""
    if func._schema.is_mutable:
        return False
    if func.is_view or func._schema.name in ("aten::_unsafe_view", "aten::_reshape_alias"):
        return True
    return isinstance(out, Tensor) and any(out is x for x in tree_leaves(args))
