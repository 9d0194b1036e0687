"""tools/compare.py as a user meets it."""

import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from test_compare import content, row

from jepa_kit.evaluation.tables.results import write_results

TOOL = Path(__file__).parents[2] / "tools" / "compare.py"


@pytest.fixture(scope="module")
def tool():
    return importlib.import_module("jepa_kit.tools.compare")


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        rows = [
            row(network, label, 0.5, protocol=protocol)
            for network in ("target", "untrained")
            for label in ("count", "shape")
            for protocol in ("knn", "linear")
        ]
        write_results(content(rows, seed=seed), tmp_path / f"seed{seed}" / "evaluation" / "a.json")
    return [str(tmp_path / "seed0"), str(tmp_path / "seed1")]


def test_a_table_and_its_files(tool, runs, tmp_path, capsys):
    assert tool.main([*runs, "--output", str(tmp_path / "new" / "c")]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[2].startswith("| seed* | target encoder | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0    |")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["c.csv", "c.md", "c.png"]
    assert (tmp_path / "new" / "c.md").read_text() == printed
    assert tool.main([*runs, "--output", str(tmp_path / "new" / "d"), "--format", "pdf"]) == 0
    assert (tmp_path / "new" / "d.pdf").read_bytes().startswith(b"%PDF")
    assert not (tmp_path / "new" / "d.png").exists()


def test_a_choice_of_rows(tool, runs, capsys):
    assert tool.main([*runs, "--protocol", "knn", "--network", "target", "--label", "shape"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "count" not in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "liner"], "--protocol (='liner') must be one of those in the results: knn, linear"),
        (["--network", "context"], "--network (='context') must be one of those in the results: target, untrained"),
        (["--format", "pdf"], "--format (='pdf') would do nothing without --output: there is no figure"),
        (["--label", "colour"], "--label (='colour') must be one of those in the results: count, shape"),
    ],
)
def test_a_choice_that_is_not_there(tool, runs, capsys, options, message):
    assert tool.main([*runs, *options]) == 2
    assert capsys.readouterr().err == f"compare.py: {message}\n"


def test_an_interruption_from_the_keyboard(tool, runs, monkeypatch, capsys):
    def interrupted(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr("jepa_kit.evaluation.tables.runs.load", interrupted)
    assert tool.main(runs) == 130
    assert capsys.readouterr().err == "\ncompare.py: interrupted\n"


def test_folders_that_hold_nothing(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path)]) == 2
    assert "has no results" in capsys.readouterr().err
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "a.json").write_text(json.dumps({"format": "x"}))
    assert tool.main([str(tmp_path)]) == 2
    assert "evaluate again" in capsys.readouterr().err
