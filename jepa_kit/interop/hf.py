"""Hugging Face: folders that ``transformers.IJepaModel.from_pretrained`` loads, with config and preprocessor.

transformers stores q, k and v separately, and a position table [1, N, D]. Names of weights in files have not changed
since its first I-JEPA (``encoder.layer.0...``); version 5 has other names in memory (``layers.0...``); both are read.
Its models of the release (``facebook/ijepa_*``) are the context encoder, with a preprocessor that normalises with 0.5,
while the release trained with ImageNet's mean and standard deviation.
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
from jepa_kit.interop.names import strip_names
from jepa_kit.interop.safetensors import read_file, write_file
from jepa_kit.interop.weight_checks import checked_weights
from jepa_kit.interop.weights import AS_IT_IS, Architecture, EncoderWeights, Provenance, Reading, read_about

TABLE = "embeddings.position_embeddings"
ENDS = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
"""Their names -> ours, outside of the blocks."""

BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
"""Their names in files -> ours, in a block, except for q, k and v."""

IN_MEMORY = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
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
"""Fields of ``Architecture`` -> their names in ``IJepaConfig``, and its defaults, which older files omit."""

CARD = """---
{license}library_name: transformers
pipeline_tag: image-feature-extraction
---

# I-JEPA encoder

{words}

Written by jepa_kit; `transformers.IJepaModel.from_pretrained` loads this folder.
"""

QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
HEADS = ("classifier.", "pooler.", "embeddings.mask_token")
FILES = "jepa_kit.files"
"""Metadata key of the weights: SHA-256 of the other files of the folder, by name."""


def write(weights: EncoderWeights, folder: Path) -> None:
    """Write config, weights, preprocessor and a model card."""
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
    config = {**to_config(weights.architecture), ABOUT: about}
    beside = {"config.json": config, "preprocessor_config.json": preprocessor}
    for name, held in beside.items():
        (folder / name).write_text(json.dumps(held, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    digests = json.dumps({name: sha256_of(folder / name) for name in beside}, sort_keys=True)
    metadata = {"format": "pt", ABOUT: weights.about(), FILES: digests}
    write_file(folder / "model.safetensors", to_names(weights), metadata)
    licence = weights.provenance.licence
    license = f"license: {licence.lower()}\n" if licence and " " not in licence else ""
    (folder / "README.md").write_text(CARD.format(license=license, words=weights.words()), encoding="utf-8")


def to_config(shape: Architecture) -> dict[str, Any]:
    """Return the arguments of ``IJepaConfig``."""
    h, w = shape.image_size
    return {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": h if h == w else [h, w],
        **{theirs: getattr(shape, ours) for ours, (theirs, _) in OPTIONS.items()},
    }


def to_names(weights: EncoderWeights) -> dict[str, Tensor]:
    """Return the weights under transformers' names in files; q, k and v are views."""
    out = {TABLE: weights.table[None]}
    ends, inside = ({ours: theirs for theirs, ours in names.items()} for names in (ENDS, BLOCK))
    for name, value in weights.state.items():
        stem, _, kind = name.rpartition(".")
        if not stem.startswith("blocks."):
            out[f"{ends[stem]}.{kind}"] = value
            continue
        _, number, part = stem.split(".", 2)
        at = f"encoder.layer.{number}"
        if part == "attn.qkv":
            out.update({f"{at}.{to}.{kind}": x for to, x in zip(QKV, value.chunk(3), strict=True)})
        else:
            out[f"{at}.{inside[part]}.{kind}"] = value
    return out


def from_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under our names; unknown names are unchanged."""
    ends, out = ENDS, {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        match = re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)", stem)
        inner = IN_MEMORY.get(match[2], match[2]) if match else ""
        if match and inner in QKV:
            parts.setdefault(f"blocks.{match[1]}.attn.qkv.{kind}", {})[inner] = value
        elif match and inner in BLOCK:
            out[f"blocks.{match[1]}.{BLOCK[inner]}.{kind}"] = value
        else:
            out[f"{ends[stem]}.{kind}" if stem in ends else name] = value
    for name, found in parts.items():
        if set(found) == set(QKV):
            out[name] = torch.cat([found[part] for part in QKV])
        else:
            out.update({f"{name} ({part})": value for part, value in found.items()})
    return out


def read(folder: Path, reading: Reading = AS_IT_IS) -> EncoderWeights:
    """Read a folder of transformers.

    Raises:
        CheckpointError: the architecture is another, files are missing, or weights do not fit the config.
    """
    config = read_json(folder / "config.json")
    architecture = _architecture(config, folder)
    state, left_out = strip_names(_open(folder, reading), str(folder), reading.prefix, HEADS)
    provenance, positions = _provenance(config, folder), reading.positions
    return checked_weights(
        from_names(state), architecture, provenance, str(folder), positions, table=TABLE, left_out=left_out
    )


def _architecture(config: dict[str, Any], folder: Path) -> Architecture:
    if config.get("model_type") != "ijepa":
        raise CheckpointError(f"{folder}: model_type (={config.get('model_type')!r}) must be 'ijepa'")
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{folder}: hidden_act (={config['hidden_act']!r}) must be 'gelu'")
    patch, image = config.get("patch_size"), config.get("image_size", 224)
    if isinstance(patch, list) and len(set(patch)) == 1:
        config = {**config, "patch_size": patch[0]}
    try:
        options = {ours: type(default)(config.get(theirs, default)) for ours, (theirs, default) in OPTIONS.items()}
        size = (image, image) if isinstance(image, int) else (int(image[0]), int(image[1]))
        return Architecture(image_size=size, **options)
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
