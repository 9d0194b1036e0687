"""Read, write and convert any format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from jepa_kit.engine.checkpoint.format import Checkpoint, check_finite, load_checkpoint
from jepa_kit.errors import CheckpointError
from jepa_kit.files import atomic_write
from jepa_kit.interop import hf, native, official, onnx, safetensors, timm
from jepa_kit.interop.files import Format, fetch, recognise
from jepa_kit.interop.weights import AS_IT_IS, EncoderWeights, Positions, Reading, choose

WHOLE = ("official", "jepa_kit")
"""Formats of a whole run; the others contain one encoder."""
OUR_OWN = ("jepa_kit", "safetensors")
"""Formats with jepa_kit's own metadata, which can store features that only jepa_kit has."""


def read(path: Path, format: Format | None = None, reading: Reading = AS_IT_IS) -> Checkpoint | EncoderWeights:
    """Read a file or folder without running or importing code from it.

    Args:
        path: file or folder.
        format: the required format; None for the detected one.
        reading: options.

    Returns:
        a Checkpoint for official and jepa_kit, EncoderWeights for the others.

    Raises:
        CheckpointError: it has another format, or cannot be read.
    """
    found = recognise(path, allow_unchecked=reading.allow_unchecked)
    if format is not None and found != format:
        raise CheckpointError(f"{path} is not in the format {format!r}: by its content it is {found!r}")
    if found == "jepa_kit":
        held = load_checkpoint(path)
        check_checkpoint(held, str(path))
        return held
    readers = {"official": official, "hf": hf, "timm": timm, "safetensors": safetensors, "onnx": onnx}
    try:
        return readers[found].read(path, reading)
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        # e.g. a value of an unexpected type
        kind = type(error).__name__
        raise CheckpointError(f"{path} is damaged, or not a valid {found!r} file: {kind}: {error}") from error


def read_encoder(
    path_or_url: str | os.PathLike[str],
    encoder: str | None = "target",
    *,
    sha256: str | None = None,
    num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    positions: Positions = "formula",
    prefix: str | None = None,
    allow_unchecked: bool = False,
) -> EncoderWeights:
    """Read the weights of one encoder from any format.

    Args:
        path_or_url: see ``fetch``.
        encoder: ``target``, ``context``, or None for any (the target encoder if the file has both).
        sha256: expected checksum of the file.
        (others): see ``Reading``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, or does not contain this encoder.
        ValueError: ``encoder`` is none of these.
    """
    reading = Reading(
        num_heads=num_heads,
        image_size=image_size,
        positions=positions,
        prefix=prefix,
        allow_unchecked=allow_unchecked,
    )
    path = fetch(path_or_url, sha256)
    held = read(path, None, reading)
    return encoder_from(held, encoder, path.name)


def check_checkpoint(held: Checkpoint, what: str) -> None:
    """Raise CheckpointError if weights or moments are not finite."""
    check_finite(held.model, what)
    moments = {f"{key} of {name}": x for name, state in held.optimizer.items() for key, x in state.items()}
    check_finite(moments, f"the optimiser of {what}")


def encoder_from(held: Checkpoint | EncoderWeights, encoder: str | None, source: str) -> EncoderWeights:
    """Return one encoder of what ``read`` returned."""
    if isinstance(held, Checkpoint):
        return native.encoder_of(held, encoder, f"{source} (jepa_kit)")
    return choose(held, encoder)


def write(
    held: Checkpoint | EncoderWeights,
    path: Path,
    format: Format,
    *,
    encoder: str | None = None,
    image_size: tuple[int, int] | None = None,
) -> str:
    """Write a checkpoint or an encoder, and return a summary of it.

    Args:
        held: what ``read`` returned. A single encoder becomes a checkpoint with that encoder only.
        path: a file, or a folder for hf; must not exist.
        format: format to write.
        encoder: for formats of one encoder, which one; None for the target encoder, or the only one.
        image_size: for onnx, the graph's (h, w).

    Raises:
        FileExistsError: ``path`` exists.
        CheckpointError: the format cannot represent the weights.
        ValueError: the format does not support an option.
    """
    if image_size is not None and format != "onnx":
        raise ValueError(
            f"image_size (={image_size}) is for onnx, whose graphs have a fixed size; {format} has that of training"
        )
    if path.exists():
        raise FileExistsError(f"{path} already exists")
    if format not in OUR_OWN:
        _check_input_norm(held, format)
    if format in WHOLE:
        if isinstance(held, Checkpoint) and encoder is not None:
            raise ValueError(f"encoder (={encoder!r}) is for formats of one encoder; {format} keeps all parts")
        whole = held if isinstance(held, Checkpoint) else native.checkpoint_of(choose(held, encoder))
        _in_one_piece(path, lambda at: (official if format == "official" else native).write(whole, at))
        return _words(whole)
    weights = encoder_from(held, encoder, "a checkpoint")
    if format == "onnx":
        try:
            onnx.write(weights, path, image_size=image_size)
        except FileExistsError:
            raise
        except OSError as error:
            raise _not_written(path, error) from error
        note = (
            "" if image_size in (None, weights.architecture.image_size) else f"; positions interpolated to {image_size}"
        )
        return weights.words() + note
    writers = {"hf": hf.write, "timm": timm.write, "safetensors": safetensors.write}
    _in_one_piece(path, lambda at: writers[format](weights, at))
    return weights.words()


def _check_input_norm(held: Checkpoint | EncoderWeights, format: str) -> None:
    """Raise CheckpointError if the encoder normalises its images, which other code does not do."""
    if isinstance(held, Checkpoint):
        shape = native.architecture_of(native.config_of(held, "the checkpoint"))
    else:
        shape = held.architecture
    if shape.input_norm != "none":
        raise CheckpointError(
            f"encoder.input_norm (={shape.input_norm!r}) cannot be stored in {format}: its readers would not normalise "
            f"images; {' and '.join(OUR_OWN)} store it"
        )


def _not_written(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"{path} could not be written, and has been removed: {error.strerror}")


def _in_one_piece(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name, then rename: a crash or a full disk leaves nothing under the final name."""
    try:
        with atomic_write(path) as part:
            write(part)
    except OSError as error:
        raise _not_written(path, error) from error


def _words(checkpoint: Checkpoint) -> str:
    parts = sorted({name.partition(".")[0] for name in checkpoint.model})
    words = [f"{', '.join(parts)} of {native.origin_words(checkpoint)}", f"step {checkpoint.step}"]
    moments = sum(1 for state in checkpoint.optimizer.values() if state)
    words.append(f"moments of {moments} parameters" if moments else "no optimiser")
    return "; ".join([*words, f"licence {checkpoint.origin.get('licence', 'not stated')}"])


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Format,
    from_: Format | None = None,
    encoder: str | None = None,
    sha256: str | None = None,
    num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    positions: Positions = "formula",
    prefix: str | None = None,
    allow_unchecked: bool = False,
) -> str:
    """Convert a file or folder to another format; see ``read``, ``Reading`` and ``write``.

    Returns:
        a summary of what was written.
    """
    for name, value in (("from", from_), ("to", to)):
        if value is not None and value not in get_args(Format):
            raise ValueError(f"{name} (={value!r}) must be one of {', '.join(get_args(Format))}")
    reading = Reading(num_heads=num_heads, positions=positions, prefix=prefix, allow_unchecked=allow_unchecked)
    path = fetch(source, sha256)
    held = read(path, from_, reading)
    if isinstance(held, Checkpoint) and to not in WHOLE:
        held, encoder = encoder_from(held, encoder, path.name), None
    return write(held, Path(target).expanduser(), to, encoder=encoder, image_size=image_size)
