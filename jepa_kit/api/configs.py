"""Configs and overrides as the functions of the API take them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from jepa_kit.config import Config, config_from_dict, load_config

AnyConfig = str | os.PathLike[str] | Mapping[str, Any] | Config
"""Name of a shipped config (``list_configs``); path of a YAML file, a run folder or a checkpoint; the content of a YAML
file as a mapping; or a checked config."""


def checked_config(config: AnyConfig, overrides: Mapping[str, Any]) -> Config:
    """Return a checked config with overrides laid over it.

    Args:
        config: see ``AnyConfig``.
        overrides: key -> value, as keywords of a call (``train={"epochs": 10}``), or with dots,
            ``{"train.epochs": 10}``. They mean what ``key=value`` means on a command line: mappings merge key by key,
            other values replace, and another ``name`` replaces a part with all its options.

    Raises:
        ConfigError: with every mistake of the config and the overrides.
        TypeError: a value that YAML cannot have.
    """
    texts = [_override(key, value) for key, value in overrides.items()]
    if isinstance(config, Config):
        return config_from_dict(config.to_dict(), texts) if texts else config
    if isinstance(config, Mapping):
        return config_from_dict(config, texts)
    return load_config(config, texts)


def _override(key: str, value: Any) -> str:
    """Return ``key=value`` with the value in JSON, which is YAML."""
    try:
        return f"{key}={json.dumps(value, default=_plain, ensure_ascii=False)}"
    except TypeError as error:
        raise TypeError(f"override {key} (={value!r:.60}) must be numbers, text, lists, mappings: {error}") from error


def _plain(value: Any) -> str:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a {type(value).__name__} is none of these")
