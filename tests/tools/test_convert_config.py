"""tools/convert_config.py: settings of the released configs become those of the shipped ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from jepa_kit.config import Config, load_config
from jepa_kit.tools.convert_config import main

CONFIGS = Path(__file__).parents[2] / "projects" / "ijepa" / "configs"

SETTINGS: dict[str, dict[str, Any]] = {
    "data": {
        "batch_size": 128,
        "color_jitter_strength": 0.0,
        "crop_scale": [0.3, 1.0],
        "crop_size": 224,
        "image_folder": "images/",
        "num_workers": 10,
        "pin_mem": True,
        "root_path": "$somewhere",
        "use_color_distortion": False,
        "use_gaussian_blur": False,
        "use_horizontal_flip": False,
    },
    "logging": {"folder": "$logs/", "write_tag": "jepa"},
    "mask": {
        "allow_overlap": False,
        "aspect_ratio": [0.75, 1.5],
        "enc_mask_scale": [0.85, 1.0],
        "min_keep": 10,
        "num_enc_masks": 1,
        "num_pred_masks": 4,
        "patch_size": 14,
        "pred_mask_scale": [0.15, 0.2],
    },
    "meta": {
        "copy_data": False,
        "load_checkpoint": False,
        "model_name": "vit_huge",
        "pred_depth": 12,
        "pred_emb_dim": 384,
        "read_checkpoint": None,
        "use_bfloat16": True,
    },
    "optimization": {
        "ema": [0.996, 1.0],
        "epochs": 300,
        "final_lr": 1e-6,
        "final_weight_decay": 0.4,
        "ipe_scale": 1.0,
        "lr": 1e-3,
        "start_lr": 2e-4,
        "warmup": 40,
        "weight_decay": 0.04,
    },
}
"""Of the released ViT-H/14 on ImageNet-1k; the other released configs differ from it in the keys below."""

RELEASED: dict[str, tuple[int, dict[str, Any]]] = {
    "released_in1k_vith14": (16, {}),
    "released_in1k_vith16_448": (128, {"data.batch_size": 16, "data.crop_size": 448, "mask.patch_size": 16}),
    "released_in22k_vith14": (64, {"data.batch_size": 32, "optimization.epochs": 66, "optimization.warmup": 3}),
    "released_in22k_vitg16": (
        128,
        {
            "data.batch_size": 16,
            "mask.patch_size": 16,
            "meta.model_name": "vit_giant",
            "meta.pred_depth": 16,
            "optimization.epochs": 44,
            "optimization.warmup": 3,
        },
    ),
}
"""Shipped config -> processes of the release, and what differs."""


def written(folder: Path, **changes: Any) -> str:
    """Return a file with the settings; ``section__key=value`` changes them, and ``...`` removes a key."""
    settings = copy.deepcopy(SETTINGS)
    for path, value in changes.items():
        section, key = path.replace("__", ".").split(".")
        settings[section][key] = value
        if value is ...:
            del settings[section][key]
    file = folder / "theirs.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def converted(folder: Path, ranks: int = 16, **changes: Any) -> Config:
    output = folder / "ours.yaml"
    output.unlink(missing_ok=True)
    assert main([written(folder, **changes), "--ranks", str(ranks), "--output", str(output)]) == 0
    return load_config(output)


@pytest.mark.parametrize("name", RELEASED)
def test_released_settings_become_the_shipped_config(name: str, tmp_path: Path) -> None:
    ranks, changes = RELEASED[name]
    ours, shipped = (
        config.to_dict() for config in (converted(tmp_path, ranks, **changes), load_config(CONFIGS / f"{name}.yaml"))
    )
    for config in (ours, shipped):
        del config["data"]["num_workers"], config["train"]["output_dir"]
    assert ours == shipped
    assert RELEASED.keys() == {f.stem for f in CONFIGS.glob("released_*.yaml")}


def test_every_value_is_carried_over(tmp_path: Path) -> None:
    config = converted(
        tmp_path,
        3,
        data__num_workers=2,
        data__use_color_distortion=True,
        data__color_jitter_strength=0.5,
        data__use_gaussian_blur=True,
        data__use_horizontal_flip=True,
        mask__allow_overlap=True,
        mask__aspect_ratio=[0.5, 2.0],
        mask__min_keep=4,
        mask__num_enc_masks=2,
        meta__pred_emb_dim=192,
        meta__use_bfloat16=False,
        optimization__ema=[0.99, 1.0],
        optimization__ipe_scale=1.25,
    )
    names = [part["name"] for part in config.data.transforms]
    assert names == ["random_resized_crop", "horizontal_flip", "color_jitter", "grayscale", "gaussian_blur"]
    assert config.data.transforms[2] == {
        **{"name": "color_jitter", "p": 0.8, "hue": 0.1},
        **dict.fromkeys(("brightness", "contrast", "saturation"), 0.4),
    }
    assert (config.data.num_workers, config.train.batch_size, config.train.precision) == (2, 384, "float32")
    masker = config.slots["masker"].options
    assert masker["allow_overlap"]
    assert (masker["target_aspect_ratio"], masker["num_contexts"]) == ((0.5, 2.0), 2)
    assert masker["min_keep"] == masker["min_keep_target"] == 5
    assert config.slots["predictor"].options["width"] == 192
    assert config.slots["target_update"].options["momentum"] == (0.99, 1.0)
    assert config.optim.stretch == 1.25


def test_every_key_without_a_counterpart_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([written(tmp_path, data__crop=3, data__color_jitter_strength=1.0), "--ranks", "1"]) == 0
    printed, notes = capsys.readouterr()
    named = [line.split(" (=")[0].removeprefix("not carried over: ") for line in notes.splitlines()]
    assert sorted(named) == [
        "data.color_jitter_strength",
        "data.crop",
        "data.image_folder",
        "data.pin_mem",
        "data.root_path",
        "logging.folder",
        "logging.write_tag",
        "meta.copy_data",
        "meta.load_checkpoint",
        "meta.read_checkpoint",
    ]
    assert "data.crop (=3): no key of the released code" in notes
    assert all(f"# {line}" in printed for line in notes.splitlines())


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"mask__min_keep": ..., "data__crop_size": ...}, 1, "it lacks data.crop_size, mask.min_keep"),
        ({"meta__model_name": "vit_hug"}, 1, "meta.model_name (='vit_hug') must be one of vit_tiny, vit_small"),
        ({}, 0, "ranks (=0) must be at least 1"),
        ({"optimization__lr": -1}, 1, "optim.lr (=-1.0) must be above 0 and finite"),
    ],
)
def test_an_unusable_file_or_command(
    changes: dict[str, Any], ranks: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([written(tmp_path, **changes), "--ranks", str(ranks)]) == 2
    assert message in capsys.readouterr().err


def test_other_files_and_an_output_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert main([str(tmp_path / "list.yaml"), "--ranks", "1"]) == 2
    assert "not a config of the released I-JEPA code: it lacks data.batch_size" in capsys.readouterr().err
    file = written(tmp_path)
    assert main([file, "--ranks", "1", "--output", file]) == 2
    assert "File exists" in capsys.readouterr().err
