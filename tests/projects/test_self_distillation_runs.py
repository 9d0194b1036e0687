"""Whole tiny runs of DINO and iBOT: resumed while prototypes are frozen, and in several processes or parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_dino
import test_ibot
import torch

from jepa_kit.config import Config, config_from_dict
from jepa_kit.engine import step as update
from jepa_kit.engine.checkpoint.format import load_checkpoint
from jepa_kit.engine.logging.telemetry import MEASURED, read_metrics
from jepa_kit.training import train

RAW = {"dino": test_dino.RAW, "ibot": test_ibot.RAW | test_ibot.PATCH_HEAD}


def config(name: str, shards: Path, folder: Path, *overrides: str) -> Config:
    """A run of 2 epochs of 3 steps; prototypes are frozen in the first."""
    raw = RAW[name]
    train_section = {"batch_size": 4, "epochs": 2, "steps_per_epoch": 3, "precision": "float32", "log_every": 1}
    sections: dict[str, Any] = {
        "data": raw["data"] | {"num_workers": 0, "shards": str(shards)},
        "optim": {"warmup_epochs": 1, "clip_grad": 3.0, "clip_each": True, "counting": "both_ends", "start_lr": 0.0},
        "train": train_section | {"device": "cpu", "output_dir": str(folder)},
    }
    return config_from_dict({**raw, "imports": [f"projects.{name}.recipe"], **sections}, overrides)


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in read_metrics(folder)]


def train_until(run: Config, step: int) -> None:
    """Train, with a KeyboardInterrupt in the given step."""
    count, plain = iter(range(step + 1)), update.train_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(count) == step:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "train_step", counted)
        with pytest.raises(KeyboardInterrupt):
            train(run)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["file", "sharded"])
@pytest.mark.parametrize("name", RAW)
def test_a_run_that_is_resumed_after_the_frozen_epoch_is_the_run(
    name: str, kind: str, shards: Path, tmp_path: Path
) -> None:
    whole = train(config(name, shards, tmp_path / "whole"))
    other = config(name, shards, tmp_path / "other", f"checkpoint.format={kind}")
    train_until(other, 4)
    torch.manual_seed(99)  # the state of this process must not matter
    resumed = train(other, resume=True)
    assert numbers(resumed) == numbers(whole)
    assert {"figures/teacher_entropy", "figures/kl"} <= numbers(whole)[0].keys()
    first, second = load_checkpoint(whole), load_checkpoint(resumed)
    assert all(torch.equal(value, second.model[key]) for key, value in first.model.items())
    assert first.model["targets.centre"].any()


@pytest.mark.integration
@pytest.mark.parametrize(("name", "parallel"), [("dino", "ddp"), ("ibot", "fsdp")])
def test_two_processes_train_as_one(
    name: str, parallel: str, shards: Path, tmp_path: Path, ranks: Any, repository: Path
) -> None:
    """The centre is that of all rows, and the teacher follows sharded networks too."""
    # biases of keys, and those before batch norm, have no gradient but rounding errors, which AdamW enlarges
    still = "encoder.qkv_bias=false", "head.norm=none"
    one, two = train(config(name, shards, tmp_path / "one", *still)), tmp_path / "two"
    given = ["--config-file", one / "config.yaml", "--output-dir", two, f"train.parallel={parallel}"]
    ranks(2, repository / "tools/train_net.py", *given)
    for line, other in zip(numbers(one), numbers(two), strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-5)
    first, second = (load_checkpoint(folder).model for folder in (one, two))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=1e-4, msg=key)
