"""dev/docs_hook.py: links of the repository become links of the site."""

from __future__ import annotations

import sys
from pathlib import Path

import mkdocs  # noqa: F401  # what the module needs
import nbconvert  # noqa: F401

sys.path.append(str(Path(__file__).parents[2] / "dev"))

from docs_hook import DOCS, ROOT, links, page_of, place, rewrite


def test_links_to_files_outside_docs_become_links_to_pages() -> None:
    text = "[a](../masks.md#random) [b](../../jepa_kit/recipe.py) [c](../../README.md) [d](https://x.org/y.md)"
    found = rewrite(text, DOCS / "reference", "reference/maskers.md")
    assert found == "[a](../masks.md#random) [b](../jepa_kit/recipe.py.md) [c](../index.md) [d](https://x.org/y.md)"


def test_code_and_missing_files_stay_as_they_are() -> None:
    text = "[a](nowhere.md)\n```python\nx[0](../README.md)\n```\n"
    assert rewrite(text, DOCS, "index.md") == text
    assert links(text, DOCS) == [DOCS / "nowhere.md"]


def test_pages_outside_docs() -> None:
    readme, recipe = ROOT / "projects" / "mae" / "README.md", ROOT / "jepa_kit" / "recipe.py"
    assert place(readme) == "projects/mae/README.md"
    assert "](../../docs/" not in page_of(readme)
    assert page_of(recipe).endswith(f"# jepa_kit/recipe.py\n\n````python\n{recipe.read_text().rstrip()}\n````\n")


def test_a_notebook_becomes_a_page_with_its_pictures() -> None:
    text = page_of(ROOT / "notebooks" / "own_images.ipynb")
    assert "](data:image/png;base64,iVBORw0KGgo" in text
    assert "](tutorials/own_images.md)" in text or "](../tutorials/own_images.md)" in text
