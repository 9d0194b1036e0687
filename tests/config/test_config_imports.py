from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from jepa_kit.config import config_from_dict, load_config
from jepa_kit.config.imports import ships_with_project
from jepa_kit.errors import ConfigError
from jepa_kit.registry import MASKERS, SLOTS

Write = Callable[..., Path]

PART = """\
from jepa_kit.registry import MASKERS

@MASKERS.register("{name}")
class Mine:
    def __init__(self, *, grid: tuple[int, int], phase: int = 0) -> None:
        self.phase = phase
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for registry in SLOTS.values():
        registry.import_members()  # these stay, also if this file is tested alone
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] not in before:  # a module of torch would be registered twice
            del sys.modules[name]


def uses(write: Write, imports: str, name: str = "mine", file: str = "top.yaml") -> Path:
    write(name="valid.yaml")
    base = "../" * (file.count("/")) + "valid.yaml"
    return write(f"_BASE_: {base}\nimports: [{imports}]\nmasker: {{name: {name}, phase: 1}}\n", file)


def test_a_file_beside_the_config(write: Write) -> None:
    part = write(PART.format(name="mine"), "parts/my_part.py")
    config = load_config(uses(write, "parts/my_part.py"))
    assert config.imports == (str(part),)
    assert config.slots["masker"].options == {"phase": 1}
    assert MASKERS.build("mine", {"phase": 2}, grid=(2, 2)).phase == 2


def test_a_file_is_imported_once(write: Write) -> None:
    write(PART.format(name="mine"), "my_part.py")
    path = uses(write, "my_part.py, ./my_part.py")
    assert load_config(path) == load_config(path)


def test_two_files_of_one_name(write: Write) -> None:
    write(PART.format(name="mine"), "a/part_of_ours.py")
    write(PART.format(name="yours"), "b/part_of_ours.py")
    load_config(uses(write, "a/part_of_ours.py, b/part_of_ours.py", "yours"))
    assert {"mine", "yours"} <= set(MASKERS.names())


def test_a_file_with_the_name_of_a_known_module(write: Write) -> None:
    import random

    write(PART.format(name="mine"), "random.py")
    load_config(uses(write, "random.py"))
    assert sys.modules["random"] is random


def test_a_file_may_import_its_neighbours_and_its_parts_can_be_pickled(write: Write) -> None:
    write("PHASE = 3", "neighbour_of_mine.py")
    write("from neighbour_of_mine import PHASE\n" + PART.format(name="mine"), "my_part.py")
    load_config(uses(write, "my_part.py"))
    built = MASKERS.build("mine", {"phase": 2}, grid=(2, 2))
    assert pickle.loads(pickle.dumps(built)).phase == 2


@pytest.mark.parametrize("place", ["current folder", "above the config"])
def test_a_dotted_name(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str) -> None:
    root = tmp_path / "elsewhere" if place == "current folder" else tmp_path
    (root / "ideas_of_ours/mine").mkdir(parents=True)
    (root / "ideas_of_ours/mine/masker.py").write_text(PART.format(name="mine"))
    if place == "current folder":
        monkeypatch.chdir(root)
    config = load_config(uses(write, "ideas_of_ours.mine.masker", file="ideas_of_ours/mine/configs/top.yaml"))
    assert config.imports == ("ideas_of_ours.mine.masker",)
    assert str(root) in sys.path
    assert MASKERS.get("mine").__module__ == "ideas_of_ours.mine.masker"


def test_imports_of_bases_are_kept_and_relative_to_the_base(write: Write) -> None:
    mine = write(PART.format(name="mine"), "deep/mine.py")
    yours = write(PART.format(name="yours"), "yours.py")
    write(write().read_text() + "imports: [mine.py]", "deep/base.yaml")
    config = load_config(write("_BASE_: deep/base.yaml\nimports: [yours.py, yours.py]", "top.yaml"))
    assert config.imports == (str(mine), str(yours))


def test_imports_from_the_command_line(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = write(PART.format(name="mine"), "my_part.py")
    monkeypatch.chdir(tmp_path)
    config = load_config(write(), ["imports=[my_part.py]", "masker={name: mine}"])
    assert config.imports == (str(part),)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(write(), ["imports=[~/my_part.py]", "masker={name: mine}"]).imports == (str(part),)


def test_a_resolved_config_imports_again(write: Write, tmp_path: Path) -> None:
    """In a new process, from another folder."""
    write(PART.format(name="mine"), "my_part.py")
    top = write(
        "imports: [my_part.py]\ndata: {image_size: 32}\nmasker: {name: mine, phase: 1}\n"
        "encoder: {name: vit, patch_size: 8}\npredictor: {name: vit}\ntarget: {name: representation}\n"
        "loss: {name: l2}\ntarget_update: {name: ema}\n",
        "top.yaml",
    )
    code = "import sys; from jepa_kit.config import *; "
    code += (
        f"c = load_config({str(top)!r}); c.save('run'); assert load_config('run') == c; print(c.slots['masker'].name)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "mine\n"


@pytest.mark.parametrize(
    ("text", "imports", "line", "cause"),
    [
        (None, "no_such_module", "ModuleNotFoundError: no module of this name on sys.path, in ", ModuleNotFoundError),
        (None, "no_such.module", "ModuleNotFoundError: no module of this name on sys.path, in ", ModuleNotFoundError),
        (None, "none.py", "FileNotFoundError: there is no such file", FileNotFoundError),
        ("import no_such_module", "my_part.py", "ModuleNotFoundError: No module named 'no_such", ModuleNotFoundError),
        ("import no_such_module", "my_part", "ModuleNotFoundError: No module named 'no_such", ModuleNotFoundError),
        ("from os import nothing", "my_part", "ImportError: cannot import name 'nothing' from 'os'", ImportError),
        ("def", "my_part.py", "SyntaxError: invalid syntax (my_part.py, line 1)", SyntaxError),
        (PART.format(name="blocks"), "my_part.py", "ValueError: masker 'blocks' is already registered by ", ValueError),
        (PART.replace("*, ", ""), "my_part.py", "TypeError: Mine: argument 'grid' must be keyword-only", TypeError),
        (None, "..x", "TypeError: the 'package' argument is required", TypeError),
    ],
)
def test_an_import_that_fails(
    write: Write, text: str | None, imports: str, line: str, cause: type[BaseException]
) -> None:
    if text is not None:
        write(text, "my_part.py")
    path = uses(write, imports)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["train.epochs=0"])
    where = str(path.parent / imports) if imports.endswith(".py") else imports
    assert caught.value.problems[0].startswith(f"imports: cannot import {where!r}: {line}")
    assert caught.value.problems[-1] == "train.epochs (=0) must be at least 1"
    assert isinstance(caught.value.__cause__, cause)
    assert "my_part" not in sys.modules


def test_a_bug_of_a_module_keeps_its_traceback(write: Write) -> None:
    write("1 / 0", "my_part.py")
    with pytest.raises(ZeroDivisionError):
        load_config(uses(write, "my_part.py"))


@pytest.mark.parametrize("value", ["my_part", "[3]", "['']", "{a: b}"])
def test_imports_that_are_no_list_of_modules(write: Write, value: str) -> None:
    message = r"imports \(=.*\) must be a list of files and modules, such as \[my_masker"
    valid = write(name="valid.yaml")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(f"_BASE_: valid.yaml\nimports: {value}"), ["train.epochs=0"])
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match=message):
        load_config(valid, [f"imports={value}"])


HOSTILE = "import pathlib\npathlib.Path({trace!r}).touch()\n" + PART


@pytest.fixture
def hostile(write: Write, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint whose config imports a module that leaves a trace, and the trace."""
    trace = tmp_path / "trace"
    write(HOSTILE.format(name="mine", trace=str(trace)), "evil.py")
    raw = load_config(write(name="valid.yaml")).to_dict()
    raw |= {"imports": [str(tmp_path / "evil.py")], "masker": {"name": "mine", "phase": 1}}
    torch.save({"config": raw}, tmp_path / "x.pt")
    return tmp_path / "x.pt", trace


def test_a_checkpoint_does_not_run_code(hostile: tuple[Path, Path]) -> None:
    file, trace = hostile
    with pytest.raises(ConfigError, match=r"x.pt: 1 mistake\n  imports: '.*evil.py' would run as code, and does not"):
        load_config(file)
    raw = torch.load(file, weights_only=True)["config"]
    with pytest.raises(ConfigError, match=r"If you trust it: --trust-imports \(trust_imports=True\); or name your own"):
        config_from_dict(raw, trust_imports=False)
    assert not trace.exists()
    assert load_config(file, trust_imports=True).slots["masker"].name == "mine"
    assert trace.exists()


def test_a_base_that_is_a_checkpoint_does_not_run_code(hostile: tuple[Path, Path], write: Write) -> None:
    _, trace = hostile
    with pytest.raises(ConfigError, match="would run as code"):
        load_config(write("_BASE_: x.pt\n", "over.yaml"))
    assert not trace.exists()


def test_the_users_own_copy_takes_the_place_of_a_checkpoints(hostile: tuple[Path, Path], write: Write) -> None:
    own = write(PART.format(name="mine"), "own.py")
    config = load_config(hostile[0], [f"imports=[{own}]"])
    assert config.imports == (str(own),)
    assert not hostile[1].exists()


def test_what_ships_with_the_project_is_trusted_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    assert ships_with_project("jepa_kit.maskers.random")
    assert ships_with_project("projects.ijepa.quickstart")
    assert ships_with_project(str(root / "projects" / "ijepa" / "quickstart.py"))
    (tmp_path / "projects" / "ijepa").mkdir(parents=True)
    (tmp_path / "projects" / "ijepa" / "quickstart.py").write_text("")
    (tmp_path / "projects" / "other.py").write_text("")
    for name in ("os", "projects.other", "jepa_kit.nothing", "jepa_kit.maskers...random", str(tmp_path / "x.py")):
        assert not ships_with_project(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not ships_with_project("projects.other")
    assert not ships_with_project("projects.ijepa.quickstart")  # another module of this name comes first
    (tmp_path / "link.py").symlink_to(tmp_path / "projects" / "other.py")
    assert not ships_with_project(str(tmp_path / "link.py"))
