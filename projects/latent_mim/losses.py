"""Latent-MIM's losses: which patch of the image is it, and how alike the tokens of an image are.

S = sets of patches    L = patches of a set    P = patches of all sets    D = width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.distributed.collectives import gather_with_grad
from jepa_kit.losses.distances import Average, averaged
from jepa_kit.registry import LOSSES, check_choice
from jepa_kit.structures import PatchSets, Prediction, at_least_float32


@LOSSES.register("patch_info_nce")
class PatchInfoNCE(nn.Module):
    """Choose the target of each predicted patch among all targets of its set (Wei et al. 2024, arXiv 2407.15837).

    The cross entropy of softmax(cosine / temperature), times 2 * temperature. Negatives are other patches of the same
    image, so the loss depends on no other image. If two targets of a set are equal, it cannot fall to zero.

    Args:
        temperature: of the softmax, above 0.
        standardise: subtract from the predictions of a set their mean, and divide by their deviation plus 1e-4, so that
            what all of them have in common cannot lower the loss.
        average: of the patches' values.

    Raises:
        ValueError: a value is outside its range; or, in a call, a set of one patch, which has no other to choose.
    """

    is_distance = False

    def __init__(self, *, temperature: float = 0.2, standardise: bool = True, average: Average = "images") -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature (={temperature}) must be above 0 and finite")
        check_choice("average", average, Average)
        self.temperature, self.standardise, self.average = temperature, standardise, average

    def forward(self, prediction: Prediction) -> Tensor:
        lengths = prediction.masks.targets.lengths
        if min(lengths) < 2:
            raise ValueError(f"a target set has {min(lengths)} patch: patch_info_nce needs 2 or more in each")
        ours, theirs = prediction.prediction, prediction.target
        if lengths.uniform:
            values = self.values(*(x.unflatten(0, (len(lengths), -1)) for x in (ours, theirs))).flatten()
        else:
            sets = zip(*(x.split(lengths.on_host) for x in (ours, theirs)), strict=True)
            values = torch.cat([self.values(*pair) for pair in sets])
        return averaged(prediction, values, self.average)

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each patch of a set: [..., L, D] twice -> [..., L]."""
        if self.standardise:
            center = prediction.mean(-2, keepdim=True)
            prediction = (prediction - center) / (prediction.std(-2, keepdim=True) + 1e-4)
        with torch.autocast(prediction.device.type, enabled=False):  # half precision would round differences away
            cosines = F.normalize(prediction, dim=-1) @ F.normalize(target, dim=-1).mT  # [..., L, L]
        logits = cosines / self.temperature
        return 2 * self.temperature * (logits.logsumexp(-1) - logits.diagonal(dim1=-2, dim2=-1))


@LOSSES.register("patch_similarity")
class PatchSimilarity(nn.Module):
    """Keep the mean cosine of all pairs of an image's tokens near a goal, by squared differences.

    It is a sum over predictions and context tokens. The mean is over the images of all processes. The goal falls
    from the first number to the last by half a cosine.

    Args:
        goal: first and last goal, each in [-1, 1].

    Raises:
        ValueError: a goal is outside its range.
    """

    is_distance = False

    def __init__(self, *, goal: tuple[float, float] = (0.75, 0.25)) -> None:
        super().__init__()
        if not all(-1 <= value <= 1 for value in goal):
            raise ValueError(f"goal (={goal}) must be two numbers in [-1, 1]")
        self.goal = goal

    def forward(self, prediction: Prediction) -> Tensor:
        first, last = self.goal
        goal = last + (first - last) * (1 + math.cos(math.pi * prediction.where)) / 2
        masks = prediction.masks
        pairs = ((masks.targets, prediction.prediction), (masks.context, prediction.context))
        return torch.stack([(mean_cosine(*pair) - goal).square() for pair in pairs]).sum()


def mean_cosine(patches: PatchSets, tokens: Tensor) -> Tensor:
    """Return the mean cosine of all pairs of tokens of a set, over the sets of all processes: [P, D] -> []."""
    means = patches.pool(F.normalize(at_least_float32(tokens), dim=-1))  # [S, D]
    return gather_with_grad(means.square().sum(-1)).mean()
