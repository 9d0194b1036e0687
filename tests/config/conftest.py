"""Registries with small parts of our own in place of the package's, for one test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import pytest

from jepa_kit.config import load_config
from jepa_kit.errors import ConfigError
from jepa_kit.registry import SLOTS

VALID = """\
data: {image_size: 32}
masker: {name: blocks, num_targets: 4, scale: [0.1, 0.2]}
encoder: {name: net}
predictor: {name: net}
target: {name: tokens}
loss: {name: l2}
target_update: {name: ema}
"""


class Blocks:
    def __init__(
        self,
        *,
        grid: tuple[int, int],
        num_targets: int,
        scale: tuple[float, float] = (0.15, 0.2),
        overlap: bool = False,
    ) -> None: ...


class Scattered:
    def __init__(self, *, grid: tuple[int, int], ratio: float = 0.6) -> None: ...


class Net:
    def __init__(
        self,
        *,
        size: Literal["tiny", "small"] = "tiny",
        width: int | None = None,
        layers: tuple[int, ...] = (),
        per_layer: Mapping[str, float] = {},
    ) -> None: ...


class Plain:
    pass


class Huber:
    def __init__(self, *, beta: float = 1.0) -> None: ...


class Ema:
    def __init__(self, *, momentum: tuple[float, float] = (0.996, 1.0)) -> None: ...


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: dict[str, dict[str, type]] = {
        "masker": {"blocks": Blocks, "scattered": Scattered},
        "encoder": {"net": Net},
        "predictor": {"net": Plain},
        "target": {"tokens": Plain},
        "head": {},
        "loss": {"l2": Plain, "huber": Huber},
        "target_update": {"ema": Ema, "none": Plain},
    }
    for slot, registry in SLOTS.items():
        registry.import_members()  # so that they do not register in our place later
        monkeypatch.setattr(registry, "_obj_map", {})
        for name, part in ours.get(slot, {}).items():
            registry.register(name)(part)


Write = Callable[..., Path]


@pytest.fixture
def write(parts: None, tmp_path: Path) -> Write:
    """Writes a YAML file; by default a valid one."""

    def make(text: str = VALID, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return make


Problems = Callable[..., list[str]]


@pytest.fixture
def problems(write: Write) -> Problems:
    """The lines about a valid config with a text merged over it, and overrides."""

    def find(text: str = "", *overrides: str) -> list[str]:
        write(VALID, "valid.yaml")
        path = write(f"_BASE_: valid.yaml\n{text}", "over.yaml")
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        return list(caught.value.problems)

    return find
