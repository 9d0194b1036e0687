"""Checksums of weights, stored by our writers and verified by readers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from jepa_kit.errors import CheckpointError

ABOUT = "jepa_kit"
"""Metadata key of the note, ``EncoderWeights.about``, in every format."""
SEALED = "sealed"
"""Key of the note that is set if the file has a digest."""
DIGEST = "jepa_kit.sha256"
"""Metadata key of the digest. The note (``ABOUT``) also states that there is one, so damage to this key is detected."""

UNCHECKED_HINT = "allow_unchecked=True (--allow-unchecked) loads it anyway"


def raw(value: Tensor) -> memoryview:
    """Return the bytes of a tensor, row-major, without a copy if it is contiguous."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 in hex of all tensors (name, type, shape, bytes) and all metadata except the digest itself."""
    found = hashlib.sha256(json.dumps({k: v for k, v in metadata.items() if k != DIGEST}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(raw(value))
    return found.hexdigest()


def is_sealed(text: str | None) -> bool:
    """Whether a note states that its file has a digest; False for a damaged note."""
    try:
        held = json.loads(text or "null")
    except (ValueError, RecursionError):
        return False
    return isinstance(held, dict) and SEALED in held


def check_digest(
    metadata: Mapping[str, str], digest_of: Callable[[], str], what: str, *, allow_unchecked: bool
) -> None:
    """Compare the digest in a file's metadata, if there is one, with that of its contents.

    Args:
        metadata: of the file.
        digest_of: returns the digest of the contents.
        what: name of the file in messages.
        allow_unchecked: whether to accept a file that fails.

    Raises:
        CheckpointError: the digests differ, or there is none though the file's note states one.
    """
    stored = metadata.get(DIGEST)
    if allow_unchecked or (stored is None and not is_sealed(metadata.get(ABOUT))):
        return
    if stored is None:
        raise CheckpointError(f"{what} is damaged: its checksum ({DIGEST}) is missing; {UNCHECKED_HINT}")
    if stored != (found := digest_of()):
        raise CheckpointError(
            f"{what} is damaged, or was changed after jepa_kit wrote it: its SHA-256 is {found[:16]}..., "
            f"not {stored[:16]}...; {UNCHECKED_HINT}"
        )
