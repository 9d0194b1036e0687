"""Solids against the convex hull of their own points, normals against finite differences, patterns in range."""

import numpy as np
import pytest
from scipy.spatial import ConvexHull

from jepa_kit.scenes.shapes import PATTERNS, PITCH, SOLIDS, _rotation

POSES = [np.array(p) for p in ((0.0, 0.0), (0.5, 0.5), (0.99, 0.99), (0.2, 0.7))]


def box(samples=161, half=1.0):
    at = ((np.arange(samples) + 0.5) / samples * 2 - 1) * half
    return np.meshgrid(at, -at)


@pytest.mark.parametrize("pose", POSES, ids=str)
@pytest.mark.parametrize("name", SOLIDS)
def test_a_solid_fills_its_box_and_faces_the_viewer(name, pose):
    x, y = box(half=1.3)
    mask, normal, uv = SOLIDS[name](x, y, pose)
    assert 0.3 < mask.mean() * 1.69 < 0.85  # of the box
    assert -1.02 < y[mask].min() < -0.92  # it stands on the floor
    assert 0.9 < y[mask].max() < 1.02
    assert 0.45 < np.abs(x[mask]).max() < 1.02
    assert normal.shape == (3, mask.sum())
    assert uv.shape == (2, mask.sum())
    np.testing.assert_allclose(np.linalg.norm(normal, axis=0), 1.0, atol=1e-9)
    assert normal[2].min() > -1e-9
    assert np.isfinite(uv).all()
    assert 0.8 < np.abs(uv).max() < 1.5


def solid_points(name, pose):
    """Points of the surface of a convex solid, in camera space, from its plain description."""
    angle = np.linspace(0, 2 * np.pi, 400)
    c, s = np.cos(PITCH), np.sin(PITCH)
    tilt = _rotation(0.0, PITCH)
    if name == "sphere":
        return np.stack([np.cos(angle), np.sin(angle)], 1)
    if name == "cylinder":
        r = 0.6 + 0.12 * pose[0]
        h = (1.0 - r * s) / c
        rims = [np.stack([r * np.cos(angle), np.full_like(angle, k * h), r * np.sin(angle)]) for k in (-1, 1)]
        return (tilt @ np.concatenate(rims, axis=1))[:2].T
    if name == "cone":
        r = 0.74 + 0.1 * pose[0]
        tall = (2.0 - r * s) / c
        foot = np.stack([r * np.cos(angle), np.zeros_like(angle), r * np.sin(angle)])
        points = tilt @ np.concatenate([foot, [[0.0], [tall], [0.0]]], axis=1)
        return points[:2].T + np.array([0.0, -1.0 + r * s])
    if name == "cube":
        yaw = np.pi / 4 + (pose[0] - 0.5) * np.deg2rad(56)
        half = 1.0 / (c + s * (abs(np.cos(yaw)) + abs(np.sin(yaw))))
        corners = half * np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)])
        return (_rotation(yaw, PITCH) @ corners.T)[:2].T
    corners = np.array([[0.74, 0, 0], [-0.74, 0, 0], [0, 1 / c, 0], [0, -1 / c, 0], [0, 0, 0.74], [0, 0, -0.74]])
    return (_rotation(pose[0] * np.pi / 2, PITCH) @ corners.T)[:2].T


@pytest.mark.parametrize("pose", POSES, ids=str)
@pytest.mark.parametrize("name", ["sphere", "cube", "cylinder", "cone", "diamond"])
def test_silhouettes_of_convex_solids_are_the_hulls_of_their_points(name, pose):
    x, y = box(241)
    mask = SOLIDS[name](x, y, pose)[0]
    hull = ConvexHull(solid_points(name, pose))
    inside = np.ones(x.shape, dtype=bool)
    for a, b, offset in hull.equations:
        inside &= a * x + b * y + offset <= 0
    assert (mask != inside).mean() < 0.004
    assert mask.mean() * 4 == pytest.approx(hull.volume, rel=0.01)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_mix_two_colours(name):
    u, v = np.meshgrid(np.linspace(-3, 3, 200), np.linspace(-3, 3, 200))
    mix = PATTERNS[name](u, v)
    assert mix.shape == u.shape
    assert mix.min() >= 0.0
    assert mix.max() <= 1.0
    if name != "plain":
        assert mix.min() < 0.1
        assert mix.max() > 0.9
        assert 0.2 < mix.mean() < 0.8
