"""A recipe may have a default for a slot; then a config may lack it."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from jepa_kit.config import config_from_dict
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import build_recipe
from jepa_kit.recipe import Recipe
from jepa_kit.registry import RECIPES

RAW = {
    "recipe": {"name": "two_heads"},
    "encoder": {"name": "vit", "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1},
    "head": {"name": "prototypes", "out_dim": 3},
    "data": {"image_size": 16},
}
SECOND = {"second_head": {"name": "prototypes", "out_dim": 5}}


@pytest.fixture(autouse=True)
def two_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    RECIPES.import_members()
    monkeypatch.setattr(RECIPES, "_obj_map", dict(RECIPES._obj_map))

    @RECIPES.register("two_heads")
    class TwoHeads(Recipe):
        masked = False
        head_inputs: ClassVar = {"second_head": "head"}

        def __init__(self, *, encoder: nn.Module, head: nn.Module, second_head: nn.Module | None = None) -> None:
            super().__init__(encoder=encoder)
            self.head, self.second_head = head, second_head


def test_a_slot_that_is_given_is_built() -> None:
    config = config_from_dict(RAW | SECOND)
    head = build_recipe(config).second_head
    assert head is not None
    assert head(torch.zeros(2, 3)).shape == (2, 5)
    assert config_from_dict(config.to_dict()) == config


def test_a_slot_that_is_not_given_is_none() -> None:
    config = config_from_dict(RAW)
    assert build_recipe(config).second_head is None
    assert "second_head" not in config.to_dict()
    assert config_from_dict(config.to_dict()) == config


def test_a_slot_without_a_default_is_missing() -> None:
    with pytest.raises(ConfigError, match="head is missing: give it a mapping with a name"):
        config_from_dict({key: value for key, value in RAW.items() if key != "head"} | SECOND)
