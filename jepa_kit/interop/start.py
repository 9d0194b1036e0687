"""Start a run from weights of any format (``train.init_from``) or a released checkpoint (``--resume FILE``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jepa_kit.encoders.vit import ViT
from jepa_kit.engine.checkpoint.format import Checkpoint, check_state, restore
from jepa_kit.engine.checkpoint.state_dict import load_full_state
from jepa_kit.engine.run import Start
from jepa_kit.errors import CheckpointError
from jepa_kit.frozen import EXTRA_STATE, FrozenNetwork
from jepa_kit.interop import official
from jepa_kit.interop.files import fetch
from jepa_kit.interop.formats import encoder_from, read
from jepa_kit.interop.native import origin_words
from jepa_kit.interop.weight_checks import usual_heads
from jepa_kit.interop.weights import OWN, Architecture, Reading, architecture_of_vit
from jepa_kit.recipe import Recipe


def init_from(jepa: Recipe, path_or_url: str | os.PathLike[str]) -> Start:
    """Load the weights of a file into a new run, which starts at step 0 with a new optimizer.

    A whole checkpoint initialises each part that the run has. A single encoder initialises the context and the target
    encoder; the predictor keeps its weights, and a target encoder from a file of its own (``frozen``) too.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, or does not fit; the run is unchanged then.
    """
    path = fetch(path_or_url)
    held = read(path, None, Reading(num_heads=_architecture_of(jepa).num_heads))
    if isinstance(held, Checkpoint) and any(name.startswith("encoder.") for name in held.model):
        weights = encoder_from(held, "context", path.name)
        names = {name.partition(".")[0] for name in held.model if not name.endswith(EXTRA_STATE)}
        parts = {part: held.part(part) for part in official.PARTS if part in names}
    else:
        weights = encoder_from(held, None, path.name)
        parts = {"encoder": weights.state}
    lines = [f"weights: {weights.words()}", *_check_architecture(jepa, weights.architecture, str(path))]
    modules = {
        part: module
        for part in official.PARTS
        if isinstance(module := getattr(jepa, part, None), nn.Module) and not isinstance(module, FrozenNetwork)
    }
    parts.setdefault("target_encoder", parts["encoder"])
    known = {part: module for part, module in modules.items() if part in parts}
    for part, module in known.items():
        check_state(module.state_dict(), parts[part], f"the run's {part} (train.init_from: {path})")
    for part, module in known.items():
        load_full_state(module, parts[part])
    if fresh := [part for part in modules if part not in parts]:
        lines.append(f"not in the file, newly initialised: {', '.join(fresh)}")
    origin = held.origin if isinstance(held, Checkpoint) else {}
    return Start(0, _origin(origin, path.name, weights.provenance.licence), lines)


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
        if here != there:
            raise CheckpointError(f"encoder.{name} (={here}) must be {there}, as in the weights of {what}")
    usual = usual_heads(run.embed_dim, run.depth)
    if usual not in (None, run.num_heads):  # released files do not state theirs
        lines.append(f"note: encoders of this width and depth have {usual} heads; this run has {run.num_heads}")
    if run.grid != found.grid:
        (h, w), (a, b) = run.grid, found.grid
        trained = f"note: the weights were trained on {a} x {b} patches"
        lines.append(f"{trained}; this run has the formula's positions of {h} x {w}")
    return lines
