from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Optional, Union

import pytest

from jepa_kit.config.typed import DoesNotFitError, convert, describe, plain


@pytest.mark.parametrize(
    ("value", "annotation", "converted"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (0.5, float, 0.5),
        (True, bool, True),
        ("a", str, "a"),
        (None, None, None),
        (None, int | None, None),
        (None, Optional[float], None),  # noqa: UP045
        (2, Union[str, float], 2.0),  # noqa: UP007
        (2, float | int, 2),
        (2, int | float, 2),
        ("small", Literal["tiny", "small"], "small"),
        (4, Literal[2, 4], 4),
        ([1, 2], tuple[int, int], (1, 2)),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ([], tuple[int, ...], ()),
        ([1, 2, 3], tuple[float, ...], (1.0, 2.0, 3.0)),
        ([1, 2], list[float], [1.0, 2.0]),
        ([1, 2], Sequence[int], (1, 2)),
        ([[1, 2], [3, 4]], tuple[tuple[int, int], ...], ((1, 2), (3, 4))),
        ([1, "a"], tuple, (1, "a")),
        ([1, "a"], list, [1, "a"]),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": [1, 2]}, Mapping[str, tuple[int, int]], {"a": (1, 2)}),
        ({"a": 1}, dict, {"a": 1}),
        ({"a": (1, 2)}, Any, {"a": [1, 2]}),
        ([1, 2], tuple[int, int] | int, (1, 2)),
    ],
)
def test_what_fits(value: object, annotation: Any, converted: object) -> None:
    result = convert(value, annotation)
    assert result == converted
    assert repr(result) == repr(converted)
    assert convert(plain(result), annotation) == converted


@pytest.mark.parametrize(
    ("value", "annotation", "words"),
    [
        (True, int, "an int"),
        (1.0, int, "an int"),
        ("1", int, "an int"),
        (True, float, "a float"),
        ("fast", float, "a float"),
        (1, bool, "true or false"),
        ("yes", bool, "true or false"),
        (1, str, "a str"),
        (0, None, "null"),
        ("x", int | None, "an int or null"),
        ("x", Optional[float], "a float or null"),  # noqa: UP045
        ("big", Literal["tiny", "small"], "one of 'tiny', 'small'"),
        ("big", Literal["tiny"], "'tiny'"),
        (True, Literal[1, 2], "one of 1, 2"),
        ([1], tuple[int, int], "a list of 2 (an int, an int)"),
        ([1, 2, 3], tuple[int, int], "a list of 2 (an int, an int)"),
        ([1, "a"], tuple[int, float], "a list of 2 (an int, a float)"),
        (3, tuple[int, ...], "a list, each an int"),
        (["a"], list[int], "a list, each an int"),
        ("ab", Sequence[str], "a list, each a str"),
        (3, list, "a list"),
        ([1], dict[str, int], "a mapping of a str to an int"),
        ({"a": "b"}, dict[str, int], "a mapping of a str to an int"),
        ([1], Mapping, "a mapping"),
        ("x", complex, "of the type complex, which a config cannot write"),
    ],
)
def test_what_does_not_fit(value: object, annotation: Any, words: str) -> None:
    with pytest.raises(DoesNotFitError):
        convert(value, annotation)
    assert describe(annotation) == words


def test_any_value_is_any_value() -> None:
    assert describe(Any) == "any value"


def test_plain_shares_nothing() -> None:
    value = {"a": [1, (2, 3)]}
    copy = plain(value)
    assert copy == {"a": [1, [2, 3]]}
    value["a"].append(4)
    assert copy == {"a": [1, [2, 3]]}
