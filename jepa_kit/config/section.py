"""What all sections of a config share: fields with ranges, which are checked at construction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any

from jepa_kit.errors import ConfigError

if TYPE_CHECKING:  # so that the chain of imports is no longer
    from jepa_kit.registry import PartRegistry


def option(
    allowed: str,
    is_valid: Callable[[Any], bool],
    default: Any = dataclasses.MISSING,
    *,
    parts: PartRegistry | None = None,
    items: type[Section] | None = None,
) -> Any:
    """Return a field with a range.

    Args:
        allowed: the range in English, for messages.
        is_valid: returns whether a value is in the range; not called for None, which is always valid.
        default: of the field; none if it is required.
        parts: registry of the parts that the value lists, each as a mapping.
        items: schema of the mappings that the value lists.
    """
    metadata = {"allowed": allowed, "is_valid": is_valid, "parts": parts, "items": items}
    return field(default=default, metadata=metadata)


def above_0(default: Any) -> Any:
    """Return a field above 0."""
    return option("above 0 and finite", lambda x: 0 < x < math.inf, default)


def at_least(low: int, default: Any) -> Any:
    """Return a field of at least ``low``."""
    allowed = f"at least {low}" + (" and finite" if isinstance(default, float) else "")
    return option(allowed, lambda x: low <= x < math.inf, default)


class Section:
    """Base of the sections: checks all ranges at construction and reports every problem."""

    def __post_init__(self) -> None:
        if problems := self.out_of_range(vars(self)) or self.relations(vars(self)):
            raise ConfigError(problems)

    @classmethod
    def out_of_range(cls, values: Mapping[str, Any]) -> list[str]:
        """Return a message for each value of the right type that is out of range: 'lr (=0.0) must be above 0'."""
        checks = {f.name: f.metadata for f in dataclasses.fields(cls) if f.metadata}  # type: ignore[arg-type]
        return [
            f"{name} (={value!r}) must be {checks[name]['allowed']}"
            for name, value in values.items()
            if name in checks and value is not None and not checks[name]["is_valid"](value)
        ]

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        """Return problems between fields whose values are valid alone."""
        return []
