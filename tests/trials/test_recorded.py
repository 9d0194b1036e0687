"""Recordings are read with clear errors, and differences are reported, also NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

from jepa_kit.trials.recorded import Recorded, Report, run_check, sums

META = {"embed_dim": 4, "nested": {"depth": 2}}


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A recording made without the code under test: float32, float64 and int64 tensors, and a trajectory."""
    tensors = {
        "images": np.arange(6, dtype=np.float32).reshape(2, 3) / 3,
        "state/weight": np.array([1.0, -2.0]),
        "state/bias": np.array([[3.0]]),
        "mask": np.array([0, 1, 1]),
    }
    save_file(tensors, tmp_path / "small.safetensors")
    trajectory = [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 0.25}]
    (tmp_path / "small.json").write_text(json.dumps({"meta": META, "numbers": {"trajectory": trajectory}}))
    return tmp_path / "small"


@pytest.mark.parametrize("suffix", ["", ".json", ".safetensors"])
def test_a_recording_is_read(recording: Path, suffix: str) -> None:
    recorded = Recorded(f"{recording}{suffix}")
    assert recorded.meta == META
    assert recorded.meta["nested"]["depth"] == 2
    assert recorded.meta.get("patch_size") is None
    assert [row["loss"] for row in recorded.numbers["trajectory"]] == [1.5, 0.25]
    assert "mask" in recorded
    assert "masks" not in recorded
    assert recorded.unread == ["images", "mask", "state/bias", "state/weight"]
    assert recorded["images"].dtype == torch.float64
    np.testing.assert_allclose(recorded["images"].numpy(), np.arange(6).reshape(2, 3) / 3, rtol=1e-7)
    assert recorded["mask"].tolist() == [0, 1, 1]
    assert recorded["mask"].dtype == torch.int64
    state = recorded.under("state/")
    assert {name: x.tolist() for name, x in state.items()} == {"bias": [[3.0]], "weight": [1.0, -2.0]}
    assert recorded.unread == []


def test_a_recording_without_numbers_is_read(recording: Path) -> None:
    recording.with_suffix(".json").write_text('{"meta": {}}')
    assert dict(Recorded(recording).numbers) == {}


def test_what_is_missing_is_named(recording: Path, tmp_path: Path) -> None:
    recorded = Recorded(recording)
    with pytest.raises(
        ValueError, match=r"small\.safetensors has no tensor 'state/w'; it has state/bias, state/weight"
    ):
        recorded["state/w"]
    with pytest.raises(ValueError, match=r"has no tensor 'target'; it has images, mask, state/bias, state/weight"):
        recorded["target"]
    with pytest.raises(ValueError, match=r"has no tensor under 'grad/'; it has images, mask, state"):
        recorded.under("grad/")
    with pytest.raises(ValueError, match=r"small\.safetensors has no tensor state/\.\.\. 'w' beside bias, weight"):
        recorded.under("state/")["w"]
    with pytest.raises(ValueError, match=r"small\.json has no number 'patch_size' beside embed_dim, nested"):
        recorded.meta["patch_size"]
    with pytest.raises(ValueError, match=r"small\.json has no number 'lr' beside step, loss"):
        recorded.numbers["trajectory"][0]["lr"]
    with pytest.raises(ValueError, match=r"no file .*other\.json; a recording is other\.json and other\.safetensors"):
        Recorded(tmp_path / "other")
    recording.with_suffix(".safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file .*small\.safetensors"):
        Recorded(recording)


def test_a_damaged_recording_is_refused(recording: Path) -> None:
    recording.with_suffix(".safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match=r"small\.safetensors is damaged, or not a safetensors file"):
        Recorded(recording)
    for text in ('{"numbers": {}}', "[1]"):
        recording.with_suffix(".json").write_text(text)
        with pytest.raises(ValueError, match=r"small\.json must have an object 'meta'"):
            Recorded(recording)
    recording.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"small\.json is not a JSON file"):
        Recorded(recording)


def test_sums_are_those_of_numpy() -> None:
    x = np.random.default_rng(0).normal(size=(3, 4))
    found = sums({"w": torch.from_numpy(x).requires_grad_()})["w"]
    np.testing.assert_allclose(found.numpy(), [x.sum(), (x**2).sum()], rtol=1e-14)


def test_differences_are_the_largest_of_each_quantity() -> None:
    report = Report(1e-3)
    report.compare("loss", torch.tensor([1.5], requires_grad=True), 1.5)  # [1] and a number
    report.compare("lr", [0.0, 2.0], [0.0, 2.5])
    report.compare("lr again", [0.0, 2.0], [0.0, 2.5], relative=True, tolerance=0.2)
    theirs = {"a": torch.tensor([10.0, 0.0]), "b": torch.tensor([[0.0, 0.0]])}
    report.compare("gradient", {"b": theirs["b"] + 0.25, "a": theirs["a"] + 1}, theirs, relative=True)
    assert report.rows == [
        ("loss", 0.0, 1e-3, ""),
        ("lr", 0.5, 1e-3, ""),
        ("lr again", 0.2, 0.2, "relative"),
        ("gradient", 0.25, 1e-3, "relative, b"),
    ]
    assert report.failed == ["lr", "gradient"]
    assert report.exit_code == 1
    assert str(report).splitlines() == [
        "quantity  largest difference  tolerance",
        "loss                 0.0e+00      0.001",
        "lr                   5.0e-01      0.001  ABOVE",
        "lr again             2.0e-01        0.2  relative",
        "gradient             2.5e-01      0.001  ABOVE  relative, b",
    ]


def test_numbers_of_python_are_not_rounded_to_float32() -> None:
    report = Report(0)
    report.compare("loss", torch.tensor(1 + 1e-12, dtype=torch.float64), 1 + 1e-12)
    report.compare("losses", [0.1], torch.tensor([0.1], dtype=torch.float64))
    assert report.failed == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("relative", [False, True])
def test_nan_counts_as_above(bad: float, relative: bool) -> None:
    for ours, theirs in (([1.0, bad], [1.0, 2.0]), ([1.0, 2.0], [1.0, bad]), ([bad, 1.0], [bad, 1.0])):
        report = Report(1e9)
        report.compare("loss", {"x": torch.tensor(ours)}, {"x": torch.tensor(theirs)}, relative=relative)
        assert report.exit_code == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), r"^x: ours has shape \[2, 3\], the recorded one \[3, 2\]"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(1)}, r"^x, a: ours has shape \[2\]"),
        ({"a": torch.zeros(1)}, {"b": torch.zeros(1)}, r"^x: ours has a and the recording does not; .* has b and ours"),
        ({"a": torch.zeros(1)}, torch.zeros(1), r"^x: one side is tensors by name"),
        ({}, {}, r"^x: there is nothing to compare"),
        (torch.zeros(0), torch.zeros(0), r"^x: there is nothing to compare"),
    ],
)
def test_what_cannot_be_compared_is_an_error(
    ours: Tensor | dict[str, Tensor], theirs: Tensor | dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Report().compare("x", ours, theirs)


def compare_weight(recorded: Recorded, report: Report) -> None:
    report.compare("weight", torch.tensor([1.0, -2.00001]), recorded["state/weight"])


def test_the_command_line_prints_the_table(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check("Compare.", compare_weight, [str(recording)]) == 1
    out = capsys.readouterr().out
    assert "weight               1.0e-05      1e-08  ABOVE" in out
    assert "in the recording, but not read: images, mask, state/bias" in out
    assert "1 of 1 quantities differ by more than their tolerance: weight" in out
    assert run_check("Compare.", compare_weight, [f"{recording}.json", "--tolerance", "2e-5"]) == 0
    assert "all 1 quantities are within their tolerances" in capsys.readouterr().out


def test_the_command_line_reports_what_is_wrong(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check("Compare.", compare_weight, [f"{recording}2"]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert run_check("Compare.", lambda recorded, report: None, [str(recording)]) == 2
    assert "the check compared nothing" in capsys.readouterr().err
    for text in ("-1", "nan", "much"):
        with pytest.raises(SystemExit):
            run_check("Compare.", compare_weight, [str(recording), f"--tolerance={text}"])
        assert f"(={text}) must be a number of 0 or more" in capsys.readouterr().err
