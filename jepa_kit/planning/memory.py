"""Compute the memory of a training step on one device by a formula, for each part.

n  tokens of all sets    D  width    F  hidden width of the MLP    h  heads
w  bytes of a number in matrix products: 2 in bf16, 4 in float32; weights, their state and the residual stream have 4

What a block keeps for its backward pass, for each token (attention by a fused kernel, which keeps no scores):

    inputs of the two norms                2 * 4 D        and a mean and a deviation each, 4 * 4
    outputs of the two norms               2 * w D
    q, k, v; output of attention           4 * w D        and a sum for each head, 4 h
    before and after the GELU              2 * w F

The predictor's first block keeps the values before q, k and v once for each context and target token; its last keeps
the values after attention for target tokens, and attention's output a second time for these.

tests/engine/test_memory_of_runs.py compares this with the tensors that torch saves. Workspaces of kernels, buffers of
NCCL, the CUDA context and fragmentation of the allocator need some GB more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor, nn

from jepa_kit.config import Config
from jepa_kit.encoders import ViT
from jepa_kit.encoders.blocks import Block, blocks_of, checkpoint_activations
from jepa_kit.frozen import FrozenNetwork
from jepa_kit.planning.flops import Lengths, model_flops
from jepa_kit.precision import autocast_of
from jepa_kit.predictors import ViTPredictor
from jepa_kit.random_state import seeded
from jepa_kit.recipe import JEPA, Recipe
from jepa_kit.structures import Precision
from jepa_kit.targets import RepresentationTarget
from jepa_kit.trials.recipe_trial import trial_recipe, trial_views

FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Args:
        weights: of encoder, predictor and all other trained parameters, float32.
        gradients: of the same.
        optimizer: its state, such as the two moments of AdamW.
        target_encoder: its weights, and those of all networks that are not trained.
        gathered: whole blocks that FSDP gathers for their computation; 0 without FSDP.
        casts: copies of weights in bf16: autocast keeps them to the end of the forward pass, blocks without
            checkpointing to their backward pass.
        activations: values that the forward pass keeps for the backward pass.
        working: peak of the temporary values of a pass; the roughest of these estimates.
    """

    weights: float
    gradients: float
    optimizer: float
    target_encoder: float
    gathered: float
    casts: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def training_memory(
    jepa: Recipe,
    lengths: Lengths,
    *,
    precision: Precision,
    shards: int = 1,
    accumulate: int = 1,
    checkpointing: bool = False,
    optimizer_states: int = 2,
    kept_per_image: float | None = None,
) -> Memory:
    """Return the memory of one device that processes the images of ``lengths`` at once.

    Args:
        jepa: the recipe; its networks may be on the meta device.
        lengths: of the sets of those images, which are a part of the batch if it is accumulated.
        precision: of the matrix products.
        shards: number of devices over which FSDP shards weights and their state; 1 for a whole copy on each.
        accumulate: parts of a step's batch; with several, FSDP sums whole gradients and scatters them at the end.
        checkpointing: blocks keep their input alone.
        optimizer_states: numbers that the optimiser keeps for each parameter.
        kept_per_image: bytes of activations that an image keeps (``kept_by_an_image``), for a recipe without a formula;
            temporary values are unknown then, and left out.

    Raises:
        ValueError: there is no formula for a network, and no ``kept_per_image``.
    """
    if kept_per_image is None and not has_memory_formula(jepa):
        raise ValueError("the formula for memory is for encoder 'vit' with predictor 'vit' only: give kept_per_image")
    count, target = parameter_counts(jepa)
    frozen = sum(p.numel() for m in jepa.modules() if isinstance(m, FrozenNetwork) for p in m.network.parameters())
    number = 2 if precision == "bf16" else FLOAT32
    if kept_per_image is None:
        kept, working = _activations(cast(JEPA, jepa), lengths, number, checkpointing)
    else:
        kept, working = kept_per_image * lengths.images, 0.0
    matrices = sum(p.numel() for p in jepa.parameters() if p.requires_grad and p.ndim > 1)
    block = max((sum(p.numel() for p in b.parameters()) for b in blocks_of(jepa)), default=0)
    return Memory(
        weights=FLOAT32 * count / shards,
        gradients=FLOAT32 * count / (shards if accumulate == 1 else 1),
        optimizer=optimizer_states * FLOAT32 * count / shards,
        target_encoder=FLOAT32 * (target / shards + frozen),
        # The weights of a block, those of the next one in transfer, and a gradient that waits for its scatter.
        gathered=0 if shards == 1 else 3 * FLOAT32 * block,
        casts=number * (3 * block if shards > 1 else matrices) if number < FLOAT32 else 0,
        activations=kept,
        working=working,
    )


def has_memory_formula(jepa: Recipe) -> bool:
    """Return whether the formula for activations is valid for a recipe."""
    known = isinstance(jepa, JEPA) and isinstance(jepa.predictor, ViTPredictor) and jepa.predictor.angles() is None
    return known and isinstance(jepa.encoder, ViT) and jepa.encoder.is_plain and model_flops(jepa).has_formula


def _activations(jepa: JEPA, lengths: Lengths, number: int, checkpointing: bool) -> tuple[float, float]:
    """Return the bytes that a step keeps for its backward pass, and those of temporary values."""
    encoder, predictor = cast(ViT, jepa.encoder), cast(ViTPredictor, jepa.predictor)
    flops = model_flops(jepa)
    context, sequences = int(lengths.context.sum()), int(lengths.sequences.sum())
    seen, targets = int(flops.seen(lengths).sum()), int(lengths.targets.sum())
    kept = _network(encoder.blocks, context, number, checkpointing)
    kept += _network(predictor.blocks, sequences, number, checkpointing, context + targets, targets)
    kept += _ends(encoder, predictor, lengths, number)
    if flops.targets_trained:  # and the encoder's norm and a LayerNorm over the targets of each of its layers
        layers = len(cast(RepresentationTarget, jepa.target).numbers(encoder.depth))
        kept += _network(encoder.blocks, seen, number, checkpointing) + seen * _ends_of(encoder, number)
        kept += (layers - 1) * seen * _norm(encoder) + layers * targets * _norm(encoder)
    working = max(
        _working(encoder.blocks, context, number, checkpointing),
        _working(predictor.blocks, sequences, number, checkpointing),
        _working(encoder.blocks, seen, number, False),
    )
    return kept, working


def kept_by_an_image(config: Config, *, precision: Precision, checkpointing: bool = False, images: int = 8) -> float:
    """Return the bytes that a training step keeps for its backward pass, for each image, as torch saves them here.

    For recipes without a formula: it runs the forward pass of a few images on the CPU.

    Args:
        config: of the recipe.
        precision: of the matrix products.
        checkpointing: blocks keep their input alone.
        images: number of images of the trial.
    """
    jepa = trial_recipe(config, torch.device("cpu"), attention="sdpa")
    if checkpointing:
        checkpoint_activations(jepa)
    views = trial_views(config, torch.device("cpu"), images)
    own = {x.untyped_storage().data_ptr() for x in (*jepa.parameters(), *jepa.buffers(), *(v.images for v in views))}
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x  # held, so that no address is used twice
        return x

    autocast = autocast_of(precision, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), seeded(0), autocast():
        out = jepa(*views)
    total = sum(x.untyped_storage().nbytes() for x in found.values())
    del out
    return total / images


def parameter_counts(jepa: Recipe) -> tuple[int, int]:
    """Return the number of trained parameters, and that of the others: target encoder, heads that follow."""
    counts = dict.fromkeys((True, False), 0)
    for p in jepa.parameters():
        counts[p.requires_grad] += p.numel()
    return counts[True], counts[False]


def _sizes(blocks: nn.ModuleList) -> Iterator[tuple[int, int, int]]:
    """Yield (D, F, h) of each block."""
    for block in blocks:
        assert isinstance(block, Block)
        yield block.norm1.normalized_shape[0], block.mlp.fc1.out_features, block.attn.num_heads


def _before(d: int, number: int) -> float:
    """Return the bytes that a block keeps per token of the values before q, k and v."""
    return FLOAT32 * d + 8 + number * d


def _after(d: int, f: int, number: int) -> float:
    """Return the bytes that a block keeps per token of the values after attention."""
    return FLOAT32 * d + 8 + number * d + 2 * number * f


def _block(d: int, f: int, h: int, number: int) -> float:
    """Return the bytes that a block keeps per token."""
    return _before(d, number) + 4 * number * d + FLOAT32 * h + _after(d, f, number)


def _network(
    blocks: nn.ModuleList,
    tokens: int,
    number: int,
    checkpointing: bool,
    first: int | None = None,
    last: int | None = None,
) -> float:
    """Return the bytes that blocks keep for their backward pass.

    Args:
        first: tokens at the first block's input, if some are in several sets.
        last: tokens that the last block returns, if not all.
    """
    sizes = list(_sizes(blocks))
    (d, _, _), (e, f, _) = sizes[0], sizes[-1]
    more = 0 if first is None else first - tokens  # at the first block's input
    if checkpointing:
        return float(sum(tokens * FLOAT32 * d for d, _, _ in sizes) + more * FLOAT32 * d)
    kept = float(sum(tokens * _block(*size, number) for size in sizes)) + more * _before(d, number)
    if last is not None:
        kept += (last - tokens) * _after(e, f, number) + last * number * e
    return kept


def _working(blocks: nn.ModuleList, tokens: int, number: int, checkpointing: bool) -> float:
    """Return the bytes of gradients and outputs of one block at once: two of width D and two of the MLP's hidden width.

    A checkpointed block is recomputed, and keeps all its values meanwhile.
    """
    again = max(tokens * _block(*size, number) for size in _sizes(blocks)) if checkpointing else 0.0
    return again + max(tokens * (2 * FLOAT32 * d + 2 * number * f) for d, f, _ in _sizes(blocks))


def _ends(encoder: ViT, predictor: ViTPredictor, lengths: Lengths, number: int) -> float:
    """Return the bytes kept before the first block, after the last and in the loss."""
    context, targets = int(lengths.context.sum()), int(lengths.targets.sum())
    d, e, out = encoder.embed_dim, predictor.width, predictor.proj.out_features
    predicted = FLOAT32 * e + 8 + number * e  # the predictor's norm, and its last map's input
    in_loss = 2 * FLOAT32 * out  # prediction and target
    return context * (_ends_of(encoder, number) + number * d) + targets * (predicted + in_loss)


def _ends_of(encoder: ViT, number: int) -> float:
    """Return the bytes kept per token of its pixels and the input of the last norm."""
    return number * encoder.patch_embed.proj.weight[0].numel() + _norm(encoder)


def _norm(encoder: ViT) -> float:
    """Return the bytes kept per token by a LayerNorm: its input, mean and deviation."""
    return FLOAT32 * encoder.embed_dim + 8
