"""The pages: the reference equals signatures and docstrings, and every command of every page parses."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_repository import DOCUMENTS, PLACEHOLDER, ROOT, commands, short

from jepa_kit.config import load_config
from jepa_kit.config.shipped import find_config

sys.path.append(str(ROOT / "dev"))

import reference

FOLDER = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages as a process of their own writes them: other tests here may have registered parts."""
    folder = tmp_path_factory.mktemp("reference")
    subprocess.run([sys.executable, str(ROOT / "dev" / "reference.py"), "--output", str(folder)], check=True)
    return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.mark.parametrize("page", [*sorted(f.name for f in FOLDER.glob("*.md"))])
def test_the_reference_equals_signatures_and_docstrings(page: str, pages: dict[str, str]) -> None:
    assert (FOLDER / page).read_text() == pages[page], "run `python dev/reference.py`"


def test_the_reference_has_a_page_for_every_registry(pages: dict[str, str]) -> None:
    assert set(pages) == {f.name for f in FOLDER.glob("*.md")}


def test_a_docstring_becomes_markdown() -> None:
    text = "A < B * C [D](E).\n\nCode::\n\n    x = 1\n\n    y = 2\n\n- ``a``: b\n\nArgs:\n    x: no"
    assert reference.body(text) == "A \\< B \\* C [D\\](E).\n\nCode:\n\n```text\nx = 1\n\ny = 2\n```\n\n- `a`: b\n"


PROGRAMS = ("tools/", "projects/", "benchmarks/", "dev/")


class ParsedError(Exception):
    """Raised in place of what a program does after it has read its command line."""


def program_of(line: str) -> tuple[str, list[str]] | None:
    """Return the module of a command's program, and its arguments; None if it is none of the repository's."""
    words = shlex.split(re.split(r" (?:\||>|&&|;) ", line)[0])
    for number, word in enumerate(words):
        if tool := dict(reference.TOOLS).get(word):
            return f"jepa_kit.tools.{tool}", words[number + 1 :]
        if word.endswith(".py") and word.startswith(PROGRAMS) and (ROOT / word).exists():
            folder, *rest = Path(word).with_suffix("").parts
            return ".".join(["jepa_kit.tools" if folder == "tools" else folder, *rest]), words[number + 1 :]
    return None


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """What programs read from their command lines; they end there."""
    found: list[argparse.Namespace] = []

    def ending(method: str) -> None:
        parse = getattr(argparse.ArgumentParser, method)

        def parse_and_end(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
            found.append(parse(self, args, namespace))
            raise ParsedError

        monkeypatch.setattr(argparse.ArgumentParser, method, parse_and_end)

    ending("parse_args")
    ending("parse_intermixed_args")
    return found


def lines() -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        for line in commands(document.read_text()):
            if program_of(line):
                yield short(document), line


def check(line: str, parsed: list[argparse.Namespace], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command, and load its config with its overrides if there is such a config."""
    module, words = program_of(line) or ("", [])
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(ParsedError):
        importlib.import_module(module).main()
    overrides = getattr(parsed[-1], "overrides", [])
    config = getattr(parsed[-1], "config_file", None) or ""
    if not any(map(PLACEHOLDER.search, [config, *overrides])) and Path(find_config(config, str(ROOT))).is_file():
        load_config(config, overrides)


@pytest.mark.parametrize("document", sorted({document for document, _ in lines()}))
def test_every_command_parses(document: str, parsed: list[argparse.Namespace], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for _, line in (pair for pair in lines() if pair[0] == document):
        check(line, parsed, monkeypatch)
    assert parsed


@pytest.mark.parametrize("words", ["--nothing", "--config-file projects/ijepa/configs/quickstart.yaml optim.rate=1"])
def test_a_wrong_command_is_found(
    words: str, parsed: list[argparse.Namespace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)):
        check(f"python tools/train_net.py {words}", parsed, monkeypatch)
