"""CAE: predict the tokens of the hidden patches, and from these predictions their codes.

s_x = encoder(visible patches)    s_hat_y = regressor(s_x)    loss = 2 |s_hat_y - encoder(hidden patches)|^2 + CE(codes)
P_t = hidden patches    K = codes of the vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import nn

from jepa_kit.interfaces import TargetUpdate
from jepa_kit.recipe import JEPA
from jepa_kit.registry import RECIPES
from jepa_kit.structures import START, Output, Progress, View, at_least_float32


@RECIPES.register("cae")
class CAE(JEPA):
    """A context autoencoder (Chen et al. 2022, arXiv 2202.03026): JEPA with a second prediction, of codes.

    Args:
        encoder, predictor, target, losses, target_update: of the alignment, as for JEPA. In CAE the target update is
            ``tied`` and targets are ``masked_at: input``: the current encoder sees the hidden patches alone.
        code_target: computes the codes of the hidden patches.
        code_predictor: maps the predicted tokens [P_t, D] and the masks to scores [P_t, K].
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        predictor: nn.Module,
        target: nn.Module,
        losses: Sequence[tuple[str, nn.Module, float]],
        target_update: TargetUpdate,
        code_target: nn.Module,
        code_predictor: nn.Module,
    ) -> None:
        super().__init__(
            encoder=encoder, predictor=predictor, target=target, losses=losses, target_update=target_update
        )
        self.code_target, self.code_predictor = code_target, code_predictor

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return the alignment's losses plus the mean cross entropy of all hidden patches' codes (term ``codes``)."""
        aligned = super().forward(*views, progress=progress)
        prediction, (view,) = aligned.prediction, views
        assert prediction is not None
        codes = self.code_target(view.images, prediction.masks.targets, None)  # [P_t]
        scores = at_least_float32(self.code_predictor(prediction.prediction, prediction.masks))  # [P_t, K]
        term = F.cross_entropy(scores, codes)
        return Output(aligned.loss + term, {**aligned.terms, "codes": term}, prediction)
