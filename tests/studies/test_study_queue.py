"""Studies that run: in the local queue, with failures, kills and resumption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.studies.jobs import JOBS, done_steps, job_file, open_jobs, state_of, totals
from jepa_kit.studies.local import LOCK, _Worker, make_queue
from jepa_kit.studies.plan import plan_study
from jepa_kit.studies.records import Record, read_record, record_file, write_record
from jepa_kit.studies.worker import main as work
from jepa_kit.tools import ablate

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folders(tmp_path):
    """Folders of results and of runs."""
    return tmp_path / "results", tmp_path / "runs"


def command(file, folders, *options):
    return [str(file), "--output", str(folders[0]), "--runs", str(folders[1]), *options]


@pytest.mark.slow
def test_the_second_call_runs_nothing(write_study, folders, capsys):
    one = {"factors": None, "arms": [{}, {"masker": {"ratio": 0.25}}], "baselines": ["pixels"], "seeds": [0]}
    file = write_study(**one)
    assert ablate.main(command(file, folders)) == 0
    first = capsys.readouterr()
    assert "3 jobs, 0 of them done" in first.out
    assert first.err.count("finished") == 3
    results, runs = folders
    before = {path: path.stat().st_mtime_ns for path in (results / "cells").iterdir()}
    assert len(before) == 3
    assert ablate.main(command(file, folders)) == 0
    second = capsys.readouterr()
    assert "3 jobs, 3 of them done" in second.out
    assert "starts" not in second.err
    assert before == {path: path.stat().st_mtime_ns for path in (results / "cells").iterdir()}
    assert {path.name for path in results.iterdir()} >= {"report.md", "report.csv", "report.json", "data.json"}
    assert {path.name for path in results.iterdir()} >= {"cost.png", "cost.pdf", "differences.png", "differences.pdf"}

    # from the results alone, as on another machine
    assert ablate.main([str(file), "--output", str(results), "--runs", str(runs / "other")]) == 0
    assert "3 jobs, 3 of them done" in capsys.readouterr().out

    # from the results of another study in the same folder
    other = results.with_name("other")
    assert ablate.main([str(file), "--output", str(other), "--dry-run"]) == 0
    assert "3 jobs, 3 of them done, 3 by other studies in this folder" in capsys.readouterr().out
    assert not other.exists()
    assert ablate.main([str(file), "--output", str(other), "--runs", str(runs / "other")]) == 0
    assert {path.name for path in (other / "cells").iterdir()} == {path.name for path in before}
    capsys.readouterr()

    # a changed study does only what is new: another protocol evaluates, another arm trains
    more = write_study(
        **one | {"arms": [{}, {"masker.ratio": 0.75}], "protocols": [{"name": "knn", "neighbours": [3]}]}
    )
    plan = plan_study(more)
    assert [state_of(job, results, runs) for job in plan.jobs] == ["new evaluation", "new evaluation", "new"]
    trained = {path: path.stat().st_mtime_ns for path in runs.glob("*/checkpoint_*.pt")}
    assert ablate.main(command(more, folders)) == 0
    assert trained.items() <= {path: path.stat().st_mtime_ns for path in runs.glob("*/checkpoint_*.pt")}.items()
    record = read_record(results, plan.cells[0][0].id)
    assert [len(rows) for rows in record.rows.values()] == [2, 2]
    assert (record.training["steps"], record.training["images"]) == (12, 96)
    assert record.training["hours"] > 0


class WorkerHere:
    """A worker of the queue that works in this process, and has ended when it has begun."""

    stdin = None

    def __init__(self, command, **_):
        self.returncode = work([next(word for word in command if word.endswith(".json"))])

    def poll(self):
        return self.returncode


def test_a_cell_that_fails_becomes_a_row_and_the_others_continue(write_study, folders, capsys, monkeypatch):
    stand_in = SimpleNamespace(Popen=WorkerHere, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr("jepa_kit.studies.local.subprocess", stand_in)
    arms = [{"name": "base"}, {"name": "diverges", "optim": {"lr": 1e30, "start_lr": 1e30}}]
    file = write_study(factors=None, arms=arms, seeds=[0], baselines=[])
    assert ablate.main(command(file, folders)) == 1
    report = (folders[0] / "report.md").read_text()
    assert "diverges, seed 0: failed: " in report
    assert "1 of 2 cells have figures" in report
    assert "failed (1)" in report
    assert str(folders[1]) not in report
    table = json.loads((folders[0] / "report.json").read_text())["table"]
    assert {line["arm"] for line in table} == {"base"}
    capsys.readouterr()
    assert ablate.main(command(file, folders)) == 1
    assert "2 jobs, 2 of them done" in capsys.readouterr().out
    plan = plan_study(file)
    assert len(open_jobs(plan, *folders)) == 0
    assert [job.title for job in open_jobs(plan, *folders, retry=True)] == ["diverges"]


@pytest.mark.slow
def test_a_worker_that_dies_becomes_a_row(write_study, folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "sudden.py").write_text(
        "import os\n"
        "from jepa_kit.maskers.random import Random\n"
        "from jepa_kit.registry import MASKERS\n"
        "@MASKERS.register('sudden')\n"
        "class Sudden(Random):\n"
        "    def __call__(self, samples, *, seed, epoch, step):\n"
        "        if os.environ.get('SUDDEN') == str(step) and seed == 0:\n"
        "            print('the masker has a bug', flush=True)\n"
        "            os.abort()\n"
        "        return super().__call__(samples, seed=seed, epoch=epoch, step=step)\n"
    )
    arms = [{}, {"name": "sudden", "masker": {"name": "sudden", "ratio": 0.5}}]
    file = write_study(
        factors=None, arms=arms, seeds=[0], baselines=[], overrides={"imports": [str(tmp_path / "sudden.py")]}
    )
    plan = plan_study(file)
    monkeypatch.setenv("SUDDEN", "5")
    assert make_queue(plan, *folders, 2).run(plan.jobs[::-1]) == 0
    good, bad = (read_record(folders[0], plan.cells[arm][0].id) for arm in (0, 1))
    assert (good.state, bad.state) == ("finished", "failed")
    assert bad.reason.startswith("killed by SIGABRT; ")


def test_the_progress_line_counts_all_jobs_of_the_study(write_study, folders, capsys):
    plan = plan_study(write_study(seeds=[0]))
    first, *left = plan.jobs
    write_record(Record(id=first.id, kind=first.kind, title=first.title, seed=0), folders[0])
    queue = make_queue(plan, *folders, 1)
    queue._show(plan.jobs, [_Worker(left[0], 0, None), _Worker(plan.cells[0][0], 1, None)])
    other, cell = left[0].title, plan.arms[0].name
    assert capsys.readouterr().err == f"1 of 7 done, 0 % of the FLOP | {other} | {cell}, seed 0 0 %\n"


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_study_that_is_killed_continues(write_study, folders, how, capsys):
    """Killed in the middle of a run, however: the worker saves, and the next call gives the figures of one that ran."""
    results, runs = folders
    train = {
        "batch_size": 8,
        "epochs": 1,
        "steps_per_epoch": 200,
        "device": "cpu",
        "tensorboard": False,
        "log_every": 1,
    }
    file = write_study({"train": train, "checkpoint": {"every": 20}}, factors=None, arms=[{}], seeds=[3], baselines=[])
    job = plan_study(file).cells[0][0]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "jepa_kit.tools.ablate", *command(file, folders)]
    process = subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: done_steps(job, runs) >= 20)
    process.send_signal(how)
    status = process.wait(timeout=600)
    assert status == {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGINT: 130}[how]
    log = runs / JOBS / f"{job.id}.log"
    wait_for(lambda: "stopped by SIGTERM" in log.read_text())  # after SIGKILL the worker learns of it by itself
    assert state_of(job, results, runs) == "interrupted"
    stopped = done_steps(job, runs)
    assert 20 <= stopped < 200
    assert f"stopped by SIGTERM after {stopped}" in log.read_text()
    assert ablate.main(command(file, folders)) == 0
    assert f"interrupted, resumes at step {stopped}; log {log}\n" in capsys.readouterr().err
    assert f"resumed at step {stopped}" in log.read_text()
    assert [line["step"] for line in read_metrics(runs / job.id)] == list(range(200))


def test_one_queue_for_a_folder(write_study, folders):
    plan = plan_study(write_study())
    script = (
        "import sys; from pathlib import Path; from jepa_kit.lock import lock_file\n"
        f"with lock_file(Path({str(folders[1] / LOCK)!r})):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    call = [sys.executable, "-c", script]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout.readline()
        with pytest.raises(ValueError, match=r"the study already runs in .*: process"):
            make_queue(plan, *folders, 1).run(plan.jobs)
        other.communicate()


def test_workers_share_the_cores(write_study, folders, monkeypatch):
    plan = plan_study(write_study())
    monkeypatch.setattr("jepa_kit.studies.local.usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert make_queue(plan, *folders, 3).threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert make_queue(plan, *folders, 3).threads == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3, 5, 6, 7})
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [make_queue(plan, *folders, 3).cores_of(place) for place in range(3)] == [[1, 2], [3, 5], [6, 7]]
    for workers in (0, 9):
        with pytest.raises(
            ValueError, match=rf"--workers \(={workers}\) must be from 1 to the cores of this machine \(=8\)"
        ):
            make_queue(plan, *folders, workers)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_a_worker_stays_on_its_cores(write_study, folders):
    plan = plan_study(write_study())
    file, core = job_file(plan, plan.cells[0][0], *folders), min(os.sched_getaffinity(0))
    script = (
        "import os, sys; from jepa_kit.studies import worker; "
        "worker.work = lambda job: print(os.sched_getaffinity(0)); worker.main(sys.argv[1:])"
    )
    call = [sys.executable, "-c", script, str(file), "--cores", str(core)]
    assert subprocess.run(call, capture_output=True, check=True, cwd=ROOT, text=True).stdout.strip() == f"{{{core}}}"


def test_a_crash_reported_by_the_jobs_script(write_study, folders):
    plan = plan_study(write_study())
    file = job_file(plan, plan.cells[0][0], *folders)
    assert work([str(file), "--crashed", "137"]) == 1
    record = read_record(folders[0], plan.cells[0][0].id)
    assert (record.state, record.reason) == ("failed", "its process ended with status 137; its output shows more")


def test_a_damaged_record(write_study, folders):
    job = plan_study(write_study()).jobs[0]
    file = record_file(folders[0], job.id)
    file.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"format": "other"}', '{"format": "jepa_kit study/1", "id": 3}'):
        file.write_text(text)
        with pytest.raises(
            ValueError, match="is not a record of 'jepa_kit study/1': delete it, and the cell runs again"
        ):
            read_record(folders[0], job.id)


def test_only_options_of_the_machine_on_the_command_line(write_study, folders, capsys):
    for text in ("optim.lr=1", "train.seed=4", "train.output_dir=x", "data.shards=x"):
        assert ablate.main(command(write_study(), folders, "--list", text)) == 2
        assert f"'{text}' would change the study" in capsys.readouterr().err
    assert ablate.main(command(write_study(), folders, "--list", "data.num_workers=0")) == 0
    assert "masker.ratio=0.25, deep" in capsys.readouterr().out


def test_the_cost_before_it_starts(write_study, folders, capsys):
    assert ablate.main(command(write_study(), folders, "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "masker.ratio=0.5, deep: 12 steps of 8 images" in printed
    assert "11 jobs: 768 images, " in printed
    assert re.search(r" (\d+ s|\d+ min|\d+\.\d h) on this machine with 1 worker \(from measured steps", printed)
    assert not folders[0].exists()


def test_the_cost_of_an_interrupted_run_is_that_of_the_rest(write_study, folders):
    plan = plan_study(write_study())
    first, second = (cell[0] for cell in plan.cells[:2])
    (folders[1] / second.id).mkdir(parents=True)
    (folders[1] / second.id / "checkpoint_00000009.pt").touch()
    flop = first.length.flop + second.length.flop * 3 / 12
    assert totals([*plan.baselines, first, second], folders[1]) == (96 + 24, pytest.approx(flop / 1e12))


def test_a_network_that_is_too_large_to_measure(write_study, folders, capsys, monkeypatch):
    monkeypatch.setattr("jepa_kit.studies.cost.MOST_FLOP", 1e6)
    assert ablate.main(command(write_study(), folders, "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "1 runs, too much" not in printed
    assert "2 runs, too much for this CPU to measure" in printed
    assert "; 4 arms could not be measured)" in printed
