"""The memory of a loader worker stays flat over 200,000 samples."""

import multiprocessing
import os
import re
from itertools import islice
from pathlib import Path

import pytest
from small_shards import encoded, picture, write_shards

from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.writing import Sample
from jepa_kit.data.transforms import train_pipeline
from jepa_kit.data.views import ViewMaker
from jepa_kit.maskers.multiblock import MultiBlock


def own_mib(pid):
    """Return the private memory of a process, without mapped files and pages shared with its parent."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads memory from /proc")
def test_a_worker_does_not_grow(tmp_path):
    image = encoded(picture(0, 12, 12), "PNG")
    samples = [Sample(f"folder/{k:06d}", "png", image, {"class": k % 4}) for k in range(20_000)]
    dataset = ShardDataset(write_shards(tmp_path / "s", samples, 1000, {"class": tuple("abcd")}))
    (tmp_path / "s/shard-000019.tar").unlink()  # skipping takes no memory either
    loader = TrainLoader(
        dataset=dataset,
        views=[ViewMaker(pipeline=train_pipeline(image_size=(12, 12)), masker=MultiBlock(grid=(6, 6)))],
        batch_size=200,
        shuffle_window=4096,
        num_workers=1,
    )
    seen, curve = 0, []
    for step, batch in islice(loader.batches(), 1000):
        seen += len(batch) + len(batch.skipped)
        if step % 100 == 99:
            (worker,) = multiprocessing.active_children()
            curve.append((own_mib(worker.pid), own_mib(os.getpid())))
    print(
        "MiB of the worker and of the main process, every 20,000 samples:",
        [(round(a, 1), round(b, 1)) for a, b in curve],
    )
    assert seen == 200_000
    for first, last in ((curve[1][k], curve[-1][k]) for k in (0, 1)):
        assert last - first < 6.0  # of 160,000 samples, with what the allocator cannot reuse at first
