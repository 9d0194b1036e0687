"""dev/house.py: fake packages whose chains, lines, words and calls were counted by hand, and one run on this clone."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "dev"))

import house
import house_imports
import house_source
import house_start
from house_imports import Place

ROOT = Path(__file__).parents[2]

CHAIN = {
    "kit/__init__.py": "",
    "kit/a.py": "from kit import b",
    "kit/b.py": "from .low import c",
    "kit/low/__init__.py": "c_name = 1",
    "kit/low/c.py": "from ..d import VALUE",
    "kit/d.py": "try:\n    import kit.e\nexcept ImportError:\n    pass\nVALUE = 1",
    "kit/e.py": "class E:\n    from kit.f import F",
    "kit/f.py": "from kit.low import c_name as F\ndef g():\n    class G:\n        from kit import h",
    "kit/h.py": "import typing\nif typing.TYPE_CHECKING:\n    from kit.i import I\nelse:\n    import os, kit.j as j",
    "kit/i.py": "import kit.unused",
    "kit/j.py": "",
    "kit/unused.py": "from kit import VERSION",
}


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def graph(root, *places):
    return house_imports.import_graph(house_imports.read_imports(house_imports.find_modules(root, "kit")), *places)


def test_chains(tmp_path):
    write(tmp_path, CHAIN)
    top = ["kit.a", "kit.b", "kit.low.c", "kit.d", "kit.e", "kit.f"]
    assert house_imports.longest_chain(graph(tmp_path, Place.TOP)) == [*top, "kit.low"]
    both = graph(tmp_path, Place.TOP, Place.FUNCTION)
    assert house_imports.longest_chain(both) == [*top, "kit.h", "kit.j"]
    assert house_imports.longest_chain(both, "kit.d") == [*top[3:], "kit.h", "kit.j"]
    assert graph(tmp_path, Place.TYPING) == {name: {"kit.i"} if name == "kit.h" else set() for name in both}
    assert graph(tmp_path, Place.TOP)["kit.unused"] == set(), "every import loads the outermost package first"
    assert house_imports.cycles(both) == []


def test_what_the_graph_reaches_is_what_python_loads(tmp_path):
    write(tmp_path, CHAIN)
    top = graph(tmp_path, Place.TOP)
    todo, reached = ["kit.a"], set()
    while todo:
        reached.add(name := todo.pop())
        todo += top[name] - reached
    code = "import sys, kit.a; print(*(name for name in sys.modules if name.startswith('kit.')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == reached


def test_a_cycle_counts_with_all_of_its_modules(tmp_path):
    write(tmp_path, {"kit/a.py": "import kit.b", "kit/b.py": "import kit.c", "kit/c.py": "from kit import b, d"})
    write(tmp_path, {"kit/d.py": "import importlib\nx = importlib.import_module('kit.a')"})
    found = graph(tmp_path, Place.TOP)
    assert house_imports.cycles(found) == [["kit.b", "kit.c"]]
    assert house_imports.longest_chain(found) == ["kit.a", "kit.b", "kit.c", "kit.d"]
    assert house_imports.count_imports_by_name(house_imports.find_modules(tmp_path, "kit")) == 1


FILE = '''#!/usr/bin/env python
"""What is told here goes

on, where it is held."""

import os  # a held-out set

A = """a string that asks

is code"""
"""Where `where` is, in words."""

# he told and Asked; it goes
# on where it ``holds``
B = [
    # for people

    "tell",
]


@staticmethod
def f(a, *b: int, c: int = 1) -> int:
    "One line."

    def inner(x):
        return x

    return a


class _K:
    def __init__(self, x: int) -> None: ...


class K:
    async def __call__(self, x: int, **y) -> None:
        """Ask."""; print()
'''


def test_lines():
    """Code: import, 2 of A, 3 of B, 5 of f (the inner ones among them) with its decorator, 2 of _K, 3 of K."""
    counts = house_source.count_lines(FILE)
    assert counts == (2 + 1 + 3 + 5 + 2 + 3, 2 + 1 + 1, 1 + 2 + 1, 14)
    assert sum(counts) == len(FILE.splitlines())
    assert house_source.count_lines("") == (0, 0, 0, 0)
    assert house_source.count_lines("x = 1") == (1, 0, 0, 0)


def test_words():
    found = {word: count for word, count in house_source.count_words(FILE).items() if count}
    once = dict.fromkeys(("asked", "ask", "held", "in words", "for people"), 1)
    assert found == {"where": 3, "told": 2, "goes on": 2, **once}


def test_functions(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "house_fake.py").write_text(FILE)
    module = importlib.import_module("house_fake")
    found = dict(house_source.lengths(ast.parse(FILE)))
    assert found == {"f": 7, "f.inner": 2, "_K.__init__": 1, "K.__call__": 2}
    assert found["f"] == len(inspect.getsourcelines(module.f)[0]) - 1, "inspect counts the decorator too"
    assert found["K.__call__"] == len(inspect.getsourcelines(module.K.__call__)[0])
    # f: a, b, c and the return; inner: x and the return; K.__call__: x, y and the return
    assert house_source.count_annotations(ast.parse(FILE)) == (4 + 2 + 3, 3 + 0 + 2)


TOOL = "import sys\nsys.path.insert(0, '.')\n"
CHECKOUT = {
    "jepa_kit/__init__.py": "",
    "jepa_kit/one.py": "from jepa_kit import two\nclass One: ...\ndef train(more):\n    two.f()\n    two.f()\n"
    "    own()\n    import jepa_kit.three\n    more(jepa_kit.three)\n    two.train_step()\ndef own(): two.f()",
    "jepa_kit/two.py": "def f(): ...\ndef train_step(): raise AssertionError('the process ends before')",
    "jepa_kit/three.py": "import threading\ndef f(): [x for x in '12']\nclass A: f()\n"
    "def threaded():\n    t = threading.Thread(target=f)\n    t.start()\n    t.join()",
    "tools/make_shards.py": TOOL + "import os\nassert sys.argv[1] == 'synthetic:scenes'\nos.mkdir(sys.argv[2])",
    "tools/train_net.py": TOOL + "import os\nassert os.path.isdir(sys.argv[-1].removeprefix('data.shards='))\n"
    "from jepa_kit import one\none.own()\none.train(lambda three: three.threaded())",
}


def test_work_before_step_0(tmp_path):
    """Calls: own, f, then of train: train, f, f, own, f, threaded; and one of f in a thread of its own."""
    write(tmp_path, CHECKOUT)
    found = house_start.work_before_step_0(tmp_path, ("one.py", "train"), "train_step")
    assert list(found["figures"].values()) == [3, 5, 7, 4, 3, 3, 6]
    assert found["pairs"] == {"one.py -> two.py": 2, "two.py -> one.py": 1, "two.py -> three.py": 1}
    assert found["files"] == {"two.py": 2, "one.py": 1, "three.py": 1}


def test_training_without_a_step_is_an_error(tmp_path):
    write(tmp_path, CHECKOUT)
    with pytest.raises(RuntimeError, match=r"exit status 1\s[\s\S]*the process ends before"):
        house_start.work_before_step_0(tmp_path, ("one.py", "train"), "other_step")
    write(tmp_path, {"jepa_kit/two.py": "def f(): ...\ndef train_step(): ..."})
    with pytest.raises(RuntimeError, match=r"tools/train_net\.py .* called no other_step \(the function of a step\)"):
        house_start.work_before_step_0(tmp_path, ("one.py", "train"), "other_step")


def test_the_training_function_is_of_one_module(tmp_path, capsys):
    write(tmp_path, CHECKOUT | {"jepa_kit/two.py": "def train(): ..."})
    assert house.find_function(tmp_path, "jepa_kit.two:train") == ("jepa_kit.two", "train")
    assert house.main(["--root", str(tmp_path), "--train", "train"]) == 2
    assert "--train (=train) must be a function of one module" in (error := capsys.readouterr().err)
    assert "modules that have it: jepa_kit.one, jepa_kit.two" in error
    assert house.main(["--root", str(tmp_path), "--train", "fit"]) == 2
    assert "modules that have it: none" in capsys.readouterr().err
    assert house.main(["--root", str(tmp_path)]) == 2
    assert "--train (=jepa_kit.training:train)" in capsys.readouterr().err
    assert house.find_function(ROOT, house.TRAIN) == ("jepa_kit.training", "train")


def test_two_measurements_in_one_table(tmp_path, capsys):
    write(tmp_path, CHECKOUT)
    before, after = str(tmp_path / "new/before.json"), str(tmp_path / "after.json")
    checkout = ["--root", str(tmp_path), "--train", "train"]
    assert house.main([*checkout, "--json", before]) == 0
    assert "| modules in the longest chain of imports | 2 | 3 |" in capsys.readouterr().out
    long = "def f():\n    # where it is\n" + "    x = 1\n" * 400
    write(tmp_path, {"jepa_kit/four.py": "from jepa_kit import one\n" + long})
    assert house.main([*checkout, "--json", after, "--work-before-step-0", "--words"]) == 0
    assert "- jepa_kit/four.py: where 1" in capsys.readouterr().out
    assert house.main(["--compare", before, after]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| modules in the longest chain of imports | 2 | 3 | 3 | 3 |" in lines
    assert "| files of more than 350 lines | 0 | 1 | 0 | 0 |" in lines
    assert "| files entered before step 0 |  | 3 |  |  |" in lines
    assert "- jepa_kit.four -> jepa_kit.one -> jepa_kit.two" in lines
    assert "- jepa_kit/four.py: 403" in lines
    assert "- jepa_kit/four.py: f: 402" in lines


@pytest.mark.integration
def test_this_clone(tmp_path):
    """Lines and files are counted in another way, and Python loads the chain's modules with its first one."""
    assert house.main(["--json", str(tmp_path / "house.json")]) == 0
    measured = json.loads((tmp_path / "house.json").read_text())
    for folder, figures in measured["figures"].items():
        files = list((ROOT / folder).rglob("*.py"))
        assert figures["files"] == len(files)
        assert figures["lines"] == sum(len(file.read_text().splitlines()) for file in files)
        assert sum(figures[f"lines of {kind}"] for kind in ("code", "docstrings", "comments")) < figures["lines"]
        assert figures["modules in the longest chain of imports"] > 1
    chain = measured["lists"]["tools"]["longest chain of imports"]
    loaded = house_start.run_python(ROOT, "-c", f"import sys, {chain[0]}; print(*sys.modules)").split()
    assert set(chain) <= set(loaded)


@pytest.mark.slow
def test_work_before_step_0_of_this_clone():
    figures, lists = house.training_figures(ROOT, house.TRAIN, "train_step")
    entered = figures["files entered before step 0"]
    assert 1 < entered <= figures["modules loaded with the training function, of jepa_kit"]
    assert figures["changes of file before step 0"] >= figures["different changes of file before step 0"] >= entered - 1
    assert lists["changes of file before step 0, by pair"]
