"""Import the modules that a config lists under ``imports``, which register parts."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jepa_kit.config.shipped import IN_WHEEL, PACKAGE, PROJECTS, REPOSITORY
from jepa_kit.errors import ConfigError

_OURS = {"jepa_kit": PACKAGE, "projects": PROJECTS}


def resolve_imports(raw: Any, folder: str, problems: list[str]) -> list[str]:
    """Return the entries, with absolute paths of .py files.

    Args:
        raw: value of ``imports``.
        folder: relative paths start here.
        problems: gets a line if ``raw`` is not a list of names; the result is empty then.
    """
    if not isinstance(raw, list) or not all(isinstance(x, str) and x for x in raw):
        problems.append(f"imports (={raw!r}) must be a list of files and modules, such as [my_masker.py]")
        return []
    return [os.path.abspath(os.path.join(folder, os.path.expanduser(x))) if x.endswith(".py") else x for x in raw]


def ships_with_project(name: str) -> bool:
    """Return whether an entry is a module in jepa_kit/ or projects/ of this installation, without importing it.

    Args:
        name: dotted, or an absolute path of a .py file.
    """
    if name.endswith(".py"):
        path = os.path.realpath(name)
        folders = [os.path.join(os.path.realpath(top), "") for top in _OURS.values()]
        return os.path.isfile(path) and path.startswith(tuple(folders))
    parts = name.split(".")
    if parts[0] not in _OURS or not all(part.isidentifier() for part in parts):
        return False
    if REPOSITORY not in sys.path:
        sys.path.append(REPOSITORY)
    ours = os.path.join(_OURS[parts[0]], *parts[1:])
    for folder in sys.path:  # a module of this name that comes first would be imported instead
        path = os.path.join(folder or os.getcwd(), *parts)
        if _is_module(path):
            return os.path.realpath(path) == os.path.realpath(ours)
    return _is_module(ours)  # in a wheel, where projects/ is inside jepa_kit/


def _is_module(path: str) -> bool:
    """Return whether there is a module or package at a path without suffix."""
    return os.path.isfile(f"{path}.py") or os.path.isdir(path)


def check_trusted(raw: Any, source: str) -> None:
    """Raise ConfigError if ``imports`` of a config that others may have written has modules from elsewhere.

    Args:
        raw: value of ``imports``.
        source: the checkpoint or config, for the message.
    """
    names = resolve_imports(raw, os.getcwd(), [])
    foreign = [name for name in names if not ships_with_project(name)]
    if foreign:
        raise ConfigError(
            [
                f"imports: {', '.join(map(repr, foreign))} would run as code, and does not ship with jepa_kit. If you "
                "trust it: --trust-imports (trust_imports=True); or name your own copy, imports=[my_parts.py]"
            ],
            source,
        )


def import_parts(name: str, folder: str) -> Exception | None:
    """Import a module by its dotted name, or a .py file by its path; return the error if that fails.

    A dotted name is searched on ``sys.path``, then in the current folder, in the folders above the config and in the
    checkout of this package. Its folder is appended to ``sys.path``, so that loader workers find it too. In a wheel,
    ``projects.x`` that is not on ``sys.path`` is ``jepa_kit.projects.x``. Errors other than those caught here are bugs
    of the module, and keep their traceback.

    Args:
        name: dotted, or an absolute path.
        folder: of the config.
    """
    try:
        _import_file(name) if name.endswith(".py") else _import_dotted(name, folder)
    except (ImportError, SyntaxError, TypeError, ValueError, FileNotFoundError) as error:
        return error
    return None


def find_source(name: str) -> Path | None:
    """Return the source file of an imported entry of ``imports``; None if it has none."""
    if name.endswith(".py"):
        return Path(name)
    module = sys.modules.get(name) or sys.modules.get(f"jepa_kit.{name}")
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file)


def _import_dotted(name: str, folder: str) -> None:
    for root in ("", *_roots(folder)):
        if root:
            path = os.path.join(root, *name.split("."))
            if root in sys.path or not _is_module(path):
                continue
            sys.path.append(root)
            importlib.invalidate_caches()
        try:
            importlib.import_module(name)
            return
        except ModuleNotFoundError as error:
            # raised again unless it is the module itself (or its package) that was not found
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
        if not root and IN_WHEEL and ships_with_project(name):
            importlib.import_module(f"jepa_kit.{name}")
            return
    raise ModuleNotFoundError(
        f"no module of this name on sys.path, in {os.getcwd()}, or in a folder above the config", name=name
    )


def _roots(folder: str) -> Iterator[str]:
    """Yield the folders that are searched besides ``sys.path``."""
    yield os.getcwd()
    while folder and os.path.dirname(folder) != folder:
        yield folder
        folder = os.path.dirname(folder)
    yield REPOSITORY


def _import_file(path: str) -> None:
    real = os.path.realpath(path)
    if not os.path.isfile(real):
        raise FileNotFoundError("there is no such file")
    known = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    if any(file is not None and os.path.realpath(file) == real for file in known):
        return
    folder, file = os.path.split(path)
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    # Loader workers can import the plain name too, unless another module has it.
    name = os.path.splitext(file)[0]
    found = importlib.util.find_spec(name) if name.isidentifier() and name not in sys.modules else None
    if found is None or found.origin is None or os.path.realpath(found.origin) != real:
        name = f"{name}_{zlib.crc32(real.encode()):08x}"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
