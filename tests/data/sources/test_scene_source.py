"""Scenes as samples: the images, labels and masks of the renderer."""

import io

import numpy as np
import pytest
from PIL import Image

from jepa_kit.data.segmentation import decode_mask
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.writing import write_index, write_shard
from jepa_kit.data.sources.scenes import MASK_CLASSES, Scenes
from jepa_kit.scenes.scenes import CLASSES, SHAPE_NAMES, render


def test_scenes():
    source = Scenes(num_scenes=5, size=(24, 32), seed=9)
    assert len(source) == 5
    assert source.classes == CLASSES
    sample = source.sample(3)
    scene = render(9, 3, (24, 32))
    assert sample.key == "scene-9-00000003"
    assert sample.labels == scene.labels
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), scene.image)


@pytest.mark.parametrize("index", range(6))
def test_a_mask_has_the_shape_of_the_solid_at_each_pixel(index):
    scene = render(4, index, 48)
    found = decode_mask(Scenes(num_scenes=6, size=(48, 48), seed=4).sample(index).mask)
    assert found.shape == (48, 48)
    expected = [[0 if owner == 0 else 1 + scene.shapes[owner - 1] for owner in row] for row in scene.mask]
    np.testing.assert_array_equal(found, expected)
    assert (found == 1 + scene.labels["shape"]).any()  # the nearest solid
    assert ("background", *SHAPE_NAMES) == MASK_CLASSES


def test_masks_through_shards(tmp_path):
    source = Scenes(num_scenes=4, size=(24, 32), seed=1)
    shard, rows = write_shard(str(tmp_path / "shard-000000.tar"), [source.sample(i) for i in range(4)])
    write_index(
        *(str(tmp_path), [shard], [rows]),
        classes=source.classes,
        refused=[],
        made_by={},
        mask_classes=source.mask_classes,
    )
    dataset = ShardDataset(tmp_path)
    assert dataset.mask_classes == MASK_CLASSES
    for i in range(4):
        np.testing.assert_array_equal(dataset.mask(i), decode_mask(source.sample(i).mask))
        np.testing.assert_array_equal(np.asarray(dataset.image(i)), render(1, i, (24, 32)).image)


def test_masks_can_be_left_out():
    source = Scenes(num_scenes=1, size=(24, 32), seed=1, masks=False)
    assert source.sample(0).mask is None
    assert source.mask_classes == ()
    assert source.fingerprint() != Scenes(num_scenes=1, size=(24, 32), seed=1).fingerprint()


def test_no_scenes():
    with pytest.raises(ValueError, match=r"num_scenes \(=0\) must be at least 1"):
        Scenes(num_scenes=0, size=(64, 64), seed=0)


def test_scenes_too_small():
    with pytest.raises(ValueError, match=r"size \(=\(8, 64\)\) must be at least 16 pixels"):
        Scenes(num_scenes=1, size=(8, 64), seed=0)
