"""Every tool is a file in tools/, a module, and a command of an installation, and all have ``--version``."""

from __future__ import annotations

import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import setuptools

import jepa_kit

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(file.stem for file in (ROOT / "tools").glob("*.py"))


def test_every_tool_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    commands = [line.split(" = ") for line in given["entry_points"]["console_scripts"]]
    assert sorted(place for _, place in commands) == [f"jepa_kit.tools.{name}:main" for name in MODULES]
    assert len({command for command, _ in commands if command.startswith("jepa-")}) == len(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_every_tool_has_a_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = import_module(f"jepa_kit.tools.{name}").main
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"jepa_kit {jepa_kit.__version__}\n")
