"""Read shards: samples in any order and in any process, and an error for each kind of invalid folder."""

import http.server
import io
import multiprocessing
import os
import pickle
import tarfile
import threading
from functools import partial

import numpy as np
import pytest
from PIL import Image
from small_shards import encoded, make_samples, picture, write_shards

from jepa_kit.data.shards import reader
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.writing import Sample


def test_samples_come_back(dataset, samples):
    assert len(dataset) == len(samples)
    assert dataset.shard_sizes.tolist() == [10, 10, 3]
    for i in np.random.default_rng(0).permutation(len(samples)):
        assert dataset.image_bytes(i) == samples[i].image
        assert dataset.key(i) == samples[i].key
        expected = np.asarray(Image.open(io.BytesIO(samples[i].image)).convert("RGB"))
        image = dataset.image(i)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)
        sample = dataset.read(i)
        assert sample["key"] == samples[i].key
        assert sample["labels"] == samples[i].labels
        np.testing.assert_array_equal(np.asarray(sample["image"]), expected)


def test_image_files_of_several_samples(dataset, samples):
    for numbers in ([22, 0, 10], []):
        files = dataset.image_files(np.array(numbers, dtype=np.int64))
        assert [file.read() for file in files] == [samples[i].image for i in numbers]
        assert [file.key for file in files] == [samples[i].key for i in numbers]
    for numbers in ([0, 23], [-1, 3]):
        with pytest.raises(IndexError, match=rf"samples \(={min(numbers)} to {max(numbers)}\) must be 0 to 22"):
            dataset.image_files(np.array(numbers))


def test_labels_and_classes(dataset, samples):
    labels = dataset.labels("class")
    assert labels.dtype == np.int64
    assert labels.tolist() == [s.labels["class"] for s in samples]
    assert dataset.classes == {"class": ("a", "b", "c", "d")}
    assert repr(dataset).endswith("23 samples in 3 shards, labels ['class'])")


def test_several_labels(tmp_path):
    samples = make_samples(7, labels=("count", "shape"))
    names = tuple("abcd")
    dataset = ShardDataset(write_shards(tmp_path / "s", samples, 4, {"count": names, "shape": names}))
    for name in ("count", "shape"):
        assert dataset.labels(name).tolist() == [s.labels[name] for s in samples]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_few_shards_are_open_at_a_time(dataset, samples, monkeypatch):
    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    for i in (0, 10, 20, 1, 11, 22, 0):
        assert dataset.image_bytes(i) == samples[i].image
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    opened = [os.readlink(link) for link in links if os.path.lexists(link)]  # one was that of the folder
    assert sum(path.startswith(f"{dataset.path}/shard-") for path in opened) == 2


def _read(dataset, numbers):
    return [dataset.image_bytes(i) for i in numbers]


def test_files_are_closed_at_exit_too(dataset, monkeypatch):
    """Python clears modules before it deletes the objects that remain."""
    dataset.image_bytes(0)
    used = next(part for part in vars(dataset).values() if isinstance(part, reader.ShardReader))
    (descriptor,) = used._files.values()
    with monkeypatch.context() as patch:
        patch.setattr(reader, "os", None)
        used.__del__()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    used._files.clear()


@pytest.mark.parametrize("start", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_forked_and_spawned_processes_read_at_the_same_time(dataset, samples, start):
    dataset.image_bytes(0)  # so that a fork inherits an open shard
    with multiprocessing.get_context(start).Pool(2) as pool:
        numbers = [list(range(k, len(samples), 4)) for k in range(4)]
        for chosen, found in zip(numbers, pool.map(partial(_read, dataset), numbers), strict=True):
            assert found == [samples[i].image for i in chosen]


def test_pickled_it_takes_no_samples_along(dataset, samples):
    dataset.image_bytes(0)
    packed = pickle.dumps(dataset)
    assert len(packed) < 2000
    assert pickle.loads(packed).image_bytes(22) == samples[22].image


@pytest.mark.parametrize("i", [-1, 23])
def test_numbers_out_of_range(dataset, i):
    with pytest.raises(IndexError, match=rf"sample \(={i}\) must be 0 to 22"):
        dataset.image(i)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    handler = partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_shards_of_another_machine(server, folder, samples):
    dataset = ShardDataset(f"{server}/shards/")
    for i in (0, 12, 22):
        assert dataset.image_bytes(i) == samples[i].image


def test_a_machine_without_them(server):
    with pytest.raises(ValueError, match=r"nothing'\) must be a folder with an index.json, but there is none at"):
        ShardDataset(f"{server}/nothing")


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match=r"shards \(='.*gone'\) must be a folder of .tar shards, but there is no such"):
        ShardDataset(tmp_path / "gone")


def test_a_folder_without_shards(tmp_path, folder):
    with pytest.raises(ValueError, match=r"but it contains none; these folders in it do: shards$"):
        ShardDataset(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must be a folder of .tar shards or of images, but it contains neither \(of"):
        ShardDataset(tmp_path / "empty")


def test_an_archive_that_is_no_shard(tmp_path):
    """The message has the command that makes shards."""
    (tmp_path / "photos.zip").touch()
    with pytest.raises(ValueError, match=r"must be a folder of .tar shards, but it is a file: `jepa-shards"):
        ShardDataset(tmp_path / "photos.zip")


def test_an_unfinished_folder(folder):
    (folder / "index.json").unlink()
    (folder / "UNFINISHED").touch()
    with pytest.raises(ValueError, match=r"are unfinished: run the same make_shards command again, or with"):
        ShardDataset(folder)


@pytest.mark.parametrize("version", [0, 2, None])
def test_an_index_of_another_version(folder, edit_index, version):
    edit_index(lambda index: index.update(version=version))
    with pytest.raises(ValueError, match=rf"version \(={version}\), but this release reads version 1: make the shards"):
        ShardDataset(folder)


def test_a_cut_index(folder):
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"index.json is incomplete: .*; make the shards again"):
        ShardDataset(folder)


@pytest.mark.parametrize("name", ["offsets.npy", "labels.npy", "keys.npy"])
def test_a_missing_array(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing, but index.json is there: make the shards again"):
        ShardDataset(folder)


def test_an_index_that_disagrees_with_the_offsets(folder, edit_index):
    edit_index(lambda index: index["shards"].pop())
    with pytest.raises(ValueError, match=r"index.json has 23 samples, but its shards have 20: make the shards again"):
        ShardDataset(folder)


def test_a_missing_shard(folder, dataset):
    (folder / "shard-000001.tar").unlink()
    dataset.image(3)
    with pytest.raises(ValueError, match=r"shard shard-000001.tar of .* is missing, but index.json lists it"):
        dataset.image(13)


def test_a_shard_that_was_cut_short(folder, dataset):
    path = folder / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"shard-000002.tar of .* has \d+ bytes, but index.json says \d+: it was cut"):
        dataset.image(22)


@pytest.mark.parametrize("size", [299, 301, 10**9])
def test_a_header_of_another_size_is_refused(size):
    """A tar header of Python with more bytes, fewer bytes and as many bytes as the index lists."""
    header = tarfile.TarInfo("folder/0001.jpg")
    header.size = size
    fault = reader.header_fault(header.tobuf(tarfile.USTAR_FORMAT), 300, "folder/0001")
    assert fault == f"its header says {size} bytes, but index.json 300"
    assert reader.header_fault(header.tobuf(tarfile.USTAR_FORMAT), size, "folder/0001") is None


def test_a_sample_that_is_no_image(tmp_path):
    samples = [Sample("good", "png", encoded(picture(0), "PNG")), Sample("bad", "jpg", b"not a picture")]
    dataset = ShardDataset(write_shards(tmp_path / "s", samples, 2, {}))
    dataset.image(0)
    with pytest.raises(ValueError, match=r"sample 1 \('bad'\) of .* cannot be used: no image format that"):
        dataset.image(1)


def test_unlabelled_shards(tmp_path):
    dataset = ShardDataset(write_shards(tmp_path / "s", make_samples(3, labels=()), 2, {}))
    assert dataset.classes == {}
    assert dataset.read(2)["labels"] == {}
    with pytest.raises(ValueError, match=r"label \(='class'\) cannot be read: the shards in .* are unlabelled"):
        dataset.labels("class")


def test_another_label(dataset):
    with pytest.raises(ValueError, match=r"label \(='clas'\) is not among .*; did you mean 'class'\? They are: class"):
        dataset.labels("clas")


def test_a_label_that_some_samples_lack(tmp_path):
    samples = make_samples(5)
    samples[3] = Sample("without", "png", samples[0].image)
    dataset = ShardDataset(write_shards(tmp_path / "s", samples, 2, {"class": tuple("abcd")}))
    assert dataset.read(3)["labels"] == {}
    with pytest.raises(
        ValueError, match=r"label \(='class'\) is missing for 1 of 5 samples of .*, first for 'without'"
    ):
        dataset.labels("class")
