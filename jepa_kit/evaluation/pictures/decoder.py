"""A small decoder from targets to pixels, to see what a representation contains and what a predictor expects.

It is trained on frozen targets only, and then applied to predictions. Each patch is drawn from its own token and noise,
so a drawing of a hidden block depends on nothing but the predictions there. Half of the noise is the same for all
patches of an image, so that patches can agree on what their tokens do not determine, such as a colour.

B = images    n = patches of an image    D = width of a target    Z = width of the noise    p = patch size
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from jepa_kit.evaluation.pictures.panels import to_uint8
from jepa_kit.structures import Grid

NOISE = 16
"""Z."""


class Decoder(nn.Module):
    """Network from a token and noise to the pixels of its patch; patches are independent.

    Args:
        dim: D.
        patch_size: p.
        hidden: width of the two hidden layers.
    """

    def __init__(self, *, dim: int, patch_size: int, hidden: int = 256) -> None:
        super().__init__()
        self.embed = nn.Linear(dim + NOISE, hidden)
        self.hidden = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 3 * patch_size**2)

    def forward(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """Map tokens [B, n, D] and noise [B, n, Z] to normalised pixels [B, n, 3 * p * p]."""
        x = F.gelu(self.embed(torch.cat([tokens, noise], dim=-1)))
        x = x + F.gelu(self.hidden(self.norm(x)))
        return self.out(x)

    def draw(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Return pixels as ``forward``, for random noise."""
        count, patches = tokens.shape[:2]
        shared = torch.randn(count, 1, NOISE // 2, generator=generator).expand(-1, patches, -1)
        own = torch.randn(count, patches, NOISE // 2, generator=generator)
        return self(tokens, torch.cat([shared, own], dim=-1))


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Return the patches of images: [B, 3, h, w] -> [B, n, 3 * p * p]."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, grid: Grid) -> Tensor:
    """Return the images of patches: [B, n, 3 * p * p] -> [B, 3, h, w]."""
    p = round((patches.shape[-1] / 3) ** 0.5)
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], w=grid[1], c=3, p=p, q=p)


def energy_score(draws: tuple[Tensor, Tensor], truth: Tensor) -> Tensor:
    """Return the mean over images of (|x1 - y| + |x2 - y| - |x1 - x2|) / 2, with Euclidean norms over an image.

    Its expectation is minimal if draws have the distribution of the truth given the token: what the token does not
    determine differs between draws instead of being blurred. Source: Gneiting and Raftery 2007, section 4.2.

    Args:
        draws: two of [B, ...].
        truth: [B, ...].
    """
    first, second, between = ((a - b).flatten(1).norm(dim=1) for a, b in (*((x, truth) for x in draws), draws))
    return (first + second - between).mean() / 2


def train_decoder(
    tokens: Tensor,
    pixels: Tensor,
    *,
    steps: int = 600,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    hidden: int = 256,
) -> Decoder:
    """Train a decoder of frozen tokens. Equal arguments give equal decoders; torch's random state does not change.

    Args:
        tokens: [B, n, D] targets, without gradients.
        pixels: [B, n, 3 * p * p], the normalised pixels of their patches.
        steps: updates of Adam; the learning rate decays to 0 along a cosine.
        batch_size: images of an update.
        lr: learning rate at the start.
        seed: of weights, order and noise.
        hidden: see ``Decoder``.

    Raises:
        ValueError: if tokens and pixels have different numbers of images or patches, or a number is below 1.
    """
    if tokens.shape[:2] != pixels.shape[:2]:
        raise ValueError(f"tokens {tuple(tokens.shape)} and pixels {tuple(pixels.shape)} must be of the same patches")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} (={value}) must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(dim=tokens.shape[-1], patch_size=round((pixels.shape[-1] / 3) ** 0.5), hidden=hidden)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(tokens), (min(batch_size, len(tokens)),), generator=generator)
        x, y = tokens[chosen], pixels[chosen]
        with torch.enable_grad():
            loss = energy_score((decoder.draw(x, generator), decoder.draw(x, generator)), y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
    return decoder.eval().requires_grad_(False)


def r_squared(decoder: Decoder, tokens: Tensor, pixels: Tensor, *, draws: int = 8, seed: int = 1) -> float:
    """Return R^2 of the mean of several draws: the fraction of the pixels' variance that it explains, at most 1.

    Args:
        decoder: trained on other images.
        tokens, pixels: [..., D] and [..., 3 * p * p] of the same patches.
        draws: number of draws.
        seed: of their noise.
    """
    x, y = tokens.reshape(1, -1, tokens.shape[-1]), pixels.reshape(1, -1, pixels.shape[-1]).double()
    generator = torch.Generator().manual_seed(seed)
    guess = torch.stack([decoder.draw(x, generator).double() for _ in range(draws)]).mean(0)
    return 1.0 - float((guess - y).square().mean() / (y - y.mean((0, 1))).square().mean())


def image_scale(images: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """Return the centre [B, 3, 1, 1] and deviation [B, 1, 1, 1] that ``input_norm: image`` removes from each image.

    The tokens do not contain them, so a decoder draws images without them, and pictures add them again.

    Args:
        images: [B, 3, h, w] normalised.
        whole: whether the encoder removes them; if not, 0 and 1.
    """
    if not whole:
        return images.new_zeros(len(images), 3, 1, 1), images.new_ones(len(images), 1, 1, 1)
    centre = images.mean((2, 3), keepdim=True)
    return centre, (images - centre).std((1, 2, 3), keepdim=True) + 0.1  # 0.1 as in the encoder (vit.py)


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return normalised images [B, 3, h, w] as uint8; values outside the range are clipped."""
    scale, centre = (torch.tensor(tuple(v)).view(-1, 1, 1) for v in (std, mean))
    return to_uint8(images * scale + centre)
