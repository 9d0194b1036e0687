"""A joint-embedding architecture: embeddings of views are compared with their mean.

V = views of an image    B = images    D = width of an embedding    D_e = the encoder's width
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from jepa_kit.encoders.pooling import pooled_views
from jepa_kit.recipe import Recipe, named_losses, weighted_sum
from jepa_kit.registry import RECIPES
from jepa_kit.structures import START, MaskBatch, Output, PatchSets, Prediction, Progress, View, at_least_float32


@RECIPES.register("joint_embedding")
class JointEmbedding(Recipe):
    """Compare embeddings of the views of an image with their mean (the paper's figure 2a).

    There is no target network and no stop-gradient: a loss that is a distance draws views together, and a regulariser
    (``vicreg``, ``sigreg``, ``visreg``) keeps images apart. A loss is given embeddings as predictions, each view as a
    set of one patch, and the mean of the views as targets, with its gradient.

    Args:
        encoder: its class token, or else the mean of its patches, is the representation.
        losses: (name, module, weight) of each term of the loss.
        head: projects representations; None for none.
        centre: number of views, the first ones, whose mean is the target; None for all.

    Raises:
        ValueError: there is no loss, two losses share a name, or ``centre`` is below 1; in ``forward``, there are fewer
            views.
    """

    num_views = (2, None)
    masked = False

    def __init__(
        self,
        *,
        encoder: nn.Module,
        losses: Sequence[tuple[str, nn.Module, float]],
        head: nn.Module | None = None,
        centre: int | None = None,
    ) -> None:
        super().__init__(encoder=encoder)
        self.head = head
        self.losses, self.weights = named_losses(losses)
        if centre is not None and centre < 1:
            raise ValueError(f"centre (={centre}) must be at least 1 view")
        self.centre = centre

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return the weighted sum of the losses of two or more views."""
        features = pooled_views(self.encoder, views)  # [V * B, D_e], view by view
        return self.compare(features if self.head is None else self.head(features), features, len(views), progress)

    def compare(self, z: Tensor, features: Tensor, views: int, progress: Progress = START) -> Output:
        """Return the loss of embeddings [V * B, D] and the features [V * B, D_e] that they are of, view by view."""
        if self.centre is not None and self.centre > views:
            raise ValueError(f"centre (={self.centre}) must be at most the number of views (={views})")
        z = at_least_float32(z)
        target = z.unflatten(0, (views, -1))[: self.centre].mean(0)  # [B, D]
        masks = _views_as_sets(views, len(target), z.device)
        prediction = Prediction(z, target.repeat(views, 1), features, masks, progress)
        return Output(*weighted_sum(self.losses, self.weights, prediction))


@lru_cache(maxsize=8)  # a copy to the device would make each step wait
def _views_as_sets(views: int, images: int, device: torch.device) -> MaskBatch:
    """Return each view of each image as a set of one patch, view by view."""
    image = torch.arange(images).repeat(views)
    sets = PatchSets.from_padded(torch.zeros(len(image), 1, dtype=torch.int64), image)
    return MaskBatch(sets, sets, (1, 1), torch.arange(len(image))).to(device)
