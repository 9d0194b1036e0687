"""A damaged index gives an error that names the damage; the index of foreign shards is made again if they change."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from small_shards import make_samples, write_shards

from jepa_kit.data.making.verify import verify
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.sources.opening import SourceOptions, open_source

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
    expected = f"{folder}/index.json is incomplete: {message}; make the shards again"
    assert error_of(folder, read, tmp_path) == expected


def error_of(folder, read, tmp_path):
    """Return the error of a damaged folder of shards."""
    if read == "verify":
        _, (problem,) = verify(str(folder), workers=1, show=lambda *_: None)
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
    "empty": (lambda path: os.truncate(path, 0), "is not a complete array: "),
    "without its end": (cut, "is not a complete array: mmap length is greater than file size"),
    "without its head": (
        lambda path: path.write_bytes(b"some text" * 20),
        "is not a complete array: the magic",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is not a complete array: Is a directory"),
    "objects": (
        lambda path: np.save(path, np.array([{}] * 23)),
        "is not a complete array: Array can't be",
    ),
    "of another shape": (lambda path: np.save(path, np.zeros((23, 9), dtype=np.int64)), "has int64 of shape (23, 9)"),
    "of another type": (lambda path: np.save(path, np.zeros(23)), "has float64 of shape (23,), but index.json has "),
}


@pytest.mark.parametrize("damage", DAMAGED_ARRAYS)
@pytest.mark.parametrize("name", ["offsets.npy", "labels.npy", "keys.npy"])
def test_a_damaged_array_is_named(tmp_path, folder, name, damage):
    apply, message = DAMAGED_ARRAYS[damage]
    apply(folder / name)
    for read in ("dataset", "verify"):
        text = error_of(folder, read, tmp_path)
        assert text.startswith(f"{folder / name} {message}"), text
        assert text.endswith("make the shards again")


@pytest.fixture
def foreign(tmp_path):
    """Two shards of 6 and 4 samples, without an index."""
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
    """Another shard replaces it, also one of the same size."""
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
    assert f"more.tar in {folder} differs from its index.json: run jepa-shards --verify" in caplog.text


def edited(folder, name, change, *, old):
    """Change an array; ``old`` deletes its checksum, since data sets of earlier releases have none."""
    array = np.load(folder / name)
    change(array)
    np.save(folder / name, array)
    index = json.loads((folder / "index.json").read_text())
    if old:
        index.pop("arrays", None)
    (folder / "index.json").write_text(json.dumps(index))


IMPOSSIBLE = {
    "class 999": ("labels.npy", (3, 0), 999, "sample 3 has class 999 of label 'class', which has 4 classes"),
    "class 4": ("labels.npy", (3, 0), 4, "sample 3 has class 4 of label 'class', which has 4 classes"),
    "class -2": ("labels.npy", (3, 0), -2, "sample 3 has class -2 of label 'class', which has 4 classes"),
    "beyond the shard": (
        "offsets.npy",
        (12, 1),
        2**62,
        f"the image of sample 12 has {2**62} bytes at ",
    ),
    "before the shard": ("offsets.npy", (12, 0), -512, "the image of sample 12 has "),
    "no image": ("offsets.npy", (12, slice(0, 2)), (-1, 0), "the image of sample 12 has 0 bytes at -1, in a shard of"),
    "inside a block": ("offsets.npy", (12, 0), 5121, "the image of sample 12 has "),
    "negative size": ("offsets.npy", (12, 3), -1, "the label of sample 12 has -1 bytes at "),
    "no text": ("keys.npy", 5, b"\xff\xfe", "key 5 is no text in UTF-8"),
}


@pytest.mark.parametrize("damage", IMPOSSIBLE)
def test_what_cannot_be_is_refused_without_checksums(folder, damage):
    name, place, value, message = IMPOSSIBLE[damage]
    edited(folder, name, lambda array: array.__setitem__(place, value), old=True)
    with pytest.raises(ValueError, match=rf"^{folder / name} is damaged: {message}.*; make the shards again$"):
        ShardDataset(folder)


def test_the_last_byte_of_a_shard_is_its_last(folder):
    """A member may end at the end of its shard, and not one byte later."""
    offset = int(np.load(folder / "offsets.npy")[12, 0])
    size = (folder / "shard-000001.tar").stat().st_size
    edited(folder, "offsets.npy", lambda array: array.__setitem__((12, 1), size - offset), old=True)
    ShardDataset(folder)
    edited(folder, "offsets.npy", lambda array: array.__setitem__((12, 1), size - offset + 1), old=True)
    with pytest.raises(
        ValueError, match=f"the image of sample 12 has {size - offset + 1} bytes at {offset}, in a shard"
    ):
        ShardDataset(folder)


@pytest.mark.parametrize("name", ["labels.npy", "offsets.npy", "keys.npy"])
def test_every_changed_byte_of_an_array_is_noticed(folder, name, samples):
    """Change each byte in turn, of header and numbers; unchanged files open, also without checksums."""
    whole = (folder / name).read_bytes()
    for place in range(0, len(whole), 7):
        (folder / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=rf"^{folder / name} (was changed or damaged|is not a complete|has )"):
            ShardDataset(folder)
    (folder / name).write_bytes(whole)
    assert len(ShardDataset(folder)) == len(samples)
    edited(folder, name, lambda array: None, old=True)
    assert len(ShardDataset(folder)) == len(samples)


BAD_NUMBERS = {
    "samples": ({"samples": -1}, "'samples' of it (=-1) must be 0 to "),
    "a truth": ({"samples": True}, "'samples' of it (=True) must be of type int"),
    "bytes": (
        {"shards": [{"file": "a", "samples": 0, "bytes": -5, "sha256": None}]},
        "'bytes' of shards[0] (=-5) must b",
    ),
    "huge": (
        {"shards": [{"file": "a", "samples": 0, "bytes": 10**30, "sha256": None}]},
        "'bytes' of shards[0] (=1000000",
    ),
    "sum": (
        {"shards": [{"file": "a", "samples": 0, "bytes": 5, "sha256": "ab"}]},
        "'sha256' of shards[0] (='ab') must be",
    ),
    "classes": ({"labels": {"class": ["a", 7]}}, "'class' (=['a', 7]) must be a list of texts"),
    "no mapping of arrays": ({"arrays": None}, "arrays (=None) must be a mapping"),
    "links in a list": ({"links": [[]]}, "links (=[[]]) must be a mapping"),
    "no maker": ({"made_by": None}, "made_by (=None) must be a mapping"),
    "arrays": ({"arrays": {"labels.npy": 5}}, "'labels.npy' of arrays (=5) must be of type str"),
}


@pytest.mark.parametrize("damage", BAD_NUMBERS)
def test_an_index_with_impossible_values(folder, edit_index, damage):
    change, message = BAD_NUMBERS[damage]
    edit_index(lambda index: index.update(change))
    with pytest.raises(ValueError, match="make the shards again") as caught:
        ShardDataset(folder)
    assert str(caught.value).startswith(f"{folder}/index.json is incomplete: {message}")


def test_options_of_the_maker_have_any_type(folder, edit_index, samples):
    options = {"shuffle": True, "num_scenes": 32, "quality": 0.5, "source": None, "names": ["a"]}
    edit_index(lambda index: index.update(made_by=options))
    assert len(ShardDataset(folder)) == len(samples)


def test_a_deeply_nested_index(folder):
    (folder / "index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"index.json is incomplete: .*; make the shards again"):
        ShardDataset(folder)


@pytest.mark.parametrize(
    "header", ["(" * 2000, "{'descr': '<i8', 'fortran_order': False, 'shape': (9", "{[1]: 2}", "\0"]
)
def test_a_broken_header_of_an_array(folder, header):
    text = header.encode() + b"\n"
    (folder / "labels.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(200))
    with pytest.raises(ValueError, match=r"labels.npy is not a complete array: .*; make the shards again"):
        ShardDataset(folder)


def test_an_index_of_an_earlier_version_is_made_again(foreign, caplog):
    keys(foreign)
    index = json.loads((foreign / "index.json").read_text())
    index["made_by"], index["shards"][0]["sha256"] = {"tool": "index_shards"}, None
    (foreign / "index.json").write_text(json.dumps(index))
    assert ShardDataset(foreign).shards[0]["sha256"] is not None
    assert f"index.json in {foreign} is of an earlier version, without checksums: indexed again" in caplog.text


def test_a_damaged_array_of_a_foreign_index_names_what_to_remove(foreign):
    ShardDataset(foreign)
    edited(foreign, "labels.npy", lambda array: array.__setitem__((0, 0), 1 - array[0, 0]), old=False)
    with pytest.raises(
        ValueError, match=rf"its SHA-256 is not that .*; remove {foreign}/index.json, and it is made ag"
    ):
        ShardDataset(foreign)


def test_a_damaged_array_in_the_cache_names_what_to_remove(foreign, tmp_path):
    ShardDataset(str(foreign / "one.tar"))
    (kept,) = (tmp_path / "user_cache/jepa_kit/indexes").iterdir()
    edited(kept, "labels.npy", lambda array: array.__setitem__((0, 0), 1 - array[0, 0]), old=False)
    with pytest.raises(ValueError, match=rf"its SHA-256 is not that of index.json; remove {kept}, and it"):
        ShardDataset(str(foreign / "one.tar"))
