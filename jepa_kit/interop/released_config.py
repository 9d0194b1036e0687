"""Configs of the released I-JEPA code (facebookresearch/ijepa, commit 52c1ae9) as configs of jepa_kit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from jepa_kit.encoders.sizes import SIZES
from jepa_kit.maskers.multiblock import RELEASED
from jepa_kit.registry import did_you_mean

CARRIED: dict[str, tuple[str, ...]] = {
    "data": (
        "batch_size",
        "color_jitter_strength",
        "crop_scale",
        "crop_size",
        "num_workers",
        "use_color_distortion",
        "use_gaussian_blur",
        "use_horizontal_flip",
    ),
    "mask": (
        "allow_overlap",
        "aspect_ratio",
        "enc_mask_scale",
        "min_keep",
        "num_enc_masks",
        "num_pred_masks",
        "patch_size",
        "pred_mask_scale",
    ),
    "meta": ("model_name", "pred_depth", "pred_emb_dim", "use_bfloat16"),
    "optimization": (
        "ema",
        "epochs",
        "final_lr",
        "final_weight_decay",
        "ipe_scale",
        "lr",
        "start_lr",
        "warmup",
        "weight_decay",
    ),
}
"""Section -> its keys that have a counterpart; a file must have all of them."""

NOT_CARRIED: dict[str, str] = {
    "data.root_path": "make shards of the images (jepa-shards) and give data.shards",
    "data.image_folder": "as data.root_path",
    "data.pin_mem": "batches are pinned whenever the device is a GPU",
    "logging.folder": "give train.output_dir",
    "logging.write_tag": "files of a run folder have fixed names",
    "meta.copy_data": "data.cache keeps remote shards on a local disk",
    "meta.load_checkpoint": "to resume: jepa-train --resume FILE",
    "meta.read_checkpoint": "as meta.load_checkpoint",
}
"""Key without a counterpart -> what to do instead."""


class Converted(NamedTuple):
    """A config of jepa_kit, and notes on the keys that it does not have.

    Args:
        config: as ``config_from_dict`` takes it.
        notes: 'section.key (=value): what to do instead', one for each key without a counterpart.
    """

    config: dict[str, Any]
    notes: list[str]


def convert_config(raw: Any, ranks: int) -> Converted:
    """Convert a config of the released code; with its masks, initialisation and loss, which are options here.

    Args:
        raw: sections ``data``, ``mask``, ``meta``, ``optimization`` and ``logging``, as in its YAML files.
        ranks: number of processes that it was meant for: its batch size is that of one of them.

    Raises:
        ValueError: the number of ranks is not positive, or the file lacks keys or has another model.
    """
    if ranks < 1:
        raise ValueError(f"ranks (={ranks}) must be at least 1")
    sections = raw if isinstance(raw, Mapping) else {}
    missing = [
        f"{section}.{key}"
        for section, keys in CARRIED.items()
        for key in keys
        if not isinstance(sections.get(section), Mapping) or key not in sections[section]
    ]
    if missing:
        raise ValueError(f"not a config of the released I-JEPA code: it lacks {', '.join(missing)}")
    data, mask, meta, optim = (cast(Mapping[str, Any], sections[name]) for name in CARRIED)
    size = str(meta["model_name"]).removeprefix("vit_")
    if size not in SIZES:
        names = [f"vit_{name}" for name in SIZES]
        hint = did_you_mean(str(meta["model_name"]), names)
        raise ValueError(f"meta.model_name (={meta['model_name']!r}) must be one of {', '.join(names)}{hint}")
    config = {
        "masker": {
            "name": "multiblock",
            "num_targets": mask["num_pred_masks"],
            "target_scale": mask["pred_mask_scale"],
            "target_aspect_ratio": mask["aspect_ratio"],
            "num_contexts": mask["num_enc_masks"],
            "context_scale": mask["enc_mask_scale"],
            "allow_overlap": mask["allow_overlap"],
            **RELEASED,
            # the release asks for more than min_keep patches, of targets too
            "min_keep": mask["min_keep"] + 1,
            "min_keep_target": mask["min_keep"] + 1,
        },
        "encoder": {
            "name": "vit",
            "size": size,
            "patch_size": mask["patch_size"],
            "init": "released",
            "patch_init": "released",
        },
        "predictor": {
            "name": "vit",
            "width": meta["pred_emb_dim"],
            "depth": meta["pred_depth"],
            "num_heads": SIZES[size].num_heads,
            "init": "released",
        },
        "target": {"name": "representation"},
        "loss": {"name": "smooth_l1"},
        "target_update": {"name": "ema", "momentum": optim["ema"]},
        "data": {
            "image_size": data["crop_size"],
            "transforms": _transforms(data),
            "num_workers": data["num_workers"],
        },
        "optim": {
            "lr": optim["lr"],
            "start_lr": optim["start_lr"],
            "final_lr": optim["final_lr"],
            "warmup_epochs": optim["warmup"],
            "weight_decay": [optim["weight_decay"], optim["final_weight_decay"]],
            "stretch": optim["ipe_scale"],
        },
        "train": {
            "batch_size": data["batch_size"] * ranks,
            "epochs": optim["epochs"],
            "precision": "bf16" if meta["use_bfloat16"] else "float32",
        },
    }
    return Converted(config, _notes(sections))


def _transforms(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the augmentations of a section ``data``, in the order in which the released code applies them."""
    found: list[dict[str, Any]] = [{"name": "random_resized_crop", "scale": data["crop_scale"]}]
    if data["use_horizontal_flip"]:
        found.append({"name": "horizontal_flip"})
    if data["use_color_distortion"]:
        s = data["color_jitter_strength"]
        jitter = {"brightness": 0.8 * s, "contrast": 0.8 * s, "saturation": 0.8 * s, "hue": 0.2 * s, "p": 0.8}
        found += [{"name": "color_jitter", **jitter}] if s else []
        found.append({"name": "grayscale", "p": 0.2})
    if data["use_gaussian_blur"]:
        found.append({"name": "gaussian_blur", "sigma": [0.1, 2.0], "p": 0.5})
    return found


def _notes(sections: Mapping[str, Any]) -> list[str]:
    """Return a note for each key of a file that has no counterpart."""
    notes = []
    for section, content in sections.items():
        for key, value in content.items() if isinstance(content, Mapping) else [("", content)]:
            path = f"{section}.{key}".rstrip(".")
            if key not in CARRIED.get(section, ()):
                notes.append(f"{path} (={value!r}): {NOT_CARRIED.get(path, 'no key of the released code')}")
    data = sections["data"]
    if data["color_jitter_strength"] and not data["use_color_distortion"]:
        strength = data["color_jitter_strength"]
        notes.append(f"data.color_jitter_strength (={strength!r}): no effect, as data.use_color_distortion is false")
    return notes
