"""A convolutional encoder of sets of patches: isotropic ConvNeXt, whose convolutions see what a set contains alone.

B = images    N = H * W patches of an image    S = sets    P = packed patches of all sets    D = width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.encoders.packed import take_rows
from jepa_kit.encoders.patch_embed import PatchEmbed, hide
from jepa_kit.encoders.positions import patch_grid
from jepa_kit.encoders.sizes import check_layers
from jepa_kit.registry import ENCODERS
from jepa_kit.structures import Grid, PatchSets


@dataclass(frozen=True, eq=False)
class Canvas:
    """Where the tokens of sets are on grids, one grid for each set.

    Args:
        sets: S.
        grid: (H, W).
        place: [P], the place of each token among the S * N of all grids; None if every place has its token, in order.
    """

    sets: int
    grid: Grid
    place: Tensor | None

    def spread(self, x: Tensor) -> Tensor:
        """Put tokens on their grids, with zeros elsewhere: [P, D] -> [S, D, H, W]."""
        h, w = self.grid
        if self.place is not None:
            x = x.new_zeros(self.sets * h * w, x.shape[1]).index_copy(0, self.place, x)
        return x.view(self.sets, h, w, -1).permute(0, 3, 1, 2)

    def collect(self, x: Tensor) -> Tensor:
        """Return the tokens on the grids: [S, D, H, W] -> [P, D]."""
        x = x.permute(0, 2, 3, 1).flatten(0, 2)
        return x if self.place is None else x.index_select(0, self.place)


class ConvBlock(nn.Module):
    """ConvNeXt's block (Liu et al. 2022, figure 4): depthwise convolution, LayerNorm, and an MLP, added to the input.

    Args:
        dim: D.
        kernel: side of the convolution in patches, odd.
        hidden: width of the MLP.
        norm_eps: eps of the LayerNorm.
    """

    is_block = True

    def __init__(self, dim: int, *, kernel: int, hidden: int, norm_eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, canvas: Canvas) -> Tensor:
        """Map [P, D] -> [P, D]."""
        y = self.norm(canvas.collect(self.conv(canvas.spread(x))))
        return x + self.fc2(F.gelu(self.fc1(y)))


@ENCODERS.register("conv")
class ConvEncoder(nn.Module):
    """Isotropic ConvNeXt (Liu et al. 2022, section 3.4): patches are embedded one by one, then mixed by convolutions.

    Nothing of a patch outside a set reaches the set's tokens: the convolutions of every block see zeros in its place
    and at the border, and give tokens at the set's patches alone, as sparse convolutions do (SparK, Tian et al. 2023).
    Hidden patches have a token: the mask token, which the convolutions change like others. Differences of positions
    come from the convolutions, so there are no embeddings of positions, and images may have any size.

    Args:
        image_size: (h, w) in pixels of training images; supplied by the recipe.
        patch_size: side of a patch in pixels; divides both sides of the image.
        embed_dim: D (384 in the isotropic ConvNeXt-S).
        depth: number of blocks (18).
        kernel: side of the convolutions in patches, odd (7).
        mlp_ratio: hidden width of the MLP over D.
        in_chans: channels of an image.
        norm_eps: eps of every LayerNorm.
        mask_token: learn a token that replaces the content of hidden patches, for masker ``in_place``.

    Raises:
        ValueError: the patch size does not divide the image, or another value is outside its range.
    """

    forward_methods = ("forward_layers",)

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        embed_dim: int = 384,
        depth: int = 18,
        kernel: int = 7,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        norm_eps: float = 1e-6,
        mask_token: bool = False,
    ) -> None:
        super().__init__()
        hidden = round(embed_dim * mlp_ratio)
        for name, value in (("embed_dim", embed_dim), ("depth", depth), ("in_chans", in_chans)):
            if value < 1:
                raise ValueError(f"{name} (={value}) must be at least 1")
        if hidden < 1:
            raise ValueError(f"mlp_ratio (={mlp_ratio}) must be above 0: the MLP needs a unit")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel (={kernel}) must be odd and at least 1")
        self.patch_size, self.embed_dim, self.depth, self.in_chans = patch_size, embed_dim, depth, in_chans
        self.grid: Grid = patch_grid(image_size, patch_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(
            ConvBlock(embed_dim, kernel=kernel, hidden=hidden, norm_eps=norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim)) if mask_token else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw weights from a truncated normal (0.02) with zero biases, as ConvNeXt does."""
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(m.weight, std=0.02)
                assert m.bias is not None
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.LayerNorm):
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, patches: PatchSets | None = None) -> Tensor:
        """Encode [B, C, h, w] -> [P, D], packed as ``patches``; [B * N, D] if it is None.

        Raises:
            ValueError: the number of channels is wrong, the patch size does not divide the image, or patches are hidden
                and there is no mask token.
        """
        return self.forward_layers(images, patches, layers=(self.depth,))[0]

    def forward_layers(
        self, images: Tensor, patches: PatchSets | None = None, *, layers: Sequence[int], norm: bool = True
    ) -> list[Tensor]:
        """Return the outputs of some layers; see ``ViT.forward_layers``."""
        check_layers(layers, self.depth)
        x, canvas = self.embed(images, patches)
        outputs = [x]
        for block in self.blocks[: max(layers)]:
            outputs.append(block(outputs[-1], canvas))
        return [self.norm(outputs[number]) if norm else outputs[number] for number in layers]

    def embed(self, images: Tensor, patches: PatchSets | None) -> tuple[Tensor, Canvas]:
        """Return the input of the first block, [P, D], and the places of its tokens."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images must be [B, {self.in_chans}, h, w], not {tuple(images.shape)}")
        grid = patch_grid((images.shape[2], images.shape[3]), self.patch_size)
        x = self.patch_embed(images, patches)
        x = x.to(self.patch_embed.proj.weight.dtype)  # under autocast, too, sums of branches are float32
        if patches is None:
            return take_rows(x, len(images) * grid[0] * grid[1]), Canvas(len(images), grid, None)
        x = hide(take_rows(x, patches.num_patches), patches, self.mask_token)
        place = patches.lengths.set_of_token * (grid[0] * grid[1]) + patches.index
        return x, Canvas(len(patches), grid, place)
