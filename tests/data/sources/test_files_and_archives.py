"""Sources list their samples in one order, keep bytes, and give the reason of a refusal."""

import io
import multiprocessing
import os
import pickle
import tarfile
import time
import zipfile

import numpy as np
import pytest
from PIL import Image
from small_shards import encoded, picture, write_shards

from jepa_kit.data.sources.base import Refused
from jepa_kit.data.sources.keys import safe_keys, unique_keys
from jepa_kit.data.sources.opening import SourceOptions, open_source

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
    """Return a source of the tree, as a folder or an archive."""
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
    return opened(build(tmp_path, kind, tree), tmp_path, label_from=label_from)


def opened(path, tmp_path, **options):
    return open_source(path, SourceOptions(**options), seed=0, scratch=str(tmp_path))


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
def test_labels_by_folder(tmp_path, label_from, classes, labels):
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
    with pytest.raises(Refused, match="is not in a class folder"):
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


def test_paths_of_windows(tmp_path):
    """Backslashes in a zip (of old .NET), a table and a list become slashes, except in the name of an existing file."""
    images = {r"cat\1.png": TREE["train/cat/1.png"], r"dog\sub\2.jpg": TREE["train/cat/0.jpg"]}
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("cat\\", b"")
        for name, data in images.items():
            archive.writestr(name, data)
    assert b"cat\\1.png" in (tmp_path / "w.zip").read_bytes()
    packed = opened(str(tmp_path / "w.zip"), tmp_path)
    assert (packed.names, packed.classes) == (["cat/1.png", "dog/sub/2.jpg"], {"class": ("cat", "sub")})
    assert packed.sample(0).image == images[r"cat\1.png"]
    assert packed.sample(0).labels == {"class": 0}
    for name, data in images.items():
        place = tmp_path / name.replace("\\", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    (tmp_path / r"odd\3.png").write_bytes(TREE["train/cat/1.png"])
    rows = [r"cat\1.png,a", r"dog\sub\2.jpg,b", r"odd\3.png,a"]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows]))
    table = opened(str(tmp_path / "t.csv"), tmp_path)
    assert table.names == ["cat/1.png", "dog/sub/2.jpg", r"odd\3.png"]
    assert [table.sample(i).labels["class"] for i in range(3)] == [0, 1, 0]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows[:2]]))
    labelled = opened(str(tmp_path / "w.zip"), tmp_path, labels=str(tmp_path / "list.csv"))
    assert [labelled.sample(i).labels["class"] for i in range(2)] == [0, 1]


@pytest.mark.parametrize("kind", [".tar", ".tar.gz"])
def test_a_tar_with_backslashes(tmp_path, kind):
    """Backslashes in a tar separate folders, unless it has slashes."""
    names = ["cat\\0.jpg", "cat\\.hidden.jpg", "dog\\1.jpg"]
    for added, expected in ((), ["cat/0.jpg", "dog/1.jpg"]), (("cat/2.jpg",), ["cat/2.jpg", *sorted(names)]):
        tree = {name: encoded(picture(0)) for name in (*names, *added)}
        source = files(tmp_path, kind, tree, label_from="none")
        assert sorted(source.names) == expected


def test_keys_are_unique_and_webdatasets():
    names = ["a/x.jpg", "a/x.png", "a/x.y.jpg", "a/x_y.jpg", "b.c/x.jpg", "x", "__meta__/x.jpg", "a/x_1.jpg"]
    assert unique_keys(names) == ["a/x", "a/x_1", "a/x_y", "a/x_y_1", "b.c/x", "x", "_meta__/x", "a/x_1_1"]


def test_keys_that_repeat_often_take_no_longer():
    """Shards that each count from 0 are common; trying every number again would take 10 s."""
    begin = time.process_time()
    keys = safe_keys(["a", "b"] * 10_000)
    assert time.process_time() - begin < 1
    assert len(set(keys)) == 20_000
    assert keys[:6] == ["a", "b", "a_1", "b_1", "a_2", "b_2"]


def test_a_name_that_is_not_text(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    try:
        with open(os.fsencode(folder) + b"/\xff.jpg", "wb") as f:
            f.write(TREE["train/cat/0.jpg"])
    except OSError:
        pytest.skip("this file system takes text alone")
    source = opened(str(folder), tmp_path)
    assert source.name(0) == "?.jpg"
    assert source.sample(0).key == "?"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_it(tmp_path, kind):
    (tmp_path / "source").mkdir()
    with pytest.raises(ValueError, match=r"source \(='.*'\) contains no files"):
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
    with pytest.raises(ValueError, match=rf"source \(='.*'\) is not a complete {word} archive: "):
        opened(path, tmp_path)


def test_a_damaged_zip_member_is_refused(tmp_path):
    path = build(tmp_path, ".zip", {"a/0.png": TREE["train/cat/1.png"], "b/0.jpg": TREE["train/cat/0.jpg"]})
    with open(path, "r+b") as f:
        f.seek(200)
        f.write(bytes(30))
    source = opened(path, tmp_path)
    with pytest.raises(Refused, match=r"cannot be read: (Bad CRC|Error -3)"):
        source.sample(0)
    source.sample(1)


def test_no_such_source(tmp_path):
    with pytest.raises(ValueError, match=r"source \(='.*gone'\) does not exist"):
        opened(str(tmp_path / "gone"), tmp_path)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "x.rar").touch()
    with pytest.raises(
        ValueError, match=r"must be a folder, a .tar, .tar.gz, .tgz, .zip archive, a .csv, .tsv table, w"
    ):
        opened(str(tmp_path / "x.rar"), tmp_path)


@pytest.mark.parametrize("label_from", ["parent", "top"])
def test_labels_by_folder_without_folders(tmp_path, label_from):
    with pytest.raises(ValueError, match=rf"label_from \(='{label_from}'\) must be 'none': no file of the source"):
        files(tmp_path, tree={"x.jpg": TREE["train/cat/0.jpg"]}, label_from=label_from)


def test_a_compressed_tar_is_unpacked_once(tmp_path):
    """A run that resumes uses a complete decompressed tar, and no incomplete one."""
    path = build(tmp_path, ".tar.gz")
    opened(path, tmp_path)
    (unpacked,) = tmp_path.glob(".unpacked.*")
    written = unpacked.stat().st_mtime_ns
    opened(path, tmp_path)
    assert unpacked.stat().st_mtime_ns == written
    with open(path, "r+b") as f:
        f.truncate(os.path.getsize(path) - 9)
    with pytest.raises(ValueError, match="is not a complete tar archive"):
        opened(path, tmp_path)
    assert [p.suffix for p in tmp_path.glob(".unpacked.*")] == [".tar"]


def test_a_broken_link_is_refused_by_name(tmp_path):
    path = build(tmp_path, "")
    os.symlink(tmp_path / "gone", os.path.join(path, "train/dog/9.jpg"))
    source = opened(path, tmp_path)
    assert source.name(3) == "train/dog/9.jpg"
    with pytest.raises(Refused, match="cannot be read: No such file or directory"):
        source.sample(3)


@pytest.mark.parametrize("change", ["a name", "a size", "nothing", "a label"])
def test_the_fingerprint_is_that_of_names_sizes_and_labels(tmp_path, change):
    one = files(tmp_path).fingerprint()
    if change == "a name":
        os.rename(tmp_path / "source/train/dog/0.jpg", tmp_path / "source/train/dog/1.jpg")
    if change == "a size":
        (tmp_path / "source/train/dog/0.jpg").write_bytes(b"x")
    label_from = "none" if change == "a label" else "auto"
    assert (opened(str(tmp_path / "source"), tmp_path, label_from=label_from).fingerprint() == one) == (
        change == "nothing"
    )


def tar_of(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


CLASSES = {
    "n02.tar": {"n02_7.JPEG": encoded(picture(1)), "n02_3.JPEG": encoded(picture(2))},
    "n01.tar": {f"n01_{'long' * 40}.JPEG": encoded(picture(3))},
}


def test_a_tar_of_tars_is_read_in_place(tmp_path):
    """An archive like ImageNet-1k's train archive: a tar for each class."""
    path = tmp_path / "train.tar"
    path.write_bytes(tar_of({name: tar_of(members) for name, members in CLASSES.items()}))
    source = opened(str(path), tmp_path)
    assert source.classes == {"class": ("n01", "n02")}
    found = {source.name(i): source.sample(i) for i in range(len(source))}
    assert list(found) == sorted(found)
    for outer, members in CLASSES.items():
        for name, data in members.items():
            sample = found[f"{outer[:3]}/{name}"]
            assert (sample.image, sample.labels) == (data, {"class": int(outer[2]) - 1})
    assert [p.name for p in tmp_path.iterdir()] == ["train.tar"]


@pytest.mark.parametrize("how", ["cut inside", "cut between", "other"])
def test_a_broken_tar_in_a_tar_is_named(tmp_path, how):
    members = {name: tar_of(inner) for name, inner in CLASSES.items()}
    size = len(CLASSES["n02.tar"]["n02_7.JPEG"])
    cut = {"cut inside": 700, "cut between": 512 + -(-size // 512) * 512, "other": 2000}[how]
    members["n02.tar"] = b"no tar" * 400 if how == "other" else members["n02.tar"][:cut]
    path = tmp_path / "train.tar"
    path.write_bytes(tar_of(members))
    with pytest.raises(ValueError, match=r"n02.tar in source \(='.*train.tar'\) is not a complete tar archive: "):
        opened(str(path), tmp_path)


@pytest.mark.parametrize("what", ["folder of tars", "shard", "made shards"])
def test_possible_shards_give_an_error_that_names_the_prefix(tmp_path, what, samples):
    data = tar_of({"0.jpg": encoded(picture(0)), "0.cls": b"1"})
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    if what == "folder of tars":
        with pytest.raises(ValueError, match=r"contains only tar files: if they are WebDataset shards, give wds:/"):
            opened(str(tmp_path), tmp_path)
    elif what == "shard":
        with pytest.raises(ValueError, match=r"contains .cls files, as WebDataset shards do: give wds:/.*x.tar"):
            opened(str(path), tmp_path)
    else:
        folder = write_shards(tmp_path / "s", samples, 10, {"class": tuple("abcd")})
        with pytest.raises(ValueError, match=r"contains shards: give wds:.* to copy them into new ones"):
            opened(str(folder), tmp_path)


def test_keys_are_safe_to_unpack():
    assert safe_keys(["../../a", "/abs/b", "./c", "a", ".hidden/x"]) == ["a", "abs/b", "c", "a_1", ".hidden/x"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("f", {"num_scenes": 5}, r"--num-scenes \(=5\) is only for synthetic:scenes"),
        ("f", {"masks": False}, r"--masks \(=False\) is only for synthetic:scenes"),
        ("f", {"label_column": ("a", "b")}, r"--label-column \(=a,b\) is only for tables and hf:NAME"),
        ("f", {"path_column": "p"}, r"--path-column \(=p\) is only for tables"),
        ("f", {"image_column": "p"}, r"--image-column \(=p\) is only for hf:NAME"),
        ("wds:f", {"label_from": "top"}, r"--label-from \(=top\) is only for image files"),
        ("wds:f", {"classes_from": "x"}, r"--classes-from \(=x\) is only for image files and tables"),
        ("synthetic:scenes", {"shorter_side": 9}, r"--shorter-side \(=9\) is only for images that exist; --image-size"),
        ("synthetic:scenes", {"quality": 9}, r"--quality \(=9\) is only for images that exist; scenes are lossless"),
        ("synthetic:scenes", {"labels": "x"}, r"--labels \(=x\) is only for image files"),
        ("hf:x", {"labels": "x"}, r"--labels \(=x\) is only for image files"),
    ],
)
def test_options_that_would_do_nothing(tmp_path, name, options, message):
    build(tmp_path, "")
    name = str(tmp_path / "source") if name == "f" else name
    with pytest.raises(ValueError, match=message):
        opened(name, tmp_path, **options)
