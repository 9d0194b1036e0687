"""Old names of options and parts, read for one more version with a warning that gives the new name.

A config that a run wrote (it has ``versions``) is read without a warning, and its old names must stay readable.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

OPTIONS: dict[str, str | None] = {
    "data.label": None,
    "train.bad_numbers": "train.on_nonfinite",
    "train.bad_numbers_limit": "train.nonfinite_limit",
    "train.checkpoint": "checkpoint.format",
    "train.checkpoint_dir": "checkpoint.dir",
    "train.checkpoint_every": "checkpoint.every",
    "train.keep_checkpoints": "checkpoint.keep",
    "train.keep_every": "checkpoint.keep_every",
}
"""Old path -> new path; None for an option that never did anything and is dropped if it is null."""

PARTS: dict[str, dict[str, str]] = {
    "data.transforms": {
        "centre_crop": "center_crop",
        "colour_jitter": "color_jitter",
        "grey": "grayscale",
        "solarise": "solarize",
    },
}
"""Path of a part, or of a list of parts -> old name -> new name."""

CROPS = {"crop_scale": "scale", "crop_ratio": "ratio"}
"""Old key of ``data`` -> the option of ``random_resized_crop`` that replaces it; ``flip`` became a transform."""

RELEASED_CROP: dict[str, Any] = {
    "name": "random_resized_crop",
    "scale": (0.3, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "interpolation": "bilinear",
}
"""The transform of the released recipe, which ``data.transforms`` has by default."""


def modernize(
    raw: Mapping[Any, Any], *, below: Mapping[Any, Any] | None = None, problems: list[str] | None = None
) -> dict[Any, Any]:
    """Return a config with the present names; ``raw`` is unchanged.

    Args:
        raw: a config, or a part of one, as it was read.
        below: the config that ``raw`` will be laid over, whose transforms ``crop_scale``, ``crop_ratio`` and ``flip``
            change.
        problems: gets a line for each option that is given under its old and its new name.
    """
    config: dict[Any, Any] = copy.deepcopy(dict(raw))
    problems, notes = [] if problems is None else problems, []
    for old, new in OPTIONS.items():
        section, key = old.split(".")
        options = config.get(section)
        if not isinstance(options, dict) or key not in options:
            continue
        if new is None:
            if options[key] is None:
                del options[key]
            continue
        section, new_key = new.split(".")
        target = config.setdefault(section, {})
        if not isinstance(target, dict):
            continue  # an error of its own
        value = options.pop(key)
        notes.append(f"{old} is now {new}")
        if new_key in target:
            problems.append(f"{old} (={value!r}) is now {new}, which is given too: remove {old}")
        target[new_key] = value
    notes += _replace_short_keys(config, below or {}, problems)
    for part in _parts_at(config, "data.transforms"):
        if part.get("name") == "flip" and isinstance(direction := part.get("direction", "horizontal"), str):
            part.pop("direction", None)
            part["name"] = f"{direction}_flip"
            notes.append(f"data.transforms: 'flip' is now {part['name']!r}")
    for path, names in PARTS.items():
        for part in _parts_at(config, path):
            if isinstance(name := part.get("name"), str) and name in names:
                part["name"] = names[name]
                notes.append(f"{path}: {name!r} is now {names[name]!r}")
    for note in notes if "versions" not in config else []:
        warnings.warn(f"{note}; the next version will not read the old name", FutureWarning, stacklevel=1)
    return config


def _parts_at(config: Mapping[Any, Any], path: str) -> list[dict[Any, Any]]:
    """The mappings at a path of the config: one, or those of a list."""
    found: Any = config
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return [part for part in (found if isinstance(found, list) else [found]) if isinstance(part, dict)]


def _replace_short_keys(config: dict[Any, Any], below: Mapping[Any, Any], problems: list[str]) -> list[str]:
    """Move ``crop_scale``, ``crop_ratio`` and ``flip`` of ``data`` into its ``transforms``; return notes."""
    data: Any = config.get("data")
    given = {key: data.pop(key) for key in (*CROPS, "flip") if key in data} if isinstance(data, dict) else {}
    if not given:
        return []
    if data.get("transforms") is not None:
        problems.extend(
            f"data.{key} (={value!r}) must be left out if data.transforms is given"
            for key, value in given.items()
            if value is not None
        )
        return []
    parts = copy.deepcopy(([] if "transforms" in data else _parts_at(below, "data.transforms")) or [RELEASED_CROP])
    for key, option in CROPS.items():
        crops = [part for part in parts if part.get("name") == RELEASED_CROP["name"]]
        if crops and key in given:
            crops[0][option] = RELEASED_CROP[option] if given[key] is None else given[key]
        elif given.get(key) is not None:
            problems.append(f"data.{key} (={given[key]!r}) needs a random_resized_crop in data.transforms")
    if "flip" in given:
        parts = [part for part in parts if part.get("name") != "horizontal_flip"]
        parts += [{"name": "horizontal_flip", "p": given["flip"]}] if given["flip"] else []
    data["transforms"] = parts
    return [f"data.{key} is now part of data.transforms" for key in given]
