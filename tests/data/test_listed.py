"""Folders and lists of images are read as shards are: the same images, in any order that a run needs, and exactly."""

import os
import pickle
import shutil
from itertools import islice

import numpy as np
import pytest
from small_shards import encoded, picture
from test_exactness import a_loader, records

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.listed import ListedSamples, image_files, image_folder
from jepa_kit.data.loader import eval_batches
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.index import difference, identity
from jepa_kit.data.sources.labels import Labels
from jepa_kit.errors import SampleError
from jepa_kit.rng import Stream, generator, permutation
from jepa_kit.tools.make_shards import main as make_shards

CLASSES = ("bird", "cat", "dog")


@pytest.fixture
def photos(tmp_path):
    """24 images in three folders, and files that are none."""
    folder = tmp_path / "photos"
    for k in range(24):
        path = folder / CLASSES[k % 3] / (f"{k}.JPG" if k % 2 else f"{k}.v2.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(k, 16 + k % 5, 20), "JPEG" if k % 2 else "PNG"))
    (folder / "cat/notes.txt").write_text("no image")
    (folder / "cat/.thumbs").mkdir()
    (folder / "cat/.thumbs/0.png").write_bytes(b"")
    return folder


def folders_of(photos):
    return sorted(str(path.relative_to(photos)) for path in photos.glob("*/*") if path.suffix in (".JPG", ".png"))


def test_a_folder_is_what_make_shards_makes_of_it(photos, tmp_path):
    """Without shuffling: the same samples, keys, labels and bytes, and so the same pixels."""
    (photos / "cat/notes.txt").unlink()
    assert make_shards([str(photos), str(tmp_path / "shards"), "--no-shuffle", "--workers", "1"]) == 0
    ours, theirs = ShardDataset(photos), ShardDataset(tmp_path / "shards")
    assert len(ours) == len(theirs) == 24
    assert ours.classes == theirs.classes == {"class": CLASSES}
    np.testing.assert_array_equal(ours.labels("class"), theirs.labels("class"))
    for i in range(24):
        assert ours.key(i) == theirs.key(i)
        assert ours.image_bytes(i) == theirs.image_bytes(i) == (photos / folders_of(photos)[i]).read_bytes()
        assert ours.labels_of(i) == theirs.labels_of(i)
    options = ImageOptions(image_size=(12, 12), batch_size=10, num_workers=0)
    for one, other in zip(eval_batches(ours, options), eval_batches(theirs, options), strict=True):
        assert one.images.equal(other.images)


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (0, 4)])
def test_batches_are_a_function_of_the_step(photos, workers, ranks):
    dataset = ShardDataset(photos)
    whole = [records(batch) for _, batch in islice(a_loader(dataset).batches(), 9)]
    for first in (0, 4):
        loaders = [
            a_loader(dataset, rank=r, world_size=ranks, num_workers=workers).batches(first) for r in range(ranks)
        ]
        for step in range(first, 9):
            parts = [next(loader)[1] for loader in loaders]
            assert [record for part in parts for record in records(part)] == whole[step]


def test_windows_do_not_keep_classes_together(photos):
    """A shard's samples were shuffled when it was written; files are in the order of their folders."""
    order = a_loader(ShardDataset(photos), window=4).order(0)
    np.testing.assert_array_equal(np.sort(order), np.arange(24))
    rng = generator(Stream.ORDER, seed=11, epoch=0)
    expected = permutation(rng, 24)
    for begin in range(0, 24, 4):
        expected[begin : begin + 4] = expected[begin : begin + 4][permutation(rng, 4)]
    np.testing.assert_array_equal(order, expected)


def test_damaged_files_are_left_out_with_their_reason(photos):
    dataset = ShardDataset(photos)
    names = folders_of(photos)
    (photos / names[0]).unlink()
    (photos / names[1]).write_bytes((photos / names[1]).read_bytes()[:-40])
    size = (photos / names[2]).stat().st_size
    (photos / names[2]).write_bytes(b"x" * size)
    (photos / names[3]).unlink()
    os.mkfifo(photos / names[3])
    batches = [batch for _, batch in islice(a_loader(dataset).batches(), 3)]
    reasons = {skipped.sample: skipped.reason for batch in batches for skipped in batch.skipped}
    assert sorted(reasons) == [0, 1, 2, 3]
    assert reasons[0] == f"{names[0]} of {photos} cannot be read: No such file or directory"
    assert f"has {(photos / names[1]).stat().st_size} bytes, but had " in reasons[1]
    assert "no image format" in reasons[2]
    assert "it is a folder, a pipe or a device" in reasons[3]
    assert sum(len(batch) for batch in batches) == 20
    with pytest.raises(ValueError, match=r"sample 0 \('bird/0_v2'\) of .* cannot be used: .* cannot be read: No such"):
        dataset.image(0)


def test_notes(photos):
    for name in ("train", "val"):
        shutil.copytree(photos / "cat", photos.parent / "both" / name)
    assert image_folder(str(photos)).notes == (
        f"{photos}: left out 1 files without the extension of an image: 1 .txt",
        f"{photos}: left out 1 hidden files",
    )
    together = image_folder(str(photos.parent / "both"))
    assert "its folders train and val are one data set here; for one of them name that folder" in together.notes[-1]


def test_labels_of_a_folder_without_folders(photos):
    assert ShardDataset(photos / "cat").classes == {}
    shutil.copy(photos / "cat/1.JPG", photos / "stray.jpg")
    dataset = ShardDataset(photos)
    assert dataset.labelled("class").tolist() == list(range(24))  # the stray one is the last by name
    with pytest.raises(ValueError, match=r"missing for 1 of 25 samples of .*, first for 'stray'"):
        dataset.labels("class")


def test_the_identity_is_that_of_names_and_sizes(photos, tmp_path):
    def now(path):
        return identity(ShardDataset(path).shards)

    before = now(photos)
    shutil.copytree(photos, tmp_path / "elsewhere/photos")
    note = "1 of 1 data sets are files in no shard: compared by their names and sizes"
    assert difference(before, now(tmp_path / "elsewhere/photos")) == (None, note)
    first = photos / folders_of(photos)[0]
    first.rename(first.with_name("0.v3.png"))
    fault, _ = difference(before, now(photos))
    assert fault.startswith("folder 0 differs: photos had digest of names and sizes ")
    first.with_name("0.v3.png").unlink()
    assert difference(before, now(photos))[0] == "folder 0 differs: photos had files 24, but here photos has 23"


def test_folders_and_shards_as_one_data_set(photos, folder):
    both = ShardDataset([str(photos), str(folder)])
    assert len(both) == 24 + 23
    assert both.unit_sizes.tolist() == [1] * 24 + [10, 10, 3]
    assert both.image_bytes(0) == ShardDataset(photos).image_bytes(0)
    assert both.image_bytes(24) == ShardDataset(folder).image_bytes(0)
    assert both.conflicts.keys() == {"class"}
    with pytest.raises(ValueError, match=r"name .*photos/? more than once"):
        ShardDataset([str(photos), f"{photos}/"])


def test_a_data_set_of_files_can_be_pickled(photos):
    dataset = ShardDataset(photos)
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy.image_bytes(i) for i in range(24)] == [dataset.image_bytes(i) for i in range(24)]
    assert copy.labels("class").tolist() == dataset.labels("class").tolist()


class TestListOfPaths:
    def test_keeps_the_order(self, photos):
        paths = [photos / name for name in folders_of(photos)[::-2]]
        dataset = ShardDataset(image_files(paths))
        assert [dataset.image_bytes(i) for i in range(12)] == [path.read_bytes() for path in paths]
        assert dataset.classes == {"class": CLASSES}
        assert [CLASSES[k] for k in dataset.labels("class")] == [path.parent.name for path in paths]

    def test_labels(self, photos):
        paths = [photos / name for name in folders_of(photos)[:3]]
        names = ShardDataset(image_files(paths, ["b", "a", ""]))
        assert names.classes == {"class": ("a", "b")}
        assert [names.labels_of(i) for i in range(3)] == [{"class": 1}, {"class": 0}, {}]
        numbers = ShardDataset(image_files(paths, [2, 0, 2]))
        assert numbers.labels("class").tolist() == [2, 0, 2]
        assert numbers.classes == {"class": ("0", "1", "2")}

    def test_is_the_same_elsewhere(self, photos, tmp_path):
        shutil.copytree(photos, tmp_path / "elsewhere")
        names = folders_of(photos)
        one, other = (image_files([root / name for name in names]) for root in (photos, tmp_path / "elsewhere"))
        assert one.digest == other.digest == image_folder(str(photos)).digest
        assert one.digest != image_files([photos / name for name in names[::-1]]).digest

    @pytest.mark.parametrize(
        ("paths", "labels", "message"),
        [
            ([], None, r"paths \(=\[\]\) must be at least one"),
            (["a.png", "./a.png"], None, r"must name each file once, but '.*/a.png' occurs more than once"),
            (["a.png", "b.png"], ["x"], r"labels \(of length 1\) must be one for each of 2 paths"),
        ],
    )
    def test_mistakes(self, paths, labels, message):
        with pytest.raises(ValueError, match=message):
            image_files(paths, labels)

    def test_a_missing_file_is_a_damaged_one(self, photos):
        dataset = ShardDataset(image_files([photos / "gone.png", photos / folders_of(photos)[0]]))
        with pytest.raises(SampleError, match=r"gone.png of .*photos cannot be read: No such file"):
            dataset.image_bytes(0)


def made(count=3, labels=None, **options):
    keys = np.array([f"sample {k}".encode() for k in range(count)], dtype=bytes)
    values = {"sizes": np.zeros(count, dtype=np.int64), "labels": labels or Labels(), "digest": "d"} | options
    return ListedSamples(path="made", keys=keys, read=lambda i: encoded(picture(i)), **values)


def test_samples_that_the_caller_makes():
    dataset = ShardDataset(made())
    assert dataset.image(2).tobytes() == ShardDataset(made()).image(2).tobytes()
    assert [dataset.key(i) for i in range(3)] == ["sample 0", "sample 1", "sample 2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, r"data set \(='made'\) must have at least one sample"),
        ({"sizes": np.zeros(2, dtype=np.int64)}, r"must have one key, size and label for each sample: keys 3, sizes 2"),
        ({"labels": Labels({"class": ("a",)}, {"class": np.zeros(4, dtype=np.int64)})}, r"labels\['class'\] 4"),
    ],
)
def test_samples_that_do_not_fit_together(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)
