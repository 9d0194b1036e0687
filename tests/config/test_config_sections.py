from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from jepa_kit.config import DataConfig
from jepa_kit.config.check import SECTIONS
from jepa_kit.config.sections import CheckpointConfig, OptimConfig, TrainConfig
from jepa_kit.errors import ConfigError

SCALE = ", as pixel values are in [0, 1]: divide values of the scale from 0 to 255 by 255"
DATA: dict[str, Any] = {"image_size": (32, 32)}

OUT_OF_RANGE: list[tuple[str, str, Any, str]] = [
    ("data", "image_size", (0, 32), "image_size (=(0, 32)) must be from 1 to 65,536 pixels each way"),
    ("data", "shards", (), "shards (=()) must be a path, or at least one"),
    ("data", "cache", "", "cache (='') must be a path"),
    ("data", "cache_gb", 0.0, "cache_gb (=0.0) must be above 0 and finite"),
    ("data", "retries", -1, "retries (=-1) must be at least 0"),
    ("data", "backoff", -0.5, "backoff (=-0.5) must be at least 0 and finite"),
    ("data", "timeout", 0.0, "timeout (=0.0) must be above 0 and finite"),
    ("data", "max_skipped", 1.5, "max_skipped (=1.5) must be in [0, 1]"),
    ("data", "transforms", (), "transforms (=()) must be a list of at least one"),
    ("data", "max_pixels", 0, "max_pixels (=0) must be at least 1"),
    ("data", "prefetch", -1, "prefetch (=-1) must be at least 0"),
    ("data", "mean", (0.5, math.inf, 0.5), f"mean (=(0.5, inf, 0.5)) must be in [0, 1] each{SCALE}"),
    ("data", "mean", (123.7, 116.3, 103.5), f"mean (=(123.7, 116.3, 103.5)) must be in [0, 1] each{SCALE}"),
    ("data", "std", (58.4, 57.1, 57.4), f"std (=(58.4, 57.1, 57.4)) must be in (0, 1] each{SCALE}"),
    ("data", "num_workers", 100_000, 'num_workers (=100000) must be from 0 to 1024, or "auto"'),
    ("data", "views", (), "views (=()) must be a list of at least one"),
    ("data", "image_size", (10**9, 16), "image_size (=(1000000000, 16)) must be from 1 to 65,536 pixels each way"),
    ("data", "std", (0.5, 0.0, 0.5), f"std (=(0.5, 0.0, 0.5)) must be in (0, 1] each{SCALE}"),
    ("data", "shuffle_window", 0, "shuffle_window (=0) must be at least 1"),
    ("data", "num_workers", -1, 'num_workers (=-1) must be from 0 to 1024, or "auto"'),
    ("optim", "lr", 0.0, "lr (=0.0) must be above 0 and finite"),
    ("optim", "lr", math.nan, "lr (=nan) must be above 0 and finite"),
    ("optim", "lr", math.inf, "lr (=inf) must be above 0 and finite"),
    (
        "optim",
        "lr",
        1e-4,
        "start_lr (=0.0002, its default) must not be above lr (=0.0001): give start_lr too, at most 0.0001",
    ),
    ("optim", "start_lr", -1.0, "start_lr (=-1.0) must be at least 0 and finite"),
    ("optim", "final_lr", 1.0, "final_lr (=1.0) must not be above lr (=0.001)"),
    ("optim", "start_lr", math.inf, "start_lr (=inf) must be at least 0 and finite"),
    ("optim", "final_lr", -1.0, "final_lr (=-1.0) must be at least 0 and finite"),
    ("optim", "warmup_epochs", -1.0, "warmup_epochs (=-1.0) must be at least 0 and finite"),
    ("optim", "weight_decay", (-0.1, 0.4), "weight_decay (=(-0.1, 0.4)) must be at least 0 and finite each"),
    ("optim", "betas", (0.9, 1.0), "betas (=(0.9, 1.0)) must be in [0, 1) each"),
    ("optim", "eps", 0.0, "eps (=0.0) must be above 0 and finite"),
    ("optim", "clip_grad", 0.0, "clip_grad (=0.0) must be above 0 and finite"),
    ("optim", "groups", (), "groups (=()) must be a list of at least one"),
    ("optim", "momentum", 1.0, "momentum (=1.0) must be in [0, 1)"),
    ("optim", "stretch", 0.5, "stretch (=0.5) must be at least 1 and finite"),
    ("train", "batch_size", 0, "batch_size (=0) must be at least 1"),
    ("train", "epochs", 0, "epochs (=0) must be at least 1"),
    ("train", "steps_per_epoch", 0, "steps_per_epoch (=0) must be at least 1"),
    ("train", "seed", -1, "seed (=-1) must be from 0 to 2**63 - 1"),
    ("train", "seed", 2**63, f"seed (={2**63}) must be from 0 to 2**63 - 1"),
    ("train", "output_dir", "", "output_dir (='') must be a local path, not a URL"),
    ("checkpoint", "dir", "", "dir (='') must be a path or a URL"),
    ("train", "init_from", "", "init_from (='') must be a path or a URL"),
    ("train", "log_every", 0, "log_every (=0) must be at least 1"),
    ("checkpoint", "every", 0, "every (=0) must be at least 1"),
    ("checkpoint", "keep", 0, "keep (=0) must be at least 1"),
    ("train", "accumulate", 0, "accumulate (=0) must be at least 1"),
    ("train", "wandb", "", "wandb (='') must be a project's name"),
    ("checkpoint", "keep_every", 0, "keep_every (=0) must be at least 1"),
    ("train", "nonfinite_limit", 0, "nonfinite_limit (=0) must be at least 1"),
    ("train", "device", "", "device (='') must be a device"),
    ("evaluate", "every", 0, "every (=0) must be at least 1"),
    ("evaluate", "samples", 15, "samples (=15) must be at least 16"),
    ("evaluate", "probe_samples", 31, "probe_samples (=31) must be at least 32"),
    ("evaluate", "shards", "", "shards (='') must be a path"),
]


@pytest.mark.parametrize(("section", "name", "value", "message"), OUT_OF_RANGE)
def test_ranges_are_checked_when_a_section_is_made(section: str, name: str, value: Any, message: str) -> None:
    values = (DATA if section == "data" else {}) | {name: value}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SECTIONS[section](**values)


def test_every_checked_field_has_a_test() -> None:
    checked = {(s, f.name) for s, cls in SECTIONS.items() for f in dataclasses.fields(cls) if f.metadata}
    assert {(section, name) for section, name, _, _ in OUT_OF_RANGE} == checked


def test_a_section_names_all_its_mistakes() -> None:
    with pytest.raises(ValueError, match=r"^batch_size \(=0\) must be at least 1\nepochs \(=-1\) must be at least 1$"):
        TrainConfig(batch_size=0, epochs=-1)


def test_the_edges_of_the_ranges() -> None:
    DataConfig(image_size=(1, 1), num_workers=0)
    OptimConfig(lr=1e-6, start_lr=0.0, final_lr=1e-6, warmup_epochs=0.0, weight_decay=(0.0, 0.0), betas=(0.0, 0.0))
    TrainConfig(batch_size=1, epochs=1, steps_per_epoch=1, seed=2**63 - 1)


def test_defaults_are_the_release_s() -> None:
    """Published: lr 2e-4 -> 1e-3 in 40 epochs, -> 1e-6; weight decay 0.04 -> 0.4; batch 2048; crops of (0.3, 1.0)."""
    assert OptimConfig() == OptimConfig(
        lr=1e-3, start_lr=2e-4, final_lr=1e-6, warmup_epochs=40, weight_decay=(0.04, 0.4), betas=(0.9, 0.999), eps=1e-8
    )
    assert (TrainConfig().batch_size, TrainConfig().epochs) == (2048, 300)
    assert DataConfig(image_size=(224, 224)).transforms[0]["scale"] == (0.3, 1.0)


def test_what_would_not_be_evaluated_is_an_error(problems: Callable[..., list[str]]) -> None:
    assert problems("evaluate: {samples: 32, probe: knn}") == [
        "evaluate.samples (=32) has no effect if every is null",
        "evaluate.probe (='knn') has no effect if every is null",
    ]
    assert problems("evaluate: {every: 10, label: count, probe_samples: 64}") == [
        "evaluate.probe_samples (=64) has no effect if probe is none",
        "evaluate.label (='count') has no effect if probe is none",
    ]
    assert problems("evaluate: {every: 10, probe: linear}") == [
        "evaluate.label (=None) must name the label that probe (='linear') predicts"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.5}, "momentum (=0.5) has no effect if name is adamw"),
        ({"name": "sgd", "betas": (0.9, 0.95)}, "betas (=(0.9, 0.95)) has no effect if name is sgd"),
        ({"name": "lars", "eps": 1e-6}, "eps (=1e-06) has no effect if name is lars"),
        ({"clip_each": True}, "clip_each (=True) has no effect if clip_grad is null"),
    ],
)
def test_options_of_another_optimiser(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        OptimConfig(**options)
    assert OptimConfig(name="lars", momentum=0.5, clip_grad=3.0, clip_each=True).momentum == 0.5


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("[]", "optim.groups (=()) must be a list of at least one"),
        ("[{lr: 0.5}]", "optim.groups[0].match is missing: 'optim.groups[0]' needs it; it must be a str"),
        ("[{match: '', lr: 0.5}]", "optim.groups[0].match (='') must be a pattern of names"),
        ("[{match: a, lr: -1}]", "optim.groups[0].lr (=-1.0) must be at least 0 and finite"),
        ("[{match: a, weight_decay: -1}]", "optim.groups[0].weight_decay (=-1.0) must be at least 0 and finite"),
        ("[{match: a}]", "optim.groups[0].match (='a') has no effect without lr or weight_decay"),
    ],
)
def test_groups_of_parameters(problems: Callable[..., list[str]], groups: str, message: str) -> None:
    assert problems(f"optim: {{groups: {groups}}}") == [message]


def test_sections_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 3  # type: ignore[misc]


def test_range_errors_have_the_path_in_a_config(problems: Callable[..., list[str]]) -> None:
    assert problems("optim: {lr: 0, eps: -1}\ntrain: {epochs: 0}\ndata: {image_size: 0}") == [
        "data.image_size (=(0, 0)) must be from 1 to 65,536 pixels each way",
        "optim.lr (=0.0) must be above 0 and finite",
        "optim.eps (=-1.0) must be above 0 and finite",
        "train.epochs (=0) must be at least 1",
    ]


def test_a_range_error_is_told_beside_an_ill_typed_value(problems: Callable[..., list[str]]) -> None:
    assert problems("train: {epochs: 0, seed: x}") == [
        "train.seed (='x') must be an int",
        "train.epochs (=0) must be at least 1",
    ]


def test_relations(problems: Callable[..., list[str]]) -> None:
    assert problems("optim: {lr: 1e-4, final_lr: 1}") == [
        "optim.start_lr (=0.0002, its default) must not be above lr (=0.0001): give start_lr too, at most 0.0001",
        "optim.final_lr (=1.0) must not be above lr (=0.0001)",
    ]
    assert problems("train: {epochs: 40}") == ["optim.warmup_epochs (=40.0) must be below train.epochs (=40)"]
    assert problems("train: {epochs: 20}\noptim: {stretch: 1.5}") == [
        "optim.warmup_epochs (=40.0) must be below optim.stretch times train.epochs (=30.0)"
    ]


def test_relations_of_checkpoints_and_nonfinite_steps():
    with pytest.raises(ConfigError, match=r"keep_every \(=50\) must be a multiple of every \(=20\)"):
        CheckpointConfig(every=20, keep_every=50)
    with pytest.raises(ConfigError, match=r"nonfinite_limit \(=5\) has no effect if on_nonfinite is stop"):
        TrainConfig(nonfinite_limit=5)
