"""Released I-JEPA checkpoints (``.pth.tar``): read names, layout and optimizer, and write them back unchanged.

A file contains ``encoder``, ``predictor``, ``target_encoder`` (``module.`` in names if DDP wrote them), ``opt``,
``scaler``, ``epoch`` (completed), ``loss``, ``batch_size`` (per process), ``world_size`` and ``lr``.

Names of encoders are the same as ours, except for the position table, which the release stores and we compute. Most
names of the release's predictor begin with ``predictor_``, and its mask token has an additional axis.

The released AdamW numbers its parameters group by group: encoder weights, predictor weights, encoder biases and 1-D,
predictor biases and 1-D, each in the order of the state dict. The position tables are in the first two groups, and
never have a state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_kit.config import Config
from jepa_kit.encoders.positions import sincos_2d
from jepa_kit.engine.checkpoint.format import Checkpoint, check_finite
from jepa_kit.engine.schedules import Schedule
from jepa_kit.errors import CheckpointError
from jepa_kit.files import write_archive
from jepa_kit.interop.digest import ABOUT
from jepa_kit.interop.files import open_archive
from jepa_kit.interop.names import strip_names
from jepa_kit.interop.native import architecture_of, config_of, released_config, steps_per_epoch
from jepa_kit.interop.weight_checks import check_positions, check_shapes, depth_of, shapes_to_architecture
from jepa_kit.interop.weights import AS_IT_IS, Architecture, Reading

PREFIX = "predictor_"
POSITIONS = ("pos_embed", "predictor_pos_embed")
MODULE = "module."
PARTS = ("encoder", "predictor", "target_encoder")
TABLE = {"encoder": "pos_embed", "target_encoder": "pos_embed", "predictor": "predictor_pos_embed"}

NOTE = {"step": int, "config": dict, "versions": dict, "data": dict, "origin": dict}
"""Fields of ``Checkpoint`` that our note has, and their types."""

LICENCE = "CC-BY-NC-4.0"
RELEASED_FILES = (
    "IN1K-vit.h.14-300e.pth.tar",
    "IN1K-vit.h.16-448px-300e.pth.tar",
    "IN22K-vit.h.14-900e.pth.tar",
    "IN22K-vit.g.16-600e.pth.tar",
)
"""Files at dl.fbaipublicfiles.com/ijepa, whose repository states the licence."""


def encoder_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return released encoder weights under our names, without position tables."""
    return {name: value for name, value in state.items() if name not in POSITIONS}


def predictor_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return released predictor weights under our names, without position tables."""
    return {
        name.removeprefix(PREFIX): value.reshape(1, -1) if name == "mask_token" else value
        for name, value in state.items()
        if name not in POSITIONS
    }


def predictor_name_to_official(name: str) -> str:
    """Return the release's name of a predictor's parameter."""
    return name if name == "mask_token" else PREFIX + name


def licence_of(path: Path) -> str:
    """Return the licence of a file in the released layout, which does not state it itself, or None."""
    return LICENCE if path.name in RELEASED_FILES else f"not stated ({LICENCE} if these are weights released by Meta)"


def read(path: Path, reading: Reading = AS_IT_IS) -> Checkpoint:
    """Read a file in the released layout, with the parts that it has.

    Files that ``write`` made from our runs contain config, step and origin. For others, config is the released recipe
    with the sizes of the weights, step is ``epoch`` times the fewest updates per epoch that AdamW's count allows (the
    release skips updates whose gradients overflow, so its count may lag), and origin is the file.

    Args:
        path: the file.
        reading: ``num_heads`` applies to encoder and predictor.

    Raises:
        CheckpointError: it cannot be read, or its parts do not fit together.
    """
    held = open_archive(path, allow_unchecked=reading.allow_unchecked)
    named = {part: held[part] for part in PARTS if isinstance(held.get(part), dict)}
    if not named.keys() & {"encoder", "target_encoder"}:
        raise CheckpointError(f"{path} has no encoder and no target_encoder; it contains {', '.join(held)}")
    prefix = {part: MODULE if all(n.startswith(MODULE) for n in state) else "" for part, state in named.items()}
    parts = {part: strip_names(state, f"{part} of {path}", reading.prefix)[0] for part, state in named.items()}
    note = held.get(ABOUT)
    shape = _encoders(parts, path, note, reading.num_heads)
    positions = _positions(parts, shape, path)
    model = {
        f"{part}.{name}": value
        for part, state in parts.items()
        for name, value in (predictor_from_official if part == "predictor" else encoder_from_official)(state).items()
    }
    check_finite(parts.get("predictor", {}), f"predictor of {path}")
    optimizer = _optimizer(held.get("opt"), parts, path)
    for name, state in optimizer.items():
        check_finite(state, f"the optimiser's state for {name} of {path}")
    own = {"positions": positions} if positions else {}
    if note is not None:
        if wrong := [key for key, kind in NOTE.items() if type(note.get(key)) is not kind]:
            raise CheckpointError(f"{path}: its note {ABOUT!r} is damaged: {wrong[0]} (={note.get(wrong[0])!r:.60})")
        return Checkpoint(model=model, optimizer=optimizer, **{**note, "origin": {**note["origin"], **own}})
    epoch = int(held.get("epoch") or 0)
    count = max((int(state["step"]) for state in optimizer.values() if "step" in state), default=0)
    per_epoch = max(1, math.ceil(count / epoch)) if epoch else None
    step = epoch * per_epoch if per_epoch else count
    origin = {
        "source": f"{path.name} (released layout)",
        "licence": licence_of(path),
        "released": {
            "step": step,
            "keys": list(held),
            "prefix": prefix,
            "param_groups": (held.get("opt") or {}).get("param_groups"),
            "values": {key: value for key, value in held.items() if key not in (*PARTS, "opt")},
        },
        **own,
    }
    batch_size = int(held.get("batch_size") or 2048) * int(held.get("world_size") or 1)
    config = released_config(
        shape,
        predictor=_predictor_options(parts, shape, path),
        optim=_optim_options(held.get("lr")),
        train={"batch_size": batch_size, "epochs": max(300, epoch), "steps_per_epoch": per_epoch},
    )
    return Checkpoint(step=step, model=model, optimizer=optimizer, config=config, versions={}, data={}, origin=origin)


def _encoders(parts: Mapping[str, Any], path: Path, note: Any, num_heads: int | None) -> Architecture:
    """Return the architecture of the encoders, which must agree."""
    if note is not None:
        shape = architecture_of(config_of(note["config"], str(path)))
    else:
        part = "target_encoder" if "target_encoder" in parts else "encoder"
        table = parts[part].get("pos_embed")
        named = encoder_from_official(parts[part])
        shape = shapes_to_architecture(named, f"{part} of {path}", table=table, num_heads=num_heads)
    for part in parts.keys() & {"encoder", "target_encoder"}:
        check_shapes(shape, encoder_from_official(parts[part]), f"{part} of {path}")
    return shape


def _positions(parts: Mapping[str, Any], shape: Architecture, path: Path) -> dict[str, Tensor]:
    """Return the position tables [N, D] that differ from the formula; each part must have one."""
    found = {}
    for part, state in parts.items():
        if TABLE[part] not in state:
            raise CheckpointError(f"{part} of {path} has no {TABLE[part]} [1, N, D], which the released layout has")
        own = check_positions(state[TABLE[part]], shape.grid, f"{TABLE[part]} in {part} of {path}")
        if own is not None:
            found[part] = own
    return found


def _predictor_options(parts: Mapping[str, Any], shape: Architecture, path: Path) -> dict[str, Any]:
    """Return the sizes of the predictor; in the release it has as many heads as the encoder."""
    if "predictor" not in parts:
        return {}
    state = predictor_from_official(parts["predictor"])
    if "embed.weight" not in state or "blocks.0.mlp.fc1.weight" not in state:
        some = ", ".join(list(parts["predictor"])[:6])
        raise CheckpointError(
            f"predictor of {path} is not the released one: no predictor_embed.weight; it contains {some}"
        )
    width = state["embed.weight"].shape[0]
    return {
        "width": width,
        "depth": depth_of(state),
        "num_heads": shape.num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "norm_eps": shape.norm_eps,
    }


def _optim_options(lr: Any) -> dict[str, Any]:
    if not isinstance(lr, float) or lr <= 0:
        return {}
    return {"lr": lr, "start_lr": min(2e-4, lr), "final_lr": min(1e-6, lr)}


def _groups(parts: Mapping[str, Mapping[str, Tensor]]) -> list[list[tuple[str, str]]]:
    """Return (part, released name) of each parameter, in the released optimizer's four groups."""

    def decayed(name: str, value: Tensor) -> bool:
        return "bias" not in name and value.ndim != 1

    return [
        [(part, name) for name, value in parts[part].items() if decayed(name, value) == want]
        for want in (True, False)
        for part in ("encoder", "predictor")
    ]


def _our_name(part: str, name: str) -> str:
    return f"{part}.{name if part == 'encoder' else name.removeprefix(PREFIX)}"


def _optimizer(opt: Any, parts: Mapping[str, Mapping[str, Tensor]], path: Path) -> dict[str, dict[str, Tensor]]:
    """Return AdamW's state by our names; empty if the file has no optimizer."""
    if opt is None:
        return {}
    missing = [part for part in ("encoder", "predictor") if part not in parts]
    if missing:
        raise CheckpointError(f"{path} has an optimiser, but no {' and no '.join(missing)} whose moments it would be")
    groups, numbers = _groups(parts), [group["params"] for group in opt["param_groups"]]
    found, expected = ([len(group) for group in each] for each in (numbers, groups))
    if found != expected:
        raise CheckpointError(
            f"the optimiser of {path} has groups of {found} parameters, but its weights make {expected}"
        )
    state: dict[str, dict[str, Tensor]] = {}
    for number, (part, name) in zip(chain(*numbers), chain(*groups), strict=True):
        held, value = opt["state"].get(number, {}), parts[part][name]
        if name in POSITIONS:
            if held:
                raise CheckpointError(f"the optimiser of {path} has trained {name}, which the release never does")
            continue
        wrong = [key for key in ("exp_avg", "exp_avg_sq") if held and held[key].shape != value.shape]
        if wrong:
            raise CheckpointError(
                f"the optimiser of {path} does not fit: {wrong[0]} of {part}.{name} is "
                f"{tuple(held[wrong[0]].shape)}, not {tuple(value.shape)}"
            )
        state[_our_name(part, name)] = {key: _moment(key, name, x) for key, x in held.items()}
    return state


def _moment(key: str, name: str, value: Any) -> Tensor:
    if key == "step":
        return torch.as_tensor(value, dtype=torch.float32)  # torch before 1.12 stored a number
    return value.reshape(1, -1) if name == "mask_token" else value


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write the released layout; values read from such a file are written unchanged if there was no update since.

    Raises:
        CheckpointError: the released layout cannot store a part or weights.
    """
    what = f"the checkpoint of step {checkpoint.step}"
    config = config_of(checkpoint.config, what)
    strange = [name for name in checkpoint.model if name.partition(".")[0] not in PARTS]
    name = config.slots["predictor"].name
    if name != "vit" or strange:
        raise CheckpointError(
            f"{what} does not fit the released layout: predictor.name (={name!r}) must be 'vit', and weights beside "
            f"{', '.join(PARTS)} cannot be kept: {', '.join(strange) or 'none'}"
        )
    if config.optim.name != "adamw":
        raise CheckpointError(
            f"{what} does not fit the released layout: optim.name (={config.optim.name!r}) must be 'adamw'"
        )
    if config.optim.groups:
        raise CheckpointError(f"{what} does not fit the released layout, which has no learning rates of optim.groups")
    kept = checkpoint.origin.get("released", {})
    kept = kept if kept.get("step") == checkpoint.step else {}
    parts = _to_parts(checkpoint, architecture_of(config))
    prefix = kept.get("prefix", {})
    content: dict[str, Any] = {
        part: {prefix.get(part, MODULE) + name: value for name, value in state.items()} for part, state in parts.items()
    }
    if checkpoint.optimizer:
        content["opt"] = _to_opt(checkpoint, config, parts, kept)
    if kept:
        content |= kept["values"]
        content = {key: content[key] for key in kept["keys"] if key in content} | content
    else:
        content |= _values(checkpoint, config)
    write_archive(content, path)


def _to_parts(checkpoint: Checkpoint, shape: Architecture) -> dict[str, dict[str, Tensor]]:
    """Return each part under the released names, in the released order, with its position table."""
    tables = checkpoint.origin.get("positions", {})
    parts: dict[str, dict[str, Tensor]] = {}
    for part in PARTS:
        state = {k[len(part) + 1 :]: v for k, v in checkpoint.model.items() if k.startswith(f"{part}.")}
        if not state:
            continue
        first = state["embed.bias" if part == "predictor" else "patch_embed.proj.bias"]
        # The release computes its tables in float32, whatever the model's precision.
        stored = torch.float32 if first.dtype == torch.float64 else first.dtype
        table = tables.get(part, sincos_2d(len(first), shape.grid).to(stored))[None]
        if part == "predictor":
            token = state.pop("mask_token")
            named = {PREFIX + name: value for name, value in state.items()}
            parts[part] = {"mask_token": token.reshape(1, 1, -1), TABLE[part]: table, **named}
        else:
            parts[part] = {TABLE[part]: table, **state}
    return parts


def _to_opt(checkpoint: Checkpoint, config: Config, parts: Mapping[str, Any], kept: Any) -> dict[str, Any]:
    groups = _groups(parts)
    state = {}
    for number, (part, name) in enumerate(chain(*groups)):
        if held := checkpoint.optimizer.get(_our_name(part, name)):
            shape = parts[part][name].shape
            state[number] = {key: x if key == "step" else x.reshape(shape) for key, x in held.items()}
    if kept:
        return {"state": state, "param_groups": kept["param_groups"]}
    lr, decay = _last_hyper(checkpoint, config)
    options = 2 * [{"weight_decay": decay}] + 2 * [{"WD_exclude": True, "weight_decay": 0}]
    blank = [
        {"params": [torch.nn.Parameter(torch.empty(0)) for _ in group], **option}
        for group, option in zip(groups, options, strict=True)
    ]
    optimizer = torch.optim.AdamW(blank, lr=lr, betas=config.optim.betas, eps=config.optim.eps)
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _last_hyper(checkpoint: Checkpoint, config: Config) -> tuple[float, float]:
    """Return learning rate and weight decay of the last update, if the length of an epoch is known."""
    per_epoch, optim = steps_per_epoch(config, checkpoint.data), config.optim
    if not per_epoch:
        return optim.lr, optim.weight_decay[0]
    schedule = Schedule.of(config, per_epoch)
    hyper = schedule(min(max(checkpoint.step - 1, 0), schedule.steps - 1))
    return hyper.lr, hyper.weight_decay


def _values(checkpoint: Checkpoint, config: Config) -> dict[str, Any]:
    """Return the numbers stored with the weights, and our note, which the released code ignores."""
    per_epoch = steps_per_epoch(config, checkpoint.data)
    origin = {key: value for key, value in checkpoint.origin.items() if key not in ("positions", "released")}
    return {
        "scaler": None,
        "epoch": checkpoint.step // per_epoch if per_epoch else 0,
        "loss": None,
        "batch_size": config.train.batch_size,
        "world_size": 1,
        "lr": config.optim.lr,
        ABOUT: {**{key: getattr(checkpoint, key) for key in NOTE}, "origin": origin},
    }
