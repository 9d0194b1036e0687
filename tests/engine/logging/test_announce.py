import platform
import textwrap

import pytest
import torch
from PIL import Image

from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.distributed.collectives import World
from jepa_kit.engine.logging.announce import Place, describe, find_places, notes_on_files, to_dict


def place(rank, host="a", tflops=100.0, model="H100", device=None):
    return Place(rank, rank % 2, host, device or f"cuda:{rank % 2}", model, tflops)


def test_one_process():
    (own,) = find_places(World(), torch.device("cpu"), "float32")
    assert (own.rank, own.host, own.device, own.model) == (0, platform.node(), "cpu", "CPU")
    assert own.matrix_tflops > 0
    lines = describe([own], "float32")
    assert lines[0] == "device: CPU, 1 process"
    assert lines[1] == f"topology: 1 node: {platform.node()} (1)"


def test_what_people_read():
    places = [place(0), place(1, tflops=79.0), place(2, "b", 99.0), place(3, "b", 98.0)]
    assert describe(places, "bf16") == [
        "device: H100, 4 processes",
        "topology: 2 nodes: a (2), b (2)",
        "mfu: relative to 79 to 100 TFLOP/s a process: a large matrix product in bf16 on H100, measured now",
        "note: rank 1 on a (cuda:1) does 79% of the fastest",
    ]
    assert len(describe([place(0, device="cpu"), place(1, tflops=1.0, device="cpu")], "bf16")) == 3


def test_what_programs_read(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    found = to_dict([place(0), place(1, "b", 99.0)], "bf16")
    assert found["nodes"] == 2
    assert found["mfu_peak"] == {
        "measured": "large square matrix product, at the start",
        "precision": "bf16",
        "devices": ["H100"],
        "tflops_a_process": 99.5,
    }
    assert found["places"][1] == {
        "rank": 1,
        "local_rank": 1,
        "host": "b",
        "device": "cuda:1",
        "model": "H100",
        "matrix_tflops": 99.0,
    }
    assert "slurm_job" not in found
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert to_dict([place(0)], "bf16")["slurm_job"] == "17"


def test_a_folder_of_images(shards, tmp_path):
    for k in range(3):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k}.png")
    (tmp_path / "readme").touch()
    notes = notes_on_files(ShardDataset([str(tmp_path), str(shards)]))
    assert notes[0] == f"note: {tmp_path}: left out 1 files without the extension of an image: 1 without one"
    assert notes[1].startswith(f"note: {tmp_path} is read file by file; shards of it (jepa-shards) are read ")
    assert notes_on_files(ShardDataset(shards)) == []


SCRIPT = """
    import torch
    from jepa_kit.distributed.collectives import all_gather, process_group, read_environment
    from jepa_kit.engine.logging.announce import find_places

    world = read_environment()
    with process_group(world, torch.device("cpu")):
        places = find_places(world, torch.device("cpu"), "float32")
        assert [p.rank for p in places] == [p.local_rank for p in places] == [0, 1]
        table = all_gather(torch.tensor([1.0 * world.rank, 5.0]))
        assert table.tolist() == [[0.0, 5.0], [1.0, 5.0]]
"""


@pytest.mark.integration
def test_two_processes(tmp_path, ranks):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(SCRIPT))
    ranks(2, script)
