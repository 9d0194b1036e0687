"""Links in folders and archives are followed; hidden files, pipes and equal names are reported."""

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
from small_shards import encoded, picture

from jepa_kit.data.sources.base import Refused
from jepa_kit.data.sources.opening import SourceOptions, open_source

IMAGES = [encoded(picture(k)) for k in range(6)]


def opened(path, **options):
    return open_source(str(path), SourceOptions(**options), seed=0, scratch="")


def put(folder, **images):
    folder.mkdir(parents=True)
    for name, data in images.items():
        (folder / f"{name}.jpg").write_bytes(data)


def content(source):
    """Return name -> (bytes, name of its class)."""
    samples = [source.sample(i) for i in range(len(source))]
    names = source.classes.get("class", ("",))
    return {source.name(i): (s.image, names[s.labels.get("class", 0)]) for i, s in enumerate(samples)}


def test_a_class_that_is_a_link_to_a_folder(tmp_path):
    put(tmp_path / "photos/cat", a=IMAGES[0])
    put(tmp_path / "else/bird", b=IMAGES[1])
    os.symlink("../else/bird", tmp_path / "photos/bird")
    os.symlink("a.jpg", tmp_path / "photos/cat/same.jpg")
    assert content(opened(tmp_path / "photos")) == {
        "bird/b.jpg": (IMAGES[1], "bird"),
        "cat/a.jpg": (IMAGES[0], "cat"),
        "cat/same.jpg": (IMAGES[0], "cat"),
    }


def test_links_that_lead_back_have_an_end(tmp_path):
    put(tmp_path / "photos/cat", a=IMAGES[0])
    put(tmp_path / "photos/dog", b=IMAGES[1])
    for place, target in (("cat/up", ".."), ("cat/self", "."), ("up", "../.."), ("cat/dogs", "../dog")):
        os.symlink(target, tmp_path / "photos" / place)
    os.symlink("../cat", tmp_path / "photos/dog/cats")  # and each in the other
    names = list(content(opened(tmp_path / "photos")))
    assert names == ["cat/a.jpg", "cat/dogs/b.jpg", "dog/b.jpg", "dog/cats/a.jpg"]


def tar(path, entries):
    """Write a tar of entries (name, bytes) or (name, kind of link, target)."""
    with tarfile.open(path, "w") as archive:
        for name, *rest in entries:
            info = tarfile.TarInfo(name)
            if len(rest) == 2:
                info.type, info.linkname = rest
                archive.addfile(info)
            else:
                info.size = len(rest[0])
                archive.addfile(info, io.BytesIO(rest[0]))
    return path


def test_a_folder_with_links_as_tar_packs_it(tmp_path):
    put(tmp_path / "photos/cat", a=IMAGES[0])
    put(tmp_path / "photos/dog", b=IMAGES[1])
    os.link(tmp_path / "photos/cat/a.jpg", tmp_path / "photos/dog/c.jpg")  # the second name that tar meets is the link
    os.symlink("../dog/b.jpg", tmp_path / "photos/cat/d.jpg")
    expected = content(opened(tmp_path / "photos"))
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(tmp_path / "photos", "./")
        assert {m.name for m in archive if m.islnk() or m.issym()} >= {"./cat/d.jpg"}
    found = opened(tmp_path / "photos.tar")
    assert content(found) == content(pickle.loads(pickle.dumps(found))) == expected
    assert len(expected) == 4


def test_links_to_links_and_to_what_comes_later(tmp_path):
    entries = [
        ("a/1.jpg", tarfile.SYMTYPE, "../b/2.jpg"),
        ("a/3.jpg", tarfile.SYMTYPE, "1.jpg"),
        ("a/4.jpg", tarfile.LNKTYPE, "a/3.jpg"),
        ("b/2.jpg", IMAGES[2]),
    ]
    assert {name: image for name, (image, _) in content(opened(tar(tmp_path / "x.tar", entries))).items()} == {
        f"{name}.jpg": IMAGES[2] for name in ("a/1", "a/3", "a/4", "b/2")
    }


@pytest.mark.parametrize("target", ["../gone.jpg", "/etc/hostname", "..", "round.jpg"])
def test_a_link_out_of_the_archive_is_refused_by_name(tmp_path, target):
    entries = [("a/1.jpg", IMAGES[1]), ("b/2.jpg", IMAGES[2]), ("b/round.jpg", tarfile.SYMTYPE, target)]
    source = opened(tar(tmp_path / "x.tar", entries))
    assert [source.name(i) for i in range(3)] == ["a/1.jpg", "b/2.jpg", "b/round.jpg"]
    with pytest.raises(Refused, match=rf"cannot be read: a link to '{target}', which is no file of the archive"):
        source.sample(2)


def test_links_inside_the_tars_of_a_tar(tmp_path):
    for name in ("n1.tar", "n2.tar"):
        tar(tmp_path / name, [("1.jpg", IMAGES[int(name[1])]), ("2.jpg", tarfile.LNKTYPE, "1.jpg")])
    outer = tar(tmp_path / "all.tar", [(name, (tmp_path / name).read_bytes()) for name in ("n1.tar", "n2.tar")])
    assert content(opened(outer)) == {f"n{k}/{i}.jpg": (IMAGES[k], f"n{k}") for k in (1, 2) for i in (1, 2)}


def test_a_pipe_is_refused_and_not_waited_for(tmp_path, monkeypatch):
    put(tmp_path / "photos", a=IMAGES[0])
    os.mkfifo(tmp_path / "photos/b.jpg")
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it would wait without end"))
    source = opened(tmp_path / "photos")
    with pytest.raises(Refused, match="cannot be read: it is a folder, a pipe or a device, not a file"):
        source.sample(1)


@pytest.mark.parametrize("kind", ["", ".tar", ".zip"])
def test_hidden_files_are_counted(tmp_path, kind):
    names = ["a/1.jpg", "a/.2.jpg", ".git/x", "__MACOSX/a/1.jpg"]
    path = tmp_path / f"photos{kind}"
    if kind == ".tar":
        tar(path, [(name, IMAGES[0]) for name in names])
    elif kind == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, IMAGES[0])
    else:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(IMAGES[0])
    source = opened(path)
    assert [source.name(i) for i in range(len(source))] == ["a/1.jpg"]
    assert source.notes == ["left out: 3 hidden files"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for k in (1, 0, 2):
            archive.writestr("a.jpg" if k else "b.jpg", IMAGES[k])
    source = opened(tmp_path / "x.zip")
    samples = [source.sample(i) for i in range(3)]
    assert [(s.key, s.image) for s in samples] == [("a", IMAGES[1]), ("a_1", IMAGES[2]), ("b", IMAGES[0])]


@pytest.mark.parametrize("kind", ["", ".tar"])
@pytest.mark.parametrize("names", [("train", "val"), ("Train", "Test"), ("training", "validation")])
def test_the_parts_of_a_data_set_side_by_side(tmp_path, kind, names):
    entries = [(f"photos/{part}/{c}/{part}.jpg", IMAGES[k]) for part in names for k, c in enumerate("ab")]
    path = tmp_path / f"photos{kind}"
    if kind:
        tar(path, entries)
    else:
        for name, data in entries:
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_bytes(data)
    source = opened(path)
    assert len(source) == 4
    first, second = sorted(names)
    inside = " (unpack photos.tar first)" if kind else ""
    assert source.notes == [
        f"{first} and {second} in {path} become one data set: to keep them apart, make shards of each folder"
        f"{inside}, and of those after the first with --classes-from the first one's shards"
    ]


@pytest.mark.parametrize("names", [("train/a/1.jpg", "train/b/2"), ("trains/1.jpg", "cars/2.jpg"), ("1.jpg", "val")])
def test_other_folders_are_nothing_to_note(tmp_path, names):
    assert opened(tar(tmp_path / "x.tar", [(name, IMAGES[0]) for name in names])).notes == []
