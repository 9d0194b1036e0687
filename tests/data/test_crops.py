"""Crops against torchvision's documented rule (by distribution), Pillow (by pixel) and plain float64 maths."""

import math

import numpy as np
import pytest
from photos import photo
from PIL import Image
from scipy.stats import kstest

from jepa_kit.data.transforms import (
    ATTEMPTS,
    CenterCrop,
    RandomResizedCrop,
    Resize,
    Window,
    crop_box,
    resample,
    train_pipeline,
)

SIDE = 20_000
"""So large an image that whole pixels do not show in the statistics."""


def boxes(n=4000, size=(SIDE, SIDE), scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3)):
    draws = train_pipeline(image_size=(8, 8)).draws(np.arange(n), seed=4, epoch=0)
    return np.array([crop_box(size, row.tolist(), scale=scale, ratio=ratio) for row in draws])


def test_area_and_aspect_are_uniform_if_every_crop_fits():
    """Shares up to 0.5 at ratios 3/4 to 4/3 always fit a square. Seven tests at a level of 1 % each, a fixed seed."""
    left, top, right, bottom = boxes(scale=(0.08, 0.5)).T
    w, h = right - left, bottom - top
    assert kstest(w * h / SIDE**2, "uniform", (0.08, 0.42)).pvalue > 0.01
    low, high = math.log(3 / 4), math.log(4 / 3)
    assert kstest(np.log(w / h), "uniform", (low, high - low)).pvalue > 0.01
    assert kstest(left / (SIDE - w), "uniform").pvalue > 0.01
    assert kstest(top / (SIDE - h), "uniform").pvalue > 0.01
    for a, b in ((w * h, w / h), (left / (SIDE - w), top / (SIDE - h)), (w * h, left / (SIDE - w))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.06


def test_released_scale_is_the_documented_rejection():
    """Scale (0.3, 1): the accepted boxes follow a plain loop of the rule over numpy's own generator."""
    rng = np.random.default_rng(0)

    def documented(height, width):
        for _ in range(10):
            area = height * width * rng.uniform(0.3, 1.0)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return rng.integers(0, width - w + 1), rng.integers(0, height - h + 1), w, h
        raise AssertionError

    theirs = np.array([documented(375 * 40, 500 * 40) for _ in range(4000)])
    left, top, right, bottom = boxes(size=(375 * 40, 500 * 40)).T
    for a, b in zip((left, top, right - left, bottom - top), theirs.T, strict=True):
        assert kstest(a, b).pvalue > 0.01


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((10, 400), (3 / 4, 4 / 3), (193, 0, 206, 10)),  # too wide: the height, and 4/3 of it
        ((400, 10), (3 / 4, 4 / 3), (0, 193, 10, 206)),  # too tall: the width, and as much over 3/4
        ((40, 40), (5.0, 6.0), (0, 16, 40, 24)),  # square, where only wide crops may be
    ],
)
def test_the_crop_is_central_if_none_fits(size, ratio, expected):
    for row in boxes(20, size, (0.9, 1.0), ratio):
        assert tuple(row) == expected


def test_a_whole_image_within_the_ratios_falls_back_to_itself():
    draws = [0.999999, 0.0] * ATTEMPTS + [0.5, 0.5]
    assert crop_box((40, 40), draws, scale=(1.0, 1.0), ratio=(0.5, 2.0)) == (0, 0, 40, 40)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 200), (64, 64), (375, 500)])
def test_boxes_lie_inside_images_of_any_size(size):
    left, top, right, bottom = boxes(300, size).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= size[1]).all()
    assert (bottom <= size[0]).all()
    assert (right > left).all()
    assert (bottom > top).all()


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (20, 30), (90, 70)])
def test_random_crop_is_pillows_crop_and_resize(size):
    """Images smaller than the result too."""
    crop = RandomResizedCrop(image_size=(24, 32), scale=(0.2, 0.9), ratio=(0.5, 2.0))
    image = photo(*size)
    for draws in np.random.default_rng(1).random((12, crop.num_draws)).tolist():
        box = crop_box(size, draws, scale=(0.2, 0.9), ratio=(0.5, 2.0))
        expected = np.asarray(image.crop(box).resize((32, 24), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(np.asarray(crop(image, draws)), expected)


def triangle(source, target):
    """[target, source] weights of bilinear resizing with antialiasing: a triangle as wide as a target pixel, or 1."""
    scale = max(source / target, 1.0)
    centres = (np.arange(target) + 0.5) * source / target
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(source) + 0.5 - centres[:, None]) / scale)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("size", "target"), [((60, 45), (20, 31)), ((20, 16), (33, 47)), ((50, 50), (50, 20))])
def test_resampling_is_the_triangle_filter(size, target):
    """Float64 maths; Pillow rounds to 8 bits after the columns and after the rows."""
    image = photo(*size)
    ours = np.asarray(resample(image, Window((0, 0, size[1], size[0]), target[::-1])))
    plain = np.einsum(
        "yh,hwc,xw->yxc", triangle(size[0], target[0]), np.asarray(image, np.float64), triangle(size[1], target[1])
    )
    assert np.abs(ours - plain).max() <= 1.01


def test_centre_crop_keeps_an_image_of_the_size():
    image = photo(16, 24)
    np.testing.assert_array_equal(np.asarray(CenterCrop(image_size=(16, 24))(image)), np.asarray(image))


@pytest.mark.parametrize(
    ("size", "resized", "box"),
    [
        ((375, 500), (341, 256), (58, 16, 282, 240)),  # the shorter side to 256, then the middle 224
        ((500, 375), (256, 341), (16, 58, 240, 282)),
        ((100, 100), (256, 256), (16, 16, 240, 240)),  # smaller than the result
    ],
)
def test_centre_crop_is_the_fields_224_of_256(size, resized, box):
    image = photo(*size)
    expected = image.resize(resized, Image.Resampling.BILINEAR).crop(box)
    ours = CenterCrop(image_size=(224, 224), share=0.875)(image)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (9, 31), (31, 9), (64, 64)])
def test_centre_crop_of_any_size(size):
    assert CenterCrop(image_size=(20, 28), share=0.9)(photo(*size)).size == (28, 20)


@pytest.mark.parametrize("kind", [RandomResizedCrop, CenterCrop, Resize])
def test_interpolation(kind):
    image, draws = photo(60, 80), [0.5] * RandomResizedCrop.num_draws
    pixels = {
        name: np.asarray(kind(image_size=(30, 40), interpolation=name)(image, draws))
        for name in ("bilinear", "bicubic")
    }
    assert not np.array_equal(pixels["bilinear"], pixels["bicubic"])
    if kind is Resize:
        np.testing.assert_array_equal(pixels["bicubic"], np.asarray(image.resize((40, 30), Image.Resampling.BICUBIC)))


def test_resize_takes_the_whole_image():
    image = photo(30, 50)
    expected = image.resize((16, 24), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(Resize(image_size=(24, 16))(image)), np.asarray(expected))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RandomResizedCrop, {"image_size": (0, 8)}, r"image_size \(=\(0, 8\)\) must be at least 1 pixel each way"),
        (CenterCrop, {"image_size": (8, 0)}, r"image_size \(=\(8, 0\)\) must be at least 1 pixel each way"),
        (Resize, {"image_size": (8, 0)}, r"image_size \(=\(8, 0\)\) must be at least 1 pixel each way"),
        (RandomResizedCrop, {"scale": (0.0, 1.0)}, r"scale \(=\(0.0, 1.0\)\) must be ascending fractions of the area"),
        (RandomResizedCrop, {"scale": (0.5, 0.4)}, r"scale \(=\(0.5, 0.4\)\) must be ascending"),
        (RandomResizedCrop, {"scale": (0.5, 1.1)}, r"scale \(=\(0.5, 1.1\)\) must be .* at most 1"),
        (RandomResizedCrop, {"ratio": (2.0, 1.0)}, r"ratio \(=\(2.0, 1.0\)\) must be ascending ratios"),
        (RandomResizedCrop, {"ratio": (0.0, 1.0)}, r"ratio \(=\(0.0, 1.0\)\) must be ascending .* above 0"),
        (CenterCrop, {"share": 0.0}, r"share \(=0.0\) must be above 0 and at most 1"),
    ],
)
def test_values_outside_their_range(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"image_size": (8, 8)} | options)
