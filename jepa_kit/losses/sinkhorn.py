"""Balanced assignments: every class takes the same share of a batch.

N = rows of this process    K = classes
"""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_kit.distributed.collectives import gather_with_grad
from jepa_kit.structures import at_least_float32


@torch.no_grad()
def sinkhorn(log_weights: Tensor, iterations: int) -> Tensor:
    """Return distributions over classes, [..., N, K] -> [..., N, K], that use all classes equally.

    Source: Sinkhorn-Knopp as in SwAV (Caron et al. 2020, arXiv 2006.09882, section 3.1). An iteration divides each
    class by its sum over the rows of all processes, then each row by its sum. Positive weights are given by their
    logarithms, so that none underflows. A factor that all weights share has no effect, so a constant may be
    subtracted from them.

    Args:
        log_weights: scores over a temperature, or log-probabilities; classes are balanced within each leading index.
        iterations: 0 for none: a softmax.

    Raises:
        ValueError: ``iterations`` is negative.
    """
    if iterations < 0:
        raise ValueError(f"iterations (={iterations}) must be 0 or more")
    x = at_least_float32(log_weights)
    for _ in range(iterations):
        of_class = gather_with_grad(x.logsumexp(-2)[None]).logsumexp(0)  # [..., K]
        x = (x - of_class.unsqueeze(-2)).log_softmax(-1)
    return x.softmax(-1)
