"""Protocols that measure features. Each is a small registered part; its docstring is its card.

knn             weighted nearest neighbours by cosine
logistic        logistic regression on whitened features, on all labels or on a few
linear          a grid of linear heads in one pass
paper_linear    I-JEPA's settings on ImageNet
paper_transfer  I-JEPA's settings by data set; count and distance are its low-level tasks
attentive       one learned query over patch tokens
dense           segmentation by a linear head on patch tokens
finetune        the encoder itself, trained with labels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jepa_kit.config.check import check_part
from jepa_kit.config.load import parse_yaml
from jepa_kit.errors import ConfigError

# The members register themselves.
from jepa_kit.evaluation.protocols import attentive, dense, finetune, knn, linear, logistic  # noqa: F401
from jepa_kit.evaluation.protocols.base import PROTOCOLS, Probe
from jepa_kit.registry import build_part

Spec = str | Mapping[str, Any]
"""A protocol's name, or a mapping with ``name`` and its options."""


class Built(NamedTuple):
    """A protocol with its registered name and all its options, including defaults."""

    name: str
    options: dict[str, Any]
    probe: Probe


def build_protocols(specs: Sequence[Spec]) -> list[Built]:
    """Return the protocols that a user's specs describe.

    Raises:
        ConfigError: (a ValueError) an unknown name or option, or a value of another type.
        ValueError: no protocol, one given twice, or a value outside its range.
    """
    if not specs:
        raise ValueError(f"protocols (=[]) must name at least one of {', '.join(PROTOCOLS.names())}")
    problems: list[str] = []
    raw = [{"name": spec} if isinstance(spec, str) else dict(spec) for spec in specs]
    parts = [check_part("protocol", one, PROTOCOLS, problems) for one in raw]
    if problems:
        raise ConfigError(problems)
    built: list[Built] = []
    for part in parts:
        assert part is not None
        probe: Probe = build_part(f"protocol {part.name!r}", {"name": part.name, **part.options}, PROTOCOLS)
        if any((part.name, part.options) == (name, options) for name, options, _ in built):
            raise ValueError(f"protocols (={part.name}) must be different ones")
        built.append(Built(part.name, dict(part.options), probe))
    return built


def plain_options(built: Sequence[Built]) -> list[dict[str, Any]]:
    """Return each protocol's name and options, including defaults, for JSON."""
    return [{"name": one.name} | one.options for one in built]


def parse_specs(texts: Sequence[str]) -> list[Spec]:
    """Parse a user's specs: names, and mappings in YAML, separated by commas: ``linear, {name: knn, neighbours: [5]}``.

    Raises:
        ConfigError: a text is not YAML.
    """
    lists = [f"[{text}]" for text in texts]
    specs = [spec for text in lists for spec in parse_yaml(text, f"--protocol {text}")]
    return [spec if isinstance(spec, Mapping) else str(spec) for spec in specs]
