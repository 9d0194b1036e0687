"""Standard sizes of ViTs, and the numbers of an encoder's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Size = Literal["tiny", "small", "base", "large", "huge", "giant", "gigantic"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a ViT; mlp_ratio is the hidden width of the MLP over embed_dim."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


SIZES: dict[str, Shape] = {
    "tiny": Shape(192, 12, 3),  # DeiT, Touvron et al. 2021, table 1
    "small": Shape(384, 12, 6),  # DeiT, table 1
    "base": Shape(768, 12, 12),  # ViT, Dosovitskiy et al. 2021, table 1
    "large": Shape(1024, 24, 16),  # ViT, table 1
    "huge": Shape(1280, 32, 16),  # ViT, table 1
    "giant": Shape(1408, 40, 16, 48 / 11),  # ViT-g, Zhai et al. 2022, table 2: MLP 6144
    "gigantic": Shape(1664, 48, 16, 64 / 13),  # ViT-G, Zhai et al. 2022, table 2: MLP 8192
}


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raise ValueError unless ``layers`` of ``forward_layers`` are layers of an encoder of this depth."""
    if not layers or not all(0 <= number <= depth for number in layers):
        raise ValueError(
            f"layers (={tuple(layers)}) must be numbers of blocks, from 1 to the encoder's depth (={depth}), or 0 for "
            "the input of the first"
        )


def shape_of(size: str | None, **values: Any) -> Shape:
    """Return the shape of a size, with those of its fields replaced whose value is not None."""
    given = {name: value for name, value in values.items() if value is not None}
    if size is not None and size not in SIZES:
        raise ValueError(f"size (={size!r}) must be one of {', '.join(SIZES)}")
    if size is not None:
        return replace(SIZES[size], **given)
    missing = [name for name in ("embed_dim", "depth", "num_heads") if name not in given]
    if missing:
        raise ValueError(f"size (=None) needs {', '.join(missing)} to be given; sizes: {', '.join(SIZES)}")
    return Shape(**given)
