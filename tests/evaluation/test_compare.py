"""Runs put together: groups of seeds, tables, and what is refused."""

import csv
import io
import json
from dataclasses import asdict

import numpy as np
import pytest

from jepa_kit.evaluation.compare import Cell, Key, compare, figure, load, to_csv, to_markdown
from jepa_kit.evaluation.report import Row
from jepa_kit.evaluation.results import FORMAT, write_results


def row(network, label, accuracy, **other):
    values = {
        "network": network,
        "layers": None if network == "pixels" else "last",
        "pooling": None,
        "seed": None,
        "width": 16,
        "protocol": "knn",
        "label": label,
        "accuracy": accuracy,
        "standard_error": 0.01,
        "chance": 0.125,
        "validation": 0.5,
        "classes": 8,
        "n_train": 10,
        "n_test": 10,
        "settings": {},
    }
    return Row(**(values | other))


def content(rows, *, seed=0, depth=4, shards="data/scenes/test", step=10):
    """What ``results`` gives, as far as a comparison looks at it."""
    return {
        "format": FORMAT,
        "checkpoint": {"file": "x.pt", "sha256": "0", "step": step},
        "config": {
            "encoder": {"depth": depth},
            "train": {"seed": seed, "output_dir": f"runs/{seed}", "device": "cpu"},
            "data": {"shards": shards},
            "versions": {"torch": str(seed)},
        },
        "data": {"test": {"shards": shards}},
        "seeds": {"run": seed, "protocols": 0},
        "rows": [asdict(r) for r in rows],
    }


@pytest.fixture
def runs(tmp_path):
    """Three seeds of one recipe, and one run of another."""
    for seed, accuracy in enumerate((0.4, 0.5, 0.6)):
        rows = [row("target", "count", accuracy), row("pixels", "count", 0.2), row("target", "shape", 0.1 + accuracy)]
        write_results(content(rows, seed=seed), tmp_path / f"small_seed{seed}" / "evaluation" / "a.json")
    write_results(content([row("target", "count", 0.7)], depth=8), tmp_path / "deep" / "run" / "evaluation" / "b.json")
    return [tmp_path / name for name in ("small_seed0", "small_seed1", "small_seed2", "deep")]


def test_seeds_become_mean_and_deviation(runs):
    cells = compare([load(path) for path in runs])
    cell = cells[Key("small_seed*", "scenes", "knn", "target encoder", "count")]
    assert (cell.mean, cell.deviation, cell.runs) == pytest.approx((0.5, np.std([0.4, 0.5, 0.6], ddof=1), 3))
    assert cells[Key("small_seed*", "scenes", "knn", "pixels", "count")].deviation == pytest.approx(0)
    assert cells[Key("deep", "scenes", "knn", "target encoder", "count")] == Cell(0.7, None, 0.01, 1, 0.125)


def test_what_moves_no_number_may_differ(runs):
    """Where shards are cached, what is logged, and whether a run looked at itself."""
    file = runs[1] / "evaluation" / "a.json"
    changed = json.loads(file.read_text())
    changed["config"]["data"] |= {"cache": "/scratch", "cache_gb": 9, "retries": 1, "backoff": 2, "timeout": 3}
    changed["config"]["data"] |= {"prefetch": 0, "num_workers": 5, "shards": "elsewhere"}
    changed["config"]["train"] |= {"wandb": "x", "tensorboard": True, "keep_every": 7, "checkpoint": "sharded"}
    changed["config"]["train"] |= {"checkpoint_dir": "s3://x", "log_every": 1, "checkpoint_every": 3}
    changed["config"]["evaluate"] = {"every": 5}
    write_results(changed, file)
    assert Key("small_seed*", "scenes", "knn", "target encoder", "count") in compare([load(path) for path in runs])
    changed["config"]["data"]["decoder"] = "fast"
    write_results(changed, file)
    assert len({load(path).recipe for path in runs[:3]}) == 2


def test_the_table(runs):
    assert to_markdown(compare([load(path) for path in runs])).splitlines() == [
        "| run         | protocol | features       | count       | shape       |",
        "| ----------- | -------- | -------------- | ----------- | ----------- |",
        "| small_seed* | knn      | target encoder | 50.0 ± 10.0 | 60.0 ± 10.0 |",
        "| small_seed* | knn      | pixels         | 20.0 ± 0.0  |             |",
        "| deep        | knn      | target encoder | 70.0 (1.0)  |             |",
        "|             |          | chance         | 12.5        | 12.5        |",
    ]


def test_csv_has_every_figure(runs):
    cells = compare([load(path) for path in runs])
    lines = list(csv.DictReader(io.StringIO(to_csv(cells))))
    assert len(lines) == len(cells) == 4
    assert (lines[0]["group"], lines[0]["column"], float(lines[0]["mean"])) == ("small_seed*", "count", 0.5)
    assert lines[-1]["deviation"] == ""


def test_several_data_sets_are_told_apart(tmp_path):
    for k, shards in enumerate(("data/scenes/test", "data/cifar10-test")):
        write_results(content([row("target", "count", 0.5)], shards=shards), tmp_path / f"evaluation/{k}.json")
    heads = to_markdown(compare([load(tmp_path)])).splitlines()[0]
    assert "scenes: count" in heads
    assert "cifar10-test: count" in heads


def test_the_newer_file_counts(tmp_path):
    import os

    for k, accuracy in enumerate((0.5, 0.6)):
        file = write_results(content([row("target", "count", accuracy)]), tmp_path / f"evaluation/{1 - k}.json")
        os.utime(file, (k, k))
    ((_, found),) = load(tmp_path).rows
    assert found.accuracy == 0.6


def test_a_figure_is_drawn(runs, tmp_path):
    from PIL import Image

    file = figure(compare([load(path) for path in runs]), tmp_path / "new" / "c.png")
    assert min(Image.open(file).size) > 300


def test_what_cannot_be_compared(runs, tmp_path):
    with pytest.raises(ValueError) as error:
        compare([])
    assert str(error.value) == "runs (=[]) must be at least one"
    with pytest.raises(ValueError) as error:
        compare([load(runs[0]), load(runs[0])])
    expected = "runs small_seed0, small_seed0 have one recipe and seeds [0, 0]: each seed may be there once"
    assert str(error.value) == expected
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path / "absent")
    assert str(error.value) == f"{tmp_path / 'absent'} does not exist; a run is a folder or a file of results"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no results \(evaluation/\*\.json or results\.json\)"):
        load(tmp_path / "empty")
    write_results(content([], depth=1), tmp_path / "two" / "evaluation" / "a.json")
    write_results(content([], depth=2), tmp_path / "two" / "evaluation" / "b.json")
    with pytest.raises(ValueError, match="holds results of 2 recipes; name their files one by one"):
        load(tmp_path / "two")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON: "),
        (json.dumps({"format": "other"}), f"has format (='other'), but this release reads {FORMAT!r}: evaluate again"),
        ("[]", f"has format (=None), but this release reads {FORMAT!r}: evaluate again"),
    ],
)
def test_files_that_are_no_results(tmp_path, text, message):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json") as error:
        load(file)
    assert message in str(error.value)
