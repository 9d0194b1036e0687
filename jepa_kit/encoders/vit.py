"""The Vision Transformer of I-JEPA, over sets of patches.

B = images    N = H * W patches of an image    P = packed patches of all sets
C = channels  p = patch size in pixels         D = width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from jepa_kit.encoders.blocks import (
    Compile,
    Init,
    add_rows,
    fill_rows,
    init_transformer,
    make_blocks,
    run_blocks,
    take_rows,
)
from jepa_kit.encoders.products import linear
from jepa_kit.registry import ENCODERS, Backend, check_choice
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import Grid, PatchSets

PatchInit = Literal["released", "xavier"]
InputNorm = Literal["none", "image"]
Size = Literal["tiny", "small", "base", "large", "huge", "giant", "gigantic"]


@dataclass(frozen=True)
class _Shape:
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


SIZES: dict[str, _Shape] = {
    "tiny": _Shape(192, 12, 3),  # DeiT, Touvron et al. 2021, table 1
    "small": _Shape(384, 12, 6),  # DeiT, table 1
    "base": _Shape(768, 12, 12),  # ViT, Dosovitskiy et al. 2021, table 1
    "large": _Shape(1024, 24, 16),  # ViT, table 1
    "huge": _Shape(1280, 32, 16),  # ViT, table 1
    "giant": _Shape(1408, 40, 16, 48 / 11),  # ViT-g, Zhai et al. 2022, table 2: MLP 6144
    "gigantic": _Shape(1664, 48, 16, 64 / 13),  # ViT-G, Zhai et al. 2022, table 2: MLP 8192
}


class PatchEmbed(nn.Module):
    """Map the pixels of each selected patch to a token, linearly.

    The weight has the shape of the convolution of other code bases, [D, C, p, p].
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, patches: PatchSets | None) -> Tensor:
        """Embed [B, C, H * p, W * p] -> [R, D]: P patches, or B * N if ``patches`` is None, plus ``fill_rows``."""
        p = self.patch_size
        if patches is None:
            pixels = rearrange(images, "b c (h p) (w q) -> (b h w) (c p q)", p=p, q=p)
        else:
            w = images.shape[-1] // p
            view = rearrange(images, "b c (h p) (w q) -> b h w c p q", p=p, q=p)
            pixels = view[patches.image_of_token, patches.index // w, patches.index % w].flatten(1)
        return linear(fill_rows(pixels), self.proj.weight.flatten(1), self.proj.bias)


@ENCODERS.register("vit")
class ViT(nn.Module):
    """Pre-norm ViT with fixed sine-cosine positions and without a class token (I-JEPA, section 3 and A.1).

    Args:
        image_size: (h, w) in pixels of training images; supplied by the recipe.
        patch_size: side of a patch in pixels; divides both sides of the image.
        size: a standard size (``SIZES`` names its source), or None if the next options are given.
        embed_dim, depth, num_heads, mlp_ratio: override the values of ``size``. mlp_ratio is 4 by default.
        in_chans: channels of an image.
        qkv_bias: whether q, k and v have a bias.
        norm_eps: eps of every LayerNorm.
        drop_path: rate of stochastic depth at the last block, in [0, 1); it rises linearly from 0 at the first.
        input_norm: ``image`` subtracts each image's mean per channel and divides by the image's standard deviation
            (plus 0.1), so that overall colour and brightness are not the easiest thing to predict; ``none`` does
            nothing, as the release.
        init: initial weights as released, or scaled down by depth (``init_transformer``).
        patch_init: initial patch embedding: ``released`` is a truncated normal (0.02), ``xavier`` is Xavier-uniform
            over flattened pixels, as in MAE. With small patches, the released one makes a token's content much
            smaller than its position (a fifth with 4 x 4 pixels), and training learns positions only.
        compile: torch.compile for everything in a block except attention: fewer kernels, but minutes before the first
            step. ``auto`` compiles in training on CUDA if the encoder is a ViT-B or wider (``compile_blocks``).
        attention: the backend of ``attend``; supplied by the recipe.

    Raises:
        ValueError: neither a size nor all of width, depth and heads are given; the patch size does not divide the
            image; heads or positions do not divide the width; or another value is outside its range.
    """

    forward_methods = ("forward_layers",)
    """Methods that are called besides ``forward``; FSDP gathers weights for them too."""

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        size: Size | None = None,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        in_chans: int = 3,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        input_norm: InputNorm = "none",
        init: Init = "released",
        patch_init: PatchInit = "xavier",
        compile: Compile = "auto",
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        shape = _resolve(size, embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
        check_choice("patch_init", patch_init, PatchInit)
        check_choice("input_norm", input_norm, InputNorm)
        if in_chans < 1:
            raise ValueError(f"in_chans (={in_chans}) must be at least 1")
        self.patch_size = patch_size
        self.grid: Grid = patch_grid(image_size, patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.embed_dim, self.depth = shape.embed_dim, shape.depth
        self.in_chans = in_chans
        self.input_norm = input_norm
        self.init: Init = init
        self.patch_init = patch_init
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_2d(shape.embed_dim, self.grid), persistent=False)
        self.patch_embed = PatchEmbed(patch_size, in_chans, shape.embed_dim)
        self.blocks = make_blocks(
            shape.embed_dim,
            shape.depth,
            shape.num_heads,
            mlp_ratio=shape.mlp_ratio,
            qkv_bias=qkv_bias,
            norm_eps=norm_eps,
            drop_path=drop_path,
            backend=attention,
            compiled=compile,
        )
        self.norm = nn.LayerNorm(shape.embed_dim, eps=norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all parameters and buffers."""
        self.pos_embed.copy_(sincos_2d(self.embed_dim, self.grid))
        init_transformer(self, self.blocks, self.init)
        if self.patch_init == "xavier":
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        else:
            nn.init.trunc_normal_(self.patch_embed.proj.weight, std=0.02)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)

    def forward(self, images: Tensor, patches: PatchSets | None = None) -> Tensor:
        """Encode the given patches; each set attends only to itself.

        Args:
            images: [B, C, h, w], normalised; positions are interpolated for sizes other than ``image_size``.
            patches: the sets to encode; None for all patches of each image.

        Returns:
            [P, D], packed as ``patches``; [B * N, D] if it is None.

        Raises:
            ValueError: the number of channels is wrong, or the patch size does not divide the image.
        """
        return self.forward_layers(images, patches, layers=(self.depth,))[0]

    def forward_layers(
        self, images: Tensor, patches: PatchSets | None = None, *, layers: Sequence[int], norm: bool = True
    ) -> list[Tensor]:
        """Return the outputs of some layers, each [P, D], in the order of ``layers``.

        Args:
            images, patches: as for ``forward``.
            layers: numbers of blocks from 1; 0 is the input of the first. Blocks after the last of them are not run.
            norm: whether the final norm is applied to each.

        Raises:
            ValueError: a layer does not exist, or there is none.
        """
        check_layers(layers, self.depth)
        x, lengths = self.embed(images, patches)
        outputs = {}
        for number, output in enumerate(chain([x], run_blocks(self.blocks, x, lengths))):
            if number in layers:
                outputs[number] = take_rows(self.norm(output) if norm else output, lengths.total)
            if number == max(layers):
                break
        return [outputs[number] for number in layers]

    def embed(self, images: Tensor, patches: PatchSets | None) -> tuple[Tensor, SetLengths]:
        """Return content plus position of each patch, [R, D] with the P tokens first, and the lengths of the sets."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images must be [B, {self.in_chans}, h, w], not {tuple(images.shape)}")
        grid = patch_grid((images.shape[2], images.shape[3]), self.patch_size)
        if self.input_norm == "image":
            centred = images - images.mean((2, 3), keepdim=True)
            # as torch.std, which takes 30 times as long on a CPU
            deviation = torch.linalg.vector_norm(centred, dim=(1, 2, 3), keepdim=True) / (centred[0].numel() - 1) ** 0.5
            images = centred / (deviation + 0.1)
        table = interpolate_pos_embed(self.pos_embed, self.grid, grid)  # [N, D]
        content = self.patch_embed(images, patches)  # [R, D]
        if patches is None:
            lengths = SetLengths([len(table)] * len(images), images.device, whole=True)
            position = table.repeat(len(images), 1)
        else:
            lengths = patches.lengths
            position = table.index_select(0, patches.index)
        return content + add_rows(position, len(content)), lengths


def patch_grid(image_size: tuple[int, int], patch_size: int) -> Grid:
    """Return (H, W), the patch grid of an image.

    Raises:
        ValueError: the patch size does not divide both sides.
    """
    h, w = image_size
    if patch_size < 1 or h < patch_size or w < patch_size or h % patch_size or w % patch_size:
        raise ValueError(f"patch_size (={patch_size}) must divide the height (={h}) and the width (={w}) of an image")
    return h // patch_size, w // patch_size


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raise ValueError unless ``layers`` of ``forward_layers`` are layers of an encoder of this depth."""
    if not layers or not all(0 <= number <= depth for number in layers):
        raise ValueError(
            f"layers (={tuple(layers)}) must be numbers of blocks, from 1 to the encoder's depth (={depth}), or 0 for "
            "the input of the first"
        )


def _resolve(size: str | None, **values: Any) -> _Shape:
    """Return the shape of a size, with those of its fields replaced whose value is not None."""
    given = {name: value for name, value in values.items() if value is not None}
    if size is not None and size not in SIZES:
        raise ValueError(f"size (={size!r}) must be one of {', '.join(SIZES)}")
    if size is not None:
        return replace(SIZES[size], **given)
    missing = [name for name in ("embed_dim", "depth", "num_heads") if name not in given]
    if missing:
        raise ValueError(f"size (=None) needs {', '.join(missing)} to be given; sizes: {', '.join(SIZES)}")
    return _Shape(**given)


def sincos_2d(embed_dim: int, grid: Grid) -> Tensor:
    """Return the fixed sine-cosine positions of a grid (Vaswani et al. 2017; in two dimensions MAE, He et al. 2022).

    The first half of the width encodes the column, the second half the row; each half is the sine, then the cosine of
    position / 10000**(i / (D / 4)). Computed in float64 and stored in float32, as the released code does.

    Returns:
        [N, D] float32.

    Raises:
        ValueError: ``embed_dim`` is not a multiple of 4.
    """
    if embed_dim < 4 or embed_dim % 4:
        raise ValueError(f"embed_dim (={embed_dim}) must be a multiple of 4: sine and cosine of rows and columns")
    h, w = grid
    quarter = embed_dim // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)  # [D/4]
    row = torch.arange(h, dtype=torch.float64).repeat_interleave(w)  # [N]
    column = torch.arange(w, dtype=torch.float64).repeat(h)  # [N]
    angles = [x[:, None] * frequency for x in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


def interpolate_pos_embed(table: Tensor, from_grid: Grid, to_grid: Grid) -> Tensor:
    """Return positions for another grid by bicubic interpolation, as ViT and DINO do.

    Args:
        table: [N, D] for ``from_grid``.

    Returns:
        [N', D] for ``to_grid``, in the dtype of ``table``.
    """
    if from_grid == to_grid:
        return table
    image = table.T.reshape(1, -1, *from_grid)
    image = image if image.dtype == torch.float64 else image.float()
    image = F.interpolate(image, size=to_grid, mode="bicubic", align_corners=False)
    return image.flatten(2)[0].T.to(table.dtype).contiguous()
