from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_kit.arguments import add_config, tool_parser

TEXT = """Does something.

examples:
  # on two lines
  python tools/some.py

The end.
"""


def test_help_is_the_text_of_the_tool(capsys: pytest.CaptureFixture[str]) -> None:
    parser = tool_parser("some.py", TEXT)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: some.py [-h]\n\nDoes something.\n")
    assert printed.rstrip().endswith("\n\nexamples:\n  # on two lines\n  python tools/some.py\n\nThe end.")


def test_overrides_may_stand_anywhere() -> None:
    parser = tool_parser("some.py", TEXT)
    add_config(parser)
    parser.add_argument("--device")
    arguments = parser.parse_intermixed_args(["a.b=1", "--config-file", "x.yaml", "--device", "cpu", "c=[2, 3]"])
    assert (arguments.config_file, arguments.overrides) == ("x.yaml", ["a.b=1", "c=[2, 3]"])


TOOL = """
import pathlib, sys
from jepa_kit.arguments import run_tool

def main():
    print("accuracy 40.4 ± 1.1 " * 20_000)
    pathlib.Path(sys.argv[1]).write_text("done")
    print("more", file=sys.stderr)
    return 3

sys.exit(run_tool(main))
"""


@pytest.mark.integration
@pytest.mark.parametrize("how", ["ascii", "pipe", "both pipes", "head"])
def test_no_terminal_or_pipe_stops_a_tool(tmp_path: Path, how: str) -> None:
    """A terminal of ASCII alone, and readers that close their end at once or after a while."""
    done = tmp_path / "done"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"} if how == "ascii" else dict(os.environ)
    with subprocess.Popen(
        [sys.executable, "-c", TOOL, str(done)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if how == "ascii":
            assert b"accuracy 40.4 ? 1.1" in process.stdout.read()
        if how == "head":
            process.stdout.read(100)
        process.stdout.close()
        if how == "both pipes":
            process.stderr.close()
        else:
            assert process.stderr.read() == b"more\n"  # no traceback, and nothing ignored at the exit
    assert process.returncode == 3
    assert done.read_text() == "done"
