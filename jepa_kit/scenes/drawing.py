"""Draw synthetic scenes: the room, the appearance of solids, and the canvas that combines them.

Legend: h, w the image's sides; n solids of a scene, the nearest first; P visible samples of a solid. Screen coordinates
are in halves of the image's shorter side, y up, from the middle. A floor point at distance z is DROP / z below the
horizon.
"""

from __future__ import annotations

import colorsys
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from jepa_kit.rng import FloatArray
from jepa_kit.scenes.shapes import PATTERNS, SOLIDS, rotate

DROP, WALL = 1.85, 4.0
"""Height of the camera above the floor, on the screen at distance 1; and the distance of the wall."""
MIN_VISIBLE = 0.4
"""Smallest visible fraction of the silhouette of each solid."""
SHADOW = 0.6
NIGHT, GLOW, FLOOR_GLOW = 0.42, 0.42, 0.65
"""At night: the room's brightness, the light of a solid itself, and its light on the floor. Solids and the floor around
them are then as much brighter than an empty room as they are darker by day (tests/scenes/test_scenes.py)."""

Image = NDArray[np.uint8]


class Room:
    """Camera, light, floor and wall of a scene."""

    def __init__(self, rng: np.random.Generator, aspect: float) -> None:
        u = rng.random(25)
        self.aspect = aspect
        self.night = bool(u[24] < 0.5)
        self.horizon = 0.95 + 0.25 * u[0]
        side = (u[1] - 0.5) * 2.2
        light = np.array([np.sign(side) * (0.35 + abs(side)), 0.9 + 0.5 * u[2], 0.8])
        self.light = light / np.linalg.norm(light)
        self.ambient = 0.42 + 0.14 * u[3]
        warmth = (u[4] - 0.5) * 0.16
        self.tint = np.array([1.0 + warmth, 1.0, 1.0 - warmth])
        self.floor = _colour(u[5], 0.08 + 0.42 * u[6], 0.4 + 0.45 * u[7])
        self.floor2 = _colour(u[5] + 0.12 * (u[8] - 0.5), 0.08 + 0.42 * u[9], 0.35 + 0.55 * u[10])
        self.wall = _colour(u[11], 0.06 + 0.36 * u[12], 0.45 + 0.45 * u[13])
        self.wall2 = _colour(u[11] + 0.15 * (u[14] - 0.5), 0.06 + 0.4 * u[15], 0.4 + 0.55 * u[16])
        self.haze = 0.5 * self.wall + 0.5 * np.array([0.8, 0.83, 0.88])
        if self.night:
            for colour in (self.floor, self.floor2, self.wall, self.wall2, self.haze):
                colour *= NIGHT
        self.floor_kind = int(u[17] * 6)
        self.wall_kind = int(u[18] * 6)
        self.floor_turn, self.floor_scale = u[19] * np.pi, 1.5 + 1.7 * u[20]
        self.wall_turn, self.wall_scale = u[21] * np.pi, 2.0 + 3.0 * u[22]
        self.offset = 4.0 * u[23]
        self.grain = rng.random((2, 3, 24, 24)) - 0.5  # floor and wall, three octaves

    def paint(self, height: int, width: int) -> FloatArray:
        """Return [h, w, 3] the empty room."""
        y, x, unit = _coordinates(height, width)
        foot = self.horizon - DROP / WALL
        # the wall
        p, q = rotate(x, y, self.wall_turn)
        mix = _pattern(self.wall_kind, self.wall_scale * p, self.wall_scale * q + self.offset)
        mix = 0.55 * mix + 1.3 * _noise(self.grain[1], height, width)
        wall = self.wall + (self.wall2 - self.wall) * np.clip(mix, 0, 1)[..., None]
        wall = wall * (0.86 + 0.22 * np.clip(y - foot, 0, 1.2) - 0.1 * x * -self.light[0])[..., None]
        # the floor, in coordinates of the room
        away = DROP / np.maximum(self.horizon - y, DROP / (WALL * 1.05))  # [h, 1] distance
        across = x * away * 1.2
        p, q = rotate(across, away, self.floor_turn)
        mix = _pattern(self.floor_kind, self.floor_scale * p, self.floor_scale * q + self.offset)
        mix = 0.5 + (mix - 0.5) / (1.0 + (away * self.floor_scale / 7.0) ** 4)  # fade what is finer than a pixel
        mix = mix + 0.8 * _noise(self.grain[0], height, width)
        floor = self.floor + (self.floor2 - self.floor) * np.clip(mix, 0, 1)[..., None]
        floor = self.hazed(floor * 0.95, away[..., None])
        floor *= (1.0 - 0.35 * np.exp(-np.maximum(foot - y, 0.0) / 0.05))[..., None]  # shade in the corner
        edge = np.clip((y - foot) / unit + 0.5, 0.0, 1.0)[..., None]
        return floor + (self.hazed(wall, WALL) - floor) * edge

    def hazed(self, colour: FloatArray, distance: FloatArray | float) -> FloatArray:
        """Return a colour blended with that of the haze: 0 % of it at distance 1, 37 % at 3."""
        clear = np.exp(-0.23 * np.maximum(np.asarray(distance) - 1.0, 0.0))
        return self.haze + (colour - self.haze) * clear


def _coordinates(height: int, width: int) -> tuple[FloatArray, FloatArray, float]:
    """Return y [h, 1] and x [1, w] of the pixels' middles, and the side of a pixel."""
    unit = 2.0 / min(height, width)
    y, x = (height - 1) / 2 - np.arange(height, dtype=float), np.arange(width, dtype=float) - (width - 1) / 2
    return y[:, None] * unit, x[None, :] * unit, unit


def _colour(hue: float, saturation: float, value: float) -> FloatArray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


def _pattern(kind: int, u: FloatArray, v: FloatArray) -> FloatArray:
    """Return a pattern for the floor or the wall, 0 to 1; kinds 0 and 5 are plain and show only the grain."""
    name = ("plain", "stripes", "checks", "dots", "waves", "plain")[kind]
    return PATTERNS[name](u, v) if name != "plain" else np.full(np.broadcast_shapes(u.shape, v.shape), 0.5)


@lru_cache(maxsize=32)
def _weights(length: int, cells: int) -> FloatArray:
    """Return [length, cells + 1] weights of a cosine interpolation between cells + 1 knots."""
    at = np.linspace(0.0, cells, length, endpoint=False)
    left = np.floor(at).astype(np.int64)
    weight = 0.5 - 0.5 * np.cos(np.pi * (at - left))
    rows = np.zeros((length, cells + 1))
    rows[np.arange(length), left] = 1.0 - weight
    rows[np.arange(length), left + 1] += weight
    return rows


def _noise(knots: FloatArray, height: int, width: int) -> FloatArray:
    """Return [h, w] smooth noise of three octaves, about -0.5 to 0.5."""
    total = np.zeros((height, width))
    for octave, cells in enumerate((4, 9, 22)):
        total += (
            _weights(height, cells) @ knots[octave, : cells + 1, : cells + 1] @ _weights(width, cells).T / (1 + octave)
        )
    return total * 0.6


HUE, INDIVIDUAL = 2, [6, 7, 10, 11]
"""Columns of the numbers of a ``Look``: its hue; its pose and phase, which solids of one kind do not share."""


class Look:
    """Shape, colours and pattern of a solid, from 16 numbers in [0, 1)."""

    def __init__(self, u: FloatArray, room: Room) -> None:
        self.shape = int(u[0] * len(SOLIDS))
        self.solid = tuple(SOLIDS.values())[self.shape]
        self.pattern = tuple(PATTERNS.values())[int(u[1] * len(PATTERNS))]
        hues = [_colour(u[2] + k / 5, 0.5 + 0.4 * u[3], 0.55 + 0.42 * u[4]) for k in range(5)]
        clash = [min(np.abs(c - room.floor).sum(), np.abs(c - room.wall).sum()) for c in hues]
        chosen = next((k for k in range(5) if clash[k] > 0.6), int(np.argmax(clash)))
        self.colour = hues[chosen]
        if u[5] < 0.4:
            self.colour2 = self.colour * 0.45
        elif u[5] < 0.7:
            self.colour2 = 0.35 * self.colour + 0.65
        else:
            self.colour2 = _colour(u[2] + chosen / 5 + 0.3 + 0.4 * u[13], 0.5 + 0.35 * u[14], 0.5 + 0.5 * u[15])
        self.pose = u[6:8]
        self.frequency = 1.5 + 1.3 * u[8]
        self.turn = u[9] * np.pi
        self.phase = 2.0 * u[10:12]
        self.gloss = 0.55 * max(0.0, 2.0 * u[12] - 1.0)

    def shade(self, normal: FloatArray, uv: FloatArray, room: Room) -> FloatArray:
        """Return [3, P] the colours of surface points: pattern, diffuse light, highlight."""
        u, v = self.frequency * uv + self.phase[:, None]
        mix = self.pattern(*rotate(u, v, self.turn))
        sky = 0.825 + 0.275 * normal[1]  # more light comes from above than from the floor
        light = room.ambient * sky + 0.72 * np.maximum(room.light @ normal, 0.0)
        if room.night:
            light = 0.6 * light + GLOW
        half = room.light + np.array([0.0, 0.0, 1.0])
        shine = np.maximum((half / np.linalg.norm(half)) @ normal, 0.0)
        shine *= shine
        shine *= shine
        shine *= shine  # power 8; `shine**3` below makes it 24
        colour = np.outer(self.colour, light) + np.outer(self.colour2 - self.colour, light * mix)
        return colour + self.gloss * shine**3


class Canvas:
    """An image with ``fine`` x ``fine`` samples per pixel; nearer solids are placed first and own their samples."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.fine = 4 if min(height, width) <= 96 else 3 if min(height, width) <= 160 else 2
        self.unit = 2.0 / (min(height, width) * self.fine)
        self.owner = np.zeros((height * self.fine, width * self.fine), dtype=np.uint8)
        self.parts: list[tuple[tuple[NDArray[np.int64], ...], FloatArray, FloatArray]] = []

    def place(self, looks: list[Look], layouts: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Place the solids in the first layout in which all are visible enough.

        Layouts are sorted, so it is nearly always the first one. If none is good, the solids are shrunk; 2,500 crowded
        scenes never needed it.

        Args:
            looks: of n solids, the nearest first.
            layouts: [K, n, 4] x, y, radius and distance.

        Returns:
            [n, 4] the layout, and [n] the visible fraction of each silhouette.
        """
        for shrink in (1.0, 0.7, 0.4):
            for layout in layouts:
                x, y, radius, z = layout.T
                layout = np.stack([x, y - radius * (1.0 - shrink), radius * shrink, z], axis=1)
                self.owner[:], self.parts = 0, []
                visible = np.array([self._cover(look, *box) for look, box in zip(looks, layout[:, :3], strict=True)])
                if visible.min() >= MIN_VISIBLE:
                    return layout, visible
        raise AssertionError("no layout shows every solid, not even with solids of 0.4 their size")

    def _cover(self, look: Look, x: float, y: float, radius: float) -> float:
        """Give a solid the free samples of its silhouette, and return which fraction of the silhouette they are."""
        rows, columns = self.owner.shape
        top, left = (rows / 2 - (y + radius) / self.unit), (columns / 2 + (x - radius) / self.unit)
        span = 2 * radius / self.unit
        i = np.arange(int(np.floor(top)), int(np.ceil(top + span)) + 1)
        j = np.arange(int(np.floor(left)), int(np.ceil(left + span)) + 1)
        across, up = ((j + 0.5 - left) / span * 2 - 1)[None, :], (1 - (i + 0.5 - top) / span * 2)[:, None]
        xx, yy = np.broadcast_arrays(across, up)
        mask, normal, uv = look.solid(xx, yy, look.pose)
        row, column = np.nonzero(mask)
        row, column = row + i[0], column + j[0]
        seen = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        seen[seen] = self.owner[row[seen], column[seen]] == 0
        samples = row[seen], column[seen]
        self.parts.append((samples, normal[:, seen], uv[:, seen]))
        self.owner[samples] = len(self.parts)
        return float(seen.mean())

    def mask(self) -> Image:
        """Return [h, w] the owner of the middle sample of each pixel: 0 for the room, 1 for the nearest solid."""
        middle = self.fine // 2
        return np.ascontiguousarray(self.owner[middle :: self.fine, middle :: self.fine])

    def finish(self, room: Room, looks: list[Look], layout: FloatArray) -> Image:
        """Return [h, w, 3] uint8 the image: room, shadows, then the solids' samples averaged over each pixel."""
        picture = room.paint(self.height, self.width)
        for look, place in zip(looks, layout, strict=True):
            self._shade_floor(picture, room, look, *place[:3])
        colours = [
            room.hazed(look.shade(normal, uv, room).T, place[3])
            for look, (_, normal, uv), place in zip(looks, self.parts, layout, strict=True)
        ]
        rows, columns = (np.concatenate([part[0][axis] for part in self.parts]) // self.fine for axis in (0, 1))
        pixel, samples = rows * self.width + columns, np.concatenate(colours)
        num_pixels, weight = self.height * self.width, 1.0 / self.fine**2
        empty = 1.0 - weight * np.bincount(pixel, minlength=num_pixels)
        solid = np.stack([np.bincount(pixel, samples[:, c], num_pixels) for c in range(3)], axis=1) * weight
        picture = picture * empty.reshape(self.height, self.width, 1) + solid.reshape(picture.shape)
        return np.round(np.clip(picture * room.tint, 0.0, 1.0) * 255.0).astype(np.uint8)

    def _shade_floor(self, picture: FloatArray, room: Room, look: Look, x: float, y: float, radius: float) -> None:
        """Draw the shadow of a solid, on the side away from the light, or at night its light on the floor."""
        y_of, x_of, unit = _coordinates(self.height, self.width)
        x = x - 0.75 * radius * room.light[0] * (not room.night)
        wide, deep = 1.15 * radius, 0.36 * radius
        middle = y - 0.88 * radius
        top, bottom = (self.height / 2 - (middle + s * 1.4 * deep) / unit for s in (1, -1))
        left, right = (self.width / 2 + (x + s * 1.4 * wide) / unit for s in (-1, 1))
        rows = slice(max(int(top), 0), max(int(bottom) + 1, 0))
        columns = slice(max(int(left), 0), max(int(right) + 1, 0))
        far = np.sqrt(((x_of[:, columns] - x) / wide) ** 2 + ((y_of[rows] - middle) / deep) ** 2)
        shade = np.clip((1.35 - far) / 0.9, 0.0, 1.0)
        shade = (shade * shade * (3 - 2 * shade))[..., None]
        if room.night:
            picture[rows, columns] += FLOOR_GLOW * shade * 0.5 * (look.colour + look.colour2)
        else:
            picture[rows, columns] *= 1.0 - SHADOW * shade
