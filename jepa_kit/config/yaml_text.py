"""YAML as a config needs it: the scalars of YAML 1.2, and no key twice.

PyYAML reads YAML 1.1, where ``1e-3`` is text, ``no`` is false, ``12:30`` is 750 and ``010`` is 8.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.reader import ReaderError

from jepa_kit.errors import ConfigError

_SCALARS: list[tuple[str, str, str]] = [
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"^<<$", "<"),
]
"""(tag, pattern, first characters) of what is not text; tried in this order."""


class ConfigLoader(yaml.SafeLoader):
    """Reads plain values; keeps a line about each key that a mapping has twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML copies it for each class)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            line, column = key.start_mark.line + 1, key.start_mark.column + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                where = f"line {line}, column {column}"
                self.duplicates.append(f"{where}: {key.value!r} is already given in line {first[key.value]}")
            first.setdefault(key.value, line)
        return node


class ConfigDumper(yaml.SafeDumper):
    """Writes what ``ConfigLoader`` reads back as the same values; lists of scalars on one line."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML copies it for each class)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: ConfigDumper, data: list[Any]) -> Any:
    flat = not any(isinstance(x, (list, dict)) for x in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


ConfigDumper.add_representer(list, _represent_list)
for _tag, _pattern, _first in _SCALARS:
    for _class in (ConfigLoader, ConfigDumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), ["" if c == "\0" else c for c in _first])


def parse_yaml(text: str, source: str) -> Any:
    """The value that a text holds.

    Raises:
        ConfigError: the text is not YAML, or a key is given twice; with lines and columns.
    """
    try:
        loader = ConfigLoader(text)
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


def end_of_yaml(text: str) -> int:
    """Where the value of a text that ``parse_yaml`` reads ends; behind it are spaces and comments."""
    node = ConfigLoader(text).get_single_node()
    return len(text) if node is None else int(node.end_mark.index)


def dump_yaml(value: Any) -> str:
    """A text that ``parse_yaml`` reads back as the same value, keys in their order."""
    text: str = yaml.dump(value, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True, width=110)
    return text
