"""The tables of docs/methods.md agree with the configs of the projects, and that of README.md with the registries."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from jepa_kit.config import Config, config_from_dict, load_config
from jepa_kit.config.typed import plain
from jepa_kit.registry import RECIPES, SLOTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text()
SETTINGS = ("optim.lr", "optim.weight_decay", "optim.clip_grad", "train.batch_size", "train.epochs")


def table(heading: str, page: str = PAGE) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the first table of a section."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    header, _, *body = ([cell.strip() for cell in row] for row in rows)
    return header, body


def views(config: Config) -> str:
    """Number and size of the views, as the page writes them."""
    counts: Counter[str] = Counter()
    for _, view in config.data.entries():
        assert view.image_size is not None
        masked = ", masked" if view.masked and "masker" in config.slots else ""
        counts[f"{view.image_size[0]} px{masked}"] += view.count
    return "; ".join(f"{count} x {size}" for size, count in counts.items())


HEADER, ROWS = table("From I-JEPA to MAE, data2vec and DINO")


@pytest.mark.parametrize("project", HEADER[1:])
def test_slots_are_those_of_the_config(project: str) -> None:
    config = load_config(ROOT / f"projects/{project}/configs/in1k_vitb16.yaml")
    column = {row[0].strip("`"): row[1 + HEADER[1:].index(project)] for row in ROWS}
    assert column.pop("views") == views(config)
    for path in SETTINGS:
        section, key = path.split(".")
        assert yaml.safe_load(column.pop(path)) == plain(getattr(getattr(config, section), key)), path
    parts: dict[str, Any] = {slot: yaml.safe_load(cell.strip("`")) for slot, cell in column.items() if cell}
    data = {"image_size": 224, **({} if "masker" in parts else {"views": [{"count": 2}]})}
    written = config_from_dict({**parts, "data": data})
    assert written.recipe == config.recipe
    assert written.slots == config.slots
    assert written.losses == config.losses


def test_every_project_and_its_parts_are_in_the_first_table() -> None:
    header, rows = table("All recipes")
    named = {re.match(r"\[(\w+)\]", row[0])[1]: dict(zip(header, row, strict=True)) for row in rows}  # type: ignore[index]
    assert set(named) == {file.parents[1].name for file in ROOT.glob("projects/*/configs/*.yaml")}
    for project, row in named.items():
        folder = ROOT / f"projects/{project}/configs"
        files = sorted(folder.glob("*in1k_vit[bs]16.yaml")) or sorted(folder.glob("in1k_*.yaml"))
        configs = [load_config(file) for file in files]
        names = {column: re.findall(r"`(\w+)`", row[column]) for column in ("recipe", "masks", "target network")}
        assert set(names["recipe"]) == {config.recipe.name for config in configs}
        for column, slot in (("masks", "masker"), ("target network", "target_update")):
            part = configs[0].slots.get(slot)
            inner = [part.options["masker"]["name"]] if part is not None and "masker" in part.options else []
            assert set(names[column]) == {*inner, *([] if part is None else [part.name])}, (project, column)


def test_the_readme_has_all_slots_and_all_parts_of_jepa_kit() -> None:
    _, rows = table("Swap a part", (ROOT / "README.md").read_text())
    named = {slot.strip("`"): set(re.findall(r"`(\w+)`", members)) for slot, _, members in rows}
    assert named.keys() == {"recipe", *SLOTS}
    for slot, registry in {"recipe": RECIPES, **SLOTS}.items():
        ours = {name for name in registry.names() if registry.get(name).__module__.startswith("jepa_kit.")}
        assert named[slot] == ours
