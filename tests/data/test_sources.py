"""Sources list their samples in one order, keep bytes, and say why they refuse."""

import io
import multiprocessing
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from small_shards import encoded, picture

from jepa_kit.data.scenes import CLASSES, render
from jepa_kit.data.sources import Refused, Scenes, open_files, unique_keys

TREE = {
    "train/cat/0.jpg": encoded(picture(0)),
    "train/cat/1.png": encoded(picture(1), "PNG"),
    "train/dog/0.jpg": encoded(picture(2)),
    "train/dog/.hidden.jpg": b"x",
    "__MACOSX/train/dog/0.jpg": b"x",
    "train/.cache/0.jpg": b"x",
}
NAMES = ["train/cat/0.jpg", "train/cat/1.png", "train/dog/0.jpg"]


def build(tmp_path, kind, tree=TREE):
    """The tree as a folder or an archive."""
    path = tmp_path / f"source{kind}"
    if kind == "":
        for name, data in tree.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    elif kind == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train/", b"")
            for name, data in tree.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as archive:
            folder = tarfile.TarInfo("train")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for name, data in reversed(tree.items()):
                info = tarfile.TarInfo(f"./{name}" if kind == ".tgz" else name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(path)


def files(tmp_path, kind="", tree=TREE, label_from="auto"):
    return open_files(build(tmp_path, kind, tree), label_from=label_from, scratch=str(tmp_path / "scratch.tar"))


KINDS = ["", ".tar", ".tar.gz", ".tgz", ".zip"]


@pytest.mark.parametrize("kind", KINDS)
def test_folders_and_archives_hold_the_same(tmp_path, kind):
    source = files(tmp_path, kind)
    assert [source.name(i) for i in range(len(source))] == NAMES
    assert source.classes == {"class": ("cat", "dog")}
    for i, name in enumerate(NAMES):
        sample = source.sample(i)
        assert sample.key == os.path.splitext(name)[0]
        assert sample.image == TREE[name]
        assert sample.extension == name[-3:]
        assert sample.labels == {"class": i // 2}
    copy = pickle.loads(pickle.dumps(source))
    assert copy.sample(1) == source.sample(1)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_processes_read_one_zip(tmp_path):
    tree = {f"c{k % 3}/{k}.png": encoded(picture(k), "PNG") for k in range(40)}
    source = files(tmp_path, ".zip", tree)
    source.sample(0)  # so that the forks inherit an open archive
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(source.sample, range(40), chunksize=1)
    assert [s.image for s in found] == [tree[source.name(i)] for i in range(40)]


@pytest.mark.parametrize(
    ("label_from", "classes", "labels"),
    [
        ("auto", ("cat", "dog"), [0, 0, 1]),
        ("parent", ("cat", "dog"), [0, 0, 1]),
        ("top", ("train",), [0, 0, 0]),
        ("none", None, None),
    ],
)
def test_where_labels_come_from(tmp_path, label_from, classes, labels):
    source = files(tmp_path, label_from=label_from)
    assert source.classes == ({"class": classes} if classes else {})
    found = [source.sample(i).labels for i in range(3)]
    assert found == ([{"class": k} for k in labels] if labels else [{}] * 3)


@pytest.mark.parametrize("tree", [{"a.png": TREE["train/cat/1.png"]}, {"images/a.png": TREE["train/cat/1.png"]}])
def test_one_folder_is_unlabelled(tmp_path, tree):
    source = files(tmp_path, tree=tree)
    assert source.classes == {}
    assert source.sample(0).labels == {}


def test_files_beside_class_folders_are_refused(tmp_path):
    source = files(tmp_path, tree=TREE | {"stray.png": TREE["train/cat/1.png"]})
    assert source.name(0) == "stray.png"
    with pytest.raises(Refused, match="lies outside every class folder"):
        source.sample(0)
    assert source.sample(1).labels == {"class": 0}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"some text", "not a decodable image: no image format that Pillow knows"),
        (encoded(picture(0, 200, 200))[:-3000], "not a decodable image: .*truncated"),
        (encoded(picture(0, 50, 50), "PNG")[:-900], "not a decodable image: "),
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG"],
)
def test_what_is_no_image_is_refused(tmp_path, data, reason):
    source = files(tmp_path, tree={"a/x.jpg": data, "b/y.jpg": TREE["train/cat/0.jpg"]})
    with pytest.raises(Refused, match=reason):
        source.sample(0)
    source.sample(1)


@pytest.mark.parametrize("file_format", ["BMP", "TIFF", "GIF", "WEBP"])
def test_other_formats_become_png(tmp_path, file_format):
    image = picture(3).quantize(16).convert("RGB")
    data = encoded(image, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    sample = files(tmp_path, tree={"x.img": data}).sample(0)
    assert sample.extension == "png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), np.asarray(image))


def test_extension_is_that_of_the_content(tmp_path):
    sample = files(tmp_path, tree={"x.png": TREE["train/cat/0.jpg"]}).sample(0)
    assert (sample.key, sample.extension) == ("x", "jpg")


def test_keys_are_unique_and_webdatasets():
    names = ["a/x.jpg", "a/x.png", "a/x.y.jpg", "a/x_y.jpg", "b.c/x.jpg", "x", "__meta__/x.jpg", "a/x_1.jpg"]
    assert unique_keys(names) == ["a/x", "a/x_1", "a/x_y", "a/x_y_1", "b.c/x", "x", "_meta__/x", "a/x_1_1"]


def test_a_name_that_is_not_text(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    try:
        with open(os.fsencode(folder) + b"/\xff.jpg", "wb") as f:
            f.write(TREE["train/cat/0.jpg"])
    except OSError:
        pytest.skip("this file system takes text alone")
    source = open_files(str(folder), label_from="auto", scratch="")
    assert source.name(0) == "?.jpg"
    assert source.sample(0).key == "?"


def test_scenes():
    source = Scenes(num_scenes=5, size=(24, 32), seed=9)
    assert len(source) == 5
    assert source.classes == CLASSES
    sample = source.sample(3)
    scene = render(9, 3, (24, 32))
    assert sample.key == "scene-9-00000003"
    assert sample.labels == scene.labels
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), scene.image)


def test_no_scenes():
    with pytest.raises(ValueError, match=r"num_scenes \(=0\) must be at least 1"):
        Scenes(num_scenes=0, size=(64, 64), seed=0)


def test_scenes_too_small():
    with pytest.raises(ValueError, match=r"size \(=\(8, 64\)\) must be at least 16 pixels"):
        Scenes(num_scenes=1, size=(8, 64), seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_it(tmp_path, kind):
    (tmp_path / "source").mkdir()
    with pytest.raises(ValueError, match=r"source \(='.*'\) holds no files"):
        files(tmp_path, kind, {"train/.hidden": b"x"})


@pytest.mark.parametrize(("kind", "word"), [(".tar", "tar"), (".tar.gz", "tar"), (".zip", "zip")])
@pytest.mark.parametrize("how", ["cut", "other", "changed"])
def test_broken_archives(tmp_path, kind, word, how):
    if how == "changed" and kind != ".tar.gz":
        pytest.skip("a change inside shows when the member is read")
    path = build(tmp_path, kind, TREE | {"train/cat/9.png": encoded(picture(1, 90, 90), "PNG")})
    with open(path, "rb") as f:
        data = f.read()
    with open(path, "wb") as f:
        f.write(
            {"cut": data[:3000], "other": b"no archive" * 100, "changed": data[:2000] + bytes(99) + data[2099:]}[how]
        )
    with pytest.raises(ValueError, match=rf"source \(='.*'\) is not a whole {word} archive: "):
        open_files(path, label_from="auto", scratch=str(tmp_path / "scratch.tar"))


def test_a_damaged_zip_member_is_refused(tmp_path):
    path = build(tmp_path, ".zip", {"a/0.png": TREE["train/cat/1.png"], "b/0.jpg": TREE["train/cat/0.jpg"]})
    with open(path, "r+b") as f:
        f.seek(200)
        f.write(bytes(30))
    source = open_files(path, label_from="auto", scratch="")
    with pytest.raises(Refused, match=r"not a decodable image: (Bad CRC|Error -3)"):
        source.sample(0)
    source.sample(1)


def test_no_such_source(tmp_path):
    with pytest.raises(ValueError, match=r"source \(='.*gone'\) does not exist"):
        open_files(str(tmp_path / "gone"), label_from="auto", scratch="")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "x.rar").touch()
    with pytest.raises(ValueError, match=r"must be a folder, a .tar, .tar.gz, .tgz, .zip archive, or synthetic:scenes"):
        open_files(str(tmp_path / "x.rar"), label_from="auto", scratch="")


@pytest.mark.parametrize("label_from", ["parent", "top"])
def test_labels_where_there_are_no_folders(tmp_path, label_from):
    with pytest.raises(ValueError, match=rf"label_from \(='{label_from}'\) must be 'none': every file lies at the top"):
        files(tmp_path, tree={"x.jpg": TREE["train/cat/0.jpg"]}, label_from=label_from)
