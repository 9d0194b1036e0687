"""The folders of projects and of reference runs that ship with jepa_kit: configs and runs by name.

In a clone they are projects/ and reference/, beside jepa_kit/; in a wheel they are inside jepa_kit/, so that no other
package can have them.
"""

from __future__ import annotations

import os
from pathlib import Path

from jepa_kit.run_folder import RUN_CONFIG

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REPOSITORY = os.path.dirname(PACKAGE)
IN_WHEEL = os.path.isdir(os.path.join(PACKAGE, "projects"))
PROJECTS = os.path.join(PACKAGE if IN_WHEEL else REPOSITORY, "projects")
REFERENCES = os.path.join(PACKAGE if IN_WHEEL else REPOSITORY, "reference")
PREFIX = "reference:"
"""Of the name of a reference run, wherever a checkpoint, a run or a config is expected."""


def shipped_configs() -> dict[str, Path]:
    """Return name -> file of the configs of all projects, sorted; a name has its project, as ``ijepa/in1k_vitb16``.

    ``find_config`` also takes the name without the project, if one project alone has it.
    """
    return {_with_project(file): file for file in _files()}


def _files() -> list[Path]:
    return sorted(Path(PROJECTS).glob("*/configs/*.yaml"))


def _with_project(file: Path) -> str:
    return f"{file.parents[1].name}/{file.stem}"


def find_config(text: str, folder: str) -> str:
    """Return the path of a shipped config if ``text`` is its name; else ``text`` as a path.

    Args:
        text: a path, a URL, ``reference:NAME``, or a name, with or without its project; an existing file or folder
            comes before a config of the same name.
        folder: a relative path starts here.
    """
    if is_reference(text):
        return str(find_reference(text) / RUN_CONFIG)
    path = text if "://" in text else os.path.join(folder, os.path.expanduser(text))
    if os.path.exists(path):
        return path
    named = [str(file) for file in _files() if text in (file.stem, _with_project(file))]
    return named[0] if len(named) == 1 else path


def reference_names() -> list[str]:
    """Return the names of the reference runs, sorted."""
    return sorted(file.parent.name for file in Path(REFERENCES).glob(f"*/{RUN_CONFIG}"))


def is_reference(text: object) -> bool:
    """Return whether a user names a reference run, as ``reference:ijepa_scenes``."""
    return str(text).startswith(PREFIX)


def find_reference(text: object) -> Path:
    """Return the folder of a reference run.

    Args:
        text: ``reference:NAME``.

    Raises:
        FileNotFoundError: there is no such run; the message lists those that there are.
    """
    name, names = str(text).removeprefix(PREFIX), reference_names()
    if name not in names:
        there = f"there are: {', '.join(names)}" if names else f"the folder {REFERENCES} has none"
        raise FileNotFoundError(f"there is no reference run {name!r}; {there}")
    return Path(REFERENCES, name)
