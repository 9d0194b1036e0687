"""Configs of simclr, moco and msn: they build with the sources' settings, train, resume, and reject mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jepa_kit.config import load_config
from jepa_kit.engine import step as update
from jepa_kit.engine.checkpoint.format import load_checkpoint
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import build_recipe
from jepa_kit.training import train

PROJECTS = Path(__file__).parents[2] / "projects"

SOURCE = {
    "simclr/in1k_vitb16": ("simclr", [224] * 2, 4096, 0.1, 2048, 128),
    "moco/in1k_vitb16": ("moco_v3", [224] * 2, 4096, 0.2, 4096, 256),
    "moco/queue_in1k_vitb16": ("moco", [224] * 2, 256, 0.2, 768, 128),
    "msn/in1k_vits16": ("msn", [224] * 2 + [96] * 10, 1024, 0.1, 2048, 256),
}
"""Config -> recipe, sides of the views, batch, temperature, hidden width and width of the projection."""

QUEUE = ["recipe={name: moco, queue: 10}", "head={name: mlp, hidden: 8, out_dim: 4}", "prediction_head=null"]


def path(config: str) -> Path:
    project, name = config.split("/")
    return PROJECTS / project / "configs" / f"{name}.yaml"


def test_every_config_is_listed() -> None:
    found = {f"{name}/{file.stem}" for name in ("simclr", "moco", "msn") for file in path(f"{name}/x").parent.iterdir()}
    assert found == {*SOURCE, "simclr/quick", "moco/quick", "msn/quick"}


@pytest.mark.parametrize("name", SOURCE)
def test_settings_of_the_sources(name: str) -> None:
    config = load_config(path(name))
    with torch.device("meta"):
        recipe = build_recipe(config)
    head = config.slots["head"].options
    sides = [height for height, _ in config.data.view_sizes]
    found = (config.recipe.name, sides, config.train.batch_size, recipe.temperature, head["hidden"], head["out_dim"])
    assert found == SOURCE[name]
    assert recipe.encoder.class_token


@pytest.fixture
def quick(shards, tmp_path):
    """A quick config with 4 steps of 4 small images and a tiny encoder."""

    def make(name: str, *overrides: str):
        changes = [
            "encoder.embed_dim=12",
            "encoder.depth=1",
            "encoder.num_heads=2",
            f"data.shards={shards}",
            "data.num_workers=0",
            "train.batch_size=4",
            "train.epochs=2",
            "train.steps_per_epoch=2",
            "train.precision=float32",
            "train.device=cpu",
            f"train.output_dir={tmp_path / 'run'}",
            "checkpoint.every=2",
        ]
        return load_config(path(f"{name}/quick"), [*changes, *overrides])

    return make


@pytest.mark.integration
@pytest.mark.parametrize("name", ["simclr", "moco", "msn"])
def test_runs(quick, name: str) -> None:
    folder = train(quick(name, "train.epochs=1"))
    state = load_checkpoint(folder / "checkpoint_00000002.pt").model
    assert all(x.isfinite().all() for x in state.values())


@pytest.mark.integration
def test_a_resumed_run_has_the_queue_of_one_that_was_not_interrupted(quick, tmp_path, monkeypatch) -> None:
    whole = train(quick("moco", *QUEUE))
    changed = quick("moco", *QUEUE, f"train.output_dir={tmp_path / 'resumed'}")
    plain, calls = update.train_step, iter(range(3))

    def interrupted(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(update, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(changed)
    resumed = train(changed, resume=True)
    states = [load_checkpoint(folder / "checkpoint_00000004.pt").model for folder in (whole, resumed)]
    assert states[0]["pointer"] == 16 % 10
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "simclr",
            ["data.views=[{count: 1}]"],
            r"data.views \(=1 in all\) must give at least 2 to the recipe 'simclr'",
        ),
        ("moco", ["data.views=[{count: 3}]"], r"data.views \(=3 in all\) must give 2 to the recipe 'moco_v3'"),
        (
            "msn",
            ["data.views=[{count: 3}]"],
            r"data.views must have an entry with masked: true, for the masker of 'msn'",
        ),
        ("simclr", ["head=null"], "head is missing"),
        ("moco", ["prediction_head=null"], "prediction_head is missing"),
        ("msn", ["prototype_head=null"], "prototype_head is missing"),
        ("simclr", ["target_update={name: ema}"], "target_update is a slot that the recipe 'simclr' does not have"),
        ("moco", ["recipe={name: moco}"], "prediction_head is a slot that the recipe 'moco' does not have"),
        ("moco", ["recipe.queue=8"], "recipe.queue is not an option of 'moco_v3'"),
    ],
)
def test_mistakes_in_configs(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(path(f"{name}/quick"), overrides)


@pytest.mark.parametrize("name", ["moco", "msn"])
def test_no_momentum_encoder(name: str) -> None:
    config = load_config(path(f"{name}/quick"), ["target_update={name: none}"])
    with pytest.raises(ConfigError, match="recipe: target_update makes no target encoder, which this recipe needs"):
        build_recipe(config)
