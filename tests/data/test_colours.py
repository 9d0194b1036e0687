"""Colour transforms against colorsys, scipy.ndimage and float64 maths; their amounts by distribution."""

import colorsys
import itertools
import math

import numpy as np
import pytest
from photos import photo
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.ndimage import gaussian_filter
from scipy.stats import binomtest, chisquare, kstest

from jepa_kit.data.transforms import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Pipeline,
    Solarize,
    VerticalFlip,
    colours,
)
from jepa_kit.data.transforms.crops import Resize

IMAGE = photo(40, 30, seed=3)
PIXELS = np.asarray(IMAGE, dtype=np.float64)
LUMA = PIXELS @ (0.299, 0.587, 0.114)
"""ITU-R 601."""
ONLY = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


def jittered(u, **amounts):
    """Return the image with one amount of the jitter, whose draw is u."""
    place = 1 + list(ONLY).index(next(iter(amounts)))
    draws = [0.0] * 9
    draws[place] = u
    return np.asarray(ColorJitter(**(ONLY | amounts))(IMAGE, draws), dtype=np.float64)


def blended(other, factor):
    return np.clip(other + factor * (PIXELS - other), 0, 255)


@pytest.mark.parametrize("u", [0.0, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("x", [0.4, 1.6])
def test_brightness_contrast_and_saturation(u, x):
    """Within the rounding of 8 bits: one level of the result, and one of the grey that it is blended with."""
    low = max(0.0, 1 - x)
    factor = low + (1 + x - low) * u
    others = {"brightness": 0.0, "contrast": LUMA.mean(), "saturation": LUMA[..., None]}
    for name, other in others.items():
        slack = 1.01 + abs(1 - factor) * (name != "brightness")
        assert np.abs(jittered(u, **{name: x}) - blended(other, factor)).max() <= slack, name


@pytest.mark.parametrize("u", [0.0, 0.25, 0.75])
def test_hue_shifts_as_in_colorsys(u):
    """Pillow's HSV has 8 bits a channel: the median pixel is a level off, the worst a few hues of 256."""
    turn = 0.5 * (2 * u - 1)
    expected = np.array(
        [
            colorsys.hsv_to_rgb((h + turn) % 1.0, s, v)
            for h, s, v in (colorsys.rgb_to_hsv(*pixel) for pixel in (PIXELS / 255).reshape(-1, 3))
        ]
    ).reshape(PIXELS.shape)
    difference = np.abs(jittered(u, hue=0.5) - 255 * expected)
    assert np.median(difference) <= 1.0
    assert difference.max() <= 8.0


def test_no_shift_is_only_the_conversion_to_hsv():
    np.testing.assert_array_equal(jittered(0.5, hue=0.3), np.asarray(IMAGE.convert("HSV").convert("RGB")))


def test_the_order_is_that_of_the_draws():
    """Brightness 1.8 clips, so that contrast 0.2 before or after it makes another image."""
    jitter = ColorJitter(brightness=0.8, contrast=0.8, saturation=0.0, hue=0.0)
    up, down = 1 - 2**-32, 0.0
    first = np.asarray(jitter(IMAGE, [0.0, up, down, 0.0, 0.0, 0.1, 0.2, 0.3, 0.4]))
    second = np.asarray(jitter(IMAGE, [0.0, up, down, 0.0, 0.0, 0.2, 0.1, 0.3, 0.4]))
    bright = np.clip(PIXELS * 1.8, 0, 255)
    mean = (bright @ (0.299, 0.587, 0.114)).mean()
    assert np.abs(first - (mean + 0.2 * (bright - mean))).max() <= 2.0
    assert np.abs(first.astype(int) - second).max() > 10


def test_all_orders_are_equally_likely(monkeypatch):
    """Chi-squared over the 24 orders, at a level of 1 %."""
    order = []
    monkeypatch.setattr(colours, "_ENHANCERS", [lambda image, k=k: _Recorder(image, order, k) for k in range(3)])
    monkeypatch.setattr(colours, "shift_hue", lambda image, share: order.append(3) or image)
    jitter = ColorJitter()
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for draws in _draws(jitter, 4800).tolist():
        order.clear()
        jitter(IMAGE, draws)
        counts[tuple(order)] += 1
    assert chisquare(list(counts.values())).pvalue > 0.01


class _Recorder:
    def __init__(self, image, order, k):
        self.image, self.order, self.k = image, order, k

    def enhance(self, factor):
        self.order.append(self.k)
        return self.image


def _draws(transform, n):
    pipeline = Pipeline([("resize", Resize(image_size=(4, 4))), ("it", transform)])
    return pipeline.draws(np.arange(n), seed=5, epoch=1)


def test_amounts_are_uniform(monkeypatch):
    """Kolmogorov-Smirnov at a level of 1 % each."""
    seen = {k: [] for k in range(4)}

    class Seen:
        def __init__(self, image, k):
            self.image, self.k = image, k

        def enhance(self, factor):
            seen[self.k].append(factor)
            return self.image

    monkeypatch.setattr(colours, "_ENHANCERS", [lambda image, k=k: Seen(image, k) for k in range(3)])
    monkeypatch.setattr(colours, "shift_hue", lambda image, share: seen[3].append(share) or image)
    jitter = ColorJitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    for draws in _draws(jitter, 2000).tolist():
        jitter(IMAGE, draws)
    for k, (low, width) in enumerate([(0.6, 0.8), (0.0, 2.5), (0.8, 0.4), (-0.1, 0.2)]):
        assert kstest(seen[k], "uniform", (low, width)).pvalue > 0.01


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0])
def test_blur_is_nearly_the_gaussian(sigma):
    """Three box filters: within 4 levels anywhere and half a level on average, borders (repeated) left out."""
    blurred = np.asarray(GaussianBlur(sigma=(sigma, sigma), p=1.0)(IMAGE, [0.0, 0.7]), dtype=np.float64)
    exact = gaussian_filter(PIXELS, (sigma, sigma, 0), mode="nearest")
    edge = math.ceil(2 * sigma)
    difference = np.abs(blurred - exact)[edge:-edge, edge:-edge]
    assert difference.max() <= 4.0
    assert difference.mean() <= 0.75


def test_grey_is_the_luma():
    grey = np.asarray(Grayscale(p=1.0)(IMAGE, [0.9]), dtype=np.float64)
    assert np.abs(grey - LUMA[..., None]).max() <= 0.51
    assert grey.shape == PIXELS.shape


def test_solarise():
    ours = np.asarray(Solarize(threshold=100, p=1.0)(IMAGE, [0.9]))
    np.testing.assert_array_equal(ours, np.where(PIXELS < 100, PIXELS, 255 - PIXELS))


@pytest.mark.parametrize(("kind", "axis"), [(HorizontalFlip, 1), (VerticalFlip, 0)])
def test_flips(kind, axis):
    flip = kind(p=0.5)
    np.testing.assert_array_equal(np.asarray(flip(IMAGE, [0.49])), np.flip(PIXELS, axis))
    assert flip(IMAGE, [0.5]) is IMAGE


def test_each_is_pillows_operation():
    """The image is what Pillow's own calls give, to the bit."""
    factor = 0.6 + 0.8 * 0.25
    for name, enhance in (("brightness", "Brightness"), ("contrast", "Contrast"), ("saturation", "Color")):
        expected = getattr(ImageEnhance, enhance)(IMAGE).enhance(factor)
        np.testing.assert_array_equal(jittered(0.25, **{name: 0.4}), np.asarray(expected), name)
    for transform, draws, expected in (
        (GaussianBlur(sigma=(0.5, 1.5), p=1.0), [0.0, 0.25], IMAGE.filter(ImageFilter.GaussianBlur(0.75))),
        (Grayscale(p=1.0), [0.0], ImageOps.grayscale(IMAGE).convert("RGB")),
        (Solarize(threshold=100, p=1.0), [0.0], ImageOps.solarize(IMAGE, 100)),
        (HorizontalFlip(p=1.0), [0.0], ImageOps.mirror(IMAGE)),
        (VerticalFlip(p=1.0), [0.0], ImageOps.flip(IMAGE)),
    ):
        assert transform(IMAGE, draws).tobytes() == expected.tobytes(), type(transform).__name__


PROBABLE = {
    "horizontal_flip": HorizontalFlip(p=0.3),
    "vertical_flip": VerticalFlip(p=0.3),
    "color_jitter": ColorJitter(p=0.3),
    "gaussian_blur": GaussianBlur(p=0.3),
    "grayscale": Grayscale(p=0.3),
    "solarize": Solarize(p=0.3),
}


@pytest.mark.parametrize("name", PROBABLE)
def test_each_is_applied_with_its_probability(name):
    """A binomial test at a level of 0.1 %, as there are six; an image that is left alone is not even copied."""
    transform = PROBABLE[name]
    small = IMAGE.resize((4, 4))
    happened = sum(transform(small, draws) is not small for draws in _draws(transform, 2000).tolist())
    assert binomtest(happened, 2000, 0.3).pvalue > 0.001


@pytest.mark.parametrize("kind", [HorizontalFlip, VerticalFlip, ColorJitter, GaussianBlur, Grayscale, Solarize])
@pytest.mark.parametrize(("p", "expected"), [(0.0, False), (1.0, True)])
def test_never_and_always(kind, p, expected):
    for u in (0.0, 1 - 2**-32):
        assert (kind(p=p)(IMAGE, [u] * 9) is not IMAGE) == expected
    with pytest.raises(ValueError, match=r"p \(=1.5\) must be a probability, 0 to 1"):
        kind(p=1.5)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ColorJitter, {"brightness": -0.1}, r"brightness \(=-0.1\) must be at least 0, and finite"),
        (ColorJitter, {"contrast": math.inf}, r"contrast \(=inf\) must be at least 0"),
        (ColorJitter, {"saturation": math.nan}, r"saturation \(=nan\) must be at least 0"),
        (ColorJitter, {"hue": 0.6}, r"hue \(=0.6\) must be a fraction of the colour circle, 0 to 0.5"),
        (ColorJitter, ONLY, "brightness, contrast, saturation and hue are all 0: leave the colour jitter out"),
        (GaussianBlur, {"sigma": (0.0, 1.0)}, r"sigma \(=\(0.0, 1.0\)\) must be ascending, above 0"),
        (GaussianBlur, {"sigma": (2.0, 1.0)}, r"sigma \(=\(2.0, 1.0\)\) must be ascending"),
        (Solarize, {"threshold": 256}, r"threshold \(=256\) must be a level, 0 to 255"),
    ],
)
def test_values_outside_their_range(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_results_are_rgb():
    for transform in PROBABLE.values():
        assert transform(IMAGE, [0.0] * 9).mode == "RGB"
        assert transform(Image.new("RGB", (1, 1)), [0.0] * 9).size == (1, 1)
