"""Start a run from weights of any format (``train.init_from``) or a released checkpoint (``--resume FILE``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_kit.config import modernize
from jepa_kit.config.check import DEFAULT_RECIPE
from jepa_kit.encoders.vit import ViT
from jepa_kit.engine.checkpoint.format import Checkpoint, check_state, restore
from jepa_kit.engine.checkpoint.state_dict import load_full_state
from jepa_kit.engine.run import Start
from jepa_kit.errors import CheckpointError
from jepa_kit.frozen import EXTRA_STATE
from jepa_kit.interop import official
from jepa_kit.interop.files import fetch
from jepa_kit.interop.formats import encoder_from, read
from jepa_kit.interop.native import origin_words
from jepa_kit.interop.weight_checks import usual_heads
from jepa_kit.interop.weights import NOT_STATED, OWN, Architecture, Reading, architecture_of_vit
from jepa_kit.recipe import Recipe
from jepa_kit.registry import ENCODERS, RECIPES


def init_from(jepa: Recipe, path_or_url: str | os.PathLike[str]) -> Start:
    """Load the weights of a file into a new run, which starts at step 0 with a new optimizer.

    A whole checkpoint initialises each part that the run has; one of another recipe its encoders only, because its
    other parts have another meaning. A single encoder initialises the context and the target encoder. A part that
    follows another one (``target_``) and is not in the file is initialised as that one. All others keep their weights,
    also networks from a file of their own (``frozen``).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, or does not fit; the run is unchanged then.
    """
    path = fetch(path_or_url)
    held = read(path, None, Reading(num_heads=getattr(jepa.encoder, "num_heads", None)))
    whole = isinstance(held, Checkpoint) and any(name.startswith("encoder.") for name in held.model)
    if isinstance(held, Checkpoint) and whole and not isinstance(jepa.encoder, ViT):
        lines, licence = _check_same_encoder(jepa, held, str(path)), held.origin.get("licence")
    else:
        weights = encoder_from(held, "context" if whole else None, path.name)
        lines = [f"weights: {weights.words()}", *_check_architecture(jepa, weights.architecture, str(path))]
        licence, parts = weights.provenance.licence, {"encoder": weights.state}
    modules = {name: module for name, module in jepa.named_children() if _own_state(module.state_dict())}
    if isinstance(held, Checkpoint) and whole:
        names = {name.partition(".")[0] for name in held.model}
        recipe = modernize(held.config).get(RECIPES.slot, {}).get("name", DEFAULT_RECIPE["name"])
        if recipe not in RECIPES or not isinstance(jepa, RECIPES.get(recipe)):
            names &= {"encoder", "target_encoder"}
            lines.append(f"note: the file is of the recipe {recipe!r}: only its encoders are loaded")
        parts = {name: state for name in modules if name in names and (state := _own_state(held.part(name)))}
    for name in modules:
        if (followed := name.removeprefix("target_")) != name and followed in parts:
            parts.setdefault(name, parts[followed])
    known = {name: module for name, module in modules.items() if name in parts}
    for name, module in known.items():
        check_state(_own_state(module.state_dict()), parts[name], f"the run's {name} (train.init_from: {path})")
    for name, module in known.items():
        load_full_state(module, {**module.state_dict(), **parts[name]})
    if fresh := [name for name in modules if name not in parts]:
        lines.append(f"not in the file, newly initialised: {', '.join(fresh)}")
    origin = held.origin if isinstance(held, Checkpoint) else {}
    return Start(0, _origin(origin, path.name, licence), lines)


def _own_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a state without the digests of frozen networks, which have files of their own."""
    return {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}


def _check_same_encoder(jepa: Recipe, held: Checkpoint, what: str) -> list[str]:
    """Return notes on a checkpoint whose encoder is of the run's class, which is not ``vit``.

    Raises:
        CheckpointError: its encoder is of another class.
    """
    name = modernize(held.config).get("encoder", {}).get("name")
    cls = ENCODERS.get(name) if name in ENCODERS else None
    if not isinstance(cls, type) or not isinstance(jepa.encoder, cls):
        raise CheckpointError(
            f"the run's encoder is a {type(jepa.encoder).__name__}, but that of {what} is {name!r}: they must be the "
            "same"
        )
    return [
        f"weights: {name} of {what}; step {held.step}; licence {held.origin.get('licence', NOT_STATED)}",
        "note: names and shapes of weights are compared, but no options that these do not show",
    ]


def resume_official(
    jepa: Recipe, optimizer: torch.optim.Optimizer, path_or_url: str | os.PathLike[str], steps_per_epoch: int
) -> Start:
    """Resume a run in the released layout: weights, moments of the optimizer, and the epoch.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the format is another, a part is missing, or sizes differ; the run is unchanged then.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        raise CheckpointError(
            "optim.name must be 'adamw' to resume a released checkpoint, which has its moments; train.init_from starts "
            "a new run from the weights"
        )
    path = fetch(path_or_url)
    held = read(path, "official", Reading(num_heads=_architecture_of(jepa).num_heads))
    assert isinstance(held, Checkpoint)
    parts = {name.partition(".")[0] for name in held.model}
    missing = [part for part in official.PARTS if part not in parts] + ([] if held.optimizer else ["opt"])
    if missing:
        raise CheckpointError(
            f"{path} has no {', no '.join(missing)}, so its run cannot be resumed; train.init_from starts a new run "
            "from its weights"
        )
    weights = encoder_from(held, "context", path.name)
    lines = _check_architecture(jepa, weights.architecture, str(path))
    restore(held, jepa, optimizer)
    released = held.origin.get("released")
    # A file that jepa_kit wrote stores the step.
    step = held.step if released is None else int(released["values"].get("epoch") or 0) * steps_per_epoch
    epoch = step // steps_per_epoch
    counts = {int(state["step"]) for state in held.optimizer.values() if "step" in state}
    lines.append(f"resumed from {path} ({origin_words(held)}) after {epoch} epochs, step {step:,}")
    if counts and max(counts) != step:
        lines.append(f"note: AdamW has counted {max(counts):,} updates, and {step:,} are {epoch} epochs of this run")
    origin = _origin(held.origin, path.name, held.origin.get("licence")) | {"file": Path(path_or_url).name}
    return Start(step, origin, lines)


def _origin(held: dict[str, Any], name: str, licence: str | None) -> dict[str, Any]:
    found = {"source": held.get("source", name), "licence": licence}
    return {key: value for key, value in found.items() if value is not None}


def _architecture_of(jepa: Recipe) -> Architecture:
    if not isinstance(jepa.encoder, ViT):
        raise CheckpointError(
            f"the run's encoder is a {type(jepa.encoder).__name__}, but weights of other formats need a 'vit'"
        )
    return architecture_of_vit(jepa.encoder)


def _check_architecture(jepa: Recipe, found: Architecture, what: str) -> list[str]:
    """Return notes on harmless differences; raise CheckpointError for others that shapes do not reveal."""
    run, lines = _architecture_of(jepa), []
    for name in ("num_heads", "norm_eps", *OWN):
        here, there = getattr(run, name), getattr(found, name)
        learned = name == "layer_scale" and None not in (here, there)  # then its value is only the first one
        if here != there and not learned:
            raise CheckpointError(f"encoder.{name} (={here}) must be {there}, as in the weights of {what}")
    usual = usual_heads(run.embed_dim, run.depth)
    if usual not in (None, run.num_heads):  # released files do not state theirs
        lines.append(f"note: encoders of this width and depth have {usual} heads; this run has {run.num_heads}")
    if run.grid != found.grid:
        (h, w), (a, b) = run.grid, found.grid
        positions = "the formula's positions of " if run.positions == "sincos" else ""
        lines.append(f"note: the weights were trained on {a} x {b} patches; this run has {positions}{h} x {w}")
    return lines
