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

    The name is that of the file without ``.yaml``, as ``in1k_vitb16``. If several projects have a config of this name,
    each has its project in front, as ``ijepa/in1k_vitb16``.
    """
    files = sorted(Path(PROJECTS).glob("*/configs/*.yaml"))
    count = Counter(file.stem for file in files)
    return {f.stem if count[f.stem] == 1 else f"{f.parents[1].name}/{f.stem}": f for f in files}


def find_config(text: str, folder: str) -> str:
    """Return the path of a shipped config if ``text`` is its name; else ``text`` as a path.

    Args:
        text: a path, a URL, or a name; an existing file or folder comes before a config of the same name.
        folder: a relative path starts here.
    """
    path = text if "://" in text else os.path.join(folder, os.path.expanduser(text))
    shipped = None if os.path.exists(path) else shipped_configs().get(text)
    return path if shipped is None else str(shipped)
