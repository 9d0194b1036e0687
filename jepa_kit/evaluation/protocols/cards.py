"""The card of a protocol, read from the docstring of its class."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

_EXAMPLE = re.compile(r"^Example: ``(.+)``$", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*)$")


class Card(NamedTuple):
    """What ``tools/eval_net.py --list`` prints of a protocol.

    Args:
        title: the first line of the docstring, without its full stop.
        example: a value of ``--protocol``; None if the docstring has no line ``Example``.
        options: name -> its text under ``Args``, in the spelling of YAML.
    """

    title: str
    example: str | None
    options: dict[str, str]


def card_of(protocol: type) -> Card:
    """Return the card of a registered protocol."""
    text = inspect.getdoc(protocol) or ""
    example = _EXAMPLE.search(text)
    title = _plain(text.partition("\n")[0].rstrip("."))
    options = {name: _plain(text) for name, text in documented(text).items()}
    return Card(title, example[1] if example else None, options)


def _plain(text: str) -> str:
    return text.replace("``", "").replace("None", "null")


def documented(text: str) -> dict[str, str]:
    """Return the entries under ``Args:`` of a docstring; several names before one colon have the same text."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.partition("\nArgs:\n")[2].splitlines():
        if not line.startswith("    "):
            break
        if entry := _ENTRY.match(line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
