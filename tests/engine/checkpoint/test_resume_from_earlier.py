"""``--resume FILE`` goes back once, however often the command is started, and no FILE is ignored silently."""

import pytest
import torch

from jepa_kit.engine import step as update
from jepa_kit.engine.checkpoint.async_save import write_archive
from jepa_kit.engine.checkpoint.format import checkpoint_path, checkpoints
from jepa_kit.engine.job import Job
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.engine.submit import prepare
from jepa_kit.errors import CheckpointError
from jepa_kit.interop.formats import convert
from jepa_kit.training import train


@pytest.fixture
def config(tiny):
    return tiny("checkpoint.every=1", "checkpoint.keep=9", "train.tensorboard=false")


@pytest.fixture
def run(config):
    return train(config)


@pytest.fixture
def dies_at(monkeypatch):
    """Interrupt the next start of a run after some steps."""
    plain = update.train_step

    def make(count):
        def step(*arguments, **options):
            nonlocal count
            count -= 1
            if count < 0:
                raise KeyboardInterrupt
            return plain(*arguments, **options)

        monkeypatch.setattr(update, "train_step", step)

    return make


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint_*"))


@pytest.mark.parametrize("counter", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_the_same_command_started_again_goes_on(config, run, dies_at, monkeypatch, capsys, counter):
    back = str(run / "checkpoint_00000002.pt")
    monkeypatch.setenv(counter, "0")
    dies_at(2)
    with pytest.raises(KeyboardInterrupt):
        train(config, resume=True, resume_from=back)
    assert "resumed at step 2\nset aside: checkpoint_00000003.pt" in capsys.readouterr().out
    monkeypatch.setenv(counter, "1")
    dies_at(9)
    train(config, resume=True, resume_from=back)
    printed = capsys.readouterr().out
    assert (
        "note: the run was resumed from checkpoint_00000002.pt before; this start resumes from the latest\n" in printed
    )
    assert "resumed at step 4\n" in printed
    assert "set aside" not in printed
    assert [line["step"] for line in read_metrics(run)] == list(range(6))


def test_a_first_start_that_died_before_it_went_back(config, run, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    train(config, resume=True, resume_from=str(run / "checkpoint_00000002.pt"))
    assert "resumed at step 2\nset aside: checkpoint_00000003.pt" in capsys.readouterr().out


def test_a_job_goes_back_when_it_is_handed_in(config, run, tmp_path, capsys):
    capsys.readouterr()
    back = str(run / "checkpoint_00000004.pt")
    command = prepare(config, Job(time="60"), tool=tmp_path / "tool.py", resume=True, resume_from=back).command
    assert command[-1] == "--resume"
    assert capsys.readouterr().out == "set aside: checkpoint_00000005.pt\nset aside: checkpoint_00000006.pt\n"
    assert [path.name for path in checkpoints(run)][-1] == "checkpoint_00000004.pt"
    assert "checkpoint_00000006.pt.set_aside" in names(run)


@pytest.mark.parametrize(
    "named", ["checkpoint_00000002.pt", "nothing/at/all.pth", "other/checkpoint_00000002.pt", "run/{}.set_aside"]
)
def test_a_file_that_is_not_of_the_run(config, run, tmp_path, named, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = named.format("checkpoint_00000005.pt")
    before = names(run)
    message = (
        rf"--resume \(='{named}'\) is not a checkpoint of the run in .*run, which has: checkpoint_00000001.pt, .*06.pt"
        r". "
        "--resume alone resumes from the latest"
    )
    with pytest.raises(ValueError, match=message):
        train(config, resume=True, resume_from=named)
    assert names(run) == before


def test_the_file_that_the_run_began_from(config, run, tiny, tmp_path, capsys):
    """The command of a job names the file at every start."""
    released = tmp_path / "epoch1.pth.tar"
    convert(run / "checkpoint_00000003.pt", released, to="official")
    other = tiny(f"train.output_dir={tmp_path / 'other'}", "checkpoint.every=1", "train.tensorboard=false")
    folder = train(other, resume=True, resume_from=str(released))
    (folder / "checkpoint_00000006.pt").unlink()
    for _ in range(2):  # the second from a checkpoint of the first
        capsys.readouterr()
        train(other, resume=True, resume_from=str(released))
        assert f"note: {released} is where the run began; it resumes from its latest checkpoint\n" in (
            capsys.readouterr().out
        )
    message = r"is not a checkpoint of the run .*; nor is it what the run began from \(epoch1.pth.tar\)"
    with pytest.raises(ValueError, match=message):
        train(other, resume=True, resume_from="epoch2.pth.tar")


@pytest.mark.parametrize(("name", "step"), [(99, 6), (6, 5), (99, 99)])
def test_a_checkpoint_of_another_step_than_its_name(config, run, name, step):
    path = checkpoint_path(run, 6)
    content = torch.load(path, weights_only=True)
    path.unlink()
    write_archive(content | {"step": step}, checkpoint_path(run, name))
    message = (
        rf"checkpoint_0*{name}.pt contains step {step}, which is not that of its name, or is after the run's last "
        r"\(=6\); "
        "the last good one is checkpoint_00000005.pt"
    )
    with pytest.raises(CheckpointError, match=message):
        train(config, resume=True)
