"""JEPA: the equations.

s_y     = target(images)            at the target patches      (no gradient)
s_x     = encoder(images)           at the context patches
s_hat_y = predictor(s_x, positions) at the target patches
loss    = D(s_hat_y, s_y);  target encoder <- target_update(encoder)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from jepa_kit.interfaces import Encoder, TargetUpdate
from jepa_kit.structures import MaskBatch, Output, Prediction


class JEPA(nn.Module):
    """A joint-embedding predictive architecture, assembled from exchangeable parts.

    Args:
        encoder: the context encoder.
        predictor: maps context tokens and target positions to predictions.
        target: computes what is predicted.
        losses: (name, module, weight) of each term of the loss.
        target_update: makes the target encoder and updates it.

    Raises:
        ValueError: there is no loss, two losses share a name, or the target needs a target encoder and the update
            makes none.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        predictor: nn.Module,
        target: nn.Module,
        losses: Sequence[tuple[str, nn.Module, float]],
        target_update: TargetUpdate,
    ) -> None:
        super().__init__()
        names = [name for name, _, _ in losses]
        if not names:
            raise ValueError("losses (=[]) must contain at least one term")
        if len(set(names)) < len(names):
            raise ValueError(f"losses (={names}) must have different names")
        self.encoder = encoder
        self.predictor = predictor
        self.target = target
        self.losses = nn.ModuleDict({name: module for name, module, _ in losses})
        self.weights = {name: weight for name, _, weight in losses}
        self.target_update = target_update
        # A tied target encoder is not registered a second time.
        self.target_encoder: nn.Module | None = target_update.make(encoder)
        if getattr(target, "needs_encoder", False) and self.target_network is None:
            raise ValueError(
                "target needs a target encoder, and target_update makes none; "
                "take target_update={name: ema}, or target={name: pixel}"
            )
        self.train()

    @property
    def target_network(self) -> nn.Module | None:
        """The network that computes targets: the target encoder, or the context encoder if the two are tied."""
        return self.encoder if self.target_update.tied else self.target_encoder

    def forward(self, images: Tensor, masks: MaskBatch) -> Output:
        """Return the loss of a batch of normalised images [B, C, h, w].

        Raises:
            ValueError: the masks' grid differs from that of the images.
        """
        p = cast(Encoder, self.encoder).patch_size
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        if grid != masks.grid:
            raise ValueError(f"masks.grid (={masks.grid}) must be that of the images (={grid})")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.target_update.stop_gradient):
            s_y = self.target(images, masks.targets, self.target_network)  # [P_t, D]
        s_x = self.encoder(images, masks.context)  # [P_c, D_e]
        s_hat_y = self.predictor(s_x, masks)  # [P_t, D]
        # Distances and their sums are computed in float32 or better: half precision would round them away.
        prediction = Prediction(_at_least_float32(s_hat_y), _at_least_float32(s_y), s_x, masks)
        terms = {name: loss(prediction) for name, loss in self.losses.items()}
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return Output(total, terms, prediction)

    def update_target(self, momentum: float) -> None:
        """Update the target encoder: target encoder <- target_update(encoder)."""
        self.target_update.update(self.target_encoder, self.encoder, momentum)

    def momentum(self, where: float) -> float:
        """Return the momentum at progress ``where`` in [0, 1] of training."""
        return self.target_update.momentum(where)

    def encoder_for(self, which: Literal["target", "context"]) -> nn.Module:
        """Return the encoder to evaluate: as in the paper the target encoder, or the context encoder if none exists."""
        if which not in ("target", "context"):
            raise ValueError(f"which (={which!r}) must be 'target' or 'context'")
        network = self.target_network if which == "target" else self.encoder
        return self.encoder if network is None else network

    def train(self, mode: bool = True) -> JEPA:
        """Set the training mode as ``nn.Module.train``; a separate target encoder stays in eval mode."""
        super().train(mode)
        if self.target_encoder is not None:
            self.target_encoder.eval()
        return self


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
