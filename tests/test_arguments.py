from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from jepa_kit.arguments import add_config, in_order, run_tool, tool_parser, without_clone
from jepa_kit.errors import PeerError, StartError

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
    assert printed.startswith("usage: some.py [-h] [--version]\n\nDoes something.\n")
    assert printed.rstrip().endswith("\n\nexamples:\n  # on two lines\n  python tools/some.py\n\nThe end.")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool_parser("some.py", TEXT).parse_args(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"jepa_kit {metadata.version('jepa_kit')}\n"


def test_help_without_a_clone() -> None:
    text = """\
  python tools/train_net.py --config-file projects/ijepa/configs/NAME.yaml
  torchrun --nproc-per-node 8 tools/train_net.py --config-file projects/ijepa/configs/in1k_vitb16.yaml
  # a run of tools/train_net.py
"""
    assert (
        without_clone(text)
        == """\
  python -m jepa_kit.tools.train_net --config-file ijepa/NAME
  torchrun --nproc-per-node 8 -m jepa_kit.tools.train_net --config-file ijepa/in1k_vitb16
  # a run of tools/train_net.py
"""
    )


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("no"), 2, "some.py: no\n"),
        (FileNotFoundError("no file"), 2, "some.py: no file\n"),
        (PeerError("rank 3 failed"), 1, "some.py: rank 3 failed\n"),
        (StartError("no group"), 1, "some.py: no group\n"),
        (KeyboardInterrupt(), 130, "\nsome.py: interrupted\n"),
    ],
)
def test_errors_are_messages(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> int:
        raise error

    assert run_tool("some.py", run) == status
    assert capsys.readouterr().err == message
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    run_tool("some.py", run)
    assert capsys.readouterr().err == message.replace("some.py:", "some.py (rank 3):")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_tool("some.py", lambda: 1 // 0)


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

sys.exit(run_tool("some.py", main))
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


def test_a_tilde_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home-of-mine")
    parser = tool_parser("some.py", TEXT)
    add_config(parser)
    parser.add_mutually_exclusive_group().add_argument("--checkpoint", metavar="FILE", nargs="+")
    parser.add_argument("--run", metavar="DIR", type=Path)
    parser.add_argument("--name", metavar="NAME")
    given = ["--config-file=~/x.yaml", "--checkpoint", "~/a", "s3://b/~c", "--run=~/r", "--name=~/n"]
    found = parser.parse_intermixed_args(given)
    assert (found.config_file, found.checkpoint) == ("/home-of-mine/x.yaml", ["/home-of-mine/a", "s3://b/~c"])
    assert (found.run, found.name) == (Path("/home-of-mine/r"), "~/n")


def test_overrides_in_the_order_of_the_command_line() -> None:
    argv = ["a=1", "--resume", "b=2", "--x", "3", "a=4", "--resume=c=5", "--y=6"]
    assert in_order(["b=2", "a=4", "a=1", "c=5"], argv) == ["a=1", "b=2", "a=4", "c=5"]


def test_of_overrides_around_resume_the_last_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from jepa_kit.tools import health, train_net

    seen: list[list[str]] = []

    def record(file: str, overrides: list[str], **options: bool) -> None:
        seen.append(overrides)
        raise ValueError("seen")

    monkeypatch.setattr(train_net, "load_config", record)
    assert train_net.main(["--config-file", "x", "optim.lr=3e-3", "--resume", "optim.lr=5e-4"]) == 2
    assert train_net.main(["--config-file", "x", "--resume", "optim.lr=5e-4", "optim.lr=3e-3"]) == 2
    assert train_net.main(["--config-file", "x", "optim.lr=1", "--resume", "--output-dir", "y", "optim.lr=2"]) == 2
    assert [[text for text in one if text.startswith("optim")] for one in seen] == [
        ["optim.lr=3e-3", "optim.lr=5e-4"],
        ["optim.lr=5e-4", "optim.lr=3e-3"],
        ["optim.lr=1", "optim.lr=2"],
    ]
    monkeypatch.setattr(health, "run", lambda arguments, *_: seen.append(arguments.overrides))
    health.main(["a=1", "--checkpoint", "x", "a=2", "--images", "32", "a=3"])
    assert seen[-1] == ["a=1", "a=2", "a=3"]
