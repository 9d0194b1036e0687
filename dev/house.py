#!/usr/bin/env python
"""Measure the code: chains of imports, sizes, words, and the work before the first step.

The table is Markdown, with one column for jepa_kit and one for tools; below it are the chain of imports, long files,
long functions and what else a figure is made of. --compare prints the tables of two such measurements side by side.

examples:
  python dev/house.py
  python dev/house.py --words                                             # and the files with most of the words
  python dev/house.py --work-before-step-0 --json output/after.json       # all figures, into a file as well
  python dev/house.py --root CHECKOUT --work-before-step-0 --json output/before.json
  python dev/house.py --compare dev/recordings/house_before.json output/after.json
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from house_imports import (
    Place,
    count_imports_by_name,
    cycles,
    find_modules,
    import_graph,
    longest_chain,
    read_imports,
)
from house_source import WORDS, count_annotations, count_lines, count_words, lengths
from house_start import run_python, work_before_step_0

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, TOOLS = "jepa_kit", "tools"
TRAIN = "jepa_kit.training:train"
"""What tools/train_net.py calls; see ``find_function``."""
LONG_FILE, LONG_FUNCTION, MEDIUM_FUNCTION = 350, 80, 60
"""Lines that a file and a function should not exceed, and those that a function should aim at."""

Figures = dict[str, int]
Lists = dict[str, Any]
"""Heading -> what a figure consists of: names, or name -> count."""


def import_figures(root: Path, folder: str) -> tuple[Figures, Lists]:
    """Return figures on imports of modules in a folder; a chain from a tool goes on into the package."""
    modules = find_modules(root, *{PACKAGE, folder})
    imports = read_imports(modules)
    own = {name: found for name, found in imports.items() if name.split(".")[0] == folder}
    top = import_graph(imports, Place.TOP)
    both = import_graph(imports, Place.TOP, Place.FUNCTION)
    inside = [i for found in own.values() for i in found if i.place is Place.FUNCTION]
    typing = [i for found in own.values() for i in found if i.place is Place.TYPING and i.targets]
    chain, whole = longest_chain(top, folder), longest_chain(both, folder)
    loops = [loop for loop in cycles(both) if loop[0].startswith(folder)]
    figures = {
        "modules in the longest chain of imports": len(chain),
        "modules in the longest chain, imports inside functions included": len(whole),
        "cycles of imports": len([loop for loop in cycles(top) if loop[0].startswith(folder)]),
        "cycles of imports, those inside functions included": len(loops),
        "import statements inside functions": len(inside),
        "import statements inside functions, of modules of the repository": sum(bool(i.targets) for i in inside),
        "import statements under TYPE_CHECKING, of modules of the repository": len(typing),
        "calls of import_module": count_imports_by_name({name: modules[name] for name in own}),
    }
    lists: Lists = {"longest chain of imports": chain, "longest chain, imports inside functions included": whole}
    return figures, lists | {"cycles of imports": [" <-> ".join(loop) for loop in loops]}


def source_figures(root: Path, folder: str) -> tuple[Figures, Lists]:
    """Return figures on lines, functions and words of the files in a folder."""
    texts = {str(file.relative_to(root)): file.read_text() for file in find_modules(root, folder).values()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lines = [count_lines(text) for text in texts.values()]
    code, docstring, comment, blank = (sum(column) for column in zip(*lines, strict=True)) if lines else (0, 0, 0, 0)
    files = {name: sum(found) for name, found in zip(texts, lines, strict=True)}
    functions = {f"{name}: {f.name}": f.lines for name, tree in trees.items() for f in lengths(tree)}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    annotations = [count_annotations(tree) for tree in trees.values()]
    words = {name: count_words(text) for name, text in texts.items()}
    words = {name: found for name, found in words.items() if any(found.values())}
    counts = {word: sum(found[word] for found in words.values()) for word in WORDS}
    long_files, long_functions = over(files, LONG_FILE), over(functions, LONG_FUNCTION)
    figures = {
        "files": len(texts),
        "packages": sum(name.endswith("/__init__.py") for name in texts),
        f"files of more than {LONG_FILE} lines": len(long_files),
        f"functions of more than {LONG_FUNCTION} lines": len(long_functions),
        f"functions of more than {MEDIUM_FUNCTION} lines": len(over(functions, MEDIUM_FUNCTION)),
        "lines": code + docstring + comment + blank,
        "lines of code": code,
        "lines of docstrings": docstring,
        "lines of comments": comment,
        "functions": sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in nodes),
        "classes": sum(isinstance(node, ast.ClassDef) for node in nodes),
        "parameters and returns of public functions": sum(slots for slots, _ in annotations),
        "parameters and returns of public functions, annotated": sum(annotated for _, annotated in annotations),
        "words: where": counts["where"],
        "words: the phrases below together": sum(counts.values()) - counts["where"],
        **{f"words: {word}": count for word, count in counts.items() if word != "where"},
    }
    lists: Lists = {
        f"files of more than {LONG_FILE} lines": long_files,
        f"functions of more than {LONG_FUNCTION} lines": long_functions,
        "words by file": {name: {w: n for w, n in found.items() if n} for name, found in words.items()},
    }
    return figures, lists


def over(lengths: Mapping[str, int], limit: int) -> Figures:
    """Return what is longer than ``limit`` lines, the longest first."""
    return dict(sorted(((n, v) for n, v in lengths.items() if v > limit), key=lambda item: (-item[1], item[0])))


def find_function(root: Path, name: str) -> tuple[str, str]:
    """Return the module and the name of a function at the top of a module of the package.

    Args:
        root: the checkout.
        name: ``FUNCTION``, or ``MODULE:FUNCTION`` if several modules have one of that name; without a module,
            jepa_kit.training comes first.

    Raises:
        ValueError: no module has it, or several have.
    """
    module, _, function = name.rpartition(":")
    found = [
        other
        for other, file in find_modules(root, PACKAGE).items()
        if module in {"", other}
        and any(isinstance(n, ast.FunctionDef) and n.name == function for n in ast.parse(file.read_text()).body)
    ]
    found = [other for other in found if other == f"{PACKAGE}.training"] or found
    if len(found) != 1:
        raise ValueError(
            f"--train (={name}) must be a function of one module of {PACKAGE}, or MODULE:FUNCTION; "
            f"modules that have it: {', '.join(found) or 'none'}"
        )
    return found[0], function


def training_figures(root: Path, train: str, step: str | None) -> tuple[Figures, Lists]:
    """Return how many modules the import of the training function loads and, with ``step``, what runs before it."""
    module, function = find_function(root, train)
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = run_python(root, "-c", code).split()
    figures: Figures = {
        f"modules loaded with the training function, of {PACKAGE}": sum(m.split(".")[0] == PACKAGE for m in loaded),
        "modules loaded with the training function, of any package": len(loaded),
    }
    lists: Lists = {"training function": [f"{module}.{function}"]}
    if step is not None:
        file = find_modules(root, PACKAGE)[module].relative_to(root / PACKAGE)
        work = work_before_step_0(root, (str(file), function), step)
        figures |= work["figures"]
        lists |= {"changes of file before step 0, by pair": work["pairs"]}
        lists |= {"changes of file before step 0, by the file entered": work["files"]}
    return figures, lists


def measure(root: Path, train: str = TRAIN, step: str | None = None) -> dict[str, Any]:
    """Return all figures of a checkout.

    Args:
        root: the checkout.
        train: name of the training function (``find_function``).
        step: name of the function that makes a step, to count the work before it; None does not run the training.

    Returns:
        ``commit``; ``figures`` and ``lists``, each for jepa_kit and for tools.
    """
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=root, capture_output=True)
    result: dict[str, Any] = {"commit": commit.stdout.decode().strip() or "unknown", "figures": {}, "lists": {}}
    for folder in (PACKAGE, TOOLS):
        parts = [import_figures(root, folder), source_figures(root, folder)]
        if folder == PACKAGE:
            parts.append(training_figures(root, train, step))
        result["figures"][folder] = {name: value for figures, _ in parts for name, value in figures.items()}
        result["lists"][folder] = {name: value for _, lists in parts for name, value in lists.items()}
    return result


def table(columns: Mapping[str, Figures]) -> str:
    """Return a Markdown table with a row for each figure that any of the columns has."""
    rows = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    return "\n".join(
        lines + [f"| {row} | {' | '.join(str(c.get(row, '')) for c in columns.values())} |" for row in rows]
    )


def details(measured: Mapping[str, Any], words: bool = False) -> str:
    """Return the lists behind the figures, in Markdown; ``words`` adds the 20 files with most of the words."""
    parts = []
    for folder, lists in measured["lists"].items():
        for name, found in lists.items():
            if name == "words by file":
                most = Counter({file: sum(counts.values()) for file, counts in found.items()}).most_common(20)
                texts = [f"{file}: {', '.join(f'{w} {n}' for w, n in found[file].items())}" for file, _ in most]
                texts = texts if words else []
            elif isinstance(found, dict):
                texts = [f"{text}: {count}" for text, count in found.items()]
            else:
                texts = [" -> ".join(found)] if "chain" in name and found else found
            if texts:
                parts.append(f"{folder}, {name}:\n\n" + "\n".join(f"- {text}" for text in texts))
    return "\n\n".join(parts)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return one table of two measurements, and the lists of the second."""
    columns = {
        f"{folder} {when} ({measured['commit']})": measured["figures"][folder]
        for folder in (PACKAGE, TOOLS)
        for when, measured in (("before", before), ("after", after))
    }
    return f"{table(columns)}\n\n{details(after)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 2 for a mistake in the command."""
    description, _, examples = (__doc__ or "").partition("\n\nexamples:")
    parser = argparse.ArgumentParser(
        prog="house.py",
        description=description,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="the checkout (default: this one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and lists into FILE as well")
    parser.add_argument("--words", action="store_true", help="print the files with most of the words")
    parser.add_argument(
        "--work-before-step-0", action="store_true", help="run the quickstart's training up to its first step"
    )
    parser.add_argument(
        "--train", default=TRAIN, metavar="NAME", help="FUNCTION or MODULE:FUNCTION that trains (default: %(default)s)"
    )
    parser.add_argument("--step", default="train_step", metavar="NAME", help="function that makes a step")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="files of --json")
    args = parser.parse_args(argv)
    try:
        if args.compare:
            print(compare(*(json.loads(file.read_text()) for file in args.compare)))
            return 0
        measured = measure(args.root.resolve(), args.train, args.step if args.work_before_step_0 else None)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(measured, indent=1) + "\n")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"house.py: {error}", file=sys.stderr)
        return 2
    print(f"{table(measured['figures'])}\n\n{details(measured, args.words)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
