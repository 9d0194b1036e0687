import os

import pytest
import torch

from jepa_kit.engine import step as update
from jepa_kit.engine.logging.telemetry import MEASURED, read_metrics
from jepa_kit.precision import deterministic
from jepa_kit.training import train


def settings():
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_settings_are_made_and_restored(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings()
    with deterministic(False):
        assert settings() == before
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with pytest.raises(KeyError), deterministic(True):
        raise KeyError(settings())
    assert settings() == before
    with deterministic(True):
        assert settings() == (True, True, False, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_on_a_cpu_it_changes_no_number(tiny, tmp_path, monkeypatch):
    seen, plain = [], update.train_step

    def train_step(*args, **kwargs):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return plain(*args, **kwargs)

    monkeypatch.setattr(update, "train_step", train_step)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    folders = [
        train(tiny(f"train.deterministic={wanted}", f"train.output_dir={tmp_path / wanted}"))
        for wanted in ("false", "true")
    ]
    assert seen == [False] * 6 + [True] * 6
    one, other = (
        [{key: value for key, value in line.items() if key not in MEASURED} for line in read_metrics(folder)]
        for folder in folders
    )
    assert one == other
