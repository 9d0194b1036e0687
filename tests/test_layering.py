"""Imports point down only, nothing in the core knows a project, and xformers is loaded only where it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "dev"))

from house_imports import Place, find_modules, import_graph, longest_chain, read_imports

ROOT = Path(__file__).resolve().parents[1]
MAX_CHAIN = 12
"""Modules in the longest chain of imports, of which each imports the next outside functions (dev/house.py)."""

LAYERS: list[set[str]] = [
    {
        "arguments",
        "compat",
        "errors",
        "files",
        "frozen",
        "lock",
        "machine",
        "patch_sets",
        "plotting",
        "progress",
        "random_state",
        "registry",
        "rng",
        "run_folder",
        "set_lengths",
        "structures",
        "interfaces",
    },
    {"distributed", "encoders", "heads", "losses", "maskers"},
    {"predictors", "target_updates", "targets"},
    {"config", "data", "from_config", "joint_embedding", "recipe", "scenes"},
    {"precision"},
    {"trials"},
    {"planning"},
    {"engine"},
    {"interop"},
    {"evaluation"},
    {"demo", "training"},
    {"api"},
    {"studies"},
    {"tools"},
]
"""Packages of jepa_kit from the bottom up. Each may import those below it, and neighbours if that makes no cycle."""

LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_modules(root: Path) -> dict[str, Path]:
    return {module_name(f, root): f for f in sorted((root / "jepa_kit").rglob("*.py"))}


def imported(tree: ast.AST, module: str, is_package: bool, modules: set[str]) -> Iterator[tuple[str, int]]:
    """(module, line) for every import in the tree, also those inside functions; names are resolved to modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in modules else base), node.lineno


def edges(root: Path) -> dict[str, list[tuple[str, int]]]:
    modules = package_modules(root)
    return {
        name: list(imported(ast.parse(file.read_text()), name, file.name == "__init__.py", set(modules)))
        for name, file in modules.items()
    }


def room_of(module: str) -> str:
    return module.split(".")[1]


def violations(root: Path) -> list[str]:
    """What breaks the rules in a tree, as readable lines."""
    found = []
    for module, imports in edges(root).items():
        if module == "jepa_kit":  # what it offers, it imports when it is asked for
            tree = ast.parse((root / "jepa_kit" / "__init__.py").read_text())
            eager = {node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
            here = [(name, line) for name, line in imports if line in eager and name != "typing"]
            found += [f"jepa_kit imports {name} (line {line})" for name, line in here]
            continue
        if room_of(module) not in LEVEL:
            found.append(f"{module}: the room {room_of(module)!r} has no layer; give it one in LAYERS")
            continue
        for name, line in imports:
            top = name.split(".")[0]
            if top in {"projects", "tools", "tests", "benchmarks"}:
                found.append(f"{module}:{line} imports {name}: the core knows nothing of what stands on it")
            elif top == "jepa_kit" and "." in name and LEVEL.get(room_of(name), 0) > LEVEL[room_of(module)]:
                found.append(f"{module}:{line} imports {name}, which is above it")
    return found


def cycle(root: Path) -> list[str]:
    """One cycle of modules, or nothing."""
    graph = {
        module: {name for name, _ in imports if name.startswith("jepa_kit.")} for module, imports in edges(root).items()
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_point_down_only() -> None:
    assert violations(ROOT) == []


def test_there_is_no_cycle() -> None:
    assert cycle(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("maskers/a.py", "from jepa_kit.recipe import JEPA", "jepa_kit.maskers.a:1 imports jepa_kit.recipe, which"),
        ("maskers/a.py", "from ..engine import loop", "jepa_kit.maskers.a:1 imports jepa_kit.engine.loop, which"),
        ("config.py", "def f():\n    from projects.x import y", "jepa_kit.config:2 imports projects.x"),
        ("engine/__init__.py", "import tools.train_net", "jepa_kit.engine:1 imports tools.train_net"),
        ("utils.py", "", "jepa_kit.utils: the room 'utils' has no layer; give it one in LAYERS"),
        (
            "engine/a.py",
            "def f():\n    from jepa_kit import evaluation",
            "jepa_kit.engine.a:2 imports jepa_kit.evaluation,",
        ),
        ("engine/a.py", "from jepa_kit.interop import start", "jepa_kit.engine.a:1 imports jepa_kit.interop, which"),
        (
            "interop/a.py",
            "import jepa_kit.evaluation.online",
            "jepa_kit.interop.a:1 imports jepa_kit.evaluation.online",
        ),
        ("__init__.py", "import torch", "jepa_kit imports torch (line 1)"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, line: str, message: str) -> None:
    for name in ("recipe.py", "engine/loop.py", "evaluation/__init__.py", file):
        (tmp_path / "jepa_kit" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "jepa_kit" / name).write_text("")
    (tmp_path / "jepa_kit" / file).write_text(line)
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(message)


def test_a_cycle_is_found(tmp_path: Path) -> None:
    (tmp_path / "jepa_kit").mkdir()
    (tmp_path / "jepa_kit" / "config.py").write_text("from jepa_kit import recipe")
    (tmp_path / "jepa_kit" / "recipe.py").write_text("def f():\n    from jepa_kit.config import load_config")
    assert set(cycle(tmp_path)) == {"jepa_kit.config", "jepa_kit.recipe"}


def test_no_chain_of_imports_is_longer_than_it_may_be() -> None:
    chain = longest_chain(import_graph(read_imports(find_modules(ROOT, "jepa_kit")), Place.TOP))
    assert len(chain) <= MAX_CHAIN, " -> ".join(chain)


def loads_at_import(tree: ast.Module, package: str) -> list[int]:
    """Lines that import a package outside any function."""
    found: list[int] = []
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [node.lineno for name in names if name.split(".")[0] == package]  # type: ignore[attr-defined]
        todo += ast.iter_child_nodes(node)
    return found


def test_xformers_is_imported_only_inside_functions() -> None:
    """On a CPU it prints warnings and offers nothing, so no import may bring it along."""
    assert loads_at_import(ast.parse("try:\n    import xformers.ops\nfinally:\n    pass"), "xformers") == [2]
    files = [f for folder in ("jepa_kit", "tools", "projects") for f in (ROOT / folder).rglob("*.py")]
    found = {str(f.relative_to(ROOT)): loads_at_import(ast.parse(f.read_text()), "xformers") for f in files}
    assert {f: lines for f, lines in found.items() if lines} == {}


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, jepa_kit; print(jepa_kit.__version__, 'torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[1:] == ["False", "False"]


def test_a_tool_starts_without_what_sharded_checkpoints_need() -> None:
    """torch.distributed.checkpoint takes a second to import, and most runs never use it."""
    code = "import sys; from jepa_kit.tools import train_net; print('torch.distributed.checkpoint' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
