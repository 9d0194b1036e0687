"""``data.views``: entries with a schema of their own, and checks against the recipe, the masker and the encoder."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from torch import nn

from jepa_kit.config import Config, config_from_dict
from jepa_kit.config.data_section import DataConfig, ViewConfig
from jepa_kit.engine.build import training_views
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import part_problems
from jepa_kit.recipe import Recipe
from jepa_kit.registry import RECIPES, TRANSFORMS

ENCODER = {"name": "vit", "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
CROP = {"name": "random_resized_crop", "scale": [0.05, 0.4]}
JITTER = {"name": "color_jitter"}


class Silent:
    """A transform that says nothing of its draws."""

    num_draws = 0

    def __init__(self) -> None:
        pass

    def __call__(self, image: Any, draws: Any) -> Any:
        return image


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """``views`` takes two and more, ``masked_views`` up to four with a masker."""
    RECIPES.import_members()
    monkeypatch.setattr(RECIPES, "_obj_map", {"jepa": RECIPES.get("jepa")})  # without those of other tests

    TRANSFORMS.import_members()
    monkeypatch.setattr(TRANSFORMS, "_obj_map", {**TRANSFORMS._obj_map, "silent": Silent})

    @RECIPES.register("views")
    class Views(Recipe):
        num_views: ClassVar = (2, None)
        masked = False

        def __init__(self, *, encoder: nn.Module) -> None:
            super().__init__(encoder=encoder)

    @RECIPES.register("masked_views")
    class MaskedViews(Views):
        num_views: ClassVar = (1, 4)
        masked = True


def load(views: Any, recipe: str = "views", **data: Any) -> Config:
    raw: dict[str, Any] = {"recipe": {"name": recipe}, "encoder": ENCODER}
    raw |= {"masker": {"name": "random", "ratio": 0.5}} if recipe == "masked_views" else {}
    return config_from_dict(raw | {"data": {"image_size": 16, "views": views} | data})


def problems(views: Any, recipe: str = "views", **data: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(views, recipe, **data)
    return list(raised.value.problems)


def test_views_of_several_sizes() -> None:
    """Two global and three local views of another size, as in multi-crop."""
    config = load([{"count": 2}, {"count": 3, "image_size": 8, "transforms": [CROP, JITTER]}])
    assert config.data.num_views == 5
    assert config.data.view_sizes == [(16, 16)] * 2 + [(8, 8)] * 3
    (first, whole), (second, local) = config.data.entries()
    assert (first, second) == ("data.views[0]", "data.views[1]")
    assert whole.transforms == config.data.transforms
    assert local.transforms is not None
    assert [part["name"] for part in local.transforms] == ["random_resized_crop", "color_jitter"]
    assert local.transforms[1]["brightness"] == 0.4
    assert config_from_dict(config.to_dict()) == config
    makers = training_views(config)
    assert [len(maker.pipeline.transforms) for maker in makers] == [1, 1, 2, 2, 2]
    assert [maker.pipeline.transforms[0].image_size for maker in makers] == config.data.view_sizes
    assert all(maker.masker is None for maker in makers)


def test_without_views_there_is_one() -> None:
    data = DataConfig(image_size=(16, 8))
    assert (data.num_views, data.view_sizes, data.views) == (1, [(16, 8)], None)
    masked, unmasked = training_views(load(None, "masked_views")), load([{"count": 2}])
    assert len(masked) == 1
    assert masked[0].masker is not None
    assert all(maker.masker is None for maker in training_views(unmasked))


def test_masks_are_on_the_grid_of_each_view() -> None:
    entries = [
        {"masked": True, "count": 2},
        {"image_size": [20, 24], "masked": True, "same_draws": [CROP["name"]], "action": True},
        {},
    ]
    makers = training_views(load(entries, "masked_views"))
    assert [maker.masker and maker.masker.grid for maker in makers] == [(4, 4), (4, 4), (5, 6), None]
    assert [maker.same_draws for maker in makers] == [(), (), ("random_resized_crop",), ()]
    assert [maker.action for maker in makers] == [False, False, True, False]


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        (3, "data.views (=3) must be a list of mappings, or null. It takes: count, transforms, image_size, masked, "),
        ([], "data.views (=()) must be a list of at least one"),
        ([3], "data.views[0] (=3) must be a mapping, or left out. It takes: count, transforms, image_size, masked, "),
        ([{"cuont": 2}], "data.views[0].cuont is not an option; did you mean 'count'? It takes: count, transforms, "),
        ([{"count": 0}], "data.views[0].count (=0) must be at least 1"),
        ([{"count": "two"}], "data.views[0].count (='two') must be an int"),
        ([{}, {"masked": 1}], "data.views[1].masked (=1) must be true or false"),
        (
            [{}, {"image_size": 8.0}],
            "data.views[1].image_size (=8.0) must be a list of 2 (an int, an int) or null, or one int for a square",
        ),
        ([{}, {"image_size": 0}], "data.views[1].image_size (=(0, 0)) must be from 1 to 65,536 pixels each way"),
        (
            [{"transforms": [JITTER], "count": 2}],
            "data.views[0].transforms (=['color_jitter']) must have one that sets the size: center_crop, ",
        ),
        ([{"transforms": [{"name": "crop"}]}], "data.views[0].transforms[0].name: 'crop' is not a registered transfo"),
        ([{"transforms": [CROP | {"sacle": 1}]}], "data.views[0].transforms[0].sacle is not an option of 'random_re"),
        ([{}, {"image_size": 10}], "data.views[1].image_size (=[10, 10]) must be divisible by encoder.patch_size (=4)"),
        ([{}, {"image_size": 8192}], "data.views[1].image_size (=[8192, 8192]) over encoder.patch_size (=4) gives 4,1"),
        (
            [{}, {"transforms": [CROP, {"name": "silent"}], "action": True}],
            "data.views[1].action (=True) needs transforms with action and action_size, which silent lacks",
        ),
        ([{}], "data.views (=1 in all) must give at least 2 to the recipe 'views'; each entry counts"),
        ([{}, {"masked": True}], "data.views[1].masked (=True) must be left out: the recipe 'views' has no masker"),
        (
            [{"same_draws": [CROP["name"]]}, {}],
            "data.views[0].same_draws (=['random_resized_crop']) has no effect: this is the first view",
        ),
        (
            [{}, {"same_draws": ["solarize"]}],
            "data.views[1].same_draws (=['solarize']) must name transforms of both lists, but 'solarize' is not "
            "in that of views[0]",
        ),
        (
            [{"transforms": [CROP, JITTER]}, {"same_draws": ["color_jitter"]}],
            "data.views[1].same_draws (=['color_jitter']) must name transforms of both lists, but 'color_jitter' is "
            "not in that of views[1]",
        ),
    ],
)
def test_messages(views: Any, expected: str) -> None:
    (message,) = problems(views)
    assert message.startswith(expected)


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        (
            [{"count": 5, "masked": True}],
            "data.views (=5 in all) must give 1 to 4 to the recipe 'masked_views'; each entry counts ``count`` times, "
            "and without data.views there is one",
        ),
        ([{"count": 2}], "data.views must have an entry with masked: true, for the masker of 'masked_views'"),
    ],
)
def test_messages_of_a_recipe_with_a_masker(views: Any, expected: str) -> None:
    assert problems(views, "masked_views") == [expected]


def test_every_mistake_is_reported_at_once() -> None:
    views = [{"count": 0, "masked": "x"}, {"transforms": [CROP | {"p": 1}], "image_size": "y"}]
    assert [p.partition(" ")[0] for p in problems(views, max_pixels=0)] == [
        "data.views[0].masked",
        "data.views[0].count",
        "data.views[1].image_size",
        "data.views[1].transforms[0].p",
        "data.max_pixels",
    ]


def test_the_first_of_several_that_are_made_alike_shares_its_draws() -> None:
    views = (ViewConfig(count=2, same_draws=("random_resized_crop",)),)
    assert DataConfig(image_size=(16, 16), views=views).num_views == 2


def test_a_value_that_a_transform_refuses() -> None:
    views = [{"count": 2}, {"transforms": [CROP, {"name": "horizontal_flip", "p": 2.0}]}]
    config, expected = load(views), ["data.views[1]: transforms[1]: p (=2.0) must be a probability, 0 to 1"]
    assert part_problems(config) == expected
    with pytest.raises(ConfigError) as raised:
        training_views(config)
    assert list(raised.value.problems) == expected


def test_the_numbers_of_an_action() -> None:
    """Those of the view that has most: 4 of the crop and 5 of the jitter; none without ``action: true``."""
    views = [{"action": True, "transforms": [CROP]}, {"action": True, "transforms": [CROP, JITTER]}, {}]
    assert load(views).data.action_size == 9
    assert load(views[:1] * 2).data.action_size == 4
    assert load([{}, {}]).data.action_size == 0
