"""Shards are plain WebDataset, equal for equal samples, and never incomplete; foreign ones get an index."""

import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
import webdataset
from small_shards import encoded, make_samples, picture, write_shards

from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.writing import Sample, pack, tar_size, write_shard


def webdataset_samples(folder):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def test_webdataset_reads_them_to_the_same_samples(folder, samples):
    for theirs, ours in zip(webdataset_samples(folder), samples, strict=True):
        assert theirs["__key__"] == ours.key
        assert theirs[ours.extension] == ours.image
        assert int(theirs["cls"]) == ours.labels["class"]


def test_webdataset_decodes_them(folder, dataset):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg;png", "cls")
    for i, (image, label) in enumerate(pipeline):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(dataset.image(i)))
        assert label == dataset.labels("class")[i]


def test_several_labels_are_json(tmp_path):
    samples = make_samples(5, labels=("count", "shape"))
    folder = write_shards(tmp_path / "s", samples, 5, {"count": tuple("abcd"), "shape": tuple("abcd")})
    assert [json.loads(s["json"]) for s in webdataset_samples(folder)] == [s.labels for s in samples]


def test_offsets_are_where_tarfile_finds_the_members(folder, samples):
    offsets = np.load(folder / "offsets.npy")
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: m for m in tar.getmembers()}
        found.append(members)
    members = {name: m for shard in found for name, m in shard.items()}
    for row, sample in zip(offsets, samples, strict=True):
        image, label = members[f"{sample.key}.{sample.extension}"], members[f"{sample.key}.cls"]
        assert row.tolist() == [image.offset_data, image.size, label.offset_data, label.size]


def test_the_index_describes_the_shards(folder, samples):
    index = json.loads((folder / "index.json").read_text())
    assert (index["version"], index["samples"]) == (1, len(samples))
    assert index["labels"] == {"class": ["a", "b", "c", "d"]}
    for entry, count in zip(index["shards"], (10, 10, 3), strict=True):
        data = (folder / entry["file"]).read_bytes()
        assert entry["samples"] == count
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()


def test_equal_samples_give_equal_bytes(tmp_path, samples):
    a, b = (write_shard(str(tmp_path / f"{name}.tar"), samples)[0] for name in "ab")
    assert (a.sha256, a.bytes) == (b.sha256, b.bytes)


@pytest.mark.parametrize(
    "sample",
    [
        Sample("a/b", "jpg", b"x" * 511),
        Sample("a/b", "png", b"x" * 512, {"class": 7}),
        Sample("a/b", "jpg", b"x" * 513, {"count": 1, "shape": 2}, b"mask"),
        Sample("y" * 300, "jpg", b"", {"class": 0}),
        Sample("straße/ключ", "jpg", b"x"),
    ],
)
def test_bytes_are_those_of_webdatasets_own_writer(tmp_path, sample):
    """Compare members, headers, padding, end and offsets with those of webdataset."""
    out = io.BytesIO()
    with webdataset.TarWriter(out, mtime=0) as tar:
        members = {"__key__": sample.key, sample.extension: sample.image}
        if sample.mask is not None:
            members["mask.png"] = sample.mask
        if sample.labels.keys() == {"class"}:
            members["cls"] = str(sample.labels["class"])
        elif sample.labels:
            members["json"] = json.dumps(dict(sample.labels))
        tar.write(members)
    write_shard(str(tmp_path / "shard.tar"), [sample])
    assert (tmp_path / "shard.tar").read_bytes() == out.getvalue()
    packed = pack(sample)
    assert tar_size(len(packed.data)) == len(out.getvalue())
    (offset, size), label, (mask_offset, mask_size) = packed.places.tolist()
    assert packed.data[offset : offset + size] == sample.image
    assert packed.data[mask_offset : mask_offset + mask_size] == sample.mask if sample.mask else mask_offset == -1
    assert packed.data[label[0] : sum(label)] == json.dumps(
        sample.labels.get("class", sample.labels)
    ).encode() if sample.labels else label == [-1, 0]  # fmt: skip


@pytest.mark.parametrize("key", ["x" * 90, "deep/" * 40 + "x", "y" * 300, "straße/ключ", "a b'c"])
def test_long_and_foreign_keys(tmp_path, key):
    folder = write_shards(tmp_path / "s", [Sample(key, "png", encoded(picture(1), "PNG"))], 1, {})
    assert ShardDataset(folder).key(0) == key
    assert webdataset_samples(folder)[0]["__key__"] == key


def test_nothing_half_written_has_a_final_name(tmp_path, samples):
    def broken():
        yield from samples[:3]
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_shard(str(tmp_path / "shard.tar"), broken())
    assert os.listdir(tmp_path) == []


def foreign_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_foreign_shards_get_their_index_once(tmp_path):
    jpg, png = encoded(picture(0)), encoded(picture(1), "PNG")
    foreign_shard(tmp_path / "b.tar", [("n02/2.JPEG", jpg), ("n02/2.cls", b"2")])
    foreign_shard(
        tmp_path / "a.tar",
        [("./0.cls", b"1"), ("./0.png", png), ("1.jpg", jpg), ("1.cls", b"cat"), ("1.txt", b"a cat")],
    )
    dataset = ShardDataset(tmp_path)
    assert [dataset.key(i) for i in range(3)] == ["./0", "1", "n02/2"]
    assert [dataset.image_bytes(i) for i in range(3)] == [png, jpg, jpg]
    assert dataset.classes == {"class": ("0", "1", "2")}
    assert [dataset.read(i)["labels"] for i in range(3)] == [{"class": 1}, {}, {"class": 2}]
    written = (tmp_path / "index.json").stat().st_mtime_ns
    ShardDataset(tmp_path)
    assert (tmp_path / "index.json").stat().st_mtime_ns == written


def test_foreign_json_labels(tmp_path):
    jpg = encoded(picture(0))
    texts = ['{"count": 3, "caption": "x", "flag": true, "width": 70000}', '{"count": 0}', "[1]", "{broken", ""]
    foreign_shard(
        tmp_path / "a.tar", [m for k, t in enumerate(texts) for m in ((f"{k}.jpg", jpg), (f"{k}.json", t.encode()))]
    )
    dataset = ShardDataset(tmp_path)
    assert [dataset.read(i)["labels"] for i in range(5)] == [{"count": 3}, {"count": 0}, {}, {}, {}]


def test_our_own_shards_survive_the_loss_of_their_index(folder, samples):
    for name in ("index.json", "offsets.npy", "labels.npy", "keys.npy"):
        (folder / name).unlink()
    dataset = ShardDataset(folder)
    assert [dataset.image_bytes(i) for i in range(len(dataset))] == [s.image for s in samples]
    assert dataset.labels("class").tolist() == [s.labels["class"] for s in samples]


def test_foreign_samples_without_an_image_are_refused_by_name(tmp_path):
    foreign_shard(tmp_path / "a.tar", [("0.jpg", encoded(picture(0))), ("1.txt", b"x"), ("1.cls", b"1")])
    assert len(ShardDataset(tmp_path)) == 1
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["refused"] == [{"name": "a.tar: 1", "reason": "no image member, only: txt, cls"}]


def test_foreign_shards_without_any_image(tmp_path):
    foreign_shard(tmp_path / "a.tar", [("1.txt", b"x")])
    with pytest.raises(ValueError, match=r"must contain images, but no sample of its 1 shards has one"):
        ShardDataset(tmp_path)
