"""jepa_kit's own checkpoints: read the encoder of one, and make one with an encoder only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from jepa_kit.config import Config, config_from_dict, modernize, versions
from jepa_kit.config.check import Part, check_part, check_section
from jepa_kit.encoders.vit import ViT
from jepa_kit.engine.checkpoint.files import FORMAT
from jepa_kit.engine.checkpoint.format import Checkpoint
from jepa_kit.errors import CheckpointError, ConfigError
from jepa_kit.files import write_archive
from jepa_kit.frozen import EXTRA_STATE
from jepa_kit.interop.weight_checks import check_shapes
from jepa_kit.interop.weights import Architecture, EncoderWeights, Provenance, Which, architecture_of_vit, check_which
from jepa_kit.maskers.multiblock import RELEASED
from jepa_kit.registry import ENCODERS, SLOTS

PARTS = {"target": "target_encoder", "context": "encoder"}


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint to any file name."""
    content = {"format": FORMAT, **{name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__}}
    write_archive(content, path)


def config_of(config: Mapping[str, Any], what: str) -> Config:
    """Return a checkpoint's config, whose encoder must be a ViT: encoder, names of parts, sections.

    Modules named in the config are not imported, and options of parts other than the encoder are ignored.

    Raises:
        CheckpointError: the encoder is another one, for which other formats have no names.
        ConfigError: the encoder or a section rejects a value.
    """
    raw, problems = modernize(config), list[str]()
    named = {slot: part.get("name") for slot in SLOTS if isinstance(part := raw.get(slot), dict)}
    if named.get("encoder") != "vit":
        raise CheckpointError(
            f"{what}: encoder.name (={named.get('encoder')!r}) must be 'vit', the only one that formats share; another "
            "stays in the format 'jepa_kit', which tools that build the whole run can read, such as eval_net.py"
        )
    slots = {slot: Part(str(name), {}) for slot, name in named.items()}
    sections = {name: dict(raw.get(name) or {}) for name in ("data", "optim", "train")}
    for key in ("transforms", "views"):
        sections["data"].pop(key, None)  # may be user-defined
    part = check_part("encoder", raw["encoder"], ENCODERS, problems)
    checked = {name: check_section(name, section, problems) for name, section in sections.items()}
    if problems or part is None:
        raise ConfigError(problems, f"the config of {what}")
    return Config(slots={**slots, "encoder": part}, losses=(), **checked)


def architecture_of(config: Config) -> Architecture:
    """Return the architecture of a config's encoder, a ViT."""
    with torch.device("meta"):
        vit = ENCODERS.build(
            "vit", config.slots["encoder"].options, image_size=config.data.image_size, attention="auto"
        )
    assert isinstance(vit, ViT)
    return architecture_of_vit(vit)


def steps_per_epoch(config: Config, data: Mapping[str, Any]) -> int | None:
    """Return the number of updates of an epoch, if config and data determine it."""
    if config.train.steps_per_epoch is not None:
        return config.train.steps_per_epoch
    return data["samples"] // config.train.batch_size if "samples" in data else None


def encoder_of(checkpoint: Checkpoint, encoder: str | None, source: str) -> EncoderWeights:
    """Return one of the encoders of a checkpoint.

    Args:
        checkpoint: a whole run, or one encoder only.
        encoder: ``target``, ``context``, or None for the target encoder if there is one.
        source: name of the file in messages.

    Raises:
        CheckpointError: the checkpoint does not have it, or its weights do not fit its config.
        ValueError: ``encoder`` is none of these.
    """
    check_which(encoder)
    config = config_of(checkpoint.config, source)
    there = {name.partition(".")[0] for name in checkpoint.model if not name.endswith(EXTRA_STATE)}
    contained = [which for which, part in PARTS.items() if part in there]
    tied = "target_update" in config.slots and config.slots["target_update"].name == "tied"
    which = encoder or ("target" if "target" in contained or tied else "context")
    part = PARTS["context"] if which == "target" and tied else PARTS[which]
    if part not in there:
        others = ", ".join(map(repr, contained)) or "no encoder"
        take = f"; encoder={contained[0]!r} takes it" if contained else ""
        raise CheckpointError(f"{source} has no {which} encoder; it contains {others}{take}")
    state, architecture = checkpoint.part(part), architecture_of(config)
    check_shapes(architecture, state, source)
    positions = checkpoint.origin.get("positions", {}).get(part)
    provenance = _provenance(checkpoint, config, "target" if which == "target" else "context", source)
    if which == "target" and tied:
        provenance = replace(provenance, notes=("the target encoder is the context encoder itself",))
    return EncoderWeights(state=state, architecture=architecture, provenance=provenance, positions=positions)


def _provenance(checkpoint: Checkpoint, config: Config, which: Which, source: str) -> Provenance:
    origin = checkpoint.origin
    if "encoder_alone" in origin:  # written by checkpoint_of
        return Provenance(**origin["encoder_alone"])
    per_epoch = steps_per_epoch(config, checkpoint.data)
    released = origin.get("released")
    return Provenance(
        encoder=which,
        source=origin["source"] if released else source,
        step=None if released and not checkpoint.optimizer else checkpoint.step,  # else AdamW's count gives it
        epoch=released["values"].get("epoch") if released else checkpoint.step // per_epoch if per_epoch else None,
        licence=origin.get("licence"),
        config=None if released else checkpoint.config,  # the release's config is an assumption
        mean=config.data.mean,
        std=config.data.std,
        notes=() if released or "source" not in origin else (f"its run began from {origin['source']}",),
    )


def origin_words(checkpoint: Checkpoint) -> str:
    """Return a readable name of the origin of a checkpoint."""
    origin = checkpoint.origin
    if "released" in origin or "encoder_alone" in origin:
        return str(origin["source"])
    return f"a run of jepa_kit that began from {origin['source']}" if "source" in origin else "a run of jepa_kit"


def checkpoint_of(weights: EncoderWeights) -> Checkpoint:
    """Return a checkpoint with one encoder, and without predictor and optimizer.

    Raises:
        CheckpointError: the weights do not state which encoder they are, or have a custom position table, which such a
            checkpoint cannot store.
    """
    held = weights.provenance
    if held.encoder is None:
        raise CheckpointError(
            f"{held.source} does not state which encoder it contains, and this format has both: "
            "encoder='context' puts it there"
        )
    if weights.positions is not None:
        raise CheckpointError(
            f"{held.source} has a position table of its own; this format's positions are the formula's"
        )
    data = {"mean": list(held.mean), "std": list(held.std)}
    config = dict(held.config) if held.config else released_config(weights.architecture, data=data)
    origin = {"source": held.source, "licence": held.licence, "encoder_alone": asdict(held)}
    return Checkpoint(
        step=held.step or 0,
        model={f"{PARTS[held.encoder]}.{name}": value for name, value in weights.state.items()},
        optimizer={},
        config=config,
        versions=versions(),
        data={},
        origin={key: value for key, value in origin.items() if value is not None},
    )


def released_config(shape: Architecture, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved released recipe around an encoder, assumed for weights whose file has no config.

    Args:
        sections: options of ``predictor``, ``data``, ``optim`` and ``train``.
    """
    options = shape.options()
    size = list(options.pop("image_size"))
    raw: dict[str, Any] = {
        **sections,
        "masker": {"name": "multiblock", **RELEASED},
        "encoder": {"name": "vit", **options, "patch_init": "released"},
        "predictor": {"name": "vit", **sections.get("predictor", {})},
        "target": {"name": "representation"},
        "loss": {"name": "smooth_l1"},
        "target_update": {"name": "ema", "momentum": [0.996, 1.0]},
        "data": {"image_size": size, **sections.get("data", {})},
    }
    return config_from_dict(raw, source="the released recipe around the weights").to_dict()
