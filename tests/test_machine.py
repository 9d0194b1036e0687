"""Cores that a process may use, by affinity and cgroup, and the environment that tools set before torch is imported."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_kit import machine
from jepa_kit.machine import affinity, cgroup_limit, cores_of_rank, prepare, usable_cores

ROOT = Path(__file__).parents[1]


def files(root, **contents):
    for name, text in contents.items():
        path = root / name.replace("__", "/").replace("cpu_", "cpu.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("contents", "limit"),
    [
        ({}, math.inf),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_max": "max 100000\n"}, math.inf),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_max": "250000 100000\n"}, 2.5),
        # a parent's limit counts too, and a path that is not there (a container's) leaves the base
        (
            {
                "proc__self__cgroup": "0::/a/b\n",
                "sys__fs__cgroup__a__cpu_max": "300000 100000\n",
                "sys__fs__cgroup__a__b__cpu_max": "max 100000\n",
            },
            3.0,
        ),
        ({"proc__self__cgroup": "0::/gone\n", "sys__fs__cgroup__cpu_max": "50000 100000\n"}, 0.5),
        (
            {
                "proc__self__cgroup": "5:cpuset:/x\n4:cpu,cpuacct:/job\n",
                "sys__fs__cgroup__cpu__job__cpu_cfs_quota_us": "400000\n",
                "sys__fs__cgroup__cpu__job__cpu_cfs_period_us": "100000\n",
            },
            4.0,
        ),
        (
            {
                "proc__self__cgroup": "4:cpu:/\n",
                "sys__fs__cgroup__cpu__cpu_cfs_quota_us": "-1\n",
                "sys__fs__cgroup__cpu__cpu_cfs_period_us": "100000\n",
            },
            math.inf,
        ),
    ],
)
def test_limits_of_cgroups(tmp_path, contents, limit):
    assert cgroup_limit(files(tmp_path, **contents)) == limit


def test_cores_are_the_least_of_affinity_and_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "affinity", lambda: 8)
    assert usable_cores(tmp_path) == 8
    files(tmp_path, proc__self__cgroup="0::/\n", sys__fs__cgroup__cpu_max="250000 100000\n")
    assert usable_cores(tmp_path) == 3
    files(tmp_path, sys__fs__cgroup__cpu_max="10000 100000\n")
    assert usable_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({}, 16),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_WORLD_SIZE": "64"}, 1),
        ({"SLURM_CPUS_PER_TASK": "6"}, 6),
        ({"SLURM_CPUS_PER_TASK": "32"}, 16),
        ({"LOCAL_WORLD_SIZE": "", "SLURM_CPUS_PER_TASK": "x"}, 16),
    ],
)
def test_cores_of_a_rank(monkeypatch, variables, cores):
    monkeypatch.setattr(machine, "usable_cores", lambda: 16)
    assert cores_of_rank(variables) == cores


def test_the_environment_is_the_users_first(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.setattr(machine, "affinity", lambda: 16)
    found = {}
    prepare(found)
    assert found == {
        "OMP_NUM_THREADS": "4",
        "GOMP_SPINCOUNT": machine.SPINS,
        "KMP_BLOCKTIME": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    own = {"OMP_NUM_THREADS": "9", "OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}
    found = dict(own)
    prepare(found)
    assert found == own
    monkeypatch.setattr(machine, "affinity", lambda: 4)
    found = {}
    prepare(found)
    assert "OMP_NUM_THREADS" not in found


@pytest.mark.integration
@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_prepares_before_torch(tool):
    """torch must not be imported while the variables are unset."""
    script = (
        "import importlib.abc, importlib.util, os, sys\n"
        "class Watch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        assert name != 'torch' or 'GOMP_SPINCOUNT' in os.environ\n"
        "        if name == 'torch': print('READY'); sys.stdout.flush(); os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import tools.{tool}\n"
        "print('READY' if 'GOMP_SPINCOUNT' in os.environ else 'unset')\n"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = kept | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout == "READY\n", done.stderr


def test_this_machine():
    assert 1 <= usable_cores() <= affinity() <= (os.cpu_count() or 1)
