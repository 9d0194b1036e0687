"""Comparison of runs: groups of seeds, names, tables, and rejected files."""

import csv
import io
import json
from dataclasses import asdict

import numpy as np
import pytest

from jepa_kit.evaluation.tables.compare import Cell, Key, compare, figure, to_csv, to_markdown
from jepa_kit.evaluation.tables.results import write_results
from jepa_kit.evaluation.tables.rows import FORMAT, Row
from jepa_kit.evaluation.tables.runs import load


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


def content(rows, *, seed=0, depth=4, shards="data/scenes/test", step=10, learned="l", held="h", asked=0, on="t"):
    """Return the part of ``results`` that a comparison uses."""
    return {
        "format": FORMAT,
        "checkpoint": {"file": "x.pt", "sha256": "0", "step": step, "data": {"samples": 9, "digest": on}},
        "config": {
            "encoder": {"depth": depth},
            "train": {"seed": seed, "output_dir": f"runs/{seed}", "device": "cpu"},
            "data": {"shards": shards},
            "versions": {"torch": str(seed)},
        },
        "data": {
            "train": {"shards": "data/scenes/train", "index_sha256": learned},
            "test": {"shards": shards, "index_sha256": held},
        },
        "seeds": {"run": seed, "protocols": asked},
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
    cells = compare(load(*runs))
    cell = cells[Key("small_seed*", "scenes", "knn", "target encoder", "count")]
    assert (cell.mean, cell.deviation, cell.runs) == pytest.approx((0.5, np.std([0.4, 0.5, 0.6], ddof=1), 3))
    assert cells[Key("small_seed*", "scenes", "knn", "pixels", "count")].deviation == pytest.approx(0)
    assert cells[Key("deep", "scenes", "knn", "target encoder", "count")] == Cell(0.7, None, 0.01, 1, 0.125)


def test_options_that_change_no_number_may_differ(runs):
    """Cache of shards, logging, and evaluation during a run."""
    file = runs[1] / "evaluation" / "a.json"
    changed = json.loads(file.read_text())
    changed["config"]["data"] |= {"cache": "/scratch", "cache_gb": 9, "retries": 1, "backoff": 2, "timeout": 3}
    changed["config"]["data"] |= {"prefetch": 0, "num_workers": 5, "shards": "elsewhere"}
    changed["config"]["train"] |= {"wandb": "x", "tensorboard": True, "log_every": 1}
    changed["config"]["checkpoint"] = {"keep_every": 7, "format": "sharded", "dir": "s3://x", "every": 3}
    changed["config"]["evaluate"] = {"every": 5}
    write_results(changed, file)
    assert Key("small_seed*", "scenes", "knn", "target encoder", "count") in compare(load(*runs))
    changed["config"]["data"]["decoder"] = "fast"
    write_results(changed, file)
    assert len({run.recipe for run in load(*runs[:3])}) == 2


def test_the_table(runs):
    assert to_markdown(compare(load(*runs))).splitlines() == [
        "| run         | protocol | features       | count       | shape       |",
        "| ----------- | -------- | -------------- | ----------- | ----------- |",
        "| small_seed* | knn      | target encoder | 50.0 ± 10.0 | 60.0 ± 10.0 |",
        "| small_seed* | knn      | pixels         | 20.0 ± 0.0  |             |",
        "| deep        | knn      | target encoder | 70.0 (1.0)  |             |",
        "|             |          | chance         | 12.5        | 12.5        |",
    ]


def test_csv_has_every_figure(runs):
    cells = compare(load(*runs))
    lines = list(csv.DictReader(io.StringIO(to_csv(cells))))
    assert len(lines) == len(cells) == 4
    assert (lines[0]["group"], lines[0]["column"], float(lines[0]["mean"])) == ("small_seed*", "count", 0.5)
    assert lines[-1]["deviation"] == ""


def test_several_data_sets_have_different_names(tmp_path):
    for k, shards in enumerate(("data/scenes/test", "data/cifar10-test")):
        asked = content([row("target", "count", 0.5)], shards=shards, held=str(k))
        write_results(asked, tmp_path / f"evaluation/{k}.json")
    heads = to_markdown(compare(load(tmp_path))).splitlines()[0]
    assert "scenes: count" in heads
    assert "cifar10-test: count" in heads


def test_the_newer_file_counts(tmp_path):
    import os

    for k, accuracy in enumerate((0.5, 0.6)):
        file = write_results(content([row("target", "count", accuracy)]), tmp_path / f"evaluation/{1 - k}.json")
        os.utime(file, (k, k))
    ((answer,),) = (run.rows for run in load(tmp_path))
    assert answer.row.accuracy == 0.6


def test_a_figure_is_drawn(runs, tmp_path):
    from PIL import Image

    file = figure(compare(load(*runs)), tmp_path / "new" / "c.png")
    assert min(Image.open(file).size) > 300


def test_rejected_runs(runs, tmp_path):
    with pytest.raises(ValueError) as error:
        compare([])
    assert str(error.value) == "runs (=[]) must be at least one"
    write_results(content([row("target", "count", 0.7)]), tmp_path / "again" / "evaluation" / "a.json")
    with pytest.raises(ValueError) as error:
        compare(load(runs[0], tmp_path / "again"))
    expected = f"runs {runs[0]}, {tmp_path / 'again'} have one recipe and seeds [0, 0]: seeds must differ"
    assert str(error.value) == expected
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path / "absent")
    assert str(error.value) == f"{tmp_path / 'absent'} does not exist; a run is a folder or a file of results"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no results \(evaluation/\*\.json or results\.json\)"):
        load(tmp_path / "empty")
    write_results(content([]), tmp_path / "no_rows" / "evaluation" / "a.json")
    with pytest.raises(ValueError, match=r"a\.json has no rows: evaluate again"):
        load(tmp_path / "no_rows")


def lines_of(*paths):
    """Return {(run, data: column, protocol): mean in percent} of the target encoder."""
    cells = compare(load(*paths))
    return {(k.group, f"{k.data}: {k.column}", k.protocol): round(100 * c.mean, 1) for k, c in cells.items()}


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (("a/seed0", "a/seed1", "b/seed0", "b/seed1"), ("a/seed*", "b/seed*")),
        (("run_0", "run_1", "run_2", "run_3"), ("run_0, run_1", "run_2, run_3")),
    ],
)
def test_recipes_of_one_name_are_not_mixed(tmp_path, places, names):
    for place, (depth, seed, accuracy) in zip(
        places, [(4, 0, 0.2), (4, 1, 0.3), (8, 0, 0.7), (8, 1, 0.8)], strict=True
    ):
        file = tmp_path / place / "evaluation" / "a.json"
        write_results(content([row("target", "count", accuracy)], depth=depth, seed=seed), file)
    found = lines_of(*(tmp_path / place for place in places))
    assert found == {(name, "scenes: count", "knn"): mean for name, mean in zip(names, (25.0, 75.0), strict=True)}


def test_each_checkpoint_of_a_run_has_a_line(tmp_path):
    """Two files of each; the same if loaded as a folder or as files."""
    files = []
    for step, accuracy in ((100, 0.2), (900, 0.8)):
        for label in ("count", "shape"):
            asked = content([row("target", label, accuracy)], step=step)
            files.append(write_results(asked, tmp_path / "r" / "evaluation" / f"{step}{label}.json"))
    expected = {
        (f"r, step {step}", f"scenes: {label}", "knn"): mean
        for step, mean in ((100, 20.0), (900, 80.0))
        for label in ("count", "shape")
    }
    assert lines_of(tmp_path / "r") == expected
    assert lines_of(*files) == expected


def test_files_in_one_folder_have_different_names(tmp_path):
    """Two recipes at the same step, evaluated into one folder."""
    for k in (1, 2):
        write_results(content([row("target", "count", k / 10)], depth=k), tmp_path / f"{k}.json")
    files = [tmp_path / f"{k}.json" for k in (1, 2)]
    assert [(group, mean) for (group, *_), mean in lines_of(*files).items()] == [
        (str(files[0]), 10.0),
        (str(files[1]), 20.0),
    ]


@pytest.mark.parametrize(
    ("first", "second", "protocols"),
    [
        (({"k": 5, "q": 1}, 0), ({"k": 9, "q": 1}, 0), ("knn k=5", "knn k=9")),
        (({"k": 5}, 0), ({"k": 5}, 3), ("knn seed=0", "knn seed=3")),
        (({"k": 5}, 0), ({}, 0), ("knn", "knn options unknown")),
        (({"k": 5}, 0), ({"k": 5}, 0), ("knn",)),
        (({"k": 5}, 0), ({"k": 5, "pooling": "mean"}, 0), ("knn",)),
        (({"k": 5}, 0), ({"k": 5, "pooling": "class"}, 0), ("knn pooling=mean", "knn pooling=class")),
    ],
)
@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_other_options_are_another_figure(tmp_path, first, second, protocols, seeds):
    """In files of one run, and over seeds."""
    for k, (options, asked) in enumerate((first, second)):
        rows = [row("target", "count", 0.2 + 0.6 * k, options=options)]
        write_results(
            content(rows, asked=asked, seed=seeds[k]), tmp_path / f"run{seeds[k]}" / "evaluation" / f"{k}.json"
        )
    found = lines_of(*{tmp_path / f"run{seed}" for seed in seeds})
    if len(protocols) == 2:
        assert [(protocol, mean) for (_, _, protocol), mean in sorted(found.items(), key=lambda i: i[1])] == [
            (protocols[0], 20.0),
            (protocols[1], 80.0),
        ]
    else:  # the newer file of one run; the mean over seeds
        assert set(found.values()) == {80.0 if seeds == (0, 0) else 50.0}


def test_options_of_older_files_are_beside_the_rows(tmp_path):
    for k, value in enumerate((5, 9)):
        asked = content([row("target", "count", 0.2 + 0.6 * k)], seed=k)
        del asked["rows"][0]["options"]
        asked["protocols"] = [{"name": "dense", "k": 3}, {"name": "knn", "k": value}]
        write_results(asked, tmp_path / f"run{k}" / "evaluation" / "a.json")
    assert [protocol for *_, protocol in lines_of(tmp_path / "run0", tmp_path / "run1")] == ["knn k=5", "knn k=9"]


@pytest.mark.parametrize(
    ("second", "names"),
    [
        ({"shards": "other/scenes/test", "held": "g"}, ("data/scenes", "other/scenes")),
        ({"learned": "m"}, ("scenes h (learned from l)", "scenes h (learned from m)")),
        ({"shards": "moved/scenes/test"}, ("scenes",)),
    ],
)
def test_data_are_identified_by_digest(tmp_path, second, names):
    """Other test shards of the same name, other training shards in the same place, the same shards in another place."""
    for k, other in enumerate(({}, second)):
        asked = content([row("target", "count", 0.2 + 0.6 * k)], seed=k, **other)
        write_results(asked, tmp_path / f"run{k}" / "evaluation" / "a.json")
    found = lines_of(*(tmp_path / f"run{k}" for k in (0, 1)))
    assert tuple(dict.fromkeys(data.removesuffix(": count") for _, data, _ in found)) == names
    assert list(found.values()) == ([20.0, 80.0] if len(names) == 2 else [50.0])


@pytest.mark.parametrize("recorded", [True, False])
def test_runs_that_trained_on_other_data_are_other_recipes(tmp_path, recorded):
    """By the digest in the checkpoint; if it has none, by the shards in the config."""
    for k, shards in enumerate(("scenes/train", "imagenet/train")):
        held = content([row("target", "count", 0.2 + 0.6 * k)], seed=k, on=shards if recorded else "")
        held["config"]["data"]["shards"] = "/here" if recorded else shards
        write_results(held, tmp_path / f"d{k}" / "evaluation" / "a.json")
    assert list(lines_of(tmp_path / "d0", tmp_path / "d1").values()) == [20.0, 80.0]


def without(content, *path):
    *above, last = path
    part = content
    for key in above:
        part = part[key]
    del part[last]
    return content


def test_files_that_are_incomplete(tmp_path):
    file = tmp_path / "a.json"
    whole = content([row("target", "count", 0.2)])
    extra = json.loads(json.dumps(whole))
    extra["rows"][0]["colour"] = 1
    for broken, message in (
        ({"format": FORMAT}, f"{file} has no checkpoint: it is incomplete; evaluate again"),
        (
            without(json.loads(json.dumps(whole)), "seeds", "run"),
            f"{file} has no seeds.run: it is incomplete; evaluate again",
        ),
        (without(json.loads(json.dumps(whole)), "rows", 0, "accuracy"), f"{file}: row 1 has no 'accuracy'"),
        (extra, f"{file}: row 1 has 'colour', which this release does not know"),
    ):
        file.write_text(json.dumps(broken))
        with pytest.raises(ValueError) as error:
            load(file)
        assert str(error.value) == message


def test_rejects_numbers_that_are_not_finite(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(ValueError) as error:
        write_results(content([row("target", "count", 0.2, settings={"loss_by_epoch": [1.0, float("nan")]})]), file)
    expected = (
        f"{file} cannot be written: rows.0.settings.loss_by_epoch.1 (=nan) is not finite, and JSON has no such number"
    )
    assert str(error.value) == expected
    assert not list(tmp_path.iterdir())


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


def test_other_sizes_and_decoders_are_other_data(tmp_path):
    """One run at two sizes, and with two decoders: nothing is averaged, and columns have different names."""
    ways = ([16, 16], "pillow"), ([32, 32], "pillow"), ([32, 32], "fast")
    for number, (size, decoder) in enumerate(ways):
        held = content([row("target", "count", 0.1 * (number + 1))])
        held["data"] |= {"image_size": size, "decoder": decoder}
        held["config"]["data"]["image_size"] = size
        write_results(held, tmp_path / "a" / "evaluation" / f"{number}.json")
    cells = compare(load(tmp_path / "a"))
    assert {(key.group, key.data): round(cell.mean, 3) for key, cell in cells.items()} == {
        ("a, at 16 x 16", "scenes at 16 x 16, pillow"): 0.1,
        ("a, at 32 x 32", "scenes at 32 x 32, pillow"): 0.2,
        ("a, at 32 x 32", "scenes at 32 x 32, fast"): 0.3,
    }
    assert "scenes at 32 x 32, fast: count" in to_markdown(cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": {"step": {}}}, r"checkpoint.step \(={}\) must be an int"),
        ({"checkpoint": 3}, r"checkpoint \(=3\) must be a mapping or null"),
        ({"seeds": {"run": "0", "protocols": 0}}, r"seeds.run \(='0'\) must be an int"),
        ({"rows": [3]}, r"row 1 \(=3\) must be a mapping"),
        ({"config": {"data": []}}, r"is damaged \(AttributeError: .*\): evaluate again"),
    ],
)
def test_files_of_results_that_are_damaged(tmp_path, change, message):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content([row("target", "count", 0.5)]) | change))
    with pytest.raises(ValueError, match=message):
        load(file)


@pytest.mark.parametrize(
    ("name", "value"), [("label", 3), ("accuracy", "x"), ("settings", []), ("layers", 1), ("seed", "")]
)
def test_rows_that_are_damaged(tmp_path, name, value):
    held = content([row("target", "count", 0.5)])
    held["rows"][0][name] = value
    (tmp_path / "results.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match=rf"row 1 has {name} \(=.*\), which must be"):
        load(tmp_path / "results.json")
