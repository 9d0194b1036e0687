"""Hugging Face data sets, made here with their library: bytes, labels, splits, and errors."""

import builtins

import numpy as np
import pytest
from small_shards import encoded, picture

from jepa_kit.data.sources.base import Refused
from jepa_kit.data.sources.opening import SourceOptions, open_source

datasets = pytest.importorskip("datasets", reason="the package datasets is not installed (extra hf)")

IMAGES = [encoded(picture(k), "PNG" if k % 2 else "JPEG") for k in range(6)]


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def table(numbers, names=("ant", "bee"), **columns):
    features = {
        "img": datasets.Image(),
        "label": datasets.ClassLabel(names=list(names)),
        "note": datasets.Value("string"),
    }
    rows = {
        "img": [{"bytes": IMAGES[k], "path": None} for k in numbers],
        "label": [k % 2 for k in numbers],
        "note": ["x" if k < 3 else "y" for k in numbers],
    }
    return datasets.Dataset.from_dict(rows | columns, features=datasets.Features(features))


def opened(name, **options):
    return open_source(f"hf:{name}", SourceOptions(**options), seed=0, scratch="")


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_a_data_set_on_this_machine(tmp_path, kind):
    path = tmp_path / ("rows.parquet" if kind == "parquet" else "rows")
    table(range(5)).to_parquet(path) if kind == "parquet" else table(range(5)).save_to_disk(path)
    source = opened(path)
    assert source.classes == {"class": ("ant", "bee")}
    assert {k: v.tolist() for k, v in source.splits.items()} == {"": [0, 1, 2, 3, 4]}
    for i in range(5):
        sample = source.sample(i)
        assert (sample.key, sample.image, sample.labels) == (f"{i:08d}", IMAGES[i], {"class": i % 2})
        assert sample.extension == ("png" if i % 2 else "jpg")


def test_splits_become_folders(tmp_path):
    whole = datasets.DatasetDict({"train": table(range(4)), "test": table([4, 5])})
    whole.save_to_disk(tmp_path / "rows")
    source = opened(tmp_path / "rows")
    assert {k: v.tolist() for k, v in source.splits.items()} == {"train": [0, 1, 2, 3], "test": [4, 5]}
    assert [source.sample(i).image for i in range(6)] == IMAGES
    assert source.name(5) == "test/00000001"


def test_columns_by_name(tmp_path):
    table(range(4)).rename_column("img", "photo").add_column("raw", IMAGES[:4]).save_to_disk(tmp_path / "rows")
    source = opened(tmp_path / "rows", label_column=("note", "label"))
    assert source.classes == {"note": ("x", "y"), "label": ("ant", "bee")}
    assert source.sample(3).labels == {"note": 1, "label": 1}
    one = opened(tmp_path / "rows", label_column=("note",), image_column="raw")
    assert one.classes == {"class": ("x", "y")}
    assert one.sample(2).image == IMAGES[2]


def test_hidden_labels_and_missing_images(tmp_path):
    rows = table(
        range(3), label=[-1, 1, 0], img=[None, {"bytes": IMAGES[1], "path": None}, {"bytes": b"", "path": None}]
    )
    rows.save_to_disk(tmp_path / "rows")
    source = opened(tmp_path / "rows")
    with pytest.raises(Refused, match="no image in this row"):
        source.sample(0)
    assert source.sample(1).labels == {"class": 1}
    with pytest.raises(Refused, match=r"empty file|no image in this row"):
        source.sample(2)
    assert source.labels.of(0) == {}


def test_images_that_are_files(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(IMAGES[0])
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": None, "path": str(tmp_path / name)} for name in ("a.jpg", "gone.jpg")]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.Dataset.from_dict(rows, features=features))
    source = opened("who/what")
    assert source.classes == {}
    assert source.sample(0).image == IMAGES[0]
    with pytest.raises(Refused, match="cannot be read: No such file"):
        source.sample(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "imag"}, r"--image-column \(=imag\) is no column of hf:.*; did you mean 'img'\? It has: img"),
        ({"label_column": ("labels",)}, r"--label-column \(=labels\) is no column of hf:.*; did you mean 'label'\?"),
        ({"image_column": "note"}, None),
    ],
)
def test_columns_that_are_not_there(tmp_path, options, message):
    table(range(2)).save_to_disk(tmp_path / "rows")
    if message is None:
        with pytest.raises(Refused, match="cannot be read: No such file"):
            opened(tmp_path / "rows", **options).sample(0)
    else:
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / "rows", **options)


def test_no_column_of_images(tmp_path):
    table(range(2)).remove_columns("img").save_to_disk(tmp_path / "rows")
    with pytest.raises(
        ValueError, match=r"has 0 columns of images: name one with --image-column; its columns are: lab"
    ):
        opened(tmp_path / "rows")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"source \(='hf:'\) must name a data set, such as hf:"),
        ("gone.parquet", r"source \(='hf:gone.parquet'\) does not exist"),
    ],
)
def test_names_of_nothing(name, message):
    with pytest.raises(ValueError, match=message):
        opened(name)


def test_errors_of_the_library_are_in_the_message(monkeypatch):
    called = []

    def load(*arguments):
        called.append(arguments)
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"source \(='hf:who/what:small'\) cannot be loaded: no network here"):
        opened("who/what:small")
    assert called == [("who/what", "small")]


@pytest.mark.parametrize("empty", ["one split", "all"])
def test_an_empty_split(monkeypatch, empty):
    rows = datasets.DatasetDict({"train": table([0, 1] if empty == "one split" else []), "test": table([])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: rows)
    if empty == "one split":
        assert {k: v.tolist() for k, v in opened("who/what").splits.items()} == {"": [0, 1]}
    else:
        with pytest.raises(ValueError, match=r"source \(='hf:who/what'\) has no rows"):
            opened("who/what")


def test_without_the_package(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        ValueError, match=r"source \(='hf:x/y'\) needs the package datasets: pip install 'jepa_kit\[hf\]'"
    ):
        opened("x/y")


def test_the_fingerprint_is_that_of_rows_and_labels(tmp_path):
    prints = []
    for k, numbers in enumerate(([0, 1], [0, 1], [1, 0], [0, 1, 2])):
        table(numbers).save_to_disk(tmp_path / f"{k}")
        prints.append(opened(tmp_path / f"{k}").fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert np.unique(prints).size == 3
