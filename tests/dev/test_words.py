"""dev/check_words.py: phrases planted in a docstring, a comment, a message and a page, and what must not be a hit."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

DEV = Path(__file__).parents[2] / "dev"
LIST = """# a comment
[never]
purple cow -> "violet cow"
[at most 2]
held(?!-out)|holds -> "kept"
where -> "if"
"""


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DEV))
    return importlib.import_module("check_words")


@pytest.fixture
def check(words: ModuleType, tmp_path: Path):
    """Write one file and return what is wrong with the folder."""

    def run(name: str, text: str) -> list[str]:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return words.check(tmp_path, LIST, [])[0]

    return run


HIT = '"{}": write "violet cow"'


def test_a_phrase_is_found_in_each_kind_of_text(check) -> None:
    source = '"""Return 1.\n\nRaises a Purple\ncow.\n"""\nx = 1  # a\n# b purple\n# cow\ny = f"no {x} purple " "cow"\n'
    source += 'z = 1\n"""A purple cow, described."""\n'
    assert sorted(check("jepa_kit/a.py", source)) == [
        "jepa_kit/a.py:11: " + HIT.format("purple cow"),
        "jepa_kit/a.py:3: " + HIT.format("Purple cow"),
        "jepa_kit/a.py:7: " + HIT.format("purple cow"),
        "jepa_kit/a.py:9: " + HIT.format("purple cow"),
    ]


def test_a_phrase_is_found_in_a_page(check) -> None:
    assert check("docs/a.md", "# Page\n\n- one\n- purple\n  cow\n") == ["docs/a.md:4: " + HIT.format("purple cow")]
    assert len(check("README.md", "A purple cow.")) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("jepa_kit/a.py", '"""`purple cow` and ``a purple\ncow``."""\nA = {"purple": "cow"}\npurple, cow = 1, 2\n'),
        ("tools/a.py", "# a purplecow, purple: cow\n\n# purple\n\n# cow\n"),
        ("docs/a.md", "`purple cow`, `a\npurple cow`\n\n```\npurple cow\n```\n\npurple\n\ncow\n"),
        ("docs/a.txt", "purple cow"),
    ],
)
def test_code_and_parts_of_words_are_no_hits(check, name: str, text: str) -> None:
    assert check(name, text) == []


def test_a_group_has_a_maximum_over_docstrings_and_comments(check) -> None:
    twice = '"""Holds where\nheld-out samples are."""\n'
    assert check("jepa_kit/a.py", twice) == []
    assert check("jepa_kit/b.py", 'x = "holds where it is held"\n') == [], "a message does not count"
    assert check("tests/a.py", "# where\n") == [], "nor does another folder"
    (wrong,) = check("tools/a.py", "# it holds\n")
    assert wrong.startswith("3 times (holds, where), at most 2 are allowed; most in jepa_kit/a.py 2, tools/a.py 1")


def test_held_out_is_no_hit_of_the_real_list(words: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "jepa_kit").mkdir()
    file = tmp_path / "jepa_kit" / "a.py"
    file.write_text('"""Held-out samples; what it held, where."""\n')
    wrong, below = words.check(tmp_path, (DEV / "words.txt").read_text(), [file])
    assert wrong == []
    assert sorted(hit.split('"')[1] for hit in below) == ["held", "where"]


@pytest.mark.parametrize("line", ["no arrow", "-> no pattern", "[at most x]", "no better ->"])
def test_a_line_that_cannot_be_read_is_an_error(words: ModuleType, line: str) -> None:
    with pytest.raises(ValueError, match=r"words.txt:2: .* must be \[never\], \[at most N\]"):
        words.read_words(f"[never]\n{line}")


def test_the_repository_passes() -> None:
    done = subprocess.run([sys.executable, DEV / "check_words.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
