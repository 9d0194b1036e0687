"""Features of images from an encoder or from raw pixels (the baseline), and loading of runs.

B  images of a batch    n  patches of an image    D  width of a feature
N  images of all        h, w  sides in pixels
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from jepa_kit.config import Config, DataConfig, config_from_dict
from jepa_kit.config.resolved import import_named
from jepa_kit.data.transforms import normalize
from jepa_kit.encoders.pooling import quarters
from jepa_kit.engine.checkpoint.format import check_finite, restore
from jepa_kit.engine.checkpoint.locate import to_read
from jepa_kit.from_config import build_recipe
from jepa_kit.interfaces import Encoder
from jepa_kit.interop.reference import read_checkpoint
from jepa_kit.precision import autocast_of
from jepa_kit.recipe import Recipe
from jepa_kit.registry import check_choice
from jepa_kit.structures import Pooling, Precision

Float32 = NDArray[np.float32]
BlockSource = Callable[[Tensor, Sequence[tuple[int, Pooling]]], list[Tensor]]
"""uint8 images [B, 3, h, w] on the host, and several (block, pooling) -> float32 features on the host: [B, D] each if
pooled, else [B, n, D]."""

PIXEL_SIDE = 16
"""Side in pixels of the averaged images of the baseline of raw pixels."""


def layer_numbers(layers: str, depth: int) -> tuple[int, ...]:
    """Return the blocks, from 1 to ``depth``, whose outputs are concatenated, each after the final norm.

    Args:
        layers: ``last``; ``last4`` (or any number) for the last 4; or block numbers as ``4+8+12``, ascending.
        depth: of the encoder.

    Raises:
        ValueError: another form, or blocks that the encoder does not have.
    """
    if re.fullmatch(r"[1-9]\d*(\+[1-9]\d*)*", layers):
        blocks = tuple(int(number) for number in layers.split("+"))
        if blocks[-1] > depth or any(b <= a for a, b in pairwise(blocks)):
            raise ValueError(f"layers (={layers!r}) must be ascending numbers of blocks from 1 to the depth (={depth})")
        return blocks
    match = re.fullmatch(r"last([1-9]\d*)?", layers)
    if match is None:
        raise ValueError(
            f"layers (={layers!r}) must be 'last', 'last4' (any number) for the last 4 concatenated, or numbers of "
            "blocks as '4+8+12'"
        )
    count = int(match[1] or 1)
    if count > depth:
        raise ValueError(f"layers (={layers!r}) needs {count} layers, but the encoder has {depth}")
    return tuple(range(depth - count + 1, depth + 1))


def extract_features(
    encoder: Encoder,
    images: Tensor | Iterable[Tensor],
    *,
    pooling: Pooling = "mean",
    layers: str = "last",
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    mean: Sequence[float] = DataConfig.mean,
    std: Sequence[float] = DataConfig.std,
    batch_size: int = 256,
) -> Float32:
    """Return frozen features of images (I-JEPA, A.2: the target encoder's patch tokens, averaged over the image).

    The encoder is moved to the device, runs in evaluation mode and without gradients, and gets its mode back.

    Args:
        encoder: the paper evaluates the target encoder.
        images: uint8 [N, 3, h, w], or batches of them.
        pooling: ``mean`` over the patch tokens, ``class`` for the class token, ``quarters`` for the means over the four
            quarters of the image side by side (see ``jepa_kit.encoders.pooling.quarters``), or ``none``.
        layers: ``last``; ``last4`` for the last four layers, each after the final norm, concatenated in order (the
            paper reports the better of the two); or any blocks, see ``layer_numbers``.
        device: of the encoder.
        precision: of the matrix products; the mean is float32.
        mean, std: of the channels, as in training; ImageNet's by default.
        batch_size: images at a time if ``images`` is one tensor.

    Returns:
        [N, D], or [N, n, D] without pooling; D is the encoder's width times the number of layers, times 4 for quarters.
            Each layer has its four quarters together.

    Raises:
        ValueError: no image, images that are not uint8, an option outside its range, ``class`` for an encoder without a
            class token, or ``quarters`` of fewer than 2 x 2 patches.
    """
    check_choice("pooling", pooling, Pooling)
    if pooling == "class" and not has_class_token(encoder):
        raise ValueError(f"pooling (='class') needs a class token, which encoder (={type(encoder).__name__}) lacks")
    wanted = [(block, pooling) for block in layer_numbers(layers, encoder.depth)]
    source = block_source(encoder, device=device, precision=precision, mean=mean, std=std)
    parts = []
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        if batch.dtype != torch.uint8 or batch.ndim != 4:
            raise ValueError(f"images must be uint8 [B, 3, h, w], not {batch.dtype} of shape {tuple(batch.shape)}")
        parts.append(torch.cat(source(batch, wanted), dim=-1).numpy())
    if not parts:
        raise ValueError("images must contain at least one batch")
    return np.concatenate(parts)


def block_source(
    encoder: Encoder,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    mean: Sequence[float] = DataConfig.mean,
    std: Sequence[float] = DataConfig.std,
) -> BlockSource:
    """Return a function from images to the outputs of several blocks, pooled in several ways, in one pass.

    ``extract_features`` is the simpler interface; evaluations call this one, because several protocols share a pass.

    Raises:
        ValueError: another precision.
    """
    check_choice("precision", precision, Precision)
    device = torch.device(device)
    assert isinstance(encoder, nn.Module)
    network: Any = encoder.to(device)

    @torch.no_grad()  # not inference_mode: its tensors cannot be used in training later
    def source(images: Tensor, wanted: Sequence[tuple[int, Pooling]]) -> list[Tensor]:
        blocks = sorted({block for block, _ in wanted})
        x = normalize(images.to(device, non_blocking=True), mean, std)
        classes: list[Tensor] = []
        with evaluating(network), autocast_of(precision, device)():
            if any(pooling == "class" for _, pooling in wanted):
                patches, prefixes = zip(*network.forward_tokens(x, layers=blocks), strict=True)
                classes = [prefix[:, 0].float() for prefix in prefixes]  # [B, D] each
            else:
                patches = network.forward_layers(x, layers=blocks)  # [B * n, D] each
        tokens = [one.float().unflatten(0, (len(images), -1)) for one in patches]  # [B, n, D] each

        def pooled(k: int, pooling: Pooling) -> Tensor:
            if pooling == "class":
                return classes[k]
            if pooling == "quarters":
                return quarters(tokens[k], grid_of(network, x))
            return tokens[k].mean(dim=1) if pooling == "mean" else tokens[k]

        return [pooled(blocks.index(block), pooling).cpu() for block, pooling in wanted]

    return source


def grid_of(encoder: Encoder, images: Tensor) -> tuple[int, int]:
    """Return the rows and columns of an encoder's patches of images [B, C, h, w]."""
    return images.shape[2] // encoder.patch_size, images.shape[3] // encoder.patch_size


def has_class_token(encoder: object) -> bool:
    """Return whether an encoder has a class token, the first of its prefix."""
    return bool(getattr(encoder, "class_token", False))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode; restore the mode of each module at the end."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def pixel_features(images: Tensor, side: int | None = PIXEL_SIDE) -> Tensor:
    """Return the baseline of raw pixels: uint8 images [B, 3, h, w] -> float32 [B, 3 * side * side] in [0, 1].

    Args:
        images: uint8.
        side: larger images are averaged down to this side; None keeps every pixel. A linear probe is as good or better
            with fewer pixels than with all, and much faster.
    """
    x = images.float() / 255
    if side is not None and min(x.shape[2:]) > side:
        x = F.adaptive_avg_pool2d(x, side)
    return x.flatten(1)


def pixel_patches(images: Tensor, patch_size: int) -> Tensor:
    """Return raw pixels for protocols of patches: uint8 [B, 3, h, w] -> float32 [B, n, 3 * p * p] in [0, 1]."""
    return rearrange(images.float() / 255, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


class LoadedRun(NamedTuple):
    """A loaded run: its config, its networks, the number of their updates, and its data.

    ``data`` are the number of samples and a digest, from the checkpoint; None if unknown.
    """

    config: Config
    jepa: Recipe
    step: int
    data: Mapping[str, Any] | None = None


def latest_checkpoint(checkpoint: str | Path) -> Path:
    """Return the file itself, or the latest checkpoint of a run folder; the path as given if there is none.

    Remote checkpoints are downloaded (``jepa_kit.engine.checkpoint.locate.to_read``).
    """
    return to_read(checkpoint)


def load_run(checkpoint: str | Path, overrides: Sequence[str] = (), *, trust_imports: bool = False) -> LoadedRun:
    """Load the recipe of a checkpoint with its weights, on the CPU, in evaluation mode.

    Args:
        checkpoint: a file, a run folder, for its latest checkpoint, or ``reference:NAME``.
        overrides: of the config, as on the command line: ``train.attention=reference``.
        trust_imports: run ``imports`` of its config that are not part of jepa_kit.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a checkpoint, has weights that are not finite, or does not fit its config (after an
            override of a part).
        ConfigError: an override that the config does not have, or imports that are not trusted.
    """
    import_named(overrides)  # first, because the URL of the checkpoint may need a handler that they register
    loaded = read_checkpoint(latest_checkpoint(checkpoint))
    config = config_from_dict(
        loaded.config,
        overrides,
        folder=str(Path(checkpoint).parent),
        source=str(checkpoint),
        trust_imports=trust_imports,
    )
    check_finite(loaded.model, str(checkpoint))
    jepa = build_recipe(config)
    restore(loaded, jepa)
    return LoadedRun(config, jepa.eval(), loaded.step, loaded.data)


def untrained_encoder(config: Config, seed: int) -> nn.Module:
    """Return the encoder of a config with fresh weights, a function of the seed; torch's random state is unchanged.

    With the seed of a run, these are its initial weights, unless it has ``train.init_from``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_recipe(config).encoder.eval()
