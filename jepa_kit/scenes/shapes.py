"""Solids and surface patterns of the synthetic scenes, by ray casting in closed form.

Legend: h, w the samples of a box; P the samples inside the silhouette; F the faces of a solid.

Parallel rays come from slightly above. The box of a solid spans x and y in [-1, 1] (x to the right, y up), the
silhouette touches y = -1, and a pose is two numbers in [0, 1). Normals are in camera space (z towards the viewer).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jepa_kit.rng import FloatArray

PITCH = np.deg2rad(28.0)
"""Angle by which the camera looks down, in radians."""


class Surface(NamedTuple):
    """The surface that the rays of a box hit.

    Attributes:
        mask: [h, w] bool, the silhouette.
        normal: [3, P] unit normals.
        uv: [2, P] coordinates on the surface, about -1 to 1.
    """

    mask: np.ndarray
    normal: FloatArray
    uv: FloatArray


Solid = Callable[[FloatArray, FloatArray, FloatArray], Surface]


def _rotation(yaw: float, pitch: float) -> FloatArray:
    """Return [3, 3] from object to camera coordinates: a rotation about the vertical, then the camera's pitch."""
    c, s, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    turn = np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])
    tilt = np.array([[1.0, 0.0, 0.0], [0.0, cp, -sp], [0.0, sp, cp]])
    return tilt @ turn


def rotate(x: FloatArray, y: FloatArray, angle: float) -> tuple[FloatArray, FloatArray]:
    """Return x and y rotated clockwise by an angle."""
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def sphere(x: FloatArray, y: FloatArray, pose: FloatArray) -> Surface:
    """Return a ball, with a pattern that leans to one side."""
    mask = x * x + y * y < 1.0
    x, y = x[mask], y[mask]
    z = np.sqrt(1.0 - x * x - y * y)
    # longitude and latitude of a globe that leans to one side
    across, up = rotate(x, y, (pose[0] - 0.5) * 1.6)
    uv = np.stack([np.arctan2(across, z) * (2 / np.pi), np.arcsin(np.clip(up, -1, 1)) * (2 / np.pi)])
    return Surface(mask, np.stack([x, y, z]), uv * 1.3)


def _convex(x: FloatArray, y: FloatArray, faces: FloatArray, reach: FloatArray, turn: FloatArray) -> Surface:
    """Return a convex solid: the points p with faces @ p <= reach, rotated.

    Args:
        x: [h, w] of the rays.
        y: [h, w] of the rays.
        faces: [F, 3] unit normals.
        reach: [F] distance of each face from the origin.
        turn: [3, 3] the rotation to camera coordinates.
    """
    normals = faces @ turn.T  # [F, 3] in camera space
    front, back = normals[:, 2] > 1e-9, normals[:, 2] < -1e-9
    # a ray is (x, y, t), t decreasing from the viewer: it enters at the smallest bound of the front faces
    slope = np.einsum("fk,k...->f...", normals[:, :2], np.stack([x, y]))
    t = (reach[:, None, None] - slope) / np.where(np.abs(normals[:, 2]) < 1e-9, 1e-9, normals[:, 2])[:, None, None]
    entry = t[front].min(axis=0)
    mask = entry > t[back].max(axis=0)
    face = np.flatnonzero(front)[t[front].argmin(axis=0)[mask]]
    hit = np.stack([x[mask], y[mask], entry[mask]])  # [3, P]
    normal = normals[face].T
    # two axes in each face: horizontal and upward
    across = np.cross([0.0, 1.0, 0.0], normals)
    across /= np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-9)
    upward = np.cross(normals, across)
    uv = np.stack([np.einsum("pk,kp->p", across[face], hit), np.einsum("pk,kp->p", upward[face], hit)])
    return Surface(mask, normal, uv)


def cube(x: FloatArray, y: FloatArray, pose: FloatArray) -> Surface:
    """Return a cube that stands on a face, with a vertical edge roughly in front."""
    yaw = np.pi / 4 + (pose[0] - 0.5) * np.deg2rad(56)
    half = 1.0 / (np.cos(PITCH) + np.sin(PITCH) * (abs(np.cos(yaw)) + abs(np.sin(yaw))))
    faces = np.concatenate([np.eye(3), -np.eye(3)])
    return _convex(x, y, faces, np.full(6, half), _rotation(yaw, PITCH))


def diamond(x: FloatArray, y: FloatArray, pose: FloatArray) -> Surface:
    """Return an octahedron that stands on one corner, taller than wide."""
    yaw = pose[0] * np.pi / 2
    signs = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], dtype=np.float64)
    width, height = 0.74, 1.0 / np.cos(PITCH)
    faces = signs / np.array([width, height, width])
    length = np.linalg.norm(faces, axis=1)
    return _convex(x, y, faces / length[:, None], 1.0 / length, _rotation(yaw, PITCH))


def cylinder(x: FloatArray, y: FloatArray, pose: FloatArray) -> Surface:
    """Return an upright cylinder with a visible lid."""
    radius = 0.6 + 0.12 * pose[0]
    c, s = np.cos(PITCH), np.sin(PITCH)
    half = (1.0 - radius * s) / c
    depth = np.sqrt(np.maximum(radius**2 - x * x, 0.0))  # towards the viewer, before the pitch
    height = (y + s * depth) / c  # on the side; camera y = c * height - s * depth
    side = (np.abs(x) < radius) & (np.abs(height) <= half)
    lid_depth = (c * half - y) / s
    lid = ~side & (x * x + lid_depth**2 < radius**2)
    mask = side | lid
    lid, height, depth, lid_depth = lid[mask], height[mask], depth[mask], lid_depth[mask]
    x = x[mask]
    across = x / radius
    out = np.sqrt(np.maximum(1.0 - across * across, 0.0))
    normal = np.where(lid, np.array([[0.0], [c], [s]]), np.stack([across, -s * out, c * out]))
    uv = np.where(lid, np.stack([x, lid_depth]), np.stack([np.arcsin(np.clip(across, -1, 1)) * 0.7, height]))
    return Surface(mask, normal, uv)


def cone(x: FloatArray, y: FloatArray, pose: FloatArray) -> Surface:
    """Return an upright cone."""
    radius = 0.74 + 0.1 * pose[0]
    c, s = np.cos(PITCH), np.sin(PITCH)
    tall = (2.0 - radius * s) / c  # apex at camera y = 1, the foot's front edge at y = -1
    k2 = (radius / tall) ** 2
    # height h and depth d of the point at t on a ray: h = h0 + s t, d = d0 + c t
    foot = -1.0 + radius * s  # camera y of the middle of the foot
    h0, d0 = c * (y - foot), -s * (y - foot)
    a = c * c - k2 * s * s
    b = c * d0 + k2 * s * (tall - h0)
    q = x * x + d0 * d0 - k2 * (tall - h0) ** 2
    root = b * b - a * q
    t = (-b + np.sqrt(np.maximum(root, 0.0))) / a
    height = h0 + s * t
    mask = (root > 0.0) & (height >= 0.0) & (height <= tall)
    x, height, depth = x[mask], height[mask], (d0 + c * t)[mask]
    wide = np.maximum(np.sqrt(k2) * (tall - height), 1e-9)
    length = np.sqrt(1.0 + k2)
    out = np.stack([x / wide, np.full_like(x, np.sqrt(k2)), depth / wide]) / length
    normal = np.stack([out[0], c * out[1] - s * out[2], s * out[1] + c * out[2]])
    uv = np.stack([np.arctan2(x, depth) * 0.6, height - 1.0])
    return Surface(mask, normal, uv)


def ring(x: FloatArray, y: FloatArray, pose: FloatArray) -> Surface:
    """Return a torus that stands on its edge, turned a little."""
    turn = np.cos((pose[0] - 0.5) * np.deg2rad(70))
    tube = 0.27 + 0.05 * pose[1]
    x = x / turn
    rho = np.sqrt(x * x + y * y)
    t = (rho - (1.0 - tube)) / tube
    mask = np.abs(t) < 1.0
    x, y, rho, t = x[mask], y[mask], rho[mask], t[mask]
    normal = np.stack([t * x / rho, t * y / rho, np.sqrt(1.0 - t * t)])
    return Surface(mask, normal, np.stack([x, y]))


def star(x: FloatArray, y: FloatArray, pose: FloatArray) -> Surface:
    """Return a star with five points and ten facets."""
    lean = (pose[0] - 0.5) * 0.5
    tips = np.cos(0.4 * np.pi * np.arange(5) - lean)
    y = tips.min() + (y + 1.0) / 2.0 * (tips.max() - tips.min())  # from foot to top
    x, y = rotate(x, y, lean)
    rho, angle = np.sqrt(x * x + y * y), np.arctan2(x, y)
    sector = np.round(angle / (0.4 * np.pi)) * (0.4 * np.pi)
    inside = angle - sector
    side = np.where(inside < 0, -1.0, 1.0)
    u, v = rho * np.cos(inside), rho * np.abs(np.sin(inside))  # along a point, and away from its axis
    notch = 0.5 * np.array([np.cos(0.2 * np.pi), np.sin(0.2 * np.pi)])
    mask = (1.0 - u) * notch[1] - v * (1.0 - notch[0]) > 0.0
    x, y, sector, side = x[mask], y[mask], sector[mask], side[mask]
    # the facet through (0, 0, peak), (1, 0, 0) and (notch, 0)
    peak = 0.5
    facet = np.cross([1.0, 0.0, -peak], [notch[0], notch[1], -peak])
    facet /= np.linalg.norm(facet)
    along, away = facet[0], facet[1] * side
    nx = along * np.sin(sector) + away * np.cos(sector)
    ny = along * np.cos(sector) - away * np.sin(sector)
    return Surface(mask, np.stack([*rotate(nx, ny, -lean), np.full_like(x, facet[2])]), np.stack([x, y]))


def cross(x: FloatArray, y: FloatArray, pose: FloatArray) -> Surface:
    """Return a plus sign with bevelled edges."""
    lean = (pose[0] - 0.5) * 0.3
    x, y = rotate(x, y, lean)
    arm = 0.34 + 0.05 * pose[1]
    ax, ay = np.abs(x), np.abs(y)
    end = 0.95
    mask = ((ax < arm) & (ay < end)) | ((ay < arm) & (ax < end))
    x, y, ax, ay = x[mask], y[mask], ax[mask], ay[mask]
    lying = ax > ay  # in a horizontal arm
    far, near = np.where(lying, ax, ay), np.where(lying, ay, ax)
    bevel = 0.16
    to_side = np.where(far > arm, np.clip(1.0 - (arm - near) / bevel, 0.0, 1.0), 0.0)
    to_end = np.clip(1.0 - (end - far) / bevel, 0.0, 1.0)
    tilt_far, tilt_near = 0.75 * (to_end > to_side), 0.75 * ((to_side >= to_end) & (to_side > 0))
    nx = np.where(lying, tilt_far, tilt_near) * np.sign(x)
    ny = np.where(lying, tilt_near, tilt_far) * np.sign(y)
    nz = np.sqrt(1.0 - nx * nx - ny * ny)
    return Surface(mask, np.stack([*rotate(nx, ny, -lean), nz]), np.stack([x, y]))


SOLIDS: dict[str, Solid] = {f.__name__: f for f in (sphere, cube, cylinder, cone, ring, star, cross, diamond)}
"""The shapes; the label is the index in this order."""


def _soft_step(x: FloatArray, width: float = 0.25) -> FloatArray:
    """Return 0 below -width, 1 above width, and linear values between."""
    return np.clip(x / (2 * width) + 0.5, 0.0, 1.0)


def plain(u: FloatArray, v: FloatArray) -> FloatArray:
    """Return one colour."""
    return np.zeros_like(u)


def stripes(u: FloatArray, v: FloatArray) -> FloatArray:
    """Return vertical stripes."""
    return _soft_step(np.sin(np.pi * u))


def checks(u: FloatArray, v: FloatArray) -> FloatArray:
    """Return a chessboard."""
    return _soft_step(np.sin(np.pi * u) * np.sin(np.pi * v), 0.12)


def dots(u: FloatArray, v: FloatArray) -> FloatArray:
    """Return dots in rows, every other row shifted by half a period."""
    row = np.floor(v)
    du, dv = (u + 0.5 * (row % 2)) % 1.0 - 0.5, v - row - 0.5
    return _soft_step(0.3 - np.sqrt(du * du + dv * dv), 0.06)


def gradient(u: FloatArray, v: FloatArray) -> FloatArray:
    """Return a gradient from one colour to the other, upwards."""
    return np.clip(0.5 + 0.3 * v, 0.0, 1.0)


def waves(u: FloatArray, v: FloatArray) -> FloatArray:
    """Return wavy stripes."""
    return _soft_step(np.sin(np.pi * (u + 0.35 * np.sin(np.pi * v))))


Pattern = Callable[[FloatArray, FloatArray], FloatArray]
PATTERNS: dict[str, Pattern] = {f.__name__: f for f in (plain, stripes, checks, dots, gradient, waves)}
"""Functions of surface coordinates that return the weight of the second colour, 0 to 1, with period 2 (dots: 1)."""
