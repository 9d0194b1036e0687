"""``Config``, the checked config of a run, and the functions that return one."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jepa_kit
from jepa_kit.config.check import DEFAULT_RECIPE, SECTIONS, Part, check_config
from jepa_kit.config.data_section import DataConfig
from jepa_kit.config.imports import check_trusted, import_parts, resolve_imports
from jepa_kit.config.learning_rate import LearningRate, chosen_rate
from jepa_kit.config.load import apply_overrides, dump_yaml, read_config
from jepa_kit.config.renamed import modernize
from jepa_kit.config.sections import (
    CheckpointConfig,
    EvaluateConfig,
    OptimConfig,
    TrainConfig,
)
from jepa_kit.config.shipped import find_config
from jepa_kit.config.typed import plain
from jepa_kit.errors import ConfigError
from jepa_kit.registry import LOSSES, RECIPES
from jepa_kit.run_folder import RUN_CONFIG


@dataclass(frozen=True, kw_only=True)
class Config:
    """The checked config of a run: converted values, with every default written out.

    Args:
        recipe: the recipe, whose parts are ``slots`` and ``losses``.
        slots: slot -> part, for every slot but ``loss``.
        losses: the terms of the loss, each with its weight; none if the recipe has no slot ``loss``.
        data, optim, train, checkpoint, evaluate: the sections.
        imports: modules (dotted) and .py files (absolute) that registered parts.
        written_by: ``versions`` of the file, if it was a resolved config; not compared.
        lr_chosen: learning rate of the files and the batch size that it was chosen for (``learning_rate.py``), before
            overrides; not compared.
    """

    recipe: Part = field(default_factory=lambda: Part(DEFAULT_RECIPE["name"], {}))
    slots: Mapping[str, Part]
    losses: Sequence[tuple[Part, float]]
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    imports: tuple[str, ...] = ()
    written_by: Mapping[str, str] = field(default_factory=dict, compare=False)
    lr_chosen: LearningRate | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which ``config_from_dict`` makes an equal Config, with the present ``versions``."""
        resolved: dict[str, Any] = {"imports": list(self.imports)} if self.imports else {}
        resolved[RECIPES.slot] = {"name": self.recipe.name, **self.recipe.options}
        for slot in RECIPES.slots(self.recipe.name):
            if slot == LOSSES.slot:
                terms = [{"name": part.name, **part.options, "weight": weight} for part, weight in self.losses]
                resolved[slot] = terms[0] if len(terms) == 1 else terms
            elif slot in self.slots:
                resolved[slot] = {"name": self.slots[slot].name, **self.slots[slot].options}
        for name in SECTIONS:
            resolved[name] = asdict(getattr(self, name))
        return plain(resolved) | {"versions": versions()}

    def to_yaml(self) -> str:
        """Return ``to_dict`` as YAML."""
        return dump_yaml(self.to_dict())

    def save(self, folder: str | os.PathLike[str]) -> str:
        """Write ``config.yaml`` into a run folder, created if necessary; return the path of the file."""
        path = Path(folder, RUN_CONFIG)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_yaml(), encoding="utf-8")
        return str(path)


def load_config(file: str | os.PathLike[str], overrides: Sequence[str] = (), *, trust_imports: bool = False) -> Config:
    """Read, merge, import and check a config.

    Args:
        file: a YAML file (with ``_BASE_``, relative to it), a run folder or a checkpoint; or the URL of one, whose
            handler may be registered by ``imports`` among the overrides; or the name of a config that ships with
            jepa_kit (``shipped_configs``).
        overrides: ``key.key=value`` with the value in YAML, as in ``masker.num_targets=8`` or
            ``masker={name: random, ratio: 0.6}``.
        trust_imports: run ``imports`` of a checkpoint, or of a file at a URL, that do not ship with jepa_kit. Those of
            a local YAML file and of the overrides are the user's own and always run.

    Raises:
        ConfigError: with every mistake of the file and the overrides. A file, or a base, that cannot be read is
            reported alone.
    """
    path = find_config(os.fspath(file), "")
    folder = os.path.dirname(path if "://" in path else os.path.abspath(path))
    if "://" in path:
        import_named(overrides)
    problems: list[str] = []
    levels: list[dict[Any, Any]] = []
    raw = read_config(path, problems, trust_imports=trust_imports or bool(_own_imports(overrides)), levels=levels)
    return _check(raw, overrides, folder, path, problems, levels)


def config_from_dict(
    raw: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    folder: str = ".",
    source: str = "config",
    trust_imports: bool = True,
) -> Config:
    """Check a plain mapping, such as ``Config.to_dict`` returns, with overrides laid over it.

    Args:
        raw: without ``_BASE_``.
        overrides: as for ``load_config``.
        folder: searched for modules of ``imports`` besides ``sys.path`` and the current folder.
        source: name of the config in messages.
        trust_imports: run ``imports`` of the mapping that do not ship with jepa_kit; False for a mapping from a file
            that others may have written.

    Raises:
        ConfigError: with every mistake; imports that are not trusted are reported alone.
    """
    if not trust_imports and not _own_imports(overrides):
        check_trusted(raw.get("imports", []), source)
    problems: list[str] = []
    raw = modernize(raw, problems=problems)
    return _check(raw, overrides, folder, source, problems, [raw])


def import_named(overrides: Sequence[str]) -> None:
    """Import the modules of ``imports=[...]`` among overrides, before a file that may need their URL handler is read.

    Raises:
        ConfigError: a module cannot be imported.
    """
    problems: list[str] = []
    named = apply_overrides({}, _own_imports(overrides), problems).get("imports", [])
    _, cause = _import_all(named, os.getcwd(), problems)
    if problems:
        raise ConfigError(problems) from cause


def _own_imports(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that replace ``imports``."""
    return [text for text in overrides if text.partition("=")[0].strip() == "imports"]


def _check(
    raw: Mapping[str, Any],
    overrides: Sequence[str],
    folder: str,
    source: str,
    problems: list[str],
    levels: Sequence[Mapping[Any, Any]],
) -> Config:
    merged = apply_overrides(dict(raw), overrides, problems)
    imports, cause = _import_all(merged.get("imports", []), folder, problems)
    checked = check_config(merged, problems)
    if problems:
        raise ConfigError(problems, source) from cause
    written_by = merged.get("versions")
    return Config(
        **checked,
        imports=imports,
        written_by=written_by if isinstance(written_by, dict) else {},
        lr_chosen=chosen_rate(levels),
    )


def _import_all(raw: Any, folder: str, problems: list[str]) -> tuple[tuple[str, ...], Exception | None]:
    """Import every entry; return the entries, and the first error."""
    names = resolve_imports(raw, os.getcwd(), problems)
    results = {name: import_parts(name, folder) for name in names}
    failed = {name: cause for name, cause in results.items() if cause is not None}
    problems.extend(f"imports: cannot import {name!r}: {type(e).__name__}: {e}" for name, e in failed.items())
    return tuple(names), next(iter(failed.values()), None)


def versions() -> dict[str, str]:
    """Return the versions of jepa_kit, Python and the installed packages that affect numbers.

    ``git_commit`` is that of the checkout, with ``-dirty`` if tracked files differ from it.
    """
    return _versions().copy()


@functools.cache
def _versions() -> dict[str, str]:
    found = {"jepa_kit": jepa_kit.__version__, "python": platform.python_version()}
    # If jepa_kit is installed in an environment inside another repository, that repository's commit is not ours.
    file = Path(__file__)
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is not None:
        commit = _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        found |= {"git_commit": commit} if commit else {}
    for name in ("torch", "numpy", "xformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
