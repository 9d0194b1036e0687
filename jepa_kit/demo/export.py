"""What a page needs of a run: shapes, weights and options, and errors for what its JavaScript cannot compute.

N = patches of an image    D = width of the encoder    E = width of the predictor    k = tokens of the encoder's prefix
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from jepa_kit.config import Config
from jepa_kit.demo.tensors import TensorBlock
from jepa_kit.encoders.blocks import Block
from jepa_kit.encoders.vit import ViT
from jepa_kit.evaluation.pictures.decoder import NOISE, Decoder
from jepa_kit.frozen import FrozenNetwork
from jepa_kit.losses import is_distance
from jepa_kit.losses.distances import L1, L2, Cosine, SmoothL1
from jepa_kit.predictors.vit import ViTPredictor
from jepa_kit.recipe import JEPA, Recipe
from jepa_kit.targets.representation import RepresentationTarget

DISTANCES: dict[type, str] = {SmoothL1: "smooth_l1", L2: "l2", L1: "l1", Cosine: "cosine"}
"""Losses that the page computes, by the names that static/network.js has for them."""


def check_run(recipe: Recipe, config: Config) -> JEPA:
    """Return the recipe if a page can run it.

    Raises:
        ValueError: it cannot; a line for each option that is in the way.
    """
    if not isinstance(recipe, JEPA):
        raise ValueError(f"recipe (={config.recipe.name!r}) must be 'jepa': a page runs no other")
    problems = list(_problems(recipe))
    if problems:
        raise ValueError("a page cannot run this network:\n" + "\n".join(f"  {problem}" for problem in problems))
    return recipe


def _problems(recipe: JEPA) -> Iterator[str]:
    yield from _encoder_problems("encoder", recipe.encoder)
    target = _unwrapped(recipe.target_network)
    if target is not recipe.encoder:
        yield from _encoder_problems("the target encoder: encoder", target)
    predictor = recipe.predictor
    if isinstance(predictor, ViTPredictor):
        if predictor.positions != "sincos":
            yield f"predictor.positions (={predictor.positions!r}) must be 'sincos'"
        if len(predictor.mask_token) > 1:
            yield f"predictor.mask_tokens (={len(predictor.mask_token)}) must be 1"
    else:
        yield f"predictor (={type(predictor).__name__}) must be 'vit'"
    yield from _target_problems(recipe.target)
    terms = {name: type(loss) for name, loss in recipe.losses.items() if is_distance(loss)}
    if not terms or not {*terms.values()} <= {*DISTANCES}:
        yield f"loss (={', '.join(recipe.losses)}) must have distances out of {', '.join(DISTANCES.values())}"


def _encoder_problems(name: str, encoder: nn.Module | None) -> Iterator[str]:
    if not isinstance(encoder, ViT):
        yield f"{name} (={type(encoder).__name__}) must be 'vit'"
        return
    if encoder.positions not in ("sincos", "learned", "none"):
        yield f"{name}.positions (={encoder.positions!r}) must be 'sincos', 'learned' or 'none'"
    if encoder.relative is not None:
        yield f"{name}.relative_bias must be 'none'"
    if encoder.mask_token is not None:
        yield f"{name}.mask_token (=True) must be false: a page leaves hidden patches out, and hides none in place"
    if encoder.causal:
        yield f"{name}.causal (=True) must be false"
    if encoder.in_chans != 3:
        yield f"{name}.in_chans (={encoder.in_chans}) must be 3"


def _target_problems(target: nn.Module) -> Iterator[str]:
    if not isinstance(target, RepresentationTarget):
        yield f"target (={type(target).__name__}) must be 'representation'"
        return
    if target.masked_at != "output":
        yield f"target.masked_at (={target.masked_at!r}) must be 'output'"


def _unwrapped(network: nn.Module | None) -> nn.Module | None:
    return network.network if isinstance(network, FrozenNetwork) else network


def networks(recipe: JEPA, block: TensorBlock) -> dict[str, Any]:
    """Add the weights of encoder, target encoder and predictor to a block, and return their shapes for the page.

    Args:
        recipe: from ``check_run``.
        block: gets the weights.
    """
    encoder, predictor, target = recipe.encoder, recipe.predictor, cast(RepresentationTarget, recipe.target)
    follower = _unwrapped(recipe.target_network)
    assert isinstance(encoder, ViT)
    assert isinstance(follower, ViT)
    assert isinstance(predictor, ViTPredictor)
    shapes: dict[str, Any] = {"encoder": _add_encoder("encoder", encoder, block)}
    shapes["target"] = shapes["encoder"] if follower is encoder else _add_encoder("target", follower, block)
    shapes["target"] = {
        **shapes["target"],
        "layers": list(target.numbers(follower.depth)),
        **{name: getattr(target, name) for name in ("norm", "final_norm", "mean_norm", "combine")},
    }
    assert predictor.pos_embed is not None
    for name, values in (
        ("embed.weight", predictor.embed.weight),
        ("embed.bias", predictor.embed.bias),
        ("positions", predictor.pos_embed),
        ("mask", predictor.mask_token[0]),
        ("out.weight", predictor.proj.weight),
        ("out.bias", predictor.proj.bias),
    ):
        block.add(f"predictor.{name}", values)
    _add_norm("predictor.norm", predictor.norm, block)
    _add_blocks("predictor", predictor.blocks, block)
    shapes["predictor"] = {**_shape(predictor.blocks, predictor.width), "prefix": predictor.uses_prefix}
    return shapes


@torch.no_grad()
def _add_encoder(name: str, encoder: ViT, block: TensorBlock) -> dict[str, Any]:
    """Add an encoder's weights and return its shape; positions [N, D] and prefix [k, D] are tables, however made."""
    block.add(f"{name}.patch.weight", encoder.patch_embed.proj.weight.flatten(1))
    if encoder.patch_embed.proj.bias is not None:
        block.add(f"{name}.patch.bias", encoder.patch_embed.proj.bias)
    if encoder.pos_embed is not None:
        block.add(f"{name}.positions", encoder.pos_embed[len(encoder.pos_embed) - encoder.num_patches :])
    if encoder.num_prefix:
        side = [n * encoder.patch_size for n in encoder.grid]
        rows, _ = encoder.embed(encoder.patch_embed.proj.weight.new_zeros(1, 3, *side), None)
        block.add(f"{name}.prefix", rows[: encoder.num_prefix])
    _add_blocks(name, encoder.blocks, block)
    if isinstance(encoder.norm, nn.LayerNorm):
        _add_norm(f"{name}.norm", encoder.norm, block)
    return {"tensors": name, **_shape(encoder.blocks, encoder.embed_dim), "input_norm": encoder.input_norm}


def _shape(blocks: nn.ModuleList, width: int) -> dict[str, Any]:
    first = cast(Block, blocks[0])
    return {"width": width, "depth": len(blocks), "heads": first.attn.num_heads, "eps": first.norm1.eps}


def _add_norm(name: str, norm: nn.LayerNorm, block: TensorBlock) -> None:
    block.add(f"{name}.weight", norm.weight)
    block.add(f"{name}.bias", norm.bias)


def _add_blocks(name: str, blocks: nn.ModuleList, block: TensorBlock) -> None:
    """Add the weights of blocks; the factors of LayerScale are multiplied into the layer before them."""
    for number, one in enumerate(cast(list[Block], list(blocks))):
        at = f"{name}.{number}"
        _add_norm(f"{at}.norm1", one.norm1, block)
        _add_norm(f"{at}.norm2", one.norm2, block)
        layers = {
            "qkv": (one.attn.qkv, None),
            "proj": (one.attn.proj, one.scale1),
            "fc1": (one.mlp.fc1, None),
            "fc2": (one.mlp.fc2, one.scale2),
        }
        for layer, (linear, scale) in layers.items():
            block.add(f"{at}.{layer}.weight", linear.weight if scale is None else linear.weight * scale[:, None])
            if linear.bias is not None:
                block.add(f"{at}.{layer}.bias", linear.bias if scale is None else linear.bias * scale)


def add_decoder(decoder: Decoder, block: TensorBlock) -> dict[str, int]:
    """Add the weights of a decoder to a block, and return its shape for the page."""
    for name, module in decoder.named_children():
        for part, values in module.named_parameters():
            block.add(f"decoder.{name}.{part}", values)
    return {"width": decoder.embed.in_features - NOISE, "noise": NOISE}


def distances(recipe: JEPA) -> list[dict[str, Any]]:
    """Return the distances of a run's loss, with weights and options; regularisers are left out."""
    return [
        {"name": DISTANCES[type(loss)], "weight": recipe.weights[name], "beta": getattr(loss, "beta", None)}
        for name, loss in recipe.losses.items()
        if is_distance(loss)
    ]
