"""timm's names of I-JEPA's ViTs: the same as ours, plus the position table as ``pos_embed`` [1, N, D].

timm's models are ``vit_huge_patch14_gap_224``, ``vit_huge_patch16_gap_448`` and ``vit_giant_patch16_gap_224``, its
VisionTransformer with ``class_token=False, global_pool="avg", fc_norm=False``: the final norm comes before
the mean and is called ``norm``. Their weights are the ``encoder`` of the released files: the context encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from jepa_kit.errors import CheckpointError
from jepa_kit.interop.digest import ABOUT
from jepa_kit.interop.files import open_archive, read_json
from jepa_kit.interop.names import strip_names
from jepa_kit.interop.tensor_files import read_file, write_file
from jepa_kit.interop.weight_checks import checked_weights, shapes_to_architecture
from jepa_kit.interop.weights import AS_IT_IS, EncoderWeights, Provenance, Reading, read_about

WRAPPERS = ("state_dict", "model")
HEADS = ("head.",)


def write(weights: EncoderWeights, path: Path) -> None:
    """Write a safetensors file for ``timm.create_model(..., checkpoint_path=path)``."""
    tensors = {"pos_embed": weights.table[None], **weights.state}
    write_file(path, tensors, {"format": "pt", ABOUT: weights.about()})


def read(path: Path, reading: Reading = AS_IT_IS) -> EncoderWeights:
    """Read a state dict with timm's names: safetensors, a torch archive, or timm's folder of the Hub.

    Raises:
        CheckpointError: it cannot be read, or is not a ViT like I-JEPA's.
    """
    known: dict[str, Any] = {}
    file = path
    if path.is_dir():
        known = read_json(path / "config.json").get("pretrained_cfg", {})
        file = path / "model.safetensors"
        if not file.is_file():
            raise CheckpointError(f"the folder {path} has timm's config.json, but no model.safetensors")
    state, note, left_out = _open(file, reading)
    about = read_about(note)
    if about is None:
        table, heads, size = state.get("pos_embed"), reading.num_heads, reading.image_size
        architecture = shapes_to_architecture(state, str(path), table=table, num_heads=heads, image_size=size)
        provenance = Provenance(encoder=None, source=f"{path.name} (timm)", licence=known.get("license"))
        if "mean" in known and "std" in known:
            provenance = replace(provenance, mean=tuple(known["mean"]), std=tuple(known["std"]))
        about = architecture, provenance
    return checked_weights(state, *about, str(path), reading.positions, needed=False, left_out=left_out)


def _open(path: Path, reading: Reading) -> tuple[dict[str, Tensor], str | None, list[str]]:
    """Return the state dict of a file without wrappers in names, jepa_kit's note in it, and the omitted names."""
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if not is_archive:
        tensors, metadata = read_file(path, allow_unchecked=reading.allow_unchecked)
        state, left_out = strip_names(tensors, str(path), reading.prefix, HEADS)
        return state, metadata.get(ABOUT), left_out
    held: Mapping[str, Any] = open_archive(path, allow_unchecked=reading.allow_unchecked)
    prefix = reading.prefix
    for key in WRAPPERS:
        if isinstance(held.get(key), dict):
            held = held[key]
    first, _, rest = (prefix or "").partition(".")
    if isinstance(held.get(first), dict):  # such as DINO's {"teacher": {...}, "student": {...}}
        held, prefix = held[first], rest or None
    others = [name for name, value in held.items() if not isinstance(value, Tensor)]
    if others or not held:
        some = ", ".join(map(str, list(held)[:8])) or "nothing"
        raise CheckpointError(f"{path} is not a checkpoint of any known layout: it contains {some}")
    state, left_out = strip_names(held, str(path), prefix, HEADS)
    return state, None, left_out
