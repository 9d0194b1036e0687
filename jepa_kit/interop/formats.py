"""Any format in, any format out: ``read``, ``read_encoder``, ``write``, and ``convert`` from file to file."""

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
"""Formats of a whole run; the others hold one encoder."""
OUR_OWN = ("jepa_kit", "safetensors")
"""Formats with a note of ours that every reader of theirs needs; what only jepa_kit does may go into these."""


def read(path: Path, format: Format | None = None, reading: Reading = AS_IT_IS) -> Checkpoint | EncoderWeights:
    """What a file or folder holds. Nothing in it is executed or imported.

    Args:
        path: of it.
        format: what it must be; None for whatever its content says.
        reading: options.

    Returns:
        a Checkpoint from official and jepa_kit, EncoderWeights from the others.

    Raises:
        CheckpointError: it is another format, or cannot be read.
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
        # a value of another type than the format has there
        kind = type(error).__name__
        raise CheckpointError(f"{path} is damaged, or not as {found!r} files are: {kind}: {error}") from error


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
    """The weights of one encoder, from any format.

    Args:
        path_or_url: see ``fetch``.
        encoder: ``target``, ``context``, or None for what the file holds (the target encoder where it has both).
        sha256: of the file.
        (others): see ``Reading``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, or does not hold this encoder.
        ValueError: another word for ``encoder``.
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
    """Raise CheckpointError for weights or moments that are not finite."""
    check_finite(held.model, what)
    moments = {f"{key} of {name}": x for name, state in held.optimizer.items() for key, x in state.items()}
    check_finite(moments, f"the optimiser of {what}")


def encoder_from(held: Checkpoint | EncoderWeights, encoder: str | None, source: str) -> EncoderWeights:
    """One encoder of what ``read`` gave."""
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
    """Writes it in a format; says in words what was written.

    Args:
        held: what ``read`` gave. An encoder alone becomes a checkpoint with that encoder alone.
        path: of a file, for hf of a folder; nothing may be there.
        format: to write.
        encoder: which, for formats of one encoder; None for the target encoder, or what there is.
        image_size: for onnx, (h, w) that the graph takes.

    Raises:
        FileExistsError: something is there.
        CheckpointError: what the format has no place for.
        ValueError: options that the format does not take.
    """
    if image_size is not None and format != "onnx":
        raise ValueError(
            f"image_size (={image_size}) is for onnx, whose graphs have one size; {format} keeps the trained"
        )
    if path.exists():
        raise FileExistsError(f"{path} is there already")
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
    """Raises CheckpointError for an encoder that prepares its images, which other code would not do."""
    if isinstance(held, Checkpoint):
        shape = native.architecture_of(native.config_of(held, "the checkpoint"))
    else:
        shape = held.architecture
    if shape.input_norm != "none":
        raise CheckpointError(
            f"encoder.input_norm (={shape.input_norm!r}) has no place in {format}: who loads it would give the encoder "
            f"images as they are; {' and '.join(OUR_OWN)} keep it"
        )


def _not_written(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"{path} could not be written, and nothing is left of it: {error.strerror}")


def _in_one_piece(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside, then rename: a crash or a full disk leaves nothing under the name."""
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
    """From one file or folder to another; see ``read``, ``Reading`` and ``write``.

    Returns:
        what was written, in words.
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
