"""Synthetic scenes: small rendered rooms with labels that no linear function of the pixels predicts.

One to eight solids of eight shapes stand on a textured floor in front of a textured wall, lit from one side, and
occlude each other. The labels follow the low-level tasks of I-JEPA's evaluation (arXiv 2301.08243, table 4), which are
Clevr/Count and Clevr/Dist of VTAB (arXiv 1910.04867), and add a semantic one:

    count     0 to 7   1 to 8 solids
    distance  0 to 5   the distance of the nearest solid, six classes of equal ratio
    shape     0 to 7   the shape of the nearest solid

Each block of 384 consecutive scenes has each combination of the three labels once, in random order: any range of
indices is balanced, and the labels are independent. A scene is a pure function of (seed, index).

Similar objects occur together, as in photographs: each solid has the shape, the pattern and roughly the colours of the
nearest one with probability 0.85, and solids keep some distance. So hidden parts can be predicted from visible ones; if
all solids were unrelated, only the room could be predicted.

Distance shows in the point where a solid touches the floor, relative to the foot of the wall (the tilt of the camera
varies, its height does not), and in the haze. Size alone does not show it, since true sizes vary by a factor of 1.7.
Half of the scenes are by day: solids cast shadows and are darker than the room on average. Half are at night: solids
glow and light the floor, by the same amount. So no weighted sum of pixels gives the positions or the number of solids.

Legend: h, w the image's sides; n solids of a scene, the nearest first; K candidate layouts. Units: see ``drawing.py``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from jepa_kit.rng import FloatArray, Stream, generator, permutation
from jepa_kit.scenes.drawing import DROP, HUE, INDIVIDUAL, MIN_VISIBLE, Canvas, Image, Look, Room
from jepa_kit.scenes.shapes import SOLIDS

COUNT_NAMES = tuple(str(n) for n in range(1, 9))
SHAPE_NAMES = tuple(SOLIDS)
DISTANCE_EDGES = tuple(float(z) for z in np.geomspace(1.0, 2.2, 7).round(3))
"""Edges of the six classes of distance."""
DISTANCE_NAMES = tuple(f"{a:.2f} to {b:.2f}" for a, b in itertools.pairwise(DISTANCE_EDGES))
CLASSES: dict[str, tuple[str, ...]] = {"count": COUNT_NAMES, "distance": DISTANCE_NAMES, "shape": SHAPE_NAMES}
"""Label name -> the names of its classes."""
COMBINATIONS = len(COUNT_NAMES) * len(DISTANCE_NAMES) * len(SHAPE_NAMES)

FAR = 3.0
"""Largest distance of a solid."""
RADIUS = 0.5
"""Half the height of a solid of size 1 at distance 1, on the screen."""
SAME_KIND = 0.85
"""Probability that a solid is of the same kind as the nearest one."""
SPREAD = 0.5
"""Horizontal jitter of solids, in widths of their slot."""
LAYOUTS = 96
"""Candidate layouts of a scene."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A rendered scene.

    Args:
        image: [h, w, 3] uint8.
        labels: count, distance and shape, each a class number.
        mask: [h, w] uint8: 0 is the room, 1 the nearest solid, 2 the next.
        visible: [n] the visible fraction of each silhouette, the nearest first.
        shapes: [n] the shape of each solid, an index of ``SHAPE_NAMES``.
        distances: [n] the distance of each solid, ascending.
    """

    image: Image
    labels: dict[str, int]
    mask: Image
    visible: FloatArray
    shapes: NDArray[np.int64]
    distances: FloatArray


def scene_labels(seed: int, index: int) -> dict[str, int]:
    """Return the labels of a scene, without rendering it."""
    block, place = divmod(index, COMBINATIONS)
    code = int(_label_order(seed, block)[place])
    code, count = divmod(code, len(COUNT_NAMES))
    shape, distance = divmod(code, len(DISTANCE_NAMES))
    return {"count": count, "distance": distance, "shape": shape}


@lru_cache(maxsize=64)
def _label_order(seed: int, block: int) -> NDArray[np.int64]:
    return permutation(generator(Stream.SCENE, seed=seed, epoch=1, lane=block), COMBINATIONS)


def render(seed: int, index: int, size: int | tuple[int, int] = 64) -> Scene:
    """Return scene ``index`` of the endless series ``seed``.

    Args:
        seed: 0 to 2**63 - 1.
        index: 0 or more.
        size: side, or (height, width), in pixels, at least 16. Sizes of one aspect ratio show the same scene.

    Raises:
        ValueError: a side below 16, or a negative seed or index.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 16:
        raise ValueError(f"size (={size}) must be at least 16 pixels on each side: solids are not readable below")
    if seed < 0 or index < 0:
        raise ValueError(f"seed (={seed}) and index (={index}) must not be negative")
    labels = scene_labels(seed, index)
    rng = generator(Stream.SCENE, seed=seed, lane=index)
    room = Room(rng, aspect=width / min(height, width))
    layouts = _layouts(rng, labels, room)
    looks = rng.random((len(COUNT_NAMES), 16))
    looks[0, 0] = (labels["shape"] + 0.5) / len(SHAPE_NAMES)
    _copy_kind(looks, rng.random(len(looks)) < SAME_KIND)
    solids = [Look(row, room) for row in looks[: labels["count"] + 1]]
    canvas = Canvas(height, width)
    layout, visible = canvas.place(solids, layouts)
    image = canvas.finish(room, solids, layout)
    shapes = np.array([solid.shape for solid in solids])
    return Scene(image, labels, canvas.mask(), visible, shapes, layout[:, 3])


def _copy_kind(looks: FloatArray, kin: NDArray[np.bool_]) -> None:
    """Copy the first solid's numbers to those of its kind, except pose and phase; hues differ slightly."""
    hues = (looks[0, HUE] + 0.08 * (looks[:, HUE] - 0.5)) % 1.0
    own = looks[:, INDIVIDUAL].copy()
    looks[kin] = looks[0]
    looks[:, INDIVIDUAL] = own
    looks[kin, HUE] = hues[kin]


def _layouts(rng: np.random.Generator, labels: dict[str, int], room: Room) -> FloatArray:
    """Return candidate layouts of the solids, sorted by the estimated visibility of the least visible solid.

    Returns:
        [K, n, 4]: x and y of the middle of a solid's box and half its side, on the screen; and its distance.
    """
    n = labels["count"] + 1
    u = rng.random((LAYOUTS, len(COUNT_NAMES), 4))[:, :n]
    low, high = DISTANCE_EDGES[labels["distance"] : labels["distance"] + 2]
    nearest = low * (high / low) ** (0.1 + 0.8 * u[:, :1, 0])
    z = nearest * 1.05 * (FAR / (nearest * 1.05)) ** np.sort(u[:, :, 0], axis=1)
    z[:, 0] = nearest[:, 0]
    radius = RADIUS * 0.76 * 1.68 ** u[:, :, 1] / z
    slot = np.argsort(u[:, :, 2], axis=1)
    x = (2.0 * (slot + 0.5 + SPREAD * (u[:, :, 3] - 0.5)) / n - 1.0) * room.aspect
    reach = room.aspect - 0.85 * radius
    x = np.clip(x, -reach, reach)
    y = room.horizon - DROP / z + radius
    visible = _estimate_visibility(x, y, radius).min(axis=1)
    # capped, so that the first good layout is taken and not always the least crowded one
    order = np.argsort(-np.minimum(visible, MIN_VISIBLE + 0.15), kind="stable")
    return np.stack([x, y, radius, z], axis=-1)[order]


def _disc(*circles: tuple[float, int]) -> FloatArray:
    """Return [points, 2] on circles, which are given as (radius, number of points)."""
    angles = [(radius, 2 * np.pi * k / count) for radius, count in circles for k in range(count)]
    return np.array([[radius * np.cos(a), radius * np.sin(a)] for radius, a in angles])


_PROBES = _disc((0.0, 1), (0.45, 4), (0.8, 8))


def _estimate_visibility(x: FloatArray, y: FloatArray, radius: FloatArray) -> FloatArray:
    """Return [K, n] the fraction of 13 points of each solid that are outside the discs of nearer solids."""
    points = np.stack([x, y], -1)[:, :, None] + radius[:, :, None, None] * _PROBES  # [K, n, 13, 2]
    hidden = np.zeros(points.shape[:3], dtype=bool)
    for j in range(x.shape[1] - 1):
        gap = points[:, j + 1 :] - np.stack([x[:, j], y[:, j]], -1)[:, None, None]
        hidden[:, j + 1 :] |= np.einsum("knpc,knpc->knp", gap, gap) < (0.85 * radius[:, j, None, None]) ** 2
    return 1.0 - hidden.mean(axis=2)
