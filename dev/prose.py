"""Extract the prose of source files: docstrings, comments and messages of Python, paragraphs of Markdown."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from typing import NamedTuple


class Prose(NamedTuple):
    """A piece of text: its kind ("docstring", "comment", "message" or "markdown"), first line (from 1) and text.

    Line k of the text (from 0) is line `line + k` of the file. Only a message made of several literals differs.
    """

    kind: str
    line: int
    text: str


def docstrings(tree: ast.Module) -> Iterator[Prose]:
    """Yield the strings that are statements: docstrings, and descriptions of the assignment above them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield Prose("docstring", node.lineno, node.value.value)


def comments(source: str) -> Iterator[Prose]:
    """Yield comments without their `#`; comments on consecutive lines are one piece."""
    start, lines = 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if lines and token.start[0] != start + len(lines):
                yield Prose("comment", start, "\n".join(lines))
                lines = []
            start = start if lines else token.start[0]
            lines.append(token.string.lstrip("#!").strip())
    if lines:
        yield Prose("comment", start, "\n".join(lines))


def messages(tree: ast.Module) -> Iterator[Prose]:
    """Yield strings of two words or more that are values, such as messages; a value in an f-string becomes `{}`."""
    seen = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):  # a parent comes before its children
        if isinstance(node, ast.JoinedStr):
            seen |= {id(part) for part in node.values}
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in seen:
            text = node.value
        else:
            continue
        if len(text.split()) > 1:
            yield Prose("message", node.lineno, text)


def python_prose(source: str) -> list[Prose]:
    """Return docstrings, comments and messages of a Python file."""
    tree = ast.parse(source)
    return [*docstrings(tree), *comments(source), *messages(tree)]


def markdown_prose(source: str) -> list[Prose]:
    """Return the paragraphs of a Markdown file, without fenced code."""
    found: list[Prose] = []
    paragraph: list[str] = []
    fenced = False
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        if line.strip() and not fenced and not fence:
            paragraph.append(line)
        elif paragraph:
            found.append(Prose("markdown", number - len(paragraph), "\n".join(paragraph)))
            paragraph = []
    return found


def without_code(text: str) -> str:
    """Replace text in backticks by spaces and keep its newlines, so that lines can still be counted."""
    span = r"``.+?``|`(?:(?!\n\s*\n)[^`])+`"
    return re.sub(span, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.DOTALL)
