"""SimCLR: views of one image are near each other, and those of different images are not.

B = images of this process    V = views of an image    K = views of all images of all processes    D = width of the head
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa_kit.distributed.collectives import first_row, gather_with_grad
from jepa_kit.encoders.pooling import pooled_views
from jepa_kit.losses.contrastive import info_nce
from jepa_kit.losses.self_distillation import check_temperature
from jepa_kit.recipe import Recipe
from jepa_kit.registry import RECIPES
from jepa_kit.structures import START, Output, Progress, View


@RECIPES.register("simclr")
class SimCLR(Recipe):
    """Find the other views of an image among the views of all images (Chen et al. 2020, arXiv 2002.05709).

    Batch norm of the head is over all views of all processes together.

    Args:
        encoder: its class token, or else the mean of its patches, is the representation.
        head: projects representations; only training uses it.
        temperature: of the softmax over cosines, above 0; the paper has 0.1 for its long runs.

    Raises:
        ValueError: the temperature is not above 0.
    """

    num_views = (2, None)
    masked = False

    def __init__(self, *, encoder: nn.Module, head: nn.Module, temperature: float = 0.1) -> None:
        super().__init__(encoder=encoder)
        check_temperature("temperature", temperature)
        self.head = head
        self.temperature = temperature

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return NT-Xent of two or more views."""
        loss = self.nt_xent(self.head(pooled_views(self.encoder, views)), len(views))
        return Output(loss, {"nt_xent": loss})

    def nt_xent(self, z: Tensor, views: int) -> Tensor:
        """Return the loss of embeddings [V * B, D], view by view: -> [].

        The mean over embeddings of -log of the softmax over all others that falls to the views of the same image. With
        two views it is the paper's equation 1; more views are as in supervised contrastive learning's L_in (Khosla et
        al. 2020, arXiv 2004.11362).
        """
        keys = gather_with_grad(z)  # [K, D]
        first = first_row(len(z))
        own = slice(first, first + len(z))  # the rows of this process
        image = torch.arange(len(z), device=z.device) % (len(z) // views)  # [V * B]
        positive, itself = torch.zeros(2, len(z), len(keys), dtype=torch.bool, device=z.device)  # [V * B, K] each
        positive[:, own] = image[:, None] == image
        itself[:, own].fill_diagonal_(True)
        return info_nce(z, keys, positive, temperature=self.temperature, left_out=itself).mean()
