"""Image files of every kind are decoded to the RGB pixels that they show, or rejected with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from jepa_kit.data import images
from jepa_kit.data.images import (
    DECODE_ERRORS,
    MAX_PIXELS,
    decode,
    encode_png,
    open_header,
    open_image,
    orientation,
    to_rgb,
)
from jepa_kit.errors import ImageError

RAMP = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


def saved(image, file_format, **options):
    out = io.BytesIO()
    image.save(out, format=file_format, **options)
    return out.getvalue()


def colours():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))


def flat(*colour, mode="RGB", size=(16, 16)):
    return Image.new(mode, size, colour)


def png(samples, colour_type):
    """A 16-bit PNG of samples [h, w, channels], made by hand: Pillow writes only the grey ones."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    h, w = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", w, h, 16, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_rgb_is_kept(file_format):
    image = decode(saved(colours(), file_format, **({"lossless": True} if file_format == "WEBP" else {})))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(colours()))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_grey_is_repeated(file_format):
    data = saved(Image.fromarray(RAMP), file_format)
    pixels = np.asarray(decode(data))
    assert pixels.shape == (16, 16, 3)
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)))[..., None].repeat(3, axis=2))


def test_black_and_white():
    pixels = np.asarray(decode(saved(Image.fromarray(RAMP).convert("1", dither=Image.Dither.NONE), "PNG")))
    np.testing.assert_array_equal(pixels[..., 0], np.where(RAMP > 127, 255, 0))


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"])
def test_sixteen_bits_keep_the_upper_eight(colour_type, channels):
    deep = np.random.default_rng(1).integers(0, 65536, (9, 7, channels))
    pixels = np.asarray(decode(png(deep, colour_type)))
    shown = deep[..., : 3 if channels > 2 else 1] >> 8
    np.testing.assert_array_equal(pixels, np.broadcast_to(shown, (9, 7, 3)))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_of_pillow(file_format):
    deep = (RAMP.astype(np.uint16) << 8) + 200
    pixels = np.asarray(decode(saved(Image.fromarray(deep), file_format)))
    np.testing.assert_array_equal(pixels, np.repeat(RAMP[..., None], 3, axis=2))


@pytest.fixture
def notes(monkeypatch):
    monkeypatch.setattr(images, "_logged", set())


DEEP = {  # (bits in use, dtype and format of the file)
    "int32": (8, np.int32, "TIFF"),
    "int32 of 12": (12, np.int32, "TIFF"),
    "int32 of 16": (16, np.int32, "TIFF"),
    "uint16 of 8": (8, np.uint16, "TIFF"),
    "uint16 of 12": (12, np.uint16, "TIFF"),
    "uint16 of 12, big-endian": (12, ">u2", "TIFF"),
    "PNG of 12": (12, np.uint16, "PNG"),
    "uint16": (16, np.uint16, "TIFF"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_is_as_bright_as_its_bits(kind, notes, caplog):
    """An 8-bit ramp stored with more bits decodes to the ramp; a note, once, if fewer bits are used."""
    bits, dtype, file_format = DEEP[kind]
    values = (RAMP.astype(np.int64) << (bits - 8)) + (3 if bits > 8 else 0)
    data = saved(Image.fromarray(values.astype(dtype)), file_format)
    assert np.asarray(Image.open(io.BytesIO(data))).max() == values.max(), "the file has them"
    for _ in range(2):
        np.testing.assert_array_equal(np.asarray(decode(data)), np.repeat(RAMP[..., None], 3, axis=2))
    expected = [f"no value above {2**bits - 1}: taken for {bits}-bit numbers"] if bits < 16 else []
    assert len(caplog.records) == len(expected)
    assert all(text in caplog.text for text in expected)


def test_a_black_deep_image_has_no_note(notes, caplog):
    assert np.asarray(decode(saved(Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), "PNG"))).max() == 0
    assert not caplog.records


@pytest.mark.parametrize(("least", "most"), [(-1, 300), (0, 65536), (-(2**31), 2**31 - 1)])
def test_numbers_of_unknown_range_are_rejected(least, most):
    data = saved(Image.fromarray(np.array([[least, most]], dtype=np.int32)), "TIFF")
    with pytest.raises(ImageError, match=rf"whole numbers from {least} to {most}: they must be within 0 to 65535"):
        decode(data)


def test_a_rotated_deep_image_is_upright():
    deep = Image.fromarray(RAMP.astype(np.uint16) << 8)
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.asarray(decode(saved(deep, "PNG", exif=exif)))
    np.testing.assert_array_equal(pixels[..., 0], RAMP[::-1, ::-1])


def test_a_palette_with_alpha():
    image = colours().quantize(8)
    with_alpha = image.convert("PA")
    assert with_alpha.mode == "PA"
    np.testing.assert_array_equal(np.asarray(to_rgb(with_alpha)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("file_format", ["TIFF", "PNG"])
def test_bilevel_images_are_black_and_white(file_format):
    pixels = np.asarray(decode(saved(Image.fromarray(RAMP > 99), file_format)))
    np.testing.assert_array_equal(pixels, np.where(RAMP > 99, 255, 0)[..., None].repeat(3, axis=2))


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


LARGE = {
    "zTXt": b"notes\0\0" + zlib.compress(bytes(3 << 20)),
    "iTXt": b"notes\0\1\0\0\0" + zlib.compress(bytes(3 << 20)),
    "iTXt, plain": b"XML:com.adobe.xmp\0\0\0\0\0" + b"x" * (3 << 20),
    "iCCP": b"profile\0\0" + zlib.compress(bytes(3 << 20)),
}


@pytest.mark.parametrize("place", ["before the pixels", "after them"])
@pytest.mark.parametrize("kind", LARGE)
def test_a_png_with_a_large_text_or_profile(kind, place):
    whole = saved(colours(), "PNG")
    at = whole.index(b"IDAT") - 4 if place == "before the pixels" else whole.index(b"IEND") - 4
    extra = chunk(kind[:4].encode(), LARGE[kind])
    data = whole[:at] + extra + whole[at:]
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(colours()))
    if place == "before the pixels":  # behind them, Pillow looks at no checksum
        with pytest.raises(ImageError):
            decode(data[: at + 40] + bytes([data[at + 40] ^ 1]) + data[at + 41 :])


@pytest.mark.parametrize("depth", [8, 16])
def test_a_png_with_damaged_pixels_is_rejected(depth):
    """For each byte of the pixels; Pillow decodes some of these files, because it ignores the checksum."""
    whole = saved(colours(), "PNG") if depth == 8 else png(np.full((9, 7, 1), 700), 0)
    begin, end = whole.index(b"IDAT") + 4, whole.index(b"IEND") - 8
    for at in range(begin, end):
        with pytest.raises(ImageError, match=r"its pixels are damaged: the checksum of the chunk at byte \d+ differs"):
            decode(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])


def test_a_png_with_many_texts():
    """More than Pillow's bound of 64 MB for all texts together."""
    whole = saved(colours(), "PNG")
    texts = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20))) * 70
    at = whole.index(b"IDAT") - 4
    np.testing.assert_array_equal(np.asarray(decode(whole[:at] + texts + whole[at:])), np.asarray(colours()))


def test_the_orientation_of_a_png_stays():
    """In the eXIf chunk, beside texts that are removed; and in XMP, which Pillow reads if EXIF has no orientation."""
    exif, plain = Image.Exif(), Image.Exif()
    exif[0x0112], plain[0x0131] = 3, "software"
    text = PngInfo()
    text.add_text("a", "b" * 500, zip=True)
    data = saved(Image.fromarray(RAMP), "PNG", exif=exif, pnginfo=text)
    np.testing.assert_array_equal(np.asarray(decode(data))[..., 0], RAMP[::-1, ::-1])
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    data = saved(Image.fromarray(RAMP), "PNG", exif=plain, pnginfo=text)
    assert orientation(Image.open(io.BytesIO(data))) == orientation(open_header(data)) == 3


def test_alpha_is_dropped():
    rgba = colours().convert("RGBA")
    rgba.putalpha(77)
    np.testing.assert_array_equal(np.asarray(decode(saved(rgba, "PNG"))), np.asarray(colours()))


def test_grey_with_alpha():
    image = Image.fromarray(np.stack([RAMP, RAMP.T], axis=2))
    assert image.mode == "LA"
    np.testing.assert_array_equal(np.asarray(decode(saved(image, "PNG"))), np.repeat(RAMP[..., None], 3, axis=2))


def test_palette():
    image = colours().quantize(8)
    np.testing.assert_array_equal(np.asarray(decode(saved(image, "PNG"))), np.asarray(image.convert("RGB")))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [3, b"\x00\x10\x20"], ids=["one colour", "a table"])
def test_palette_with_transparency(transparency):
    image = colours().quantize(8)
    transparent = saved(image, "PNG", transparency=transparency)
    np.testing.assert_array_equal(np.asarray(decode(transparent)), np.asarray(image.convert("RGB")))


def test_cmyk():
    assert np.asarray(decode(saved(flat(0, 255, 255, 0, mode="CMYK"), "TIFF")))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("ink", "shown"),
    [
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 255, 0), (0, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0,) * 4, (255,) * 3),
    ],
    ids=["red", "green", "black", "white"],
)
def test_cmyk_jpeg_as_adobe_writes_it(ink, shown):
    """Adobe and Pillow store inverted inks, 255 for none. RGB is (1 - C)(1 - K) and so on, without a colour profile."""
    data = saved(flat(*ink, mode="CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.asarray(decode(data))[8, 8].tolist() == pytest.approx(list(shown), abs=2)


def test_ycck_jpeg():
    """The file of a CMYK image with the mark that says YCCK: its first three channels become RGB = 255 - CMY."""
    stored = (200, 90, 160, 120)  # Y, Cb, Cr and K, inverted
    data = bytearray(saved(flat(*(255 - v for v in stored), mode="CMYK"), "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2
    y, cb, cr, k = stored
    # libjpeg's YCCK to CMYK is C = 255 - R; Pillow inverts all four, so R itself is what multiplies K
    r, g, b = y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)
    expected = [(255 - np.clip(v, 0, 255)) * k / 255 for v in (r, g, b)]
    assert np.asarray(decode(bytes(data)))[8, 8].tolist() == pytest.approx(expected, abs=3)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("mark", "upright"),
    [
        (1, lambda p: p),
        (2, np.fliplr),
        (3, lambda p: np.rot90(p, 2)),
        (4, np.flipud),
        (5, lambda p: p.transpose(1, 0, 2)),
        (6, lambda p: np.rot90(p, 3)),
        (7, lambda p: np.rot90(p, 2).transpose(1, 0, 2)),
        (8, np.rot90),
    ],
)
def test_exif_orientation_is_applied(file_format, mark, upright):
    exif = Image.Exif()
    exif[0x0112] = mark
    data = saved(colours(), file_format, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert orientation(open_header(data)) == mark
    np.testing.assert_array_equal(np.asarray(decode(data)), upright(stored))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0", b"Exif\0\0not a TIFF file", b"Exif\0\0" + b"II*\0\x08\0\0\0\xff\xff\x12\x01"]
)
def test_unreadable_exif_is_ignored(exif):
    plain = saved(colours(), "JPEG")
    marked = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    np.testing.assert_array_equal(np.asarray(decode(marked)), np.asarray(decode(plain)))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(file_format):
    frames = [Image.new("RGB", (5, 5), c) for c in ("red", "blue", "lime")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert open_header(data).n_frames == 3
    assert np.asarray(decode(data))[2, 2].tolist() == [255, 0, 0]


def test_encode_png_is_lossless():
    np.testing.assert_array_equal(np.asarray(open_image(encode_png(colours()))), np.asarray(colours()))


def test_rgb_is_not_copied():
    image = colours()
    assert to_rgb(image) is image


REFUSED = {
    "empty": (b"", "the file is empty"),
    "text": (b"text", "no image format that Pillow knows; the file begins with b'text'"),
    "an error page": (b"\n<!DOCTYPE html><html>404</html>", "an HTML page, not an image"),
    "another page": (b"<HTML><body>", "an HTML page, not an image"),
    "half a JPEG": (saved(colours(), "JPEG")[:-40], "truncated"),
    "the head of a JPEG": (saved(colours(), "JPEG")[:100], "Truncated"),
    "half a PNG": (saved(colours(), "PNG")[:60], "truncated"),
    "half a GIF": (saved(colours(), "GIF")[:30], "no image format"),
    "half a WebP": (saved(colours(), "WEBP")[:60], "."),
    "zeros": (bytes(5000), "no image format"),
    "floating point": (
        saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        "floating point numbers of unknown range",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_not_complete_images_are_rejected_with_the_reason(kind):
    data, reason = REFUSED[kind]
    with pytest.raises(ImageError, match=reason) as caught:
        decode(data)
    assert str(caught.value)
    assert isinstance(caught.value, DECODE_ERRORS)


def test_a_damaged_png_is_rejected():
    data = bytearray(saved(colours(), "PNG"))
    data[60] ^= 0xFF
    with pytest.raises(ImageError):
        decode(bytes(data))


@pytest.mark.filterwarnings("error")
def test_an_enormous_image_is_rejected_before_it_is_decoded():
    """60,000 x 60,000 pixels, in 60 bytes that would unpack to 10 gigabytes."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 100) + b"IDAT" + bytes(20)
    with pytest.raises(ImageError, match=rf"60000 x 60000 pixels are more than max_pixels \(={MAX_PIXELS}\) allows"):
        decode(bomb)


def test_max_pixels():
    data = saved(colours(), "PNG")
    assert decode(data, max_pixels=63).size == (7, 9)
    with pytest.raises(ImageError, match=r"7 x 9 pixels are more than max_pixels \(=62\) allows: it is not decoded"):
        decode(data, max_pixels=62)


@pytest.mark.filterwarnings("error")
def test_max_pixels_above_the_limit_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    monkeypatch.setattr("jepa_kit.data.images._PILLOWS_LIMIT", 20)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(saved(colours(), "PNG")))
    assert decode(saved(colours(), "PNG")).size == (7, 9)
    assert Image.MAX_IMAGE_PIXELS == 20  # other users of Pillow keep theirs


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, TypeError])
def test_errors_of_pillows_plug_ins_become_image_errors(monkeypatch, error):
    """Pillow's AVIF, DDS and BLP, and TIFF plug-ins raise these for damaged files."""

    def broken(*arguments):
        raise error("what it says")

    monkeypatch.setattr(PngImageFile, "load", broken)
    with pytest.raises(ImageError, match="what it says"):
        decode(saved(colours(), "PNG"))


def test_a_dds_file_of_unknown_compression():
    """A DDS file whose header names an unknown compression, and one that Pillow reads."""
    data = bytearray(saved(colours(), "DDS"))
    assert decode(bytes(data)).size == colours().size
    data[80:88] = struct.pack("<I4s", 4, b"NONE")  # pixel format: a four-letter code follows
    with pytest.raises(ImageError, match="Unimplemented pixel format"):
        decode(bytes(data))


def test_other_errors_propagate(monkeypatch):
    """A bug is not reported as a damaged file."""

    def broken(*arguments):
        raise AttributeError("a bug")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(AttributeError, match="a bug"):
        decode(b"x")
