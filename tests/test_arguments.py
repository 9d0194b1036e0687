from __future__ import annotations

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
