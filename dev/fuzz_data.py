"""Kinds of fuzz.py: damaged shards, their indices, archives for make_shards, and images."""

from __future__ import annotations

import functools
import io
import json
import logging
import random
import shutil
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import Harmed, damaged, temporary_folder
from PIL import Image

from jepa_kit.data.images import decode
from jepa_kit.data.making.verify import verify
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.writing import INDEX, KEYS, LABELS, OFFSETS, Sample, write_index, write_shard
from jepa_kit.data.sources.base import Refused
from jepa_kit.data.sources.opening import SourceOptions, open_source
from jepa_kit.errors import SampleError

logging.getLogger("jepa_kit.data").setLevel(logging.ERROR)  # what an index leaves out
warnings.filterwarnings("ignore", module="PIL")

Cases = Iterator[tuple[str, Callable[[], object]]]
ARRAYS = (OFFSETS, LABELS, KEYS)
FILES = (INDEX, *ARRAYS, "shard-000001.tar")
SMALL = 1 << 22
"""Pixels that a decoded image of a case may have: memory is not what is tested here."""
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "16-bit PNG", "int32 TIFF", "CMYK JPEG", "palette PNG")


folder = functools.partial(temporary_folder, "data")


def encoded(image: Image.Image, file_format: str) -> bytes:
    out = io.BytesIO()
    image.save(out, format=file_format)
    return out.getvalue()


@functools.cache
def images() -> dict[str, bytes]:
    """Return an image file of each format, about 1 kB."""
    pixels = np.random.default_rng(0).integers(0, 256, (14, 18, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    deep = (pixels[..., 0].astype(np.uint16) << 8) + 7
    odd = {
        "16-bit PNG": encoded(Image.fromarray(deep), "PNG"),
        "int32 TIFF": encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "CMYK JPEG": encoded(image.convert("CMYK"), "JPEG"),
        "palette PNG": encoded(image.quantize(16), "PNG"),
    }
    return {name: odd[name] if name in odd else encoded(image, name) for name in FORMATS}


@functools.cache
def samples() -> list[Sample]:
    """Return eight samples, alternately JPEG and PNG."""
    files = [("jpg", images()["JPEG"]), ("png", images()["PNG"])]
    return [Sample(f"d/{k}", *files[k % 2], {"class": k % 3}) for k in range(8)]


def shards(place: Path) -> Path:
    """Write a data set of jepa_kit to a new folder: two shards of four samples."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    parts = [write_shard(str(place / f"shard-{k:06d}.tar"), samples()[4 * k : 4 * k + 4]) for k in range(2)]
    shards_, rows = zip(*parts, strict=True)
    write_index(str(place), shards_, rows, classes={"class": tuple("abc")}, refused=[], made_by={})
    return place


def read_all(dataset: ShardDataset) -> dict[str, bytes]:
    """Return key -> bytes of all readable samples."""
    found = {}
    for i in range(len(dataset)):
        try:
            found[dataset.key(i)] = dataset.image_bytes(i)
        except SampleError:  # noqa: PERF203 (counted and left out in training)
            continue
    return found


def index_cases(seed: int) -> Cases:
    """Yield damaged data sets of jepa_kit: arrays have checksums, and --verify finds what a reader cannot."""
    rng = random.Random(seed)
    while True:
        name, numbered = rng.choice(FILES), rng.randrange(2**32)
        old = rng.random() < 0.3
        yield (
            f"{name}{' without checksums' if old else ''} ({numbered})",
            functools.partial(_index, name, old, numbered),
        )


def _index(name: str, old: bool, seed: int) -> None:
    rng = random.Random(seed)
    place = shards(folder() / "index")
    if old:
        index = json.loads((place / INDEX).read_text())
        del index["arrays"]
        (place / INDEX).write_text(json.dumps(index))
    whole = (place / name).read_bytes()
    what, changed = damaged(whole, rng)
    (place / name).write_bytes(changed)
    if changed == whole:
        return
    dataset = ShardDataset(place)
    dataset.labels("class") if dataset.classes == {"class": tuple("abc")} else None
    found = read_all(dataset)
    if name in ARRAYS and not old:
        raise Harmed(f"{name}: {what}")
    _, problems = verify(str(place), workers=1, show=lambda *_: None)
    if name.endswith(".tar") and not problems:
        raise Harmed(f"--verify passes {name}: {what}")
    originals = {sample.key: sample.image for sample in samples()}
    wrong = [key for key, data in found.items() if originals.get(key) not in (None, data)]
    if wrong and name != INDEX and not problems:
        raise Harmed(f"{wrong[0]} has other bytes, and --verify finds nothing: {what}")


def tar_members(rng: random.Random) -> bytes:
    """Return a tar with unusual members: links, pax headers, devices, folders, long names, JSON labels."""
    out = io.BytesIO()
    formats = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
    headers = {"comment": "x" * rng.randrange(900)} if rng.random() < 0.3 else {}
    with tarfile.open(fileobj=out, mode="w", format=rng.choice(formats), pax_headers=headers) as tar:
        for k in range(rng.randrange(1, 9)):
            kind = rng.choice(("file", "file", "file", "link", "symlink", "device", "folder", "json", "cls", "long"))
            data = b""
            info = tarfile.TarInfo(f"{'n' * (140 if kind == 'long' else 1)}{k}.png")
            if kind in ("file", "long"):
                data = rng.choice(list(images().values()))
            elif kind in ("json", "cls"):
                info.name = f"n{max(k - 1, 0)}.{kind}"
                data = rng.choice((b"3", b'{"a": 4}', b"{}", b"[" * 3000, b"-1", b'{"width": 9, "u": 99999}', b"\xff"))
            else:
                info.type = {"link": b"1", "symlink": b"2", "device": b"3", "folder": b"5"}[kind]
                info.linkname = rng.choice((f"n{k - 1}.png", f"n{k}.png", "../n0.png", "/etc/passwd", ""))
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # a name that ustar has no place for
                continue
    return out.getvalue()


def foreign_cases(seed: int) -> Cases:
    """Yield shards without an index and with unusual members, three in four damaged; all samples are read."""
    rng = random.Random(seed)
    while True:
        yield f"shard {(numbered := rng.randrange(2**32))}", functools.partial(_foreign, numbered)


def _foreign(seed: int) -> None:
    rng = random.Random(seed)
    place = folder() / "foreign"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    data = tar_members(rng)
    (place / "a.tar").write_bytes(damaged(data, rng)[1] if rng.random() < 0.75 else data)
    dataset = ShardDataset(place)
    for i in range(len(dataset)):
        dataset.labels_of(i)
        dataset.image_bytes(i)
    reread = ShardDataset(place)
    if len(reread) != len(dataset) or reread.shards != dataset.shards:
        raise Harmed("a second reading of the index found another data set")


def archive_cases(seed: int) -> Cases:
    """Yield damaged tars and zips for make_shards; all files are listed and read."""
    rng = random.Random(seed)
    while True:
        kind = rng.choice(("tar", "zip"))
        yield f"{kind} {(numbered := rng.randrange(2**32))}", functools.partial(_archive, kind, numbered)


def _archive(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    if kind == "tar":
        data = tar_members(rng)
    else:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as packed:
            for k in range(rng.randrange(1, 6)):
                packed.writestr(rng.choice((f"a/{k}.png", f"b\\{k}.png")), rng.choice(list(images().values())))
        data = out.getvalue()
    path = folder() / f"a.{kind}"
    path.write_bytes(damaged(data, rng)[1])
    source = open_source(str(path), SourceOptions(), seed=0, scratch=str(folder()))
    originals = set(images().values())
    for i in range(len(source)):
        try:
            made = source.sample(i)
        except Refused:
            continue
        if kind == "zip" and made.extension == "jpg" and made.image not in originals:
            raise Harmed(f"a file of a zip, which carries its CRC-32, has other bytes: {source.name(i)}")


def image_cases(seed: int) -> Cases:
    """Yield damaged image files, which must be decoded to RGB or rejected; chunks of a PNG have a CRC-32."""
    rng = random.Random(seed)
    while True:
        kind = rng.choice(FORMATS)
        yield f"{kind} {(numbered := rng.randrange(2**32))}", functools.partial(_image, kind, numbered)


def _image(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    whole = images()[kind]
    what, changed = damaged(whole, rng)
    found = decode(changed, SMALL)
    if found.mode != "RGB":
        raise Harmed(f"the mode is {found.mode}")
    if kind.endswith("PNG") and not np.array_equal(np.asarray(found), np.asarray(decode(whole))):
        raise Harmed(f"a PNG shows other pixels: {what}")


KINDS: dict[str, Callable[[int], Cases]] = {
    "data.index": index_cases,
    "data.foreign": foreign_cases,
    "data.archive": archive_cases,
    "data.image": image_cases,
}


def cases(seed: int) -> Cases:
    """Yield cases of all kinds in turn."""
    running: list[Any] = [kind(seed) for kind in KINDS.values()]
    while True:
        for one in running:
            yield next(one)
