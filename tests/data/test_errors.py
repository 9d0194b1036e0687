"""Damaged data: usable samples are used once, the others are skipped, counted and named."""

import io
import shutil
import tarfile
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from bad_server import serving
from PIL import Image
from small_shards import encoded, make_samples, picture, write_shards
from test_exactness import records

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import TrainLoader, eval_batches
from jepa_kit.data.remote.fetch import Access
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.writing import Sample
from jepa_kit.data.transforms import train_pipeline
from jepa_kit.data.views import ViewMaker
from jepa_kit.engine.skipped_samples import Allowance
from jepa_kit.maskers.multiblock import MultiBlock

CLASSES = {"class": tuple("abcd")}
COUNT, PER_SHARD = 24, 6


@pytest.fixture
def whole(tmp_path):
    """24 samples in 4 shards, all good."""
    return write_shards(tmp_path / "whole", make_samples(COUNT), PER_SHARD, CLASSES)


@pytest.fixture
def broken(whole, tmp_path):
    """A copy of them, for the test to damage."""
    return shutil.copytree(whole, tmp_path / "broken")


def a_loader(dataset, **options):
    defaults = {
        "views": [ViewMaker(pipeline=train_pipeline(image_size=(12, 12)), masker=MultiBlock(grid=(6, 6)))],
        "batch_size": 12,
        "seed": 2,
        "shuffle_window": 12,
    }
    return TrainLoader(dataset=dataset, **(defaults | options))


def epoch(dataset, number=0, **options):
    """(records, skipped) of an epoch; checks that every sample is in one of them, once."""
    loader = a_loader(dataset, **options)
    batches = [batch for _, batch in islice(loader.batches(number * loader.steps_per_epoch), loader.steps_per_epoch)]
    skipped = [s for batch in batches for s in batch.skipped]
    found = [r for batch in batches for r in records(batch)]
    for batch in batches:
        assert len(batch) == len(batch.samples) == len(set(batch.masks.context.image.tolist()))
    counts = Counter([r[0] for r in found] + [s.sample for s in skipped])
    used = loader.steps_per_epoch * loader.batch_size
    assert set(counts.values()) == {1}
    assert len(counts) == used
    for s in skipped:
        assert s.key == dataset.key(s.sample)
    return found, skipped


def assert_usable_samples_are_unchanged(found, whole, **options):
    """Check that samples that are used have the same crops and masks as without damage."""
    expected = {r[0]: r for r in epoch(ShardDataset(whole), **options)[0]}
    assert all(expected[r[0]] == r for r in found)


def whole_members(path, images_of):
    """Return the samples whose image is complete in a shard that was cut, by the tar headers before the cut."""
    size = path.stat().st_size
    with tarfile.open(images_of) as tar:
        images = [m for m in tar if m.name.endswith((".jpg", ".png"))]
    return [k for k, m in enumerate(images) if m.offset_data + m.size <= size]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("share", [0.95, 0.5, 0.1, 0.0])
def test_a_shard_that_was_cut(whole, broken, share, num_workers):
    path = broken / "shard-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    expected = {PER_SHARD + k for k in range(PER_SHARD)} - {
        PER_SHARD + k for k in whole_members(path, whole / "shard-000001.tar")
    }
    found, skipped = epoch(ShardDataset(broken), num_workers=num_workers)
    assert {s.sample for s in skipped} == expected
    assert expected or share == 0.95
    for s in skipped:
        assert s.reason == (
            f"shard shard-000001.tar of {broken} has {int(len(data) * share)} bytes, "
            f"but index.json says {len(data)}: it was cut short or changed"
        )
    assert_usable_samples_are_unchanged(found, whole)


def test_a_corrupt_header(whole, broken):
    path = broken / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    header = data.index(b"0014.png")
    data[header : header + 8] = b"\xff" * 8
    path.write_bytes(data)
    found, (skipped,) = epoch(ShardDataset(broken))
    assert (skipped.sample, skipped.key) == (14, "folder/0014")
    assert "is corrupt at byte" in skipped.reason
    assert "no tar header is there (bad checksum)" in skipped.reason
    assert_usable_samples_are_unchanged(found, whole)


def test_corrupt_image_bytes(whole, broken):
    path = broken / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    start = ShardDataset(broken)._offsets[14, 0]
    data[start + 20 : start + 300] = bytes(280)
    path.write_bytes(data)
    found, skipped = epoch(ShardDataset(broken))
    assert [s.sample for s in skipped] == [14]
    assert_usable_samples_are_unchanged(found, whole)


@pytest.mark.parametrize("shift", [512, 300])
def test_a_shard_replaced_by_another(whole, broken, shift):
    """Bytes of another image are never taken for the sample."""
    path = broken / "shard-000001.tar"
    path.write_bytes(bytes(shift) + path.read_bytes())
    found, skipped = epoch(ShardDataset(broken))
    assert {s.sample for s in skipped} == set(range(6, 12))
    shutil.copy(broken / "shard-000000.tar", path)
    found, skipped = epoch(ShardDataset(broken))
    assert {s.sample for s in skipped} == set(range(6, 12))
    assert_usable_samples_are_unchanged(found, whole)


def test_a_missing_shard(whole, broken):
    (broken / "shard-000003.tar").unlink()
    found, skipped = epoch(ShardDataset(broken))
    assert {s.sample for s in skipped} == set(range(18, 24))
    assert {s.reason for s in skipped} == {f"shard shard-000003.tar of {broken} is missing, but index.json lists it"}
    assert_usable_samples_are_unchanged(found, whole)


def test_a_shard_that_cannot_be_read(whole, broken):
    (broken / "shard-000003.tar").unlink()
    (broken / "shard-000003.tar").mkdir()
    _, skipped = epoch(ShardDataset(broken))
    assert {s.sample for s in skipped} == set(range(18, 24))
    assert all("cannot be read: " in s.reason for s in skipped)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_deleted_during_an_epoch(whole, broken, num_workers):
    """Open shards can still be read; samples of later ones are skipped."""
    dataset = ShardDataset(broken)
    loader = a_loader(dataset, shuffle_window=1, batch_size=3, num_workers=num_workers)
    order, batches = loader.order(0), loader.batches()
    got = [next(batches)[1]]
    for path in broken.glob("*.tar"):
        path.unlink()
    last = order[-3:]
    with pytest.raises(
        ValueError, match=r"no image is left in the batch of step \d, as none of its 3 samples can be used: "
    ):
        got += [batch for _, batch in islice(batches, 7)]
    used = [i for batch in got for i in batch.samples.tolist()]
    assert used == order[: len(used)].tolist()
    assert not set(used) & set(last.tolist())


def test_a_shard_that_is_missing_for_part_of_an_epoch(whole, broken):
    dataset = ShardDataset(broken)
    loader = a_loader(dataset, shuffle_window=24, batch_size=6)
    batches = loader.batches()
    gone = broken / "shard-000001.tar"
    aside = gone.rename(broken / "aside")
    first = next(batches)[1]
    assert {dataset.shard_of(s.sample) for s in first.skipped} == {1}
    aside.rename(gone)
    rest = [batch for _, batch in islice(batches, 3)]
    assert not any(batch.skipped for batch in rest)
    used = [i for batch in (first, *rest) for i in batch.samples.tolist()] + [s.sample for s in first.skipped]
    assert sorted(used) == list(range(24))


def test_a_server_that_stops_in_the_middle_of_a_shard(whole, tmp_path):
    """If always at the same place, samples before it are used and the others skipped; if once, all are used."""
    data = (whole / "shard-000001.tar").read_bytes()
    stop = len(data) // 2
    (tmp_path / "cut").write_bytes(data[:stop])
    expected = set(range(6, 12)) - {6 + k for k in whole_members(tmp_path / "cut", whole / "shard-000001.tar")}
    access = Access(cache=str(tmp_path / "cache"), retries=2, backoff=0.0, timeout=5.0)
    with serving(whole) as server:
        server.plans = {"shard-000001.tar": [("stop", stop)], "shard-000002.tar": [("stop", 100), None]}
        dataset = ShardDataset(server.address, access=access)
        found, skipped = epoch(dataset, num_workers=1)
        assert server.count("shard-000001.tar") == 3, "one try and two more, for all of its samples"
        assert server.requests.count(("shard-000002.tar", "bytes=100-")) == 1
    assert {s.sample for s in skipped} == expected
    assert 0 < len(expected) < 6
    assert "was not downloaded completely: the stream ended after" in skipped[0].reason
    assert_usable_samples_are_unchanged(found, whole)


def test_a_server_without_ranges_that_stops(whole, tmp_path):
    with serving(whole, ranges=False) as server:
        server.plans = {"shard-000001.tar": [("stop", 700), ("stop", 5000), None]}
        access = Access(cache=str(tmp_path / "cache"), retries=2, backoff=0.0)
        found, skipped = epoch(ShardDataset(server.address, access=access))
    assert not skipped
    assert_usable_samples_are_unchanged(found, whole)


def test_a_server_that_stalls(whole, tmp_path):
    """After one stall nothing is lost; after endless ones, the shard is given up at the timeout."""
    access = Access(cache=str(tmp_path / "cache"), retries=1, backoff=0.0, timeout=0.5)
    with serving(whole) as server:
        server.plans = {"shard-000000.tar": [("stall", 3000), None], "shard-000003.tar": [("stall", 0)]}
        found, skipped = epoch(ShardDataset(server.address, access=access), num_workers=1)
    assert {s.sample for s in skipped} == set(range(18, 24))
    assert all("the stream stalled: no data for 0.5 s; gave up after 2 tries" in s.reason for s in skipped)
    assert_usable_samples_are_unchanged(found, whole)


def test_a_pipe_that_fails(whole, tmp_path):
    command = f"pipe:cat '{whole}'/shard-{{000000..000003}}.tar"
    dataset = ShardDataset(command, access=Access(cache=str(tmp_path / "cache"), retries=0))
    shutil.rmtree(tmp_path / "cache/shards")
    (whole / "shard-000002.tar").rename(whole / "aside")
    _, skipped = epoch(dataset)
    assert {s.sample for s in skipped} == set(range(12, 18))
    assert "the command ended with status 1: cat: " in skipped[0].reason


def kinds():
    """Return image files that are usable, and others that are not."""
    grey16 = Image.fromarray((np.arange(400, dtype=np.uint16) * 100).reshape(20, 20))
    frames = [picture(k) for k in range(3)]
    rotated = Image.Exif()
    rotated[0x0112] = 6
    good = {
        "rgb": encoded(picture(0)),
        "cmyk": encoded(picture(1).convert("CMYK")),
        "grey": encoded(picture(2).convert("L")),
        "deep": encoded(grey16, "PNG"),
        "palette": encoded(picture(3).convert("P"), "PNG"),
        "alpha": encoded(picture(4).convert("RGBA"), "PNG"),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "rotated": encoded(picture(5), exif=rotated.tobytes()),
        "tiny": encoded(picture(6, 1, 1), "PNG"),
        "thin": encoded(picture(7, 1, 900), "PNG"),
    }
    big = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(big, "PNG")
    bad = {
        "empty": b"",
        "noise": np.random.default_rng(0).bytes(500),
        "page": b"<!DOCTYPE html><html>404</html>",
        "cut": encoded(picture(8, 90, 90))[:-2000],
        "cut png": encoded(picture(9, 60, 60), "PNG")[:2000],
        "enormous": big.getvalue(),
    }
    return good, bad


def test_images_of_all_kinds(tmp_path):
    good, bad = kinds()
    samples = [Sample(key, "img", data) for key, data in (good | bad).items()]
    dataset = ShardDataset(write_shards(tmp_path / "s", samples, 5, {}))
    found, skipped = epoch(dataset, batch_size=16, shuffle_window=16)
    assert {s.key for s in skipped} == bad.keys()
    assert {dataset.key(r[0]) for r in found} == good.keys()
    reasons = {s.key: s.reason for s in skipped}
    assert reasons["empty"] == "the file is empty"
    assert reasons["page"] == "an HTML page, not an image"
    assert "20000 x 20000 pixels are more than max_pixels" in reasons["enormous"]


def test_training_ignores_missing_and_invalid_labels(tmp_path):
    image = encoded(picture(0))
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s/a.tar", "w") as tar:
        for k in range(12):
            for name, data in ((f"{k}.jpg", image), (f"{k}.cls", [b"1", b"cat", b"-1"][k % 3])):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if k != 5 or name.endswith("jpg"):
                    tar.addfile(info, io.BytesIO(data))
    dataset = ShardDataset(tmp_path / "s")
    found, skipped = epoch(dataset)
    assert (len(found), len(skipped)) == (12, 0)
    assert dataset.labelled("class").tolist() == [0, 3, 6, 9]
    with pytest.raises(
        ValueError, match=r"label \(='class'\) is missing for 8 of 12 samples of .*, first for '1'; labelled"
    ):
        dataset.labels("class")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_evaluation_names_the_sample_and_stops(tmp_path, num_workers):
    samples = [*make_samples(3), Sample("broken/one", "jpg", encoded(picture(0, 90, 90))[:-2000])]
    dataset = ShardDataset(write_shards(tmp_path / "s", samples, 4, CLASSES))
    with pytest.raises(ValueError, match=r"sample 3 \('broken/one'\) of .* cannot be used: "):
        list(eval_batches(dataset, ImageOptions(image_size=(8, 8), batch_size=4, num_workers=num_workers)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_with_no_image_left(tmp_path, num_workers):
    samples = [Sample(f"bad/{k}", "jpg", b"x") for k in range(4)]
    dataset = ShardDataset(write_shards(tmp_path / "s", samples, 4, {}))
    with pytest.raises(
        ValueError, match=r"no image is left in the batch of step 0, as none of its 4 samples can be used: 'b"
    ):
        next(a_loader(dataset, batch_size=4, num_workers=num_workers).batches())


def test_how_much_may_be_skipped():
    assert Allowance(0.01, 1_281_167).count == 12_811
    assert Allowance(0.01, 100).count == 8
    assert Allowance(0.0, 1_281_167).count == 0
    assert Allowance(1.0, 100).count == 100
    with pytest.raises(ValueError, match=r"max_skipped \(=1.5\) must be a fraction in \[0, 1\]"):
        Allowance(1.5, 100)
