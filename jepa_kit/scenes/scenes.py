"""Synthetic scenes: small rendered rooms whose labels pixels alone do not give away.

One to eight solids of eight shapes stand on a textured floor before a textured wall, lit from one side, and hide
parts of one another. Labels follow the low-level tasks of I-JEPA's evaluation (arXiv 2301.08243, table 4), which
are Clevr/Count and Clevr/Dist of VTAB (arXiv 1910.04867), and add a semantic one:

    count     0 to 7   1 to 8 solids
    distance  0 to 5   the distance of the nearest solid, six classes of equal ratio
    shape     0 to 7   the shape of the nearest solid

Each block of 384 consecutive scenes holds each combination of the three labels once, in an order of its own: any
range of indices is balanced, and the labels are independent. A scene is a pure function of (seed, index).

Things of a kind stand together, as in photographs: a solid has the shape, the pattern and about the colours of the
nearest one, with a chance of 0.85 each, and solids keep some distance from one another. So what is hidden can be told
from what is seen; where every solid is unlike every other, there is nothing to predict but the room.

What tells the distance: where a solid touches the floor, measured from the wall's foot (the camera's tilt
differs from scene to scene, its height does not), and haze. Size alone does not, since true sizes differ by 1.7.
Half of the scenes are by day: solids cast shadows, and are darker than the room on average. Half are by night: solids
glow and shed light on the floor, by as much. So no weighted sum of pixels tells where solids are, or how many.

Legend: h, w the image's sides; n solids of a scene, the nearest first; K layouts to choose from. Units as in
``scene_drawing.py``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from jepa_kit.data.order import permutation
from jepa_kit.rng import FloatArray, Stream, generator
from jepa_kit.scenes.drawing import DROP, HUE, MIN_VISIBLE, OF_ITSELF, Canvas, Image, Look, Room
from jepa_kit.scenes.shapes import SOLIDS

COUNT_NAMES = tuple(str(n) for n in range(1, 9))
SHAPE_NAMES = tuple(SOLIDS)
DISTANCE_EDGES = tuple(float(z) for z in np.geomspace(1.0, 2.2, 7).round(3))
"""Edges of the six classes of distance."""
DISTANCE_NAMES = tuple(f"{a:.2f} to {b:.2f}" for a, b in itertools.pairwise(DISTANCE_EDGES))
CLASSES: dict[str, tuple[str, ...]] = {"count": COUNT_NAMES, "distance": DISTANCE_NAMES, "shape": SHAPE_NAMES}
"""The names of each label's classes."""
COMBINATIONS = len(COUNT_NAMES) * len(DISTANCE_NAMES) * len(SHAPE_NAMES)

FAR = 3.0
"""Where the farthest solid may stand."""
RADIUS = 0.5
"""Half the height of a solid of size 1 at distance 1, on the screen."""
KIN = 0.85
"""The chance that a solid is of the nearest one's kind."""
SPREAD = 0.5
"""How far solids leave their places in a row, in places."""
LAYOUTS = 96


@dataclass(frozen=True, eq=False)
class Scene:
    """A rendered scene.

    Args:
        image: [h, w, 3] uint8.
        labels: count, distance and shape, each a class number.
        mask: [h, w] uint8: 0 is the room, 1 the nearest solid, 2 the next.
        visible: [n] the share of each silhouette that is seen, the nearest first.
        shapes: [n] the shape of each solid, a number of ``SHAPE_NAMES``.
        distances: [n] the distance of each solid, ascending.
    """

    image: Image
    labels: dict[str, int]
    mask: Image
    visible: FloatArray
    shapes: NDArray[np.int64]
    distances: FloatArray


def scene_labels(seed: int, index: int) -> dict[str, int]:
    """The labels of a scene, without rendering it."""
    block, place = divmod(index, COMBINATIONS)
    code = int(_label_order(seed, block)[place])
    code, count = divmod(code, len(COUNT_NAMES))
    shape, distance = divmod(code, len(DISTANCE_NAMES))
    return {"count": count, "distance": distance, "shape": shape}


@lru_cache(maxsize=64)
def _label_order(seed: int, block: int) -> NDArray[np.int64]:
    return permutation(generator(Stream.SCENE, seed=seed, epoch=1, lane=block), COMBINATIONS)


def render(seed: int, index: int, size: int | tuple[int, int] = 64) -> Scene:
    """Renders scene ``index`` of the endless series ``seed``.

    Args:
        seed: 0 to 2**63 - 1.
        index: 0 or more.
        size: side, or (height, width), in pixels, at least 16. Sizes of one aspect ratio show one scene.

    Raises:
        ValueError: a side below 16, a negative seed or index.
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
    _make_kin(looks, rng.random(len(looks)) < KIN)
    solids = [Look(row, room) for row in looks[: labels["count"] + 1]]
    canvas = Canvas(height, width)
    layout, visible = canvas.place(solids, layouts)
    image = canvas.finish(room, solids, layout)
    shapes = np.array([solid.shape for solid in solids])
    return Scene(image, labels, canvas.mask(), visible, shapes, layout[:, 3])


def _make_kin(looks: FloatArray, kin: NDArray[np.bool_]) -> None:
    """Gives solids the first one's numbers but those of pose and place on the surface; hues stay a little apart."""
    hues = (looks[0, HUE] + 0.08 * (looks[:, HUE] - 0.5)) % 1.0
    own = looks[:, OF_ITSELF].copy()
    looks[kin] = looks[0]
    looks[:, OF_ITSELF] = own
    looks[kin, HUE] = hues[kin]


def _layouts(rng: np.random.Generator, labels: dict[str, int], room: Room) -> FloatArray:
    """Places for the solids; layouts in which all seem to show come first.

    Returns:
        [K, n, 4]: x and y of a box's middle, half its side, all on the screen, and the distance.
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
    share = _rough_visibility(x, y, radius).min(axis=1)
    order = np.argsort(-np.minimum(share, MIN_VISIBLE + 0.15), kind="stable")
    return np.stack([x, y, radius, z], axis=-1)[order]


def _disc(*circles: tuple[float, int]) -> FloatArray:
    """[points, 2]: so many points on circles of such radii."""
    angles = [(radius, 2 * np.pi * k / count) for radius, count in circles for k in range(count)]
    return np.array([[radius * np.cos(a), radius * np.sin(a)] for radius, a in angles])


_PROBES = _disc((0.0, 1), (0.45, 4), (0.8, 8))


def _rough_visibility(x: FloatArray, y: FloatArray, radius: FloatArray) -> FloatArray:
    """[K, n] share of 13 points of each solid outside the discs of the nearer ones."""
    points = np.stack([x, y], -1)[:, :, None] + radius[:, :, None, None] * _PROBES  # [K, n, 13, 2]
    hidden = np.zeros(points.shape[:3], dtype=bool)
    for j in range(x.shape[1] - 1):
        gap = points[:, j + 1 :] - np.stack([x[:, j], y[:, j]], -1)[:, None, None]
        hidden[:, j + 1 :] |= np.einsum("knpc,knpc->knp", gap, gap) < (0.85 * radius[:, j, None, None]) ** 2
    return 1.0 - hidden.mean(axis=2)
