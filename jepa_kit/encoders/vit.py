"""The Vision Transformer of I-JEPA, over sets of patches.

B = images    N = H * W patches of an image    P = packed patches of all sets
C = channels  p = patch size in pixels         D = width
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from jepa_kit.encoders.blocks import Compile, Init, init_transformer, make_blocks, run_blocks
from jepa_kit.encoders.packed import Terms, add_rows, fill_rows, take_rows
from jepa_kit.encoders.patch_embed import PatchEmbed, hide, standardise, whiten
from jepa_kit.encoders.positions import (
    RelativeBias,
    Rotary,
    interpolate_pos_embed,
    patch_grid,
    rotary_angles,
    sincos_2d,
)
from jepa_kit.encoders.prefix import add_prefix, split_prefix
from jepa_kit.encoders.sizes import Size, check_layers, shape_of
from jepa_kit.registry import ENCODERS, Backend, check_choice
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import Grid, PatchSets, Tokens

PatchInit = Literal["released", "xavier", "whitened"]
InputNorm = Literal["none", "image"]
Positions = Literal["sincos", "learned", "rotary", "rotary_video", "none"]
Bias = Literal["none", "shared", "per_block"]


@ENCODERS.register("vit")
class ViT(nn.Module):
    """Pre-norm ViT; by default I-JEPA's, with fixed sine-cosine positions and without a class token (section 3, A.1).

    Args:
        image_size: (h, w) in pixels of training images; supplied by the recipe.
        patch_size: side of a patch in pixels; divides both sides of the image.
        size: a standard size (``SIZES`` names its source), or None if the next options are given.
        embed_dim, depth, num_heads, mlp_ratio: override the values of ``size``. mlp_ratio is 4 by default.
        in_chans: channels of an image.
        qkv_bias: whether q, k and v have a bias. BEiT's keys have none: a bias of the keys adds the same to all scores
            of a query, so it changes no output and gets no gradient, unless positions are rotary.
        norm_eps: eps of every LayerNorm.
        final_norm: whether a LayerNorm follows the last block.
        layer_scale: initial value of the factors of each block's branches (``Block``), 0.1 in BEiT; null for none.
        drop_path: rate of stochastic depth at the last block, in [0, 1); it rises linearly from 0 at the first.
        mask_token: learn a token that replaces the content of hidden patches before positions are added (BEiT, SimMIM),
            for masker ``in_place``.
        class_token: begin each set with a learned token.
        registers: number of learned tokens of each set after the class token (Darcet et al. 2024).
        positions: ``sincos`` adds fixed ones to the content, ``learned`` learned ones, ``rotary`` and ``rotary_video``
            rotate queries and keys (``rotary_angles``), ``none`` does neither. The class token has a learned one or
            none (MAE); registers have none.
        interpolation_offset: added to the sides of another grid when tables are interpolated for it, which moves the
            samples by a fraction of a patch: 0.1 in DINO's and MSN's code, 0 in I-JEPA's.
        rotary_base: of rotary positions; 100 in RoPE-ViT (Heo et al. 2024), 10,000 in V-JEPA 2.
        relative_bias: biases of scores by relative position (``RelativeBias``): none, ``shared`` by all blocks (BEiT,
            SimMIM), or of each block (``per_block``).
        causal: whether a token attends only to those up to itself in its set: first the class token and registers, then
            patches in raster order.
        decay_tokens: whether weight decay applies to class token, registers and learned positions: true in MAE and
            DINO, false in BEiT, SimMIM and data2vec.
        input_norm: ``image`` subtracts each image's mean per channel and divides by the image's standard deviation
            (plus 0.1), so that overall colour and brightness are not the easiest thing to predict; ``none`` does
            nothing, as the release.
        init: initial weights as released, scaled down by depth, or Xavier-uniform (``init_transformer``).
        patch_init: initial patch embedding: ``released`` is a truncated normal (0.02), ``xavier`` is Xavier-uniform
            over flattened pixels, as in MAE. With small patches, the released one makes a token's content much
            smaller than its position (a fifth with 4 x 4 pixels), and training learns positions only. ``whitened`` is
            ``xavier`` for whitened patches (``patch_embed.whiten``): edges count as much as the mean colour.
        compile: torch.compile for everything in a block except attention: fewer kernels, but minutes before the first
            step. ``auto`` compiles in training on CUDA if the encoder is a ViT-B or wider (``compile_blocks``).
        attention: the backend of ``attend``; supplied by the recipe.

    Raises:
        ValueError: neither a size nor all of width, depth and heads are given; the patch size does not divide the
            image; heads or positions do not divide the width; or another value is outside its range.

    Attributes:
        num_prefix: k, the number of tokens before the patches of each set.
    """

    forward_methods = ("forward_layers", "forward_tokens")
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
        final_norm: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        mask_token: bool = False,
        class_token: bool = False,
        registers: int = 0,
        positions: Positions = "sincos",
        interpolation_offset: float = 0.0,
        rotary_base: float = 100.0,
        relative_bias: Bias = "none",
        causal: bool = False,
        decay_tokens: bool = True,
        input_norm: InputNorm = "none",
        init: Init = "released",
        patch_init: PatchInit = "xavier",
        compile: Compile = "auto",
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        shape = shape_of(size, embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
        check_choice("patch_init", patch_init, PatchInit)
        check_choice("input_norm", input_norm, InputNorm)
        check_choice("positions", positions, Positions)
        check_choice("relative_bias", relative_bias, Bias)
        for name, value, least in (("in_chans", in_chans, 1), ("registers", registers, 0)):
            if value < least:
                raise ValueError(f"{name} (={value}) must be at least {least}")
        if not 0 <= interpolation_offset < 1:
            raise ValueError(f"interpolation_offset (={interpolation_offset}) must be in [0, 1)")
        if not 0 < rotary_base < math.inf:
            raise ValueError(f"rotary_base (={rotary_base}) must be above 0 and finite")
        self.patch_size = patch_size
        self.grid: Grid = patch_grid(image_size, patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.embed_dim, self.depth, self.num_heads = shape.embed_dim, shape.depth, shape.num_heads
        self.in_chans = in_chans
        self.input_norm = input_norm
        self.init: Init = init
        self.patch_init = patch_init
        self.positions: Positions = positions
        self.interpolation_offset, self.rotary_base = interpolation_offset, rotary_base
        self.causal = causal
        self.class_token, self.num_prefix = class_token, class_token + registers
        self.pos_embed: Tensor  # None without a table
        if positions == "sincos":
            self.register_buffer("pos_embed", sincos_2d(shape.embed_dim, self.grid), persistent=False)
        else:
            rows = class_token + self.num_patches if positions == "learned" else 0
            self.register_parameter("pos_embed", self._token(rows))
        self.patch_embed = PatchEmbed(patch_size, in_chans, shape.embed_dim)
        self.blocks = make_blocks(
            shape.embed_dim,
            shape.depth,
            shape.num_heads,
            mlp_ratio=shape.mlp_ratio,
            qkv_bias=qkv_bias,
            norm_eps=norm_eps,
            drop_path=drop_path,
            layer_scale=layer_scale,
            backend=attention,
            compiled=compile,
        )
        if positions in get_args(Rotary):
            self.angles(self.grid)  # checks the width of heads
        self.relative = None
        if relative_bias != "none":
            tables = shape.depth if relative_bias == "per_block" else 1
            self.relative = RelativeBias(self.grid, shape.num_heads, tables=tables, prefix=self.num_prefix)
        self.norm = nn.LayerNorm(shape.embed_dim, eps=norm_eps) if final_norm else nn.Identity()
        self.mask_token = self._token(int(mask_token))
        self.cls_token = self._token(int(class_token))
        self.register_tokens = self._token(registers)
        if not decay_tokens:
            for token in (self.cls_token, self.register_tokens, self.pos_embed):
                if isinstance(token, nn.Parameter):
                    token.no_decay = True  # type: ignore[attr-defined]
        self.init_weights()

    @property
    def is_plain(self) -> bool:
        """Whether it has no token, position, bias or scale besides I-JEPA's, as formulas of memory assume."""
        more = (self.mask_token, self.cls_token, self.register_tokens, self.relative, self.blocks[0].scale1)
        fixed = self.positions == "sincos" and isinstance(self.norm, nn.LayerNorm) and not self.causal
        return fixed and all(part is None for part in more)

    def _token(self, rows: int) -> nn.Parameter | None:
        """Return learned tokens [rows, D], or None for no row."""
        return nn.Parameter(torch.zeros(rows, self.embed_dim)) if rows else None

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all parameters and buffers."""
        if self.positions == "sincos":
            self.pos_embed.copy_(sincos_2d(self.embed_dim, self.grid))
        init_transformer(self, self.blocks, self.init)
        weight = self.patch_embed.proj.weight
        if self.patch_init == "released":
            nn.init.trunc_normal_(weight, std=0.02)
        else:
            nn.init.xavier_uniform_(weight.view(self.embed_dim, -1))
        if self.patch_init == "whitened":
            weight.copy_(whiten(weight))
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        for token in (self.mask_token, self.cls_token, self.register_tokens, self.pos_embed):
            if isinstance(token, nn.Parameter):
                nn.init.trunc_normal_(token, std=0.02)
        if self.relative is not None:
            for table in self.relative.tables:
                nn.init.zeros_(table)

    def forward(self, images: Tensor, patches: PatchSets | None = None) -> Tensor:
        """Encode the given patches; each set attends only to itself.

        Args:
            images: [B, C, h, w], normalised; positions are interpolated for sizes other than ``image_size``.
            patches: the sets to encode, with mask tokens at ``patches.hidden``; None for all patches of each image.

        Returns:
            [P, D], packed as ``patches``; [B * N, D] if it is None.

        Raises:
            ValueError: the number of channels is wrong, the patch size does not divide the image, patches are hidden
                and there is no mask token, or ``relative_bias`` has no table for images of this size.
        """
        return self._encode(images, patches, (self.depth,), True)[0].patches

    def forward_layers(
        self, images: Tensor, patches: PatchSets | None = None, *, layers: Sequence[int], norm: bool = True
    ) -> list[Tensor]:
        """Return the outputs of some layers, each [P, D], in the order of ``layers``.

        Args:
            images, patches: as for ``forward``.
            layers: numbers of blocks from 1; 0 is the input of the first. Blocks after the last of them are not run.
            norm: whether the final norm is applied to each.

        Raises:
            ValueError: a layer does not exist, or there is none; or as for ``forward``.
        """
        return [tokens.patches for tokens in self._encode(images, patches, layers, norm)]

    def forward_tokens(
        self,
        images: Tensor,
        patches: PatchSets | None = None,
        *,
        layers: Sequence[int] | None = None,
        norm: bool = True,
    ) -> list[Tokens]:
        """Return what ``forward_layers`` returns, with the class token and the registers of each set.

        Args:
            layers: None for the last block alone; otherwise as for ``forward_layers``.
        """
        return self._encode(images, patches, (self.depth,) if layers is None else layers, norm)

    def _encode(self, images: Tensor, patches: PatchSets | None, layers: Sequence[int], norm: bool) -> list[Tokens]:
        check_layers(layers, self.depth)
        x, lengths = self.embed(images, patches)
        blocks = run_blocks(self.blocks, x, lengths, terms=self.terms(images, patches, lengths))
        outputs = {}
        for number, output in enumerate(chain([x], blocks)):
            if number in layers:
                rows = take_rows(self.norm(output) if norm else output, lengths.total)
                outputs[number] = Tokens(*split_prefix(rows, lengths, self.num_prefix))
            if number == max(layers):
                break
        return [outputs[number] for number in layers]

    def embed(self, images: Tensor, patches: PatchSets | None) -> tuple[Tensor, SetLengths]:
        """Return the input of the first block, [R, D], and the lengths of its sets.

        Each set is its prefix, without position or with a learned one for the class token, then content plus position
        of each patch. R is the number of tokens, or more (``fill_rows``).
        """
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images must be [B, {self.in_chans}, h, w], not {tuple(images.shape)}")
        grid = patch_grid((images.shape[2], images.shape[3]), self.patch_size)
        if self.input_norm == "image":
            images = standardise(images)
        x = self.patch_embed(images, patches)  # [R, D]
        if patches is None:
            lengths = SetLengths([grid[0] * grid[1]] * len(images), images.device, whole=True)
        else:
            lengths = patches.lengths
            x = hide(x, patches, self.mask_token)
        if self.pos_embed is None:
            x = x.to(self.patch_embed.proj.weight.dtype)  # as after the sum with a table, if autocast made it bf16
        else:
            prefix = len(self.pos_embed) - self.num_patches
            table = interpolate_pos_embed(self.pos_embed[prefix:], self.grid, grid, self.interpolation_offset)
            position = table.repeat(len(images), 1) if patches is None else table.index_select(0, patches.index)
            x = x + add_rows(position, len(x))
        if not self.num_prefix:
            return x, lengths
        x = add_prefix(self._prefix().expand(len(lengths), -1, -1), take_rows(x, lengths.total), lengths)
        return fill_rows(x), lengths.plus(self.num_prefix)

    def _prefix(self) -> Tensor:
        """Return the class token and the registers, [k, D]."""
        tokens: list[Tensor] = [token for token in (self.cls_token, self.register_tokens) if token is not None]
        if self.class_token and self.positions == "learned":
            tokens[0] = tokens[0] + self.pos_embed[:1]
        return torch.cat(tokens)

    def terms(self, images: Tensor, patches: PatchSets | None, lengths: SetLengths) -> Iterable[Terms] | None:
        """Return what the attention of each block adds for sets with these lengths; None if it adds nothing."""
        grid = patch_grid((images.shape[2], images.shape[3]), self.patch_size)
        rotation = None
        if self.positions in get_args(Rotary):
            angles = self.angles(grid)  # [N, d]
            angles = angles.repeat(len(images), 1) if patches is None else angles.index_select(0, patches.index)
            still = angles.new_zeros(len(lengths), self.num_prefix, angles.shape[1])
            angles = add_prefix(still, angles, lengths.plus(-self.num_prefix)).unsqueeze(1)  # [P, 1, d]
            rotation = (angles.cos(), angles.sin())
        if self.relative is not None:
            biases = self.relative(patches, lengths, grid)
            if len(self.relative.tables) == 1:
                return repeat(Terms(next(biases), rotation, self.causal), self.depth)
            return (Terms(bias, rotation, self.causal) for bias in biases)
        none = rotation is None and not self.causal
        return None if none else repeat(Terms(rotation=rotation, causal=self.causal), self.depth)

    def angles(self, grid: Grid) -> Tensor:
        """Return the angles by which queries and keys are rotated, [N, d]: see ``rotary_angles``."""
        width, like = self.embed_dim // self.num_heads, self.patch_embed.proj.weight
        return rotary_angles(width, grid, self.rotary_base, like, cast(Rotary, self.positions))
