"""Hook of mkdocs.yml: pages outside docs/, so that every link works in the repository and on the site.

A page of docs/ links to files of the repository, as a reader of the repository expects. For the site, each such file
becomes a page: Markdown as it is, source and configs as code, notebooks with their outputs, others as files.
"""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:|data:|#)([^)#\s]+)")
LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".sh": "bash",
    ".json": "json",
    ".txt": "text",
    "": "text",
}
LARGEST = 50_000
"""Bytes of a file that is shown as code; a larger one is copied."""


def split_code(text: str) -> list[str]:
    """Return Markdown in pieces, of which every second one is a code fence."""
    return re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str, folder: Path) -> list[Path]:
    """Return the files that Markdown of a folder links to."""
    found = [target for piece in split_code(text)[::2] for target in LINK.findall(piece)]
    return [Path(os.path.normpath(folder / target)) for target in found]


def place(file: Path) -> str:
    """Return the place of a file of the repository among the sources of the site."""
    if file == ROOT / "README.md":
        return "index.md"
    if file.is_relative_to(DOCS):
        return str(file.relative_to(DOCS))
    inside = str(file.relative_to(ROOT))
    return f"{inside}.md" if is_shown(file) else inside


def is_shown(file: Path) -> bool:
    """Return whether a page shows the content of a file that is not Markdown."""
    return file.suffix == ".ipynb" or (file.suffix in LANGUAGES and file.stat().st_size <= LARGEST)


def rewrite(text: str, folder: Path, page: str) -> str:
    """Return Markdown with links to places of the site.

    Args:
        text: with links as in the repository.
        folder: that they are relative to.
        page: place of the page on the site.
    """

    def target(match: re.Match[str]) -> str:
        file = Path(os.path.normpath(folder / match[1]))
        return os.path.relpath(place(file), os.path.dirname(page) or ".") if file.is_file() else match[0]

    pieces = split_code(text)
    pieces[::2] = [LINK.sub(target, piece) for piece in pieces[::2]]
    return "".join(pieces)


def page_of(file: Path) -> str:
    """Return the Markdown of a file outside docs/."""
    text = file.read_text()
    if file.suffix == ".ipynb":
        text, resources = MarkdownExporter().from_filename(str(file))
        for name, data in resources["outputs"].items():
            text = text.replace(f"]({name})", f"](data:image/png;base64,{base64.b64encode(data).decode()})")
    if file.suffix in {".md", ".ipynb"}:
        return rewrite(text, file.parent, place(file))
    hidden = "---\nsearch: {exclude: true}\n---\n\n"
    return f"{hidden}# {file.relative_to(ROOT)}\n\n````{LANGUAGES[file.suffix]}\n{text.rstrip()}\n````\n"


def pages_of(nav: Any) -> list[str]:
    """Return the pages of a navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to, and what those pages link to, except from code."""
    listed = [page.replace(".ipynb.md", ".ipynb") for page in pages_of(config["nav"])]
    waiting = [ROOT / page for page in listed if page not in files.src_uris]
    waiting += [
        file
        for page in files.documentation_pages()
        for file in links(page.content_string, Path(str(page.abs_src_path)).parent)
    ]
    while waiting:
        file = waiting.pop()
        if not file.is_file() or file.is_relative_to(DOCS) or place(file) in files.src_uris:
            continue
        if file.suffix == ".md" or is_shown(file):
            files.append(File.generated(config, place(file), content=page_of(file)))
        else:
            files.append(File.generated(config, place(file), abs_src_path=str(file)))
        if file.suffix == ".md":
            waiting += links(file.read_text(), file.parent)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page of docs/; the first page has no menu at its side."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    file = Path(str(page.file.abs_src_path or ""))
    return rewrite(markdown, file.parent, page.file.src_uri) if file.is_relative_to(DOCS) else markdown
