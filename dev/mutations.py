"""Make, store and find small changes of a syntax tree, for `dev/mutate.py`."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SWAPS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.MatMult: ast.Mult},
}
PAIRS = (
    "min max, any all, floor ceil, sin cos, argmin argmax, zeros ones, amin amax, cumsum cumprod, mean sum, "
    "startswith endswith"
)
NAMES = {a: b for pair in PAIRS.split(", ") for a, b in (pair.split(), pair.split()[::-1])}


def altered(node: ast.AST, **fields: Any) -> Any:
    """Return a copy of a node with other values of some fields."""
    return ast.copy_location(type(node)(**{**dict(ast.iter_fields(node)), **fields}), node)


def replaced(items: Sequence[Any], index: int, *new: Any) -> list[Any]:
    """Return a copy of a list with one item replaced by others."""
    return [*items[:index], *new, *items[index + 1 :]]


def expression_changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield (operator, mutated node) for all changes of an expression."""
    match node:
        case ast.Compare(ops=ops):
            yield from (
                ("comparison", altered(node, ops=replaced(ops, k, SWAPS[type(o)]()))) for k, o in enumerate(ops)
            )
        case ast.BoolOp(op=op):
            yield "and/or", altered(node, op=SWAPS[type(op)]())
        case ast.BinOp(op=op) if type(op) in SWAPS:
            yield "arithmetic", altered(node, op=SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "unary", operand
        case ast.Constant(value=bool(value)):
            yield "constant", altered(node, value=not value)
        case ast.Constant(value=int(value)):
            yield from (("constant", altered(node, value=value + by)) for by in (1, -1) if value + by >= 0)
        case ast.Constant(value=float(value)):
            yield "constant", altered(node, value=2 * value if value else 1.0)
        case ast.Name(id=name) if name in NAMES:
            yield "name", altered(node, id=NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES:
            yield "name", altered(node, attr=NAMES[name])
        case ast.Subscript(slice=ast.Slice(lower=lower, upper=upper) as part):
            ends = {"lower": lower, "upper": upper}
            yield from (("slice", altered(node, slice=altered(part, **{k: None}))) for k, end in ends.items() if end)
        case ast.Call(args=args, keywords=keywords):
            for k in range(len(args) - 1):
                swapped = replaced(replaced(args, k, args[k + 1]), k + 1, args[k])
                if ast.dump(args[k]) != ast.dump(args[k + 1]):
                    yield "swapped arguments", altered(node, args=swapped)
            for k in (k for k, keyword in enumerate(keywords) if keyword.arg):
                yield "dropped keyword", altered(node, keywords=replaced(keywords, k))


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield (operator, mutated node) for all changes of a node."""
    yield from expression_changes(node)
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield "negation", altered(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[test, *rest]):
            yield "negation", altered(node, ifs=[ast.UnaryOp(ast.Not(), test), *rest])
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]):
            yield "dropped statement", ast.copy_location(ast.Pass(), node)
        case ast.AugAssign(op=op):
            yield "dropped statement", ast.copy_location(ast.Pass(), node)
            if type(op) in SWAPS:
                yield "arithmetic", altered(node, op=SWAPS[type(op)]())
        case ast.Break() | ast.Continue():
            yield "loop", ast.copy_location(ast.Continue() if isinstance(node, ast.Break) else ast.Break(), node)
        case ast.FunctionDef(decorator_list=decorators):
            for k in (k for k, d in enumerate(decorators) if re.search("no_grad|inference_mode", ast.dump(d))):
                yield "dropped decorator", altered(node, decorator_list=replaced(decorators, k))


def sites(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST, str, ast.AST]]:
    """Yield (function, node, operator, mutated node) of a module, except annotations, messages and imports."""
    for field, value in ast.iter_fields(tree):
        for node in value if isinstance(value, list) else [value]:
            left_out = field in {"annotation", "returns"} or isinstance(
                node, ast.JoinedStr | ast.Import | ast.ImportFrom
            )
            if left_out or not isinstance(node, ast.AST):
                continue
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            inside = f"{function}.{node.name}".lstrip(".") if named else function
            yield from ((inside, node, operator, new) for operator, new in changes(node))
            yield from sites(node, inside)


class Replace(ast.NodeTransformer):
    """Replaces ``old`` by ``new``."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


KEY = ("file", "function", "operator", "line", "was", "now", "nth")


def described(tree: Path, file: str) -> Iterator[tuple[dict[str, Any], ast.Module, ast.AST, ast.AST]]:
    """Yield each mutant of a file in its stored form, with the module and the node to replace."""
    source = (tree / file).read_text()
    lines, module, seen = source.splitlines(), ast.parse(source), Counter[tuple[str, ...]]()
    for function, node, operator, new in sites(module):
        line = lines[getattr(node, "lineno", 1) - 1].strip() if hasattr(node, "lineno") else ""
        was, now = (ast.unparse(n).split(":\n")[0] for n in (node, new))
        key = (file, function, operator, line, was, now)
        yield {**dict(zip(KEY, key, strict=False)), "nth": seen[key]}, module, node, new
        seen[key] += 1


def mutated(tree: Path, mutant: dict[str, Any]) -> tuple[str, str] | None:
    """Return (file, its text with the mutant in it), or None if the line is gone. A function may have moved."""
    moved = (str(f.relative_to(tree)) for f in sorted((tree / "jepa_kit").rglob("*.py")))
    for file in (mutant["file"], *moved):
        text = (tree / file).read_text() if (tree / file).is_file() else ""
        if mutant["line"] not in text or mutant["function"].split(".")[-1] not in text:
            continue
        for found, module, old, new in described(tree, file):
            if all(found[k] == mutant[k] for k in KEY[1:]):
                return file, ast.unparse(ast.fix_missing_locations(Replace(old, new).visit(module)))
    return None
