"""``pooled`` and ``pooled_views`` against means of tokens of single images and sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from jepa_kit.encoders import ViT
from jepa_kit.encoders.pooling import pooled, pooled_views, quarters
from jepa_kit.structures import MaskBatch, PatchSets, Tokens, View

EXACT = {"rtol": 0, "atol": 1e-12}


def vit() -> ViT:
    return ViT(image_size=(16, 16), patch_size=4, embed_dim=8, depth=2, num_heads=2).double().eval()


class WithClassToken(nn.Module):
    """Its class token is the sum of a set's patch numbers, and it counts its calls."""

    class_token = True

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward_tokens(self, images, patches=None):
        self.calls += 1
        patches = PatchSets.full(len(images), 16) if patches is None else patches
        sums = torch.stack([index.sum() for index in patches.split()]).double()
        prefix = torch.stack([sums, -sums], 1).unsqueeze(-1)  # a class token and a register
        return [Tokens(torch.zeros(patches.num_patches, 1), prefix)]


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def masks_of(*contexts: list[int]) -> MaskBatch:
    sets = PatchSets.pack([torch.tensor(context) for context in contexts])
    return MaskBatch(sets, PatchSets.full(len(contexts), 1), (4, 4), torch.arange(len(contexts)))


def test_the_mean_over_each_set():
    encoder, x = vit(), images(2, 3, 16, 16)
    sets = masks_of([0, 3, 5], [7]).context
    wanted = [encoder(x[b : b + 1], PatchSets.pack([index])).mean(0) for b, index in enumerate(sets.split())]
    torch.testing.assert_close(pooled(encoder, x, sets), torch.stack(wanted), **EXACT)
    whole = [encoder(x[b : b + 1]).mean(0) for b in range(2)]
    torch.testing.assert_close(pooled(encoder, x), torch.stack(whole), **EXACT)


def test_the_class_token_if_there_is_one():
    assert pooled(WithClassToken(), images(2, 3, 16, 16)).tolist() == [[120.0], [120.0]]
    assert pooled(WithClassToken(), images(2, 3, 16, 16), masks_of([0, 3], [5]).context).tolist() == [[3.0], [5.0]]


def test_views_of_several_sizes_and_with_masks():
    encoder = vit()
    views = [
        View(images(2, 3, 16, 16, seed=0), masks_of([0, 3, 5], [7])),
        View(images(2, 3, 16, 16, seed=1)),
        View(images(2, 3, 16, 16, seed=2)),
        View(images(2, 3, 8, 8, seed=3)),
    ]
    wanted = [pooled(encoder, view.images, None if view.masks is None else view.masks.context) for view in views]
    torch.testing.assert_close(pooled_views(encoder, views), torch.cat(wanted), **EXACT)


def test_views_of_one_size_are_encoded_at_once():
    encoder = WithClassToken()
    masked = View(images(2, 3, 16, 16), masks_of([1], [2]))
    views = [masked, *[View(images(2, 3, 16, 16))] * 3, *[View(images(2, 3, 8, 8))] * 2, masked]
    pooled_views(encoder, views)
    assert encoder.calls == 4


@pytest.mark.parametrize("grid", [(4, 6), (2, 2), (3, 5), (7, 4)])
def test_quarters_are_means_of_slices(grid):
    """With an odd side, the middle row or column belongs to both halves."""
    rows, columns = grid
    tokens = np.random.default_rng(0).normal(size=(3, rows, columns, 5))
    halves = [(slice(0, -(-side // 2)), slice(side // 2, side)) for side in grid]
    wanted = [tokens[:, r, c].mean((1, 2)) for r in halves[0] for c in halves[1]]
    found = quarters(torch.from_numpy(tokens).flatten(1, 2), grid)
    np.testing.assert_allclose(found.numpy(), np.concatenate(wanted, axis=1), atol=1e-12)


@pytest.mark.parametrize("grid", [(1, 4), (4, 1)])
def test_quarters_of_too_few_patches(grid):
    with pytest.raises(ValueError) as error:
        quarters(torch.zeros(2, 4, 3), grid)
    said = f"pooling (='quarters') needs at least 2 x 2 patches, and these images have {grid[0]} x {grid[1]}"
    assert str(error.value) == said
