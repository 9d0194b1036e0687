import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from ranks import free_port

from jepa_kit.distributed.slurm import PORTS, first_host, minutes, torchrun_variables

TASK = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}


def test_a_task_of_several():
    found = torchrun_variables(TASK)
    port = int(found.pop("MASTER_PORT"))
    assert found == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu003"}
    assert port in PORTS
    # Every task of the step gets the same, another step and another job another one.
    assert torchrun_variables(TASK | {"SLURM_PROCID": "0"})["MASTER_PORT"] == str(port)
    others = [TASK | {"SLURM_STEP_ID": "1"}, TASK | {"SLURM_JOB_ID": "1235"}]
    assert str(port) not in [torchrun_variables(other)["MASTER_PORT"] for other in others]


def test_where_to_meet_may_be_given():
    found = torchrun_variables(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4242"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "4242")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # a shell of salloc
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},  # a batch script of one task
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_one_process(environment):
    assert torchrun_variables(environment) == {}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
            r"Slurm's job has 8 tasks \(SLURM_NTASKS\), but this process was started without srun and would",
        ),
        (
            TASK | {"SLURM_PROCID": ""},
            r"SLURM_PROCID \(=''\) must be a whole number: Slurm sets it for each task of srun",
        ),
        (TASK | {"SLURM_STEP_NUM_TASKS": "x"}, r"SLURM_STEP_NUM_TASKS \(='x'\) must be a whole number"),
        (
            TASK | {"SLURM_STEP_NODELIST": ""},
            r"SLURM_STEP_NODELIST \(=''\) must name the nodes of this step, or MASTER_ADDR",
        ),
    ],
)
def test_a_broken_environment(environment, message):
    with pytest.raises(ValueError, match=message):
        torchrun_variables(environment)


LISTS = {
    "a": "a",
    "a,b": "a",
    "gpu[003-007,012],cpu1": "gpu003",
    "n[5]": "n5",
    "n[9,12]": "n9",
    "rack[1-2]node[0-3,8]": "rack1node0",
    "a.b-c.org,n[1-2]": "a.b-c.org",
}


@pytest.mark.parametrize(("nodes", "host"), LISTS.items())
def test_the_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs Slurm")
@pytest.mark.parametrize("nodes", LISTS)
def test_the_first_host_is_slurms(nodes):
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == first_host(nodes)


def test_no_host():
    with pytest.raises(ValueError, match=r"nodes \(=''\) must be a list of hosts as Slurm writes it"):
        first_host("")


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 90),
        ("90:00", 90),
        ("0:30", 1),
        ("1:30:00", 90),
        ("1:30:01", 91),
        ("3-0", 4320),
        ("3-12:30", 5070),
        ("1-00:00:59", 1441),
    ],
)
def test_times(time, expected):
    """As in Slurm's manual of sbatch, --time; rounded up."""
    assert minutes(time) == expected


@pytest.mark.parametrize("time", ["", "0", "0:00", "1d", "1:2:3:4", "-5", "2-", "1.5"])
def test_times_that_are_none(time):
    with pytest.raises(
        ValueError, match=r"time \(='.*'\) must be minutes, hours:minutes:seconds or days-hours:minutes"
    ):
        minutes(time)


SCRIPT = """
    import torch
    import torch.distributed as dist
    from jepa_kit.distributed.collectives import process_group, read_environment

    world = read_environment()
    with process_group(world, torch.device("cpu")):
        total = torch.tensor(float(world.rank + 1))
        dist.all_reduce(total)
        print(world.rank, world.size, total.item())
"""


@pytest.mark.integration
def test_two_tasks_meet_without_torchrun(tmp_path):
    """With the variables that srun sets, and no Slurm."""
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(SCRIPT))
    common = TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    common |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with free_port() as port:
        tasks = [
            subprocess.Popen(
                [sys.executable, str(script)],
                env=common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "MASTER_PORT": port},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        printed = [task.communicate(timeout=600) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], printed
    assert [out.split() for out, _ in printed] == [["0", "2", "3.0"], ["1", "2", "3.0"]]
