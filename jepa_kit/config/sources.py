"""Where a config comes from: a YAML file with its bases, a run folder, or a checkpoint."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
import zlib
from typing import Any, BinaryIO, cast

import torch

from jepa_kit.config.errors import reason_of
from jepa_kit.config.imports import check_trusted, resolve_imports
from jepa_kit.config.merging import merge
from jepa_kit.config.renamed import modernize
from jepa_kit.config.yaml_text import parse_yaml
from jepa_kit.data.remote.fetch import Access, copy, path_manager
from jepa_kit.errors import ConfigError
from jepa_kit.run_folder import HEADER, RUN_CONFIG

INSIDE = (RUN_CONFIG, HEADER)
"""What a folder has its config in: a run folder, a checkpoint in shards."""

_TAKES = "a config is a YAML file, a run folder or a checkpoint"
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)
"""What zipfile, pickle and torch raise on damaged checkpoints."""
_ZIP = b"PK\x03\x04"


def read_config(file: str, problems: list[str], *, trust_imports: bool = False) -> dict[Any, Any]:
    """The raw mapping that a file holds, laid over its bases; ``imports`` of all of them, the base's first.

    Args:
        file: a YAML file, a folder with a ``config.yaml``, or a checkpoint (its entry ``config``), here or at an
            address that a handler of ``jepa_kit.data.remote.fetch.path_manager`` opens.
        problems: gets lines about what does not keep the rest from being checked.
        trust_imports: allow any ``imports`` in checkpoints and in files at addresses; a local YAML file is its user's.

    Raises:
        ConfigError: the file is missing or none of these, a base is, the bases go round in a circle, or imports
            that are not trusted.
    """
    return _read_over_bases(file, (), problems, trust_imports)


def _read_over_bases(file: str, above: tuple[str, ...], problems: list[str], trust: bool) -> dict[Any, Any]:
    path = _config_file(file, above)
    if path in above:
        raise ConfigError([f"_BASE_ goes round in a circle: {' -> '.join([*above[above.index(path) :], path])}"], path)
    raw, is_checkpoint = _read_mapping(path)
    if "imports" in raw and not trust and (is_checkpoint or "://" in path):
        check_trusted(raw["imports"], path)
    if "imports" in raw:
        raw["imports"] = resolve_imports(raw["imports"], os.path.dirname(path), problems)
    if "_BASE_" not in raw:
        return modernize(raw, problems=problems)
    base = raw.pop("_BASE_")
    if not isinstance(base, str) or not base:
        raise ConfigError([f"_BASE_ (={base!r}) must be the path of a config, relative to this file"], path)
    below = os.path.join(os.path.dirname(path), os.path.expanduser(base))
    lower = _read_over_bases(below, (*above, path), problems, trust)
    lower.pop("versions", None)
    merged = merge(lower, modernize(raw, below=lower, problems=problems))
    if "imports" in lower and "imports" in raw:
        merged["imports"] = list(dict.fromkeys([*lower["imports"], *raw["imports"]]))
    return merged


def _config_file(file: str, above: tuple[str, ...]) -> str:
    """The file itself, for a folder the config in it; absolute where it is local."""
    path = file.rstrip("/") if "://" in file else os.path.abspath(os.path.expanduser(file))
    if _is_file(path):
        return path
    inside = next((name for name in INSIDE if _is_file(os.path.join(path, name))), None)
    if inside is not None:
        return os.path.join(path, inside)
    if os.path.isdir(path):
        raise ConfigError([f"the folder {path!r} is not a run folder: it has no {RUN_CONFIG}; {_TAKES}"])
    base = f", the _BASE_ of {above[-1]!r}," if above else ""
    raise ConfigError([f"{path!r}{base} does not exist; {_TAKES}"])


def _is_file(path: str) -> bool:
    """Of handlers that cannot tell (http), whether it opens does."""
    try:
        return path_manager.isfile(path)
    except NotImplementedError:
        try:
            path_manager.open(path, "rb").close()
        except OSError:
            return False
        return True


def _read_mapping(path: str) -> tuple[dict[Any, Any], bool]:
    """The mapping of a file, and whether the file is a checkpoint."""
    with path_manager.open(path, "rb") as file:
        start = file.read(len(_ZIP))
        data = b"" if start == _ZIP else start + file.read()
    if start == _ZIP and "://" in path:
        with tempfile.NamedTemporaryFile() as here:
            copy(path, cast(BinaryIO, here), Access())
            return _read_checkpoint(here.name, path), True
    if start == _ZIP:
        return _read_checkpoint(path, path), True
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"neither text nor a checkpoint that torch.save wrote; {_TAKES}"], path) from error
    raw = parse_yaml(text, path)
    if not isinstance(raw, dict):
        raise ConfigError([f"the file holds {_kind(raw)}, but a config is a mapping with keys such as masker"], path)
    return raw, False


def _read_checkpoint(file: str, path: str) -> dict[Any, Any]:
    try:
        with zipfile.ZipFile(file) as archive:  # the values alone: their CRC is compared, weights are not read
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    archive.read(name)
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise ConfigError([f"the checkpoint cannot be read: {reason_of(error)}"], path) from error
    config = held.get("config") if isinstance(held, dict) else None
    if not isinstance(config, dict):
        entries = f"entries {', '.join(map(str, held))}" if isinstance(held, dict) else _kind(held)
        raise ConfigError([f"the checkpoint has no config (it holds {entries}); give the YAML file of its run"], path)
    return config


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
