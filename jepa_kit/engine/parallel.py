"""One training step on several processes, or in several parts: DDP, FSDP2, gradient accumulation.

Losses and gradients are those of one process on the whole batch, to rounding: a loss is a mean over images, so the mean
over ranks with equally many images, and over parts weighted by their images, is the mean over all. Four things differ:
stochastic depth is drawn per process and part; a loss term that compares the samples of a batch sees those of a part;
buffers that move in a forward pass (statistics of batch norm, a centre) move once a part; and masks that depend on the
batch (the released truncation) depend on a rank's batch. Parts are taken from the masks of the rank's batch, so
accumulation changes no mask.

bf16 is autocast around the forward pass, also under FSDP: parameters are gathered in float32 and cast by autocast.
``MixedPrecisionPolicy(param_dtype=torch.bfloat16)`` would halve the communication, but it makes LayerNorm's weights and
the residual stream bf16, so the run would differ from that of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jepa_kit.compat import initialize_fsdp
from jepa_kit.distributed.buffers import broadcast_buffers
from jepa_kit.distributed.collectives import joined, wrap
from jepa_kit.encoders.blocks import blocks_of
from jepa_kit.recipe import Recipe
from jepa_kit.structures import START, Output, Progress, View

Mode = Literal["auto", "none", "ddp", "fsdp"]


def parallelize(jepa: Recipe, device: torch.device, mode: Mode = "auto", accumulate: int = 1) -> nn.Module:
    """Return the module that a training step calls in place of ``jepa``; to be called before the optimiser is built.

    Args:
        jepa: on its device, with the same weights on all ranks (rank 0's are taken).
        device: of this process.
        mode: ``ddp`` keeps the whole model in every process and averages gradients; ``fsdp`` shards parameters,
            gradients and the optimiser's moments over the processes, block by block (FSDP2), and makes ``jepa`` itself
            sharded; ``none`` is for one process; ``auto`` is ``ddp`` if there are several.
        accumulate: parts that a rank's batch is split into, one after another; 1 for the whole batch at once.

    Raises:
        ValueError: the mode does not fit the number of processes, or ``accumulate`` is below 1.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate (={accumulate}) must be at least 1")
    processes = dist.get_world_size() if joined() else 1
    if mode == "none" and processes > 1:
        raise ValueError(f"train.parallel (='none') would train {processes} independent copies; choose 'ddp' or 'fsdp'")
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


def shard(jepa: Recipe, device: torch.device) -> None:
    """Apply FSDP2 over all processes, in place: to each block, the rest of each network, and the rest of the recipe.

    A block is a module with ``is_block = True``. A network names its methods that are called beside ``forward`` in
    ``forward_methods``.

    Encoder and target encoder are sharded alike, so that each process has the same part of both, and the update of the
    target encoder needs no communication. All ranks together may call any of the networks alone.
    """
    from torch.distributed.device_mesh import init_device_mesh  # half a second to import
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for value in (*jepa.parameters(), *jepa.buffers()):  # as DDP does
        dist.broadcast(value.detach(), 0)
    undecayed = [name for name, p in jepa.named_parameters() if getattr(p, "no_decay", False)]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    networks = [
        part
        for part in jepa.children()
        if not isinstance(part, nn.ModuleDict | nn.ModuleList) and any(True for _ in part.parameters())
    ]
    for network in networks:
        for block in blocks_of(network):
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
        for method in getattr(network, "forward_methods", ()):
            register_fsdp_forward_method(network, method)
    fully_shard(jepa, mesh=mesh)
    for name in undecayed:  # parameters are new ones now, without the attributes of the old
        jepa.get_parameter(name).no_decay = True  # type: ignore[attr-defined]
    initialize_fsdp(jepa)
    broadcast_buffers(jepa)


class Accumulated(nn.Module):
    """Gradient accumulation: ``forward`` returns the loss of the whole batch; its ``backward`` completes the gradient.

    All parts but the last run backward inside ``forward``, without communication, and add their gradients to ``.grad``.
    The returned loss has the value for the whole batch and the graph of the last part; ``prediction`` is that of the
    last part.

    Args:
        inner: JEPA, or DDP around it, or JEPA sharded by FSDP2.
        parts: 2 and up.
    """

    def __init__(self, inner: nn.Module, parts: int) -> None:
        super().__init__()
        self.inner = inner
        self.parts = parts

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """As ``Recipe.forward``."""
        loss: Any = 0.0
        terms: dict[str, Any] = {}
        figures: dict[str, Any] = {}
        for last, weight, part_views in self.split(views):
            with nullcontext() if last else self.local_gradients():
                out = self.inner(*part_views, progress=progress)
                part = weight * out.loss
                if not last:
                    if part.requires_grad:
                        # backward runs in what forward ran in
                        with torch.autocast(views[0].images.device.type, enabled=False):
                            part.backward()
                    part = part.detach()
            loss = loss + part
            terms = {name: terms.get(name, 0.0) + weight * term.detach() for name, term in out.terms.items()}
            figures = {name: figures.get(name, 0.0) + weight * value.detach() for name, value in out.figures.items()}
        return Output(loss, terms, out.prediction, figures)

    def split(self, views: Sequence[View]) -> Iterator[tuple[bool, float, list[View]]]:
        """Yield (whether it is the last, its fraction of the images, views) for each part.

        There are always as many parts, since sharded ranks communicate in each. If this rank has fewer images than
        parts, because some were unusable, the first parts are its first image with a weight of 0, which adds nothing.
        """
        count = len(views[0])
        whole = min(self.parts, count)
        if whole < self.parts:
            first = [view.split([0, 1])[0] for view in views]
            yield from [(False, 0.0, first)] * (self.parts - whole)
        ends = [count * k // whole for k in range(whole + 1)]
        for k, part in enumerate(zip(*(view.split(ends) for view in views), strict=True)):
            yield k == whole - 1, (ends[k + 1] - ends[k]) / count, list(part)

    def local_gradients(self) -> AbstractContextManager[object]:
        """Return a context in which gradients stay in this process."""
        if isinstance(self.inner, DistributedDataParallel):
            return self.inner.no_sync()
        return _unreduced(self.inner) if hasattr(self.inner, "set_requires_gradient_sync") else nullcontext()


@contextmanager
def _unreduced(model: Any) -> Iterator[None]:
    """Let FSDP2 add up unsharded gradients; it averages and shards them after the last part."""
    model.set_requires_gradient_sync(False)
    model.set_is_last_backward(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
        model.set_is_last_backward(True)
