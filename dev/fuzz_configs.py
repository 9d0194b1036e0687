"""Kinds of fuzz.py: configs as text and mappings, overrides, and results files."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz import ROOT, Harmed, damaged, temporary_folder

from jepa_kit.config import Config, config_from_dict, load_config
from jepa_kit.config.load import dump_yaml
from jepa_kit.evaluation.tables.compare import compare, to_csv, to_markdown
from jepa_kit.evaluation.tables.rows import FORMAT
from jepa_kit.evaluation.tables.runs import load

Cases = Iterator[tuple[str, Callable[[], object]]]
CONFIGS = sorted((ROOT / "projects" / "ijepa" / "configs").glob("*.yaml"))
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**70, 10**400, 0.5, -0.0, 1e300, float("nan"), float("inf"), "", "x", "ü" * 300, "~", "[",
    [], {}, [[]], [None], [1, 2], [0.1, 0.2, 0.3], {"name": "x"}, {"name": []}, {"": None}, {1: 2},
    "1e-3", "null", "a b", "\0",
)  # fmt: skip
WORDS = (
    "null", "~", "[", "]", "{", "}", ":", "- ", "&a", "*a", "<<: ", "!!python/object:os.system", "%YAML", "---", "...",
    "|", ">", '"', "'", "#", "\t", "\0", "\ufeff", "1e999", ".nan", "-.inf", "0x10", "010", "1_000", "9" * 400,
    "[" * 300, "yes", "a: b: c", "_BASE_: x", "imports: [os]", "name: ", "é", "\u2028",
)  # fmt: skip


folder = functools.partial(temporary_folder, "configs")


@functools.cache
def whole(file: Path) -> dict[str, Any]:
    return load_config(file).to_dict()


def again(config: Config) -> None:
    """Check that an accepted config equals the one read from its own text."""
    try:
        back = config_from_dict(config.to_dict())
        (folder() / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
        read = load_config(folder() / "again.yaml")
    except ValueError as error:
        raise Harmed(f"accepted, but refused when it is read back: {error}") from error
    ours, *others = (repr(one.to_dict()) for one in (config, back, read))  # NaN is not NaN
    if any(other != ours for other in others):
        raise Harmed("accepted, but another when it is read back")


def texts(seed: int) -> Cases:
    """Yield YAML with changed bytes or words."""
    chance = random.Random(f"text {seed}")
    while True:
        source = chance.choice(CONFIGS)
        text = dump_yaml(whole(source)) if chance.random() < 0.7 else source.read_text(encoding="utf-8")
        if chance.random() < 0.4:
            how, data = damaged(text.encode(), chance)
        else:
            lines = text.split("\n")
            place, word = chance.randrange(len(lines)), chance.choice(WORDS)
            how = f"{word!r:.40} in line {place + 1}"
            at = chance.randrange(len(lines[place]) + 1)
            lines[place] = lines[place][:at] + word + lines[place][at:]
            data = "\n".join(lines).encode()

        def call(data: bytes = data) -> None:
            file = folder() / "x.yaml"
            file.write_bytes(data)
            again(load_config(file))

        yield f"{source.stem}: {how}", call


def _changed(value: Any, chance: random.Random, depth: int = 0) -> Any:
    if isinstance(value, dict) and value and depth < 5 and chance.random() < 0.93:
        key = chance.choice(sorted(value, key=str))
        way = chance.random()
        if way < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.16:
            return {**value, chance.choice(("naem", "", "weight", 3)): chance.choice(ODD)}
        return {**value, key: _changed(value[key], chance, depth + 1)}
    if isinstance(value, list) and value and chance.random() < 0.6:
        place = chance.randrange(len(value))
        return [*value[:place], _changed(value[place], chance, depth + 1), *value[place + 1 :]]
    if type(value) in (int, float) and chance.random() < 0.3:
        return chance.choice((value * 2, -value, value / 3, value + 1, str(value)))
    return chance.choice(ODD)


def mappings(seed: int) -> Cases:
    """Yield resolved configs with values of another type or range."""
    chance = random.Random(f"mapping {seed}")
    while True:
        source = chance.choice(CONFIGS)
        raw = whole(source)
        for _ in range(chance.choice((1, 1, 2, 4))):
            raw = _changed(raw, chance)

        def call(raw: Any = raw) -> None:
            if isinstance(raw, dict):
                again(config_from_dict(raw))

        yield source.stem, call


def overrides(seed: int) -> Cases:
    """Yield overrides as on a command line."""
    chance = random.Random(f"override {seed}")
    keys = [f"{slot}.{key}" for slot, held in whole(CONFIGS[0]).items() if isinstance(held, dict) for key in held]
    keys += ["masker", "loss", "data", "x", "", ".", "train.", "train..seed", "loss.0.name", "imports", "_BASE_"]
    while True:
        source = chance.choice(CONFIGS)
        texts = []
        for _ in range(chance.choice((1, 1, 2, 5))):
            value = (
                chance.choice(WORDS) if chance.random() < 0.5 else json.dumps(chance.choice(ODD), ensure_ascii=False)
            )
            texts.append(chance.choice(keys) + chance.choice(("=", "=", "=", "", ": ", "==")) + value)

        def call(source: Path = source, texts: list[str] = texts) -> None:
            again(load_config(source, texts))

        yield f"{source.stem} {texts!r:.100}", call


@functools.cache
def results() -> dict[str, Any]:
    row = {
        "network": "target", "layers": "last", "pooling": "mean", "seed": None, "width": 16, "protocol": "knn",
        "label": "count", "accuracy": 0.5, "standard_error": 0.01, "chance": 0.1, "validation": 0.5, "classes": 8,
        "n_train": 10, "n_test": 10, "settings": {"k": 10}, "variant": "", "metric": "accuracy", "draws": 1,
        "seconds": 1.0, "options": {"neighbours": [10]},
    }  # fmt: skip
    return {
        "format": FORMAT,
        "checkpoint": {"file": "x.pt", "sha256": "0", "step": 10, "data": {"samples": 9, "digest": "d"}},
        "config": whole(CONFIGS[0]),
        "data": {
            "image_size": [32, 32],
            "decoder": "pillow",
            "train": {"shards": "a/train", "index_sha256": "1"},
            "test": {"shards": "a/test", "index_sha256": "2"},
        },
        "seeds": {"run": 0, "protocols": 0},
        "rows": [row, row | {"label": "shape"}, row | {"network": "pixels", "layers": None}],
    }


def result_files(seed: int) -> Cases:
    """Yield tables of results files with changed bytes or values."""
    chance = random.Random(f"results {seed}")
    while True:
        held = results()
        if chance.random() < 0.5:
            how, data = damaged(json.dumps(held).encode(), chance)
        else:
            how, data = "values", json.dumps(_changed(held, chance)).encode()

        def call(data: bytes = data) -> None:
            file = folder() / "results.json"
            file.write_bytes(data)
            table = compare(load(file))
            to_markdown(table)
            to_csv(table)

        yield how, call


KINDS: dict[str, Callable[[int], Cases]] = {
    "configs.text": texts,
    "configs.mapping": mappings,
    "configs.overrides": overrides,
    "results": result_files,
}
