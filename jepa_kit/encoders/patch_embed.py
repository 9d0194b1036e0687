"""From pixels to the content of tokens.

B = images    N = H * W patches of an image    P = packed patches of all sets    R = P or more rows (``fill_rows``)
C = channels  p = patch size in pixels         D = width
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from jepa_kit.encoders.packed import add_rows, fill_rows
from jepa_kit.encoders.products import linear
from jepa_kit.structures import PatchSets

NEARNESS = 0.95
"""Correlation of pixels next to each other."""
COLOUR = 0.9
"""Correlation of two channels of a pixel."""
REGULARISATION = 0.004
"""Of eigenvalues, relative to the largest: what is less is noise of the camera or of JPEG."""


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


def whiten(weight: Tensor) -> Tensor:
    """Return embeddings [D, C, p, p] times the whitening (ZCA) of patches of natural images, of the same power.

    Neighbouring pixels are nearly equal, so a random embedding is mostly one of the mean colour of a patch. The
    covariance is a model without data: ``NEARNESS`` to the power of the distance in pixels, times ``COLOUR`` between
    channels. Its eigenvalues are regularised as in Coates, Lee & Ng 2011.
    """
    _, c, p, _ = weight.shape
    at = torch.cartesian_prod(*2 * [torch.arange(p, dtype=torch.float64, device="cpu")])
    colour = COLOUR + (1 - COLOUR) * torch.eye(c, dtype=torch.float64, device="cpu")
    (power_c, of_c), (power_x, of_x) = torch.linalg.eigh(colour), torch.linalg.eigh(NEARNESS ** torch.cdist(at, at))
    power = power_c[:, None] * power_x  # [C, p * p]
    gain = (power + REGULARISATION * power.max()).rsqrt()
    gain *= (power.sum() / (power * gain**2).sum()).sqrt()
    of_c, of_x, gain = (x.to(weight.device, weight.dtype) for x in (of_c, of_x, gain))
    coefficients = gain * (of_c.T @ weight.flatten(2) @ of_x)
    return (of_c @ coefficients @ of_x.T).view_as(weight)


def hide(content: Tensor, patches: PatchSets, mask_token: Tensor | None) -> Tensor:
    """Return the content [R, D] of patches with the mask token [1, D] in place of hidden ones.

    Raises:
        ValueError: patches are hidden, and there is no mask token.
    """
    if patches.hidden is None:
        return content
    if mask_token is None:
        raise ValueError(
            "patches.hidden is given, but this encoder has no mask token: set encoder.mask_token to true, or take a "
            "masker other than 'in_place'"
        )
    return torch.where(add_rows(patches.hidden[:, None], len(content)), mask_token, content)


def standardise(images: Tensor) -> Tensor:
    """Return images without their mean colour, divided by their standard deviation plus 0.1: [B, C, h, w]."""
    centred = images - images.mean((2, 3), keepdim=True)
    # as torch.std, which takes 30 times as long on a CPU
    deviation = torch.linalg.vector_norm(centred, dim=(1, 2, 3), keepdim=True) / (centred[0].numel() - 1) ** 0.5
    return centred / (deviation + 0.1)
