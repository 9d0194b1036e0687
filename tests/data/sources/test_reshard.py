"""Copy shards into new shards: images, masks, labels and class names are kept."""

import dataclasses
import io
import os
import tarfile

import numpy as np
import pytest
from small_shards import encoded, make_samples, picture, write_shards

from jepa_kit.data.segmentation import encode_mask
from jepa_kit.data.sources.base import Refused
from jepa_kit.data.sources.opening import SourceOptions, open_source


def opened(pattern, **options):
    return open_source(f"wds:{pattern}", SourceOptions(**options), seed=0, scratch="")


@pytest.mark.parametrize("pattern", ["", "/shard-{000000..000002}.tar", "/shard-000000.tar::{tmp}/shard-000001.tar"])
def test_our_own_shards(tmp_path, samples, pattern):
    folder = write_shards(tmp_path / "old", samples, 10, {"class": ("w", "x", "y", "z")})
    source = opened(f"{folder}{pattern}".replace("{tmp}", str(folder)))
    count = 20 if "::" in pattern else 23
    assert source.classes == {"class": ("w", "x", "y", "z")}
    assert [source.sample(i) for i in range(len(source))] == samples[:count]
    assert source.notes == []


def test_masks_go_over_and_shrink(tmp_path, samples):
    mask = encode_mask(np.random.default_rng(0).integers(0, 5, (16, 18), dtype=np.uint8))
    samples = [dataclasses.replace(samples[0], mask=mask), samples[1]]
    folder = write_shards(tmp_path / "old", samples, 10, {"class": tuple("abcd")})
    source = opened(folder)
    assert [source.sample(i).mask for i in range(2)] == [mask, None]
    assert len(opened(folder, shorter_side=8).sample(0).mask) < len(mask)


def foreign(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_foreign_shards(tmp_path):
    jpg, png = encoded(picture(0)), encoded(picture(1), "PNG")
    foreign(tmp_path / "a.tar", [("0.jpg", jpg), ("0.cls", b"3"), ("0.txt", b"a cat"), ("1.cls", b"1")])
    foreign(tmp_path / "b.tar", [("0.png", png), ("0.cls", b"0"), ("0.depth.npy", b"x")])
    source = opened(tmp_path)
    assert source.classes == {"class": ("0", "1", "2", "3")}
    first, second = source.sample(0), source.sample(1)
    assert (first.key, first.image, first.labels) == ("0", jpg, {"class": 3})
    assert (second.key, second.image, second.labels) == ("0_1", png, {"class": 0})
    assert source.name(2) == "a.tar: 1"
    with pytest.raises(Refused, match="no image member, only: cls"):
        source.sample(2)
    assert len(source) == 3
    assert source.notes == ["not copied: members .txt (as in a.tar)"]


def test_a_missing_shard_is_refused_sample_by_sample(tmp_path, samples):
    folder = write_shards(tmp_path / "old", samples, 10, {"class": tuple("abcd")})
    source = opened(folder)
    os.remove(folder / "shard-000001.tar")
    with pytest.raises(Refused, match=r"cannot be read: .*shard-000001\.tar"):
        source.sample(10)
    assert source.sample(0) == samples[0]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/gone", r"gone"),
        ("/old/shard-{000000..000009}.tar", "missing"),
        ("/old/shard-{0.tar", "braces match"),
        ("", r"must be a folder of .tar shards, but it contains none; these folders in it do: old"),
    ],
)
def test_nothing_there(tmp_path, samples, pattern, message):
    write_shards(tmp_path / "old", samples, 10, {"class": tuple("abcd")})
    with pytest.raises(ValueError, match=message):
        opened(f"{tmp_path}{pattern}")


def test_the_fingerprint_is_that_of_the_shards(tmp_path, samples):
    prints = []
    for k, part in enumerate((samples, samples, samples[1:], [dataclasses.replace(samples[0], labels={"class": 3})])):
        folder = write_shards(tmp_path / f"{k}", part, 10, {"class": tuple("abcd")})
        prints.append(opened(folder).fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert make_samples(1)[0] == samples[0]
