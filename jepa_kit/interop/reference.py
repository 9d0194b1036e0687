"""Weights of a whole recipe as one safetensors file, in float16 and without the optimiser: those of reference runs.

Tensors have the names of ``Recipe.state_dict()``, and the metadata has the other fields of a checkpoint. A file may
also contain one encoder alone: ``load_encoder`` reads it, and what needs the whole recipe reports what is missing.
"""

from __future__ import annotations

import json
from pathlib import Path

from jepa_kit.engine.checkpoint.files import FORMAT
from jepa_kit.engine.checkpoint.format import Checkpoint, as_checkpoint, check_finite, load_checkpoint
from jepa_kit.errors import CheckpointError
from jepa_kit.interop.digest import ABOUT, SEALED
from jepa_kit.interop.tensor_files import read_file, write_file

FIELDS = ("step", "config", "versions", "data", "origin")
"""Fields of a checkpoint in the metadata."""


def write_weights(checkpoint: Checkpoint, path: Path) -> None:
    """Write the weights of a checkpoint, in float16, and what its config and data are.

    Raises:
        CheckpointError: a weight is too large for float16.
    """
    state = {name: value.half() if value.is_floating_point() else value for name, value in checkpoint.model.items()}
    check_finite(state, f"{path} in float16")
    about = {name: getattr(checkpoint, name) for name in FIELDS}
    metadata = {"format_name": FORMAT, ABOUT: json.dumps({**about, SEALED: True}, sort_keys=True)}
    write_file(path, {name: state[name] for name in sorted(state)}, metadata)


def read_checkpoint(path: Path, *, allow_unchecked: bool = False) -> Checkpoint:
    """Return a checkpoint of jepa_kit, or what ``write_weights`` wrote, in float32.

    Args:
        path: a file or folder of ``load_checkpoint``, or a safetensors file.
        allow_unchecked: read a safetensors file whose checksum is missing or wrong.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is neither, or damaged.
    """
    if not _is_safetensors(path):
        return load_checkpoint(path)
    state, metadata = read_file(path, allow_unchecked=allow_unchecked)
    if metadata.get("format_name") != FORMAT:
        raise CheckpointError(f"{path} has no recipe, only weights of one encoder: jepa_kit.load_encoder reads those")
    try:
        about = dict(json.loads(metadata[ABOUT]))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the note {ABOUT!r} of {path} is damaged: {error}") from error
    wide = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    return as_checkpoint({**about, "model": wide, "optimizer": {}}, path)


def _is_safetensors(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"  # after the length of the header, which is JSON
