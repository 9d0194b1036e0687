"""JEPA: the equations, and their assembly from a config.

s_y     = target(images)            at the target patches      (no gradient)
s_x     = encoder(images)           at the context patches
s_hat_y = predictor(s_x, positions) at the target patches
loss    = D(s_hat_y, s_y);  target encoder <- target_update(encoder)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

# The members of each slot register themselves.
import jepa_kit.losses
import jepa_kit.predictors
import jepa_kit.targets  # noqa: F401
from jepa_kit.config import Config, ConfigError, Part, located
from jepa_kit.encoders import Encoder
from jepa_kit.maskers import Masker
from jepa_kit.registry import SLOTS, TRANSFORMS
from jepa_kit.structures import Grid, MaskBatch, Prediction
from jepa_kit.target_updates import TargetUpdate

CHANNELS = 3
"""Of every image that the data give."""


@dataclass(frozen=True, eq=False)
class Output:
    """loss [] is the weighted sum of the terms [], by name; prediction is what they were taken from."""

    loss: Tensor
    terms: dict[str, Tensor]
    prediction: Prediction


class JEPA(nn.Module):
    """A joint-embedding predictive architecture out of exchangeable parts.

    Args:
        encoder: the context encoder.
        predictor: context tokens and target positions to predictions.
        target: what is predicted.
        losses: (name, module, weight) of each term.
        target_update: makes the target encoder and moves it.

    Raises:
        ValueError: no loss, two losses of one name, or a target that needs a target encoder where the
            update makes none.
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
        super().__init__()
        names = [name for name, _, _ in losses]
        if not names:
            raise ValueError("losses (=[]) must hold at least one term")
        if len(set(names)) < len(names):
            raise ValueError(f"losses (={names}) must have names of their own")
        self.encoder = encoder
        self.predictor = predictor
        self.target = target
        self.losses = nn.ModuleDict({name: module for name, module, _ in losses})
        self.weights = {name: weight for name, _, weight in losses}
        self.target_update = target_update
        # A tied target encoder is not registered a second time.
        self.target_encoder: nn.Module | None = target_update.make(encoder)
        if getattr(target, "needs_encoder", False) and self.target_network is None:
            raise ValueError(
                "target needs a target encoder, and target_update makes none; "
                "take target_update={name: ema}, or target={name: pixel}"
            )
        self.train()

    @property
    def target_network(self) -> nn.Module | None:
        """The module that makes targets: the target encoder, or the context encoder where it is tied to it."""
        return self.encoder if self.target_update.tied else self.target_encoder

    def forward(self, images: Tensor, masks: MaskBatch) -> Output:
        """The equations, for a batch of normalised images [B, C, h, w].

        Raises:
            ValueError: masks of another grid than the images have.
        """
        p = cast(Encoder, self.encoder).patch_size
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        if grid != masks.grid:
            raise ValueError(f"masks.grid (={masks.grid}) must be that of the images (={grid})")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.target_update.stop_gradient):
            s_y = self.target(images, masks.targets, self.target_network)  # [P_t, D]
        s_x = self.encoder(images, masks.context)  # [P_c, D_e]
        s_hat_y = self.predictor(s_x, masks)  # [P_t, D]
        # Distances and their sums are taken in the targets' precision or better, never in half.
        prediction = Prediction(_at_least_float32(s_hat_y), _at_least_float32(s_y), s_x, masks)
        terms = {name: loss(prediction) for name, loss in self.losses.items()}
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return Output(total, terms, prediction)

    def update_target(self, momentum: float) -> None:
        """target encoder <- target_update(encoder)."""
        self.target_update.update(self.target_encoder, self.encoder, momentum)

    def momentum(self, where: float) -> float:
        """The momentum when a share ``where`` in [0, 1] of the planned updates is done."""
        return self.target_update.momentum(where)

    def encoder_for(self, which: Literal["target", "context"]) -> nn.Module:
        """The encoder to evaluate. The paper evaluates the target encoder; a recipe without one has the context's."""
        if which not in ("target", "context"):
            raise ValueError(f"which (={which!r}) must be 'target' or 'context'")
        network = self.target_network if which == "target" else self.encoder
        return self.encoder if network is None else network

    def train(self, mode: bool = True) -> JEPA:
        """As ``nn.Module.train``, but a target encoder of its own stays as it is evaluated: no stochastic depth."""
        super().train(mode)
        if self.target_encoder is not None:
            self.target_encoder.eval()
        return self


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def build_masker(config: Config) -> Masker:
    """The masker of a config, for its grid of patches.

    Raises:
        ConfigError: what the masker cannot satisfy, and what other parts refuse; each line begins with its slot.
    """
    with every_problem(config):
        return _build(config.slots["masker"], "masker", grid=patch_grid_of(config))


@contextmanager
def every_problem(config: Config) -> Iterator[None]:
    """Report what all parts and transforms of a config refuse, if one of them is refused inside.

    Raises:
        ConfigError: a line for each.
    """
    try:
        yield
    except ConfigError as error:
        problems = part_problems(config)
        raise ConfigError([*(p for p in error.problems if p not in problems), *problems]) from error


BUILD_ERRORS = (ArithmeticError, RuntimeError, TypeError)
"""Of a part that cannot be built on meta, or has another error: building it for use reports these."""


def part_problems(config: Config) -> list[str]:
    """Return what parts and transforms refuse, a line each that begins with its place; builds nothing with memory.

    A part that needs what a refused one would supply gets a plausible value for it.
    """
    problems: list[str] = []

    def tried(part: Part, slot: str, **supplied: object) -> Any:
        try:
            with torch.device("meta"):
                return _build(part, slot, **supplied)
        except ConfigError as error:
            problems.extend(error.problems)
        except BUILD_ERRORS:
            pass
        return None

    slots, size = config.slots, config.data.image_size
    given = {name: value for name, value in slots["encoder"].options.items() if type(value) is int and value > 0}
    encoder = tried(slots["encoder"], "encoder", image_size=size, attention=config.train.attention)
    width, depth, p = (
        getattr(encoder, name, given.get(name, default))
        for name, default in (("embed_dim", 64), ("depth", 12), ("patch_size", 16))
    )
    grid = getattr(encoder, "grid", (max(4, size[0] // p), max(4, size[1] // p)))
    tried(slots["masker"], "masker", grid=grid)
    target = tried(slots["target"], "target", embed_dim=width, depth=depth, patch_size=p)
    out_dim = getattr(target, "out_dim", width)
    supplied = {"embed_dim": width, "out_dim": out_dim, "grid": grid, "attention": config.train.attention}
    tried(slots["predictor"], "predictor", **supplied)
    for part, _ in config.losses:
        tried(part, "loss")
    tried(slots["target_update"], "target_update")
    for i, transform in enumerate(config.data.view):
        options = {key: value for key, value in transform.items() if key != "name"}
        try:
            with located(f"data: transforms[{i}]"):
                TRANSFORMS.build(transform["name"], options, image_size=size)
        except ConfigError as error:
            problems.extend(error.problems)
        except BUILD_ERRORS:
            pass
    return problems


def build_recipe(config: Config) -> JEPA:
    """The JEPA of a config, with fresh weights from torch's current random state.

    Raises:
        ConfigError: what parts refuse, a line each that begins with the slot; weights larger than the host's memory.
    """
    with every_problem(config):
        return _build_recipe(config)


def _build_recipe(config: Config) -> JEPA:
    if torch.empty(0).device.type != "meta":
        _check_memory(config)
    for slot in ("encoder", "target"):
        channels = config.slots[slot].options.get("in_chans", CHANNELS)
        if channels != CHANNELS:
            with located(slot):
                raise ValueError(f"in_chans (={channels}) must be {CHANNELS}: the data give colour images")
    encoder = _build_encoder(config)
    target = _build(
        config.slots["target"],
        "target",
        embed_dim=encoder.embed_dim,
        depth=encoder.depth,
        patch_size=encoder.patch_size,
    )
    predictor = _build(
        config.slots["predictor"],
        "predictor",
        embed_dim=encoder.embed_dim,
        out_dim=target.out_dim,
        grid=encoder.grid,
        attention=config.train.attention,
    )
    losses = [(part.name, _build(part, "loss"), weight) for part, weight in config.losses]
    update = _build(config.slots["target_update"], "target_update")
    with located("target_update"):
        return JEPA(encoder=encoder, predictor=predictor, target=target, losses=losses, target_update=update)


ATTRIBUTES = {
    "encoder": ("grid", "patch_size", "embed_dim", "depth"),
    "target": ("out_dim",),
    "target_update": ("tied", "stop_gradient"),
}
"""Slot -> what the recipe reads of its parts."""


def _check_memory(config: Config) -> None:
    """Raise ConfigError where the matrices of a transformer's blocks alone are larger than this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    problems = []
    for slot, name in (("encoder", "embed_dim"), ("predictor", "width")):
        options = config.slots[slot].options
        depth, width, ratio = (options.get(key) for key in ("depth", name, "mlp_ratio"))
        if type(depth) is int and type(width) is int:
            needed = 4.0 * depth * width**2 * (4 + 2 * (ratio if isinstance(ratio, float) else 0))
            if needed > memory:
                problems.append(
                    f"{slot}: depth (={depth}) blocks of {name} (={width}) need {needed / 1e9:,.0f} GB for their "
                    f"weights, but this machine has {memory / 1e9:,.0f} GB of memory"
                )
    if problems:
        raise ConfigError(problems)


def _build(part: Part, slot: str, **supplied: object) -> Any:
    with located(slot):
        try:
            built = SLOTS[slot].build(part.name, part.options, **supplied)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            if SLOTS[slot].get(part.name).__module__.startswith("jepa_kit."):
                raise
            raise ValueError(f"{part.name!r} failed in its constructor: {type(error).__name__}: {error}") from error
        if missing := [name for name in ATTRIBUTES.get(slot, ()) if not hasattr(built, name)]:
            raise ValueError(f"{part.name!r} must have the attribute {', '.join(missing)}, which the recipe reads")
        return built


def patch_grid_of(config: Config) -> Grid:
    """(H, W) patches of the config's images, as its encoder cuts them (made without memory for its weights)."""
    with torch.device("meta"):
        return _build_encoder(config).grid


def _build_encoder(config: Config) -> Any:
    part = config.slots["encoder"]
    return _build(part, "encoder", image_size=config.data.image_size, attention=config.train.attention)
