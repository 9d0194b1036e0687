"""A checkout of the released I-JEPA code (github.com/facebookresearch/ijepa) as a contender of bench_step.py.

The checkout (CC-BY-NC 4.0) is the user's; none of its code is here. It must have
``vit_*`` and ``vit_predictor`` in ``src.models.vision_transformer``, ``src.masks.utils.apply_masks``,
``encoder(images, masks)`` and ``predictor(z, context, targets)``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from steps import WIDTH, Setting, predictor_depth
from torch import Tensor, nn

from jepa_kit.encoders import SIZES
from jepa_kit.interop.official import predictor_name_to_official
from jepa_kit.recipe import JEPA
from jepa_kit.structures import MaskBatch

Masks = tuple[list[Tensor], list[Tensor]]
"""Patch numbers [B, L] of each context and of each target block."""


def uniform_masks(masks: MaskBatch) -> Masks:
    """Masks as the release takes them.

    Raises:
        ValueError: sets of different lengths.
    """
    context, targets = masks.context, masks.targets
    if not (context.uniform and targets.uniform):
        raise ValueError("the released code takes sets of one length: --masks uniform")
    rows = targets.index.view(-1, len(context), targets.lengths.longest)  # [M, B, L_t]
    return [context.index.view(len(context), -1)], list(rows)


class Reference(nn.Module):
    """The equations with the networks of the checkout at ``path``, and our weights.

    Raises:
        ValueError: no such code at ``path``.
    """

    def __init__(self, path: str, s: Setting, ours: JEPA) -> None:
        super().__init__()
        if not (Path(path) / "src" / "models" / "vision_transformer.py").is_file():
            raise ValueError(f"--reference (={path}) has no src/models/vision_transformer.py: it must be a checkout")
        sys.path.insert(0, path)
        networks = importlib.import_module("src.models.vision_transformer")
        self.apply_masks = importlib.import_module("src.masks.utils").apply_masks
        make = getattr(networks, f"vit_{s.size}")
        with torch.device(s.device):
            self.encoder, self.target_encoder = (
                make(patch_size=s.patch_size, img_size=[s.image_size]) for _ in range(2)
            )
            self.predictor = networks.vit_predictor(
                num_patches=ours.encoder.num_patches,
                embed_dim=SIZES[s.size].embed_dim,
                predictor_embed_dim=WIDTH,
                depth=predictor_depth(s.size),
                num_heads=SIZES[s.size].num_heads,
            )
        self.to(s.device)
        for name in ("encoder", "target_encoder"):
            _load(getattr(self, name), getattr(ours, name).state_dict())
        state = {predictor_name_to_official(k): v for k, v in ours.predictor.state_dict().items()}
        _load(self.predictor, state)
        self.target_encoder.requires_grad_(False)

    def forward(self, images: Tensor, context: list[Tensor], targets: list[Tensor]) -> Tensor:
        with torch.no_grad():
            h = self.target_encoder(images)
            s_y = self.apply_masks(F.layer_norm(h, (h.shape[-1],)), targets)
        return F.smooth_l1_loss(self.predictor(self.encoder(images, context), context, targets), s_y)


def _load(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy weights, except position tables."""
    own = network.state_dict()
    shaped = {name: value.view(own[name].shape) for name, value in state.items()}
    missing, _ = network.load_state_dict(shaped, strict=False)
    strange = [name for name in missing if "pos_embed" not in name]
    if strange:
        raise ValueError(f"the released code has weights that are unknown here: {', '.join(strange)}")
