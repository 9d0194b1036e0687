"""tools/train_net.py as a user meets it: examples, messages and exit statuses."""

import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jepa_kit.data.loader import _TrainBatches
from jepa_kit.data.shards.writing import Sample, write_index, write_shard
from jepa_kit.distributed.signals import Preempted
from jepa_kit.engine import step as update
from jepa_kit.engine import train as training
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.errors import CacheError, StartError
from jepa_kit.interop.formats import convert

TOOL = Path(__file__).parents[2] / "tools" / "train_net.py"

CONFIG = """\
masker: {name: multiblock}
encoder: {name: vit, embed_dim: 16, depth: 1, num_heads: 2, patch_size: 4}
predictor: {name: vit, width: 8, depth: 1, num_heads: 2}
target: {name: representation}
loss: {name: smooth_l1}
target_update: {name: ema}
data: {image_size: 16, num_workers: 0}
optim: {warmup_epochs: 0}
train: {batch_size: 4, epochs: 2, precision: float32, log_every: 1, device: cpu}
"""


@pytest.fixture(scope="module")
def tool():
    return importlib.import_module("jepa_kit.tools.train_net")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    samples = []
    for number in range(8):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (number * 30, 100, 200 - number * 20)).save(buffer, "PNG")
        samples.append(Sample(str(number), "png", buffer.getvalue()))
    shard, rows = write_shard(str(folder / "shard-000000.tar"), samples)
    write_index(str(folder), [shard], [rows], classes={}, refused=[], made_by={})
    return folder


@pytest.fixture
def command(tmp_path, shards):
    """The arguments of a tiny run into tmp_path/run."""
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG)
    return ["--config-file", str(file), "--output-dir", str(tmp_path / "run"), f"data.shards={shards}"]


@pytest.fixture
def refused(tool, capsys):
    """Runs the tool, which must fail with the status, without a traceback; its message."""

    def run(status, *arguments):
        assert tool.main(list(arguments)) == status
        message = capsys.readouterr().err
        assert message.startswith("train_net.py")
        assert "Traceback" not in message
        return message

    return run


def test_help_has_examples(tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:\n  # shards first" in printed
    assert "torchrun --nproc-per-node 8 tools/train_net.py" in printed


def test_without_a_config_file(tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main([])
    assert stopped.value.code == 2
    assert "the following arguments are required: --config-file" in capsys.readouterr().err


@pytest.mark.integration
def test_runs_from_any_directory(command, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, str(TOOL), *command],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"done: {tmp_path / 'run'}\n")
    assert list(elsewhere.iterdir()) == []


def test_overrides_may_stand_anywhere(tool, command, tmp_path):
    assert tool.main(["train.epochs=1", *command, "optim.lr=2e-3", "--resume"]) == 0
    assert [line["lr"] for line in read_metrics(tmp_path / "run")] == pytest.approx([1e-3, 1e-6], rel=1e-2)


def test_resume_before_an_override(tool, command, tmp_path):
    """What follows --resume is a file only if it does not look like key=value."""
    assert tool.main([*command, "--resume", "train.epochs=1"]) == 0
    assert len(read_metrics(tmp_path / "run")) == 2


def test_a_released_checkpoint_to_go_on_from(tool, command, refused, tmp_path, capsys):
    assert tool.main(command) == 0
    run = tmp_path / "run"
    convert(run / "checkpoint_00000002.pt", tmp_path / "epoch1.pth.tar", to="official")
    shutil.rmtree(run)
    assert tool.main([*command, "--resume", str(tmp_path / "epoch1.pth.tar")]) == 0
    assert [line["step"] for line in read_metrics(run)] == [2, 3]
    assert "after 1 epochs, step 2" in capsys.readouterr().out
    command[3] = str(tmp_path / "other")
    assert "there is no file nothing.pth.tar" in refused(2, *command, "--resume", "nothing.pth.tar")


def test_a_run_folder_goes_on_where_it_is(tool, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command[3] = "a run's folder"  # relative, and not plain in YAML
    assert tool.main(command) == 0
    monkeypatch.chdir("/")
    folder = tmp_path / "a run's folder"
    (folder / "checkpoint_00000004.pt").unlink()
    assert tool.main(["--config-file", str(folder), "--resume"]) == 0
    assert (folder / "checkpoint_00000004.pt").exists()
    assert [line["step"] for line in read_metrics(folder)] == [0, 1, 2, 3]


def test_mistakes_in_a_config_are_listed(refused, command):
    message = refused(2, *command, "masker.num_targts=3", "train.epochs=many")
    assert "masker.num_targts is not an option of 'multiblock'; did you mean 'num_targets'?" in message
    assert "train.epochs" in message


def test_a_config_file_that_is_not_there(refused):
    assert "'/none.yaml' does not exist" in refused(2, "--config-file", "/none.yaml")


def test_no_data(refused, command):
    assert "data.shards (=None) must name a folder of images or of shards to train" in refused(
        2, *command, "data.shards=null"
    )


def test_a_folder_that_holds_a_run(tool, refused, command):
    assert tool.main([*command, "train.epochs=1"]) == 0
    assert "already contains a run (checkpoint_00000002.pt): give --resume" in refused(2, *command)
    assert "has another config, so it cannot be resumed:\n  train.epochs: 1 in" in refused(2, *command, "--resume")


def test_an_output_folder_that_is_a_file(refused, command, tmp_path):
    (tmp_path / "run").write_text("")
    assert "must be a folder, but it is a file" in refused(2, *command)


def test_a_place_that_cannot_hold_checkpoints(refused, command):
    message = refused(2, *command, "checkpoint.dir=https://example.invalid/x")
    assert "https://example.invalid/x cannot be listed: its handler cannot do that" in message


def test_a_checkpoint_cut_short(tool, refused, command, tmp_path):
    assert tool.main(command) == 0
    path = tmp_path / "run" / "checkpoint_00000004.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert "checkpoint_00000004.pt (1000 bytes) is cut short: its end is missing" in refused(2, *command, "--resume")


def test_a_run_that_diverges(refused, command):
    assert "the loss is nan at step 1 (lr 5e+29" in refused(1, *command, "optim.lr=1e30")


@pytest.fixture
def cut(shards, tmp_path):
    """The shards of ``command``, of which the last image is cut off."""
    folder = shutil.copytree(shards, tmp_path / "cut")
    with (folder / "shard-000000.tar").open("r+b") as file:
        file.truncate(int(np.load(folder / "offsets.npy")[-1, 0]) + 10)
    return folder


def test_too_many_images_that_cannot_be_used_are_no_mistake_of_the_command(refused, command, cut):
    message = refused(1, *command, f"data.shards={cut}", "data.max_skipped=0")
    assert (
        "1 of the 8 samples of epoch 0 could not be used, more than the 0 that data.max_skipped (=0) allows" in message
    )


def test_what_fails_under_way_is_told_with_its_place(command, tool, monkeypatch, capsys):
    """Here the folder of shards from elsewhere, which is full; before the first step it would be status 2."""

    def full(*arguments, **options):
        raise CacheError("the cache takes no more")

    monkeypatch.setattr(update, "train_step", full)
    assert tool.main(command) == 1
    message = capsys.readouterr().err
    assert message.startswith("Traceback")
    assert message.endswith(
        'in full\n    raise CacheError("the cache takes no more")\njepa_kit.errors.CacheError: '
        "the cache takes no more\ntrain_net.py: the cache takes no more\n"
    )
    monkeypatch.setattr(training, "build_run", full)
    command[3] += "_other"
    assert tool.main(command) == 2
    assert capsys.readouterr().err == "train_net.py: the cache takes no more\n"


def test_a_loader_worker_that_dies(command, tool, monkeypatch, capsys):
    def die(self, request):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(_TrainBatches, "__getitem__", die)
    assert tool.main([*command, "data.num_workers=1"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train_net.py: a loader worker died (DataLoader worker (pid")


def test_processes_that_cannot_join(refused, command, tool, monkeypatch):
    def no_one(config, *, resume, resume_from):
        raise StartError("rank 1 of 2 could not join the others")

    monkeypatch.setattr("jepa_kit.training.train", no_one)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(1, *command) == "train_net.py (rank 1): rank 1 of 2 could not join the others\n"


@pytest.mark.parametrize(
    ("number", "rank", "fails", "status", "queued", "message"),
    [
        (
            signal.SIGUSR1,
            0,
            None,
            75,
            True,
            "stopped by SIGUSR1 after 12 steps; the checkpoint is written, and --resume continues it",
        ),
        (signal.SIGTERM, 0, None, 75, False, "stopped by SIGTERM after 12 steps"),  # perhaps of scancel
        (signal.SIGHUP, 0, None, 75, False, "stopped by SIGHUP after 12 steps"),
        (signal.SIGINT, 0, None, 130, False, "stopped by SIGINT after 12 steps"),
        (signal.SIGUSR1, 1, None, 75, False, "stopped by SIGUSR1 after 12 steps"),  # rank 0 does it
        (signal.SIGUSR1, 0, "no scontrol", 1, True, "and --resume continues it, but no scontrol"),
    ],
)
def test_a_stop_under_slurm(tool, command, capsys, monkeypatch, number, rank, fails, status, queued, message):
    asked = []

    def train(config, *, resume, resume_from):
        raise Preempted(number, 12)

    def requeue():
        asked.append(True)
        if fails:
            raise RuntimeError(fails)
        return "job 7 is requeued"

    monkeypatch.setattr("jepa_kit.training.train", train)
    monkeypatch.setattr(tool, "requeue", requeue)
    monkeypatch.setenv("RANK", str(rank))
    assert tool.main(command) == status
    printed = capsys.readouterr()
    assert message in printed.err
    assert bool(asked) == queued
    assert printed.out == ("job 7 is requeued\n" if queued and not fails else "")


def test_an_interruption(refused, command, tool, monkeypatch, tmp_path):
    def interrupted(config, *, resume, resume_from):
        raise KeyboardInterrupt

    monkeypatch.setattr("jepa_kit.training.train", interrupted)
    command = [*command, "--output-dir", str(tmp_path / "new")]
    assert refused(130, *command) == "train_net.py: interrupted; no checkpoint is there\n"
    (tmp_path / "new").mkdir()
    for step in (900, 1000):
        (tmp_path / f"new/checkpoint_{step:08}.pt").touch()
    message = "train_net.py: interrupted; --resume continues at step 1,000, its latest checkpoint\n"
    assert refused(130, *command) == message
    message = "train_net.py: interrupted; --resume continues from the latest checkpoint in file://there\n"
    assert refused(130, *command, "checkpoint.dir=file://there") == message
