"""From a run and images to its page of pictures, and to each of them alone.

B = images    n = patches of an image, H * W    D = width of a target    h = heads
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from jepa_kit.build import build_masker
from jepa_kit.config import versions
from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import eval_batches
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.transforms import normalize
from jepa_kit.evaluation.feature_sources import encoder_named
from jepa_kit.evaluation.features import LoadedRun, evaluating, untrained_encoder
from jepa_kit.evaluation.health.measure import BATCH, measure_health, several_masks
from jepa_kit.evaluation.health.verdict import judge
from jepa_kit.evaluation.pictures.decoder import (
    Decoder,
    explained,
    image_scale,
    patchify,
    to_pixels,
    train_decoder,
    unpatchify,
)
from jepa_kit.evaluation.pictures.maps import Guess, all_targets, attention_weights, guesses, predict
from jepa_kit.evaluation.pictures.sections import (
    COLUMNS,
    Drawing,
    Section,
    attention_section,
    components_section,
    decoder_section,
    guess_section,
    page,
    single,
)
from jepa_kit.evaluation.tables.results import write_results
from jepa_kit.rng import Stream, generator, permutation
from jepa_kit.structures import Grid, MaskBatch, PatchSets

GUESSES, ATTENTIONS, DRAWINGS = 3, 2, 4
"""Rows of each section: always the first images, none is picked."""
DRAWS = 3
"""Draws of the decoder's noise."""
ASKED = 64
"""Images whose predictions are placed among all patches, for the median."""
FEWEST = 24
"""Images that a page needs: 16 for the figures of health, 8 for the decoder."""
STEPS = 600
"""Updates of the decoder."""


@dataclass(frozen=True, eq=False)
class Material:
    """What all sections draw from.

    Args:
        run: read back; its modules are on the device.
        images: [B, 3, h, w] uint8 that pictures are about, the first of them shown.
        others: [B', 3, h, w] uint8 that the decoder learns from.
        masks: of ``images``, the recipe's.
        device: where the networks are.
        seed: of the decoder, its noise and the contexts cut in half.
    """

    run: LoadedRun
    images: Tensor
    others: Tensor
    masks: MaskBatch
    device: torch.device
    seed: int

    @property
    def grid(self) -> Grid:
        return self.masks.grid

    @property
    def patch_size(self) -> int:
        return self.images.shape[2] // self.grid[0]

    def normalized(self, images: Tensor) -> Tensor:
        """As the encoder gets them, on its device."""
        data = self.run.config.data
        return normalize(images.to(self.device), data.mean, data.std)

    def pixels(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a decoder can draw, [B, n, 3 * p * p] on the host, and the scale of ``image_scale`` taken out of it."""
        x = self.normalized(images).cpu()
        centre, deviation = image_scale(x, getattr(self.run.jepa.encoder, "input_norm", "none") == "image")
        return patchify((x - centre) / deviation, self.patch_size), centre, deviation


def divided(samples: int, images: int, others: int, path: str = "the data set") -> tuple[int, int]:
    """How many images are looked at, and how many others the decoder learns from; fewer than wanted of a small set.

    Args:
        samples: in the data set.
        images, others: wanted.
        path: of the data set, for the message.

    Raises:
        ValueError: fewer than 24 images.
    """
    if samples < FEWEST:
        raise ValueError(f"{path} holds {samples} images; pictures of a run need at least {FEWEST}")
    kept = min(others, max(BATCH, samples - images), samples // 3)  # for the decoder
    images = min(images, samples - kept)
    return images, min(others, samples - images)


def gather(
    run: LoadedRun,
    dataset: ShardDataset,
    *,
    images: int,
    others: int,
    device: torch.device,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Material:
    """Images of a data set in random order, and the recipe's masks of them; fewer if there are not so many.

    Raises:
        ValueError: fewer than 24 images in the data set.
    """
    wanted = (images, others)
    images, others = divided(len(dataset), images, others, dataset.path)
    if (images, others) != wanted:
        say(
            f"{dataset.path} holds {len(dataset)} images: pictures are of {images}, and the decoder learns from "
            f"{others} others"
        )
    order = permutation(generator(Stream.EVALUATION, seed=seed, lane=3), len(dataset))[: images + others]
    batches = eval_batches(dataset, ImageOptions.from_config(run.config.data), samples=order)
    held = torch.cat([batch.images for batch in batches])
    masks = several_masks(build_masker(run.config), np.arange(images), 1, seed=seed)
    run.jepa.to(device)
    return Material(run, held[:images], held[images:], masks, device, seed)


def draw_run(
    material: Material, folder: Path, *, name: str, steps: int = STEPS, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Writes ``page.png``, a PNG for each section, and ``visualize.json``, which it returns.

    Args:
        material: from ``gather``.
        folder: is made where it is missing.
        name: of the run, for the heading.
        steps: of the decoder's training.
        say: is told what is being done.
    """
    run, config = material.run, material.run.config
    say("health")
    health = measure_health(
        run.jepa,
        material.images,
        build_masker(config),
        encoder=encoder_named(run.jepa),
        mean=config.data.mean,
        std=config.data.std,
        device=material.device,
    )
    verdict = judge(health)
    say("patch features")
    sections = [_components(material)]
    say("guesses")
    section, found = _guesses(material)
    sections.append(section)
    say("attention")
    sections.append(_attention(material, [guess.patch for guess in found]))
    say(f"decoder: {steps} updates on {len(material.others)} images")
    section, shares = _decoder(material, steps)
    sections.append(section)
    aspect = material.images.shape[2] / material.images.shape[3]
    parts = [f"{slot} {config.slots[slot].name}" for slot in ("encoder", "masker", "target", "target_update")]
    lines = [f"after {run.step:,} updates; {', '.join(parts)}", str(verdict)]
    files = [page(sections, folder / "page.png", heading=name, lines=lines, aspect=aspect)]
    files += [single(section, folder / f"{section.name}.png", aspect=aspect) for section in sections]
    content = {
        "step": run.step,
        "verdict": verdict.state,
        "reason": verdict.reason,
        "health": health.to_dict(),
        "median_place": float(np.median([guess.place for guess in found])),
        "patches": int(material.images.shape[0] * np.prod(material.grid)),
        "decoder_explains": shares,
        "files": [file.name for file in files],
        "versions": versions(),
    }
    write_results(content, folder / "visualize.json")
    return content


def _tokens(material: Material, encoder: nn.Module) -> NDArray[np.floating]:
    """[B, n, D] of all images."""
    with torch.no_grad(), evaluating(encoder):
        parts = [
            encoder(material.normalized(part)).float().unflatten(0, (len(part), -1)).cpu()
            for part in material.images.split(BATCH)
        ]
    return torch.cat(parts).numpy()


def _components(material: Material) -> Section:
    run = material.run
    untrained = untrained_encoder(run.config, run.config.train.seed).to(material.device)
    which = encoder_named(run.jepa)
    encoders = {f"{which} encoder": run.jepa.encoder_for(which), "untrained": untrained}
    tokens = {name: _tokens(material, encoder) for name, encoder in encoders.items()}
    return components_section(material.images[:COLUMNS], tokens, material.grid)


def _guesses(material: Material) -> tuple[Section, list[Guess]]:
    data = material.run.config.data
    found = guesses(
        material.run.jepa,
        material.images.to(material.device),
        material.masks.to(material.device),
        range(min(ASKED, len(material.images))),
        mean=data.mean,
        std=data.std,
    )
    held = [guess.on_host() for guess in found]
    places = [guess.place for guess in held]
    section = guess_section(material.images, held[:GUESSES], material.grid, material.patch_size, median=places)
    return section, held


def _attention(material: Material, asked: Sequence[int]) -> Section:
    """Of the patches that were asked for in the guesses."""
    which = encoder_named(material.run.jepa)
    encoder: Any = material.run.jepa.encoder_for(which)
    images = material.images[:ATTENTIONS]
    weights = attention_weights(encoder, material.normalized(images)).cpu()  # [m, h, n, n]
    return attention_section(
        images,
        weights.numpy(),
        asked[: len(images)],
        material.grid,
        material.patch_size,
        encoder.depth,
        name=f"{which} encoder",
    )


def _decoder(material: Material, steps: int) -> tuple[Section, dict[str, float]]:
    jepa, p, grid = material.run.jepa, material.patch_size, material.grid
    with torch.no_grad():
        tokens = torch.cat([all_targets(jepa, material.normalized(x)).cpu() for x in material.others.split(BATCH)])
        pixels = torch.cat([material.pixels(x)[0] for x in material.others.split(BATCH)])
    decoder = train_decoder(tokens, pixels, steps=steps, seed=material.seed)
    shares = _explained(material, decoder)
    hidden = middle_block(grid)
    seen = np.setdiff1d(np.arange(grid[0] * grid[1]), hidden)
    rng = generator(Stream.EVALUATION, seed=material.seed, lane=4)
    halves = [np.sort(seen[permutation(rng, len(seen))[: len(seen) // 2]]) for _ in range(2)]
    images = material.images[:DRAWINGS]
    own = all_targets(jepa, material.normalized(images)).cpu()[:, hidden]  # [m, T, D]
    expected = [
        predict(jepa, material.normalized(images), _one_block(len(images), context, hidden, grid).to(material.device))
        .cpu()
        .unflatten(0, (len(images), -1))
        for context in (seen, *halves)
    ]
    noise = torch.Generator().manual_seed(material.seed)
    of_noise = [decoder.draw(expected[0], noise) for _ in range(DRAWS)]
    of_context = [decoder.draw(tokens, noise) for tokens in expected[1:]]
    columns = [decoder.draw(own, noise), *of_noise, *of_context]
    drawn = [_filled(material, images, column, hidden) for column in columns]
    drawings = [
        Drawing(image, torch.from_numpy(seen), torch.from_numpy(hidden), [column[k] for column in drawn])
        for k, image in enumerate(images)
    ]
    titles = ["drawn from the\ntrue targets", *[f"expected,\ndraw {k + 1}" for k in range(DRAWS)]]
    titles += [f"expected from\nhalf the context {word}" for word in ("A", "B")]
    of_image = getattr(jepa.encoder, "input_norm", "none") == "image"
    given = " (whose colour and contrast as a whole are given: the encoder takes them out)" if of_image else ""
    told = {name: f"{100 * share:.0f} %" for name, share in shares.items()}
    text = (
        "A small decoder, trained on targets and pixels of other images, draws the block in red, each patch from its "
        f"token and noise; everything outside the block is the image itself{given}. From the true targets: what the "
        "representation holds. Expected: from the predictions, given all that is seen; draws differ in noise, which "
        "stands for what tokens leave open. Half the context: the predictor saw a random half of the patches, A or B. "
        f"On {len(material.images)} images under the recipe's masks the decoder explains {told['targets']} of the "
        f"pixels' variance from the true targets, {told['predictions']} from the predictions and {told['positions']} "
        "from the mean target of each position."
    )
    return decoder_section(drawings, titles, grid, p, text=text), shares


def _explained(material: Material, decoder: Decoder) -> dict[str, float]:
    """R^2 of the pixels of hidden patches: from targets, from predictions, from the mean target of a position."""
    targets, predictions, positions, pixels = [], [], [], []
    jepa = material.run.jepa
    for first in range(0, len(material.images), BATCH):
        images = material.images[first : first + BATCH]
        x = material.normalized(images)
        # image numbers of a batch begin at 0
        masks = several_masks(
            build_masker(material.run.config), np.arange(first, first + len(images)), 1, seed=material.seed
        )
        dense = all_targets(jepa, x).cpu()
        sets = masks.targets
        targets.append(sets.gather(dense))
        predictions.append(predict(jepa, x, masks.to(material.device)).cpu())
        positions.append(sets.index)
        pixels.append(sets.gather(material.pixels(images)[0]))
    own, index = torch.cat(targets), torch.cat(positions)
    sums = torch.zeros(int(index.max()) + 1, own.shape[1]).index_add_(0, index, own)
    means = sums / torch.bincount(index).clamp(min=1)[:, None]
    truth = torch.cat(pixels)
    given = {"targets": own, "predictions": torch.cat(predictions), "positions": means[index]}
    return {name: explained(decoder, tokens, truth) for name, tokens in given.items()}


def middle_block(grid: Grid) -> NDArray[np.int64]:
    """[T] the patches of the middle quarter of an image."""
    h, w = grid
    rows, columns = (np.arange(n // 4, n - n // 4) if n >= 4 else np.arange(1) for n in (h, w))
    return (rows[:, None] * w + columns).ravel()


def _one_block(count: int, context: NDArray[np.int64], hidden: NDArray[np.int64], grid: Grid) -> MaskBatch:
    """One context and one target set for each of ``count`` images."""
    seen, asked = (PatchSets.from_padded(torch.from_numpy(np.tile(x, (count, 1)))) for x in (context, hidden))
    return MaskBatch(seen, asked, grid, torch.arange(count))


def _filled(material: Material, images: Tensor, drawn: Tensor, hidden: NDArray[np.int64]) -> Tensor:
    """Images [m, 3, h, w] uint8 whose hidden patches are those drawn [m, T, 3 * p * p]."""
    own, centre, deviation = material.pixels(images)
    own[:, hidden] = drawn
    data = material.run.config.data
    pixels = patchify(
        to_pixels(unpatchify(own, material.grid) * deviation + centre, data.mean, data.std), material.patch_size
    )
    kept = patchify(images, material.patch_size)
    kept[:, hidden] = pixels[:, hidden]
    return unpatchify(kept, material.grid)
