"""Train a decoder on a run's targets, and draw what the predictor expects in a hidden block.

m = images shown    n = patches of an image    T = patches of the block    D = width of a target    p = patch size
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.evaluation.health.measure import BATCH, several_masks
from jepa_kit.evaluation.pictures.decoder import Decoder, patchify, r_squared, to_pixels, train_decoder, unpatchify
from jepa_kit.evaluation.pictures.material import Material
from jepa_kit.evaluation.pictures.panels import show_image
from jepa_kit.evaluation.pictures.sections import RED, Section, dimmed, frame
from jepa_kit.from_config import build_masker
from jepa_kit.plotting import Axes
from jepa_kit.rng import Stream, generator, permutation
from jepa_kit.structures import Grid, MaskBatch, PatchSets

ROWS = 4
"""Images shown: always the first, so that none is picked."""
DRAWS = 3
"""Draws of the decoder's noise."""


def hidden_block_section(material: Material, steps: int) -> tuple[Section, dict[str, float]]:
    """Train a decoder on ``material.others``, and draw the middle block of some images with it.

    Args:
        material: from ``gather``.
        steps: updates of the decoder.

    Returns:
        the section, and the fraction of the pixels' variance that the decoder explains; see ``explained_variance``.
    """
    grid = material.grid
    parts = material.others.split(BATCH)
    tokens = torch.cat([material.targets(x) for x in parts])  # [B, n, D]
    pixels = torch.cat([material.pixels(x)[0] for x in parts])
    decoder = train_decoder(tokens, pixels, steps=steps, seed=material.seed)
    fractions = explained_variance(material, decoder)
    hidden = middle_block(grid)
    seen = np.setdiff1d(np.arange(grid[0] * grid[1]), hidden)
    rng = generator(Stream.EVALUATION, seed=material.seed, lane=4)
    halves = [np.sort(seen[permutation(rng, len(seen))[: len(seen) // 2]]) for _ in range(2)]
    images = material.images[:ROWS]
    expected = [
        material.predictions(images, _one_block(material, len(images), context, hidden)).unflatten(0, (len(images), -1))
        for context in (seen, *halves)
    ]
    sources = [*expected[:1] * DRAWS, *expected[1:], material.targets(images)[:, hidden]]  # [m, T, D] each
    noise = torch.Generator().manual_seed(material.seed)
    filled = [_filled(material, images, decoder.draw(x, noise), hidden) for x in sources]
    columns = [images, dimmed(images, torch.from_numpy(seen), grid), filled[-1], *filled[:-1]]

    def draw(axes: list[list[Axes]]) -> None:
        for row, pictures in zip(axes, zip(*columns, strict=True), strict=True):
            for panel, picture in zip(row, pictures, strict=False):
                show_image(panel, picture)
                frame(panel, hidden.tolist(), grid, material.patch_size, RED, 1.2)

    titles = ["image", "context", "drawn from the\ntrue targets", *[f"expected,\ndraw {k + 1}" for k in range(DRAWS)]]
    titles += [f"expected from\nhalf the context {half}" for half in ("A", "B")]
    section = Section(
        name="decoder",
        title="What the predictor expects in a hidden block",
        text=_text(material, fractions),
        rows=len(images),
        draw=draw,
        titles=titles,
    )
    return section, fractions


def _text(material: Material, fractions: dict[str, float]) -> str:
    given = " (also its overall colour and contrast, which the encoder removes)"
    percent = {name: f"{100 * fraction:.0f} %" for name, fraction in fractions.items()}
    return (
        "A small decoder, trained on targets and pixels of other images, draws the block in red, each patch from its "
        "token and noise; everything outside the block is the image itself"
        f"{given if material.normalizes_images else ''}. From the true targets: what the representation contains. "
        "Expected: from the predictions, given the whole context; draws differ in noise, for what tokens do not "
        "determine. Half the context: the predictor saw a random half of the patches, A or B. "
        f"On {len(material.images)} images under the recipe's masks the decoder explains {percent['targets']} of the "
        f"pixels' variance from the true targets, {percent['predictions']} from the predictions and "
        f"{percent['positions']} from the mean target of each position."
    )


def explained_variance(material: Material, decoder: Decoder) -> dict[str, float]:
    """Return R^2 of the pixels of hidden patches, decoded from three sources.

    Returns:
        ``targets``, ``predictions``, and ``positions``: from the mean target of each position.
    """
    parts = []
    masker = build_masker(material.run.config)
    for first in range(0, len(material.images), BATCH):
        images = material.images[first : first + BATCH]
        # image numbers of a batch begin at 0
        masks = several_masks(masker, np.arange(first, first + len(images)), 1, seed=material.seed)
        tokens, pixels = map(masks.targets.gather, (material.targets(images), material.pixels(images)[0]))
        parts.append((tokens, pixels, material.predictions(images, masks), masks.targets.index))
    own, truth, predictions, index = map(torch.cat, zip(*parts, strict=True))
    sums = torch.zeros(int(index.max()) + 1, own.shape[1]).index_add_(0, index, own)
    means = sums / torch.bincount(index).clamp(min=1)[:, None]
    sources = {"targets": own, "predictions": predictions, "positions": means[index]}
    return {name: r_squared(decoder, tokens, truth) for name, tokens in sources.items()}


def middle_block(grid: Grid) -> NDArray[np.int64]:
    """Return [T], the patches of the middle quarter of an image."""
    h, w = grid
    rows, columns = (np.arange(n // 4, n - n // 4) if n >= 4 else np.arange(1) for n in (h, w))
    return (rows[:, None] * w + columns).ravel()


def _one_block(material: Material, count: int, seen: NDArray[np.int64], hidden: NDArray[np.int64]) -> MaskBatch:
    """Return masks with one context and one target set for each of ``count`` images.

    If the recipe's masks are in place, the context is all patches, with mask tokens for those that are not in ``seen``.
    """
    assert material.masks is not None
    context, block = (PatchSets.from_padded(torch.from_numpy(np.tile(x, (count, 1)))) for x in (seen, hidden))
    if material.masks.context.hidden is not None:
        patches = material.grid[0] * material.grid[1]
        shown = torch.zeros(patches, dtype=torch.bool)
        shown[torch.from_numpy(seen)] = True
        context = replace(PatchSets.full(count, patches), hidden=~shown.repeat(count))
    return MaskBatch(context, block, material.grid, torch.arange(count))


def _filled(material: Material, images: Tensor, drawn: Tensor, hidden: NDArray[np.int64]) -> Tensor:
    """Return images [m, 3, h, w] uint8 with their hidden patches replaced by those drawn [m, T, 3 * p * p]."""
    patches, centre, deviation = material.pixels(images)
    patches[:, hidden] = drawn
    data = material.run.config.data
    whole = to_pixels(unpatchify(patches, material.grid) * deviation + centre, data.mean, data.std)
    filled = patchify(images, material.patch_size)
    filled[:, hidden] = patchify(whole, material.patch_size)[:, hidden]
    return unpatchify(filled, material.grid)
