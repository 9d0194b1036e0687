"""A network that a run uses and never trains, from a file of its own: a teacher, a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kit.errors import CheckpointError

EXTRA_STATE = "_extra_state"
"""Torch's name in a state dict of what ``get_extra_state`` returns."""


class FrozenNetwork(nn.Module):
    """A network whose weights stay as they are and outside of checkpoints.

    ``parameters()``, ``buffers()`` and ``state_dict()`` do not have its tensors: no optimiser trains it, no average
    follows it, FSDP does not shard it, and each process has a whole copy. The state dict has the SHA-256 of its weights
    instead; loading the state of a run that had others is an error. It is always in eval mode, and moves with
    ``.to()``. Its attributes and methods are those of the network: ``frozen.embed_dim``.

    Args:
        network: with its weights; they get no gradient any more.
        source: name of its file, for messages.

    Attributes:
        network: the same.
        digest: [32] uint8, the SHA-256 of names, types, shapes and values; zeros if the weights are on ``meta``.
    """

    def __init__(self, network: nn.Module, source: str = "") -> None:
        super().__init__()
        self._network = [network.requires_grad_(False).eval()]  # nn.Module does not see it in a list
        self.source = source
        self.digest = digest_of(network)
        self.train(False)

    @property
    def network(self) -> nn.Module:
        return self._network[0]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Return what the network returns."""
        return self.network(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_network" not in vars(self):  # before the constructor, as in copy.copy
                raise
            return getattr(self.network, name)

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Stay in eval mode, whatever ``mode`` is."""
        super().train(False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenNetwork:
        """Move or convert the network too: torch's way to all of ``to``, ``cuda``, ``double``."""
        super()._apply(fn, recurse)
        self.network._apply(fn, recurse)
        return self

    def get_extra_state(self) -> Tensor:
        """Return the digest, which the state dict has in place of the weights; a copy, which a reader may overwrite."""
        return self.digest.clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Compare the digest of a checkpoint with that of these weights.

        Raises:
            CheckpointError: they differ.
        """
        if not torch.equal(state.cpu(), self.digest):
            then, now = (bytes(x.tolist()).hex()[:16] for x in (state, self.digest))
            raise CheckpointError(
                f"the frozen network {self.source or type(self.network).__name__} is not that of the checkpoint: its "
                f"weights have the SHA-256 {now}..., and those that the run was trained with have {then}..."
            )


@torch.no_grad()
def digest_of(network: nn.Module) -> Tensor:
    """Return the SHA-256 [32] uint8 of a network's state dict: names, types, shapes, bytes; zeros on ``meta``."""
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if value.is_meta:
            return torch.zeros(32, dtype=torch.uint8, device="cpu")
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(found.digest()), dtype=torch.uint8, device="cpu")
