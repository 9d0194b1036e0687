"""Labels from tables and lists: the right class for each file, or an error that names the problem."""

import io
import tarfile

import numpy as np
import pytest
from scipy.io import savemat
from small_shards import encoded, make_samples, picture, write_shards

from jepa_kit.data.sources.base import Refused
from jepa_kit.data.sources.labels import GROUND_TRUTH
from jepa_kit.data.sources.opening import SourceOptions, open_source

IMAGES = {f"img/{name}.jpg": encoded(picture(k)) for k, name in enumerate("cab")}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "img").mkdir()
    for name, data in IMAGES.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def table(root, text, name="images.csv", **options):
    (root / name).write_text(text)
    return open_source(str(root / name), SourceOptions(**options), seed=0, scratch=str(root))


def listed(root, text, name="labels.csv", **options):
    """Return a source: the folder of images with a list of labels."""
    (root / name).write_text(text)
    options = SourceOptions(labels=str(root / name), **options)
    return open_source(str(root / "img"), options, seed=0, scratch=str(root))


def rows(source):
    return [(source.name(i), source.sample(i).labels) for i in range(len(source))]


@pytest.mark.parametrize("name", ["images.csv", "images.tsv"])
def test_a_table_of_images(root, name):
    text = "path,label,notes\nimg/c.jpg,cat,\nimg/a.jpg,ant,x\n\nimg/b.jpg,cat,\n"
    source = table(root, text.replace(",", "\t") if name.endswith("tsv") else text, name)
    assert source.classes == {"class": ("ant", "cat")}
    assert rows(source) == [("img/c.jpg", {"class": 1}), ("img/a.jpg", {"class": 0}), ("img/b.jpg", {"class": 1})]
    assert [source.sample(i).image for i in range(3)] == [IMAGES[source.name(i)] for i in range(3)]
    assert [source.sample(i).key for i in range(3)] == ["img/c", "img/a", "img/b"]


def test_numbers_stay_those_numbers(root):
    source = table(root, "path,label\nimg/c.jpg,10\nimg/a.jpg,2\n")
    assert source.classes == {"class": tuple(map(str, range(11)))}
    assert [labels for _, labels in rows(source)] == [{"class": 10}, {"class": 2}]


def test_numbers_as_pandas_writes_them_beside_empty_cells(root):
    source = table(root, "path,label\nimg/c.jpg,10.0\nimg/a.jpg,2.0\nimg/b.jpg,\n")
    assert source.classes == {"class": tuple(map(str, range(11)))}
    assert [source.sample(i).labels for i in (0, 1)] == [{"class": 10}, {"class": 2}]
    assert source.notes == []


def test_numbers_below_0_are_classes_in_their_order(root):
    source = table(root, "path,label\nimg/c.jpg,10\nimg/a.jpg,-1\nimg/b.jpg,2\n")
    assert source.classes == {"class": ("-1", "2", "10")}
    assert [labels for _, labels in rows(source)] == [{"class": 2}, {"class": 0}, {"class": 1}]
    assert source.notes == [
        "label 'class' has numbers below 0: its classes are numbered in their order, -1 as 0; if -1 means no "
        "label, leave those cells empty"
    ]


@pytest.mark.parametrize("texts", [("10.5", "2.5", "3"), ("10", "2", "x")])
def test_texts_that_are_not_all_integers_are_names(root, texts):
    lines = [f"img/{name}.jpg,{text}\n" for name, text in zip("abc", texts, strict=True)]
    source = table(root, "path,label\n" + "".join(lines))
    assert source.classes == {"class": tuple(sorted(texts))}
    assert [source.classes["class"][labels["class"]] for _, labels in rows(source)] == list(texts)


def test_a_table_notices_that_an_image_changed(root):
    text = "path,label\nimg/a.jpg,x\nimg/gone.jpg,y\n"
    first = table(root, text).fingerprint()
    assert table(root, text).fingerprint() == first
    (root / "img/a.jpg").write_bytes(IMAGES["img/b.jpg"] + b"more")
    assert table(root, text).fingerprint() != first


@pytest.mark.parametrize("option", ["labels", "classes-from"])
def test_a_list_that_is_not_utf_8(root, option):
    (root / "latin.txt").write_bytes("a.jpg caf\xe9\n".encode("latin-1"))
    message = rf"--{option} \(='{root}/latin.txt'\) must be a text in UTF-8, but 'utf-8' codec .* save it as UTF-8"
    (root / "good.txt").write_text("a.jpg x\n")
    lists = {"labels": str(root / "good.txt"), option.replace("-", "_"): str(root / "latin.txt")}
    with pytest.raises(ValueError, match=message):
        open_source(str(root / "img"), SourceOptions(**lists), seed=0, scratch="")


def test_several_labels_and_other_columns(root):
    text = "file,size,kind\nimg/a.jpg,3,x\nimg/b.jpg,1,y\n"
    source = table(root, text, path_column="file", label_column=("kind", "size"))
    assert source.classes == {"kind": ("x", "y"), "size": ("0", "1", "2", "3")}
    assert rows(source) == [("img/a.jpg", {"kind": 0, "size": 3}), ("img/b.jpg", {"kind": 1, "size": 1})]


def test_a_table_without_labels(root):
    source = table(root, "path\nimg/a.jpg\n")
    assert source.classes == {}
    assert rows(source) == [("img/a.jpg", {})]


def test_rows_that_cannot_be_used_are_refused(root):
    source = table(root, "path,label\nimg/a.jpg,\nimg/gone.jpg,x\nimg/b.jpg,x\n")
    with pytest.raises(Refused, match=r"no label in images.csv"):
        source.sample(0)
    with pytest.raises(Refused, match="cannot be read: No such file"):
        source.sample(1)
    assert source.sample(2).labels == {"class": 0}


def test_a_path_from_the_root_is_found_and_has_a_safe_key(root):
    (root / "sub").mkdir()
    source = table(root / "sub", f"path\n{root}/img/a.jpg\n../img/b.jpg\n")
    assert source.sample(0).key == f"{root}/img/a".lstrip("/")
    assert source.sample(1).key == "img/b"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, r"table \(='.*images.csv'\) must have a line of column names and at least one row"),
        ("path\n", {}, "must have a line of column names and at least one row"),
        ("path,label\nx\n", {}, "must have 2 cells in row 2, but it has 1"),
        ("path,path\nx,y\n", {}, "must name each column once, but its first line is: path, path"),
        ("paths,label\nx,y\n", {}, r"has no column 'path'; did you mean 'paths'\? Its columns are: paths, label"),
        ("path,label\nx,y\n", {"label_column": ("labels",)}, r"has no column 'labels'; did you mean 'label'\?"),
        ("path,label\nx,65536\n", {}, r"label 'class' has class number \(=65536\), which must be below 65536"),
        ("path\nx\n", {"classes_from": "x"}, r"--classes-from \(=x\) numbers classes, but the source is unlabelled"),
    ],
)
def test_mistakes_of_a_table(root, text, options, message):
    with pytest.raises(ValueError, match=message):
        table(root, text, **options)


def test_a_table_that_is_no_text(root):
    (root / "images.csv").write_bytes(b"\xff\xfe\x00path")
    with pytest.raises(ValueError, match=r"table \(='.*'\) is not readable: 'utf-8' codec"):
        open_source(str(root / "images.csv"), SourceOptions(), seed=0, scratch="")


LISTS = {
    "by name": ("path,label\nb.jpg,y\na.jpg,x\nc.jpg,y\n", "labels.csv"),
    "by path": ("path,label\nimg/b.jpg,y\nimg/a.jpg,x\nimg/c.jpg,y\n", "labels.csv"),
    "without extension": ("path,label\nb,y\na,x\nc,y\n", "labels.csv"),
    "pairs": ("b.jpg y\na.jpg x\nc.jpg y\n", "labels.txt"),
    "in order": ("x\ny\ny\n", "labels.txt"),
    "Kaggle's": ("ImageId,PredictionString\nb,y 1 2 3 4 y 5 6 7 8\na,x 1 2 3 4\nc,y 0 0 0 0\n", "solution.csv"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_labels(root, kind):
    source = listed(root, *LISTS[kind])
    assert source.classes == {"class": ("x", "y")}
    assert rows(source) == [("a.jpg", {"class": 0}), ("b.jpg", {"class": 1}), ("c.jpg", {"class": 1})]
    assert source.notes == []


def test_a_list_that_has_other_files_too(root):
    source = listed(root, "a.jpg x\nb.jpg y\nz.jpg y\n", "labels.txt")
    assert source.notes == [f"{root}/labels.txt names 1 files that are not in the source"]
    with pytest.raises(Refused, match=r"no label in labels.txt"):
        source.sample(2)


@pytest.mark.parametrize(
    ("text", "name", "options", "message"),
    [
        (
            "1\n2\n2\n",
            "l.txt",
            {},
            "must not be only numbers: those of ILSVRC2012_validation_ground_truth.txt differ",
        ),
        ("x\ny\n", "l.txt", {}, "has 2 lines, but must have one for each of 3 files"),
        ("a b c\n", "l.txt", {}, "must have a file's name and its class, or a class, on each line"),
        ("", "l.txt", {}, "must have a file's name and its class, or a class, on each line"),
        ("z.jpg x\n", "l.txt", {}, "names none of the 3 files; its first is 'z.jpg'"),
        ("a.jpg x\na.jpg y\n", "l.txt", {}, "must name each file once, but names 'a.jpg' twice"),
        ("path,kind\na.jpg,x\n", "l.csv", {}, "must have a column of labels: name it with --label-column"),
        ("x", "l.txt", {"label_from": "top"}, r"--labels \(=.*l.txt\) and --label-from \(=top\) exclude each other"),
        ("x", "l.txt", {"label_column": ("k",)}, r"--label-column \(=k\) is only for tables and hf:NAME"),
    ],
)
def test_mistakes_of_a_list(root, text, name, options, message):
    with pytest.raises(ValueError, match=message):
        listed(root, text, name, **options)


def test_a_list_that_is_not_there(root):
    with pytest.raises(ValueError, match=r"--labels \(='gone.txt'\) does not exist, or is not a file"):
        open_source(str(root / "img"), SourceOptions(labels="gone.txt"), seed=0, scratch="")


def development_kit(path, leave_out=()):
    """Write a development kit like ImageNet's, with four classes whose numbers are not in the order of their names."""
    wordnet = ["n04", "n02", "n03", "n01", "n00"]
    synsets = np.array(
        [(k + 1, name, f"word {k}") for k, name in enumerate(wordnet)],
        dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)],
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    truth = [4, 1, 2]
    files = {"data/meta.mat": meta.getvalue(), f"data/{GROUND_TRUTH}": "".join(f"{k}\n" for k in truth).encode()}
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
            info.size = len(data)
            if name not in leave_out:
                tar.addfile(info, io.BytesIO(data))
    return [wordnet[k - 1] for k in truth]


def validation_tar(path, count=3):
    with tarfile.open(path, "w") as tar:
        for k in reversed(range(1, count + 1)):
            info = tarfile.TarInfo(f"ILSVRC2012_val_{k:08d}.JPEG")
            data = encoded(picture(k))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_imagenets_validation_tar_with_its_development_kit(tmp_path):
    names = development_kit(tmp_path / "kit.tar.gz")
    validation_tar(tmp_path / "val.tar")
    options = SourceOptions(labels=str(tmp_path / "kit.tar.gz"))
    source = open_source(str(tmp_path / "val.tar"), options, seed=0, scratch="")
    assert [source.name(i)[-6] for i in range(3)] == ["1", "2", "3"]
    assert (
        [source.classes["class"][source.sample(i).labels["class"]] for i in range(3)] == names == ["n01", "n04", "n02"]
    )


@pytest.mark.parametrize("leave_out", ["data/meta.mat", f"data/{GROUND_TRUTH}"])
def test_a_development_kit_that_is_none(tmp_path, leave_out):
    development_kit(tmp_path / "kit.tar.gz", [leave_out])
    validation_tar(tmp_path / "val.tar")
    options = SourceOptions(labels=str(tmp_path / "kit.tar.gz"))
    with pytest.raises(ValueError, match=rf"must be ImageNet's development kit, with {GROUND_TRUTH} and meta.mat"):
        open_source(str(tmp_path / "val.tar"), options, seed=0, scratch="")


@pytest.mark.parametrize("kind", ["shards", "text"])
def test_class_numbers_of_other_shards(root, samples, kind):
    """A test set without one of the classes has the class numbers of the training set."""
    if kind == "shards":
        given = write_shards(root / "train", samples, 10, {"class": ("w", "x", "y", "z")})
    else:
        given = root / "classes.txt"
        given.write_text("w\nx\ny\nz\n")
    source = listed(root, *LISTS["pairs"], classes_from=str(given))
    assert source.classes == {"class": ("w", "x", "y", "z")}
    assert rows(source) == [("a.jpg", {"class": 1}), ("b.jpg", {"class": 2}), ("c.jpg", {"class": 2})]
    assert source.fingerprint() != listed(root, *LISTS["pairs"]).fingerprint()
    in_table = table(root, "path,label\nimg/a.jpg,y\n", classes_from=str(given))
    assert rows(in_table) == [("img/a.jpg", {"class": 2})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x\nyy\n", r"class \(='y'\) of label 'class' is not among the classes of --classes-from; did you mean 'yy'\?"),
        ("x\nx\n", r"--classes-from \(=.*\) must name each class once"),
        (None, r"--classes-from \(=.*\) must be a folder of shards with an index.json, or a list of classes"),
        (("kind",), r"label \(='class'\) is not among the labels of --classes-from: kind"),
    ],
)
def test_classes_that_do_not_fit(root, content, message):
    given = root / "classes"
    if isinstance(content, tuple):
        write_shards(given, make_samples(2, labels=content), 2, dict.fromkeys(content, tuple("abcd")))
    elif content is not None:
        given.write_text(content)
    with pytest.raises(ValueError, match=message):
        listed(root, *LISTS["pairs"], classes_from=str(given))
