"""V-JEPA 2.1 for images: predict hidden and visible patches.

loss = mean over hidden of |s_hat_y - s_y| + weight(t) * mean over visible of |s_hat_y - s_y| / sqrt(distance)

P = patches of the predictor's sequences    P_v = visible ones    D = width of a target, of all levels together
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kit.interfaces import TargetUpdate
from jepa_kit.losses.distances import Distance, averaged
from jepa_kit.recipe import JEPA
from jepa_kit.registry import RECIPES
from jepa_kit.structures import START, MaskBatch, Output, Prediction, Progress, View

from .parts import distances, sequences


@RECIPES.register("dense_jepa")
class DenseJEPA(JEPA):
    """JEPA that predicts the patches of the context, too (V-JEPA 2.1, Mur-Labadia et al. 2026, arXiv 2603.14482).

    ``predict``, which health and pictures call, predicts hidden patches alone. The term ``visible`` is the mean over
    visible patches of their distance between prediction and target, over the square root of their distance (in patches,
    between centres) from the nearest hidden patch of the same set; it counts ``visible_weight`` times.

    Args:
        encoder, predictor, target, losses, target_update: as for JEPA; the predictor must predict visible patches, and
            losses must be distances.
        visible_weight: weight of the visible patches after its warm-up, at least 0.
        warmup: the fractions of training between which the weight rises linearly from 0; by default between updates
            15,000 and 30,000 of about 135,000, as a user read in the release (issue 170 of facebookresearch/vjepa2).

    Raises:
        ValueError: the predictor does not predict visible patches, a loss is no distance, or a value is outside its
            range.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        predictor: nn.Module,
        target: nn.Module,
        losses: Sequence[tuple[str, nn.Module, float]],
        target_update: TargetUpdate,
        visible_weight: float = 0.5,
        warmup: tuple[float, float] = (0.111, 0.222),
    ) -> None:
        super().__init__(
            encoder=encoder, predictor=predictor, target=target, losses=losses, target_update=target_update
        )
        if not getattr(predictor, "predicts_visible", False):
            raise ValueError("predictor must predict visible patches, as 'dense' does")
        if others := [name for name, loss, _ in losses if not isinstance(loss, Distance)]:
            raise ValueError(f"losses (={others}) must be distances, such as 'l1', to be weighted patch by patch")
        if not 0 <= visible_weight < float("inf"):
            raise ValueError(f"visible_weight (={visible_weight}) must be at least 0 and finite")
        if not 0 <= warmup[0] <= warmup[1] <= 1:
            raise ValueError(f"warmup (={tuple(warmup)}) must be two fractions of training, in [0, 1] and ascending")
        self.visible_weight, self.warmup = visible_weight, warmup

    def weight(self, where: float) -> float:
        """Return the weight of visible patches at progress ``where`` in [0, 1] of training."""
        first, last = self.warmup
        if where >= last:
            return self.visible_weight
        return self.visible_weight * (where - first) / (last - first) if where > first else 0.0

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return the losses of hidden patches, plus ``weight`` times the term ``visible``."""
        (view,) = views
        if view.masks is None:
            return super().forward(view, progress=progress)  # an error
        hidden, visible = self.predict_all(view, view.masks, progress)
        out, term = self.weigh(hidden), self.visible_term(visible, view.masks)
        return Output(out.loss + self.weight(progress.where) * term, {**out.terms, "visible": term}, hidden)

    def predict_all(self, view: View, masks: MaskBatch, progress: Progress) -> tuple[Prediction, Prediction]:
        """Return predictions at the hidden patches, and at the visible ones, from one pass of all networks."""
        parts = sequences(masks)
        whole = self.predict(replace(view, masks=parts.every), progress)
        s_hat_y, s_y = whole.prediction, whole.target  # [P, D]
        hidden, visible = (
            Prediction(s_hat_y.index_select(0, rows), s_y.index_select(0, rows), whole.context, sets, progress)
            for rows, sets in ((parts.hidden, masks), (parts.seen, parts.visible))
        )
        return hidden, visible

    def visible_term(self, visible: Prediction, masks: MaskBatch) -> Tensor:
        """Return the weighted sum of the losses of visible patches, each patch over sqrt(distance): []."""
        sets = visible.masks.targets
        # A patch may be in the context and in the set, if the masker allows it: it counts as next to a hidden one.
        near = distances(masks)[sets.lengths.set_of_token, sets.index].clamp(min=1.0).rsqrt()  # [P_v]
        losses: Any = self.losses  # of ``Distance``s
        terms = [
            self.weights[name] * averaged(visible, loss.values(visible.prediction, visible.target) * near, loss.average)
            for name, loss in losses.items()
        ]
        return torch.stack(terms).sum()
