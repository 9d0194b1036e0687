"""What one Python file consists of: lines of code and of text, functions and their lengths, words of its text."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from prose import comments, docstrings, without_code

Function = ast.FunctionDef | ast.AsyncFunctionDef

LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

WORDS = {
    "where": r"where",
    **{word: word for word in ("told", "tells", "tell", "asked", "asks", "ask")},
    "held": r"held(?!-out)",
    "holds": "holds",
    **{f"{form} on": rf"{form}\s+on" for form in ("go", "goes", "going", "gone", "went")},
    "in words": r"in\s+words",
    "for people": r"for\s+people",
}
"""Word or phrase -> what finds it between the borders of words, in capital or small letters."""


class Lines(NamedTuple):
    """Number of lines of each kind. A line with code and a comment is code; a blank one is blank, also in a string.

    Attributes:
        code: all that is none of the others.
        docstring: of strings that are statements: docstrings, and those below a constant.
        comment: with nothing but a comment.
        blank: empty, or spaces only.
    """

    code: int
    docstring: int
    comment: int
    blank: int


class Length(NamedTuple):
    """A function and its number of lines, from ``def`` to its last, docstring included."""

    name: str
    lines: int


def logical_lines(text: str) -> Iterator[list[tokenize.TokenInfo]]:
    """Yield the tokens of each logical line; comments are logical lines of their own, white space is left out."""
    line: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield [token]
        elif token.type not in LAYOUT:
            line.append(token)
        elif token.type in {tokenize.NEWLINE, tokenize.ENDMARKER} and line:
            yield line
            line = []


def is_comment(line: list[tokenize.TokenInfo]) -> bool:
    return line[0].type == tokenize.COMMENT


def is_docstring(line: list[tokenize.TokenInfo]) -> bool:
    """Return whether a logical line is a string and nothing else."""
    return all(token.type == tokenize.STRING and re.match(r"[rRuU]?['\"]", token.string) for token in line)


def count_lines(text: str) -> Lines:
    """Return how many lines of each kind a file has; their sum is the number of its lines."""
    lines = text.removesuffix("\n").split("\n") if text else []
    blank = {number for number, line in enumerate(lines, start=1) if not line.strip()}
    code: set[int] = set()
    docstring: set[int] = set()
    comment: set[int] = set()
    for line in logical_lines(text):
        kind = comment if is_comment(line) else docstring if is_docstring(line) else code
        kind.update(chain.from_iterable(range(token.start[0], token.end[0] + 1) for token in line))
    code -= blank
    docstring -= blank | code
    comment -= docstring | code
    return Lines(len(code), len(docstring), len(comment), len(blank))


def count_words(text: str) -> dict[str, int]:
    """Return how often a file's docstrings and comments, without code in backticks, have each of ``WORDS``."""
    pieces = [without_code(piece.text) for piece in (*docstrings(ast.parse(text)), *comments(text))]
    return {
        word: sum(len(re.findall(rf"\b{pattern}\b", piece, re.IGNORECASE)) for piece in pieces)
        for word, pattern in WORDS.items()
    }


def named_functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    """Yield (name, node) for all functions, methods and functions inside functions; a name has its owners' names."""
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, Function | ast.ClassDef):
            name = f"{inside}.{node.name}".lstrip(".")
            if isinstance(node, Function):
                yield name, node
        yield from named_functions(node, name)


def lengths(tree: ast.AST) -> list[Length]:
    """Return the length of every function."""
    return [Length(name, (node.end_lineno or 0) - node.lineno + 1) for name, node in named_functions(tree)]


def count_annotations(tree: ast.AST) -> tuple[int, int]:
    """Return how many parameters and returns of public functions there are, and how many have an annotation.

    ``self`` and ``cls`` are left out. Private is what has an owner or a name with one underscore at its front.
    """
    slots: list[ast.expr | None] = []
    for name, node in named_functions(tree):
        if not re.search(r"(?:^|\.)_(?!_)", name):
            a = node.args
            parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            slots += [p.annotation for p in parameters if p.arg not in {"self", "cls"}] + [node.returns]
    return len(slots), sum(slot is not None for slot in slots)
