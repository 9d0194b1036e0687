"""Draw the page of pictures of a run, and each of its sections.

A guess is a prediction for a hidden patch, compared with the targets of all patches of all images (``maps.Guess``): the
rank of the true patch says how much the prediction knows.

m = images of the section    n = patches of an image, H * W    h = heads
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jepa_kit.config import versions
from jepa_kit.evaluation.features import extract_features, has_class_token, untrained_encoder
from jepa_kit.evaluation.health.measure import BATCH, measure_health
from jepa_kit.evaluation.health.verdict import judge
from jepa_kit.evaluation.pictures.energy import energy_section
from jepa_kit.evaluation.pictures.hidden_block import hidden_block_section
from jepa_kit.evaluation.pictures.maps import Guess, attention_weights, guesses, why_no_attention
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
from jepa_kit.from_config import masker_of
from jepa_kit.plotting import Axes
from jepa_kit.recipe import PatchRecipe

GUESSES, ATTENTIONS = 3, 2
"""Rows of these sections: always the first images, so that none is picked."""
RANKED = 64
"""Images whose predictions are ranked among all patches, for the median."""
STEPS = 600
"""Updates of the decoder."""


def draw_run(
    material: Material,
    folder: Path,
    *,
    name: str,
    steps: int = STEPS,
    singles: bool = True,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write ``page.png``, a PNG for each section, and ``visualize.json``, and return the content of the latter.

    Sections that the recipe or its encoder has no material for are left out; a line of the page says why.

    Args:
        material: from ``gather``.
        folder: made if it is missing.
        name: of the run, for the heading.
        steps: updates of the decoder.
        singles: write the PNG of each section too.
        log: called with the name of each stage.
    """
    run, config = material.run, material.run.config
    log("health")
    health = measure_health(
        run.jepa,
        material.images,
        masker_of(config),
        encoder=material.encoder,
        mean=config.data.mean,
        std=config.data.std,
        device=material.device,
    )
    verdict = judge(health)
    sections, left_out = list[Section](), list[str]()
    fractions: dict[str, float] | None = None
    energy: dict[str, Any] | None = None
    found: list[Guess] = []
    if health.of_images is None:
        left_out.append("patch features: an image has one token")
    else:
        log("patch features")
        sections.append(_components(material))
    if health.loss_position is None:  # it is measured if targets are vectors that predictions are compared with
        reason = "; ".join(health.not_measured) if health.loss is None else "targets are codes"
        energies = "" if isinstance(run.jepa, PatchRecipe) else ", energy"
        left_out.append(f"the predictor's guess{energies} and the hidden block ({reason})")
    else:
        log("guesses")
        predictions, found = _guesses(material)
        sections.append(predictions)
    if isinstance(run.jepa, PatchRecipe):
        log("energy")
        section, energy = energy_section(material)
        sections.append(section)
    if why := why_no_attention(run.jepa.encoder_for(material.encoder)):
        left_out.append(f"attention: {why}")
    else:
        log("attention")
        sections.append(_attention(material, {guess.image: guess.patch for guess in found}))
    if health.loss_position is not None:
        log(f"decoder: {steps} updates on {len(material.others)} images")
        block, fractions = hidden_block_section(material, steps)
        sections.append(block)
    for line in left_out:
        log(f"left out: {line}")
    sections = [replace(section, title=f"{k}  {section.title}") for k, section in enumerate(sections, start=1)]
    aspect = material.images.shape[2] / material.images.shape[3]
    slots = ("encoder", "masker", "target", "target_update")
    parts = [f"{slot} {config.slots[slot].name}" for slot in slots if slot in config.slots]
    lines = [f"{config.recipe.name} after {run.step:,} updates; {', '.join(parts)}", str(verdict)]
    lines += [f"left out: {line}" for line in left_out]
    files = [page(sections, folder / "page.png", heading=name, lines=lines, aspect=aspect)]
    files += [single(one, folder / f"{one.name}.png", aspect=aspect) for one in sections if singles]
    content = {
        "step": run.step,
        "verdict": verdict.state,
        "reason": verdict.reason,
        "health": health.to_dict(),
        "left_out": left_out,
        "median_place": _median_rank(found) if found else None,
        "patches": found[0].total if found else None,
        "energy": energy,
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
        title="Patch features",
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
    assert material.masks is not None
    chosen = material.masks.targets.image.unique().tolist()[:RANKED]  # a masker may hide nothing of some images
    found = guesses(material.recipe, material.normalized(images), material.masks.to(material.device), chosen)

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
        title="The predictor's guess",
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


def _attention(material: Material, patches: Mapping[int, int]) -> Section:
    """Return the section of the last block's attention: some heads for one token, their mean, and that of all patches.

    The token is the class token if the encoder has one, else a patch of each image.

    Args:
        material: from ``gather``.
        patches: image -> patch that the guess is about; of other images, the patch in the middle is taken.
    """
    encoder: Any = material.run.jepa.encoder_for(material.encoder)
    images, grid, patch_size = material.images[:ATTENTIONS], material.grid, material.patch_size
    weights = attention_weights(encoder, material.normalized(images)).cpu().numpy()  # [m, h, k + n, k + n]
    prefix = weights.shape[2] - grid[0] * grid[1]
    middle = grid[0] // 2 * grid[1] + grid[1] // 2
    queries = [patches.get(image, middle) for image in range(len(images))]
    class_token = has_class_token(encoder)
    heads = min(weights.shape[1], COLUMNS - 3)

    def draw(axes: list[list[Axes]]) -> None:
        for row, image, every, patch in zip(axes, images, weights[..., prefix:], queries, strict=False):
            own = every[:, 0 if class_token else prefix + patch]  # [h, n]
            show_image(row[0], image)
            maps = [*own[:heads], own.mean(0), every[:, prefix:].mean((0, 1))]
            for panel, values in zip(row[1:], maps, strict=False):
                show_map(panel, image, values.reshape(grid), 0.0, float(np.percentile(values, 99)))
            for panel in row[1 + len(maps) :]:
                panel.set_visible(False)
            for panel, width in zip(row[: 1 + len(maps)], [1.8, *[1.0] * len(maps)], strict=True):
                frame(panel, [] if class_token else [patch], grid, patch_size, RED, width)

    token = "the class token" if class_token else "one patch (red)"
    return Section(
        name="attention",
        title=f"Attention of the {material.encoder} encoder, block {encoder.depth}",
        text=f"Attention of {token} to every patch: some heads, the mean of all heads, and the mean "
        "of all heads and patches. Each map has its own scale from 0 (black) to its 99th percentile (bright).",
        rows=len(images),
        draw=draw,
        titles=[
            "image" if class_token else "image; patch",
            *[f"head {k + 1}" for k in range(heads)],
            "mean of heads",
            "mean of all\npatches",
        ],
    )
