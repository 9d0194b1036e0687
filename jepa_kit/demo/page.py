"""One HTML file with a network, images and the JavaScript that runs them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jepa_kit import __version__
from jepa_kit.config import Config
from jepa_kit.demo.export import add_decoder, check_run, distances, networks
from jepa_kit.demo.tensors import TensorBlock
from jepa_kit.evaluation.features import LoadedRun
from jepa_kit.evaluation.pictures.decoder import r_squared, train_decoder
from jepa_kit.evaluation.pictures.material import Material

LIMIT = 5_000_000
"""Largest size of a page in bytes."""
SCRIPTS = ("tensors.js", "network.js", "maskers.js", "analysis.js", "editing.js", "drawing.js", "controls.js", "app.js")
"""In the order of their imports: what a module imports stands before it."""
DRAWN = ("multiblock", "block", "random", "rasterized", "blockwise", "inverse_block", "kept_block", "causal")
"""Maskers that static/maskers.js draws."""
HIDDEN = 128
"""Width of the decoder's hidden layers: half of that of pictures of a run, for the size of the page."""

_IMPORT = re.compile(r"^import \{[^}]*\} from \"\./(\w+\.js)\";\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?function |const |class )", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Network:
    """The networks of a run, ready for a page.

    Args:
        run: of recipe ``jepa``.
        block: has their weights.
        shapes: of the networks, for the JavaScript.
    """

    run: LoadedRun
    block: TensorBlock
    shapes: dict[str, Any]


def prepare_network(run: LoadedRun, images: int) -> Network:
    """Return the networks of a run for a page with so many images.

    Raises:
        ValueError: the page cannot run the network (``export.check_run``), or would be larger than 5 MB.
    """
    recipe = check_run(run.jepa, run.config)
    block = TensorBlock()
    shapes = networks(recipe, block)
    h, w = run.config.data.image_size
    check_size(_encoded(len(block)), _encoded(images * 3 * h * w), images)
    return Network(run, block, shapes)


def check_size(weights: int, images: int, count: int, rest: int = 0) -> None:
    """Raise ValueError if the bytes of weights, images and the rest exceed 5 MB; ``count`` is the number of images."""
    total = weights + images + rest
    if total > LIMIT:
        raise ValueError(
            f"the page would have {total / 1e6:.1f} MB, {weights / 1e6:.1f} of them weights and {images / 1e6:.1f} the "
            f"{count} images; at most {LIMIT / 1e6:.0f} MB are allowed: take a smaller network, or fewer images with "
            "--num-images"
        )


def _encoded(size: int) -> int:
    """Return the number of characters of bytes in base64."""
    return -(-size // 3) * 4


def build_page(
    network: Network,
    material: Material,
    *,
    title: str,
    steps: int = 600,
    log: Callable[[str], None] = lambda text: None,
) -> str:
    """Return the HTML of a page.

    Args:
        network: from ``prepare_network``.
        material: of the same run: the images to show, and others to train the decoder on.
        title: of the page.
        steps: updates of the decoder.
        log: called with a line about each stage.

    Raises:
        ValueError: the page is larger than 5 MB.
    """
    run, block = network.run, network.block
    masker = run.config.slots.get("masker")
    if masker is not None and masker.name not in DRAWN:
        log(f"note: the page does not draw the masker of the run (={masker.name!r}), only {', '.join(DRAWN)}")
    log(f"decoder: {steps} updates on {len(material.others)} images")
    pixels, _, _ = material.pixels(material.others)
    decoder = train_decoder(material.targets(material.others), pixels, steps=steps, seed=material.seed, hidden=HIDDEN)
    shown, _, _ = material.pixels(material.images)
    explained = r_squared(decoder, material.targets(material.images), shown)
    log(f"decoder: explains {explained:.0%} of the variance of pixels of the {len(material.images)} images shown")
    shapes = {**network.shapes, "decoder": {**add_decoder(decoder, block), "explained": explained}}
    weights = len(block)
    block.add("images", material.images.flatten(1))
    data = {**page_data(run.config, network), **shapes, "tensors": block.entries}
    data |= {"title": title, "step": run.step, "version": __version__}
    page = assemble(data, block.to_bytes())
    size = len(page.encode())
    images = len(block) - weights
    rest = size - _encoded(len(block))
    check_size(_encoded(weights), _encoded(images), len(material.images), rest)
    return page


def page_data(config: Config, network: Network) -> dict[str, Any]:
    """Return what the JavaScript needs besides weights: sizes, loss, masker."""
    recipe = check_run(network.run.jepa, config)
    encoder = recipe.encoder
    masker = config.slots.get("masker")
    return {
        "grid": encoder.grid,
        "patch_size": encoder.patch_size,
        "mean": config.data.mean,
        "std": config.data.std,
        "losses": distances(recipe),
        "masker": None if masker is None else {"name": masker.name, **masker.options},
        "batch_size": config.train.batch_size,
        "weights": {
            name: sum(p.numel() for p in part.parameters())
            for name, part in (("encoder", encoder), ("predictor", recipe.predictor))
        },
    }


def static(name: str) -> str:
    """Return a file of the folder static/."""
    return files("jepa_kit.demo").joinpath("static").joinpath(name).read_text(encoding="utf-8")


def script() -> str:
    """Return all modules as one script: their imports are left out, because what is imported stands before."""
    parts, seen = [], set[str]()
    for name in SCRIPTS:
        text = static(name)
        missing = {*_IMPORT.findall(text)} - seen
        assert not missing, f"{name} imports {missing}, which must stand before it in SCRIPTS"
        seen.add(name)
        parts.append(f"// {name}\n" + _EXPORT.sub("", _IMPORT.sub("", text)))
    return "\n".join(parts)


def assemble(data: dict[str, Any], tensors: bytes) -> str:
    """Return the HTML with style, script, data and tensors in it."""
    texts = {
        "style": static("style.css"),
        "script": script(),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # no end of the element inside it
        "tensors": base64.b64encode(tensors).decode(),
    }
    page = static("index.html")
    for name, text in texts.items():
        page = page.replace(f"/*{name}*/", text)
    return page
