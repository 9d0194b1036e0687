"""Energy: how far predictions are from targets at each hidden patch, for the targets of the own image and of others.

B = images    n = patches of an image, H * W    P = target patches of all masks    D = width of a target
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.evaluation.features import evaluating
from jepa_kit.evaluation.health.measure import several_masks
from jepa_kit.evaluation.pictures.material import Material
from jepa_kit.evaluation.pictures.panels import show_image
from jepa_kit.evaluation.pictures.sections import COLUMNS, Section, show_map
from jepa_kit.from_config import build_masker
from jepa_kit.losses import is_distance
from jepa_kit.plotting import Axes
from jepa_kit.recipe import PatchRecipe
from jepa_kit.structures import MaskBatch, View

ROWS = 3
"""Images shown: always the first, so that none is picked."""
OTHERS = COLUMNS - 2
"""Other images whose targets are compared."""
IMAGES, MASKS = 64, 4
"""Images of the means, and masks of each, so that most patches are hidden once."""


@dataclass(frozen=True, eq=False)
class Energies:
    """Energies of the predictions of some images.

    Args:
        maps: float64 [1 + OTHERS, B, n], against the targets of the image itself, of the next image, and so on: the
            mean over the masks that hide a patch, NaN if none does.
        distance: name of the distance.
    """

    maps: NDArray[np.float64]
    distance: str

    def figures(self) -> dict[str, Any]:
        """Return the means over patches, then images, and how often the own energy is lowest, with their numbers."""
        hidden = np.isfinite(self.maps[0]).any(1)  # [B]
        means = np.nanmean(self.maps[:, hidden], axis=2)  # [1 + OTHERS, images]
        return {
            "own": float(means[0].mean()),
            "others": float(means[1:].mean()),
            "own_is_lowest": int((means[0] < means[1:].min(0)).sum()),
            "images": int(hidden.sum()),
            "distance": self.distance,
        }


def patch_energies(jepa: PatchRecipe, prediction: Tensor, target: Tensor) -> tuple[Tensor, str]:
    """Return the energy of each patch, float64 [P], and the name of the distance.

    It is the weighted sum of the recipe's distances, as far as they have ``values`` (``interfaces.Loss``); the mean
    squared error if none has; for codes their cross entropy in nats.

    Args:
        jepa: whose distances are taken.
        prediction: [P, D]; scores [P, K] for codes.
        target: [P, D]; codes [P] or [P, 1].
    """
    prediction = prediction.double()
    if not target.is_floating_point():
        return F.cross_entropy(prediction, target.flatten(), reduction="none"), "cross entropy"
    terms = {name: loss for name, loss in jepa.losses.items() if is_distance(loss) and hasattr(loss, "values")}
    target = target.double()
    if not terms:
        return (prediction - target).square().mean(-1), "squared error"
    values = [jepa.weights[name] * term.values(prediction, target) for name, term in terms.items()]  # type: ignore[operator]
    return torch.stack(values).sum(0), " + ".join(terms)


@torch.no_grad()
def energies(jepa: PatchRecipe, images: Tensor, masks: MaskBatch, others: int = OTHERS) -> Energies:
    """Return the energies of the predictions of images, against their own targets and those of other images.

    Targets of another image are at the same places: image b is compared with images b + 1 to b + ``others``, and the
    first follow the last.

    Args:
        jepa: on the device of images and masks.
        images: [B, 3, h, w] normalised, more than ``others``.
        masks: of these images, one or several each.
        others: number of other images.
    """
    own, n = masks.targets, masks.grid[0] * masks.grid[1]
    place = own.image_of_token * n + own.index  # [P]
    counts = torch.bincount(place, minlength=len(images) * n)
    maps, name = [], ""
    with evaluating(jepa):
        out = jepa.predict(View(images, masks))
        for k in range(1 + others):
            elsewhere = replace(own, image=(own.image + k) % len(images))
            target = jepa.targets_at(images, elsewhere) if k else out.target
            values, name = patch_energies(jepa, out.prediction, target)
            sums = torch.zeros(len(counts), dtype=torch.float64, device=values.device).index_add_(0, place, values)
            maps.append((sums / counts).view(len(images), n))
    return Energies(torch.stack(maps).cpu().numpy(), name)


def energy_section(material: Material) -> tuple[Section, dict[str, Any]]:
    """Return the section of energy maps, and the figures of ``Energies``."""
    images, grid = material.images[:IMAGES], material.grid
    masks = several_masks(build_masker(material.run.config), np.arange(len(images)), MASKS, seed=material.seed)
    found = energies(material.recipe, material.normalized(images), masks.to(material.device))
    figures, maps = found.figures(), found.maps
    shown = np.flatnonzero(np.isfinite(maps[0]).any(1))[:ROWS]
    low, high = np.nanpercentile(maps[:, shown], (1, 99))

    def draw(axes: list[list[Axes]]) -> None:
        for row, image in zip(axes, shown.tolist(), strict=False):
            show_image(row[0], images[image])
            for k, panel in enumerate(row[1:]):
                values = maps[k, image]
                show_map(panel, images[(image + k) % len(images)], values.reshape(grid), low, high)
                panel.set_xlabel(f"mean {np.nanmean(values):.3f}", fontsize=7)

    section = Section(
        name="energy",
        title="Energy of predictions",
        text=f"The distance ({found.distance}) between the prediction of each hidden patch and a target: black is near "
        f"and bright far, on one scale; patches that none of {MASKS} masks hides are grey. A row's predictions are "
        "made from the visible patches of its first image. They are compared with the targets of this image, then with "
        "those of others at the same places. If the predictor knows what is hidden, the own map is the darkest of its "
        f"row. Mean over {figures['images']} images: own {figures['own']:.3f}, others {figures['others']:.3f}; the own "
        f"is the lowest of {1 + OTHERS} for {figures['own_is_lowest']} images (by chance "
        f"{figures['images'] / (1 + OTHERS):.0f}).",
        rows=len(shown),
        draw=draw,
        titles=["image", "own targets", "targets of\nanother image", *["another"] * (OTHERS - 1)],
        captions=True,
    )
    return section, figures
