"""The report of records that are written here, with figures that are known."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from scipy import stats

from jepa_kit.studies.figures import draw_cost, draw_differences
from jepa_kit.studies.plan import plan_study
from jepa_kit.studies.records import Record, read_record, record_file, write_record
from jepa_kit.studies.report import COLUMNS, figure_lines, table_of, to_csv, to_markdown, write_report
from jepa_kit.studies.summary import Outcome, summarize

VALUES = {
    "base": {"shape": [0.30, 0.32, 0.31], "count": [0.50, 0.52, 0.54]},
    "better": {"shape": [0.35, 0.37, 0.365], "count": [0.49, 0.55, 0.53]},
}
KNN = "nearest neighbours on the last layer"
SHAPE, COUNT = Outcome(KNN, "shape"), Outcome(KNN, "count")


def row(network, label, accuracy):
    return {
        **{"network": network, "layers": "last", "pooling": "mean", "seed": None, "width": 16, "protocol": "knn"},
        **{"label": label, "accuracy": accuracy, "standard_error": 0.01, "chance": 0.2, "validation": None},
        **{"classes": 5, "n_train": 96, "n_test": 64, "settings": {}, "options": {}},
    }


@pytest.fixture
def study(write_study, tmp_path):
    """The plan of two arms that have figures, one that failed or collapsed and one without results, and its results."""
    arms = [{"name": name, "encoder.depth": k + 1} for k, name in enumerate(("base", "better", "bad", "open"))]
    plan = plan_study(write_study(factors=None, arms=arms, seeds=[0, 1, 2], protocols=["knn"], baselines=["pixels"]))
    results = tmp_path / "results"
    (evaluation,) = plan.jobs[0].evaluations

    def write(job, title, values, **other):
        rows = {evaluation: [row("x", label, value) for label, value in values.items()]}
        write_record(Record(id=job.id, kind=job.kind, title=title, seed=job.seed, rows=rows, **other), results)

    sound = {
        "training": {"steps": 12, "images": 96, "tflop": 1.0, "hours": 0.5},
        "health": {"state": "healthy", "reason": "", "collapsed": False},
        "machine": {"device": "a CPU", "threads": 2},
    }
    for k, name in enumerate(VALUES):
        for job in plan.cells[k]:
            write(job, name, {label: numbers[job.seed] for label, numbers in VALUES[name].items()}, **sound)
    first, second, _ = plan.cells[2]
    write_record(
        Record(id=first.id, kind="cell", title="bad", seed=0, state="failed", reason="the loss is nan"), results
    )
    collapsed = {"state": "constant", "reason": "tokens are equal", "collapsed": True}
    write(second, "bad", {"shape": 0.2, "count": 0.2}, health=collapsed, reason="constant: tokens are equal")
    write(plan.baselines[0], "pixels", {"shape": 0.25, "count": 0.4})
    return plan, results


def test_figures_over_seeds_and_against_the_base(study):
    summary = summarize(*study)
    assert summary.outcomes == [SHAPE, COUNT]
    for name, arm in zip(VALUES, summary.arms, strict=False):
        for outcome, label in ((SHAPE, "shape"), (COUNT, "count")):
            values = VALUES[name][label]
            found = arm.figures[outcome]
            assert found.mean == pytest.approx(np.mean(values))
            assert found.deviation == pytest.approx(np.std(values, ddof=1))
    for outcome, label in ((SHAPE, "shape"), (COUNT, "count")):
        compared = summary.arms[1].figures[outcome].against_base
        theirs = stats.ttest_rel(VALUES["better"][label], VALUES["base"][label]).confidence_interval(0.95)
        assert (compared.low, compared.high) == pytest.approx((theirs.low, theirs.high))
    assert summary.arms[0].figures[SHAPE].against_base is None
    one_seed = summary.arms[2].figures[SHAPE].against_base
    assert one_seed.mean == pytest.approx(0.2 - VALUES["base"]["shape"][1])
    assert one_seed.low is None
    assert summary.arms[3].figures == {}


def test_the_report_says_what_is_and_is_not_distinguishable(study):
    text = to_markdown(summarize(*study))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert ["better", "36.2 ± 1.0", "52.3 ± 3.1"] in lines
    assert ["*pixels*", "25.0 (1.0)", "40.0 (1.0)"] in lines
    assert ["*chance*", "20.0", "20.0"] in lines
    shape, count = (line for line in lines if line[0] == "better" and len(line) == 6 and line[1] in VALUES["base"])
    assert shape[2:5] == ["+5.2", "+4.4 to +5.9", "better"]
    assert count[3:5] == ["-5.4 to +6.1", "not distinguishable"]
    assert int(count[5]) > 20 > int(shape[5])
    assert ["bad", "shape", "-12.0", "", "one seed: no interval", ""] in lines
    assert ["arm", "shape", "count"] in lines
    assert "\nNearest neighbours on the last layer. In %: mean" in text
    assert ["base", "12", "96"] in [line[:3] for line in lines]
    assert {"0.5"} == {line[4] for line in lines if line[:1] in (["base"], ["better"]) and line[1] == "12"}
    assert "healthy (3)" in text
    assert "failed (1), constant (1)" in text
    assert "- bad, seed 0: failed: the loss is nan" in text
    assert "- bad, seed 1: constant: tokens are equal" in text
    assert "- open, seed 2: no result yet" in text
    assert "7 of 12 cells have figures" in text
    assert "float32 on a CPU, 2 threads" in text
    assert "among 2 intervals, 0.1 would" in text


def test_one_interval_and_one_thread(study):
    plan, results = study
    for job in plan.cells[0]:
        record = read_record(results, job.id)
        rows = {key: rows[:1] for key, rows in record.rows.items()}
        write_record(dataclasses.replace(record, machine={"device": "a CPU", "threads": 1}, rows=rows), results)
    text = to_markdown(summarize(plan, results))
    assert "among 1 interval, 0.05 would miss" in text
    assert "on a CPU, 1 thread and on a CPU, 2 threads." in text


def test_one_seed_gives_no_interval(study):
    plan, results = study
    for job in plan.jobs:
        if job.seed:
            record_file(results, job.id).unlink(missing_ok=True)
    text = to_markdown(summarize(plan, results))
    assert "\nIn points, of the runs with one seed: an interval needs two seeds or more.\n" in text
    assert "interval of the paired t test" not in text


def test_columns_name_their_protocol_if_there_are_several(study):
    other = Outcome("linear probe on the last layer", "shape")
    summary = dataclasses.replace(summarize(*study), outcomes=[SHAPE, other])
    assert figure_lines(summary)[0] == ["arm", f"shape, {KNN}", "shape, linear probe on the last layer"]
    assert "\nIn %: mean" in to_markdown(summary)


def test_baselines_stand_once(study):
    lines = figure_lines(summarize(*study))
    assert [line[0] for line in lines[1:]] == ["base", "better", "bad", "open", "*pixels*", "*chance*"]


def test_all_digits_are_in_the_csv(study):
    summary = summarize(*study)
    found = list(csv.DictReader(io.StringIO(to_csv(summary))))
    assert tuple(found[0]) == COLUMNS
    assert len(found) == len(table_of(summary)) == 8
    better = next(line for line in found if line["arm"] == "better" and line["label"] == "shape")
    assert float(better["difference"]) == summary.arms[1].figures[SHAPE].against_base.mean
    assert better["distinguishable"] == "True"
    assert better["hours"] == "0.5"


def test_every_file_is_written(study):
    plan, results = study
    written = write_report(summarize(plan, results), results)
    names = {"report.md", "report.csv", "report.json", "differences.png", "differences.pdf", "cost.png", "cost.pdf"}
    assert {path.name for path in written} == names
    assert (results / "cost.pdf").read_bytes().startswith(b"%PDF")
    assert (results / "differences.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((results / "report.json").read_text())
    assert {"arm": "better", "protocol": KNN, "label": "count", "seed": 1, "value": 0.55} in content["values"]
    assert content["study"]["seeds"] == [0, 1, 2]


def test_arms_of_one_cost_are_drawn_below_each_other(study, monkeypatch, tmp_path):
    monkeypatch.setattr("jepa_kit.studies.figures.save_figure", lambda fig, file, **options: fig)
    summary = summarize(*study)

    def drawn(costs):
        arms = [dataclasses.replace(arm, tflop=cost) for arm, cost in zip(summary.arms, costs, strict=True)]
        (fig,) = draw_cost(dataclasses.replace(summary, arms=arms), tmp_path / "cost.png")
        return fig.axes[0], sorted(text.get_text() for text in fig.legends[0].get_texts())

    def means(ax, of):
        return [float(getattr(box.lines[0], f"get_{of}data")()[0]) for box in ax.containers]

    ax, legend = drawn([2.0, 2.01, 1.99, 2.0])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["base", "better", "bad", "open"]
    assert (means(ax, "y"), means(ax, "x")) == ([0, -1, -2], pytest.approx([31.0, 36.1667, 20.0], abs=1e-3))
    assert legend == ["pixels (baseline)"]
    (fig,) = draw_cost(dataclasses.replace(summary, arms=summary.arms[:1], baselines={}), tmp_path / "cost.png")
    assert fig.legends == []
    ax, legend = drawn([2.0, 4.0, 1.0, 3.0])
    assert (means(ax, "x"), ax.get_xscale()) == ([2.0, 4.0, 1.0], "linear")
    assert legend == ["bad", "base", "better", "pixels (baseline)"]
    ax, _ = drawn([2.0, 40.0, 1.0, 3.0])
    assert (means(ax, "x"), ax.get_xscale()) == ([2.0, 40.0, 1.0], "log")


def test_arms_have_the_baselines_of_their_networks(write_study, monkeypatch, tmp_path):
    monkeypatch.setattr("jepa_kit.studies.figures.save_figure", lambda fig, file, **options: fig)
    plan = plan_study(write_study(seeds=[0], protocols=["knn"]))
    for k, job in enumerate(plan.jobs):
        rows = {next(iter(job.evaluations)): [row("x", "shape", k / 10)]}
        write_record(Record(id=job.id, kind=job.kind, title=job.title, seed=0, rows=rows), tmp_path)
    summary = summarize(plan, tmp_path)
    assert (
        "Networks differ: *untrained* is of masker.ratio=0.5, encoder.depth=2 and of masker.ratio=0.25, "
        "encoder.depth=2; *untrained (masker.ratio=0.5, deep)* is of masker.ratio=0.5, "
        "deep and of masker.ratio=0.25, deep.\n"
    ) in to_markdown(summary)
    arms = [dataclasses.replace(arm, tflop=1.0) for arm in summary.arms]
    (fig,) = draw_cost(dataclasses.replace(summary, arms=arms), tmp_path / "cost.png")
    lines = [line for line in fig.axes[0].lines if line.get_label().endswith("(baseline)")]
    rows_of = [(line.get_xdata()[0], {-round(y - 0.1) for y in line.get_ydata()[::3]}) for line in lines]
    assert rows_of == [(0, {0, 2}), (pytest.approx(10), {1, 3}), (pytest.approx(20), {0, 1, 2, 3})]


def test_an_arm_named_as_a_baseline_has_its_own_place_in_the_legend(study, monkeypatch, tmp_path):
    monkeypatch.setattr("jepa_kit.studies.figures.save_figure", lambda fig, file, **options: fig)
    summary = summarize(*study)
    arms = [dataclasses.replace(arm, tflop=float(k + 1)) for k, arm in enumerate(summary.arms)]
    arms = [dataclasses.replace(arm, name="pixels") if arm.name == "better" else arm for arm in arms]
    (fig,) = draw_cost(dataclasses.replace(summary, arms=arms), tmp_path / "cost.png")
    assert {"pixels", "pixels (baseline)"} <= {text.get_text() for text in fig.legends[0].get_texts()}


def test_without_results_there_is_nothing_to_draw(write_study, tmp_path):
    summary = summarize(plan_study(write_study()), tmp_path / "none")
    assert draw_cost(summary, tmp_path / "cost.png") == []
    assert draw_differences(summary, tmp_path / "differences.png") == []
    text = to_markdown(summary)
    assert "0 of 8 cells have figures" in text
    assert "- pixels: no result yet" in text
