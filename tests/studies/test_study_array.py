"""A study as a Slurm array, with stand-ins for sbatch and srun that run its tasks on this machine."""

import os
import subprocess

import pytest

from jepa_kit.engine.job import Job
from jepa_kit.studies.array import Array, submit_array, write_array
from jepa_kit.studies.jobs import open_jobs, state_of
from jepa_kit.studies.plan import plan_study
from jepa_kit.studies.records import read_record
from jepa_kit.tools import ablate

SBATCH = """#!/bin/bash
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
for k in $(seq 0 "$last"); do
    SLURM_ARRAY_TASK_ID=$k bash "$1" > "$1.$k.out" 2>&1
    echo "$k $?" >> "$1.status"
done
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "results", tmp_path / "runs"


def test_what_the_script_asks_for(write_study, folders):
    plan = plan_study(write_study())
    jobs = plan.jobs
    resources = Job(time="2:00:00", cpus_per_task=4, gpus_per_node=1, partition="gpu")
    script = write_array(plan, jobs, *folders, Array(resources, at_once=3))
    lines = script.read_text().splitlines()
    assert set(lines) >= {
        "#!/bin/bash",
        "#SBATCH --job-name=study",
        f"#SBATCH --array=0-{len(jobs) - 1}%3",
        f"#SBATCH --output={folders[1]}/jobs/%A_%a.out",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=2:00:00",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --requeue",
        *(f"    {folders[1]}/jobs/{job.id}.json" for job in jobs),
    }
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "#SBATCH --array=0-1" in write_array(plan, jobs[:2], *folders, Array(resources)).read_text().splitlines()


@pytest.mark.integration
def test_an_array_runs_what_is_open(slurm, write_study, folders, capsys, tmp_path):
    """One cell finishes, one is killed by a signal: both get a record, and nothing is left to submit."""
    (tmp_path / "fatal.py").write_text(
        "import os\n"
        "from jepa_kit.maskers.random import Random\n"
        "from jepa_kit.registry import MASKERS\n"
        "@MASKERS.register('fatal')\n"
        "class Fatal(Random):\n"
        "    def __call__(self, samples, *, seed, epoch, step):\n"
        "        if 'SLURM_ARRAY_TASK_ID' in os.environ:\n"
        "            os.abort()\n"
        "        return super().__call__(samples, seed=seed, epoch=epoch, step=step)\n"
    )
    arms = [{"name": "good"}, {"name": "fatal", "masker": {"name": "fatal", "ratio": 0.5}}]
    imports = {"imports": [str(tmp_path / "fatal.py")]}
    file = write_study(factors=None, arms=arms, seeds=[0], baselines=[], overrides=imports)
    options = [str(file), "--output", str(folders[0]), "--runs", str(folders[1])]
    assert ablate.main([*options, "--submit", "slurm", "--time", "10"]) == 0
    assert "Submitted batch job 7" in capsys.readouterr().out
    plan = plan_study(file)
    assert [state_of(job, *folders) for job in plan.jobs] == ["finished", "failed"]
    record = read_record(folders[0], plan.cells[1][0].id)
    assert record.reason == "its process ended with status 134; its output shows more"
    assert (folders[1] / "jobs" / "array.sbatch.status").read_text() == "0 0\n1 134\n"
    assert open_jobs(plan, *folders) == []
    assert ablate.main([*options, "--report"]) == 1
    assert "fatal, seed 0: failed" in capsys.readouterr().out


def test_a_script_to_read(write_study, folders, capsys):
    file = write_study(factors=None, arms=[{}], seeds=[0], baselines=[])
    options = [str(file), "--output", str(folders[0]), "--runs", str(folders[1])]
    assert ablate.main([*options, "--submit", "sbatch-script", "--time", "10"]) == 0
    assert "#SBATCH --array=0-0\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--at-once", "2"], "--at-once: only with --submit"),
        (["--time", "3"], "--time: only with --submit"),
        (["--submit", "slurm"], "--submit needs --time"),
        (["--submit", "slurm", "--time", "10", "--at-once", "0"], "--at-once (=0) must be at least 1"),
        (["--submit", "slurm", "--time", "10", "--sbatch", "array=1"], "--sbatch array= is set by the study"),
    ],
)
def test_options_that_do_not_fit(write_study, capsys, options, message):
    assert ablate.main([str(write_study()), *options]) == 2
    assert message in capsys.readouterr().err


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="--submit slurm needs Slurm on this machine: there is no sbatch on the path"):
        submit_array(tmp_path / "array.sbatch")


def test_a_job_that_sbatch_refuses(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="sbatch refused the job: invalid partition"):
        submit_array(tmp_path / "array.sbatch")
