"""Small archives like CIFAR's: pixels, labels, splits; and no pickle runs code."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from old_pickles import old_pickle
from PIL import Image

from jepa_kit.data.sources.base import Recode
from jepa_kit.data.sources.cifar import unpickle
from jepa_kit.data.sources.opening import SourceOptions, open_source

NAMES10 = ["airplane", "automobile", "bird"]


def batch10(seed, count=4, **changes):
    rng = np.random.default_rng(seed)
    content = {
        "batch_label": f"batch {seed}",
        "labels": rng.integers(0, 3, count).tolist(),
        "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        "filenames": [f"name_{seed}_s_{k:06d}.png" for k in range(count)],
    }
    return {k: v for k, v in (content | changes).items() if v is not None}


def write(path, folder, files, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        top = tarfile.TarInfo(folder)
        top.type = tarfile.DIRTYPE
        tar.addfile(top)
        for name, content in files.items():
            data = content if isinstance(content, bytes) else old_pickle(content)
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


BATCHES10 = {"data_batch_4": batch10(4), "readme.html": b"<html>", "test_batch": batch10(6, 3)} | {
    f"data_batch_{k}": batch10(k) for k in (1, 2, 3, 5)
}
FILES10 = BATCHES10 | {"batches.meta": {"num_cases_per_batch": 4, "label_names": NAMES10, "num_vis": 3072}}


def opened(path, **options):
    return open_source(path, SourceOptions(**options), seed=0, scratch="")


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_cifar10(tmp_path, mode):
    name = "cifar-10-python.tar" + (".gz" if mode == "w:gz" else "")
    source = opened(write(tmp_path / name, "cifar-10-batches-py", FILES10, mode))
    assert source.classes == {"class": tuple(NAMES10)}
    assert {split: numbers.tolist() for split, numbers in source.splits.items()} == {
        "train": list(range(20)),
        "test": [20, 21, 22],
    }
    order = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    expected = [(b, k) for name in order for b in [BATCHES10[name]] for k in range(len(b["labels"]))]
    for i, (batch, k) in enumerate(expected):
        sample = source.sample(i)
        assert (sample.key, sample.extension) == (batch["filenames"][k][:-4], "png")
        assert sample.labels == {"class": batch["labels"][k]}
        planes = batch["data"][k].reshape(3, 32, 32)  # red, green, blue
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)))
        for channel in range(3):
            np.testing.assert_array_equal(pixels[..., channel], planes[channel])


def test_cifar100_has_two_labels(tmp_path):
    def batch(seed, count):
        rng = np.random.default_rng(seed)
        return batch10(seed, count, labels=None) | {
            "fine_labels": rng.integers(0, 4, count).tolist(),
            "coarse_labels": rng.integers(0, 2, count).tolist(),
        }

    files = {
        "meta": {"fine_label_names": list("wxyz"), "coarse_label_names": ["p", "q"]},
        "test": batch(0, 3),
        "train": batch(1, 5),
    }
    source = opened(write(tmp_path / "cifar-100-python.tar.gz", "cifar-100-python", files))
    assert source.classes == {"fine": tuple("wxyz"), "coarse": ("p", "q")}
    assert [len(numbers) for numbers in source.splits.values()] == [5, 3]
    for i in range(8):
        batch_, k = (files["train"], i) if i < 5 else (files["test"], i - 5)
        labels = {"fine": batch_["fine_labels"][k], "coarse": batch_["coarse_labels"][k]}
        assert source.sample(i).labels == labels


def test_images_can_be_encoded_again(tmp_path):
    path = write(tmp_path / "c.tar.gz", "cifar-10-batches-py", FILES10)
    sample = opened(path, shorter_side=16).sample(3)
    assert Image.open(io.BytesIO(sample.image)).size == (16, 16)
    png = opened(path).sample(3).image
    assert opened(path, quality=50).sample(3).image == Recode(quality=50).sample("k", png, {}).image


def test_our_reading_is_numpys_own():
    """pickle and numpy read the same values from bytes written opcode by opcode."""
    data = old_pickle(BATCHES10["data_batch_2"])
    theirs = pickle.loads(data, encoding="bytes")
    ours = unpickle(data)
    np.testing.assert_array_equal(ours["data"], theirs[b"data"])
    assert ours["labels"] == theirs[b"labels"]
    assert ours["data"].dtype == np.uint8


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_batch_that_python_3_wrote(protocol):
    data = np.arange(2 * 3072, dtype=np.uint64).astype(np.uint8).reshape(2, 3072)
    if protocol == 2:  # bytes come as a call of _codecs.encode there, which is not needed for CIFAR
        with pytest.raises(ValueError, match=r"_codecs\.encode is not allowed in a batch of CIFAR"):
            unpickle(pickle.dumps({"data": data}, protocol=protocol))
    else:
        np.testing.assert_array_equal(unpickle(pickle.dumps({"data": data}, protocol=protocol))["data"], data)


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps({"data": Evil(os.system, "touch owned")}), r"\w+.system is not allowed in a batch of CIFAR"),
        (pickle.dumps({"data": Evil(eval, "1")}), "builtins.eval is not allowed"),
        (pickle.dumps({"data": np.array([os.getcwd], dtype=object)}), r"\w+.getcwd is not allowed"),
        (pickle.dumps(np.float64), "numpy.float64 is not allowed"),
        (b"cnumpy\nload\n(S'x'\ntR.", "numpy.load is not allowed"),
        (old_pickle([1]), "a batch must be a dict, but is a list"),
        (old_pickle({"data": np.zeros((1, 2), dtype=np.float32)}), "an array must be of unsigned bytes"),
        (b"", "Ran out of input"),
        (b"no pickle", ""),
        (old_pickle({"data": 1})[:-3], ""),
    ],
)
def test_what_is_no_batch(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"not a batch of CIFAR: .*{reason}"):
        unpickle(content)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data_batch_3": None}, "data_batch_3 in source .* is invalid: 'data_batch_3' is missing"),
        ({"batches.meta": None}, "batches.meta in source .* 'batches.meta' is missing"),
        ({"data_batch_2": batch10(2, labels=None)}, "data_batch_2 in source .* 'labels' is missing"),
        ({"test_batch": batch10(6, labels=[1])}, "test_batch .* must have one label for each of 4 images"),
        ({"test_batch": batch10(6, labels=[1, 2, 3, 0])}, r"test_batch .* label \(=3\) must be 0 to 2"),
        ({"test_batch": batch10(6, filenames=["x"])}, "test_batch .* 1 names for 4 images"),
        ({"test_batch": batch10(6, data=np.zeros((4, 99), np.uint8))}, "test_batch .* cannot reshape array"),
        ({"test_batch": batch10(6, data=7)}, "test_batch .* has no attribute 'reshape'"),
        ({"test_batch": b"cos\nsystem\n(S'x'\ntR."}, "test_batch .* not a batch of CIFAR: os.system is not allowed"),
    ],
)
def test_archives_that_are_not_as_they_should_be(tmp_path, files, message):
    files = {name: content for name, content in (FILES10 | files).items() if content is not None}
    with pytest.raises(ValueError, match=message):
        opened(write(tmp_path / "c.tar.gz", "cifar-10-batches-py", files))


def test_an_archive_that_was_cut(tmp_path):
    path = write(tmp_path / "c.tar.gz", "cifar-10-batches-py", FILES10)
    with open(path, "r+b") as f:
        f.truncate(os.path.getsize(path) - 2000)
    with pytest.raises(ValueError, match=r"source \(='.*c.tar.gz'\) is not a complete tar archive"):
        opened(path)


def test_labels_are_its_own(tmp_path):
    path = write(tmp_path / "c.tar.gz", "cifar-10-batches-py", FILES10)
    with pytest.raises(ValueError, match=r"--label-from \(=top\) is only for image files"):
        opened(path, label_from="top")
