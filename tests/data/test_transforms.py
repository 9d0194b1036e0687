"""Crops against torchvision's documented rule (by distribution) and Pillow (by pixel); normalisation against numpy."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest

from jepa_kit.data.transforms import ATTEMPTS, CentreCrop, RandomCrop, crop_box, normalize, stack

SIDE = 20_000
"""So large an image that whole pixels do not show in the statistics."""


def boxes(n=4000, size=(SIDE, SIDE), scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3), epoch=0):
    crop = RandomCrop(image_size=(8, 8), scale=scale, ratio=ratio)
    draws, _ = crop.draws(np.arange(n), seed=4, epoch=epoch)
    return np.array([crop_box(size, row.tolist(), scale=scale, ratio=ratio) for row in draws])


def photo(height, width):
    rng = np.random.default_rng(height * 1000 + width)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return smooth.resize((width, height), Image.Resampling.BICUBIC)


def test_area_and_aspect_are_uniform_where_nothing_is_cut():
    """Shares up to 0.5 at ratios 3/4 to 4/3 always fit a square."""
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
def test_where_nothing_fits_the_crop_is_central(size, ratio, expected):
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
def test_crop_is_pillows_crop_and_resize(size):
    """Images smaller than the result too."""
    crop = RandomCrop(image_size=(24, 32), flip=0.5)
    image = photo(*size)
    draws, flips = crop.draws(np.arange(12), seed=1, epoch=2)
    assert 0 < flips.sum() < 12
    for row, flipped in zip(draws, flips, strict=True):
        box = crop_box(size, row.tolist(), scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3))
        expected = np.asarray(image.crop(box).resize((32, 24), Image.Resampling.BILINEAR))
        expected = expected[:, ::-1] if flipped else expected
        np.testing.assert_array_equal(np.asarray(crop.apply(image, row, bool(flipped))), expected)


def test_draws_belong_to_the_sample_and_the_epoch():
    crop = RandomCrop(image_size=(8, 8), flip=0.5)
    draws, flips = crop.draws(np.array([5, 9, 700]), seed=3, epoch=1)
    alone, flip_alone = crop.draws(np.array([700]), seed=3, epoch=1)
    np.testing.assert_array_equal(draws[2:], alone)
    np.testing.assert_array_equal(flips[2:], flip_alone)
    for other in (crop.draws(np.array([700]), seed=4, epoch=1)[0], crop.draws(np.array([700]), seed=3, epoch=2)[0]):
        assert not np.isin(other, alone).any()


@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
def test_share_of_flips(flip):
    flips = RandomCrop(image_size=(8, 8), flip=flip).draws(np.arange(4000), seed=0, epoch=0)[1]
    assert flips.mean() == pytest.approx(flip, abs=4 * math.sqrt(max(flip * (1 - flip), 1e-12) / 4000))


def test_centre_crop_keeps_an_image_of_the_size():
    image = photo(16, 24)
    np.testing.assert_array_equal(np.asarray(CentreCrop(image_size=(16, 24)).apply(image)), np.asarray(image))


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
    ours = CentreCrop(image_size=(224, 224), share=0.875).apply(image)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (9, 31), (31, 9), (64, 64)])
def test_centre_crop_of_any_size(size):
    assert CentreCrop(image_size=(20, 28), share=0.9).apply(photo(*size)).size == (28, 20)


def test_stack_and_normalize():
    images = [photo(6, 5), photo(6, 5).transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    batch = stack(images)
    assert batch.dtype == torch.uint8
    assert batch.shape == (2, 3, 6, 5)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (np.stack([np.asarray(i, dtype=np.float64) for i in images]) / 255.0 - mean) / std
    ours = normalize(batch, mean, std)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)
    assert batch.dtype == torch.uint8  # and is left as it was
    np.testing.assert_array_equal(batch[0].numpy().transpose(1, 2, 0), np.asarray(images[0]))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RandomCrop, {"image_size": (0, 8)}, r"image_size \(=\(0, 8\)\) must be at least 1 pixel each way"),
        (CentreCrop, {"image_size": (8, 0)}, r"image_size \(=\(8, 0\)\) must be at least 1 pixel each way"),
        (RandomCrop, {"scale": (0.0, 1.0)}, r"crop_scale \(=\(0.0, 1.0\)\) must be ascending shares of the area"),
        (RandomCrop, {"scale": (0.5, 0.4)}, r"crop_scale \(=\(0.5, 0.4\)\) must be ascending"),
        (RandomCrop, {"scale": (0.5, 1.1)}, r"crop_scale \(=\(0.5, 1.1\)\) must be .* at most 1"),
        (RandomCrop, {"ratio": (2.0, 1.0)}, r"crop_ratio \(=\(2.0, 1.0\)\) must be ascending ratios"),
        (RandomCrop, {"ratio": (0.0, 1.0)}, r"crop_ratio \(=\(0.0, 1.0\)\) must be ascending .* above 0"),
        (RandomCrop, {"flip": 1.5}, r"flip \(=1.5\) must be a probability, 0 to 1"),
        (CentreCrop, {"share": 0.0}, r"share \(=0.0\) must be above 0 and at most 1"),
    ],
)
def test_values_outside_their_range(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"image_size": (8, 8)} | options)
