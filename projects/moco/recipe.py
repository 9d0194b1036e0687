"""MoCo: an embedding of one view finds the momentum encoder's embedding of another among those of other images.

B = images of this process    K = keys    D = width of the head
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.distributed.collectives import first_row, gather_with_grad
from jepa_kit.encoders.pooling import pooled
from jepa_kit.interfaces import Head, TargetUpdate
from jepa_kit.losses.contrastive import info_nce
from jepa_kit.losses.self_distillation import check_temperature
from jepa_kit.recipe import Recipe
from jepa_kit.registry import RECIPES
from jepa_kit.structures import START, Output, Progress, View, at_least_float32


class MomentumContrast(Recipe):
    """What all versions have: a projection head, and momentum copies of encoder and head, which compute keys."""

    num_views = (2, 2)
    masked = False
    needs_teacher = True

    def __init__(self, *, encoder: nn.Module, head: nn.Module, target_update: TargetUpdate, temperature: float) -> None:
        super().__init__(encoder=encoder, target_update=target_update)
        check_temperature("temperature", temperature)
        self.temperature = temperature
        self.head = head
        # Batch norm, if there is any, is by the statistics of the batch, as in the released code.
        self.target_encoder = self.follow("encoder", training=True)
        self.target_head = self.follow("head", training=True)
        self.train()

    def embed(self, view: View, network: Any) -> Tensor:
        """Return projections [B, D]; the function ``network`` returns the encoder and the head by name."""
        return network("head")(pooled(network("encoder"), view.images))

    @torch.no_grad()
    def keys(self, view: View) -> Tensor:
        """Return the momentum networks' projections [B, D]."""
        return self.embed(view, self.network)


@RECIPES.register("moco")
class MoCo(MomentumContrast):
    """Find the key of the same image before a queue of keys of earlier images (v1 and v2).

    Source: He et al. 2020, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297. The first view gives queries, the
    second keys. In training, keys of all processes enter the queue after the loss is computed.

    Args:
        encoder: its class token, or the mean over patches if it has none, represents a view.
        head: projects representations: one linear layer in v1, two layers in v2.
        target_update: ``ema``; the paper has a constant momentum.
        queue: number of keys that are kept, at least those of a step.
        temperature: of the softmax over cosines: 0.07 in v1, 0.2 in v2.

    Raises:
        ValueError: an option is outside its range, ``target_update`` makes no momentum encoder, or, in training, a
            step has more keys than the queue.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        *,
        encoder: nn.Module,
        head: nn.Module,
        target_update: TargetUpdate,
        queue: int = 65536,
        temperature: float = 0.07,
    ) -> None:
        super().__init__(encoder=encoder, head=head, target_update=target_update, temperature=temperature)
        if queue < 1:
            raise ValueError(f"queue (={queue}) must be at least 1")
        self.register_buffer("queue", F.normalize(torch.randn(queue, cast(Head, head).out_dim), dim=1))  # [K, D]
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # row of the oldest key

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return the loss of two views."""
        first, second = views
        queries, keys = self.embed(first, self.get_submodule), self.keys(second)
        logits = self.logits(queries, keys)
        if self.training:
            self.enqueue(gather_with_grad(keys))
        loss = F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64))
        return Output(loss, {"info_nce": loss})

    def logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return cosines of queries [B, D] with their keys [B, D] and the queue, over the temperature: [B, 1 + K]."""
        with torch.autocast(queries.device.type, enabled=False):  # half precision would round cosines away
            q, k = (F.normalize(at_least_float32(x), dim=1) for x in (queries, keys))
            queue = self.queue.clone()  # [K, D]; the backward pass needs it after enqueue has changed it
            return torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / self.temperature

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys of the queue by these, [n, D], which may wrap around its end."""
        if len(keys) > len(self.queue):
            raise ValueError(f"queue (={len(self.queue)}) must be at least the number of images in a step, {len(keys)}")
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, rows, F.normalize(at_least_float32(keys), dim=1))
        self.pointer.add_(len(keys)).remainder_(len(self.queue))


@RECIPES.register("moco_v3")
class MoCoV3(MomentumContrast):
    """Find the key of the same image among those of the batch, in both directions (Chen et al. 2021, arXiv 2104.02057).

    Args:
        encoder: its class token, or the mean over patches if it has none, represents a view.
        head: projects representations; the momentum copy has one too.
        prediction_head: maps projections to queries; the momentum copy has none.
        target_update: ``ema``; the paper raises the momentum to 1 along a cosine.
        temperature: of the softmax over cosines. Each loss is multiplied by twice the temperature.
        freeze_patch_embed: do not train the patch embedding, as it makes training unstable (section 4.2).

    Raises:
        ValueError: the temperature is not above 0, ``target_update`` makes no momentum encoder, or the encoder has no
            module ``patch_embed`` to freeze.
    """

    head_inputs: ClassVar = {"prediction_head": "head"}

    def __init__(
        self,
        *,
        encoder: nn.Module,
        head: nn.Module,
        prediction_head: nn.Module,
        target_update: TargetUpdate,
        temperature: float = 0.2,
        freeze_patch_embed: bool = True,
    ) -> None:
        super().__init__(encoder=encoder, head=head, target_update=target_update, temperature=temperature)
        self.prediction_head = prediction_head
        if freeze_patch_embed:
            if not isinstance(embedding := getattr(encoder, "patch_embed", None), nn.Module):
                raise ValueError("freeze_patch_embed (=True) must be False: the encoder has no module patch_embed")
            embedding.requires_grad_(False)

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return the sum of the losses of each view's queries with the other view's keys."""
        queries = [self.prediction_head(self.embed(view, self.get_submodule)) for view in views]
        keys = [self.keys(view) for view in views]
        loss = self.contrast(queries[0], keys[1]) + self.contrast(queries[1], keys[0])
        return Output(loss, {"info_nce": loss})

    def contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the loss [] of queries [B, D] with their keys [B, D] among the keys of all processes."""
        every = gather_with_grad(keys.detach())  # [K, D]
        column = torch.arange(len(every), device=keys.device)
        positive = column == first_row(len(keys)) + column[: len(keys), None]  # [B, K]
        return 2 * self.temperature * info_nce(queries, every, positive, temperature=self.temperature).mean()
