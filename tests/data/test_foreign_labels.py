"""Which numbers of .json members are labels: not img2dataset's sizes; numbers out of range are reported."""

import io
import json
import tarfile

import pytest
from small_shards import encoded, picture

from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.sources.opening import SourceOptions, open_source

IMAGE = encoded(picture(0), "PNG")


def shard(path, contents):
    """One sample for each .json: a mapping, or bytes."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for k, content in enumerate(contents):
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            for extension, data in (("png", IMAGE), ("json", text)):
                info = tarfile.TarInfo(f"{k:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path.parent


def img2dataset(k):
    """The metadata that img2dataset 1.45 writes beside an image."""
    return {
        "caption": f"photo {k}", "url": f"https://example.org/{k}.jpg", "key": f"{k:09d}", "status": "success",
        "error_message": None, "width": 256, "height": 256 - k, "original_width": 70_000, "original_height": 480,
        "exif": "{}", "sha256": "0" * 64,
    }  # fmt: skip


def index(folder):
    return json.loads((folder / "index.json").read_text())


def test_sizes_are_not_labels(tmp_path, caplog):
    folder = shard(tmp_path / "s/a.tar", [img2dataset(k) | {"class": k % 3} for k in range(5)])
    dataset = ShardDataset(folder)
    assert dataset.classes == {"class": ("0", "1", "2")}
    assert dataset.labels("class").tolist() == [0, 1, 2, 0, 1]
    note = "height, original_height, original_width, width: image sizes, not used as labels"
    assert index(folder)["notes"] == [note]
    assert f"{folder}: {note}" in caplog.text
    assert open_source(f"wds:{folder}", SourceOptions(), seed=0, scratch="").notes == [note]


def test_numbers_out_of_range_are_reported(tmp_path, caplog):
    """An identifier is not a label; if one sample has a label out of range, the others keep theirs."""
    contents = [{"uid": 10**12 + k, "shape": 3, "count": k} for k in range(4)]
    contents += [{"uid": 5, "shape": 65_536, "count": -1}, {"shape": -7}]
    folder = shard(tmp_path / "s/a.tar", contents)
    dataset = ShardDataset(folder)
    assert {name: len(classes) for name, classes in dataset.classes.items()} == {"count": 4, "shape": 4}
    assert dataset.labelled("shape").tolist() == dataset.labelled("count").tolist() == [0, 1, 2, 3]
    note = "uid: not used as a label, since 4 of 5 samples have a number outside 0 to 65535"
    assert index(folder)["notes"] == [note]
    assert index(folder)["refused"] == [
        {"name": "label 'shape'", "reason": "2 samples have a number outside 0 to 65535: used without that label"}
    ]
    assert note in caplog.text
    assert "label 'shape': 2 samples have a number outside" in caplog.text


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 9000], ids=["lists", "maps", "digits"])
def test_absurd_json_loses_only_its_label(tmp_path, text):
    folder = shard(tmp_path / "s/a.tar", [{"class": 1}, text])
    dataset = ShardDataset(folder)
    assert [dataset.labels_of(i) for i in range(2)] == [{"class": 1}, {}]
    (entry,) = index(folder)["refused"]
    assert entry["name"] == "a.tar: 000000001.json"
    assert entry["reason"].endswith("is no JSON: used without that label")
