"""Read raw configs: YAML text, files with their bases, run folders, checkpoints, and overrides.

Configs are YAML 1.2 with the core scalars. PyYAML alone reads YAML 1.1, in which ``1e-3`` is text, ``no`` is false,
``12:30`` is 750 and ``010`` is 8, and it accepts duplicate keys. ruamel.yaml reads YAML 1.2, but with dates, without
``=`` as text, and stops at the first duplicate key.
"""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import yaml
from yaml.reader import ReaderError

from jepa_kit.config.imports import check_trusted, resolve_imports
from jepa_kit.config.renamed import modernize
from jepa_kit.config.shipped import find_config, shipped_configs
from jepa_kit.errors import MALFORMED, ConfigError, reason_of
from jepa_kit.registry import RECIPES, did_you_mean, registry_of
from jepa_kit.run_folder import HEADER, RUN_CONFIG

_SCALARS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    ("merge", r"^<<$", ["<"]),
)
"""(tag, pattern, first characters) of scalars that are not text, in the order in which they are tried."""


_RESOLVERS: dict[str, Any] = {}


class _Loader(yaml.SafeLoader):
    """Reads plain values; ``duplicates`` gets a line for each duplicate key of a mapping."""

    yaml_implicit_resolvers = _RESOLVERS

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, column = key.start_mark.line + 1, key.start_mark.column + 1
            if key.value in first:
                at = f"line {line}, column {column}"
                self.duplicates.append(f"{at}: {key.value!r} is already given in line {first[key.value]}")
            first.setdefault(key.value, line)
        return node


class _Dumper(yaml.SafeDumper):
    """Writes text that ``_Loader`` reads as the same values; lists of scalars on one line."""

    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _represent_list(dumper: _Dumper, data: list[Any]) -> Any:
    flat = not any(isinstance(x, (list, dict)) for x in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


_Dumper.add_representer(list, _represent_list)


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: the text.
        source: file or override, for messages.

    Raises:
        ConfigError: the text is not YAML, or has a duplicate key; with lines and columns.
    """
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark, start = error.problem_mark or error.context_mark, error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        context = f"{error.context} from line {start.line + 1}" if error.context and start else error.context
        what = ", ".join(part for part in (context, error.problem) if part)
        raise ConfigError([f"{at}not YAML: {what}"], source) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError([f"line {line}: not YAML: {str(error).splitlines()[0]}"], source) from error
    except RecursionError as error:
        raise ConfigError(["nested too deeply for a config"], source) from error
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError([f"not a value of a config: {error}"], source) from error
    if loader.duplicates:
        raise ConfigError(loader.duplicates, source)
    return value


def dump_yaml(value: Any) -> str:
    """Return a text that ``parse_yaml`` reads as the same value, with keys in their order."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def merge(base: dict[Any, Any], over: dict[Any, Any], *, top: bool = True) -> dict[Any, Any]:
    """Return ``over`` laid over ``base``; neither is changed.

    Mappings merge key by key, at any depth; lists and scalars replace. At the top, a slot with another ``name``
    replaces the base's slot, so that no option of the base's part remains.
    """
    merged = dict(base)
    for key, value in over.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            both_named = top and _is_part(key) and "name" in old.keys() & value.keys()
            if not (both_named and old["name"] != value["name"]):
                value = merge(old, value, top=False)
        merged[key] = value
    return merged


def _is_part(key: object) -> bool:
    return key == RECIPES.slot or (isinstance(key, str) and registry_of(key) is not None)


def apply_overrides(raw: dict[Any, Any], overrides: Sequence[str], problems: list[str]) -> dict[Any, Any]:
    """Return ``raw`` with overrides ``key.key=value`` laid over it.

    Overrides merge with each other first, so that ``masker.ratio=0.6 masker.name=random`` means the same in either
    order; of two values for one key the later applies.
    """
    together: dict[Any, Any] = {}
    for text in overrides:
        try:
            keys, value = _parse_override(text)
        except ConfigError as error:
            problems.extend(error.problems)
            continue
        if (inside := _list_on_path(merge(raw, together), keys)) is not None:
            problems.append(f"override {text!r}: {inside} is a list here; override it whole, {inside}=[...]")
            continue
        for key in reversed(keys):
            value = {key: value}
        together = merge(together, value)
    return merge(raw, modernize(together, below=raw, problems=problems))


def _parse_override(text: str) -> tuple[list[str], Any]:
    """Return the keys and the value of an override; raise ConfigError if it is malformed."""
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
        return keys, _override_value(value.strip(), text)
    except ConfigError as error:
        raise ConfigError([f"override {text!r}: {problem}" for problem in error.problems]) from error


def _override_value(text: str, override: str) -> Any:
    """Return the value of an override, in which ``#`` starts no comment; raise ConfigError for text after the value."""
    if text[0] not in "[{'\"" and re.search(r"(^|\s)#", text):
        return text
    value = parse_yaml(text, override)
    node = _Loader(text).get_single_node() if "#" in text else None
    if node is not None and (rest := text[node.end_mark.index :].strip()):
        raise ConfigError([f"{rest!r} follows the value; quote the whole if it is part of it"])
    return value


def _list_on_path(raw: dict[Any, Any], keys: list[str]) -> str | None:
    """Return the path of the list that ``keys`` would lead into, if any."""
    value: Any = raw
    for depth, key in enumerate(keys[:-1], 1):
        value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, list):
            return ".".join(keys[:depth])
    return None


INSIDE = (RUN_CONFIG, HEADER)
"""Files with the config of a folder: a run folder, a sharded checkpoint."""
_TAKES = "a config is a YAML file, a run folder or a checkpoint"
_ZIP = b"PK\x03\x04"


def read_config(
    file: str,
    problems: list[str],
    *,
    trust_imports: bool = False,
    above: tuple[str, ...] = (),
    levels: list[dict[Any, Any]] | None = None,
) -> dict[Any, Any]:
    """Return the raw mapping of a file laid over its bases, with the ``imports`` of all, the base's first.

    Args:
        file: a YAML file, a folder with a ``config.yaml``, or a checkpoint (its entry ``config``); a path, or a URL
            that a handler of ``jepa_kit.data.remote.fetch.path_manager`` opens.
        problems: gets lines about mistakes that do not prevent further checks.
        trust_imports: allow any ``imports`` in checkpoints and in files at URLs; a local YAML file may have any.
        above: the files of which this one is a base.
        levels: gets the mapping of each file, without those of its bases, the lowest base first.

    Raises:
        ConfigError: the file or a base is missing or none of these, the bases form a circle, or there are imports that
            are not trusted.
    """
    path = _config_file(file, above)
    if path in above:
        raise ConfigError([f"_BASE_ goes round in a circle: {' -> '.join([*above[above.index(path) :], path])}"], path)
    raw, is_checkpoint = _read_mapping(path)
    if "imports" in raw and not trust_imports and (is_checkpoint or "://" in path):
        check_trusted(raw["imports"], path)
    if "imports" in raw:
        raw["imports"] = resolve_imports(raw["imports"], os.path.dirname(path), problems)
    levels = [] if levels is None else levels
    if "_BASE_" not in raw:
        raw = modernize(raw, problems=problems)
        levels.append(raw)
        return raw
    base = raw.pop("_BASE_")
    if not isinstance(base, str) or not base:
        raise ConfigError([f"_BASE_ (={base!r}) must be the path of a config, relative to this file, or a name"], path)
    below = find_config(base, os.path.dirname(path))
    lower = read_config(below, problems, trust_imports=trust_imports, above=(*above, path), levels=levels)
    lower.pop("versions", None)
    raw = modernize(raw, below=lower, problems=problems)
    levels.append(raw)
    merged = merge(lower, raw)
    if "imports" in lower and "imports" in raw:
        merged["imports"] = list(dict.fromkeys([*lower["imports"], *raw["imports"]]))
    return merged


def _config_file(file: str, above: tuple[str, ...]) -> str:
    """Return the file, or the config in a folder; absolute if it is local."""
    path = file.rstrip("/") if "://" in file else os.path.abspath(file)
    if _is_file(path):
        return path
    inside = next((name for name in INSIDE if _is_file(os.path.join(path, name))), None)
    if inside is not None:
        return os.path.join(path, inside)
    if os.path.isdir(path):
        raise ConfigError([f"the folder {path!r} is not a run folder: it has no {RUN_CONFIG}; {_TAKES}"])
    base = f", the _BASE_ of {above[-1]!r}," if above else ""
    names = shipped_configs()
    known = f", or one of these names: {', '.join(names)}{did_you_mean(file, names)}"
    known = "" if "." in os.path.basename(path) else known.removesuffix(".")
    raise ConfigError([f"{path!r}{base} does not exist; {_TAKES}{known}"])


def _is_file(path: str) -> bool:
    if "://" not in path:
        return os.path.isfile(path)
    from jepa_kit.data.remote.fetch import path_manager  # not at the top, as URLs alone need it

    try:
        return path_manager.isfile(path)
    except NotImplementedError:  # a handler without a listing (http): try to open the file
        try:
            path_manager.open(path, "rb").close()
        except OSError:
            return False
        return True


@contextmanager
def _local(path: str) -> Iterator[str]:
    """Yield the path of a file, or of its copy here if it is at a URL."""
    if "://" not in path:
        yield path
        return
    from jepa_kit.data.remote.fetch import Access, copy

    with tempfile.NamedTemporaryFile() as file:
        copy(path, cast(BinaryIO, file), Access())
        yield file.name


def _read_mapping(path: str) -> tuple[dict[Any, Any], bool]:
    """Return the mapping of a file, and whether the file is a checkpoint."""
    with _local(path) as local:
        with open(local, "rb") as file:
            start = file.read(len(_ZIP))
            data = start + (b"" if start == _ZIP else file.read())
        if start == _ZIP:
            return _config_of_checkpoint(local, path), True
    try:
        raw = parse_yaml(data.decode("utf-8"), path)
    except UnicodeDecodeError as error:
        raise ConfigError([f"neither text nor a checkpoint that torch.save wrote; {_TAKES}"], path) from error
    if not isinstance(raw, dict):
        raise ConfigError([f"the file has {_kind(raw)}, but a config is a mapping with keys such as masker"], path)
    return raw, False


def _config_of_checkpoint(file: str, source: str) -> dict[Any, Any]:
    import torch  # not at the top, as YAML files do not need it

    try:
        with zipfile.ZipFile(file) as archive:  # reading compares the CRC of the values; weights are not read
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    archive.read(name)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except MALFORMED as error:
        raise ConfigError([f"the checkpoint cannot be read: {reason_of(error)}"], source) from error
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict):
        entries = f"entries {', '.join(map(str, content))}" if isinstance(content, dict) else _kind(content)
        raise ConfigError([f"the checkpoint has no config (it has {entries}); give the YAML file of its run"], source)
    return config


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
