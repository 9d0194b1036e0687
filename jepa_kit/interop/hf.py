"""Hugging Face: folders that transformers' ``from_pretrained`` loads, with config and preprocessor (hf_models.py).

transformers stores q, k and v separately, and a position table [1, N, D], or [1, 1 + N, D] with a class token. Names of
weights in files have not changed since the first of these models (``encoder.layer.0...``); version 5 has other names in
memory (``layers.0...``); both are read. Its I-JEPA models (``facebook/ijepa_*``) are the release's context encoders,
with a preprocessor that normalises with 0.5, while the release trained with ImageNet's mean and standard deviation.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_kit.config import DataConfig
from jepa_kit.errors import CheckpointError
from jepa_kit.files import sha256_of
from jepa_kit.interop.digest import ABOUT, DIGEST, check_digest
from jepa_kit.interop.files import open_archive, read_json
from jepa_kit.interop.hf_models import MODELS, from_options, model_type_of, to_options
from jepa_kit.interop.names import strip_names
from jepa_kit.interop.tensor_files import read_file, write_file
from jepa_kit.interop.weight_checks import checked_weights
from jepa_kit.interop.weights import AS_IT_IS, Architecture, EncoderWeights, Provenance, Reading, read_about

TABLE = "embeddings.position_embeddings"
ENDS = {
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "encoder.relative_position_bias.relative_position_bias_table": "relative.tables.0",
}
"""Their names in files -> ours, outside of the blocks."""

BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
"""Their names of modules in files -> ours, in a block, except for q, k and v."""

SCALES = {"lambda_1": "scale1", "lambda_2": "scale2"}
"""Their names of parameters -> ours, in a block."""

BIAS = "attention.attention.relative_position_bias.relative_position_bias_table"
"""Their name of a block's own table of relative biases."""

IN_MEMORY = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "relative_position_bias.relative_position_bias_table": BIAS,
}
"""Their names in memory since transformers 5 -> their names in files."""

OPTIONS: dict[str, tuple[str, Any]] = {
    "patch_size": ("patch_size", 16),
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "mlp_hidden": ("intermediate_size", 3072),
    "in_chans": ("num_channels", 3),
    "qkv_bias": ("qkv_bias", True),
    "norm_eps": ("layer_norm_eps", 1e-12),
}
"""Fields of ``Architecture`` -> their names in all configs, and the defaults, which older files omit."""

CARD = """---
{license}library_name: transformers
pipeline_tag: image-feature-extraction
---

# Encoder

{words}

Written by jepa_kit; `transformers.{model}.from_pretrained` loads this folder.
"""

SHARED = {
    "shared_position_bias.relative_position_bias_table": ("encoder.relative_position_bias.relative_position_bias_table")
}
"""Names in memory since transformers 5 -> names in files, outside of the blocks."""

QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
HEADS = ("classifier.", "pooler.", "decoder.", "lm_head.")
"""Beginnings of names of layers after the encoder."""
TOKENS = "embeddings.mask_token"
"""Left out of models in which only pretraining uses it."""
FILES = "jepa_kit.files"
"""Metadata key of the weights: SHA-256 of the other files of the folder, by name."""


def write(weights: EncoderWeights, folder: Path, model_type: str | None = None) -> None:
    """Write config, weights, preprocessor and a model card.

    Args:
        model_type: of transformers; None for the first that fits (``hf_models.MODELS``).
    """
    model_type = model_type_of(weights.architecture, model_type)
    folder.mkdir(parents=True, exist_ok=True)
    # transformers copies the note into files that it saves without a digest, so it does not state that there is one
    about = json.loads(weights.about(sealed=False))
    h, w = weights.architecture.image_size
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": h, "width": w},
        "resample": 2,  # bilinear, as in training
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(weights.provenance.mean),
        "image_std": list(weights.provenance.std),
    }
    config = {**to_config(weights.architecture, model_type), ABOUT: about}
    beside = {"config.json": config, "preprocessor_config.json": preprocessor}
    for name, held in beside.items():
        (folder / name).write_text(json.dumps(held, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    digests = json.dumps({name: sha256_of(folder / name) for name in beside}, sort_keys=True)
    metadata = {"format": "pt", ABOUT: weights.about(), FILES: digests}
    write_file(folder / "model.safetensors", to_names(weights, model_type), metadata)
    licence = weights.provenance.licence
    license = f"license: {licence.lower()}\n" if licence and " " not in licence else ""
    card = CARD.format(license=license, words=weights.words(), model=MODELS[model_type].name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def to_config(shape: Architecture, model_type: str = "ijepa") -> dict[str, Any]:
    """Return the arguments of the model's config."""
    h, w = shape.image_size
    return {
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": h if h == w else [h, w],
        **{theirs: getattr(shape, ours) for ours, (theirs, _) in OPTIONS.items()},
        **to_options(shape, model_type),
    }


def to_names(weights: EncoderWeights, model_type: str = "ijepa") -> dict[str, Tensor]:
    """Return the weights under transformers' names in files; q, k and v are views."""
    shape, out = weights.architecture, {}
    ends, inside = ({ours: theirs for theirs, ours in names.items()} for names in (ENDS, BLOCK))
    scales = {ours: theirs for theirs, ours in SCALES.items()}
    if shape.positions == "sincos":
        first = weights.table.new_zeros(int(shape.class_token), shape.embed_dim)
        out[TABLE] = torch.cat([first, weights.table])[None]
    for name, value in weights.state.items():
        stem, _, kind = name.rpartition(".")
        if name == "pos_embed":
            out[TABLE] = value[None]
        elif name == "mask_token" and "mask_token" in MODELS[model_type].drops:
            continue
        elif name in ("cls_token", "mask_token"):
            out[ends[name]] = value[None]
        elif stem == "relative.tables" and shape.relative_bias == "per_block":
            out[f"encoder.layer.{kind}.{BIAS}"] = value
        elif not stem.startswith("blocks."):
            out[ends[name]] = value
        elif kind in scales:
            out[f"encoder.layer.{stem.split('.')[1]}.{scales[kind]}"] = value
        else:
            _, number, part = stem.split(".", 2)
            at = f"encoder.layer.{number}"
            if part == "attn.qkv":
                out.update({f"{at}.{to}.{kind}": x for to, x in zip(QKV, value.chunk(3), strict=True)})
                if kind == "bias" and not MODELS[model_type].key_bias:
                    del out[f"{at}.{QKV[1]}.{kind}"]
            else:
                out[f"{at}.{inside[part]}.{kind}"] = value
    return out


def from_names(state: dict[str, Tensor], *, key_bias: bool = True) -> dict[str, Tensor]:
    """Return the weights under our names; unknown names are unchanged.

    Args:
        key_bias: whether the model has a bias of keys; without one, ours is 0, which gives the same features.
    """
    out: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        name = SHARED.get(name, name)
        kind = name.rpartition(".")[2]
        match = re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)", name)
        inside = match[2] if match else ""
        inner = IN_MEMORY.get(inside.rpartition(".")[0], inside.rpartition(".")[0])
        if name == TABLE:
            out["pos_embed"] = value
        elif name in ("embeddings.cls_token", "embeddings.mask_token") and value.ndim == 3:
            out[ENDS[name]] = value[0]
        elif match and inside in SCALES:
            out[f"blocks.{match[1]}.{SCALES[inside]}"] = value
        elif match and IN_MEMORY.get(inside, inside) == BIAS:
            out[f"relative.tables.{match[1]}"] = value
        elif match and inner in QKV:
            parts.setdefault(f"blocks.{match[1]}.attn.qkv.{kind}", {})[inner] = value
        elif match and inner in BLOCK:
            out[f"blocks.{match[1]}.{BLOCK[inner]}.{kind}"] = value
        else:
            out[ENDS.get(name, name)] = value
    for name, found in parts.items():
        if name.endswith("bias") and not key_bias and set(found) == {QKV[0], QKV[2]}:
            found[QKV[1]] = torch.zeros_like(found[QKV[0]])
        if set(found) == set(QKV):
            out[name] = torch.cat([found[part] for part in QKV])
        else:
            out.update({f"{name} ({part})": x for part, x in found.items()})
    return out


def read(folder: Path, reading: Reading = AS_IT_IS) -> EncoderWeights:
    """Read a folder of transformers.

    Raises:
        CheckpointError: the architecture is another, files are missing, or weights do not fit the config.
    """
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type not in MODELS:
        raise CheckpointError(f"{folder}: model_type (={model_type!r}) must be one of {', '.join(MODELS)}")
    unused = (TOKENS,) if MODELS[model_type].key_bias else ()
    tokens = model_type != "ijepa"
    named, left_out = strip_names(_open(folder, reading), str(folder), reading.prefix, (*HEADS, *unused), tokens=tokens)
    state = from_names(named, key_bias=MODELS[model_type].key_bias)
    architecture = _architecture(config, set(state), folder)
    if "pos_embed" in state and architecture.positions == "learned":
        state["pos_embed"] = state["pos_embed"].squeeze(0)
    elif "pos_embed" in state:
        table = state.pop("pos_embed")
        state[TABLE] = _without_class(table, folder) if architecture.class_token else table
    provenance, positions = _provenance(config, folder), reading.positions
    return checked_weights(state, architecture, provenance, str(folder), positions, table=TABLE, left_out=left_out)


def _without_class(table: Tensor, folder: Path) -> Tensor:
    """Return a table [1, 1 + N, D] without the class token's position, which must be 0."""
    if table.ndim != 3 or bool(table[:, :1].any()):
        raise CheckpointError(
            f"{folder}: {TABLE} {tuple(table.shape)} must be [1, 1 + N, D], with zeros for the class token"
        )
    return table[:, 1:]


def _architecture(config: dict[str, Any], names: set[str], folder: Path) -> Architecture:
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{folder}: hidden_act (={config['hidden_act']!r}) must be 'gelu'")
    patch, image = config.get("patch_size"), config.get("image_size", 224)
    if isinstance(patch, list) and len(set(patch)) == 1:
        config = {**config, "patch_size": patch[0]}
    try:
        options = {ours: type(default)(config.get(theirs, default)) for ours, (theirs, default) in OPTIONS.items()}
        size = (image, image) if isinstance(image, int) else (int(image[0]), int(image[1]))
        return Architecture(image_size=size, **options, **from_options(config, names))
    except CheckpointError:
        raise
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{folder}: config.json has a size that is no number: {error}") from error


def _open(folder: Path, reading: Reading) -> dict[str, Tensor]:
    """Return all weights of a folder: one file, several with an index, or an old ``pytorch_model.bin``."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise CheckpointError(f"{index} must have a weight_map of names to files")
        names = sorted(set(listed.values()))
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif (folder / "pytorch_model.bin").is_file():
        return open_archive(folder / "pytorch_model.bin", allow_unchecked=reading.allow_unchecked)
    else:
        raise CheckpointError(f"the folder {folder} has a config.json, but no model.safetensors")
    state: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name!r}, which is not in the folder")
        tensors, metadata = read_file(folder / name, allow_unchecked=reading.allow_unchecked)
        state |= tensors
        for other, stored in json.loads(metadata.get(FILES, "{}")).items():
            file = folder / other
            check_digest({DIGEST: stored}, partial(_checksum, file), str(file), allow_unchecked=reading.allow_unchecked)
    return state


def _checksum(file: Path) -> str:
    return sha256_of(file) if file.is_file() else "no file"


def _provenance(config: dict[str, Any], folder: Path) -> Provenance:
    """Return the provenance in our note, or else the card's licence and the preprocessor's mean and deviation."""
    about = read_about(json.dumps(config[ABOUT]) if ABOUT in config else None)
    if about is not None:
        return about[1]
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    licence = re.search(r"^license:\s*['\"]?([\w.+-]+)", text, re.MULTILINE)
    provenance = Provenance(
        encoder=None, source=f"{folder.name} (Hugging Face)", licence=licence[1] if licence else None
    )
    processor = folder / "preprocessor_config.json"
    held = read_json(processor) if processor.is_file() else {}
    if "image_mean" not in held or "image_std" not in held:
        return provenance
    mean, std = tuple(held["image_mean"]), tuple(held["image_std"])
    note = f"its preprocessor normalises with mean {mean}; the release trained with ImageNet's"
    return replace(provenance, mean=mean, std=std, notes=() if mean == DataConfig.mean else (note,))
