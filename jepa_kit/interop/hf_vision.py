"""Vision models of transformers that jepa_kit does not have itself, such as DINOv2, as frozen encoders.

transformers runs the model (``AutoModel``); weights and config are read from the folder alone, and code in it is not
run. A trial call finds where the tokens of the patches are, so that no list of models is needed: a model is refused if
its tokens are not those of patches, as in hierarchical and convolutional networks.

B = images    N = H * W patches of an image    k = tokens before the patches    D = width    p = patch size
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kit.encoders.sizes import check_layers
from jepa_kit.errors import CheckpointError, reason_of
from jepa_kit.interop.files import read_json, recognise
from jepa_kit.interop.hf_models import MODELS
from jepa_kit.structures import Grid, PatchSets

NORMS = ("layernorm", "norm", "post_layernorm")
"""Names that models give to the norm after their last block."""
UNUSED = ("pooler.", "head.")
"""Beginnings of names of layers after the tokens, which a folder may lack."""
FROM_BYTES = 1 / 255
"""What brings pixels to [0, 1], as the data of a run."""
CLOSE = 1e-4
"""Largest difference of a norm's output from the model's, relative to the largest value."""

Channels = tuple[float, float, float]


class VisionModel(nn.Module):
    """A vision model of transformers with the interface of an encoder; it sees whole images.

    Args:
        model: of transformers, in eval mode.
        grid: (H, W) of the patches of an image; None for that of its config.
        source: name of its folder, for messages.

    Raises:
        CheckpointError: it has no patches, does not take images of this size, or its tokens are not those of patches.
    """

    def __init__(self, model: nn.Module, grid: Grid | None, source: str) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        side, size = (_pair(getattr(config, name, None)) for name in ("patch_size", "image_size"))
        if side is None or side[0] != side[1] or size is None:
            raise CheckpointError(f"{source}: {type(model).__name__} has no square patches, so it cannot be a teacher")
        self.patch_size = side[0]
        self.grid = grid or (size[0] // side[0], size[1] // side[0])
        takes = inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        with torch.no_grad():
            hidden, last = self._trial(source)
            self.norm = self._final_norm(hidden[-1], last)
        self.depth, self.embed_dim = len(hidden) - 1, last.shape[-1]

    def forward(self, images: Tensor, patches: PatchSets | None = None) -> Tensor:
        """Encode [B, C, h, w] -> [B * N, D]."""
        return self.forward_layers(images, patches, layers=(self.depth,))[0]

    def forward_layers(
        self, images: Tensor, patches: PatchSets | None = None, *, layers: Sequence[int], norm: bool = True
    ) -> list[Tensor]:
        """Return the outputs of some layers, each [B * N, D], in the order of ``layers``; see ``Encoder``.

        Raises:
            ValueError: ``patches`` are given, a layer does not exist, or ``norm`` for a layer before the last of a
                model whose final norm is not known.
        """
        name = type(self.model).__name__
        if patches is not None:
            raise ValueError(f"{name} of transformers encodes whole images: take target.masked_at=output")
        check_layers(layers, self.depth)
        if norm and self.norm is None and set(layers) != {self.depth}:
            raise ValueError(
                f"{name} has no final norm that could be applied to layers before the last: take "
                "target.final_norm=false"
            )
        hidden, last = self._run(images)
        height, width = (side // self.patch_size for side in images.shape[-2:])
        outputs = []
        for number in layers:
            x = hidden[number]
            if norm:
                x = last if number == self.depth or self.norm is None else self.norm(x)
            outputs.append(x[:, -height * width :].flatten(0, 1))  # [B, k + N, D] -> [B * N, D]
        return outputs

    def _run(self, images: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """Return the input of the first block and the output of each, and the last one with the final norm."""
        out = self.model(pixel_values=images, output_hidden_states=True, return_dict=True, **self.options)
        return out.hidden_states, out.last_hidden_state

    def _trial(self, source: str) -> tuple[Sequence[Tensor], Tensor]:
        """Return what two images give, one of which differs in the patch at the right end of the first row."""
        p, (height, width) = self.patch_size, self.grid
        images = torch.rand(1, 3, height * p, width * p, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
        images[1, :, :p, -p:] += 1.0
        name = f"{source}: {type(self.model).__name__}"
        try:
            hidden, last = self._run(images)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{name} does not give tokens of images of {height * p} x {width * p} pixels: {reason_of(error)}"
            ) from error
        tokens = hidden[0].shape[1]
        if any(x.shape != (2, tokens, hidden[0].shape[-1]) for x in hidden) or tokens < height * width:
            shapes = ", ".join(str(tuple(x.shape[1:])) for x in hidden)
            raise CheckpointError(f"{name} gives layers of the shapes {shapes}, not one token for each of its patches")
        moved = (hidden[0][0] - hidden[0][1]).abs().amax(-1)  # [k + N]
        changed = (moved > 0.1 * moved.max()).nonzero().flatten().tolist()
        if changed != [tokens - height * width + width - 1]:
            raise CheckpointError(f"{name} does not give the tokens of patches row by row, after all others")
        return hidden, last

    def _final_norm(self, hidden: Tensor, last: Tensor) -> nn.Module | None:
        """Return the norm that turns the last block's output into the model's; None if there is none of that name."""
        if torch.equal(hidden, last):
            return nn.Identity()
        limit = CLOSE * float(last.abs().max())
        named = [getattr(self.model, name, None) for name in NORMS]
        norms = [norm for norm in named if isinstance(norm, nn.Module)]
        return next((norm for norm in norms if float((norm(hidden) - last).abs().max()) <= limit), None)


def is_other_model(path: Path) -> bool:
    """Return whether this is a folder of transformers with a model that jepa_kit does not have itself."""
    return path.is_dir() and recognise(path) == "hf" and read_json(path / "config.json").get("model_type") not in MODELS


def read(folder: Path, grid: Grid | None = None) -> tuple[VisionModel, tuple[Channels, Channels]]:
    """Return the model of a folder, and (mean, std) of its images.

    Args:
        folder: as ``save_pretrained`` writes it.
        grid: (H, W) of the patches of the images that it will see.

    Raises:
        CheckpointError: transformers is not installed or cannot load the model, weights are missing, or see
            ``VisionModel``.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise CheckpointError(f"{folder} has a model of transformers, which is not installed: {error}") from error
    try:
        model, found = AutoModel.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {reason_of(error)}") from error
    model = getattr(model, "vision_model", model)  # of a model of images and texts
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(UNUSED))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} weights of {type(model).__name__}: {missing[0]}, ...")
    return VisionModel(model.float().eval(), grid, str(folder)), _normalisation(folder)


def _normalisation(folder: Path) -> tuple[Channels, Channels]:
    """Return (mean, std) of the preprocessor, for pixels in [0, 1]."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no preprocessor_config.json, which gives the mean and std of its images")
    given = read_json(file)
    factor = given.get("rescale_factor", FROM_BYTES) if given.get("do_rescale", True) else 1.0
    if not isinstance(factor, float) or abs(factor - FROM_BYTES) > 1e-6 or given.get("rescale_offset"):
        raise CheckpointError(f"{file} scales pixels by {factor}, but images of a run by 1 / 255")
    if not given.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return _three(given, "image_mean", file), _three(given, "image_std", file)


def _three(given: dict[str, Any], name: str, file: Path) -> Channels:
    """Return three numbers of a preprocessor."""
    values = given.get(name)
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(x, int | float) for x in values):
        raise CheckpointError(f"{file} must have {name} with three numbers, not {values!r}")
    return values[0], values[1], values[2]


def _pair(size: object) -> tuple[int, int] | None:
    """Return (h, w) of a size in a config, which may be one number; None if it is neither."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(x, int) for x in size):
        return size[0], size[1]
    return None
