import json
import os

import pytest
import torch

from jepa_kit.config import load_config
from jepa_kit.data import workers
from jepa_kit.data.shards.reader import ShardFile
from jepa_kit.data.workers import choose_workers, limit_threads
from jepa_kit.distributed.collectives import World
from jepa_kit.engine.build import build_run
from jepa_kit.training import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "cores", "seconds", "chosen"),
    [
        (CUDA, 1, 2.4e-3, 0),
        (CUDA, 8, 2.4e-3, 8),
        (CUDA, 8, None, 8),
        (CUDA, 64, 2.4e-3, 16),
        (CUDA, 8, 1e-5, 0),  # tensors
        (CPU, 2, 2.4e-3, 0),
        (CPU, 16, 2.4e-3, 4),
        (CPU, 16, 3e-4, 0),  # small images
        (CPU, 96, None, 16),
    ],
)
def test_auto(monkeypatch, device, cores, seconds, chosen):
    monkeypatch.setattr(workers, "cores_of_rank", lambda: cores)
    assert choose_workers("auto", device, seconds) == chosen
    assert choose_workers(3, device, seconds) == 3


def test_a_run_times_its_images_and_logs_what_it_chose(tiny, monkeypatch, capsys):
    monkeypatch.setattr(workers, "cores_of_rank", lambda: 16)
    run = build_run(tiny("data.num_workers=auto"), World(), CPU)
    seconds = run.loader.seconds_per_image()
    assert 0 < seconds < 1
    assert run.loader.num_workers == (0 if seconds < workers.QUICK["cpu"] else 4)
    monkeypatch.setitem(workers.QUICK, "cpu", 0.0)
    monkeypatch.setattr(workers, "cores_of_rank", lambda: 4)
    folder = train(tiny("data.num_workers=auto", "train.steps_per_epoch=1"))
    assert "loading: 1 workers for each process, " in capsys.readouterr().out
    assert json.loads((folder / "run.json").read_text())["num_workers"] == 1
    assert load_config(folder).data.num_workers == "auto"  # another machine has other cores


def test_timing_skips_images_that_cannot_be_used(tiny, monkeypatch):
    loader = build_run(tiny(), World(), CPU).loader
    monkeypatch.setattr(ShardFile, "read", lambda self: b"no image")
    assert loader.seconds_per_image() is None


def test_threads_stay_within_the_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(workers, "cores_of_rank", lambda: 1)
    try:
        torch.set_num_threads(2)
        limit_threads()
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "2")  # the user's word
        limit_threads()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
