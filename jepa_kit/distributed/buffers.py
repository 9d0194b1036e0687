"""Buffers that training changes: batch norm's statistics, the centre of targets in DINO, ...

They are the buffers of the state dict. A buffer that is not persistent is in no checkpoint, so it must be a table that
the constructor computes, as the position tables of jepa_kit are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_kit.compat import buffers_of, persistent_names


def persistent_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield (module, name in it, full name) of each buffer of the state dict, once."""
    for prefix, module in model.named_modules():
        for name in persistent_names(module):
            yield module, name, f"{prefix}.{name}" if prefix else name


class Buffers:
    """Copies of the persistent buffers before a step, to undo what the step does to them; never waits for the device.

    Args:
        model: before its forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.before = [
            (module, name, full_name, module.get_buffer(name).detach().clone())
            for module, name, full_name in persistent_buffers(model)
        ]

    @torch.no_grad()
    def restore_unless(self, finite: Tensor) -> None:
        """Put back the values from before if ``finite`` [] bool is false.

        Raises:
            ValueError: the forward pass gave a buffer another shape.
        """
        for module, name, full_name, before in self.before:
            now = buffers_of(module)[name]
            if now is None or now.shape != before.shape:
                shape = None if now is None else tuple(now.shape)
                raise ValueError(
                    f"buffer {full_name} has the shape {shape} after the forward pass, and {tuple(before.shape)} "
                    "before: it must keep its shape, so that a bad batch can be undone and checkpoints fit"
                )
            now.copy_(torch.where(finite, now, before))


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the persistent buffers on leaving the ``with``."""
    buffers = Buffers(model)
    try:
        yield
    finally:
        for module, name, _full_name, before in buffers.before:
            now = buffers_of(module)[name]
            if now is not None and now.shape == before.shape:
                now.detach().copy_(before)
            else:
                buffers_of(module)[name] = before


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's persistent buffers before each forward pass in training: those that a checkpoint has.

    DDP's own option does not see a buffer that is replaced, and FSDP has none.
    """

    def send(*_: object) -> None:
        for module, name, _full_name in persistent_buffers(model) if model.training else ():
            dist.broadcast(module.get_buffer(name).detach(), 0)

    if any(persistent_buffers(model)):
        model.register_forward_pre_hook(send)
