"""What holds for every file, whoever adds it: errors, docstrings, paths, help texts, documents, cards of configs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("jepa_kit", "tools", "projects", "benchmarks", "dev", "docs", "tests", ".ci")
TEXT = {".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".json", ".txt", ".cfg", ""}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(*folders: str) -> list[Path]:
    """Text files under these folders; those of the root too, where no folder is named."""
    found = [] if folders else [f for f in ROOT.iterdir() if f.is_file() and f.name != ".git"]  # a file in a worktree
    for folder in folders or FOLDERS:
        found += [f for f in (ROOT / folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    return sorted(f for f in found if f.suffix in TEXT)


def short(file: Path) -> str:
    return str(file.relative_to(ROOT))


def python_files(*folders: str) -> list[Path]:
    return [f for f in files(*folders) if f.suffix == ".py"]


def broad_handlers(source: str) -> list[int]:
    """Lines of handlers that catch everything and do not end with a bare `raise`."""
    broad = {"Exception", "BaseException"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            last = node.body[-1]
            passed_on = isinstance(last, ast.Raise) and last.exc is None
            if not passed_on and any(c is None or (isinstance(c, ast.Name) and c.id in broad) for c in caught):
                found.append(node.lineno)
    return found


FUZZ = "dev/fuzz.py"
"""Whatever a damaged file makes a case raise is the result of that case."""


def test_no_handler_catches_everything() -> None:
    for text in ("except Exception:", "except:", "except (ValueError, BaseException) as e:"):
        assert broad_handlers(f"try:\n    pass\n{text}\n    pass") == [3]
    assert broad_handlers("try:\n    pass\nexcept (ValueError, OSError):\n    pass") == []
    assert broad_handlers("try:\n    pass\nexcept BaseException:\n    undo()\n    raise") == []
    found = [f"{short(f)}:{n}" for f in python_files() for n in broad_handlers(f.read_text()) if short(f) != FUZZ]
    assert found == []


HERE = re.compile(r"(?<![\w.])/(?:work|root|home|Users|tmp)/|\.\./shared\b|https?://[^\s/]*(?:pypi|download\.pytorch)")
"""Folders of one machine, and addresses of package indices: pip's own configuration says where packages come from."""


def test_no_file_names_a_path_of_one_machine() -> None:
    for text in (
        "x = '/home/me/data'",
        "--out /tmp/run",
        "ls " + "/".join(("..", "shared", "golden")),
        "https://pypi.org/simple",
    ):
        assert HERE.search(text)
    assert not HERE.search("https://github.com/x/home/y and output/tmp/run, #!/usr/bin/env bash")
    found = [
        f"{short(f)}:{n}: {line.strip()[:80]}"
        for f in files()
        for n, line in enumerate(f.read_text().splitlines(), start=1)
        if f != Path(__file__) and HERE.search(line)
    ]
    assert found == []


LONG = 12
"""Lines of a method from which it needs a docstring of its own; a shorter one may lean on that of its class."""


def described(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef, bool]]:
    """(name, node, whether it needs a docstring) for what is public at the top of a module, and its public methods."""
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        overload = any(isinstance(one, ast.Name) and one.id == "overload" for one in node.decorator_list)
        yield node.name, node, not overload
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(inner, Function) and (inner.name in {"__init__", "__call__"} or inner.name[0] != "_"):
                lines = (inner.end_lineno or 0) - inner.body[0].lineno + 1
                yield f"{node.name}.{inner.name}", inner, lines >= LONG and inner.name != "__init__"


def undescribed(source: str) -> list[str]:
    """What lacks a docstring or an annotation."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) or not tree.body else ["the module has no docstring"]
    for name, node, needs_docstring in described(tree):
        if needs_docstring and not ast.get_docstring(node):
            found.append(f"{name} has no docstring")
        if isinstance(node, Function):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in {"self", "cls"}]
            found += [f"{name}: {a} has no annotation" for a in bare]
            found += [f"{name} has no annotation of what it returns"] if node.returns is None else []
    return found


def test_a_missing_docstring_or_annotation_is_found() -> None:
    source = '"""M."""\nclass A:\n    """A."""\n    def g(self, x) -> int:\n' + "        x += 1\n" * LONG
    source += "def f(*, y: int): ...\ndef _g(): ..."
    assert undescribed(source) == [
        "A.g has no docstring",
        "A.g: x has no annotation",
        "f has no docstring",
        "f has no annotation of what it returns",
    ]


@pytest.mark.parametrize("file", python_files("jepa_kit"), ids=short)
def test_what_is_public_is_described_and_annotated(file: Path) -> None:
    assert undescribed(file.read_text()) == []


def programs() -> list[Path]:
    """What a user runs: files of tools/ and projects/ with a main."""
    found = [*ROOT.glob("tools/*.py"), *ROOT.glob("projects/*/*.py"), *ROOT.glob("benchmarks/*.py")]
    return sorted(f for f in found if '__name__ == "__main__"' in f.read_text())


@pytest.mark.integration
@pytest.mark.parametrize("program", programs(), ids=short)
def test_help_shows_an_example(program: Path) -> None:
    done = subprocess.run([sys.executable, short(program), "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    example = rf"(?:python|torchrun .*?) {re.escape(short(program))} ?"
    assert re.search(example, done.stdout), "the help shows a command to copy"


DOCUMENTS = [f for f in files() if f.suffix == ".md" and "tests" not in f.parts]
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PLACEHOLDER = re.compile(r"[A-Z]{3}|[*<>${}]|\.\.\.")


def commands(text: str) -> Iterator[str]:
    """Command lines of a document (in fences, or indented), continuation lines joined."""
    fenced = False
    for raw in re.sub(r"\\\n\s*", " ", text).splitlines():
        if raw.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or raw.startswith("    "):
            line = raw.strip().removeprefix("$ ").split(" #")[0].strip()
            if re.match(r"(?:\w+=\S+ )*(?:make|\S*python3?|torchrun|bash|dev/\S+|\.ci/run|jepa-\w+)\b", line):
                yield line


def missing_in(text: str, folder: Path) -> list[str]:
    """Files and make targets that a document's commands and links name and that are not there."""
    found = []
    for line in commands(text):
        words = line.split()
        targets = words[words.index("make") + 1 :] if "make" in words else []
        found += [f"make {t}" for t in targets if re.fullmatch(r"[a-z-]+", t) and t not in MAKE_TARGETS and t[0] != "-"]
        for word in words:
            path = word.split("=")[-1]
            if re.fullmatch(r"[\w./-]+\.(?:py|yaml|sh|json|safetensors)", path) and not PLACEHOLDER.search(path):
                made_by_the_user = path.startswith(("output/", "shards/")) or "/" not in path
                found += [] if made_by_the_user or (ROOT / path).exists() else [path]
    for link, anchor in re.findall(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        page = folder / link
        if not page.exists():
            found.append(link)
        elif anchor and anchor not in anchors(page.read_text() if link else text):
            found.append(f"{link}#{anchor}")
    return found


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_a_missing_file_is_found() -> None:
    text = "    make tset\n```\npython tools/nothing.py \\\n    --config-file projects/no.yaml\n```\n[x](nowhere.md)"
    text += "\n## One: two (of 3)\n[x](#one-two-of-3), [x](#one), [x](README.md#nowhere)"
    found = ["make tset", "tools/nothing.py", "projects/no.yaml", "nowhere.md", "#one", "README.md#nowhere"]
    assert missing_in(text, ROOT) == found
    assert missing_in("```bash\nmake test VENV=env\npython setup.py --file configs/NAME.yaml\n```", ROOT) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=short)
def test_documents_name_what_exists(document: Path) -> None:
    assert missing_in(document.read_text(), document.parent) == []


def card(text: str) -> str:
    """The comment that a config opens with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return "\n".join(lines)


@pytest.mark.parametrize("config", [f for f in files("projects") if f.suffix in {".yaml", ".yml"}], ids=short)
def test_a_config_opens_with_its_card(config: Path) -> None:
    text = card(config.read_text())
    assert len(text.splitlines()) >= 3, "a config opens with a comment: source, command, cost, result, departures"
    assert re.search(r"\b(?:python|torchrun|make) \S+", text), "the card gives the command"


def test_the_version_is_said_once() -> None:
    import jepa_kit

    assert re.fullmatch(r"\d+\.\d+\.\d+", jepa_kit.__version__)
    assert f"## {jepa_kit.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert jepa_kit.__version__ not in (ROOT / "setup.py").read_text().replace("torch>=2.10,<2.14", "")


def test_the_hooks_run_what_make_lint_runs() -> None:
    parts = re.search(r"all\) for part in (.+?); do", (ROOT / "dev" / "lint.sh").read_text())
    hooks = re.findall(r"entry: dev/lint\.sh (\w+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert parts is not None
    assert parts[1].split() == hooks
