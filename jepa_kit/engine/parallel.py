"""One training step over several processes, and in several parts: DDP, FSDP2, gradient accumulation.

Losses and gradients are those of one process on the whole batch, to rounding: a loss is a mean over images, so the
mean over ranks with as many images each, and over parts by their images, is the mean over all. Three things are others:
stochastic depth, which is drawn for each process and each part; a loss term that compares the samples of a batch, which
sees those of a part; and masks that hang on the batch (the released truncation), which hang on a rank's batch. Parts
are taken from the masks of the rank's batch, so accumulation changes no mask.

bf16 is autocast around the forward pass, under FSDP as well: parameters are gathered in float32 and cast where autocast
casts them. ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)`` would halve what is sent, but it takes LayerNorm's
weights and the residual stream to bf16, and the run would be another one than that of one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jepa_kit.compat import initialize_fsdp
from jepa_kit.distributed.buffers import broadcast_buffers
from jepa_kit.distributed.collectives import joined, wrap
from jepa_kit.encoders.blocks import Block
from jepa_kit.recipe import JEPA
from jepa_kit.structures import MaskBatch, Output

Mode = Literal["auto", "none", "ddp", "fsdp"]

METHODS = ("forward_layers",)
"""What is called of an encoder beside ``forward``."""


def parallelize(jepa: JEPA, device: torch.device, mode: Mode = "auto", accumulate: int = 1) -> nn.Module:
    """What a training step calls in place of ``jepa``; to be called before the optimiser is built.

    Args:
        jepa: on its device, with the same weights on all ranks (rank 0's are taken).
        device: of this process.
        mode: ``ddp`` keeps the whole model in every process and averages gradients; ``fsdp`` shards parameters,
            gradients and the optimiser's moments over the processes, block by block (FSDP2), and makes ``jepa`` itself
            sharded; ``none`` is for one process; ``auto`` takes ``ddp`` where there are several.
        accumulate: parts that a rank's batch is split into, one after another; 1 for the whole batch at once.

    Raises:
        ValueError: a mode that does not fit the number of processes, or ``accumulate`` below 1.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate (={accumulate}) must be at least 1")
    processes = dist.get_world_size() if joined() else 1
    if mode == "none" and processes > 1:
        raise ValueError(
            f"train.parallel (='none') would train {processes} copies apart from one another; take 'ddp' or 'fsdp'"
        )
    if mode in ("ddp", "fsdp") and not joined():
        raise ValueError(
            f"train.parallel (={mode!r}) needs several processes (torchrun --nproc-per-node N ...), and this is one: "
            "'auto' fits both"
        )
    if mode == "fsdp":
        shard(jepa, device)
        forward: nn.Module = jepa
    else:
        forward = wrap(jepa, device)
    return Accumulated(forward, accumulate) if accumulate > 1 else forward


def shard(jepa: JEPA, device: torch.device) -> None:
    """FSDP2 over all processes, in place: each block by itself, the rest of each network, then what is left.

    Encoder and target encoder are sharded alike, so that each process has the same part of both, and the target
    encoder's average needs no communication. Every network can be called by itself, by all ranks together.
    """
    from torch.distributed.device_mesh import init_device_mesh  # half a second to import
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for value in (*jepa.parameters(), *jepa.buffers()):  # as DDP does
        dist.broadcast(value.detach(), 0)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    networks = [part for part in (jepa.encoder, jepa.target_encoder, jepa.predictor) if part is not None]
    for network in networks:
        for block in network.modules():
            if isinstance(block, Block):
                fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
        for method in METHODS:
            if hasattr(network, method):
                register_fsdp_forward_method(network, method)
    fully_shard(jepa, mesh=mesh)
    initialize_fsdp(jepa)
    broadcast_buffers(jepa)


class Accumulated(nn.Module):
    """A batch in parts: ``forward`` gives the loss of the whole, and its ``backward`` completes the whole gradient.

    The parts but the last run backward inside ``forward``, without communication; their gradients wait in ``.grad``.
    The loss that comes out has the value of the whole batch's and the graph of the last part's. ``prediction`` is the
    last part's alone.

    Args:
        inner: JEPA, or DDP around it, or JEPA sharded by FSDP2.
        parts: 2 and up.
    """

    def __init__(self, inner: nn.Module, parts: int) -> None:
        super().__init__()
        self.inner = inner
        self.parts = parts

    def forward(self, images: Tensor, masks: MaskBatch) -> Output:
        """As ``JEPA.forward``."""
        loss: Any = 0.0
        terms: dict[str, Any] = {}
        for last, share, x, m in self.split(images, masks):
            with nullcontext() if last else self.local_gradients():
                out = self.inner(x, m)
                part = share * out.loss
                if not last:
                    if part.requires_grad:
                        with torch.autocast(images.device.type, enabled=False):  # backward runs in what forward ran in
                            part.backward()
                    part = part.detach()
            loss = loss + part
            terms = {name: terms.get(name, 0.0) + share * term.detach() for name, term in out.terms.items()}
        return Output(loss, terms, out.prediction)

    def split(self, images: Tensor, masks: MaskBatch) -> Iterator[tuple[bool, float, Tensor, MaskBatch]]:
        """(whether it is the last, its share of the images, images, masks) of each part.

        There are always as many parts, since sharded ranks talk in each. Where fewer images are left to this rank, as
        some could not be used, the first parts have its first image with a share of 0, which adds nothing.
        """
        whole = min(self.parts, len(images))
        if whole < self.parts:
            (first,) = masks.split([0, 1])
            yield from [(False, 0.0, images[:1], first)] * (self.parts - whole)
        ends = [len(images) * k // whole for k in range(whole + 1)]
        for k, m in enumerate(masks.split(ends)):
            yield k == whole - 1, (ends[k + 1] - ends[k]) / len(images), images[ends[k] : ends[k + 1]], m

    def local_gradients(self) -> AbstractContextManager[object]:
        """Inside it, gradients stay in this process."""
        if isinstance(self.inner, DistributedDataParallel):
            return self.inner.no_sync()
        return _unreduced(self.inner) if hasattr(self.inner, "set_requires_gradient_sync") else nullcontext()


@contextmanager
def _unreduced(model: Any) -> Iterator[None]:
    """FSDP2 adds up whole gradients, and averages and shards them after the last part."""
    model.set_requires_gradient_sync(False)
    model.set_is_last_backward(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
        model.set_is_last_backward(True)
