"""The fast decoder: at most one level of 255 from Pillow's, two for bicubic, for the same files."""

import itertools

import numpy as np
import pytest
from photos import photo, saved
from PIL import Image

from jepa_kit.data import images
from jepa_kit.data.transforms import Window, build_pipeline, eval_pipeline, resample, train_pipeline
from jepa_kit.data.transforms.crops import resample_array
from jepa_kit.errors import ImageError

pytest.importorskip("simplejpeg", reason="the extra `fast` is not installed")

SIZES = [(375, 500), (500, 375), (64, 48), (33, 200), (1, 1), (7, 3), (1000, 800)]


def pair(data, transforms, seed=0):
    pipelines = [build_pipeline(transforms, image_size=(96, 80), decoder=name) for name in ("pillow", "fast")]
    for row in pipelines[0].draws(np.arange(4), seed=seed, epoch=0):
        exact, fast = (pipeline(data, row).astype(int) for pipeline in pipelines)
        assert exact.shape == fast.shape == (96, 80, 3)
        yield exact, fast


@pytest.mark.parametrize("name", ["random_resized_crop", "center_crop", "resize"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_tolerance(name, interpolation):
    allowed = {"bilinear": 1, "bicubic": 2}[interpolation]
    for size, quality in itertools.product(SIZES, (60, 95)):
        data = saved(photo(*size), quality=quality)
        for exact, fast in pair(data, [{"name": name, "interpolation": interpolation}], seed=quality):
            assert np.abs(exact - fast).max() <= allowed, size
            assert np.abs(exact - fast).mean() <= 0.1, size


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"progressive": True},
        {"optimize": True, "quality": 100},
        {"restart_marker_rows": 1},
        {"keep_rgb": True},
        {"icc_profile": b"not a profile, but nobody looks"},
        {"comment": b"words"},
    ],
    ids=str,
)
def test_jpegs_of_every_kind(options):
    data = saved(photo(120, 90), **options)
    for exact, fast in pair(data, [{"name": "random_resized_crop"}]):
        assert np.abs(exact - fast).max() <= 1


def marked(mark):
    exif = Image.Exif()
    exif[0x0112] = mark
    return saved(photo(120, 90), exif=exif)


OTHERS = {
    "grey": saved(photo(120, 90).convert("L")),
    "CMYK": saved(photo(120, 90).convert("CMYK")),
    "PNG": saved(photo(120, 90), "PNG"),
    "RGBA": saved(photo(120, 90).convert("RGBA"), "PNG"),
    "WebP": saved(photo(120, 90), "WEBP"),
    "upright": marked(1),
    "turned": marked(6),
    "mirrored": marked(5),
    "several pictures": saved(photo(120, 90), "MPO", save_all=True, append_images=[photo(120, 90, seed=1)]),
    "more after the end": saved(photo(120, 90)) + b"trailing bytes",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files(kind):
    for exact, fast in pair(OTHERS[kind], [{"name": "random_resized_crop"}]):
        assert np.abs(exact - fast).max() <= 1


def damaged(data, at, byte):
    return data[:at] + bytes([byte]) + data[at + 1 :]


WHOLE = saved(photo(120, 90))
BROKEN = {
    "empty": b"",
    "text": b"<html>",
    "half": WHOLE[: len(WHOLE) // 2],
    "no end": WHOLE[:-2],
    "the head": WHOLE[:300],
    "a stray marker": damaged(damaged(WHOLE, len(WHOLE) // 2, 0xFF), len(WHOLE) // 2 + 1, 0xD9),
    "more rows than there are": WHOLE[: WHOLE.index(b"\xff\xc0") + 5]
    + b"\x13\x88"
    + WHOLE[WHOLE.index(b"\xff\xc0") + 7 :],
    "no image size": damaged(WHOLE, WHOLE.index(b"\xff\xc0") + 6, 0xFF),
}


def outcome(data, decoder):
    """Return the pixels, or the error's message."""
    try:
        return eval_pipeline(image_size=(96, 80), decoder=decoder)(data, np.empty(0)).astype(int)
    except ImageError as error:
        return str(error)


@pytest.mark.parametrize("kind", BROKEN)
def test_both_decoders_accept_and_reject_the_same_files(kind):
    """Damaged files that are accepted have the same pixels, because Pillow decodes them."""
    np.testing.assert_array_equal(outcome(BROKEN[kind], "pillow"), outcome(BROKEN[kind], "fast"))


@pytest.mark.parametrize("seed", range(3))
def test_bytes_flipped_at_random(seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        data = damaged(WHOLE, int(rng.integers(2, len(WHOLE))), int(rng.integers(256)))
        exact, fast = outcome(data, "pillow"), outcome(data, "fast")
        if isinstance(exact, str):
            assert exact == fast
        else:
            assert np.abs(exact - fast).max() <= 1


def test_max_pixels_of_the_fast_decoder():
    with pytest.raises(ImageError, match=r"90 x 120 pixels are more than max_pixels \(=100\) allows"):
        eval_pipeline(image_size=(8, 8), decoder="fast", max_pixels=100)(WHOLE, np.empty(0))


def test_transforms_after_the_fast_decoder():
    parts = [{"name": "random_resized_crop"}, {"name": "horizontal_flip", "p": 1.0}, {"name": "grayscale", "p": 1.0}]
    for exact, fast in pair(WHOLE, parts):
        assert np.abs(exact - fast).max() <= 1


@pytest.mark.parametrize(
    "window",
    [
        Window((3, 5, 83, 95), (80, 90)),  # nothing to resize
        Window((0, 0, 90, 120), (40, 54), (3, 4, 33, 44)),
        Window((10, 10, 11, 11), (16, 16)),
        Window((0, 0, 90, 120), (180, 300), None, "bicubic"),
    ],
)
def test_resample_array_is_resample(window):
    image = photo(120, 90)
    exact = np.asarray(resample(image, window)).astype(int)
    fast = resample_array(np.array(image), window)
    assert fast.shape == exact.shape
    assert np.abs(exact - fast).max() <= 1


def test_unavailable_decoders(monkeypatch):
    with pytest.raises(ValueError, match=r"decoder \(='quick'\) must be one of 'pillow', 'fast'"):
        train_pipeline(image_size=(8, 8), decoder="quick")
    monkeypatch.setattr(images, "simplejpeg", None)
    with pytest.raises(ValueError, match=r"decoder \(='fast'\) needs simplejpeg: pip install 'jepa_kit\[fast\]'"):
        train_pipeline(image_size=(8, 8), decoder="fast")
    assert train_pipeline(image_size=(8, 8)).decoder == "pillow"
