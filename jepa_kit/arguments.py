"""Command lines of the tools: environment, help from the tool's docstring, config and overrides, exit."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from jepa_kit import __version__
from jepa_kit.errors import PeerError, StartError
from jepa_kit.machine import prepare

prepare()  # tools import this module first, and torch reads the environment when it is imported

PATHS = ("FILE", "DIR", "PATH", "RUN", "OTHER", "OUT_DIR", "DUMP")
"""Placeholders (metavar) of options that are paths."""


class _Parser(argparse.ArgumentParser):
    """Expands ``~`` in paths; a shell does not expand it in ``--output=~/x``."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        for action in self._actions:
            if action.metavar in PATHS and action.type in (None, Path):
                action.type = _path if action.type is Path else os.path.expanduser
        return super().parse_known_args(args, namespace)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def in_order(overrides: Sequence[str], argv: Sequence[str] | None) -> list[str]:
    """Return overrides in the order of the command line, so that the last one of a key applies.

    Args:
        overrides: in any order, as argparse collects them.
        argv: the command line; None for ``sys.argv``.
    """
    words = sys.argv[1:] if argv is None else argv
    texts = [word.partition("=")[2] if re.match(r"--[\w-]+=", word) else word for word in words]
    return [text for text in texts if text in overrides]


def tool_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the docstring of a tool, with its line breaks, and an option ``--version``.

    Args:
        name: of the tool.
        text: ``__doc__`` of the tool: a description, a line ``examples:``, and the rest.
    """
    in_clone = (Path(__file__).parents[1] / "tools" / "train_net.py").is_file()
    text = text or ""
    description, _, examples = (text if in_clone else without_clone(text)).partition("\n\nexamples:")
    p = _Parser(
        prog=name,
        description=description,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action="version", version=f"jepa_kit {__version__}", help="print the version and exit")
    return p


def without_clone(text: str) -> str:
    """Return a help text with commands that also work outside a clone: modules for tools, and names of configs."""
    text = re.sub(r"(python |torchrun .*?)tools/(\w+)\.py", r"\1-m jepa_kit.tools.\2", text)
    return re.sub(r"projects/(\w+)/configs/(\w+)\.yaml", r"\1/\2", text)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add ``--config-file`` and ``overrides`` for ``load_config``; parse them with ``parse_intermixed_args``."""
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="a YAML file, a run folder, a checkpoint, or the name of a config, as ijepa/in1k_vitb16",
    )
    add_trust(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options of the config to change; values in YAML"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``; the tool runs by ``run_with_json``."""
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, and nothing else, on the standard output"
    )


Show = Callable[[str, Any], None]
"""Prints the result of a tool: a text, or with ``--json`` its content."""


def run_with_json(run: Callable[[argparse.Namespace, Show], int | None], arguments: argparse.Namespace) -> int | None:
    """Call the function of a tool with ``--json`` in ``json_alone``."""
    with json_alone(arguments.json) as show:
        return run(arguments, show)


@contextmanager
def json_alone(wanted: bool) -> Iterator[Show]:
    """Yield the function that prints the result of a tool: a text, or with ``--json`` its content.

    With ``--json``, anything else that the block prints goes to stderr. A number that is not finite becomes null.

    Args:
        wanted: whether ``--json`` is given.
    """
    out = sys.stdout

    def show(text: str, content: Any) -> None:
        if wanted:
            print(json.dumps(_finite(content), indent=1, allow_nan=False), file=out, flush=True)
        else:
            print(text, flush=True)

    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield show


def _finite(content: Any) -> Any:
    """Return plain values with None for numbers that are not finite."""
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content if content is None or isinstance(content, str | int) else str(content)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-imports``, for tools that open checkpoints or configs of others."""
    parser.add_argument(
        "--trust-imports",
        action="store_true",
        help="run `imports` of a checkpoint's config, or of a config at a URL, that do not ship with jepa_kit",
    )


class _Unbreakable:
    """A standard stream that discards its text after the reader has closed it, as ``| head`` does."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _try(self, call: Callable[[], int | None]) -> int:
        try:
            return call() or 0
        except BrokenPipeError:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self._stream.fileno())
            os.close(devnull)
            return 0

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def run_tool(name: str, run: Callable[[], int | None]) -> int:
    """Run a tool and return its exit status; print errors that the user can fix as one message on stderr.

    Characters that the terminal does not have are printed as ``?``. If the reader of a pipe closes it, the rest of the
    output is discarded, the tool still completes, and Python has nothing left to flush at its exit.

    Args:
        name: of the tool, for messages.
        run: parses the command line and does the work; returns the status, or None for 0.

    Returns:
        the status of ``run``; 1 if processes could not form a group or another process failed; 2 for a ValueError or
        OSError; 130 for Ctrl-C.
    """
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = (_Unbreakable(stream) for stream in streams)
    try:
        return run() or 0
    except (StartError, PeerError) as error:
        return fail(name, str(error), status=1)
    except (ValueError, OSError) as error:
        return fail(name, str(error), status=2)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # after the terminal's ^C
        return fail(name, "interrupted", status=130)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


def fail(name: str, message: str, *, status: int) -> int:
    """Print an error with the name of the tool, and the rank if there are several processes; return ``status``."""
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
    print(f"{name}{rank}: {message}", file=sys.stderr)
    return status
