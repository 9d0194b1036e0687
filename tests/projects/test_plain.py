"""projects/ijepa/plain.py against the toolkit: the same masks, losses and weights; and its command."""

from __future__ import annotations

import ast
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import jepa_kit
from jepa_kit.config import load_config
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Schedule
from jepa_kit.engine.step import train_step
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.maskers import MultiBlock
from jepa_kit.maskers.multiblock import ATTEMPTS
from jepa_kit.rng import Stream, uniforms
from jepa_kit.structures import View
from projects.ijepa import plain

CONFIG = Path(__file__).parents[2] / "projects/ijepa/configs/cifar10_vit4.yaml"


class Draws:
    """The numbers that the toolkit's masker draws for one sample, in the order in which a generator would give them."""

    def __init__(self, sample: int, *, seed: int, epoch: int) -> None:
        self.sample, self.seed, self.epoch, self.calls = np.array([sample]), seed, epoch, 0

    def random(self, shape: tuple[int, ...]) -> np.ndarray:
        stream, attempt = (Stream.MASK, self.calls - 1) if self.calls else (Stream.MASK_SIZE, 0)
        self.calls += 1
        count = math.prod(shape)
        return uniforms(stream, self.sample, count, seed=self.seed, epoch=self.epoch, attempt=attempt).reshape(shape)


# Masks


def documented() -> ast.FunctionDef:
    """The code in the docstring of MultiBlock."""
    lines = inspect.getdoc(MultiBlock).split("::\n\n", 1)[1].splitlines()
    end = next(i for i, line in enumerate(lines) if line and not line.startswith(" "))
    (function,) = ast.parse(textwrap.dedent("\n".join(lines[:end]))).body
    assert isinstance(function, ast.FunctionDef)
    return function


def run_documented(*args: Any, **options: Any) -> plain.Masks:
    names: dict[str, Any] = {"np": np, "math": math}
    exec(compile(ast.Module([documented()], []), "docstring", "exec"), names)
    return names["multiblock"](*args, **options)


SETTINGS: list[dict[str, Any]] = [
    {"grid": (14, 14)},
    {"grid": (4, 4)},
    {"grid": (4, 20), "num_targets": 3, "context_aspect_ratio": (0.5, 2.0), "target_aspect_ratio": (0.3, 3.0)},
    {"grid": (16, 8), "target_scale": (0.01, 0.1), "context_scale": (0.3, 0.8), "min_keep": 10},
    {"grid": (14, 14), "min_keep": 100},
]


@pytest.mark.parametrize("draw", [plain.multiblock, run_documented])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_masks_are_the_toolkits(options: dict[str, Any], draw: Callable[..., plain.Masks]) -> None:
    samples, where = np.arange(300) + 2**33, {"seed": 7, "epoch": 3}
    masks = MultiBlock(**options)(samples, **where)
    contexts = masks.context.split()
    targets = list(zip(*[iter(masks.targets.split())] * len(samples), strict=True))  # [M][B]
    for b, sample in enumerate(samples.tolist()):
        context, blocks = draw(Draws(sample, **where), **options)
        assert np.array_equal(context, contexts[b])
        assert len(blocks) == len(targets)
        assert all(np.array_equal(block, of_all[b]) for block, of_all in zip(blocks, targets, strict=True))


@pytest.mark.parametrize(("options", "attempts"), [(SETTINGS[1], {1, 2}), (SETTINGS[4], {*range(1, ATTEMPTS + 2)})])
def test_settings_draw_again_and_come_to_the_corners(options: dict[str, Any], attempts: set[int]) -> None:
    masker, samples = MultiBlock(**options), np.arange(300) + 2**33
    height, width = masker.sizes(samples, seed=7, epoch=3)
    found = masker.place(samples, height, width, seed=7, epoch=3).attempts
    assert attempts <= set(found.tolist())


def test_the_code_in_the_docstring_is_that_of_the_file() -> None:
    (own,) = ast.parse(inspect.getsource(plain.multiblock)).body
    assert isinstance(own, ast.FunctionDef)
    # less its docstring, and the error for what MultiBlock's constructor refuses
    assert isinstance(own.body[-1], ast.Raise)
    own.body = own.body[1:-1]
    own.returns = None
    for argument in own.args.args:
        argument.annotation = None
    assert ast.unparse(own) == ast.unparse(documented())


def test_what_targets_cover_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"less than min_keep \(=17\) patches of a grid of 4 x 4"):
        plain.multiblock(np.random.default_rng(0), (4, 4), min_keep=17)


# Training

GRID, WIDTH, DEPTH, HEADS, PREDICTOR = (8, 8), 48, 2, 3, (24, 2)
EPOCHS, STEPS_PER_EPOCH, WARMUP_EPOCHS, BATCH, LR = 5, 4, 1.5, 6, 2e-3
STEPS, SEED = EPOCHS * STEPS_PER_EPOCH, 3


def recipe() -> Any:
    """The project's config with small networks and the released code's schedules."""
    overrides = [
        f"encoder={{name: vit, patch_size: 4, embed_dim: {WIDTH}, depth: {DEPTH}, num_heads: {HEADS}}}",
        f"predictor={{name: vit, width: {PREDICTOR[0]}, depth: {PREDICTOR[1]}, num_heads: {HEADS}}}",
        "target_update={name: ema, momentum: [0.996, 1.0]}",
        f"optim={{lr: {LR}, start_lr: {LR / 5}, final_lr: {LR / 1000}, warmup_epochs: {WARMUP_EPOCHS}}}",
        "optim.weight_decay=[0.04, 0.4]",
        f"train.epochs={EPOCHS}",
    ]
    return load_config(CONFIG, overrides)


def networks() -> plain.IJEPA:
    encoder = plain.Encoder(GRID, 4, WIDTH, DEPTH, HEADS)
    return plain.IJEPA(encoder, plain.Predictor(GRID, WIDTH, *PREDICTOR, HEADS))


def samples_of(step: int) -> tuple[np.ndarray, int]:
    """Samples and epoch of a step."""
    epoch, place = divmod(step, STEPS_PER_EPOCH)
    return np.arange(BATCH) + BATCH * place, epoch


def images_of(step: int) -> torch.Tensor:
    return torch.randn(BATCH, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def plain_batches(min_keep: int) -> Iterator[plain.Batch]:
    for step in range(STEPS):
        samples, epoch = samples_of(step)
        masks = [plain.multiblock(Draws(s, seed=SEED, epoch=epoch), GRID, min_keep=min_keep) for s in samples.tolist()]  # type: ignore[arg-type]
        yield plain.collate([(image, m) for image, m in zip(images_of(step), masks, strict=True)])


def test_losses_and_weights_are_the_toolkits() -> None:
    config = recipe()
    torch.manual_seed(SEED)
    jepa, masker = build_recipe(config).double(), build_masker(config)
    model = networks().double()
    assert not model.load_state_dict(jepa.state_dict(), strict=False).unexpected_keys
    optimizer, optim = build_optimizer(jepa), config.optim
    schedule = Schedule(
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        lr=optim.lr,
        start_lr=optim.start_lr,
        final_lr=optim.final_lr,
        warmup_epochs=optim.warmup_epochs,
        weight_decay=optim.weight_decay,
        momentum=jepa.momentum,
    )
    expected = []
    for step in range(STEPS):
        samples, epoch = samples_of(step)
        masks = masker(samples, seed=SEED, epoch=epoch, step=step)
        expected.append(train_step(jepa, optimizer, schedule(step), [View(images_of(step), masks)]).loss.detach())
    batches = plain_batches(config.slots["masker"].options["min_keep"])
    losses = torch.stack(list(plain.train(model, batches, STEPS, int(WARMUP_EPOCHS * STEPS_PER_EPOCH), LR)))
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=0.0)
    assert losses[-1] < 0.9 * losses[0]
    theirs = dict(jepa.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, theirs.pop(name), rtol=0.0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    assert not theirs
    weights = {"target_encoder": model.target_encoder, "encoder": model.encoder}
    first, second = (w.blocks[0].mlp.fc1.weight.detach() for w in weights.values())
    assert float((first - second).abs().max()) > 1e-3  # the average is behind


def test_first_weights_are_as_wide_as_the_toolkits() -> None:
    torch.manual_seed(0)
    ours, theirs = (dict(m.requires_grad_(False).named_parameters()) for m in (networks(), build_recipe(recipe())))
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        assert p.shape == theirs[name].shape
        spread, mean = (abs(float(f(p) - f(theirs[name]))) for f in (torch.std, torch.mean))
        scale = float(theirs[name].std())
        assert max(spread, mean) <= scale * 6 / p.numel() ** 0.5, name


# Images and the command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "images/more").mkdir(parents=True)
    for i in range(10):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / ("more" if i % 2 else ".") / f"{i}.jpeg")
    (tmp_path / "images/notes.txt").write_text("no image")
    return tmp_path / "images"


def test_items_are_crops_with_masks(folder: Path) -> None:
    Image.new("L", (50, 20), 128).save(folder / "0_grey.png")
    images = plain.Images(folder, 16, 4, seed=0)
    assert [f.name for f in images.files[:2]] == ["0.jpeg", "0_grey.png"]
    pixels, (context, targets) = images[0, 1]
    torch.testing.assert_close(pixels, ((128 / 255 - plain.MEAN) / plain.STD).view(3, 1, 1).expand(3, 16, 16))
    assert len(context) >= 4
    assert len(targets) == 4
    assert torch.equal(images[0, 3][0], images[0, 3][0])
    assert not torch.equal(images[0, 3][0], images[1, 3][0])


def test_an_epoch_has_every_image_once(folder: Path) -> None:
    order = list(plain.Images(folder, 16, 4, seed=0).order(epochs=2, batch_size=3))
    assert [len(batch) for batch in order] == [3] * 6
    for epoch in range(2):
        items = [item for batch in order[3 * epoch : 3 * epoch + 3] for item in batch]
        assert {e for e, _ in items} == {epoch}
        assert len({i for _, i in items} & {*range(10)}) == 9
    assert [i for _, i in order[0]] != [i for _, i in order[3]]


SMALL = "--image-size 16 --patch-size 4 --width 64 --depth 1 --batch-size 5 --epochs 6"


def run(folder: Path, *arguments: str) -> None:
    plain.main([str(folder), *SMALL.split(), *arguments])


def test_the_command_trains(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "one.pt", tmp_path / "two.pt"]
    for workers, file in zip("01", files, strict=True):
        run(folder, "--workers", workers, "--save", str(file))
    printed = capsys.readouterr().out
    assert re.findall(r"step (\S+)  loss 0\.\d{4}  \d+ images/s", printed) == 2 * ["10/12", "12/12"]
    one, two = (torch.load(file)["target_encoder"] for file in files)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    # The toolkit reads it, for all that it evaluates.
    encoder = plain.Encoder((4, 4), 4, dim=64, depth=1, heads=1)
    encoder.load_state_dict(one)
    loaded = jepa_kit.load_encoder(files[0], num_heads=1)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded.forward_features(images), encoder(images), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "--epochs (=0) must be at least 1"),
        ("--patch-size 5", "--patch-size (=5) must divide --image-size (=16)"),
        ("--width 96", "--width (=96) must be a multiple of 64"),
        ("--batch-size 11", "images has 10 images, fewer than one batch (--batch-size 11)"),
    ],
)
def test_bad_options_are_errors(folder: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(folder, *arguments.split())
    assert message in capsys.readouterr().err
