"""Every example of docs/python.md runs, one after another, as in one session of a user."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
BLOCKS = re.findall(r"^## (.*?)$|^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
EXAMPLES = [code for _, code in BLOCKS if code]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/train and photos/val, each with a folder of circles and one of squares."""
    folder = tmp_path_factory.mktemp("page")
    for part, count in (("train", 24), ("val", 12)):
        for shape in ("circle", "square"):
            for i in range(count):
                path = folder / "photos" / part / shape / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.new("RGB", (80, 72), (40 + 5 * i, 90, 120))
                draw = getattr(ImageDraw.Draw(image), "ellipse" if shape == "circle" else "rectangle")
                draw((10 + i, 8, 50 + i, 48), fill=(220, 9 * i, 60))
                image.save(path)
    return folder


@pytest.mark.slow
def test_every_example_runs(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    names: dict[str, object] = {}
    for code in EXAMPLES:
        exec(compile(code, str(PAGE), "exec"), names)
    assert Path("curves.png").stat().st_size > 10_000
    assert names["features"].shape == (2, 96)


def test_the_first_example_has_at_most_15_lines() -> None:
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 15
