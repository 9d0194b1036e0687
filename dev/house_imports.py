"""Import graph of Python folders, read from their source: which module imports which, and the longest chain."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import networkx

Graph = Mapping[str, Collection[str]]
"""Module -> the modules that it imports."""


class Place(Enum):
    """Where an import statement stands, which decides when it runs."""

    TOP = "outside functions: it runs when the module is imported"
    FUNCTION = "inside a function"
    TYPING = "under `if TYPE_CHECKING:`: it never runs"


class Import(NamedTuple):
    """One import statement.

    Attributes:
        place: where it stands.
        targets: modules of the folders that it imports; none if it imports other packages only.
    """

    place: Place
    targets: tuple[str, ...]


def find_modules(root: Path, *folders: str) -> dict[str, Path]:
    """Return dotted name -> file for all modules in folders of ``root``; a package is named without ``__init__``."""
    found = {}
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def import_statements(
    nodes: Iterable[ast.AST], place: Place = Place.TOP
) -> Iterator[tuple[ast.Import | ast.ImportFrom, Place]]:
    """Yield every import statement in syntax trees with its place; ``else`` of TYPE_CHECKING runs and counts so."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, place
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from import_statements(node.body, Place.FUNCTION)
        elif isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            yield from import_statements(node.body, Place.TYPING)
            yield from import_statements(node.orelse, place)
        else:
            yield from import_statements(ast.iter_child_nodes(node), place)


def targets(
    statement: ast.Import | ast.ImportFrom, module: str, is_package: bool, modules: Collection[str]
) -> Iterator[str]:
    """Yield the modules that a statement of ``module`` names.

    ``from package import name`` is the module ``package.name`` if there is one, and the package itself otherwise. A
    package whose submodule is imported does not count; neither does the outermost package, which every import of a
    module below it loads first.
    """
    if isinstance(statement, ast.Import):
        names = [alias.name for alias in statement.names]
    else:
        parts = module.split(".")
        parents = parts[: len(parts) - statement.level + is_package] if statement.level else []
        base = ".".join([*parents, *([statement.module] if statement.module else [])])
        names = [f"{base}.{alias.name}" for alias in statement.names]
    for name in names:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        if "." in name and name != module:
            yield name


def read_imports(modules: Mapping[str, Path]) -> dict[str, list[Import]]:
    """Return the import statements of each module."""
    return {
        name: [
            Import(place, tuple(targets(statement, name, file.name == "__init__.py", modules)))
            for statement, place in import_statements([ast.parse(file.read_text())])
        ]
        for name, file in modules.items()
    }


def import_graph(imports: Mapping[str, Iterable[Import]], *places: Place) -> dict[str, set[str]]:
    """Return the graph of the imports that stand in any of ``places``."""
    return {name: {t for i in found if i.place in places for t in i.targets} for name, found in imports.items()}


def _components(graph: Graph) -> networkx.DiGraph:
    """Return the graph of strongly connected components; each has its modules, sorted, as ``names``."""
    whole = networkx.DiGraph()
    whole.add_nodes_from(graph)
    whole.add_edges_from((name, target) for name, found in graph.items() for target in found)
    components = networkx.condensation(whole)
    for _, data in components.nodes(data=True):
        data["names"] = sorted(data["members"])
    return components


def cycles(graph: Graph) -> list[list[str]]:
    """Return the groups of modules that import one another, directly or through others."""
    found = [data["names"] for _, data in _components(graph).nodes(data=True)]
    return sorted(names for names in found if len(names) > 1)


def longest_chain(graph: Graph, start: str = "") -> list[str]:
    """Return the longest chain of modules, each of which imports the next; a cycle counts with all of its modules.

    Args:
        graph: module -> the modules that it imports.
        start: what the name of the first module begins with.
    """
    components = _components(graph)
    chains: dict[int, list[str]] = {}
    for node in reversed(list(networkx.topological_sort(components))):
        tails = sorted(chains[after] for after in components.successors(node))
        chains[node] = [*components.nodes[node]["names"], *max(tails, key=len, default=[])]
    return max(sorted(c for c in chains.values() if c[0].startswith(start)), key=len, default=[])


def count_imports_by_name(modules: Mapping[str, Path]) -> int:
    """Return the number of calls of ``import_module`` and ``__import__``, whose targets the graph does not have."""
    calls = [n for file in modules.values() for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
    return sum(ast.unparse(call.func).split(".")[-1] in {"import_module", "__import__"} for call in calls)
