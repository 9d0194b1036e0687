"""An index that is damaged says what of it is; one of shards from elsewhere is made again when they change."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from small_shards import make_samples, write_shards

from jepa_kit.data.shard_verify import verify
from jepa_kit.data.shards import ShardDataset
from jepa_kit.data.sources import SourceOptions, open_source

DAMAGED_INDEXES = {
    "no shards": ({"shards": None}, "it has no 'shards'"),
    "no samples": ({"samples": None}, "it has no 'samples'"),
    "no labels": ({"labels": None}, "it has no 'labels'"),
    "samples as text": ({"samples": "23"}, "'samples' of it (='23') must be of type int"),
    "labels as a list": ({"labels": ["class"]}, "'labels' of it (=['class']) must be of type dict"),
    "classes as a number": ({"labels": {"class": 4}}, "'class' of labels (=4) must be of type list"),
    "shards as texts": ({"shards": ["a.tar"]}, "shards[0] (='a.tar') must be a mapping"),
    "a shard without bytes": ({"shards": [{"file": "a.tar", "samples": 23}]}, "shards[0] has no 'bytes'"),
    "masks without classes": ({"masks": {}}, "masks has no 'classes'"),
}


@pytest.mark.parametrize("damage", DAMAGED_INDEXES)
@pytest.mark.parametrize("read", ["dataset", "verify", "classes"])
def test_what_an_index_lacks_is_named(tmp_path, folder, edit_index, damage, read):
    change, message = DAMAGED_INDEXES[damage]

    def edit(index):
        index.update(change)
        for key in (key for key, value in change.items() if value is None):
            del index[key]

    edit_index(edit)
    expected = f"{folder}/index.json is not whole: {message}; make the shards again"
    assert told(folder, read, tmp_path) == expected


def told(folder, read, tmp_path):
    """What is said of a damaged folder of shards."""
    if read == "verify":
        (problem,) = verify(str(folder), workers=1, show=lambda *_: None).problems
        return problem
    (tmp_path / "images.csv").write_text("path,label\nx.jpg,a\n")
    options = SourceOptions(classes_from=str(folder))
    with pytest.raises(ValueError, match="make the shards again") as caught:
        ShardDataset(folder) if read == "dataset" else open_source(
            str(tmp_path / "images.csv"), options, seed=0, scratch=""
        )
    return str(caught.value)


def cut(path):
    os.truncate(path, os.path.getsize(path) - 20)


DAMAGED_ARRAYS = {
    "empty": (lambda path: os.truncate(path, 0), "is not a whole array: "),
    "without its end": (cut, "is not a whole array: mmap length is greater than file size"),
    "without its head": (lambda path: path.write_bytes(b"some text" * 20), "is not a whole array: the magic string is"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is not a whole array: Is a directory"),
    "objects": (lambda path: np.save(path, np.array([{}] * 23)), "is not a whole array: Array can't be memory-mapped"),
    "of another shape": (lambda path: np.save(path, np.zeros((23, 9), dtype=np.int64)), "holds int64 of shape (23, 9)"),
    "of another type": (lambda path: np.save(path, np.zeros(23)), "holds float64 of shape (23,), but index.json has "),
}


@pytest.mark.parametrize("damage", DAMAGED_ARRAYS)
@pytest.mark.parametrize("name", ["offsets.npy", "labels.npy", "keys.npy"])
def test_a_damaged_array_is_named(tmp_path, folder, name, damage):
    apply, message = DAMAGED_ARRAYS[damage]
    apply(folder / name)
    for read in ("dataset", "verify"):
        text = told(folder, read, tmp_path)
        assert text.startswith(f"{folder / name} {message}"), text
        assert text.endswith("make the shards again")


@pytest.fixture
def foreign(tmp_path):
    """Two folders of 6 and 4 samples in a shard each, without an index."""
    for name, samples in (("one", make_samples(6)), ("two", make_samples(10)[6:])):
        write_shards(tmp_path / name, samples, 10, {"class": tuple("abcd")})
        (tmp_path / name / "shard-000000.tar").rename(tmp_path / name / f"{name}.tar")
        for path in (path for path in (tmp_path / name).iterdir() if path.suffix != ".tar"):
            path.unlink()
    return tmp_path / "one"


def keys(path):
    dataset = ShardDataset(path)
    return [dataset.image_bytes(i) and dataset.key(i) for i in range(len(dataset))]


def test_a_shard_that_was_added(foreign, caplog):
    first = keys(foreign)
    assert len(first) == 6
    assert not caplog.text
    shutil.copy(foreign.parent / "two/two.tar", foreign)
    assert keys(foreign) == [s.key for s in make_samples(10)]
    assert f"two.tar was added to {foreign}, or changed, since it was indexed: indexed again" in caplog.text
    caplog.clear()
    assert len(keys(foreign)) == 10
    assert not caplog.text, "the index is kept"


@pytest.mark.parametrize("named", ["", "/one.tar"])
def test_a_shard_that_was_replaced(foreign, named):
    """By another one, of the same size too."""
    keys(foreign)
    time.sleep(0.02)  # a file's time is that of the last tick
    shutil.copy(foreign.parent / "two/two.tar", foreign / "one.tar")
    assert keys(f"{foreign}{named}") == [s.key for s in make_samples(10)[6:]]


def test_a_shard_of_a_machine_whose_clock_is_ahead(foreign, caplog):
    ahead = time.time() + 3600
    os.utime(foreign / "one.tar", (ahead, ahead))
    for _ in range(2):
        assert len(keys(foreign)) == 6
    assert not caplog.text, "it is indexed once"


def test_a_folder_that_changed_and_cannot_be_written(foreign, monkeypatch):
    keys(foreign)
    shutil.copy(foreign.parent / "two/two.tar", foreign)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(keys(foreign)) == 10
    assert json.loads((foreign / "index.json").read_text())["samples"] == 6


def test_a_shard_that_is_away_stays_in_the_index(foreign):
    shutil.copy(foreign.parent / "two/two.tar", foreign)
    ShardDataset(foreign)
    (foreign / "two.tar").rename(foreign.parent / "away.tar")
    assert len(ShardDataset(foreign)) == 10


def test_our_own_index_is_never_made_again(folder, samples, caplog):
    (folder / "more.tar").write_bytes((folder / "shard-000000.tar").read_bytes())
    assert len(ShardDataset(folder)) == len(samples)
    assert f"more.tar in {folder} is not as its index.json says: see make_shards.py --verify" in caplog.text
