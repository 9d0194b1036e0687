"""Each damage of a folder of shards is named, and intact folders have none."""

import dataclasses
import json
import os

import numpy as np
import pytest
from small_shards import make_samples, write_shards

from jepa_kit.data.making.verify import verify
from jepa_kit.data.segmentation import encode_mask
from jepa_kit.data.shards.dataset import ShardDataset


@pytest.fixture
def masked_folder(tmp_path):
    mask = encode_mask(np.zeros((16, 18), dtype=np.uint8))
    samples = [dataclasses.replace(s, mask=mask) if k % 2 else s for k, s in enumerate(make_samples(23))]
    return write_shards(tmp_path / "out", samples, 10, {"class": tuple("abcd")})


def problems(folder):
    shown = []
    _, problems = verify(str(folder), workers=2, show=lambda done, total: shown.append((done, total)))
    if shown:
        assert shown[-1][0] == shown[-1][1] == sum(p.stat().st_size for p in folder.rglob("*.tar") if p.name < "t")
    return [text.replace(f"{folder}/", "") for text in problems]


def test_intact_shards_have_no_problems(masked_folder):
    assert verify(str(masked_folder), workers=2, show=lambda *_: None) == (3, [])
    assert problems(masked_folder) == []


def test_folders_in_the_folder(tmp_path, samples):
    for name in ("train", "val"):
        write_shards(tmp_path / name, samples, 10, {"class": tuple("abcd")})
    (tmp_path / "notes").mkdir()
    os.truncate(tmp_path / "val/shard-000002.tar", 100)
    shards, problems = verify(str(tmp_path), workers=1, show=lambda *_: None)
    assert shards == 6
    (problem,) = problems
    assert problem.startswith(f"{tmp_path}/val/shard-000002.tar: it has 100 bytes, but index.json says ")


def test_foreign_shards_get_checksums(folder):
    for name in ("index.json", "offsets.npy", "labels.npy", "keys.npy"):
        (folder / name).unlink()
    ShardDataset(folder)
    assert problems(folder) == []
    change_byte(folder / SHARD, 9000)
    assert problems(folder) == [f"{SHARD}: its bytes have changed: their SHA-256 is not that of index.json"]


def change_byte(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def edit_array(folder, name, change):
    array = np.load(folder / name)
    change(array)
    np.save(folder / name, array)
    edit(folder, lambda index: index.pop("arrays", None))  # as in data sets of earlier releases


def without_checksums(folder):
    edit(folder, lambda index: [entry.update(sha256=None) for entry in index["shards"]])


def broken_header(folder):
    without_checksums(folder)
    change_byte(folder / "shard-000001.tar", 10)


SHARD = "shard-000001.tar"
DAMAGES = {
    "gone": (lambda f: os.remove(f / SHARD), [f"{SHARD}: it is missing"]),
    "cut": (lambda f: os.truncate(f / SHARD, 20480), [f"{SHARD}: it has 20480 bytes, but index.json says "]),
    "one bit": (
        lambda f: change_byte(f / SHARD, 9000),
        [f"{SHARD}: its bytes have changed: their SHA-256 is not that of index.json"],
    ),
    "extra": (lambda f: (f / "s.tar").write_bytes(b""), ["s.tar: index.json does not list it"]),
    "unfinished": (lambda f: (f / "UNFINISHED").touch(), ["UNFINISHED: a run was interrupted: run its command again"]),
    "index cut": (
        lambda f: os.truncate(f / "index.json", 99),
        ["index.json is incomplete: Unterminated string"],
    ),
    "index of another kind": (
        lambda f: (f / "index.json").write_text('{"version": 1}'),
        ["index.json is incomplete: it has no 'samples'; make the shards again"],
    ),
    "version": (
        lambda f: edit(f, lambda i: i.update(version=9)),
        ["index.json has version (=9), but this release reads version 1"],
    ),
    "count": (
        lambda f: edit(f, lambda i: i.update(samples=22)),
        ["index.json has 22 samples, but its shards have 23"],
    ),
    "array gone": (
        lambda f: os.remove(f / "keys.npy"),
        ["keys.npy is missing, but index.json is there"],
    ),
    "array cut": (lambda f: os.truncate(f / "labels.npy", 150), ["labels.npy is not a complete array: "]),
    "array of another shape": (
        lambda f: np.save(f / "offsets.npy", np.zeros((3, 4))),
        ["offsets.npy has float64 of shape (3, 4), but index.json has 23 samples: it must be int64 of"],
    ),
    "offsets": (
        lambda f: edit_array(f, "offsets.npy", lambda a: a.__setitem__((12, 0), a[11, 0])),
        [f"{SHARD}: its members are not at the offsets of offsets.npy"],
    ),
    "labels": (
        lambda f: edit_array(f, "labels.npy", lambda a: a.__setitem__((12, 0), 3 - a[12, 0])),
        [f"{SHARD}: its labels 'class' are not those of labels.npy"],
    ),
    "keys": (
        lambda f: edit_array(f, "keys.npy", lambda a: a.__setitem__(12, b"x")),
        [f"{SHARD}: its keys are not those of keys.npy"],
    ),
    "masks": (
        lambda f: edit_array(f, "masks.npy", lambda a: a.__setitem__((13, 1), 7)),
        [f"{SHARD}: its masks are not at the offsets of masks.npy"],
    ),
    "a header, without checksums": (  # of the first sample's label
        broken_header,
        [
            f"{SHARD}: before ",
            f"{SHARD}: its members are not at the offsets of offsets.npy",
            f"{SHARD}: its labels 'class' are not those of labels.npy",
        ],
    ),
    "two things": (
        lambda f: (os.remove(f / SHARD), os.truncate(f / "shard-000002.tar", 0)),
        [f"{SHARD}: it is missing", "shard-000002.tar: it has 0 bytes, but index.json says "],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named(masked_folder, damage):
    apply, expected = DAMAGES[damage]
    apply(masked_folder)
    _, problems = verify(str(masked_folder), workers=2, show=lambda *_: None)
    found = [text.removeprefix(f"{masked_folder}/") for text in problems]
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True)), found


@pytest.mark.parametrize("what", ["gone", "empty", "images"])
def test_nothing_to_verify(tmp_path, what):
    folder = tmp_path / what
    if what != "gone":
        folder.mkdir()
    if what == "images":
        (folder / "train").mkdir()
        (folder / "train/x.jpg").touch()
    message = "must be a folder of shards, but there is no such" if what == "gone" else "has no index.json, nor does"
    with pytest.raises(ValueError, match=rf"--verify \(='{folder}'\) {message}"):
        verify(str(folder), workers=1, show=lambda *_: None)
