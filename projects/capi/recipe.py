"""CAPI: predict which cluster a hidden patch of the teacher belongs to; the clusters are learned in the same run.

z      = clusters(target(images))                          scores of all patches, at each position those of all images
q      = sinkhorn(z / teacher_temperature)                 balanced over clusters, at each position by itself
s_hat  = head(predictor(encoder(context)))                 scores of the target patches
loss   = cross entropy of q and softmax(s_hat / temperature), at the target patches
       + cross entropy of q and softmax(z / cluster_temperature), at all patches, which moves the clusters alone

B = images of this process    N = patches of an image    D = width of the target    K = clusters    P_t = target patches
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.interfaces import Head, Target, TargetUpdate
from jepa_kit.losses.self_distillation import check_temperature, cross_entropy, entropy, log_distributions
from jepa_kit.losses.sinkhorn import sinkhorn
from jepa_kit.recipe import JEPA
from jepa_kit.registry import RECIPES
from jepa_kit.structures import START, Output, PatchSets, Prediction, Progress, View, at_least_float32


class Clusters(nn.Module):
    """Assign patches to clusters, and measure how well the clusters fit: a linear map of unit vectors.

    Args:
        width: D.
        clusters: K.
        teacher_temperature, cluster_temperature: of the assignments, and of the scores that are compared with them.
        iterations: of Sinkhorn-Knopp, 0 for none.
        positionwise: whether clusters are balanced at each position by itself, so that none stands for a position.
        bias: of the linear map.
        eps: see ``sinkhorn``; the released code's.
    """

    def __init__(
        self,
        width: int,
        clusters: int,
        *,
        teacher_temperature: float,
        cluster_temperature: float,
        iterations: int,
        positionwise: bool,
        bias: bool = True,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.teacher_temperature, self.cluster_temperature = teacher_temperature, cluster_temperature
        self.iterations, self.positionwise, self.eps = iterations, positionwise, eps
        self.layer = nn.Linear(width, clusters, bias=bias)
        nn.init.normal_(self.layer.weight)
        if bias:
            nn.init.zeros_(self.layer.bias)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens [B, N, D] to assignments [B, N, K], without a gradient, and to the loss of the clusters []."""
        scores = at_least_float32(self.layer(F.normalize(tokens, dim=-1, eps=1e-7)))  # [B, N, K]
        rows = scores.detach().transpose(0, 1)  # [N, B, K]
        log_weights = (rows if self.positionwise else rows.flatten(0, 1)) / self.teacher_temperature
        assigned = sinkhorn(log_weights, self.iterations, eps=self.eps).view(rows.shape).transpose(0, 1)
        return assigned, cross_entropy(assigned, log_distributions(scores, self.cluster_temperature)).mean()


@RECIPES.register("capi")
class CAPI(JEPA):
    """Cluster and predict latent patches (Darcet et al. 2025, arXiv 2502.08769, sections 3.1 and 3.2).

    Args:
        encoder, predictor, target, losses, target_update: as for JEPA. Targets of patches are clustered, so ``target``
            gives tokens of any patches, and the loss is ``cross_entropy`` with the student's temperature.
        head: maps predictions to scores of clusters; its ``out_dim`` is their number.
        teacher_temperature, cluster_temperature: of the assignments, and of the scores that are compared with them.
        sinkhorn: its iterations.
        positionwise: whether clusters are balanced at each position by itself, so that none stands for a position.

    Raises:
        ValueError: a temperature is not above 0, or ``sinkhorn`` is negative.
    """

    head_inputs: ClassVar = {"head": "target"}

    def __init__(
        self,
        *,
        encoder: nn.Module,
        predictor: nn.Module,
        target: nn.Module,
        head: nn.Module,
        losses: Sequence[tuple[str, nn.Module, float]],
        target_update: TargetUpdate,
        teacher_temperature: float = 0.06,
        cluster_temperature: float = 0.12,
        sinkhorn: int = 3,
        positionwise: bool = True,
    ) -> None:
        check_temperature("teacher_temperature", teacher_temperature)
        check_temperature("cluster_temperature", cluster_temperature)
        if sinkhorn < 0:
            raise ValueError(f"sinkhorn (={sinkhorn}) must be 0 or more iterations")
        super().__init__(
            encoder=encoder, predictor=predictor, target=target, losses=losses, target_update=target_update
        )
        self.head = head
        self.clusters = Clusters(
            cast(Target, target).out_dim,
            cast(Head, head).out_dim,
            teacher_temperature=teacher_temperature,
            cluster_temperature=cluster_temperature,
            iterations=sinkhorn,
            positionwise=positionwise,
        )

    def cluster(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the assignments of all patches of images, [B, N, K], and the loss of the clusters []."""
        h, w = (side // cast(int, self.encoder.patch_size) for side in images.shape[2:])
        tokens = super().targets_at(images, PatchSets.full(len(images), h * w, images.device)).detach()
        return cast(tuple[Tensor, Tensor], self.clusters(tokens.unflatten(0, (len(images), -1))))

    def targets_at(self, images: Tensor, patches: PatchSets) -> Tensor:
        """Return the assignments of some patches, [P, K], balanced over these images."""
        return patches.gather(self.cluster(images)[0])

    def predict_targets(self, view: View, s_y: Tensor, progress: Progress = START) -> Prediction:
        """Return scores of clusters [P_t, K] with assignments s_y [P_t, K]."""
        found = super().predict_targets(view, s_y, progress)
        return replace(found, prediction=at_least_float32(self.head(found.prediction)))

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return the losses of predictions plus that of the clusters (term ``clusters``)."""
        (view,) = views
        assigned, fit = self.cluster(view.images)
        targets = self.masks_of(view).targets.gather(assigned)
        out = self.weigh(self.predict_targets(view, targets, progress))
        figures = {"target_entropy": entropy(targets)}
        return Output(out.loss + fit, {**out.terms, "clusters": fit}, out.prediction, figures)
