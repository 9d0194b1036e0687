"""MSN: views with dropped patches belong to the same prototypes as the whole image.

B = images of this process    A = anchor views of an image    K = prototypes    D = width of the head
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jepa_kit.distributed.collectives import gather_with_grad
from jepa_kit.encoders.pooling import pooled_views
from jepa_kit.interfaces import TargetUpdate
from jepa_kit.losses.self_distillation import check_temperature, cross_entropy, log_distributions
from jepa_kit.losses.sinkhorn import sinkhorn
from jepa_kit.recipe import Recipe
from jepa_kit.registry import RECIPES
from jepa_kit.structures import START, Output, Progress, View, at_least_float32


@RECIPES.register("msn")
class MSN(Recipe):
    """Assign masked anchor views to the prototypes of a whole target view (Assran et al. 2022, arXiv 2204.07141).

    The first view is the target, and the momentum networks see it whole. All others are anchors: of those with masks,
    the encoder sees the context patches alone. Prototypes are trained, without weight decay.

    Args:
        encoder: its class token, or else the mean of its patches, is the representation.
        head: projects representations; the momentum copy has batch norm by the statistics of a batch too.
        prototype_head: cosines of projections with prototypes.
        target_update: ``ema``.
        temperature: of the softmax over cosines, above 0.
        sharpening: targets are probabilities to the power of 1 / sharpening, normalised; in (0, 1].
        sinkhorn: iterations that balance the targets of all processes over prototypes; 0 for none.
        label_smoothing: fraction of each probability that is spread over all prototypes, in [0, 1).
        me_max: weight of log K minus the entropy of the mean anchor of all processes.
        entropy: weight of the mean entropy of an anchor.

    Raises:
        ValueError: an option is outside its range, or ``target_update`` makes no momentum encoder; in ``forward``, the
            target view has masks, or the masker gives an image of an anchor view several contexts.
    """

    num_views = (2, None)
    needs_teacher = True
    head_inputs: ClassVar = {"prototype_head": "head"}

    def __init__(
        self,
        *,
        encoder: nn.Module,
        head: nn.Module,
        prototype_head: nn.Module,
        target_update: TargetUpdate,
        temperature: float = 0.1,
        sharpening: float = 0.25,
        sinkhorn: int = 3,
        label_smoothing: float = 0.0,
        me_max: float = 1.0,
        entropy: float = 0.0,
    ) -> None:
        super().__init__(encoder=encoder, target_update=target_update)
        check_temperature("temperature", temperature)
        if not 0.0 < sharpening <= 1.0:
            raise ValueError(f"sharpening (={sharpening}) must be above 0 and at most 1")
        if sinkhorn < 0:
            raise ValueError(f"sinkhorn (={sinkhorn}) must be 0 or more iterations")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing (={label_smoothing}) must be in [0, 1)")
        self.temperature, self.sharpening, self.sinkhorn = temperature, sharpening, sinkhorn
        self.label_smoothing = label_smoothing
        self.weights = {"cross_entropy": 1.0, "me_max": me_max, "entropy": entropy}
        self.head, self.prototype_head = head, prototype_head
        self.target_head = self.follow("head", training=True)  # batch norm by the statistics of the batch
        for prototypes in prototype_head.parameters():
            prototypes.no_decay = True  # type: ignore[attr-defined]
        self.train()

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return the loss of the target view, the first, and the anchor views."""
        target, *anchors = views
        if target.masks is not None:
            raise ValueError("the first view is the target and must be whole, but it has masked: true")
        z = self.embed(anchors, self.get_submodule)  # [A * B, D]
        if len(z) != len(anchors) * len(target):
            raise ValueError(
                f"masker must give each image one context: {len(anchors)} anchors of {len(target)} images have {len(z)}"
            )
        with torch.no_grad():
            targets = self.targets(self.embed([target], self.network))
        return self.compare(z, targets)

    def embed(self, views: Sequence[View], network: Any) -> Tensor:
        """Return projections [V * B, D]; the function ``network`` returns the encoder and the head by name."""
        return network("head")(pooled_views(network("encoder"), views))

    def log_probabilities(self, z: Tensor) -> Tensor:
        """Return the logarithms of the prototypes' probabilities for projections [N, D]: -> [N, K]."""
        with torch.autocast(z.device.type, enabled=False):  # half precision would round cosines away
            log_p = log_distributions(self.prototype_head(at_least_float32(z)), self.temperature)
        if not self.label_smoothing:
            return log_p
        spread = log_p.new_full((), math.log(self.label_smoothing / log_p.shape[1]))
        return torch.logaddexp(log_p + math.log1p(-self.label_smoothing), spread)

    @torch.no_grad()
    def targets(self, z: Tensor) -> Tensor:
        """Return the sharpened, balanced probabilities of target projections: [B, D] -> [B, K]."""
        return sinkhorn(self.log_probabilities(z).div(self.sharpening).log_softmax(1), self.sinkhorn)

    def compare(self, z: Tensor, targets: Tensor) -> Output:
        """Return the loss of anchor projections [A * B, D], view by view, and targets [B, K]."""
        log_p = self.log_probabilities(z)
        p = log_p.exp()
        mean = gather_with_grad(p.mean(0, keepdim=True)).mean(0)  # [K], of all processes
        terms = {
            "cross_entropy": cross_entropy(targets.repeat(len(z) // len(targets), 1), log_p).mean(),
            "me_max": math.log(len(mean)) - torch.special.entr(mean).sum(),
            "entropy": cross_entropy(p, log_p).mean(),
        }
        return Output(torch.stack([self.weights[name] * term for name, term in terms.items()]).sum(), terms)
