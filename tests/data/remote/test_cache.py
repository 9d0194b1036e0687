"""The cache: each shard is fetched once, whole or not at all under its name, within its bound."""

import errno
import hashlib
import logging
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import pytest
from bad_server import serving

from jepa_kit.data.remote import cache as cache_module
from jepa_kit.data.remote.cache import RemoteShard, ShardCache
from jepa_kit.data.remote.fetch import Access
from jepa_kit.errors import CacheError

DATA = {f"{k}.tar": bytes([k]) * 50_000 for k in range(6)}


@pytest.fixture
def server(tmp_path):
    (tmp_path / "far").mkdir()
    for name, data in DATA.items():
        (tmp_path / "far" / name).write_bytes(data)
    with serving(tmp_path / "far") as found:
        yield found


@pytest.fixture
def new_cache(tmp_path):
    def make(**options):
        defaults = {"cache": str(tmp_path / "cache"), "retries": 1, "backoff": 0.0, "timeout": 2.0}
        return ShardCache(Access(**(defaults | options)))

    return make


def shard(server, k, **facts):
    return RemoteShard(f"{server.address}/{k}.tar", **facts)


def kept(cache):
    return sorted(name.partition("-")[2] for name in os.listdir(f"{cache.folder}/shards"))


def test_a_shard_is_fetched_once(server, new_cache):
    cache = new_cache()
    wanted = shard(server, 1, bytes=50_000, sha256=hashlib.sha256(DATA["1.tar"]).hexdigest())
    for _ in range(3):
        found = cache.get(wanted)
        assert found.fault is None
        assert Path(found.path).read_bytes() == DATA["1.tar"]
    assert len(server.requests) == 1


def test_processes_fetch_it_once_together(server, new_cache):
    cache = new_cache()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(partial(_get, cache), [shard(server, k) for k in (0, 0, 1, 0, 1, 1)])
    assert {path for path, fault in found if fault is None} == {cache.get(shard(server, k)).path for k in (0, 1)}
    assert len(server.requests) == 2


def _get(cache, wanted):
    found = cache.get(wanted)
    return found.path, found.fault


def test_the_bound_lets_go_what_was_used_longest_ago(server, new_cache):
    cache = new_cache(cache_gb=0.00016)  # three shards
    for k in (0, 1, 2, 0, 3):
        cache.get(shard(server, k, bytes=50_000))
        time.sleep(0.01)
    assert kept(cache) == ["0.tar", "2.tar", "3.tar"]
    assert server.count("0.tar") == 1


def test_what_a_dead_process_left_goes_and_what_one_writes_stays(server, new_cache, tmp_path):
    cache = new_cache(cache_gb=0.00006)
    os.makedirs(f"{cache.folder}/shards")
    for name, age in (("a-dead.tar.part", 2 * 3600), ("b-live.tar.part", 10)):
        path = Path(cache.folder, "shards", name)
        path.write_bytes(bytes(60_000))
        os.utime(path, (time.time() - age,) * 2)
    cache.get(shard(server, 0, bytes=50_000))
    assert "dead.tar.part" not in kept(cache)
    assert "live.tar.part" in kept(cache)


def test_a_wrong_checksum_is_fetched_again_once_and_told(server, new_cache, caplog):
    with caplog.at_level(logging.WARNING):
        found = new_cache().get(shard(server, 2, bytes=50_000, sha256="0" * 64))
    what = "does not match its index and is not used"
    assert found.fault == f"{server.address}/2.tar {what}: its SHA-256 is not that of its index"
    assert len(server.requests) == 2
    assert Path(found.path).read_bytes() == b"", "a damaged image may decode"


def test_another_length_than_that_of_the_index(server, new_cache):
    found = new_cache().get(shard(server, 2, bytes=49_000))
    assert found.fault.endswith("is not used: it has 50000 bytes, but its index says 49000")


def test_a_kept_shard_that_was_damaged_is_fetched_again(server, new_cache):
    cache, wanted = new_cache(), shard(server, 1, bytes=50_000)
    path = cache.get(wanted).path
    os.truncate(path, 1000)
    assert Path(cache.get(wanted).path).read_bytes() == DATA["1.tar"]


def test_one_that_breaks_always_is_remembered_for_a_while(server, new_cache, monkeypatch):
    cache, wanted = new_cache(), shard(server, 1, bytes=50_000)
    server.plans["1.tar"] = [("stop", 20_000)]
    first = cache.get(wanted)
    assert Path(first.path).read_bytes() == DATA["1.tar"][:20_000]
    assert (
        "was not downloaded completely: the stream ended after 20000 of 50000 bytes; gave up after 2 tries"
        in first.fault
    )
    requests = len(server.requests)
    assert cache.get(wanted) == first
    assert len(server.requests) == requests
    server.plans["1.tar"] = [None]
    monkeypatch.setattr(cache_module, "FORGIVEN_AFTER", -1.0)
    assert cache.get(wanted).fault is None
    assert kept(cache) == ["1.tar"]


def test_a_run_that_is_started_again_asks_again(server, new_cache):
    wanted = shard(server, 1, bytes=50_000)
    server.plans["1.tar"] = [("stop", 20_000)]
    first = new_cache()
    assert first.get(wanted).fault
    del server.plans["1.tar"]  # it was put right
    time.sleep(0.02)  # a file's time is that of the last tick
    again = new_cache()
    assert again.get(wanted).fault is None
    assert kept(again) == ["1.tar"]


def test_a_full_disk_is_no_fault_of_a_shard(server, new_cache, monkeypatch):
    cache = new_cache()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "copy", full)
    with pytest.raises(
        CacheError, match=r"the cache .* cannot store http.*1.tar: .*No space left on device; set data.cache"
    ):
        cache.get(shard(server, 1))
    assert kept(cache) == []


def test_a_temporary_cache_has_a_bound_and_goes(new_cache):
    cache = new_cache(cache=None)
    assert (cache.temporary, cache.limit) == (True, 20.0)
    folder = cache.folder
    child = multiprocessing.get_context("fork").Process(target=cache._removal)
    child.start()
    child.join()
    assert os.path.isdir(folder), "another process leaves it alone"
    del cache
    assert not os.path.exists(folder)
