"""Folders, patterns, lists and URLs give the same samples, and an index is made once."""

import dataclasses
import io
import json
import os
import pickle
import re
import tarfile

import numpy as np
import pytest
from bad_server import serving
from small_shards import encoded, picture, write_shards

from jepa_kit.data.remote.fetch import Access
from jepa_kit.data.segmentation import encode_mask
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.index import difference, identity
from jepa_kit.data.shards.writing import Sample
from jepa_kit.data.sources.opening import SourceOptions, open_source
from jepa_kit.errors import SampleError

NAMES = ("index.json", "offsets.npy", "labels.npy", "keys.npy")
QUICK = {"retries": 1, "backoff": 0.0, "timeout": 1.0}


@pytest.fixture
def server(tmp_path):
    with serving(tmp_path) as found:
        yield found


@pytest.fixture
def access(tmp_path):
    return Access(cache=str(tmp_path / "cache"), **QUICK)


def without_index(folder):
    for name in NAMES:
        (folder / name).unlink()


def assert_samples(dataset, samples):
    assert len(dataset) == len(samples)
    assert [dataset.key(i) for i in range(len(samples))] == [s.key for s in samples]
    assert [dataset.image_bytes(i) for i in range(len(samples))] == [s.image for s in samples]
    if samples[0].labels:
        assert dataset.labels("class").tolist() == [s.labels["class"] for s in samples]


def test_a_pattern_of_all_shards_of_a_folder(folder, samples):
    dataset = ShardDataset(f"{folder}/shard-{{000000..000002}}.tar")
    assert_samples(dataset, samples)
    assert dataset.classes == {"class": ("a", "b", "c", "d")}
    assert dataset.shards == ShardDataset(folder).shards
    assert not dataset.remote


def test_some_shards_of_a_folder_in_another_order(folder, samples):
    dataset = ShardDataset([f"{folder}/shard-000002.tar", f"{folder}/shard-000000.tar"])
    assert_samples(dataset, samples[20:] + samples[:10])
    assert_samples(pickle.loads(pickle.dumps(dataset)), samples[20:] + samples[:10])
    assert dataset.shard_sizes.tolist() == [3, 10]


def test_a_list_of_folders_is_one_data_set(tmp_path, folder, samples):
    more = [Sample(f"more/{k}", s.extension, s.image, {"class": 3, "count": k}) for k, s in enumerate(samples[:4])]
    write_shards(tmp_path / "more", more, 3, {"class": tuple("abcd"), "count": tuple("0123")})
    dataset = ShardDataset([str(tmp_path / "more"), str(folder)])
    assert_samples(dataset, more + samples)
    assert dataset.path == f"{tmp_path / 'more'}, {folder}"
    assert dataset.labelled("count").tolist() == [0, 1, 2, 3]
    assert dataset.read(2)["labels"] == {"class": 3, "count": 2}
    assert dataset.read(4)["labels"] == samples[0].labels


def test_lists_whose_classes_differ(tmp_path, folder, samples):
    """Images can be used, since training reads no labels; reading the label is an error."""
    other = [Sample(f"o/{k}", s.extension, s.image, {"class": 1, "count": 2}) for k, s in enumerate(samples[:2])]
    write_shards(tmp_path / "other", other, 2, {"class": tuple("abXd"), "count": tuple("0123")})
    both = [str(folder), str(tmp_path / "other")]
    for dataset in (ShardDataset(both), pickle.loads(pickle.dumps(ShardDataset(both)))):
        assert [dataset.image_bytes(i) for i in range(25)] == [s.image for s in [*samples, *other]]
        assert dataset.classes == {"count": tuple("0123")}
        assert dataset.read(24)["labels"] == {"count": 2}
        message = r"label \(='class'\) must have the same classes in all parts, but those of .*other differ "
        for ask in (dataset.labels, dataset.labelled):
            with pytest.raises(ValueError, match=message):
                ask("class")
    with pytest.raises(ValueError, match=r"source \(='wds:.*'\) cannot become one set of shards: label"):
        open_source(f"wds:{'::'.join(both)}", SourceOptions(), seed=0, scratch="")


def test_lists_whose_only_label_has_other_classes(tmp_path, folder, samples):
    other = [Sample(f"o/{k}", s.extension, s.image, {"class": k}) for k, s in enumerate(samples[:2])]
    write_shards(tmp_path / "a", [dataclasses.replace(s, labels={"class": 0}) for s in samples], 2, {"class": ("x",)})
    write_shards(tmp_path / "b", other, 2, {"class": ("y", "z")})
    dataset = ShardDataset([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [dataset.image_bytes(i) for i in range(25)] == [s.image for s in [*samples, *other]]
    assert dataset.classes == {}
    assert dataset.read(24)["labels"] == {}
    with pytest.raises(ValueError, match=r"label \(='class'\) must have the same classes in all parts"):
        dataset.labels("class")


def test_lists_whose_masks_have_other_classes(tmp_path, samples):
    mask = encode_mask(np.zeros((16, 18), dtype=np.uint8))
    for name, classes in (("a", ["none", "cat"]), ("b", ["none", "dog"])):
        write_shards(tmp_path / name, [dataclasses.replace(samples[0], mask=mask)], 2, {"class": tuple("abcd")})
        index = json.loads((tmp_path / name / "index.json").read_text())
        index["masks"]["classes"] = classes
        (tmp_path / name / "index.json").write_text(json.dumps(index))
    dataset = ShardDataset([str(tmp_path / "a"), str(tmp_path / "b")])
    assert dataset.image_bytes(1) == samples[0].image
    assert not dataset.has_masks
    with pytest.raises(ValueError, match=r"masks have other classes in .*b than in .*a$"):
        dataset.mask(0)


def test_foreign_shards_of_two_folders_that_saw_other_classes(tmp_path, samples):
    write_shards(tmp_path / "a", samples[:2], 2, {"class": tuple("abcd")})
    write_shards(tmp_path / "b", samples[:8], 8, {"class": tuple("abcd")})
    for name in "ab":
        without_index(tmp_path / name)
    dataset = ShardDataset([str(tmp_path / "a"), str(tmp_path / "b")])
    assert dataset.classes == {"class": ("0", "1", "2", "3")}
    assert_samples(dataset, samples[:2] + samples[:8])


def test_foreign_shards_by_pattern_are_indexed_once_in_the_users_cache(tmp_path, folder, samples):
    without_index(folder)
    pattern = f"{folder}/shard-{{000000..000002}}.tar"
    assert_samples(ShardDataset(pattern), samples)
    assert not (folder / "index.json").exists()
    (index,) = (tmp_path / "user_cache/jepa_kit/indexes").glob("*/index.json")
    written = index.stat().st_mtime_ns
    assert_samples(ShardDataset(pattern), samples)
    assert index.stat().st_mtime_ns == written
    (folder / "shard-000002.tar").write_bytes((folder / "shard-000000.tar").read_bytes())
    with pytest.raises(ValueError, match="shard-000002"):  # another file has another index; its keys are there twice
        raise ValueError(ShardDataset(pattern).shards[2]["file"])
    assert len(list((tmp_path / "user_cache/jepa_kit/indexes").glob("*/index.json"))) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_foreign_folder_that_is_not_writable(folder, samples):
    without_index(folder)
    folder.chmod(0o500)
    assert_samples(ShardDataset(folder), samples)


def test_the_index_of_a_folder_that_cannot_be_written(tmp_path, folder, samples, monkeypatch):
    without_index(folder)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert_samples(ShardDataset(folder), samples)
    assert not (folder / "index.json").exists()


def test_a_pattern_that_names_missing_files(folder):
    without_index(folder)
    with pytest.raises(ValueError, match=r"name 5 files, but 2 of them are missing, first .*shard-000003.tar"):
        ShardDataset(f"{folder}/shard-{{000000..000004}}.tar")


@pytest.mark.parametrize(
    ("names", "twice"),
    [
        (["{f}/shard-{{000000..000001}}.tar", "{f}/shard-000001.tar"], "{f}/shard-000001.tar"),
        (["{f}", "{f}"], "{f}"),
        (["{f}", "{f}/../shards/"], "{f}/../shards/"),
        (["{f}", "link"], "link"),
        (["{f}", "{f}/shard-000001.tar"], "{f}/shard-000001.tar"),
        (["{f}/shard-000002.tar", "{other}", "{f}"], "{f}/shard-000002.tar"),
        (["{url}", "{url}/"], "{url}/"),
        (["{url}", "{url}/shard-000000.tar"], "{url}/shard-000000.tar"),
    ],
)
def test_a_shard_that_is_named_twice(server, access, tmp_path, monkeypatch, folder, samples, names, twice):
    """By its name, by its folder, or by another path."""
    monkeypatch.chdir(tmp_path)
    os.symlink(folder, "link")
    other = write_shards(tmp_path / "other", samples[:3], 3, {"class": tuple("abcd")})
    places = {"f": folder, "other": other, "url": f"{server.address}/shards"}
    names, twice = [name.format(**places) for name in names], twice.format(**places)
    message = f"name {re.escape(twice)} more than once: its samples would be used as often"
    with pytest.raises(ValueError, match=message):
        ShardDataset(names, access=access)
    assert not any(name.endswith(".tar") for name, _ in server.requests)


def test_a_folder_of_another_machine(server, folder, samples, access):
    dataset = ShardDataset(f"{server.address}/shards/", access=access)
    assert dataset.remote
    assert server.count("shard-000000.tar") == 0, "shards are fetched when they are read"
    assert_samples(dataset, samples)
    assert_samples(ShardDataset(f"{server.address}/shards", access=access), samples)
    assert [server.count(f"shard-00000{k}.tar") for k in range(3)] == [1, 1, 1]
    assert server.count("offsets.npy") == 1


def test_without_a_cache_folder_shards_go_when_the_data_set_does(server, folder, samples):
    dataset = ShardDataset(f"{server.address}/shards", access=Access(**QUICK))
    assert_samples(dataset, samples)
    place = dataset.cache.folder
    assert len(os.listdir(f"{place}/shards")) == 3
    del dataset
    assert not os.path.exists(place)


def test_shards_of_another_machine_by_pattern_use_the_index_beside_them(server, folder, samples, access):
    dataset = ShardDataset(f"{server.address}/shards/shard-{{000001..000002}}.tar", access=access)
    assert server.count("shard-000001.tar") == 0
    assert_samples(dataset, samples[10:])


def test_foreign_shards_of_another_machine_are_read_once_for_their_index(server, folder, samples, access):
    without_index(folder)
    pattern = f"{server.address}/shards/shard-{{000000..000002}}.tar"
    assert_samples(ShardDataset(pattern, access=access), samples)
    assert [server.count(f"shard-00000{k}.tar") for k in range(3)] == [1, 1, 1], "and kept in the cache"
    assert_samples(ShardDataset(pattern, access=access), samples)
    assert server.count("shard-000000.tar") == 1


def test_an_interrupted_index_resumes(server, folder, samples, access):
    without_index(folder)
    pattern = f"{server.address}/shards/shard-{{000000..000002}}.tar"
    server.plans["shard-000002.tar"] = [("status", 404)]
    with pytest.raises(
        ValueError, match=r"each is read once, but http.*000002.tar was not downloaded completely: HTTP 404"
    ):
        ShardDataset(pattern, access=access)
    del server.plans["shard-000002.tar"]
    later = Access(cache=access.cache, **QUICK)
    for name in (f for f in os.listdir(f"{access.cache}/shards") if f.endswith((".cut", ".why"))):
        os.remove(f"{access.cache}/shards/{name}")
    assert_samples(ShardDataset(pattern, access=later), samples)
    assert [server.count(f"shard-00000{k}.tar") for k in range(3)] == [1, 1, 2]


def test_pipes(folder, samples, access):
    without_index(folder)
    dataset = ShardDataset(f"pipe:cat '{folder}'/shard-{{000000..000002}}.tar", access=access)
    assert dataset.remote
    assert_samples(dataset, samples)
    assert_samples(pickle.loads(pickle.dumps(dataset)), samples)


def test_local_and_remote_shards_together(server, folder, samples, tmp_path, access):
    write_shards(tmp_path / "near", samples[:3], 2, {"class": tuple("abcd")})
    dataset = ShardDataset([str(tmp_path / "near"), f"{server.address}/shards"], access=access)
    assert_samples(dataset, samples[:3] + samples)
    assert dataset.shard_of(np.array([0, 2, 3, 13])).tolist() == [0, 1, 2, 3]
    dataset.fetch(0)
    assert server.count("shard-000000.tar") == 1


def test_an_index_of_another_machine_that_is_broken(server, folder, access):
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text[:50])
    with pytest.raises(ValueError, match=r"http.*/index.json is incomplete: "):
        ShardDataset(f"{server.address}/shards", access=access)
    (folder / "index.json").write_text(text)
    (folder / "keys.npy").unlink()
    with pytest.raises(ValueError, match=r"keys.npy cannot be read, but index.json is there: HTTP 404"):
        ShardDataset(f"{server.address}/shards", access=access)


def test_a_machine_that_does_not_answer(tmp_path):
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/x/index.json cannot be read: .*gave up after 1 tries"):
        ShardDataset("http://127.0.0.1:9/x", access=Access(retries=0, timeout=1.0))


def foreign_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def jpegs(count):
    return [encoded(picture(k, 40, 40)) for k in range(count)]


def test_a_foreign_shard_that_was_cut_keeps_what_is_whole(tmp_path, caplog):
    images = jpegs(4)
    foreign_shard(tmp_path / "a.tar", [(f"{k}.jpg", image) for k, image in enumerate(images)])
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: data.index(images[2]) + 100])
    dataset = ShardDataset(tmp_path)
    assert [dataset.image_bytes(i) for i in range(len(dataset))] == images[:2]
    (entry,) = json.loads((tmp_path / "index.json").read_text())["refused"]
    assert entry["name"] == "a.tar: 2.jpg"
    assert entry["reason"].startswith("the shard ends after ")
    assert "a.tar: 2.jpg: the shard ends after" in caplog.text


@pytest.mark.parametrize("damage", [b"\xff", b"\0"])
def test_a_foreign_shard_with_a_corrupt_stretch_keeps_what_is_before_and_after(tmp_path, damage):
    images = jpegs(5)
    foreign_shard(tmp_path / "a.tar", [(f"{k}.jpg", image) for k, image in enumerate(images)])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    header = data.index(b"2.jpg\0")
    data[header : header + 700] = damage * 700
    (tmp_path / "a.tar").write_bytes(data)
    dataset = ShardDataset(tmp_path)
    assert [dataset.key(i) for i in range(len(dataset))] == ["0", "1", "3", "4"]
    assert [dataset.image_bytes(i) for i in range(4)] == [images[k] for k in (0, 1, 3, 4)]
    (entry,) = json.loads((tmp_path / "index.json").read_text())["refused"]
    assert entry["name"] == "a.tar: before 3.jpg"
    assert "are no tar members: the shard is corrupt there" in entry["reason"]


def test_a_foreign_file_that_is_no_tar_costs_itself_alone(tmp_path):
    foreign_shard(tmp_path / "a.tar", [("0.jpg", jpegs(1)[0])])
    (tmp_path / "b.tar").write_bytes(b"no tar" * 300)
    (tmp_path / "c.tar").write_bytes(b"")
    dataset = ShardDataset(tmp_path)
    assert dataset.shard_sizes.tolist() == [1, 0, 0]
    names = [entry["name"] for entry in json.loads((tmp_path / "index.json").read_text())["refused"]]
    assert names[0].startswith("b.tar: from byte 0 on")


def test_a_key_that_comes_twice_is_two_samples(tmp_path):
    """Concatenated shards, or a writer that restarts its numbers; the second sample may have no label."""
    images = jpegs(5)
    labelled = [m for k in range(3) for m in ((f"{k}.jpg", images[k]), (f"{k}.cls", b"%d" % k))]
    again = [("1.jpg", images[3]), ("0.jpg", images[4]), ("0.cls", b"4")]
    foreign_shard(tmp_path / "a.tar", labelled + again)
    dataset = ShardDataset(tmp_path)
    assert [dataset.key(i) for i in range(5)] == ["0", "1", "2", "1", "0"]
    assert [dataset.image_bytes(i) for i in range(5)] == images
    assert [dataset.labels_of(i).get("class") for i in range(5)] == [0, 1, 2, None, 4]
    assert json.loads((tmp_path / "index.json").read_text())["refused"] == []


def test_labels_that_are_none_are_listed_and_their_samples_used(tmp_path):
    image = jpegs(1)[0]
    texts = [b"1", b"cat", b"-3", b"70000", b"", b"\xff\xfe"]
    foreign_shard(
        tmp_path / "a.tar", [m for k, text in enumerate(texts) for m in ((f"{k}.jpg", image), (f"{k}.cls", text))]
    )
    foreign_shard(tmp_path / "b.tar", [("x.jpg", image), ("x.json", b"{broken"), ("y.jpg", image), ("y.json", b"[1]")])
    dataset = ShardDataset(tmp_path)
    assert len(dataset) == 8
    assert dataset.labelled("class").tolist() == [0]
    refused = json.loads((tmp_path / "index.json").read_text())["refused"]
    assert [entry["name"] for entry in refused] == [f"a.tar: {k}.cls" for k in range(1, 6)] + [
        "b.tar: x.json",
        "b.tar: y.json",
    ]
    assert refused[0]["reason"] == "'cat' is no class number: used without that label"
    assert refused[1]["reason"] == "'-3' is no class number from 0 to 65535: used without that label"
    assert refused[5]["reason"] == "'{broken' is no JSON: used without that label"
    assert refused[6]["reason"] == "'[1]' is no mapping of labels: used without that label"


def test_remote_shards_are_downloaded_once_and_must_not_change(folder, samples, tmp_path):
    """Their checksum is that of the bytes that were indexed; comparing data sets downloads nothing."""
    places = [f"pipe:echo x >> {tmp_path}/count; cat {path}" for path in sorted(folder.glob("*.tar"))]
    kept = Access(cache=str(tmp_path / "cache"), **QUICK)
    dataset = ShardDataset(places, access=kept)
    assert_samples(dataset, samples)
    assert_samples(ShardDataset(places, access=kept), samples)
    assert (tmp_path / "count").read_text() == "x\n" * 3
    assert difference(identity(dataset.shards), identity(ShardDataset(folder).shards)) == (None, None)
    for path in (tmp_path / "cache/shards").iterdir():
        path.unlink()
    first = folder / "shard-000000.tar"
    data = first.read_bytes()
    first.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    again = ShardDataset(places, access=kept)
    assert again.image_bytes(10) == samples[10].image
    with pytest.raises(SampleError, match="its SHA-256 is not that of its index"):
        again.image_bytes(9)
