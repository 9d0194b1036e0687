"""Every message about a mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jepa_kit.config import load_config
from jepa_kit.errors import ConfigError
from jepa_kit.registry import LOSSES, MASKERS, TARGETS

Problems = Callable[..., list[str]]
Write = Callable[..., Path]

BLOCKS = "It takes: num_targets, scale, overlap"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("maskr: {}", "maskr is neither a slot nor a section; did you mean 'masker'? A config takes: recipe, masker,"),
        ("7: {}", "7 is neither a slot nor a section. A config takes: recipe, masker,"),
        ("masker: blocks", "masker (='blocks') must be a mapping with a name. Registered: blocks, scattered"),
        ("masker: null", "masker is missing: give it a mapping with a name. Registered: blocks, scattered"),
        ("masker: [blocks]", "masker (=['blocks']) must be a mapping with a name. Registered: blocks, scattered"),
        (
            "masker: {name: bloks}",
            "masker.name: 'bloks' is not a registered masker; did you mean 'blocks'? Registered: blocks, scattered",
        ),
        ("masker: {name: 3}", "masker.name: 3 is not a registered masker. Registered: blocks, scattered"),
        (
            "target_update: {name: null}",
            "target_update.name: None is not a registered target_update; did you mean 'none'? Registered: ema, none",
        ),
        (
            "masker: {name: [blocks]}",
            "masker.name: ['blocks'] is not a registered masker; did you mean 'blocks'? Regis",
        ),
        (
            "masker: {num_targts: 8}",
            f"masker.num_targts is not an option of 'blocks'; did you mean 'num_targets'? {BLOCKS}",
        ),
        ("masker: {ratio: 0.5}", f"masker.ratio is not an option of 'blocks'; it belongs to 'scattered'. {BLOCKS}"),
        ("masker: {1: 2}", f"masker.1 is not an option of 'blocks'. {BLOCKS}"),
        ("target: {x: 1}", "target.x is not an option of 'tokens'. It takes: nothing"),
        (
            "masker: {grid: [2, 2]}",
            "masker.grid is supplied by the recipe (data.image_size over encoder.patch_size); take it out",
        ),
        ("predictor: {embed_dim: 3}", "predictor.embed_dim is supplied by the recipe (the encoder's); take it out"),
        ("masker: {num_targets: many}", "masker.num_targets (='many') must be an int"),
        ("masker: {num_targets: true}", "masker.num_targets (=True) must be an int"),
        ("masker: {num_targets: 4.0}", "masker.num_targets (=4.0) must be an int: write 4"),
        ("masker: {num_targets: 4.5}", "masker.num_targets (=4.5) must be an int"),
        ("masker: {num_targets: null}", "masker.num_targets (=None) must be an int"),
        ("masker: {overlap: yes}", "masker.overlap (='yes') must be true or false"),
        ("masker: {scale: 0.2}", "masker.scale (=0.2) must be a list of 2 (a float, a float)"),
        ("masker: {scale: {a: 1}}", "masker.scale (={'a': 1}) must be a list of 2 (a float, a float)"),
        ("encoder: {size: big}", "encoder.size (='big') must be one of 'tiny', 'small'"),
        ("encoder: {width: wide}", "encoder.width (='wide') must be an int or null"),
        ("encoder: {layers: [1, a]}", "encoder.layers (=[1, 'a']) must be a list, each an int"),
        ("encoder: {per_layer: {a: b}}", "encoder.per_layer (={'a': 'b'}) must be a mapping of a str to a float"),
        ("loss: []", "loss (=[]) must have at least one loss. Registered: huber, l2"),
        ("loss: [l2]", "loss[0] (='l2') must be a mapping with a name. Registered: huber, l2"),
        ("loss: [{name: l2}, {weight: 2}]", "loss[1].name is missing. Registered: huber, l2"),
        (
            "loss: {name: l2, weight: .nan}",
            "loss.weight (=nan) must be at least 0 and finite: the sum is minimised",
        ),
        (
            "loss: [{name: l2}, {name: huber, weight: -.inf}]",
            "loss[1].weight (=-inf) must be at least 0 and finite: the sum is minimised",
        ),
        (
            "loss: [{name: l2}, {name: huber, weight: -0.5}]",
            "loss[1].weight (=-0.5) must be at least 0 and finite: the sum is minimised",
        ),
        ("loss: {name: l2, weight: 0}", "loss: the weight of at least one term must be above 0"),
        ("masker: {num_targets: 2000}", "masker.num_targets (=2000) must be at most 1,024"),
        ("loss: {weight: heavy}", "loss.weight (='heavy') must be a float"),
        ("loss: [{name: l2}, {name: huber, weight: a}]", "loss[1].weight (='a') must be a float"),
        (
            "loss: [{name: l2}, {name: l2}]",
            "loss[1].name (='l2') is in the list already; give one term both weights' sum",
        ),
        ("loss: {beta: 1}", "loss.beta is not an option of 'l2'; it belongs to 'huber'. It takes: nothing"),
        ("optim: fast", "optim (='fast') must be a mapping, or left out. It takes: name, lr, start_lr,"),
        ("optim: null", "optim (=None) must be a mapping, or left out. It takes: name, lr, start_lr,"),
        ("optim: {lr: fast}", "optim.lr (='fast') must be a float"),
        ("optim: {lrs: 1}", "optim.lrs is not an option; did you mean 'lr'? It takes: name, lr, start_lr,"),
        ("train: {precision: fp16}", "train.precision (='fp16') must be one of 'auto', 'float32', 'tf32', 'bf16'"),
        (
            "data: {image_size: big}",
            "data.image_size (='big') must be a list of 2 (an int, an int), or one int for a square",
        ),
        ("data: {image_size: 32.0}", "data.image_size (=32.0) must be a list of 2 (an int, an int), or one int for"),
        ("imports: a.py", "imports (='a.py') must be a list of files and modules, such as [my_masker.py]"),
    ],
)
def test_one_mistake(problems: Problems, text: str, line: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(line)
    if not line.endswith((",", "Regis", "for")):
        assert found[0] == line


def test_an_empty_config_lacks_every_slot(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write("{}"))
    assert caught.value.problems == (
        "masker is missing: give it a mapping with a name. Registered: blocks, scattered",
        "encoder is missing: give it a mapping with a name. Registered: net",
        "predictor is missing: give it a mapping with a name. Registered: net",
        "target is missing: give it a mapping with a name. Registered: tokens",
        "loss is missing: give it a mapping with a name. Registered: huber, l2",
        "target_update is missing: give it a mapping with a name. Registered: ema, none",
        "data.image_size is missing: 'data' needs it; it must be a list of 2 (an int, an int), or one int for a square",
    )


def test_a_missing_name(write: Write) -> None:
    text = write().read_text().replace("name: blocks, ", "")
    with pytest.raises(ConfigError, match=r"masker\.name is missing\. Registered: blocks, scattered"):
        load_config(write(text))


def test_a_missing_option(write: Write) -> None:
    text = write().read_text().replace("num_targets: 4, ", "")
    with pytest.raises(ConfigError, match=r"masker\.num_targets is missing: 'blocks' needs it; it must be an int"):
        load_config(write(text))


def test_a_slot_without_any_part(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TARGETS, "_obj_map", {})
    with pytest.raises(ConfigError, match=r"target\.name: 'tokens' is not a registered target\. Registered: none"):
        load_config(write())


def test_a_default_that_is_not_of_its_type(problems: Problems) -> None:
    class Wrong:
        def __init__(self, *, kind: complex = 1j) -> None: ...

    MASKERS.register("wrong")(Wrong)
    assert problems("masker: {name: wrong}") == [
        "masker.kind: the default (=1j) of 'wrong' is not of the type that its constructor declares: "
        "of the type complex, which a config cannot write"
    ]


def test_a_loss_with_an_option_named_weight(problems: Problems) -> None:
    class Heavy:
        def __init__(self, *, weight: float = 2.0) -> None: ...

    LOSSES.register("heavy")(Heavy)
    assert problems("loss: {name: heavy}") == [
        "loss: 'heavy' has an option 'weight', the key of a term's weight: rename the option"
    ]


def test_all_mistakes_are_reported_together(write: Write) -> None:
    text = """\
data: {image_size: 32, max_pixels: 0}
masker: {name: blocks, num_targts: 8, grid: [2, 2]}
encoder: {name: nett}
predictor: {name: net, depth: 6}
loss: [{name: l2, weight: heavy}, {name: huber, beta: x}]
target_update: {name: ema, momentum: 0.99}
optim: {lr: fast, final_lr: -1}
train: {epochs: 0, batch_size: 0}
trian: {}
"""
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["train.seed", "optim.betas=[0.9]"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 17 mistakes"
    assert [line.strip().split(" ")[0] for line in lines[1:]] == [
        "override",
        "trian",
        "masker.num_targts",
        "masker.grid",
        "masker.num_targets",
        "encoder.name:",
        "predictor.depth",
        "target",
        "loss[0].weight",
        "loss[1].beta",
        "target_update.momentum",
        "data.max_pixels",
        "optim.lr",
        "optim.betas",
        "optim.final_lr",
        "train.batch_size",
        "train.epochs",
    ]


def test_nothing_is_built(write: Write) -> None:
    class Unbuildable:
        def __init__(self, *, ratio: float = 0.5) -> None:
            raise AssertionError

    MASKERS.register("unbuildable")(Unbuildable)
    text = write().read_text().replace("{name: blocks, num_targets: 4, scale: [0.1, 0.2]}", "{name: unbuildable}")
    assert load_config(write(text)).slots["masker"].options == {"ratio": 0.5}
