"""What was skipped is listed once, counted over processes and resumes, and stops the run where it is too much."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jepa_kit.data.batch import Skipped
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.engine.skipped_samples import Allowance, SkippedSamples, read_skipped
from jepa_kit.errors import TooManySkippedError
from jepa_kit.training import train

CPU = torch.device("cpu")


def listed(folder, *, first_step=0, share=0.5):
    return SkippedSamples(folder, first_step=first_step, steps_per_epoch=10, allowance=Allowance(share, 40), device=CPU)


def skipped(*numbers):
    return [Skipped(n, f"photo/{n}", "broken") for n in numbers]


def test_lines_and_counts(tmp_path):
    said, samples = [], listed(tmp_path)
    samples.add(3, skipped(1, 2))
    samples.add(4, [])
    assert samples.collect(said.append) == 2
    assert samples.collect(said.append) == 2
    samples.add(12, skipped(*range(3, 8)))
    assert samples.collect(said.append) == 7
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 3, "epoch": 0, "sample": 1, "key": "photo/1", "reason": "broken"}
    assert [(line["step"], line["epoch"], line["sample"]) for line in lines[2:]] == [(12, 1, n) for n in range(3, 8)]
    assert said[:2] == ["skipped 'photo/1': broken", "skipped 'photo/2': broken"]
    assert said[5] == f"skipped 2 more: {tmp_path}/skipped.jsonl"


def test_without_faults_there_is_no_file(tmp_path):
    samples = listed(tmp_path)
    samples.add(0, [])
    assert samples.collect(print) == 0
    assert not (tmp_path / "skipped.jsonl").exists()


def test_a_resumed_run_counts_on_and_lists_none_twice(tmp_path):
    first = listed(tmp_path)
    for step in (2, 5):
        first.add(step, skipped(step))
    first.collect(print)
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write('{"step": 6, "epo')  # killed while it wrote
    again = listed(tmp_path, first_step=5)
    assert again.total == 1
    again.add(5, skipped(5))
    assert again.collect(print) == 2
    assert [line["step"] for line in read_skipped(tmp_path)] == [2, 5]


def test_too_many_of_an_epoch_stop_the_run(tmp_path):
    samples = listed(tmp_path, share=0.25)  # 10 of 40
    samples.add(1, skipped(*range(10)))
    samples.add(11, skipped(*range(10)))
    assert samples.collect(print) == 20
    samples.add(12, skipped(10))
    with pytest.raises(
        TooManySkippedError,
        match=r"^11 of the 40 samples of epoch 1 could not be used, more than the 10 that data.max_skipped \(=0.25\) "
        r"allows. .*skipped.jsonl lists all; the last: 'photo/10': broken$",
    ):
        samples.collect(print)
    assert len(read_skipped(tmp_path)) == 21
    assert listed(tmp_path, first_step=20, share=0.25)._of_epoch == {0: 10, 1: 11}


def test_none_may_be_skipped(tmp_path):
    samples = listed(tmp_path, share=0.0)
    samples.add(0, skipped(1))
    with pytest.raises(TooManySkippedError, match=r"more than the 0 that data.max_skipped \(=0\) allows"):
        samples.collect(print)


def test_a_file_that_is_broken(tmp_path):
    (tmp_path / "skipped.jsonl").write_text("{}\nbroken\n")
    with pytest.raises(ValueError, match=r"skipped.jsonl, line 2 is not JSON"):
        read_skipped(tmp_path)


@pytest.fixture
def cut(shards, tmp_path):
    """The images of ``tiny``, of which 3 of the second shard are cut off."""
    folder = shutil.copytree(shards, tmp_path / "cut")
    offset = np.load(folder / "offsets.npy")[17, 0]
    os.truncate(folder / "shard-000001.tar", offset + 10)
    return folder


def test_a_run_goes_on_without_what_is_broken(tiny, cut, tmp_path):
    folder = train(tiny(f"data.shards={cut}", "train.log_every=1"))
    listed = read_skipped(folder)
    assert {line["sample"] for line in listed} <= {17, 18, 19}
    assert listed
    lines = read_metrics(folder)
    assert [line["data/skipped"] for line in lines] == [
        sum(line["step"] <= step for line in listed) for step in range(len(lines))
    ]
    for line in listed:
        assert line["reason"].endswith("it was cut short or changed")


def test_a_run_stops_where_too_much_is_broken(tiny, cut, tmp_path):
    with pytest.raises(TooManySkippedError, match=r"samples of epoch 0 could not be used, more than the 0 that"):
        train(tiny(f"data.shards={cut}", "data.max_skipped=0", "train.epochs=4"))


def _rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    samples, said = listed(folder, share=0.25), []
    samples.add(1, skipped(*([7, 8] if rank else [])))
    samples.add(0, skipped(rank))
    assert samples.collect(said.append) == 4
    assert bool(said) == (rank == 0)
    samples.add(2, skipped(*range(20, 27)) if rank else [])
    with pytest.raises(TooManySkippedError, match=r"11 of the 40 samples of epoch 0"):
        samples.collect(said.append)
    dist.destroy_process_group()


@pytest.mark.integration
@pytest.mark.usefixtures("rank_server")
def test_processes_join_their_lists_and_stop_together(tmp_path):
    mp.start_processes(_rank, (tmp_path,), nprocs=2, start_method="forkserver")
    assert [(line["step"], line["sample"]) for line in read_skipped(tmp_path)[:4]] == [(0, 0), (0, 1), (1, 7), (1, 8)]
    assert len(read_skipped(tmp_path)) == 11
