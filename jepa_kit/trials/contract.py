"""Check the contract of user-defined parts before the first step of a run.

Each part that does not ship with jepa_kit is called twice on a small batch. The calls use a separate recipe, and random
states and buffers are restored, so that the run is the same with and without the check. The results must have the right
types, shapes and values, and be equal. For networks, losses and updates, both calls have the same random state of torch
and different ones of numpy and Python, because a run sets torch's alone. Maskers and transforms must not depend on any
random state, because their numbers are functions of (seed, epoch, sample).

B images    N patches of an image    P_c, P_t patches of all contexts and targets
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from jepa_kit.config import Config
from jepa_kit.config.check import nested_parts
from jepa_kit.data.transforms import build_pipeline
from jepa_kit.distributed.buffers import persistent_buffers, unchanged_buffers
from jepa_kit.errors import ContractError
from jepa_kit.from_config import build_masker, build_order
from jepa_kit.interfaces import Encoder
from jepa_kit.interfaces import Recipe as Interface
from jepa_kit.losses import is_distance
from jepa_kit.precision import autocast_of
from jepa_kit.random_state import seeded
from jepa_kit.recipe import JEPA, Recipe
from jepa_kit.registry import ENCODERS, HEADS, LOSSES, RECIPES, TRANSFORMS, registry_of
from jepa_kit.structures import MaskBatch, Output, PatchSets, Prediction, View
from jepa_kit.trials.data_contract import check_masker, check_transform, with_members
from jepa_kit.trials.kept import attributes, check_attributes, check_restored, check_trained, restore
from jepa_kit.trials.part_trial import Trial, agree
from jepa_kit.trials.recipe_trial import trial_recipe, trial_views


def check_parts(config: Config, device: torch.device, *, weights_of: Recipe | None = None, every: bool = False) -> None:
    """Check the user-defined parts of a config; if there are none, build nothing.

    Args:
        config: a checked config.
        device: of the trial calls.
        weights_of: the run's recipe with its first weights, which a second build must reproduce.
        every: check the parts of jepa_kit too.

    Raises:
        ContractError: a part violates the contract of its slot; the first one is reported.
    """
    if not every and _ships_with_jepa_kit(config):
        return
    for _, view in config.data.entries():
        size = view.image_size or config.data.image_size
        pipeline = build_pipeline(view.transforms or config.data.transforms, image_size=size)
        for name, transform in zip(pipeline.names, pipeline.transforms, strict=True):
            if every or not of_jepa_kit(transform):
                check_transform(Trial("transform", name), transform)
    masker = build_masker(config) if "masker" in config.slots else None
    if masker and (every or not all(map(of_jepa_kit, with_members(masker)))):
        check_masker(Trial("masker", config.slots["masker"].name), masker, config)
    if weights_of is None or every or not all(of_jepa_kit(part) for _, _, part in _parts_of(config, weights_of)):
        _check_networks(config, device, weights_of, every)


def _ships_with_jepa_kit(config: Config) -> bool:
    """Return whether all parts and transforms of a config, and members of its parts, are registered by jepa_kit."""
    parts = [cls for slot, part in config.slots.items() for cls in nested_parts(slot, part.name, part.options)]
    parts += [cls for part, _ in config.losses for cls in nested_parts(LOSSES.slot, part.name, part.options)]
    parts.append(RECIPES.get(config.recipe.name))
    transforms = [part for _, view in config.data.entries() for part in view.transforms or ()]
    parts += [TRANSFORMS.get(transform["name"]) for transform in transforms]
    return all(map(of_jepa_kit, parts))


def of_jepa_kit(part: object) -> bool:
    """Return whether a part, or its class, ships with jepa_kit."""
    return part.__module__.partition(".")[0] == "jepa_kit"


def _parts_of(config: Config, jepa: Recipe) -> list[tuple[str, str, object]]:
    """Return (slot, name, part) of each part with tensors or an update, of each loss, and of the recipe itself."""
    built = [slot for slot in build_order(config) if slot != LOSSES.slot]
    parts: list[tuple[str, str, object]] = [(slot, config.slots[slot].name, getattr(jepa, slot)) for slot in built]
    if config.losses:
        losses = cast(nn.ModuleDict, jepa.losses)
        parts += [("loss", name, losses[name]) for name in losses]
    return [*parts, ("recipe", config.recipe.name, jepa)]


def _check_networks(config: Config, device: torch.device, weights_of: Recipe | None, every: bool) -> None:
    """Check the parts of a recipe alone, then the gradients of a training step; arguments as for ``check_parts``."""
    jepa = trial_recipe(config, device)
    trials = [Trial(slot, name, jepa) for slot, name, part in _parts_of(config, jepa) if every or not of_jepa_kit(part)]
    if not trials:
        return
    named = ", ".join(f"{trial.slot} {trial.name!r}" for trial in trials)
    if weights_of is not None:
        _check_first_weights(jepa, weights_of, named)
    views = trial_views(config, device)
    autocast = autocast_of(config.train.precision, device)
    with autocast():
        for trial in trials:
            _check_network(trial, jepa, views)
    for trial in trials:
        if trial.slot.endswith("target_update"):
            check_target_update(trial, jepa)
    other = trial_recipe(config, device, seed=config.train.seed + 1)
    restore(other, jepa, named)
    losses = []
    for recipe in (jepa, other):
        with seeded(0), autocast():
            losses.append(recipe(*views).loss)
    check_trained(jepa, losses[0], named)
    check_gradients(jepa, losses[0], named)
    losses[1].backward()
    check_restored((jepa, other), losses, named)


def _check_network(trial: Trial, jepa: Recipe, views: Sequence[View]) -> None:
    """Check a part alone; targets, predictors and losses of other recipes than JEPA are checked by its forward pass."""
    registry = registry_of(trial.slot)
    images, masks = views[0].images, views[0].masks
    if registry is ENCODERS:
        encoder: Any = getattr(jepa, trial.slot)
        half = torch.arange(max(1, encoder.grid[0] * encoder.grid[1] // 2), device=images.device)
        some = PatchSets.from_padded(half.expand(len(images), -1)) if masks is None else masks.context
        check_encoder(trial, encoder, images, some)
        if masks is not None and not getattr(encoder, "mixes_patches", False):
            check_sight(trial, encoder, images, some)
    elif registry is HEADS:
        check_head(trial, jepa, images)
    elif registry is None:
        check_recipe(trial, jepa, views)
    elif isinstance(jepa, JEPA) and masks is not None:
        if trial.slot == "predictor":
            check_predictor(trial, jepa, views[0], masks)
        elif trial.slot in ("target", "loss"):
            {"target": check_target, "loss": check_loss}[trial.slot](trial, jepa, images, masks)


def check_head(trial: Trial, jepa: Recipe, images: Tensor) -> None:
    """Check the attribute and the output for as many rows as there are images."""
    head: Any = getattr(jepa, trial.slot)
    trial.need_sizes(head, "out_dim")
    before = type(jepa).head_inputs.get(trial.slot)
    width = int(getattr(jepa, before).out_dim if before else cast(Encoder, jepa.encoder).embed_dim)
    x = torch.randn(len(images), width, generator=torch.Generator().manual_seed(0)).to(images.device)
    _check_call(trial, head, lambda: head(x), (len(images), head.out_dim), "the output [N, out_dim]")


def check_recipe(trial: Trial, jepa: Recipe, views: Sequence[View]) -> None:
    """Check the interface, and that the loss is a finite scalar, the same in two calls."""
    trial.need(isinstance(jepa, Interface), "lacks an attribute or a method of jepa_kit.interfaces.Recipe")

    def loss() -> Tensor:
        out = jepa(*views)
        trial.need(isinstance(out, Output), f"gave a {type(out).__name__}, not a jepa_kit.structures.Output")
        return out.loss

    _check_call(trial, jepa, loss, (), "the loss []")


def _check_first_weights(jepa: Recipe, run: Recipe, named: str) -> None:
    """Raise ContractError unless a build with other random states of numpy and Python has the same weights."""
    again = jepa.state_dict()
    for name, value in run.state_dict().items():
        if name not in again or not torch.equal(value, again[name].to(value.device)):
            raise ContractError(
                f"the first weights differ in two builds with one train.seed, first {name}: a user-defined part "
                f"({named}) must draw them by torch, and not by numpy or Python's random"
            )


def check_encoder(trial: Trial, encoder: Any, images: Tensor, contexts: PatchSets) -> None:
    """Check the attributes, and the tokens of contexts, whole images and layers."""
    trial.need_sizes(encoder, "patch_size", "embed_dim", "depth")
    grid = (images.shape[-2] // encoder.patch_size, images.shape[-1] // encoder.patch_size)
    trial.need_grid(encoder, grid)
    trial.need(hasattr(encoder, "forward_layers"), "has no method forward_layers")
    shape = (contexts.num_patches, encoder.embed_dim)
    _check_call(trial, encoder, lambda: encoder(images, contexts), shape, "the contexts [P_c, embed_dim]")
    whole = (len(images) * grid[0] * grid[1], encoder.embed_dim)
    with torch.no_grad():
        _check_call(trial, encoder, lambda: encoder(images), whole, "whole images [B * N, embed_dim]")
        layers, again = trial.twice(lambda: list(encoder.forward_layers(images, None, layers=(encoder.depth,))))
        trial.need(len(layers) == 1, f"gave {len(layers)} tensors for one layer of forward_layers")
        trial.tensor(layers[0], whole, "the last layer [B * N, embed_dim]")
        trial.same(layers, again)


def check_sight(trial: Trial, encoder: Any, images: Tensor, contexts: PatchSets) -> None:
    """Check that tokens of contexts do not depend on the pixels of patches that are hidden, or in no context.

    These patches are turned by 180 degrees, which keeps the mean and the variance of each image.
    """
    p, (rows, columns) = encoder.patch_size, encoder.grid
    seen = torch.zeros(len(images), rows * columns, dtype=torch.bool, device=images.device)
    at = slice(None) if contexts.hidden is None else ~contexts.hidden
    seen[contexts.image_of_token[at], contexts.index[at]] = True
    turned = images.clone()
    patches = turned[..., : rows * p, : columns * p].unflatten(3, (columns, p)).unflatten(2, (rows, p))
    here = seen.view(-1, 1, rows, 1, columns, 1)
    patches.copy_(torch.where(here, patches, patches.flip(3, 5)))
    encoder.eval()
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        before, after = (trial.twice(partial(encoder, x, contexts))[0] for x in (images, turned))
    encoder.train()
    trial.need(
        float((before - after).abs().max()) <= 1e-3 * float(before.abs().max()),
        "gave other tokens of a context if pixels outside of the context, or of its hidden patches, change, so it sees "
        "what is to be predicted: select the patches before tokens are mixed, and put a mask token in place of hidden "
        "ones (patches.hidden). An encoder that means this declares mixes_patches = True",
    )


def check_target(trial: Trial, jepa: JEPA, images: Tensor, masks: MaskBatch) -> None:
    """Check the attributes, and the targets of all target patches, which may be codes."""
    target: Any = jepa.target
    trial.need_sizes(target, "out_dim")
    trial.need_flags(target, "needs_encoder")

    def targets() -> Any:
        with torch.set_grad_enabled(not jepa.target_update.stop_gradient):
            return target(images, masks.targets, jepa.target_network)

    count = masks.targets.num_patches
    _check_call(trial, target, targets, (count, target.out_dim), "the targets [P_t, out_dim]", codes=target.out_dim)


def check_predictor(trial: Trial, jepa: JEPA, view: View, masks: MaskBatch) -> None:
    """Check the predictions for all target patches of a view."""
    with seeded(0), unchanged_buffers(jepa):
        context, more = jepa.encode_context(view, masks)
    shape = (masks.targets.num_patches, jepa.target.out_dim)
    predict = partial(jepa.predictor, context, masks, **more)
    _check_call(trial, jepa.predictor, predict, shape, "the predictions [P_t, out_dim]")


def check_loss(trial: Trial, jepa: JEPA, images: Tensor, masks: MaskBatch) -> None:
    """Check for a finite scalar; a distance must draw no random numbers, and be smallest for exact predictions.

    The loss is given random targets; if the recipe's are codes, those of the images, which no prediction equals.
    """
    loss = jepa.losses[trial.name]
    width = int(jepa.target.out_dim)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(0)
    guess, truth = (torch.randn(masks.targets.num_patches, width, generator=noise).to(images.device) for _ in range(2))
    with seeded(0), unchanged_buffers(jepa), torch.no_grad():
        context = jepa.encoder(images, masks.context)
        targets = jepa.targets_at(images, masks.targets)
    codes = not targets.is_floating_point()
    at = Prediction(guess, targets if codes else truth, context, masks)
    first = _check_call(trial, loss, lambda: loss(at), (), "the loss []")
    if codes or not is_distance(loss):
        return
    but = "counts as a distance (is_distance is not False), but"
    one, other = trial.twice(lambda: loss(at), pure=True)
    trial.need(agree(one, other), f"{but} draws random numbers: a regulariser declares is_distance = False")
    right = trial.call(lambda: loss(Prediction(truth, truth, context, masks)))
    exact, apart = float(right.detach()), float(first.detach())
    trial.need(
        exact <= apart * (1 + 1e-6) + 1e-6,
        f"{but} is {exact:.4g} if predictions equal targets, and {apart:.4g} if they do not: "
        "a loss that is not a distance declares is_distance = False",
    )


def check_target_update(trial: Trial, jepa: Recipe) -> None:
    """Check the attributes, the momenta, and that an update changes the target encoder alone and keeps it finite."""
    update = jepa.target_update
    trial.need_flags(update, "tied", "stop_gradient")
    made = jepa.target_encoder
    trial.need(made is None or isinstance(made, nn.Module), f"made a {type(made).__name__}, not a module or None")
    momenta, again = trial.twice(lambda: [update.momentum(where) for where in (0.0, 0.5, 1.0)])
    for momentum in momenta:
        right = isinstance(momentum, float | int) and math.isfinite(momentum)
        trial.need(right, f"gave the momentum {momentum!r}, not a finite number")
    trial.same(momenta, again)
    before = {name: value.detach().clone() for name, value in jepa.named_parameters()}

    def moved() -> list[Tensor]:
        jepa.load_state_dict(before, strict=False)
        with torch.no_grad():
            for value in jepa.encoder.parameters():
                value.mul_(1.5)  # stands for training
        update.update(made, jepa.encoder, float(momenta[0]))
        return [value.detach().clone() for value in jepa.parameters()]

    with unchanged_buffers(jepa):
        trial.call(moved)
    after_one = attributes(update)
    first, second = trial.twice(moved)
    check_attributes(trial, after_one, attributes(update))
    followed = {p.data_ptr() for p in jepa.encoder.parameters() if p.requires_grad}
    trial.need(
        made is None or not followed <= {p.data_ptr() for p in made.parameters()},
        "gave a target encoder whose weights are the encoder's own tensors: copy the encoder, and later its values "
        "(a.copy_(b), not a.data = b.data), or declare tied = True",
    )
    for name, value in jepa.named_parameters():
        trial.need(value.is_leaf, f"recorded a gradient of {name}: decorate update with @torch.no_grad()")
    for name, value in zip(before, first, strict=True):
        trial.need(bool(value.isfinite().all()), f"made {name} not finite")
        untouched = not name.startswith("encoder.") or made is None or torch.equal(value, before[name] * 1.5)
        trial.need(untouched, f"changed {name}, which the optimiser alone may change")
    trial.same(first, second, "updates")
    jepa.load_state_dict(before, strict=False)


def _check_call(
    trial: Trial, module: nn.Module, do: Callable[[], Any], shape: tuple[Any, ...], what: str, *, codes: int = 0
) -> Tensor:
    """Return the result of a call, a finite tensor of a shape, and the same if called again.

    Buffers that the call changes must be in the state dict, because a resumed run needs them. Integers are accepted
    too, as codes below ``codes`` if it is above 0.
    """
    kept = {id(owner.get_buffer(name)) for owner, name, _ in persistent_buffers(module)}
    tables = {name: value.clone() for name, value in module.named_buffers() if id(value) not in kept}
    with seeded(0), unchanged_buffers(module):
        trial.call(do)
    now = dict(module.named_buffers())
    for name, value in tables.items():
        same = name in now and torch.equal(now[name], value)
        trial.need(same, f"changes its buffer {name}, which is not persistent: a resumed run would not have it")
    before = attributes(module)
    first, second = trial.twice(do)
    check_attributes(trial, before, attributes(module))
    if codes and isinstance(first, Tensor) and not first.is_floating_point():
        trial.codes(first, shape[0], codes)
    else:
        trial.tensor(first, shape, what)
    trial.same(first, second)
    return first


def check_gradients(jepa: Recipe, loss: Tensor, named: str) -> None:
    """Check that finite gradients of the loss reach every parameter that is not frozen.

    Raises:
        ContractError: they do not; the message names the first parameter and the user-defined parts.
    """
    trained = {name: p for name, p in jepa.named_parameters() if p.requires_grad}
    if not loss.requires_grad:
        raise ContractError(f"the loss carries no gradient with {named}: nothing would be trained")
    loss.backward()
    without = [name for name, p in trained.items() if p.grad is None]
    if without:
        raise ContractError(
            f"no gradient reaches {len(without)} of {len(trained)} parameters, first {without[0]}, with {named}: use "
            "each in every forward pass (a detach() or no_grad() may cut it off), or freeze it: requires_grad_(False)"
        )
    broken = [name for name, p in trained.items() if p.grad is not None and not p.grad.isfinite().all()]
    if broken:
        raise ContractError(f"the gradient of {broken[0]} is not finite with {named}, from finite images and losses")
