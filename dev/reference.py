#!/usr/bin/env python
"""Write docs/reference/: every option of every part, section, protocol and tool, from signatures and docstrings.

examples:
  python dev/reference.py        # after a change of a signature, a docstring or a command line

The pages are committed, so that they can be read in the repository; `tests/test_docs.py` compares them with this.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jepa_kit
from jepa_kit import interfaces, patch_sets, recipe, rng, structures
from jepa_kit.config import data_section, sections
from jepa_kit.config.typed import describe
from jepa_kit.evaluation.protocols.base import PROTOCOLS
from jepa_kit.evaluation.protocols.cards import documented
from jepa_kit.interop import frozen
from jepa_kit.registry import RECIPES, REQUIRED, SLOTS, TRANSFORMS, Option, PartRegistry, signature_options

FOLDER = ROOT / "docs" / "reference"
TOOLS = re.findall(r'"(jepa-[\w-]+)": "(\w+)"', (ROOT / "setup.py").read_text())
NOTE = "<!-- written by dev/reference.py from signatures and docstrings: change those -->\n"

REGISTRIES: dict[str, tuple[PartRegistry, str]] = {
    "recipes": (RECIPES, "A recipe is the method: what a step computes, and which slots a config has."),
    "maskers": (SLOTS["masker"], "A masker decides which patches are context and which are targets."),
    "encoders": (SLOTS["encoder"], "An encoder turns images and sets of patches into tokens."),
    "predictors": (SLOTS["predictor"], "A predictor turns context tokens and target positions into predictions."),
    "targets": (SLOTS["target"], "A target is what is predicted."),
    "heads": (SLOTS["head"], "A head is what features of views pass before they are compared."),
    "losses": (
        SLOTS["loss"],
        "A loss is one term or a list of terms. Each term of a list may also have a `weight`, by default 1.",
    ),
    "target_updates": (SLOTS["target_update"], "A target update decides how the target encoder follows the encoder."),
    "transforms": (TRANSFORMS, "Transforms are applied to an image in the order of `data.transforms`."),
    "protocols": (PROTOCOLS, "A protocol measures what features contain: `tools/eval_net.py --protocol`."),
}
"""Page -> its registry, and what it opens with."""

SECTIONS: dict[str, type] = {
    "data": data_section.DataConfig,
    "data.views": data_section.ViewConfig,
    "optim": sections.OptimConfig,
    "optim.groups": sections.GroupConfig,
    "train": sections.TrainConfig,
    "checkpoint": sections.CheckpointConfig,
    "evaluate": sections.EvaluateConfig,
}
LINKS: dict[str, str] = {}
"""Class of a part -> link to its section; filled by ``pages``."""


def import_projects() -> None:
    """Register the parts of all projects."""
    for file in sorted(ROOT.glob("projects/*/*.py")):
        if file.name != "check.py" and re.search(r"^@[A-Z_]+\.register\(", file.read_text(), re.MULTILINE):
            importlib.import_module(f"projects.{file.parent.name}.{file.stem}")


def escape(text: str) -> str:
    """Return text of a docstring as Markdown: outside of code, ``*`` and ``<`` stand for themselves."""
    pieces = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    plain = [re.sub(r"([*<]|\](?=\())", r"\\\1", piece) for piece in pieces[::2]]
    code = [f"`{piece.strip('`')}`" for piece in pieces[1::2]]
    return "".join(a + b for a, b in zip(plain, [*code, ""], strict=True))


def cell(text: str) -> str:
    """Return text for a table; the name of a part's class becomes a link to the part."""
    text = escape(" ".join(text.split())).replace("|", r"\|")
    return re.sub(r"(?<=see )`(\w+)`", lambda match: LINKS.get(match[1], match[0]), text)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * lines[0].count(" | ") + "---|")
    return "\n".join(lines) + "\n"


def source(thing: Any) -> str:
    """Return a link to the module of a class or function."""
    file = Path(inspect.getsourcefile(thing) or "").relative_to(ROOT)
    return f"[{file}]({os.path.relpath(ROOT / file, FOLDER)})"


def body(text: str) -> str:
    """Return the part of a docstring above ``Args``, ``Raises`` and the like, with its literal blocks fenced."""
    text = re.split(r"^(?:Args|Raises|Returns|Yields|Attributes|Example):.*$", text, maxsplit=1, flags=re.MULTILINE)[0]
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if block.startswith("    "):
            if blocks and blocks[-1].endswith("\n```"):  # an empty line of the same code
                blocks[-1] = blocks[-1].removesuffix("\n```")
                blocks.append(textwrap.dedent(block) + "\n```")
            else:
                blocks.append("```text\n" + textwrap.dedent(block) + "\n```")
        else:
            bullet = block[:2] if block[:2] in {"- ", "* "} else ""
            blocks.append(bullet + escape(re.sub(r"::$", ":", block[len(bullet) :])))
    return "\n\n".join(blocks) + "\n"


def texts(thing: Any) -> dict[str, str]:
    """Return option -> its text in the docstring of a class or of a base of it, or of a function."""
    found: dict[str, str] = {}
    for owner in reversed(inspect.getmro(thing)) if inspect.isclass(thing) else [thing]:
        own = documented(inspect.cleandoc(owner.__doc__ or ""))
        found |= {name: text for name, text in own.items() if name not in found or not text.startswith("see ``")}
    return found


def options_table(thing: Any, options: Iterable[Option], allowed: Callable[[str], str] = lambda name: "") -> str:
    """Return the table of options of a part or a section.

    Args:
        thing: its class.
        options: of a config.
        allowed: option -> its range, if the section declares one.

    Raises:
        KeyError: the docstring lacks an option.
    """
    text = texts(thing)
    rows = []
    for option in options:
        default = "needed" if option.default is REQUIRED else f"`{shown(option.default)}`"
        kind = re.sub(
            r"of the type \w+Config, which a config cannot write", "a mapping (below)", describe(option.annotation)
        )
        limit = f"; {allowed(option.name)}" if allowed(option.name) else ""
        meaning = re.sub(r"\bNone\b", "null", text[option.name])
        rows.append([f"`{option.name}`", cell(kind + limit), default, cell(meaning)])
    return table(("option", "value", "default", "meaning"), rows) if rows else "It has no options.\n"


def shown(default: Any) -> str:
    """Return a default as in YAML."""
    return re.sub(r'"([\w.-]+)"', r"\1", json.dumps(default))


def part(registry: PartRegistry, name: str) -> str:
    """Return the section of a part."""
    cls = registry.get(name)
    supplied = [key for key in signature_options(cls) if key in registry.supplied]
    lines = [f"## {name}\n", body(inspect.getdoc(cls) or "")]
    if example := re.search(r"^Example: ``(.+)``$", inspect.getdoc(cls) or "", re.MULTILINE):
        lines.append(f"    --protocol '{example[1]}'\n")
    if isinstance(registry, type(RECIPES)):
        optional = registry.optional_slots(name)
        slots = [f"`{slot}`" + (" (optional)" if slot in optional else "") for slot in registry.slots(name)]
        lines.append(f"Slots: {', '.join(slots)}.\n")
    lines.append(options_table(cls, registry.options(name).values()))
    tail = [f"Supplied by the recipe: {', '.join(f'`{key}`' for key in supplied)}."] if supplied else []
    if cls.__module__.startswith("projects."):
        tail.append(f"A config needs `imports: [{cls.__module__}]`.")
    return "\n".join([*lines, " ".join([*tail, f"Source: {source(cls)}."])]) + "\n"


def parts_page(title: str, registry: PartRegistry, intro: str) -> str:
    """Return the page of a registry: the parts of jepa_kit, then those of projects."""
    ours = [name for name in registry.names() if registry.get(name).__module__.startswith("jepa_kit.")]
    others = [name for name in registry.names() if registry.get(name).__module__.startswith("projects.")]
    index = ", ".join(f"[`{name}`](#{name})" for name in ours)
    if others:
        index += "; of projects: " + ", ".join(f"[`{name}`](#{name})" for name in others)
    lines = [f"# {title.replace('_', ' ').capitalize()}\n", NOTE, f"{intro}\n", f"{index}.\n"]
    return "\n".join([*lines, *(part(registry, name) for name in [*ours, *others])])


def sections_page() -> str:
    """Return the page of the sections of a config."""
    lines = [
        "# Sections of a config\n",
        NOTE,
        "Options that belong to no part. Those of parts: "
        + ", ".join(f"[{page.replace('_', ' ')}]({page}.md)" for page in REGISTRIES)
        + ".\n",
    ]
    for path, cls in SECTIONS.items():
        limits = {f.name: f.metadata.get("allowed", "") for f in dataclasses.fields(cls)}
        lines += [f"## {path}\n", body(inspect.getdoc(cls) or "")]
        lines.append(options_table(cls, signature_options(cls).values(), limits.__getitem__))
    return "\n".join(lines)


def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yield the usage and the help of each argument."""
    formatter = argparse.HelpFormatter("", max_help_position=40)
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction | argparse._VersionAction):
            named = formatter._format_action_invocation(action)
            yield named, formatter._expand_help(action) if action.help else ""


def tool(command: str, module: str) -> str:
    """Return the section of a tool."""
    parser = importlib.import_module(f"jepa_kit.tools.{module}").parser()
    description, _, rest = (parser.description or "").partition("\n\n")
    examples, _, after = (parser.epilog or "").removeprefix("examples:\n").partition("\n\n")
    while after.startswith("  "):
        block, _, after = after.partition("\n\n")
        examples += f"\n\n{block}"
    arguments = [[f"`{name}`".replace("|", r"\|"), cell(text)] for name, text in actions(parser)]
    lines = [
        f"## {module}\n",
        f"`python tools/{module}.py`, or `{command}` after an installation. {escape(description)}\n",
        fence("text", rest),
        table(("argument", "meaning"), arguments),
        fence("bash", examples),
        fence("text", after),
    ]
    return "\n".join(line for line in lines if line)


def fence(language: str, text: str) -> str:
    text = textwrap.dedent(text).strip()
    return f"```{language}\n{text}\n```\n" if text else ""


def tools_page() -> str:
    """Return the page of the tools."""
    lines = ["# Tools\n", NOTE, "Every tool also has `--help` and `--version`.\n"]
    return "\n".join([*lines, *(tool(command, module) for command, module in TOOLS)])


def chapter(text: str, heading: str) -> str:
    """Return the indented text under a heading of a docstring, such as ``Returns``; empty if there is none."""
    found = re.search(rf"^{heading}:\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)
    return textwrap.dedent(found[1]).strip() if found else ""


def signature(thing: Any, name: str) -> str:
    """Return the signature of a function or of a class's constructor as in its source, on several lines if long."""
    function = thing.__init__ if inspect.isclass(thing) else thing
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        fields = [field for field in dataclasses.fields(thing) if field.init]
        items, returned = [f"{field.name}: {field.type}" for field in fields], ""
    elif inspect.isclass(thing) and not inspect.isfunction(function):
        return f"class {name}"
    else:
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(node, ast.FunctionDef)
        arguments = node.args
        for names in (arguments.posonlyargs, arguments.args):
            names[:] = [argument for argument in names if argument.arg not in ("self", "cls")]
        text = ast.unparse(arguments)
        items = re.split(r", (?=\*{0,2}\w+(?::|=|,|$)|\*,|/,)", text) if text else []
        items = [re.sub(r"^(\w+: [^=]+)=", r"\1 = ", item) for item in items]
        returned = f" -> {ast.unparse(node.returns)}" if node.returns and not inspect.isclass(thing) else ""
    kind = "class " if inspect.isclass(thing) else ""
    short = f"{kind}{name}({', '.join(items)}){returned}"
    if len(short) <= 100:
        return short
    return f"{kind}{name}(\n" + "".join(f"    {item},\n" for item in items) + f"){returned}"


def described(thing: Any, name: str, level: str = "##") -> str:
    """Return the section of a function or class of the Python API, with the public methods of a class."""
    text = inspect.getdoc(thing) or ""
    lines = [f"{level} {name.rpartition('.')[2]}\n", f"```python\n{signature(thing, name)}\n```\n", body(text)]
    for heading, column in (("Args", "argument"), ("Attributes", "attribute")):
        entries = documented("\nArgs:\n" + textwrap.indent(chapter(text, heading), "    "))
        if entries:
            lines.append(table((column, "meaning"), [[f"`{key}`", cell(meaning)] for key, meaning in entries.items()]))
    chapters = {heading: chapter(text, heading) for heading in ("Returns", "Raises")}
    lines += [f"**{heading}** {escape(content)}\n" for heading, content in chapters.items() if content]
    for key, member in vars(thing).items() if inspect.isclass(thing) else ():
        function = getattr(member, "__func__", member)
        if key[0] != "_" and inspect.isfunction(function) and function.__doc__:  # a public method
            one_line = re.sub(r",?\n(?=\))", "", signature(function, key)).replace("(\n    ", "(").replace("\n   ", "")
            first = body(inspect.getdoc(function) or "").partition("\n\n")[0]
            lines.append(f"- `{one_line}`: {' '.join(first.split())}")
    return "\n".join([*lines, ""])


def python_page() -> str:
    """Return the page of the Python API: the names of ``import jepa_kit``, then structures and interfaces."""
    lines = [
        "# Python API\n",
        NOTE,
        "[jepa_kit from Python](../python.md) shows all of it in use. First the names of `import jepa_kit`, then the\n"
        "data that parts exchange, then the interfaces of parts.\n",
        *(described(getattr(jepa_kit, name), f"jepa_kit.{name}") for name in sorted(jepa_kit._NAMES)),
    ]
    for module in (frozen, recipe, structures, patch_sets, interfaces, rng):
        classes = [
            thing
            for thing in vars(module).values()
            if (inspect.isclass(thing) or thing is rng.uniforms) and thing.__module__ == module.__name__
        ]
        public = [thing for thing in classes if thing.__name__[0] != "_" and thing.__doc__ and thing is not recipe.JEPA]
        lines += [described(thing, f"{module.__name__}.{thing.__name__}") for thing in public]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Return file name -> text of all pages of the reference."""
    import_projects()
    for page, (registry, _) in REGISTRIES.items():
        LINKS.update({registry.get(name).__name__: f"[`{name}`]({page}.md#{name})" for name in registry.names()})
    made = {f"{name}.md": parts_page(name, *entry) for name, entry in REGISTRIES.items()}
    return {**made, "config.md": sections_page(), "tools.md": tools_page(), "python.md": python_page()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="default: docs/reference/")
    output = parser.parse_args().output
    output.mkdir(exist_ok=True)
    for name, text in pages().items():
        (output / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
