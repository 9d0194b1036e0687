"""Masks in shards: written and read unchanged, and a clear error if there are none."""

import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from small_shards import encoded, make_samples, picture, write_shards

from jepa_kit.data.segmentation import decode_mask, encode_mask
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.errors import ImageError


def random_mask(seed, height=16, width=18):
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def masked(samples, every=1):
    return [
        dataclasses.replace(s, mask=encode_mask(random_mask(k))) if k % every == 0 else s for k, s in enumerate(samples)
    ]


@pytest.fixture
def dataset(tmp_path):
    return ShardDataset(write_shards(tmp_path / "s", masked(make_samples(7)), 3, {"class": tuple("abcd")}))


def test_masks_round_trip(dataset):
    copy = pickle.loads(pickle.dumps(dataset))
    for i in range(7):
        mask = copy.mask(i)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, random_mask(i))
    assert dataset.has_masks
    index = json.loads(Path(dataset.path, "index.json").read_text())
    assert index["masks"] == {"samples": 7, "classes": []}


def test_masks_do_not_change_images_and_labels(dataset, tmp_path):
    plain = ShardDataset(write_shards(tmp_path / "plain", make_samples(7), 3, {"class": tuple("abcd")}))
    assert [plain.image_bytes(i) for i in range(7)] == [dataset.image_bytes(i) for i in range(7)]
    np.testing.assert_array_equal(plain.labels("class"), dataset.labels("class"))


def test_webdataset_reads_masks(dataset):
    found = list(webdataset.WebDataset([f"{dataset.path}/shard-000000.tar"], shardshuffle=False))
    np.testing.assert_array_equal(decode_mask(found[2]["mask.png"]), random_mask(2))


def test_shards_that_lost_their_index_keep_their_masks(dataset):
    for name in ("index.json", "offsets.npy", "labels.npy", "keys.npy", "masks.npy"):
        os.remove(os.path.join(dataset.path, name))
    np.testing.assert_array_equal(ShardDataset(dataset.path).mask(6), random_mask(6))


def test_shards_without_masks(tmp_path):
    dataset = ShardDataset(write_shards(tmp_path / "s", make_samples(2), 3, {"class": tuple("abcd")}))
    assert not dataset.has_masks
    with pytest.raises(ValueError, match=r"mask of sample 1 cannot be read: the shards in .* have no masks"):
        dataset.mask(1)


def test_a_sample_without_a_mask(tmp_path):
    samples = masked(make_samples(4), every=2)
    dataset = ShardDataset(write_shards(tmp_path / "s", samples, 3, {"class": tuple("abcd")}))
    np.testing.assert_array_equal(dataset.mask(2), random_mask(2))
    with pytest.raises(ValueError, match=r"sample 1 \('folder/0001'\) of .* has no mask, though others have"):
        dataset.mask(1)


@pytest.mark.parametrize(("data", "reason"), [(b"x", "no image"), (encoded(picture(0), "PNG"), "one 8-bit channel")])
def test_a_file_that_is_not_a_mask(tmp_path, data, reason):
    samples = [dataclasses.replace(s, mask=data) for s in make_samples(1)]
    dataset = ShardDataset(write_shards(tmp_path / "s", samples, 3, {"class": tuple("abcd")}))
    with pytest.raises(ValueError, match=rf"mask of sample 0 \('folder/0000'\) of .* is not usable: .*{reason}"):
        dataset.mask(0)


def test_a_mask_of_too_many_pixels(dataset):
    np.testing.assert_array_equal(dataset.mask(2, max_pixels=16 * 18), random_mask(2))
    reason = r"18 x 16 pixels are more than max_pixels \(=287\) allows"
    with pytest.raises(ValueError, match=rf"mask of sample 2 \('folder/0002'\) of .* is not usable: {reason}"):
        dataset.mask(2, max_pixels=287)


def test_a_palette_is_ignored():
    numbers = random_mask(3)
    image = Image.fromarray(numbers, mode="P")
    image.putpalette(list(range(255, -1, -1)) * 3)
    np.testing.assert_array_equal(decode_mask(encoded(image, "PNG")), numbers)


def test_deep_masks_are_rejected():
    with pytest.raises(ImageError, match=r"a mask must have one 8-bit channel, but its mode is 'I;16'"):
        decode_mask(encoded(Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), "PNG"))
