"""Draw the page of pictures of a run, and each of its sections.

A guess is a prediction for a hidden patch, compared with the targets of all patches of all images (``maps.Guess``): the
rank of the true patch says how much the prediction knows.

m = images of the section    n = patches of an image, H * W    h = heads
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from jepa_kit.build import build_masker
from jepa_kit.config import versions
from jepa_kit.evaluation.features import extract_features, untrained_encoder
from jepa_kit.evaluation.health.measure import BATCH, measure_health
from jepa_kit.evaluation.health.verdict import judge
from jepa_kit.evaluation.pictures.hidden_block import hidden_block_section
from jepa_kit.evaluation.pictures.maps import Guess, attention_weights, guesses
from jepa_kit.evaluation.pictures.material import Material
from jepa_kit.evaluation.pictures.panels import component_images, show_image, to_uint8
from jepa_kit.evaluation.pictures.sections import (
    COLUMNS,
    RED,
    Section,
    dimmed,
    frame,
    name_row,
    page,
    show_map,
    single,
)
from jepa_kit.evaluation.tables.results import write_results
from jepa_kit.plotting import Axes
from jepa_kit.recipe import PatchRecipe

GUESSES, ATTENTIONS = 3, 2
"""Rows of these sections: always the first images, so that none is picked."""
RANKED = 64
"""Images whose predictions are ranked among all patches, for the median."""
STEPS = 600
"""Updates of the decoder."""


def draw_run(
    material: Material, folder: Path, *, name: str, steps: int = STEPS, log: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Write ``page.png``, a PNG for each section, and ``visualize.json``, and return the content of the latter.

    Args:
        material: from ``gather``.
        folder: made if it is missing.
        name: of the run, for the heading.
        steps: updates of the decoder.
        log: called with the name of each stage.
    """
    run, config = material.run, material.run.config
    log("health")
    health = measure_health(
        cast(PatchRecipe, run.jepa),
        material.images,
        build_masker(config),
        encoder=material.encoder,
        mean=config.data.mean,
        std=config.data.std,
        device=material.device,
    )
    verdict = judge(health)
    log("patch features")
    components = _components(material)
    log("guesses")
    predictions, found = _guesses(material)
    log("attention")
    attention = _attention(material, [guess.patch for guess in found])
    log(f"decoder: {steps} updates on {len(material.others)} images")
    block, fractions = hidden_block_section(material, steps)
    sections = [components, predictions, attention, block]
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
        "median_place": _median_rank(found),
        "patches": found[0].total,
        "decoder_explains": fractions,
        "files": [file.name for file in files],
        "versions": versions(),
    }
    write_results(content, folder / "visualize.json")
    return content


def _components(material: Material) -> Section:
    """Return the section of principal components of patch features, of the encoder and of an untrained one."""
    run, data, which = material.run, material.run.config.data, material.encoder
    encoders: dict[str, Any] = {
        f"{which} encoder": run.jepa.encoder_for(which),
        "untrained": untrained_encoder(run.config, run.config.train.seed),
    }
    coloured = {}
    for name, encoder in encoders.items():
        tokens = extract_features(
            encoder,
            material.images,
            pooling="none",
            device=material.device,
            mean=data.mean,
            std=data.std,
            batch_size=BATCH,
        )
        coloured[name] = component_images(tokens, material.grid)

    def draw(axes: list[list[Axes]]) -> None:
        for panel, image in zip(axes[0], material.images, strict=False):
            show_image(panel, image)
        name_row(axes[0][0], "image")
        for row, (name, (colours, explained)) in zip(axes[1:], coloured.items(), strict=True):
            for panel, picture in zip(row, to_uint8(colours[:COLUMNS]), strict=False):
                show_image(panel, picture)
            name_row(row[0], f"{name}\n({100 * explained:.0f} % of\nvariance)")

    return Section(
        name="patch_pca",
        title="1  Patch features",
        text="The first three principal components of the features of all patches and images, as red, green and blue. "
        "Patches of one colour have similar features. If the network knows objects, colours follow them across images; "
        "if it knows positions, all images look the same.",
        rows=1 + len(encoders),
        draw=draw,
    )


def _guesses(material: Material) -> tuple[Section, list[Guess]]:
    """Return the section of the first guesses, and the guesses of all ``RANKED`` images.

    The section has the cosine maps of predictions over their own image and over those with the nearest patches.
    """
    images, grid, patch_size = material.images, material.grid, material.patch_size
    chosen = range(min(RANKED, len(images)))
    found = guesses(
        cast(PatchRecipe, material.run.jepa), material.normalized(images), material.masks.to(material.device), chosen
    )

    def draw(axes: list[list[Axes]]) -> None:
        for row, guess in zip(axes, found, strict=False):
            low, high = float(np.percentile(guess.cosine.numpy(), 50)), float(guess.cosine.max())
            show_image(row[0], dimmed(images[guess.image], guess.context, grid))
            frame(row[0], [guess.patch], grid, patch_size, RED)
            shown = [(guess.image, guess.patch), *guess.nearest]
            for panel, (image, patch) in zip(row[1:], shown, strict=False):
                show_map(panel, images[image], guess.cosine[image].view(grid).numpy(), low, high)
                frame(panel, [patch], grid, patch_size, RED if image == guess.image else "white")
                panel.set_xlabel(f"cosine {guess.cosine[image, patch]:.2f}", fontsize=7)
            own = guess.cosine[guess.image, guess.patch]
            row[1].set_xlabel(f"{own:.2f}; rank {guess.rank:,} of {guess.total:,}", fontsize=7)

    others = ["nearest patch\nof other images", "second", "third", "fourth", "fifth", "sixth"]
    section = Section(
        name="predictor_guess",
        title="2  The predictor's guess",
        text="For one hidden patch (red), the cosine between its prediction and the target of every patch of "
        f"{len(images)} images, after subtraction of the mean target; black is below the median. "
        "Rank 1: no other patch of all images fits the prediction better than the true one; the median over "
        f"{len(found)} images is {_median_rank(found):,.0f} (by chance: {found[0].total // 2:,}). White frames: "
        "the best patch of the six other images that fit best. If nearest patches have the same position but other "
        "content, the predictor knows only positions.",
        rows=len(found[:GUESSES]),
        draw=draw,
        titles=["context; hidden patch", "own image", *others],
        captions=True,
    )
    return section, found


def _median_rank(found: Sequence[Guess]) -> float:
    return float(np.median([guess.rank for guess in found]))


def _attention(material: Material, queries: Sequence[int]) -> Section:
    """Return the section of the last block's attention: some heads for one patch, their mean, and that of all patches.

    ``queries`` are the patches whose attention is drawn, one for each image: those that the guesses are about.
    """
    encoder: Any = material.run.jepa.encoder_for(material.encoder)
    images, grid, patch_size = material.images[:ATTENTIONS], material.grid, material.patch_size
    weights = attention_weights(encoder, material.normalized(images)).cpu().numpy()  # [m, h, n, n]
    heads = min(weights.shape[1], COLUMNS - 3)

    def draw(axes: list[list[Axes]]) -> None:
        for row, image, weight, patch in zip(axes, images, weights, queries, strict=False):
            show_image(row[0], image)
            frame(row[0], [patch], grid, patch_size, RED)
            maps = [*weight[:heads, patch], weight[:, patch].mean(0), weight.mean((0, 1))]
            for panel, values in zip(row[1:], maps, strict=False):
                show_map(panel, image, values.reshape(grid), 0.0, float(np.percentile(values, 99)))
                frame(panel, [patch], grid, patch_size, RED, 1.0)
            for panel in row[1 + len(maps) :]:
                panel.set_visible(False)

    return Section(
        name="attention",
        title=f"3  Attention of the {material.encoder} encoder, block {encoder.depth}",
        text="Attention of one patch (red, as above) to every patch: some heads, the mean of all heads, and the mean "
        "of all heads and patches. Each map has its own scale from 0 (black) to its 99th percentile (bright).",
        rows=len(images),
        draw=draw,
        titles=["image; patch", *[f"head {k + 1}" for k in range(heads)], "mean of heads", "mean of all\npatches"],
    )
