"""MaskFeat: its targets against plain maths, and codes from the tool that learns them to a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.distance import cdist

from jepa_kit.config import load_config
from jepa_kit.engine.checkpoint.format import load_checkpoint, restore
from jepa_kit.errors import CheckpointError, ConfigError
from jepa_kit.evaluation.patch_codes import CONTRAST
from jepa_kit.from_config import build_recipe
from jepa_kit.interop.tensor_files import write_file
from jepa_kit.structures import PatchSets
from jepa_kit.training import train
from projects.maskfeat import learn_codes
from projects.maskfeat.targets import HOGTarget, PatchCodeTarget

CONFIGS = Path(__file__).parents[2] / "projects/maskfeat/configs"
SMALL = ["data.image_size=16", "encoder.embed_dim=16", "encoder.depth=1", "encoder.num_heads=2", "target.number=5"]
SMALL += ["predictor.width=16", "predictor.depth=1", "predictor.num_heads=2"]


def hog(image: np.ndarray, row: int, column: int, *, side: int, cell: int, bins: int) -> list[float]:
    """Histograms of the patch at a row and column of a grid, by loops over cells, channels and pixels [3, h, w]."""
    padded = np.pad(image.astype(np.float64), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    sobel = np.outer([1, 2, 1], [-1, 0, 1])
    found: list[float] = []
    for top in range(row * side, (row + 1) * side, cell):
        for left in range(column * side, (column + 1) * side, cell):
            for channel in padded:
                histogram = np.zeros(bins)
                for y in range(top, top + cell):
                    for x in range(left, left + cell):
                        around = channel[y : y + 3, x : x + 3]
                        gx, gy = (around * sobel).sum(), (around * sobel.T).sum()
                        turn = math.atan2(gx, gy) % math.pi
                        histogram[min(bins - 1, int(turn / math.pi * bins))] += math.hypot(gx, gy)
                found += list(histogram / np.linalg.norm(histogram))
    return found


@pytest.mark.parametrize(("cell", "bins"), [(8, 9), (4, 6)])
def test_histograms_of_gradients(cell: int, bins: int) -> None:
    target = HOGTarget(patch_size=8, cell=cell, bins=bins)
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    found = target(images, PatchSets.pack([torch.tensor([0, 4]), torch.tensor([5])]), None)
    at = [(0, 0, 0), (0, 1, 1), (1, 1, 2)]
    want = [hog(images[b].numpy(), i, j, side=8, cell=cell, bins=bins) for b, i, j in at]
    assert found.shape == (3, target.out_dim)
    np.testing.assert_allclose(found.numpy(), want, atol=1e-5)


def test_histograms_do_not_depend_on_light() -> None:
    target, patches = HOGTarget(patch_size=8), PatchSets.full(1, 4)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        target(0.3 * images + 2, patches, None), target(images, patches, None), atol=1e-4, rtol=0
    )


def test_a_plain_patch_has_no_gradients() -> None:
    assert not HOGTarget(patch_size=8)(torch.ones(1, 3, 16, 16), PatchSets.full(1, 4), None).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 0}, r"bins \(=0\) must be at least 1"),
        ({"cell": 6}, r"cell \(=6\) must divide patch_size \(=16\)"),
        ({"cell": 0}, r"cell \(=0\) must divide patch_size \(=16\)"),
    ],
)
def test_histograms_of_other_sizes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HOGTarget(patch_size=16, **options)


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def codes_of(folder: Path, *, side: int = 6, stride: int = 2, without: str = "") -> Path:
    """A file of 5 codes for patches of 4 pixels."""
    random = torch.Generator().manual_seed(0)
    p = 3 * side**2
    sizes = {"mean": (p,), "whitening": (p, p), "centroids": (5, p), "code_mean": (5,)}
    tensors = {name: torch.randn(size, generator=random) / p**0.5 for name, size in sizes.items()}
    tensors["code_std"] = torch.rand(5, generator=random) + 0.5
    written = {"number": "5", "patch_size": "4", "stride": str(stride)}
    written.pop(without, None)
    write_file(folder / "codes.safetensors", tensors, written)
    return folder / "codes.safetensors"


def target_of(file: Path, **options: int) -> PatchCodeTarget:
    return PatchCodeTarget(codes=str(file), **{"number": 5, "patch_size": 4} | options, mean=MEAN, std=STD)


@pytest.mark.parametrize(("side", "stride"), [(6, 2), (5, 4), (4, 4), (3, 1)])
def test_codes_of_windows_about_a_patch(tmp_path: Path, side: int, stride: int) -> None:
    file = codes_of(tmp_path, side=side, stride=stride)
    target = target_of(file, stride=stride)
    images = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    found = target(images, PatchSets.pack([torch.tensor([0, 4]), torch.tensor([5])]), None)
    t = {name: value.double().numpy() for name, value in load_file(file).items()}
    before = (side - stride) // 2
    edges = ((0, 0), (before, side), (before, side))
    want = []
    for b, i, j in [(0, 0, 0), (0, 1, 1), (1, 1, 2)]:
        pixels = images[b].double().numpy() * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
        levels = np.pad(255 * pixels, edges, mode="edge")
        codes = []
        for y in range(4 * i, 4 * i + 4, stride):
            for x in range(4 * j, 4 * j + 4, stride):
                window = levels[:, y : y + side, x : x + side].ravel()
                window = (window - window.mean()) / np.sqrt(window.var() + CONTRAST)
                z = cdist((window - t["mean"])[None] @ t["whitening"], t["centroids"])[0]
                codes.append(np.maximum(0, z.mean() - z))
        want.append((np.mean(codes, 0) - t["code_mean"]) / t["code_std"])
    np.testing.assert_allclose(found.numpy(), want, atol=1e-4)


def test_half_precision_leaves_codes_as_they_are(tmp_path: Path) -> None:
    target = target_of(codes_of(tmp_path))
    images, patches = torch.randn(1, 3, 8, 8), PatchSets.full(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = target(images, patches, None)
    assert torch.equal(found, target(images, patches, None))


def test_codes_stay_out_of_the_state(tmp_path: Path) -> None:
    target = target_of(codes_of(tmp_path))
    assert list(target.parameters()) == []
    assert list(target.state_dict()) == ["codes._extra_state"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 6}, r"number \(=6\) must be that of .*codes.safetensors \(=5\); learn_codes.py makes another"),
        ({"patch_size": 8}, r"patch_size \(=8\) must be that of .*codes.safetensors \(=4\)"),
        ({"stride": 4}, r"stride \(=4\) must be that of .*codes.safetensors \(=2\)"),
        ({"stride": 3}, r"stride \(=3\) must divide patch_size \(=4\)"),
    ],
)
def test_codes_of_other_sizes_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target_of(codes_of(tmp_path), **options)


@pytest.mark.parametrize("part", ["number", "patch_size", "stride"])
def test_a_file_that_has_no_codes_is_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(ValueError, match=f"does not say its {part}: projects/maskfeat/learn_codes.py did not write it"):
        target_of(codes_of(tmp_path, without=part))


def test_missing_codes_are_named_by_their_slot(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "cifar10_small.yaml", [f"target.codes={tmp_path}/none"])
    with pytest.raises(ConfigError, match=r"target: codes \(='.*none'\) is not a file: projects/maskfeat/learn_codes"):
        build_recipe(config)


def prepared(shards: Path, folder: Path) -> list[str]:
    """Overrides that make cifar10_small.yaml smaller, with codes learned by the command of its card."""
    overrides = [*SMALL, f"data.shards={shards}", f"target.codes={folder}/made/codes.safetensors"]
    arguments = ["--config-file", str(CONFIGS / "cifar10_small.yaml"), "--images", "20", *overrides]
    assert learn_codes.main(arguments) == 0
    return [*overrides, "train.batch_size=10", "train.epochs=2", f"train.output_dir={folder}/run", "train.device=cpu"]


@pytest.mark.integration
def test_from_codes_to_a_run(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = prepared(shards, tmp_path)
    assert "5 codes of windows of 6 x 6 pixels; over 320 patches, a code is 0 in " in capsys.readouterr().out
    config = load_config(CONFIGS / "cifar10_small.yaml", overrides)
    train(config)
    checkpoint = load_checkpoint(tmp_path / "run/checkpoint_00000004.pt")
    assert [name for name in checkpoint.model if name.startswith("target")] == ["target.codes._extra_state"]
    restore(checkpoint, build_recipe(config))
    codes_of(tmp_path / "made")  # others in the same place
    with pytest.raises(CheckpointError, match=r"made/codes.safetensors is not that of the checkpoint"):
        restore(checkpoint, build_recipe(config))


def test_codes_that_are_learned_are_standardised(shards: Path, tmp_path: Path) -> None:
    from jepa_kit.data.image_options import ImageOptions
    from jepa_kit.data.transforms import normalize
    from jepa_kit.engine.build import open_shards
    from jepa_kit.evaluation.images import read_images

    config = load_config(CONFIGS / "cifar10_small.yaml", prepared(shards, tmp_path))
    dataset = open_shards(config)
    images = read_images(dataset, ImageOptions.from_config(config.data), np.arange(len(dataset)))
    file = tmp_path / "made/codes.safetensors"
    mean, std = config.data.mean, config.data.std
    target = PatchCodeTarget(codes=str(file), number=5, patch_size=4, mean=mean, std=std)
    found = target(normalize(images, mean, std), PatchSets.full(len(images), 16), None)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(found.std(0, correction=0), 1, atol=1e-3)
    first = load_file(file)
    prepared(shards, tmp_path)
    assert all(torch.equal(value, first[name]) for name, value in load_file(file).items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--side", "1"], "--side (=1) must be from the stride (=2) to the image's side (=16)"),
        (["--side", "17"], "--side (=17) must be from the stride (=2) to the image's side (=16)"),
        (["--images", "0"], "--images (=0) must be at least 1"),
        (
            ["--images", "1", "target.number=500"],
            "number (=500) of codes must be at most that of different windows (=121)",
        ),
        (["data.shards=null"], "the config must have a target 'patch_codes', and data.shards must name images"),
    ],
)
def test_codes_that_cannot_be_learned(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    file = tmp_path / "codes.safetensors"
    config = ["--config-file", str(CONFIGS / "cifar10_small.yaml"), *SMALL, f"target.codes={file}"]
    assert learn_codes.main([*config, f"data.shards={shards}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not file.exists()


def test_a_config_without_codes_learns_none(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learn_codes.main(["--config-file", str(CONFIGS / "quick.yaml"), f"data.shards={shards}"]) == 2
    assert "the config must have a target 'patch_codes'" in capsys.readouterr().err
