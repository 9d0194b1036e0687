"""The folder of projects that ships with jepa_kit, and its configs by name.

In a clone it is projects/, beside jepa_kit/; in a wheel it is jepa_kit/projects/, so that no other package can have it.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REPOSITORY = os.path.dirname(PACKAGE)
IN_WHEEL = os.path.isdir(os.path.join(PACKAGE, "projects"))
PROJECTS = os.path.join(PACKAGE if IN_WHEEL else REPOSITORY, "projects")


def shipped_configs() -> dict[str, Path]:
    """Return name -> file of the configs of all projects.

    The name is that of the file without ``.yaml``, as ``quickstart``. If several projects have a config of this name,
    each has its project in front, as ``ijepa/in1k_vitb16``.
    """
    files = _files()
    count = Counter(file.stem for file in files)
    return {f.stem if count[f.stem] == 1 else _with_project(f): f for f in files}


def config_names() -> list[str]:
    """Return the names of the configs of all projects, each with its project in front, sorted."""
    return [_with_project(file) for file in _files()]


def _files() -> list[Path]:
    return sorted(Path(PROJECTS).glob("*/configs/*.yaml"))


def _with_project(file: Path) -> str:
    return f"{file.parents[1].name}/{file.stem}"


def find_config(text: str, folder: str) -> str:
    """Return the path of a shipped config if ``text`` is its name; else ``text`` as a path.

    Args:
        text: a path, a URL, or a name, with or without its project; an existing file or folder comes before a config of
            the same name.
        folder: a relative path starts here.
    """
    path = text if "://" in text else os.path.join(folder, os.path.expanduser(text))
    if os.path.exists(path):
        return path
    named = [str(file) for file in _files() if text in (file.stem, _with_project(file))]
    return named[0] if len(named) == 1 else path
