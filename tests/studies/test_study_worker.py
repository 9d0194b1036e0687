"""The process of one cell: signals outside of training, several processes, and cells that collapse."""

import json
import os
import signal

import pytest

from jepa_kit.studies import worker
from jepa_kit.studies.jobs import job_file, state_of
from jepa_kit.studies.plan import plan_study
from jepa_kit.studies.records import read_record
from jepa_kit.studies.summary import summarize


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "results", tmp_path / "runs"


@pytest.fixture
def one_cell(write_study, folders):
    """Makes the plan of one arm with one seed, and the file of its job."""

    def make(config=None, **changes):
        plan = plan_study(write_study(config, factors=None, arms=[{}], seeds=[0], baselines=[], **changes))
        return plan, job_file(plan, plan.cells[0][0], *folders)

    return make


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_during_an_evaluation_is_no_failure(one_cell, folders, monkeypatch, number, capsys, tmp_path):
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" > "$0.called"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setattr(worker, "train_to_the_end", lambda config, steps: None)
    monkeypatch.setattr(worker, "evaluate_job", lambda *_: os.kill(os.getpid(), number))
    plan, file = one_cell()
    before = signal.getsignal(number)
    assert worker.main([str(file)]) == 75
    assert signal.getsignal(number) == before
    assert f"stopped by {signal.Signals(number).name}" in capsys.readouterr().out
    assert read_record(folders[0], plan.cells[0][0].id) is None
    called = tmp_path / "scontrol.called"
    assert called.exists() == (number == signal.SIGUSR1)
    assert number != signal.SIGUSR1 or called.read_text() == "requeue 41\n"


def test_an_error_keeps_what_was_measured_before(one_cell, folders, monkeypatch):
    plan, file = one_cell()
    job = plan.cells[0][0]
    assert worker.main([str(file)]) == 0
    good = read_record(folders[0], job.id)
    content = json.loads(file.read_text())
    content["evaluations"].append({"id": "another", "spec": {"name": "nothing"}, "layers": "last"})
    file.write_text(json.dumps(content))
    assert worker.main([str(file)]) == 1
    bad = read_record(folders[0], job.id)
    assert bad.state == "failed"
    assert "'nothing' is not a registered protocol" in bad.reason
    assert (bad.rows, bad.training, bad.health) == (good.rows, good.training, good.health)


def test_a_collapsed_cell_keeps_its_figures_and_says_why(one_cell, folders, monkeypatch):
    """Targets with a gradient make all tokens equal."""
    config = {
        "target_update": {"name": "tied", "stop_gradient": False},
        "optim": {"warmup_epochs": 0, "lr": 0.05, "start_lr": 0.05},
        "train": {"batch_size": 8, "epochs": 1, "steps_per_epoch": 60, "device": "cpu", "tensorboard": False},
    }
    plan, file = one_cell(config)
    assert worker.main([str(file)]) == 0
    record = read_record(folders[0], plan.cells[0][0].id)
    assert record.collapsed
    assert state_of(plan.cells[0][0], *folders) == "finished"
    summary = summarize(plan, folders[0])
    assert len(summary.arms[0].figures) == 2
    assert summary.arms[0].notes == [f"base, seed 0: {record.reason}"]
    assert record.reason.startswith(f"{record.health['state']}: ")


@pytest.mark.slow
def test_a_cell_of_two_processes(one_cell, folders, torchrun, tmp_path):
    plan, file = one_cell()
    (tmp_path / "go.py").write_text("import sys; from jepa_kit.studies.worker import main; sys.exit(main())")
    torchrun(2, tmp_path / "go.py", file)
    record = read_record(folders[0], plan.cells[0][0].id)
    assert record.state == "finished"
    assert [len(rows) for rows in record.rows.values()] == [2]
