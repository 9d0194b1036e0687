"""Tars of GNU tar and of Python: sparse files, links, global headers, compression, devices."""

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image
from small_shards import encoded, picture

from jepa_kit.data.images import decode
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.tars import compression, is_filler
from jepa_kit.data.sources.base import Refused
from jepa_kit.data.sources.opening import SourceOptions, open_source


def add(tar, name, data=b"", **header):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in header.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def images(count):
    return [encoded(picture(k), "PNG") for k in range(count)]


def refused(path):
    """Return what the index of a folder of shards refuses."""
    return json.loads((path / "index.json").read_text())["refused"]


def read(path):
    dataset = ShardDataset(path)
    return {dataset.key(i): dataset.image_bytes(i) for i in range(len(dataset))}


def made(path):
    """Return what make_shards reads from an archive: name -> image bytes, or the reason of a refusal."""
    source = open_source(str(path), SourceOptions(), seed=0, scratch=str(path.parent))
    found = {}
    for i in range(len(source)):
        try:
            found[source.name(i)] = source.sample(i).image
        except Refused as error:  # noqa: PERF203 (each file alone)
            found[source.name(i)] = str(error)
    return found


def sparse_tar(folder, kind):
    """Return an archive by GNU tar of a BMP with a hole of 200 kB, between two plain files; None without tar."""
    folder.mkdir()
    image = np.zeros((300, 300, 3), dtype=np.uint8)
    image[:20], image[-20:] = 99, 200
    data = encoded(Image.fromarray(image), "BMP")
    (folder / "b.bmp").write_bytes(data)
    with open(folder / "b.bmp", "wb") as stream:  # holes where there are zeros
        for begin in range(0, len(data), 4096):
            block = data[begin : begin + 4096]
            if block.count(0) < len(block):
                stream.seek(begin)
                stream.write(block)
        stream.truncate(len(data))
    first, last = images(2)
    (folder / "a.png").write_bytes(first)
    (folder / "c.png").write_bytes(last)
    tar = folder / "photos.tar"
    command = ["tar", "-S", *kind, "-C", folder, "-cf", tar, "a.png", "b.bmp", "c.png"]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        return None
    with tarfile.open(tar) as packed:
        if not packed.getmember("b.bmp").issparse():
            return None
    return tar, data


KINDS = {
    "gnu": ["--format=gnu"],
    **{f"pax {v}": ["--format=pax", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0")},
}


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_files(tmp_path, kind):
    """make_shards reads their pixels; in a foreign shard they are refused, and later members are read."""
    found = sparse_tar(tmp_path / "in", KINDS[kind])
    if found is None:
        pytest.skip("this tar, or this file system, makes no sparse members")
    tar, data = found
    first, last = images(2)
    packed = made(tar)
    assert (packed["a.png"], packed["c.png"]) == (first, last)
    np.testing.assert_array_equal(np.asarray(decode(packed["b.bmp"])), np.asarray(decode(data)))
    (tmp_path / "shards").mkdir()
    shutil.move(tar, tmp_path / "shards/a.tar")
    assert read(tmp_path / "shards") == {"a": first, "c": last}
    (entry,) = refused(tmp_path / "shards")
    assert entry["name"] == "a.tar: b.bmp"
    assert entry["reason"].startswith("a sparse file (tar -S)")


@pytest.fixture
def linked(tmp_path):
    """Samples a and b, then links to them of each kind, and two broken links."""
    (tmp_path / "shards").mkdir()
    first, second = images(2)
    with tarfile.open(tmp_path / "shards/x.tar", "w") as tar:
        add(tar, "d/early.png", type=tarfile.SYMTYPE, linkname="a.png")
        add(tar, "d/a.png", first)
        add(tar, "d/a.cls", b"3")
        add(tar, "b.png", second)
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="d/a.png")
        add(tar, "hard.cls", type=tarfile.LNKTYPE, linkname="d/a.cls")
        add(tar, "d/soft.png", type=tarfile.SYMTYPE, linkname="../b.png")
        add(tar, "twice.png", type=tarfile.SYMTYPE, linkname="./hard.png")
        add(tar, "lost.png", type=tarfile.SYMTYPE, linkname="/data/gone.png")
        add(tar, "loop.png", type=tarfile.SYMTYPE, linkname="loop.png")
        add(tar, "pipe.png", type=tarfile.FIFOTYPE)
        add(tar, "d", type=tarfile.DIRTYPE)
    return tmp_path / "shards"


def test_links_in_shards(linked):
    first, second = images(2)
    whole = {"d/a": first, "b": second, "hard": first, "d/soft": second, "d/early": first, "twice": first}
    assert read(linked) == whole
    assert read(str(linked / "x.tar")) == whole
    dataset = ShardDataset(linked)
    assert {dataset.key(i): dataset.labels_of(i) for i in range(6) if dataset.labels_of(i)} == {
        "d/a": {"class": 3},
        "hard": {"class": 3},
    }
    assert {entry["name"].removeprefix("x.tar: "): entry["reason"] for entry in refused(linked)} == {
        "lost.png": "a link to '/data/gone.png', which is no file of the shard",
        "loop.png": "a link to 'loop.png', which is no file of the shard",
        "pipe.png": "a device, a pipe or a member of unknown type, not a file",
    }


def test_a_header_of_another_sample_is_accepted_only_for_links(linked):
    """The bytes of b are replaced by those of a sample that b is no link to."""
    read(linked)
    index = json.loads((linked / "index.json").read_text())
    assert index["links"] == {
        "hard": ["d/a.png"], "d/soft": ["b.png"], "d/early": ["d/a.png"], "twice": ["d/a.png"],
    }  # fmt: skip
    index["links"]["hard"] = ["c.png"]
    (linked / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"its header is that of 'd/a.png', not of 'hard'"):
        read(linked)


def test_devices_and_links_in_archives(linked):
    first = images(1)[0]
    with tarfile.open(linked / "z.tar", "w") as tar:
        add(tar, "a.png", first)
        add(tar, "b.png", type=tarfile.LNKTYPE, linkname="./a.png")
        add(tar, "c.png", type=tarfile.CHRTYPE)
        add(tar, "d.png", type=tarfile.SYMTYPE, linkname="none.png")
    assert made(linked / "z.tar") == {
        "a.png": first,
        "b.png": first,
        "c.png": "cannot be read: a device, a pipe or a member of unknown type, not a file",
        "d.png": "cannot be read: a link to 'none.png', which is no file of the archive",
    }


@pytest.mark.parametrize("joined", [False, True])
def test_a_pax_header_for_the_whole_archive(tmp_path, joined):
    """`git archive` writes one; concatenated archives have another in the middle. Nothing is refused."""
    (tmp_path / "shards").mkdir()
    pictures = images(4)
    parts = []
    for k in (0, 2):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 700}) as tar:
            add(tar, f"{k}.png", pictures[k])
            add(tar, f"{k + 1}.png", pictures[k + 1])
        parts.append(out.getvalue())
    (tmp_path / "shards/a.tar").write_bytes(parts[0] + (parts[1] if joined else b""))
    (tmp_path / "b.tar").write_bytes(parts[0])
    assert read(tmp_path / "shards") == {str(k): pictures[k] for k in range(4 if joined else 2)}
    assert refused(tmp_path / "shards") == []
    assert made(tmp_path / "b.tar") == {"0.png": pictures[0], "1.png": pictures[1]}


def test_what_is_no_filler():
    header = tarfile.TarInfo("x").tobuf()
    assert is_filler(io.BytesIO(bytes(2048)), 0, 2048)
    assert not is_filler(io.BytesIO(header), 0, 512)
    assert not is_filler(io.BytesIO(bytes(512) + b"x" * 512), 0, 1024)
    assert not is_filler(io.BytesIO(bytes(512)), 0, 1024)


@pytest.fixture
def plain(tmp_path):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/a.tar", "w") as tar:
        add(tar, "BZh.png", images(1)[0])
    return tmp_path / "shards/a.tar"


def test_a_compressed_shard(plain):
    """Recognised by its content, and by its name before a download."""
    plain.write_bytes(gzip.compress(plain.read_bytes()))
    message = r"shard .*a.tar is compressed \(gzip\), but samples are read at their offsets: decompress it first with"
    for address in (plain, plain.parent):
        with pytest.raises(ValueError, match=message):
            ShardDataset(address)
    plain.rename(plain.with_suffix(".tar.gz"))
    for address in (f"{plain}.gz", plain.parent, "http://127.0.0.1:9/a.tgz", [f"{plain}.gz"]):
        with pytest.raises(ValueError, match=r"shard .* is compressed \(by its name\), but samples are read at their"):
            ShardDataset(address if isinstance(address, list) else str(address))
    folder = plain.parent / "old.tar.gz"
    os.rename(f"{plain}.gz", plain)
    folder.mkdir()
    with pytest.raises(ValueError, match=r"must be a folder of .tar shards or of images, but it contains neither"):
        ShardDataset(folder)


def test_a_pipe_decompresses(plain):
    whole = read(plain.parent)
    packed = plain.with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(f"pipe:gunzip -c {packed}") == whole == {"BZh": images(1)[0]}


def test_an_archive_is_what_its_content_is(tmp_path, plain):
    """A .tar that is gzip, a .tar.gz that is not, and another compression."""
    data = plain.read_bytes()
    for name, content in (("a.tar", gzip.compress(data)), ("b.tar.gz", data), ("c.tgz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content)
        assert made(tmp_path / name) == {"BZh.png": images(1)[0]}
    (tmp_path / "d.tar").write_bytes(b"BZh91AY" + data[:99])
    with pytest.raises(ValueError, match=r"source \(=.*d.tar'\) is compressed by bzip2: decompress it first, or use"):
        made(tmp_path / "d.tar")
    assert compression(data[:512]) is None, "the name of its first member is no magic"
