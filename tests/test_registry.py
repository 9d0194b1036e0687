from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from jepa_kit.registry import (
    REQUIRED,
    SLOTS,
    Option,
    PartRegistry,
    build_part,
    check_choice,
    did_you_mean,
    signature_options,
)

Pair = tuple[int, int]


@pytest.fixture
def registry() -> PartRegistry:
    return PartRegistry("masker", {"grid": "data.image_size over encoder.patch_size"})


class Checkerboard:
    def __init__(self, *, grid: Pair, scale: float, phase: int = 0) -> None:
        self.values = (grid, scale, phase)


class Everything:
    def __init__(self, *, keep: float = 1.0) -> None:
        self.keep = keep


def test_signature_is_the_schema() -> None:
    assert signature_options(Checkerboard) == {
        "grid": Option("grid", Pair, REQUIRED),
        "scale": Option("scale", float, REQUIRED),
        "phase": Option("phase", int, 0),
    }


def test_a_choice_is_one_of_the_words() -> None:
    words = Literal["inclusive", "released"]
    check_choice("edges", "inclusive", words)
    with pytest.raises(ValueError, match=r"^edges \(='open'\) must be one of 'inclusive', 'released'$"):
        check_choice("edges", "open", words)


def test_signature_of_a_class_without_a_constructor_is_empty() -> None:
    assert signature_options(type("Plain", (), {})) == {}


def test_signature_of_a_dataclass_has_the_values_of_its_factories() -> None:
    @dataclass(kw_only=True)
    class Table:
        rows: dict[str, int] = field(default_factory=lambda: {"a": 1})
        made: int = field(init=False, default=3)

    assert signature_options(Table) == {"rows": Option("rows", dict[str, int], {"a": 1})}


class Positional:
    def __init__(self, ratio: float) -> None: ...


class Bare:
    def __init__(self, *, ratio) -> None: ...  # type: ignore[no-untyped-def]


class Unknown:
    def __init__(self, *, ratio: Ratio) -> None: ...  # type: ignore[name-defined]  # noqa: F821


class Open:
    def __init__(self, **options: int) -> None: ...


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Positional, "Positional: argument 'ratio' must be keyword-only (put a * before it)"),
        (Bare, "Bare: argument 'ratio' needs an annotation: it is the option's type"),
        (
            Unknown,
            "Unknown: an annotation of its constructor is unknown when the module runs: name 'Ratio' is not defined",
        ),
        (Open, "Open: **options must be replaced by the options themselves, each keyword-only with an annotation"),
    ],
)
def test_a_constructor_outside_the_contract_is_refused(registry: PartRegistry, part: type, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        registry.register("x")(part)
    assert registry.names() == []


def test_a_decorator_without_a_name(registry: PartRegistry) -> None:
    with pytest.raises(TypeError, match=r'register\(name=<class .*\) needs a name: write @register\("my_masker"\)'):
        registry.register(Checkerboard)  # type: ignore[arg-type]


def test_a_name_is_given_once(registry: PartRegistry) -> None:
    registry.register("a")(Checkerboard)
    with pytest.raises(ValueError, match=r"masker 'a' is already registered by \S*\.Checkerboard"):
        registry.register("a")(Everything)
    assert registry.get("a") is Checkerboard


def test_register_gives_the_class_back(registry: PartRegistry) -> None:
    assert registry.register("b")(Checkerboard) is Checkerboard
    registry.register("a")(Everything)
    assert registry.names() == ["a", "b"]


def test_options_leave_out_what_the_recipe_supplies(registry: PartRegistry) -> None:
    registry.register("checkerboard")(Checkerboard)
    assert list(registry.options("checkerboard")) == ["scale", "phase"]


def test_build_hands_on_only_the_supplied_values_that_the_part_names(registry: PartRegistry) -> None:
    registry.register("checkerboard")(Checkerboard)
    registry.register("everything")(Everything)
    assert registry.build("checkerboard", {"scale": 0.5}, grid=(2, 3)).values == ((2, 3), 0.5, 0)
    assert registry.build("everything", {"keep": 0.5}, grid=(2, 3)).keep == 0.5


def test_an_unknown_name_lists_the_known(registry: PartRegistry) -> None:
    with pytest.raises(KeyError, match=r"'a' is not a registered masker\. Registered: none"):
        registry.get("a")
    registry.register("checkerboard")(Checkerboard)
    registry.register("everything")(Everything)
    message = (
        "'chekerboard' is not a registered masker; did you mean 'checkerboard'? Registered: checkerboard, everything"
    )
    with pytest.raises(KeyError, match=re.escape(message)):
        registry.get("chekerboard")


def test_did_you_mean_says_nothing_about_words_that_are_far() -> None:
    assert did_you_mean("num_targts", ["num_targets", "ratio"]) == "; did you mean 'num_targets'?"
    assert did_you_mean("zzz", ["num_targets", "ratio"]) == "."


def test_the_slots() -> None:
    assert list(SLOTS) == ["masker", "encoder", "predictor", "target", "head", "loss", "target_update"]
    assert all(registry.slot == slot for slot, registry in SLOTS.items())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"name": "chekerboard"}, "maskers[1].name: 'chekerboard' is not a registered masker; did you mean 'checker"),
        ({}, "maskers[1].name: None is not a registered masker. Registered: checkerboard"),
        ({"name": ["a"]}, "maskers[1].name: ['a'] is not a registered masker"),
        (
            {"name": "checkerboard", "scal": 1.0},
            "maskers[1].scal is not an option of 'checkerboard'; did you mean 'scale'? It takes: scale, phase",
        ),
        ({"name": "checkerboard", "grid": (1, 1)}, "maskers[1].grid is not an option of 'checkerboard'. It takes:"),
        ({"name": "checkerboard", "scale": -1.0}, "maskers[1]: scale (=-1.0) must be above 0"),
    ],
)
def test_build_part_rejects_with_the_path(registry: PartRegistry, raw: dict[str, object], message: str) -> None:
    class Positive(Checkerboard):
        def __init__(self, *, grid: Pair, scale: float, phase: int = 0) -> None:
            if scale <= 0:
                raise ValueError(f"scale (={scale}) must be above 0")
            super().__init__(grid=grid, scale=scale, phase=phase)

    registry.register("checkerboard")(Positive)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        build_part("maskers[1]", raw, registry, grid=(2, 3), other=1)
    built = build_part("maskers[1]", {"name": "checkerboard", "scale": 2.0}, registry, grid=(2, 3), other=1)
    assert built.values == ((2, 3), 2.0, 0)
