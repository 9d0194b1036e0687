#!/usr/bin/env python
"""Reject words that this project does not use, in docstrings, comments, messages and Markdown pages.

dev/words.txt lists them, with what to write instead. Text in backticks and fenced code is not checked.

examples:
  python dev/check_words.py                    # what `dev/lint.sh words` runs
  python dev/check_words.py jepa_kit/data      # every hit there, those below a maximum too

Exit status: 0 if no phrase occurs that must not and every group stays below its maximum, 1 otherwise.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prose import Prose, markdown_prose, python_prose, without_code

FOLDERS = ("jepa_kit", "tools", "projects", "dev", "benchmarks", "tests", "docs", ".")
COUNTED_FOLDERS = {"jepa_kit", "tools"}
COUNTED_KINDS = {"docstring", "comment"}
"""Maxima hold for these kinds of text in these folders."""


class Phrase(NamedTuple):
    pattern: re.Pattern[str]
    better: str


class Group(NamedTuple):
    """Phrases that may occur `maximum` times together; None: in no text at all."""

    maximum: int | None
    phrases: list[Phrase]


class Hit(NamedTuple):
    file: Path
    line: int
    text: str
    better: str
    counted: bool

    def __str__(self) -> str:
        return f'{self.file}:{self.line}: "{self.text}": write {self.better}'


def read_words(text: str) -> list[Group]:
    """Parse dev/words.txt: `[never]` or `[at most N]`, then lines of `pattern -> better`.

    A pattern is a regular expression for whole words in any case; a space in it also matches a line break.

    Raises:
        ValueError: if a line is none of these.
    """
    groups: list[Group] = []
    for number, line in enumerate(text.splitlines(), start=1):
        heading = re.fullmatch(r"\[(?:never|at most (\d+))\]", line.strip())
        pattern, arrow, better = (part.strip() for part in line.partition("->"))
        if heading:
            groups.append(Group(int(heading[1]) if heading[1] else None, []))
        elif groups and pattern and arrow and better and not line.startswith("#"):
            whole_words = rf"\b(?:{pattern})\b".replace(" ", r"\s+")
            groups[-1].phrases.append(Phrase(re.compile(whole_words, re.IGNORECASE), better))
        elif line.strip() and not line.startswith("#"):
            raise ValueError(f"words.txt:{number}: {line!r} must be [never], [at most N], # or `pattern -> better`")
    return groups


def files_of(root: Path, paths: list[Path]) -> Iterator[Path]:
    """Yield Python and Markdown files: of `paths`, or of the folders of the repository and its root."""
    for path in paths or [root / folder for folder in FOLDERS]:
        inside = [path] if path.is_file() else sorted(path.glob("*") if path == root / "." else path.rglob("*"))
        yield from (f for f in inside if f.suffix in {".py", ".md"} and f.is_file())


def find(group: Group, root: Path, texts: list[tuple[Path, Prose]]) -> list[Hit]:
    """Return the places where a phrase of the group occurs."""
    hits = []
    for file, piece in texts:
        counted = file.relative_to(root).parts[0] in COUNTED_FOLDERS and piece.kind in COUNTED_KINDS
        prose = without_code(piece.text)
        for phrase in group.phrases:
            for match in phrase.pattern.finditer(prose):
                line = piece.line + prose.count("\n", 0, match.start())
                text = " ".join(match[0].split())
                hits.append(Hit(file.relative_to(root), line, text, phrase.better, counted))
    return hits


def check(root: Path, words: str, paths: list[Path]) -> tuple[list[str], list[str]]:
    """Return what is wrong in the repository at `root`, and the hits below a maximum in `paths`.

    Args:
        root: the repository.
        words: the text of dev/words.txt.
        paths: files and folders to look into; none: all, which is when maxima are checked.
    """
    texts = []
    for file in files_of(root, paths):
        source = file.read_text()
        texts += [(file, p) for p in (python_prose(source) if file.suffix == ".py" else markdown_prose(source))]
    wrong, allowed = [], []
    for group in read_words(words):
        hits = find(group, root, texts)
        if group.maximum is None:
            wrong += [str(hit) for hit in hits]
            continue
        counted = [hit for hit in hits if hit.counted]
        allowed += [str(hit) for hit in counted]
        if not paths and len(counted) > group.maximum:
            most = ", ".join(f"{file} {n}" for file, n in Counter(str(h.file) for h in counted).most_common(5))
            phrases = ", ".join(dict.fromkeys(hit.text.lower() for hit in counted))
            wrong.append(f"{len(counted)} times ({phrases}), at most {group.maximum} are allowed; most in {most}")
    return wrong, allowed


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    paths = [Path(argument).resolve() for argument in sys.argv[1:] if argument not in {"-h", "--help"}]
    if len(paths) < len(sys.argv) - 1:
        print(__doc__)
        return 0
    wrong, allowed = check(root, (root / "dev" / "words.txt").read_text(), paths)
    print("\n".join([*(allowed if paths else []), *wrong]) or "words: none that must not occur")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
