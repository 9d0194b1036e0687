"""Attention weights, and the patches whose targets are nearest to a prediction.

B = images    n = patches of an image, H * W    D = width of a target    h = heads    d = width of a head
k = tokens of the encoder's prefix: the class token, then registers
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.encoders.attention_dense import causal_mask
from jepa_kit.encoders.packed import NO_TERMS, Terms, rotate
from jepa_kit.evaluation.features import evaluating
from jepa_kit.recipe import PatchRecipe
from jepa_kit.structures import MaskBatch, PatchSets, View


def attention_weights(encoder: nn.Module, images: Tensor, block: int = -1) -> Tensor:
    """Return the weights softmax(q k^T / sqrt(d)) of a block, over all tokens of each image.

    The fused kernels never write them out, so they are recomputed from the output of the block's projection, with
    rotations and biases if the encoder's ``terms`` has them.

    Args:
        encoder: with ``blocks`` whose ``attn`` has ``qkv`` and ``num_heads``, as ``vit`` has.
        images: [B, C, h, w] float, normalised.
        block: index; the last by default.

    Returns:
        [B, h, k + n, k + n] float32; row i has the weights of token i over all tokens and adds up to 1. The k tokens of
        the prefix are the first.

    Raises:
        ValueError: if the encoder has no such blocks.
    """
    if why := why_no_attention(encoder):
        raise ValueError(why)
    network: Any = encoder
    blocks = network.blocks
    attention: Any = blocks[block].attn
    outputs: list[Tensor] = []
    every: list[Any] = list(blocks)
    compiled = [(b, b.compiled) for b in every if hasattr(b, "compiled")]
    handle = attention.qkv.register_forward_hook(lambda module, given, out: outputs.append(out))
    try:
        for b, _ in compiled:
            b.compiled = False  # a compiled block does not call the hook
        with torch.no_grad(), evaluating(encoder):
            network(images)
            terms = _terms(network, images, block % len(blocks))
    finally:
        handle.remove()
        for b, was in compiled:
            b.compiled = was
    tokens = getattr(encoder, "num_prefix", 0) + _patches(network, images)  # k + n
    qkv = outputs[0][: len(images) * tokens].float().unflatten(-1, (3, attention.num_heads, -1))  # [.., 3, h, d]
    q, k, _ = qkv.unbind(1)
    if terms.rotation is not None:
        q, k = rotate(q, terms.rotation), rotate(k, terms.rotation)
    q, k = (x.unflatten(0, (len(images), -1)).transpose(1, 2) for x in (q, k))  # [B, h, k + n, d]
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if terms.bias is None else scores + terms.bias
    return (scores + causal_mask(scores.shape[-1], scores) if terms.causal else scores).softmax(-1)


def why_no_attention(encoder: nn.Module) -> str | None:
    """Return why there are no weights of an encoder's attention, or None."""
    blocks = getattr(encoder, "blocks", None)
    if isinstance(blocks, nn.ModuleList) and all(hasattr(getattr(b, "attn", None), "qkv") for b in blocks):
        return None
    return f"encoder (={type(encoder).__name__}) must have blocks with attn.qkv, as 'vit' has"


def _terms(encoder: Any, images: Tensor, block: int) -> Terms:
    """Return what the attention of a block (from 0) adds over whole images."""
    if not hasattr(encoder, "terms"):
        return NO_TERMS
    found = encoder.terms(images, None, encoder.embed(images, None)[1])
    return NO_TERMS if found is None else next(itertools.islice(found, block, None))


def _patches(encoder: Any, images: Tensor) -> int:
    p = encoder.patch_size
    return (images.shape[2] // p) * (images.shape[3] // p)


@dataclass(frozen=True, eq=False)
class Guess:
    """A prediction compared with the targets of all patches of many images. Tensors are on the host.

    Args:
        image, patch: the hidden patch that was predicted.
        context: [L] the patches that the prediction was made from, without mask tokens.
        cosine: [B, n] of the prediction with every patch's target, after subtraction of the mean target from both.
        rank: of the true patch by that cosine, from 1.
        total: number of patches, B * n.
        nearest: (image, patch) of the highest cosines in other images, one for each image.
    """

    image: int
    patch: int
    context: Tensor
    cosine: Tensor
    rank: int
    total: int
    nearest: list[tuple[int, int]]


def all_targets(jepa: PatchRecipe, images: Tensor) -> Tensor:
    """Return [B, n, D] float32: the target of every patch of normalised images."""
    encoder: Any = jepa.encoder
    sets = PatchSets.full(len(images), encoder.grid[0] * encoder.grid[1], images.device)
    with torch.no_grad(), evaluating(jepa):
        return jepa.targets_at(images, sets).float().unflatten(0, (len(images), -1))


def predict(jepa: PatchRecipe, images: Tensor, masks: MaskBatch) -> Tensor:
    """Return [P, D] float32: predictions for normalised images, packed as ``masks.targets``, without gradients."""
    with torch.no_grad(), evaluating(jepa):
        return jepa.predict(View(images, masks)).prediction


def guesses(
    jepa: PatchRecipe,
    images: Tensor,
    masks: MaskBatch,
    chosen: Sequence[int],
    nearest: int = 8,
) -> list[Guess]:
    """Compare the prediction of one hidden patch of some images with the targets of all patches of all images.

    Of the hidden patches of an image, the one whose target is farthest from the mean target of its position is taken:
    the most informative. The mean target is subtracted from all targets and predictions, so that cosines compare what
    differs.

    Args:
        jepa: on the images' device.
        images: [B, 3, h, w] float, normalised, all of which are searched.
        masks: of these images.
        chosen: the images whose hidden patches are predicted.
        nearest: number of other images in ``Guess.nearest``.

    Returns:
        one for each of ``chosen``.
    """
    targets = torch.cat([all_targets(jepa, part) for part in images.split(64)])  # [B, n, D]
    predictions, index = predict(jepa, images, masks), masks.targets.index
    centre = targets.mean((0, 1))
    unit = F.normalize(targets - centre, dim=-1)
    unlikely = (targets - targets.mean(0)).square().sum(-1)  # [B, n]
    image_of, shown = masks.targets.image_of_token, masks.context.shown()
    found = []
    for image in chosen:
        own = torch.nonzero(image_of == image)[:, 0]
        token = own[unlikely[image, index[own]].argmax()]
        cosine = unit @ F.normalize(predictions[token] - centre, dim=0)  # [B, n]
        patch = int(index[token])
        best = cosine.max(1)
        others = [i for i in best.values.argsort(descending=True).tolist() if i != image][:nearest]
        context_set = int(masks.context_of[masks.targets.lengths.set_of_token[token]])
        found.append(
            Guess(
                image=image,
                patch=patch,
                context=shown[context_set].cpu(),
                cosine=cosine.cpu(),
                rank=1 + int((cosine > cosine[image, patch]).sum()),
                total=cosine.numel(),
                nearest=[(i, int(best.indices[i])) for i in others],
            )
        )
    return found
