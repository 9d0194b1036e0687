"""Draw the page of pictures of a run, and each of its sections.

A guess is a prediction for a hidden patch, compared with the targets of all patches of all images (``maps.Guess``): the
rank of the true patch says how much the prediction knows.

m = images of the section    n = patches of an image, H * W    h = heads
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jepa_kit.build import build_masker
from jepa_kit.config import versions
from jepa_kit.evaluation.features import extract_features, untrained_encoder
from jepa_kit.evaluation.health.measure import BATCH, measure_health
from jepa_kit.evaluation.health.verdict import judge
from jepa_kit.evaluation.pictures.hidden_block import hidden_block_section
from jepa_kit.evaluation.pictures.maps import Guess, attention_weights, guesses
from jepa_kit.evaluation.pictures.material import Material
from jepa_kit.evaluation.pictures.sections import (
    COLUMNS,
    Section,
    attention_section,
    components_section,
    guess_section,
    page,
    single,
)
from jepa_kit.evaluation.tables.results import write_results

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
        run.jepa,
        material.images,
        build_masker(config),
        encoder=material.encoder,
        mean=config.data.mean,
        std=config.data.std,
        device=material.device,
    )
    verdict = judge(health)
    log("patch features")
    sections = [_components(material)]
    log("guesses")
    section, found = _guesses(material)
    sections.append(section)
    log("attention")
    sections.append(_attention(material, [guess.patch for guess in found]))
    log(f"decoder: {steps} updates on {len(material.others)} images")
    section, fractions = hidden_block_section(material, steps)
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
        "median_place": float(np.median([guess.rank for guess in found])),
        "patches": int(material.images.shape[0] * np.prod(material.grid)),
        "decoder_explains": fractions,
        "files": [file.name for file in files],
        "versions": versions(),
    }
    write_results(content, folder / "visualize.json")
    return content


def _components(material: Material) -> Section:
    """Return the principal components of patch features as colours, of the encoder and of an untrained one."""
    run, data, which = material.run, material.run.config.data, material.encoder
    encoders: dict[str, Any] = {
        f"{which} encoder": run.jepa.encoder_for(which),
        "untrained": untrained_encoder(run.config, run.config.train.seed),
    }
    tokens = {
        name: extract_features(
            encoder,
            material.images,
            pooling="none",
            device=material.device,
            mean=data.mean,
            std=data.std,
            batch_size=BATCH,
        )
        for name, encoder in encoders.items()
    }
    return components_section(material.images[:COLUMNS], tokens, material.grid)


def _guesses(material: Material) -> tuple[Section, list[Guess]]:
    """Return the section of the first guesses, and the guesses of all ``RANKED`` images."""
    data = material.run.config.data
    found = guesses(
        material.run.jepa,
        material.images.to(material.device),
        material.masks.to(material.device),
        range(min(RANKED, len(material.images))),
        mean=data.mean,
        std=data.std,
    )
    ranks = [guess.rank for guess in found]
    return guess_section(material.images, found[:GUESSES], material.grid, material.patch_size, ranks=ranks), found


def _attention(material: Material, queries: Sequence[int]) -> Section:
    """Return the attention of the patches ``queries``, one for each image: those that the guesses are about."""
    encoder: Any = material.run.jepa.encoder_for(material.encoder)
    images = material.images[:ATTENTIONS]
    weights = attention_weights(encoder, material.normalized(images)).cpu()  # [m, h, n, n]
    return attention_section(
        images,
        weights.numpy(),
        queries[: len(images)],
        material.grid,
        material.patch_size,
        encoder.depth,
        name=f"{material.encoder} encoder",
    )
