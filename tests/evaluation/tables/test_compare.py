"""Comparison of runs: groups of seeds, names, tables, and rejected files."""

import csv
import io
import json
from dataclasses import asdict

import numpy as np
import pytest

from jepa_kit.evaluation.tables.compare import Cell, Column, Line, compare, to_csv, to_markdown
from jepa_kit.evaluation.tables.cost import cost_of
from jepa_kit.evaluation.tables.figure import figure
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
    cells = compare(load(*runs)).cells
    count = Column("scenes", "knn", "", "count")
    cell = cells[Line("small_seed*", "target"), count]
    assert (cell.mean, cell.deviation, cell.runs) == pytest.approx((0.5, np.std([0.4, 0.5, 0.6], ddof=1), 3))
    assert cells[Line("", "pixels"), count] == Cell(pytest.approx(0.2), None, pytest.approx(0.01), 1, 0.125)
    assert cells[Line("deep", "target"), count] == Cell(0.7, None, 0.01, 1, 0.125)


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
    assert Line("small_seed*", "target") in compare(load(*runs)).lines
    changed["config"]["data"]["decoder"] = "fast"
    write_results(changed, file)
    assert len({run.recipe for run in load(*runs[:3])}) == 2


def test_the_table(runs):
    """A line for each recipe, and baselines once."""
    assert to_markdown(compare(load(*runs))).splitlines() == [
        "| run         | features       | knn: count  | knn: shape  |",
        "| ----------- | -------------- | ----------- | ----------- |",
        "| small_seed* | target encoder | 50.0 ± 10.0 | 60.0 ± 10.0 |",
        "| deep        | target encoder | 70.0 (1.0)  |             |",
        "|             | pixels         | 20.0 (1.0)  |             |",
        "|             | chance         | 12.5        | 12.5        |",
    ]


LAYERED = (
    ("target", "last4", "mean"),
    ("untrained", "last4", "mean"),
    ("pixels", None, None),
    ("patches", None, "mean"),
)


def write_seeds(place, *, seeds=(0, 1), encoder, rate, shift=0.0, pooling="mean"):
    """Write results of a recipe: two protocols, two labels, three baselines."""
    for seed in seeds:
        rows = [
            row(
                network,
                label,
                0.2 + 0.1 * k + 0.02 * seed * (network in ("target", "untrained")) + shift * (network == "target"),
                protocol=protocol,
                layers=layers,
                pooling=pooling if tokens else None,
                seed=seed if network == "untrained" else None,
            )
            for k, (network, layers, tokens) in enumerate(LAYERED)
            for protocol in ("knn", "logistic")
            for label in ("count", "shape")
        ]
        held = content(rows, seed=seed)
        held["config"]["encoder"], held["config"]["optim"] = {"embed_dim": encoder}, {"lr": rate}
        write_results(held, place / f"seed{seed}" / "evaluation" / "a.json")
    return [place / f"seed{seed}" for seed in seeds]


def test_columns_are_protocols_and_labels(tmp_path):
    """Baselines without layers are in the columns of the layers that the others have."""
    places = [p for k in (1, 2) for p in write_seeds(tmp_path / f"r{k}", encoder=8, rate=k, shift=0.1 * k)]
    lines = to_markdown(compare(load(*places))).splitlines()
    heads = ["run", "features", *(f"{p}, last4: {label}" for p in ("knn", "logistic") for label in ("count", "shape"))]
    assert [head.strip() for head in lines[0].strip("|").split("|")] == heads
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells == [
        ["r1/seed*", "target encoder", *["31.0 ± 1.4"] * 4],
        ["r2/seed*", "target encoder", *["41.0 ± 1.4"] * 4],
        ["", "untrained", *["31.0 ± 1.4"] * 4],  # two seeds, each of which two runs have
        ["", "pixels", *["40.0 (1.0)"] * 4],
        ["", "patches", *["50.0 (1.0)"] * 4],
        ["", "chance", *["12.5"] * 4],
    ]


def test_an_untrained_network_is_that_of_its_encoder(tmp_path):
    places = [p for k in (1, 2, 3) for p in write_seeds(tmp_path / f"r{k}", encoder=min(k, 2), rate=k)]
    table = compare(load(*places))
    names = [line.recipe for line in table.lines if line.network == "untrained"]
    assert names == ["r1/seed*", "r2/seed* and 1 more"]
    assert table.untrained == {
        "r1/seed*": Line(names[0], "untrained"),
        "r2/seed*": Line(names[1], "untrained"),
        "r3/seed*": Line(names[1], "untrained"),
    }


def test_poolings_are_columns(tmp_path):
    """Patches have one figure for each pooling, pixels the same for both."""
    for k, pooling in enumerate(("mean", "quarters")):
        rows = [
            row(
                name,
                "count",
                0.1 * n + 0.05 * k * (name != "pixels"),
                layers=layers,
                pooling=pooling if tokens else None,
            )
            for n, (name, layers, tokens) in enumerate(LAYERED, 2)
        ]
        rows = [asdict(one) | {"options": {"pooling": pooling}} for one in rows]
        write_results(content([Row(**one) for one in rows]), tmp_path / "r" / "evaluation" / f"{k}.json")
    table = compare(load(tmp_path / "r"))
    assert [column.title for column in table.columns] == [
        "knn pooling=mean, last4: count",
        "knn pooling=quarters, last4: count",
    ]
    first, second = table.columns
    found = [[round(table.cells[line, one].mean, 3) for one in (first, second)] for line in table.lines]
    assert found == [[0.2, 0.25], [0.3, 0.35], [0.4, 0.4], [0.5, 0.55]]


def test_a_pooling_that_all_have_is_in_the_title(tmp_path):
    places = write_seeds(tmp_path / "r", encoder=8, rate=1, pooling="quarters")
    assert compare(load(*places)).columns[0].title == "knn, quarters, last4: count"


def write_metrics(place, lines):
    keys = ("step", "samples", "images_per_second", "gflop_per_image")
    text = [json.dumps(dict(zip(keys, line, strict=False))) for line in lines]
    (place / "metrics.jsonl").write_text("".join(f"{line}\n" for line in text))


def test_the_cost_of_training(runs):
    """64 images in 1 s and 576 in 18 s up to step 10; half of the steps logged; no FLOP; no metrics."""
    write_metrics(runs[0], [(0, 64, 64, 0.5), (9, 640, 32, 1.0), (19, 1280, 1, 9.0)])
    write_metrics(runs[1], [(0, 64, 64, 0.5), (4, 320, 32, 1.0)])
    write_metrics(runs[2], [(9, 640, 64)])
    small = [cost_of(run) for run in load(*runs)]
    assert small[0] == pytest.approx((10, 640, 0.5 * 0.064 + 0.576, 19 / 3600))
    assert small[1] == pytest.approx((10, 640, 2 * (0.5 * 0.064 + 0.256), 2 * 9 / 3600))
    assert small[2] == (10, 640, None, pytest.approx(10 / 3600))
    assert small[3] is None


def test_cost_columns(runs, tmp_path):
    """Beside the checkpoint, if the results are elsewhere; of a mean, only what all runs have."""
    for run in runs[:3]:
        write_metrics(run, [(9, 640, 64, 1.5)])
    table = compare(load(*runs))
    assert table.costs == {"small_seed*": (10, 640, pytest.approx(0.96), pytest.approx(1 / 360))}
    lines = [[c.strip() for c in line.strip("|").split("|")][-4:] for line in to_markdown(table).splitlines()]
    none = ["", "", "", ""]
    assert [lines[0], *lines[2:]] == [
        ["steps", "images", "TFLOP", "hours"],
        ["10", "640", "0.96", "0.00278"],
        *[none] * 3,
    ]
    assert next(csv.DictReader(io.StringIO(to_csv(table))))["images"] == "640.0"
    write_metrics(runs[1], [(9, 640, 64)])
    assert compare(load(*runs)).costs["small_seed*"].tflop is None
    held = content([row("target", "count", 0.5)])
    held["checkpoint"]["file"] = str(runs[0] / "x.pt")
    (one,) = load(write_results(held, tmp_path / "elsewhere" / "a.json"))
    assert cost_of(one) is not None


def test_csv_has_every_figure(runs):
    table = compare(load(*runs))
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(lines) == len(table.cells) == 4
    assert (lines[0]["recipe"], lines[0]["label"], float(lines[0]["mean"])) == ("small_seed*", "count", 0.5)
    assert lines[-1]["deviation"] == ""


def test_several_data_sets_have_different_names(tmp_path):
    for k, shards in enumerate(("data/scenes/test", "data/cifar10-test")):
        asked = content([row("target", "count", 0.5)], shards=shards, held=str(k))
        write_results(asked, tmp_path / f"evaluation/{k}.json")
    heads = to_markdown(compare(load(tmp_path))).splitlines()[0]
    assert "scenes: knn: count" in heads
    assert "cifar10-test: knn: count" in heads


def test_the_newer_file_counts(tmp_path):
    import os

    for k, accuracy in enumerate((0.5, 0.6)):
        file = write_results(content([row("target", "count", accuracy)]), tmp_path / f"evaluation/{1 - k}.json")
        os.utime(file, (k, k))
    ((answer,),) = (run.rows for run in load(tmp_path))
    assert answer.row.accuracy == 0.6


def drawn_figure(monkeypatch, table, file, **options):
    """Draw a figure; return matplotlib's."""
    kept = []
    monkeypatch.setattr("jepa_kit.evaluation.tables.figure.save_figure", lambda fig, *a, **k: kept.append(fig) or a[0])
    figure(table, file, **options)
    return kept[0]


def test_a_figure_has_a_line_for_each_recipe_and_a_legend_inside(tmp_path, monkeypatch):
    """Eight recipes, two protocols, two labels: nothing is clipped, and the legend does not grow with the recipes."""
    places = [p for k in range(8) for p in write_seeds(tmp_path / f"a recipe {k}", encoder=8, rate=k)]
    fig = drawn_figure(monkeypatch, compare(load(*places)), tmp_path / "c.png")
    axes = fig.get_axes()
    assert len(axes) == 4
    assert [t.get_text() for t in axes[0].get_yticklabels()] == [f"a recipe {k}/seed*" for k in range(8)]
    (legend,) = fig.legends
    assert [t.get_text() for t in legend.get_texts()] == ["target encoder", "untrained", "pixels", "patches", "chance"]
    fig.draw_without_rendering()
    whole = fig.bbox
    artists = [legend, *(ax.title for ax in axes), *axes[0].get_yticklabels()]
    for box in (artist.get_window_extent() for artist in artists):
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    targets = [c for c in axes[0].containers if c.get_label() == "target encoder"]
    assert [float(c.lines[0].get_xdata()[0]) for c in targets] == pytest.approx([21.0] * 8)


@pytest.mark.parametrize(("labels", "panels"), [(1, 1), (5, 6)])
def test_panels_fill_rows(tmp_path, monkeypatch, labels, panels):
    rows = [row("target", f"label {k}", 0.5) for k in range(labels)]
    write_results(content(rows), tmp_path / "r" / "evaluation" / "a.json")
    fig = drawn_figure(monkeypatch, compare(load(tmp_path / "r")), tmp_path / "c.png")
    assert len(fig.get_axes()) == panels


@pytest.mark.parametrize(("form", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_figure_is_written(runs, tmp_path, form, begins):
    assert figure(compare(load(*runs)), tmp_path / "new" / f"c.{form}", format=form).read_bytes().startswith(begins)


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
    cells = compare(load(*paths)).cells
    return {(k.recipe, f"{c.data}: {c.label}", c.protocol): round(100 * f.mean, 1) for (k, c), f in cells.items()}


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
    table = compare(load(tmp_path / "a"))
    assert {(line.recipe, column.data): round(cell.mean, 3) for (line, column), cell in table.cells.items()} == {
        ("a, at 16 x 16", "scenes at 16 x 16, pillow"): 0.1,
        ("a, at 32 x 32", "scenes at 32 x 32, pillow"): 0.2,
        ("a, at 32 x 32", "scenes at 32 x 32, fast"): 0.3,
    }
    assert "scenes at 32 x 32, fast: knn: count" in to_markdown(table)


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
