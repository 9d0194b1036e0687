"""Boards against what TensorBoard itself reads, and against the calls that wandb is made of."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jepa_kit.engine.logging import loggers
from jepa_kit.engine.logging.loggers import check_loggers, open_loggers, tag
from jepa_kit.engine.logging.telemetry import Journal


def line(step, loss):
    return {
        "step": step,
        "epoch": 0,
        "samples": 8 * (step + 1),
        "loss": loss,
        "lr": 1e-3,
        "momentum": 1.0,
        "images_per_second": 1.0,
        "data_wait": 0.0,
        "online/knn": 50.0,
    }


def write(folder, steps, loss, **options):
    options = {"tensorboard": False, "wandb": None, "config": {"a": 1}} | options
    opened = open_loggers(folder, first_step=steps[0], **options)
    with Journal(folder, first_step=steps[0], steps=20, bar=False, loggers=opened) as journal:
        for step in steps:
            journal.write(line(step, loss))


def test_names():
    assert [tag(name) for name in ("loss", "loss/l2", "lr", "tflops", "epoch", "online/knn")] == [
        "loss/total",
        "loss/l2",
        "optim/lr",
        "speed/tflops",
        "run/epoch",
        "online/knn",
    ]


def test_tensorboard_reads_no_step_twice(tmp_path):
    write(tmp_path, range(6), loss=1.0, tensorboard=True)
    write(tmp_path, range(4, 8), loss=2.0, tensorboard=True)  # resumed from a checkpoint after step 3
    read = EventAccumulator(str(tmp_path / loggers.TENSORBOARD))
    read.Reload()
    losses = [(event.step, event.value) for event in read.Scalars("loss/total")]
    assert losses == [*((step, 1.0) for step in range(4)), *((step, 2.0) for step in range(4, 8))]
    assert len(read.Scalars("online/knn")) == 8
    assert "run/step" not in read.Tags()["scalars"]


def test_a_line_is_on_the_disk_before_the_next(tmp_path):
    """A process that is killed has lost none."""
    (logger,) = open_loggers(tmp_path, first_step=0, tensorboard=True, wandb=None, config={})
    for step in range(3):
        logger.write(line(step, 1.0))
        read = EventAccumulator(str(tmp_path / loggers.TENSORBOARD))
        read.Reload()
        assert len(read.Scalars("loss/total")) == step + 1
    logger.close()


class Wandb:
    """Stands for the package: one server, runs by id; as the real one, it takes no step below a run's last."""

    def __init__(self):
        self.runs, self.calls = {}, []

    def init(self, *, id, **options):
        self.calls.append((id, options))
        run = self.runs.setdefault(id or "abc", SimpleNamespace(id=id or "abc", steps=[], finish=lambda: None))

        def log(values, step):
            assert "step" not in values
            if step not in run.steps:
                run.steps.append(step)

        run.log = log
        return run


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    package = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(loggers, "check_loggers", lambda **options: None)
    write(tmp_path, range(3), loss=1.0, wandb="ijepa")
    write(tmp_path, range(2, 5), loss=1.0, wandb="ijepa")
    assert [call[0] for call in package.calls] == [None, "abc"]
    options = {"project": "ijepa", "name": tmp_path.name, "dir": str(tmp_path), "config": {"a": 1}, "resume": "allow"}
    assert package.calls[1][1] == options
    assert package.runs["abc"].steps == [0, 1, 2, 3, 4]


def test_a_logger_without_its_package(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    check_loggers(tensorboard=False, wandb=None)
    with pytest.raises(ValueError, match=r"train.tensorboard \(=True\) needs the package tensorboard: pip install"):
        check_loggers(tensorboard=True, wandb=None)
    with pytest.raises(
        ValueError, match=r"train.wandb \(='x'\) needs the package wandb: pip install 'jepa_kit\[wandb\]'"
    ):
        check_loggers(tensorboard=False, wandb="x")
