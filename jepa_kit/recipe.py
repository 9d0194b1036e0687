"""``Recipe``, the base of all recipes, and JEPA, the equations.

s_y     = target(images)            at the target patches      (no gradient)
s_x     = encoder(images)           at the context patches
s_hat_y = predictor(s_x, positions) at the target patches
loss    = D(s_hat_y, s_y);  target encoder <- target_update(encoder)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from jepa_kit.data.transforms import normalize
from jepa_kit.encoders.sizes import check_layers
from jepa_kit.frozen import FrozenNetwork
from jepa_kit.interfaces import Encoder, Masker, TargetUpdate
from jepa_kit.registry import RECIPES
from jepa_kit.rng import view_seed
from jepa_kit.structures import (
    START,
    MaskBatch,
    Output,
    PatchSets,
    Prediction,
    Progress,
    Tokens,
    View,
    at_least_float32,
)
from jepa_kit.target_updates import NoTargetEncoder

if TYPE_CHECKING:
    from jepa_kit.config import Config


class Recipe(nn.Module):
    """Base of the recipes: an encoder, and networks that follow others as ``target_update`` says.

    A recipe is registered in ``RECIPES``. The arguments of its constructor that are slots (``encoder``, ``head``,
    ``losses``, or a name that ends with a slot's: ``patch_head``) are the slots of its config; all others are options
    of ``recipe:``. It keeps each part as the attribute of that name.

    Args:
        encoder: the context encoder.
        target_update: makes the networks that follow, and updates them; None for none.

    Raises:
        ValueError: the recipe ``needs_teacher``, and ``target_update`` makes none.

    Attributes:
        num_views: fewest and most views of an image that ``forward`` takes; None for any number.
        masked: whether views have masks; then the config has a slot ``masker``.
        head_inputs: head -> the head whose output it maps; other heads map the encoder's tokens.
        needs_teacher: whether there must be a target encoder, or one tied to the encoder.
        config: of a recipe from ``jepa_kit.build``; else None.
        maskers: the masker of each view, or None if it has no masks; empty unless from ``jepa_kit.build``.
    """

    num_views: ClassVar[tuple[int, int | None]] = (1, 1)
    masked: ClassVar[bool] = True
    head_inputs: ClassVar[Mapping[str, str]] = {}
    needs_teacher: ClassVar[bool] = False
    config: Config | None = None
    maskers: tuple[Masker | None, ...] = ()

    def __init__(self, *, encoder: nn.Module, target_update: TargetUpdate | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.target_update: TargetUpdate = target_update or NoTargetEncoder()
        self._followers: dict[str, bool] = {}  # name of a network -> whether its follower has a training mode
        self.target_encoder = self.follow("encoder")
        if self.needs_teacher and self.target_network is None:
            raise ValueError("target_update makes no target encoder, which this recipe needs; take {name: ema}")

    def follow(self, name: str, *, training: bool = False) -> nn.Module | None:
        """Return the network that follows the attribute ``name``; to be kept as the attribute ``target_`` + ``name``.

        Args:
            name: of a network of this recipe.
            training: whether it has a training mode, for batch norm by the statistics of a batch; else it stays in
                eval mode.
        """
        made = self.target_update.make(getattr(self, name))
        if made is not None:
            self._followers[name] = training
        return made

    def network(self, name: str) -> nn.Module | None:
        """Return the follower of ``name``, or the network itself if the two are tied, or None if there is neither."""
        network: nn.Module | None = getattr(self, name if self.target_update.tied else f"target_{name}")
        return network

    @property
    def target_network(self) -> nn.Module | None:
        """The network that computes targets: the target encoder, or the context encoder if the two are tied."""
        return self.network("encoder")

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return the loss of a batch of normalised images.

        Args:
            views: of the same images.
            progress: of the run.
        """
        raise NotImplementedError

    @property
    def masker(self) -> Masker | None:
        """The masker of the first view that has masks; None if no view has."""
        return next((masker for masker in self.maskers if masker is not None), None)

    def views(self, *images: Tensor, step: int = 0) -> tuple[View, ...]:
        """Return the views of a batch of images, with masks; only of a recipe from ``jepa_kit.build``.

        Args:
            images: [B, 3, h, w] of each view of the config (most recipes have one): uint8, which are normalised by
                ``data.mean`` and ``data.std``, or float and normalised already.
            step: number of the batch; its masks are a function of ``train.seed`` and of this number.

        Raises:
            ValueError: the recipe is not from ``jepa_kit.build``, or it has another number of views or needs actions.
        """
        if self.config is None:
            raise ValueError("views need the recipe's config and maskers: make the recipe with jepa_kit.build")
        data, seed = self.config.data, self.config.train.seed
        if len(images) != len(self.maskers):
            raise ValueError(f"images (={len(images)} tensors) must be one for each of the {len(self.maskers)} views")
        if data.action_size:
            raise ValueError(
                "data.views asks for actions, which images (=tensors) lack: make each View with its action"
            )
        views = []
        for k, (x, draw) in enumerate(zip(images, self.maskers, strict=True)):
            x = x if x.is_floating_point() else normalize(x, data.mean, data.std)
            samples = step * len(x) + np.arange(len(x))
            masks = None if draw is None else draw(samples, seed=view_seed(seed, k), epoch=0, step=step)
            views.append(View(x, None if masks is None else masks.to(x.device)))
        return tuple(views)

    def forward_images(self, *images: Tensor, step: int = 0, steps: int = 1) -> Output:
        """Return the loss of a batch of images: ``self(*self.views(*images, step=step), progress=...)``.

        Args:
            images: see ``views``.
            step: number of updates before this one; new masks are drawn for each.
            steps: number of planned updates, for losses that change during training.

        Raises:
            ValueError: see ``views``; or ``step`` is not in [0, steps).
        """
        if not 0 <= step < steps:
            raise ValueError(f"step (={step}) must be from 0 to steps - 1 (={steps - 1})")
        seed = 0 if self.config is None else self.config.train.seed
        return self(*self.views(*images, step=step), progress=Progress(step, step / steps, seed=seed))

    def update_target(self, momentum: float) -> None:
        """Update all networks that follow others: target encoder <- target_update(encoder)."""
        for name in self._followers:
            self.target_update.update(getattr(self, f"target_{name}"), getattr(self, name), momentum)

    def momentum(self, where: float) -> float:
        """Return the momentum at progress ``where`` in [0, 1] of training."""
        return self.target_update.momentum(where)

    def adjust_gradients(self, progress: Progress) -> None:
        """Change gradients after the backward pass and before they are clipped; may set some to None."""

    def encoder_for(self, which: Literal["target", "context"]) -> nn.Module:
        """Return the encoder to evaluate: as in the paper the target encoder, or the context encoder if none exists.

        A target encoder from a file of its own (``frozen``) counts as none: it is not what the run trains.
        """
        if which not in ("target", "context"):
            raise ValueError(f"which (={which!r}) must be 'target' or 'context'")
        network = self.target_network if which == "target" else self.encoder
        return self.encoder if network is None or isinstance(network, FrozenNetwork) else network

    def train(self, mode: bool = True) -> Any:
        """Set the training mode as ``nn.Module.train``; networks that follow others stay in eval mode."""
        super().train(mode)
        for name, training in self._followers.items():
            if not training:
                getattr(self, f"target_{name}").eval()
        return self


class PatchRecipe(Recipe):
    """Base of the recipes that predict patches of a view with masks; health and pictures show their predictions.

    Attributes:
        losses: name -> each term of the loss that compares predictions with targets.
        weights: name -> weight of that term.
    """

    losses: nn.ModuleDict
    weights: dict[str, float]

    def targets_at(self, images: Tensor, patches: PatchSets) -> Tensor:
        """Return s_y [P, D], the targets at some patches of images [B, C, h, w], packed as ``patches``."""
        raise NotImplementedError

    def predict(self, view: View, progress: Progress = START) -> Prediction:
        """Return predictions and targets of a view, in float32 or better.

        Raises:
            ValueError: the view has no masks, or their grid differs from that of the images.
        """
        raise NotImplementedError


@RECIPES.register("jepa")
class JEPA(PatchRecipe):
    """A joint-embedding predictive architecture, assembled from exchangeable parts.

    Args:
        encoder: the context encoder.
        predictor: maps context tokens and target positions to predictions.
        target: computes what is predicted.
        losses: (name, module, weight) of each term of the loss.
        target_update: makes the target encoder and updates it.

    Raises:
        ValueError: there is no loss, two losses share a name, the predictor uses layers that the encoder lacks, or the
            target needs a target encoder and the update makes none.
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
        super().__init__(encoder=encoder, target_update=target_update)
        self.predictor = predictor
        self.target = target
        self.losses, self.weights = named_losses(losses)
        if numbers := getattr(predictor, "uses_layers", ()):
            check_layers(numbers, cast(Encoder, encoder).depth)
        if getattr(target, "needs_encoder", False) and self.target_network is None:
            raise ValueError(
                "target needs a target encoder, and target_update makes none; "
                "take target_update={name: ema}, or target={name: pixel}"
            )
        self.train()

    def targets_at(self, images: Tensor, patches: PatchSets) -> Tensor:
        """Return the targets at some patches; see ``PatchRecipe``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.target_update.stop_gradient):
            targets: Tensor = self.target(images, patches, self.target_network)
        if self.target_update.tied:
            # older torch (pull request 165068) keeps autocast's copies of weights that were made without gradients
            torch.clear_autocast_cache()
        return targets

    def predict(self, view: View, progress: Progress = START, *, of: Tensor | None = None) -> Prediction:
        """Return predictions from a view's context, and targets; see ``PatchRecipe``.

        Args:
            view: with masks.
            progress: of the run.
            of: [B, C, h, w], the images whose targets are predicted; None for those of the view.
        """
        targets = self.targets_at(view.images if of is None else of, self.masks_of(view).targets)
        return self.predict_targets(view, targets, progress)

    def masks_of(self, view: View) -> MaskBatch:
        """Return the masks of a view; for its errors see ``PatchRecipe.predict``."""
        images, masks = view.images, view.masks
        if masks is None:
            raise ValueError("the view (masks=None) must have masks: data.views needs an entry with masked: true")
        p = cast(Encoder, self.encoder).patch_size
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        if grid != masks.grid:
            raise ValueError(f"masks.grid (={masks.grid}) must be that of the images (={grid})")
        return masks

    def predict_targets(self, view: View, s_y: Tensor, progress: Progress = START) -> Prediction:
        """Return predictions from a view's context, with targets s_y [P_t, D] that are computed already."""
        masks = self.masks_of(view)
        s_x, more = self.encode_context(view, masks)
        s_hat_y = self.predictor(s_x, masks, **more)  # [P_t, D]
        # Distances and their sums are computed in float32 or better: half precision would round them away.
        return Prediction(at_least_float32(s_hat_y), at_least_float32(s_y), s_x, masks, progress)

    def encode_context(self, view: View, masks: MaskBatch) -> tuple[Tensor, dict[str, Any]]:
        """Return s_x [P_c, D_e], and what the predictor also declares to use, by name; see ``interfaces.Predictor``."""
        encoder, images, context = cast(Encoder, self.encoder), view.images, masks.context
        numbers: Sequence[int] = getattr(self.predictor, "uses_layers", ())
        outputs: list[Tokens] = []
        more: dict[str, Any] = {}
        if getattr(self.predictor, "uses_prefix", False):
            *outputs, (s_x, more["prefix"]) = encoder.forward_tokens(images, context, layers=[*numbers, encoder.depth])
        elif numbers:
            *found, s_x = encoder.forward_layers(images, context, layers=[*numbers, encoder.depth])
            outputs = [Tokens(x, x.new_empty(len(context), 0, x.shape[1])) for x in found]
        else:
            s_x = encoder(images, context)
        if numbers:
            more["layers"] = outputs
        if getattr(self.predictor, "uses_action", False):
            more["action"] = view.action
        return s_x, more

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return the weighted sum of the losses of one view."""
        (view,) = views
        return self.weigh(self.predict(view, progress))

    def weigh(self, prediction: Prediction) -> Output:
        """Return the weighted sum of the losses of a prediction."""
        return Output(*weighted_sum(self.losses, self.weights, prediction), prediction)


def named_losses(losses: Sequence[tuple[str, nn.Module, float]]) -> tuple[nn.ModuleDict, dict[str, float]]:
    """Return modules and weights by name of (name, module, weight)."""
    names = [name for name, _, _ in losses]
    if not names:
        raise ValueError("losses (=[]) must contain at least one term")
    if len(set(names)) < len(names):
        raise ValueError(f"losses (={names}) must have different names")
    return nn.ModuleDict({name: module for name, module, _ in losses}), {name: weight for name, _, weight in losses}


def weighted_sum(
    losses: nn.ModuleDict, weights: Mapping[str, float], prediction: Prediction
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of losses, and each by name."""
    terms = {name: loss(prediction) for name, loss in losses.items()}
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum(), terms
