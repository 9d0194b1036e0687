import os
import re
import subprocess
import sys
import textwrap
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ranks import free_port
from torch import nn

from jepa_kit.distributed import collectives, rendezvous
from jepa_kit.distributed.collectives import (
    World,
    all_gather_object,
    broadcast_from_rank0,
    choose_device,
    is_main,
    mean_over_ranks,
    process_group,
    read_environment,
    run_on_all_ranks,
    wrap,
)
from jepa_kit.errors import StartError

ROOT = Path(__file__).parents[2]

ENVIRONMENT = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


def test_alone_without_torchrun():
    assert read_environment({"PATH": "/bin"}) == World(rank=0, local_rank=0, size=1)


def test_torchrun_says_who_this_is():
    assert read_environment(ENVIRONMENT) == World(rank=3, local_rank=1, size=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": None}, "the environment has some of torchrun's variables, but not MASTER_PORT"),
        ({"WORLD_SIZE": None, "LOCAL_RANK": None}, "some of torchrun's variables, but not LOCAL_RANK, WORLD_SIZE"),
        ({"RANK": "x"}, r"RANK \(='x'\) must be a whole number"),
        ({"RANK": "4"}, r"RANK \(=4\) must be from 0 to 3, as WORLD_SIZE is 4"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, r"WORLD_SIZE \(=0\) must be at least 1"),
    ],
)
def test_a_broken_environment(changes, message):
    environment = {name: value for name, value in (ENVIRONMENT | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        read_environment(environment)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpirun_starts_nothing_that_trains_alone(name):
    with pytest.raises(ValueError, match=rf"mpirun started 2 processes \({name}\), and this one would train alone"):
        read_environment({name: "2"})
    assert read_environment({name: "1"}) == World()
    assert read_environment({name: "2", **ENVIRONMENT}).size == 4


def test_tasks_of_srun_know_one_another():
    """More in test_slurm.py."""
    task = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    environment = task | {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]"}
    assert read_environment(environment) == World(rank=5, local_rank=1, size=8)
    assert environment["MASTER_ADDR"] == "n1"
    with pytest.raises(ValueError, match=r"SLURM_STEP_ID \(=''\) must be a whole number: Slurm sets it for each task"):
        read_environment(dict(task))
    assert read_environment({"SLURM_STEP_NUM_TASKS": "1"}) == World()
    assert read_environment({"SLURM_STEP_NUM_TASKS": "8", **ENVIRONMENT}).size == 4  # torchrun in a task of srun


def see_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_devices(monkeypatch):
    see_gpus(monkeypatch, 2)
    assert choose_device("auto", World(rank=3, local_rank=1, size=4)) == torch.device("cuda", 1)
    assert choose_device("cuda:1", World()) == torch.device("cuda", 1)
    assert choose_device("cpu", World()) == torch.device("cpu")
    see_gpus(monkeypatch, 0)
    assert choose_device("auto", World()) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "world", "gpus", "message"),
    [
        ("gpu", World(), 1, r"device \(='gpu'\) must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("cpu:1", World(), 1, r"device \(='cpu:1'\) must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("cuda:x", World(), 1, r"device \(='cuda:x'\) must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("cuda", World(), 0, r"device \(='cuda'\) needs CUDA, which torch .* does not see here"),
        ("cuda:0", World(size=2), 2, r"device \(='cuda:0'\) names one GPU for 2 processes; 'cuda' gives each its own"),
        ("cuda", World(3, 3, 4), 2, r"GPU 3 is needed, but there are 2: start fewer processes"),
    ],
)
def test_devices_that_there_are_not(monkeypatch, name, world, gpus, message):
    see_gpus(monkeypatch, gpus)
    with pytest.raises(ValueError, match=message):
        choose_device(name, world)


def test_a_failed_start_names_rank_and_cause(monkeypatch):
    with free_port() as port:  # nothing answers there in time
        for name, value in (ENVIRONMENT | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        message = rf"(?s)rank 3 of 4 could not join the others over gloo at 127.0.0.1:{port}: .+"
        with (
            pytest.raises(StartError, match=message),
            process_group(read_environment(), torch.device("cpu"), timeout=timedelta(seconds=1)),
        ):
            pass


@pytest.mark.parametrize(
    ("host", "rank", "line"),
    [
        ("127.0.0.1", 3, r"rank 3 of 4 is waiting for rank 0 at {at} and for the other ranks, for up to 1 s"),
        ("no.such.host.invalid", 3, r"rank 3 .* this machine knows no address of 'no.such.host.invalid' \(.+\)"),
        (
            "127.0.0.1",
            0,
            r"rank 0 of 4 is waiting at {at} for the other ranks, for up to 1 s \(MASTER_ADDR, MASTER_PORT",
        ),
    ],
)
def test_a_start_that_waits_names_whom_and_how_long(monkeypatch, capfd, host, rank, line):
    monkeypatch.setattr(rendezvous, "NOTICE", 0.1)
    with free_port() as port:
        for name, value in (ENVIRONMENT | {"MASTER_ADDR": host, "MASTER_PORT": port, "RANK": str(rank)}).items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(StartError, match=rf"rank {rank} of 4 could not join the others over gloo at {host}:{port}"),
            process_group(read_environment(), torch.device("cpu"), timeout=timedelta(seconds=1)),
        ):
            pass
    assert re.search(line.format(at=f"{host}:{port}"), capfd.readouterr().err)


def test_one_waits_for_another_longer_than_for_joining(monkeypatch):
    given = []
    monkeypatch.setattr(collectives, "start_store", lambda rank, size, timeout: given.append(timeout))
    monkeypatch.setattr(collectives.dist, "init_process_group", lambda *a, timeout, **k: given.append(timeout))
    monkeypatch.setattr(collectives.dist, "new_group", lambda backend, timeout: given.append(timeout))
    monkeypatch.setattr(collectives.dist, "destroy_process_group", lambda: None)
    short, long = timedelta(minutes=5), timedelta(days=7)
    for patience in (long, None):
        with process_group(World(0, 0, 2), torch.device("cpu"), timeout=short, patience=patience):
            pass
    assert given == [short, long, long, short, short, collectives.PATIENCE]


def test_alone_everything_is_itself():
    model = nn.Linear(2, 2)
    with process_group(World(), torch.device("cpu")):
        assert wrap(model, torch.device("cpu")) is model
        assert is_main()
        assert broadcast_from_rank0(lambda: 5) == 5
        assert run_on_all_ranks(lambda: 6) == 6
        assert all_gather_object(7) == [7]
        assert mean_over_ranks(torch.tensor([1.0, 3.0])).tolist() == [1.0, 3.0]
        collectives.barrier()


SCRIPT = """
import sys, time, torch
from datetime import timedelta
from jepa_kit.distributed.collectives import *
world = read_environment()
device = choose_device("cpu", world)
with process_group(world, device, timeout=timedelta(seconds=5)):
    assert is_main() == (world.rank == 0) == world.is_main
    assert all_gather_object(world.rank) == [0, 1]
    assert broadcast_from_rank0(lambda: time.sleep(7) or "late") == "late"  # longer than a step may wait
    assert mean_over_ranks(torch.tensor([float(world.rank)])).tolist() == [0.5]
    assert broadcast_from_rank0(lambda: f"from {world.rank}") == "from 0"
    def refuse():
        raise ValueError(f"refused by {world.rank}")
    try:
        broadcast_from_rank0(refuse)
    except ValueError as error:
        assert str(error) == "refused by 0"
    else:
        raise SystemExit("not refused")

    def refused(call, kind, text):
        try:
            call()
        except kind as error:
            assert text in str(error), error
        else:
            raise SystemExit("not refused")

    def fail(rank, error):
        def do():
            if world.rank == rank:
                raise error
            return world.rank
        return do

    # a kind that all share, one that only its own process can tell, one that pickle cannot carry
    unsent = OSError("no pickle")
    unsent.held = sys.stdout
    for rank, call in ((0, broadcast_from_rank0), (0, run_on_all_ranks), (1, run_on_all_ranks)):
        own = world.rank == rank
        refused(lambda: call(fail(rank, RuntimeError("shared"))), RuntimeError, "shared")
        peer = f"rank {rank} failed (KeyError); see its own message"
        refused(lambda: call(fail(rank, KeyError("own"))), KeyError if own else PeerError, "own" if own else peer)
        peer = f"rank {rank}: OSError: no pickle"
        refused(lambda: call(fail(rank, unsent)), OSError if own else PeerError, "no pickle" if own else peer)
    assert run_on_all_ranks(lambda: world.rank) == world.rank  # and they are in step
    torch.manual_seed(world.rank)  # DDP starts both from rank 0's weights, the frozen ones too
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 1), "b": torch.nn.Linear(2, 1).requires_grad_(False)})
    model.forward = lambda x: model["a"](x)
    wrapped = wrap(model, device)
    weights = torch.cat([p.flatten() for p in model.parameters()])
    assert torch.equal(mean_over_ranks(weights), weights.detach())
    wrapped(torch.full((1, 2), float(world.rank))).backward()
    assert model["a"].weight.grad.tolist() == [[0.5, 0.5]]  # the mean of 0 and 1
    barrier()
"""


@pytest.mark.integration
def test_two_processes(tmp_path, ranks):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(SCRIPT))
    ranks(2, script)


AGENT = """
import os, pathlib, time
import torch, torch.distributed as dist
from jepa_kit.distributed.collectives import process_group, read_environment, restarted

agent = os.environ["AGENT"]
first = not pathlib.Path(agent).exists()
pathlib.Path(agent).touch()
world = read_environment()
with process_group(world, torch.device("cpu")):
    dist.all_reduce(torch.ones(1))
    if first and agent == "A":
        os._exit(1)
    if first:
        time.sleep(600)  # as in a step; its agent ends it
    print(f"agent {agent}, count {os.environ['TORCHELASTIC_RESTART_COUNT']}: restarted {restarted()}")
"""


@pytest.mark.integration
@pytest.mark.parametrize("shared", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_two_agents_start_again(tmp_path, shared):
    """Only the one whose process died counts the restart; with torchrun's store over all starts, or without."""
    (tmp_path / "agent.py").write_text(AGENT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = shared
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-id=7", "--monitor-interval=0.1"]
    with free_port() as port:
        agents = [
            subprocess.Popen(
                [*command, f"--rdzv-endpoint=127.0.0.1:{port}", "agent.py"],
                cwd=tmp_path,
                env={**environment, "AGENT": name},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for name in "AB"
        ]
        try:
            printed = [agent.communicate(timeout=600)[0] for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert "agent A, count 1: restarted True" in printed[0]
    assert "agent B, count 0: restarted True" in printed[1]
