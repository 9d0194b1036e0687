"""The config after all checks, and the ways to get one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jepa_kit.config.checking import Part, check_config
from jepa_kit.config.imports import check_trusted, import_members, import_parts, resolve_imports
from jepa_kit.config.merging import apply_overrides
from jepa_kit.config.renamed import modernize
from jepa_kit.config.sections import SECTIONS, CheckpointConfig, DataConfig, EvaluateConfig, OptimConfig, TrainConfig
from jepa_kit.config.sources import read_config
from jepa_kit.config.typed import plain
from jepa_kit.config.versions import versions
from jepa_kit.config.yaml_text import dump_yaml
from jepa_kit.errors import ConfigError
from jepa_kit.registry import LOSSES, SLOTS
from jepa_kit.run_folder import RUN_CONFIG


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run is made of; checked, converted, with every default written out.

    Args:
        slots: slot -> part, for every slot but ``loss``.
        losses: the terms of the loss, each with its weight; at least one.
        data, optim, train, checkpoint, evaluate: the sections.
        imports: modules (dotted) and .py files (absolute) that registered parts.
        written_by: the versions of whoever wrote the file, where it was a resolved config; not compared.
    """

    slots: Mapping[str, Part]
    losses: Sequence[tuple[Part, float]]
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    imports: tuple[str, ...] = ()
    written_by: Mapping[str, str] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``config_from_dict`` turns into an equal Config; with the present ``versions``."""
        resolved: dict[str, Any] = {"imports": list(self.imports)} if self.imports else {}
        for slot in SLOTS:
            if slot == LOSSES.slot:
                terms = [_part(part) | {"weight": weight} for part, weight in self.losses]
                resolved[slot] = terms[0] if len(terms) == 1 else terms
            else:
                resolved[slot] = _part(self.slots[slot])
        for name in SECTIONS:
            resolved[name] = plain(asdict(getattr(self, name)))
        return resolved | {"versions": versions()}

    def to_yaml(self) -> str:
        """``to_dict`` as text."""
        return dump_yaml(self.to_dict())

    def save(self, folder: str | os.PathLike[str]) -> str:
        """Writes ``config.yaml`` into a run folder, which is made where it is missing; returns the file's path."""
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(os.fspath(folder), RUN_CONFIG)
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_yaml())
        return path


def _part(part: Part) -> dict[str, Any]:
    return {"name": part.name} | plain(dict(part.options))


def load_config(file: str | os.PathLike[str], overrides: Sequence[str] = (), *, trust_imports: bool = False) -> Config:
    """Reads, merges, imports and checks a config.

    Args:
        file: a YAML file (with ``_BASE_``, relative to it), a run folder or a checkpoint; or the address of one, whose
            handler ``imports`` among the overrides may register.
        overrides: ``key.key=value`` with the value in YAML, as in ``masker.num_targets=8`` or
            ``masker={name: random, ratio: 0.6}``.
        trust_imports: run ``imports`` of a checkpoint, or of a file at an address, that do not ship with jepa_kit.
            Those of a local YAML file, and of the overrides, are the user's own and always run.

    Raises:
        ConfigError: with every mistake of the file and the overrides. A file that cannot be read at all, or a base
            of it, is reported alone.
    """
    path = os.path.expanduser(os.fspath(file))
    folder = os.path.dirname(path if "://" in path else os.path.abspath(path))
    if "://" in path:
        import_named(overrides)
    problems: list[str] = []
    raw = read_config(path, problems, trust_imports=trust_imports or bool(_own_imports(overrides)))
    return _check(raw, overrides, folder, path, problems)


def import_named(overrides: Sequence[str]) -> None:
    """Imports what ``imports=[...]`` among overrides names, ahead of a file that it may take a handler to read.

    Raises:
        ConfigError: it cannot be imported.
    """
    problems: list[str] = []
    _, cause = _import_all(
        apply_overrides({}, _own_imports(overrides), problems).get("imports", []), os.getcwd(), problems
    )
    if problems:
        raise ConfigError(problems) from cause


def _own_imports(overrides: Sequence[str]) -> list[str]:
    """Overrides that replace ``imports``."""
    return [text for text in overrides if text.partition("=")[0].strip() == "imports"]


def config_from_dict(
    raw: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    folder: str = ".",
    source: str = "config",
    trust_imports: bool = True,
) -> Config:
    """Checks a plain mapping, such as ``Config.to_dict`` gives, and what is laid over it.

    Args:
        raw: without ``_BASE_``.
        overrides: as for ``load_config``.
        folder: where modules of ``imports`` are looked for besides ``sys.path`` and the current folder.
        source: names the config in messages.
        trust_imports: run ``imports`` of the mapping that do not ship with jepa_kit; False for one from a file that
            others may have written.

    Raises:
        ConfigError: with every mistake; imports that are not trusted are reported alone.
    """
    if not trust_imports and not _own_imports(overrides):
        check_trusted(raw.get("imports", []), source)
    problems: list[str] = []
    return _check(modernize(raw, problems=problems), overrides, folder, source, problems)


def _check(raw: Mapping[str, Any], overrides: Sequence[str], folder: str, source: str, problems: list[str]) -> Config:
    import_members()
    merged = apply_overrides(dict(raw), overrides, problems)
    imports, cause = _import_all(merged.get("imports", []), folder, problems)
    checked = check_config(merged, problems)
    if problems:
        raise ConfigError(problems, source) from cause
    written_by = merged.get("versions")
    return Config(**checked, imports=imports, written_by=written_by if isinstance(written_by, dict) else {})


def _import_all(raw: Any, folder: str, problems: list[str]) -> tuple[tuple[str, ...], Exception | None]:
    """Imports every entry; the entries, and the cause of the first that failed."""
    names = resolve_imports(raw, os.getcwd(), problems)
    results = {name: import_parts(name, folder) for name in names}
    failed = {name: cause for name, cause in results.items() if cause is not None}
    problems.extend(f"imports: cannot import {name!r}: {type(e).__name__}: {e}" for name, e in failed.items())
    return tuple(names), next(iter(failed.values()), None)
