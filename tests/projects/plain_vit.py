"""A ViT in plain float64 maths, one image and one block at a time, for the tests of projects that predict its layers.

N = patches of an image    D = width    h = heads
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jepa_kit.encoders import ViT


def standardise(x: Tensor, eps: float) -> Tensor:
    """Mean 0 and (biased) variance 1 of each row."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)


def layers_of(vit: ViT, image: Tensor) -> list[Tensor]:
    """Return the input of the first block and the output of each, [N, D], without the final norm: [3, h, w] -> list.

    The weights are those of ``vit``; all else is computed here.
    """
    w = {name: value.detach().double() for name, value in vit.state_dict().items()}
    p = vit.patch_size
    pixels = image.double()
    if vit.input_norm == "image":
        pixels = pixels - pixels.mean((1, 2), keepdim=True)
        pixels = pixels / ((pixels.square().sum() / (pixels.numel() - 1)) ** 0.5 + 0.1)
    rows = [
        pixels[:, y : y + p, x : x + p].reshape(-1)
        for y in range(0, image.shape[1], p)
        for x in range(0, image.shape[2], p)
    ]
    kernel = w["patch_embed.proj.weight"].flatten(1)  # [D, 3 * p * p]
    x = torch.stack([kernel @ row + w["patch_embed.proj.bias"] for row in rows]) + vit.pos_embed.double()
    outputs = [x]
    for number in range(vit.depth):
        at = f"blocks.{number}."
        y = standardise(x, 1e-6) * w[f"{at}norm1.weight"] + w[f"{at}norm1.bias"]
        q, k, v = (y @ w[f"{at}attn.qkv.weight"].T + w[f"{at}attn.qkv.bias"]).chunk(3, -1)
        mixed = []
        for q_i, k_i, v_i in zip(*(part.chunk(vit.num_heads, -1) for part in (q, k, v)), strict=True):
            scores = torch.exp(q_i @ k_i.T / math.sqrt(q_i.shape[-1]))
            mixed.append(scores / scores.sum(-1, keepdim=True) @ v_i)
        x = x + torch.cat(mixed, -1) @ w[f"{at}attn.proj.weight"].T + w[f"{at}attn.proj.bias"]
        y = standardise(x, 1e-6) * w[f"{at}norm2.weight"] + w[f"{at}norm2.bias"]
        y = y @ w[f"{at}mlp.fc1.weight"].T + w[f"{at}mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))  # GELU
        x = x + y @ w[f"{at}mlp.fc2.weight"].T + w[f"{at}mlp.fc2.bias"]
        outputs.append(x)
    return outputs
