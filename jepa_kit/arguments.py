"""What the command lines of tools share: the environment, help out of the tool's own text, a config and overrides."""

from __future__ import annotations

import argparse

from jepa_kit.machine import prepare

prepare()  # here, because tools import this module first, and torch reads the environment when it is imported


def tool_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the tool's text as it is written.

    Args:
        name: of the tool.
        text: its ``__doc__``: a description, then ``examples:`` on a line of its own and the rest.
    """
    description, _, examples = (text or "").partition("\n\nexamples:")
    return argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds ``--config-file`` and ``overrides``: what ``load_config`` takes. Read with ``parse_intermixed_args``."""
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a YAML file, a run folder or a checkpoint"
    )
    add_trust(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="what to change in the config; values in YAML"
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-imports``, for tools that open checkpoints or configs of others."""
    parser.add_argument(
        "--trust-imports",
        action="store_true",
        help="run `imports` of a checkpoint's config, or of one at an address, that do not ship with jepa_kit",
    )
