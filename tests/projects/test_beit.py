"""BEiT: the check passes on the recording and sees faults; the tokenizer, from its training to a run with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.distance import cdist

from jepa_kit.config import load_config
from jepa_kit.engine.checkpoint.format import load_checkpoint, restore
from jepa_kit.errors import CheckpointError, ConfigError
from jepa_kit.from_config import build_recipe
from jepa_kit.interop.tensor_files import write_file
from jepa_kit.structures import PatchSets
from jepa_kit.training import train
from jepa_kit.trials.recorded import Recorded, Report
from projects.beit import check, train_tokenizer
from projects.beit.codes import CodeTarget

CONFIGS = Path(__file__).parents[2] / "projects/beit/configs"
SMALL = ["data.image_size=16", "encoder.patch_size=4", "encoder.embed_dim=12", "encoder.depth=1", "target.vocabulary=5"]


def tokenizer_of(folder: Path, codes: int = 5, side: int = 4) -> Path:
    file = folder / "tokenizer.safetensors"
    centroids = torch.randn(codes, 3 * side**2, generator=torch.Generator().manual_seed(0))
    write_file(file, {"centroids": centroids}, {})
    return file


def test_the_recording_is_reproduced(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(fixtures / "methods/beit"), "--tolerance", "1e-12"]) == 0
    assert "not read" not in capsys.readouterr().out


def test_another_setting_is_seen(altered: Any) -> None:
    report = Report()
    check.check(altered("beit", "layer_norm_eps", 1e-4), report)
    assert report.failed == ["scores", "loss", "gradients"]


def test_positions_that_are_not_built_are_refused(altered: Any) -> None:
    with pytest.raises(ValueError, match="abs_pos and rel_pos_bias must be false"):
        check.check(altered("beit", "abs_pos", True), Report())


def test_a_weight_that_the_recording_lacks() -> None:
    with pytest.raises(ValueError, match="the recording has no weight bias"):
        check.load(torch.nn.Linear(2, 2), {"weight": torch.zeros(2, 2)})


def test_the_check_builds_the_config_of_the_project(fixtures: Path, same_parts: Any) -> None:
    recording = check.config_of(Recorded(fixtures / "methods/beit").meta)
    same_parts(recording, load_config(CONFIGS / "in1k_vitb16.yaml"), without=("target", "masker"))


def test_a_code_is_the_nearest_centroid_of_the_standardised_patch(tmp_path: Path) -> None:
    file = tokenizer_of(tmp_path)
    target = CodeTarget(tokenizer=str(file), vocabulary=5, patch_size=4)
    images = torch.randn(2, 3, 8, 12)
    codes = target(images, PatchSets.pack([torch.tensor([5, 0]), torch.tensor([3])]), None)
    pixels = [images[b, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] for b, i, j in ((0, 1, 2), (0, 0, 0), (1, 1, 0))]
    flat = torch.stack([x.permute(1, 2, 0).flatten() for x in pixels])  # row, column, channel
    flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
    assert codes.tolist() == cdist(flat, target.tokenizer.centroids).argmin(1).tolist()
    assert codes.dtype == torch.int64


def test_the_tokenizer_stays_out_of_the_state(tmp_path: Path) -> None:
    target = CodeTarget(tokenizer=str(tokenizer_of(tmp_path)), vocabulary=5, patch_size=4)
    assert list(target.parameters()) == []
    assert list(target.state_dict()) == ["tokenizer._extra_state"]


@pytest.mark.parametrize(
    ("vocabulary", "side", "message"),
    [
        (6, 4, r"vocabulary \(=6\) must be the number of codes of .*tokenizer.safetensors \(=5\)"),
        (5, 8, r"tokenizer.safetensors is of patches of 4 x 4 pixels, but the encoder's are 8 x 8"),
    ],
)
def test_a_tokenizer_of_other_sizes_is_refused(tmp_path: Path, vocabulary: int, side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeTarget(tokenizer=str(tokenizer_of(tmp_path)), vocabulary=vocabulary, patch_size=side)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    with pytest.raises(ValueError, match=r"other.safetensors'\) is not a file: projects/beit/train_tokenizer.py makes"):
        CodeTarget(tokenizer=str(file), vocabulary=5, patch_size=4)
    write_file(file, {"centroids": torch.zeros(3)}, {})
    with pytest.raises(ValueError, match=r"has no centroids: projects/beit/train_tokenizer.py did not write it"):
        CodeTarget(tokenizer=str(file), vocabulary=5, patch_size=4)


def test_a_missing_tokenizer_is_named_by_its_slot(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "quick.yaml", [f"target.tokenizer={tmp_path}/none"])
    with pytest.raises(ConfigError, match=r"target: tokenizer \(='.*none'\) is not a file"):
        build_recipe(config)


def prepared(shards: Path, folder: Path) -> list[str]:
    """Overrides that make quick.yaml small, with a tokenizer made by the command of its card."""
    overrides = [*SMALL, f"data.shards={shards}", f"target.tokenizer={folder}/made/tokenizer.safetensors"]
    arguments = ["--config-file", str(CONFIGS / "quick.yaml"), "--images", "20", "--patches", "8", *overrides]
    assert train_tokenizer.main(arguments) == 0
    return [*overrides, "train.batch_size=10", "train.epochs=2", f"train.output_dir={folder}/run", "train.device=cpu"]


@pytest.mark.integration
def test_from_the_tokenizer_to_a_run(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = prepared(shards, tmp_path)
    assert "5 codes explain" in capsys.readouterr().out
    config = load_config(CONFIGS / "quick.yaml", overrides)
    train(config)
    checkpoint = load_checkpoint(tmp_path / "run/checkpoint_00000004.pt")
    assert [name for name in checkpoint.model if name.startswith("target")] == ["target.tokenizer._extra_state"]
    restore(checkpoint, build_recipe(config))
    # Another tokenizer in the same place is not that of the run.
    tokenizer_of(tmp_path / "made")
    with pytest.raises(CheckpointError, match=r"made/tokenizer.safetensors is not that of the checkpoint"):
        restore(checkpoint, build_recipe(config))


def test_a_tokenizer_has_the_centroids_of_k_means(shards: Path, tmp_path: Path) -> None:
    prepared(shards, tmp_path)
    first = load_file(tmp_path / "made/tokenizer.safetensors")["centroids"]
    prepared(shards, tmp_path)
    assert torch.equal(load_file(tmp_path / "made/tokenizer.safetensors")["centroids"], first)
    assert first.shape == (5, 48)
    # A centroid is a mean of standardised patches.
    assert first.mean(1).abs().max() < 1e-5
    assert (first.std(1) <= 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "1", "--patches", "2"], "--images times --patches (=2) must be at least the vocabulary (=5)"),
        (["data.shards=null"], "the config must have a target 'codes', and data.shards must name images"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    config = ["--config-file", str(CONFIGS / "quick.yaml"), f"data.shards={shards}", *SMALL]
    assert train_tokenizer.main([*config, f"target.tokenizer={tmp_path}/t.safetensors", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t.safetensors").exists()


def test_a_config_without_codes_has_no_tokenizer(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tokenizer.main(["--config-file", "quickstart", f"data.shards={shards}"]) == 2
    assert "the config must have a target 'codes'" in capsys.readouterr().err
