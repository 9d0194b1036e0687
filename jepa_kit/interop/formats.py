"""Read, write and convert any format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

from jepa_kit.config.shipped import is_reference
from jepa_kit.engine.checkpoint.format import Checkpoint, check_finite
from jepa_kit.errors import CheckpointError
from jepa_kit.files import atomic_write
from jepa_kit.interop import hf, hf_models, native, official, onnx, safetensors, timm
from jepa_kit.interop.files import Format, fetch, recognise
from jepa_kit.interop.reference import read_checkpoint
from jepa_kit.interop.weights import AS_IT_IS, EncoderWeights, Reading, choose

MODULES = dict(zip(get_args(Format), (official, native, hf, timm, safetensors, onnx), strict=True))
"""Each format's module, with ``read`` (except native's) and ``write``."""
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
        held = read_checkpoint(path, allow_unchecked=reading.allow_unchecked)
        check_finite(held.model, str(path))
        moments = {f"{key} of {name}": x for name, state in held.optimizer.items() for key, x in state.items()}
        check_finite(moments, f"the optimiser of {path}")
        return held
    try:
        return MODULES[found].read(path, reading)
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
    **options: Any,
) -> EncoderWeights:
    """Read the weights of one encoder from any format.

    Args:
        path_or_url: see ``fetch``.
        encoder: ``target``, ``context``, or None for any (the target encoder if the file has both). Of a reference run,
            ``target`` is the encoder that was evaluated, which is the context encoder if no target encoder learns.
        sha256: expected checksum of the file.
        options: of ``Reading``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, or does not contain this encoder.
        ValueError: ``encoder`` is none of these.
    """
    reading = Reading(**options)
    path = fetch(path_or_url, sha256)
    if is_reference(path_or_url):
        return encoder_from(read(path, None, reading), None if encoder == "target" else encoder, str(path_or_url))
    return encoder_from(read(path, None, reading), encoder, path.name)


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
    model_type: str | None = None,
) -> str:
    """Write a checkpoint or an encoder, and return a summary of it.

    Args:
        held: what ``read`` returned. A single encoder becomes a checkpoint with that encoder only.
        path: a file, or a folder for hf; must not exist.
        format: format to write.
        encoder: for formats of one encoder, which one; None for the target encoder, or the only one.
        image_size: for onnx, the graph's (h, w).
        model_type: for hf, the model of transformers; None for the first that fits.

    Raises:
        FileExistsError: ``path`` exists.
        CheckpointError: the format cannot represent the weights.
        ValueError: the format does not support an option.
    """
    if image_size is not None and format != "onnx":
        raise ValueError(
            f"image_size (={image_size}) is for onnx, whose graphs have a fixed size; {format} has that of training"
        )
    if model_type is not None and format != "hf":
        raise ValueError(f"model_type (={model_type!r}) is for hf, whose folders are of a model of transformers")
    if path.exists():
        raise FileExistsError(f"{path} already exists")
    if format not in OUR_OWN:
        _check_options(held, format, model_type)
    if format in WHOLE:
        if isinstance(held, Checkpoint) and encoder is not None:
            raise ValueError(f"encoder (={encoder!r}) is for formats of one encoder; {format} keeps all parts")
        whole = held if isinstance(held, Checkpoint) else native.checkpoint_of(choose(held, encoder))
        with _writing(path) as part:
            MODULES[format].write(whole, part)
        return _words(whole)
    weights = encoder_from(held, encoder, "a checkpoint")
    every: dict[str, dict[str, Any]] = {"onnx": {"image_size": image_size}, "hf": {"model_type": model_type}}
    with _writing(path, atomic=format != "onnx") as part:  # onnx.write does it itself
        MODULES[format].write(weights, part, **every.get(format, {}))
    own = image_size in (None, weights.architecture.image_size)
    return weights.words() + ("" if own else f"; positions interpolated to {image_size}")


def _check_options(held: Checkpoint | EncoderWeights, format: str, model_type: str | None) -> None:
    """Raise CheckpointError if the encoder has options that other code does not have."""
    if isinstance(held, Checkpoint):
        shape = native.architecture_of(native.config_of(held.config, "the checkpoint"))
    else:
        shape = held.architecture
    if format == "hf":
        hf_models.model_type_of(shape, model_type)
        return
    for name, value in shape.own.items():
        raise CheckpointError(
            f"encoder.{name} (={value!r}) cannot be stored in {format}: its readers would ignore it; "
            f"{' and '.join(OUR_OWN)} store it"
        )


@contextmanager
def _writing(path: Path, *, atomic: bool = True) -> Iterator[Path]:
    """Yield a temporary name, renamed at the end: a crash or a full disk leaves nothing under the final name."""
    try:
        with atomic_write(path) if atomic else nullcontext(path) as part:
            yield part
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written, and has been removed: {error.strerror}") from error


def _words(checkpoint: Checkpoint) -> str:
    parts = ", ".join(sorted({name.partition(".")[0] for name in checkpoint.model}))
    moments = sum(1 for state in checkpoint.optimizer.values() if state)
    return (
        f"{parts} of {native.origin_words(checkpoint)}; step {checkpoint.step}; "
        f"{f'moments of {moments} parameters' if moments else 'no optimiser'}; "
        f"licence {checkpoint.origin.get('licence', 'not stated')}"
    )


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Format,
    from_: Format | None = None,
    encoder: str | None = None,
    sha256: str | None = None,
    image_size: tuple[int, int] | None = None,
    model_type: str | None = None,
    **options: Any,
) -> str:
    """Convert a file or folder to another format; see ``read`` and ``write``.

    Args:
        options: of ``Reading``.

    Returns:
        a summary of what was written.
    """
    for name, value in (("from", from_), ("to", to)):
        if value is not None and value not in get_args(Format):
            raise ValueError(f"{name} (={value!r}) must be one of {', '.join(get_args(Format))}")
    reading = Reading(**options)
    path = fetch(source, sha256)
    held = read(path, from_, reading)
    if isinstance(held, Checkpoint) and to not in WHOLE:
        held, encoder = encoder_from(held, encoder, path.name), None
    return write(held, Path(target).expanduser(), to, encoder=encoder, image_size=image_size, model_type=model_type)
