"""The models of transformers that jepa_kit reads and writes: what each has, and its names.

ijepa            I-JEPA: patch tokens alone, sine-cosine positions
vit              the ViT of DINO, iBOT and others: class token, learned positions
vit_msn          MSN's, which is the same
vit_mae          MAE's encoder: class token without position, sine-cosine positions
beit             BEiT's: class token, relative biases, layer scale, no bias of keys
data2vec-vision  data2vec's, which is the same under older names

A bias of keys adds the same number to all scores of a query, so attention does not depend on it: models without one get
the same features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jepa_kit.errors import CheckpointError
from jepa_kit.interop.weights import Architecture


@dataclass(frozen=True)
class Model:
    """A model of transformers.

    Args:
        name: its class.
        needs: fields of ``Architecture`` -> the values that it can have; a field of ``Architecture.own`` that is not
            named must have I-JEPA's value.
        drops: fields that it does not store, as they do not change features of whole images of training size.
        key_bias: whether keys have a bias.
    """

    name: str
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    key_bias: bool = True

    def problems(self, shape: Architecture) -> list[str]:
        """Return the options of an encoder that this model cannot have: 'registers (=4)'."""
        unlike = [name for name in shape.own if name not in (*self.needs, *self.drops)]
        unlike += [name for name, values in self.needs.items() if values and getattr(shape, name) not in values]
        problems = [f"{name} (={getattr(shape, name)!r})" for name in unlike]
        if shape.grid[0] != shape.grid[1] and not self.key_bias:  # BEiT's
            of_grid = f"of a grid of {shape.grid[0]} x {shape.grid[1]}"
            if shape.relative_bias != "none":  # numbered by another rule there
                problems.append(f"relative_bias (={shape.relative_bias!r}) {of_grid}")
            if shape.positions == "learned":  # it takes every table for that of a square
                problems.append(f"positions (='learned') {of_grid}")
        return problems


_LEARNED = {"class_token": (True,), "positions": ("learned",)}
_LIKE_BEIT: dict[str, tuple[Any, ...]] = {
    "class_token": (True,),
    "positions": ("learned", "none"),
    "relative_bias": (),
    "layer_scale": (),
    "mask_token": (),
    "final_norm": (),
}
MODELS = {
    "ijepa": Model("IJepaModel"),
    "vit_mae": Model("ViTMAEModel", {"class_token": (True,), "positions": ("sincos",)}, ("mask_token",)),
    "vit": Model("ViTModel", _LEARNED, ("mask_token", "interpolation_offset")),
    "vit_msn": Model("ViTMSNModel", _LEARNED, ("mask_token", "interpolation_offset")),
    "beit": Model("BeitModel", _LIKE_BEIT, ("interpolation_offset",), key_bias=False),
    "data2vec-vision": Model("Data2VecVisionModel", _LIKE_BEIT, ("interpolation_offset",), key_bias=False),
}
"""model_type -> the model; the first that fits an encoder is the default."""


def model_type_of(shape: Architecture, wanted: str | None = None) -> str:
    """Return the model type that stores an encoder: the wanted one, or the first that fits.

    Raises:
        CheckpointError: none fits, or not the wanted one; the message names the options in question.
        ValueError: the wanted one is unknown.
    """
    if wanted is not None and wanted not in MODELS:
        raise ValueError(f"model_type (={wanted!r}) must be one of {', '.join(MODELS)}")
    candidates = list(MODELS) if wanted is None else [wanted]
    fitting = [name for name in candidates if not MODELS[name].problems(shape)]
    if fitting:
        return fitting[0]
    fewest = min((MODELS[name].problems(shape) for name in candidates), key=len)
    model = "no model of transformers" if wanted is None else f"not the model {wanted!r} of transformers"
    raise CheckpointError(
        f"encoder.{', encoder.'.join(fewest)} cannot be stored in hf: its readers would ignore it ({model} has it); "
        "jepa_kit and safetensors store it"
    )


def to_options(shape: Architecture, model_type: str) -> dict[str, Any]:
    """Return the entries of config.json in which the models differ."""
    entries: dict[str, Any] = {"architectures": [MODELS[model_type].name], "model_type": model_type}
    if model_type == "vit_mae":
        return entries | {"mask_ratio": 0.0}  # the encoder sees the whole image
    if MODELS[model_type].key_bias:
        return entries
    return entries | {
        "use_mask_token": shape.mask_token,
        "use_absolute_position_embeddings": shape.positions == "learned",
        "use_relative_position_bias": shape.relative_bias == "per_block",
        "use_shared_relative_position_bias": shape.relative_bias == "shared",
        # the model has factors only if this is above 0; it is no more than their first value
        "layer_scale_init_value": 0.0 if shape.layer_scale is None else abs(shape.layer_scale) or 1.0,
        "use_mean_pooling": not shape.final_norm,
        "drop_path_rate": 0.0,
    }


def from_options(config: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """Return the fields of ``Architecture`` in which the models differ.

    Args:
        config: config.json.
        names: those of the weights under our names.

    Raises:
        CheckpointError: a combination that no encoder of jepa_kit has.
    """
    model_type = config["model_type"]
    if model_type == "ijepa":
        return {}
    fields: dict[str, Any] = {"class_token": True}
    if model_type != "vit_mae":
        fields["positions"] = "learned" if "pos_embed" in names else "none"
    if MODELS[model_type].key_bias:
        return fields
    each, shared = (config.get(f"use_{of}relative_position_bias", False) for of in ("", "shared_"))
    size = config.get("image_size", 224)
    if (each or shared) and isinstance(size, list) and len(set(size)) > 1:
        raise CheckpointError(
            f"config.json has image_size (={size}) with relative positions, which transformers numbers by another rule "
            "if an image is not square"
        )
    if each and shared:
        raise CheckpointError(
            "config.json has both use_relative_position_bias and use_shared_relative_position_bias, but an encoder of "
            "jepa_kit has one kind of relative bias"
        )
    scale = config.get("layer_scale_init_value", 0.1)
    return fields | {
        "relative_bias": "per_block" if each else "shared" if shared else "none",
        "layer_scale": float(scale) if scale > 0 else None,
        "mask_token": "mask_token" in names,
        "final_norm": "norm.weight" in names,
    }
