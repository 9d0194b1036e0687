"""Images that are encoded again equal those of Pillow; others keep their bytes."""

import io

import numpy as np
import pytest
from PIL import Image
from small_shards import encoded, picture

from jepa_kit.data.segmentation import decode_mask, encode_mask
from jepa_kit.data.sources.base import Recode, Refused

JPEG, PNG = encoded(picture(0, 60, 90)), encoded(picture(1, 60, 90), "PNG")


def opened(sample):
    return Image.open(io.BytesIO(sample.image))


@pytest.mark.parametrize("data", [JPEG, PNG])
@pytest.mark.parametrize("recode", [Recode(), Recode(shorter_side=60), Recode(shorter_side=100)])
def test_bytes_stay_if_nothing_must_change(data, recode):
    assert recode.sample("k", data, {"class": 3}).image == data


@pytest.mark.parametrize(("data", "extension"), [(JPEG, "jpg"), (PNG, "png")])
def test_larger_images_become_smaller(data, extension):
    sample = Recode(shorter_side=20).sample("k", data, {})
    assert sample.extension == extension
    expected = Image.open(io.BytesIO(data)).resize((30, 20), Image.Resampling.BICUBIC)
    if extension == "png":
        np.testing.assert_array_equal(np.asarray(opened(sample)), np.asarray(expected))
    else:
        assert sample.image == encoded(expected, quality=95, subsampling="4:2:0")


def test_portrait_and_rounding():
    assert opened(Recode(shorter_side=7).sample("k", encoded(picture(0, 100, 33)), {})).size == (7, 21)
    assert opened(Recode(shorter_side=1).sample("k", encoded(picture(0, 3, 100), "PNG"), {})).size == (33, 1)


def test_quality_makes_every_image_a_jpeg():
    sample = Recode(quality=40).sample("k", PNG, {})
    assert (sample.extension, sample.image) == ("jpg", encoded(picture(1, 60, 90), quality=40, subsampling="4:2:0"))
    small = Recode(shorter_side=30, quality=40).sample("k", JPEG, {})
    assert len(small.image) < len(Recode(quality=40).sample("k", JPEG, {}).image) < len(JPEG)


def test_a_rotated_photo_is_upright_when_it_is_encoded_again():
    image = picture(2, 40, 80)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    data = encoded(image, exif=exif)
    assert Recode().sample("k", data, {}).image == data
    assert opened(Recode(shorter_side=20).sample("k", data, {})).size == (20, 40)


def test_masks_shrink_by_the_nearest_pixel():
    mask = np.random.default_rng(0).integers(0, 9, (60, 90), dtype=np.uint8)
    sample = Recode(shorter_side=20).sample("k", PNG, {}, encode_mask(mask))
    np.testing.assert_array_equal(decode_mask(sample.mask), mask[1::3, 1::3])
    assert Recode().sample("k", PNG, {}, encode_mask(mask)).mask == encode_mask(mask)


@pytest.mark.parametrize(
    ("data", "mask", "reason"),
    [
        (b"", None, "empty file"),
        (b"text", None, "not a decodable image: "),
        (PNG, b"text", "not a decodable mask: "),
        (
            PNG,
            encode_mask(np.zeros((90, 60), np.uint8)),
            r"mask of \(60, 90\) pixels for an image of \(90, 60\): width",
        ),
    ],
)
def test_what_is_refused(data, mask, reason):
    with pytest.raises(Refused, match=reason):
        Recode().sample("k", data, {}, mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shorter_side": 0}, r"shorter_side \(=0\) must be at least 1 pixel"),
        ({"quality": 0}, r"quality \(=0\) must be 1 to 100"),
        ({"quality": 101}, r"quality \(=101\) must be 1 to 100"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        Recode(**options)
