"""Image files of every mode become the RGB pixels that they show."""

import io

import numpy as np
import pytest
from PIL import Image

from jepa_kit.data.images import DECODE_ERRORS, decode, encode_png, open_image, to_rgb

RAMP = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


def saved(image, file_format, **options):
    out = io.BytesIO()
    image.save(out, format=file_format, **options)
    return out.getvalue()


def colours():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_rgb_is_kept(file_format):
    image = decode(saved(colours(), file_format))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(colours()))


def test_grey_is_repeated():
    pixels = np.asarray(decode(saved(Image.fromarray(RAMP), "PNG")))
    np.testing.assert_array_equal(pixels, np.repeat(RAMP[..., None], 3, axis=2))


def test_sixteen_bit_grey_keeps_its_upper_bits():
    deep = (RAMP.astype(np.uint16) << 8) + 200
    pixels = np.asarray(decode(saved(Image.fromarray(deep), "PNG")))
    np.testing.assert_array_equal(pixels, np.repeat(RAMP[..., None], 3, axis=2))


def test_alpha_is_dropped():
    rgba = colours().convert("RGBA")
    rgba.putalpha(77)
    np.testing.assert_array_equal(np.asarray(decode(saved(rgba, "PNG"))), np.asarray(colours()))


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency():
    image = colours().quantize(8)
    transparent = saved(image, "PNG", transparency=b"\x00\x10\x20")
    np.testing.assert_array_equal(np.asarray(decode(transparent)), np.asarray(image.convert("RGB")))


def test_cmyk():
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert np.asarray(decode(saved(cmyk, "TIFF")))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("mark", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_a_cameras_orientation_is_obeyed(mark, turns):
    exif = Image.Exif()
    exif[0x0112] = mark
    pixels = np.asarray(decode(saved(colours(), "PNG", exif=exif)))
    np.testing.assert_array_equal(pixels, np.rot90(np.asarray(colours()), turns))


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (5, 5), c) for c in ("red", "blue")]
    pixels = np.asarray(decode(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    assert pixels[2, 2].tolist() == [255, 0, 0]


def test_png_of_ours_is_lossless():
    np.testing.assert_array_equal(np.asarray(open_image(encode_png(colours()))), np.asarray(colours()))


def test_rgb_is_not_copied():
    image = colours()
    assert to_rgb(image) is image


@pytest.mark.parametrize(
    "data",
    [b"", b"text", saved(colours(), "JPEG")[:-40], saved(colours(), "PNG")[:60], saved(colours(), "GIF")[:30]],
    ids=["empty", "text", "half a JPEG", "half a PNG", "half a GIF"],
)
def test_what_is_not_a_whole_image_raises_one_of_the_named_errors(data):
    with pytest.raises(DECODE_ERRORS):
        decode(data)
