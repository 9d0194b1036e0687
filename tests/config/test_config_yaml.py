from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jepa_kit.config.load import dump_yaml, parse_yaml
from jepa_kit.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("+3", 3),
        ("1_000", 1000),
        ("0", 0),
        ("null", None),
        ("~", None),
        ("", None),
        ("true", True),
        ("False", False),
        (".inf", math.inf),
        ("-.inf", -math.inf),
    ],
)
def test_scalars(text: str, value: object) -> None:
    read = parse_yaml(f"a: {text}", "f")["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text", ["no", "on", "yes", "off", "none", "12:30", "010", "2024-01-01", "1e", "e3", "l2", "0x10"]
)
def test_what_yaml_1_1_takes_for_something_else_is_text(text: str) -> None:
    assert parse_yaml(f"a: {text}", "f") == {"a": text}


def test_nan() -> None:
    assert math.isnan(parse_yaml(".nan", "f"))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(
        ["1e-3", "no", "010", "null", "~", "<<", "=", "12:30", "1_0", ".inf", "a: b", "x\ny", "2024-01-01"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_what_is_dumped_reads_back(value: object) -> None:
    read = parse_yaml(dump_yaml(value), "f")
    assert read == value
    assert repr(read) == repr(value)


def test_pyyaml_alone_would_not_do() -> None:
    """The reason for a loader of our own."""
    assert yaml.safe_load("1e-3") == "1e-3"
    assert yaml.safe_load("{a: 1, a: 2}") == {"a": 2}


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "b: [1,\nc: 2",
            ["line 2, column 5: not YAML: while parsing a flow sequence from line 1, expected ',' or ']'"],
        ),
        ("a: 1\n\tb: 2", ["line 2, column 1: not YAML: while scanning for the next token, found character '\\t'"]),
        ("a: !!python/name:os.system", ["line 1, column 4: not YAML: could not determine a constructor for the tag"]),
        ("a: 1\nb: \x01", ["line 2: not YAML: unacceptable character #x0001"]),
        (
            "a: 1\nb: {c: 1, c: 2}\na: 3",
            ["line 2, column 11: 'c' is already given in line 2", "line 3, column 1: 'a' is"],
        ),
    ],
)
def test_errors_have_lines_and_columns(text: str, lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    assert len(caught.value.problems) == len(lines)
    for problem, line in zip(caught.value.problems, lines, strict=True):
        assert problem.startswith(line)
    assert str(caught.value).startswith("f.yaml: ")


def test_a_merge_key_is_no_duplicate() -> None:
    assert parse_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", "f")["d"] == {"b": 1, "c": 3}


def test_lists_of_scalars_are_on_one_line() -> None:
    assert dump_yaml({"a": [1, 2.5], "b": [{"c": None}]}) == "a: [1, 2.5]\nb:\n- c: null\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 2000, "nested too deeply for a config"),
        ("{a: " * 2000, "nested too deeply for a config"),
        ("a: " + "9" * 9000, "not a value of a config: Exceeds the limit"),
    ],
    ids=["lists", "maps", "digits"],
)
def test_absurd_texts_are_errors_of_the_config(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "x.yaml")
