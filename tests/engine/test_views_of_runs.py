"""Runs of a recipe with several views: logged, resumed exactly, and replayed after a bad step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import nn

from jepa_kit.config import Config
from jepa_kit.engine.checkpoint.format import checkpoints, load_checkpoint
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.engine.replay import read_dump, views_of
from jepa_kit.interfaces import Encoder
from jepa_kit.recipe import Recipe
from jepa_kit.registry import RECIPES
from jepa_kit.structures import START, Output, Progress, View
from jepa_kit.training import train

Tiny = Callable[..., Config]
VIEWS = "[{count: 2}, {image_size: 8, count: 3, transforms: [{name: random_resized_crop}, {name: color_jitter}]}]"
RUN = (f"data.views={VIEWS}", "recipe={name: agreement}", "target_update={name: none}")
GONE = ("masker", "predictor", "target", "loss")
SIDES = [16, 16, 8, 8, 8]


@pytest.fixture(autouse=True)
def agreement(monkeypatch: pytest.MonkeyPatch) -> list[list[View]]:
    """A recipe whose views shall have one mean token; the views of each call."""
    RECIPES.import_members()
    monkeypatch.setattr(RECIPES, "_obj_map", dict(RECIPES._obj_map))
    seen: list[list[View]] = []

    @RECIPES.register("agreement")
    class Agreement(Recipe):
        num_views: ClassVar = (2, None)
        masked = False

        def __init__(self, *, encoder: nn.Module, target_update: Any) -> None:
            super().__init__(encoder=encoder, target_update=target_update)

        def forward(self, *views: View, progress: Progress = START) -> Output:
            seen.append(list(views))
            means = [
                cast(Encoder, self.encoder)(view.images).unflatten(0, (len(view), -1)).mean(1)
                for view in views[: 2 if all(v.images.shape == views[0].images.shape for v in views) else None]
            ]
            loss = torch.stack(means).var(0).mean()
            return Output(loss, {"variance": loss})

    return seen


def config_of(tiny: Tiny, *overrides: str) -> Config:
    return tiny(*RUN, *(f"{slot}=null" for slot in GONE), *overrides)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoints(folder)[-1]).model


def test_a_run(tiny: Tiny, tmp_path: Path, agreement: list[list[View]]) -> None:
    """All views are normalised float32; a run that was stopped gives the same weights."""
    folder = train(config_of(tiny, "checkpoint.keep=9", "checkpoint.every=2"))
    views = agreement[-1]
    assert [view.images.shape for view in views] == [(4, 3, side, side) for side in SIDES]
    assert all(view.images.dtype == torch.float32 and -3 < view.images.min() < 0 for view in views)
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(6))
    whole = state(folder)
    for path in checkpoints(folder)[1:]:
        path.unlink()
    train(config_of(tiny), resume=True)
    assert [line["loss"] for line in read_metrics(folder)] == [line["loss"] for line in lines]
    assert all(torch.equal(value, state(folder)[name]) for name, value in whole.items())


def test_accumulated_parts_have_all_views(tiny: Tiny, agreement: list[list[View]]) -> None:
    train(config_of(tiny, "train.accumulate=2"))
    assert [view.images.shape for view in agreement[-1]] == [(2, 3, side, side) for side in SIDES]


def test_a_bad_step_is_replayed_with_all_views(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, agreement: list[list[View]], capsys: pytest.CaptureFixture[str]
) -> None:
    step = importlib.import_module("jepa_kit.engine.step")
    plain, calls = step.normalize, []

    def normalize(images: torch.Tensor, *statistics: Any) -> torch.Tensor:
        calls.append(1)
        images = plain(images, *statistics)
        if len(calls) == 5 * 2 + 3:  # the third view of step 2
            images[0] = math.nan
        return images

    monkeypatch.setattr(step, "normalize", normalize)
    folder = train(config_of(tiny, "train.on_nonfinite=skip", "encoder.drop_path=0.0"))
    used = agreement[-6:][2]  # of step 2
    path = folder / "bad_step_00000002" / "rank_0000.pt"
    views = views_of(read_dump(path))
    assert [view.images.shape for view in views] == [(4, 3, side, side) for side in SIDES]
    config = config_of(tiny)
    for k, (saved, view) in enumerate(zip(views, used, strict=True)):
        expected = plain(saved.images, config.data.mean, config.data.std)
        assert torch.equal(expected, view.images) == (k != 2)  # and the NaN came later
    assert importlib.import_module("jepa_kit.tools.replay_step").main([str(path)]) == 3
    assert "all numbers are finite this time" in capsys.readouterr().out
