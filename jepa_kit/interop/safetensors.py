"""safetensors: one encoder under our names, with its description in the metadata.

The file also contains a fixed position table as ``pos_embed`` [N, D], for readers that do not compute it.
"""

from __future__ import annotations

from pathlib import Path

from jepa_kit.errors import CheckpointError
from jepa_kit.interop.digest import ABOUT
from jepa_kit.interop.files import FORMAT_NAME
from jepa_kit.interop.tensor_files import read_file, write_file
from jepa_kit.interop.weight_checks import checked_weights
from jepa_kit.interop.weights import AS_IT_IS, EncoderWeights, Reading, read_about


def write(weights: EncoderWeights, path: Path) -> None:
    """Write the encoder with its metadata."""
    table = {"pos_embed": weights.table} if weights.architecture.positions == "sincos" else {}
    write_file(path, weights.state | table, {"format_name": FORMAT_NAME, ABOUT: weights.about()})


def read(path: Path, reading: Reading = AS_IT_IS) -> EncoderWeights:
    """Read what ``write`` wrote.

    Raises:
        CheckpointError: the file is damaged or lacks our metadata, or weights do not fit them.
    """
    state, metadata = read_file(path, allow_unchecked=reading.allow_unchecked)
    about = read_about(metadata.get(ABOUT))
    if about is None:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one of jepa_kit: it has no note {ABOUT!r}. "
            "With the names of timm it is read as timm"
        )
    return checked_weights(state, *about, str(path), reading.positions)
