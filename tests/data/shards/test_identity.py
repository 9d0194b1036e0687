"""The identity of a data set depends on contents, not on names; checkpoints of earlier versions can be compared."""

import hashlib
import json
import shutil

import pytest
from small_shards import make_samples, write_shards

from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.index import brief, difference, identity


def entry(k, **changes):
    return {"file": f"shard-{k}.tar", "samples": 5, "bytes": 10240, "sha256": f"{k:064x}"} | changes


THREE = [entry(k) for k in range(3)]


def test_the_same_shards_elsewhere_are_the_same(folder, dataset, tmp_path):
    """Copied, renamed, and without an index."""
    (tmp_path / "copy").mkdir()
    for k, path in enumerate(sorted(folder.glob("*.tar"))):
        shutil.copy(path, tmp_path / f"copy/other-{k}.tar")
    ours, copied = identity(dataset.shards), identity(ShardDataset(tmp_path / "copy").shards)
    assert difference(ours, copied) == (None, None)
    assert ours["digest"] == copied["digest"]
    assert ours["samples"] == 23
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))]
    assert [shard[3] for shard in ours["shards"]] == [shard[3] for shard in copied["shards"]] == sums
    assert brief(ours) == {"samples": 23, "digest": ours["digest"]}


def test_shards_of_other_pixels_and_the_same_size_differ(tmp_path):
    """Two data sets with equal names, counts and sizes, with our index and without an index."""
    found = []
    for name, first in (("a", 0), ("b", 35)):  # sizes of images repeat after 35, and tar rounds
        samples = make_samples(first + 4)[first:]
        renamed = [type(s)(f"k{i}", s.extension, s.image, {"class": 0}) for i, s in enumerate(samples)]
        found.append(write_shards(tmp_path / name, renamed, 4, {"class": ("a",)}))
    for _ in range(2):
        one, two = (identity(ShardDataset(path).shards) for path in found)
        assert [shard[:3] for shard in one["shards"]] == [shard[:3] for shard in two["shards"]]
        fault, _ = difference(one, two)
        assert fault.startswith("shard 0 differs: shard-000000.tar had SHA-256 ")
        for path in found:  # now they are foreign shards
            (path / "index.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            [entry(0), entry(9), entry(2)],
            f"shard 1 differs: shard-1.tar had SHA-256 {1:064x}, but here shard-9.tar has",
        ),
        (
            [entry(0), entry(1, samples=4), entry(2)],
            "shard 1 differs: shard-1.tar had samples 5, but here shard-1.tar h",
        ),
        (THREE[:2], "it had 3 shards, but here are 2: the first that one side lacks is shard-2.tar"),
        ([*THREE, entry(3)], "it had 3 shards, but here are 4: the first that one side lacks is shard-3.tar"),
        (THREE[::-1], "shard 0 differs: shard-0.tar had SHA-256 "),
        (
            [entry(0, sha256=None, bytes=2), *THREE[1:]],
            "shard 0 differs: shard-0.tar had bytes 10240, but here shard-0.t",
        ),
        (
            [entry(0, sha256=None, file="a"), *THREE[1:]],
            "shard 0 differs: shard-0.tar had name shard-0.tar, but here a h",
        ),
    ],
)
def test_the_shard_that_differs_is_named(now, message):
    fault, note = difference(identity(THREE), identity(now))
    assert fault.startswith(message)
    assert note is None
    assert identity(now)["digest"] != identity(THREE)["digest"]


def test_a_shard_without_a_checksum_is_compared_by_name_and_size():
    fault, note = difference(identity(THREE), identity([entry(0, sha256=None), *THREE[1:]]))
    assert fault is None
    assert note == "1 of 3 shards have no checksum in their index: compared by name, sample count and size"


def test_a_checkpoint_of_an_earlier_version():
    """The digest of an earlier version covers names, counts and sizes."""
    text = json.dumps([[shard["file"], shard["samples"], shard["bytes"]] for shard in THREE])
    old = {"samples": 15, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}
    fault, note = difference(old, identity(THREE))
    assert fault is None
    assert note.startswith("the checkpoint is of an earlier version and has no checksums of its shards: their names, ")
    fault, _ = difference(old, identity([*THREE[:2], entry(2, bytes=20480)]))
    assert fault == "names, sample counts or sizes of its shards differ"
    fault, _ = difference(old, identity(THREE[:2]))
    assert fault == "it had 15 samples, but here are 10"
