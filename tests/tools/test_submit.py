"""tools/train_net.py --submit, without Slurm."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "train_net.py"

CONFIG = """\
masker: {name: multiblock}
encoder: {name: vit, embed_dim: 16, depth: 1, num_heads: 2, patch_size: 4}
predictor: {name: vit, width: 8, depth: 1, num_heads: 2}
target: {name: representation}
loss: {name: smooth_l1}
target_update: {name: ema}
data: {image_size: 16, shards: shards/mine}
optim: {warmup_epochs: 0}
train: {batch_size: 32, epochs: 2, output_dir: runs/first}
"""


@pytest.fixture(scope="module")
def tool():
    return importlib.import_module("jepa_kit.tools.train_net")


@pytest.fixture
def run(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    return lambda *arguments: tool.main(["--config-file", "tiny.yaml", *arguments])


def test_a_script(run, tmp_path, capsys):
    options = ["--nodes", "2", "--gpus-per-node", "8", "--time", "1-0", "--sbatch", "exclusive=", "--sbatch", "nice=5"]
    assert run("--submit", "sbatch-script", *options, "train.seed=4") == 0
    script = tmp_path / "runs" / "first" / "slurm" / "train.sbatch"
    text = script.read_text()
    printed = capsys.readouterr().out
    assert printed.startswith(text)
    assert printed.endswith(f"written to {script}; to submit it:\n  sbatch {script}\n")
    for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1-0", "--exclusive", "--nice=5"):
        assert f"#SBATCH {line}\n" in text
    assert "seed: 4" in (script.parent / "config.yaml").read_text()


def test_through_submitit(run, tool, tmp_path, monkeypatch, capsys):
    submissions = []

    def submit(submission):
        submissions.append(submission)
        return SimpleNamespace(job_id="17", paths=SimpleNamespace(stdout="run.out"))

    monkeypatch.setattr(tool, "submit", submit)
    assert run("--submit", "slurm", "--tasks-per-node", "4", "--time", "30") == 0
    assert capsys.readouterr().out == "job 17: first, 4 processes on 1 node(s)\noutput: run.out\n"
    assert submissions[0].job.processes == 4
    assert submissions[0].command[0] == str(TOOL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2", "--sbatch", "nice=5"], "--nodes, --sbatch: only with --submit"),
        (["--submit", "slurm"], "--submit needs --time, the time limit of the job: the run saves before it"),
        (
            ["--submit", "slurm", "--time", "x"],
            "time (='x') must be minutes, hours:minutes:seconds or days-hours:minutes",
        ),
        (
            ["--submit", "slurm", "--time", "9", "--nodes", "3"],
            "train.batch_size (=32) must be divisible by the number of processes (=3)",
        ),
        (["--submit", "slurm", "--time", "9", "train.epohs=3"], "train.epohs is not"),
        (
            ["--submit", "slurm", "--time", "9", "data.shards=null"],
            "data.shards (=None) must name a folder of images or of shards",
        ),
    ],
)
def test_mistakes_are_reported_before_submission(run, capsys, arguments, message):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_folder_that_holds_a_run(run, capsys):
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/metrics.jsonl").touch()
    assert run("--submit", "sbatch-script", "--time", "9") == 2
    assert "already contains a run" in capsys.readouterr().err
    assert run("--submit", "sbatch-script", "--time", "9", "--resume") == 0
