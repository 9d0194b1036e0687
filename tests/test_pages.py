"""The pages that teach: every command and every snippet runs, one after another, as a reader would run them.

A block of code is run unless its title says what it needs: ``bash title="needs a GPU"``. Trainings are made short, and
commands call the tools in this process. A block that begins with ``# name.py`` or ``# name.yaml`` is a file.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_docs import program_of
from test_repository import ROOT, commands

from jepa_kit.registry import RECIPES, SLOTS

DOCS = ROOT / "docs"
PAGES = [
    DOCS / "index.md",
    DOCS / "getting_started.md",
    DOCS / "faq.md",
    DOCS / "paper_release_hearsay.md",
    *sorted(f for folder in ("tutorials", "howto", "explanation") for f in (DOCS / folder).glob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORTER: dict[str, list[str]] = {
    "train_net": [
        *("train.batch_size=8", "train.epochs=2", "train.steps_per_epoch=2", "train.log_every=1", "train.device=cpu"),
        *("train.precision=float32", "train.tensorboard=false", "data.num_workers=0", "optim.warmup_epochs=1"),
        *("encoder.depth=2", "predictor.depth=1"),
    ],
    "eval_net": ["--baselines", "none"],
    "health": ["--images", "16"],
    "make_shards": ["--num-scenes", "260"],
    "visualize": ["--images", "32", "--decoder-images", "64", "--decoder-steps", "2"],
}
"""Tool -> arguments that make it take a second, after those of the page."""


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return (language, title, text) of each block of code of a page."""
    return BLOCK.findall(page.read_text())


def loops(script: str) -> Iterator[str]:
    """Yield the commands of a script, with those of ``for x in a b c; do`` once for each value."""
    inside, values, variable = [], [""], ""
    for line in script.replace("\\\n", " ").splitlines():
        if loop := re.match(r"for (\w+) in (.+); do", line):
            variable, values = loop[1], loop[2].split()
        elif line == "done":
            yield from (text.replace(f"${variable}", value) for value in values for text in inside)
            inside, values = [], [""]
        elif len(values) > 1:
            inside.append(line.strip())
        else:
            yield line


def run_script(script: str) -> None:
    """Run the commands of a block in this process."""
    for line in loops(script):
        for command in commands(f"```\n{line}\n```"):
            module, words = program_of(command) or pytest.fail(f"{command!r} is no tool: say in a title what it needs")
            words += SHORTER.get(module.rpartition(".")[2], [])
            with new_process():
                assert importlib.import_module(module).main(words) == 0, command


@contextmanager
def new_process() -> Iterator[None]:
    """Without the parts and modules of the reader's files, as in a process of its own."""
    here = {name: m for name, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(os.getcwd())}
    registries = [RECIPES, *SLOTS.values()]
    with pytest.MonkeyPatch.context() as patch:
        for name in here:
            patch.delitem(sys.modules, name)
        for registry in registries:
            parts = {k: part for k, part in registry._obj_map.items() if part.__module__ not in here}
            patch.setattr(registry, "_obj_map", parts)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, with photos/train and photos/val, and a folder for each of two classes."""
    folder = tmp_path_factory.mktemp("reader") / "photos"
    for part, count in (("train", 24), ("val", 12)):
        for shape, extension in (("ellipse", "png"), ("rectangle", "jpg")):
            (folder / part / shape).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (100, 100), (40 + 5 * i, 90, 120))
                getattr(ImageDraw.Draw(image), shape)((10 + i, 8, 60 + i, 58), fill=(220, 9 * i, 60))
                image.save(folder / part / shape / f"{i}.{extension}")
    return folder


@pytest.fixture
def reader(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, in which a page runs; what it registers and imports is gone after the test."""
    (tmp_path / "photos").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (RECIPES, *SLOTS.values()):
        registry.import_members()
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    return tmp_path


SLOW = ("getting_started", "own_images", "compare", "collapse", "curves", "learning_rate")
"""Pages with several trainings or an evaluation; .ci/run runs them too."""
RUN = [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in SLOW)) for p in PAGES if blocks(p)]


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_runs(page: Path, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for language, title, text in blocks(page):
        if title or language == "text":
            continue
        file = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        if file:
            (reader / file[1]).write_text(text)
            monkeypatch.delitem(sys.modules, file[1].removesuffix(".py"), raising=False)
        elif language == "bash":
            run_script(text)
        elif language == "python":
            exec(compile(text, str(page), "exec"), names)
        else:
            pytest.fail(f"a block of language {language!r} cannot be run")


def test_what_is_not_run_says_what_it_needs() -> None:
    for page in PAGES:
        for language, title, text in blocks(page):
            assert not title or re.match(r"needs |takes |run in a clone", title), (page, title)
            assert shlex.split(text, comments=True) or language == "text"


def test_the_disc_of_the_tutorial_never_reaches_an_edge(reader: Path) -> None:
    """As its page says of a radius of 0.25, and alike on all four sides."""
    (disc,) = [text for _, _, text in blocks(DOCS / "tutorials" / "own_masker.md") if text.startswith("# disc.py")]
    names: dict[str, Any] = {}
    exec(disc, names)
    masks = names["Disc"](grid=(8, 8), radius=0.25)(np.arange(2048), seed=0, epoch=0)
    hidden = np.bincount(masks.targets.index.numpy(), minlength=64).reshape(8, 8) > 0
    for axis in (0, 1):
        assert np.flatnonzero(hidden.any(axis)).tolist() == [1, 2, 3, 4, 5, 6]


def test_the_transcript_has_commands_of_the_pages() -> None:
    """Whoever changes a command of a page changes, or runs again, its transcript."""
    of_pages = {command for page in PAGES for command in commands(page.read_text())}
    assert {*commands((DOCS / "transcript.md").read_text())} <= of_pages


def test_loops() -> None:
    assert list(loops("a\nfor x in 1 2; do\n    b $x \\\n    c\ndone\nd")) == ["a", "b 1      c", "b 2      c", "d"]
