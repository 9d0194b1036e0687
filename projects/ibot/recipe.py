"""iBOT: DINO, and the same for patches: a student that sees mask tokens predicts how the teacher classifies patches.

q    = softmax((teacher(view) - centre) / temperature)       for each global view, and for each of its patches
p    = softmax(student(view) / student_temperature)          global views with mask tokens, local views whole
loss = cross entropy of q and p of class tokens, mean over all pairs of different views
     + cross entropy of q and p of hidden patches in the same view;  teacher <- target_update(student)

V = views    T = global views    B = images    N = patches of a view    D = width of the encoder    K = prototypes
P = target patches of all global views, packed
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from jepa_kit.encoders.pooling import pooled_views
from jepa_kit.interfaces import Head, TargetUpdate
from jepa_kit.losses import self_distillation as sd
from jepa_kit.recipe import Recipe
from jepa_kit.registry import RECIPES
from jepa_kit.structures import START, MaskBatch, Output, PatchSets, Progress, Tokens, View


@RECIPES.register("ibot")
class IBOT(Recipe):
    """Image BERT pre-training with an online tokenizer (Zhou et al. 2022, arXiv 2111.07832).

    Args:
        encoder: the student's, with a class token and a mask token.
        head: maps tokens to a small width.
        prototype_head: scores of K prototypes, from the output of ``head``.
        target_update: makes the teacher from the encoder and the heads, and updates it.
        patch_head: the same for patches; None if patches have those of class tokens.
        num_global: T; the teacher sees the first T views of ``data.views``, which have masks.
        shared_teacher: whether patches of the teacher have the prototypes of class tokens in any case.
        student_temperature: of the student's distributions.
        teacher_temperature, centre_momentum: of the teacher's distributions of class tokens (``CentredTargets``).
        patch_temperature, patch_centre_momentum: of patches.
        warmup_epochs: of both temperatures.
        class_weight, patch_weight: of the two terms.
        freeze_epochs: number of epochs at the start in which prototypes are not trained.

    Raises:
        ValueError: an option is outside its range, the encoder has no class token, ``target_update`` makes no teacher,
            or teacher and student have different numbers of prototypes of patches.
    """

    num_views = (2, None)
    needs_teacher = True
    head_inputs: ClassVar = {"prototype_head": "head", "patch_head": "head"}

    def __init__(
        self,
        *,
        encoder: nn.Module,
        head: nn.Module,
        prototype_head: nn.Module,
        target_update: TargetUpdate,
        patch_head: nn.Module | None = None,
        num_global: int = 2,
        shared_teacher: bool = True,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.04),
        centre_momentum: float = 0.9,
        patch_temperature: tuple[float, float] = (0.04, 0.07),
        patch_centre_momentum: float = 0.9,
        warmup_epochs: int = 30,
        class_weight: float = 1.0,
        patch_weight: float = 1.0,
        freeze_epochs: int = 1,
    ) -> None:
        super().__init__(encoder=encoder, target_update=target_update)
        options: dict[str, tuple[float, int]] = {"num_global": (num_global, 1), "freeze_epochs": (freeze_epochs, 0)}
        options |= {"class_weight": (class_weight, 0), "patch_weight": (patch_weight, 0)}
        for name, (value, least) in options.items():
            if not least <= value < math.inf:
                raise ValueError(f"{name} (={value}) must be at least {least} and finite")
        sd.check_temperature("student_temperature", student_temperature)
        if not getattr(encoder, "class_token", False):
            raise ValueError("encoder.class_token must be true: the class token represents a view")
        self.num_global, self.freeze_epochs, self.student_temperature = num_global, freeze_epochs, student_temperature
        self.weights = {"class": class_weight, "patch": patch_weight}
        self.head, self.prototype_head, self.patch_head = head, prototype_head, patch_head
        self.target_head = self.follow("head", training=True)  # batch norm by the statistics of the batch
        self.target_prototype_head = self.follow("prototype_head")
        self.target_patch_head = None if patch_head is None or shared_teacher else self.follow("patch_head")
        k, patch_k = (cast(Head, x).out_dim for x in (prototype_head, patch_head or prototype_head))
        if self.target_patch_head is None and k != patch_k:
            raise ValueError(
                f"patch_head.out_dim (={patch_k}) must be prototype_head.out_dim (={k}), because the teacher uses the "
                "latter for patches too; or set shared_teacher to false"
            )
        self.targets = sd.CentredTargets(
            k, temperature=teacher_temperature, warmup_epochs=warmup_epochs, momentum=centre_momentum
        )
        self.patch_targets = sd.CentredTargets(
            patch_k, temperature=patch_temperature, warmup_epochs=warmup_epochs, momentum=patch_centre_momentum
        )
        self.train()

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return the loss of V views of the same images, of which the first T have one size and masks.

        Raises:
            ValueError: there are fewer views than ``num_global``, or fewer than two; or the first T have not one size,
                or not hidden patches.
        """
        if len(views) < max(2, self.num_global):
            raise ValueError(f"views (={len(views)} in all) must be at least 2, and num_global (={self.num_global})")
        masks, local = [self.masks_of(view) for view in views[: self.num_global]], views[self.num_global :]
        if len(sizes := {tuple(view.images.shape[2:]) for view in views[: self.num_global]}) > 1:
            raise ValueError(f"the first num_global (={self.num_global}) views must have one size, not {sorted(sizes)}")
        images = torch.cat([view.images for view in views[: self.num_global]])
        with torch.no_grad():
            tokens = cast(Any, self.network("encoder")).forward_tokens(images)[0]
            teacher = self.scores(tokens.prefix[:, 0], self.network)
            teacher_patch = self.scores(tokens.patches, self.network, patch=True)
        tokens = self.encode(images, masks)
        classes = [tokens.prefix[:, 0], *([pooled_views(self.encoder, local)] if local else [])]
        student = self.scores(torch.cat(classes), partial(getattr, self))
        student_patch = self.scores(sd.at_targets(tokens.patches, masks), partial(getattr, self), patch=True)
        return self.compare((teacher, teacher_patch), (student, student_patch), masks, progress)

    def masks_of(self, view: View) -> MaskBatch:
        """Return the masks of a global view."""
        if view.masks is None or view.masks.context.hidden is None or len(view.masks.context) != len(view):
            raise ValueError(
                f"the first num_global (={self.num_global}) views must have hidden patches, in one context for each "
                "image: set masked: true in their entry of data.views, and take the masker in_place"
            )
        return view.masks

    def encode(self, images: Tensor, masks: Sequence[MaskBatch]) -> Tokens:
        """Return the student's tokens of global views [T * B, C, h, w], with mask tokens."""
        hidden = sd.hidden_in(masks)  # [T * B * N]
        patches = PatchSets.full(len(images), len(hidden) // len(images), images.device)
        tokens: Tokens = cast(Any, self.encoder).forward_tokens(images, replace(patches, hidden=hidden))[0]
        return tokens

    def scores(self, rows: Tensor, network: Callable[[str], Any], *, patch: bool = False) -> Tensor:
        """Return scores of class tokens or patches, [R, D] -> [R, K]; ``network`` returns networks by name."""
        last = network("patch_head") if patch else None
        return (network("prototype_head") if last is None else last)(network("head")(rows))

    def compare(
        self,
        teacher: tuple[Tensor, Tensor],
        student: tuple[Tensor, Tensor],
        masks: Sequence[MaskBatch],
        progress: Progress,
    ) -> Output:
        """Return the loss of scores; in training, move both centres afterwards.

        Args:
            teacher: of class tokens [T * B, K], and of all patches [T * B * N, K].
            student: of class tokens [V * B, K], and of target patches [P, K].
            masks: of the T global views.
            progress: of the run.
        """
        count = len(teacher[0]) // len(masks)  # B
        q = self.targets(teacher[0].unflatten(0, (-1, count)), progress)
        log_p = sd.log_distributions(student[0].unflatten(0, (-1, count)), self.student_temperature)
        patch_q = self.patch_targets.distributions(sd.at_targets(teacher[1], masks), progress)
        self.patch_targets.update(teacher[1])
        errors = sd.cross_entropy(patch_q, sd.log_distributions(student[1], self.student_temperature))  # [P]
        terms = {"class": sd.across_views(q, log_p), "patch": sd.over_hidden(errors, masks)}
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        entropies = {"teacher_entropy": sd.entropy(q), "patch_teacher_entropy": sd.entropy(patch_q)}
        return Output(loss, terms, figures={**entropies, "kl": terms["class"] - entropies["teacher_entropy"]})

    def adjust_gradients(self, progress: Progress) -> None:
        """Drop the gradients of prototypes in the first ``freeze_epochs`` epochs."""
        for head in (self.prototype_head, self.patch_head):
            for parameter in head.parameters() if head is not None and progress.epoch < self.freeze_epochs else ():
                parameter.grad = None
