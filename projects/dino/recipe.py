"""DINO: a student that sees all views of an image predicts how a teacher, which sees two, classifies another view.

q    = softmax((teacher(view) - centre) / temperature)    for each global view (no gradient)
p    = softmax(student(view) / student_temperature)       for each view
loss = cross entropy of q and p, mean over all pairs of different views;  teacher <- target_update(student)

V = views    T = global views    B = images    D = width of the encoder    K = prototypes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from jepa_kit.encoders.pooling import pooled_views
from jepa_kit.interfaces import Head, TargetUpdate
from jepa_kit.losses.self_distillation import (
    CentredTargets,
    across_views,
    check_temperature,
    entropy,
    log_distributions,
)
from jepa_kit.recipe import Recipe
from jepa_kit.registry import RECIPES
from jepa_kit.structures import START, Output, Progress, View


@RECIPES.register("dino")
class DINO(Recipe):
    """Self-distillation without labels (Caron et al. 2021, arXiv 2104.14294).

    Args:
        encoder: the student's. Its class token, or the mean over patches if it has none, represents a view.
        head: maps it to a small width.
        prototype_head: scores of K prototypes, from the output of ``head``.
        target_update: makes the teacher from the encoder and both heads, and updates it.
        num_global: T; the teacher sees the first T views of ``data.views``.
        student_temperature: of the student's distributions.
        teacher_temperature, warmup_epochs, centre_momentum: of the teacher's distributions (``CentredTargets``).
        freeze_epochs: number of epochs at the start in which ``prototype_head`` is not trained.

    Raises:
        ValueError: an option is outside its range, or ``target_update`` makes no teacher.
    """

    num_views = (2, None)
    masked = False
    needs_teacher = True
    head_inputs: ClassVar = {"prototype_head": "head"}

    def __init__(
        self,
        *,
        encoder: nn.Module,
        head: nn.Module,
        prototype_head: nn.Module,
        target_update: TargetUpdate,
        num_global: int = 2,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.04),
        warmup_epochs: int = 0,
        centre_momentum: float = 0.9,
        freeze_epochs: int = 1,
    ) -> None:
        super().__init__(encoder=encoder, target_update=target_update)
        for name, value, least in (("num_global", num_global, 1), ("freeze_epochs", freeze_epochs, 0)):
            if value < least:
                raise ValueError(f"{name} (={value}) must be at least {least}")
        check_temperature("student_temperature", student_temperature)
        self.num_global, self.student_temperature, self.freeze_epochs = num_global, student_temperature, freeze_epochs
        self.head, self.prototype_head = head, prototype_head
        self.target_head = self.follow("head", training=True)  # batch norm by the statistics of the batch
        self.target_prototype_head = self.follow("prototype_head")
        self.targets = CentredTargets(
            cast(Head, prototype_head).out_dim,
            temperature=teacher_temperature,
            warmup_epochs=warmup_epochs,
            momentum=centre_momentum,
        )
        self.train()

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return the loss of V views of the same images.

        Raises:
            ValueError: there are fewer than ``num_global`` views, or fewer than two.
        """
        if len(views) < max(2, self.num_global):
            raise ValueError(f"views (={len(views)} in all) must be at least 2, and num_global (={self.num_global})")
        with torch.no_grad():
            teacher = self.scores(views[: self.num_global], self.network)
        return self.compare(teacher, self.scores(views, self.get_submodule), progress)

    def scores(self, views: Sequence[View], network: Any) -> Tensor:
        """Return scores [V, B, K]; the function ``network`` returns the networks of student or teacher by name."""
        features = pooled_views(network("encoder"), views)  # [V * B, D]
        scores: Tensor = network("prototype_head")(network("head")(features))
        return scores.unflatten(0, (len(views), -1))

    def compare(self, teacher: Tensor, student: Tensor, progress: Progress) -> Output:
        """Return the loss of scores [T, B, K] and [V, B, K]; in training, move the centre afterwards."""
        q = self.targets(teacher, progress)
        loss = across_views(q, log_distributions(student, self.student_temperature))
        teacher_entropy = entropy(q)
        figures = {"teacher_entropy": teacher_entropy, "kl": loss - teacher_entropy}
        return Output(loss, {"cross_entropy": loss}, figures=figures)

    def adjust_gradients(self, progress: Progress) -> None:
        """Drop the gradients of ``prototype_head`` in the first ``freeze_epochs`` epochs."""
        if progress.epoch < self.freeze_epochs:
            for parameter in self.prototype_head.parameters():
                parameter.grad = None
