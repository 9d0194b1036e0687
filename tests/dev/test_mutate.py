"""dev/mutate.py on a toy package: which mutants there are, which are killed, and which are not run."""

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEV = Path(__file__).parents[2] / "dev"


def test_every_pattern_of_an_area_finds_files(monkeypatch):
    """A file that moves would otherwise be left out without a word."""
    monkeypatch.syspath_prepend(str(DEV))
    areas = importlib.import_module("mutate").AREAS.items()
    for folder, patterns in (("jepa_kit", 0), ("tests", 1)):
        for area, parts in areas:
            for pattern in parts[patterns].split():
                assert list((DEV.parent / folder).glob(pattern)), f"{area}: {folder}/{pattern}"


@pytest.fixture
def mutations():
    spec = importlib.util.spec_from_file_location("mutations", DEV / "mutations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", {"a <= b"}),
        ("a and b", {"a or b"}),
        ("a - b", {"a + b"}),
        ("not a", {"a"}),
        ("f(a, a)", {"pass"}),
        ("f(a, b, c=d)", {"pass", "f(b, a, c=d)", "f(a, b)"}),
        ("x = a[b:c]", {"x = a[:c]", "x = a[b:]"}),
        ("x.y = a", {"pass"}),
        ("a += b", {"pass", "a -= b"}),
        ("x = min(a, b)", {"x = max(a, b)", "x = min(b, a)"}),
        ("x = 0", {"x = 1"}),
        ("x = 2", {"x = 3", "x = 1"}),
        ("x = True", {"x = False"}),
        ("x = 0.5", {"x = 1.0"}),
        ("x = b if a else c", {"x = b if not a else c"}),
        ("x = [a for a in b if a]", {"x = [a for a in b if not a]"}),
        ("def f(a: g(1)=b) -> h(1):\n    raise a", {"def f(a: g(1)=b) -> h(1):\n    pass"}),
        ("import a\nx = f'{1}'", set()),
        ("@torch.no_grad()\ndef f():\n    return a", {"def f():\n    return a"}),
        ("for a in b:\n    break", {"for a in b:\n    continue"}),
    ],
)
def test_mutants_of_a_line(mutations, source, expected):
    count = len(list(mutations.sites(ast.parse(source))))
    texts = set()
    for k in range(count):
        tree = ast.parse(source)
        _, old, _, new = list(mutations.sites(tree))[k]
        texts.add(ast.unparse(ast.fix_missing_locations(mutations.Replace(old, new).visit(tree))))
    assert texts == expected
    assert count == len(expected)


TOY = """def clip(x: int) -> int:
    if x > 30:
        return 30
    return abs(x)
"""
TESTS = """from jepa_kit.toy import clip
def test_clip():
    assert clip(70) == 30
    assert clip(0) == 0
"""
RUN = """
import sys
sys.path.insert(0, {dev!r})
import mutate
mutate.AREAS, mutate.PRELOAD = {{"toy": ("toy.py", "test_toy.py")}}, ("pytest",)
sys.exit(mutate.main(sys.argv[1:]))
"""


@pytest.mark.integration
def test_a_toy_package(tmp_path):
    tree, sample = tmp_path / "tree", tmp_path / "sample.jsonl"
    for folder in ("jepa_kit", "tests"):
        (tree / folder).mkdir(parents=True)
    (tree / "jepa_kit" / "__init__.py").touch()
    (tree / "jepa_kit" / "toy.py").write_text(TOY)
    (tree / "tests" / "test_toy.py").write_text(TESTS)
    subprocess.run(["git", "init", "-q", str(tree)], check=True)

    def mutate(*options):
        command = [sys.executable, "-c", RUN.format(dev=str(DEV)), "--tree", str(tree), "--mutants", str(sample)]
        plain = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins take most of the time of a toy's test
        done = subprocess.run([*command, *options], env=plain, capture_output=True, text=True, timeout=600)
        read = map(json.loads, sample.read_text().splitlines())
        return done, {(m["line"], m["was"], m["now"]): m for m in read}

    done, mutants = mutate("--draw", "6", "--column", "before")
    assert done.returncode == 1, done.stdout + done.stderr  # more than 3 % survive
    condition, result = "if x > 30:", "return 30"
    inclusive, above, below = (condition, "x > 30", "x >= 30"), (condition, "30", "31"), (condition, "30", "29")
    assert {key for key, m in mutants.items() if m["before"] == "survived"} == {inclusive, above, below}
    assert len(mutants) == 6
    assert mutants[condition, "if x > 30", "if not x > 30"]["by"] == "tests/test_toy.py::test_clip"
    assert (tree / "jepa_kit" / "toy.py").read_text() == TOY

    # What has a reason is not run again, a line that changed is gone, the rest is replayed where it now is.
    mutants[inclusive]["equivalent"] = "30 either way"
    sample.write_text("".join(json.dumps(m) + "\n" for m in mutants.values()))
    (tree / "jepa_kit" / "toy.py").unlink()
    (tree / "jepa_kit" / "moved.py").write_text('"""A toy."""\n' + TOY.replace(result, "return +30"))
    (tree / "tests" / "test_toy.py").write_text(TESTS.replace("toy", "moved") + "    assert clip(31) == 30\n")
    done, mutants = mutate()
    assert {(key[0] == result, m.get("after")) for key, m in mutants.items() if key != inclusive} == {
        (True, "gone"),
        (False, "killed"),
        (False, "survived"),
    }
    assert "after" not in mutants[inclusive]
    assert [key for key, m in mutants.items() if m.get("after") == "survived"] == [below]
    assert done.returncode == 1
    table = sample.with_suffix(".md").read_text()
    assert "-> `x >= 30`. 30 either way" in table
    assert "| toy | 6 | 1 | 2 | 2 | 2 | 1 | 0 |" in table
