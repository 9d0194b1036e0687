"""Threads that fetch ahead: as far as they may, never further, and they end."""

import itertools
import threading
import time

import pytest
from bad_server import serving

from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.remote.fetch import Access
from jepa_kit.data.remote.prefetch import Prefetcher
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.transforms import train_pipeline
from jepa_kit.data.views import ViewMaker
from jepa_kit.errors import CacheError


def until(holds, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.002)
    return holds()


@pytest.fixture
def started():
    made = []

    def make(plan, fetch, steps):
        made.append(Prefetcher(plan, fetch, steps))
        return made[-1]

    yield make
    for ahead in made:
        ahead.stop()
        for thread in ahead._threads:
            thread.join(10)
            assert not thread.is_alive()


def test_as_far_as_the_window_and_no_further(started):
    fetched = []
    ahead = started(((step, 10 * step) for step in itertools.count()), fetched.append, 3)
    assert fetched == [], "nothing before the first step"
    assert all(thread.daemon for thread in ahead._threads), "a program can end while a fetch stalls"
    ahead.advance(0)
    assert until(lambda: len(fetched) == 4)
    time.sleep(0.05)
    assert sorted(fetched) == [0, 10, 20, 30]
    ahead.advance(2)
    assert until(lambda: len(fetched) == 6)
    assert sorted(fetched)[4:] == [40, 50]


def test_a_plan_that_needs_nothing_more_holds_nobody_up(started):
    looked = []

    def plan():
        for step in itertools.count():
            looked.append(step)
            yield step, None

    ahead = started(plan(), pytest.fail, 5)
    ahead.advance(0)
    assert until(lambda: len(looked) == 7)
    ahead.advance(1)
    assert until(lambda: len(looked) == 8)


def test_a_slow_plan_does_not_hold_the_run_up(started):
    slow = threading.Event()

    def plan():
        slow.wait(20)
        yield from itertools.cycle([(0, None)])

    ahead = started(plan(), pytest.fail, 1)
    start = time.monotonic()
    ahead.advance(0)
    ahead.advance(1)
    assert time.monotonic() - start < 5
    slow.set()


def test_a_full_cache_ends_them_and_the_reader_tells(started):
    def full(shard):
        raise CacheError("full")

    ahead = started(((step, step) for step in itertools.count()), full, 100)
    ahead.advance(0)
    assert until(lambda: not any(thread.is_alive() for thread in ahead._threads))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("window", [5, 1000])
def test_loaders_of_few_shards_go_on_and_end(folder, tmp_path, window, num_workers):
    """Every shard is used in every window: there is nothing to fetch after the first."""
    with serving(folder) as server:
        dataset = ShardDataset(server.address, access=Access(cache=str(tmp_path / "cache"), retries=0))
        pipeline = train_pipeline(image_size=(8, 8))
        loader = TrainLoader(
            dataset=dataset,
            views=[ViewMaker(pipeline=pipeline)],
            batch_size=5,
            shuffle_window=window,
            num_workers=num_workers,
        )
        before = threading.active_count()
        batches = loader.batches()
        for _, batch in itertools.islice(batches, 12):
            assert len(batch) == 5
        batches.close()
        assert [server.count(f"shard-00000{k}.tar") for k in range(3)] == [1, 1, 1]
        assert until(lambda: threading.active_count() <= before)
