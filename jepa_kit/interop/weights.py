"""Common representation of an encoder's weights: our names, sizes read from shapes, and provenance.

N = H * W patches of an image    D = width    C = channels    p = patch size in pixels
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from jepa_kit.config.data_section import DataConfig
from jepa_kit.encoders.blocks import Block
from jepa_kit.encoders.positions import sincos_2d
from jepa_kit.encoders.vit import ViT
from jepa_kit.errors import CheckpointError
from jepa_kit.interop.digest import ABOUT, SEALED
from jepa_kit.structures import Grid

TorchBackend = Literal["auto", "sdpa", "reference"]
"""Backends of ``attend`` that need nothing but torch."""

Which = Literal["target", "context"]
Positions = Literal["formula", "file"]

NOT_STATED = "not stated"

OWN = (
    "input_norm",
    "final_norm",
    "layer_scale",
    "mask_token",
    "class_token",
    "registers",
    "positions",
    "interpolation_offset",
    "rotary_base",
    "relative_bias",
    "causal",
)
"""Options of an encoder that formats of other code do not have."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Architecture of a ViT.

    Args:
        image_size: (h, w) in pixels of training images.
        mlp_hidden: hidden width of the MLP.
        (others): as for ``ViT``.
    """

    image_size: tuple[int, int]
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_hidden: int
    in_chans: int = 3
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    input_norm: str = "none"
    final_norm: bool = True
    layer_scale: float | None = None
    mask_token: bool = False
    class_token: bool = False
    registers: int = 0
    positions: str = "sincos"
    interpolation_offset: float = 0.0
    rotary_base: float = 100.0
    relative_bias: str = "none"
    causal: bool = False

    def __post_init__(self) -> None:
        sizes = (*self.image_size, self.patch_size, self.embed_dim, self.depth, self.num_heads, self.mlp_hidden)
        if len(self.image_size) != 2 or any(type(n) is not int or n < 1 for n in (*sizes, self.in_chans)):
            raise ValueError(f"sizes must be ints of at least 1: {asdict(self)}")
        if not (isinstance(self.norm_eps, float) and 0 < self.norm_eps < 1):
            raise ValueError(f"norm_eps (={self.norm_eps!r}) must be a float above 0 and below 1")
        if type(self.qkv_bias) is not bool:
            raise ValueError(f"qkv_bias (={self.qkv_bias!r}) must be true or false")

    @property
    def own(self) -> dict[str, Any]:
        """Return those of ``OWN`` that differ from I-JEPA's, with their values."""
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.name in OWN and getattr(self, f.name) != f.default
        }

    @property
    def grid(self) -> Grid:
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def options(self) -> dict[str, Any]:
        """Return the arguments of ``ViT``."""
        options = {name: value for name, value in asdict(self).items() if name != "mlp_hidden"}
        return {**options, "mlp_ratio": self.mlp_hidden / self.embed_dim}

    def build(self, attention: TorchBackend = "auto") -> ViT:
        """Return a ViT of this architecture, on torch's default device."""
        return ViT(**self.options(), attention=attention)

    def words(self) -> str:
        """Return a one-line summary."""
        (h, w), p = self.image_size, self.patch_size
        own = "".join(f", {name} {value}" for name, value in self.own.items())
        return (
            f"ViT of width {self.embed_dim}, depth {self.depth}, {self.num_heads} heads, "
            f"patches of {p} x {p} in images of {h} x {w}{own}"
        )


def architecture_of_vit(vit: ViT) -> Architecture:
    """Return the architecture of a module, which may be on the meta device."""
    (h, w), p, block = vit.grid, vit.patch_size, vit.blocks[0]
    assert isinstance(block, Block)
    tables = 0 if vit.relative is None else len(vit.relative.tables)
    return Architecture(
        image_size=(h * p, w * p),
        patch_size=p,
        embed_dim=vit.embed_dim,
        depth=vit.depth,
        num_heads=block.attn.num_heads,
        mlp_hidden=block.mlp.fc1.out_features,
        in_chans=vit.in_chans,
        qkv_bias=block.attn.qkv.bias is not None,
        norm_eps=block.norm1.eps,
        input_norm=vit.input_norm,
        final_norm=isinstance(vit.norm, nn.LayerNorm),
        layer_scale=block.layer_scale,
        mask_token=vit.mask_token is not None,
        class_token=vit.class_token,
        registers=vit.num_prefix - vit.class_token,
        positions=vit.positions,
        interpolation_offset=vit.interpolation_offset,
        rotary_base=vit.rotary_base,
        relative_bias="none" if not tables else "shared" if tables == 1 else "per_block",
        causal=vit.causal,
    )


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin of weights, as stated in their file.

    Args:
        encoder: ``target`` or ``context``; None if not stated.
        source: the file and its format.
        step: number of updates.
        epoch: number of epochs.
        licence: licence as stated by the source.
        config: config of the run, as a mapping.
        mean, std: per channel, for normalising images.
        notes: further remarks.
    """

    encoder: Which | None
    source: str
    step: int | None = None
    epoch: int | None = None
    licence: str | None = None
    config: Mapping[str, Any] | None = None
    mean: tuple[float, float, float] = DataConfig.mean
    std: tuple[float, float, float] = DataConfig.std
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.encoder not in (None, *get_args(Which)):
            raise ValueError(f"encoder (={self.encoder!r}) must be 'target', 'context' or null")
        for name, values, least in (("mean", self.mean, -math.inf), ("std", self.std, 0.0)):
            if len(values) != 3 or not all(isinstance(x, int | float) and least < x < math.inf for x in values):
                raise ValueError(f"{name} (={values!r}) must be 3 finite numbers" + (" above 0" if least == 0 else ""))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Options for reading a file.

    Args:
        num_heads: needed if neither the file nor the encoder's size determines it.
        image_size: (h, w), for timm, needed if the position table does not determine it.
        positions: see ``check_positions``.
        prefix: use the weights whose names begin with it; for official, timm and hf.
        allow_unchecked: accept files whose checksum is missing (torch files written without CRCs) or wrong.
    """

    num_heads: int | None = None
    image_size: tuple[int, int] | None = None
    positions: Positions = "formula"
    prefix: str | None = None
    allow_unchecked: bool = False

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions (={self.positions!r}) must be 'formula' or 'file'")


AS_IT_IS = Reading()
"""Default options."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EncoderWeights:
    """Weights of an encoder.

    Args:
        state: parameters under our names, in the file's precision.
        architecture: architecture of the encoder.
        positions: [N, D] position table of the file, if it differs from the formula; else None.
        provenance: origin.
    """

    state: dict[str, Tensor]
    architecture: Architecture
    provenance: Provenance
    positions: Tensor | None = None

    @property
    def table(self) -> Tensor:
        """Return the fixed position table [N, D] in the precision of the weights."""
        assert self.architecture.positions == "sincos", "other positions have no fixed table"
        if self.positions is not None:
            return self.positions
        shape = self.architecture
        return sincos_2d(shape.embed_dim, shape.grid).to(self.state["patch_embed.proj.weight"].dtype)

    def about(self, *, sealed: bool = True) -> str:
        """Return provenance and architecture as JSON for the file's metadata; ``sealed`` states a digest."""
        held = {**asdict(self.provenance), "architecture": asdict(self.architecture)}
        return json.dumps({**held, SEALED: True} if sealed else held, sort_keys=True)

    def words(self) -> str:
        """Return a one-line description: which encoder, its source, its licence."""
        p = self.provenance
        which = f"{p.encoder} encoder" if p.encoder else f"encoder (whether target or context is {NOT_STATED})"
        when = [f"{name} {value}" for name, value in (("epoch", p.epoch), ("step", p.step)) if value is not None]
        parts = [f"{which} of {p.source}", self.architecture.words(), ", ".join(when) or f"step {NOT_STATED}"]
        return "; ".join([*parts, f"licence {p.licence or NOT_STATED}", *p.notes])

    def module(self, attention: TorchBackend = "auto") -> ViT:
        """Return a ViT with these weights in eval mode, in float32, or float64 if they are."""
        with torch.device("meta"):
            vit = self.architecture.build(attention)
        wide = any(value.dtype == torch.float64 for value in self.state.values())
        vit = vit.to(torch.float64 if wide else torch.float32).to_empty(device="cpu")
        vit.load_state_dict(self.state)
        if self.architecture.positions == "sincos":
            vit.pos_embed.copy_(self.table)
        return vit.eval()


def read_about(text: str | None) -> tuple[Architecture, Provenance] | None:
    """Return what ``EncoderWeights.about`` wrote, or None if the file has no such note.

    Raises:
        CheckpointError: the note is damaged.
    """
    if text is None:
        return None
    try:
        held = json.loads(text)
        held.pop(SEALED, None)
        shape = held.pop("architecture")
        for mapping, keys in ((shape, ("image_size",)), (held, ("mean", "std", "notes"))):
            mapping.update({key: tuple(mapping[key]) for key in keys})
        return Architecture(**shape), Provenance(**held)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the file's note {ABOUT!r} is damaged ({error}); it was written by jepa_kit") from error


def check_which(encoder: str | None) -> None:
    """Raise ValueError unless ``encoder`` is ``target``, ``context`` or None."""
    if encoder not in (None, *get_args(Which)):
        raise ValueError(f"encoder (={encoder!r}) must be 'target' or 'context', or None for any")


def choose(weights: EncoderWeights, encoder: str | None) -> EncoderWeights:
    """Return the weights if they are those of the requested encoder.

    Args:
        weights: the encoder of a file.
        encoder: ``target``, ``context``, or None for any.

    Raises:
        CheckpointError: the file contains the other one, or does not state that it is the target encoder.
        ValueError: ``encoder`` is none of these.
    """
    check_which(encoder)
    held = weights.provenance
    if encoder is None or encoder == held.encoder:
        return weights
    if held.encoder is not None:
        raise CheckpointError(
            f"{held.source} contains only the {held.encoder} encoder, not the {encoder} encoder; "
            f"encoder={held.encoder!r} takes it"
        )
    if encoder == "target":
        raise CheckpointError(
            f"{held.source} does not state which encoder it contains. Hugging Face and timm distribute the release's "
            "context encoder; the paper evaluates the target encoder, which is in the released .pth.tar files. Use "
            "encoder=None for any, or encoder='context' if you know that it is the context encoder"
        )
    note = "that it is the context encoder is what its reader said"
    return replace(weights, provenance=replace(held, encoder="context", notes=(*held.notes, note)))
