"""An epoch's samples, crops and masks are the same for any ranks and workers; killed runs resume exactly.

A record of an image is its number, a digest of the pixels that its crop gave, and its masks, patch by patch.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
from bad_server import serving
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import make_samples, write_shards

from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.remote.fetch import Access
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.transforms import train_pipeline
from jepa_kit.data.views import ViewMaker
from jepa_kit.maskers.multiblock import MultiBlock

SAMPLES, BATCH, SEED = 53, 8, 11
STEPS = SAMPLES // BATCH  # of an epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """53 samples in shards of 7: more readers (4 ranks x 3 workers) than shards."""
    return write_shards(tmp_path_factory.mktemp("data") / "s", make_samples(SAMPLES), 7, {"class": tuple("abcd")})


def a_loader(dataset, *, rank=0, world_size=1, num_workers=0, window=20):
    return TrainLoader(
        dataset=dataset,
        views=[ViewMaker(pipeline=train_pipeline(image_size=(12, 12), flip=0.5), masker=MultiBlock(grid=(6, 6)))],
        batch_size=BATCH,
        seed=SEED,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        shuffle_window=window,
    )


def records(batch):
    """Return the record of each image of a batch, in order."""
    sets = {}
    for kind, group in (("context", batch.masks.context), ("target", batch.masks.targets)):
        for image, index in zip(group.image.tolist(), group.split(), strict=True):
            sets.setdefault(image, []).append((kind, *index.tolist()))
    return [
        (sample, hashlib.sha256(pixels.numpy().tobytes()).hexdigest(), tuple(sets[b]))
        for b, (sample, pixels) in enumerate(zip(batch.samples.tolist(), batch.images, strict=True))
    ]


def stream(dataset, steps, start=0, **options):
    """Return [(step, records)], joined over ``world_size`` ranks."""
    world = options.pop("world_size", 1)
    ranks = [
        [(step, records(batch)) for step, batch in islice(loader.batches(start), steps)]
        for loader in (a_loader(dataset, rank=r, world_size=world, **options) for r in range(world))
    ]
    return [(parts[0][0], [r for _, part in parts for r in part]) for parts in zip(*ranks, strict=True)]


@cache
def uninterrupted(folder):
    """Two epochs and a half."""
    return stream(ShardDataset(folder), 5 * STEPS // 2)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_ranks_and_workers_see_the_same_epochs(folder, world_size, num_workers):
    expected = uninterrupted(folder)[: 2 * STEPS]
    found = stream(ShardDataset(folder), 2 * STEPS, world_size=world_size, num_workers=num_workers)
    for epoch in range(2):
        steps = slice(epoch * STEPS, (epoch + 1) * STEPS)
        seen = Counter(r for _, part in found[steps] for r in part)
        assert seen == Counter(r for _, part in expected[steps] for r in part)
        samples = Counter(sample for sample, _, _ in seen.elements())
        assert set(samples.values()) == {1}, "none is used twice"
        assert len(samples) == SAMPLES - SAMPLES % BATCH, "all but less than a batch are used"
    assert found == expected, "and each step has the same ones, in the same order"


def test_epochs_differ_in_order_crops_and_masks(folder):
    first, second = (
        {r[0]: r for _, part in uninterrupted(folder)[e * STEPS : (e + 1) * STEPS] for r in part} for e in (0, 1)
    )
    both = first.keys() & second.keys()
    assert list(first) != list(second)
    assert sum(first[i][1] == second[i][1] for i in both) < len(both) / 4
    assert sum(first[i][2] == second[i][2] for i in both) < len(both) / 4


@settings(max_examples=15, deadline=None)
@given(stops=st.lists(st.integers(1, 5 * STEPS // 2 - 1), max_size=4, unique=True).map(sorted))
def test_resuming_at_any_step_any_number_of_times(folder, stops):
    expected, dataset = uninterrupted(folder), ShardDataset(folder)
    found = []
    for start, end in zip([0, *stops], [*stops, len(expected)], strict=True):
        found += stream(dataset, end - start, start)
    assert found == expected


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("stops", "workers"), [((4, 7, 11), (2, 0, 1, 3)), ((1, 6), (0, 3, 1)), ((6, 12), (3, 0, 2))])
def test_resuming_with_another_number_of_workers(folder, stops, workers):
    expected, dataset = uninterrupted(folder), ShardDataset(folder)
    found = []
    for start, end, number in zip([0, *stops], [*stops, len(expected)], workers, strict=True):
        found += stream(dataset, end - start, start, num_workers=number)
    assert found == expected


CHILD = """
import sys
sys.path[:0] = {path!r}
from test_exactness import *
start, workers, out = int(sys.argv[1]), int(sys.argv[2]), open(sys.argv[3], "a")
for step, batch in a_loader(ShardDataset({folder!r}), num_workers=workers).batches(start):
    print(repr((step, records(batch))), file=out, flush=True)
"""


def finished(log):
    """Return the complete lines."""
    return log.read_text().splitlines(keepends=True) if log.exists() else []


@pytest.mark.slow
def test_resuming_after_kills_with_other_numbers_of_workers(folder, tmp_path):
    """Three processes are killed by SIGKILL; each next one resumes after the last finished step."""
    log, chance, workers = tmp_path / "log", random.Random(5), [2, 0, 1, 3]
    program = CHILD.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[2])], folder=str(folder))
    expected = uninterrupted(folder)
    done = []
    for number in workers:
        target = len(expected) if number == workers[-1] else len(done) + chance.randint(1, 4)
        child = subprocess.Popen([sys.executable, "-c", program, str(len(done)), str(number), str(log)])
        deadline = time.monotonic() + 120
        while len(finished(log)) < target and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        done = [line for line in finished(log) if line.endswith("\n")]
        log.write_text("".join(done))
    assert len(done) >= len(expected)
    assert done[: len(expected)] == [f"{entry!r}\n" for entry in expected]


@pytest.mark.parametrize("world_size", [1, 2])
def test_remote_shards_give_the_same_batches(folder, tmp_path, world_size):
    with serving(folder) as server:
        access = Access(cache=str(tmp_path / "cache"), retries=0)
        dataset = ShardDataset(f"{server.address}/shard-{{000000..000007}}.tar", access=access)
        found = stream(dataset, len(uninterrupted(folder)), world_size=world_size, num_workers=1)
        assert [server.count(f"shard-{k:06d}.tar") for k in range(8)] == [1] * 8, "each is fetched once"
    assert found == uninterrupted(folder)


def test_resuming_downloads_only_the_shards_that_are_needed(folder, tmp_path):
    start = 9
    with serving(folder) as server:
        dataset = ShardDataset(server.address, access=Access(cache=str(tmp_path / "cache"), retries=0))
        loader = a_loader(dataset, window=1)
        batches = loader.batches(start)
        _, batch = next(batches)
        needed = set(dataset.shard_of(batch.samples.numpy()).tolist())
        fetched = {name for name, _ in server.requests if name.endswith(".tar")}
        assert {f"shard-{k:06d}.tar" for k in needed} <= fetched
        assert len(needed) <= 3
        batches.close()


def test_shards_are_prefetched(folder, tmp_path):
    with serving(folder) as server:
        dataset = ShardDataset(server.address, access=Access(cache=str(tmp_path / "cache"), retries=0))
        loader = a_loader(dataset, window=16)  # of two batches
        batches = loader.batches()
        next(batches)
        ahead = {shard for step, shard in islice(loader.shards_needed(0), 20) if step <= 2} - {None}
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not all(server.count(f"shard-{k:06d}.tar") for k in ahead):
            time.sleep(0.01)
        assert all(server.count(f"shard-{k:06d}.tar") == 1 for k in ahead)
        batches.close()


def test_fetched_bytes(folder, tmp_path):
    """Counted by hand: the shards of each window that contain the rank's samples."""
    with serving(folder) as server:
        dataset = ShardDataset(server.address, access=Access(cache=str(tmp_path / "cache"), retries=0))
        for window, world_size in ((56, 1), (16, 2), (8, 4)):
            for rank in range(world_size):
                loader = a_loader(dataset, window=window, rank=rank, world_size=world_size)
                pairs = set()
                for request in islice(loader.requests(0), STEPS):
                    number = request.step * BATCH // window
                    pairs |= {(number, shard) for shard in dataset.shard_of(request.samples).tolist()}
                assert loader.fetched_bytes() == sum(dataset.shards[shard]["bytes"] for _, shard in pairs)


@pytest.mark.parametrize(
    ("kept", "text"),
    [(True, "GB of shards in an epoch; data.cache is shared"), (False, "and downloads them itself in every epoch")],
)
def test_summary_of_downloads(folder, tmp_path, kept, text):
    with serving(folder) as server:
        access = Access(cache=str(tmp_path / "cache") if kept else None, retries=0)
        said = a_loader(ShardDataset(server.address, access=access), world_size=4).fetching()
    assert text in said
    assert said.startswith("each rank reads 0.000")


def test_a_cache_too_small_for_a_window(folder):
    with serving(folder) as server:
        dataset = ShardDataset(server.address, access=Access(cache_gb=5e-5, retries=0))
        with pytest.raises(
            ValueError, match=r"data.cache_gb \(=5e-05\) must be at least .*: the samples that are shuffled"
        ):
            a_loader(dataset)
