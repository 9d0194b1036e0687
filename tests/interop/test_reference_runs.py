"""The runs in reference/, and the file of their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import jepa_kit
from jepa_kit.config import config_from_dict, load_config
from jepa_kit.config.shipped import reference_names
from jepa_kit.engine.checkpoint.format import Checkpoint, save_checkpoint
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.errors import CheckpointError
from jepa_kit.evaluation.features import load_run
from jepa_kit.evaluation.tables.runs import load
from jepa_kit.from_config import build_recipe
from jepa_kit.interop import convert
from jepa_kit.interop.reference import read_checkpoint, write_weights

ROOT = Path(__file__).parents[2] / "reference"
NAMES = reference_names()


def test_sizes() -> None:
    assert sum(file.stat().st_size for file in ROOT.rglob("*") if file.is_file()) <= 25_000_000
    assert {path.name for path in ROOT.iterdir()} == {*NAMES, "README.md"}


@pytest.mark.parametrize("name", NAMES)
def test_a_reference_run(name: str) -> None:
    folder = ROOT / name
    assert (folder / "weights.safetensors").stat().st_size <= 3_000_000
    config = load_config(f"reference:{name}")
    encoder = jepa_kit.load_encoder(f"reference:{name}")
    h, w = config.data.image_size
    images = torch.randint(0, 256, (2, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = encoder(encoder.preprocess(images))
    assert bool(torch.isfinite(tokens).all())
    assert float(tokens.std(dim=1).mean()) > 0.01, "tokens differ between patches"
    lines = read_metrics(folder)
    assert 2 <= len(lines) <= 300
    assert lines[-1]["loss"] < lines[0]["loss"]
    (results,) = load(f"reference:{name}")
    assert {"untrained", "pixels", "patches"} < {answer.row.network for answer in results.rows}
    assert encoder.provenance.step == results.step == lines[-1]["step"] + 1
    with Image.open(folder / "curves.png") as picture:
        assert picture.width == 1200
    card = (folder / "README.md").read_text(encoding="utf-8")
    for text in (
        f"# {name}",
        "| machine | ",
        "| hours | ",
        "| weights | ",
        f"--config-file reference:{name} ",
        "chance",
    ):
        assert text in card


def test_a_name_that_no_run_has() -> None:
    with pytest.raises(FileNotFoundError, match=r"^there is no reference run 'ijepa_moon'; (there are: |the folder )"):
        jepa_kit.load_encoder("reference:ijepa_moon")


@pytest.fixture
def checkpoint() -> Checkpoint:
    """A whole recipe with random weights."""
    config = config_from_dict(
        {
            "masker": {"name": "multiblock"},
            "encoder": {"name": "vit", "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4},
            "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
            "target": {"name": "representation"},
            "loss": {"name": "smooth_l1"},
            "target_update": {"name": "ema"},
            "data": {"image_size": 16},
        }
    )
    torch.manual_seed(0)
    state = {name: torch.randn_like(value) for name, value in build_recipe(config).state_dict().items()}
    return Checkpoint(step=3, model=state, optimizer={}, config=config.to_dict(), versions={}, data={})


@pytest.fixture
def weights(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    write_weights(checkpoint, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_weights_are_converted_as_a_checkpoint_is(checkpoint: Checkpoint, weights: Path, tmp_path: Path) -> None:
    rounded = Checkpoint(**{**vars(checkpoint), "model": {k: v.half().float() for k, v in checkpoint.model.items()}})
    file = save_checkpoint(tmp_path, rounded)
    for source, target in ((weights, "a"), (file, "b")):
        convert(source, tmp_path / target, to="timm", encoder="target")
    a, b = (jepa_kit.load_encoder(tmp_path / name, None) for name in ("a", "b"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_weight_too_large_for_float16(checkpoint: Checkpoint, tmp_path: Path) -> None:
    name = next(iter(checkpoint.model))
    checkpoint.model[name] = torch.full_like(checkpoint.model[name], 1e5)
    with pytest.raises(CheckpointError, match=rf"in float16 has weights that are NaN or infinite: {name}"):
        write_weights(checkpoint, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_damage(weights: Path, tmp_path: Path) -> None:
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged, or was changed after jepa_kit wrote it"):
        load_run(weights)
    weights.write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match="is cut short"):
        load_run(weights)


def test_a_note_that_is_damaged(checkpoint: Checkpoint, weights: Path) -> None:
    checkpoint = Checkpoint(**{**vars(checkpoint), "data": []})  # type: ignore[arg-type]
    write_weights(checkpoint, weights)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of jepa_kit: it has 'data' \(\[\]\)"):
        read_checkpoint(weights)
    text = weights.read_bytes().replace(b'{\\"config\\"', b'[\\"config\\"')
    weights.write_bytes(text)
    with pytest.raises(CheckpointError, match=r"the note 'jepa_kit' of .* is damaged: "):
        read_checkpoint(weights, allow_unchecked=True)


def test_one_encoder_is_no_recipe(checkpoint: Checkpoint, tmp_path: Path) -> None:
    convert(save_checkpoint(tmp_path, checkpoint), tmp_path / "a.safetensors", to="safetensors", encoder="target")
    with pytest.raises(
        CheckpointError, match=r"has no recipe, only weights of one encoder: jepa_kit\.load_encoder reads"
    ):
        load_run(tmp_path / "a.safetensors")
