"""Scenes are pure functions of (seed, index), balanced and readable, and pixels do not predict their labels."""

from itertools import pairwise

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier

from jepa_kit.scenes.drawing import MIN_VISIBLE, Canvas
from jepa_kit.scenes.scenes import CLASSES, COMBINATIONS, DISTANCE_EDGES, SAME_KIND, SHAPE_NAMES, render, scene_labels

LABELS = [(1, 0, 6), (3, 3, 2), (4, 5, 4), (4, 5, 1)]
MEANS = [61.55, 63.74, 55.88, 71.79]
COVERED = [444, 772, 565, 577]


@pytest.fixture(scope="module")
def scenes():
    return [render(7, index, 32) for index in range(2 * COMBINATIONS)]


def table(scenes, name):
    return np.array([scene.labels[name] for scene in scenes])


def test_a_scene_is_a_pure_function_of_seed_and_index():
    first = [render(3, index) for index in range(6)]
    again = [render(3, index) for index in reversed(range(6))][::-1]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.mask, b.mask)
        assert a.labels == b.labels
    assert not np.array_equal(render(3, 0).image, render(4, 0).image)
    assert not np.array_equal(render(3, 0).image, render(3, 1).image)


def test_scenes_stay_what_they_were():
    """Numbers of the first scenes of seed 0: if they change, the data set changes."""
    scenes = [render(0, index) for index in range(4)]
    assert [tuple(s.labels.values()) for s in scenes] == LABELS
    np.testing.assert_allclose([s.image.mean() for s in scenes], MEANS, atol=0.01)
    assert [int((s.mask > 0).sum()) for s in scenes] == COVERED


@pytest.mark.parametrize("block", [0, 5])
def test_each_block_holds_each_combination_of_labels_once(block):
    labels = [scene_labels(1, block * COMBINATIONS + i) for i in range(COMBINATIONS)]
    seen = {(x["count"], x["distance"], x["shape"]) for x in labels}
    assert len(seen) == COMBINATIONS == 8 * 6 * len(SHAPE_NAMES)
    for name, names in CLASSES.items():
        assert {x[name] for x in labels} == set(range(len(names)))


def test_blocks_have_orders_of_their_own():
    orders = [[scene_labels(seed, b * COMBINATIONS + i)["count"] for i in range(40)] for seed in (1, 2) for b in (0, 1)]
    assert all(a != b for a, b in pairwise(orders))


def test_labels_say_what_is_in_the_scene(scenes):
    for scene in scenes:
        count = scene.labels["count"] + 1
        assert len(scene.shapes) == len(scene.visible) == len(scene.distances) == count
        assert scene.shapes[0] == scene.labels["shape"]
        assert (np.diff(scene.distances) > 0).all()
        low, high = DISTANCE_EDGES[scene.labels["distance"] : scene.labels["distance"] + 2]
        assert low < scene.distances[0] < high


def test_most_solids_are_of_the_nearest_ones_kind(scenes):
    alike = np.concatenate([scene.shapes[1:] == scene.shapes[0] for scene in scenes])
    p = SAME_KIND + (1 - SAME_KIND) / len(SHAPE_NAMES)  # a solid of another kind may have the same shape
    assert abs(alike.mean() - p) < 4 * np.sqrt(p * (1 - p) / len(alike))
    assert len({scene.shapes[0] for scene in scenes}) == len(SHAPE_NAMES)


def test_each_solid_shows(scenes):
    assert min(scene.visible.min() for scene in scenes) >= MIN_VISIBLE
    hidden = [scene for scene in scenes if scene.visible.min() < 0.95]
    assert len(hidden) > 0.4 * len(scenes)  # and yet they occlude each other


def test_the_mask_holds_each_solid_and_nothing_else():
    for index in range(60):
        scene = render(2, index)
        count = scene.labels["count"] + 1
        assert set(np.unique(scene.mask)) == set(range(count + 1))
        assert scene.mask.dtype == np.uint8
        assert min(np.bincount(scene.mask.ravel())) >= 4


def test_the_nearest_solid_is_whole():
    for index in range(60):
        assert render(2, index).visible[0] > 0.85  # the edge of the image may cut it, solids may not


def test_solids_that_cannot_show_shrink():
    """Solids shrink if all layouts put both at one place."""
    canvas = Canvas(32, 32)
    canvas.fine = 2
    looks = [type("Look", (), {"solid": staticmethod(square), "pose": None})] * 2
    spot = np.array([[[0.0, 0.0, 0.5, 1.0], [0.2, 0.2, 0.5, 2.0]]])
    layout, visible = canvas.place(looks, spot)
    assert visible.min() >= MIN_VISIBLE
    assert layout[0, 2] < 0.5
    np.testing.assert_allclose(layout[:, 1] - layout[:, 2], spot[0, :, 1] - spot[0, :, 2])  # the feet stay
    with pytest.raises(AssertionError, match="no layout shows every solid"):
        canvas.place(looks, np.array([[[0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.5, 2.0]]]))


def square(x, y, pose):
    mask = np.ones(x.shape, dtype=bool)
    return mask, np.zeros((3, mask.sum())), np.zeros((2, mask.sum()))


def test_sizes_show_the_same_scene():
    small, large = render(5, 8, 48), render(5, 8, 96)
    shrunk = large.image.reshape(48, 2, 48, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small.image).mean() < 3.0
    assert small.labels == large.labels


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (16, 16), 200])
def test_any_size(size):
    scene = render(5, 8, size)
    h, w = (size, size) if isinstance(size, int) else size
    assert scene.image.shape == (h, w, 3)
    assert scene.mask.shape == (h, w)
    assert scene.image.std() > 10


def test_day_and_night_balance(scenes):
    """Solids are as much brighter than the rest at night as they are darker by day."""
    contrasts = []
    for scene in scenes:
        solid = scene.mask > 0
        contrasts.append(scene.image[solid].mean() - scene.image[~solid].mean())
    contrasts = np.array(contrasts)
    assert abs(contrasts.mean()) < 8  # of 255
    assert contrasts.std() > 25


def test_pixels_alone_do_not_give_the_labels_away(scenes):
    """Linear and k-NN on pixels, 512 scenes to fit and 256 to test: near chance (sampling error 0.02)."""
    pixels = np.stack([scene.image[::2, ::2].ravel() for scene in scenes]) / 255.0
    pixels = (pixels - pixels.mean(axis=0)) / pixels.std(axis=0)
    fit, test = slice(0, 512), slice(512, None)
    limits = {"count": 0.25, "distance": 0.38, "shape": 0.20}
    for name, limit in limits.items():
        y = table(scenes, name)
        for model in (RidgeClassifier(alpha=1e4), KNeighborsClassifier(10)):
            score = model.fit(pixels[fit], y[fit]).score(pixels[test], y[test])
            assert score < limit, (name, model, score)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 15), r"size \(=15\) must be at least 16 pixels on each side"),
        ((0, 0, (64, 8)), r"size \(=\(64, 8\)\) must be at least 16 pixels"),
        ((-1, 0), r"seed \(=-1\) and index \(=0\) must not be negative"),
        ((0, -3), r"seed \(=0\) and index \(=-3\) must not be negative"),
    ],
)
def test_what_cannot_be_rendered(arguments, message):
    with pytest.raises(ValueError, match=message):
        render(*arguments)
