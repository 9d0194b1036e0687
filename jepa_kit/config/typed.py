"""Convert plain YAML to annotated types, and describe those in English."""

from __future__ import annotations

import collections.abc
import types
from typing import Any, Literal, Union, get_args, get_origin


def plain(value: Any) -> Any:
    """Return a copy of a value as YAML has it, with tuples as lists."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


_NAMES: dict[Any, str] = {
    int: "an int",
    float: "a float",
    bool: "true or false",
    str: "a str",
    None: "null",
    type(None): "null",
    Any: "any value",
    object: "any value",
}
HUGE = 1 << 1000
"""Larger ints are far from every float."""
_LISTS = (list, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


class DoesNotFitError(Exception):
    """A value is not of the annotated type."""


def describe(annotation: Any) -> str:
    """Return an annotation in English: 'a list of 2 (a float, a float)'."""
    if annotation in _NAMES:
        return _NAMES[annotation]
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)} ({', '.join(describe(a) for a in args)})"
    if origin is tuple or origin in _LISTS:
        return f"a list, each {describe(args[0])}" if args else "a list"
    if origin in _MAPPINGS:
        return f"a mapping of {describe(args[0])} to {describe(args[1])}" if args else "a mapping"
    return f"of the type {getattr(annotation, '__name__', annotation)}, which a config cannot write"


def convert(value: Any, annotation: Any) -> Any:
    """Convert a value to its annotation: an int to a float, a list to a tuple.

    Args:
        value: plain YAML, or a default, which may be a tuple.
        annotation: int, float, bool, str, None, Any, Literal, Union, tuple, list, Sequence, dict or Mapping.

    Raises:
        DoesNotFitError: the value has another type. A bool is not an int, but an int is a float.
    """
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Any, object):
        return plain(value)
    if type(value) is int and abs(value) >= HUGE:
        raise DoesNotFitError
    if origin is float and type(value) is int:
        return float(value)
    if origin in (int, float, bool, str) and type(value) is origin:
        return value
    if origin in (None, type(None)) and value is None:
        return None
    if origin is Literal and any(type(a) is type(value) and a == value for a in args):
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if isinstance(value, (list, tuple)) and (origin is tuple or origin in _LISTS):
        return _convert_sequence(value, origin, args)
    if isinstance(value, dict) and origin in _MAPPINGS:
        k, v = args or (Any, Any)
        return {convert(a, k): convert(b, v) for a, b in value.items()}
    raise DoesNotFitError


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    fitting = [x for member in members for x in _fits(value, member)]
    if not fitting:
        raise DoesNotFitError
    # An int stays an int if the union has int, in any order of its members.
    return next((x for x in fitting if type(x) is type(value)), fitting[0])


def _fits(value: Any, annotation: Any) -> list[Any]:
    """Return the converted value, or nothing."""
    try:
        return [convert(value, annotation)]
    except DoesNotFitError:
        return []


def _convert_sequence(value: list[Any] | tuple[Any, ...], origin: Any, args: tuple[Any, ...]) -> Any:
    if origin is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise DoesNotFitError
        return tuple(convert(x, a) for x, a in zip(value, args, strict=True))
    items = [convert(x, args[0] if args else Any) for x in value]
    return items if origin is list else tuple(items)
