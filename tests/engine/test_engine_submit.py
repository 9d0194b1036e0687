import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jepa_kit
from jepa_kit.config import load_config
from jepa_kit.engine import submit as module
from jepa_kit.engine.job import Job
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.engine.submit import prepare, run_tool, submit, write_script

TOOL = Path(__file__).parents[2] / "tools" / "train_net.py"


def test_what_a_job_asks_for():
    job = Job(
        time="1-0",
        nodes=2,
        gpus_per_node=8,
        cpus_per_task=12,
        mem="500G",
        partition="gpu",
        account="lab",
        qos="high",
        constraint="h100",
        options={"exclusive": "", "mail-type": "END"},
    )
    assert job.processes == 16
    assert job.sbatch_options() == {
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "mem": "500G",
        "time": "1-0",
        "partition": "gpu",
        "account": "lab",
        "qos": "high",
        "constraint": "h100",
        "signal": "USR1@120",
        "requeue": "",
        "open-mode": "append",
        "exclusive": "",
        "mail-type": "END",
    }
    assert Job(time="5").processes == 1
    assert Job(time="5", nodes=3, gpus_per_node=4, tasks_per_node=2).processes == 6
    assert "gpus-per-node" not in Job(time="5").sbatch_options()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, r"nodes \(=0\) must be at least 1"),
        ({"tasks_per_node": 0}, r"tasks_per_node \(=0\) must be at least 1"),
        ({"gpus_per_node": -1}, r"gpus_per_node \(=-1\) must be at least 0"),
        ({"time": "soon"}, r"time \(='soon'\) must be minutes"),
        ({"time": "2"}, r"signal_seconds \(=120\) must be below the time limit \(=120 s\)"),
        ({"options": {"nodes": "4"}}, r"options \(=nodes\) are set by the job itself"),
        ({"options": {"signal": "TERM@5"}}, r"options \(=signal\) are set by the job itself"),
        ({"options": {"ntasks": "3"}}, r"options \(=ntasks\) are set by the job itself"),
        ({"options": {"": ""}}, r"options \(=''\) must have a name: NAME=VALUE, or NAME= for one without a value"),
    ],
)
def test_a_job_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Job(**{"time": "60", **options})


@pytest.fixture
def submission(tiny):
    def make(*overrides, job=None, **options):
        return prepare(tiny(*overrides), job or Job(time="60", tasks_per_node=2), tool=TOOL, **options)

    return make


def test_a_script_for_sbatch(submission, tmp_path):
    script = write_script(submission("train.seed=3", python_path=["/parts of mine"]))
    folder = tmp_path / "run" / "slurm"
    assert script == folder / "train.sbatch"
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert set(lines) >= {
        "#SBATCH --job-name=run",
        f"#SBATCH --output={folder}/%j.out",
        f"#SBATCH --chdir={Path.cwd()}",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --time=60",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --requeue",
        f"export PYTHONPATH='{Path(jepa_kit.__file__).parents[1]}:/parts of mine'${{PYTHONPATH:+:$PYTHONPATH}}",
    }
    assert lines[-1] == (
        f"srun --kill-on-bad-exit=1 {sys.executable} {TOOL} --config-file {folder}/config.yaml "
        f"--output-dir {tmp_path}/run --resume"
    )
    assert load_config(folder / "config.yaml").train.seed == 3
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_released_checkpoint_to_go_on_from(submission):
    assert submission(resume_from="weights.pth").command[-2:] == ("--resume", "weights.pth")


def test_a_run_is_checked_before_it_waits(submission, tiny, tmp_path):
    message = (
        r"train.batch_size \(=4\) must be divisible by the number of processes \(={}\) times train.accumulate \(={}\)"
    )
    with pytest.raises(ValueError, match=message.format(3, 1)):
        submission(job=Job(time="60", tasks_per_node=3))
    with pytest.raises(ValueError, match=message.format(2, 4)):
        submission("train.accumulate=4")
    for mode, tasks in (("fsdp", 1), ("none", 2)):
        with pytest.raises(
            ValueError, match=rf"train.parallel \(='{mode}'\) does not fit the job's processes \(={tasks}\)"
        ):
            submission(f"train.parallel={mode}", job=Job(time="60", tasks_per_node=tasks))
    with pytest.raises(ValueError, match=r"data.shards \(=None\) must name a folder of images or of shards to train"):
        submission("data.shards=null")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="already contains a run"):
        submission()
    assert submission(resume=True)


def test_without_submitit(submission, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs the package submitit: pip install 'jepa_kit\[slurm\]'; --submit sbatch-"
    ):
        submit(submission())


def test_without_slurm(submission, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="--submit slurm needs Slurm on this machine: there is no sbatch on the path"):
        submit(submission())


def test_a_job_that_sbatch_refuses(submission, tmp_path, monkeypatch):
    """A stand-in for sbatch, which submitit calls."""
    pytest.importorskip("submitit")
    for name in ("sbatch", "srun"):  # submitit looks for srun to know that Slurm is here
        (tmp_path / name).write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: nope' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"sbatch refused the job: (?s:.*)invalid partition specified: nope"):
        submit(submission(job=Job(time="60", partition="nope")))


def test_the_tool_runs_in_the_task_itself(tmp_path, monkeypatch):
    tool = tmp_path / "tool.py"
    tool.write_text(
        "import os, sys\nopen(sys.argv[1], 'w').write(f'{os.getpid()} {__name__}')\nsys.exit(int(sys.argv[2]))"
    )
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    run_tool((str(tool), str(tmp_path / "out"), "0"), ("/somewhere",))
    assert (tmp_path / "out").read_text() == f"{os.getpid()} __main__"
    assert sys.path[0] == "/somewhere"
    with pytest.raises(SystemExit) as stopped:
        run_tool((str(tool), str(tmp_path / "out"), "85"), ())
    assert stopped.value.code == 85


@pytest.mark.integration
def test_through_submitit_on_this_machine(submission, tmp_path, monkeypatch):
    """submitit's own executor for one machine, in place of Slurm."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = submit(submission("train.epochs=2", job=Job(time="5")), cluster="local")
    assert job.result() is None
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(6))


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs Slurm")
def test_what_submitit_hands_to_sbatch(submission, monkeypatch):
    submitit = pytest.importorskip("submitit")
    texts = []

    def keep(executor, command):
        texts.append(executor._make_submission_file_text(command, "x"))
        raise KeyboardInterrupt  # nothing is handed in

    monkeypatch.setattr(submitit.SlurmExecutor, "_submit_command", keep)
    with pytest.raises(KeyboardInterrupt):
        submit(submission(job=Job(time="1-0", nodes=2, tasks_per_node=1, partition="main", options={"exclusive": ""})))
    lines = texts[0].splitlines()
    assert set(lines) >= {
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --time=1-0",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --requeue",
        "#SBATCH --exclusive",
        "#SBATCH --partition=main",
        "#SBATCH --job-name=run",
        f"#SBATCH --chdir={Path.cwd()}",
    }
    assert next(line for line in lines if line.startswith("srun")).count("--kill-on-bad-exit=1") == 1
