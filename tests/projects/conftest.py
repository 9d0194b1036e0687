"""What the tests of several projects' checks share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from jepa_kit.config import Config
from jepa_kit.trials.recorded import Recorded

SIZES = {
    "size",
    "patch_size",
    "embed_dim",
    "width",
    "depth",
    "num_heads",
    "mlp_ratio",
    "init",
    "patch_init",
    "drop_path",
}
"""Options of parts that differ between a recording and a config for ImageNet, with initial weights and drop path."""


@pytest.fixture
def altered(fixtures: Path, tmp_path: Path) -> Callable[[str, str, Any], Recorded]:
    """Copies the recording of a method with another value of ``meta[key]``."""

    def copy(name: str, key: str, value: Any) -> Recorded:
        file = fixtures / "methods" / name
        content = json.loads(file.with_suffix(".json").read_text())
        assert key in content["meta"]
        content["meta"][key] = value
        (tmp_path / "other.json").write_text(json.dumps(content))
        shutil.copy(file.with_suffix(".safetensors"), tmp_path / "other.safetensors")
        return Recorded(tmp_path / "other")

    return copy


@pytest.fixture
def same_parts() -> Callable[..., None]:
    """Asserts that two configs have the same parts and losses with the same options, apart from sizes."""

    def compare(one: Config, other: Config, without: Collection[str] = (), options: Collection[str] = ()) -> None:
        assert one.slots.keys() == other.slots.keys()
        for slot in one.slots.keys() - {*without}:
            a, b = one.slots[slot], other.slots[slot]
            ours, theirs = ({k: v for k, v in x.options.items() if k not in SIZES | {*options}} for x in (a, b))
            assert (a.name, ours) == (b.name, theirs)
        assert one.losses == other.losses

    return compare
