"""The head on the encoder's own tokens, set by set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jepa_kit.maskers import InPlace, Random
from jepa_kit.predictors import TokenPredictor
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import MaskBatch, PatchSets

DIM, OUT = 12, 7


def whole_images() -> MaskBatch:
    return InPlace(grid=(4, 6), masker={"name": "multiblock", "num_targets": 2})(np.arange(4), seed=0, epoch=0)


def parts_of_images() -> MaskBatch:
    """Contexts that are not whole images, in an order of their own, and two targets of one of them."""
    context = PatchSets.pack([torch.tensor(x) for x in ([5, 3, 20], [7, 1, 2, 23, 9])], torch.tensor([1, 0]))
    context = replace(context, hidden=torch.tensor([True, False, True, True, False, True, True, False]))
    targets = PatchSets.pack([torch.tensor(x) for x in ([2, 23], [20, 5], [7])], torch.tensor([0, 1, 0]))
    return MaskBatch(context, targets, (4, 6), torch.tensor([1, 0, 1]))


def unmarked() -> MaskBatch:
    """Whole images whose lengths are not marked as such, as those of a batch that was split."""
    masks = whole_images()
    lengths = SetLengths(masks.context.lengths.on_host)
    return replace(masks, context=replace(masks.context, lengths=lengths))


@pytest.mark.parametrize("hidden", [None, 9])
@pytest.mark.parametrize("make_masks", [whole_images, parts_of_images, unmarked])
def test_a_prediction_is_a_map_of_the_token_of_that_patch(make_masks: Any, hidden: int | None) -> None:
    torch.manual_seed(0)
    head, masks = TokenPredictor(embed_dim=DIM, out_dim=OUT, hidden=hidden).double(), make_masks()
    for p in head.parameters():
        torch.nn.init.normal_(p)
    context = torch.randn(masks.context.num_patches, DIM, dtype=torch.float64)
    tokens, index = context.split(masks.context.lengths.on_host), [x.tolist() for x in masks.context.split()]
    expected = []
    for target, c in zip(masks.targets.split(), masks.context_of.tolist(), strict=True):
        x = tokens[c][[index[c].index(patch) for patch in target.tolist()]]
        if head.fc is not None:
            x = F.gelu(x @ head.fc.weight.T + head.fc.bias)
        expected.append(x @ head.proj.weight.T + head.proj.bias)
    torch.testing.assert_close(head(context, masks), torch.cat(expected), rtol=0, atol=1e-12)


def test_first_weights() -> None:
    head = TokenPredictor(embed_dim=200, out_dim=300)
    assert float(head.proj.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert not head.proj.bias.any()


def test_targets_that_the_encoder_does_not_see() -> None:
    masks = Random(grid=(4, 6))(np.arange(2), seed=0, epoch=0)
    with pytest.raises(ValueError) as error:
        TokenPredictor(embed_dim=DIM, out_dim=OUT)(torch.zeros(masks.context.num_patches, DIM), masks)
    assert str(error.value) == (
        "a target patch is not in its context: predictor 'tokens' needs masker {name: in_place, ...}"
    )


def test_refuses_a_hidden_layer_without_a_unit() -> None:
    with pytest.raises(ValueError, match=r"^hidden \(=0\) must be at least 1, or null for one linear map$"):
        TokenPredictor(embed_dim=DIM, out_dim=OUT, hidden=0)
