"""One config over another: ``_BASE_`` and the command line follow the same rule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jepa_kit.config.renamed import modernize
from jepa_kit.config.yaml_text import end_of_yaml, parse_yaml
from jepa_kit.errors import ConfigError
from jepa_kit.registry import SLOTS


def merge(base: dict[Any, Any], over: dict[Any, Any], *, top: bool = True) -> dict[Any, Any]:
    """``over`` laid over ``base``; neither is changed.

    Mappings merge key by key, down to any depth; lists and scalars replace. At the top, a slot whose ``name``
    differs from the base's replaces the base's whole, so that no option of the other part is left over.
    """
    merged = dict(base)
    for key, value in over.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not (top and _other_part(key, old, value)):
            merged[key] = merge(old, value, top=False)
        else:
            merged[key] = value
    return merged


def _other_part(key: Any, base: dict[Any, Any], over: dict[Any, Any]) -> bool:
    return key in SLOTS and "name" in base and "name" in over and bool(base["name"] != over["name"])


def _value(text: str, override: str) -> Any:
    """The value of an override: YAML, in which ``#`` begins no comment.

    Raises:
        ConfigError: it is not YAML, or something stands after the end of it.
    """
    if text[0] not in "[{'\"" and re.search(r"(^|\s)#", text):
        return text
    value = parse_yaml(text, override)
    if "#" in text and (rest := text[end_of_yaml(text) :].strip()):
        raise ConfigError([f"{rest!r} stands after the value; quote the whole if it belongs to it"])
    return value


def _parse(text: str) -> tuple[list[str], Any]:
    """The keys and the value of an override.

    Raises:
        ConfigError: it is malformed.
    """
    path, equals, value = text.partition("=")
    path = path.strip()
    keys = path.split(".")
    if not equals or not all(keys) or any(c.isspace() for c in path):
        raise ConfigError([f"override {text!r} must be key=value, such as masker.num_targets=8"])
    if not value.strip():
        raise ConfigError([f"override {text!r} has no value; write {path}=null for none"])
    if path == "_BASE_":
        raise ConfigError([f"override {text!r}: _BASE_ belongs in a file; give that file as --config-file"])
    try:
        return keys, _value(value.strip(), text)
    except ConfigError as error:
        raise ConfigError([f"override {text!r}: {problem}" for problem in error.problems]) from error


def apply_overrides(raw: dict[Any, Any], overrides: Sequence[str], problems: list[str]) -> dict[Any, Any]:
    """``raw`` with ``key.key=value`` laid over it.

    Overrides merge with one another first, so that ``masker.ratio=0.6 masker.name=random`` means the same in
    either order; of two values for one key the later counts.
    """
    together: dict[Any, Any] = {}
    for text in overrides:
        try:
            keys, value = _parse(text)
        except ConfigError as error:
            problems.extend(error.problems)
            continue
        if (inside := _list_on_the_way(merge(raw, together), keys)) is not None:
            problems.append(f"override {text!r}: {inside} is a list here; override it whole, {inside}=[...]")
            continue
        for key in reversed(keys):
            value = {key: value}
        together = merge(together, value)
    return merge(raw, modernize(together, below=raw, problems=problems))


def _list_on_the_way(raw: dict[Any, Any], keys: list[str]) -> str | None:
    """The path of the list that ``keys`` would lead into."""
    value: Any = raw
    for depth, key in enumerate(keys[:-1], 1):
        value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, list):
            return ".".join(keys[:depth])
    return None
